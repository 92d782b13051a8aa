"""Formulas by hand; ranks and rows change nothing; killed runs end like others; bad input costs nothing."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import ranks as processes
from tests.ranks import launch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
from tokenizer import CHAT_TEMPLATE, render_chat
import model
import ssm_scan
import train_sft as t
from model import PRESETS, FalconH1, read_safetensors

ROOT = Path(__file__).parent.parent
TIMES = ("seconds", "idle", "t_sample", "t_score", "t_update", "t_verify")
TOKENIZER = data.Tokenizer.byte_level()
SMALL_RUN = ("--batch", 6, "--held-out", 4, "--steps", 6, "--eval-every", 100, "--save-every", 2)

@pytest.fixture(scope="module")
def sft_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    assert data.main(["make", "--out", str(folder), "--sft", "60", "--rl", "40", "--heldout", "10"]) == 0
    return folder / "sft.jsonl"

@pytest.fixture(scope="module")
def small_models(tmp_path_factory):
    """Models whose heads 2 or 4 ranks can share; keys, values, B and C evenly, or a copy for each head."""
    folder = tmp_path_factory.mktemp("init")
    heads = {"num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 2, "mamba_n_heads": 12,
             "mamba_d_head": 8}
    for name, groups in (("even", 2), ("uneven", 3)):
        torch.manual_seed(0)
        config = replace(PRESETS["tiny"], initializer_range=0.02, num_hidden_layers=2, **heads)
        FalconH1(replace(config, mamba_n_groups=groups)).save_pretrained(folder / name)
        TOKENIZER.save(folder / name)
    return [folder / "even", folder / "uneven"]

@pytest.fixture
def small_run(sft_file, tmp_path):
    """Its command line; a flag that is given again replaces the first one."""
    return ("--data", sft_file, "--out", tmp_path / "run", *SMALL_RUN)

@pytest.fixture(scope="module")
def whole_run(sft_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    result = launch(t.main, "--data", sft_file, "--out", out, *SMALL_RUN)
    assert "sample: " in result.out and "left" in result.out
    return out

def refused(main, args, monkeypatch, capsys):
    """Run a script's main in this process; it must end in one line and exit status 1. Returns the line."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, args)])
    status, err = t.run_main(main), capsys.readouterr().err
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, err
    return err

def read_log(out):
    """The records of a run's log, without what depends on the clock."""
    records = [json.loads(line) for line in open(out / "log.jsonl")]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]

