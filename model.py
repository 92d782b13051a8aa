"""Falcon-H1: attention and Mamba-2 side by side in every block. Model, loss, cache, checkpoints.

    model = FalconH1(PRESETS["tiny"])
    logits = model(torch.tensor([[72, 101, 108, 108, 111]]))         # (1, 5, vocab)
    logprobs, entropy = model(ids, targets=targets)                  # (b, t) each, without holding all logits
    traces = generate(model, [[72, 101]], max_new_tokens=20)         # a list of Trace, see decode.py
    model = FalconH1.from_pretrained("runs/tiny/sft/model")          # the published format

One block, the paper's SA_M ("semi-parallel attention and Mamba, then MLP"); µ is a scalar multiplier of muP:

    h ──┬── RMSNorm ──┬── µ ── q k v ── RoPE ── attention ───────── o ── µ ──(+)──┬── RMSNorm ── MLP ──(+)── h
        │             └── µ ── z x B C dt ── conv ── scan ─ norm ── out ── µ ─┘   │                     │
        └─────────────────────────────────────────────────────────────────────┘   └─────────────────────┘

Glossary (the letters of the SSM are those of ssm_scan.py)
    b, t        batch rows, tokens              d        hidden_size
    hq, hkv     query heads, key/value heads    hd       head_dim
    h, p, n, g  SSM heads, channels per head, state size, groups of B and C;  I = h p, all channels of the SSM
    cu_seqlens  (s + 1,) boundaries of the documents packed into one row; nothing passes from one to another
    mup         the forward multipliers that let one learning rate serve every model size
    slot        one sequence of the cache while decoding

Deviations from the published model: none in the function. The paper (Falcon-H1, arXiv 2507.22448) projects
concatenated heads with one matrix; the published weights hold one projection per branch and add the results,
which is the same. To copy this file, also take ssm_scan.py and decode.py.
"""

import json
import math
import mmap
import os
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from decode import Decoder, Sampler, Trace, draw, generate, prefill  # noqa: F401  for importers
from decode import attend_step, kernels_serve, mamba_step, norm_step
from ssm_scan import (
    causal_conv1d, causal_conv1d_step, check, check_cu_seqlens, check_first_order, ssd_scan, ssd_step,
    to_device)

