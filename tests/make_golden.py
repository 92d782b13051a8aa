"""Write tests/golden/: tiny checkpoints and tokenizers with what transformers and tokenizers make of them:
so parity is checked where neither is installed.

    pip install -r requirements-dev.txt && python -m tests.make_golden
"""

import json
import shutil
from pathlib import Path

import torch

GOLDEN = Path(__file__).parent / "golden"

# Odd sizes, and multipliers that are all different: what is left out or applied twice shows.
SHAPE = dict(
    vocab_size=41, hidden_size=12, intermediate_size=18, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, max_position_embeddings=512, mamba_d_ssm=20, mamba_n_heads=4,
    mamba_d_head=5, mamba_n_groups=1, mamba_d_state=7, mamba_chunk_size=8, mamba_norm_before_gate=False,
    mamba_rms_norm=True, rope_parameters={"rope_theta": 1e11, "rope_type": "default"},
    embedding_multiplier=5.7, lm_head_multiplier=0.7, attention_in_multiplier=1.1, key_multiplier=0.4,
    attention_out_multiplier=0.9, ssm_in_multiplier=1.25, ssm_out_multiplier=0.24,
    ssm_multipliers=[0.35, 0.25, 0.18, 0.5, 0.36], mlp_multipliers=[0.88, 0.59],
    bos_token_id=None, eos_token_id=None, pad_token_id=None)
BIASES = dict(attention_bias=True, mlp_bias=True, projectors_bias=True, mamba_proj_bias=True)
CHECKPOINTS = {  # name: (what differs from SHAPE, dtype, largest shard)
    "plain": (dict(num_hidden_layers=1, mamba_rms_norm=False, mamba_conv_bias=False), torch.float32, "1GB"),
    "groups": (dict(mamba_n_groups=2), torch.float32, "1GB"),
    "biases": (dict(num_hidden_layers=1, mamba_norm_before_gate=True, **BIASES), torch.float32, "1GB"),
    "tied-bf16-shards": (dict(mamba_n_groups=2, tie_word_embeddings=True), torch.bfloat16, "6KB"),
}
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXTS = [
    "", " ", "\n\n  \t x", "Hello, world! It's 12345 o'clock; don't you'll see?", "  leading and trailing  ",
    "naïve café — “quotes”…",
    "def f(x):\n    return x ** 2  # square\n\n\nprint(f(3))",
    r"\frac{a_1}{b^{2}} \le \sqrt{x} $\alpha$ \boxed{42}",
    "日本語のテキスト、漢字と仮名。",
    "emoji 😀👩‍👩‍👧‍👦🇩🇪 done", "١٢٣ and ½ and Ⅷ", "a" * 50, "<|im_start|>user\nhi<|im_end|>",
    "x<sep> y", "\x00\x7f\u200b\ufeff", "\r\n\r\nA\r",
    "ǅ ß ſ İ", "1,234.56 + 7e-8 = ?", "https://example.org/?q=1&r=%20#top"]

def random_checkpoint(change, seed=0):
    """transformers' model with every parameter random: nothing may hide behind an initial 0 or 1."""
    import transformers

    torch.manual_seed(seed)
    theirs = transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**(SHAPE | change))).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            scale = "norm" in name or name.endswith(".D")
            p.copy_(torch.rand_like(p) + 0.5 if scale else torch.randn_like(p) * 0.3)
            if name.endswith("A_log"):
                p.copy_(torch.linspace(0, 2.5, len(p)))
    return theirs

def train_tokenizer(pre_tokenizer, **model):
    """A small byte-level BPE on this project's own words, with added tokens of every manner."""
    import tokenizers as tk

    t = tk.Tokenizer(tk.models.BPE(**model))
    t.pre_tokenizer, t.decoder = pre_tokenizer, tk.decoders.ByteLevel()
    names = "<|pad|> <|begin_of_text|> <|end_of_text|> <|im_start|> <|im_end|> <think> </think>".split()
    corpus = TEXTS * 3
    for path in sorted(GOLDEN.parent.parent.glob("*.py")):
        corpus += path.read_text().splitlines()[:300]
    trainer = tk.trainers.BpeTrainer(
        vocab_size=400, special_tokens=names, show_progress=False,
        initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(corpus, trainer)
    t.add_tokens(["<sep>", "clock"])
    return t

def tokenizer_kinds():
    """{name: (pre-tokenizer, arguments of the BPE model)}: what published tokenizers are made of."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Sequence, Split

    plain = ByteLevel(add_prefix_space=False, use_regex=False)
    return {
        "gpt2": (ByteLevel(add_prefix_space=False), {}),
        "falcon": (Sequence([Punctuation("contiguous"), ByteLevel(add_prefix_space=False), Digits(True),
                             Split(Regex("[0-9]{3}"), "isolated")]), {}),
        "llama3": (Sequence([Split(Regex(LLAMA3), "isolated"), plain]), {"ignore_merges": True}),
        "split": (Sequence([Split(" ", "merged_with_next"), Digits(False), Punctuation("isolated"),
                            plain]), {}),
    }

@torch.no_grad()
def main():
    from safetensors.torch import save_file

    shutil.rmtree(GOLDEN, ignore_errors=True)
    for name, (change, dtype, shard) in CHECKPOINTS.items():
        theirs, folder = random_checkpoint(change).to(dtype), GOLDEN / name
        theirs.save_pretrained(folder, max_shard_size=shard)
        (folder / "generation_config.json").unlink(missing_ok=True)
        ids = torch.randint(SHAPE["vocab_size"], (2, 21))
        prompts = [ids[0, :3].tolist(), ids[1, :17].tolist()]  # alone, hence without padding
        replies = [theirs.generate(torch.tensor([p]), do_sample=False, max_new_tokens=24)[0] for p in prompts]
        greedy = torch.stack([reply[len(p) :] for reply, p in zip(replies, prompts)])
        expected = {"ids": ids, "logits": theirs(ids).logits.contiguous(), "greedy": greedy}
        save_file(expected, folder / "expected.safetensors")
    for old in ("plain", "groups"):  # the key as published in 2025
        config = json.loads((path := GOLDEN / old / "config.json").read_text())
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        path.write_text(json.dumps(config, indent=2))
    for name in ("falcon", "llama3"):
        pre_tokenizer, model = tokenizer_kinds()[name]
        theirs, folder = train_tokenizer(pre_tokenizer, **model), GOLDEN / f"tokenizer-{name}"
        folder.mkdir()
        theirs.save(str(folder / "tokenizer.json"), pretty=False)
        expected = [[text, theirs.encode(text, add_special_tokens=False).ids] for text in TEXTS]
        (folder / "expected.json").write_text(json.dumps(expected) + "\n")

if __name__ == "__main__":
    main()