def assert_same_weights(one, other):
    a, b = (read_safetensors(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def assert_same_run(one, other):
    """Two runs end in the same weights and have the same log, bit for bit."""
    assert_same_weights(one / "model", other / "model")
    assert read_log(one) == read_log(other)

# 1. Formulas ------------------------------------------------------------------------------------------------

def test_learning_rate_by_hand():
    rates = [t.learning_rate(step, 10, 1.0, 0.2) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert t.learning_rate(0, 1, 1.0, 0.04) == 1.0

def test_loss_divisors_by_hand():
    """Rows of weight 6, 1 and 2, then a dummy: dealt out in turn, ranks 0 and 1 of two get 6 + 2 and 1."""
    packs = [data.Pack(None, None, np.array(w, np.float32), None, []) for w in ([1.5, 4.5], [0, 1], [2], [0])]
    def divisors(normalise, world, **kinds):
        return [t.loss_divisor(packs, t.Ranks(rank, world, **kinds), normalise) for rank in range(world)]
    assert divisors("batch", 1) == divisors("rank", 1) == [9] and divisors("batch", 2) == [9, 9]
    assert divisors("rank", 2) == [2 * 8, 2 * 1]
    assert divisors("rank", 4, cp=2) == [16, 16, 2, 2]  # ranks that share their rows are one
    assert divisors("rank", 2, replicas=2) == [16, 2]
    assert divisors("rank", 4) == [24, 4, 8, 1]  # the rank with the dummy: 0 / 1 is no NaN
    with pytest.raises(ValueError, match="no token to learn from"):
        t.loss_divisor(packs[3:], t.Ranks(), "rank")

def test_vectors_do_not_decay():
    model = FalconH1(PRESETS["tiny"])
    matrices, vectors = t.make_optimizer(model, 1.0, 0.01).param_groups
    assert matrices["weight_decay"] == 0.01 and vectors["weight_decay"] == 0
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))
    assert all(p.dim() == 1 for p in vectors["params"]) and len(vectors["params"]) == 3 * 7 + 1

def test_heads_of_ranks():
    def lists(*args):
        return [part.tolist() for part in t.split_heads(*args)]
    assert lists(4, 2, 2) == [[[0, 1], [2, 3]], [[0], [1]]]
    assert lists(4, 4, 2) == [[[0], [1], [2], [3]], [[0], [0], [1], [1]]]
    assert lists(12, 4, 3)[1] == [[0, 0, 0], [0, 1, 1], [1, 1, 2], [2, 2, 2]]  # uneven: one for every head
    own, read = t.split_heads(4, 2, 1)
    index, sizes = t.gather_index([(4, 2, own), (1, 3, read)])  # heads of 2 columns, then a group of 3
    assert index.tolist() == [[0, 1, 2, 3, 8, 9, 10], [4, 5, 6, 7, 8, 9, 10]] and sizes == [4, 3]

# 2. What a step asks of a GPU -------------------------------------------------------------------------------

class Traffic(TorchDispatchMode):
    """What passes between the host and a GPU, for which "meta" stands in. copies: to the GPU. reads: from it,
    for which the host waits; an operator whose result has a shape that only the GPU knows cannot run at all.
    created: the size of each tensor that is new there, neither a view nor changed in place."""

    def __init__(self):
        super().__init__()
        self.copies, self.reads, self.created = 0, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        there = any(v.is_meta for v in given)
        copies = function is torch.ops.aten._to_copy.default
        if there and copies and kwargs.get("device") == torch.device("cpu"):
            self.reads += 1
            return torch.ones(args[0].shape, dtype=args[0].dtype)
        if there and function is torch.ops.aten._local_scalar_dense.default:
            self.reads += 1
            return 1.0
        out = function(*args, **(kwargs or {}))
        owned = {v.untyped_storage()._cdata for v in given}
        new = [v for v in tree_leaves(out) if isinstance(v, torch.Tensor) and v.is_meta]
        new = [v.numel() for v in new if v.untyped_storage()._cdata not in owned]
        self.created += new
        if function is torch.ops.aten.copy_.default:
            self.copies += args[0].is_meta and not args[1].is_meta
        else:
            self.copies += copies and not there and len(new)
        return out

def traffic_of(step, monkeypatch):
    """Of a step, when the tables of its rows have been made. Operators are a GPU's; "meta" runs no kernel."""
    monkeypatch.setattr(ssm_scan, "_backend", lambda name, x: "triton")
    monkeypatch.setattr(ssm_scan, "_launch", lambda *args, **options: None)
    for _ in range(2):
        with Traffic() as traffic:
            step()
    return traffic

def model_of_a_gpu(layers=3):
    with torch.device("meta"):
        return FalconH1(replace(PRESETS["tiny"], num_hidden_layers=layers)).to(torch.bfloat16)

def step_of_a_gpu(rows=1, layers=3):
    """A training step on rows of three documents, to be called."""
    ids, cu = np.arange(200), np.array([0, 70, 120, 200], np.int32)
    packs = [data.Pack(ids, ids, np.ones(200, np.float32), cu, []) for _ in range(rows)]
    model = model_of_a_gpu(layers)
    return partial(t.train_step, model, torch.optim.SGD(model.parameters()), packs, 0, 1.0, t.Ranks())

@pytest.mark.parametrize("rows", [1, 4])
def test_a_step_waits_for_the_gpu_once(rows, monkeypatch):
    step = step_of_a_gpu(rows)
    traffic = traffic_of(step, monkeypatch)
    assert (traffic.reads, traffic.copies) == (1, 2 * rows)  # loss and norm; ids and targets, weights
    for table in [*vars(model).values(), *vars(ssm_scan).values()]:
        if hasattr(table, "cache_clear"):
            table.cache_clear()
    with Traffic() as traffic:
        step()
    # And what the mixers know of these documents. The table of chunks, two more copies, is made inside of
    # operators, which "meta" does not run.
    assert traffic.reads == 1 and 2 * rows < traffic.copies <= 2 * rows + 2

def test_a_held_out_loss_is_read_once(monkeypatch):
    model, sample = model_of_a_gpu(), data.Sample(np.arange(200), np.arange(200) > 9, 1.0, "math")
    args = t.Args(pack_tokens=200, steps=1)
    run = partial(t.evaluate, model, None, [sample] * 3, args, t.Ranks(rank=1, device="cuda"), 1)
    monkeypatch.setattr(t.Ranks, "local_rows", lambda self, packs: packs)
    traffic = traffic_of(run, monkeypatch)
    assert (traffic.reads, traffic.copies) == (1, 2 * 3)

def test_a_block_creates_no_more_tensors_than_it_did(monkeypatch):
    """At least as large as the hidden states, forward and backward; those inside of kernels are not seen."""
    created = {n: traffic_of(step_of_a_gpu(layers=n), monkeypatch).created for n in (3, 1)}
    large = {n: sum(size >= 200 * 96 for size in sizes) for n, sizes in created.items()}
    assert large[3] - large[1] <= 2 * 118, large

# 3. Ranks and rows change nothing ---------------------------------------------------------------------------

def test_the_split_into_rows_changes_nothing(sft_file):
    torch.manual_seed(0)
    model = FalconH1(PRESETS["tiny"])
    samples = [*t.SftFiles(str(sft_file), TOKENIZER, 512, limit=9)]

    def gradients(packs, world=1):
        model.zero_grad()
        loss_of = partial(t.sft_loss, model, total_weight=t.total_loss_weight(packs))
        ranks = [t.Ranks(r, world) for r in range(world)]
        loss = sum(float(t.accumulate_gradients(model, packs, rank, loss_of)) for rank in ranks)
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()]) / world

    loss, grad = gradients(data.pack(samples, 4096))
    # By definition: every sample by itself, all token losses weighted and divided by all weights.
    weighted, weights = 0.0, 0.0
    for s in samples:
        ids = torch.tensor(s.ids.astype(np.int64))
        logprobs = model(ids[None]).log_softmax(-1)[0, :-1].gather(1, ids[1:, None])[s.mask[1:], 0].detach()
        weighted -= s.weight * float(logprobs.sum())
        weights += s.weight * len(logprobs)
    assert loss == pytest.approx(weighted / weights, rel=1e-6)
    for capacity, world in ((512, 1), (200, 1), (4096, 2), (300, 4), (4096, 16)):
        other, theirs = gradients(data.pack(samples, capacity, world), world)
        assert other == pytest.approx(loss, rel=1e-6)
        assert (theirs - grad).norm() / grad.norm() < 1e-6

def test_a_mean_per_rank_weighs_the_batchs_gradient_by_known_factors(sft_file, small_models):
    """(W_1 + W_2) / (2 W_r) times rank r's share of it; also if a rank has a dummy row and adds nothing."""
    body = partial(processes.compare_normalisations, small_models[0], str(sft_file))
    results = launch(body, ranks=2)
    assert results[0].out.count("a mean per rank: ") == 2

@pytest.mark.parametrize(("world", "settings"), [
    (2, [(1, 1, 120), (1, 2, 4096), (2, 1, 4096)]),
    (4, [(1, 1, 4096), (2, 2, 300), (2, 1, 120), (4, 1, 120)])])
