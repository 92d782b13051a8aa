"""Falcon-H1: attention and Mamba-2 side by side in every block. Configuration, model, cache, sampler, checkpoints.

    python model.py                       parameters of every preset, part by part
    python model.py --preset 7b           its block as a diagram with all sizes; parameters, operations and memory
    python model.py --plan 7b --gpus 256 --cp 2 --context 36864    estimated memory, time and traffic of training it
    python model.py --bench               speed against what this machine allows, and against transformers
    model = FalconH1(PRESETS["tiny"]);    logits = model(torch.tensor([[72, 101, 108, 108, 111]]))

One block, the paper's SA_M ("semi-parallel attention and Mamba, then MLP"); µ is a scalar multiplier of muP:

    h ──┬── RMSNorm ──┬── µ ── q k v ── RoPE ── attention ─────────────── o ── µ ──(+)──┬── RMSNorm ── SwiGLU ──(+)── h
        │             └── µ ── z x B C dt ── conv ── scan ── gated norm ── out ── µ ─┘  │                        │
        └─────────────────────────────────────────────────────────────────────────────┘└────────────────────────┘

Glossary (the letters of the SSM are those of ssm_scan.py)
    b, t        batch rows, tokens              d        hidden_size
    hq, hkv     query heads, key/value heads    hd       head_dim
    h, p, n, g  SSM heads, channels of a head, state size, groups of B and C;  I = h p, all channels of the SSM
    cu_seqlens  (s + 1,) boundaries of the documents packed into one row; nothing passes from one to another
    mup         the forward multipliers through which one learning rate serves every model size (PRESETS lists them)

Deviations from the published model: none in the function. The paper projects concatenated heads with one matrix; the
published weights hold one projection per branch, whose results are added. That is the same function, and is done here.
To copy this file, also take ssm_scan.py and decode.py; its command line needs tests/measure.py, train_sft.py, data.py.
"""

import json
import math
import mmap
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from decode import Decoder, attend_step, draw, kernels_serve, mamba_step, norm_step
from ssm_scan import (causal_conv1d, causal_conv1d_step, check_cu_seqlens, gather_rows, ssd_scan, ssd_step,
                      to_device)

CHUNK = 512  # tokens of a chunk of the scan on a GPU: half as many states to store as with 256, and more of C B^T


def check(ok, message):
    if not ok:
        raise ValueError(message)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Configuration, with the field names of the published config.json


