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

def test_flops_are_those_that_torch_counts(monkeypatch):
    monkeypatch.setattr(model, "attend", model.attend.__wrapped__)  # the kernel is chosen here
    flops, mm, bmm = bench.flops_per_token(TINY, 64), torch.ops.aten.mm, torch.ops.aten.bmm
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = FalconH1(TINY)(torch.randint(37, (1, 64)))
        forward = dict(counter.flop_counts["Global"])
        logits.sum().backward()
    # A CPU computes the zero half of every triangle too, and takes chunks of 16 tokens at this size.
    scan = 2 * bench.scan_flops(4, 5, 2, 7, chunk=2 * 16)
    assert forward == {mm: 64 * (flops["blocks"] + flops["head"]), bmm: 64 * (scan + 2 * flops["attention"])}
    assert counter.flop_counts["Global"] == {mm: 3 * forward[mm], bmm: 3 * forward[bmm]}

def test_bytes_of_decoding():
    cache = Cache(TINY, 5, 8, dtype=torch.bfloat16)
    size = {"kv": cache.k.nbytes + cache.v.nbytes, "conv": cache.conv.nbytes, "ssm": cache.ssm.nbytes}
    assert bench.cache_bytes(TINY, 5, 8, torch.bfloat16) == size
    weights = 2 * BLOCK + 12 * 37
    moved = 2 * weights + size["kv"] + 2 * size["conv"] + 2 * size["ssm"]
    for bandwidth, rate, seconds in ((100, 1e30, moved / 100), (1e30, 100, 5 * 2 * weights / 100)):
        floor = bench.decoding_floor(TINY, 5, 8, torch.bfloat16, bandwidth, rate)
        assert floor == pytest.approx(seconds)

@interpreter
@pytest.mark.parametrize("norm", [True, False])
def test_bytes_of_a_block_are_what_autograd_saves(norm, monkeypatch):
    """In bfloat16 with the Triton kernels, one chunk, every storage once, without weights and tables."""
    t = 256
    for module in (model, bench):
        monkeypatch.setattr(module, "CHUNK", t)
    for name in ("ssd_scan", "causal_conv1d"):
        monkeypatch.setattr(model, name, partial(getattr(ssm_scan, name), backend="triton"))
    c = replace(PRESETS["7b"], vocab_size=64, hidden_size=96, intermediate_size=384, num_attention_heads=4,
                head_dim=16, mamba_d_ssm=96, mamba_n_heads=3, mamba_d_head=32, mamba_d_state=32,
                num_hidden_layers=1, mamba_rms_norm=norm)
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

@pytest.mark.parametrize("script", ["stages", "check", "decoding", "parts", "scan", "train", "warm"])
def test_gpu_scripts_can_be_imported(script, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "gpu")
    assert importlib.import_module(script)