def test_ranks_compute_the_gradient_of_one_process(sft_file, small_models, world, settings):
    """Settings are cp, replicas, tokens of a row: at 4,096 each rank or team has one row, at 120 it adds up
    three or more. Documents are uneven, and where rows are short, activations are recomputed."""
    body = partial(processes.compare_gradients, small_models, str(sft_file), settings)
    results = launch(body, ranks=world)
    assert results[0].out.count("loss off by") == len(settings) + 1  # the last one on both models

def test_runs_of_other_ranks_are_the_same_run(sft_file, small_models, tmp_path):
    """Four ranks, two to a row, two replicas, train like one process; one and two go on from there.
    Data are several files, a mixture, trimmed. While ranks train, none keeps a copy of the model."""
    lines = [json.loads(line) for line in sft_file.read_text().splitlines()]
    for i, domain in enumerate(["math", "code", "science"]):
        part = [line | {"domain": domain} for line in lines[20 * i : 20 * i + 20]]
        data.write_jsonl(tmp_path / f"part-{i}.jsonl", part)
    args = ("--data", tmp_path / "part-*.jsonl", "--mixture", "math=3,code=2,science=1", "--context", 55,
            "--trim", "--init", small_models[0], *SMALL_RUN, "--steps", 4, "--eval-every", 3, "--seed", 1)
    launch(t.main, *args, "--out", tmp_path / "one")
    body = partial(processes.count_copies, "train_sft", 0)
    four = launch(body, *args, "--out", tmp_path / "four", "--cp", 2, "--replicas", 2, ranks=4)
    assert all("made 2 copies" in r.out for r in four)
    expected = read_log(tmp_path / "one")
    assert 0 < sum(r["trimmed"] for r in expected) < 24 and all(r["tokens"] <= 6 * 55 for r in expected)

    logs = [read_log(tmp_path / "four")]
    for ranks in (1, 2):
        out = tmp_path / f"then {ranks}"
        shutil.copytree(tmp_path / "four", out)
        shutil.rmtree(out / "trainer" / "step-000000004")
        launch(t.main, *args, "--out", out, ranks=ranks)
        logs.append(read_log(out))
    for log in logs:
        for theirs, ours in zip(log, expected, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-6 if ours["step"] == 1 else 1e-4)

@pytest.mark.parametrize(("body", "flags", "error"), [
    (t.main, ("--cp", 3), "--cp 3: it must divide the number of ranks, 2"),
    (t.main, ("--replicas", 3), "--replicas 3: it must divide the number of ranks, 2"),
    (t.main, ("--cp", 2), "--cp 2: num_attention_heads 3 is not a multiple of it"),
    (partial(processes.altered, "seeds"), (), "ranks 0 and 1 disagree about the arguments: "),
    (partial(processes.altered, "files"), (), "ranks 0 and 1 disagree about the data: ")])
def test_ranks_that_cannot_train_together(small_run, tmp_path, body, flags, error):
    results = launch(body, *small_run, *flags, ranks=2, status=1)
    assert all(f"error: {error}" in result.err for result in results) and not (tmp_path / "run").exists()

def test_a_dead_rank_ends_the_run(small_run, tmp_path):
    """torchrun ends the others at once, with status 1. By hand, the dead rank's connections fail."""
    program = tmp_path / "program.py"
    program.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.ranks import *\n"
                       "train_sft.run_main(lambda: die_at('train_sft', 'log of step 3', rank=1))")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program]
    torchrun = subprocess.Popen([*command, *map(str, small_run)], stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    body = partial(processes.die_at, "train_sft", "log of step 3")
    results = launch(body, *small_run, "--out", tmp_path / "by-hand", ranks=2, status=None)
    assert results[0].status == -9 and results[1].status == 1
    assert results[1].err == "error: another rank has ended, and so does this one\n"
    err = torchrun.communicate(timeout=60)[1]
    assert torchrun.returncode == 1 and "rank      : 1" in err and "SIGKILL" in err, err

def test_a_mistake_that_one_rank_finds_is_no_traceback_of_the_others(small_run, tmp_path):
    (tmp_path / "run").write_text("a file")
    first, other = launch(t.main, *small_run, ranks=2, status=1)
    assert "File exists" in first.err and first.err.count("\n") == 1
    assert other.err == "error: another rank has ended, and so does this one\n"

def test_a_missing_rendezvous(small_run, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert "MASTER_ADDR expected, but not set" in refused(t.main, small_run, monkeypatch, capsys)

# 4. The run's folder ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("moment", "every"), [
    ("log of step 4", 2), ("step-000000004.tmp/state.json", 2), ("model/tokenizer.json", 2),
    ("log of step 6", 6), ("log of step 3", 6)])  # the last one: before the first checkpoint
def test_a_killed_run_ends_like_one_that_was_not(small_run, tmp_path, whole_run, moment, every):
    args = (*small_run, "--save-every", every)
    launch(partial(processes.die_at, "train_sft", moment), *args, status=-9)
    launch(t.main, *small_run, "--save-every", 3)
    assert_same_run(whole_run, tmp_path / "run")
    assert not list(tmp_path.rglob("*.tmp"))  # half of step 4, which is not saved again

def test_training_goes_on_while_a_checkpoint_is_written(small_run, tmp_path, monkeypatch):
    log, export, logged = tmp_path / "run" / "log.jsonl", t.export, []

    def slow(*args):  # the first checkpoint, of step 2, is not complete before step 3 is logged
        deadline = time.monotonic() + 20
        while len(log.read_text().splitlines()) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        logged.append(len(log.read_text().splitlines()))
        export(*args)

    monkeypatch.setattr(t, "export", slow)
    monkeypatch.setattr(sys, "argv", ["script", *map(str, small_run)])
    assert t.run_main(t.main) == 0
    assert logged[0] == 3 and len(logged) == 3
    assert len(list(log.with_name("trainer").iterdir())) == 2  # the last two are kept

