"""Compile every Triton kernel for one GPU generation, without a GPU, at the shapes of the 7B model in bfloat16:

    python tests/compile_kernels.py 90

prints one JSON object a line: kernel, registers, bytes spilled, bytes of shared memory, matrix products in the source program
and the tensor-core instructions they became. A process of its own, because the interpreter of the other tests replaces @triton.jit.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import decode
import ssm_scan as s

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 163, 90: 227, 120: 99}  # KB of shared memory that a block may take
SIZES = dict(H=24, G=1, P=128, N=256, L=256)
FLOAT32 = {"dt", "c", "D", "A", "initial", "final", "crossing", "ddt", "dD", "row", "col", "through", "state", "dweight", "dbias",
           "part", "lse"}
INT64 = {"start", "length", "first", "seq", "cu", "lengths"}
SCALARS = {"room": "i32", "splits": "i32", "span": "i32",
           "eps": "fp32", "low": "fp32", "high": "fp32", "multiplier": "fp32", "scale": "fp32"}


def compiled(kernel, capability, constants, *, num_warps, num_stages=3):
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in SCALARS:
            signature[name] = SCALARS[name]
        elif name.startswith("s_"):
            signature[name] = "i64" if name == "s_lo" else "i32"
        else:
            signature[name] = "*i64" if name in INT64 else "*fp32" if name in FLOAT32 else "*bf16"
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name] not in ("constexpr", "fp32")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=num_warps, num_stages=num_stages))


def report(name, binary, capability):
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(binary.asm["ptx"])
        cubin.write_bytes(binary.asm["cubin"])
        arch = re.search(r"\.target (\w+)", binary.asm["ptx"])[1]
        ptxas = TOOLS / ("ptxas-blackwell" if capability >= 100 else "ptxas")
        verbose = subprocess.run([ptxas, "-v", f"-arch={arch}", ptx, "-o", os.devnull], capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True,
                              env={**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}"}).stdout
    return {"kernel": name, "registers": int(re.search(r"Used (\d+) registers", verbose)[1]),
            "spilled": sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", verbose).groups())),
            "shared": binary.metadata.shared, "dots": len(re.findall(r"\btt\.dot\b", binary.asm["ttir"])),
            "tensor_core": len(re.findall(r"\b(?:HGMMA|HMMA)\b", sass)),
            "scalar_products": len(re.findall(r"tt\.dot .*-> tensor<\S+ #blocked", binary.asm["ttgir"]))}


def main(capability):
    tiles = s._tiling(SIZES["L"], SIZES["P"], SIZES["N"], torch.bfloat16, SHARED[capability] * 1024)
    forward = {  # what a kernel is not given when it does not run backward
        "states": {"entering": None, "crossing": None}, "scan": {"x": None, "ddt": None, "dD": None, "s_x": 0}, "dbc": {}}
    jobs = [("dcb", s._dcb_kernel, "HGPL", tiles["dcb"])]
    for name, kernel in (("states", s._states_kernel), ("scan", s._scan_kernel), ("dbc", s._dbc_kernel)):
        jobs.append((name, kernel, "HGPNL", tiles[name] | forward[name] | {"REVERSED": False}))
        jobs.append((name + " reversed", kernel, "HGPNL", tiles[name] | {"REVERSED": True}))
    conv = dict(CHANNELS=3584, K=4, SILU=True, BT=32, BD=64, num_warps=8)
    gradients = dict.fromkeys(("dy", "dx", "dhistory", "dweight", "dbias"))
    jobs.append(("conv", s._conv_kernel, "", conv | gradients | {"BACKWARD": False}))
    jobs.append(("conv backward", s._conv_kernel, "", conv | {"y": None, "BACKWARD": True}))
    step = dict(BP=16, BN=256, num_warps=4)
    jobs.append(("step", s._step_kernel, "HGPN", step | {"RAW": False, "dt_bias": None}))
    jobs.append(("step of the mixer", s._step_kernel, "HGPN", step | {"RAW": True}))
    jobs.append(("widest step", s._step_kernel, "HGP", step | {"RAW": True, "N": 512, "BN": 512}))
    jobs.append(("conv step", decode._conv_step_kernel, "", dict(CHANNELS=3584, K=4, BD=128, num_warps=4)))
    norm = dict(WIDTH=3072, BLOCK=4096, NORM=True, BEFORE=False, num_warps=16)
    jobs.append(("norm", decode._norm_kernel, "G", norm | {"z": None, "s_z": 0}))
    jobs.append(("gated norm", decode._norm_kernel, "G", norm))
    jobs.append(("widest norm", decode._norm_kernel, "G", norm | {"WIDTH": 16384, "BLOCK": 16384}))
    attend = dict(HKV=2, ROWS=6, HD=128, BR=16, BD=128, BN=64, num_warps=4, num_stages=2)
    jobs.append(("attend", decode._attend_kernel, "", attend))
    jobs.append(("widest attend", decode._attend_kernel, "", attend | dict(ROWS=16, HD=256, BD=256, BN=32)))
    jobs.append(("combine", decode._combine_kernel, "", dict(HQ=12, HD=128, BS=32, BD=128, num_warps=4)))
    for name, kernel, sizes, constants in jobs:
        options = {k: v for k, v in constants.items() if k.startswith("num_")}
        constants = {k: v for k, v in constants.items() if k not in options} | {k: SIZES[k] for k in sizes}
        print(json.dumps(report(name, compiled(kernel, capability, constants, **options), capability)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
