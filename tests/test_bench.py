"""What a configuration costs: the formulas against hand-worked numbers and against what torch counts."""

import importlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model
import ssm_scan
from model import PRESETS, Cache, Context, FalconH1, FalconH1Config, rope_table, token_logprobs
from tests import bench
from tests.gpu.kernels import kernel_bytes

interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off with a GPU")
# Every size is another number. in_proj computes z and x, 20 each, B and C, 14 each, and dt, 4.
TINY = FalconH1Config(
    vocab_size=37, hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, mamba_d_ssm=20, mamba_n_heads=4, mamba_d_head=5, mamba_d_state=7,
    mamba_n_groups=2)
BLOCK = 12 * 6 * (4 + 2 + 2 + 4) + 12 * (20 + 20 + 14 + 14 + 4) + 20 * 12 + 3 * 12 * 24  # matrices' weights
COUNTS = {"0.5b": 521_411_104, "1.5b": 1_554_859_392, "1.5b-deep": 1_554_872_208, "3b": 3_149_387_264,
          "7b": 7_585_648_736, "34b": 33_642_516_224}  # of the published checkpoints

def test_sizes_are_the_published_ones(capsys):
    assert {name: sum(bench.parameters(PRESETS[name]).values()) for name in COUNTS} == COUNTS
    bench.main(["sizes"])
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert rows.keys() >= PRESETS.keys()
    assert rows["7b"][0] == "7,585.6" and rows["7b"][3] == "15,171.3"  # 2 bytes per weight
    of_7b = [float(cell.replace(",", "")) for cell in rows["7b"]]
    assert len(of_7b) == 12 and max(of_7b[-3:]) < 80_000  # RL on 8 GPUs and evaluation: 80 GB are enough

def test_bytes_of_sampling_by_hand():
    total = sum(bench.parameters(TINY).values())
    kv = 5 * 2 * 2 * 2 * 6 * 8 * 2  # traces, layers, keys and values, heads, their size, tokens, bytes
    other = bench.cache_bytes(TINY, 5, 8, torch.bfloat16)
    assert bench.sampling_bytes(TINY, 5, 8, gpus=4) == {
        "weights": 2 * total, "trainer": 3 * total, "cache": kv + other["conv"] + other["ssm"],
        "growth": kv / 2, "drawing": 2 * 4 * 5 * 37}
    assert bench.sampling_bytes(TINY, 5, 8)["trainer"] == 0

def test_flops_by_hand():
    assert bench.scan_flops(h=1, p=2, g=1, n=3, chunk=4) == 4 * 3 + 4 * 2 + 2 * 2 * 3 + 2 * 2 * 3
    assert bench.flops_per_token(TINY, 10) == {
        "blocks": 2 * 2 * BLOCK, "head": 2 * 12 * 37, "attention": 2 * 2 * 4 * 6 * 10,
        "scan": 2 * (4 * (10 * 5 + 4 * 5 * 7) + 2 * 10 * 7)}
    # One mixer alone: of BLOCK, the other one's matrices go.
    attention = bench.flops_per_token(replace(TINY, mixers="attention"), 10)
    mamba = bench.flops_per_token(replace(TINY, mixers="mamba"), 10)
    assert (attention["blocks"], attention["scan"]) == (4 * (BLOCK - 12 * 72 - 20 * 12), 0)
    assert (mamba["blocks"], mamba["attention"]) == (4 * (BLOCK - 12 * 6 * 12), 0)
    assert (attention["attention"], mamba["scan"]) == (2 * 2 * 4 * 6 * 10, 2 * (4 * 190 + 140))

@pytest.mark.parametrize("mixers", ["both", "attention", "mamba"])
def test_flops_are_those_that_torch_counts(monkeypatch, mixers):
    c = replace(TINY, mixers=mixers)
    monkeypatch.setattr(model, "attend", model.attend.__wrapped__)  # the kernel is chosen here
    flops, mm, bmm = bench.flops_per_token(c, 64), torch.ops.aten.mm, torch.ops.aten.bmm
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = FalconH1(c)(torch.randint(37, (1, 64)))
        forward = dict(counter.flop_counts["Global"])
        logits.sum().backward()
    # A CPU computes the zero half of every triangle too, and takes chunks of 16 tokens at this size.
    scan = bench.has(c, "mamba") * 2 * bench.scan_flops(4, 5, 2, 7, chunk=2 * 16)
    assert forward == {mm: 64 * (flops["blocks"] + flops["head"]), bmm: 64 * (scan + 2 * flops["attention"])}
    assert counter.flop_counts["Global"] == {mm: 3 * forward[mm], bmm: 3 * forward[bmm]}

@pytest.mark.parametrize(("mixers", "block", "kv", "conv", "ssm"), [
    ("both", BLOCK, 1, 1, 1), ("attention", BLOCK - 1104, 1, 0, 0), ("mamba", BLOCK - 864, 0, 1, 1)])