def test_exporting_holds_no_more_than_a_tensor(tmp_path, whole_run):
    with torch.profiler.profile(profile_memory=True) as profiler:
        t.export(PRESETS["tiny"], TOKENIZER, whole_run / "trainer" / "step-000000006", tmp_path)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max()
    assert_same_weights(whole_run / "model", tmp_path)
    sizes = [v.nbytes for v in read_safetensors(tmp_path / "model.safetensors").values()]
    assert peak <= 2.1 * max(sizes) < sum(sizes) / 2

def test_exports_hold_what_servers_read(tmp_path, whole_run):
    """Ids, template and settings of the folder to start from; of a new model, those of its tokenizer."""
    def exported(name, start):
        config, tokenizer = t.load_config(start), data.load_tokenizer(start)
        t.export(config, tokenizer, whole_run / "trainer" / "step-000000006", tmp_path / name)
        files = {path.name: path.read_text() for path in (tmp_path / name).glob("*[aon]")}  # but for weights
        return files, *(json.loads(files[f"{kind}config.json"]) for kind in ("", "generation_"))
    ids = {"bos_token_id": 257, "eos_token_id": 260, "pad_token_id": 256}
    files, config, generation = exported("first", whole_run)
    assert config.items() >= ids.items() and generation == ids | {"eos_token_id": [260, 258]}
    assert files == exported("again", tmp_path / "first")[0]
    assert t.load_config(tmp_path / "first") == PRESETS["tiny"]  # so train_rl.py takes its defaults
    for name, change in {"config": {"pad_token_id": 0}, "generation_config": {"top_p": 0.95}}.items():
        path = tmp_path / "first" / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (tmp_path / "first" / "chat_template.jinja").write_text(CHAT_TEMPLATE + "é")
    files, config, generation = exported("last", tmp_path / "first")
    assert config["pad_token_id"] == 0 and files["chat_template.jinja"] == CHAT_TEMPLATE + "é"
    assert generation == ids | {"eos_token_id": [260, 258], "top_p": 0.95}

def test_a_full_disk_costs_nothing_but_the_step(small_run, tmp_path, whole_run):
    full = launch(partial(processes.altered, "full disk"), *small_run, status=1)
    assert full.err.startswith(f"error: {tmp_path / 'run'}: step 2 could not be saved"), full.err
    assert full.err.count("\n") == 1 and not list(tmp_path.rglob("*.tmp"))
    assert full.err.endswith("give the same command again\n")
    fresh = launch(partial(processes.altered, "full disk"), *small_run, "--fresh", status=1)
    assert fresh.err.endswith("again, without --fresh\n")  # it would delete what was saved
    launch(t.main, *small_run)
    assert_same_run(whole_run, tmp_path / "run")

@pytest.mark.parametrize("damage", [lambda content: content[:-7], lambda content: content[:-1] + b"\x99"])
def test_a_damaged_checkpoint_is_passed_over(small_run, tmp_path, whole_run, damage):
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    largest = max((out / "trainer" / "step-000000006").iterdir(), key=lambda p: p.stat().st_size)
    largest.write_bytes(damage(largest.read_bytes()))
    (out / "log.jsonl").write_text((out / "log.jsonl").read_text()[:-9])  # as a power cut may leave it
    result = launch(t.main, *small_run)
    assert "step-000000006: not a whole checkpoint" in result.err and "continuing after step 4" in result.out
    assert_same_run(whole_run, out)

def test_a_run_starts_over_if_all_checkpoints_are_damaged(small_run, tmp_path, whole_run):
    """The first new checkpoint has a lower number than the damaged ones, and must stay."""
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    for state in out.glob("trainer/*/state.json"):
        state.unlink()
    launch(t.main, *small_run)
    assert_same_run(whole_run, out)
    assert [path.name for path in sorted(out.glob("trainer/*"))] == ["step-000000004", "step-000000006"]

def test_an_export_that_fails_is_not_a_checkpoint_that_fails(small_run, tmp_path, monkeypatch, capsys):
    def export(*args):
        raise OSError("model.safetensors: could not be written: No space left on device")
    monkeypatch.setattr(t, "export", export)
    expected = "error: model.safetensors: could not be written: No space left on device\n"
    assert refused(t.main, small_run, monkeypatch, capsys) == expected
    assert (tmp_path / "run" / "trainer" / "step-000000002" / "state.json").exists()

def test_ctrl_c_is_no_traceback(capsys):
    def body():
        raise KeyboardInterrupt
    assert t.run_main(body) == 130 and capsys.readouterr().err == "interrupted\n"

def test_too_little_memory_is_one_line(capsys):
    def body():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ...")
    assert t.run_main(body) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB: take --checkpoint-activ")
    assert error.count("\n") == 1

def test_fewer_rows_than_a_batch_are_named(capsys):
    t.check_enough("a.jsonl", 12, 2, 10, quiet=False)
    t.check_enough("a.jsonl", 12, 3, 10, quiet=True)
    assert not capsys.readouterr().out
    t.check_enough("a.jsonl", 12, 3, 10, quiet=False)
    assert "warning: a.jsonl: 9 rows to learn from; a batch of 10 draws" in capsys.readouterr().out

