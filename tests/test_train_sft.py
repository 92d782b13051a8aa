"""The recipe's formulas by hand; ranks and row lengths change nothing; killed runs end like others; bad input costs nothing."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import ssm_scan
import train_sft as t
from model import PRESETS, FalconH1, document_table, read_safetensors, token_logprobs, tokens_of_chunk
from tests.bench import peak_bytes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def sft_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    assert data.main(["make", "--out", str(folder), "--sft", "60", "--rl", "40", "--heldout", "10"]) == 0
    return folder / "sft.jsonl"


def run(script, *args, ranks=1, **environment):
    """A script in its own process -> (exit status, stdout, stderr)."""
    launcher = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | environment
    done = subprocess.run([*launcher, str(ROOT / script), *map(str, args)], capture_output=True, text=True, env=env, timeout=120)
    return done.returncode, done.stdout, done.stderr


def refused(main, args, monkeypatch, capsys):
    """Run a script's main in this process; it must end in one line and exit status 1. Returns the line."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, args)])
    status, err = t.run_main(main), capsys.readouterr().err
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


SMALL_RUN = ("--batch", 6, "--held-out", 4, "--steps", 6, "--eval-every", 100)


def test_learning_rate_by_hand():
    rates = [t.learning_rate(step, 10, 1.0, 0.2) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert t.learning_rate(0, 1, 1.0, 0.04) == 1.0


def test_vectors_do_not_decay():
    model = FalconH1(PRESETS["tiny"])
    matrices, vectors = t.make_optimizer(model, 1.0, 0.01).param_groups
    assert matrices["weight_decay"] == 0.01 and vectors["weight_decay"] == 0
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))
    assert all(p.dim() == 1 for p in vectors["params"]) and len(vectors["params"]) == 3 * 7 + 1


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_token_logprobs(chunk):
    torch.manual_seed(0)
    h, w, targets = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True), torch.tensor([0, 1, 7, 3, 10, 5, 2])
    g = torch.randn(7)
    logprobs, entropy = token_logprobs(h, w, targets, 0.7, chunk)
    logprobs.backward(g)
    mine = h.grad.clone(), w.grad.clone()
    h.grad = w.grad = None
    logp = (h @ w.T * 0.7).log_softmax(-1)
    plain = logp.gather(1, targets[:, None])[:, 0]
    plain.backward(g)
    torch.testing.assert_close(logprobs, plain)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1))
    torch.testing.assert_close(mine, (h.grad, w.grad), rtol=1e-5, atol=1e-6)


def test_tokens_of_chunk_by_hand():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert tokens_of_chunk(130048, cpu) == 258  # 2^25 / 130,048 = 258.02
    assert tokens_of_chunk(2**26, cpu) == 1
    assert tokens_of_chunk(130048, gpu) == 2048  # 2^28 / 130,048 = 2,064.1, 16 tiles
    assert tokens_of_chunk(261120, gpu) == 1024  # 1,028.01, 8 tiles
    assert tokens_of_chunk(65536, gpu) == 4096  # 4,096 exactly
    assert tokens_of_chunk(272, gpu) == 4096
    assert tokens_of_chunk(2**28, gpu) == 128


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing(device, dtype):
    torch.manual_seed(0)
    h, w, g = torch.randn(700, 32), 0.2 * torch.randn(512, 32), torch.randn(700, device=device)
    h, w = (v.to(device, dtype).requires_grad_() for v in (h, w))
    targets, results = torch.randint(512, (700,), device=device), []
    for chunk in (700, 256, 128, 1):
        logprobs, entropy = token_logprobs(h, w, targets, 0.7, chunk)
        results.append([logprobs, entropy, *torch.autograd.grad(logprobs, (h, w), g)])
    for other in results[1:]:
        for ours, whole in zip(other, results[0]):
            error = (ours.double() - whole.double()).norm() / whole.double().norm()
            assert error < (1e-6 if dtype == torch.float32 else 1e-3)  # sums may round to either of two bf16


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_product_adds_in_float32(device, dtype):
    """512 + 2^-10 * 2^-4 is 512 in bf16, which has 8 bits: a product rounded before it is added loses it."""
    a, b = torch.tensor([[16.0, 2**-10], [1.0, 0.0]]), torch.tensor([[32.0, 1.0], [2**-4, 0.0]])
    a, b, total = a.to(device, dtype), b.to(device, dtype), torch.ones(2, 2, device=device)
    t.add_product(total, a, b)
    assert total.tolist() == [[513 + 2**-14, 17], [33, 2]]


