"""What the README's figures are measured with: speed, memory and size.

    python -m tests.bench scan     errors of every backend against the float64 recurrence; ms, GB/s, TFLOP/s,
                                   and share of this machine's limits, forward and backward; on a GPU next to
                                   mamba_ssm and fla if installed. About 5 s on two CPU cores.
    python -m tests.bench model    tokens per second and peak memory of training, prefill and greedy decoding,
                                   next to a floor. On a CPU of a small model, beside transformers' if it is
                                   installed; on a GPU of the 7B shape. About 30 s on two idle CPU cores, with
                                   transformers 2 minutes.
    python -m tests.bench sizes    a table of the presets: parameters, FLOPs, bytes. About 4 s.
    python -m tests.bench mixers   tokens per second of decoding, by batch and context, and bytes of cache, of
                                   the hybrid, attention alone and SSM alone at equal parameters. Measured on
                                   a small model, modelled for the 7B shape next to Qwen3-8B's. About 30 s
                                   on two idle CPU cores, 11 GB. --figure FILE draws what was measured.

--device cpu or cuda; without it, a GPU if there is one. Not timed on a GPU yet. Functions that are compared
take turns, so that background load affects all alike. FLOPs count a multiply-add as two.
"""

import argparse
import itertools
import os
import statistics
import time
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

from decode import free_bytes
from eval import new_figure
from model import (
    CHUNK, PRESETS, Decoder, FalconH1, FalconH1Config, generate, prefill, single_mixer, tokens_of_chunk)
from ssm_scan import ssd_scan
from tests.peers import peers, their_model

DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}

# 1. What a configuration costs. c is a FalconH1Config; letters as in model.py's glossary --------------------

@lru_cache
def parameters(c):
    """{part: number of parameters}. Tied embeddings count once; nothing is allocated."""
    part_of = {"embed": "embedding", "self_attn": "attention", "mamba": "mamba", "feed_forward": "mlp",
               "layernorm": "norms", "lm_head": "head"}
    counts = dict.fromkeys(part_of.values(), 0)
    with torch.device("meta"):
        model = FalconH1(c)
    for name, p in model.named_parameters():
        counts[next(part for key, part in part_of.items() if key in name)] += p.numel()
    return counts

def has(c, mixer):
    """Whether the blocks of c have this mixer, "attention" or "mamba": 0 or 1 times its cost."""
    return c.mixers in ("both", mixer)

def scan_flops(h, p, g, n, chunk=CHUNK):
    """FLOPs per token of the chunked scan with chunks of l tokens; the triangles' zeros do not count.

        C B^T               g l n        what a chunk adds to the state      2 h p n
        (C B^T * L) (dt x)  h l p        C times the state before a chunk    2 h p n"""
    return h * (chunk * p + 4 * p * n) + g * chunk * n

def flops_per_token(c, context):
    """{part: forward FLOPs per token}, the mean over a row of `context` tokens.

        blocks      2 per weight of a block's matrices
        head        2 d vocab
        attention   2 hq hd context: q k^T and the product with v, over context / 2 keys on average
        scan        scan_flops

    Training costs three times the sum: the backward pass has two products for each of the forward's. Norms,
    gates and the convolution do not count (0.1% at 7B), nor does what the backward pass recomputes."""
    d, hd = c.hidden_size, c.head_dim
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads  # q, o; k, v
    attention = has(c, "attention") * d * hd * heads
    mamba = has(c, "mamba") * d * (sum(c.mamba_widths) + c.mamba_d_ssm)  # in_proj, out_proj
    mlp = 3 * d * c.intermediate_size
    scan = scan_flops(c.mamba_n_heads, c.mamba_d_head, c.mamba_n_groups, c.mamba_d_state, min(CHUNK, context))
    n = c.num_hidden_layers
    return {"blocks": n * 2 * (attention + mamba + mlp), "head": 2 * d * c.vocab_size,
            "attention": has(c, "attention") * n * 2 * c.num_attention_heads * hd * context,
            "scan": has(c, "mamba") * n * scan}