@pytest.mark.parametrize(("args", "message"), [
    (("--steps", 7), "holds another run, with --steps 6"),
    (("--init", "{init}", "--pack-tokens", 4096, "--context", 1024), "holds another run, with --init ''"),
    (("--fresh", "--data", "{bad}"), "bad.jsonl, line 2"),
    (("--fresh", "--init", "{out}"), "holds the model of --init"),
    (("--fresh", "--data", "{empty}"), "empty.jsonl"),
    (("--fresh", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
    (("--fresh", "--context", 50), "the limit is 50"),
    (("--fresh", "--init", "nowhere", "--data", "nowhere.jsonl"), "error: nowhere"),
    (("--fresh", "--preset", "huge"), "--preset huge"),
    (("--fresh", "--mixture", "math"), "--mixture 'math'"),
    (("--fresh", "--mixture", "math=1, math=2"), "it names a domain twice"),
    (("--fresh", "--mixture", "math=1,code=1", "--data", "{rare}"), "no sample of code is left to draw from"),
    (("--fresh", "--held-out", 60), "has 60 rows, --held-out 60 keeps them all"),
    (("--fresh", "--save-every", 0), "--save-every 0: must be at least 1"),
    (("--fresh", "--limit", -1), "--limit -1: must be at least 0"),
    (("--fresh", "--lr", "nan"), "--lr nan: must be at least 0"),
    (("--fresh", "--clip", "inf"), "--clip inf: must be at least 0, and finite"),
    (("--fresh", "--normalise", "token"), "--normalise token: expected batch or rank"),
    (("--fresh", "--warmup", 200), "--warmup 200: it is a share of the steps, at most 1"),
    (("--fresh", "--context", 8193), "--context 8193 exceeds max_position_embeddings 8192"),
    (("--fresh", "--context", 900, "--pack-tokens", 800), "--pack-tokens must be at least --context, 900"),
    (("--fresh", "--device", "cuda"), "no GPU"),
    (("--fresh", "--device", "cuda:3"), "--device cuda:3: expected cpu or cuda"),
    (("--stpes", 3), "unrecognized arguments: --stpes 3; see --help"),
])
def test_bad_input_costs_nothing(sft_file, small_run, tmp_path, whole_run, small_models, args, message,
                                 monkeypatch, capsys):
    """It is one line, and all files of the run are untouched."""
    if "cuda" in args and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    rows = [json.loads(line) for line in sft_file.read_text().splitlines()]
    (tmp_path / "bad.jsonl").write_text(json.dumps(rows[0]) + "\n{\n")
    (tmp_path / "empty.jsonl").write_text("")
    data.write_jsonl(tmp_path / "rare.jsonl", [rows[0] | {"domain": "code"}, *rows[1:]])  # which is held out
    paths = {"init": small_models[0], "out": whole_run} | {path.stem: path for path in tmp_path.iterdir()}
    before = {p: p.stat().st_mtime_ns for p in whole_run.rglob("*") if p.is_file()}
    args = (*small_run, "--out", whole_run, *[str(a).format(**paths) for a in args])
    assert message in refused(t.main, args, monkeypatch, capsys)
    assert before == {p: p.stat().st_mtime_ns for p in whole_run.rglob("*") if p.is_file()}

@pytest.mark.parametrize(("cause", "line"), [
    (OSError("rl.jsonl: No space left on device"), "error: rl.jsonl: No space left on device\n"),
    (KeyboardInterrupt(), "interrupted\n")])
def test_default_data_that_cannot_be_made_end_the_run(tmp_path, monkeypatch, capsys, cause, line):
    """The samples are written last: where they are, the next run takes all three files for made."""
    def write_jsonl(path, records):
        if path.name == "rl.jsonl":
            raise cause
        write(path, records[:9])
    write = data.write_jsonl
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "write_jsonl", write_jsonl)
    monkeypatch.setattr(sys, "argv", ["script", "--steps", "1", "--held-out", "0"])
    assert t.run_main(t.main) > 0 and capsys.readouterr().err == line
    assert not (tmp_path / t.Args.data).exists()

def test_changed_data_are_another_run(small_run, whole_run, monkeypatch, capsys):
    monkeypatch.setattr(t.zlib, "crc32", lambda *_: 7)
    err = refused(t.main, (*small_run, "--out", whole_run), monkeypatch, capsys)
    assert "holds another run, with data of checksum" in err

def test_a_finished_run_stays_as_it_is(small_run, whole_run):
    before = (whole_run / "log.jsonl").read_bytes()
    launch(t.main, *small_run, "--out", whole_run, "--eval-every", 100)
    assert (whole_run / "log.jsonl").read_bytes() == before

def test_a_damaged_log_is_named(small_run, tmp_path, whole_run, monkeypatch, capsys):
    shutil.copytree(whole_run, tmp_path / "run")
    with open(tmp_path / "run" / "log.jsonl", "a", encoding="utf-8") as log:
        log.write("\0\0\n")  # as a power cut may leave it
    err = refused(t.main, small_run, monkeypatch, capsys)
    assert err.startswith(f"error: {tmp_path / 'run' / 'log.jsonl'}, line 7: "), err

def test_a_checkpoint_of_another_model(small_run, tmp_path, whole_run, small_models, monkeypatch, capsys):
    """--init is the same folder, but another model lies there now."""
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    about = json.loads((out / "run.json").read_text())
    about["identity"]["init"] = str(small_models[0])
    (out / "run.json").write_text(json.dumps(about))
    same = ("--pack-tokens", 4096, "--context", 1024, "--lr", t.Args.lr)  # the tiny run's defaults
    err = refused(t.main, (*small_run, "--init", small_models[0], *same), monkeypatch, capsys)
    assert "step-000000006: a checkpoint of another model: " in err

def test_a_file_with_brackets_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("part1", "part2", "part[1]"):
        (tmp_path / name).touch()
    assert t.files_of("part[1]") == ["part[1]"] and t.files_of("part[12]") == ["part1", "part2"]

def test_a_loss_that_is_not_finite_stops_the_run(small_run, tmp_path, monkeypatch, capsys):
    err = refused(t.main, (*small_run, "--save-every", 1, "--lr", "1e30"), monkeypatch, capsys)
    assert "step 2, samples 6 to 11 of the stream: " in err and "holds what was saved before" in err, err
    weights = read_safetensors(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.isfinite(v).all() for v in weights.values())

def test_compiled_blocks_train_alike(small_run, tmp_path, small_models):
    args = (*small_run, "--init", small_models[0], "--steps", 1, "--held-out", 0)
    launch(t.main, *args, "--out", tmp_path / "plain")
    launch(partial(processes.altered, "traced"), *args, "--out", tmp_path / "compiled", "--compile")
    plain, compiled = (read_log(tmp_path / out)[0] for out in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-5)

def test_recomputation_ends_in_front_of_the_last_product(monkeypatch):
    begun, ended = [], []

    def counting(product):
        def forward(x):
            begun.append(product)
            y = product(x)
            ended.append(product)
            return y
        return forward
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for compile in (False, True):
        model = FalconH1(PRESETS["tiny"])
        for block in model.model.layers:
            block.feed_forward.down_proj.forward = counting(block.feed_forward.down_proj.forward)
        t.shard(model, t.Ranks(), checkpoint_activations=True, compile=compile)
        ids = torch.arange(20)[None]
        model(ids, targets=ids)[0].sum().backward()
        assert (len(begun), len(ended)) == (6, 3)
        begun.clear(), ended.clear()

def test_only_tiny_models_have_the_tiny_runs_defaults(tmp_path, small_models, monkeypatch, capsys):
    """Trained weights start from the paper's learning rate; other shapes take the paper's sizes as well."""
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit):
        t.read_args()
    assert "real models start from the paper's" in " ".join(capsys.readouterr().out.split())
    FalconH1(PRESETS["tiny"]).save_pretrained(tmp_path)
    fields = ("lr", "batch", "steps", "context", "pack_tokens")
    for flags, expected in {
        (): (2.5e-3, 6, 3400, 1024, 4096), ("--preset", "tiny-mamba"): (2.5e-3, 6, 3400, 1024, 4096),
        ("--init", tmp_path): (1.024e-3, 6, 3400, 1024, 4096),
        ("--init", small_models[0]): (1.024e-3, 512, 0, 8192, 8192),
        ("--preset", "7b"): (1.024e-3, 512, 0, 36864, 36864),
        ("--preset", "7b", "--lr", 1, "--steps", 9, "--context", 50): (1, 512, 9, 50, 4096),
    }.items():
        monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
        args, _ = t.read_args()
        assert tuple(getattr(args, name) for name in fields) == expected, flags

