"""Compile every Triton kernel for one GPU generation, without a GPU, at the shapes of the 7B model in bfloat16:

    python tests/compile_kernels.py 90              one JSON object a line: registers, spills, shared memory, tensor cores
    python tests/compile_kernels.py 90 --model      and a model of the time that each takes for 32,768 tokens, as a table

A process of its own, because the interpreter of the other tests replaces @triton.jit. The model takes the assembler listing,
weights every loop by its trips, and gives per kernel the largest of four times on an H100 (132 SMs of 4 schedulers at 1.755 GHz):

    issue     instructions of all warps / (132 * 4 * 1.755e9 per second): a scheduler issues one per clock
    bytes     every operand moved once / 3.0e12 bytes per second, which copies were measured to reach
    tensor    operations of the products, whole tiles / 798e12 per second, measured for products of 8,192
    serial    of one program, where a sequence is a chain: 2 clocks per instruction of a warp that is alone on its scheduler, the
              clocks of its products (4,096 operations each), 60 for each wait, and 900 for each load that nothing runs ahead of
"""

import argparse
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

import ssm_scan as s

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 163, 90: 227, 120: 99}  # KB of shared memory that a block may take
TOKENS, SIZES = 32768, dict(H=24, G=1, P=128, N=256)
FLOAT32 = {"step", "dt", "c", "before", "after", "D", "A", "initial", "final", "crossing", "diagonal", "row", "col", "through", "F", "E",
           "ddt", "state", "dweight", "dbias"}
FLOAT64 = {"dA", "dD"}
INT64 = {"start", "length", "first", "seq", "cu"}


# ---------------------------------------------------------------------------------------------------------------------
# 1. Compiling


def compiled(kernel, capability, constants, *, num_warps, num_stages=3):
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("s_") or name == "low":
            signature[name] = "i32"
        else:
            dtype = "i64" if name in INT64 else "fp64" if name in FLOAT64 else "fp32" if name in FLOAT32 else "bf16"
            signature[name] = "*" + dtype
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name] != "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=num_warps, num_stages=num_stages))


def run(tool, *arguments):
    environment = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}"}
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True, env=environment)


def instructions(binary):
    """[(address, text)] of the listing, without the padding behind its end."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        listing = run("cuobjdump", "-sass", cubin).stdout
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", listing)
    return [(int(address, 16), text) for address, text in found if not text.startswith("NOP")]


def report(name, binary, capability):
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(binary.asm["ptx"])
        arch = re.search(r"\.target (\w+)", binary.asm["ptx"])[1]
        verbose = run("ptxas-blackwell" if capability >= 100 else "ptxas", "-v", f"-arch={arch}", ptx, "-o", os.devnull).stderr
    listing = "\n".join(text for _, text in instructions(binary))
    return {"kernel": name, "registers": int(re.search(r"Used (\d+) registers", verbose)[1]),
            "spilled": sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", verbose).groups())),
            "shared": binary.metadata.shared, "dots": len(re.findall(r"\btt\.dot\b", binary.asm["ttir"])),
            "tensor_core": len(re.findall(r"\b(?:HGMMA|HMMA)\b", listing)),
            "scalar_products": len(re.findall(r"tt\.dot .*-> tensor<\S+ #blocked", binary.asm["ttgir"])),
            "narrow_loads": len(re.findall(r"\bLDG\S*\.[US](?:8|16)\b", listing))}


def jobs(capability, l):
    """{name: (kernel, constants, launch options)} at the 7B model's shape, for chunks of l tokens."""
    tiles = s._tiling(l, SIZES["P"], SIZES["N"], torch.bfloat16, SHARED[capability] * 1024)
    sizes = SIZES | dict(L=l, EDGE=tiles["decays"]["EDGE"], R=l // tiles["decays"]["EDGE"] + 1)

    def count(name, size, tile):
        return triton.cdiv(sizes[size], tiles[name][tile])
    parts = count("states", "P", "BP") * count("states", "N", "BN")
    kernels = {
        "decays": (s._decays_kernel, {}), "cb": (s._cb_kernel, {}),
        "states": (s._states_kernel, dict(initial=None, final=None, entering=None, crossing=None, REVERSED=False)),
        "scan": (s._scan_kernel, dict(REVERSED=False)),
        "states reversed": (s._states_kernel, dict(initial=None, final=None, REVERSED=True)),
        "scan reversed": (s._scan_kernel, dict(REVERSED=True)),
        "dcb": (s._dcb_kernel, {}),
        "dbc": (s._dbc_kernel, dict(REVERSED=False)), "dbc reversed": (s._dbc_kernel, dict(REVERSED=True)),
        "ddt": (s._ddt_kernel, dict(SIDE=count("dcb", "L", "BM"), SPLIT=count("dbc", "N", "BN"), PARTS=parts))}
    found = {}
    for name, (kernel, own) in kernels.items():
        tile = tiles[name.split()[0]]
        options = {key: v for key, v in tile.items() if key.startswith("num_")}
        given = sizes | {key: v for key, v in tile.items() if key not in options}
        found[name] = kernel, {key: v for key, v in given.items() if key in kernel.arg_names} | own, options
    return found


# ---------------------------------------------------------------------------------------------------------------------
# 2. The model


def executed(listing, trips, branches=()):
    """Instructions that a warp executes: loops, in the order of their first instructions, run `trips` times; what a forward branch
    inside the first loop jumps over runs in a share of its trips, `branches` in order."""
    jumps = [(address, int(target, 16)) for address, text in listing for target in re.findall(r"\bBRA\b[^;]*?(0x[0-9a-f]+)", text)]
    loops = sorted((target, address) for address, target in jumps if target < address)
    if len(loops) != len(trips):
        raise ValueError(f"{len(loops)} loops in the listing, expected {len(trips)}")
    first, last = loops[0] if loops else (0, 0)
    skipped = [(address, target) for address, target in jumps if first <= address < target <= last][: len(branches)]
    total = 0.0
    for address, _ in listing:
        weight = 1.0
        for (begin, end), times in zip(loops, trips):
            weight *= times if begin <= address <= end else 1
        for (begin, end), share in zip(skipped, branches):
            weight *= share if begin < address < end else 1
        total += weight
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int)
    parser.add_argument("--chunk", type=int, default=512)
    args = parser.parse_args()
    for name, (kernel, constants, options) in jobs(args.capability, args.chunk).items():
        binary = compiled(kernel, args.capability, constants, **options)
        print(json.dumps(report(name, binary, args.capability)), flush=True)
