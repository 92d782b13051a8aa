"""Compile every Triton kernel for one GPU generation, without a GPU, in bfloat16, at shapes of the 7B model:

    python tests/compile_kernels.py 90            a JSON object per kernel: registers, stack (spills), shared
                                                  memory, tensor cores; at the end, for 90, the model's sums
    python tests/compile_kernels.py 90 --model    a model of the time of each, as a table

A process of its own, because the interpreter of the other tests replaces @triton.jit. The model is for 32,768
tokens. It reads the assembler listing, weights every loop by its trips, and takes per kernel the largest of
four times on an H100 (132 SMs of 4 schedulers at 1.755 GHz):

    issue     instructions of all warps / (132 * 4 * 1.755e9 per second): a scheduler issues one per clock
    bytes     every operand moved once / 3.0e12 bytes per second, which copies were measured to reach
    tensor    operations of the products, whole tiles / 798e12 per second, measured for products of 8,192
    serial    of one program, where a sequence is a chain (states): 2 clocks per instruction of a warp that is
              alone on its scheduler, the clocks of its products, 4,096 operations each, and 60 clocks a wait
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

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED = {80: 163, 90: 227, 120: 99}  # KB of shared memory that a block may take
CLOCK = 1.755e9
TOKENS, SIZES = 32768, dict(H=24, G=1, P=128, N=256)

# Types of arguments; pointers that are not listed point at bfloat16.
POINTERS = {
    "fp32": "step decays D A initial final crossing diagonal row col flow F E ddt state dtaps part "
            "lse".split(),
    "fp64": "dA dD".split(),
    "i64": "start left first lengths".split()}
SCALARS = {"room": "i32", "splits": "i32", "span": "i32", "eps": "fp32", "multiplier": "fp32",
           "scale": "fp32", "low": "fp32", "high": "fp32"}

# 1. Compiling -----------------------------------------------------------------------------------------------

def type_of(name):
    if name in SCALARS or name.startswith("s_"):
        return SCALARS.get(name, "i32")
    return "*" + next((dtype for dtype, names in POINTERS.items() if name in names), "bf16")

def compiled(kernel, capability, constants, *, num_warps, num_stages=3):
    signature = {name: "constexpr" if name in constants else type_of(name) for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name] not in ("constexpr", "fp32")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = dict(num_warps=num_warps, num_stages=num_stages)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

def cuobjdump(binary, option):
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        return subprocess.run([CUOBJDUMP, option, cubin], capture_output=True, text=True, check=True).stdout

def instructions(binary):
    """[(address, text)] of the listing, without the padding behind its end."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", cuobjdump(binary, "-sass"))
    return [(int(address, 16), text) for address, text in found if not text.startswith("NOP")]

def report(name, binary, listing):
    text = "\n".join(text for _, text in listing)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump(binary, "-res-usage")).groups()
    return {"kernel": name, "registers": int(registers), "stack": int(stack),
            "shared": binary.metadata.shared,
            "dots": len(re.findall(r"\btt\.dot\b", binary.asm["ttir"])),
            "tensor_core": len(re.findall(r"\b(?:HGMMA|HMMA)\b", text)),
            "scalar_products": len(re.findall(r"tt\.dot .*-> tensor<\S+ #blocked", binary.asm["ttgir"])),
            "narrow_loads": len(re.findall(r"\bLDG\S*\.[US](?:8|16)\b", text))}

def jobs(capability):
    """{name: (kernel, constants, launch options)} at the 7B model's shape and with its chunks."""
    tiles = s._tiling(CHUNK, SIZES["P"], SIZES["N"], torch.bfloat16, SHARED[capability] * 1024)
    sizes = SIZES | dict(L=CHUNK, EDGE=tiles["dcb"]["BL"])

    def count(name, side):
        return triton.cdiv(sizes[side], tiles[name]["B" + side])

    parts = count("states", "P") * count("states", "N")
    sums = dict(SIDE=count("dcb", "L"), SPLIT=count("dbc", "N"), PARTS=parts)
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
        "combine": (decode._combine_kernel, dict(HQ=12, HD=128, BS=32, BD=128, num_warps=4))}
    result = {}
    for name, (kernel, given) in found.items():
        options = {k: v for k, v in given.items() if k in ("num_warps", "num_stages")}
        result[name] = kernel, {k: v for k, v in given.items() if k in kernel.arg_names}, options
    return result

# 2. The model -----------------------------------------------------------------------------------------------

PARTS = {"states": "forward", "scan": "forward", "states reversed": "backward", "scan reversed": "backward",
         "dcb": "backward", "dcb diagonal": "backward", "dbc": "backward", "dbc reversed": "backward",
         "conv": "convolution", "conv backward": "convolution"}

