"""Parity and speed, for `python ssm_scan.py`, `python model.py --bench` and the tests: errors against the definition; times as
shares of a floor that is measured on the spot, next to other people's kernels and models where they are installed.
"""

import itertools
import time

import torch
import torch.nn.functional as F

from ssm_scan import ssd_scan, ssd_step


def random_inputs(b, t, h, p, g, n, *, states=None, dtype=torch.float32, seed=0):
    """Tensors of a plausible layer, for tests and benchmarks: dt around 0.1 after softplus, A between -1 and -16."""
    r = torch.Generator().manual_seed(seed)
    def normal(*shape):
        return torch.randn(*shape, generator=r)
    inputs = dict(x=normal(b, t, h, p), dt=normal(b, t, h) - 2, A=-1 - 15 * torch.rand(h, generator=r),
                  B=normal(b, t, g, n) * n**-0.5, C=normal(b, t, g, n), D=normal(h), dt_bias=normal(h) * 0.3)
    if states is not None:
        inputs["initial_states"] = normal(states, h, p, n)
    return {name: v.to(dtype).requires_grad_() for name, v in inputs.items()}


def relative_errors(inputs, *, cu_seqlens=None, chunk_size=256, backend="torch"):
    """|ours - oracle| / |oracle| of y, the final states and every gradient; the oracle is the float64 recurrence."""
    def run(backend, inputs):
        leaves = {name: v.detach().requires_grad_() for name, v in inputs.items()}
        y, S = ssd_scan(**leaves, dt_softplus=True, cu_seqlens=cu_seqlens, chunk_size=chunk_size, backend=backend)
        r = torch.Generator().manual_seed(1)  # the same cotangents for both
        dy, dS = (torch.randn(v.shape, generator=r).to(v) for v in (y, S))
        torch.autograd.backward([y, S], [dy, dS])
        return {"y": y.detach(), "S": S.detach(), **{"d" + name: v.grad for name, v in leaves.items()}}
    ours, oracle = run(backend, inputs), run("recurrent", {name: v.double() for name, v in inputs.items()})
    return {name: float((ours[name] - v).norm() / v.norm().clamp(min=1e-30)) for name, v in oracle.items()}


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


def milliseconds(run, device):
    """Median of five, after one that compiles; each is the mean of some runs in a row, so that a GPU need not wait for the host."""
    times, runs = [], 10 if device == "cuda" else 1
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(runs):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / runs * 1e3)
    return sorted(times[1:])[2]


def floors(device):
    """Bytes a second of a copy and operations a second of a matrix product, measured here: nothing can be faster."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, out = torch.randn(size, size, device=device, dtype=dtype), torch.empty(size, size, device=device, dtype=dtype)
    long = torch.empty(2**29 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    copy, product = torch.empty_like(long), milliseconds(lambda: torch.mm(a, a, out=out), device)
    return 2 * long.numel() / milliseconds(lambda: copy.copy_(long), device) * 1e3, 2 * size**3 / product * 1e3


def peers():
    """mamba_ssm's and fla's scans under our arguments, where they can be imported. x, dt, B, C are (1, t, ...)."""
    found = {}
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        def mamba(x, dt, A, B, C, cu):
            seq = torch.repeat_interleave(torch.arange(len(cu) - 1), torch.tensor(cu).diff())[None].int().to(x.device)
            return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256, seq_idx=seq if len(cu) > 2 else None)

        found["mamba_ssm"] = mamba
    except ImportError:
        pass
    try:
        from fla.ops.simple_gla import chunk_simple_gla

        def fla(x, dt, A, B, C, cu):
            q, k = (v.repeat_interleave(x.shape[2] // v.shape[2], 2) for v in (C, B))
            written, ends = (x * dt[..., None]).to(x.dtype), torch.tensor(cu, device=x.device)
            return chunk_simple_gla(q, k, written, g=dt * A, scale=1.0, cu_seqlens=ends)[0]

        found["fla"] = fla
    except ImportError:
        pass
    return found


def ours(backend):
    return lambda x, dt, A, B, C, cu: ssd_scan(x, dt, A, B, C, cu_seqlens=cu, backend=backend)[0]


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
        inputs = {k: v.detach().to(device) for k, v in random_inputs(1, t, h, p, 1, n).items()}
        leaves = [F.softplus(inputs["dt"]), inputs["A"], *(inputs[k].to(dtype) for k in "xBC")]
        dt, A, x, B, C = (v.requires_grad_() for v in leaves)
        # What must be moved, and the operations of the chunked algorithm (chunks of 256, the triangle's half counted).
        moved = (t * (2 * h * p + 2 * n) * width + 4 * t * h, t * (3 * h * p + 4 * n) * width + 8 * t * h)
        operations = (t * (h * (256 * p + 4 * p * n) + 256 * n), t * (h * (512 * p + 8 * p * n) + 512 * n))
        for name, function in functions.items():
            def both():
                y = function(x, dt, A, B, C, cu)
                torch.autograd.grad(y, (x, dt, A, B, C), y)
            with torch.no_grad():
                forward = milliseconds(lambda: function(x, dt, A, B, C, cu), device)
            for part, ms, size, work in zip(("forward", "backward"), (forward, milliseconds(both, device) - forward), moved, operations):
                floor = max(size / bandwidth, work / rate) * 1e3
                print(f"  {shape:5s} {t:7,d} tokens {'packed' if packed else '':6s} {name:10s} {part:8s} {ms:9.3f} ms "
                      f"{size / ms / 1e6:7.1f} GB/s {work / ms / 1e9:7.2f} TFLOP/s {100 * floor / ms:4.0f} %")
    for (shape, (h, p, n)), b in itertools.product(shapes.items(), (1, 64, 256)):
        inputs = {k: v.detach().to(device) for k, v in random_inputs(b, 1, h, p, 1, n, states=b).items()}
        state, A, one = inputs["initial_states"], inputs["A"], {k: inputs[k][:, 0].to(dtype) for k in ("x", "B", "C")}
        dt = F.softplus(inputs["dt"][:, 0])
        with torch.no_grad():
            ms = milliseconds(lambda: ssd_step(state, one["x"], dt, A, one["B"], one["C"]), device)
        floor = 8 * state.numel() / bandwidth * 1e3  # float32, read once and written once
        print(f"  {shape:5s} decode step, batch {b:3d}   {ms:9.3f} ms {8 * state.numel() / ms / 1e6:7.1f} GB/s {100 * floor / ms:4.0f} %")
    if device == "cpu":
        print("the rows of the triton backend, of the shapes 0.5B and 7B at 4k, 32k and 128k tokens, and of the peers need a GPU")
