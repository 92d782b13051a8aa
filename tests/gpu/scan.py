"""Times against bytes: the scan next to mamba_ssm's and fla's, and each of its kernels.
python tests/gpu/scan.py"""

import itertools
from functools import partial

from stages import DEV, DRY, put, put_kernels, stage

import torch
import triton
from triton.runtime.autotuner import Autotuner

from kernels import kernel_bytes
from tests.bench import CHUNK, floors, milliseconds, ours, passes, scan_inputs, scan_work
from tests.peers import peers

SHAPES = {"small": (4, 16, 16)} if DRY else {"7B": (24, 128, 256), "0.5B": (24, 64, 128)}
TOKENS = (256,) if DRY else (32768, 4096, 131072)

def scan(by, function, shape, t, packed, bandwidth, rate, chunk=CHUNK, detail=False):
    h, p, n = SHAPES[shape]
    inputs, cu = scan_inputs(t, h, p, n, torch.bfloat16, DEV), (*range(0, t, 1000 if packed else t), t)
    for part, run in passes(lambda *leaves: function(*leaves, cu), inputs).items():
        about = dict(by=by, shape=shape, tokens=t, packed=packed, part=part)
        size, operations = scan_work(t, h, p, n, 2)[part]
        took, floor = milliseconds(run, DEV), max(size / bandwidth, operations / rate) * 1e3
        put("scan", ms=took, floor_ms=floor, share=floor / took, **about)
        if detail:  # the peers' kernels have other names, and so no bytes here
            put_kernels("kernel", run, bandwidth, kernel_bytes(t, h, p, n, chunk)[part], **about)

def main():
    limits, device = floors(DEV), "cpu" if DRY else torch.cuda.get_device_name()
    put("floors", device=device, copy_gb_s=limits[0] / 1e9, matrix_tflop_s=limits[1] / 1e12)
    for shape, t, packed in itertools.product(SHAPES, TOKENS, (False, True)):
        stage(f"ours, {shape}, {t}", scan, "ours", ours(), shape, t, packed, *limits,
              detail=not packed and shape != "0.5B")
    found = peers()
    # mamba_ssm times 110 configurations: 40 s with 125 ms for each, as Triton does it.
    Autotuner.do_bench = property(lambda self: partial(triton.testing.do_bench, warmup=5, rep=20))
    if DRY:  # a CPU launches none of them
        return
    for chunk in (128, 256, 512):
        name = f"ours, chunk {chunk}"
        stage(name, scan, name, ours(chunk=chunk), "7B", 32768, False, *limits, chunk, detail=True)
    for (name, function), packed in itertools.product(found.items(), (False, True)):
        stage(name, scan, name, function, "7B", TOKENS[0], packed, *limits, detail=not packed)

if __name__ == "__main__":
    main()
