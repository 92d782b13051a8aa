"""The sampler: one for RL rollouts, evaluation, DeepConf and chat.

    traces = generate(model, [prompt_ids, ...], max_new_tokens=256, samples=16, stop_ids=[0])

Many traces decode together, each in a slot of one cache (model.Cache). One step of all slots:

    start     free slots take the next traces, and the states of their prompts, which were prefilled once
    fit       the cache doubles when the longest trace has filled it; where that does not fit into memory,
              the youngest traces are set aside, and go on later from prompt and tokens
    step      Decoder appends a token to every slot and draws the next: on a GPU one CUDA graph, then one read
    finish    traces that have ended leave their slots

To copy this file, also take model.py and ssm_scan.py.
"""

import math
import os
import re
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import Cache, check


@dataclass
class Trace:
    """One sample. The stop token, where one was sampled, is part of it."""
    prompt_index: int
    sample_index: int
    tokens: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)  # of each token under the distribution it was drawn from
    confidences: list = field(default_factory=list)  # DeepConf's token confidence, see `draw`
    stop: str = ""  # "stop" | "length" | "deepconf" (the callback said so)


# ------------------------------------------------------------------------------------------------------------
# 1. Drawing a token


def invert(weights, u):
    """Weights (b, n), u (b, 1) -> the first index (b, 1) whose running sum exceeds u of the whole; all sums.

    They are float64: float32 sums of a hundred thousand weights would favour some tokens."""
    cdf = weights.cumsum(-1, dtype=torch.float64)
    index = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)
    return index.clamp_(max=cdf.shape[-1] - 1), cdf  # nan would lead past the end


def draw(logits, u, temperature, top_p, top=20):
    """One token a row. logits (b, vocab), u (b,) uniform -> tokens (b,), their log-probabilities (b,),
    confidences (b,).

    Tokens come from softmax(logits / temperature), cut to the smallest set of probability >= top_p and
    renormalised, by inverting its cumulative distribution at u. Temperature 0 takes the most likely token,
    and gives its log-probability at 1. Confidence: -mean log P over the `top` most likely tokens of the
    untempered, uncut distribution (DeepConf, equation 2)."""
    logp, vocab = logits.log_softmax(-1, dtype=torch.float32), logits.shape[-1]
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
    total, first = probs.sum(-1, keepdim=True), 0
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


# ------------------------------------------------------------------------------------------------------------
# 2. Prefill, memory, decoding


