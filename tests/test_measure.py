"""What a configuration costs: the formulas against numbers worked by hand and against what torch counts; both commands."""

import importlib
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import decode
import model
import ssm_scan
import train_sft
from model import PRESETS, Cache, Context, FalconH1, rope_table, token_logprobs
from tests import measure, peers
from tests.measure import (block_bytes, cache_bytes, decoding_floor, describe, diagram, flops_per_token, large_model, medians, parameters,
                           peak_bytes, scan_flops, small_model, training_bytes)

from .test_model import SMALL

SEVEN = PRESETS["7b"]


def test_flops_by_hand():
    assert scan_flops(h=1, p=2, g=1, n=3, chunk=4) == 4 * 3 + 4 * 2 + 2 * 2 * 3 + 2 * 2 * 3  # C B^T, W x, state in, state out
    # SMALL: d 12, 4 and 2 heads of 6, in_proj 20 + 20 + 14 + 14 + 4, I 20, MLP 20, 2 layers, vocabulary 37, 4 SSM heads of 5, 2 groups, n 7
    block = 12 * 6 * (4 + 2 + 2 + 4) + 12 * 72 + 20 * 12 + 3 * 12 * 20
    assert flops_per_token(SMALL, 10) == {"blocks": 2 * 2 * block, "head": 2 * 12 * 37, "attention": 2 * 4 * 4 * 6 * 10 // 2,
                                          "scan": 2 * (4 * (10 * 5 + 4 * 5 * 7) + 2 * 10 * 7)}
    weights = sum(m.weight.numel() for m in FalconH1(SMALL).modules() if isinstance(m, torch.nn.Linear))
    flops = flops_per_token(SMALL, 10)
    assert flops["blocks"] + flops["head"] == 2 * weights


