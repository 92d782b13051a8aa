"""Are the kernels right on the hardware? Errors against float64, equal bits, graphs against plain steps:
python tests/gpu/check.py"""

import threading
from unittest.mock import patch

from stages import DEV, DRY, error, put, stage

import torch

import model
import ssm_scan
from tests.bench import CHUNK, cotangents, random_inputs, relative_errors, scan_results

SHAPE = dict(h=4, p=16, g=1, n=16) if DRY else dict(h=24, p=128, g=1, n=256)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PER_TOKEN = ("x", "dt", "B", "C")

def layer_inputs(t, dtype, states=None, **shape):
    inputs = random_inputs(1, t, **(SHAPE | shape), states=states, device=DEV)
    return {name: v.detach().to(dtype if name in PER_TOKEN else FP32) for name, v in inputs.items()}

def against_float64(name, t, dtype, cu=None, states=None, decay=1.0, **shape):
    """Two calls must have the same bits; and their distance from the chunked scan in float64."""
    inputs = layer_inputs(t, dtype, states, **shape)
    inputs["A"] *= decay
    first, second = (scan_results(inputs, cu_seqlens=cu) for _ in range(2))
    again = all(torch.equal(first[k], second[k]) for k in first)
    del first, second
    errors = relative_errors(inputs, cu_seqlens=cu, backend=None, oracle="torch")
    put("scan error", case=name, tokens=t, dtype=str(dtype)[6:], same_bits_twice=again, **errors)