@dataclass(frozen=True)
class FalconH1Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mamba_d_ssm: int  # channels of the SSM, mamba_n_heads * mamba_d_head
    mamba_n_heads: int
    mamba_d_head: int
    mamba_d_state: int
    mamba_n_groups: int = 1
    mamba_d_conv: int = 4
    mamba_chunk_size: int = 128  # not read: chunks are a matter of speed, see CHUNK
    mamba_rms_norm: bool = True
    mamba_norm_before_gate: bool = False
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    projectors_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e11
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    embedding_multiplier: float = 1.0
    lm_head_multiplier: float = 1.0
    attention_in_multiplier: float = 1.0
    attention_out_multiplier: float = 1.0
    key_multiplier: float = 1.0
    ssm_in_multiplier: float = 1.0
    ssm_out_multiplier: float = 1.0
    ssm_multipliers: tuple = (1.0, 1.0, 1.0, 1.0, 1.0)  # z, x, B, C, dt
    mlp_multipliers: tuple = (1.0, 1.0)  # gate, down
    time_step_limit: tuple = (0.0, float("inf"))

    def __post_init__(self):
        def number(v):
            return type(v) in (int, float) and abs(v) < 1e30

        for f in fields(self):
            v = getattr(self, f.name)
            if f.type is int:
                ok, expected = type(v) is int and 0 < v < 2**31, "a whole number above 0"
            elif f.type is float:
                ok, expected = number(v), "a finite number"
            elif f.type is bool:
                ok, expected = type(v) is bool, "true or false"
            else:
                ok, expected = type(v) is tuple and len(v) == len(f.default), f"{len(f.default)} numbers"
                ok = ok and all(number(x) or x == float("inf") for x in v)
            check(ok, f"{f.name} is {v!r}, expected {expected}")
        ssm = self.mamba_n_heads * self.mamba_d_head
        check(self.mamba_d_ssm == ssm, f"mamba_d_ssm {self.mamba_d_ssm} is not mamba_n_heads * mamba_d_head = {ssm}")
        for name, divisor in (("mamba_n_heads", "mamba_n_groups"), ("num_attention_heads", "num_key_value_heads")):
            n, by = getattr(self, name), getattr(self, divisor)
            check(n % by == 0, f"{name} {n} is not a multiple of {divisor} {by}")
        check(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd, but RoPE turns channels in pairs")
        low, high = self.time_step_limit
        check(self.rope_theta > 0 and self.rms_norm_eps >= 0 and low <= high,
              "needed: rope_theta above 0, rms_norm_eps not below, and time_step_limit in order")

    @property
    def mamba_widths(self):
        """Widths of what in_proj computes: z, x, B, C, dt."""
        gn = self.mamba_n_groups * self.mamba_d_state
        return self.mamba_d_ssm, self.mamba_d_ssm, gn, gn, self.mamba_n_heads

    @classmethod
    def from_json(cls, path):
        """Read a config.json in the published format, of old or new versions of transformers. Nothing that changes a
        logit is guessed: transformers' defaults (norm before the gate, mamba_d_ssm 1024) are of no published model."""
        try:
            text = Path(path).read_text()
            raw = json.loads(text, object_hook=lambda d: float(d["__float__"]) if "__float__" in d else d)  # infinity
            check(isinstance(raw, dict), "not a JSON object")
            raw = {name: tuple(v) if isinstance(v, list) else v for name, v in raw.items() if v is not None}
            return cls._from_fields(raw)
        except KeyError as e:
            raise ValueError(f"{path}: field {e.args[0]} is missing") from None
        except (OSError, ValueError, TypeError, ArithmeticError, RecursionError) as e:
            raise ValueError(f"{path}: {e}") from None

    @classmethod
    def _from_fields(cls, raw):
        check(raw.get("model_type") == "falcon_h1", f"model_type is {raw.get('model_type')!r}, expected 'falcon_h1'")
        rope = raw.pop("rope_parameters", {})
        plain = isinstance(rope, dict) and rope.keys() <= {"rope_theta", "rope_type"}
        check(plain and rope.get("rope_type", "default") == "default",
              f"rope_parameters {rope} are not supported, expected rope_theta and the rope_type 'default'")
        theta = raw.setdefault("rope_theta", rope.get("rope_theta"))
        check(rope.get("rope_theta", theta) == theta, f"rope_theta {theta} contradicts rope_parameters {rope}")
        for name, only in _ONE_VALUE.items():
            check(raw.pop(name, only) == only, f"{name} is supported with the value {only!r} only")
        names, expand = {f.name for f in fields(cls)}, raw.pop("mamba_expand", None)
        for name in sorted(raw.keys() - names - _NOT_READ):
            raise ValueError(f"field {name} is unknown; it may change what the model computes")

        # What the published format derives where it is absent, null or "auto".
        if expand is not None:
            raw.setdefault("mamba_d_ssm", int(expand * raw["hidden_size"]))
        if raw.get("mamba_d_head", "auto") == "auto":
            raw["mamba_d_head"] = raw["mamba_d_ssm"] // raw["mamba_n_heads"]
        raw.setdefault("num_key_value_heads", raw["num_attention_heads"])
        raw.setdefault("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
        missing = sorted(n for n in names - _MAY_BE_ABSENT if raw.get(n) is None)
        check(not missing, f"field {', '.join(missing)} is missing")
        return cls(**{n: v for n, v in raw.items() if n in names})


# May be absent: they change no logit, or missing or additional tensors would reveal a wrong default.
_MAY_BE_ABSENT = {"mamba_chunk_size", "initializer_range", "time_step_limit", "tie_word_embeddings", "attention_bias",
                  "mlp_bias", "projectors_bias", "mamba_proj_bias"}
_ONE_VALUE = {"hidden_act": "silu", "mamba_use_mlp": True, "attention_dropout": 0, "rope_scaling": None,
              "attn_layer_indices": None}  # supported with these values only
_NOT_READ = set("""model_type architectures auto_map dtype torch_dtype transformers_version _name_or_path use_cache
    bos_token_id eos_token_id pad_token_id num_logits_to_keep mlp_expansion_factor time_step_min time_step_max
    time_step_floor return_dict output_attentions output_hidden_states is_encoder_decoder chunk_size_feed_forward
    id2label label2id problem_type""".split())  # ignored: they change no logit


def _published(vocab, hidden, layers, heads, kv, head_dim, ssm_heads, ssm_head, state, mlp, positions, **other):
    """The published shapes. Their multipliers were tuned once, at hidden 1024 (w = 1), and follow from the widths.
    The rule gives the published values of 0.5B, 7B and 34B, and those of the others as far as they are known."""
    w, ssm = hidden / 1024, ssm_heads * ssm_head
    return FalconH1Config(
        vocab, hidden, mlp, layers, heads, kv, head_dim, ssm, ssm_heads, ssm_head, state,
        max_position_embeddings=positions, embedding_multiplier=32**0.5, lm_head_multiplier=40 / hidden,
        attention_out_multiplier=0.9375 / w**2, key_multiplier=0.390625 / w**2 * (64 / head_dim) ** 0.5,
        ssm_in_multiplier=1.25 / w, ssm_out_multiplier=512 / ssm / 2**0.5,
        ssm_multipliers=(8**-0.5, 0.25, 32 * 2**0.5 / state, 0.5, 8**-0.5),
        mlp_multipliers=(0.78125**0.5 / w, 1200 / (w * mlp)), **other)


PRESETS = {
    # Two CPU cores train this one in minutes. RoPE's 1e11 serves 256k tokens of context; at 16 frequencies and traces
    # of a hundred tokens 1e4 leaves more of them useful. initializer_range is 1/sqrt(hidden_size).
    "tiny": FalconH1Config(
        vocab_size=272, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, head_dim=32, mamba_d_ssm=96, mamba_n_heads=3, mamba_d_head=32, mamba_d_state=32,
        mamba_chunk_size=32, rope_theta=1e4, initializer_range=0.1),
    # vocabulary, hidden, layers, query and key heads, their size, SSM heads, their size, state, MLP, positions
    "100m": _published(32784, 512, 20, 4, 2, 64, 12, 64, 128, 1024, 16384, mamba_rms_norm=False),  # ours: half of 0.5b
    "0.5b": _published(32784, 1024, 36, 8, 2, 64, 24, 64, 128, 2048, 16384, mamba_rms_norm=False),
    "1.5b": _published(65536, 2048, 24, 8, 2, 128, 48, 64, 256, 4608, 131072),
    "1.5b-deep": _published(65536, 1280, 66, 6, 2, 128, 24, 64, 256, 3072, 131072),
    "3b": _published(65536, 2560, 32, 10, 2, 128, 32, 128, 256, 6144, 131072),
    "7b": _published(130048, 3072, 44, 12, 2, 128, 24, 128, 256, 12288, 262144),  # Falcon-H1R-7B
    "34b": _published(261120, 5120, 72, 20, 4, 128, 32, 128, 256, 21504, 262144, mamba_n_groups=2),
}

# ---------------------------------------------------------------------------------------------------------------------
# 2. The pieces of a block. Tokens interact only inside `mix`, or `step` while decoding; all else is per token.


@dataclass
class Context:
    """What the blocks of a forward pass share. Only `mix` and `step`, which torch.compile skips, read more than rope,
    mup and fused: so one compiled block serves every packing."""
    rope: tuple  # cos and sin of the tokens' positions, see rope_table
    mup: torch.Tensor | None  # see ssm_multipliers; in the model's dtype, as published, even if that is bf16
    cu: tuple | None = None  # cu_seqlens
    cache: object = None  # a Cache
    cp: object = None  # a train_sft.ContextParallel: h holds this rank's share of a row's tokens
    fused: bool = False  # one token per slot of the cache, in decode.py's kernels: `step` instead of `mix`


def scaled(x, multiplier):
    """x * multiplier; the multipliers that are 1 (of "tiny" all) cost no pass over x: some 3% of a step on a CPU."""
    return x if multiplier == 1 else x * multiplier


class RMSNorm(nn.RMSNorm):
    """w * x / sqrt(mean(x^2) + eps), the mean in float32 and the cast before the weight, as in the published model."""

    def forward(self, x):
        if x.shape[1] == 1 and kernels_serve(x):
            return norm_step(x, self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), self.normalized_shape, eps=self.eps).to(x.dtype)


def rope_table(positions, head_dim, theta, dtype):
    """positions (b, t) -> cos, sin (b, t, 1, head_dim) of the angles position * theta^(-2i / head_dim). Channels i and
    i + head_dim / 2 share one; the sine of the first is negative, as `rotate` needs it."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[..., None, None].float() * frequency
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, cos, sin):
    """RoPE on x (b, t, heads, head_dim): channel i turns together with channel i + head_dim / 2 ("rotate half")."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is cached may meet autograd later
def document_table(cu, device):
    """Attention pads documents in groups, the longest at most 1.25 times the shortest: little padding, few calls.
    Returns each token's position in its document (tokens,), the tokens of the padded documents, group by group, where
    each token stands among those (tokens,), and the groups' shapes [documents, longest]."""
    positions, place = np.empty((2, cu[-1]), np.int64)
    tokens, shapes, used = [], [], 0
    for start, end in sorted(zip(cu, cu[1:]), key=lambda d: d[0] - d[1]):  # the longest first
        if not shapes or shapes[-1][1] > 1.25 * (end - start):
            shapes.append([0, end - start])
        shapes[-1][0] += 1
        tokens.append(np.arange(start, start + shapes[-1][1]).clip(max=end - 1))  # padding repeats the last
        positions[start:end] = np.arange(end - start)
        place[start:end] = positions[start:end] + used
        used += shapes[-1][1]
    return *to_device([*map(torch.from_numpy, (positions, np.concatenate(tokens), place))], device), shapes


# cuDNN, torch's choice on an H100, plans for up to a second at every new shape. The others are for float32.
@sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
def attend(q, k, v, cu):
    """Causal attention. q (b, t, hq, hd), k and v (b, t, hkv, hd); query head j reads key head j // (hq / hkv).
    Padding stands after the last token of its document (see document_table), where causality hides it."""
    def causal(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (b, heads, t, hd)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    if cu is None:
        return causal(q, k, v)
    _, tokens, place, shapes = document_table(cu, q.device)
    rows = [gather_rows(x[0], tokens, place).split([n * most for n, most in shapes]) for x in (q, k, v)]
    y = [causal(*(x.unflatten(0, shape) for x in group)).flatten(0, 1) for shape, group in zip(shapes, zip(*rows))]
    return gather_rows(torch.cat(y), place)[None]


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.attention_bias)

    def forward(self, x, context, layer):
        c = self.config
        x = scaled(x, c.attention_in_multiplier)
        q = self.q_proj(x).unflatten(-1, (-1, c.head_dim))  # (b, t, hq, hd)
        k = self.k_proj(x).unflatten(-1, (-1, c.head_dim))  # (b, t, hkv, hd)
        v = self.v_proj(x).unflatten(-1, (-1, c.head_dim))
        if context.fused:
            y = self.step(q, k, v, context, layer)
        else:
            k = rotate(scaled(k, c.key_multiplier), *context.rope)
            y = self.mix(rotate(q, *context.rope), k, v, context, layer)
        return scaled(self.o_proj(y.flatten(2)), c.attention_out_multiplier)

    @torch.compiler.disable
    def mix(self, q, k, v, context, layer):
        """What each token reads from those before it: (b, t, hq, hd)."""
        cp, cache = context.cp, context.cache
        if cp is not None:  # from a share of the tokens and all heads to all tokens and a share of the heads
            q, k, v = cp.to_heads(torch.cat([q, k, v], 2), cp.attention)
        y = attend(q, k, v, context.cu) if cache is None else cache.attend(layer, q, k, v)
        return y if cp is None else cp.to_tokens(y)

    @torch.compiler.disable
    def step(self, q, k, v, context, layer):
        """The same for one token per slot, from before RoPE."""
        cache = context.cache
        return attend_step(q, k, v, *context.rope, cache.lengths, cache.k[layer], cache.v[layer],
                           key_multiplier=self.config.key_multiplier)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is cached may meet autograd later
def ssm_multipliers(c, dtype, device):
    """The multiplier of every output channel of in_proj; None where all are 1."""
    values = [m for m, width in zip(c.ssm_multipliers, c.mamba_widths) for _ in range(width)]
    return None if set(values) == {1} else torch.tensor(values, dtype=dtype).to(device)


def gated_norm(y, z, weight, groups, eps, norm_before_gate):
    """Mamba-2's gated RMSNorm over each group's channels. y, z (b, t, I) -> (b, t, I), computed in float32.
    norm_before_gate False (the published checkpoints): w * RMS(y silu(z));  True: w * RMS(y) silu(z)."""
    gate = F.silu(z.float())
    y = y.float() if norm_before_gate else y.float() * gate
    y = F.rms_norm(y.unflatten(-1, (groups, -1)), (y.shape[-1] // groups,), eps=eps).flatten(-2) * weight
    return (y * gate if norm_before_gate else y).to(z.dtype)


class Mamba(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        channels = sum(c.mamba_widths[1:4])  # x, B and C pass the convolution, for which conv1d holds the weights
        self.in_proj = nn.Linear(c.hidden_size, sum(c.mamba_widths), bias=c.mamba_proj_bias)
        self.conv1d = nn.Conv1d(channels, channels, c.mamba_d_conv, groups=channels, bias=c.mamba_conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(c.mamba_n_heads))
        self.A_log = nn.Parameter(torch.empty(c.mamba_n_heads))
        self.D = nn.Parameter(torch.ones(c.mamba_n_heads))
        if c.mamba_rms_norm:
            self.norm = RMSNorm(c.mamba_d_ssm, c.rms_norm_eps)  # holds the weight of gated_norm
        self.out_proj = nn.Linear(c.mamba_d_ssm, c.hidden_size, bias=c.projectors_bias)

    def forward(self, u, context, layer):
        c = self.config
        p = self.in_proj(scaled(u, c.ssm_in_multiplier))
        p = p if context.mup is None else p * context.mup
        z, xBC, dt = p.split([c.mamba_d_ssm, sum(c.mamba_widths[1:4]), c.mamba_n_heads], -1)
        if context.fused:
            return scaled(self.out_proj(self.step(z, xBC, dt, context.cache, layer)), c.ssm_out_multiplier)
        dt = F.softplus(dt + self.dt_bias).clamp(*c.time_step_limit)  # in the model's dtype, as published
        y = self.mix(xBC, dt, context, layer).flatten(2)  # (b, t, I)
        if c.mamba_rms_norm:
            y = gated_norm(y, z, self.norm.weight, c.mamba_n_groups, c.rms_norm_eps, c.mamba_norm_before_gate)
        else:
            y = y * F.silu(z)
        return scaled(self.out_proj(y), c.ssm_out_multiplier)

    @torch.compiler.disable
    def mix(self, xBC, dt, context, layer):
        """What each token reads from those before it, by convolution and scan: (b, t, h, p)."""
        c, cp, cache, cu = self.config, context.cp, context.cache, context.cu
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        A, D = -self.A_log.float().exp(), self.D
        if cp is not None:  # as in attention; the convolution and the scan then see whole sequences, too
            xBC, dt = cp.to_heads(torch.cat([xBC, dt], 2), cp.mamba)
            weight, bias, A, D = cp.own_weights(weight, bias, A, D)
        conv, state = (None, None) if cache is None else (cache.conv[layer], cache.ssm[layer])
        one = cache is not None and dt.shape[1] == 1
        if one:
            xBC, new_conv = causal_conv1d_step(conv, xBC[:, 0], weight, bias, activation="silu")
        else:
            xBC, new_conv = causal_conv1d(xBC, weight, bias, initial_states=conv, cu_seqlens=cu, activation="silu")
        inner = dt.shape[-1] * c.mamba_d_head  # channels of the heads that are here
        gn = (xBC.shape[-1] - inner) // 2
        x, B, C = xBC.split([inner, gn, gn], -1)
        x = x.unflatten(-1, (-1, c.mamba_d_head))  # (b, t, h, p), without t in a single step
        B, C = (v.unflatten(-1, (-1, c.mamba_d_state)) for v in (B, C))  # (b, t, g, n)
        if one:
            y, new_state = ssd_step(state, x, dt[:, 0], A, B, C, D=D)
            y = y[:, None]
        else:
            y, new_state = ssd_scan(x, dt, A, B, C, D=D, initial_states=state, cu_seqlens=cu, chunk_size=CHUNK,
                                    return_final_states=cache is not None)
        if cache is not None:  # nothing to do where a step has updated them in place, as it does without gradients
            conv.copy_(new_conv)
            state.copy_(new_state)
        return y if cp is None else cp.to_tokens(y)

    @torch.compiler.disable
    def step(self, z, xBC, dt, cache, layer):
        """One token per slot, from the softplus to the gated norm: (b, 1, I)."""
        c, conv = self.config, self.conv1d
        y = mamba_step(cache.conv[layer], cache.ssm[layer], xBC[:, 0], dt[:, 0], conv.weight[:, 0], conv.bias,
                       self.dt_bias, self.A_log, self.D, c.time_step_limit)
        weight = self.norm.weight if c.mamba_rms_norm else None
        return norm_step(y.flatten(1)[:, None], weight, c.rms_norm_eps, z=z, groups=c.mamba_n_groups,
                         norm_before_gate=c.mamba_norm_before_gate)


class Linear(nn.Linear):
    """x W^T + bias for MLP and head, the widest layers: CPUs multiply a few rows faster as (W x^T)^T."""

    def forward(self, x):
        if x.is_cuda or torch.is_grad_enabled() or x.shape[:-1].numel() > 64:
            return super().forward(x)
        y = (self.weight @ x.flatten(0, -2).mT).mT.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.multipliers = c.mlp_multipliers
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        gate = F.silu(scaled(self.gate_proj(x), self.multipliers[0]))
        return scaled(self.down_proj(self.up_proj(x) * gate), self.multipliers[1])


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mamba = Mamba(c)
        self.self_attn = Attention(c)
        self.pre_ff_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.feed_forward = MLP(c)

    def forward(self, h, context, layer=0):
        n = self.input_layernorm(h)  # one norm feeds both branches
        h = h + (self.mamba(n, context, layer) + self.self_attn(n, context, layer))
        return h + self.feed_forward(self.pre_ff_layernorm(h))


# ---------------------------------------------------------------------------------------------------------------------
# 3. The model


class Backbone(nn.Module):
    """Everything below the head: ids (b, t) -> hidden states (b, t, d)."""

    checkpoint_activations = False  # True: keep only the activations between blocks, and recompute the others in the backward pass

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.final_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, input_ids, cu=None, cache=None, cp=None):
        c, t = self.config, input_ids.shape[1]
        first = 0 if cp is None else cp.rank * t
        positions = torch.arange(first, first + t, device=input_ids.device)[None]
        if cu is not None:  # positions start anew in every document
            positions = document_table(cu, input_ids.device)[0][None, first : first + t]
        elif cache is not None:
            positions = cache.lengths[:, None] + positions
            cache.extend(positions)
        h = scaled(self.embed_tokens(input_ids), c.embedding_multiplier)
        rope = rope_table(positions, c.head_dim, c.rope_theta, h.dtype)
        fused = cache is not None and cache.fused
        context = Context(rope, ssm_multipliers(c, h.dtype, h.device), cu, cache, cp, fused)
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for layer, block in enumerate(self.layers):
            h = checkpoint(block, h, context, layer, use_reentrant=False) if recompute else block(h, context, layer)
        if cache is not None:
            cache.lengths += t
        return self.final_layernorm(h)


class FalconH1(nn.Module):
    cp = None  # or a train_sft.ContextParallel: input_ids are then this rank's share of a row, cu_seqlens those of all

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal matrices; as in Mamba-2, A in (1, 16) and log-uniform softplus(dt_bias) in (0.001, 0.1)."""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                m.weight.normal_(0, self.config.initializer_range)
                if getattr(m, "bias", None) is not None:
                    m.bias.zero_()
            elif isinstance(m, Mamba):
                m.A_log.uniform_(1, 16).log_()
                dt = m.dt_bias.uniform_(-6.9, -2.3).exp()  # about ln 0.001 and ln 0.1
                m.dt_bias.copy_(dt.expm1().log())  # the inverse of softplus

    def forward(self, input_ids, *, cu_seqlens=None, cache=None, targets=None, temperature=1.0):
        """input_ids (b, t) -> logits (b, t, vocab), in the model's dtype.

        cu_seqlens (s + 1,) packs s documents into one row (b = 1). cache: a Cache of b slots; each appends t tokens.
        targets (b, t): return instead (log-probabilities of the targets at `temperature`, entropies of the distributions
        they come from), both (b, t) float32, without ever holding all logits. Negative targets give 0 and no gradient.
        Ids and targets may lie on the CPU when the model does not, and best do: to find the targets on a GPU, the host
        must wait for it."""
        c, shape = self.config, tuple(input_ids.shape)
        check(len(shape) == 2 and shape[1] >= 1, f"input_ids: got {shape}, expected (b, t) with t >= 1")
        b, tokens = shape[0], shape[1] * (1 if self.cp is None else self.cp.size)
        cu = None if cu_seqlens is None else check_cu_seqlens(cu_seqlens, b, tokens)
        check(cache is None or cu_seqlens is None and len(cache.lengths) == b,
              f"cache: got {cache and len(cache.lengths)} slots, expected {b} and no cu_seqlens")
        if input_ids.device.type == "cpu":  # looking at a GPU's ids would stop the host
            inside = 0 <= input_ids.min() and input_ids.max() < c.vocab_size
            check(inside, f"input_ids: an id is outside 0..{c.vocab_size - 1}")
        if targets is None:
            return scaled(self.lm_head(self.model(input_ids, cu, cache, self.cp)), c.lm_head_multiplier)
        kept = (targets.flatten() >= 0).nonzero()[:, 0]  # prompts have no targets and need no logits
        tensors = input_ids, kept, targets.flatten()[kept]
        if targets.device.type == "cpu":
            tensors = to_device(tensors, self.lm_head.weight.device)
        input_ids, kept, wanted = tensors
        h = gather_rows(self.model(input_ids, cu, cache, self.cp).flatten(0, 1), kept)
        values = token_logprobs(h, self.lm_head.weight, wanted, c.lm_head_multiplier / temperature)
        return tuple(v.new_zeros(targets.numel()).index_copy(0, kept, v).view(targets.shape) for v in values)

    def save_pretrained(self, folder, read=lambda name, v: v):
        """Write config.json and model.safetensors in the published format. read(name, v) gives a tensor's values when
        it is written, for a model that has none itself (on the meta device) or only shards of them."""
        state = self.state_dict()
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        os.makedirs(folder, exist_ok=True)
        write_safetensors(Path(folder) / "model.safetensors", state, read)
        config = {"architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1", "hidden_act": "silu",
                  "torch_dtype": str(next(iter(state.values())).dtype).split(".")[1], **asdict(self.config)}
        if self.config.time_step_limit == (0, float("inf")):
            del config["time_step_limit"]  # the published default; JSON has no word for infinity
        _replace(Path(folder) / "config.json", lambda f: f.write(json.dumps(config, indent=2).encode() + b"\n"))

    @classmethod
    def from_pretrained(cls, folder, *, dtype=None, device=None, mapped=False):
        """Read a checkpoint in the published format, every tensor of it; there may be no other. dtype None keeps the
        stored one. mapped leaves the tensors in their file, whatever dtype and device: train_sft.shard() moves and
        converts a block at a time, so that no rank ever holds the whole model."""
        config = FalconH1Config.from_json(Path(folder) / "config.json")
        state = read_checkpoint(folder)
        embeddings, head = "model.embed_tokens.weight", "lm_head.weight"
        for name in (embeddings, f"model.layers.{config.num_hidden_layers - 1}.mamba.D"):  # before a model is built
            check(name in state, f"{folder}: tensor {name} is missing")
        stored = state[embeddings].dtype
        if config.tie_word_embeddings:
            check(torch.equal(state.setdefault(head, state[embeddings]), state[embeddings]),
                  f"{folder}: tensor {head} differs from {embeddings}, but config.json says tie_word_embeddings")
        with torch.device("meta"):
            model = cls(config)
        expected = model.state_dict()
        for name in sorted({*expected, *state}):
            tensor = f"{folder}: tensor {name}"
            check(name in state, f"{tensor} is missing")
            check(name in expected, f"{tensor} is not part of this model")
            v, shape = state[name], tuple(expected[name].shape)
            check(v.shape == shape, f"{tensor} is {tuple(v.shape)}, config.json makes it {shape}")
            check(v.is_floating_point() and (dtype is not None or v.dtype == stored),
                  f"{tensor} is {v.dtype}, expected {stored} as the embeddings are; "
                  "give a dtype to convert a mixture of floating-point types")
        if not mapped:
            state = {name: v.to(device, dtype, copy=True) for name, v in state.items()}
        model.load_state_dict(state, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(scale h W^T)[target] and the entropy, a chunk of tokens at a time. The backward pass computes the logits
    once more instead of keeping them:  dlogits = (onehot(target) - softmax) * dlogp. All chunks use the same memory: on a CPU,
    where large tensors are mapped anew each time, that takes a quarter off the time."""

    @staticmethod
    def forward(ctx, h, weight, targets, scale, chunk):
        logprobs, entropy, lse = (h.new_empty(len(h), dtype=torch.float32) for _ in range(3))
        products, ps = h.new_empty(chunk, len(weight)), h.new_empty(chunk, len(weight), dtype=torch.float32)
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
            logits = torch.mm(h[part], weight.T, out=products[: len(h) - i]).float().mul_(scale)  # (chunk, vocab)
            largest = logits.amax(-1, keepdim=True)
            p = torch.sub(logits, largest, out=ps[: len(h) - i]).exp_()  # softmax, not yet divided by its sum z
            z = p.sum(-1)
            lse[part] = largest[:, 0] + z.log()
            logprobs[part] = logits.gather(1, targets[part, None])[:, 0] - lse[part]
            entropy[part] = lse[part] - p.mul_(logits).sum(-1) / z
            del logits  # before the next chunk's: two would be in memory at once
        ctx.save_for_backward(h, weight, targets, lse)
        ctx.scale, ctx.chunk = scale, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, dlogprobs, _):
        h, weight, targets, lse = ctx.saved_tensors
        dh, dweight = torch.empty_like(h), torch.zeros_like(weight, dtype=torch.float32)
        dlogprobs = dlogprobs.float() * ctx.scale
        products = h.new_empty(ctx.chunk, len(weight))
        for i in range(0, len(h), ctx.chunk):
            part = slice(i, i + ctx.chunk)
            logits = torch.mm(h[part], weight.T, out=products[: len(h) - i]).float().mul_(ctx.scale)
            d = logits.sub_(lse[part, None]).exp_().mul_(-dlogprobs[part, None])
            d.scatter_add_(1, targets[part, None], dlogprobs[part, None])
            d = d.to(h.dtype)
            torch.mm(d, weight, out=dh[part])
            add_product(dweight, d.T, h[part])
            del logits, d
        return dh, dweight.to(weight.dtype), None, None, None


def add_product(total, a, b):
    """total += a b, total in float32. On a GPU, cuBLAS adds a product in bf16 without rounding it."""
    if total.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def tokens_of_chunk(vocab, device):
    """How many tokens' logits are in work at a time: 2^25 numbers (128 MB) on a CPU; on a GPU up to 2^28, of
    10 bytes each (product in bf16, logits and softmax in float32): 2.7 GB, 2,048 tokens at 130,048 words.

    Each chunk adds to the weight's gradient, 8 vocab d bytes of traffic beside 8 chunk vocab d operations. At
    3 TB/s and 800 TFLOP/s that takes 267 / chunk of the products' time: 13% at 2,048 tokens, 7% at 4,096.
    Multiples of 128 fill the products' tiles."""
    if device.type == "cpu":
        return max(1, 2**25 // vocab)
    return min(4096, max(128, 2**28 // vocab // 128 * 128))


def token_logprobs(h, weight, targets, scale=1.0, chunk=None):
    """h (t, d), weight (vocab, d), targets (t,) -> log-probabilities (t,) and entropies (t,, no gradient), float32.

    scale multiplies the logits: lm_head_multiplier / temperature. chunk: tokens at once (tokens_of_chunk)."""
    chunk = chunk or tokens_of_chunk(len(weight), weight.device)
    return _TokenLogprobs.apply(h, weight, targets, scale, max(1, min(len(h), chunk)))


# ---------------------------------------------------------------------------------------------------------------------
# 4. The cache


class Cache:
    """Decoding state of `slots` sequences: keys and values of every token, and the fixed-size states of the mixers.
    k, v (layers, slots, hkv, length, hd) and conv (layers, slots, channels, d_conv - 1) in the model's dtype, ssm
    (layers, slots, h, p, n) always float32, lengths (slots,). `used`: upper bound of the lengths, kept on the host so
    that no step waits for the GPU; attention reads so many positions. Only a `fused` step, one token per slot in
    decode.py's kernels, reads `lengths` instead. It cannot raise: a slot without room appends nothing and answers
    nonsense."""

    def __init__(self, config, slots, length, *, dtype=torch.float32, device=None):
        c, n = config, config.num_hidden_layers
        self.k = torch.zeros(n, slots, c.num_key_value_heads, length, c.head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.conv = self.k.new_zeros(n, slots, c.mamba_d_conv - 1, sum(c.mamba_widths[1:4])).mT
        self.ssm = torch.zeros(n, slots, c.mamba_n_heads, c.mamba_d_head, c.mamba_d_state, dtype=torch.float32, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self.used = 0
        self.fused = self.at = self.mask = None  # of the forward pass that runs, see extend

    def load(self, slot, other, row):
        """Make `slot` a copy of one sequence of `other`: a prompt is prefilled once and sampled many times."""
        self.k[:, slot, :, : other.used] = other.k[:, row, :, : other.used]
        self.v[:, slot, :, : other.used] = other.v[:, row, :, : other.used]
        self.conv[:, slot], self.ssm[:, slot] = other.conv[:, row], other.ssm[:, row]
        self.lengths[slot] = other.lengths[row]
        self.used = max(self.used, other.used)

    def bytes_to_grow(self, slots, length):
        """The bytes of what `grow` makes anew: old and new exist together."""
        n = len(self.lengths)
        kv = (self.k.nbytes + self.v.nbytes) // (n * self.k.shape[3]) * slots * length
        return kv if slots == n else kv + (self.conv.nbytes + self.ssm.nbytes) // n * slots

    def grow(self, slots, length):
        """Hold only the sequences of these slots, in this order, with room for `length` tokens."""
        def longer(old):
            new = old.new_zeros(len(old), len(slots), old.shape[2], length, old.shape[4])
            for layer, v in zip(new, old):
                layer[:, :, : old.shape[3]] = v[slots]
            return new

        self.k = longer(self.k)
        self.v = longer(self.v)
        if len(slots) < len(self.lengths):
            self.conv, self.ssm, self.lengths = self.conv[:, slots], self.ssm[:, slots], self.lengths[slots]

    def extend(self, positions):
        """The next forward pass appends tokens at `positions` (slots, t)."""
        t, length = positions.shape[1], self.k.shape[3]
        self.fused = t == 1 and kernels_serve(self.k)
        check(self.fused or self.used + t <= length, f"cache: {self.used + t} tokens do not fit a length of {length}")
        if not self.fused:
            seen = torch.arange(self.used + t, device=positions.device)
            self.mask = seen <= positions[:, None, :, None] if self.used else None  # (slots, 1, t, used)
            self.at = positions[:, None, :, None].expand(-1, self.k.shape[2], -1, self.k.shape[4])
        self.used = min(self.used + t, length)

    def attend(self, layer, q, k, v):
        """Append k, v (slots, t, hkv, hd), then attend with q (slots, t, hq, hd) to all that each slot holds."""
        keys = self.k[layer].scatter_(2, self.at, k.transpose(1, 2))  # (slots, hkv, length, hd)
        values = self.v[layer].scatter_(2, self.at, v.transpose(1, 2))
        if self.mask is None:
            return attend(q, k, v, None)
        keys, values = keys[:, :, : self.used], values[:, :, : self.used]
        if q.shape[1] == 1:
            # The queries that share a key head stand in for the tokens: keys are read once, not copied. For so few
            # queries this is twice as fast as torch's kernel for CPUs.
            q = q.reshape(len(q), keys.shape[1], -1, q.shape[-1])  # (slots, hkv, hq / hkv, hd)
            scores = (q @ keys.mT * q.shape[-1] ** -0.5).masked_fill(~self.mask, -torch.inf)
            y = scores.softmax(-1, torch.float32).to(values.dtype) @ values
            return y.reshape(len(q), 1, -1, q.shape[-1])
        # With a mask, only torch's slow kernel lets queries share keys on a GPU.
        keys, values = (x.repeat_interleave(q.shape[2] // x.shape[1], 1) for x in (keys, values))
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=self.mask).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# 5. The sampler: one for RL rollouts, evaluation, DeepConf and chat. Many traces decode together, each in a slot of one
# cache. One step of all slots:
#     start     free slots take the next traces, and the states of their prompts, which were prefilled once
#     fit       the cache doubles when the longest trace has filled it; where that does not fit into memory, the
#               youngest traces are set aside, and go on later from prompt and tokens
#     step      Decoder appends a token to every slot and draws the next: on a GPU one CUDA graph, then one read
#     finish    traces that have ended leave their slots


@dataclass
class Trace:
    """One sample. The stop token, where one was sampled, is part of it."""
    prompt_index: int
    sample_index: int
    tokens: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)  # of each token under the distribution it was drawn from
    confidences: list = field(default_factory=list)  # DeepConf's token confidence, see `draw`
    stop: str = ""  # "stop" | "length" | "deepconf" (the callback said so)


@torch.no_grad()
def prefill(model, prompts, tokens=4096):
    """Run prompts of one length, all but their last token, and return the Cache. To bound memory, at most `tokens` at a
    time, and fewer where attention's mask would hold more than 2^26 numbers."""
    p, length = next(model.parameters()), len(prompts[0]) - 1
    cache = Cache(model.config, len(prompts), max(length, 1), dtype=p.dtype, device=p.device)
    ids = torch.tensor(prompts, device=p.device)[:, :-1]
    at_once = max(1, min(tokens, 2**26 // max(length, 1)) // len(prompts))
    for part in ids.split(at_once, 1) if length else ():
        model.model(part, cache=cache)
    return cache


def free_bytes(device):
    """What can be allocated; on a CPU without swapping, or half of all memory where the OS does not tell."""
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    match = re.search(r"MemAvailable: *(\d+)", meminfo.read_text()) if meminfo.exists() else None
    return int(match[1]) * 1024 if match else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def slots_that_fit(config, length, dtype, device):
    """How many sequences of `length` tokens fit into half of the free memory: 1 to 256. They begin with that length.
    Few grow long; where too many do, Sampler sets some aside. The other half is for growth, prompts and logits."""
    cache = Cache(config, 1, length, dtype=dtype, device="meta")
    one = sum(v.nbytes for v in vars(cache).values() if isinstance(v, torch.Tensor))
    return min(256, max(1, free_bytes(device) // 2 // one))


@dataclass(eq=False)
class Running:
    """A trace in a slot, or set aside: all it needs to go on, in any slot and at any time."""
    trace: Trace
    ids: list  # of its prompt and of its tokens
    random: np.random.Generator
    aside: bool = False  # it was set aside: no other trace shares what it must read


class Sampler:
    """What generate() has under way: slots over one cache, each a Running or None, and what waits for a slot.
    The cache begins at first_length tokens per slot, or more if prompts are longer."""
    first_length = 256  # at 7B a twelfth of a slot's states

    def __init__(self, model, prompts, samples, slots, longest, seed, admit, finish):
        self.model, self.prompts, self.samples, self.longest = model, prompts, samples, longest
        self.seed, self.admit, self.finish_step = seed, admit, finish
        self.waiting = dict.fromkeys(range(len(prompts)), 0)  # prompts with the index of their next sample
        self.aside, self.prefilled, self.total = [], {}, len(prompts) * samples
        p, prompt = next(model.parameters()), max(map(len, prompts))
        length = min(longest, max(self.first_length, 1 << (prompt - 1).bit_length()))
        slots = slots or slots_that_fit(model.config, length, p.dtype, p.device)
        self.slots = [None] * min(slots, self.total)
        self.cache = Cache(model.config, len(self.slots), length, dtype=p.dtype, device=p.device)
        self.decode = Decoder(model, self.cache, finish)
        self.tokens = torch.zeros_like(self.cache.lengths)  # what each slot appends next

    def next_job(self):
        """What to start now, or None. Prompts in order, so that few prefilled states are alive at a time."""
        if self.aside:
            return self.aside.pop(0)
        for i, sample in list(self.waiting.items()):
            verdict = "go" if self.admit is None else self.admit(i, sample)
            self.waiting[i] += verdict == "go"
            if verdict == "done" or self.waiting[i] == self.samples:
                del self.waiting[i]
            if verdict == "go":
                random = np.random.default_rng([self.seed, i, sample])
                return Running(Trace(i, sample), list(self.prompts[i]), random)
            if verdict == "done":
                self.prefilled.pop(tuple(self.prompts[i]), None)
                self.total -= self.samples - sample

    def start(self):
        """Fill free slots -> whether anything runs."""
        free = [slot for slot, r in enumerate(self.slots) if r is None]
        jobs = list(zip(free, iter(self.next_job, None)))
        jobs.sort(key=lambda job: (len(job[1].ids), job[1].trace.prompt_index, job[1].trace.sample_index))
        for n, (slot, r) in enumerate(jobs):
            ids, more = tuple(r.ids), jobs[n + 1 :]
            if ids not in self.prefilled:
                self.read([r.ids, *(other.ids for _, other in more if len(other.ids) == len(ids))])
            self.cache.load(slot, *self.prefilled[ids])
            self.slots[slot], self.tokens[slot] = r, ids[-1]
            last = not more or more[0][1].ids != r.ids
            if last and (r.aside or r.trace.prompt_index not in self.waiting):
                del self.prefilled[ids]
        if self.waiting and not any(self.slots):
            raise RuntimeError(f"generate: prompt {min(self.waiting)} waits to be admitted and nothing is running")
        return any(self.slots)

    def read(self, prompts):
        """Prefill the first of some prompts of one length, and others with it: 16k tokens, half of the free memory."""
        new = [ids for ids in dict.fromkeys(map(tuple, prompts)) if ids not in self.prefilled]
        p, length = next(self.model.parameters()), len(new[0])
        most = min(16384 // length, slots_that_fit(self.model.config, length, p.dtype, p.device))
        new = new[: max(1, most)]
        cache = prefill(self.model, new)
        self.prefilled.update((ids, (cache, row)) for row, ids in enumerate(new))

    def fits(self, slots, length):
        return self.cache.bytes_to_grow(len(slots), length) <= free_bytes(self.tokens.device)

    def fit(self):
        """Make room in the cache for a token of each trace; the last traces decode faster in fewer slots."""
        slots, length = [slot for slot, r in enumerate(self.slots) if r], self.cache.k.shape[3]
        if max(len(self.slots[slot].ids) for slot in slots) > length:
            length = min(2 * length, self.longest)
            slots = self.set_aside(length)
        elif self.waiting or self.aside or 2 * len(slots) > len(self.slots) or not self.fits(slots, length):
            return
        self.decode = None
        self.cache.grow(slots, length)
        self.slots, self.tokens = [self.slots[slot] for slot in slots], self.tokens[slots]
        self.decode = Decoder(self.model, self.cache, self.finish_step)

    def set_aside(self, length):
        """Set the youngest traces aside until a cache of this length fits beside the old one -> the slots that stay.
        When a slot is free again, prompt and tokens of a trace set aside are read anew."""
        ages = [len(r.trace.tokens) if r else -1 for r in self.slots]  # free slots first
        slots = sorted(range(len(ages)), key=ages.__getitem__, reverse=True)
        self.decode = None  # gives back its graph's memory
        while slots and not self.fits(slots, length):
            if youngest := self.slots[slots.pop()]:
                youngest.aside = True
                self.aside.insert(0, youngest)
        free = free_bytes(self.tokens.device)
        check(slots, f"generate: the cache of one trace of {length} tokens does not fit into {free} free bytes")
        return sorted(slots)

    def step(self):
        """Give every running trace a token -> how many."""
        self.fit()
        self.cache.used = max(len(r.ids) for r in self.slots if r) - 1
        u = [r.random.random() if r else 0 for r in self.slots]
        drawn = self.decode(self.tokens, torch.tensor(u, dtype=torch.float64, pin_memory=self.tokens.is_cuda))
        self.tokens = drawn[:, 0]  # the next step needs no copy from the host
        for r, (token, logprob, confidence, finite) in zip(self.slots, drawn.tolist()):  # the host's only wait
            if r:
                check(finite, "generate: the model's logits are not finite")
                r.ids.append(int(token))
                r.trace.tokens.append(r.ids[-1])
                r.trace.logprobs.append(logprob)
                r.trace.confidences.append(confidence)
        return len(self.slots) - self.slots.count(None)

    def finish(self, max_new_tokens, stop_ids, on_token):
        """Generator of the traces that end with this step; they leave their slots."""
        for slot, trace in [(slot, r.trace) for slot, r in enumerate(self.slots) if r]:
            halted = on_token is not None and on_token(trace)
            full = "length" if len(trace.tokens) == max_new_tokens else ""
            trace.stop = "stop" if trace.tokens[-1] in stop_ids else "deepconf" if halted else full
            if trace.stop:
                self.slots[slot] = None
                yield trace


@torch.no_grad()
def generate(model, prompts, *, max_new_tokens, temperature=1.0, top_p=1.0, seed=0, stop_ids=(), samples=1,
             slots=None, admit=None, on_token=None, on_trace=None, progress=False):
    """Sample `samples` traces of each prompt (lists of token ids) -> list of Trace, by prompt, then by sample.
    `slots` traces decode together (None or 0: as many as fit into free memory); a slot whose trace has ended takes the
    next one at once. A trace depends on weights, prompt, settings, seed and its own two indices. What else is in the
    batch changes its numbers by rounding only, and so does being set aside where memory is short. temperature 0 is
    greedy. admit(prompt_index, sample_index) -> "go" | "wait" | "done" is asked, in sample order, before a trace is
    started; "done" means no further trace of that prompt. on_token(trace) -> True stops a trace; on_trace(trace) sees
    every ended one. progress shows a bar with tokens/s. Raises ValueError for an empty prompt, ids out of range, more
    tokens than positions, a trace that does not fit into memory, or logits that are not finite; RuntimeError where
    admit lets nothing go on."""
    c = model.config
    for i, prompt in enumerate(prompts):
        check(prompt, f"prompt {i}: it is empty")
        inside = 0 <= min(prompt) and max(prompt) < c.vocab_size
        check(inside, f"prompt {i}: a token id is outside 0..{c.vocab_size - 1}")
        check(len(prompt) + max_new_tokens <= c.max_position_embeddings,
              f"prompt {i}: {len(prompt)} tokens and max_new_tokens {max_new_tokens} exceed "
              f"max_position_embeddings {c.max_position_embeddings}")
    check(max_new_tokens >= 1 and samples >= 1 and temperature >= 0 and 0 < top_p <= 1,
          f"generate: got max_new_tokens {max_new_tokens}, samples {samples}, temperature {temperature}, "
          f"top_p {top_p}; expected >= 1, >= 1, >= 0 and in (0, 1]")
    if not prompts:
        return []
    longest = max(map(len, prompts)) + max_new_tokens - 1  # no step appends a trace's last token

    def finish(logits, u):  # (slots, 4) float64, one read for the host: what `draw` gives, and if logits are finite
        drawn = draw(logits, u, temperature, top_p)
        return torch.stack([v.double() for v in (*drawn, logits.isfinite().all(-1))], 1)

    sampler = Sampler(model, prompts, samples, slots, longest, seed, admit, finish)
    bar = tqdm(total=sampler.total, disable=not progress, desc="sampling", unit="trace", mininterval=0.5, miniters=0)
    begun, produced, ended = time.time(), 0, []
    while sampler.start():
        produced += sampler.step()
        for trace in sampler.finish(max_new_tokens, stop_ids, on_token):
            ended.append(trace)
            if on_trace is not None:
                on_trace(trace)
        bar.total = sampler.total
        bar.set_postfix_str(f"{produced / (time.time() - begun):,.0f} tokens/s", refresh=False)
        bar.update(len(ended) - bar.n)  # shows it, at most twice a second
    bar.close()
    return sorted(ended, key=lambda t: (t.prompt_index, t.sample_index))


# ---------------------------------------------------------------------------------------------------------------------
# 6. safetensors: eight bytes of header length, a JSON header, the tensors' bytes. Nothing in it can run.

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def _replace(path, write):
    """Write through a temporary name: a reader sees the old file or the new one, never half of either."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written: {e.strerror}") from None


def write_safetensors(path, tensors, read=lambda name, v: v):
    """tensors {name: tensor} -> file, little-endian, in the order of the names. read: see save_pretrained."""
    names, header, offset = {v: k for k, v in _DTYPES.items()}, {"__metadata__": {"format": "pt"}}, 0
    for name, v in sorted(tensors.items()):
        header[name] = {"dtype": names[v.dtype], "shape": list(v.shape), "data_offsets": [offset, offset + v.nbytes]}
        offset += v.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(f):
        f.write(len(text).to_bytes(8, "little") + text)
        for name, v in sorted(tensors.items()):
            f.write(read(name, v).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    _replace(path, write)


def read_safetensors(path):
    """file -> {name: tensor}, memory-mapped (copy what you want to keep or to change). The tensors' bytes must follow
    the header without gap or overlap, to the end of the file; a header that lies is a ValueError."""
    tensors = {}
    try:
        with open(path, "rb") as f:
            data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY))
        first = 8 + int.from_bytes(data[:8], "little")  # byte of the tensors
        check(first <= min(len(data), 100_000_000), f"a header of {first - 8} bytes in a file of {len(data)}")
        header = json.loads(bytes(data[8:first]))
        header.pop("__metadata__", None)
        end = 0  # of the tensors so far
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (start, stop), shape = entry["data_offsets"], entry["shape"]
            check(entry["dtype"] in _DTYPES, f"tensor {name} has dtype {entry['dtype']}")
            whole = all(type(v) is int and 0 <= v < 2**63 for v in (start, stop, *shape))
            check(whole, f"tensor {name} has no natural shape or offsets")
            dtype, count = _DTYPES[entry["dtype"]], math.prod(shape)
            right = start == end and stop - start == count * dtype.itemsize and first + stop <= len(data)
            check(right, f"tensor {name} of shape {shape} is at {start}..{stop} of {len(data) - first}")
            raw, end = data[first + start : first + stop], stop
            tensors[name] = torch.frombuffer(raw, dtype=dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
        check(first + end == len(data), f"{len(data) - first - end} bytes too many")
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror}") from None
    except ValueError as e:
        raise ValueError(f"{path}: not a whole safetensors file: {e}") from None
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:  # RecursionError, too, and absurd shapes
        raise ValueError(f"{path}: not a whole safetensors file: unreadable header ({type(e).__name__})") from None
    return tensors


def read_checkpoint(folder):
    """{name: tensor}, memory-mapped, of model.safetensors, or else of the shards in model.safetensors.index.json."""
    folder, state = Path(folder), {}
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return read_safetensors(single)
    try:
        shard_of = json.loads(index.read_text())["weight_map"]
        check(all(shard == Path(shard).name for shard in shard_of.values()), "a path, not a file name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{index}: expected a weight_map from tensors to files in its folder ({e})") from None
    for shard in sorted(set(shard_of.values())):
        for name, v in read_safetensors(folder / shard).items():
            where = shard_of.get(name)
            check(where == shard, f"{folder / shard}: tensor {name} is here, but {index.name} names {where}")
            state[name] = v
    for name in sorted(shard_of.keys() - state.keys()):
        raise ValueError(f"{folder / shard_of[name]}: tensor {name} is missing, {index.name} says it is here")
    return state


def main():
    sys.modules.setdefault("model", sys.modules["__main__"])  # measure.py imports this file, not a second copy
    from tests import measure
    measure.main()


if __name__ == "__main__":
    main()
