"""Times of the scan's kernels with other tiles than ssm_scan.py's, and with the best of them together:
python tests/gpu/tune.py

tune.py PART OF compiles that share of them, so that many processes can do so at once, and times nothing."""

import sys
from unittest.mock import patch

from stages import DEV, DRY, put, put_kernels, stage

import torch

import ssm_scan
from kernels import kernel_times
from tests.bench import milliseconds, ours, passes, scan_inputs

TOKENS, SHAPE = (256, (4, 16, 16)) if DRY else (32768, (24, 128, 256))  # h, p, n of the 7B model

def table(names, *rows):
    return [dict(zip(names.split(), row)) for row in rows]

# {kernel: changes of its tiles}. maxnreg caps registers, so that more blocks share a multiprocessor.
VARIANTS = {
    "states": table("BP BN BK num_warps num_stages", (64, 64, 256, 4, 2), (64, 64, 128, 4, 3),
                    (64, 128, 256, 4, 2), (128, 64, 256, 8, 2)),
    "scan": table("BL BJ BK num_warps num_stages maxnreg", (64, 32, 64, 4, 3, 168), (64, 32, 64, 4, 2, 168),
                  (64, 32, 32, 4, 3, 128), (64, 64, 64, 4, 3, 168), (64, 64, 64, 4, 3, None),
                  (128, 32, 64, 8, 3, 128)),
    "dcb": table("BP num_warps num_stages maxnreg", (128, 8, 3, 128), (128, 8, 1, 128), (128, 4, 3, None),
                 (128, 4, 1, None)),
    "dbc": table("BL BN BK num_warps num_stages", (128, 128, 64, 8, 3), (128, 128, 32, 8, 3),
                 (64, 128, 64, 4, 2))}

def changed_tiles(changes):
    tiling = ssm_scan._tiling

    def changed(*args):
        return {name: tiles | changes.get(name, {}) for name, tiles in tiling(*args).items()}
    return patch.object(ssm_scan, "_tiling", changed)

def timed(name, change, run, best):
    """Put the milliseconds of this kernel in both directions, and keep the fastest change in `best`."""
    ms = sum(took for kernel, (took, _) in kernel_times(run).items() if kernel == f"_{name}_kernel")
    put("tune", of=name, ms=ms, **change)
    best[name] = min(best.get(name, (ms, change)), (ms, change), key=lambda pair: pair[0])

def main(part, of, timing):
    leaves = scan_inputs(TOKENS if timing else 1024, *SHAPE, torch.bfloat16, DEV)
    runs = passes(lambda *leaves: ours()(*leaves, (0, leaves[0].shape[1])), leaves)

    def both():
        for run in runs.values():
            run()

    best = {}
    variants = [(name, change) for name, changes in VARIANTS.items() for change in changes]
    for name, change in variants[part::of]:
        with changed_tiles({name: change}):
            stage(f"tune {name} {change}", *((timed, name, change, both, best) if timing else (both,)))
    best = {name: change for name, (_, change) in best.items()}
    for tiles, changes in (("ours", {}), ("the best of all", best)) if timing else ():
        with changed_tiles(changes):
            for direction, run in runs.items():
                put("tuned", tiles=tiles, part=direction, ms=milliseconds(run, DEV))
                put_kernels("tuned kernel", run, tiles=tiles, part=direction)

if __name__ == "__main__":
    share = [int(number) for number in sys.argv[1:]]
    main(*(share or (0, 1)), timing=not share)
