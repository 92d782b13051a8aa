"""Compile every Triton kernel for one GPU generation, without a GPU, at the shapes of the 7B model in bfloat16:

    python tests/compile_kernels.py 90              one JSON object a line: registers, spills, shared memory, tensor cores
    python tests/compile_kernels.py 90 --model      and a model of the time that each takes for 32,768 tokens, as a table

A process of its own, because the interpreter of the other tests replaces @triton.jit. The model takes the assembler listing,
weights every loop by its trips, and gives per kernel the largest of four times on an H100 (132 SMs of 4 schedulers at 1.755 GHz):

    issue     instructions of all warps / (132 * 4 * 1.755e9 per second): a scheduler issues one per clock
    bytes     every operand moved once / 3.0e12 bytes per second, which copies were measured to reach
    tensor    operations of the products, whole tiles / 798e12 per second, measured for products of 8,192
    serial    of one program, where a sequence is a chain (states): 2 clocks per instruction of a warp that is alone on its scheduler,
              the clocks of its products, 4,096 operations each, and 60 clocks for each wait
"""

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
from tests.gpu.kernels import kernel_bytes

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 163, 90: 227, 120: 99}  # KB of shared memory that a block may take
CLOCK = 1.755e9
TOKENS, SIZES = 32768, dict(H=24, G=1, P=128, N=256)
FLOAT32 = {"step", "dt", "c", "before", "after", "D", "A", "initial", "final", "crossing", "diagonal", "row", "col", "through", "F", "E",
           "ddt", "state", "dweight", "part", "lse"}
FLOAT64 = {"dA", "dD"}
INT64 = {"start", "length", "first", "seq", "cu", "lengths"}
SCALARS = {"room": "i32", "splits": "i32", "span": "i32", "eps": "fp32", "multiplier": "fp32", "scale": "fp32", "high": "fp32"}


# ---------------------------------------------------------------------------------------------------------------------
# 1. Compiling


def compiled(kernel, capability, constants, *, num_warps, num_stages=3):
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in SCALARS:
            signature[name] = SCALARS[name]
        elif name == "low":  # an offset of the scan, a float of the step
            signature[name] = "fp32" if "high" in kernel.arg_names else "i32"
        elif name.startswith("s_"):
            signature[name] = "i32"
        else:
            dtype = "i64" if name in INT64 else "fp64" if name in FLOAT64 else "fp32" if name in FLOAT32 else "bf16"
            signature[name] = "*" + dtype
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name] not in ("constexpr", "fp32")}
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