def cache_bytes(c, slots, length, dtype):
    """{part: bytes} of a Cache: keys, values and the convolution's inputs in dtype, SSM states in float32."""
    attention, mamba = (c.num_hidden_layers * slots * has(c, mixer) for mixer in ("attention", "mamba"))
    return {"kv": dtype.itemsize * attention * 2 * c.num_key_value_heads * c.head_dim * length,
            "conv": dtype.itemsize * mamba * sum(c.mamba_widths[1:4]) * (c.mamba_d_conv - 1),
            "ssm": 4 * mamba * c.mamba_d_ssm * c.mamba_d_state}

def decoding_floor(c, batch, context, dtype, bandwidth, rate):
    """The least seconds of a decoding step of `batch` sequences with `context` tokens each: the larger of
    bytes / bandwidth (every weight and key is read, every state read and written) and FLOPs / rate (a token
    of each sequence goes through every matrix)."""
    flops = flops_per_token(c, context)
    cache = cache_bytes(c, batch, context, dtype)
    products = flops["blocks"] + flops["head"]  # 2 per weight
    moved = products // 2 * dtype.itemsize + cache["kv"] + 2 * (cache["conv"] + cache["ssm"])
    return max(moved / bandwidth, batch * products / rate)

def block_bytes(c):
    """Bytes per token that one block keeps for its backward pass: bfloat16, Triton kernels."""
    d, I, ff = c.hidden_size, c.mamba_d_ssm, c.intermediate_size
    gn = c.mamba_n_groups * c.mamba_d_state
    norms = 2 * (4 + 2) * d  # two: input in float32, output
    # The inputs of in_proj and of q k v, one tensor if no multiplier tells them apart; of the MLP.
    shared = c.mixers != "both" or c.attention_in_multiplier == c.ssm_in_multiplier == 1
    projections = 2 * d * (2 if shared else 3)
    attention = 2 * c.head_dim * (3 * c.num_attention_heads + 2 * c.num_key_value_heads)  # q, k, v; y twice
    mamba = 2 * (3 * I + 4 * gn + c.mamba_n_heads)  # z, x, B, C, dt; x, B, C after the convolution
    gated_norm = (22 if c.mamba_rms_norm else 6) * I  # y, z in both dtypes, gate, product, normalised
    mlp = 2 * 4 * ff  # gate, silu(gate), up, their product
    scan = 2 * (I * c.mamba_d_state // CHUNK + CHUNK * c.mamba_n_groups)  # states before chunks; C B^T
    return (norms + projections + mlp + has(c, "attention") * attention
            + has(c, "mamba") * (mamba + gated_norm + scan))

def loss_bytes(c, tokens):
    """Peak bytes of model.token_logprobs in bfloat16: 8 per logit of a chunk of tokens; in the backward pass
    6 per logit, and the head's gradient in float32."""
    logits = c.vocab_size * min(tokens, tokens_of_chunk(c.vocab_size, torch.device("cuda")))
    return max(8 * logits, 6 * logits + 4 * c.vocab_size * c.hidden_size)

def training_bytes(c, tokens, gpus):
    """{part: bytes} that train_sft.py needs per GPU for one row of `tokens` tokens, recomputing activations.

        weights, gradients, moments    4, 4 and 8 bytes per parameter, sharded over all GPUs
        gathered       weights and gradients in bfloat16, as FSDP2 needs them: embedding, head, two blocks
        activations    inputs of all blocks; and the larger of what the loss needs and what one block keeps,
                       together with the gradients of its MLP's three products

    The sum is an upper bound: gradients come while activations go."""
    counts = parameters(c)
    total = sum(counts.values())
    outer = counts["embedding"] + counts["head"]
    two_blocks = 2 * (total - outer) / c.num_hidden_layers
    inputs = 2 * c.num_hidden_layers * c.hidden_size * tokens
    one_block = (block_bytes(c) + 2 * 3 * c.intermediate_size) * tokens
    return {"weights": 4 * total / gpus, "gradients": 4 * total / gpus, "moments": 8 * total / gpus,
            "gathered": (2 + 2) * (outer + two_blocks),
            "activations": inputs + max(one_block, loss_bytes(c, tokens))}

def sampling_bytes(c, traces, length, gpus=0):
    """{part: bytes} per GPU to decode `traces` traces of `length` tokens at a time.

        weights    all of them, in bfloat16
        trainer    in RL on `gpus` GPUs: this GPU's part of weights and moments, 4 and 8 bytes per parameter
        cache      of all traces; growth: half of the keys again, those of the shorter cache before it grew
        drawing    the logits twice in float32

    The sampler sets traces aside where memory is short, so this is what lets none of them wait."""
    total = sum(parameters(c).values())
    cache = cache_bytes(c, traces, length, torch.bfloat16)
    return {"weights": 2 * total, "trainer": 12 * total / gpus if gpus else 0, "cache": sum(cache.values()),
            "growth": cache["kv"] / 2, "drawing": 2 * 4 * traces * c.vocab_size}

def sizes(tokens=32768):
    """Print the table of presets. Every number is in millions, of parameters, FLOPs or bytes."""
    print(f"Millions: parameters; FLOPs per token, forward and training, mean of {tokens:,}; bytes of")
    print("weights and cache per slot, bfloat16; bytes per GPU to train on one such row per GPU; to sample 8")
    print("traces of 49,152 tokens and to update on rows of 53,248 with --cp 2, in RL on 8 GPUs; to evaluate")
    print("8 traces of 65,536. Samplers start more, as traces begin short, and set some aside if need be.\n")
    columns = ("params", "forward", "train", "weights", "cache 1k", "cache 32k", "1 GPU", "8 GPUs", "64 GPUs",
               "RL sample", "RL update", "eval")
    print(f"{'preset':10s}", *(f"{column:>10s}" for column in columns))
    for name, c in PRESETS.items():
        total = sum(parameters(c).values())
        forward = sum(flops_per_token(c, tokens).values())
        # Training costs three forward passes; a weight takes 2 bytes in bfloat16.
        cells = [total, forward, 3 * forward, 2 * total]
        cells += [sum(cache_bytes(c, 1, length, torch.bfloat16).values()) for length in (1024, 32768)]
        cells += [sum(training_bytes(c, tokens, gpus).values()) for gpus in (1, 8, 64)]
        update = sum(training_bytes(c, 53248 // 2, 8).values()) + 2 * total  # the sampler's weights stay
        cells += [sum(sampling_bytes(c, 8, 49152, 8).values()), update]
        cells.append(sum(sampling_bytes(c, 8, 65536).values()))
        print(f"{name:10s}", *(f"{cell / 1e6:10,.1f}" for cell in cells))

# 2. Measuring -----------------------------------------------------------------------------------------------

def medians(runs, device, rounds=5):
    """Median milliseconds of each function; all have run before, and now take turns. On a GPU, events on the
    device's own clock enclose each call, and the host waits only after the last."""
    def now():
        if device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    # In turn, one call of each per round: background load then slows all of them alike.
    calls = [[] for _ in runs]
    for _ in range(rounds):
        for run, times in zip(runs, calls):
            begin = now()
            run()
            times.append((begin, now()))
    def elapsed(begin, end):
        return 1e3 * (end - begin) if device == "cpu" else begin.elapsed_time(end)

    if device == "cuda":
        torch.cuda.synchronize()
    return [statistics.median(elapsed(*call) for call in times) for times in calls]

def milliseconds(run, device):
    """Median of 5 calls on a CPU and of 15 on a GPU, after one that compiles."""
    run()
    return medians([run], device, 5 if device == "cpu" else 15)[0]

def passes(function, leaves):
    """{"forward": run, "backward": run} of y = function(*leaves), each pass by itself."""
    y = function(*leaves)
    dy = torch.randn_like(y)
    return {"forward": torch.no_grad()(lambda: function(*leaves)),
            "backward": lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)}

def peak_bytes(run, device):
    """The most bytes of tensors that run() holds at a time, beyond those held before. On a CPU from the
    profiler's record of torch's allocations, without the scratch memory of libraries."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler announces itself on stderr
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiler:
        run()
    # An allocation counts its bytes, a release minus its bytes: the peak is the largest running sum.
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(nbytes for _, nbytes in changes))

def floors(device):
    """This machine's limits: bytes per second of a copy (read and write), FLOPs per second of a product."""
    size, nbytes = (1024, 2**26) if device == "cpu" else (8192, 2**29)
    a, out = torch.randn(2, size, size, device=device, dtype=DTYPE[device])
    source, target = torch.empty(2, nbytes, dtype=torch.uint8, device=device)
    product = milliseconds(lambda: torch.mm(a, a, out=out), device)
    copy = milliseconds(lambda: target.copy_(source), device)
    # A copy reads and writes every byte; a product of two n x n matrices takes 2 n^3 FLOPs.
    return 1e3 * 2 * nbytes / copy, 1e3 * 2 * size**3 / product

def print_machine(device):
    bandwidth, rate = floors(device)
    name = f"{torch.get_num_threads()} CPU threads" if device == "cpu" else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, {DTYPE[device]}: "
          f"copy {bandwidth / 1e9:,.1f} GB/s, product {rate / 1e12:,.3f} TFLOP/s")
    return bandwidth, rate

# 3. The scan ------------------------------------------------------------------------------------------------

def random_inputs(b, t, h, p, g, n, *, states=None, dtype=torch.float32, seed=0, device="cpu"):
    """Leaves of a plausible layer, named as ssd_scan names them: dt near 0.1 after softplus, -16 < A < -1."""
    r = torch.Generator(device).manual_seed(seed)
    def normal(*shape):
        return torch.randn(*shape, generator=r, device=device)
    inputs = {"x": normal(b, t, h, p), "dt": normal(b, t, h) - 2,
              "A": -1 - 15 * torch.rand(h, generator=r, device=device), "B": normal(b, t, g, n) * n**-0.5,
              "C": normal(b, t, g, n), "D": normal(h), "dt_bias": normal(h) * 0.3}
    if states is not None:
        inputs["initial_states"] = normal(states, h, p, n)
    return {name: v.to(dtype).requires_grad_() for name, v in inputs.items()}

def cotangents(*outputs):
    """Random gradients of the outputs, the same for every backend."""
    r = torch.Generator(outputs[0].device).manual_seed(1)
    return [torch.randn(v.shape, generator=r, device=v.device).to(v) for v in outputs]

def scan_results(inputs, backend=None, *, cu_seqlens=None, chunk_size=CHUNK):
    """{"y": ..., "S": final states, "dx": ..., ...}: the scan's outputs and gradients."""
    leaves = {name: v.detach().requires_grad_() for name, v in inputs.items()}
    y, S = ssd_scan(**leaves, dt_softplus=True, cu_seqlens=cu_seqlens, chunk_size=chunk_size, backend=backend)
    torch.autograd.backward([y, S], cotangents(y, S))
    return {"y": y.detach(), "S": S.detach(), **{"d" + name: v.grad for name, v in leaves.items()}}

def relative_errors(inputs, *, backend="torch", oracle="recurrent", **options):
    """{name: |ours - oracle| / |oracle|} of y, S and every gradient; the oracle runs in float64."""
    results = scan_results(inputs, backend, **options)
    exact = scan_results({name: v.double() for name, v in inputs.items()}, oracle, **options)
    return {name: float((results[name] - v).norm() / v.norm().clamp(min=1e-30)) for name, v in exact.items()}

def ours(backend=None, chunk=CHUNK):
    """Our scan with the signature of those in tests/peers.py."""
    def scan(x, dt, A, B, C, cu):
        return ssd_scan(x, dt, A, B, C, cu_seqlens=cu, backend=backend, chunk_size=chunk)[0]
    return scan

def scan_inputs(t, h, p, n, dtype, device):
    """Leaves x, dt after softplus, A, B, C of one row with one group; dt and A stay float32."""
    inputs = {name: v.detach() for name, v in random_inputs(1, t, h, p, 1, n, device=device).items()}
    x, B, C = (inputs[name].to(dtype) for name in "xBC")
    return [v.requires_grad_() for v in (x, F.softplus(inputs["dt"]), inputs["A"], B, C)]

def scan_work(t, h, p, n, width):
    """{pass: (bytes, FLOPs)} of t tokens, one group; `width` bytes per number, but 4 for dt. Forward moves
    x, B, C, dt, y; backward dy, x, B, C, dt and the gradients of the last four, in twice as many products."""
    flops = t * scan_flops(h, p, 1, n)
    return {"forward": (t * width * (2 * h * p + 2 * n) + 4 * t * h, flops),
            "backward": (t * width * (3 * h * p + 4 * n) + 8 * t * h, 2 * flops)}

def print_scan_errors(backends, device):
    # Shape and cu_seqlens of small inputs that reach every special case.
    cases = {"ragged end": (dict(b=2, t=70, h=4, p=16, g=2, n=32), None),
             "odd sizes": (dict(b=1, t=45, h=6, p=24, g=1, n=40, states=1), None),
             "packed": (dict(b=1, t=105, h=4, p=16, g=2, n=32, states=4), [0, 40, 41, 57, 105])}
    print("relative errors against the float64 recurrence; float32, chunks of at most 32")
    for (name, (shape, cu)), backend in itertools.product(cases.items(), backends):
        inputs = random_inputs(**shape, device=device)
        errors = relative_errors(inputs, backend=backend, cu_seqlens=cu, chunk_size=32)
        print(f"  {name:10s} {backend:6s}", *(f"{k} {v:.0e}" for k, v in errors.items()))

def scan_speed(device):
    """Errors; then every scan's passes over one document, and over documents of 1,000 tokens ("packed")."""
    functions = {"torch": ours("torch")}
    shapes = {"small": (8, 64, 64)}  # h, p, n
    lengths = (2048,)
    if device == "cuda":
        functions |= {"triton": ours("triton"), **peers()}
        shapes = {"0.5B": (24, 64, 128), "7B": (24, 128, 256)}
        lengths = (4096, 32768, 131072)
    print_scan_errors(["torch"] if device == "cpu" else ["torch", "triton"], device)
    bandwidth, rate = print_machine(device)
    print(f"  {'shape, tokens':20s} {'scan':9s} {'pass':8s} {'ms':>9s} {'GB/s':>7s} {'TFLOP/s':>7s}  share")
    for (shape, (h, p, n)), t, packed in itertools.product(shapes.items(), lengths, (False, True)):
        # Packed: documents of 1,000 tokens, the last one shorter.
        cu = (*range(0, t, 1000), t) if packed else (0, t)
        inputs = scan_inputs(t, h, p, n, DTYPE[device], device)
        work = scan_work(t, h, p, n, DTYPE[device].itemsize)
        for name, function in functions.items():
            row = f"  {shape:5s} {t:7,d} {'packed' if packed else '':6s} {name:9s}"
            for part, run in passes(lambda *leaves: function(*leaves, cu), inputs).items():
                seconds = milliseconds(run, device) / 1e3
                size, flops = work[part]
                # The share of the limit that binds: bytes at the copy's rate or FLOPs at the product's.
                share = max(size / bandwidth, flops / rate) / seconds
                print(f"{row} {part:8s} {seconds * 1e3:9.3f} {size / seconds / 1e9:7.1f} "
                      f"{flops / seconds / 1e12:7.3f} {share:6.0%}")

# 4. The model -----------------------------------------------------------------------------------------------

SMALL = FalconH1Config(
    vocab_size=512, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, mamba_d_ssm=512, mamba_n_heads=8, mamba_d_head=64, mamba_d_state=64)

def compare(name, tokens, floor, runs, device, rounds):
    """Print a row: tokens per second of the floor, and of each function with its share of the floor and peak.
    runs: functions that do the same work, ours first. floor: (bandwidth, rate) -> seconds; both are measured
    in turn with the functions, as load changes."""
    peaks = [peak_bytes(run, device) for run in runs]  # this first call also compiles
    limits = []
    *times, _ = medians([*runs, lambda: limits.append(floors(device))], device, rounds)
    seconds = floor(*(statistics.median(values) for values in zip(*limits)))
    row = f"  {name:30s} {tokens / seconds:10,.0f}"
    for ms, peak in zip(times, peaks):
        row += f" {1e3 * tokens / ms:10,.0f} {1e3 * seconds / ms:6.0%} {peak / 2**20:9,.0f}"
    print(row, flush=True)

def model_speed(c, device, batch, length, decoding, rounds=3):
    """Training and prefill of `batch` rows of `length` tokens, and greedy decoding; on a CPU next to
    transformers. decoding: pairs (batch, new tokens); prompts have one token, so that every step decodes."""
    torch.manual_seed(0)
    with torch.device(device):
        model = FalconH1(c).to(DTYPE[device])
        ids = torch.randint(c.vocab_size, (batch, length))
    theirs = their_model(model) if device == "cpu" else None
    model.model.checkpoint_activations = device == "cuda"  # 32k tokens of 7B do not fit otherwise
    print_machine(device)
    print(f"{sum(parameters(c).values()):,} parameters. Floors: 6 FLOPs per weight and token (training) or 2")
    print("(prefill) at the rate of products; decoding: 2, or weights, keys and states at the copy's rate")
    columns = f"{'share':>6s} {'peak MiB':>9s}"
    print(f"  {'tokens per second':30s} {'floor':>10s} {'ours':>10s} {columns} {'theirs':>10s} {columns}")

    def row(name, tokens, floor, *runs):
        compare(name, tokens, floor, runs[:1] if theirs is None else runs, device, rounds)

    # No optimizer: its step depends on the parameters only and would hide the passes of a small model.
    def train(model, loss):
        loss().backward()
        model.zero_grad()

    # Floors count products with weights; attention and scan add a third at 7B and 32k tokens.
    tokens = batch * length
    flops = flops_per_token(c, length)
    row(f"training, {batch} x {length:,}", tokens,
        lambda bandwidth, rate: 3 * tokens * (flops["blocks"] + flops["head"]) / rate,
        lambda: train(model, lambda: -model(ids, targets=ids)[0].mean()),
        lambda: train(theirs, lambda: theirs(ids, labels=ids).loss))
    row(f"prefill, {batch} x {length:,}", tokens,
        lambda bandwidth, rate: tokens * flops["blocks"] / rate,
        lambda: prefill(model, ids.tolist()),
        torch.no_grad()(lambda: theirs(ids, use_cache=True, logits_to_keep=1)))
    for slots, new in decoding:
        prompts = torch.randint(c.vocab_size, (slots, 1))
        options = dict(do_sample=False, max_new_tokens=new, pad_token_id=0)
        row(f"decoding, batch {slots}, {new} tokens", slots * new,
            lambda *limits: new * decoding_floor(c, slots, (new + 1) // 2, DTYPE[device], *limits),
            lambda: generate(model, prompts.tolist(), max_new_tokens=new, temperature=0, slots=slots),
            lambda: theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **options))

# 5. The mixers ----------------------------------------------------------------------------------------------

# A small model with 7B's ratios of widths, whose decoding time still depends on keys and states: a slot's
# states take as many bytes as the keys and values of 1,536 tokens (3,072 at 7B). 256 x 32,768 tokens: 4 GB.
TRIO = FalconH1Config(
    vocab_size=512, hidden_size=384, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=1, head_dim=32, mamba_d_ssm=384, mamba_n_heads=6, mamba_d_head=64, mamba_d_state=256)
# The shape of Qwen3-8B, which the paper compares with. That it also normalises q and k costs next to nothing.
# It has attention alone, so its mamba_ fields have no meaning.
QWEN3_8B = FalconH1Config(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, mixers="attention",
    mamba_d_ssm=1, mamba_n_heads=1, mamba_d_head=1, mamba_d_state=1)
GPUS = {"H100": (3.35e12, 989e12, 80e9), "H200": (4.8e12, 989e12, 141e9)}  # bytes/s, FLOP/s in bf16, bytes
STYLES = {"both": dict(label="hybrid", color="#08306b", linestyle="-", marker="o"),
          "attention": dict(label="attention only", color="#d95f02", linestyle="--", marker="s"),
          "mamba": dict(label="SSM only", color="#66a61e", linestyle=":", marker="^")}
BATCHES = (1, 16, 256)
CONTEXTS = (512, 4096, 32768)

def three_forms(c):
    """{mixers: configuration}: c, and each mixer alone with as many parameters."""
    return {"both": c, **{mixers: single_mixer(c, mixers) for mixers in ("attention", "mamba")}}

def decoding_step(model, batch, context):
    """run() -> logits of a step of `batch` sequences with `context` tokens each, whose cache holds noise.
    The contents do not change the time, so nothing has to be prefilled."""
    cache = model.new_cache(batch, context + 1)
    for part in (cache.k, cache.v, cache.conv, cache.ssm):
        part.copy_(torch.randn_like(part[:, :1]))  # the same in every slot: random numbers take a while
    tokens = torch.randint(model.config.vocab_size, (batch,), device=cache.lengths.device)
    step = Decoder(model, cache)

    @torch.no_grad()
    def run():
        cache.used = context  # the same step again
        cache.lengths.fill_(context)
        return step(tokens)
    return run

def measure_mixers(device, batches, contexts):
    """Print and return {(batch, context): tokens per second of the three forms, which take turns}.
    Caches that do not fit into free memory are left out, with a line that says so."""
    torch.manual_seed(0)
    with torch.device(device):
        models = [FalconH1(c).to(DTYPE[device]) for c in three_forms(TRIO).values()]
    results = {}
    for batch, context in itertools.product(batches, contexts):
        row = f"  {batch:6,d} {context:8,d}"
        caches = [cache_bytes(model.config, batch, context, DTYPE[device]) for model in models]
        needed = sum(sum(cache.values()) for cache in caches)
        if needed > free_bytes(device):
            print(f"{row}   not measured: the three caches need {needed / 1e9:.1f} GB")
            continue
        runs = [decoding_step(model, batch, context) for model in models]
        for run in runs * (1 if device == "cpu" else 2):  # a GPU compiles, then records
            run()
        times = medians(runs, device, rounds=3 if batch * context > 2**20 else 15)
        results[batch, context] = [1e3 * batch / ms for ms in times]
        print(row, *(f"{speed:14,.1f}" for speed in results[batch, context]), flush=True)
    return results

def modelled_speed(c, gpu, batch, context):
    """Tokens per second at decoding_floor in bfloat16, and how many of the batch decode at a time: those
    whose caches fit beside the weights into nine tenths of the memory, as vLLM has it. The others wait."""
    bandwidth, rate, memory = GPUS[gpu]
    slot = sum(cache_bytes(c, 1, context, torch.bfloat16).values())
    fit = int((0.9 * memory - 2 * sum(parameters(c).values())) // slot)
    slots = min(batch, fit)
    return slots / decoding_floor(c, slots, context, torch.bfloat16, bandwidth, rate), slots

def print_cache_bytes(forms, dtype):
    """What the forms hold: parameters; keys and values, which grow with the text; states, which do not."""
    for name, c in forms.items():
        size = cache_bytes(c, 1, 1, dtype)
        slot = size["conv"] + size["ssm"]
        print(f"  {name:10s} {sum(parameters(c).values()):15,d} parameters; "
              f"cache: {size['kv']:8,d} bytes per token, {slot:12,d} per slot")

def print_modelled_mixers():
    """The 7B shape and Qwen3-8B's at the floor of an H100 and an H200, and the paper's comparison."""
    forms = three_forms(PRESETS["7b"]) | {"Qwen3-8B": QWEN3_8B}
    print("\nMODELLED, not measured, for the 7B shape in bfloat16: the least time for bytes and FLOPs.")
    print_cache_bytes(forms, torch.bfloat16)
    print("Tokens per second; in parentheses, how many fit into memory at a time where not all do.")
    print(f"  GPU   {'batch':>6s} {'context':>8s}", *(f"{name:>9s}      " for name in forms))
    for gpu, batch, context in itertools.product(GPUS, BATCHES, CONTEXTS):
        row = f"  {gpu}  {batch:6,d} {context:8,d}"
        for c in forms.values():
            speed, slots = modelled_speed(c, gpu, batch, context)
            waiting = f"({slots})" if slots < batch else ""
            row += f" {speed:9,.0f} {waiting:5s}"
        print(row.rstrip())
    print_gain_over_qwen(forms["both"])

def print_gain_over_qwen(hybrid):
    """Tokens per second of the 7B shape over Qwen3-8B's, for the lengths of the paper's figure 8."""
    print("\nHybrid against Qwen3-8B. MODELLED: decoding of 32K tokens after 512, and of 16K after 8K, at")
    print("the mean context. The paper (appendix B, figure 8) measured with vLLM on an H100, mean of the two")
    print("tasks: +20% to +100% at batch 2 to 128, growing with batch and output.")
    tasks = {"512 -> 32K": 512 + 32768 // 2, "8K -> 16K": 8192 + 16384 // 2}  # a step's time grows linearly
    print("  batch", *(f"{gpu + ' ' + task:>16s}" for gpu in GPUS for task in tasks))
    for batch in (2, 4, 8, 16, 32, 64, 128):
        row = f"  {batch:5d}"
        for gpu, context in itertools.product(GPUS, tasks.values()):
            ours, theirs = (modelled_speed(c, gpu, batch, context)[0] for c in (hybrid, QWEN3_8B))
            row += f" {ours / theirs - 1:16.0%}"
        print(row)

def save_figure(figure, path):
    """As a PNG of 64 colours: a quarter of the bytes, and no difference to see."""
    from PIL import Image  # comes with matplotlib
    figure.savefig(path, dpi=100)
    with Image.open(path) as image:
        image.convert("RGB").quantize(64).save(path, optimize=True)

def draw_mixers(path, results, title):
    """Throughput against context, a panel per batch. results: as measure_mixers returns it."""
    batches = sorted({batch for batch, _ in results})
    figure = new_figure(8, 3)
    if figure is None:
        return
    panels = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
    for axes, batch in zip(panels, batches):
        cells = sorted((context, speeds) for (other, context), speeds in results.items() if other == batch)
        contexts, speeds = zip(*cells)
        for style, values in zip(STYLES.values(), zip(*speeds)):
            axes.plot(contexts, values, **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts], minor=False)
        axes.set(yscale="log", title=f"batch {batch}", xlabel="context, tokens")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("decoding, tokens per second")
    panels[0].legend()
    figure.suptitle(title, fontsize="medium")
    save_figure(figure, path)
    print(f"\n{path}: throughput by batch and context")

def mixers_speed(device, figure="", batches=BATCHES, contexts=CONTEXTS):
    """What each mixer contributes to decoding: measured on TRIO, modelled for 7B."""
    forms = three_forms(TRIO)
    print_machine(device)
    print_cache_bytes(forms, DTYPE[device])
    print("Measured: tokens per second of a decoding step, whatever has filled the caches.")
    print(f"  {'batch':>6s} {'context':>8s}", *(f"{name:>14s}" for name in forms))
    results = measure_mixers(device, batches, contexts)
    print_modelled_mixers()
    if figure and results:
        total = sum(parameters(TRIO).values()) / 1e6
        draw_mixers(figure, results, f"{total:.1f}M parameters, {str(DTYPE[device])[6:]}, {device}")

def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.bench", allow_abbrev=False)
    parser.add_argument("command", choices=("scan", "model", "sizes", "mixers"))
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--figure", default="", metavar="FILE", help="mixers: a picture, such as mixers.png")
    args = parser.parse_args(argv)
    if args.figure and args.command != "mixers":
        parser.error("--figure: only the command mixers draws one")
    if args.figure and not Path(args.figure).absolute().parent.is_dir():
        parser.error(f"--figure {args.figure}: its folder does not exist")
    if args.command == "sizes":
        sizes()
    elif args.command == "mixers":
        mixers_speed(args.device, args.figure)
    elif args.command == "scan":
        scan_speed(args.device)
    elif args.device == "cpu":
        model_speed(SMALL, "cpu", 8, 512, ((1, 128), (16, 64), (256, 8)))
    else:
        model_speed(PRESETS["7b"], "cuda", 1, 32768, ((1, 128), (16, 128), (256, 128)))

if __name__ == "__main__":
    main()