# 1. Configuration -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class FalconH1Config:
    """The fields of the published config.json, under the same names."""
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
    mamba_chunk_size: int = 128  # not used here: the chunk affects speed only, see CHUNK
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
    # The forward multipliers of muP: each scales the input or the output of a matrix. _published derives
    # them from the widths.
    embedding_multiplier: float = 1.0
    lm_head_multiplier: float = 1.0
    attention_in_multiplier: float = 1.0
    attention_out_multiplier: float = 1.0
    key_multiplier: float = 1.0
    ssm_in_multiplier: float = 1.0
    ssm_out_multiplier: float = 1.0
    ssm_multipliers: tuple = (1.0, 1.0, 1.0, 1.0, 1.0)  # z, x, B, C, dt
    mlp_multipliers: tuple = (1.0, 1.0)  # gate, down
    time_step_limit: tuple = (0.0, math.inf)
    mixers: str = "both"  # or "attention" or "mamba" alone, in every block; published models have both
    # Special tokens, an id or a list of ids, kept in exports for other engines. Nothing here reads them: two
    # configurations that differ in them only are equal.
    bos_token_id: object = field(default=None, compare=False)
    eos_token_id: object = field(default=None, compare=False)
    pad_token_id: object = field(default=None, compare=False)

    def __post_init__(self):
        known = self.mixers in ("both", "attention", "mamba")
        check(known, f"mixers is {self.mixers!r}, expected 'both', 'attention' or 'mamba'")
        for f in (f for f in fields(self) if f.type in (int, float, bool, tuple)):
            value = getattr(self, f.name)
            got = f"{f.name} is {value!r}, expected"
            kinds = (int, float) if f.type is float else (f.type,)
            check(type(value) in kinds, f"{got} {f.type.__name__}")  # by type(): True is an int to isinstance
            # JSON has NaN, and integers of any size.
            check(f.type is not int or 0 < value < 2**31, f"{got} a number above 0 and below 2^31")
            numbers = value if f.type is tuple else (value,)
            if f.type is tuple:
                right = len(value) == len(f.default) and all(type(v) in (int, float) for v in value)
                check(right, f"{got} {len(f.default)} numbers")
            finite = all(abs(v) < 3e38 for v in numbers)  # in float32; false for NaN, too
            check(finite or f.name == "time_step_limit", f"{got} nothing but finite numbers")
        for n, by in ("mamba_n_heads", "mamba_n_groups"), ("num_attention_heads", "num_key_value_heads"):
            multiple = getattr(self, n) % getattr(self, by) == 0
            check(multiple, f"{n} {getattr(self, n)} is not a multiple of {by} {getattr(self, by)}")
        ssm = self.mamba_n_heads * self.mamba_d_head
        check(self.mamba_d_ssm == ssm, f"mamba_d_ssm {self.mamba_d_ssm}, but heads times their size is {ssm}")
        check(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd, but RoPE turns channels in pairs")
        check(self.rope_theta > 0, f"rope_theta {self.rope_theta} is not above 0")
        check(self.rms_norm_eps >= 0, f"rms_norm_eps {self.rms_norm_eps} is negative")
        low, high = self.time_step_limit
        check(low <= high, f"time_step_limit {self.time_step_limit}: its lower end is above its upper end")

    @property
    def mamba_widths(self):
        """Widths of in_proj's outputs: z, x, B, C, dt (at 7B 3072, 3072, 256, 256, 24)."""
        gn = self.mamba_n_groups * self.mamba_d_state
        return self.mamba_d_ssm, self.mamba_d_ssm, gn, gn, self.mamba_n_heads

    @classmethod
    def from_json(cls, path):
        """Read a config.json in the published format, as any version of transformers writes it. Fields that
        change a logit must be there: the defaults of transformers (norm before the gate, mamba_d_ssm 1024)
        fit no published model. Raises ValueError naming the file and the field."""
        def infinity(value):  # transformers writes it as {"__float__": "Infinity"}
            return float(value["__float__"]) if "__float__" in value else value
        try:
            return cls(**_config_fields(json.loads(Path(path).read_text("utf-8"), object_hook=infinity)))
        except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as e:
            raise ValueError(f"{path}: {e}") from None

# Optional: no effect on logits, or a wrong default shows up as a missing or an unexpected tensor.
_OPTIONAL = {"mamba_chunk_size", "initializer_range", "time_step_limit", "tie_word_embeddings", "mixers",
             "attention_bias", "mlp_bias", "projectors_bias", "mamba_proj_bias",
             "bos_token_id", "eos_token_id", "pad_token_id"}
# Supported with these values only.
_ONE_VALUE = {"hidden_act": "silu", "mamba_use_mlp": True, "attention_dropout": 0,
              "rope_scaling": None, "attn_layer_indices": None}
# Ignored: no effect on logits, or (mamba_expand, mlp_expansion_factor) given by a width that is read.
_IGNORED = set("""architectures auto_map dtype torch_dtype transformers_version _name_or_path use_cache
    num_logits_to_keep mlp_expansion_factor mamba_expand time_step_min time_step_max time_step_floor
    return_dict output_attentions output_hidden_states is_encoder_decoder chunk_size_feed_forward
    id2label label2id problem_type""".split())

def _kind(mixers):
    """The fields that tell an engine which model this is. For a single mixer these are names that no other
    engine knows: under the published ones, transformers would fill in the missing mixer at random."""
    if mixers == "both":
        return {"architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1"}
    return {"architectures": ["FalconH1SingleForCausalLM"], "model_type": "falcon_h1_single"}

def _config_fields(raw):
    """The content of a config.json -> arguments of FalconH1Config."""
    raw = {name: tuple(v) if isinstance(v, list) else v for name, v in raw.items() if v is not None}
    mixers = raw.get("mixers", "both")
    expected = _kind(mixers)["model_type"]
    found = raw.pop("model_type", "falcon_h1")
    why = f"only {expected!r} is supported with mixers {mixers!r}"
    check(found == expected, f"model_type is {found!r}; {why}")
    for name, only in _ONE_VALUE.items():
        value = raw.pop(name, only)
        check(value == only, f"{name} is {value!r}; only {only!r} is supported")
    # Files of 2025 hold rope_theta, newer ones rope_parameters.
    rope = raw.pop("rope_parameters", {})
    plain = rope.keys() <= {"rope_theta", "rope_type"} and rope.get("rope_type", "default") == "default"
    check(plain, f"rope_parameters {rope}: only a rope_theta and the rope_type 'default' are supported")
    theta = raw.setdefault("rope_theta", rope.get("rope_theta"))
    check(rope.get("rope_theta", theta) == theta, f"rope_theta {theta} contradicts rope_parameters {rope}")
    names = {f.name for f in fields(FalconH1Config)}
    unknown = sorted(raw.keys() - names - _IGNORED)
    check(not unknown, f"field {', '.join(unknown)} is unknown; it may change what the model computes")
    missing = sorted(name for name in names - _OPTIONAL if raw.get(name) is None)
    check(not missing, f"field {', '.join(missing)} is missing")
    return {name: raw[name] for name in names & raw.keys()}

def _published(*, vocab, hidden, layers, heads, mlp, ssm_heads, ssm_dim=128, kv=2, head_dim=128, state=256,
               context=131072, **other):
    """A published shape with its muP multipliers. They were tuned once, at hidden 1024 (w = 1), and follow
    from the widths: this rule gives the published values of 0.5B, 7B and 34B, and those of the others as far
    as they are known. One way to read it: trained weights have the same size at every width, so a sum over m
    inputs grows like m, and each path is divided by the sums that it contains:

        lm_head           1 / d         over the hidden size
        attention_out     1 / w^2       v over d; o over all heads, which widen with d
        key               1 / w^2       q and k over d; and 1 / hd for q . k, of which attention has hd^-1/2
        ssm_in, ssm_out   1 / w, 1 / I  in_proj over d, out_proj over the channels
        B                 1 / n         S C over the columns of the state
        mlp               1 / w         the gate over d; up and down together 1 / (w m), m the MLP's width"""
    w = hidden / 1024
    ssm = ssm_heads * ssm_dim
    return FalconH1Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=head_dim, max_position_embeddings=context,
        mamba_d_ssm=ssm, mamba_n_heads=ssm_heads, mamba_d_head=ssm_dim, mamba_d_state=state,
        embedding_multiplier=32**0.5, lm_head_multiplier=40 / hidden,
        attention_out_multiplier=0.9375 / w**2, key_multiplier=0.390625 / w**2 * (64 / head_dim) ** 0.5,
        ssm_in_multiplier=1.25 / w, ssm_out_multiplier=512 / ssm / 2**0.5,
        ssm_multipliers=(8**-0.5, 0.25, 32 * 2**0.5 / state, 0.5, 8**-0.5),
        mlp_multipliers=(0.78125**0.5 / w, 1200 / (w * mlp)), **other)

def single_mixer(c, mixers):
    """c with "attention" or "mamba" alone and as many parameters, within 1%: the MLP widens by what the other
    mixer frees. Every matrix of a block is hidden_size by some width, so it is enough to count these widths;
    the MLP's counts three times. It grows by a multiple of 8, which suits a GPU."""
    attention = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim  # q, o; k, v
    mamba = sum(c.mamba_widths) + c.mamba_d_ssm  # in_proj, out_proj
    freed = mamba if mixers == "attention" else attention
    return replace(c, mixers=mixers, intermediate_size=c.intermediate_size + 8 * math.ceil(freed / 24))

