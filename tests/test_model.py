"""Falcon-H1 against transformers (golden files, and live where it is installed); cache, checkpoints."""

import json
import math
import shutil
import struct
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import model as m
from data import Tokenizer
from model import (PRESETS, Cache, FalconH1, FalconH1Config, add_product, attend, generate, read_safetensors,
                   ssm_multipliers, token_logprobs, tokens_of_chunk, write_safetensors)
from tests import ranks as processes
from tests.make_golden import (BIASES, CHECKPOINTS, GOLDEN, SHAPE, TEXTS, random_checkpoint, tokenizer_kinds,
                               train_tokenizer)

pytestmark = pytest.mark.filterwarnings("ignore:llama.cpp would")  # of random models, which nobody serves
SMALL = FalconH1Config(
    vocab_size=37, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, mamba_d_ssm=20, mamba_n_heads=4, mamba_d_head=5, mamba_d_state=7,
    mamba_n_groups=2, rope_theta=100.0, max_position_embeddings=256, initializer_range=0.3,
    embedding_multiplier=1.7, lm_head_multiplier=0.9, attention_in_multiplier=1.1, key_multiplier=0.7,
    attention_out_multiplier=0.8, ssm_in_multiplier=1.2, ssm_out_multiplier=0.6,
    ssm_multipliers=(0.5, 1.5, 0.8, 1.3, 0.9), mlp_multipliers=(1.4, 0.75))

def build(config=SMALL, seed=0):
    torch.manual_seed(seed)
    model = FalconH1(config)
    with torch.no_grad():  # nothing may hide behind an initial 0 or 1
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model

@pytest.fixture(params=["both", "attention", "mamba"])
def model(request):
    return build(replace(SMALL, mixers=request.param))

def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

# 1. The forward pass ----------------------------------------------------------------------------------------

def test_presets_are_the_published_models():
    for preset, count in {"0.5b": 521_411_104, "1.5b": 1_554_859_392, "1.5b-deep": 1_554_872_208,
                          "3b": 3_149_387_264, "7b": 7_585_648_736, "34b": 33_642_516_224}.items():
        with torch.device("meta"):
            model = FalconH1(PRESETS[preset])
        assert sum(p.numel() for p in model.parameters()) == count
        assert preset != "7b" or len(model.state_dict()) == 751
    c, large = PRESETS["7b"], PRESETS["34b"]  # the published config.json, and that of 34b where it is known
    for ours, published in (
            (c.embedding_multiplier, 5.656854249492381), (c.lm_head_multiplier, 0.013020833333333334),
            (c.attention_out_multiplier, 0.10416666666666667), (c.ssm_in_multiplier, 0.4166666666666667),
            (c.key_multiplier, 0.030690398488999456), (c.ssm_out_multiplier, 0.11785113019775793),
            (c.ssm_multipliers, (0.3535533905932738, 0.25, 0.1767766952966369, 0.5, 0.3535533905932738)),
            (c.mlp_multipliers, (0.2946278254943948, 0.032552083333333336)),
            (large.mlp_multipliers, (0.1767766952966369, 0.011160714285714284)),
            (large.key_multiplier, 0.011048543456039804)):
        assert ours == pytest.approx(published, rel=1e-14)

def test_each_mixer_alone_has_as_many_parameters():
    """SMALL by hand. Attention's matrices have 2 x 6 x 6 = 72 columns of 12, Mamba's 72 + 20. The MLP gets a
    third of them, in multiples of 8: 24 and 32. Beside them Mamba has 240 + 12 + 20 small ones."""
    counts = {}
    for mixers in ("attention", "mamba"):
        c = m.single_mixer(SMALL, mixers)
        assert replace(c, mixers="both", intermediate_size=20) == SMALL
        block = FalconH1(c).model.layers[0]
        assert (block.mamba is None, block.self_attn is None) == (mixers == "attention", mixers == "mamba")
        counts[mixers] = sum(p.numel() for p in block.parameters())
    assert counts == {"attention": 24 + 12 * 72 + 3 * 12 * 52, "mamba": 24 + 12 * 92 + 272 + 3 * 12 * 44}
    of_7b = [PRESETS["7b"], *(m.single_mixer(PRESETS["7b"], mixers) for mixers in counts)]
    for forms in ([PRESETS["tiny"], PRESETS["tiny-attention"], PRESETS["tiny-mamba"]], of_7b):
        assert [c.mixers for c in forms] == ["both", *counts]
        with torch.device("meta"):
            hybrid, *alone = [sum(p.numel() for p in FalconH1(c).parameters()) for c in forms]
        assert alone == pytest.approx([hybrid] * 2, rel=0.01)