class Traffic(TorchDispatchMode):
    """What passes between the host and a GPU, for which "meta" stands in. copies: to the GPU. reads: from it,
    for which the host waits; an operator whose result has a shape that only the GPU knows cannot run at all.
    created: (operator, numbers) of each tensor that is new there, neither a view nor changed in place."""

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
        new = [v for v in new if v.untyped_storage()._cdata not in owned]
        self.created += [(function.__name__, v.numel()) for v in new]
        if function is torch.ops.aten.copy_.default:
            self.copies += args[0].is_meta and not args[1].is_meta
        else:
            self.copies += copies and not there and len(new)
        return out


def traffic_of(step, monkeypatch):
    """Of a step, when the tables of its rows have been made. Operators are a GPU's; "meta" runs no kernel."""
    monkeypatch.setattr(ssm_scan, "_backend", lambda name, x: "triton")
    with Traffic():
        step()
    with Traffic() as traffic:
        step()
    return traffic


def model_of_a_gpu(layers=3):
    with torch.device("meta"):
        return FalconH1(replace(PRESETS["tiny"], num_hidden_layers=layers)).to(torch.bfloat16)


def three_documents():
    ids, cu = np.arange(200), np.array([0, 70, 120, 200], np.int32)
    return data.Pack(ids, ids, np.ones(200, np.float32), cu, [])


@pytest.mark.parametrize("rows", [1, 4])
def test_a_step_waits_for_the_gpu_once(rows, monkeypatch):
    model, packs = model_of_a_gpu(), [three_documents() for _ in range(rows)]
    optimizer = torch.optim.SGD(model.parameters())
    traffic = traffic_of(lambda: t.train_step(model, optimizer, packs, 0, 1.0, t.Ranks()), monkeypatch)
    assert traffic.reads == 1  # loss and norm
    assert traffic.copies == 2 * rows  # ids and targets; weights
    for table in (document_table, ssm_scan.chunk_table, ssm_scan._last_tokens):
        table.cache_clear()
    with Traffic() as traffic:
        t.train_step(model, optimizer, packs, 0, 1.0, t.Ranks())
    assert traffic.reads == 1
    # And what attention and the convolution's last inputs know of these documents. The table of chunks, two more copies, is made
    # inside of operators, which "meta" does not run.
    assert traffic.copies == 2 * rows + 2


def test_a_held_out_loss_is_read_once(monkeypatch):
    model, sample = model_of_a_gpu(), data.Sample(np.arange(200), np.arange(200) > 9, 1.0, "math")
    run = partial(t.held_out_loss, model, [sample] * 3, t.Args(pack_tokens=200), t.Ranks())
    traffic = traffic_of(run, monkeypatch)
    assert (traffic.reads, traffic.copies) == (1, 2 * 3)


def test_a_block_creates_no_more_tensors_than_it_did(monkeypatch):
    """At least as large as the hidden states, forward and backward; those inside of kernels are not seen."""
    def large(layers):
        model = model_of_a_gpu(layers)
        optimizer, packs = torch.optim.SGD(model.parameters()), [three_documents()]
        step = partial(t.train_step, model, optimizer, packs, 0, 1.0, t.Ranks())
        return Counter(name for name, n in traffic_of(step, monkeypatch).created if n >= 200 * 96)

    two_blocks = large(3) - large(1)
    assert two_blocks.total() <= 2 * 118, two_blocks


class Sliced:
    """A parameter of which every rank holds a slice; counts how often it is gathered."""

    def __init__(self, whole):
        self.whole, self.gathered = whole, 0

    def full_tensor(self):
        self.gathered += 1
        return self.whole


