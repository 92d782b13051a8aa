"""Times of the scan's kernels with other tiles than ssm_scan.py's: python tests/gpu/tune.py

tune.py PART OF compiles that share of them, so that many processes can do so at once, and times nothing."""

import sys
from unittest.mock import patch

from kernels import kernel_times
from stages import DEV, DRY, put, stage

import torch

import ssm_scan
from tests.bench import ours, passes, scan_inputs

TOKENS, SHAPE = (256, (4, 16, 16)) if DRY else (32768, (24, 128, 256))  # h, p, n of the 7B model

def table(names, *rows):
    return [dict(zip(names.split(), row)) for row in rows]

# {kernel: changes of its tiles}. maxnreg caps registers, so that more blocks share a multiprocessor.
VARIANTS = {
    "none": [{}],
    "states": table("BP BN BK num_warps num_stages", (64, 64, 64, 4, 5), (64, 64, 256, 4, 2),
                    (64, 64, 256, 8, 2), (64, 128, 64, 4, 6), (64, 128, 128, 4, 3), (64, 128, 256, 8, 2),
                    (128, 64, 256, 8, 2), (128, 128, 128, 8, 3)),
    "scan": table("BL BK num_warps num_stages maxnreg", (64, 64, 4, 3, 168), (64, 64, 4, 2, 168),
                  (64, 64, 4, 2, 128), (64, 32, 4, 4, 168), (64, 64, 4, 4, None), (128, 64, 8, 3, None)),
    "dcb": table("BP num_stages maxnreg", (128, 1, 168), (128, 1, 128), (128, 2, 168), (128, 3, 168),
                 (64, 2, 128), (64, 3, 128), (64, 3, 168), (128, 3, None)),
    "dbc": table("BL BN BK num_warps num_stages", (64, 128, 64, 4, 3), (64, 256, 64, 8, 3),
                 (128, 128, 64, 8, 4), (128, 128, 32, 8, 3))}

def timed(name, change, run):
    for kernel, (ms, calls) in kernel_times(run).items():
        if kernel.startswith("_"):
            put("tune", of=name, kernel=kernel, ms=ms, calls=calls, **change)

def main(part, of, timing):
    leaves = scan_inputs(TOKENS if timing else 1024, *SHAPE, torch.bfloat16, DEV)
    forward, backward = passes(lambda *leaves: ours()(*leaves, (0, leaves[0].shape[1])), leaves).values()

    def both():
        forward()
        backward()

    tiling = ssm_scan._tiling
    variants = [(name, change) for name, changes in VARIANTS.items() for change in changes]
    for name, change in variants[part::of]:
        def changed(*args):
            tiles = tiling(*args)
            return tiles | {name: tiles.get(name, {}) | change}
        with patch.object(ssm_scan, "_tiling", changed):
            stage(f"tune {name} {change}", *((timed, name, change, both) if timing else (both,)))

if __name__ == "__main__":
    share = [int(number) for number in sys.argv[1:]]
    main(*(share or (0, 1)), timing=not share)