_SMALL = dict(vocab=32784, head_dim=64, ssm_dim=64, state=128, context=16384, mamba_rms_norm=False)
PRESETS = {
    # Trains in minutes on a CPU core. rope_theta 1e11 is for 256k tokens of context; with 16 frequencies
    # and fewer than a hundred tokens, 1e4 leaves more of them useful. initializer_range is hidden_size^-0.5.
    "tiny": FalconH1Config(
        vocab_size=272, hidden_size=96, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=1, head_dim=32, rope_theta=1e4, initializer_range=0.1,
        mamba_d_ssm=96, mamba_n_heads=3, mamba_d_head=32, mamba_d_state=32, mamba_chunk_size=32),
    # Ours: half the widths of 0.5b.
    "100m": _published(hidden=512, layers=20, heads=4, mlp=1024, ssm_heads=12, **_SMALL),
    # Published; 7b is also the shape of Falcon-H1R.
    "0.5b": _published(hidden=1024, layers=36, heads=8, mlp=2048, ssm_heads=24, **_SMALL),
    "1.5b": _published(vocab=65536, hidden=2048, layers=24, heads=8, mlp=4608, ssm_heads=48, ssm_dim=64),
    "1.5b-deep": _published(vocab=65536, hidden=1280, layers=66, heads=6, mlp=3072, ssm_heads=24, ssm_dim=64),
    "3b": _published(vocab=65536, hidden=2560, layers=32, heads=10, mlp=6144, ssm_heads=32),
    "7b": _published(vocab=130048, hidden=3072, layers=44, heads=12, mlp=12288, ssm_heads=24, context=262144),
    "34b": _published(vocab=261120, hidden=5120, layers=72, heads=20, mlp=21504, ssm_heads=32, context=262144,
                      kv=4, mamba_n_groups=2),
}
# "tiny" with one mixer alone, to see what each contributes. The trainers' defaults fit every model in TINY.
PRESETS |= {f"tiny-{mixers}": single_mixer(PRESETS["tiny"], mixers) for mixers in ("attention", "mamba")}
TINY = [config for name, config in PRESETS.items() if name.startswith("tiny")]

# 2. Block ---------------------------------------------------------------------------------------------------
# Tokens interact only inside `mix`, or in decode.py's kernels; everything else is per token.

CHUNK = 256  # tokens per chunk of the scan on a GPU: twice the states of 512 to store, half of C B^T's tiles

@dataclass
class Context:
    """What the blocks of one forward pass share. torch.compile skips `mix`, and only `mix` and decoding read
    more than rope and mup: so one compiled block serves every packing."""
    rope: tuple  # cos and sin of the tokens' positions, see rope_table
    mup: torch.Tensor | None  # see ssm_multipliers; in the model's dtype, as published, even if that is bf16
    cu: tuple | None = None  # cu_seqlens
    cache: object = None  # a Cache
    cp: object = None  # a train_sft.ContextParallel: h holds this rank's share of a row's tokens
    fused: bool = False  # one token per slot: decode.py's kernels instead of `mix`

def scaled(x, multiplier):
    """x * multiplier. Skipping multipliers of 1 (all of "tiny") saves 5% of a training step on a CPU."""
    return x if multiplier == 1 else x * multiplier

class RMSNorm(nn.RMSNorm):
    """w * x / sqrt(mean(x^2) + eps): the mean in float32, the cast before the weight, as published."""
    def forward(self, x):
        if x.shape[1] == 1 and kernels_serve(x):
            return norm_step(x, self.weight, self.eps)
        return self.weight * F.rms_norm(x, self.normalized_shape, eps=self.eps)  # sums 16 bits in float32

def rope_table(positions, head_dim, theta, dtype):
    """cos and sin (b, t, 1, head_dim) of the angles position * theta^(-2i / head_dim), for positions (b, t).
    Channels i and i + head_dim / 2 share an angle; the first one's sine is negative, as `rotate` needs it."""
    i = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions[..., None, None].float() * theta ** (-i / head_dim)  # (b, t, 1, head_dim / 2)
    cos, sin = (v.to(dtype) for v in (angle.cos(), angle.sin()))
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

def rotate(x, cos, sin):
    """RoPE on x (b, t, heads, head_dim): channels i and i + head_dim / 2 turn together ("rotate half")."""
    return x * cos + torch.cat(x.chunk(2, -1)[::-1], -1) * sin

# cuDNN's attention is twice as fast as flash's on Hopper, but plans 0.12 s for every new length. So it gets
# documents of at least LONG tokens, padded to multiples of 1,024: one plan for all lengths in between.
LONG = 4096
FLASH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # flash has no float32

def causal(q, k, v):
    """Causal attention of one document: q (b, hq, t, hd), k and v (b, hkv, t, hd) -> as q."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

@sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *FLASH], set_priority=True)
def causal_of_long(q, k, v):
    """The same, by cuDNN where it serves the dtype."""
    t = q.shape[2]
    if t % 1024:  # no token sees the padding behind it
        q, k, v = (F.pad(x, (0, 0, 0, -t % 1024)) for x in (q, k, v))
    return causal(q, k, v)[:, :, :t]

@sdpa_kernel(FLASH)
def attend(q, k, v, cu):
    """Causal attention, within each document if cu is given (then b = 1): (b, t, hq, hd).
    q (b, t, hq, hd), k and v (b, t, hkv, hd). Query head j reads key head j // (hq / hkv)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (b, heads, t, hd)
    lengths = [q.shape[2]] if cu is None else [end - start for start, end in zip(cu, cu[1:])]
    # A loop over views: split's gradient is one concatenation, where slices would add up whole rows.
    documents = zip(*(x.split(lengths, 2) for x in (q, k, v)))
    kernels = (causal_of_long if q.is_cuda and t >= LONG else causal for t in lengths)
    y = [kernel(*qkv) for kernel, qkv in zip(kernels, documents)]
    return torch.cat(y, 2).transpose(1, 2)

class Attention(nn.Module):
    """Causal self-attention with RoPE; hq / hkv query heads share a key head (GQA)."""
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
        # With R_i, the rotation by position i, scores depend on the distance i - j alone:
        #     y_i = sum_{j<=i} softmax_j(R_i q_i . R_j (µ k_j) / sqrt(hd)) v_j
        if context.fused:
            cache = context.cache
            y = attend_step(q, k, v, *context.rope, cache.lengths, cache.k[layer], cache.v[layer],
                            key_multiplier=c.key_multiplier)
        else:
            k = rotate(scaled(k, c.key_multiplier), *context.rope)
            y = self.mix(rotate(q, *context.rope), k, v, context, layer)
        return scaled(self.o_proj(y.flatten(2)), c.attention_out_multiplier)  # (b, t, d)

    @torch.compiler.disable
    def mix(self, q, k, v, context, layer):
        """What each token reads from itself and the tokens before it: (b, t, hq, hd)."""
        if context.cache is not None:
            return context.cache.attend(layer, q, k, v)
        if context.cp is None:
            return attend(q, k, v, context.cu)
        # From this rank's tokens of all heads to all tokens of this rank's heads, and back.
        q, k, v = context.cp.to_heads(torch.cat([q, k, v], 2), context.cp.attention)
        return context.cp.to_tokens(attend(q, k, v, context.cu))