def test_chunks_of_512(monkeypatch):
    """What a longer chunk changes: a longer triangle, and half as many states for twice as wide a C B^T."""
    with monkeypatch.context() as patch:
        patch.setattr(measure, "CHUNK", 512)
        flops, size = flops_per_token(SEVEN, 32768)["scan"], block_bytes(SEVEN)
    assert flops == 44 * (24 * (512 * 128 + 4 * 128 * 256) + 512 * 256)
    before = 3072 * 256 // measure.CHUNK + measure.CHUNK
    assert size - block_bytes(SEVEN) == 2 * (3072 * 256 // 512 + 512 - before)


def test_bytes_of_a_scan_by_hand():
    # 4 tokens, 2 heads of 3, state 5: x is 24 numbers, B 20, dt 8 in float32
    work, flops = measure.scan_work(4, 2, 3, 5, width=2), scan_flops(2, 3, 1, 5)
    assert work["forward"] == (2 * (24 + 20 + 20 + 24) + 4 * 8, 4 * flops)  # x, B, C, y; dt
    assert work["backward"] == (2 * (3 * 24 + 4 * 20) + 4 * (8 + 8), 2 * 4 * flops)


def test_bytes_of_the_kernels_by_hand():
    # 1,024 tokens in 2 chunks of 512, 3 heads of 4, state 5, two groups. In numbers of 2 bytes, x: 1024 * 12;
    # states: 2 * 3 * 4 * 5; B: 1024 * 5 * 2; C B^T: 2 chunks, 2 groups, 10 of 16 tiles of 128 x 128
    x, s, bc, cb = 24576, 240, 20480, 2 * 2 * 2 * 10 * 128 * 128
    # 1024 * 3 numbers of 4 bytes each: step, dt, c twice, before and after at 9 boundaries; of rows and columns
    # 1 to 8 of 8 tiles each, on average 4.5; F, E, diagonal, dt, ddt
    decays, ddt = 12288 * (4 + 9 + 9), 12288 * (9 + 5)
    size = measure.kernel_bytes(1024, 3, 4, 5, 512, g=2)
    both = {"_decays_kernel": decays, "_scan_kernel": x + x + bc + cb + s}
    assert size["forward"] == both | {"_cb_kernel": bc + bc + cb, "_states_kernel": x + bc + s}
    assert size["backward"] == both | {
        "_states_kernel": x + bc + s + s, "_dcb_kernel": x + x + cb + cb,
        "_dbc_kernel": 2 * (x + 3 * bc + cb + s), "_ddt_kernel": ddt}
    short = measure.kernel_bytes(32, 1, 1, 256, 16)  # two chunks, each one tile and not cut
    assert short["forward"]["_cb_kernel"] == 2 * 32 * 256 * 2 + 2 * 2 * 16 * 16
    assert short["forward"]["_decays_kernel"] == 32 * 4 * (4 + 2 + 2)
    assert short["backward"]["_ddt_kernel"] == 32 * 4 * (2 + 2 + 2 + 3)  # F and E of two tiles


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU")
def test_the_kernels_are_those_that_run(monkeypatch):
    """A pass launches the kernels that kernel_bytes names, and no other."""
    launched = {"forward": set(), "backward": set()}
    launch, current = ssm_scan._Plan.launch, ["forward"]

    def record(self, kernel, name, programs, **arguments):
        launched[current[0]].add(kernel.fn.__name__)
        launch(self, kernel, name, programs, **arguments)
    monkeypatch.setattr(ssm_scan._Plan, "launch", record)
    leaves = measure.scan_inputs(40, 2, 16, 16, torch.float32, "cpu")
    y = measure.ours("triton", 16)(*leaves, (0, 40))
    current[0] = "backward"
    y.sum().backward()
    size = measure.kernel_bytes(40, 2, 16, 16, 16)
    assert launched == {part: set(kernels) for part, kernels in size.items()}


def test_bytes_of_the_kernels_of_a_step():
    size = measure.step_kernel_bytes(SEVEN, 2, 100, torch.bfloat16)
    assert size["_attend_kernel"] == 44 * 2 * 2 * 2 * 128 * 100 * 2
    assert size["_conv_step_kernel"] == 2 * 44 * 2 * 3584 * 3 * 2
    assert size["_step_kernel"] == 2 * 44 * 2 * 24 * 128 * 256 * 4
    assert all(hasattr(decode, name) or hasattr(ssm_scan, name) for name in size)


@pytest.mark.parametrize("c", [SMALL, PRESETS["tiny"], replace(SMALL, tie_word_embeddings=True)])
def test_flops_are_those_that_torch_counts(c, monkeypatch):
    monkeypatch.setattr(model, "attend", model.attend.__wrapped__)  # kernels are chosen here
    ids, t = torch.randint(c.vocab_size, (1, 64)), 64  # of one chunk alone, the state has no gradient
    flops, count = flops_per_token(c, t), torch.ops.aten
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = FalconH1(c)(ids)
    forward = dict(counter.flop_counts["Global"])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    backward = counter.flop_counts["Global"]
    assert forward[count.mm] == t * (flops["blocks"] + flops["head"]) and backward[count.mm] == 2 * forward[count.mm]
    # On a CPU the scan cuts chunks of 16 or 32, and both it and this attention compute the triangle's empty half, too.
    chunk = 1 << max(4, (c.mamba_d_head * c.mamba_d_state).bit_length() // 2)
    scan = c.num_hidden_layers * scan_flops(c.mamba_n_heads, c.mamba_d_head, c.mamba_n_groups, c.mamba_d_state, 2 * chunk)
    assert forward[count.bmm] == t * (scan + 2 * flops["attention"]) and backward[count.bmm] == 2 * forward[count.bmm]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_those_of_the_cache(dtype):
    for c in (SMALL, PRESETS["tiny"]):
        cache, size = Cache(c, 3, 50, dtype=dtype), cache_bytes(c, 3, 50, dtype)
        assert size == {"kv": cache.k.nbytes + cache.v.nbytes, "conv": cache.conv.nbytes, "ssm": cache.ssm.nbytes}
    assert cache_bytes(SEVEN, 1, 1, torch.bfloat16) == {"kv": 44 * 2 * 2 * 128 * 2, "conv": 44 * 3584 * 3 * 2, "ssm": 44 * 24 * 128 * 256 * 4}


def test_decoding_floor_by_hand():
    weights = sum(flops_per_token(SMALL, 1)[part] for part in ("blocks", "head")) // 2
    size = cache_bytes(SMALL, 5, 8, torch.float32)
    moved = 4 * weights + size["kv"] + 2 * size["conv"] + 2 * size["ssm"]
    assert decoding_floor(SMALL, 5, 8, torch.float32, bandwidth=100, rate=1e30) == pytest.approx(moved / 100)
    assert decoding_floor(SMALL, 5, 8, torch.float32, bandwidth=1e30, rate=100) == pytest.approx(5 * 2 * weights / 100)


def step_bytes(c, tokens, documents, recompute):
    """The most bytes of tensors that a training step on one row holds, this one included, as torch reports what it allocates and frees."""
    model, ranks = FalconH1(c), train_sft.Ranks()
    optimizer, model = train_sft.make_optimizer(model, 1e-3, 0.01), train_sft.shard(model, ranks, recompute)
    ids = np.random.default_rng(0).integers(c.vocab_size, size=(documents, tokens // documents)).astype(np.int32)
    packs = data.pack([data.Sample(row, np.ones(len(row), bool), 1.0, "") for row in ids], tokens)
    def step():
        train_sft.train_step(model, optimizer, packs, 1e-3, 1.0, ranks)
    step()  # makes the moments
    held = [*model.parameters(), *(v for state in optimizer.state.values() for v in state.values() if v.dim())]
    return sum(v.nbytes for v in held) + peak_bytes(step, "cpu")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("name", "tokens", "documents"), [("tiny", 512, 4), ("tiny", 4096, 1), ("100m", 300, 2)])
def test_training_bytes_are_those_of_a_real_step(name, tokens, documents, recompute):
    size = training_bytes(PRESETS[name], tokens, device="cpu", recompute=recompute)
    assert sum(size.values()) == pytest.approx(step_bytes(PRESETS[name], tokens, documents, recompute), rel=0.08)


@pytest.mark.parametrize(("vocab", "d", "t"), [(1000, 8, 40_000), (50_000, 2000, 200)])
def test_bytes_of_the_loss_are_those_of_a_real_one(vocab, d, t):
    """Of several chunks, the largest in the forward pass; of one, in the backward pass."""
    h, weight = torch.randn(t, d, requires_grad=True), torch.randn(vocab, d, requires_grad=True)

    def step():
        token_logprobs(h, weight, torch.zeros(t, dtype=torch.long))[0].sum().backward()
    size = measure.loss_bytes(replace(SMALL, vocab_size=vocab, hidden_size=d), t, "cpu")
    assert size == pytest.approx(peak_bytes(step, "cpu"), rel=0.02)


def test_bytes_of_the_loss_on_a_gpu():
    """7B: 2,048 of 32,768 tokens a chunk. The forward pass in bfloat16 has the same buffers on a CPU."""
    numbers, head = 2048 * 130_048, 130_048 * 3072
    assert measure.loss_bytes(SEVEN, 32768, "cuda") == 8 * numbers + 4 * head
    c = replace(SMALL, vocab_size=5000, hidden_size=8)
    h, weight = (torch.randn(n, 8, dtype=torch.bfloat16) for n in (300, c.vocab_size))

    def forward():
        token_logprobs(h, weight, torch.zeros(300, dtype=torch.long), chunk=300)
    assert measure.loss_bytes(c, 300, "cuda") == 10 * 300 * 5000
    assert peak_bytes(forward, "cpu") == pytest.approx(10 * 300 * 5000, rel=0.02)


def test_training_bytes_on_many_ranks():
    total, c = sum(parameters(SMALL).values()), SMALL
    assert total == sum(p.numel() for p in FalconH1(c).parameters())
    outer = 2 * 37 * 12  # the block's share counts half of the last norm, 6 numbers, with each block
    size = training_bytes(c, 8, ranks=8)
    assert size["parameters"] == 4 * total / 8 and size["moments"] == 8 * total / 8
    assert size["gathered"] == pytest.approx(4 * (outer + 2 * (total - outer) / 2))
    assert training_bytes(c, 8, ranks=1, device="cpu")["gathered"] == 0


def kept_bytes(c, t):
    """What autograd keeps of a block's forward pass in bfloat16 with the Triton kernels, each piece of memory once, without weights."""
    m, rope = FalconH1(c).to(torch.bfloat16), rope_table(torch.arange(t)[None], c.head_dim, c.rope_theta, torch.bfloat16)
    mup = torch.ones(sum(c.mamba_widths), dtype=torch.bfloat16)
    shared, kept = {v.untyped_storage().data_ptr() for v in (*m.parameters(), *rope, mup)}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in shared:
            kept[x.untyped_storage().data_ptr()] = x  # keeps it alive, so that nothing else gets its address
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        m.model.layers[0](torch.randn(1, t, c.hidden_size, dtype=torch.bfloat16, requires_grad=True), Context(rope, mup, (0, t)))
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU")
@pytest.mark.parametrize("norm", [True, False])
def test_block_bytes(norm, monkeypatch):
    monkeypatch.setattr(model, "ssd_scan", partial(model.ssd_scan, backend="triton"))
    monkeypatch.setattr(model, "causal_conv1d", partial(model.causal_conv1d, backend="triton"))
    c = replace(SEVEN, vocab_size=64, hidden_size=96, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                mamba_d_ssm=96, mamba_n_heads=3, mamba_d_head=32, mamba_d_state=32, num_hidden_layers=1, mamba_rms_norm=norm)
    assert block_bytes(c) == pytest.approx(kept_bytes(c, measure.CHUNK) / measure.CHUNK, rel=0.01)


def test_peak_bytes():
    def run():
        a = torch.ones(1000, 250)  # 1 MB
        b = a + 1
        del a
        return b.exp()  # a is gone when this third one comes
    assert peak_bytes(run, "cpu") == pytest.approx(2_000_000, abs=100)


def test_functions_take_turns():
    order = []
    assert len(medians([lambda: order.append("a"), lambda: order.append("b")], "cpu", rounds=3)) == 2
    assert "".join(order) == "ababab"


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch):
    """Device events around each call, in the order of the stream, and no wait before the last one."""
    stream, clock = [], iter((0, 5, 10, 11, 20, 23))  # the three calls take 5, 1 and 3

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            stream.append("event")
            self.at = next(clock)

        def elapsed_time(self, end):
            assert stream[-1] == "waited"
            return end.at - self.at
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: stream.append("waited"))
    assert medians([lambda: stream.append("call")], "cuda", rounds=3) == [3]
    assert stream == 3 * ["event", "call", "event"] + ["waited"]


def test_kernel_times(monkeypatch):
    """Milliseconds from microseconds, the longest first, only the device's; of the second call."""
    rows = (("a", 2000, 1), ("cudaLaunchKernel", 0, 9), ("b", 5000, 2))
    events = [SimpleNamespace(key=key, self_device_time_total=time, count=count) for key, time, count in rows]
    calls, profiler = [], SimpleNamespace(key_averages=lambda: events)
    assert measure.kernel_times(lambda: calls.append(1)) == {} and len(calls) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: nullcontext(profiler))
    assert [*measure.kernel_times(lambda: calls.append(1)).items()] == [("b", (5, 2)), ("a", (2, 1))]
    assert len(calls) == 3