def long_is_chained(t, pieces):
    """A sequence in one call, and in `pieces` calls that hand on the state: are all results the same?"""
    inputs = layer_inputs(t, BF16, 1)
    whole = scan_results(inputs)
    leaves, ys = {name: v.requires_grad_() for name, v in inputs.items()}, []
    state = leaves["initial_states"]
    for i in range(0, t, t // pieces):
        piece = {k: v[:, i : i + t // pieces] if k in PER_TOKEN else v for k, v in leaves.items()}
        piece["initial_states"] = state
        y, state = ssm_scan.ssd_scan(**piece, dt_softplus=True, chunk_size=CHUNK)
        ys.append(y)
    y = torch.cat(ys, 1)
    torch.autograd.backward([y, state], cotangents(y, state))
    chained = {"y": y, "S": state, **{"d" + name: v.grad for name, v in leaves.items()}}
    same = {k: "same bits" if torch.equal(v, chained[k]) else error(chained[k], v) for k, v in whole.items()}
    put("long", tokens=t, pieces=pieces, elements=y.numel(), **same)

def convolution(t, d, cu, dtype):
    torch.manual_seed(0)
    shapes = ((1, t, d), (d, 4), (d,), (len(cu) - 1, d, 3), (1, t, d))
    *inputs, dy = (torch.randn(*shape, device=DEV).to(dtype) for shape in shapes)

    def results(dtype, backend):
        x, weight, bias, states = (v.detach().to(dtype).requires_grad_() for v in inputs)
        options = dict(initial_states=states, cu_seqlens=cu, activation="silu", backend=backend)
        y, last = ssm_scan.causal_conv1d(x, weight, bias, **options)
        y.backward(dy.to(dtype))
        gradients = {"dx": x.grad, "dw": weight.grad, "db": bias.grad, "dstates": states.grad}
        return {"y": y, "last": last, **gradients}
    ours, exact = results(dtype, None), results(torch.float64, "torch")
    put("conv error", tokens=t, documents=len(cu) - 1, dtype=str(dtype)[6:],
        **{name: error(ours[name], v) for name, v in exact.items()})

@torch.no_grad()
def steps(t=64):
    """One token after another against the scan."""
    inputs = layer_inputs(t, BF16, 1)
    y, S = ssm_scan.ssd_scan(**inputs, dt_softplus=True)
    state = inputs.pop("initial_states").clone()
    tokens = {name: inputs.pop(name) for name in PER_TOKEN}
    out = []
    for i in range(t):
        one = {name: v[:, i] for name, v in tokens.items()}
        out.append(ssm_scan.ssd_step(state, **one, **inputs, dt_softplus=True)[0])
    put("step error", y=error(torch.stack(out, 1), y), S=error(state, S))

def synchronise_until(done):
    """As torch's checkpoint writer does in the background: a graph is recorded while another thread waits for
    its own stream. (For the whole device it must not: that is an error in any mode of recording.)"""
    while not done.wait(1e-3):
        if not DRY:
            torch.cuda.current_stream().synchronize()

def sampled(net, prompts, new, slots):
    """Greedy traces, and the largest distance of their log-probabilities from the trainer's."""
    traces = model.generate(net, prompts, max_new_tokens=new, temperature=0, slots=slots)
    worst = 0.0
    for trace, prompt in zip(traces, prompts):
        ids = torch.tensor([prompt + trace.tokens], device=DEV)
        with torch.no_grad():
            trained = net(ids[:, :-1], targets=ids[:, 1:])[0][0, len(prompt) - 1 :]
        worst = max(worst, float((trained - torch.tensor(trace.logprobs, device=DEV)).abs().max()))
    return [trace.tokens for trace in traces], worst

def graphs(net, prompts, new, slots):
    """CUDA graphs and a cache that grows, against plain steps in one that is long enough from the start."""
    done = threading.Event()
    threading.Thread(target=synchronise_until, args=(done,)).start()
    try:
        graph, worst = sampled(net, prompts, new, slots)
    finally:
        done.set()
    with patch.object(model.Decoder, "recorded_on", ""), patch.object(model.Sampler, "first_length", 2048):
        plain, _ = sampled(net, prompts, new, slots)
    put("graphs", tokens=new, same_tokens=graph == plain, worst_logprob_against_trainer=worst)

def set_aside(net, prompts, new):
    """A byte too little for all traces to outgrow 256 tokens: some wait, and are read again."""
    cache = model.Cache(net.config, len(prompts), 256, dtype=net.lm_head.weight.dtype, device="meta")
    room, waiting, original = cache.bytes_to_grow(len(prompts), 512) - 1, [], model.Sampler.set_aside

    def counting(sampler, length):
        slots = original(sampler, length)
        waiting.append(len(sampler.aside))
        return slots
    with patch("decode.free_bytes", lambda device: room), patch.object(model.Sampler, "set_aside", counting):
        traces, worst = sampled(net, prompts, new, len(prompts))
    whole = all(len(tokens) == new for tokens in traces)
    put("set aside", waiting=max(waiting), whole=whole, worst_logprob_against_trainer=worst)

def main():
    t = 256 if DRY else 4096
    cases = [("ragged", t - 37, BF16, {}),
             ("packed with states", t, BF16, dict(cu=(0, 1, 100, 228, t), states=4)),
             ("decay x 100", t, BF16, dict(decay=100.0)),
             ("fp16", t, FP16, {}),
             ("4 heads, float32", t // 4, FP32, dict(h=4)),
             ("8 heads, long", 8 * t, BF16, dict(h=8))]
    for name, tokens, dtype, options in cases:
        stage(f"scan, {name}", against_float64, name, tokens, dtype, **options)
    stage("long", long_is_chained, 1024 if DRY else 131072, 4)
    stage("more than 2^31 elements of x", long_is_chained, 2048 if DRY else 704 * 1024, 2)
    for dtype in (BF16, FP32):
        cu, d = ((0, 2, 130, 300), 64) if DRY else ((0, 2, 130, 30000, 32768), 3584)
        stage(f"convolution, {dtype}", convolution, cu[-1], d, cu, dtype)
    stage("steps", steps)
    torch.manual_seed(0)
    net = model.FalconH1(model.PRESETS["tiny" if DRY else "100m"]).to(DEV, FP32 if DRY else BF16)
    prompts = [[1 + i] * (3 + 17 * i) for i in range(6)]
    stage("graphs", graphs, net, prompts, 12 if DRY else 200, 4)
    stage("growth past 256, 512 and 1,024 tokens", graphs, net, prompts[:2], 1100, 2)
    stage("set aside", set_aside, net, prompts[:4], 600)
    for length in (1, 20, 40, 100, 200):  # short rows have short chunks, and so other tiles
        stage(f"scan, {length} tokens", against_float64, f"{length} tokens", length, BF16)

if __name__ == "__main__":
    main()