def test_tiny_models_take_one_thread_unless_the_environment_says_otherwise(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    m.set_threads(PRESETS["tiny"])
    assert calls == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    for name, c in PRESETS.items():
        m.set_threads(c)
        assert calls == [1] * name.startswith("tiny")
        calls.clear()

def test_the_branches_add_up():
    """A block of both, with either branch's last matrix at 0, is the block of the other one alone."""
    ids, both = torch.randint(37, (2, 30)), build()
    for mixers, other in (("attention", "mamba.out_proj"), ("mamba", "self_attn.o_proj")):
        alone = FalconH1(replace(SMALL, mixers=mixers))
        state = {name: v * (other not in name) for name, v in both.state_dict().items()}
        hybrid = FalconH1(SMALL)
        hybrid.load_state_dict(state)
        report = alone.load_state_dict(state, strict=False)
        assert not report.missing_keys and all(other.split(".")[0] in name for name in report.unexpected_keys)
        assert torch.equal(alone(ids), hybrid(ids))

def test_packed_documents_are_separate(model):
    ids, cu = torch.randint(37, (1, 60)), [0, 1, 20, 43, 60]
    packed = model(ids, cu_seqlens=torch.tensor(cu))
    for same in (np.array(cu), np.array(cu, np.int32), [*np.array(cu)], [*torch.tensor(cu)]):
        assert torch.equal(model(ids, cu_seqlens=same), packed)
    for start, end in zip(cu, cu[1:]):
        assert_close(packed[:, start:end], model(ids[:, start:end]))
        other = ids.clone()
        other[:, start:end] = (other[:, start:end] + 1) % 37
        same = model(other, cu_seqlens=cu)[0] == packed[0]  # to the last bit
        assert same[:start].all() and same[end:].all() and not same[start:end].all()

def test_packed_gradients_are_the_sum_of_separate_ones(model):
    """And recomputing activations changes nothing."""
    ids, cu = torch.randint(37, (1, 30)), [0, 11, 12, 30]
    grads = []
    packed, separate = [(ids, cu)], [(ids[:, a:b], None) for a, b in zip(cu, cu[1:])]
    for model.model.checkpoint_activations, parts in ((True, packed), (False, separate)):
        model.zero_grad()
        for part, bounds in parts:
            model(part, cu_seqlens=bounds).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (grads[0] - grads[1]).norm() < 1e-5 * grads[1].norm()

@pytest.mark.parametrize("targets", [[-1, 5, 0, 36, -7, 3], [-1] * 6])
def test_targets_give_log_probabilities_and_entropies_of_the_logits(targets):
    model, ids, targets = build(), torch.randint(37, (2, 3)), torch.tensor(targets).view(2, 3)
    logp = (model(ids) / 0.7).log_softmax(-1)
    expected = logp.gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    logprobs, entropy = model(ids, targets=targets, temperature=0.7)
    assert_close(logprobs, expected)
    assert_close(entropy, -(logp.exp() * logp).sum(-1) * (targets >= 0))
    ours, theirs = (torch.autograd.grad(v.sum(), list(model.parameters())) for v in (logprobs, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize("inside", [False, True])
def test_autocast_trains_and_decodes(inside):
    """With the backward pass inside of it or not, the gradient is that of a float32 loss of such logits."""
    model, ids, targets = build(), torch.randint(37, (2, 12)), torch.randint(37, (2, 12))
    gradients = []
    for fused in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids)
            logprobs = (model(ids, targets=targets)[0] if fused else
                        logits.float().log_softmax(-1).gather(2, targets[..., None]))
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients.append(torch.autograd.grad(logprobs.sum(), list(model.parameters())))
    for ours, expected in zip(*gradients):
        assert (ours - expected).norm() < 0.03 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cache = model.new_cache(2, 12)
        parts = torch.cat([model(part, cache=cache) for part in ids.split([7, 1, 1, 3], 1)], 1)
        assert (parts - logits).norm() < 0.03 * logits.norm()
        assert len(generate(model, [[1, 2]], max_new_tokens=3)[0].tokens) == 3

def test_ssm_multipliers_by_hand():
    want = [0.5] * 20 + [1.5] * 20 + [0.75] * 14 + [1.0] * 14 + [3.0] * 4  # z, x, B, C, dt
    some, ones = (replace(SMALL, ssm_multipliers=v) for v in ((0.5, 1.5, 0.75, 1.0, 3.0), (1.0,) * 5))
    assert ssm_multipliers(some, torch.bfloat16, torch.device("cpu")).tolist() == want
    assert ssm_multipliers(ones, torch.bfloat16, torch.device("cpu")) is None

def test_short_documents_never_ask_cudnn(monkeypatch):
    seen, allowed = [], torch.backends.cuda

    def watched(q, k, v, **kwargs):
        seen.append((allowed.cudnn_sdp_enabled(), allowed.flash_sdp_enabled()))
        return q
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    attend(*(torch.randn(1, 10, heads, 8) for heads in (4, 2, 2)), (0, 3, 10))
    assert seen == [(False, True)] * 2

def test_padding_changes_no_attention():
    """What a GPU does with long documents, here of 1,030 tokens: padded to 2,048."""
    leaves = [torch.randn(1, heads, 1030, 4, requires_grad=True) for heads in (2, 1, 1)]
    values = [function(*leaves) for function in (m.causal_of_long, m.causal)]
    padded, plain = ((y, *torch.autograd.grad(y.sin().sum(), leaves)) for y in values)
    torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-5)

@pytest.mark.gpu
def test_kernels_of_attention(monkeypatch):
    """Short documents use flash, long ones cuDNN, with padding: the same values and gradients, in bf16."""
    cu = (0, 3, 10, 130, 131, 300, 300 + m.LONG, 301 + 2 * m.LONG)
    leaves = [torch.randn(1, cu[-1], heads, 128, dtype=torch.bfloat16, device="cuda") for heads in (6, 1, 1)]
    leaves = [v.requires_grad_() for v in leaves]

    def results():
        y = attend(*leaves, cu)
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))
    with torch.profiler.profile() as profile:
        ours = results()
    kernels = {f"aten::_scaled_dot_product_{name}_attention" for name in ("flash", "cudnn")}
    kernels |= {f"{name}_backward" for name in kernels}
    assert kernels <= {event.key for event in profile.key_averages()}
    monkeypatch.setattr(m, "LONG", cu[-1])
    for one, other in zip(ours, results()):
        assert (one - other).norm() < 0.01 * other.norm()

