"""The sampler; the kernels for one token against torch's and the forward pass, on caches of NaN; drawing."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import decode
import model as m
import ssm_scan as s
from decode import Running, Sampler, Trace, draw, generate, prefill
from model import PRESETS, Cache, FalconH1
from tests import test_ssm_scan
from tests.bench import peak_bytes
from tests.test_model import SMALL, assert_close, build

DEVICE = test_ssm_scan.DEVICE
interpreter = test_ssm_scan.interpreter

@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield

# 1. The sampler ---------------------------------------------------------------------------------------------

PROMPTS = [[1, 2], [3, 4, 5, 6, 7], [8], [9] * 7]

def which(trace):
    return trace.prompt_index, trace.sample_index

def assert_same_traces(some, others):
    for a, b in zip(some, others, strict=True):
        assert (which(a), a.stop, a.tokens) == (which(b), b.stop, b.tokens)
        assert a.logprobs + a.confidences == pytest.approx(b.logprobs + b.confidences, abs=1e-4)

def test_greedy_generation_with_prompts_of_many_lengths():
    model = build()
    for prompt, trace in zip(PROMPTS, generate(model, PROMPTS, max_new_tokens=12, temperature=0, slots=3)):
        ids = list(prompt)
        for token in trace.tokens:
            assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
            ids.append(token)
        assert (trace.stop, len(trace.tokens)) == ("length", 12)

def test_a_trace_depends_on_seed_and_indices_alone():
    """Not on its neighbours, nor on when it starts."""
    model, kind = build(), dict(max_new_tokens=15, samples=3, stop_ids=[0, 1, 2])
    asked = set()

    def late(i, j):  # each trace waits once
        return "go" if i == 0 or (i, j) in asked else asked.add((i, j)) or "wait"
    alone = generate(model, PROMPTS, seed=7, slots=1, **kind)
    assert_same_traces(alone, generate(model, PROMPTS, seed=7, slots=5, **kind))
    assert_same_traces(alone, generate(model, PROMPTS, seed=7, slots=4, admit=late, **kind))
    tokens = [t.tokens for t in alone]
    assert tokens != [t.tokens for t in generate(model, PROMPTS, seed=8, **kind)]
    assert len({tuple(t) for t in tokens[:3]}) > 1 and {t.stop for t in alone} == {"stop", "length"}

def test_log_probabilities_are_those_of_training():
    model = build()
    trace, = generate(model, [[3, 1, 4]], max_new_tokens=20, seed=1, temperature=0.8)
    ids = torch.tensor([[3, 1, 4, *trace.tokens]])
    logprobs, _ = model(ids[:, :-1], targets=ids[:, 1:], temperature=0.8)
    assert trace.logprobs == pytest.approx(logprobs[0, 2:].tolist(), abs=1e-4)

def test_prompts_are_prefilled_together_and_in_parts():
    model, prompts = build(), [[(i * j) % 36 for j in range(50)] for i in (1, 5, 7)]
    together, parts, *alone = (prefill(model, prompts), prefill(model, prompts, tokens=30),
                               *(prefill(model, [prompt]) for prompt in prompts))
    for name in ("k", "v", "conv", "ssm"):
        expected = torch.cat([getattr(cache, name) for cache in alone], 1)
        assert_close(getattr(together, name), expected)
        assert_close(getattr(parts, name), expected)

@pytest.fixture
def sizes(monkeypatch):
    """(slots, length) of a cache that begins with 8 tokens, each time that it is made anew."""
    seen, grow = [], m.Cache.grow
    monkeypatch.setattr(Sampler, "first_length", 8)
    monkeypatch.setattr(m.Cache, "grow", lambda self, slots, length: (
        seen.append((len(slots), length)), grow(self, slots, length)))
    return seen

@pytest.mark.parametrize("mixers", ["both", "attention", "mamba"])
def test_the_cache_grows_with_the_longest_trace(sizes, monkeypatch, mixers):
    model = build(replace(SMALL, mixers=mixers))
    kind = dict(max_new_tokens=40, samples=2, seed=3, stop_ids=[0, 1])
    traces = [generate(model, PROMPTS, slots=slots, **kind) for slots in (3, 8)]
    assert {length for _, length in sizes} == {16, 32, 7 + 40 - 1}  # no step appends the last token
    monkeypatch.setattr(Sampler, "first_length", 64)
    for some in traces:
        assert_same_traces(some, generate(model, PROMPTS, slots=7, **kind))

def test_where_memory_is_short_the_youngest_traces_wait(sizes, monkeypatch):
    """Six slots of 192 bytes a token and 2,272 of states, and memory for 16 more tokens of each. Two times 32
    fit, one time 64. Every trace is admitted once, in order, and shown each token once."""
    model, kind = build(), dict(max_new_tokens=60, samples=3, seed=3, stop_ids=[0, 1], slots=6)

    def run():
        admitted, shown = [], []

        def admit(*job):
            admitted.append(job)
            return "done" if job == (2, 2) else "go"

        def on_token(t):
            shown.append((*which(t), len(t.tokens)))
            return (t.prompt_index, len(t.tokens)) == (1, 30)
        traces = generate(model, PROMPTS, admit=admit, on_token=on_token, **kind)
        assert admitted == [(i, j) for i in range(4) for j in range(3)] and len(traces) == 11
        assert sorted(shown) == [(*which(t), n + 1) for t in traces for n in range(len(t.tokens))]
        return traces
    expected = run()
    assert {t.stop for t in expected} == {"stop", "deepconf"}
    sizes.clear()
    grown, read = m.Cache(SMALL, 6, 8).bytes_to_grow, []
    assert grown(6, 16) == 6 * 16 * 192 and grown(2, 32) == 2 * (32 * 192 + 2272)
    monkeypatch.setattr(decode, "free_bytes", lambda device: 6 * 16 * 192)
    monkeypatch.setattr(decode, "prefill", lambda *a: read.extend(map(list, a[1])) or prefill(*a))
    assert_same_traces(run(), expected)
    assert sizes == [(6, 16), (2, 32), (1, 64)]
    assert any(ids not in PROMPTS for ids in read)  # some were read again in their middle
    monkeypatch.setattr(decode, "free_bytes", lambda device: 16 * 192 - 1)
    with pytest.raises(ValueError, match="a trace of 16 tokens does not fit into 3071 free bytes"):
        generate(model, [[1]], max_new_tokens=40)

@pytest.mark.parametrize(("mixers", "one"), [
    ("both", 16 * 192 + 2272 + 8), ("attention", 16 * 192 + 8), ("mamba", 2272 + 8)])
def test_as_many_slots_as_fit(monkeypatch, mixers, one):
    """One of 16 tokens has 192 bytes a token and 2,272 of states; and 8 of its length."""
    model = build(replace(SMALL, mixers=mixers))
    for free, slots in ((0, 1), (2 * one, 1), (20 * one - 1, 9), (20 * one, 10), (2**40, 256)):
        monkeypatch.setattr(decode, "free_bytes", lambda device: free)
        assert decode.max_batch_size(model, 16) == slots

class Launches(TorchDispatchMode):
    """Counts what would launch a kernel on a GPU, and refuses what would wait for one."""
    SILENT = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"}
    WAIT = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}
    count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f._schema.name.split("::")[1]
        assert name not in self.WAIT, f"{name} waits for the GPU"
        self.count += not (f.is_view or f.namespace == "prim" or name in self.SILENT)
        return f(*args, **(kwargs or {}))

def test_a_step_reads_once_and_is_recorded_once_per_size(sizes, monkeypatch):
    """A recorder that only pretends replaces CUDA's."""
    model, recorded, steps, lists = build(), [], [], []
    step, forward, tolist = Sampler.step, FalconH1.forward, torch.Tensor.tolist
    kind = dict(max_new_tokens=40, samples=3, seed=3, slots=6, stop_ids=[0, 1])
    expected = generate(model, PROMPTS, **kind)

    def record(self):
        recorded.append((len(self.tokens), self.cache.k.shape[3]))
        self.graph = SimpleNamespace(replay=lambda: self.result.copy_(self.run()))  # in place

    def watched(self):
        with Launches():
            steps.append(step(self))
        return steps[-1]

    def unwatched(*args, **kwargs):  # on a CPU, and there alone, its checks look at values
        with _disable_current_modes():
            return forward(*args, **kwargs)
    monkeypatch.setattr(FalconH1, "forward", unwatched)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(self.shape) or tolist(self))
    monkeypatch.setattr(Sampler, "step", watched)
    monkeypatch.setattr(decode.Decoder, "record", record)
    monkeypatch.setattr(decode.Decoder, "recorded_on", "cpu")
    sizes.clear()
    assert_same_traces(generate(model, PROMPTS, **kind), expected)
    assert len(lists) == len(steps) > 40 and sum(steps) == sum(len(t.tokens) for t in expected)
    assert recorded == [(6, 8), *sizes] and len({*recorded}) == len(recorded) > 4

