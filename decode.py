"""Decoding: sampling many traces at a time, drawing a token, and the kernels of one token on a GPU.

    generate       traces of many prompts, model.generate; under it
    Sampler        which trace has which slot of the cache, and when the cache grows
    Decoder        the step of all slots: eager, then recorded, then replayed      one launch
    draw           a token from logits, on any device
    norm_step      RMSNorm; with a gate, the mixer's gated norm                    one launch
    mamba_step     convolution, step size and state of the mixer                   two launches
    attend_step    RoPE, the new key and value, attention over the cache           two launches

A decoding step is a long chain of short kernels, each a microsecond or two however little it does. So one
kernel here does what takes torch ten, and a step is recorded once, as a CUDA graph, and replayed for every
token. Nothing in it may depend on a number that the host knows: `lengths` are read on the device.

Sums are float32. What a kernel hands on is rounded to the model's dtype, as in the forward pass, and so is
the step size of the SSM. No kernel has a gradient, none uses atomics: a step gives the same bits every time,
and the bits of a slot do not depend on what other slots hold.

Glossary: as in model.py, which imports this file and hands in model and cache. length is the room of a slot;
a trace is one sampled continuation of a prompt. To copy this file, also take ssm_scan.py.
"""

import math
import os
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from ssm_scan import (
    _backend, _check_conv, _jit, _launch, _power, _program, _range, check, constexpr, tl, triton)

def kernels_serve(x):
    """Whether one token goes through these kernels where x is."""
    return x.is_cuda and not torch.is_grad_enabled() and _backend(None, x) == "triton"

# 1. Sampling: the traces of many prompts --------------------------------------------------------------------
# One sampler for RL rollouts, evaluation, DeepConf and chat. Traces decode together, each in a slot of one
# cache. A step reads all weights, however many slots it serves: slots must not stay empty.
#
#     start   free slots take the next traces, and the states of their prompts, each prefilled once
#     step    Decoder appends a token to every slot and draws the next: on a GPU one CUDA graph, then one read
#     finish  traces that have ended leave their slots, and the next start fills them

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
def generate(model, prompts, *, max_new_tokens, temperature=1.0, top_p=1.0, seed=0, stop_ids=(), samples=1,
             slots=None, vocab_size=None, admit=None, on_token=None, on_trace=None, progress=0):
    """Sample `samples` traces of each prompt. A trace depends on weights, prompt, settings, seed and its own
    two indices; what else is in the batch, or being set aside for lack of memory, changes rounding only.

    Args:
        prompts: lists of token ids.
        temperature, top_p: see `draw`; temperature 0 is greedy.
        stop_ids: token ids that end a trace.
        slots: traces that decode together; None or 0: as many as fit into free memory.
        vocab_size: of the tokenizer. The model's may be padded, and ids from here on are never sampled.
        admit: called as admit(prompt_index, sample_index), in sample order, before a trace starts. Answers
            "go", "wait" (ask again after the next step), "skip" (not this trace) or "done" (no further trace
            of this prompt).
        on_token: on_token(trace) after each token; True stops the trace.
        on_trace: on_trace(trace) when a trace has ended.
        progress: traces to expect, for a bar that shows the time left; 0: no bar.
    Returns:
        A list of Trace, by prompt, then by sample.
    Raises:
        ValueError for an empty prompt, ids out of range, more tokens than positions, a trace that does not
        fit into memory, or logits that are not finite; RuntimeError where admit lets nothing go on."""
    c = model.config
    for i, prompt in enumerate(prompts):
        check(len(prompt), f"prompt {i}: it is empty")
        inside = 0 <= min(prompt) and max(prompt) < c.vocab_size
        check(inside, f"prompt {i}: a token id is outside 0..{c.vocab_size - 1}")
        check(len(prompt) + max_new_tokens <= c.max_position_embeddings,
              f"prompt {i}: {len(prompt)} tokens and max_new_tokens {max_new_tokens} exceed "
              f"max_position_embeddings {c.max_position_embeddings}")
    check(max_new_tokens >= 1, f"generate: max_new_tokens {max_new_tokens} is below 1")
    check(samples >= 1, f"generate: samples {samples} is below 1")
    valid = temperature == 0 or temperature >= 1e-30  # logits / 1e-40 would be infinite in float32
    check(valid, f"generate: temperature {temperature} is neither 0 nor at least 1e-30")
    check(0 < top_p <= 1, f"generate: top_p {top_p} is not in (0, 1]")
    vocab_size = c.vocab_size if vocab_size is None else vocab_size
    check(0 < vocab_size <= c.vocab_size, f"generate: vocab_size {vocab_size} is not in 1..{c.vocab_size}")
    if not prompts:
        return []

    def pick(logits, u):  # (slots, 4) float64, one read for the host: what `draw` gives; are logits finite?
        finite = logits.abs().amax(-1).isfinite()
        logits[:, vocab_size:] = -torch.inf  # `draw` finds no blocks of 256 in a slice of odd width
        drawn = draw(logits, u, temperature, top_p, min(20, vocab_size))
        return torch.stack([v.double() for v in (*drawn, finite)], 1)
    longest = max(map(len, prompts)) + max_new_tokens - 1  # no step appends a trace's last token
    sampler = Sampler(model, prompts, samples, slots, longest, seed, admit, pick)
    ended = []
    produced = 0
    begun = time.time()
    with tqdm(total=progress, disable=not progress, desc="sampling", unit="trace", miniters=0) as bar:
        while sampler.start():
            produced += sampler.step()
            for trace in sampler.finish(max_new_tokens, stop_ids, on_token):
                ended.append(trace)
                if on_trace is not None:
                    on_trace(trace)
            bar.set_postfix_str(f"{produced / (time.time() - begun):,.0f} tokens/s", refresh=False)
            bar.update(len(ended) - bar.n)  # draws it at most ten times a second
    return sorted(ended, key=lambda trace: (trace.prompt_index, trace.sample_index))