def test_no_steps_are_three_epochs(small_run, tmp_path, small_models):
    flags = ("--steps", 0, "--batch", 12, "--limit", 20, "--held-out", 10)
    launch(t.main, *small_run, "--init", small_models[0], *flags)
    assert len(read_log(tmp_path / "run")) == 3  # 10 samples are left to learn from: 30 in batches of 12

def test_clip_0_is_no_clipping():
    for clip, expected in ((0, [3.0, 4.0]), (10, [3.0, 4.0]), (1, [0.6, 0.8])):
        weights = torch.nn.Parameter(torch.zeros(2))
        weights.grad = torch.tensor([3.0, 4.0])
        module = torch.nn.ParameterList([weights])
        loss = torch.zeros((), dtype=torch.float64)
        _, norm = t.optimizer_step(module, torch.optim.SGD([weights]), loss, 1.0, clip)
        assert norm == 5 and weights.tolist() == pytest.approx([-x for x in expected], rel=1e-5)

# 5. Files of samples ----------------------------------------------------------------------------------------

def turns(*contents):
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]

SFT = {"messages": turns("q", "<think>r</think>a"), "domain": "math", "weight": 1.5}
IDS, MASK = render_chat(SFT["messages"], TOKENIZER)

def sft_files(path, max_tokens=999, small=0, **options):
    """small: t.SMALL; by default files are large, and samples read again."""
    with mock.patch.object(t, "SMALL", small):
        return t.SftFiles(str(path), TOKENIZER, max_tokens, **options)

@pytest.fixture
def path(tmp_path):
    """A file of two samples, SFT and one of code."""
    data.write_jsonl(tmp_path / "s.jsonl", [SFT, SFT | {"domain": "code", "weight": 1}])
    return tmp_path / "s.jsonl"

def test_long_samples_are_refused_or_trimmed_and_marked(path):
    size = len(IDS)
    data.write_jsonl(path, [SFT, SFT | {"messages": turns("q" * 50, "<think>r</think>a")}])
    with pytest.raises(ValueError, match=rf"s\.jsonl, line 2: .*{size + 49} tokens, the limit is {size}"):
        sft_files(path, size)
    assert [sample.ids.tolist() for sample in sft_files(path, size, trim=True)] == [IDS]
    one, = sft_files(path, size - 2, trim=True)
    assert one.ids.tolist() == IDS[:-2] and one.mask.tolist() == MASK[:-2] and one.trimmed

def test_samples_that_trimming_leaves_nothing_to_learn_are_skipped_and_counted(path, capsys):
    """To learn: from the end of the prompt's header on. One token of the reply is enough."""
    prompt = MASK.index(True)
    rows = [SFT | {"messages": turns("q" * n, "<think>r</think>a")} for n in (3, 1, 2, 5)]
    data.write_jsonl(path, rows)
    samples = sft_files(path, prompt + 2, trim=True)
    assert [sample.mask.sum() for sample in samples] == [2, 1] and samples.skipped == 2
    assert samples[0].ids[prompt - 1] == IDS[prompt - 1] and samples.rows["math"].tolist() == [0, 1]
    assert "skipped 2 samples: --trim to" in capsys.readouterr().out
    assert len(sft_files(path, prompt + 2, trim=True, limit=1, quiet=True)) == 1
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match="--trim to 3 tokens leaves nothing to learn of 4 samples"):
        sft_files(path, 3, trim=True)