def test_callbacks_and_the_bar(capfd):
    model, started, ended = build(), [], []

    def admit(i, j):  # two of prompt 0, and when they have ended three of prompt 1
        started.append((i, j))
        if (i, j) == (0, 2):
            return "done"
        return "go" if i == 0 or len(ended) >= 2 else "wait"
    traces = generate(model, [[1], [2]], max_new_tokens=8, samples=3, slots=2, admit=admit, progress=True,
                      on_token=lambda t: t.prompt_index == 1 and len(t.tokens) == 3, on_trace=ended.append)
    assert [which(t) for t in traces] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert [(t.stop, len(t.tokens)) for t in traces] == [("length", 8)] * 2 + [("deepconf", 3)] * 3
    assert len(ended) == 5 and (0, 2) in started and "tokens/s" in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="prompt 0 waits"):
        generate(model, [[1]], max_new_tokens=1, admit=lambda i, j: "wait")

def test_no_prefilled_prompt_is_kept_for_nothing(monkeypatch):
    """Prompt 0 is done after the two samples that begin together; the others run out of samples."""
    seen, step = [], Sampler.step
    monkeypatch.setattr(Sampler, "step", lambda self: (
        seen.append((len(self.prefilled), len(self.waiting))), step(self))[1])
    generate(build(), [[1, 2], [3, 4], [5, 6]], max_new_tokens=4, samples=3, slots=4,
             admit=lambda i, j: "done" if (i, j) == (0, 2) else "go")
    assert seen[-1] == (0, 0) and all(kept <= waiting for kept, waiting in seen)

