"""Falcon-H1 against an oracle that spells the forward pass out in loops; cache, sampler and files on their edges."""

import json
import struct
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import model as m
from model import (PRESETS, Cache, Decoder, FalconH1, FalconH1Config, Sampler, attend, document_table, draw, generate, prefill,
                   read_safetensors, slots_that_fit, ssm_multipliers, write_safetensors)
from tests.bench import peak_bytes

SMALL = FalconH1Config(
    vocab_size=37, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=6, mamba_d_ssm=20, mamba_n_heads=4, mamba_d_head=5, mamba_d_state=7, mamba_n_groups=2, mamba_chunk_size=8,
    rope_theta=100.0, max_position_embeddings=256, initializer_range=0.3, embedding_multiplier=1.7, lm_head_multiplier=0.9,
    attention_in_multiplier=1.1, attention_out_multiplier=0.8, key_multiplier=0.7, ssm_in_multiplier=1.2, ssm_out_multiplier=0.6,
    ssm_multipliers=(0.5, 1.5, 0.8, 1.3, 0.9), mlp_multipliers=(1.4, 0.75))


def build(config=SMALL, seed=0):
    torch.manual_seed(seed)
    model = FalconH1(config)
    with torch.no_grad():  # nothing may hide behind an initial 0 or 1
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model