@pytest.mark.parametrize(("ids", "options", "message"), [
    ([[37]], {}, r"input_ids: an id is outside 0\.\.36"), ([[-1]], {}, "an id is outside"),
    ([1], {}, r"input_ids: got \(1,\)"), (np.zeros((0, 3), int), {}, r"input_ids: got \(0, 3\)"),
    ([[1, 2]], {"targets": torch.ones(1, 1)}, r"targets: got \(1, 1\)"),
    ([[1, 2]], {"targets": torch.tensor([[2, 37]])}, "targets: an id is above 36"),
    ([[1]], {"targets": torch.ones(1, 1).long(), "temperature": 0}, "temperature: got 0, expected"),
    ([[1], [2]], {"cache": Cache(SMALL, 1, 4)}, "expected 2 slots"),
    ([[1]], {"cache": Cache(SMALL, 1, 4, dtype=torch.bfloat16)}, "cache: got .*bfloat16.* model .*float32"),
    ([[1]], {"cache": Cache(SMALL, 1, 4, device="meta")}, "cache: got .*meta.* the model .*cpu")])
def test_forward_refuses(ids, options, message):
    with pytest.raises(ValueError, match=message):
        build()(torch.tensor(ids), **options)

@pytest.mark.parametrize("options", [{}, {"targets": torch.ones(1, 3, dtype=torch.long)}])
def test_ids_on_the_cpu_serve_a_model_elsewhere(options):
    outputs = build().to("meta")(torch.ones(1, 3, dtype=torch.long), **options)
    assert all(v.is_meta for v in outputs)

def test_training_after_inference_mode():
    with torch.inference_mode():  # what it leaves in caches must not reach autograd
        build()(torch.arange(36)[None], cu_seqlens=[0, 17, 36])
    build()(torch.arange(36)[None], cu_seqlens=[0, 17, 36]).sum().backward()