def test_peers_that_cannot_be_imported(monkeypatch, capsys):
    """Each is named with its reason, whatever it raises."""
    def broken():
        raise RuntimeError("no CUDA here\nand more")
    monkeypatch.setattr(peers, "fla_scan", broken)
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    assert peers.peers() == {}
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("mamba_ssm cannot be imported: ModuleNotFoundError: ")
    assert rows[1:] == ["fla cannot be imported: RuntimeError: no CUDA here"]


def test_mamba_ssm_without_its_extension(monkeypatch, tmp_path):
    (tmp_path / "mamba_ssm" / "ops" / "triton").mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import selective_scan_cuda\n")
    (tmp_path / "mamba_ssm" / "ops" / "triton" / "ssd_combined.py").write_text(
        "def mamba_chunk_scan_combined(*args, seq_idx, **options):\n    return seq_idx\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [*(name for name in sys.modules if name.split(".")[0] == "mamba_ssm"), "selective_scan_cuda"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    scan = peers.peers()["mamba_ssm"]
    assert scan(torch.ones(1, 5), *4 * [None], (0, 2, 3, 5)).tolist() == [[0, 0, 1, 2, 2]]
    assert scan(torch.ones(1, 5), *4 * [None], (0, 5)) is None
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"] + ["selective_scan_cuda"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_in_words(name):
    lines = describe(name, PRESETS[name])
    assert max(map(len, lines)) <= 120
    rows = diagram(PRESETS[name])
    joins = {"┐": "┤├┼┘│", "┤": "┘"}  # what stands below a corner goes on from it
    for above, below in zip(rows, rows[1:]):
        for i, character in enumerate(above[6:], 6):
            assert character not in joins or below[i : i + 1] in (*joins[character],) or below[i - 1 : i + 2] == "(×)", (above, below)


def test_the_published_model_in_words():
    text = "\n".join(describe("7b", SEVEN))
    assert "7b: 7,585,648,736 parameters" in text and "in_proj 3072 → 6680" in text and "states (b, 24, 128, 256)" in text
    assert "28.26 in float32, 14.13 in bfloat16" in text  # 7,585,648,736 * 4 / 2^30


def command(*arguments):
    script = Path(model.__file__)
    return subprocess.run([sys.executable, script.name, *arguments], cwd=script.parent, capture_output=True, text=True)


def test_commands():
    done = command("--preset", "7b")
    assert done.returncode == 0 and "7,585,648,736" in done.stdout and not done.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (["--preset", "8b"], "error: --preset 8b: not one of tiny, 100m, 0.5b, 1.5b, 1.5b-deep, 3b, 7b, 34b"),
    (["--ben"], "--ben"), (["--preset"], "--preset")])