@pytest.mark.parametrize("mixers", ["attention", "mamba"])
def test_one_mixer_alone_waits_for_memory_only_where_keys_need_it(sizes, monkeypatch, mixers):
    model, kind = build(replace(SMALL, mixers=mixers)), dict(max_new_tokens=60, samples=3, seed=3, slots=6)
    expected, read = generate(model, PROMPTS, **kind), []
    monkeypatch.setattr(decode, "free_bytes", lambda device: 6 * 16 * 192)
    monkeypatch.setattr(decode, "prefill", lambda *a: read.extend(map(list, a[1])) or prefill(*a))
    assert_same_traces(generate(model, PROMPTS, **kind), expected)
    assert any(ids not in PROMPTS for ids in read) == (mixers == "attention")
    bytes_of = model.new_cache(6, 8).bytes_to_grow
    assert (bytes_of(6, 16), bytes_of(2, 32)) == {
        "attention": (6 * 16 * 192, 2 * 32 * 192), "mamba": (0, 2 * 2272)}[mixers]

@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_prompts_may_be_arrays(monkeypatch, kind):
    """And each is prefilled once; a tuple of tensors does not equal another one of the same numbers."""
    model, prompts, settings = build(), [[1, 2, 3], [4]], dict(max_new_tokens=5, samples=3, slots=2)
    expected, read = generate(model, prompts, **settings), []
    monkeypatch.setattr(decode, "prefill", lambda *a: read.append([*a[1][0]]) or prefill(*a))
    assert_same_traces(generate(model, [kind(prompt) for prompt in prompts], **settings), expected)
    assert read == prompts

