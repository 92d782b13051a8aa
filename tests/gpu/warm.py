"""Fill Triton's cache on every core, so that nothing is compiled while it is timed: warm.py [SECONDS]

The peers tune themselves over some hundred configurations, minutes of compiling: each process compiles some
and launches none. Ours are simply run; warm.py ours TOKENS HEADS HEAD STATE does only that."""

import subprocess
import sys
import time

from stages import DEV, DRY, put

import torch

from ssm_scan import causal_conv1d, ssd_step
from tests.bench import ours, passes, scan_inputs
from tests.peers import peers

SHARES = 6  # processes per peer: two peers and three shapes of ours occupy 15 cores
SHAPES = ("1024 24 128 256", "1024 24 64 128", "1024 3 32 32")
JOBS = [*(f"ours {shape}" for shape in SHAPES),
        *(f"{peer} {SHAPES[0]} {share}" for peer in ("mamba_ssm", "fla") for share in range(SHARES))]

def run_ours(t, h, p, n):
    """Each kernel once, then the scan's in documents and in the small chunks of short rows."""
    for tokens, cu in ((t, (0, t)), (t, (0, t - 24, t)), (100, (0, 100)), (40, (0, 40)), (20, (0, 20))):
        x, dt, A, B, C = leaves = scan_inputs(tokens, h, p, n, torch.bfloat16, DEV)
        for run in passes(lambda *leaves: ours()(*leaves, cu), leaves).values():
            run()
        if tokens == t:
            d = h * p + 2 * n
            shapes = ((1, t, d), (d, 4), (d,))
            conv = (torch.randn(*shape, device=DEV, dtype=x.dtype, requires_grad=True) for shape in shapes)
            causal_conv1d(*conv, activation="silu")[0].sum().backward()
            with torch.no_grad():
                ssd_step(torch.zeros(1, h, p, n, device=DEV), x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])

def compile_peer(name, t, h, p, n, share):
    from triton.runtime.autotuner import Autotuner

    def run(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args))
        self.best_config = self.configs[0]  # some callers ask for it
        for config in self.prune_configs(kwargs)[share::SHARES]:
            try:
                self.fn.run(*args, **{**kwargs, "warmup": True}, **config.all_kwargs())
            except Exception as e:  # too large for the card: the autotuner will drop it, too
                print(config, type(e).__name__)
        self.nargs = None

    Autotuner.run = run
    scan, leaves = peers()[name], scan_inputs(t, h, p, n, torch.bfloat16, DEV)
    for run in passes(lambda *leaves: scan(*leaves, (0, t)), leaves).values():
        run()

def run_all(limit):
    begin, names = time.time(), JOBS[2:3] if DRY else JOBS
    jobs = {job: subprocess.Popen([sys.executable, __file__, *job.split()]) for job in names}
    for job, process in jobs.items():
        try:
            process.wait(max(1, begin + limit - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
        put("warm", job=job, rc=process.wait(), by=time.time() - begin)

if __name__ == "__main__":
    if len(sys.argv) > 2:
        name, numbers = sys.argv[1], map(int, sys.argv[2:])
        run_ours(*numbers) if name == "ours" else compile_peer(name, *numbers)
    else:
        run_all(float(sys.argv[1]) if len(sys.argv) > 1 else 120.0)