@torch.no_grad()
def prefill(model, prompts, tokens=4096):
    """A Cache that has read prompts of one length, but for their last tokens.

    Memory is bounded: at most `tokens` are read at a time, fewer where attention's mask would hold more than
    2^26 numbers."""
    p, length = next(model.parameters()), len(prompts[0]) - 1
    cache = Cache(model.config, len(prompts), max(length, 1), dtype=p.dtype, device=p.device)
    ids = torch.tensor(prompts, device=p.device)[:, :-1]
    at_once = max(1, min(tokens, 2**26 // max(length, 1)) // len(prompts))
    for part in ids.split(at_once, 1) if length else ():
        model.model(part, cache=cache)
    return cache


def free_bytes(device):
    """What can be allocated; on a CPU without swapping, or half of all where the kernel does not tell."""
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    match = re.search(r"MemAvailable: *(\d+)", meminfo.read_text()) if meminfo.exists() else None
    return int(match[1]) * 1024 if match else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def slots_that_fit(config, length, dtype, device):
    """How many sequences decode together: at most 256, at least one, with a cache of `length` tokens in half
    of the free memory.

    `length` is what they begin with. Few grow long, and where too many do, Sampler.fit sets some aside. The
    other half is for growth, shared prompts, logits and what else a step needs."""
    cache = Cache(config, 1, length, dtype=dtype, device="meta")
    one = sum(v.nbytes for v in vars(cache).values() if isinstance(v, torch.Tensor))
    return min(256, max(1, free_bytes(device) // 2 // one))


class Decoder:
    """step(tokens (slots,), u) -> finish(logits (slots, vocab), u), or the logits: every slot of `cache`
    appends a token. The caller sets cache.used.

    On a GPU a step is some thousand launches, which take the host longer than the device. So the first step
    runs as usual (Triton compiles there), the second is recorded as a CUDA graph, and all after it are
    replayed. One graph serves a cache until that grows: it reads tokens, u and the sequences' lengths where
    they are on the device."""
    recorded_on = "cuda"

    def __init__(self, model, cache, finish=lambda logits, u: logits):
        self.model, self.cache, self.finish, self.calls, self.graph = model, cache, finish, 0, None
        self.tokens, self.u = cache.lengths.clone(), cache.lengths.double()

    def run(self):
        last = self.cache.k.shape[3] - 1
        self.cache.lengths.clamp_(max=last)  # idle slots go on decoding nonsense, inside the cache
        if self.tokens.is_cuda:
            self.cache.used = last
        return self.finish(self.model(self.tokens[:, None], cache=self.cache)[:, 0], self.u)

    def record(self):
        """Record run() as a graph. thread_local: a thread that writes a checkpoint may synchronise."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # records, and runs nothing
            self.result = self.run()

    def __call__(self, tokens, u=None):
        self.tokens.copy_(tokens)
        if u is not None:
            self.u.copy_(u, non_blocking=True)
        self.calls += 1
        if self.calls == 1 or self.u.device.type != self.recorded_on:
            return self.run()
        if self.graph is None:
            self.record()
        self.graph.replay()
        return self.result


# ------------------------------------------------------------------------------------------------------------
# 3. Sampling


def draw_packed(logits, u, temperature, top_p):
    """(4, slots) float64, one read for the host: what `draw` gives, and whether the logits are finite."""
    drawn = draw(logits, u, temperature, top_p)
    return torch.stack([v.double() for v in (*drawn, logits.isfinite().all(-1))])


@dataclass(eq=False)
class Running:
    """A trace in a slot, or set aside: all it needs to go on, in any slot and at any time."""
    trace: Trace
    ids: list  # of its prompt and of its tokens
    random: np.random.Generator
    aside: bool = False  # it was set aside: no other trace shares what it must read


class Sampler:
    """What generate() has under way: slots over one cache, each a Running or None, and what waits for a slot.

    The cache begins at first_length tokens per slot, or more if prompts are longer, and doubles when the
    longest trace has filled it."""
    first_length = 256  # at 7B a twelfth of a slot's states

    def __init__(self, model, prompts, samples, slots, longest, seed, admit, finish):
        self.model, self.prompts, self.samples, self.longest = model, prompts, samples, longest
        self.seed, self.admit, self.finish_step = seed, admit, finish
        self.waiting = dict.fromkeys(range(len(prompts)), 0)  # prompts with the index of their next sample
        self.aside, self.prefilled, self.total = [], {}, len(prompts) * samples
        p, prompt = next(model.parameters()), max(map(len, prompts))
        length = min(longest, max(self.first_length, 1 << (prompt - 1).bit_length()))
        slots = min(slots or slots_that_fit(model.config, length, p.dtype, p.device), self.total)
        self.slots = [None] * slots
        self.cache = Cache(model.config, slots, length, dtype=p.dtype, device=p.device)
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
            ids = tuple(r.ids)
            if ids not in self.prefilled:
                self.read(other.ids for _, other in jobs[n:] if len(other.ids) == len(ids))
            self.cache.load(slot, *self.prefilled[ids])
            if r.aside or r.trace.sample_index == self.samples - 1:
                del self.prefilled[ids]
            self.slots[slot], self.tokens[slot] = r, ids[-1]
        if self.waiting and not any(self.slots):
            first = min(self.waiting)
            raise RuntimeError(f"generate: prompt {first} waits to be admitted and nothing is running")
        return any(self.slots)

    def read(self, prompts):
        """Prefill the first of some prompts of one length, and others with it: up to 16k tokens, in half of
        the free memory."""
        new = [ids for ids in dict.fromkeys(map(tuple, prompts)) if ids not in self.prefilled]
        p, length = next(self.model.parameters()), len(new[0])
        most = min(16384 // length, slots_that_fit(self.model.config, length, p.dtype, p.device))
        new = new[: max(1, most)]
        cache = prefill(self.model, new)
        self.prefilled.update((ids, (cache, row)) for row, ids in enumerate(new))

    def fits(self, slots, length):
        return self.cache.bytes_to_grow(slots, length) <= free_bytes(self.tokens.device)

    def fit(self):
        """Make room in the cache for a token of each trace; the last traces decode faster in fewer slots."""
        busy, length = [slot for slot, r in enumerate(self.slots) if r], self.cache.k.shape[3]
        if max(len(r.ids) for r in self.slots if r) > length:
            self.grow(min(2 * length, self.longest))
        elif not self.waiting and not self.aside and 2 * len(busy) <= len(self.slots):
            if self.fits(len(busy), length):
                self.resize(busy, length)

    def grow(self, length):
        """Where the longer cache does not fit beside the old one, the youngest traces are set aside until it
        does. When a slot is free, their prompts and tokens are read again."""
        ages = [len(r.trace.tokens) if r else -1 for r in self.slots]
        slots = sorted(range(len(ages)), key=ages.__getitem__, reverse=True)
        self.decode = None  # gives back its graph's memory
        while slots and not self.fits(len(slots), length):
            if youngest := self.slots[slots.pop()]:
                youngest.aside = True
                self.aside.insert(0, youngest)
        check(slots, f"generate: the cache of one trace of {length} tokens does not fit into "
              f"{free_bytes(self.tokens.device)} free bytes")
        self.resize(sorted(slots), length)

    def resize(self, slots, length):
        self.decode = None
        self.cache.grow(slots, length)
        self.slots, self.tokens = [self.slots[slot] for slot in slots], self.tokens[slots]
        self.decode = Decoder(self.model, self.cache, self.finish_step)

    def step(self):
        """Give every running trace a token -> how many."""
        self.fit()
        self.cache.used = max(len(r.ids) for r in self.slots if r) - 1
        u = [r.random.random() if r else 0 for r in self.slots]
        u = torch.tensor(u, dtype=torch.float64, pin_memory=self.tokens.is_cuda)
        drawn = self.decode(self.tokens, u)
        self.tokens = drawn[0]  # the next step needs no copy from the host
        *values, finite = drawn.tolist()  # the only time in a step that the host waits
        check(all(finite), "generate: the model's logits are not finite")
        for r, token, logprob, confidence in zip(self.slots, *values):
            if r:
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
    """Sample `samples` traces of each prompt (a list of lists of token ids) -> list of Trace, by prompt, then
    by sample.

    A number of `slots` decodes together; a slot whose trace has ended takes the next one at once. A trace
    depends on weights, prompt, settings, seed and its own two indices. What else is in the batch changes its
    numbers by rounding only, and so does being set aside where memory is short. admit(prompt_index,
    sample_index) -> "go" | "wait" | "done" is asked, in sample order, before a trace is started; "done" means
    no further trace of that prompt. slots None or 0: as many as fit into free memory. on_token(trace) -> True
    stops a trace; on_trace(trace) sees every ended one. temperature 0 is greedy. progress shows a bar with
    tokens/s. Raises ValueError for an empty prompt, ids out of range, more tokens than positions, a trace
    that does not fit into memory, or logits that are not finite; RuntimeError where admit lets nothing go
    on."""
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
    finish = partial(draw_packed, temperature=temperature, top_p=top_p)
    sampler = Sampler(model, prompts, samples, slots, longest, seed, admit, finish)
    bar = tqdm(total=sampler.total, disable=not progress, desc="sampling", unit="trace", mininterval=0.5,
               miniters=0)
    begun, produced, ended = time.time(), 0, []
    while sampler.start():
        produced += sampler.step()
        for trace in sampler.finish(max_new_tokens, stop_ids, on_token):
            ended.append(trace)
            bar.update()
            if on_trace is not None:
                on_trace(trace)
        bar.total = sampler.total
        bar.set_postfix_str(f"{produced / (time.time() - begun):,.0f} tokens/s", refresh=False)
        bar.update(0)  # shows it, at most twice a second
    bar.close()
    return sorted(ended, key=lambda t: (t.prompt_index, t.sample_index))