@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is cached may meet autograd later
def ssm_multipliers(c, dtype, device):
    """The multiplier of every output channel of in_proj; None where all are 1."""
    if set(c.ssm_multipliers) == {1}:
        return None
    values = [m for m, width in zip(c.ssm_multipliers, c.mamba_widths) for _ in range(width)]
    return torch.tensor(values, dtype=dtype).to(device)

def gated_norm(y, z, weight, groups, eps, norm_before_gate):
    """Mamba-2's gated RMSNorm over the channels of each group: y, z (b, t, I) -> (b, t, I), in float32.
    norm_before_gate False (the published checkpoints): w * RMS(y silu(z));  True: w * RMS(y) silu(z).
    weight None (the smallest models): y silu(z), in the model's dtype."""
    if weight is None:
        return y * F.silu(z)
    gate = F.silu(z.float())
    y = y.float() if norm_before_gate else y.float() * gate
    y = F.rms_norm(y.unflatten(-1, (groups, -1)), (y.shape[-1] // groups,), eps=eps).flatten(-2) * weight
    return (y * gate if norm_before_gate else y).to(z.dtype)

class Mamba(nn.Module):
    """The Mamba-2 mixer: h heads, each with a state S of p x n numbers that decays and is written at every
    token. The state does not grow with t: this half of a block decodes at a constant cost per token.

        z, x, B, C, dt = µ in_proj(u)                       z gates; x, B, C and dt drive the recurrence
        x, B, C = silu(conv(x, B, C))                       over the last d_conv tokens, per channel
        dt = softplus(dt + dt_bias),  A = -exp(A_log)       per head; positive and negative
        S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T          the scan
        y_t = S_t C_t + D x_t
        out = out_proj(norm(y silu(z)))"""
    def __init__(self, c):
        super().__init__()
        self.config = c
        channels = sum(c.mamba_widths[1:4])  # x, B and C pass the convolution; conv1d holds its weights
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
        p = self.in_proj(scaled(u, c.ssm_in_multiplier))  # (b, t, I + (I + 2 g n) + h)
        p = p if context.mup is None else p * context.mup
        z, xBC, dt = p.split([c.mamba_d_ssm, sum(c.mamba_widths[1:4]), c.mamba_n_heads], -1)
        weight = self.norm.weight if c.mamba_rms_norm else None
        if context.fused:  # kernels do all from the softplus to the norm
            cache, conv = context.cache, self.conv1d
            y = mamba_step(cache.conv[layer], cache.ssm[layer], xBC[:, 0], dt[:, 0], conv.weight[:, 0],
                           conv.bias, self.dt_bias, self.A_log, self.D, c.time_step_limit)
            y = norm_step(y.flatten(1)[:, None], weight, c.rms_norm_eps, z=z, groups=c.mamba_n_groups,
                          norm_before_gate=c.mamba_norm_before_gate)
        else:
            dt = F.softplus(dt + self.dt_bias).clamp(*c.time_step_limit)  # in the model's dtype, as published
            y = self.mix(xBC, dt, context, layer).flatten(2)  # (b, t, h, p) -> (b, t, I)
            y = gated_norm(y, z, weight, c.mamba_n_groups, c.rms_norm_eps, c.mamba_norm_before_gate)
        return scaled(self.out_proj(y), c.ssm_out_multiplier)

    @torch.compiler.disable
    def mix(self, xBC, dt, context, layer):
        """Convolution and scan: what each token reads from itself and the tokens before it, (b, t, h, p).
        xBC (b, t, I + 2 g n), dt (b, t, h)."""
        cp, cache = context.cp, context.cache
        weight = self.conv1d.weight[:, 0]  # (channels, d_conv)
        bias = self.conv1d.bias
        # In float32: what is left of the state after t tokens is the exponential of a sum of t terms dt A.
        A = -self.A_log.float().exp()
        D = self.D
        # One token per slot: a step of the recurrence, which changes the states in place.
        if cache is not None and dt.shape[1] == 1:
            xBC, _ = causal_conv1d_step(cache.conv[layer], xBC[:, 0], weight, bias, activation="silu")
            x, B, C = self.split(xBC, heads=dt.shape[2])
            y, _ = ssd_step(cache.ssm[layer], x, dt[:, 0], A, B, C, D=D)
            return y[:, None]
        if cp is not None:  # as in attention: from here to to_tokens, all tokens of this rank's heads
            xBC, dt = cp.to_heads(torch.cat([xBC, dt], 2), cp.mamba)
            weight, bias, A, D = cp.own_weights(weight, bias, A, D)
        # Without a cache, documents start from states of zero, and leave none.
        conv, state = (None, None) if cache is None else (cache.conv[layer], cache.ssm[layer])
        shared = {"cu_seqlens": context.cu, "return_final_states": cache is not None}
        xBC, new_conv = causal_conv1d(xBC, weight, bias, initial_states=conv, activation="silu", **shared)
        x, B, C = self.split(xBC, heads=dt.shape[2])
        # For backward, the states that enter must outlast their slots, which take over the final ones.
        entering = state.clone() if cache is not None and torch.is_grad_enabled() else state
        # All tokens at once: steps 1 to 4 of ssm_scan.py, chunk by chunk.
        y, new_state = ssd_scan(x, dt, A, B, C, D=D, initial_states=entering, chunk_size=CHUNK, **shared)
        if cache is not None:
            conv.copy_(new_conv)
            state.copy_(new_state)
        return y if cp is None else cp.to_tokens(y)

    def split(self, xBC, heads):
        """xBC (..., h p + 2 g n) -> x (..., h, p), B and C (..., g, n). Under context parallelism, h and g
        count this rank's heads and groups."""
        inner = heads * self.config.mamba_d_head
        gn = (xBC.shape[-1] - inner) // 2
        x, B, C = xBC.split([inner, gn, gn], -1)
        x = x.unflatten(-1, (heads, -1))
        B, C = (v.unflatten(-1, (-1, self.config.mamba_d_state)) for v in (B, C))
        return x, B, C

class MLP(nn.Module):
    """SwiGLU: µ down(up(x) silu(µ gate(x)))."""
    def __init__(self, c):
        super().__init__()
        self.multipliers = c.mlp_multipliers
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        gate = F.silu(scaled(self.gate_proj(x), self.multipliers[0]))
        return scaled(self.down_proj(self.up_proj(x) * gate), self.multipliers[1])

class Block(nn.Module):
    """The diagram at the top: h + Mamba(n) + Attention(n), n = norm(h), then h + MLP(norm(h)). One of the two
    mixers is None if the configuration asks for the other alone."""
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mamba = None if c.mixers == "attention" else Mamba(c)
        self.self_attn = None if c.mixers == "mamba" else Attention(c)
        self.pre_ff_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.feed_forward = MLP(c)

    def forward(self, h, context, layer=0):
        n = self.input_layernorm(h)  # one norm feeds both branches
        mixed = [mixer(n, context, layer) for mixer in (self.mamba, self.self_attn) if mixer]
        h = h + sum(mixed[1:], mixed[0])  # sum(mixed) would add to a 0 first: one operator more
        return h + self.feed_forward(self.pre_ff_layernorm(h))

# 3. Model ---------------------------------------------------------------------------------------------------

class Backbone(nn.Module):
    """Everything below the head: ids (b, t) -> hidden states (b, t, d)."""
    checkpoint_activations = False  # True: keep the blocks' inputs only, recompute the rest in backward
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.final_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, input_ids, cu=None, cache=None, cp=None):
        c, device = self.config, input_ids.device
        t = input_ids.shape[1]
        first = 0 if cp is None else cp.rank * t  # of this rank's tokens in the row
        positions = torch.arange(first, first + t, device=device)[None]  # (1, t)
        if cu is not None:  # they start anew in every document
            each = [torch.arange(end - start, device=device) for start, end in zip(cu, cu[1:])]
            positions = torch.cat(each)[None, first : first + t]
        elif cache is not None:  # each slot goes on from its own length: (slots, t)
            positions = cache.lengths[:, None] + positions
            cache.extend(positions)
        h = scaled(self.embed_tokens(input_ids), c.embedding_multiplier)  # (b, t, d)
        rope = rope_table(positions, c.head_dim, c.rope_theta, h.dtype)
        mup = ssm_multipliers(c, h.dtype, h.device)
        context = Context(rope, mup, cu, cache, cp, fused=cache is not None and cache.fused)
        for layer, block in enumerate(self.layers):
            # With a cache, computing a block again would append its tokens again.
            if self.checkpoint_activations and torch.is_grad_enabled() and cache is None:
                h = checkpoint(block, h, context, layer, use_reentrant=False)
            else:
                h = block(h, context, layer)
        if cache is not None:
            cache.lengths += t
        return self.final_layernorm(h)

class FalconH1(nn.Module):
    """The language model. Its parameters have the names and shapes of the published checkpoints."""
    cp = None  # or a train_sft.ContextParallel: input_ids are a share of a row, cu_seqlens the whole row's
    compile_loss = False  # True: torch.compile what the loss does to logits
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.files = {}  # from_pretrained: {name: content}, see BESIDE
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal matrices; as in Mamba-2, A in (-16, -1), softplus(dt_bias) log-uniform in (0.001, 0.1), so
        that a head's state lasts for one token (dt 0.1, A -16) to a thousand (dt 0.001, A -1)."""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                m.weight.normal_(0, self.config.initializer_range)
                if getattr(m, "bias", None) is not None:
                    m.bias.zero_()
            elif isinstance(m, Mamba):
                m.A_log.uniform_(1, 16).log_()
                dt = m.dt_bias.uniform_(-6.9, -2.3).exp()  # about ln 0.001 and ln 0.1
                m.dt_bias.copy_(dt.expm1().log())  # the inverse of softplus

    def forward(self, input_ids, *, targets=None, temperature=1.0, cu_seqlens=None, cache=None):
        """Logits, or with targets the log-probabilities that training needs, without ever holding all logits.

        Args:
            input_ids: (b, t) int64. Pass them and targets on the CPU: checking ids, and finding the tokens
                with targets, on a GPU would make the host wait for it.
            targets: (b, t) int64, what follows each token; negative ones give 0 and no gradient.
            temperature: above 0; divides the logits of targets.
            cu_seqlens: (s + 1,) packs s documents into one row, b = 1.
            cache: a Cache of b slots; each appends t tokens.
        Returns:
            Logits (b, t, vocab) in the model's dtype; with targets (log-probabilities, entropies of the
            distributions they come from), each (b, t) float32, the entropies without gradient.
        Raises:
            ValueError, naming the argument."""
        c, shape = self.config, tuple(input_ids.shape)
        check(len(shape) == 2 and 0 not in shape, f"input_ids: got {shape}, expected (b, t), neither 0")
        fits = cache is None or cu_seqlens is None and len(cache.lengths) == shape[0]
        check(fits, f"cache: expected {shape[0]} slots, as many as rows of input_ids, and no cu_seqlens")
        if cache is not None:
            got, expected = ((v.dtype, v.device) for v in (cache.k, self.lm_head.weight))
            check(got == expected, f"cache: got {got}, the model has {expected}")
        if input_ids.device.type == "cpu":  # looking at a GPU's ids would stop the host
            inside = 0 <= input_ids.min() and input_ids.max() < c.vocab_size
            check(inside, f"input_ids: an id is outside 0..{c.vocab_size - 1}")
        tokens = shape[1] if self.cp is None else shape[1] * self.cp.size
        cu = None if cu_seqlens is None else check_cu_seqlens(cu_seqlens, shape[0], tokens)
        device = self.lm_head.weight.device
        if targets is None:
            h = self.model(input_ids.to(device), cu, cache, self.cp)
            return scaled(self.lm_head(h), c.lm_head_multiplier)
        check(targets.shape == shape, f"targets: got {tuple(targets.shape)}, expected {shape}")
        check(temperature > 0, f"temperature: got {temperature}, expected a number above 0")
        targets = targets.flatten()
        rows = (targets >= 0).nonzero()[:, 0]  # prompts have no targets and need no logits
        if targets.device.type == "cpu":
            check(targets.max() < c.vocab_size, f"targets: an id is above {c.vocab_size - 1}")
            input_ids, targets, rows = to_device([input_ids, targets, rows], device)
        h = self.model(input_ids, cu, cache, self.cp).flatten(0, 1)  # (b t, d)
        scale = c.lm_head_multiplier / temperature
        values = token_logprobs(h, self.lm_head.weight, targets, scale, rows=rows, compiled=self.compile_loss)
        return tuple(v.view(shape) for v in values)

    def new_cache(self, slots, length, device=None):
        """An empty Cache in the model's dtype, on its device if no other is named."""
        p = next(self.parameters())
        return Cache(self.config, slots, length, dtype=p.dtype, device=device or p.device)

    def save_pretrained(self, folder, read=lambda name, v: v):
        """Write config.json and model.safetensors, and for a loaded model the files BESIDE them.
        read(name, v) returns the values of a tensor when it is written, for a model that holds none itself
        (on the meta device) or only shards of them."""
        state = self.state_dict()
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        config = {**_kind(self.config.mixers), "hidden_act": "silu",
                  "torch_dtype": str(self.lm_head.weight.dtype).removeprefix("torch."), **asdict(self.config)}
        if self.config.time_step_limit == (0, math.inf):
            del config["time_step_limit"]  # the published default; JSON has no word for infinity
        if self.config.mixers == "both":
            del config["mixers"]  # no field of the published format
            warn_of_llama_cpp(self.config)  # it refuses single mixers
        os.makedirs(folder, exist_ok=True)
        write_safetensors(Path(folder) / "model.safetensors", state, read)
        files = self.files | {"config.json": json.dumps(config, indent=2).encode() + b"\n"}
        for name, content in files.items():
            os.makedirs((Path(folder) / name).parent, exist_ok=True)
            with replacing(Path(folder) / name) as file:
                file.write(content)

    @classmethod
    def from_pretrained(cls, folder, *, dtype=None, device=None, mapped=False):
        """Read a checkpoint in the published format: exactly the model's tensors, no more and no fewer.
        dtype None keeps the stored one. mapped leaves the tensors in their file, whatever dtype and device:
        train_sft.shard() moves and converts one block at a time, so that no rank ever holds the whole model.
        Raises ValueError naming the file, and the field or tensor."""
        config = FalconH1Config.from_json(Path(folder) / "config.json")
        state = read_checkpoint(folder)
        embeddings = "model.embed_tokens.weight"
        check(embeddings in state, f"{folder}: tensor {embeddings} is missing")
        if config.tie_word_embeddings:
            same = torch.equal(state.setdefault("lm_head.weight", state[embeddings]), state[embeddings])
            check(same, f"{folder}: tensor lm_head.weight differs from the tied {embeddings}")
        with torch.device("meta"):  # shapes without memory, until the tensors are assigned
            model = cls(config)
        expected = model.state_dict()
        stored = state[embeddings].dtype
        for name in sorted({*expected, *state}):
            tensor = f"{folder}: tensor {name}"
            check(name in state, f"{tensor} is missing")
            check(name in expected, f"{tensor} is not part of this model")
            v, shape = state[name], tuple(expected[name].shape)
            check(v.shape == shape, f"{tensor} is {tuple(v.shape)}, config.json makes it {shape}")
            check(v.is_floating_point(), f"{tensor} is {v.dtype}, expected floating-point numbers")
            check(dtype or v.dtype == stored, f"{tensor} is {v.dtype}, the embeddings {stored}: give a dtype")
        if not mapped:
            state = {name: v.to(device, dtype, copy=True) for name, v in state.items()}
        model.load_state_dict(state, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        paths = [path for name in BESIDE for path in Path(folder).glob(name) if path.is_file()]
        model.files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
        return model

def set_threads(config):
    """One CPU thread for a model as small as "tiny", unless OMP_NUM_THREADS is set. Its operators take some
    50 µs each, and a second thread makes a step only 30% shorter. Where another process computes, one thread
    spins while the other waits for a core, and a step may take ten times as long."""
    if config.hidden_size <= 128 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)

# 4. Loss ----------------------------------------------------------------------------------------------------
# The logits of 32k tokens and 130k words would take 17 GB in float32. So the head runs on chunks of tokens,
# in the forward pass and again in the backward pass, and only one chunk's logits exist at a time. Between the
# passes one number per token is kept, lse.
#
#     z = scale h W^T,   lse = log sum_j exp(z_j),   log p_y = z_y - lse,   entropy = -sum_j p_j log p_j
#
# The derivative of lse is the softmax, d lse / dz_j = exp(z_j - lse) = p_j. So with g = dL / d log p_y
#
#     dz_j = g ([j = y] - p_j),   dh = scale dz W,   dW = scale dz^T h,   the last summed over chunks

def head_values(logits, targets, scale):
    """logits (chunk, vocab), targets y (chunk,) -> log p_y, entropy and lse, each (chunk,) float32.
    In place where it can be: float32 logits are overwritten."""
    logits = logits.float().mul_(scale)
    lse = logits.logsumexp(-1)
    logp = logits.sub_(lse[:, None])
    return logp.gather(1, targets[:, None])[:, 0], -logp.exp().mul_(logp).sum(-1), lse

def head_gradient(logits, targets, lse, g, scale):
    """dz (chunk, vocab) in the dtype of logits, for g (chunk,) = scale dL / d log p_y. In place, too."""
    dtype, y, g = logits.dtype, targets[:, None], g[:, None]
    logits = logits.float()  # under the same name, so that those in 16 bits are freed
    p = logits.mul_(scale).sub_(lse[:, None]).exp_()
    at_target = g - g * p.gather(1, y)
    return p.mul_(-g).to(dtype).scatter_(1, y, at_target.to(dtype))

@lru_cache(maxsize=2)
def _head_functions(compiled):
    """Plain, each line reads and writes all logits once or more; compiled, each function does so once."""
    functions = head_values, head_gradient
    return [torch.compile(f) for f in functions] if compiled else functions

class _TokenLogprobs(torch.autograd.Function):
    """h (t, d), W (vocab, d), targets y (t,) -> log p_y and entropy, (t,) float32; 0 outside `rows`.
    No row occurs twice, so dh is copied into place, not added: the same bits on every run."""
    @staticmethod
    def forward(ctx, h, weight, targets, rows, scale, chunk, compiled):
        values, _ = _head_functions(compiled)
        results = [h.new_zeros(len(h), dtype=torch.float32) for _ in range(3)]
        for i in range(0, len(rows), chunk):  # rows.split(chunk) would make one chunk of no rows
            part = rows[i : i + chunk]
            own = values(h.index_select(0, part) @ weight.T, targets[part], scale)  # logits (chunk, vocab)
            for result, value in zip(results, own):
                result[part] = value
        logprobs, entropy, lse = results
        ctx.save_for_backward(h, weight, targets, rows, lse)
        ctx.options = scale, chunk, compiled
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, dlogprobs, _):
        check_first_order()
        h, weight, targets, rows, lse = ctx.saved_tensors
        scale, chunk, compiled = ctx.options
        _, gradient = _head_functions(compiled)
        dh = torch.zeros_like(h)
        dweight = torch.zeros_like(weight, dtype=torch.float32)  # bf16 would lose small chunks in a large sum
        g = dlogprobs.float() * scale
        for i in range(0, len(rows), chunk):
            part = rows[i : i + chunk]
            x = h.index_select(0, part)  # on a CPU much faster than h[part]
            dz = gradient(x @ weight.T, targets[part], lse[part], g[part], scale)
            dh.index_copy_(0, part, dz @ weight)
            add_product(dweight, dz.T, x)
            del dz  # before the next chunk's: two would be in memory at once
        return dh, dweight.to(weight.dtype), None, None, None, None, None