def test_bytes_of_decoding(mixers, block, kv, conv, ssm):
    """By hand: 2 layers, 5 slots; 8 tokens of k and v; 3 inputs of 48 channels; states of 4 x 5 x 7."""
    c = replace(TINY, mixers=mixers)
    cache = Cache(c, 5, 8, dtype=torch.bfloat16)
    size = {"kv": cache.k.nbytes + cache.v.nbytes, "conv": cache.conv.nbytes, "ssm": cache.ssm.nbytes}
    assert size == {"kv": kv * 10 * 2 * 2 * 6 * 8 * 2, "conv": conv * 10 * 48 * 3 * 2,
                    "ssm": ssm * 10 * 140 * 4}
    assert bench.cache_bytes(c, 5, 8, torch.bfloat16) == size
    weights = 2 * block + 12 * 37
    moved = 2 * weights + size["kv"] + 2 * size["conv"] + 2 * size["ssm"]
    for bandwidth, rate, seconds in ((100, 1e30, moved / 100), (1e30, 100, 5 * 2 * weights / 100)):
        floor = bench.decoding_floor(c, 5, 8, torch.bfloat16, bandwidth, rate)
        assert floor == pytest.approx(seconds)

@interpreter
@pytest.mark.parametrize(("norm", "mixers"), [
    (True, "both"), (False, "both"), (True, "attention"), (True, "mamba")])
