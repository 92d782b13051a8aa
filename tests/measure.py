"""Parity, speed and size, for `python ssm_scan.py`, `python model.py --bench`, `python model.py --preset NAME` and the tests: errors
against the definition; times as shares of a floor that is measured on the spot, next to other people's kernels and models where
they are installed; what a configuration costs in parameters, operations and bytes, as formulas.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F

from model import CHUNK, PRESETS, Cache, Decoder, FalconH1, FalconH1Config, draw, generate, prefill
from ssm_scan import causal_conv1d, chunk_of, ssd_scan
from tests.peers import peers
from model import tokens_of_chunk
from train_sft import make_optimizer, shares

# ---------------------------------------------------------------------------------------------------------------------
# 1. The scan against its definition


def random_inputs(b, t, h, p, g, n, *, states=None, dtype=torch.float32, seed=0, device="cpu"):
    """Tensors of a plausible layer, for tests and benchmarks: dt around 0.1 after softplus, A between -1 and -16."""
    r = torch.Generator(device).manual_seed(seed)
    def normal(*shape):
        return torch.randn(*shape, generator=r, device=device)
    inputs = dict(x=normal(b, t, h, p), dt=normal(b, t, h) - 2,
                  A=-1 - 15 * torch.rand(h, generator=r, device=device), B=normal(b, t, g, n) * n**-0.5,
                  C=normal(b, t, g, n), D=normal(h), dt_bias=normal(h) * 0.3)
    if states is not None:
        inputs["initial_states"] = normal(states, h, p, n)
    return {name: v.to(dtype).requires_grad_() for name, v in inputs.items()}


def cotangents(*outputs):
    """Random gradients of the outputs, the same ones for every backend."""
    r = torch.Generator(outputs[0].device).manual_seed(1)
    return [torch.randn(v.shape, generator=r, device=v.device).to(v) for v in outputs]


def scan_results(inputs, backend=None, *, cu_seqlens=None, chunk_size=CHUNK):
    """{"y": ..., "S": final states, "dx": ..., ...}: the scan's outputs and gradients."""
    leaves = {name: v.detach().requires_grad_() for name, v in inputs.items()}
    y, S = ssd_scan(**leaves, dt_softplus=True, cu_seqlens=cu_seqlens, chunk_size=chunk_size, backend=backend)
    torch.autograd.backward([y, S], cotangents(y, S))
    return {"y": y.detach(), "S": S.detach(), **{"d" + name: v.grad for name, v in leaves.items()}}


def relative_errors(inputs, *, backend="torch", oracle="recurrent", **options):
    """|ours - oracle| / |oracle| of y, the final states and every gradient; the oracle runs in float64."""
    ours = scan_results(inputs, backend, **options)
    exact = scan_results({name: v.double() for name, v in inputs.items()}, oracle, **options)
    return {name: float((ours[name] - v).norm() / v.norm().clamp(min=1e-30)) for name, v in exact.items()}


def scan_parity():
    device, backend = ("cuda", "triton") if torch.cuda.is_available() else ("cpu", "torch")
    cases = {
        "ragged end": (dict(b=2, t=70, h=4, p=16, g=2, n=32), None),
        "packed, with states": (dict(b=1, t=105, h=4, p=16, g=2, n=32, states=4), [0, 40, 41, 57, 105]),
        "odd sizes": (dict(b=1, t=45, h=6, p=24, g=1, n=40, states=1), None),
    }
    print(f"{backend}: relative error against the float64 recurrence, chunks of at most 32, float32")
    for name, (shape, cu) in cases.items():
        inputs = {k: v.detach().to(device) for k, v in random_inputs(**shape).items()}
        errors = relative_errors(inputs, cu_seqlens=cu, chunk_size=32, backend=backend)
        print(f"  {name:20s}", "  ".join(f"{k} {v:.0e}" for k, v in errors.items()))


# ---------------------------------------------------------------------------------------------------------------------
# 2. Measuring