def add_product(total, a, b):
    """total += a b, total in float32. On a GPU, cuBLAS adds a product in bf16 without rounding it."""
    if total.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))

def tokens_of_chunk(vocab, device):
    """Tokens whose logits exist at a time: 2^25 numbers on a CPU, up to 2^28 on a GPU, of 8 bytes each
    (logits and softmax, float32): 2.1 GB, 2,048 tokens at 130,048 words.
    Each chunk adds to the weight's gradient, 8 vocab d bytes of traffic beside 8 chunk vocab d operations. At
    3 TB/s and 800 TFLOP/s that takes 267 / chunk of the products' time: 13% at 2,048 tokens, 7% at 4,096.
    Multiples of 128 fill the products' tiles."""
    if device.type == "cpu":
        return max(1, 2**25 // vocab)
    return min(4096, max(128, 2**28 // vocab // 128 * 128))

def token_logprobs(h, weight, targets, scale=1.0, chunk=None, rows=None, compiled=False):
    """h (t, d), weight (vocab, d), targets (t,) -> log-probabilities (t,) and entropies (t,), float32.
    scale multiplies the logits: lm_head_multiplier / temperature. Entropies have no gradient. rows (k,): the
    tokens to compute, each once; the others get zeros. None: all. compiled: with torch.compile."""
    chunk = chunk or tokens_of_chunk(len(weight), weight.device)
    rows = torch.arange(len(h), device=h.device) if rows is None else rows
    kind = h.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        h, weight = (v.to(torch.get_autocast_dtype(kind)) for v in (h, weight))  # for both passes
    return _TokenLogprobs.apply(h, weight, targets, rows, scale, chunk, compiled)

# 5. Cache ---------------------------------------------------------------------------------------------------
# Attention remembers every token, the mixer a state of fixed size. A slot of the 7B model, in bf16, holds
#
#     k, v    44 layers x 2 x 2 heads x 128 channels x 2 bytes            45 kB per token
#     ssm     44 layers x 24 heads x 128 x 256 numbers x 4 bytes          138 MB, as k and v of 3,072 tokens
#     conv    44 layers x (3072 + 2 x 256) channels x 3 inputs x 2 bytes  0.9 MB
#
# The states are float32 even in a bf16 model: each is a sum over thousands of tokens, to which a step adds
# dt x B^T with dt down to 0.001. bf16 has 8 bits: adding less than 1/512 of a number does not change it.

class Cache:
    """Decoding state of `slots` sequences.

    k, v     (layers, slots, hkv, length, hd)        keys and values of every token, in the model's dtype
    conv     (layers, slots, channels, d_conv - 1)   last inputs of the convolution, in the model's dtype
    ssm      (layers, slots, h, p, n)                states of the scan, always float32
             (A mixer that the model lacks has 0 heads and 0 channels here, so no bytes.)
    lengths  (slots,)                                tokens in each slot
    used     upper bound of the lengths, kept on the host so that no step waits for the GPU: attention reads
             as many positions. A `fused` step, one token per slot in kernels, reads `lengths` instead. It
             cannot raise: a slot without room appends nothing and answers nonsense."""
    def __init__(self, config, slots, length, *, dtype=torch.float32, device=None):
        c, n = config, config.num_hidden_layers
        hkv = 0 if c.mixers == "mamba" else c.num_key_value_heads
        channels = 0 if c.mixers == "attention" else sum(c.mamba_widths[1:4])  # x, B, C
        h = 0 if c.mixers == "attention" else c.mamba_n_heads
        self.k = torch.zeros(n, slots, hkv, length, c.head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        with torch.enable_grad():  # a view made without gradients could not be written to with them
            self.conv = self.k.new_zeros(n, slots, c.mamba_d_conv - 1, channels).mT
        self.ssm = self.k.new_zeros(n, slots, h, c.mamba_d_head, c.mamba_d_state, dtype=torch.float32)
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self.used = 0
        # Of the forward pass under way, see extend.
        self.fused = False
        self.at = None
        self.mask = None

    def load(self, slot, other):
        """Copy the first slot of `other` into `slot`: a prompt is prefilled once and sampled many times."""
        self.k[:, slot, :, : other.used] = other.k[:, 0, :, : other.used]
        self.v[:, slot, :, : other.used] = other.v[:, 0, :, : other.used]
        self.conv[:, slot] = other.conv[:, 0]
        self.ssm[:, slot] = other.ssm[:, 0]
        self.lengths[slot] = other.lengths[0]
        self.used = max(self.used, other.used)

    def bytes_to_grow(self, slots, length):
        """Bytes that `grow` allocates while the old tensors still exist."""
        n = len(self.lengths)
        kv = (self.k.nbytes + self.v.nbytes) // (n * self.k.shape[3]) * slots * length
        return kv if slots == n else kv + (self.conv.nbytes + self.ssm.nbytes) // n * slots

    def grow(self, slots, length):
        """Hold only the sequences of these slots, in this order, with room for `length` tokens."""
        def longer(old):  # a layer at a time: indexing all at once would copy k a second time
            new = old.new_zeros(len(old), len(slots), old.shape[2], length, old.shape[4])
            for layer in range(len(old)):
                new[layer, :, :, : old.shape[3]] = old[layer, slots]
            return new
        self.k = longer(self.k)
        self.v = longer(self.v)
        if len(slots) < len(self.lengths):
            self.conv, self.ssm, self.lengths = self.conv[:, slots], self.ssm[:, slots], self.lengths[slots]

    def extend(self, positions):
        """The next forward pass appends tokens at `positions` (slots, t)."""
        t, length = positions.shape[1], self.k.shape[3]
        self.fused = t == 1 and kernels_serve(self.k)
        end = self.used + t
        check(self.fused or end <= length, f"cache: {end} tokens do not fit a length of {length}")
        if self.k.nbytes and not self.fused:
            # at: where scatter_ writes k and v. mask: which of the first `used` positions a token may see. A
            # slot may hold fewer: positions behind its own tokens are masked, as the future is.
            at = positions[:, None, :, None]
            self.at = at.expand(-1, self.k.shape[2], -1, self.k.shape[4])  # (slots, hkv, t, hd)
            seen = torch.arange(end, device=positions.device)
            self.mask = seen <= at if self.used else None  # (slots, 1, t, used)
        self.used = min(end, length)

    def attend(self, layer, q, k, v):
        """Append k, v (slots, t, hkv, hd); attend with q (slots, t, hq, hd) to all that each slot holds."""
        for held, new in (self.k, k), (self.v, v):  # of two dtypes under autocast
            held[layer].scatter_(2, self.at, new.transpose(1, 2).to(held.dtype))
        if self.mask is None:  # nothing was held before
            return attend(q, k, v, None)
        k, v = (x[layer, :, :, : self.used] for x in (self.k, self.v))  # (slots, hkv, used, hd)
        if torch.is_grad_enabled():  # backward needs them as they are now, and the next token is written here
            k, v = k.clone(), v.clone()
        if q.shape[1] == 1:  # one token: the queries that share a key head are rows of one matrix
            y = F.scaled_dot_product_attention(q[:, 0].unflatten(1, (k.shape[1], -1)), k, v, self.mask)
            return y.flatten(1, 2)[:, None]
        if k.is_cuda:  # where with a mask only torch's slow kernel lets queries share keys: copy them
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[1], 1) for x in (k, v))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=self.mask, enable_gqa=True)
        return y.transpose(1, 2)

# 6. Checkpoints ---------------------------------------------------------------------------------------------
# safetensors: eight bytes of header length, a JSON header, the tensors' bytes. Nothing in it can run.

# What servers read beside the weights. from_pretrained keeps these files for save_pretrained, unread.
BESIDE = ("generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
          "special_tokens_map.json", "additional_chat_templates/*.jinja")

def warn_of_llama_cpp(c):
    """Warn, once per process, of configurations that llama.cpp loads but gets wrong: log-probabilities were
    off by 0.8 to 7 nats in the version of llama-cpp-python 0.3.36. No published model has any of them."""
    wrong = {
        # Its file holds one copy of a shared matrix, times embedding_multiplier, and reads it for both uses.
        "tie_word_embeddings": c.tie_word_embeddings and c.embedding_multiplier != c.lm_head_multiplier,
        # It scales the biases of q, k and v as if they were weights, and leaves that of o out.
        "attention_bias": c.attention_bias,
        # It always gates before the norm, and does not clamp dt.
        "mamba_norm_before_gate": c.mamba_norm_before_gate and c.mamba_rms_norm,
        "time_step_limit": c.time_step_limit != (0, math.inf)}
    if names := ", ".join(name for name, found in wrong.items() if found):
        warnings.warn(f"llama.cpp would load this model but compute wrong logits: {names}", stacklevel=3)

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64}