def oracle(model, ids):
    """Section by section, one token and one head at a time, in float64."""
    c, w = model.config, {k: v.double() for k, v in model.state_dict().items()}
    silu = torch.nn.functional.silu

    def rms(x, weight):
        return weight * x / (x.square().mean() + c.rms_norm_eps).sqrt()

    def linear(x, name):
        return w[name + ".weight"] @ x + (w[name + ".bias"] if name + ".bias" in w else 0)

    def rope(x, position):
        half, out = c.head_dim // 2, torch.empty_like(x)
        for i in range(half):
            angle = torch.tensor(position * c.rope_theta ** (-2 * i / c.head_dim), dtype=torch.float64)
            out[i] = x[i] * angle.cos() - x[i + half] * angle.sin()
            out[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin()
        return out

    I, G, N, H, K = c.mamba_d_ssm, c.mamba_n_groups, c.mamba_d_state, c.mamba_n_heads, c.mamba_d_conv
    h = [w["model.embed_tokens.weight"][i] * c.embedding_multiplier for i in ids]
    for layer in range(c.num_hidden_layers):
        pre = f"model.layers.{layer}."
        n = [rms(x, w[pre + "input_layernorm.weight"]) for x in h]
        mup = torch.cat([torch.full((k,), m, dtype=torch.float64) for k, m in zip((I, I, G * N, G * N, H), c.ssm_multipliers)])
        p = [linear(x * c.ssm_in_multiplier, pre + "mamba.in_proj") * mup for x in n]
        conv, bias = w[pre + "mamba.conv1d.weight"][:, 0], w.get(pre + "mamba.conv1d.bias", 0)
        S, keys, values = torch.zeros(H, I // H, N).double(), [], []
        for t in range(len(h)):
            z, dt = p[t][:I], p[t][-H:]
            taps = [p[t - K + 1 + j][I:-H] * conv[:, j] for j in range(K) if t - K + 1 + j >= 0]
            x, B, C = silu(sum(taps) + bias).split([I, G * N, G * N])
            dt = torch.nn.functional.softplus(dt + w[pre + "mamba.dt_bias"])
            y = torch.empty(H, I // H).double()
            for j in range(H):
                xj, g = x[j * I // H : (j + 1) * I // H], j // (H // G)
                S[j] = (-dt[j] * w[pre + "mamba.A_log"][j].exp()).exp() * S[j] + dt[j] * torch.outer(xj, B[g * N : (g + 1) * N])
                y[j] = S[j] @ C[g * N : (g + 1) * N] + w[pre + "mamba.D"][j] * xj
            y = y.flatten()
            if not c.mamba_rms_norm:
                y = y * silu(z)
            else:
                y = y if c.mamba_norm_before_gate else y * silu(z)
                y = torch.cat([rms(part, 1) for part in y.chunk(G)]) * w[pre + "mamba.norm.weight"]
                y = y * silu(z) if c.mamba_norm_before_gate else y
            m = linear(y, pre + "mamba.out_proj") * c.ssm_out_multiplier
            a = n[t] * c.attention_in_multiplier
            q = [rope(v, t) for v in linear(a, pre + "self_attn.q_proj").split(c.head_dim)]
            keys.append([rope(v * c.key_multiplier, t) for v in linear(a, pre + "self_attn.k_proj").split(c.head_dim)])
            values.append(linear(a, pre + "self_attn.v_proj").split(c.head_dim))
            heads = []
            for j, query in enumerate(q):
                kv = j // (c.num_attention_heads // c.num_key_value_heads)
                weight = torch.stack([query @ k[kv] for k in keys]).div(c.head_dim**0.5).softmax(0)
                heads.append(sum(s * v[kv] for s, v in zip(weight, values)))
            a = linear(torch.cat(heads), pre + "self_attn.o_proj") * c.attention_out_multiplier
            h[t] = h[t] + m + a
            n2 = rms(h[t], w[pre + "pre_ff_layernorm.weight"])
            gate = silu(linear(n2, pre + "feed_forward.gate_proj") * c.mlp_multipliers[0])
            h[t] = h[t] + linear(linear(n2, pre + "feed_forward.up_proj") * gate, pre + "feed_forward.down_proj") * c.mlp_multipliers[1]
    return torch.stack([w["lm_head.weight"] @ rms(x, w["model.final_layernorm.weight"]) for x in h]) * c.lm_head_multiplier


@pytest.mark.parametrize("change", [
    {}, {"mamba_rms_norm": False}, {"mamba_norm_before_gate": True}, {"mamba_n_groups": 1}, {"tie_word_embeddings": True},
    {"mamba_conv_bias": False, "mamba_proj_bias": True, "projectors_bias": True, "attention_bias": True, "mlp_bias": True}])
def test_forward_is_the_oracle(change):
    model, ids = build(replace(SMALL, **change)), torch.randint(37, (1, 11))
    expected = oracle(model, ids[0].tolist())
    error = (model(ids)[0].double() - expected).norm() / expected.norm()
    assert error < 1e-5


def test_presets_are_the_published_models():
    for preset, count in (("0.5b", 521_411_104), ("1.5b", 1_554_859_392), ("1.5b-deep", 1_554_872_208), ("3b", 3_149_387_264),
                          ("7b", 7_585_648_736), ("34b", 33_642_516_224)):
        with torch.device("meta"):
            model = FalconH1(PRESETS[preset])
        assert sum(p.numel() for p in model.parameters()) == count
        assert preset != "7b" or len(model.state_dict()) == 751
    c = PRESETS["7b"]  # the published config.json, and that of 34b where it is known
    assert c.embedding_multiplier == 5.656854249492381 and c.lm_head_multiplier == 0.013020833333333334
    assert (c.attention_out_multiplier, c.ssm_in_multiplier) == (0.10416666666666667, 0.4166666666666667)
    assert (c.key_multiplier, c.ssm_out_multiplier) == pytest.approx((0.030690398488999456, 0.11785113019775793), rel=1e-14)
    assert c.ssm_multipliers == pytest.approx((0.3535533905932738, 0.25, 0.1767766952966369, 0.5, 0.3535533905932738), rel=1e-14)
    assert c.mlp_multipliers == pytest.approx((0.2946278254943948, 0.032552083333333336), rel=1e-14)
    c = PRESETS["34b"]
    assert (c.key_multiplier, *c.mlp_multipliers) == pytest.approx((0.011048543456039804, 0.1767766952966369, 0.011160714285714284), rel=1e-14)


def test_packed_documents_are_separate():
    model, ids, cu = build(), torch.randint(37, (1, 60)), [0, 1, 20, 43, 60]
    packed = model(ids, cu_seqlens=torch.tensor(cu))
    for start, end in zip(cu, cu[1:]):
        torch.testing.assert_close(packed[:, start:end], model(ids[:, start:end]), rtol=1e-5, atol=1e-5)
    for start, end in zip(cu, cu[1:]):  # to the last bit
        other = ids.clone()
        other[:, start:end] = (other[:, start:end] + 1) % 37
        same = model(other, cu_seqlens=cu)[0] == packed[0]
        assert same[:start].all() and same[end:].all() and not same[start:end].all()


def test_packed_gradients_are_the_sum_of_separate_ones():
    model, ids, cu = build(), torch.randint(37, (1, 30)), [0, 11, 12, 30]
    grads = []
    for parts in ([(ids, cu)], [(ids[:, a:b], None) for a, b in zip(cu, cu[1:])]):
        model.zero_grad()
        for part, bounds in parts:
            model(part, cu_seqlens=bounds).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (grads[0] - grads[1]).norm() / grads[1].norm() < 1e-5


def test_document_table_by_hand():
    """Documents of 5, 4, 2 and 1 tokens: 5 and 4 are a group, for 5 / 4 = 1.25; 2 and 1 stand alone."""
    positions, tokens, place, shapes = document_table((0, 2, 7, 11, 12), torch.device("cpu"))
    assert positions.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 2, 3, 0]
    assert tokens.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 0, 1, 11]
    assert place.tolist() == [10, 11, 0, 1, 2, 3, 4, 5, 6, 7, 8, 12]
    assert shapes == [[2, 5], [1, 2], [1, 1]]


def test_ssm_multipliers_by_hand():
    c = build().config  # widths 20, 20, 14, 14, 4
    m = (0.5, 0.25, 2.0, 1.0, 3.0)
    want = [0.5] * 20 + [0.25] * 20 + [2.0] * 14 + [1.0] * 14 + [3.0] * 4
    for_cpu = torch.bfloat16, torch.device("cpu")
    assert ssm_multipliers(replace(c, ssm_multipliers=m), *for_cpu).tolist() == want
    assert ssm_multipliers(replace(c, ssm_multipliers=(1.0,) * 5), *for_cpu) is None


@pytest.mark.parametrize("cu", [None, (0, 3, 10)])
def test_attention_never_asks_cudnn(monkeypatch, cu):
    seen, attention, allowed = [], F.scaled_dot_product_attention, torch.backends.cuda.cudnn_sdp_enabled()

    def watched(*args, **kwargs):
        seen.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()))
        return attention(*args, **kwargs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    attend(*(torch.randn(1, 10, heads, 8) for heads in (4, 2, 2)), cu)
    assert set(seen) == {(False, True)} and torch.backends.cuda.cudnn_sdp_enabled() == allowed


@pytest.mark.gpu
@pytest.mark.parametrize("cu", [None, (0, 3, 10, 130, 131, 300)])
def test_attention_is_flash(cu):
    """In bf16, with heads that share keys, forward and backward; near a CPU's results in float32."""
    results, shapes = [], [(1, 300, heads, 64) for heads in (4, 2, 2)]
    leaves = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        here = [v.to(device, dtype).requires_grad_() for v in leaves]
        with torch.profiler.profile() as profile:
            y = attend(*here, cu)
            grads = torch.autograd.grad(y.square().sum(), here)
        results.append([v.cpu().float() for v in (y, *grads)])
    names = {event.key for event in profile.key_averages()}
    flash = "aten::_scaled_dot_product_flash_attention"
    assert {flash, f"{flash}_backward"} <= names
    for ours, right in zip(results[1], results[0]):
        assert (ours - right).norm() < 0.02 * right.norm()


@torch.no_grad()
@pytest.mark.parametrize("cuts", [range(1, 40), [1], [39], [7, 8, 25], [17, 30]])
def test_cache_continues_anywhere(cuts):
    model, ids, cuts = build(), torch.randint(37, (2, 40)), list(cuts)
    cache = Cache(SMALL, 2, 40)
    parts = [model(ids[:, a:b], cache=cache) for a, b in zip([0, *cuts], [*cuts, 40])]
    full = model(ids)
    assert (torch.cat(parts, 1) - full).norm() / full.norm() < 1e-5
    with pytest.raises(ValueError, match="cache: 41 tokens"):
        model(ids[:, :1], cache=cache)


@torch.no_grad()
def test_greedy_generation_with_prompts_of_many_lengths():
    model, prompts = build(), [[1], [2, 3], list(range(20)), [5] * 7]
    traces = generate(model, prompts, max_new_tokens=12, temperature=0, slots=3)
    for prompt, trace in zip(prompts, traces):
        ids = list(prompt)
        for token in trace.tokens:
            assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
            ids.append(token)
        assert trace.stop == "length" and len(trace.tokens) == 12


def test_a_trace_does_not_depend_on_its_neighbours():
    model, prompts = build(), [[1, 2], [3, 4, 5, 6, 7], [8]]
    def run(slots, admit=None):
        return {(t.prompt_index, t.sample_index): (t.tokens, t.logprobs) for t in generate(
            model, prompts, max_new_tokens=15, samples=3, seed=7, slots=slots, stop_ids=[0, 1, 2], admit=admit)}
    whole = run(64)
    assert len({tuple(tokens) for tokens, _ in whole.values()}) == 9  # they do differ
    for some in (run(1), run(4), run(3, lambda i, j: "go" if i == 1 else "done")):
        for key, (tokens, logprobs) in some.items():
            assert whole[key][0] == tokens and whole[key][1] == pytest.approx(logprobs, abs=1e-4)


def test_log_probabilities_are_those_of_the_trainer():
    model, prompt = build(), [3, 4, 5]
    for trace in generate(model, [prompt], max_new_tokens=20, samples=4, temperature=0.85, stop_ids=[9]):
        ids = torch.tensor([prompt + trace.tokens])
        logprobs, entropy = model(ids[:, :-1], targets=ids[:, 1:], temperature=0.85)
        assert trace.logprobs == pytest.approx(logprobs[0, 2:].tolist(), abs=1e-4) and (entropy > 0).all()
        top = model(ids[:, :-1])[0, 2:].log_softmax(-1).topk(20).values
        assert trace.confidences == pytest.approx((-top.mean(-1)).tolist(), abs=1e-4)
        assert (trace.stop == "stop") == (trace.tokens[-1] == 9) and 9 not in trace.tokens[:-1]


@pytest.mark.gpu
def test_replayed_steps_are_the_steps():
    """An eager step, a recorded one, and replays."""
    model = build().cuda()
    plain, graphed = (Cache(model.config, 3, 200, device="cuda") for _ in range(2))
    with torch.no_grad():
        step = Decoder(model, graphed)
        for i in range(100):
            tokens = torch.tensor([i, 2 * i, 3 * i], device="cuda") % model.config.vocab_size
            plain.used = graphed.used = i
            torch.testing.assert_close(step(tokens), model(tokens[:, None], cache=plain)[:, 0], rtol=1e-4, atol=1e-5)


def test_as_many_slots_as_fit():
    config = build().config
    def fit(length):
        return slots_that_fit(config, length, torch.float32, "cpu")
    assert fit(16) == 256 >= fit(10**6) >= fit(10**12) == 1


def by_indices(traces):
    return {(t.prompt_index, t.sample_index): t for t in traces}


def assert_same_traces(some, others):
    some, others = by_indices(some), by_indices(others)
    assert some.keys() == others.keys()
    for key, trace in some.items():
        other = others[key]
        assert trace.tokens == other.tokens and trace.stop == other.stop
        assert trace.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert trace.confidences == pytest.approx(other.confidences, abs=1e-4)


@pytest.fixture
def sizes(monkeypatch):
    """(slots, length) of a cache that begins with 8 tokens, each time that it is made anew."""
    seen, grow = [], Cache.grow
    monkeypatch.setattr(Sampler, "first_length", 8)
    def counted(self, slots, length):
        seen.append((len(slots), length))
        grow(self, slots, length)
    monkeypatch.setattr(Cache, "grow", counted)
    return seen


PROMPTS = [[1, 2], [3, 4, 5, 6, 7], [8], [9] * 7]


def test_the_cache_grows_with_the_longest_trace(sizes, monkeypatch):
    model, kind = build(), dict(max_new_tokens=40, samples=3, seed=3, stop_ids=[0, 1])
    traces = [generate(model, PROMPTS, slots=slots, **kind) for slots in (1, 5, 12)]
    longest = max(len(PROMPTS[t.prompt_index]) + len(t.tokens) for t in traces[0]) - 1  # the last is not appended
    assert 32 < longest and max(length for _, length in sizes) == 46 == 7 + 40 - 1
    assert {length for _, length in sizes} == {16, 32, 46}
    monkeypatch.setattr(Sampler, "first_length", 64)
    for some in traces:
        assert_same_traces(some, generate(model, PROMPTS, slots=7, **kind))


def test_where_memory_is_short_the_youngest_traces_wait(sizes, monkeypatch):
    """Six slots of 192 bytes a token and 2,272 of states, and memory for 16 more tokens of each. Two times 32 fit in,
    one time 64."""
    model, kind = build(), dict(max_new_tokens=60, samples=3, seed=3, stop_ids=[0, 1])
    def callbacks(seen):
        def admit(i, j):
            seen.append((i, j))
            return "done" if (i, j) == (2, 2) else "go"
        def on_token(t):
            seen.append((t.prompt_index, t.sample_index, len(t.tokens)))
            return (t.prompt_index, len(t.tokens)) == (1, 30)
        return dict(admit=admit, on_token=on_token, on_trace=seen.append)
    undisturbed, disturbed = [], []
    expected = generate(model, PROMPTS, slots=6, **kind, **callbacks(undisturbed))
    sizes.clear()
    cache, read = Cache(SMALL, 6, 8), []
    monkeypatch.setattr(m, "free_bytes", lambda device: 6 * 16 * 192)
    assert cache.bytes_to_grow(6, 16) == 6 * 16 * 192 and cache.bytes_to_grow(2, 32) == 2 * (32 * 192 + 2272)
    monkeypatch.setattr(m, "prefill", lambda model, prompts: read.extend(prompts) or prefill(model, prompts))
    traces = generate(model, PROMPTS, slots=6, **kind, **callbacks(disturbed))
    assert sizes == [(6, 16), (2, 32), (1, 64)]
    assert_same_traces(traces, expected)
    assert len(expected) == 11 and {t.stop for t in expected} == {"stop", "deepconf"}
    ids = {tuple(PROMPTS[t.prompt_index] + t.tokens[:n]) for t in traces for n in range(1, len(t.tokens))}
    assert {tuple(prompt) for prompt in read} & ids  # some were read again in their middle
    for seen in (undisturbed, disturbed):  # every trace is admitted once, in order, and shown each token once
        events = [x for x in seen if type(x) is tuple]
        assert [x for x in events if len(x) == 2] == [(i, j) for i in range(4) for j in range(3)]
        for (i, j), t in by_indices(expected).items():
            assert [x[2] for x in events if len(x) == 3 and x[:2] == (i, j)] == list(range(1, len(t.tokens) + 1))
        assert len([x for x in seen if x not in events]) == 11
    monkeypatch.setattr(m, "free_bytes", lambda device: 16 * 192 - 1)
    with pytest.raises(ValueError, match="one trace of 16 tokens does not fit into 3071 free bytes"):
        generate(model, [[1]], max_new_tokens=40)


def test_a_step_reads_once_and_is_recorded_once_per_size(sizes, monkeypatch):
    """Reads stop the host on a GPU. Here they are counted, and a recorder that only pretends takes CUDA's place."""
    class Uncounted(FalconH1):  # on a CPU, and there alone, its checks look at values
        def forward(self, *args, **kwargs):
            before, logits = Reads.count, super().forward(*args, **kwargs)
            Reads.count = before
            return logits

    class Reads(TorchDispatchMode):
        count = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Reads.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def record(self):
        recorded.append((len(self.tokens), self.cache.k.shape[3]))
        def replay():
            new, self.result = self.run(), getattr(self, "result", None)
            self.result = new if self.result is None else self.result.copy_(new)  # in place, as a graph's are
        self.graph = SimpleNamespace(replay=replay)

    def step(self):
        with Reads():
            steps.append(took := plain_step(self))
        return took

    model, recorded, steps, lists, plain_step, tolist = build(), [], [], [], Sampler.step, torch.Tensor.tolist
    kind = dict(max_new_tokens=40, samples=3, seed=3, slots=6, stop_ids=[0, 1])
    expected = generate(model, PROMPTS, **kind)
    model.__class__ = Uncounted
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(self.shape) or tolist(self))
    monkeypatch.setattr(Sampler, "step", step)
    monkeypatch.setattr(Decoder, "record", record)
    monkeypatch.setattr(Decoder, "recorded_on", "cpu")
    sizes.clear()
    assert_same_traces(generate(model, PROMPTS, **kind), expected)
    assert len(lists) == len(steps) > 40 and Reads.count == 0
    assert sum(steps) == sum(len(t.tokens) for t in expected)
    assert recorded == [(6, 8), *sizes] and len({*recorded}) == len(recorded) > 4