def test_a_sample_is_kept_at_every_limit_that_leaves_something_to_learn(path):
    """Also where the bytes of the prompt tell it, without the tokenizer."""
    messages = turns("q é", "<think>r</think>é" + "a" * 99)
    data.write_jsonl(path, [SFT | {"messages": messages}, SFT])
    _, mask = render_chat(messages, TOKENIZER)
    _, other = render_chat(SFT["messages"], TOKENIZER)
    for limit in range(other.index(True) + 1, len(mask) + 2):
        kept = [any(learned[1:limit]) for learned in (mask, other)]
        assert len(sft_files(path, limit, trim=True, quiet=True)) == sum(kept)
    assert not any(mask[: other.index(True) + 1])  # at first only the shorter prompt leaves something

def test_a_run_trains_and_evaluates_without_samples_that_are_skipped(sft_file, tmp_path):
    long = SFT | {"messages": turns("q" * 200, "<think>r</think>a")}
    rows = [json.loads(line) for line in sft_file.read_text().splitlines()][:10]
    data.write_jsonl(tmp_path / "s.jsonl", [long, *rows, long])  # the first and the last: held out otherwise
    args = ("--data", tmp_path / "s.jsonl", *SMALL_RUN, "--context", 100, "--trim", "--held-out", 2)
    result = launch(t.main, *args, "--batch", 1, "--out", tmp_path / "run")
    assert "skipped 2 samples" in result.out
    *_, last = log = read_log(tmp_path / "run")
    assert len(log) == 6 and last["held_out"] > 0

def test_what_the_template_adds_counts_as_length(path):
    tokenizer = data.Tokenizer(TOKENIZER.files | {"chat_template.jinja": "x" * 999 + CHAT_TEMPLATE})
    with pytest.raises(ValueError, match=r"s\.jsonl, line 1: .* tokens, the limit is 999"):
        t.SftFiles(str(path), tokenizer, 999)

@pytest.mark.parametrize(("line", "error"), [
    (SFT | {"tools": 3}, "field tools: must be a list"),
    (SFT | {"tools": "f"}, "field tools: malformed JSON"),
    (SFT | {"messages": [*SFT["messages"], {"role": "user", "content": "x", "tool": "y"}]},
     r"field messages\[2\].tool: the chat template drops"),
    (SFT | {"messages": None}, "field messages: must be a list"), (SFT | {"domain": ""}, "field domain"),
    (SFT | {"weight": 0}, "field weight"), (SFT | {"messages": turns("q")}, "field messages: holds no"),
    (b"{}", "{} is not a JSON object with fields"), (b"[1]", r"\[1\] is not"),
    (b'{"a": \xff}', "malformed .*0xff"), (b"[", "malformed")])
def test_sft_files_name_file_line_and_field(path, line, error):
    line = json.dumps(line).encode() if isinstance(line, dict) else line
    path.write_bytes(path.read_bytes() + b"\n" + line)
    with pytest.raises(ValueError, match=rf"s\.jsonl, line 4: {error}"):
        sft_files(path)

def test_arrays_and_conversations_are_the_same_samples(path):
    chat = [{"from": "human", "value": "é?"}, {"from": "gpt", "value": "<think>r</think>ü"}]
    rows = [SFT, {"conversations": chat}, {"messages": turns("q", "<think>r</think>a")}]
    data.write_jsonl(path, rows)
    array = path.with_name("array.json")
    array.write_text(json.dumps(rows, indent=1, ensure_ascii=False), "utf-8")
    lines, items = sft_files(path), sft_files(array)
    assert [sample.ids.tolist() for sample in lines] == [sample.ids.tolist() for sample in items]
    assert [(s.domain, s.weight) for s in items] == [("math", 1.5), ("other", 1.0), ("other", 1.0)]
    assert {name: numbers.tolist() for name, numbers in items.rows.items()} == {"math": [0], "other": [1, 2]}
    array.write_text(json.dumps([SFT, {"conversations": chat, "messages": turns("q", "b")}]))
    with pytest.raises(ValueError,
                       match="array.json, item 2: field conversations contradicts field messages"):
        sft_files(array)
    with pytest.raises(ValueError, match="s.jsonl.gz: unpack it"):
        sft_files(path.rename(path.with_name("s.jsonl.gz")))

@pytest.mark.parametrize(("files", "error"), [
    ("{0}/*.jsonl", r"empty\.jsonl: empty"), ("{0}/s.jsonl, {0}/t.jsonl", r"t\.jsonl is missing")])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_missing_and_empty_files_are_named(path, files, error, content):
    path.with_name("empty.jsonl").write_text(content)
    with pytest.raises(ValueError, match=error):
        sft_files(files.format(path.parent))

def test_samples_are_the_same_whether_they_are_kept_or_read_again(path):
    size = path.stat().st_size
    kept, again = sft_files(path, small=size), sft_files(path, small=size - 1)
    assert kept[0] is kept[0] and again[0] is not again[0] and len(kept) == len(again) == 2
    for one, other in zip(kept, again, strict=True):
        assert one.ids.tolist() == other.ids.tolist() == IDS
        assert one.mask.tolist() == other.mask.tolist() == MASK
        assert (one.weight, one.domain, one.trimmed) == (other.weight, other.domain, other.trimmed)

def test_a_line_that_changes_later_is_named(path):
    samples = sft_files(path)
    text = path.read_text()
    path.write_text(text[:-3])
    with pytest.raises(ValueError, match=r"s\.jsonl, line 2: malformed"):
        samples[1]
    path.write_text(text.replace("math", "code"))
    assert sft_files(path).checksum != samples.checksum