# 2. The cache -----------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("cuts", [range(1, 40), [1], [39], [7, 8, 25], [17, 30]])
def test_cache_continues_anywhere(model, cuts):
    ids, cuts = torch.randint(37, (2, 40)), list(cuts)
    cache = model.new_cache(2, 40)
    parts = [model(ids[:, a:b], cache=cache) for a, b in zip([0, *cuts], [*cuts, 40])]
    full = model(ids)
    assert (torch.cat(parts, 1) - full).norm() < 1e-5 * full.norm()

def test_a_refused_forward_leaves_the_cache_as_it_was():
    model, ids = build(), torch.arange(36)[None]
    expected = model(ids[:, :20])[:, 12:]
    cache = Cache(SMALL, 1, 20)
    model(ids[:, :12], cache=cache)
    with pytest.raises(ValueError, match="cache: 32 tokens do not fit a length of 20"):
        model(ids[:, :20], cache=cache)
    assert_close(model(ids[:, 12:20], cache=cache), expected)

@pytest.mark.parametrize("checkpoint_activations", [False, True])
@pytest.mark.parametrize("cuts", [[8], [5, 8], [1, 2, 3, 4, 5, 6, 7, 8], [3, 7, 8]])
def test_a_cache_has_the_gradients_of_the_whole(model, cuts, checkpoint_activations):
    ids, cache = torch.arange(8)[None], model.new_cache(1, 8)
    model.model.checkpoint_activations = checkpoint_activations
    parts = torch.cat([model(ids[:, a:b], cache=cache) for a, b in zip([0, *cuts], cuts)], 1)
    weights = [*model.parameters()]
    results = [[y, *torch.autograd.grad(y.square().sum(), weights)] for y in (parts, model(ids))]
    for ours, whole in zip(*results):
        assert (ours - whole).norm() < 1e-5 * whole.norm()

def test_a_cache_may_grow_and_be_filled_without_gradients_before_they_are_asked_for(model):
    """Both used to end in an error of torch about views."""
    ids = torch.arange(8)[None]
    with torch.no_grad():
        cache = model.new_cache(1, 3)
        model(ids[:, :3], cache=cache)
    cache.grow([0], 8)
    parts = torch.cat([model(ids[:, 3:6], cache=cache), model(ids[:, 6:], cache=cache)], 1)
    assert_close(parts, model(ids)[:, 3:])
    weight = model.lm_head.weight  # nothing before it depends on the past's gradient
    ours, whole = (torch.autograd.grad(y.square().sum(), weight)[0] for y in (parts, model(ids)[:, 3:]))
    assert (ours - whole).norm() < 1e-5 * whole.norm()

@pytest.mark.parametrize("mixers", ["attention", "mamba"])
def test_two_ranks_share_a_row_of_one_mixer(tmp_path, mixers):
    """As of the hybrid in test_train_sft.py: with --cp 2 they compute loss and gradient of one process."""
    data.main(["make", "--out", str(tmp_path), "--sft", "12", "--rl", "2", "--heldout", "2"])
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "mamba_n_heads": 4,
             "mamba_d_head": 24}
    build(replace(PRESETS["tiny"], num_hidden_layers=2, mixers=mixers, **heads)).save_pretrained(tmp_path)
    body = partial(processes.compare_gradients, [tmp_path], str(tmp_path / "sft.jsonl"), [(2, 1, 4096)])
    assert processes.launch(body, ranks=2)[0].out.count("loss off by") == 1

# 3. Checkpoints ---------------------------------------------------------------------------------------------

def greedy(model, prompts, n):
    return [trace.tokens for trace in generate(model, prompts, max_new_tokens=n, temperature=0)]

@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_logits_and_greedy_tokens_are_those_of_transformers(name):
    model = FalconH1.from_pretrained(GOLDEN / name)
    expected = read_safetensors(GOLDEN / name / "expected.safetensors")
    ids, logits, tokens = (expected[key] for key in ("ids", "logits", "greedy"))
    ours = model(ids)
    assert ours.dtype == CHECKPOINTS[name][1]
    error = (ours.float() - logits.float()).abs().max() / logits.abs().max()
    assert error < (1e-5 if ours.dtype == torch.float32 else 2e-2)  # a bf16 has 8 bits
    if ours.dtype == torch.float32:
        assert greedy(model, [ids[0, :3].tolist(), ids[1, :17].tolist()], tokens.shape[1]) == tokens.tolist()