def test_the_bar_shows_the_rate(capfd):
    generate(build(), [[1, 2]], max_new_tokens=3, progress=True)
    assert "tokens/s" in capfd.readouterr().err


def test_callbacks():
    model, started, ended = build(), [], []
    def admit(i, j):
        if i == 0:
            return "go" if j < 2 else "done"
        return "go" if len(ended) >= 2 else "wait"
    traces = generate(model, [[1], [2]], max_new_tokens=8, samples=3, slots=2, admit=lambda i, j: started.append((i, j)) or admit(i, j),
                      on_token=lambda t: t.prompt_index == 1 and len(t.tokens) == 3, on_trace=ended.append)
    assert [(t.prompt_index, t.sample_index, t.stop, len(t.tokens)) for t in traces] == \
        [(0, 0, "length", 8), (0, 1, "length", 8), *((1, j, "deepconf", 3) for j in range(3))]
    assert len(ended) == 5 and (0, 2) in started
    with pytest.raises(RuntimeError, match="prompt 0 waits"):
        generate(model, [[1]], max_new_tokens=1, admit=lambda i, j: "wait")


def test_a_long_prompt_is_prefilled_in_parts():
    model, prompt = build(), list(range(36)) * 3
    a, b = prefill(model, [prompt]), prefill(model, [prompt], tokens=10)
    torch.testing.assert_close(a.ssm, b.ssm, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.k, b.k, rtol=1e-4, atol=1e-5)