@pytest.mark.parametrize(("prompts", "settings", "message"), [
    ([[]], {}, "prompt 0: it is empty"), ([[1], [37]], {}, "prompt 1: a token id"), ([[-1]], {}, "token id"),
    ([[1] * 250], {"max_new_tokens": 7}, "max_position_embeddings 256"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens 0"), ([[1]], {"samples": 0}, "samples 0"),
    ([[1]], {"temperature": -1}, "temperature -1"), ([[1]], {"temperature": 1e-40}, "temperature 1e-40"),
    ([[1]], {"top_p": 0}, "top_p 0"), ([[1]], {"admit": lambda i, j: True}, "admit answered True"),
    ([[1]], {"vocab_size": 0}, "vocab_size 0 is not in 1..37"), ([[1]], {"vocab_size": 38}, "vocab_size 38")])
def test_generate_refuses(prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(build(), prompts, **({"max_new_tokens": 4} | settings))

@pytest.mark.parametrize("temperature", [0, 1.0])
def test_padding_of_the_vocabulary_is_never_sampled(temperature):
    """As from a model whose head has only the tokenizer's rows; even where padding is far more likely."""
    padded, own = build(), build(replace(SMALL, vocab_size=11))
    padded.model.embed_tokens.weight[:11] *= 0.5
    own.load_state_dict({k: v[: len(own.state_dict()[k])] for k, v in padded.state_dict().items()})
    padded.lm_head.weight[11:] = 30 * padded.lm_head.weight[11:]
    kind = dict(max_new_tokens=20, samples=3, temperature=temperature, seed=2)
    traces = generate(padded, [[1, 2], [3]], vocab_size=11, **kind)
    assert_same_traces(traces, generate(own, [[1, 2], [3]], **kind))
    assert any(max(t.tokens) > 10 for t in generate(padded, [[1, 2], [3]], **kind))

def test_generate_does_not_sample_from_nonsense():
    model = build()
    model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(model, [[1]], max_new_tokens=2)

# 2. Attention -----------------------------------------------------------------------------------------------

@pytest.fixture
def kernels(interpreter, monkeypatch):
    """A CPU, too, takes one token through the kernels; what they allocate holds NaN."""
    monkeypatch.setattr(decode, "torch", test_ssm_scan.Poisoned())
    monkeypatch.setattr(m, "kernels_serve", lambda x: not torch.is_grad_enabled())

def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, device=DEVICE)

def with_gradient(kernel, x, *rest):
    """Where one of its inputs needs a gradient, and gradients are on."""
    with torch.enable_grad():
        return kernel(x.requires_grad_(), *rest)

def mamba_inputs():
    """One slot, one head of one channel and one column; k is 2."""
    shapes = (1, 3, 1), (1, 1, 1, 1), (1, 3), (1, 1), (3, 2)  # conv, state, xBC, dt, weight
    return [*(random(*shape) for shape in shapes), None, random(1), random(1), random(1), (0.0, 1.0)]

def attention_inputs(lengths, length, hq, hkv, hd, dtype=torch.float32):
    """Arguments of attend_step; what no slot has written yet is NaN."""
    torch.manual_seed(0)
    slots, positions = len(lengths), torch.tensor(lengths, device=DEVICE)
    cos, sin = m.rope_table(positions[:, None], hd, 1e4, dtype)
    q, k, v = (random(slots, 1, heads, hd, dtype=dtype) for heads in (hq, hkv, hkv))
    keys, values = (random(slots, hkv, length, hd, dtype=dtype) for _ in range(2))
    for slot, held in enumerate(lengths):
        keys[slot, :, held:] = values[slot, :, held:] = torch.nan
    return [q, k, v, cos, sin, positions, keys, values]

def attention_oracle(q, k, v, cos, sin, lengths, keys, values, key_multiplier):
    """One slot after the other in float64, softmax spelled out."""
    cos, sin, shared, ys = cos.double(), sin.double(), q.shape[2] // k.shape[2], []
    for slot, held in enumerate(lengths.tolist()):
        turned = m.rotate(q.double(), cos, sin)[slot, 0]  # (hq, hd)
        new = m.rotate(k.double() * key_multiplier, cos, sin)[slot, 0, :, None]  # (hkv, 1, hd)
        K = torch.cat([keys[slot, :, :held].double(), new], 1).repeat_interleave(shared, 0)
        V = torch.cat([values[slot, :, :held].double(), v[slot, 0, :, None].double()], 1)
        weight = (torch.einsum("hd,hjd->hj", turned, K) / q.shape[3] ** 0.5).softmax(-1)
        ys.append(torch.einsum("hj,hjd->hd", weight, V.repeat_interleave(shared, 0)))
    return torch.stack(ys)[:, None]

@pytest.mark.parametrize(("hq", "hkv", "hd", "dtype"), [
    (2, 2, 6, torch.float32), (6, 1, 96, torch.float32), (12, 2, 64, torch.bfloat16), (3, 3, 16, torch.half)])
def test_attention_is_the_softmax(kernels, hq, hkv, hd, dtype):
    lengths = [0, 1, 127, 128, 255, 299]  # splits of 128 keys
    inputs = attention_inputs(lengths, 300, hq, hkv, hd, dtype)
    expected = attention_oracle(*inputs, 0.7)
    y = decode.attend_step(*inputs, key_multiplier=0.7)
    assert (y.double() - expected).norm() / expected.norm() < (1e-6 if dtype == torch.float32 else 1e-2)
    q, k, v, cos, sin, _, keys, values = inputs
    new = m.rotate(k.float() * 0.7, cos.float(), sin.float())[:, 0].to(dtype)
    for slot, held in enumerate(lengths):  # appended where the slot ends, and nothing else written
        torch.testing.assert_close(keys[slot, :, held], new[slot])
        assert torch.equal(values[slot, :, held], v[slot, 0])
        assert keys[slot, :, held + 1 :].isnan().all() and values[slot, :, held + 1 :].isnan().all()

def test_a_slot_does_not_depend_on_others(kernels):
    results = []
    for others in (1, 1, 3.0, torch.nan):
        inputs = attention_inputs([150, 130, 5], 200, 2, 1, 16)
        for i in (0, 1, 2, 6, 7):
            inputs[i][[0, 2]] *= others
        inputs[5][[0, 2]] += 40 * int(others != 1)
        results.append(decode.attend_step(*inputs)[1])
    assert results[0].isfinite().all() and all(torch.equal(results[0], other) for other in results)

@pytest.mark.parametrize("length", [128, 150])  # a whole number of splits, and not
def test_a_full_slot_writes_nothing(kernels, length):
    inputs = attention_inputs([length, length + 7, 3], length, 4, 2, 16)
    before = [v.clone() for v in inputs[6:]]
    y = decode.attend_step(*inputs)
    for now, then in zip(inputs[6:], before):
        assert torch.equal(now[:2], then[:2])
    expected = attention_oracle(*(v[2:] for v in inputs[:6]), *(v[2:] for v in before), 1.0)
    assert_close(y[2:].double(), expected)

def test_attention_reaches_beyond_32_bits(kernels, monkeypatch):
    monkeypatch.setattr(decode, "span_of", lambda length, heads: length)  # the interpreter visits each split
    small = attention_inputs([3, 5], 8, 2, 1, 64)
    large = [torch.empty(2, 1, 2**25 + 8, 64, device=DEVICE) for _ in range(2)]  # untouched pages are free
    for far, near in zip(large, small[6:]):
        far[:, :, :8] = near
    torch.testing.assert_close(decode.attend_step(*small[:6], *large), decode.attend_step(*small))
    torch.testing.assert_close(large[0][:, :, :8], small[6], equal_nan=True)

@pytest.mark.parametrize(("length", "heads", "span"), [
    (1, 1, 128), (16384, 2, 128), (262144, 2, 1024), (16384, 512, 1024), (32768, 8, 512), (131072, 1, 256)])
def test_spans(length, heads, span):
    assert decode.span_of(length, heads) == span

# 3. Mixer and norms -----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("g", "k", "bias", "limit", "dtype"), [
    (2, 4, False, (0.3, 0.6), torch.float32), (2, 1, True, (0.0, 1.0), torch.float32),
    (1, 2, True, (0.0, float("inf")), torch.bfloat16)])