@pytest.mark.parametrize("change", [
    {}, {"mamba_norm_before_gate": True, "mamba_n_groups": 2}, {"mamba_n_groups": 4},
    {"tie_word_embeddings": True, "mamba_rms_norm": False}, BIASES, {"mamba_conv_bias": False},
    {"num_key_value_heads": 1, "head_dim": 10, "mamba_d_conv": 2, "mamba_chunk_size": 256},
    {"hidden_size": 20, "mamba_d_ssm": 33, "mamba_n_heads": 3, "mamba_d_head": 11, "mamba_d_state": 16,
     "time_step_limit": (0.01, 0.9)}])
@torch.no_grad()
def test_transformers_agrees_both_ways(change, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = random_checkpoint(change)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, ids = FalconH1.from_pretrained(tmp_path / "theirs"), torch.randint(SHAPE["vocab_size"], (3, 70))
    expected = theirs(ids).logits
    assert (ours(ids) - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    if "time_step_limit" not in change:  # which transformers forgets when it decodes
        prompts = [ids[0, :1].tolist(), ids[1, :67].tolist(), ids[2, :30].tolist()]
        left = torch.tensor([[0] * (67 - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (67 - len(p)) + [1] * len(p) for p in prompts])
        batch = theirs.generate(left, attention_mask=mask, do_sample=False, max_new_tokens=64, pad_token_id=0)
        assert greedy(ours, prompts, 64) == batch[:, 67:].tolist()
    ours.save_pretrained(tmp_path / "ours")
    Tokenizer.byte_level().save(tmp_path / "ours")
    load = transformers.FalconH1ForCausalLM.from_pretrained
    again, report = load(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (again.generation_config.eos_token_id, again.generation_config.pad_token_id) == ([260, 258], 256)
    assert_close(again(ids).logits, ours(ids))
    # In bf16 (last: .to() changes theirs) ours is as near to the float32 logits as theirs.
    half = FalconH1.from_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    usual = theirs.to(torch.bfloat16)(ids).logits - expected
    assert (half(ids) - expected).norm() < 1.25 * usual.norm()

@pytest.mark.parametrize("name", ["falcon", "llama3"])
def test_ids_are_those_of_tokenizers(name):
    tokenizer = Tokenizer.from_pretrained(GOLDEN / f"tokenizer-{name}")
    for text, ids in json.loads((GOLDEN / f"tokenizer-{name}" / "expected.json").read_text()):
        assert tokenizer.encode(text, special=True) == ids
        typed = tokenizer.encode(text)  # where a special token's text is text
        assert "<sep>" in text or tokenizer.decode(typed) == text  # <sep> swallows spaces
        assert "<|im_start|>" not in text or tokenizer.special["<|im_start|>"] not in typed

WORDS = st.sampled_from([*TEXTS, " ", "  ", "\t", "\n", "<think>", "<sep>", "clock", "12345", "¿", "\\frac{",
                         "}", "漢", "🏳️‍🌈", "'ll", "İ"])

@settings(deadline=None, max_examples=100)
@given(text=st.one_of(st.text(), st.lists(st.one_of(WORDS, st.text(max_size=5)), max_size=8).map("".join)))
def test_ids_of_any_text_are_those_of_tokenizers(both, text):
    for theirs, ours in both:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, special=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)

@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """[(theirs, ours)], one of each kind."""
    pytest.importorskip("tokenizers")
    pairs = []
    for name, (pre_tokenizer, model) in tokenizer_kinds().items():
        folder = tmp_path_factory.mktemp(name)
        theirs = train_tokenizer(pre_tokenizer, **model)
        theirs.save(str(folder / "tokenizer.json"))
        pairs.append((theirs, Tokenizer.from_pretrained(folder)))
    return pairs

@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": True}, {"mamba_rms_norm": False},
                                    {"mixers": "attention"}, {"mixers": "mamba"}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back(tmp_path, change, dtype):
    model = build(replace(SMALL, **change)).to(dtype)
    model.save_pretrained(tmp_path)
    again, mapped = FalconH1.from_pretrained(tmp_path), FalconH1.from_pretrained(tmp_path, mapped=True)
    assert again.config == model.config
    for name, v in model.state_dict().items():
        for other in (again, mapped):
            assert torch.equal(v, other.state_dict()[name]) and v.dtype == other.state_dict()[name].dtype
    assert FalconH1.from_pretrained(tmp_path, dtype=torch.float32).lm_head.weight.dtype == torch.float32
    assert len([*again.parameters()]) == len([*model.parameters()])  # tied ones stay one
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        mapped.model.embed_tokens.weight.zero_()  # a private copy of the page, not the file
    assert (tmp_path / "model.safetensors").read_bytes() == before

@pytest.mark.parametrize("mixers", ["attention", "mamba"])
def test_other_engines_refuse_a_single_mixer(tmp_path, mixers):
    """Both of its names: transformers goes by model_type, vLLM and llama.cpp's converter by architectures."""
    for config in (SMALL, replace(SMALL, mixers=mixers)):
        build(config).save_pretrained(tmp_path / config.mixers)
    published, raw = (json.loads((tmp_path / x / "config.json").read_text()) for x in ("both", mixers))
    assert raw == published | {"mixers": mixers, "model_type": "falcon_h1_single",
                               "architectures": ["FalconH1SingleForCausalLM"]}
    assert (published["model_type"], published["architectures"]) == ("falcon_h1", ["FalconH1ForCausalLM"])
    assert "mixers" not in published
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="falcon_h1_single.* does not recognize"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / mixers)

@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDEN / "tied-bf16-shards", tmp_path / "model")

def test_what_servers_read_in_a_loaded_folder_is_saved(folder, tmp_path):
    ids = {"bos_token_id": 1, "eos_token_id": [11, 228], "pad_token_id": 0}
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ids))
    contents = {name.replace("*", "tool_use"): f"\r\n{name} é".encode() for name in m.BESIDE}
    (folder / "additional_chat_templates").mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    model = FalconH1.from_pretrained(folder)
    (folder / "chat_template.jinja").unlink()  # saved from memory: the folder may be gone, or the same one
    for place in (tmp_path / "saved", folder):
        model.save_pretrained(place)
        assert {name: (place / name).read_bytes() for name in contents} == contents
        assert json.loads((place / "config.json").read_text()).items() >= ids.items()
    FalconH1(model.config).save_pretrained(tmp_path / "new")  # another model of this shape has no tokenizer
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"config.json", "model.safetensors"}