# 2. Sampling: slots and memory ------------------------------------------------------------------------------
# Room for the longest possible trace in every slot would leave few slots. So the cache starts short, and
# doubles when the longest trace has filled it. If the longer one does not fit into memory beside the old one,
# the youngest traces are set aside: they lose their states, keep their tokens, and go on later from a prefill
# of prompt and tokens. Towards the end, the last traces move to a smaller cache.

@dataclass(eq=False)
class Running:
    """A trace in a slot, or set aside: all it needs to go on, in any slot and at any time."""
    trace: Trace
    ids: list  # of its prompt and of its tokens
    random: np.random.Generator  # its own, from (seed, prompt, sample): neighbours do not change its draws

@torch.no_grad()
def prefill(model, prompts, tokens=4096):
    """Run prompts of one length, all but their last token, and return the Cache. (The first step appends the
    last token, whose logits it needs.) To bound memory, at most `tokens` at a time, fewer where attention's
    mask would exceed 2^26 numbers."""
    length = len(prompts[0]) - 1
    cache = model.new_cache(len(prompts), max(length, 1))
    if length:
        ids = torch.tensor(prompts, device=cache.lengths.device)[:, :-1]
        at_once = min(tokens, 2**26 // length) // len(prompts)
        for part in ids.split(max(1, at_once), 1):
            model.model(part, cache=cache)
    return cache

def free_bytes(device):
    """Memory that can be allocated on a GPU; half of RAM for a CPU."""
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

def max_batch_size(model, length):
    """How many sequences of `length` tokens fit into half of the free memory: 1 to 256. The other half is for
    growth, prompts and logits. Few traces grow long; if many do, some are set aside."""
    cache = model.new_cache(1, length, device="meta")
    one = sum(v.nbytes for v in vars(cache).values() if isinstance(v, torch.Tensor))
    return min(256, max(1, free_bytes(next(model.parameters()).device) // 2 // one))

class Sampler:
    """What generate() has under way: a Running or None in each slot of a cache, and what waits for a slot."""
    first_length = 256  # tokens per slot at first, or more for longer prompts; at 7B 1/12 of a slot's states

    def __init__(self, model, prompts, samples, slots, longest, seed, admit, pick):
        self.model = model
        self.prompts = [[int(token) for token in prompt] for prompt in prompts]  # tensors differ as keys
        self.samples = samples
        self.longest = longest  # tokens a slot may have to hold
        self.seed = seed
        self.admit = admit
        self.pick = pick
        self.waiting = dict.fromkeys(range(len(prompts)), 0)  # prompt index: index of its next sample
        self.aside = []  # traces that were set aside, as Running
        self.prefilled = {}  # ids: Cache, of prompts with more samples to come
        prompt = max(map(len, prompts))
        length = min(longest, max(self.first_length, 1 << (prompt - 1).bit_length()))
        slots = min(len(prompts) * samples, slots or max_batch_size(model, length))
        self.slots = [None] * slots
        self.cache = model.new_cache(slots, length)
        self.decode = Decoder(model, self.cache, pick)
        self.tokens = torch.zeros_like(self.cache.lengths)  # what each slot appends next

    def next_job(self):
        """What to start now, or None. Prompts in order, so that few prefilled states exist at a time."""
        if self.aside:
            return self.aside.pop(0)
        for i in list(self.waiting):
            while i in self.waiting:
                sample = self.waiting[i]
                verdict = self.admit(i, sample) if self.admit else "go"
                check(verdict in ("go", "wait", "skip", "done"), f"generate: admit answered {verdict!r}")
                if verdict == "wait":
                    break
                self.waiting[i] += 1
                if verdict == "done" or self.waiting[i] == self.samples:
                    del self.waiting[i]
                if verdict == "go":
                    random = np.random.default_rng([self.seed, i, sample])
                    return Running(Trace(i, sample), self.prompts[i].copy(), random)
            else:  # no further trace of this prompt
                self.prefilled.pop(tuple(self.prompts[i]), None)

    def start(self):
        """Fill free slots -> whether anything runs."""
        free = [slot for slot, running in enumerate(self.slots) if running is None]
        # zip asks for a slot first, so that no trace is taken from next_job without one.
        for slot, running in zip(free, iter(self.next_job, None)):
            ids = tuple(running.ids)  # of its prompt, and of its tokens if it was set aside
            if ids not in self.prefilled:
                self.prefilled[ids] = prefill(self.model, [running.ids])
            self.cache.load(slot, self.prefilled[ids])
            self.tokens[slot] = ids[-1]
            self.slots[slot] = running
            # Only a prompt's next sample will read its states again.
            if running.trace.tokens or running.trace.prompt_index not in self.waiting:
                del self.prefilled[ids]
        if self.waiting and not any(self.slots):
            raise RuntimeError(f"generate: prompt {min(self.waiting)} waits to be admitted, but nothing runs")
        return any(self.slots)

    def fits(self, slots, length):
        return self.cache.bytes_to_grow(len(slots), length) <= free_bytes(self.tokens.device)

    def fit(self):
        """Make room for a token per trace; when few run and none wait, move them to a smaller cache."""
        slots = [slot for slot, running in enumerate(self.slots) if running]
        length = self.cache.k.shape[3]
        if max(len(self.slots[slot].ids) for slot in slots) > length:
            length = min(2 * length, self.longest)
            slots = self.set_aside(length)
        # Otherwise move only at the end, when at least half of the slots are free and none will be needed.
        elif self.waiting or self.aside or 2 * len(slots) > len(self.slots) or not self.fits(slots, length):
            return
        self.decode = None  # gives back its graph's memory
        self.cache.grow(slots, length)
        self.slots = [self.slots[slot] for slot in slots]
        self.tokens = self.tokens[slots]
        self.decode = Decoder(self.model, self.cache, self.pick)

    def set_aside(self, length):
        """Set the youngest traces aside until a cache of this length fits the rest; returns their slots."""
        self.decode = None
        ages = [len(running.trace.tokens) if running else -1 for running in self.slots]
        slots = sorted(range(len(ages)), key=ages.__getitem__, reverse=True)  # oldest first, free ones last
        while slots and not self.fits(slots, length):
            if youngest := self.slots[slots.pop()]:
                self.aside.insert(0, youngest)
        free = free_bytes(self.tokens.device)
        check(slots, f"generate: the cache of a trace of {length} tokens does not fit into {free} free bytes")
        return sorted(slots)

    def step(self):
        """Give every running trace a token -> how many."""
        self.fit()
        self.cache.used = max(len(r.ids) for r in self.slots if r) - 1
        u = [r.random.random() if r else 0 for r in self.slots]
        drawn = self.decode(self.tokens, torch.tensor(u, dtype=torch.float64, pin_memory=self.tokens.is_cuda))
        self.tokens = drawn[:, 0]  # the next step needs no copy from the host
        drawn = drawn.tolist()  # the host's only wait
        for r, (token, logprob, confidence, finite) in zip(self.slots, drawn):
            if r:
                check(finite, "generate: the model's logits are not finite")
                r.ids.append(int(token))
                r.trace.tokens.append(int(token))
                r.trace.logprobs.append(logprob)
                r.trace.confidences.append(confidence)
        return len(self.slots) - self.slots.count(None)

    def finish(self, max_new_tokens, stop_ids, on_token):
        """Generator of the traces that end with this step; they leave their slots."""
        for slot, trace in [(slot, running.trace) for slot, running in enumerate(self.slots) if running]:
            if len(trace.tokens) == max_new_tokens:
                trace.stop = "length"
            if on_token is not None and on_token(trace):
                trace.stop = "deepconf"
            if trace.tokens[-1] in stop_ids:
                trace.stop = "stop"
            if trace.stop:
                self.slots[slot] = None
                yield trace

# 3. Norms ---------------------------------------------------------------------------------------------------

@_jit
def _norm_kernel(y, z, weight, out, eps, s_y, s_z,
                 G: constexpr, WIDTH: constexpr, BLOCK: constexpr, NORM: constexpr, BEFORE: constexpr):
    """One group of one row per program. w RMS(y silu(z)), or w RMS(y) silu(z) if the norm comes BEFORE the
    gate; without NORM, y silu(z); with z None, w RMS(y), cast before the weight as in the published model."""
    _, g, row = _program(1, G)
    i = tl.arange(0, BLOCK)
    d = g * WIDTH + i
    inside = i < WIDTH
    v = tl.load(y + row * s_y + d, mask=inside, other=0.0).to(tl.float32)
    if z is not None:
        gate = tl.load(z + row * s_z + d, mask=inside, other=0.0).to(tl.float32)
        gate *= tl.sigmoid(gate)
        if not BEFORE:
            v *= gate
    if NORM:
        v *= tl.rsqrt(tl.sum(v * v, 0) / WIDTH + eps)
        if z is None:
            v = v.to(out.dtype.element_ty).to(tl.float32)
        v *= tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    if z is not None and BEFORE:
        v *= gate
    tl.store(out + row * G * WIDTH + d, v, mask=inside)

@torch.compiler.disable
def norm_step(y, weight, eps, *, z=None, groups=1, norm_before_gate=False):
    """model.RMSNorm, or with z model.gated_norm: y and z (b, 1, I) -> (b, 1, I) in y's dtype. weight (I,), or
    None: only gate. Raises ValueError where a group has too many channels."""
    width = y.shape[-1] // groups
    check(width <= 16384, f"norm: got {width} channels of a group, expected at most 16384 (one program)")
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    s_z = 0 if z is None else z.stride(0)
    _launch(_norm_kernel, len(y) * groups, y, z, weight, out, eps, y.stride(0), s_z, G=groups,
            WIDTH=width, BLOCK=_power(width), NORM=weight is not None, BEFORE=norm_before_gate,
            num_warps=4 if width <= 2048 else 16)  # at most 32 channels a thread
    return out

# 4. The mixer -----------------------------------------------------------------------------------------------
# The convolution has a kernel of its own. In one kernel with the state, the programs of several heads would
# convolve the B and C of their group, and some would still read the last inputs while another moves them on.

@_jit
def _conv_step_kernel(state, x, weight, bias, y, s_slot, s_channel, s_place, s_x,
                      CHANNELS: constexpr, K: constexpr, BD: constexpr):
    """y = silu(bias + sum_j w_j place_j), where the newest input has the last place. Then each place takes
    over the input of the next. A channel belongs to one thread, which reads a place before it writes it."""
    tile, _, b = _program((CHANNELS + BD - 1) // BD, 1)
    d = tile * BD + tl.arange(0, BD)
    in_d = d < CHANNELS
    place = state + b * s_slot + d * s_channel
    new = tl.load(x + b * s_x + d, mask=in_d, other=0.0)
    z = tl.zeros((BD,), tl.float32)
    if bias is not None:
        z += tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)
    for j in tl.static_range(K - 1):
        old = tl.load(place + j * s_place, mask=in_d, other=0.0)
        z += tl.load(weight + d * K + j, mask=in_d, other=0.0).to(tl.float32) * old.to(tl.float32)
        if j > 0:
            tl.store(place + (j - 1) * s_place, old, mask=in_d)
    z += tl.load(weight + d * K + K - 1, mask=in_d, other=0.0).to(tl.float32) * new.to(tl.float32)
    if K > 1:
        tl.store(place + (K - 2) * s_place, new, mask=in_d)
    tl.store(y + b * CHANNELS + d, z * tl.sigmoid(z), mask=in_d)

@_jit
def _step_kernel(state, x, dt, A_log, B, C, D, dt_bias, y, low, high, s_state, s_x, s_dt, s_b, s_c,
                 H: constexpr, G: constexpr, P: constexpr, N: constexpr, BP: constexpr, BN: constexpr):
    """S <- exp(dt A) S + dt x B^T in place, y = S C + D x, BP rows of one state per program. dt is
    softplus(dt + dt_bias), clamped to [low, high], and rounded where torch rounds, as the trainer's is."""
    tile, h, b = _program((P + BP - 1) // BP, H)
    group = h // (H // G) * N
    p, in_p = _range(tile * BP, BP, P)
    n, in_n = _range(0, BN, N)
    # The state is what takes the time, 128 KB per head at 7B: ask for it first.
    place = state + b * s_state + h * P * N + p[:, None] * N + n[None, :]
    inside = in_p[:, None] & in_n[None, :]
    S = tl.load(place, mask=inside, other=0.0)
    xp = tl.load(x + b * s_x + h * P + p, mask=in_p, other=0.0).to(tl.float32)
    Bn = tl.load(B + b * s_b + group + n, mask=in_n, other=0.0).to(tl.float32)
    Cn = tl.load(C + b * s_c + group + n, mask=in_n, other=0.0).to(tl.float32)

    # softplus(v) = max(v, 0) + log(1 + u), u = exp(-|v|). 1 + u rounds away digits of a small u, and
    # log(w) u / (w - 1) restores them.
    DTYPE: constexpr = dt.dtype.element_ty
    v = tl.load(dt + b * s_dt + h).to(tl.float32) + tl.load(dt_bias + h).to(tl.float32)
    v = v.to(DTYPE).to(tl.float32)
    u = tl.exp(-tl.abs(v))
    log1p = tl.where(1 + u == 1, u, tl.log(1 + u) * u / tl.where(1 + u == 1, 1.0, (1 + u) - 1))
    softplus = (tl.maximum(v, 0.0) + log1p).to(DTYPE).to(tl.float32)
    delta = tl.minimum(tl.maximum(softplus, low), high)
    a = -tl.exp(tl.load(A_log + h).to(tl.float32))
    S = S * tl.exp(delta * a) + (delta * xp)[:, None] * Bn[None, :]
    tl.store(place, S, mask=inside)
    skip = tl.load(D + h).to(tl.float32) * xp
    tl.store(y + (b * H + h) * P + p, tl.sum(S * Cn[None, :], 1) + skip, mask=in_p)

@torch.compiler.disable
def mamba_step(conv, state, xBC, dt, weight, bias, dt_bias, A_log, D, limit):
    """One token of the mixer: `causal_conv1d_step` with silu, then `ssd_step`. Both states change in place.
    conv (b, d, k - 1); state (b, h, p, n) float32; xBC (b, d), the channels of x, B and C; dt (b, h); weight
    (d, k); bias (d,) or None; dt_bias, A_log, D (h,). The step size is softplus(dt + dt_bias), clamped to
    limit, a pair. Returns y (b, h, p). Raises ValueError, naming the argument, for shapes that do not fit."""
    b, h, p, n = state.shape
    d, k = weight.shape
    g = (d - h * p) // (2 * n)
    check(g >= 1 and d == h * p + 2 * g * n and h % g == 0,
          f"xBC: got {d} channels, expected h p + 2 g n for h, p, n = {h, p, n} and a g that divides h")
    check(n <= 512, f"state: got {n} columns, expected at most 512, what the registers of one program hold")
    check(tuple(dt.shape) == (b, h) and dt[0].is_contiguous(),
          f"dt: got {tuple(dt.shape)}, expected {b, h}, each token's heads contiguous")
    check(state.dtype == torch.float32 and state[0].is_contiguous(),
          f"state: got {state.dtype}, expected float32, each slot contiguous")
    _check_conv(xBC, weight, bias, "silu", conv, b)
    convolved = torch.empty(b, d, dtype=xBC.dtype, device=xBC.device)
    _launch(_conv_step_kernel, triton.cdiv(d, 128) * b, conv, xBC, weight, bias, convolved,
            *conv.stride(), xBC.stride(0), CHANNELS=d, K=k, BD=128, num_warps=4)  # a channel per thread
    x, B, C = convolved.split([h * p, g * n, g * n], 1)  # heads and groups are counted in the kernel
    y = torch.empty(b, h, p, dtype=xBC.dtype, device=xBC.device)
    strides = (v.stride(0) for v in (state, x, dt, B, C))
    _launch(_step_kernel, triton.cdiv(p, 16) * h * b, state, x, dt, A_log, B, C, D, dt_bias, y, *limit,
            *strides, H=h, G=g, P=p, N=n, BP=16, BN=_power(n), num_warps=4)
    return y

# 5. Attention -----------------------------------------------------------------------------------------------
# A slot's one query reads all its keys. That needs the bandwidth of every multiprocessor, and a single slot
# has too few heads to occupy them, so the keys are split ("flash-decoding"). A program takes keys i span to
# (i + 1) span of one slot and key head, and all query heads that share them, with a running maximum as in
# FlashAttention. A second kernel adds up the parts of a head, each with its share of the softmax's sum:
#
#     s_j = q . k_j / sqrt(hd)    lse_i = log sum_j e^(s_j)   part_i = sum_j e^(s_j - lse_i) v_j  j in split i
#     y = sum_i e^(lse_i) part_i / sum_i e^(lse_i)
#
# in powers of 2, which the hardware has. Every split that the cache has room for gets a program, and those
# beyond a slot's length return at once: the grid changes only when the cache grows.

@_jit
def _rotated(x, cos, sin, d, mask, HD: constexpr):
    """RoPE, as model.rotate: channel d turns together with the one half a head away."""
    own = tl.load(x + d, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(x + (d + HD // 2) % HD, mask=mask, other=0.0).to(tl.float32)
    return own * cos + other * sin

@_jit
def _attend_kernel(q, k, v, cos, sin, lengths, keys, values, part, lse, multiplier, scale, room, splits, span,
                   HKV: constexpr, ROWS: constexpr, HD: constexpr,
                   BR: constexpr, BD: constexpr, BN: constexpr):
    """One split of one slot and key head, for the ROWS query heads that share it. The split of the new key
    appends it, and starts from it: no program reads what is written here."""
    split, head, slot = _program(splits, HKV)
    held = tl.minimum(tl.load(lengths + slot), room).to(tl.int32)  # tokens in the cache, without the new one
    if split * span > held:
        return
    r, d, n = tl.arange(0, BR), tl.arange(0, BD), tl.arange(0, BN)
    in_d = d < HD
    in_q = (r < ROWS)[:, None] & in_d[None, :]
    own_head = slot * HKV + head
    first = own_head * room

    # The new token. Query heads that share a key head are neighbours.
    c = tl.load(cos + slot * HD + d, mask=in_d, other=0.0).to(tl.float32)
    s = tl.load(sin + slot * HD + d, mask=in_d, other=0.0).to(tl.float32)
    queries = q + (own_head * ROWS + r)[:, None] * HD
    Q = _rotated(queries, c[None, :], s[None, :], d[None, :], in_q, HD).to(keys.dtype.element_ty)  # (BR, BD)
    new_k = (_rotated(k + own_head * HD, c, s, d, in_d, HD) * multiplier).to(keys.dtype.element_ty)  # (BD,)
    new_v = tl.load(v + own_head * HD + d, mask=in_d, other=0.0).to(values.dtype.element_ty)
    newest = held // span == split
    append = in_d & newest & (held < room)  # a full slot keeps what it has
    tl.store(keys + (first + held) * HD + d, new_k, mask=append)
    tl.store(values + (first + held) * HD + d, new_v, mask=append)

    # m is the largest score so far, total = sum_j 2^(s_j - m), acc = sum_j 2^(s_j - m) v_j.
    # K (BD, BN), V (BN, BD), S and P (BR, BN).
    score = tl.sum(Q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale
    m = tl.where(newest, score, float("-inf"))
    total = tl.where(newest, 1.0, 0.0) + tl.zeros((BR,), tl.float32)
    acc = tl.where(newest, new_v.to(tl.float32), 0.0)[None, :] + tl.zeros((BR, BD), tl.float32)
    for n0 in range(split * span, tl.minimum(split * span + span, held), BN):
        inside = n0 + n < held
        place = (first + n0 + n) * HD
        K = tl.load(keys + place[None, :] + d[:, None], mask=inside[None, :] & in_d[:, None], other=0.0)
        V = tl.load(values + place[:, None] + d[None, :], mask=inside[:, None] & in_d[None, :], other=0.0)
        S = tl.where(inside[None, :], tl.dot(Q, K, input_precision="ieee") * scale, float("-inf"))
        top = tl.maximum(m, tl.max(S, 1))
        P, fade = tl.exp2(S - top[:, None]), tl.exp2(m - top)
        acc = tl.dot(P.to(V.dtype), V, acc * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(P, 1)
        m = top
    row = (own_head * ROWS + r) * splits + split  # (BR,)
    tl.store(lse + row, m + tl.log2(total), mask=r < ROWS)
    tl.store(part + row[:, None] * HD + d[None, :], acc / total[:, None], mask=in_q)

@_jit
def _combine_kernel(part, lse, lengths, y, room, splits, span,
                    HQ: constexpr, HD: constexpr, BS: constexpr, BD: constexpr):
    """BD channels of one slot and query head: its splits that hold something, BS at a time."""
    tile, head, slot = _program((HD + BD - 1) // BD, HQ)
    used = tl.minimum(tl.minimum(tl.load(lengths + slot), room).to(tl.int32) // span + 1, splits)
    i, d = tl.arange(0, BS), tile * BD + tl.arange(0, BD)
    own_head = slot * HQ + head
    m = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((BD,), tl.float32)
    for i0 in range(0, used, BS):
        inside = i0 + i < used
        place = own_head * splits + i0 + i
        e = tl.load(lse + place, mask=inside, other=float("-inf"))
        mask = inside[:, None] & (d < HD)[None, :]
        v = tl.load(part + place[:, None] * HD + d[None, :], mask=mask, other=0.0)  # (BS, BD)
        top = tl.maximum(m, tl.max(e, 0))
        weight, fade = tl.exp2(e - top), tl.exp2(m - top)
        acc = acc * fade + tl.sum(weight[:, None] * v, 0)
        total = total * fade + tl.sum(weight, 0)
        m = top
    tl.store(y + own_head * HD + d, acc / total, mask=d < HD)

def span_of(length, heads):
    """How many keys a split takes, for a cache of `length` and `heads` pairs of slot and key head: a power of
    two that makes 512 to 1,024 programs, 4 to 8 for each of an H100's 132 multiprocessors. But at least 128:
    with 6 queries a key, as in 7B, writing and reading the parts is then 9% of what keys and values take. And
    at most 1024, where it is 1%: more would make all slots wait for a few long ones."""
    return 1 << max(7, min(10, (length * heads // 512).bit_length() - 1))

@torch.compiler.disable
def attend_step(q, k, v, cos, sin, lengths, keys, values, *, key_multiplier=1.0):
    """Append a token to every slot, then attend to all that the slot holds -> (slots, 1, hq, hd).
    q (slots, 1, hq, hd), k and v (slots, 1, hkv, hd), before RoPE; cos and sin (slots, 1, 1, hd) of
    model.rope_table; lengths (slots,) int64, tokens held so far, not changed; keys and values (slots, hkv,
    length, hd), changed in place. A full slot appends nothing. Raises ValueError for heads too large."""
    slots, _, hq, hd = q.shape
    hkv, length = keys.shape[1:3]
    check(hd <= 256, f"head_dim: got {hd}, expected at most 256, what the registers of one program hold")
    check(hq // hkv <= 16, f"query heads per key head: got {hq // hkv}, expected at most 16, one tile's rows")
    check(keys.is_contiguous() and values.is_contiguous(), "cache: got keys or values with gaps")
    q, k, v, cos, sin = (x.contiguous() for x in (q, k, v, cos, sin))
    span = span_of(length, slots * hkv)
    bd = _power(hd)
    splits = triton.cdiv(length, span)
    part = torch.empty(slots, hq, splits, hd, dtype=torch.float32, device=q.device)
    lse = torch.empty(slots, hq, splits, dtype=torch.float32, device=q.device)
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scale = hd**-0.5 * math.log2(math.e)  # scores are exponents of 2
    # A tile has 16 KB of keys and 16 KB of values: an H100's multiprocessor has room for five programs.
    bn = min(64, max(16, 16384 // (bd * keys.element_size())))
    _launch(_attend_kernel, slots * hkv * splits, q, k, v, cos, sin, lengths, keys, values, part, lse,
            key_multiplier, scale, length, splits, span,
            HKV=hkv, ROWS=hq // hkv, HD=hd, BR=16, BD=bd, BN=bn, num_warps=4, num_stages=2)
    # All splits of up to 16k tokens at once, and 32 channels: a lone slot has few heads for many processors.
    _launch(_combine_kernel, triton.cdiv(hd, 32) * hq * slots, part, lse, lengths, y, length, splits, span,
            HQ=hq, HD=hd, BS=min(128, _power(splits)), BD=32, num_warps=4)
    return y

# 6. Drawing the next token, on any device -------------------------------------------------------------------

def invert(weights, u):
    """Weights (b, n), u (b, 1) -> the first index (b, 1) whose running sum exceeds u of the whole; all sums.
    They are float64: float32 sums of 100,000 weights would favour some tokens."""
    cdf = weights.cumsum(-1, dtype=torch.float64)
    index = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)
    return index.clamp_(max=cdf.shape[-1] - 1), cdf  # nan would lead past the end

def draw(logits, u, temperature, top_p, top=20):
    """logits (b, vocab), u (b,) uniform -> tokens, their log-probabilities and confidences, each (b,).

    Tokens come from softmax(logits / temperature), cut to the smallest set of probability >= top_p and
    renormalised, by inverting its cumulative distribution at u. Temperature 0 takes the most likely token,
    and gives its log-probability at 1. Confidence: -mean log P over the `top` most likely tokens of the
    untempered, uncut distribution (DeepConf, equation 2)."""
    vocab = logits.shape[-1]
    logp = logits.log_softmax(-1, dtype=torch.float32)
    confidence = -logp.topk(min(top, vocab), -1).values.mean(-1)
    if temperature == 0:
        best = logp.max(-1)
        return best.indices, best.values, confidence
    probs = logp.div_(temperature).softmax(-1)  # softmax undoes what log_softmax subtracted
    del logp  # (256, 130048) float32 are 133 MB: two of them at a time, five where top_p sorts
    if top_p < 1:
        ranked, order = probs.sort(-1, descending=True)
        outside = ranked.cumsum(-1).sub_(ranked) >= top_p  # the most likely token is never outside
        probs.scatter_(-1, order, ranked.masked_fill_(outside, 0))
    total = probs.sum(-1, keepdim=True)
    first = 0  # token of the block that is searched
    u = u.clamp(max=1 - 2**-52)[:, None]  # u times the whole stays below it: the last weights may be 0
    if vocab > 2048:
        # Float64 sums over all tokens take too much memory. So find the block of 256 tokens in which they
        # pass u, then the token in it. Where 256 does not divide the vocabulary, blocks are smaller.
        blocks = probs.unflatten(-1, (-1, math.gcd(vocab, 256)))  # (b, blocks, 256)
        sums = blocks.sum(-1)
        block, cdf = invert(sums, u)
        left = (cdf.gather(-1, block) - u * cdf[:, -1:]) / sums.gather(-1, block)  # of the block, behind u
        u = (1 - left).clamp(0, 1 - 2**-52)
        probs = blocks[torch.arange(len(block), device=block.device), block[:, 0]]
        first = block * blocks.shape[-1]
    index, _ = invert(probs, u)
    return (first + index)[:, 0], (probs.gather(-1, index) / total).log()[:, 0], confidence

# 7. The recorded step ---------------------------------------------------------------------------------------

class Decoder:
    """step(tokens (slots,), u) -> finish(logits (slots, vocab), u), or the logits: every slot of `cache`
    appends a token. The caller sets cache.used. The next step may overwrite the result.

    On a GPU a step is some thousand launches, which take the host longer than the device. So the first step
    runs as usual (Triton compiles there), the second is recorded as a CUDA graph and replayed from then on.
    It serves until the cache grows: tokens, u and lengths are read where they are on the device."""
    recorded_on = "cuda"

    def __init__(self, model, cache, finish=lambda logits, u: logits):
        self.model = model
        self.cache = cache
        self.finish = finish
        self.tokens = cache.lengths.clone()
        self.u = cache.lengths.double()
        self.graph = None
        self.result = None  # of the last step

    def run(self):
        last = self.cache.k.shape[3] - 1
        self.cache.lengths.clamp_(max=last)  # idle slots go on decoding nonsense, inside the cache
        if self.tokens.is_cuda:  # without Triton, a graph attends to all there is room for
            self.cache.used = last
        return self.finish(self.model(self.tokens[:, None], cache=self.cache)[:, 0], self.u)

    def record(self):
        """Record run() as a graph. thread_local: a thread that writes a checkpoint may synchronise."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # records, and runs nothing
            self.result = self.run()

    def __call__(self, tokens, u=None):
        self.tokens.copy_(tokens)  # before the replay overwrites them: they may be part of the last result
        if u is not None:
            self.u.copy_(u, non_blocking=True)
        if self.result is None or self.u.device.type != self.recorded_on:
            self.result = self.run()
        else:
            if self.graph is None:
                self.record()
            self.graph.replay()
        return self.result