def jobs(capability):
    """{name: (kernel, constants, launch options)} at the 7B model's shape and with its chunks."""
    tiles = s._tiling(CHUNK, SIZES["P"], SIZES["N"], torch.bfloat16, SHARED[capability] * 1024)
    sizes = SIZES | dict(L=CHUNK, EDGE=tiles["decays"]["EDGE"], R=CHUNK // tiles["decays"]["EDGE"] + 1)

    def count(name, size, tile):
        return triton.cdiv(sizes[size], tiles[name][tile])
    sums = dict(SIDE=count("dcb", "L", "BM"), SPLIT=count("dbc", "N", "BN"), PARTS=count("states", "P", "BP") * count("states", "N", "BN"))
    scan = {
        "decays": (s._decays_kernel, {}),
        "cb": (s._cb_kernel, {}),
        "states": (s._states_kernel, dict(initial=None, final=None, entering=None, crossing=None, REVERSED=False)),
        "scan": (s._scan_kernel, dict(REVERSED=False)),
        "states reversed": (s._states_kernel, dict(initial=None, final=None, REVERSED=True)),
        "scan reversed": (s._scan_kernel, dict(REVERSED=True)),
        "dcb": (s._dcb_kernel, dict(DIAGONAL=False)),
        "dcb diagonal": (s._dcb_kernel, dict(DIAGONAL=True)),
        "dbc": (s._dbc_kernel, dict(REVERSED=False)),
        "dbc reversed": (s._dbc_kernel, dict(REVERSED=True)),
        "ddt": (s._ddt_kernel, sums)}
    found = {name: (kernel, sizes | tiles[name.split()[0]] | own) for name, (kernel, own) in scan.items()}
    conv, step = dict(CHANNELS=3584, K=4, SILU=True), SIZES | dict(BP=16, BN=256, num_warps=4)
    norm = dict(G=1, WIDTH=3072, BLOCK=4096, NORM=True, BEFORE=False, num_warps=16)
    attend = dict(HKV=2, ROWS=6, HD=128, BR=16, BD=128, BN=64, num_warps=4, num_stages=2)
    found |= {
        "conv": (s._conv_kernel, conv | s._CONV_FORWARD | dict.fromkeys(("dy", "dweight"))),
        "conv backward": (s._conv_kernel, conv | s._CONV_BACKWARD),
        "step": (s._step_kernel, step | dict(RAW=False, dt_bias=None)),
        "step of the mixer": (s._step_kernel, step | dict(RAW=True)),
        "widest step": (s._step_kernel, step | dict(RAW=True, N=512, BN=512)),
        "conv step": (decode._conv_step_kernel, dict(CHANNELS=3584, K=4, BD=128, num_warps=4)),
        "norm": (decode._norm_kernel, norm | dict(z=None, s_z=0)),
        "gated norm": (decode._norm_kernel, norm),
        "widest norm": (decode._norm_kernel, norm | dict(WIDTH=16384, BLOCK=16384)),
        "attend": (decode._attend_kernel, attend),
        "widest attend": (decode._attend_kernel, attend | dict(ROWS=16, HD=256, BD=256, BN=32)),
        "combine": (decode._combine_kernel, dict(HQ=12, HD=128, BS=32, BD=128, num_warps=4))}
    options = "num_warps", "num_stages"
    return {name: (kernel, {k: v for k, v in given.items() if k in kernel.arg_names}, {k: v for k, v in given.items() if k in options})
            for name, (kernel, given) in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# 2. The model


def executed(listing, trips, branch=1.0):
    """Instructions that a warp executes: the loops, in the order of their first instructions, run `trips` times each (loops that
    the compiler has unrolled are not there), and what the first forward jump inside a loop skips in a share `branch` of them."""
    jumps = [(address, int(target, 16)) for address, text in listing for target in re.findall(r"\bBRA\b[^;]*?(0x[0-9a-f]+)", text)]
    loops = sorted((target, address) for address, target in jumps if target < address)
    if loops and len(loops) != len(trips):
        raise ValueError(f"{len(loops)} loops in the listing, expected {len(trips)}")
    inside = [(address, target) for address, target in jumps for first, last in loops if first <= address < target <= last]
    total = 0.0
    for address, _ in listing:
        weight = 1.0
        for (first, last), times in zip(loops, trips):
            weight *= times if first <= address <= last else 1
        for jump, target in inside[:1]:
            weight *= branch if jump < address < target else 1
        total += weight
    return total


def workload(name, c):
    """Programs, trips of their loops, share of a loop's branch, bytes moved, and operations, of the kernels that are modelled."""
    t, h, p, n, l = TOKENS, SIZES["H"], SIZES["P"], SIZES["N"], CHUNK
    if name.startswith("conv"):
        backward = name == "conv backward"
        trips = -(-(c["BT"] + backward * (c["K"] - 1)) // c["ROWS"])
        return t // c["BT"] * (c["CHANNELS"] // c["BD"]), [trips], 1, (2 + backward) * 2 * t * c["CHANNELS"], 0
    kernel, *_ = name.split()
    moved = kernel_bytes(t, h, p, n, l)["forward" if name in ("states", "scan") else "backward"][f"_{kernel}_kernel"]
    if kernel == "states":
        return h * (p // c["BP"]) * (n // c["BN"]), [t // c["BL"]], c["BL"] / l, moved, 2 * t * h * p * n
    side = l // c["BM"]
    if kernel == "scan":
        return t // c["BM"] * h, [n // c["BK"], (side - 1) / 2], 1, moved, 2 * t * h * p * (n + (l + c["BM"]) / 2)
    if kernel == "dcb":  # two launches, whose bytes stand with the first; programs above the diagonal end at once
        diagonal = name == "dcb diagonal"
        tiles = side if diagonal else side * (side - 1) / 2
        return tiles * t // l, [h], 1, 0 if diagonal else moved, 2 * tiles * c["BM"] ** 2 * t // l * h * p
    trips = [h, (side + 1) / 2 * c["BM"] / c["BL"]]  # dbc: moved is what both of its runs do
    return t // c["BM"] * (n // c["BN"]), trips, 1, moved / 2, 2 * t * n * (h * p + (l + c["BM"]) / 2)


def milliseconds(name, binary, c, options):
    """{issue, bytes, tensor, serial} of one kernel, see the top."""
    programs, trips, branch, moved, operations = workload(name, c)
    each = executed(instructions(binary), trips, branch)
    times = {"issue": programs * options["num_warps"] * each / (132 * 4 * CLOCK), "bytes": moved / 3.0e12, "tensor": operations / 798e12}
    if name.startswith("states"):
        tile = 2 * c["BP"] * c["BN"] * c["BL"]  # operations of one product
        times["serial"] = (2 * each + trips[0] * (tile / 4096 + 60)) / CLOCK
    return {key: v * 1e3 for key, v in times.items()}


PARTS = {"states": "forward", "scan": "forward", "states reversed": "backward", "scan reversed": "backward", "dcb": "backward",
         "dbc": "backward", "dbc reversed": "backward", "conv": "convolution", "conv backward": "convolution"}


def model():
    """(rows, sums): a dict of milliseconds per kernel on sm_90, and the sums of the largest ones. The two launches of dcb are one row."""
    rows, found = {}, jobs(90)
    for name in (*PARTS, "dcb diagonal"):
        kernel, constants, options = found[name]
        rows[name] = milliseconds(name, compiled(kernel, 90, constants, **options), constants, options)
    diagonal = rows.pop("dcb diagonal")
    rows["dcb"] = {key: v + diagonal[key] for key, v in rows["dcb"].items()}
    sums = dict.fromkeys(PARTS.values(), 0.0)
    for name, times in rows.items():
        sums[PARTS[name]] += max(times.values())
    return rows, sums


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("capability", type=int, choices=SHARED)
    parser.add_argument("--model", action="store_true", help="the table of times, for 90")
    args = parser.parse_args()
    if not args.model:
        for name, (kernel, constants, options) in jobs(args.capability).items():
            binary = compiled(kernel, args.capability, constants, **options)
            print(json.dumps(report(name, binary, args.capability)), flush=True)
        return
    rows, sums = model()
    for name, times in rows.items():
        print(f"{name:16s}", "  ".join(f"{key} {ms:.3f}" for key, ms in times.items()), f"  largest {max(times.values()):.3f} ms")
    print(json.dumps({key: round(v, 4) for key, v in sums.items()}))


if __name__ == "__main__":
    main()
