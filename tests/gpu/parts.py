"""Convolution, drawing and AdamW against the bytes they must move; flash attention against cuDNN's, with what
cuDNN takes for a length it has not seen: python tests/gpu/parts.py"""

import itertools
from dataclasses import replace

from stages import DEV, DRY, error, put, put_kernels, seconds, stage

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import PRESETS, FalconH1, causal, draw
from ssm_scan import causal_conv1d
from tests.bench import floors, milliseconds, parameters, passes
from train_sft import make_optimizer

DTYPE = torch.bfloat16

def convolution(c, tokens):
    d = sum(c.mamba_widths[1:4])
    shapes = ((1, tokens, d), (d, c.mamba_d_conv), (d,))
    leaves = [torch.randn(*shape, dtype=DTYPE, device=DEV, requires_grad=True) for shape in shapes]
    runs = passes(lambda *leaves: causal_conv1d(*leaves, activation="silu")[0], leaves)
    yield "convolution, forward", runs["forward"], 2 * leaves[0].nbytes  # x, y
    yield "convolution, backward", runs["backward"], 3 * leaves[0].nbytes  # x, dy, dx

def drawing(c, batches):
    for batch, top_p in itertools.product(batches, (1.0, 0.95)):
        logits = torch.randn(batch, c.vocab_size, dtype=DTYPE, device=DEV)
        u = torch.rand(batch, dtype=torch.float64, device=DEV)
        yield f"draw, batch {batch}, top-p {top_p}", lambda: draw(logits, u, 0.85, top_p), logits.nbytes

def adamw(c):
    """Two layers: 1.1 billion parameters at the 7B shape."""
    with torch.device(DEV):
        model = FalconH1(replace(c, num_hidden_layers=2))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    step = make_optimizer(model, 1e-5, 0.01).step
    # Reads 4 numbers per parameter and writes 3: all but the gradient.
    yield "AdamW", step, 28 * sum(parameters(model.config).values())

def measure(part, bandwidth):
    for name, run, size in part:
        ms = milliseconds(run, DEV)
        put("part", name=name, ms=ms, share=size / bandwidth * 1e3 / ms)
        put_kernels("part kernel", run, bandwidth, {"_conv_kernel": size}, top=5, part=name)

def attention(c, backend, t):
    """Causal attention of one document: first calls, later ones, and [y, dq, dk, dv]."""
    torch.manual_seed(0)
    heads = c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads
    qkv = [torch.randn(1, n, t, c.head_dim, dtype=DTYPE, device=DEV, requires_grad=True) for n in heads]

    def attend(*qkv):
        with sdpa_kernel([backend]):
            return causal(*qkv)

    def both():
        y = attend(*qkv)
        return y, *torch.autograd.grad(y, qkv, torch.ones_like(y))
    first, results = seconds(both)
    second, _ = seconds(both)
    times = {part: milliseconds(run, DEV) for part, run in passes(attend, qkv).items()}
    put("attention", backend=backend.name, tokens=t, first_s=first, second_s=second, **times)
    return results

def attentions(c):
    for t in (32768, 16384, 8192, 4096, 5000, 5001, 12345):
        flash = attention(c, SDPBackend.FLASH_ATTENTION, t)
        cudnn = attention(c, SDPBackend.CUDNN_ATTENTION, t)
        put("attention error", tokens=t, **{name: error(a, b) for name, a, b in
                                           zip(("y", "dq", "dk", "dv"), cudnn, flash)})

def main():
    c = PRESETS["tiny" if DRY else "7b"]
    bandwidth, _ = floors(DEV)
    stage("convolution", measure, convolution(c, 300 if DRY else 32768), bandwidth)
    stage("drawing", measure, drawing(c, (2,) if DRY else (1, 16, 256)), bandwidth)
    stage("AdamW", measure, adamw(c), bandwidth)
    if not DRY:
        stage("attention", attentions, c)

if __name__ == "__main__":
    main()