@pytest.mark.parametrize(("change", "said"), [
    ({}, None), ({"mlp_bias": True, "mamba_rms_norm": False, "mamba_norm_before_gate": True}, None),
    ({"tie_word_embeddings": True, "lm_head_multiplier": SMALL.embedding_multiplier}, None),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"), ({"attention_bias": True}, "attention_bias"),
    ({"mamba_norm_before_gate": True}, "mamba_norm_before_gate"),
    ({"time_step_limit": (0, 0.5), "attention_bias": True}, "attention_bias, time_step_limit")])
def test_what_llama_cpp_computes_otherwise_is_said_once(tmp_path, change, said):
    model = build(replace(SMALL, **change))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            model.save_pretrained(tmp_path)
    expected = [f"llama.cpp would load this model but compute wrong logits: {said}"] if said else []
    assert [str(warning.message) for warning in caught] == expected

MAMBA = {"mixers": "mamba"}
SINGLE = {"model_type": "falcon_h1_single", **MAMBA}

def refuses(folder, message, **arguments):
    with pytest.raises(ValueError, match=message):
        FalconH1.from_pretrained(folder, **arguments)

@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "llama"}, "'llama'; only 'falcon_h1' is supported"), ({"hidden_act": 3}, "hidden_act"),
    ({"rope_scaling": {}}, "rope_scaling is {}"), ({"rope_theta": 1e4}, "rope_theta 10000.0 contradicts"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"), ({"mamba_n_groups": 3}, "not a multiple of"),
    ({"rope_parameters": {"rope_theta": 1e4, "factor": 2}}, "only a rope_theta"), ({"head_dim": 5}, "is odd"),
    ({"rope_parameters": None}, "config.json: field rope_theta is miss"), ({"rms_norm_eps": -1}, "negative"),
    ({"mamba_norm_before_gate": None}, "mamba_norm_before_gate is miss"), ({"hidden_size": 0}, "size is 0"),
    ({"mamba_d_ssm": 21}, "mamba_d_ssm 21, but"), ({"mamba_d_ssm": "20"}, "ssm is '20', expected int"),
    ({"mamba_rms_norm": 1}, "mamba_rms_norm is 1, expected bool"), ({"hidden_size": True}, "size is True"),
    ({"num_hidden_layers": 3}, "layers.2.* is missing"), ({"mlp_multipliers": 3}, "mlp_multipliers is 3"),
    ({"num_hidden_layers": 1}, "layers.1.* not part"), ({"tie_word_embeddings": False}, "lm_head.* missing"),
    (MAMBA, "is 'falcon_h1'; only 'falcon_h1_single' is supported with mixers 'mamba'"),
    ({"model_type": "falcon_h1_single"}, "'falcon_h1_single'; only 'falcon_h1' is supported"),
    (SINGLE | {"mixers": "both"}, "with mixers 'both'"), (SINGLE | {"mixers": None}, "with mixers 'both'"),
    (SINGLE | {"mixers": "ssm"}, "mixers is 'ssm', expected 'both', 'attention' or 'mamba'"),
    (SINGLE | {"mixers": ["mamba"]}, "mixers is "), (SINGLE | {"mixers": {}}, "mixers is {}"),
    (SINGLE, "self_attn.* is not part of this model"), ({"model_type": None, **MAMBA}, "mixers 'mamba'"),
    ({"surprise": 1}, "field surprise is unknown; it may"), ({"vocab_size": 10**30}, "a number above 0 and"),
    ({"rms_norm_eps": math.nan}, "is nan, .* finite"), ({"time_step_limit": [1, 0]}, "its lower end"),
    ({"time_step_limit": [math.nan, 1]}, "its lower"), ({"mlp_multipliers": [1, math.inf]}, "finite"),
    ({"ssm_multipliers": [1, 1]}, "expected 5 numbers"), ({"vocab_size": 42}, r"weight is \(41, 12\)"),
    ("", ""), ("[]", ""), ("3", ""), ("{", ""), ("[" * 100_000, ""), ("\x00", ""),
    ('{"model_type": "falcon_h1"}', ""), ('{"time_step_limit": [0, {"__float__": 1' + "0" * 400 + "}]}", "")])