@contextmanager
def replacing(path):
    """A file to write under a temporary name, renamed at the end: a reader sees the old file or the new."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written: {e.strerror}") from None

def write_safetensors(path, tensors, read=lambda name, v: v):
    """tensors {name: tensor} -> file, little-endian, in the order of the names. read: see save_pretrained."""
    names = {v: k for k, v in _DTYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, v in sorted(tensors.items()):
        start, end = end, end + v.nbytes
        header[name] = {"dtype": names[v.dtype], "shape": list(v.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, v in sorted(tensors.items()):
            file.write(read(name, v).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

def read_safetensors(path):
    """file -> {name: tensor}, memory-mapped: copy what you want to keep or to change. Raises ValueError
    unless the tensors' bytes follow the header without gap or overlap, to the end of the file."""
    tensors = {}
    end = 0  # of the tensors so far
    try:
        with open(path, "rb") as f:
            data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY))
        begin = 8 + int.from_bytes(data[:8], "little")
        check(begin <= min(len(data), 100_000_000), f"a header of {begin - 8} bytes in a file of {len(data)}")
        header = json.loads(bytes(data[8:begin]))
        data = data[begin:]
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            shape = entry["shape"]
            dtype = _DTYPES[entry["dtype"]]
            whole = start == end < stop <= len(data) and stop - start == math.prod(shape) * dtype.itemsize
            check(whole, f"tensor {name} of shape {shape} is at {start}..{stop} of {len(data)}")
            tensors[name] = torch.frombuffer(data[start:stop], dtype=dtype).view(shape)
            end = stop
        check(end == len(data), f"{len(data) - end} bytes too many")
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:  # also RecursionError
        raise ValueError(f"{path}: not a whole safetensors file: {type(e).__name__}: {e}") from None
    return tensors

def read_checkpoint(folder):
    """{name: tensor}, memory-mapped, of model.safetensors or the shards in model.safetensors.index.json."""
    single = Path(folder) / "model.safetensors"
    index = Path(folder) / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return read_safetensors(single)
    try:
        shard_of = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = sorted(set(shard_of.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index}: expected a weight_map from tensors to files in this folder") from None
    state = {}
    for shard in shards:
        check(shard == Path(shard).name, f"{index}: {shard} is not a file in this folder")
        state |= read_safetensors(Path(folder) / shard)
    for name in shard_of.keys() - state.keys():
        raise ValueError(f"{Path(folder) / shard_of[name]}: tensor {name} is missing; {index.name} names it")
    return state
