"""Other people's code, to be timed next to ours: scans (x, dt, A, B, C, cu) -> y with x, dt, B, C (1, t, ...)
and transformers' model. What is not installed is left out."""

import sys
import types
from dataclasses import asdict
from functools import lru_cache

import torch

@lru_cache(maxsize=8)  # as our own tables are: copies from the host are not what is timed
def documents(cu, device):
    """cu as a tensor, and the document (1, t) of every token."""
    ends = torch.tensor(cu)
    number = torch.repeat_interleave(torch.arange(len(cu) - 1), ends.diff())[None].int()
    return ends.to(device), number.to(device)

def mamba_ssm_scan():
    try:
        import selective_scan_cuda  # noqa: F401
    except ImportError:  # mamba_ssm imports its CUDA extension, but its Mamba-2 scan never calls it
        sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def scan(x, dt, A, B, C, cu):
        number = documents(cu, x.device)[1] if len(cu) > 2 else None
        return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256, seq_idx=number)
    return scan

def fla_scan():
    """fla's q, k, v are C, B, dt x. It has no groups: every head gets a copy of C and B."""
    from fla.ops.simple_gla import chunk_simple_gla

    def scan(x, dt, A, B, C, cu):
        q, k = (v.repeat_interleave(x.shape[2] // v.shape[2], 2) for v in (C, B))
        ends = documents(cu, x.device)[0] if len(cu) > 2 else None
        v = (x * dt[..., None]).to(x.dtype)
        return chunk_simple_gla(q, k, v, g=dt * A, scale=1.0, cu_seqlens=ends)[0]
    return scan

def peers():
    """{name: scan} of those that can be imported. For the others, print why not."""
    found = {}
    for name, load in {"mamba_ssm": mamba_ssm_scan, "fla": fla_scan}.items():
        try:
            found[name] = load()
        except Exception as e:  # half an installation raises more than ImportError
            reason = (str(e).splitlines() or ["no message"])[0]
            print(f"{name} cannot be imported: {type(e).__name__}: {reason}")
    return found

def their_model(model):
    """transformers' model with our weights, where they are; None if transformers is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()  # not a word about mamba_ssm, which a CPU cannot run
    fields = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(model.config).items()}
    config = transformers.FalconH1Config(**fields)
    weight = model.lm_head.weight
    with weight.device:
        theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=weight.dtype)
    theirs.load_state_dict(model.state_dict(), assign=True)
    theirs.generation_config.eos_token_id = None  # no token ends a sequence
    return theirs