def test_prompts_of_one_length_are_prefilled_together():
    model, prompts = build(), [[(i * j) % 36 for j in range(20)] for i in (1, 5, 7)]
    together = prefill(model, prompts)
    for row, prompt in enumerate(prompts):
        alone = prefill(model, [prompt])
        for name in ("k", "v", "conv", "ssm"):
            torch.testing.assert_close(getattr(together, name)[:, row], getattr(alone, name)[:, 0], rtol=1e-4, atol=1e-5)


def test_draw_inverts_the_distribution():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    u = torch.arange(10000).double() / 10000
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        tokens, logprobs, _ = draw(logits.expand(10000, -1), u, temperature, top_p)
        p = (logits[0] / temperature).softmax(0)
        if top_p < 1:  # 0.644 + 0.237 reach 0.8
            p = torch.where(torch.tensor([True, False, False, True]), p, 0)
        p = p / p.sum()
        assert torch.bincount(tokens, minlength=4).div(10000).tolist() == pytest.approx(p.tolist(), abs=2e-4)
        torch.testing.assert_close(logprobs, p.log()[tokens], rtol=1e-5, atol=1e-5)
    assert draw(logits, u[:1], 0, 1.0)[0].item() == 3
    assert draw(logits, u[:1], 1.0, 1.0, top=2)[2].item() == pytest.approx(-logits.log_softmax(-1)[0, [3, 0]].mean().item())


