"""Published checkpoints and tokenizers: the logits and ids of transformers and tokenizers, from golden files, and live where they are
installed; and files that are not as they should be."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Tokenizer
from model import FalconH1, FalconH1Config, read_safetensors, write_safetensors
from model import generate

from .make_golden import BIASES, CHECKPOINTS, GOLDEN, SHAPE, TEXTS, random_checkpoint, tokenizer_kinds, train_tokenizer


def greedy(model, prompts, n):
    return [trace.tokens for trace in generate(model, prompts, max_new_tokens=n, temperature=0)]


# Golden files


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_golden_checkpoint(name):
    model, expected = FalconH1.from_pretrained(GOLDEN / name), read_safetensors(GOLDEN / name / "expected.safetensors")
    ids, logits, tokens = (expected[key] for key in ("ids", "logits", "greedy"))
    with torch.no_grad():
        ours = model(ids)
    assert ours.dtype == CHECKPOINTS[name][1]
    error = (ours.float() - logits.float()).abs().max() / logits.abs().max()
    assert error < (1e-5 if ours.dtype == torch.float32 else 2e-2)  # a bf16 has 8 bits
    if ours.dtype == torch.float32:
        assert greedy(model, [ids[0, :3].tolist(), ids[1, :17].tolist()], tokens.shape[1]) == tokens.tolist()


@pytest.mark.parametrize("name", ["falcon", "llama3"])
def test_golden_tokenizer(name):
    tokenizer = Tokenizer.from_pretrained(GOLDEN / f"tokenizer-{name}")
    for text, ids in json.loads((GOLDEN / f"tokenizer-{name}" / "expected.json").read_text()):
        assert tokenizer.encode(text, special=True) == ids
        assert "<sep>" in text or tokenizer.decode(tokenizer.encode(text)) == text  # <sep> swallows spaces
        assert "<|im_start|>" not in text or tokenizer.special["<|im_start|>"] not in tokenizer.encode(text)  # typed text is text


# Live

VARIATIONS = [
    {}, {"mamba_rms_norm": False}, {"mamba_norm_before_gate": True}, {"mamba_norm_before_gate": True, "mamba_n_groups": 2},
    {"mamba_n_groups": 4}, {"tie_word_embeddings": True}, BIASES, {"mamba_conv_bias": False, "mamba_rms_norm": False},
    {"num_key_value_heads": 1, "head_dim": 10, "mamba_d_conv": 2, "mamba_chunk_size": 256},
    {"hidden_size": 20, "mamba_d_ssm": 33, "mamba_n_heads": 3, "mamba_d_head": 11, "mamba_d_state": 16, "time_step_limit": (0.01, 0.9)},
]


@pytest.mark.parametrize("change", VARIATIONS)
@torch.no_grad()
def test_logits_and_greedy_tokens_of_transformers(change, tmp_path):
    pytest.importorskip("transformers")
    theirs = random_checkpoint(change)
    theirs.save_pretrained(tmp_path)
    ours, ids = FalconH1.from_pretrained(tmp_path), torch.randint(SHAPE["vocab_size"], (3, 70))
    expected = theirs(ids).logits
    assert (ours(ids) - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    if "time_step_limit" not in change:  # which transformers forgets when it decodes
        prompts = [ids[0, :1].tolist(), ids[1, :67].tolist(), ids[2, :30].tolist()]
        left = torch.tensor([[0] * (67 - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (67 - len(p)) + [1] * len(p) for p in prompts])
        batch = theirs.generate(left, attention_mask=mask, do_sample=False, max_new_tokens=64, pad_token_id=0)
        assert greedy(ours, prompts, 64) == batch[:, 67:].tolist()
    half, halved = FalconH1.from_pretrained(tmp_path, dtype=torch.bfloat16), theirs.to(torch.bfloat16)  # last: .to() changes theirs
    error, usual = (half(ids) - expected).norm(), (halved(ids).logits - expected).norm()
    assert error < 1.25 * usual


@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": True, "mamba_rms_norm": False}])
@torch.no_grad()
def test_transformers_reads_what_we_write(change, tmp_path):
    transformers = pytest.importorskip("transformers")
    random_checkpoint(change).save_pretrained(tmp_path / "theirs")
    ours = FalconH1.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    tokenizer = Tokenizer.byte_level()
    tokenizer.save(tmp_path / "ours")
    again, report = transformers.FalconH1ForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(SHAPE["vocab_size"], (1, 30))
    torch.testing.assert_close(again(ids).logits, ours(ids), rtol=1e-5, atol=1e-5)
    assert again.generation_config.eos_token_id == list(tokenizer.stop_ids)


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


WORDS = st.sampled_from([*TEXTS, " ", "  ", "\t", "\n", "<think>", "<sep>", "clock", "12345", "¿", "\\frac{", "}", "漢", "🏳️‍🌈", "'ll", "İ"])


@settings(deadline=None, max_examples=100)
@given(text=st.one_of(st.text(), st.lists(st.one_of(WORDS, st.text(max_size=5)), max_size=8).map("".join)))
def test_ids_of_tokenizers(both, text):
    for theirs, ours in both:
        assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False).ids
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


# What is not as it should be


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDEN / "tied-bf16-shards", tmp_path / "model")


def refuses(folder, message, **arguments):
    with pytest.raises(ValueError, match=message):
        FalconH1.from_pretrained(folder, **arguments)


def rewrite(path, change):
    text = json.loads(path.read_text())
    change(text)
    path.write_text(json.dumps(text))


@pytest.mark.parametrize("change, message", [
    ({"surprise": 1}, "field surprise is unknown"), ({"hidden_act": "gelu"}, "hidden_act is supported with the value 'silu' only"),
    ({"rope_theta": 1e4}, "rope_theta 10000.0 contradicts"), ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
    ({"rope_parameters": None}, "field rope_theta is missing"), ({"mamba_norm_before_gate": None}, "field mamba_norm_before_gate is missing"),
    ({"mamba_d_ssm": 21}, "mamba_d_ssm 21 is not"), ({"mamba_d_ssm": "20"}, "mamba_d_ssm is '20', expected a whole number"),
    ({"hidden_size": 0}, "hidden_size is 0"), ({"hidden_size": True}, "hidden_size is True"), ({"hidden_size": 10**30}, "hidden_size is 1000"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"), ({"rms_norm_eps": -1}, "rms_norm_eps not below"),
    ({"mamba_n_heads": None, "head_dim": None, "mamba_d_head": "auto"}, "field mamba_n_heads is missing"),
    ({"mamba_rms_norm": 1}, "mamba_rms_norm is 1, expected true or false"),
    ({"ssm_multipliers": [1, 1]}, r"ssm_multipliers is \(1, 1\), expected 5 numbers"), ({"mlp_multipliers": 3}, "mlp_multipliers is 3"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"), ({"head_dim": 5}, "head_dim 5"),
    ({"time_step_limit": [1, 0]}, "time_step_limit"), ({"num_hidden_layers": 10**9}, "tensor model.layers.999999999.mamba.D is missing"),
    ({"num_hidden_layers": 1}, "tensor model.layers.1.* is not part"), ({"vocab_size": 42}, r"lm_head.weight is \(41, 12\)"),
    ({"tie_word_embeddings": False}, "lm_head.weight is missing"), ({"model_type": "llama"}, "model_type is 'llama'")])
def test_config_is_refused(folder, change, message):
    rewrite(folder / "config.json", lambda config: config.update(change))
    refuses(folder, message)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, "\x00", '{"model_type": "falcon_h1"}',
                                  '{"time_step_limit": [0, {"__float__": 1' + "0" * 400 + "}]}"])
def test_no_config(folder, text):
    (folder / "config.json").write_text(text)
    refuses(folder, "config.json: ")


def test_what_the_published_format_derives(folder):
    usual = FalconH1Config.from_json(folder / "config.json")
    rewrite(folder / "config.json", lambda c: c.update(mamba_d_head="auto", mamba_d_ssm=None, mamba_expand=20 / 12, use_cache=False))
    assert FalconH1Config.from_json(folder / "config.json") == usual
    rewrite(folder / "config.json", lambda c: (c.pop("mamba_proj_bias"), c.pop("time_step_limit"), c.update(mamba_d_head=5)))
    assert FalconH1Config.from_json(folder / "config.json") == usual


def test_shards_and_index_are_refused(folder):
    index = folder / "model.safetensors.index.json"
    good, where = index.read_text(), json.loads(index.read_text())["weight_map"]
    name, shard = min(where.items())
    for change, message in (({name: "elsewhere.safetensors"}, "elsewhere.safetensors: No such file"), ({name: "../x"}, "not a file name"),
                            ({"stranger": shard}, "stranger is missing"), ({name: 3}, "weight_map"), ({name: max(where.values())}, "is here, but")):
        rewrite(index, lambda text, change=change: text["weight_map"].update(change))
        refuses(folder, message)
        index.write_text(good)
    for text in ("", "[]", "{}", '{"weight_map": []}', "[" * 100_000):
        index.write_text(text)
        refuses(folder, "index.json: expected a weight_map")
    index.write_text(good)
    (folder / shard).write_bytes((folder / shard).read_bytes()[:-1])
    refuses(folder, f"{shard}: not a whole safetensors file")
    (folder / shard).unlink()
    refuses(folder, f"{shard}: No such file")
    index.unlink()
    refuses(folder, "model.safetensors: No such file")


def test_mistyped_tensors_and_a_head_that_contradicts(folder):
    tensors = {name: v.clone() for path in folder.glob("model-*") for name, v in read_safetensors(path).items()}
    name, path = "model.layers.0.mamba.D", folder / "model.safetensors"

    def write(change):
        write_safetensors(path, tensors | change)
    write({name: torch.ones(4, dtype=torch.long)})
    refuses(folder, f"{name} is torch.int64")
    refuses(folder, f"{name} is torch.int64", dtype=torch.float32)
    write({name: torch.ones(4)})
    refuses(folder, f"{name} is torch.float32, expected torch.bfloat16")
    assert FalconH1.from_pretrained(folder, dtype=torch.float32).model.layers[0].mamba.D.tolist() == [1] * 4
    head = tensors["model.embed_tokens.weight"].clone()
    write({"lm_head.weight": head})
    assert FalconH1.from_pretrained(folder).lm_head.weight is not None
    write({"lm_head.weight": head + 1})
    refuses(folder, "lm_head.weight differs")


def test_mapped_tensors_stay_in_their_file(folder):
    mapped, copied = FalconH1.from_pretrained(folder, mapped=True), FalconH1.from_pretrained(folder)
    before = (folder / "model-00001-of-00003.safetensors").read_bytes()
    for (name, a), b in zip(mapped.named_parameters(), copied.parameters()):
        assert torch.equal(a, b), name
    with torch.no_grad():
        mapped.model.embed_tokens.weight.zero_()  # a private copy of the page, not the file
    assert (folder / "model-00001-of-00003.safetensors").read_bytes() == before