def test_what_is_not_a_command(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["model.py", *arguments])
    with pytest.raises(SystemExit) as e:
        model.main()
    assert message in e.value.code and "\n" not in e.value.code  # a text: one line on stderr, exit status 1


def test_benchmark_of_a_small_model(capsys, monkeypatch):
    monkeypatch.setattr(measure, "floors", lambda device: (1e10, 1e11))
    small_model(PRESETS["tiny"], batch=2, length=8, decoding=((2, 3),), rounds=1)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[-3:]] == ["training", "prefill", "decoding,"]
    assert all(" % " in row for row in rows[-3:])


def test_benchmark_of_a_large_model(capsys, monkeypatch):
    monkeypatch.setattr(measure, "floors", lambda device: (1e10, 1e11))
    def cache(c, slots, *size, **kind):
        if slots > 2:
            raise torch.OutOfMemoryError("out of memory\nand more")
        return Cache(c, slots, *size, **kind)
    monkeypatch.setattr(measure, "Cache", cache)
    large_model(PRESETS["tiny"], "cpu", length=16, batches=(2, 4), contexts=(8,), rounds=1)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[1:]] == ["decoding,", "decoding,", "prefill", "training"]
    assert "%" in rows[1] and "does not fit: out of memory" in rows[2] and "and more" not in rows[2] and "attention and scan" in rows[4]


