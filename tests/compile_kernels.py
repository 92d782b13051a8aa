"""Compile every Triton kernel for a GPU generation, without a GPU, in bfloat16, at the 7B model's shapes:

    python tests/compile_kernels.py 90     a JSON object per kernel: registers, stack (spills), shared memory,
                                           products, tensor-core instructions, loads of 1 or 2 bytes, and
                                           products whose registers may change before they are read

A process of its own, because the interpreter of the other tests replaces @triton.jit."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are defined
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import decode
import ssm_scan as s
from model import CHUNK

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED = {80: 163, 90: 227, 120: 99}  # KB of shared memory that a block may take
SIZES = dict(H=24, G=1, P=128, N=256)

# Types of arguments; pointers that are not listed point at bfloat16.
POINTERS = {
    "fp32": "step decays D A initial final crossing diagonal row col flow F E ddt state dtaps part "
            "lse".split(),
    "fp64": "dA dD".split(),
    "i64": "start left first lengths".split()}
SCALARS = {"room": "i32", "splits": "i32", "span": "i32", "eps": "fp32", "multiplier": "fp32",
           "scale": "fp32", "low": "fp32", "high": "fp32"}

def type_of(name):
    if name in SCALARS or name.startswith("s_"):
        return SCALARS.get(name, "i32")
    return "*" + next((dtype for dtype, names in POINTERS.items() if name in names), "bf16")

def compiled(kernel, capability, constants, **options):
    signature = {name: "constexpr" if name in constants else type_of(name) for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name] not in ("constexpr", "fp32")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

def cuobjdump(binary, option):
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        return subprocess.run([CUOBJDUMP, option, cubin], capture_output=True, text=True, check=True).stdout

def report(name, binary):
    text = cuobjdump(binary, "-sass")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump(binary, "-res-usage")).groups()
    return {"kernel": name, "registers": int(registers), "stack": int(stack),
            "shared": binary.metadata.shared,
            "dots": len(re.findall(r"\btt\.dot\b", binary.asm["ttir"])),
            "tensor_core": len(re.findall(r"\b(?:HGMMA|HMMA)\b", text)),
            "scalar_products": len(re.findall(r"tt\.dot .*-> tensor<\S+ #blocked", binary.asm["ttgir"])),
            "narrow_loads": len(re.findall(r"\bLDG\S*\.[US](?:8|16)\b", text)),
            # Asynchronous products (Hopper) with a left factor in registers, and no wait for them behind.
            "unfinished": len(re.findall(r"warp_group_dot .*: tensor<.*\n(?!.*dot_wait .*pendings = 0)",
                                         binary.asm["ttgir"]))}

def jobs(capability):
    """{name: (kernel, constants, launch options)} at the 7B model's shape and with its chunks."""
    tiles = s._tiling(CHUNK, SIZES["P"], SIZES["N"], torch.bfloat16, SHARED[capability] * 1024)
    sizes = SIZES | dict(L=CHUNK, EDGE=tiles["dcb"]["BL"])

    def count(name, side):
        return triton.cdiv(sizes[side], tiles[name]["B" + side])

    parts = count("states", "P") * count("states", "N")
    sums = dict(SPLIT=count("dbc", "N"), PARTS=parts)
    nothing = dict.fromkeys(("initial", "final"))
    scan = {
        "decays": (s._decays_kernel, {}),
        "cb": (s._cb_kernel, {}),
        "states": (s._states_kernel, nothing | dict(entering=None, crossing=None, REVERSED=False)),
        "scan": (s._scan_kernel, dict(REVERSED=False)),
        "states reversed": (s._states_kernel, nothing | dict(REVERSED=True)),
        "scan reversed": (s._scan_kernel, dict(REVERSED=True)),
        "dcb": (s._dcb_kernel, dict(DIAGONAL=False)),
        "dcb diagonal": (s._dcb_kernel, dict(DIAGONAL=True)),
        "dbc": (s._dbc_kernel, dict(REVERSED=False)),
        "dbc reversed": (s._dbc_kernel, dict(REVERSED=True)),
        "ddt": (s._ddt_kernel, sums)}
    conv = dict(CHANNELS=3584, K=4, SILU=True)
    step = SIZES | dict(BP=16, BN=256, num_warps=4)
    norm = dict(G=1, WIDTH=3072, BLOCK=4096, NORM=True, BEFORE=False, num_warps=16)
    attend = dict(HKV=2, ROWS=6, HD=128, BR=16, BD=128, BN=64, num_warps=4, num_stages=2)
    found = {name: (kernel, sizes | tiles[name.split()[0]] | own) for name, (kernel, own) in scan.items()} | {
        "conv": (s._conv_kernel, conv | s._CONV_FORWARD | dict(dy=None, dtaps=None)),
        "conv backward": (s._conv_kernel, conv | s._CONV_BACKWARD),
        "step": (decode._step_kernel, step),
        "widest step": (decode._step_kernel, step | dict(N=512, BN=512)),
        "conv step": (decode._conv_step_kernel, dict(CHANNELS=3584, K=4, BD=128, num_warps=4)),
        "norm": (decode._norm_kernel, norm | dict(z=None, s_z=0)),
        "gated norm": (decode._norm_kernel, norm),
        "widest norm": (decode._norm_kernel, norm | dict(WIDTH=16384, BLOCK=16384)),
        "attend": (decode._attend_kernel, attend),
        "widest attend": (decode._attend_kernel, attend | dict(ROWS=16, HD=256, BD=256, BN=32)),
        "combine": (decode._combine_kernel, dict(HQ=12, HD=128, BS=128, BD=32, num_warps=4))}
    result = {}
    for name, (kernel, given) in found.items():
        options = {k: v for k, v in given.items() if k in ("num_warps", "num_stages", "maxnreg")}
        result[name] = kernel, {k: v for k, v in given.items() if k in kernel.arg_names}, options
    return result

def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("capability", type=int, choices=SHARED)
    args = parser.parse_args()
    for name, (kernel, constants, options) in jobs(args.capability).items():
        binary = compiled(kernel, args.capability, constants, **options)
        print(json.dumps(report(name, binary)), flush=True)

if __name__ == "__main__":
    main()