def test_mixer_is_torchs(kernels, g, k, bias, limit, dtype):
    b, h, p, n = 3, 4, 20, 9
    torch.manual_seed(0)
    d = h * p + 2 * g * n
    conv, state = random(b, k - 1, d, dtype=dtype).mT, random(b, h, p, n)
    wide = random(b, d + h, dtype=dtype)  # xBC and dt are slices of what in_proj gives
    weight, bias = random(d, k, dtype=dtype), random(d, dtype=dtype) if bias else None
    dt_bias, A_log, D = random(h, dtype=dtype) * 3 - 2, random(h, dtype=dtype), random(h, dtype=dtype)
    conv2, state2 = conv.clone(), state.clone()
    y = decode.mamba_step(conv, state, wide[:, :d], wide[:, d:], weight, bias, dt_bias, A_log, D, limit)

    xBC, _ = s.causal_conv1d_step(conv2, wide[:, :d], weight, bias, activation="silu")
    x, B, C = (v.view(b, -1, width) for v, width in zip(xBC.split([h * p, g * n, g * n], 1), (p, n, n)))
    dt = F.softplus(wide[:, d:] + dt_bias).clamp(*limit)
    expected, _ = s.ssd_step(state2, x, dt, -A_log.float().exp(), B, C, D=D)
    for ours, theirs in ((y.float(), expected.float()), (state, state2)):
        assert (ours - theirs).norm() / theirs.norm() < (1e-6 if dtype == torch.float32 else 1e-2)
    assert torch.equal(conv, conv2)