def medians(runs, device, rounds=5):
    """Milliseconds of each function of `runs`, which have run before: medians over rounds in which they take
    turns, so that whatever else the machine does hits all alike. On a GPU each call stands between two events
    on the device, and the host waits for none: launches cost time only where the device is out of work."""
    times = [[] for _ in runs]
    for _, (run, taken) in itertools.product(range(rounds), list(zip(runs, times))):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            taken.append((begin, end))
        else:
            start = time.perf_counter()
            run()
            taken.append((time.perf_counter() - start) * 1e3)
    if device == "cuda":
        torch.cuda.synchronize()
        times = [[begin.elapsed_time(end) for begin, end in taken] for taken in times]
    return [sorted(taken)[rounds // 2] for taken in times]


def milliseconds(run, device):
    """Median of 15 calls on a GPU and of 5 on a CPU, after one that compiles."""
    medians([run], device, 1)
    return medians([run], device, 15 if device == "cuda" else 5)[0]


def kernel_times(run):
    """{kernel: (milliseconds, calls)} of a second call of run, the longest first; {} without a GPU."""
    run()
    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    times = {e.key: (e.self_device_time_total / 1e3, e.count) for e in events}  # of microseconds
    return dict(sorted(((k, v) for k, v in times.items() if v[0] > 0), key=lambda row: -row[1][0]))


def passes(function, leaves):
    """{pass: run} of function(*leaves) -> y, the forward and the backward pass each by itself."""
    y = function(*leaves)
    dy = torch.randn_like(y)
    return {"forward": torch.no_grad()(lambda: function(*leaves)),
            "backward": lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)}


def peak_bytes(run, device):
    """The most bytes of tensors that run() holds at a time, on top of those that were there before. Exact on a GPU; on a CPU from
    the profiler's record of what torch allocates and frees, which leaves out scratch memory that libraries take for themselves."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces itself on stderr otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = sorted((e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(nbytes for _, nbytes in changes))


def floors(device):
    """Bytes a second of a copy and operations a second of a matrix product, measured here: nothing can be faster."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, out = torch.randn(size, size, device=device, dtype=dtype), torch.empty(size, size, device=device, dtype=dtype)
    long = torch.empty(2**29 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    copy, product = torch.empty_like(long), milliseconds(lambda: torch.mm(a, a, out=out), device)
    return 2 * long.numel() / milliseconds(lambda: copy.copy_(long), device) * 1e3, 2 * size**3 / product * 1e3


# ---------------------------------------------------------------------------------------------------------------------
# 3. The speed of the scan


def ours(backend=None, chunk=CHUNK):
    def scan(x, dt, A, B, C, cu):
        return ssd_scan(x, dt, A, B, C, cu_seqlens=cu, backend=backend, chunk_size=chunk)[0]
    return scan


def scan_inputs(t, h, p, n, dtype, device):
    """Leaves x, dt after softplus, A, B, C of one row with one group; dt and A stay in float32."""
    inputs = {k: v.detach() for k, v in random_inputs(1, t, h, p, 1, n, device=device).items()}
    x, B, C = (inputs[k].to(dtype) for k in "xBC")
    return [v.requires_grad_() for v in (x, F.softplus(inputs["dt"]), inputs["A"], B, C)]


def scan_speed():
    """Forward and backward of each function (x, dt, A, B, C, cu) -> y, in one document and in documents of 1,000 tokens."""
    if torch.cuda.is_available():
        device, dtype, width, tokens = "cuda", torch.bfloat16, 2, (4096, 32768, 131072)
        shapes, functions = {"0.5B": (24, 64, 128), "7B": (24, 128, 256)}, {"triton": ours("triton"), **peers()}
    else:
        device, dtype, width, tokens = "cpu", torch.float32, 4, (512,)
        shapes, functions = {"small": (8, 64, 64)}, {"torch": ours("torch"), "recurrent": ours("recurrent")}
    print(torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads", "torch", torch.__version__)
    bandwidth, rate = floors(device)
    print(f"copy {bandwidth / 1e9:.0f} GB/s, matrix product {rate / 1e12:.2f} TFLOP/s; ms, GB/s, TFLOP/s, share of the floor")
    for (shape, (h, p, n)), t, packed in itertools.product(shapes.items(), tokens, (False, True)):
        cu = (*range(0, t, 1000), t) if packed else (0, t)
        inputs, work = scan_inputs(t, h, p, n, dtype, device), scan_work(t, h, p, n, width)
        for name, function in functions.items():
            for part, run in passes(lambda *leaves: function(*leaves, cu), inputs).items():
                ms, (size, flops) = milliseconds(run, device), work[part]
                share = 100 * max(size / bandwidth, flops / rate) / (ms / 1e3)
                print(f"  {shape:5s} {t:7,d} tokens {'packed' if packed else '':6s} {name:10s} {part:8s} {ms:9.3f} ms "
                      f"{size / ms / 1e6:7.1f} GB/s {flops / ms / 1e9:7.2f} TFLOP/s {share:4.0f} %")


# ---------------------------------------------------------------------------------------------------------------------
# 4. What a configuration costs, in formulas. c stands for a FalconH1Config; letters as in model.py's glossary.


@lru_cache
def parameters(c):
    """{part: parameters}, tied weights once, of a model that is never given memory."""
    with torch.device("meta"):
        model = FalconH1(c)
    parts = {"embedding": 0, "attention": 0, "mamba": 0, "mlp": 0, "norms": 0, "head": 0}
    where = {"embed": "embedding", "self_attn": "attention", "mamba": "mamba", "feed_forward": "mlp", "layernorm": "norms"}
    for name, p in model.named_parameters():
        parts[next((part for key, part in where.items() if key in name), "head")] += p.numel()
    return parts


def scan_flops(h, p, g, n, chunk=CHUNK):
    """Operations of the chunked scan for one token, its four steps as in ssm_scan.py, with l = chunk and half of the triangle counted:

        C B^T   g l n        W (dt x)   h l p        chunk's state   2 h p n        entering state   2 h p n"""
    return h * (chunk * p + 4 * p * n) + g * chunk * n


def scan_work(t, h, p, n, width):
    """{pass: (bytes, operations)} of t tokens, one group. Forward: x, B, C, dt, y are moved. Backward: dy, x,
    B, C, dt and the gradients of the last four; two products for each of the forward's."""
    flops = t * scan_flops(h, p, 1, n)
    return {"forward": (t * (2 * h * p + 2 * n) * width + 4 * t * h, flops),
            "backward": (t * (3 * h * p + 4 * n) * width + 8 * t * h, 2 * flops)}


def kernel_bytes(t, h, p, n, l, g=1):
    """{pass: {kernel: bytes of all its calls}}, each operand moved once: a row of t tokens, chunks of l.

        x  2 t h p    x, y, or a gradient of them    s   2 (t / l) h p n   the states that enter the chunks
        bc 2 t n g    B, C, or a gradient of them    cb  2 t l g           C B^T: of its 128 x 128 tiles,
        f  4 t h      a float32 of token and head                          those on and below the diagonal

    f counts where there is little else. Decays: the step; dt, a pair for c, and two for each boundary, which
    stand 64 tokens apart. ddt: sums over rows and columns of the triangle's tiles of 64, half of l / 64 + 1
    each; F and E of n / 128 tiles; diagonal, dt, ddt."""
    tiles, edges = max(1, l // 128), max(1, l // 64)
    x, s, bc, f = 2 * t * h * p, 2 * t * h * p * n // l, 2 * t * n * g, 4 * t * h
    cb = 2 * t * l * g * (tiles + 1) // (2 * tiles)
    both = {"_decays_kernel": f * (4 + 2 * (edges + 1)), "_scan_kernel": 2 * x + s + bc + cb}
    forward = {"_cb_kernel": 2 * bc + cb, "_states_kernel": x + bc + s}
    backward = {"_states_kernel": x + bc + 2 * s,
                "_dcb_kernel": 2 * (x + cb),  # a call for the diagonal, one for what lies below
                "_dbc_kernel": 2 * (x + s + cb + 3 * bc),  # a call for C, one for B
                "_ddt_kernel": f * (edges + 1 + 2 * max(1, n // 128) + 3)}
    return {"forward": both | forward, "backward": both | backward}


def step_kernel_bytes(c, slots, length, dtype):
    """{kernel: bytes} of a decoding step, all layers: keys and values are read, states read and written."""
    size = cache_bytes(c, slots, length, dtype)
    return {"_attend_kernel": size["kv"], "_conv_step_kernel": 2 * size["conv"],
            "_step_kernel": 2 * size["ssm"]}


def flops_per_token(c, context):
    """{part: forward operations of one token}, the mean over a row of `context` tokens; a multiplication and an addition are two.

        blocks     2 for each weight of a block's matrices: d hd (2 hq + 2 hkv) + d (2 I + 2 g n + h) + I d + 3 d intermediate_size
        head       2 d vocab_size
        attention  2 2 hq hd context / 2 a layer: q k^T and its product with v, over the half of the keys that a token sees on average
        scan       scan_flops a layer

    Training is three times the sum: the backward pass has two products for each of the forward's, so 6 per weight. Norms, gates and
    the convolution are left out (0.1 % at 7B), as are what activation checkpointing and the head's loss compute a second time."""
    d, hd, I = c.hidden_size, c.head_dim, c.mamba_d_ssm
    block = d * hd * (2 * c.num_attention_heads + 2 * c.num_key_value_heads) + d * sum(c.mamba_widths) + I * d + 3 * d * c.intermediate_size
    scan = scan_flops(c.mamba_n_heads, c.mamba_d_head, c.mamba_n_groups, c.mamba_d_state, min(CHUNK, context))
    layers = c.num_hidden_layers
    return {"blocks": 2 * layers * block, "head": 2 * d * c.vocab_size,
            "attention": layers * 2 * c.num_attention_heads * hd * context, "scan": layers * scan}


def cache_bytes(c, slots, length, dtype):
    """{part: bytes} of a Cache: keys and values of `length` tokens and the last inputs of the convolution in dtype, states in float32."""
    rows, width = c.num_hidden_layers * slots, dtype.itemsize
    return {"kv": width * rows * 2 * c.num_key_value_heads * c.head_dim * length,
            "conv": width * rows * sum(c.mamba_widths[1:4]) * (c.mamba_d_conv - 1), "ssm": 4 * rows * c.mamba_d_ssm * c.mamba_d_state}


def decoding_floor(c, batch, context, dtype, bandwidth, rate):
    """Seconds that a decoding step of `batch` sequences with `context` tokens each cannot beat: every matrix and key is read once and
    every state read and written (bandwidth in bytes a second), or every matrix multiplied (rate in operations a second)."""
    flops, cache = flops_per_token(c, context), cache_bytes(c, batch, context, dtype)
    products = flops["blocks"] + flops["head"]
    moved = products // 2 * dtype.itemsize + cache["kv"] + 2 * (cache["conv"] + cache["ssm"])
    return max(moved / bandwidth, batch * products / rate)


def block_bytes(c, device="cuda"):
    """Bytes that one block keeps of a token for its gradient, counted from what autograd saves: w bytes a number, 2 on a GPU (bfloat16,
    Triton kernels), 4 on a CPU (float32, the chunked scan); l tokens are a chunk; letters as in model.py.

        norms           2 (4 + w) d             their inputs in float32, and those normalised
        projections     w d (2 or 3)            inputs of q k v, of in_proj (the same tensor if both multipliers are 1), of the MLP
        attention       w hd (3 hq + 2 hkv)     q, k, v; its output, as padded documents and as tokens
        mamba           w (3 I + 4 g n + h)     z, x, B, C, dt; x, B, C after the convolution
        gated norm      22 I or 20 I            y and z in bfloat16 and float32, gate, product, normalised; without norm 6 I or 12 I
        MLP             4 w ff                  gate, silu(gate), up, their product
        scan, GPU       2 (I n / l + l g)       the state that enters a chunk, C B^T; l = CHUNK
        scan, CPU       4 (5 I + 2 h l + I n / l + g l + 2 g n + 7 h)     also x, dt x, what is written and read; decays, with and without C B^T
        taps, CPU       4 (2 I + 4 g n)         the convolution's inputs with their history, its output before SiLU"""
    d, I, h, ff = c.hidden_size, c.mamba_d_ssm, c.mamba_n_heads, c.intermediate_size
    g, n, w, l = c.mamba_n_groups, c.mamba_d_state, 2 if device == "cuda" else 4, chunk_of(c.mamba_d_head, c.mamba_d_state)
    size = 2 * (4 + w) * d + w * d * (2 + (c.attention_in_multiplier != 1 or c.ssm_in_multiplier != 1)) + 4 * w * ff
    size += w * (c.head_dim * (3 * c.num_attention_heads + 2 * c.num_key_value_heads) + 3 * I + 4 * g * n + h)
    if device == "cuda":
        return size + (22 if c.mamba_rms_norm else 6) * I + 2 * (I * n // CHUNK + CHUNK * g)
    return size + (20 if c.mamba_rms_norm else 12) * I + 4 * (5 * I + 2 * h * l + I * n // l + g * l + 2 * g * n + 7 * h + 2 * I + 4 * g * n)


def loss_bytes(c, tokens, device):
    """The most bytes that the head's loss holds at a time, see model.tokens_of_chunk: for the logits of a
    chunk in the forward pass, or in the backward pass for them and the head's float32 gradient (V, d)."""
    V, d = c.vocab_size, c.hidden_size
    logits = V * min(tokens, tokens_of_chunk(V, torch.device(device)))
    forward, backward = (10, 8) if device == "cuda" else (8, 4)  # bytes a number
    return max(forward * logits, backward * logits + 4 * V * d)


def training_bytes(c, tokens, ranks=1, device="cuda", recompute=False):
    """{part: bytes} on each rank when a step of train_sft.py needs most: one row of `tokens` tokens for every rank; float32 parameters,
    gradients and two moments, each rank a slice. With recompute, activation checkpointing, all blocks but one keep their input only.

        gathered     what is whole on every rank for a while, where FSDP2 is at work: weights and gradients of the embedding and the
                     head until the backward pass is over, and of two blocks, one at work and one on its way
        at work      beside the activations, the most of what is needed at the head: loss_bytes; in the
                     last block: its gradients, of the MLP's products above all, and where recomputed itself;
                     in the first block: the same and all gradients, which have come as activations went"""
    parts, w, layers = parameters(c), 2 if device == "cuda" else 4, c.num_hidden_layers
    total, outer = sum(parts.values()), parts["embedding"] + parts["head"]
    block, products, whole = block_bytes(c, device) * tokens, 3 * w * c.intermediate_size * tokens, device == "cuda" or ranks > 1
    kept = layers * w * c.hidden_size * tokens if recompute else layers * block
    head = loss_bytes(c, tokens, device)
    work = max(head, recompute * block + products, block + products + 4 * total / ranks - kept)
    return {"parameters": 4 * total / ranks, "moments": 8 * total / ranks, "gathered": whole * 2 * w * (outer + 2 * (total - outer) / layers),
            "activations": kept, "at work": work}


# ---------------------------------------------------------------------------------------------------------------------
# 5. A configuration in words


def diagram(c):
    """The block as in model.py's docstring, with this configuration's multipliers and the sizes of what passes; at most 120 columns."""
    d, ff, hd, hq, hkv = c.hidden_size, c.intermediate_size, c.head_dim, c.num_attention_heads, c.num_key_value_heads
    I, _, gn, _, h = c.mamba_widths
    gate = "y silu(z)" if not c.mamba_rms_norm else "norm(y) silu(z)" if c.mamba_norm_before_gate else "norm(y silu(z))"

    def x(multiplier):
        return f"x {multiplier:.4g} "

    def heads(name, n):
        return f"{f'{name}_proj {d} → {n * hd} ':─<24}{' ' + x(c.key_multiplier) if name == 'k' else '':─<12}─ {f'{name} (b, t, {n}, {hd}) ':─<20}"

    def part(i, name):
        return f"{x(c.ssm_multipliers[i]):─<11}─ {name + ' ':─<18}"

    lines = [
        f"ids (b, t) ─ embed_tokens {c.vocab_size} x {d} ─ {x(c.embedding_multiplier)}─ h (b, t, {d})",
        f"{c.num_hidden_layers} blocks:",
        f"h (b, t, {d})",
        f"├─ RMSNorm ─ (b, t, {d})",
        f"│  ├─ {x(c.attention_in_multiplier)}─ (b, t, {d})",
        f"│  │  ├─ {heads('q', hq)} RoPE ─┐",
        f"│  │  ├─ {heads('k', hkv)} RoPE ─┼─ attention ─ (b, t, {hq * hd}) ─┐",
        f"│  │  └─ {heads('v', hkv)}───────┘{'':{len(f' attention ─ (b, t, {hq * hd}) ─') + 1}}│",
    ]
    back = lines[-2].rindex("┐") - len("│  │  ┌")
    lines += [
        f"│  │  ┌{'':─<{back}}┘",
        f"│  │  └─ o_proj {hq * hd} → {d} ─ {x(c.attention_out_multiplier)}─ (b, t, {d}) ─(+)",
        f"│  └─ {x(c.ssm_in_multiplier)}─ in_proj {d} → {sum(c.mamba_widths)}",
        f"│     ├─ {part(1, f'x (b, t, {I})')}┐",
        f"│     ├─ {part(2, f'B (b, t, {gn})')}┼─ conv, {c.mamba_d_conv} taps ─┐",
        f"│     ├─ {part(3, f'C (b, t, {gn})')}┘                ├─ SSD scan, states (b, {h}, {c.mamba_d_head}, {c.mamba_d_state})"
        f" ─ y (b, t, {h}, {c.mamba_d_head}) ─┐",
        f"│     ├─ {part(4, f'dt (b, t, {h})')}── softplus ─────┘",
    ]
    back = lines[-2].rindex("┐")
    lines[-1] = f"{lines[-1]:{back}}│"
    lines += [
        f"{'│     └─ ' + part(0, f'z (b, t, {I})'):─<{back}}┤",
        f"{'│     ┌':─<{back - len(gate) - 3}} {gate} ─┘",
        f"│     └─ (b, t, {I}) ─ out_proj {I} → {d} ─ {x(c.ssm_out_multiplier)}─ (b, t, {d}) ─(+)",
        f"h (b, t, {d}), the sum of all three",
        f"├─ RMSNorm ─ (b, t, {d})",
        f"│  ├─ {f'gate_proj {d} → {ff} ─ ' + x(c.mlp_multipliers[0]) + '─ silu ':─<45}┐",
        f"│  └─ {f'up_proj {d} → {ff} ':─<44}(×)─ (b, t, {ff}) ─ down_proj {ff} → {d} ─ {x(c.mlp_multipliers[1])}─(+)",
        f"h (b, t, {d})",
        f"after the last block: RMSNorm ─ lm_head {d} → {c.vocab_size}{' (tied)' if c.tie_word_embeddings else ''} ─ {x(c.lm_head_multiplier)}─ "
        f"logits (b, t, {c.vocab_size})",
    ]
    return lines


def overview():
    """What `python model.py` prints, as lines."""
    lines = [f"{'preset':10s} {'all':>14s} " + " ".join(f"{part:>14s}" for part in parameters(PRESETS["tiny"]))]
    return lines + [f"{name:10s} {sum(parameters(c).values()):14,d} " + " ".join(f"{v:14,d}" for v in parameters(c).values())
                    for name, c in PRESETS.items()]


def describe(name, c):
    """What `python model.py --preset NAME` prints, as lines: the block, then parameters, operations and memory."""
    parts, gib = parameters(c), 2**30
    total = sum(parts.values())
    lines = [f"{name}: {total:,} parameters", "", *diagram(c), "", "parameters"]
    lines += [f"  {part:10s} {n:15,d} {100 * n / total:6.1f} %" for part, n in parts.items()]
    lines += ["", "GFLOP a token, the mean over a row of so many; training is three times forward",
              f"  {'tokens':>9s}  {'blocks':>8s} {'head':>8s} {'attention':>9s} {'scan':>8s} {'forward':>8s} {'training':>8s}"]
    for context in (512, 4096, 32768, 262144):
        flops = flops_per_token(c, context)
        numbers = (*flops.values(), sum(flops.values()), 3 * sum(flops.values()))
        lines.append(f"  {context:9,d}  " + " ".join(f"{n / 1e9:{w}.3f}" for n, w in zip(numbers, (8, 8, 9, 8, 8, 8))))
    one = cache_bytes(c, 1, 1, torch.bfloat16)
    lines += ["", f"GiB of weights: {4 * total / gib:.2f} in float32, {2 * total / gib:.2f} in bfloat16", "",
              f"GiB of cache: {one['kv']:,} bytes a token (keys and values, bfloat16), {one['conv'] + one['ssm']:,} a sequence (states, float32)",
              f"  {'sequences':>9s}  " + " ".join(f"{f'{length:,d} tokens':>14s}" for length in (512, 16384, 65536, 262144))]
    for slots in (1, 16, 64, 256):
        sizes = (sum(cache_bytes(c, slots, length, torch.bfloat16).values()) for length in (512, 16384, 65536, 262144))
        lines.append(f"  {slots:9d}  " + " ".join(f"{size / gib:14.2f}" for size in sizes))
    lines += ["", "GiB a rank to train with train_sft.py, a row of 32,768 tokens on each, activations checkpointed (as --plan has it)"]
    for ranks in (1, 8, 64, 256):
        size = training_bytes(c, 32768, ranks, recompute=True)
        if ranks == 1:
            lines.append(f"  {'ranks':>9s}  " + " ".join(f"{part:>11s}" for part in (*size, "sum")))
        lines.append(f"  {ranks:9d}  " + " ".join(f"{n / gib:11.2f}" for n in (*size.values(), sum(size.values()))))
    return lines


PEAK, MFU, MEMORY = 989e12, 0.45, {"H200": 141e9, "H100": 80e9}  # bfloat16 operations a second of either (data sheet), assumed share, bytes
NVLINK, NETWORK = 450e9, 50e9  # bytes a second into a GPU, from its node and from others (data sheets: 900 GB/s both ways; 400 Gbit/s)


def exchange_bytes(c, tokens, cp):
    """Bytes that a rank with `tokens` tokens sends in the all-to-alls of one forward pass, bfloat16; letters as in model.py, N = cp:

        (N - 1) / N layers tokens 2 (2 hq hd + 2 N kv hd  +  2 I + 2 N g n + h)    kv, g: key heads and groups that one rank's heads read"""
    kv = len(shares(c.num_attention_heads, cp, c.num_key_value_heads)[1][0])
    groups = len(shares(c.mamba_n_heads, cp, c.mamba_n_groups)[1][0])
    numbers = 2 * c.head_dim * (c.num_attention_heads + cp * kv) + 2 * c.mamba_d_ssm + 2 * cp * groups * c.mamba_d_state + c.mamba_n_heads
    return (cp - 1) / cp * c.num_hidden_layers * tokens * 2 * numbers


def plan(name, c, ranks, cp, context, device):
    """What `python model.py --plan NAME` prints, as lines: one step of train_sft.py in which every cp ranks share a row of `context` tokens,
    sharded over all. Formulas; the memory of one CPU process is checked against a real run, the rates are from data sheets."""
    cases, gb = [training_bytes(c, context // cp, ranks, device, recompute) for recompute in (False, True)], 1e9
    sums = [sum(case.values()) for case in cases]
    lines = [f"{name} on {ranks} {'GPUs' if device == 'cuda' else 'CPU processes'}, {cp} to a row of {context:,} tokens, "
             f"{ranks // cp * context:,} tokens a step; estimated", "",
             f"{'GB on each':22s} {'':>12s} {'--checkpoint-activations':>26s}"]
    lines += [f"  {part:20s} {cases[0][part] / gb:12.3f} {cases[1][part] / gb:26.3f}" for part in cases[0]]
    lines += [f"  {'sum':20s} {sums[0] / gb:12.3f} {sums[1] / gb:26.3f}",
              f"  a rank that works on several rows keeps {4 * sum(parameters(c).values()) / gb:.3f} more, the whole gradient, until the last",
              f"  a checkpoint that is being written keeps {(cases[0]['parameters'] + cases[0]['moments']) / gb:.3f} more in the host's memory"]
    if device != "cuda":
        return [*lines, "  Python and its libraries take 0.4 more"]
    for gpu, room in MEMORY.items():
        fits = ["fits" if size < 0.9 * room else "DOES NOT FIT" for size in sums]
        lines.append(f"  {f'{gpu}, {room / gb:.0f} GB':20s} {fits[0]:>12s} {fits[1]:>26s}     with a tenth left free")
    work = 3 * sum(flops_per_token(c, context).values()) * context / cp  # of one GPU
    weights, again = sum(parameters(c).values()) * (ranks - 1) / ranks, 2 * exchange_bytes(c, context // cp, cp)  # forward, and its gradient
    link = NVLINK if ranks <= 8 else NETWORK
    compute, gather, exchange = work / (PEAK * MFU), 8 * weights / link, again / NVLINK
    lines += ["", "seconds of a step, each by itself; what overlaps costs nothing. Checkpointed: a third more of the first, half more of the "
              "last, for blocks that run twice",
              f"  {compute:8.2f}  {ranks * work / 1e15:,.0f} PFLOP, {100 * MFU:.0f} % of {PEAK / 1e12:.0f} TFLOP/s a GPU",
              f"  {gather:8.2f}  {8 * weights / gb:,.1f} GB a GPU: weights gathered twice in bfloat16, gradients reduced in float32, "
              f"{link / gb:.0f} GB/s",
              f"  {exchange:8.2f}  {again / gb:,.1f} GB a GPU: the all-to-alls of context parallelism, {NVLINK / gb:.0f} GB/s"]
    if gather > compute:
        lines.append(f"Gathering takes longer than the work: longer rows, or --replicas so that it stays in a node ({8 * weights / NVLINK:.2f} s)")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# 6. The speed of the model. Floors: 6 (training) or 2 operations per weight and token at the measured rate of
# matrix products; for decoding also the bytes of decoding_floor. In a CPU's caches a model can be faster.

SMALL = FalconH1Config(
    vocab_size=512, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    mamba_d_ssm=512, mamba_n_heads=8, mamba_d_head=64, mamba_d_state=64)


def print_row(name, tokens, floor, times=(), peaks=(), note=""):
    """One row of the table: tokens a second of the floor (in seconds); of ours and of theirs, with their share of it and their peak."""
    cells = [f"  {name:34s} {tokens / floor:12,.0f}"]
    for ms, peak in zip(times, peaks):
        cells.append(f"{tokens / ms * 1e3:12,.0f} {1e5 * floor / ms:5.0f} % {peak / 2**20:9,.0f}")
    cells += [f"{'-':>12s} {'-':>7s} {'-':>9s}"] * (3 - len(cells)) + [f"{times[1] / times[0]:13.2f}" if len(times) > 1 else f"{'-':>13s}", note]
    print("  ".join(cells).rstrip(), flush=True)


def compare(name, tokens, floor, runs, device, rounds=3):
    """A row for functions that do the same work: ours, then theirs where it can be had. floor(bandwidth, rate) -> seconds; both are
    measured in turn with the functions, since a machine that others use is not the same for long."""
    peaks, limits = [peak_bytes(run, device) for run in runs], []  # the first also warms up
    times = medians([*runs, lambda: limits.append(floors(device))], device, rounds)[:-1]
    print_row(name, tokens, floor(*(sorted(limit)[rounds // 2] for limit in zip(*limits))), times, peaks)


def their_model(model):
    """transformers' model with the same weights, or None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = transformers.FalconH1ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.generation_config.eos_token_id = None  # no token ends a sequence
    return theirs


def small_model(c=SMALL, batch=8, length=512, decoding=((1, 128), (16, 64), (256, 8)), rounds=3):
    """Training, prefill and decoding of a small model in float32 on the CPU, next to transformers with the same weights.
    decoding: (batch, new tokens). Prompts of a single token, so that every step decodes."""
    torch.manual_seed(0)
    model, (bandwidth, rate) = FalconH1(c), floors("cpu")
    theirs, ids = their_model(model), torch.randint(c.vocab_size, (batch, length))
    there = 1 if theirs is None else 2
    print(f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}, float32, {sum(parameters(c).values()):,} parameters: copy "
          f"{bandwidth / 1e9:.1f} GB/s, matrix product {rate / 1e12:.3f} TFLOP/s")
    if theirs is not None:
        with torch.no_grad():
            print(f"logits differ from transformers' by at most {(model(ids[:1]) - theirs(ids[:1]).logits).abs().max():.0e}")
    print(f"  {'tokens a second':34s} {'floor':>12s}  {'ours':>12s} {'share':>7s} {'peak MiB':>9s}  {'transformers':>12s} {'share':>7s} "
          f"{'peak MiB':>9s}  ours / theirs")

    def train(model, loss):
        model.zero_grad()
        loss().backward()

    @torch.no_grad()
    def read():
        theirs(ids, use_cache=True, logits_to_keep=1)

    flops, tokens = flops_per_token(c, length), batch * length
    work = {"training": 3 * tokens * (flops["blocks"] + flops["head"]), "prefill": tokens * flops["blocks"]}
    runs = {"training": [lambda: train(model, lambda: -model(ids, targets=ids)[0].mean()),
                         lambda: train(theirs, lambda: theirs(ids, labels=ids).loss)],
            "prefill": [lambda: prefill(model, ids.tolist()), read]}
    for name in work:
        compare(f"{name} {batch} x {length}", tokens, lambda bandwidth, rate: work[name] / rate, runs[name][:there], "cpu", rounds)
    for slots, new in decoding:
        prompts = torch.randint(c.vocab_size, (slots, 1))
        runs = [lambda: generate(model, prompts.tolist(), max_new_tokens=new, temperature=0, slots=slots),
                lambda: theirs.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=new, pad_token_id=0)]
        compare(f"decoding, batch {slots}, {new} tokens", slots * new,
                lambda *limits: new * decoding_floor(c, slots, (new + 1) // 2, torch.float32, *limits), runs[:there], "cpu", rounds)


def decoding_step(model, batch, context):
    """run() -> logits of a step of `batch` sequences with `context` tokens each, whose cache holds noise."""
    p = next(model.parameters())
    cache = Cache(model.config, batch, context + 1, dtype=p.dtype, device=p.device)
    for part in (cache.k, cache.v, cache.conv, cache.ssm):
        part.normal_()
    tokens, step = torch.randint(model.config.vocab_size, (batch,), device=p.device), Decoder(model, cache)

    @torch.no_grad()
    def run():
        cache.used = context  # again the same step
        cache.lengths.fill_(context)
        return step(tokens)
    return run


def large_model(c, device, dtype=torch.bfloat16, length=32768, batches=(1, 4, 16, 64, 256), contexts=(512, 16384), rounds=5):
    """The same for a model with random weights of dtype on one GPU. A batch that does not fit is skipped.
    Training is forward and backward of one row with activation checkpointing of blocks."""
    torch.manual_seed(0)
    with torch.device(device):
        model = FalconH1(c).to(dtype)
    model.model.recompute = True
    bandwidth, rate = floors(device)
    flops, ids = flops_per_token(c, length), torch.randint(c.vocab_size, (1, length), device=device)
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'cpu'}, torch {torch.__version__}, {dtype}, {sum(parameters(c).values()):,} "
          f"parameters: copy {bandwidth / 1e9:.0f} GB/s, matrix product {rate / 1e12:.2f} TFLOP/s")

    def attempt(name, tokens, floor, prepare, note=""):
        try:
            run = prepare()
            peak = peak_bytes(run, device)
            print_row(name, tokens, floor, medians([run], device, rounds), [peak], note)
        except torch.OutOfMemoryError as e:
            print_row(name, tokens, floor, note=f"does not fit: {str(e).splitlines()[0]}")
        torch.cuda.empty_cache()

    def train():
        model.zero_grad()
        (-model(ids, targets=ids)[0].mean()).backward()

    for context, batch in itertools.product(contexts, batches):
        floor = decoding_floor(c, batch, context, dtype, bandwidth, rate)
        attempt(f"decoding, batch {batch}, context {context:,d}", batch, floor,
                lambda: decoding_step(model, batch, context))
    attempt(f"prefill 1 x {length:,d}", length, length * flops["blocks"] / rate, lambda: lambda: prefill(model, ids.tolist()))
    products = flops["blocks"] + flops["head"]
    attempt(f"training 1 x {length:,d}", length, 3 * length * products / rate, lambda: train,
            note=f"with attention and scan the share is {sum(flops.values()) / products:.2f} times that")


def parts(c, dtype, device, tokens, batches=(1, 16, 256)):
    """(name, run, bytes it must move) of what a model does beside matrix products, attention and the scan."""
    d = sum(c.mamba_widths[1:4])
    shapes = ((1, tokens, d), (d, c.mamba_d_conv), (d,))
    leaves = [torch.randn(*shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]
    runs = passes(lambda *leaves: causal_conv1d(*leaves, activation="silu")[0], leaves)
    yield "convolution, forward", runs["forward"], 2 * leaves[0].nbytes  # x, y
    yield "convolution, backward", runs["backward"], 3 * leaves[0].nbytes  # x, dy, dx
    for batch, top_p in itertools.product(batches, (1.0, 0.95)):
        logits = torch.randn(batch, c.vocab_size, dtype=dtype, device=device)
        u = torch.rand(batch, dtype=torch.float64, device=device)
        yield f"draw, batch {batch}, top-p {top_p}", lambda: draw(logits, u, 0.85, top_p), logits.nbytes
    with torch.device(device):
        model = FalconH1(replace(c, num_hidden_layers=2))  # 1.1 billion parameters at the 7B shape
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    count = sum(parameters(model.config).values())
    step = make_optimizer(model, 1e-5, 0.01).step
    yield f"AdamW, {count:,} parameters", step, 28 * count  # 16 bytes read; all but the gradient written


def main():
    """The command line of model.py."""
    parser = argparse.ArgumentParser(prog="model.py", description="Without a flag: the parameters of every preset.", allow_abbrev=False)
    parser.add_argument("--preset", metavar="NAME", help="all about this one: its block as a diagram, parameters, operations, memory")
    parser.add_argument("--plan", metavar="NAME", help="memory, time and traffic of training this one on --gpus GPUs")
    for flag, default, what in (("gpus", 8, "GPUs"), ("cp", 1, "GPUs that share a row"), ("context", 32768, "tokens of a row")):
        parser.add_argument(f"--{flag}", type=int, default=default, metavar="N", help=f"{what}, for --plan")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: --gpus are processes on a CPU, for --plan")
    parser.add_argument("--bench", action="store_true", help="speed of training, prefill and decoding")
    parser.error = lambda message: sys.exit(f"error: {message}; see --help")  # one line and exit status 1, as for any bad input
    args = parser.parse_args()
    for flag, name in (("preset", args.preset), ("plan", args.plan)):
        if name not in (None, *PRESETS):
            parser.error(f"--{flag} {name}: not one of {', '.join(PRESETS)}")
    name = args.plan or args.preset
    heads = (PRESETS[name].num_attention_heads, PRESETS[name].mamba_n_heads) if args.plan else ()
    if min(args.gpus, args.cp, args.context) < 1 or any(n % args.cp for n in (args.gpus, args.context, *heads)):
        parser.error(f"--cp {args.cp}: must divide --gpus, --context and the model's heads {heads}, all above 0")
    if args.bench and torch.cuda.is_available():
        large_model(PRESETS["7b"], "cuda")
    elif args.bench:
        small_model()
    elif args.plan:
        print("\n".join(plan(name, PRESETS[name], args.gpus, args.cp, args.context, args.device)))
    else:
        print("\n".join(describe(name, PRESETS[name]) if name else overview()))