def test_plan():
    text = "\n".join(measure.plan("7b", PRESETS["7b"], 256, 2, 36864, "cuda"))
    assert "4,718,592 tokens a step" in text and text.count("DOES NOT FIT") == 2 and text.count("  fits  ") == 2
    assert "H100, 80 GB          DOES NOT FIT               DOES NOT FIT" in "\n".join(measure.plan("34b", PRESETS["34b"], 8, 1, 32768, "cuda"))
    assert "2 CPU processes" in (text := "\n".join(measure.plan("100m", PRESETS["100m"], 2, 1, 512, "cpu"))) and "H100" not in text
    c = PRESETS["7b"]  # 12 heads on 2 keys, 24 heads of 128 on one group of 256: two ranks send each other half of what they made
    assert measure.exchange_bytes(c, 10, 2) == 44 * 10 * (2 * 128 * (12 + 2) + 2 * 3072 + 2 * 2 * 256 + 24)


def test_the_parts():
    """They run, and name the bytes that they must move."""
    c, moved = PRESETS["tiny"], {}
    for name, run, size in measure.parts(c, torch.float32, "cpu", 256, batches=(2,)):
        run()
        moved[name] = size
    x = 4 * 256 * sum(c.mamba_widths[1:4])  # float32
    logits = 2 * 4 * c.vocab_size
    count = sum(parameters(replace(c, num_hidden_layers=2)).values())
    assert moved == {"convolution, forward": 2 * x, "convolution, backward": 3 * x,
                     "draw, batch 2, top-p 1.0": logits, "draw, batch 2, top-p 0.95": logits,
                     f"AdamW, {count:,} parameters": 28 * count}