def test_small_steps_keep_their_digits(kernels):
    """dt near the 0.001 that Mamba-2 starts from, and far below, where softplus(v) = e^v. B = C = x."""
    dt, zero = torch.tensor([[-6.9, -15.0, -30.0, 25.0]], device=DEVICE), torch.zeros(4, device=DEVICE)
    conv, state = torch.zeros(1, 6, 0, device=DEVICE), torch.zeros(1, 4, 1, 1, device=DEVICE)
    ones = torch.ones(1, 6, device=DEVICE)
    y = decode.mamba_step(conv, state, ones, dt, ones.T, None, zero, zero, zero, (0.0, float("inf")))[0, :, 0]
    torch.testing.assert_close(25 * y.double() / y[3], F.softplus(dt[0].double()), rtol=1e-6, atol=0)

@pytest.mark.parametrize(("groups", "dtype"), [(1, torch.float32), (2, torch.bfloat16)])
def test_norms(kernels, groups, dtype):
    torch.manual_seed(0)
    wide, weight = random(3, 1, 100, dtype=dtype), random(40, dtype=dtype)
    y, z = wide[..., :40], wide[..., 40:80]
    for before in (False, True):
        ours = decode.norm_step(y, weight, 1e-5, z=z, groups=groups, norm_before_gate=before)
        torch.testing.assert_close(ours, m.gated_norm(y, z, weight, groups, 1e-5, before).to(dtype))
    gate_alone = (y.float() * F.silu(z.float())).to(dtype)
    torch.testing.assert_close(decode.norm_step(y, None, 1e-5, z=z, groups=groups), gate_alone)
    norm = F.rms_norm(y.float(), (40,), eps=1e-5).to(dtype)
    torch.testing.assert_close(decode.norm_step(y, weight, 1e-5), weight * norm)

# 4. The whole step ------------------------------------------------------------------------------------------

LENGTHS = [0, 130, 127]  # new; in its second split of 128 keys; entering it in the second step

def decoded(model, ids, steps=2):
    """Logits of `steps` tokens for each row of ids (slots, t), LENGTHS[slot] of them read before."""
    cache = model.new_cache(len(ids), 140)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    for slot, held in enumerate(LENGTHS):
        if held:
            cache.load(slot, m.prefill(model, [ids[slot, : held + 1].tolist()]))
    out = []
    for i in range(steps):
        cache.used = -(2**40)  # what a step must not care for
        tokens = torch.stack([row[held + i] for row, held in zip(ids, LENGTHS)])
        out.append(model(tokens[:, None], cache=cache))
    assert cache.fused and cache.lengths.tolist() == [held + steps for held in LENGTHS]
    return torch.cat(out, 1).float()

def forward_pass(model, ids, steps=2):
    rows = [model(row[None, : held + steps])[0, -steps:] for row, held in zip(ids, LENGTHS)]
    return torch.stack(rows).float()

@pytest.mark.parametrize("change", [
    {"num_hidden_layers": 2}, {"mamba_rms_norm": False, "mamba_n_groups": 1, "time_step_limit": (0.2, 1.5)},
    {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 32, "mamba_norm_before_gate": True},
    {"mamba_conv_bias": False, "mamba_proj_bias": True, "projectors_bias": True, "attention_bias": True},
    {"mixers": "attention"}, {"mixers": "mamba"}])
def test_steps_are_the_forward_pass(kernels, change):
    model = build(replace(SMALL, **{"num_hidden_layers": 1} | change)).to(DEVICE)
    ids = torch.randint(37, (3, 140), device=DEVICE)
    y, expected = decoded(model, ids), forward_pass(model, ids)
    assert ((y - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2)) < 1e-5).all()