def test_a_config_is_refused(folder, change, message):
    path = folder / "config.json"
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    refuses(folder, f"{path}: .*{message}" if isinstance(change, str) else message)

def test_fields_that_change_no_logit_are_ignored(folder):
    path = folder / "config.json"
    usual, raw = FalconH1Config.from_json(path), json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"use_cache": False, "mamba_expand": 2, "surprise": None}))
    assert FalconH1Config.from_json(path) == usual

def test_shards_and_their_index_are_refused(folder):
    index = folder / "model.safetensors.index.json"
    good, where = index.read_text(), json.loads(index.read_text())["weight_map"]
    name, shard = min(where.items())
    for change, message in (({name: "elsewhere"}, "elsewhere: No such file"), ({name: "../x"}, "not a file"),
                            ({"stranger": shard}, f"{shard}: tensor stranger is missing")):
        index.write_text(json.dumps({"weight_map": where | change}))
        refuses(folder, message)
    for text in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3, "b": "x"}}', "[" * 100_000):
        index.write_text(text)
        refuses(folder, "index.json: expected a weight_map")
    index.write_text(good)
    (folder / shard).write_bytes((folder / shard).read_bytes()[:-1])
    refuses(folder, f"{shard}: not a whole safetensors file")
    (folder / shard).unlink()
    refuses(folder, f"{shard}: No such file")

def test_every_tensor_is_accounted_for(folder):
    tensors = {name: v.clone() for name, v in m.read_checkpoint(folder).items()}
    name, embeddings, head = "model.layers.0.mamba.D", "model.embed_tokens.weight", "lm_head.weight"
    for change, message in (
            ({name: None}, f"{name} is missing"), ({embeddings: None}, f"{embeddings} is missing"),
            ({"stranger": torch.ones(1)}, "stranger is not part"), ({name: torch.ones(4)}, "float32, the"),
            ({name: torch.ones(5)}, rf"{name} is \(5,\), config.json makes it \(4,\)"),
            ({name: torch.ones(4, dtype=torch.long)}, f"{name} is torch.int64"),
            ({head: tensors[embeddings] + 1}, "lm_head.weight differs from")):
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        write_safetensors(folder / "model.safetensors", changed)
        refuses(folder, message)
    tensors |= {head: tensors[embeddings], name: torch.ones(4)}
    write_safetensors(folder / "model.safetensors", tensors)
    model = FalconH1.from_pretrained(folder, dtype=torch.float32)
    assert model.model.layers[0].mamba.D.tolist() == [1] * 4