def test_a_rank_that_does_not_sample_keeps_no_copy(monkeypatch):
    model = FalconH1(PRESETS["tiny"])
    state = {name: Sliced(v) for name, v in model.state_dict().items()}
    monkeypatch.setattr(t.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(model, "state_dict", lambda: state)
    copy = t.whole_copy(model)
    for name, v in copy.state_dict().items():
        assert torch.equal(v, state[name].whole)
    with torch.no_grad():
        copy.lm_head.weight.zero_()
    assert t.whole_copy(model, copy) is copy and torch.equal(copy.lm_head.weight, model.lm_head.weight)
    monkeypatch.setattr(t, "FalconH1", None)  # none is made
    assert t.whole_copy(model, keep=False) is None
    assert {v.gathered for v in state.values()} == {3}  # it takes part, or the others would wait for ever


def test_training_holds_no_copy_of_the_model(sft_file, tmp_path):
    args = ("--data", sft_file, "--out", tmp_path / "run", *SMALL_RUN, "--steps", 3, "--eval-every", 1)
    status, out, err = run("tests/copies_held.py", "train_sft", 0, *args, ranks=2)
    assert status == 0, err
    assert "rank 0 made 3 copies" in out and "rank 1 made 0 copies" in out  # rank 0 alone samples


@pytest.mark.parametrize("targets", [[3, -1, 5, -7], [-1, -1, -1, -1]])
def test_negative_targets_give_zero_and_no_gradient(targets):
    torch.manual_seed(0)
    model, ids, targets = FalconH1(PRESETS["tiny"]), torch.tensor([[1, 2, 3, 4]]), torch.tensor([targets])
    logprobs, entropy = model(ids, targets=targets, temperature=2.0)
    logp = (model(ids) / 2.0).log_softmax(-1)
    want = torch.where(targets < 0, 0, logp.gather(2, targets.clamp(min=0)[..., None])[..., 0])
    torch.testing.assert_close(logprobs, want)
    torch.testing.assert_close(entropy, torch.where(targets < 0, 0, -(logp.exp() * logp).sum(-1)))
    ours, theirs = (torch.autograd.grad(v.sum(), list(model.parameters())) for v in (logprobs, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def gradients(model, packs, rank=0, world=1):
    model.zero_grad()
    total = float(sum(row.weights.sum() for row in packs))
    ranks = [t.Ranks(r, world) for r in range(world)]
    def loss_of(row):
        return t.sft_loss(model, row, total)
    loss = sum(float(t.backward_all(model, packs, r, loss_of)) for r in ranks)
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()]) / world


def test_the_split_into_rows_changes_nothing(sft_file):
    torch.manual_seed(0)
    model, samples = FalconH1(PRESETS["tiny"]), [*data.SftFiles(str(sft_file), data.Tokenizer.byte_level(), 512, limit=9)]
    loss, grad = gradients(model, data.pack(samples, 4096))
    # By definition: every sample by itself, all token losses weighted and divided by all weights.
    plain = [(float(s.weight), -model(torch.tensor(s.ids[None].astype(np.int64))).log_softmax(-1)[0, :-1].gather(
        1, torch.tensor(s.ids[1:, None].astype(np.int64)))[s.mask[1:], 0]) for s in samples]
    assert loss == pytest.approx(float(sum(w * v.detach().sum() for w, v in plain) / sum(w * len(v) for w, v in plain)), rel=1e-6)
    for capacity, world in ((512, 1), (200, 1), (4096, 2), (300, 4), (4096, 16)):
        other, theirs = gradients(model, data.pack(samples, capacity, world), world=world)
        assert other == pytest.approx(loss, rel=1e-6)
        assert (theirs - grad).norm() / grad.norm() < 1e-6


def test_two_ranks_train_like_one(sft_file, tmp_path):
    logs = []
    for ranks in (1, 2):
        status, _, err = run("train_sft.py", "--data", sft_file, "--out", tmp_path / str(ranks), *SMALL_RUN, ranks=ranks)
        assert status == 0, err
        logs.append([json.loads(line) for line in open(tmp_path / str(ranks) / "log.jsonl")])
    # The first steps are the claim; later ones show that Adam, which divides by small numbers, has not been misled.
    for one, two in zip(*logs):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6 if one["step"] <= 2 else 1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-6 if one["step"] <= 1 else 1e-3)


def checkpoint(folder, groups):
    """A small model whose heads can be shared by 2 or 4 ranks; keys, values, B and C by fewer."""
    torch.manual_seed(0)
    FalconH1(replace(PRESETS["tiny"], initializer_range=0.02, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                     mamba_n_heads=12, mamba_d_head=8, mamba_n_groups=groups)).save_pretrained(folder)
    data.Tokenizer.byte_level().save(folder)
    return folder