def test_steps_in_half_precision(kernels):
    """Rounding to bf16 moves the forward pass itself by 1 to 2% of these logits, and torch's steps, too:
    kernels may be no farther from float32 than it is. (On their own, see above, they are within 1e-2.)"""
    model, ids = build().to(DEVICE, torch.bfloat16), torch.randint(37, (3, 140), device=DEVICE)
    y, rounded = decoded(model, ids), forward_pass(model, ids)
    exact = forward_pass(model.float(), ids)
    assert (y - exact).norm() < 1.1 * (rounded - exact).norm() < 0.03 * exact.norm()

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_of_a_block(monkeypatch, dtype):
    """In one step of two models. Kernels are counted, and compute nothing."""
    launched, counts = [], []
    monkeypatch.setattr(m, "kernels_serve", lambda x: True)
    for module in (decode, s):
        monkeypatch.setattr(module, "_launch", lambda *args, **sizes: launched.append(args))
    for layers in (2, 3):
        model = FalconH1(replace(SMALL, num_hidden_layers=layers)).to(dtype)
        launched.clear()
        with Launches() as counted:
            model.model(torch.zeros(2, 1, dtype=torch.long), cache=model.new_cache(2, 20))
        counts.append(counted.count + len(launched))
    assert counts[1] - counts[0] <= 28  # with torch's own operations 65, and 80 in bf16

@pytest.mark.parametrize(("call", "message"), [
    (lambda: decode.attend_step(*attention_inputs([1], 4, 1, 1, 258)), "head_dim: got 258, .* at most 256"),
    (lambda: decode.attend_step(*attention_inputs([1], 4, 17, 1, 128)), "query heads .*: got 17, .* 16"),
    (lambda: decode.norm_step(random(1, 1, 16385), random(16385), 0.0), "16385 channels .* at most 16384"),
    (lambda: with_gradient(decode.norm_step, random(1, 1, 8), random(8), 0.0), "no_grad"),
    (lambda: with_gradient(decode.attend_step, *attention_inputs([1], 4, 1, 1, 16)), "no_grad"),
    (lambda: with_gradient(decode.mamba_step, *mamba_inputs()), "this kernel has no gradient.*no_grad"),
    (lambda: decode.mamba_step(None, random(1, 1, 1, 513), None, None, random(1027, 1), *[None] * 5),
     "513 columns, .* at most 512")])
def test_what_is_too_large_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

@pytest.mark.gpu
def test_a_recorded_step_serves_a_whole_generation():
    model = build().cuda()
    plain, recorded = (m.Cache(model.config, 3, 200, device="cuda") for _ in range(2))
    step = decode.Decoder(model, recorded)
    for i in range(150):
        tokens = torch.tensor([i, 2 * i, 3 * i], device="cuda") % 37
        plain.used = recorded.used = i
        assert torch.equal(step(tokens), model(tokens[:, None], cache=plain)[:, 0])

# 5. Drawing -------------------------------------------------------------------------------------------------

def distribution(logits, temperature, top_p):
    """In float64: softmax, cut to the smallest set of at least top_p."""
    p = (logits.double() / temperature).softmax(-1)
    ranked, order = p.sort(-1, descending=True)
    p.scatter_(-1, order, ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0))
    return p / p.sum(-1, keepdim=True)

@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.8)])
def test_draw_inverts_the_distribution(temperature, top_p):
    logits, u = torch.tensor([[1.0, 0.0, -1.0, 2.0]]), torch.arange(10000).double() / 10000
    tokens, logprobs, _ = draw(logits.expand(10000, -1), u, temperature, top_p)
    p = distribution(logits, temperature, top_p)[0]
    assert top_p == 1 or p.nonzero()[:, 0].tolist() == [0, 3]  # 0.644 + 0.237 reach 0.8
    assert torch.bincount(tokens, minlength=4).div(10000).tolist() == pytest.approx(p.tolist(), abs=2e-4)
    assert_close(logprobs.double(), p.log()[tokens])
    assert draw(logits, u[:1], 0, 1.0)[0].item() == 3
    confidence = -logits.log_softmax(-1)[0, [3, 0]].mean().item()
    assert draw(logits, u[:1], 1.0, 1.0, top=2)[2].item() == pytest.approx(confidence)