@settings(deadline=None, max_examples=80, derandomize=True)
@given(st.data())
def test_damaged_safetensors_are_refused_or_read(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("files") / "m.safetensors"
    write_safetensors(path, {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)})
    raw = bytearray(path.read_bytes())
    place, flipped = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 255))
    if flipped == 0:
        raw = raw[:place]
    else:
        raw[place] ^= flipped
    path.write_bytes(raw)
    try:
        assert sum(v.nbytes for v in read_safetensors(path).values()) == 30 and flipped  # inside the file
    except ValueError as error:
        assert "not a whole safetensors file" in str(error)

@pytest.mark.parametrize("entry", [
    7, {"data_offsets": [0, 80]}, {"data_offsets": [8, 16]}, {"data_offsets": [0, 8, 8]}, {"data_offsets": 0},
    {"data_offsets": [0, -8], "shape": [-2]}, {"shape": [2**62, 2**62, 0], "data_offsets": [0, 0]},
    {"shape": [2.0]}, {"shape": [-2]}, {"shape": 2}, {"dtype": "F9"}, {"dtype": ["F32"]}])
def test_headers_that_lie(tmp_path, entry):
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry if entry == 7 else good | entry}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_safetensors(path)
    path.write_bytes(struct.pack("<Q", 2**60) + header)
    with pytest.raises(ValueError, match="header of"):
        read_safetensors(path)

# 4. Log-probabilities without all logits --------------------------------------------------------------------

def test_tokens_of_chunk_by_hand():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert tokens_of_chunk(130048, cpu) == 258  # 2^25 / 130,048 = 258.02
    assert tokens_of_chunk(2**26, cpu) == 1
    on_gpu = {130048: 2048, 261120: 1024, 65536: 4096, 272: 4096, 2**28: 128}  # of 128, from 2^28 logits
    assert {words: tokens_of_chunk(words, gpu) for words in on_gpu} == on_gpu

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_are_the_whole(device, dtype):
    """In float32 the whole is torch's log_softmax, with its gradients; in bf16 one chunk."""
    torch.manual_seed(0)
    h, w, g = torch.randn(700, 32), 0.2 * torch.randn(512, 32), torch.randn(700, device=device)
    h, w = (v.to(device, dtype).requires_grad_() for v in (h, w))
    targets = torch.randint(512, (700,), device=device)
    logp = (h @ w.T * 0.7).log_softmax(-1)
    plain = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    chunked = [token_logprobs(h, w, targets, 0.7, chunk) for chunk in (700, 256, 128, 1)]
    plain, *results = [[*pair, *torch.autograd.grad(pair[0], (h, w), g)] for pair in (plain, *chunked)]
    whole = plain if dtype == torch.float32 else results[0]
    for ours, expected in zip(sum(results, []), len(results) * whole, strict=True):
        error = (ours.double() - expected.double()).norm() / expected.double().norm()
        assert error < (1e-6 if dtype == torch.float32 else 1e-3)  # sums may round to either of two bf16

def test_rows_without_targets_cost_no_product(monkeypatch):
    """As a rank's share of a long prompt: torch.compile would compile once more, for logits of no rows."""
    monkeypatch.setattr(m, "_head_functions", lambda compiled: [pytest.fail] * 2)
    h, w = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    logprobs, _ = token_logprobs(h, w, torch.arange(5), rows=torch.arange(0))
    logprobs.mul_(2).sum().backward()  # in place: no result is a view of another
    assert not any(v.any() for v in (logprobs, h.grad, w.grad))

def test_no_second_derivative_goes_missing():
    h, w = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    logprobs, _ = token_logprobs(h, w, torch.arange(5))
    with pytest.raises(ValueError, match="create_graph: got True"):  # the term of w^3 would be all
        torch.autograd.grad(logprobs.sum() + w.pow(3).sum(), w, create_graph=True)

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_product_adds_in_float32(device, dtype):
    """512 + 2^-10 * 2^-4 is 512 in bf16, which has 8 bits: a product rounded before it is added loses it."""
    a, b = torch.tensor([[16.0, 2**-10], [1.0, 0.0]]), torch.tensor([[32.0, 1.0], [2**-4, 0.0]])
    total = torch.ones(2, 2, device=device)
    add_product(total, a.to(device, dtype), b.to(device, dtype))
    assert total.tolist() == [[513 + 2**-14, 17], [33, 2]]