def test_bytes_of_a_block_are_what_autograd_saves(norm, mixers, monkeypatch):
    """In bfloat16 with the Triton kernels, one chunk, every storage once, without weights and tables."""
    t = 256
    for module in (model, bench):
        monkeypatch.setattr(module, "CHUNK", t)
    for name in ("ssd_scan", "causal_conv1d"):
        monkeypatch.setattr(model, name, partial(getattr(ssm_scan, name), backend="triton"))
    c = replace(PRESETS["7b"], vocab_size=64, hidden_size=96, intermediate_size=384, num_attention_heads=4,
                head_dim=16, mamba_d_ssm=96, mamba_n_heads=3, mamba_d_head=32, mamba_d_state=32,
                num_hidden_layers=1, mamba_rms_norm=norm, mixers=mixers)
    m = FalconH1(c).to(torch.bfloat16)
    rope = rope_table(torch.arange(t)[None], c.head_dim, c.rope_theta, torch.bfloat16)
    mup = torch.ones(sum(c.mamba_widths), dtype=torch.bfloat16)
    h = torch.randn(1, t, c.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    saved = []  # the tensors themselves, so that no other gets their address
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        m.model.layers[0](h, Context(rope, mup, (0, t)))
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    for x in (*m.parameters(), *rope, mup):
        storages.pop(x.untyped_storage().data_ptr(), None)
    assert bench.block_bytes(c) * t == pytest.approx(sum(storages.values()), rel=0.01)

def test_bytes_of_training():
    c = replace(TINY, vocab_size=5000)
    h, weight = (torch.randn(n, 12, dtype=torch.bfloat16) for n in (300, 5000))
    peak = bench.peak_bytes(lambda: token_logprobs(h, weight, torch.zeros(300, dtype=int), chunk=300), "cpu")
    assert bench.loss_bytes(c, 300) == pytest.approx(peak, rel=0.02)
    total = sum(bench.parameters(c).values())
    assert bench.training_bytes(c, 300, gpus=8) == {
        "weights": total / 2, "gradients": total / 2, "moments": total, "gathered": 4 * total,
        "activations": 2 * 2 * 12 * 300 + 8 * 300 * 5000}  # both blocks' inputs, the logits

def test_bytes_of_kernels_by_hand():
    # 2 chunks of 512 tokens, 3 heads of 4, state 5, 2 groups; 10 of C B^T's 16 tiles; bfloat16, f float32.
    x, s, bc, f = 2 * 1024 * 12, 2 * 2 * 3 * 4 * 5, 2 * 1024 * 5 * 2, 4 * 1024 * 3
    cb = 2 * 2 * 2 * 10 * 128 * 128
    both = {"_decays_kernel": (4 + 9 + 9) * f, "_scan_kernel": x + x + bc + cb + s}
    assert kernel_bytes(1024, 3, 4, 5, 512, g=2) == {
        "forward": both | {"_cb_kernel": bc + bc + cb, "_states_kernel": x + bc + s},
        "backward": both | {"_states_kernel": x + bc + s + s, "_dcb_kernel": x + x + cb + cb,
                            "_dbc_kernel": 2 * (x + 3 * bc + cb + s), "_ddt_kernel": (9 + 5) * f}}

@interpreter
def test_kernels_are_those_that_run(monkeypatch):
    launched = []
    monkeypatch.setattr(ssm_scan, "_launch", lambda kernel, *_, **sizes: launched.append(kernel.fn.__name__))
    y = bench.ours("triton", 16)(*bench.scan_inputs(40, 2, 16, 16, torch.float32, "cpu"), (0, 40))
    y.sum().backward()
    both = kernel_bytes(40, 2, 16, 16, 16)
    assert set(launched[:4]) == set(both["forward"]) and set(launched[4:]) == set(both["backward"])

def test_functions_take_turns_and_their_peak_is_counted():
    order = []
    assert len(bench.medians([lambda: order.append("a"), lambda: order.append("b")], "cpu", rounds=3)) == 2
    assert "".join(order) == "ababab"
    # Three tensors of 1 MB, of which two exist at a time: the sum is free before exp's result is made.
    peak = bench.peak_bytes(lambda: (torch.ones(1000, 250) + 1).exp(), "cpu")
    assert peak == pytest.approx(2_000_000, abs=100)

def test_tables_of_speed(capsys, monkeypatch):
    monkeypatch.setattr(bench, "floors", lambda device: (1e10, 1e11))
    monkeypatch.setattr(bench, "milliseconds", lambda run, device: bench.medians([run], device, 1)[0])
    bench.scan_speed("cpu")
    bench.model_speed(PRESETS["tiny"], "cpu", batch=2, length=8, decoding=((2, 3),), rounds=1)
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert rows == 4 * ["small"] + ["training,", "prefill,", "decoding,"]

def test_modelled_speed_by_hand(monkeypatch):
    """80 bytes of memory beside the weights, 30 a slot: two of five slots decode at a time, in 1 / 50 s."""
    weights = 2 * sum(bench.parameters(TINY).values())
    monkeypatch.setitem(bench.GPUS, "toy", (1, 1, (weights + 80) / 0.9 + 1e-6))
    monkeypatch.setattr(bench, "cache_bytes", lambda c, slots, *rest: {"kv": 20 * slots, "ssm": 10 * slots})
    monkeypatch.setattr(bench, "decoding_floor", lambda c, slots, *rest: 0.02)
    assert bench.modelled_speed(TINY, "toy", 5, 100) == (pytest.approx(100), 2)
    assert bench.modelled_speed(TINY, "toy", 1, 100) == (pytest.approx(50), 1)

def test_qwen3_8b_has_its_size():
    """8.19 billion parameters, and 144 KiB of keys and values per token: 36 x 2 x 8 x 128 x 2 bytes."""
    assert sum(bench.parameters(bench.QWEN3_8B).values()) == pytest.approx(8.19e9, rel=1e-3)
    assert bench.cache_bytes(bench.QWEN3_8B, 1, 1, torch.bfloat16) == {"kv": 147456, "conv": 0, "ssm": 0}

def test_a_step_adds_to_the_noise_of_a_full_cache():
    """Each call is the same step: it reads `context` tokens and writes one behind them."""
    for c in bench.three_forms(TINY).values():
        run = bench.decoding_step(FalconH1(c), 3, 20)
        first = run()
        assert first.shape == (3, 37) and run().isfinite().all()
        assert c.mixers != "attention" or torch.equal(run(), first)

def test_tables_of_the_mixers(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "floors", lambda device: (1e10, 1e11))
    monkeypatch.setattr(bench, "TRIO", TINY)
    bench.mixers_speed("cpu", tmp_path / "speed.png", batches=(1, 2), contexts=(4, 8))
    out = capsys.readouterr().out
    measured, modelled = out.split("MODELLED, not measured")
    rows = [line.split() for line in measured.partition("attention          mamba\n")[2].splitlines() if line]
    assert [row[:2] for row in rows] == [["1", "4"], ["1", "8"], ["2", "4"], ["2", "8"]]
    assert all(len(row) == 5 and min(float(cell.replace(",", "")) for cell in row[2:]) > 0 for row in rows)
    rows = [line.split() for line in modelled.splitlines()]
    # 15.2 GB of weights less the embedding, states read and written, keys of 512 tokens, at 3.35 TB/s.
    assert ["H100", "1", "512", "228", "233", "229", "220"] in rows
    assert ["2", "22%", "22%", "22%", "22%"] in rows  # the paper: +20% at batch 2
    assert 0 < (tmp_path / "speed.png").stat().st_size < 60_000
    monkeypatch.setattr(bench, "free_bytes", lambda device: 10_000)
    assert bench.measure_mixers("cpu", (16,), (4096,)) == {}
    kv, states = 16 * 2 * 2 * 2 * 6 * 4096 * 4, 16 * 2 * (48 * 3 + 140) * 4
    assert f"need {2 * (kv + states) / 1e9:.1f} GB" in capsys.readouterr().out

@pytest.mark.parametrize("flags", [["sizes", "--figure", "x.png"], ["mixers", "--figure", "no/such/x.png"]])
def test_a_figure_that_cannot_be_drawn_is_refused_at_once(flags, capsys):
    with pytest.raises(SystemExit):
        bench.main(flags)
    assert "error: --figure" in capsys.readouterr().err

@pytest.mark.parametrize("script", ["stages", "check", "decoding", "parts", "scan", "train", "warm"])
def test_gpu_scripts_can_be_imported(script, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "gpu")
    assert importlib.import_module(script)