@pytest.mark.parametrize("vocab", [272, 4099, 130048])  # in one block, in blocks of 1 and 256
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_draw_from_a_large_vocabulary(vocab, top_p):
    r = torch.Generator().manual_seed(vocab)
    logits, u = 3 * torch.randn(6, vocab, generator=r), torch.rand(6, dtype=torch.float64, generator=r)
    logits[:, : vocab // 3] -= 200  # nothing to be drawn from first and last tokens
    logits[:, -vocab // 3 :] = -torch.inf
    u[0], u[1] = 0, 1 - 2**-53
    tokens, logprobs, confidences = draw(logits, u, 0.8, top_p)
    p = distribution(logits, 0.8, top_p)
    upper, chosen = (v.gather(-1, tokens[:, None])[:, 0] for v in (p.cumsum(-1), p))
    assert (upper - chosen - 1e-6 <= u).all() and (u <= upper + 1e-6).all() and (chosen > 1e-30).all()
    assert_close(logprobs.double(), chosen.log())
    assert_close(confidences.double(), -logits.double().log_softmax(-1).topk(20).values.mean(-1))

@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_draw_survives_what_is_not_a_number(bad):
    logits = torch.zeros(2, 4096).index_fill_(1, torch.tensor([5]), bad)
    tokens = draw(logits, torch.tensor([0.0, 0.9]).double(), 1.0, 1.0)[0]
    assert ((0 <= tokens) & (tokens < 4096)).all()  # it is refused later, but may be embedded before

@pytest.mark.parametrize(("top_p", "copies"), [(1.0, 2), (0.95, 5)])
def test_draw_holds_few_copies_of_the_distribution(top_p, copies):
    logits, u = torch.randn(2, 130048), torch.rand(2, dtype=torch.float64)
    assert peak_bytes(lambda: draw(logits, u, 0.85, top_p), "cpu") < (copies + 0.3) * logits.nbytes

# 6. The memory of sampling at 7B ----------------------------------------------------------------------------

class Held(TorchDispatchMode):
    """The bytes of all tensors on "meta" that are alive; they may be at most `room`."""

    def __init__(self, room):
        super().__init__()
        self.now, self.room = 0, room

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        given = {v.untyped_storage()._cdata for v in given}
        for v in tree_leaves(out):
            if isinstance(v, torch.Tensor) and v.is_meta and v.untyped_storage()._cdata not in given:
                self.change(v.untyped_storage().nbytes())
                weakref.finalize(v.untyped_storage(), self.change, -v.untyped_storage().nbytes())
        return out

    def change(self, nbytes):
        self.now += nbytes
        assert self.now <= self.room

def test_sampling_at_7b_stays_inside_80_gb(monkeypatch):
    """The README's command for GRPO on eight GPUs of 80 GB: 16 of 128 prompts a rank, 16 traces of each. All
    grow to 49,152 tokens. Beside them lie the copy in bf16, and an eighth of weights and moments."""
    c = PRESETS["7b"]
    with torch.device("meta"):
        model = FalconH1(c).to(torch.bfloat16)
        one = Cache(c, 1, 512, dtype=torch.bfloat16, device="meta")
    per_slot = sum(v.nbytes for v in vars(one).values() if isinstance(v, torch.Tensor))
    n = sum(p.numel() for p in model.parameters())
    held = Held(80 * 10**9 - 2 * n - 12 * n // 8)
    monkeypatch.setattr("decode.free_bytes", lambda device: held.room - held.now)
    with held:
        sampler = Sampler(model, [[1] * 300] * 16, 16, 0, 300 + 49152 - 1, 0, None, None)
        slots, sizes = len(sampler.slots), []
        assert slots * per_slot < held.room / 2 < (slots + 1) * per_slot
        sampler.waiting, sampler.slots = {}, [Running(Trace(0, i), [], None) for i in range(slots)]
        while (length := sampler.cache.k.shape[3]) < sampler.longest:
            sizes.append((len(sampler.slots), length))
            for running in sampler.slots:
                running.ids = [1] * (length + 1)
            sampler.fit()
    assert (slots, sizes[0]) == (164, (164, 512)) and sizes[2] == (164, 2048)  # then some are set aside
    assert sampler.cache.k.shape[3] == 49451 and len(sampler.slots) == 12
    assert len(sampler.slots) + len(sampler.aside) == slots