def test_bench_leaves_the_cpu_alone_where_there_is_a_gpu(monkeypatch):
    ran = []
    monkeypatch.setattr(sys, "argv", ["model.py", "--bench"])
    for name in ("small_model", "large_model"):
        monkeypatch.setattr(measure, name, partial(lambda name, *args: ran.append(name), name))
    for gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        measure.main()
    assert ran == ["large_model", "small_model"]


def test_shares_of_the_kernels(monkeypatch, tmp_path):
    """Bytes and milliseconds of all calls together: 3 GB at 1 TB/s are 3 ms of the 4 that two calls took."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "gpu")
    stages = importlib.import_module("stages")
    monkeypatch.setattr(stages, "OUT", tmp_path)
    monkeypatch.setattr(stages, "kernel_times", lambda run: {"_dcb_kernel": (4.0, 2), "fill": (1.0, 1)})
    stages.put_kernels("kernel", None, 1e12, {"_dcb_kernel": 3e9})
    rows = [json.loads(row) for row in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row.get("of_copy") for row in rows] == [0.75, None, None]
    assert rows[0]["calls"] == 2 and rows[-1] == {"kind": "kernels", "sum_ms": 5, "launches": 3}


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes there; gpu_day.sh runs it")
def test_scripts_of_a_gpu_day(tmp_path):
    """They still fit the code: one of them from end to end, the imports of the others, the shell's syntax."""
    folder = Path(__file__).parent / "gpu"
    environment = os.environ | {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    options = dict(cwd=folder.parents[1], env=environment, capture_output=True, text=True)
    done = subprocess.run([sys.executable, folder / "check.py"], **options)
    results = [json.loads(row) for row in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert done.returncode == 0 and not [row for row in results if row["kind"] == "FAILED"], done.stderr
    kinds = ("long", "graphs", "set aside", "scan error", "conv error", "step error")
    rows = {kind: [row for row in results if row["kind"] == kind] for kind in kinds}
    assert [row["y"] for row in rows["long"]] == 2 * ["same bits"]
    assert [row["same_tokens"] for row in rows["graphs"]] == [True, True]
    assert rows["set aside"][0]["waiting"] > 0 and rows["set aside"][0]["whole"]
    assert all(row["worst_logprob_against_trainer"] < 1e-4 for row in rows["graphs"] + rows["set aside"])
    assert all(row["y"] < 0.01 for kind in kinds[-3:] for row in rows[kind])
    script = "import decoding, scan, train, warm"
    imports = subprocess.run([sys.executable, "-c", script], **options | {"cwd": folder})
    assert imports.returncode == 0, imports.stderr
    assert subprocess.run(["bash", "-n", folder / "gpu_day.sh"], **options).returncode == 0