def executed(listing, trips, branch=1.0):
    """Instructions that a warp executes. Loops, in the order of their first instructions, run `trips` times.
    What the first forward jump inside a loop skips runs in a share `branch` of them. Loops that the compiler
    has unrolled are not there."""
    jumps = [(address, int(target, 16)) for address, text in listing
             for target in re.findall(r"\bBRA\b[^;]*?(0x[0-9a-f]+)", text)]
    loops = sorted((target, address) for address, target in jumps if target < address)
    if loops and len(loops) != len(trips):
        raise ValueError(f"{len(loops)} loops in the listing, expected {len(trips)}")
    inside = [jump for jump in jumps for first, last in loops if first <= jump[0] < jump[1] <= last]
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
    """Programs, trips of their loops, share of a loop's branch, bytes moved, operations."""
    t, h, p, n, l = TOKENS, SIZES["H"], SIZES["P"], SIZES["N"], CHUNK
    if name.startswith("conv"):
        backward = name == "conv backward"
        programs = t // c["BT"] * (c["CHANNELS"] // c["BD"])
        trips = -(-(c["BT"] + backward * (c["K"] - 1)) // c["ROWS"])
        return programs, [trips], 1, (2 + backward) * 2 * t * c["CHANNELS"], 0
    kernel, *_ = name.split()
    moved = kernel_bytes(t, h, p, n, l)[PARTS[name]][f"_{kernel}_kernel"]
    if kernel == "states":
        return h * (p // c["BP"]) * (n // c["BN"]), [t // c["BK"]], c["BK"] / l, moved, 2 * t * h * p * n
    side, rows = l // c["BL"], t // c["BL"]
    within = (l + c["BL"]) / 2  # keys that a token meets in its chunk, on average, in whole tiles
    if kernel == "scan":
        return rows * h, [n // c["BK"], (side - 1) / 2], 1, moved, 2 * t * h * p * (n + within)
    if kernel == "dcb":  # the first launch counts the bytes of both; programs above the diagonal end at once
        diagonal = name == "dcb diagonal"
        tiles = (side if diagonal else side * (side - 1) / 2) * t // l
        return tiles, [h], 1, 0 if diagonal else moved, 2 * tiles * c["BL"] ** 2 * h * p
    trips = [h, (side + 1) / 2 * c["BL"] / c["BK"]]  # dbc: moved is what both of its runs do
    return rows * (n // c["BN"]), trips, 1, moved / 2, 2 * t * n * (h * p + within)

def milliseconds(name, listing, c, warps):
    """{issue, bytes, tensor, serial} of one kernel, see the top."""
    programs, trips, branch, moved, operations = workload(name, c)
    each = executed(listing, trips, branch)
    seconds = {"issue": programs * warps * each / (132 * 4 * CLOCK), "bytes": moved / 3.0e12,
               "tensor": operations / 798e12}
    if name.startswith("states"):
        tile = 2 * c["BP"] * c["BN"] * c["BK"]  # operations of one product
        seconds["serial"] = (2 * each + trips[0] * (tile / 4096 + 60)) / CLOCK
    return {key: v * 1e3 for key, v in seconds.items()}

def sums_of(times):
    """{pass: the sum of its kernels' largest times}. The two launches of dcb count as one kernel."""
    times = dict(times)
    diagonal = times.pop("dcb diagonal")
    times["dcb"] = {key: v + diagonal[key] for key, v in times["dcb"].items()}
    sums = dict.fromkeys(PARTS.values(), 0.0)
    for name, parts in times.items():
        sums[PARTS[name]] += max(parts.values())
    return times, {key: round(v, 4) for key, v in sums.items()}

def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("capability", type=int, choices=SHARED)
    parser.add_argument("--model", action="store_true", help="the table of times, for 90")
    args = parser.parse_args()
    times = {}
    for name, (kernel, constants, options) in jobs(args.capability).items():
        if args.model and name not in PARTS:
            continue
        binary = compiled(kernel, args.capability, constants, **options)
        listing = instructions(binary)
        if args.capability == 90 and name in PARTS:
            times[name] = milliseconds(name, listing, constants, options["num_warps"])
        if not args.model:
            print(json.dumps(report(name, binary, listing)), flush=True)
    if not times:
        return
    times, sums = sums_of(times)
    for name, parts in times.items() if args.model else ():
        print(f"{name:16s}", "  ".join(f"{key} {ms:.3f}" for key, ms in parts.items()),
              f"  largest {max(parts.values()):.3f} ms")
    print(json.dumps(sums))

if __name__ == "__main__":
    main()