@given(st.lists(st.lists(st.integers(0, 60), max_size=8), min_size=1, max_size=3).filter(all))
@settings(max_examples=25)
def test_what_is_read(tmp_path_factory, sizes):
    """Blank lines, a byte order mark, characters of several bytes, a last line without an end."""
    folder, expected = tmp_path_factory.mktemp("files"), []
    for i, some in enumerate(sizes):
        text = "\ufeff" if i else ""
        for n in some:
            messages = turns(f"{n}é" * (n % 7), "<think>r</think>" + "x" * n)
            record = SFT | {"domain": "ab"[n % 2], "messages": messages, "weight": n + 0.5}
            expected.append((record, f"{folder / str(i)}.jsonl", 1 + text.count("\n")))
            text += json.dumps(record, ensure_ascii=False) + "\n" * (1 + n % 3)
        (folder / f"{i}.jsonl").write_text(text.removesuffix("\n"), "utf-8")

    samples = sft_files(",".join(f"{folder}/{i}.jsonl" for i in range(len(sizes))))
    assert sft_files(f"{folder}/*.jsonl").checksum == samples.checksum
    for sample, (record, *_) in zip(samples, expected, strict=True):
        assert (sample.ids.tolist(), sample.mask.tolist()) == render_chat(record["messages"], TOKENIZER)
        assert (sample.ids.dtype, sample.mask.dtype, sample.trimmed) == (np.int32, bool, False)
        assert (sample.weight, sample.domain) == (record["weight"], record["domain"])
    places = [(samples.paths[i], line) for i, line in zip(samples.index[::4], samples.index[1::4])]
    assert places == [where[1:] for where in expected]
    assert sum(map(len, samples.rows.values())) == len(samples)
    for name, rows in samples.rows.items():
        assert rows.tolist() == [i for i, (record, *_) in enumerate(expected) if record["domain"] == name]
    few = sft_files(f"{folder}/*.jsonl", limit=2)
    assert len(few) == min(2, len(expected)) and few.checksum == samples.checksum
    assert sorted(np.concatenate([*few.rows.values()])) == [*range(len(few))]

def test_files_larger_than_memory(tmp_path):
    """1,000 samples of 50 kB, 50 MB, in a process that may have 30 MB more than it needs for itself."""
    with open(tmp_path / "s.jsonl", "w") as file:
        for i in range(1000):
            record = SFT | {"domain": "ab"[i % 2], "messages": turns(str(i), "x" * 50_000)}
            file.write(json.dumps(record) + "\n")
    program = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import data
import train_sft as t
tokenizer = data.Tokenizer.byte_level()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 30_000_000,) * 2)
samples = t.SftFiles({str(tmp_path / "s.jsonl")!r}, tokenizer, 1000, trim=True, quiet=True)
loader = t.Loader(samples.rows, 8, 0, {{"a": 3, "b": 1}})
for _ in range(5):
    batch = [samples[i] for i in next(loader)]
    assert [sample.domain for sample in batch].count("a") == 6 and all(sample.trimmed for sample in batch)
print(len(samples))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "1000\n", done.stderr

# 6. Loader --------------------------------------------------------------------------------------------------

def make_rows(**sizes):
    """Numbers of samples by domain, all different."""
    ends = np.cumsum([0, *sizes.values()])
    return {name: np.arange(start, end) for name, start, end in zip(sizes, ends, ends[1:]) if end > start}

def stream(loader, batches):
    return [next(loader) for _ in range(batches)]

def test_draws_stay_the_same():
    """The small run's figures, and runs that are resumed, depend on this order."""
    loader = t.Loader(make_rows(a=4, b=3), 5, 7, {"a": 2, "b": 1})
    assert stream(loader, 3) == [[0, 2, 4, 1, 3], [6, 2, 0, 5, 3], [1, 6, 3, 2, 4]]

@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(0, 99))
@settings(max_examples=30)
def test_default_mixture_takes_every_sample_once_an_epoch(a, b, c, seed):
    loader = t.Loader(make_rows(a=a, b=b, c=c), a + b + c, seed)
    assert [sorted(batch) for batch in stream(loader, 3)] == [[*range(a + b + c)]] * 3

@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any), st.integers(0, 9))
@settings(max_examples=30)
def test_no_domain_is_ever_a_whole_sample_away_from_its_share(weights, seed):
    names = "abcdef"[: len(weights)]
    rows = make_rows(**dict.fromkeys(names, 5))
    loader, drawn = t.Loader(rows, 1, seed, dict(zip(names, weights))), Counter()
    for step in range(1, 101):
        [number] = next(loader)
        drawn[names[number // 5]] += 1
        shares = {name: step * weight / sum(weights) for name, weight in zip(names, weights)}
        assert all(abs(drawn[name] - share) < 1 for name, share in shares.items())

def test_epochs_are_shuffled_anew_and_by_seed():
    first, second = stream(t.Loader(make_rows(a=50), 50, 0), 2)
    [other] = stream(t.Loader(make_rows(a=50), 50, 1), 1)
    assert first != second and first != other and sorted(first) == sorted(second)

@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 7), st.integers(0, 9), st.booleans())
@settings(max_examples=30)
def test_resumed_stream_equals_the_uninterrupted_one(a, b, batch, taken, mixed):
    rows, mixture = make_rows(a=a, b=b), {"a": 0.9, "b": 0.3} if mixed else None
    loader, resumed = (t.Loader(rows, batch, 3, mixture) for _ in range(2))
    stream(loader, taken)
    stream(resumed, 2)  # a used loader forgets its own position
    resumed.drawn = json.loads(json.dumps(loader.drawn))
    assert stream(resumed, 5) == stream(loader, 5)

@pytest.mark.parametrize(("sizes", "mixture", "error"), [
    ({}, None, "weights"), ({"a": 3}, {"b": 1}, r"has \['b'\]"),
    *[({"a": 3}, {"a": weight}, "weights") for weight in (-1, 0, float("nan"), float("inf"))],
    ({"a": 3, "b": 0}, {"a": 1, "b": 1}, "no sample of b is left to draw from")])
def test_loader_refuses(sizes, mixture, error):
    with pytest.raises(ValueError, match=error):
        t.Loader({name: np.arange(size) for name, size in sizes.items()}, 1, 0, mixture)
