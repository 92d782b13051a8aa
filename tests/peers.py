"""Other people's scans, to be timed next to ours: (x, dt, A, B, C, cu) -> y; x, dt, B, C are (1, t, ...)."""

import sys
import types
from functools import lru_cache

import torch


@lru_cache(maxsize=8)  # as our tables: a copy from the host is not what is to be timed
def documents(cu, device):
    """cu as a tensor, and the document (1, t) of every token."""
    ends = torch.tensor(cu)
    number = torch.repeat_interleave(torch.arange(len(cu) - 1), ends.diff())[None].int()
    return ends.to(device), number.to(device)


def mamba_ssm_scan():
    try:
        import selective_scan_cuda  # noqa: F401
    except ImportError:  # mamba_ssm's CUDA extension: its import insists on it, but its scan never calls it
        sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def scan(x, dt, A, B, C, cu):
        number = documents(cu, x.device)[1] if len(cu) > 2 else None
        return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256, seq_idx=number)
    return scan


def fla_scan():
    """C, B and dt x are fla's q, k and v. It knows no groups: every head gets a copy of the first two."""
    from fla.ops.simple_gla import chunk_simple_gla

    def scan(x, dt, A, B, C, cu):
        q, k = (v.repeat_interleave(x.shape[2] // v.shape[2], 2) for v in (C, B))
        ends = documents(cu, x.device)[0] if len(cu) > 2 else None
        v = (x * dt[..., None]).to(x.dtype)
        return chunk_simple_gla(q, k, v, g=dt * A, scale=1.0, cu_seqlens=ends)[0]
    return scan


def peers():
    """{name: scan} of other people's scans, where they can be imported. Where not, a line says why."""
    found = {}
    for name, load in {"mamba_ssm": mamba_ssm_scan, "fla": fla_scan}.items():
        try:
            found[name] = load()
        except Exception as e:  # half an installation raises more than ImportError
            reason = (str(e).splitlines() or ["no message"])[0]
            print(f"{name} cannot be imported: {type(e).__name__}: {reason}")
    return found
