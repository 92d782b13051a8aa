"""What the scripts of this folder share. Without a GPU all of it shrinks (DRY), so that it can be tried."""

import json
import os
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from kernels import kernel_times

DRY = not torch.cuda.is_available()
DEV = "cpu" if DRY else "cuda"
OUT = Path(os.environ.get("OUT", "runs/gpu"))

def sync():
    if not DRY:
        torch.cuda.synchronize()

def seconds(run):
    """Wall time of one call, which may well wait for the host; and what it returns."""
    sync()
    start = time.perf_counter()
    result = run()
    sync()
    return time.perf_counter() - start, result

def put(kind, **fields):
    """One JSON line, printed and added to results.jsonl at once: a stage that is stopped loses nothing."""
    numbers = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in fields.items()}
    line = json.dumps({"kind": kind, **numbers})
    print(line, flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / "results.jsonl", "a") as f:
        f.write(line + "\n")

def put_kernels(kind, run, bandwidth=None, sizes=None, top=15, **fields):
    """The longest kernels of run(), with their share of a copy's bandwidth where `sizes` has their bytes."""
    kernels = kernel_times(run)
    for name, (ms, calls) in [*kernels.items()][:top]:
        size = (sizes or {}).get(name)
        share = size / bandwidth / ms * 1e3 if size else None
        put(kind, name=name[:90], ms=ms, calls=calls, of_copy=share, **fields)
    ms, launches = (sum(column) for column in zip((0, 0), *kernels.values()))
    put(f"{kind}s", sum_ms=ms, launches=launches, **fields)

def error(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))

def stage(name, function, *args, **kwargs):
    """Run one part. A failure is a line in the results and not the end."""
    start = time.time()
    try:
        function(*args, **kwargs)
        put("done", part=name, seconds=time.time() - start)
    except Exception as e:
        traceback.print_exc()
        put("FAILED", part=name, error=f"{type(e).__name__}: {str(e)[:300]}", seconds=time.time() - start)
    torch.cuda.empty_cache()