@pytest.mark.parametrize("vocab", [272, 4099, 32784, 130048])  # in one block, in blocks of 1, 16 and 256
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_draw_from_a_large_vocabulary(vocab, top_p):
    r = torch.Generator().manual_seed(vocab)
    logits, u = 3 * torch.randn(6, vocab, generator=r), torch.rand(6, dtype=torch.float64, generator=r)
    logits[:, : vocab // 3] -= 200  # nothing to be drawn from first and last tokens
    logits[:, -vocab // 3 :] = -torch.inf
    u[0], u[1] = 0, 1 - 2**-53
    tokens, logprobs, confidences = draw(logits, u, 0.8, top_p)
    p = (logits.double() / 0.8).softmax(-1)
    if top_p < 1:
        ranked, order = p.sort(-1, descending=True)
        p.scatter_(-1, order, ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0))
    p /= p.sum(-1, keepdim=True)
    upper, chosen = p.cumsum(-1).gather(-1, tokens[:, None])[:, 0], p.gather(-1, tokens[:, None])[:, 0]
    assert (upper - chosen - 1e-6 <= u).all() and (u <= upper + 1e-6).all() and (chosen > 1e-30).all()
    torch.testing.assert_close(logprobs.double(), chosen.log(), rtol=1e-5, atol=1e-5)
    top = logits.double().log_softmax(-1).topk(20).values
    torch.testing.assert_close(confidences.double(), -top.mean(-1), rtol=1e-5, atol=1e-5)


def test_draw_survives_what_is_not_a_number():
    for bad in (torch.nan, torch.inf):
        logits = torch.zeros(2, 4096).index_fill_(1, torch.tensor([5]), bad)
        tokens = draw(logits, torch.tensor([0.0, 0.9]).double(), 1.0, 1.0)[0]
        assert ((0 <= tokens) & (tokens < 4096)).all()  # it is refused later, but may be embedded before


@pytest.mark.parametrize(("top_p", "copies"), [(1.0, 2), (0.95, 5)])
def test_draw_holds_few_copies_of_the_distribution(top_p, copies):
    logits, u = torch.randn(2, 130048), torch.rand(2, dtype=torch.float64)
    assert peak_bytes(lambda: draw(logits, u, 0.85, top_p), "cpu") < (copies + 0.3) * logits.nbytes


def test_generate_does_not_sample_from_nonsense():
    model = build()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(model, [[1]], max_new_tokens=2)


@pytest.mark.parametrize(("prompts", "settings", "message"), [
    ([[]], {}, "prompt 0: it is empty"), ([[1], [37]], {}, "prompt 1: a token id"), ([[-1]], {}, "a token id"),
    ([[1] * 250], {"max_new_tokens": 7}, "max_position_embeddings 256"), ([[1]], {"max_new_tokens": 0}, "max_new_tokens 0"),
    ([[1]], {"temperature": -1}, "temperature -1"), ([[1]], {"top_p": 0}, "top_p 0")])
def test_generate_refuses(prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(build(), prompts, **({"max_new_tokens": 4} | settings))


def test_forward_refuses():
    for ids in ([[37]], [[-1]]):
        with pytest.raises(ValueError, match=r"input_ids: an id is outside 0\.\.36"):
            build()(torch.tensor(ids))


def test_a_refused_forward_leaves_the_cache_as_it_was():
    model, ids = build(), torch.arange(36)[None]
    expected = model(ids[:, :20])[:, 12:]
    cache = Cache(SMALL, 1, 20)
    model(ids[:, :12], cache=cache)
    with pytest.raises(ValueError, match="cache: 32 tokens do not fit a length of 20"):
        model(ids[:, :20], cache=cache)
    torch.testing.assert_close(model(ids[:, 12:20], cache=cache), expected, rtol=1e-4, atol=1e-5)


def test_a_step_moves_the_states_with_gradients_too():
    model, ids, cache = build(), torch.arange(8)[None], Cache(SMALL, 1, 8)
    steps = [model(ids[:, i : i + 1], cache=cache) for i in range(8)]
    torch.testing.assert_close(torch.cat(steps, 1), model(ids), rtol=1e-4, atol=1e-5)


def test_no_prefilled_prompt_is_kept_for_nothing(monkeypatch):
    """Prompt 0 is done after the two samples that begin together; the others run out of samples."""
    seen, start = [], Sampler.start

    def watched(self):
        busy = start(self)
        seen.append((len(self.prefilled), len(self.waiting)))
        return busy
    monkeypatch.setattr(Sampler, "start", watched)
    generate(build(), [[1, 2], [3, 4], [5, 6]], max_new_tokens=4, samples=3, slots=4,
             admit=lambda i, j: "done" if (i, j) == (0, 2) else "go")
    assert seen[-1] == (0, 0) and all(kept <= waiting for kept, waiting in seen)


def test_training_after_inference_mode():
    model, ids = build(), torch.arange(36)[None]
    with torch.inference_mode():  # what it leaves in caches must not reach autograd
        model(ids, cu_seqlens=[0, 17, 36])
    model(ids, cu_seqlens=[0, 17, 36]).sum().backward()


# Files


@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": True}, {"mamba_rms_norm": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_round_trip(tmp_path, change, dtype):
    model = build(replace(SMALL, **change)).to(dtype)
    model.save_pretrained(tmp_path)
    again = FalconH1.from_pretrained(tmp_path)
    assert again.config == model.config
    for name, v in model.state_dict().items():
        assert torch.equal(v, again.state_dict()[name]) and v.dtype == again.state_dict()[name].dtype
    assert FalconH1.from_pretrained(tmp_path, dtype=torch.float32).lm_head.weight.dtype == torch.float32
    assert sum(1 for _ in again.parameters()) == sum(1 for _ in model.parameters())  # tied ones stay one


def test_every_tensor_is_accounted_for(tmp_path):
    build().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {k: v.clone() for k, v in read_safetensors(path).items()}
    name = "model.layers.0.mamba.D"
    embeddings = "model.embed_tokens.weight"
    for change, message in (({name: None}, f"{name} is missing"), ({embeddings: None}, f"{embeddings} is missing"),
                            ({"stranger": torch.ones(1)}, "stranger is not part"),
                            ({name: torch.ones(5)}, rf"{name} is \(5,\), config.json makes it \(4,\)")):
        write_safetensors(path, {k: v for k, v in (tensors | change).items() if v is not None})
        with pytest.raises(ValueError, match=message):
            FalconH1.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value, message in (("mamba_d_ssm", 21, "mamba_d_ssm 21"), ("model_type", "llama", "model_type"), ("rope_theta", None, "")):
        changed = config | {key: value} if value else {k: v for k, v in config.items() if k != key}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message or "field rope_theta is missing"):
            FalconH1.from_pretrained(tmp_path)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.data())
def test_damaged_safetensors_are_refused_or_read(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("files") / "m.safetensors"
    write_safetensors(path, {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)})
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="safetensors"):
            read_safetensors(path)
        return
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    try:
        tensors = read_safetensors(path)
    except ValueError:
        return
    assert sum(v.numel() * v.element_size() for v in tensors.values()) == 30  # what it read was inside the file


@pytest.mark.parametrize("entry", [
    {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}, {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}, {"dtype": "F9", "shape": [2], "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": [2]}, {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, 7,
    {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}, {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
    {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}])
def test_headers_that_lie(tmp_path, entry):
    path, header = tmp_path / "m.safetensors", json.dumps({"a": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_safetensors(path)
    path.write_bytes(struct.pack("<Q", 2**60) + header)
    with pytest.raises(ValueError, match="header of"):
        read_safetensors(path)