@pytest.mark.parametrize(("ranks", "groups", "settings"), [
    (2, 1, ["1,1,4096", "1,1,120", "1,2,4096", "2,1,4096"]), (4, 2, ["1,1,4096", "1,1,120", "2,2,300", "2,1,120"]), (4, 3, ["4,1,4096", "4,1,120"])])
def test_ranks_compute_the_gradient_of_one_process(sft_file, tmp_path, ranks, groups, settings):
    """Settings are cp, replicas, tokens of a row: at 4,096 each team has one row, at 120 it adds up three or more. Documents are uneven,
    and where rows are short, activations computed twice."""
    status, out, err = run("tests/sharded_gradient.py", checkpoint(tmp_path / "init", groups), sft_file, *settings, ranks=ranks)
    assert status == 0 and out.count("loss off by") == len(settings), err


def test_who_reads_which_group():
    assert t.shares(4, 2, 2) == ([[0, 1], [2, 3]], [[0], [1]])
    assert t.shares(4, 4, 2) == ([[0], [1], [2], [3]], [[0], [0], [1], [1]])
    assert t.shares(12, 4, 3)[1] == [[0, 0, 0], [0, 1, 1], [1, 1, 2], [2, 2, 2]]  # uneven: one for every head


def test_four_ranks_leave_a_run_that_fewer_go_on_with(sft_file, tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    args = ("--data", sft_file, "--init", checkpoint(tmp_path / "init", 2), "--out", out, "--batch", 6, "--held-out", 4, "--steps", 20,
            "--eval-every", 100, "--save-every", 10)
    status, _, err = run("train_sft.py", *args, "--cp", 2, "--replicas", 2, ranks=4)
    assert status == 0, err
    shutil.copytree(out, whole)
    for ranks in (1, 2):
        shutil.rmtree(out)
        shutil.copytree(whole, out)
        shutil.rmtree(out / "trainer" / "step-000000020")
        status, _, err = run("train_sft.py", *args, ranks=ranks)
        assert status == 0, err
        logs = [[json.loads(line) for line in open(folder / "log.jsonl")][10:] for folder in (whole, out)]
        assert [r["loss"] for r in logs[1]] == pytest.approx([r["loss"] for r in logs[0]], rel=1e-6) and len(logs[1]) == 10


def test_ranks_that_all_read_their_share(sft_file):
    """Nobody makes tokens of what another rank reads; all get all of it, in order."""
    read = []
    class Rank(t.Ranks):
        def gather(self, objects, group=None):
            read.append([i for i, x in enumerate(objects) if x is not None])
            return objects
    samples = data.SftFiles(str(sft_file), data.Tokenizer.byte_level(), 512)
    for r in range(3):
        Rank(r, 3).each(samples.__getitem__, [5, 7, 11, 2, 3])
    assert read == [[0, 3], [1, 4], [2]]


@pytest.mark.parametrize(("flags", "message"), [(("--cp", 3), "--cp 3: it must divide the number of ranks, 2"),
                                                (("--replicas", 3), "--replicas 3: it must divide"), (("--cp", 2), "num_attention_heads 3")])
def test_ranks_that_cannot_be_shared_out(sft_file, tmp_path, flags, message):
    status, _, err = run("train_sft.py", "--data", sft_file, "--out", tmp_path / "run", *SMALL_RUN, *flags, ranks=2)
    assert status == 1 and message in err and not (tmp_path / "run").exists()


KILL = """
import os, signal, sys
sys.path.insert(0, {root!r})
import data, {module}, train_sft
def dying(function, name):
    def inner(*args):
        if name(*args).endswith({moment!r}) and os.environ.get("RANK", {rank!r}) == {rank!r}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return inner
train_sft.Run.write = dying(train_sft.Run.write, lambda run, step, *rest: f"log of step {{step}}")
data.write_text = dying(data.write_text, lambda path, text: str(path))
sys.argv = ['x', *{args!r}]
train_sft.SILENCE = 4
train_sft.run_main({module}.main)
"""


def dying(script, args, out, moment, rank=0):
    """A script that kills itself, or its rank, at `moment`."""
    return KILL.format(root=str(ROOT), module=script.removesuffix(".py"), moment=moment, rank=str(rank), args=[str(a) for a in (*args, "--out", out)])


def killed_and_resumed(script, args, whole, out, moment):
    """Run a script until `moment`, SIGKILL it there, resume it, and compare its weights and log with those of `whole`."""
    assert subprocess.run([sys.executable, "-c", dying(script, args, out, moment)], capture_output=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == -9
    status, _, err = run(script, *args, "--out", out)
    assert status == 0, err
    a, b = (read_safetensors(folder / "model" / "model.safetensors") for folder in (whole, out))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    logs = [[json.loads(line) for line in open(folder / "log.jsonl")] for folder in (whole, out)]
    timing = ("seconds", "t_sample", "t_score", "t_update", "t_verify")
    strip = [[{k: v for k, v in r.items() if k not in timing} for r in log] for log in logs]
    assert strip[0] == strip[1]
    return err


@pytest.fixture(scope="module")
def whole_run(sft_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    status, stdout, err = run("train_sft.py", "--data", sft_file, "--out", out, *SMALL_RUN, "--save-every", 2)
    assert status == 0, err
    assert "sample: " in stdout and "left" in stdout
    return out


@pytest.mark.parametrize(("moment", "every"), [
    ("log of step 1", 2), ("log of step 4", 2), ("step-000000004.tmp/state.json", 2), ("model/tokenizer.json", 2),
    ("log of step 3", 6)])  # before the first checkpoint
def test_a_killed_run_ends_like_one_that_was_not(sft_file, tmp_path, whole_run, moment, every):
    killed_and_resumed("train_sft.py", ("--data", sft_file, *SMALL_RUN, "--save-every", every), whole_run, tmp_path / "run", moment)


def test_training_goes_on_while_a_checkpoint_is_written(sft_file, tmp_path, monkeypatch):
    out, export, logged = tmp_path / "run", t.export, []
    def slow(*args):  # the first checkpoint, of step 2, is not complete before step 3 is logged
        deadline = time.monotonic() + 20
        while len((out / "log.jsonl").read_text().splitlines()) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        logged.append(len((out / "log.jsonl").read_text().splitlines()))
        export(*args)
    monkeypatch.setattr(t, "export", slow)
    monkeypatch.setattr(sys, "argv", ["x", *map(str, ("--data", sft_file, "--out", out, *SMALL_RUN, "--save-every", 2))])
    assert t.run_main(t.main) == 0
    assert logged[0] == 3 and len(logged) == 3


def test_exporting_holds_no_more_than_a_tensor(tmp_path, whole_run):
    tokenizer, (checkpoint_,) = data.Tokenizer.byte_level(), (whole_run / "trainer").glob("step-000000006")
    peak = peak_bytes(lambda: t.export(PRESETS["tiny"], tokenizer, checkpoint_, tmp_path), "cpu")
    state, again = (read_safetensors(folder / "model.safetensors") for folder in (whole_run / "model", tmp_path))
    assert state.keys() == again.keys() and all(torch.equal(state[k], again[k]) for k in state)
    assert peak <= 2.1 * max(v.nbytes for v in state.values()) < sum(v.nbytes for v in state.values()) / 2


def test_a_full_disk_costs_nothing_but_the_step(sft_file, tmp_path, whole_run):
    out, args = tmp_path / "run", ("--data", sft_file, *SMALL_RUN, "--save-every", 2)
    program = (f"import resource as r, sys; r.setrlimit(r.RLIMIT_FSIZE, (2_000_000, 2_000_000)); sys.path.insert(0, {str(ROOT)!r}); "
               f"import train_sft; sys.argv = {['x', *map(str, args), '--out', str(out)]!r}; sys.exit(train_sft.run_main(train_sft.main))")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    full = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=120)
    assert full.returncode == 1 and full.stderr.startswith(f"error: {out}: step 2 could not be saved"), full.stderr
    assert full.stderr.count("\n") == 1 and not list(out.rglob("*.tmp"))
    status, _, err = run("train_sft.py", *args, "--out", out)
    a, b = (read_safetensors(folder / "model" / "model.safetensors") for folder in (whole_run, out))
    assert status == 0 and all(torch.equal(a[k], b[k]) for k in a), err


def test_a_damaged_checkpoint_is_passed_over(sft_file, tmp_path, whole_run):
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    newest = out / "trainer" / "step-000000006"
    largest = max(newest.iterdir(), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])
    (out / "log.jsonl").write_text((out / "log.jsonl").read_text()[:-9])  # as a power cut may leave it
    status, stdout, err = run("train_sft.py", "--data", sft_file, "--out", out, *SMALL_RUN, "--save-every", 2)
    assert status == 0 and "step-000000006: not a whole checkpoint" in err and "continuing after step 4" in stdout
    a, b = (read_safetensors(folder / "model" / "model.safetensors") for folder in (whole_run, out))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [json.loads(line)["step"] for line in open(out / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_an_export_that_fails_is_not_a_checkpoint_that_fails(sft_file, tmp_path, monkeypatch, capsys):
    def export(*args):
        raise OSError("model.safetensors: could not be written: No space left on device")
    monkeypatch.setattr(t, "export", export)
    args = ("--data", sft_file, "--out", tmp_path, *SMALL_RUN, "--save-every", 2)
    assert refused(t.main, args, monkeypatch, capsys) == "error: model.safetensors: could not be written: No space left on device\n"
    assert (tmp_path / "trainer" / "step-000000002" / "state.json").exists()


def test_ctrl_c_is_no_traceback(capsys):
    def body():
        raise KeyboardInterrupt
    assert t.run_main(body) == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("args", "message"), [
    (("--steps", 7), "holds another run, with --steps 6"),
    (("--fresh", "--data", "{bad}"), "bad.jsonl, line 2"),
    (("--fresh", "--data", "{empty}"), "empty.jsonl"),
    (("--fresh", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
    (("--fresh", "--context", 50), "the limit is 50"),
    (("--fresh", "--init", "nowhere"), "nowhere"),
    (("--fresh", "--preset", "huge"), "--preset huge"),
    (("--fresh", "--mixture", "math"), "--mixture 'math'"),
    (("--fresh", "--mixture", "math=1,code=1", "--data", "{rare}"), "no sample of code is left to draw from"),
    (("--fresh", "--save-every", 0), "--save-every 0: must be at least 1"),
    (("--fresh", "--limit", -1), "--limit -1: must be at least 0"),
    (("--fresh", "--lr", "nan"), "--lr nan: must be at least 0"),
    (("--fresh", "--device", "cuda"), "no GPU"),
    (("--fresh", "--device", "cuda:3"), "--device cuda:3: expected cpu or cuda"),
])
def test_bad_input_is_one_line_and_costs_nothing(sft_file, tmp_path, whole_run, args, message, monkeypatch, capsys):
    if "cuda" in args and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (tmp_path / "bad.jsonl").write_text(sft_file.read_text().splitlines()[0] + "\n{\n")
    (tmp_path / "empty.jsonl").write_text("")
    before = {p: p.stat().st_mtime_ns for p in whole_run.rglob("*") if p.is_file()}
    rows = [json.loads(line) for line in sft_file.read_text().splitlines()]
    data.write_jsonl(tmp_path / "rare.jsonl", [rows[0] | {"domain": "code"}, *rows[1:]])  # its first sample is held out
    args = [str(a).format(**{name: tmp_path / f"{name}.jsonl" for name in ("bad", "empty", "rare")}) for a in args]
    args = ("--data", sft_file, "--out", whole_run, *SMALL_RUN, "--save-every", 2, *args)
    assert message in refused(t.main, args, monkeypatch, capsys)
    assert before == {p: p.stat().st_mtime_ns for p in whole_run.rglob("*") if p.is_file()}


def test_unknown_flags_are_errors(monkeypatch, capsys):
    assert refused(t.main, ("--stpes", 3), monkeypatch, capsys) == "error: unrecognized arguments: --stpes 3; see --help\n"


def test_a_loss_that_is_not_finite_stops_the_run(sft_file, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    err = refused(t.main, ("--data", sft_file, "--out", out, *SMALL_RUN, "--save-every", 1, "--lr", "1e30"), monkeypatch, capsys)
    assert "step 2, samples 6 to 11 of the stream: " in err and "holds what was saved before" in err, err
    assert all(torch.isfinite(v).all() for v in read_safetensors(out / "model" / "model.safetensors").values())


@pytest.mark.parametrize(("change", "message"), [
    ("sys.argv += ['--seed', os.environ['RANK']]", "the arguments: "),
    ("sizes = data.sizes_of; data.sizes_of = lambda pattern: {k: v + int(os.environ['RANK']) for k, v in sizes(pattern).items()}", "the data: {")])
def test_ranks_started_differently_do_not_train(sft_file, tmp_path, change, message):
    program = tmp_path / "differs.py"
    program.write_text(f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import data, train_sft; {change}; train_sft.run_main(train_sft.main)")
    status, _, err = run(program, "--data", sft_file, "--out", tmp_path / "run", *SMALL_RUN, ranks=2)
    assert status == 1 and err.count(f"error: ranks 0 and 1 disagree about {message}") == 1 and not (tmp_path / "run").exists(), err


def launched_by_hand(program, world, timeout=60):
    """Ranks without torchrun, as a cluster's scheduler starts them -> list of (exit status, stderr)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    ranks = [subprocess.Popen([sys.executable, program], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env | {"RANK": str(r)})
             for r in range(world)]
    return [(rank.communicate(timeout=timeout)[1], rank.returncode)[::-1] for rank in ranks]


@pytest.mark.parametrize("dead", [0, 1])
def test_ranks_do_not_wait_for_the_dead(sft_file, tmp_path, dead):
    (tmp_path / "program.py").write_text(dying("train_sft.py", ("--data", sft_file, *SMALL_RUN), tmp_path / "run", "log of step 3", dead))
    start = time.monotonic()
    results = launched_by_hand(tmp_path / "program.py", 3)
    assert time.monotonic() - start < 40 and [status for status, _ in results] == [-9 if r == dead else 1 for r in range(3)]
    said = [[line for line in err.splitlines() if line.startswith("error: ")] for _, err in results]
    assert said[0 if dead else 1] == [f"error: rank {dead}{'' if dead else ' or its torchrun'} gives no sign of life; what it printed may say why. "
                                      "Give the same command again to go on from the last checkpoint"]


@pytest.mark.parametrize(("environment", "message"), [
    ({"RANK": "1"}, "MASTER_ADDR expected, but not set"),
    ({"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}, "not all of 2 ranks met at 127.0.0.1:0 within 2 s: ")])
def test_a_missing_rendezvous(sft_file, tmp_path, monkeypatch, capsys, environment, message):
    monkeypatch.setattr(t, "MEET", 2)
    for name, value in {"WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    assert message in refused(t.main, ("--data", sft_file, "--out", tmp_path / "run"), monkeypatch, capsys)


def test_a_checkpoint_of_another_model(sft_file, tmp_path, whole_run, monkeypatch, capsys):
    shutil.copytree(whole_run, tmp_path / "run")
    args = ("--data", sft_file, *SMALL_RUN, "--save-every", 2, "--init", checkpoint(tmp_path / "init", 2), "--out", tmp_path / "run")
    assert "holds another run, with --init ''" in refused(t.main, args, monkeypatch, capsys)
    run_json = json.loads((tmp_path / "run" / "run.json").read_text())  # as if --init had held another model then
    run_json["identity"]["init"] = str(tmp_path / "init")
    (tmp_path / "run" / "run.json").write_text(json.dumps(run_json))
    assert "step-000000006: a checkpoint of another model" in refused(t.main, args, monkeypatch, capsys)


def test_many_files_one_mixture_and_trimmed_samples(sft_file, tmp_path):
    lines = [json.loads(line) for line in sft_file.read_text().splitlines()]
    for i in range(3):
        part = [line | {"domain": ["math", "code", "science"][i]} for line in lines[20 * i : 20 * i + 20]]
        data.write_jsonl(tmp_path / f"part-{i}.jsonl", part)
    logs = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        status, _, err = run("train_sft.py", "--data", tmp_path / "part-*.jsonl", "--out", out, *SMALL_RUN, "--context", 90, "--trim", "--mixture",
                             "math=3,code=2,science=1", ranks=ranks)
        assert status == 0, err
        logs.append([json.loads(line) for line in open(out / "log.jsonl")])
    assert [r["trimmed"] for r in logs[0]] == [r["trimmed"] for r in logs[1]] and 0 < sum(r["trimmed"] for r in logs[0]) < 36
    assert logs[0][0]["loss"] == pytest.approx(logs[1][0]["loss"], rel=1e-6)
    assert all(r["tokens"] <= 6 * 90 for r in logs[0])


def test_compiled_blocks_train_alike(sft_file, tmp_path, whole_run):
    status, _, err = run("train_sft.py", "--data", sft_file, "--out", tmp_path / "run", *SMALL_RUN, "--save-every", 2, "--compile")
    assert status == 0, err
    logs = [[json.loads(line)["loss"] for line in open(folder / "log.jsonl")] for folder in (whole_run, tmp_path / "run")]
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
