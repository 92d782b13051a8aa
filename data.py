r"""Data for the whole pipeline: tokenizer, chat format, problems, curation, packing, loader.

    python data.py make --out runs/tiny/data --seed 0               # long divisions: sft, rl and heldout.jsonl
    python data.py convert train.jsonl --out sft.jsonl              # worked solutions (GSM8K, MATH) -> SFT samples
    python data.py convert traces.jsonl --problems rl.jsonl --out sft.jsonl      # correct rollouts -> SFT samples
    python data.py curate traces.jsonl --problems rl.jsonl --out rl_kept.jsonl   # the RL pass-rate filter
    python data.py show sft.jsonl                                   # a few rows, and a table by domain

Everything travels in files that a person can open, one JSON object a line:

    problems   {"id", "domain", "prompt", "answer"} and any further fields, kept ("tests", "choices", "solution", ...)
    sft        {"messages": [{"role", "content"}], "domain", "weight"}; reasoning stands between <think> and </think>
    traces     {"problem", "text", "answer", "correct", "stop", ...}, one sampled reply a line, written by
               eval.py; correct is true, false, or null (unknown)

A *sample* is one tokenised conversation; a *document* is a sample inside a *pack*, a row of documents laid end to end
that makes one forward pass; a *rollout* is a reply sampled from a model.

Deviations from the paper (Falcon-H1R, arXiv 2601.02346): only correct rollouts become SFT samples, where it excepts
very hard problems and theorems; its filters for wrong languages and unreliable tool calls are left out. It does not say
where easy and hard begin, what share a "small random subset" is (EASY, HARD, KEEP_TRUNCATED), nor how it packs.

To copy this, nothing else is needed: numpy and tiktoken.
"""

import argparse
import ast
import fcntl
import glob
import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import textwrap
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex  # tiktoken's own dependency
import tiktoken

# 1. Tokenizer ---------------------------------------------------------------------------------------------------------

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # what a model may write inside its own turn
CONTROL = ("<|pad|>", "<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")
STOP = ("<|im_end|>", "<|end_of_text|>")

# render_chat below, in the template language of transformers, for those who load a checkpoint elsewhere. No line breaks
# between tags, as it depends on the engine's settings whether those count.
CHAT_TEMPLATE = (
    "{{ bos_token + '\\n' }}{% set ns = namespace(last=-1, tools=false, text='') %}"
    "{% for m in messages %}{% if m.role == 'tool' or m.role == 'assistant' and '<tool_call>' in m.content %}"
    "{% set ns.tools = true %}{% endif %}{% if m.role == 'assistant' and not add_generation_prompt %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set ns.text = m.content %}"
    "{% if m.role == 'assistant' and not ns.tools and loop.index0 != ns.last %}"
    "{% set parts = m.content.split('<think>') %}{% set ns.text = parts[0].split('</think>')[-1] %}"
    "{% for part in parts[1:] %}{% if '</think>' in part %}{% set ns.text = ns.text + part.split('</think>')[-1] %}"
    "{% endif %}{% endfor %}{% set ns.text = ns.text.strip() %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + ns.text + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


# GPT-2's spelling of bytes as characters: printable ones are themselves, the others take the code points from 256 on.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
SPELLING = [chr(byte) if byte in PRINTABLE else chr(256 + byte - sum(p < byte for p in PRINTABLE)) for byte in range(256)]


def tokenizer_json(special):
    """The tokenizer.json of byte tokens 0 to 255 without merges. special: dict from special tokens to their ids."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    # TAGS are not "special" there, so that servers, which skip special tokens by default, leave reasoning marked.
    added = [{"id": i, "content": name, **flags, "special": name not in TAGS} for name, i in special.items()]
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": bytewise, "post_processor": None, "decoder": bytewise,
            "model": {"type": "BPE", "vocab": {c: byte for byte, c in enumerate(SPELLING)}, "merges": []}}


# The pre-tokenizers, functions from a piece of text to smaller ones. What a delimiter does, in the tokenizers library's words:
# it is "Removed", "Isolated", "MergedWithPrevious" or "MergedWithNext", or makes one piece with its neighbours, "Contiguous".
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# A tokenizer must not change its mind with the Unicode version of whoever reads it. To the tokenizers library, which knows Unicode
# 16, later characters are unassigned; to `regex` they may be letters. So patterns see U+10FFFF there, unassigned for everybody.
AFTER_UNICODE_16 = (
    "558 58b-58c 5c8-5c9 88f b53-b54 c5c cdc 1acf-1af0 208f 209d-209f 20c1-20c4 2b96 2e60-2e63 a7ce-a7cf a7d2 a7d4 a7dd "
    "a7e2 a7f1 ab6c-ab6d fbc3-fbd2 fd90-fd91 fdc8-fdce 107bb-107bf 10940-10959 10ec5-10ec7 10ec9-10eee 10ef0-10efb 11b0a "
    "11b60-11b67 11db0-11ddb 11de0-11de9 11df0-11df1 1246f 12475-1247f 12550-12686 16ea0-16eb8 16ebb-16ed3 16ff2-16ff6 "
    "187f8-187ff 18cd6-18cda 18d09-18d20 18d80-18df2 18e00-19191 191a0-191d2 1b123-1b128 1b168 1ccfa-1ccfc 1ceba-1ced0 "
    "1ced2-1ced4 1cedd-1cefd 1d127-1d128 1d1eb-1d1ff 1d250-1d281 1d6a6 1db00-1db1c 1df1f-1df24 1df2b-1df81 1df90-1df96 "
    "1dfcd-1dfff 1e6c0-1e6de 1e6e0-1e6f5 1e6fe-1e6ff 1f1ae 1f6d8-1f6d9 1f777-1f77a 1f7da-1f7db 1f7f1-1f7ff 1f8d0-1f8d8 "
    "1fa54-1fa57 1fa8a-1fa8e 1fac8 1facc-1facd 1fadd 1faea-1faeb 1faef 1faf9-1fafa 1fbfa 2b73a-2b73f 2b81e 2cea2-2cead "
    "323b0-33479 3d000-3fc3f")
UNKNOWN = regex.compile("[" + "".join("-".join(f"\\U{c:0>8}" for c in r.split("-")) for r in AFTER_UNICODE_16.split()) + "]")


def split_at(pattern, behavior, invert=False):
    pattern = regex.compile(pattern)

    def split(text):
        pieces, end = [], 0  # (piece, whether it is a delimiter)
        for match in pattern.finditer(UNKNOWN.sub("\U0010ffff", text)):
            start, previous, end = match.start(), end, match.end()
            pieces += [(text[previous:start], invert), (text[start:end], not invert)]
        pieces = [piece for piece in [*pieces, (text[end:], invert)] if piece[0]]
        if behavior in ("Isolated", "Removed"):
            return [piece for piece, delimiter in pieces if behavior == "Isolated" or not delimiter]
        if behavior == "MergedWithNext":
            pieces.reverse()
        joined, before = [], False
        for piece, delimiter in pieces:
            joins = delimiter == before if behavior == "Contiguous" else delimiter and not before
            if joins and joined:
                joined[-1] = piece + joined[-1] if behavior == "MergedWithNext" else joined[-1] + piece
            else:
                joined.append(piece)
            before = delimiter
        return joined[::-1] if behavior == "MergedWithNext" else joined

    return split


def pre_tokenizers(spec):
    """The "pre_tokenizer" of a tokenizer.json -> list of functions, to be applied one after another. ValueError naming the first
    component that is not supported."""
    if spec is None:
        return []
    kind = spec["type"]
    if kind == "Sequence":
        return [stage for part in spec["pretokenizers"] for stage in pre_tokenizers(part)]
    if kind == "Split":
        ((syntax, pattern),) = spec["pattern"].items()
        pattern = regex.escape(pattern) if syntax == "String" else pattern
        return [split_at(pattern, spec["behavior"], spec["invert"])]
    if kind == "Digits":
        return [split_at(r"\p{N}", "Isolated" if spec["individual_digits"] else "Contiguous")]
    if kind == "Punctuation":
        return [split_at(r"[!-/:-@\[-`{-~]|\p{P}", spec["behavior"])]
    if kind == "ByteLevel":
        space = [lambda text: [text if text.startswith(" ") else " " + text]] if spec["add_prefix_space"] else []
        return space + ([split_at(GPT2_WORDS, "Isolated")] if spec["use_regex"] else [])
    raise ValueError(f"pre_tokenizer {kind} is not supported")


def merge(word, order):
    """Byte-pair encoding as published: while a listed pair is there, join the leftmost of those listed first.

    word: list of bytes; order: dict from a pair to its place in the list. Returns (tokens, place of the last pair joined)."""
    last = None
    while pairs := [(order[pair], i) for i, pair in enumerate(zip(word, word[1:])) if pair in order]:
        last, i = min(pairs)
        word = [*word[:i], word[i] + word[i + 1], *word[i + 2 :]]
    return word, last


class Tokenizer:
    """Text <-> token ids: byte-level BPE by tiktoken, and the special tokens that a chat needs.

    tiktoken joins any neighbours that make a token, the tokenizers library only pairs that are listed. Both do the same if
    tiktoken is given exactly the tokens which `merge` makes of their own bytes: wherever neighbours X, Y that make such a token T
    come up, everything between X's start and Y's end has gone as it would have gone in T alone, so (X, Y) is the pair that is
    listed. Other tokens never come up at all, but for a whole word where "ignore_merges" says so.

    Attributes: special (dict from an added token's text to its id), vocab_size (the largest id plus one), stop_ids
    (tuple of the ids at which generation ends).
    """

    def __init__(self, files):
        """files: the texts of tokenizer.json and tokenizer_config.json. KeyError, TypeError or ValueError if they are not such."""
        self.files, whole, config = files, *(json.loads(files[name]) for name in ("tokenizer.json", "tokenizer_config.json"))
        model, added = whole["model"], whole["added_tokens"]
        for name, got, supported in (
                ("model", model["type"], ("BPE",)), ("normalizer", whole["normalizer"], (None,)),
                ("decoder", (whole["decoder"] or {}).get("type"), ("ByteLevel",)),
                *((f"model.{name}", model.get(name), (None, False, "")) for name in (
                    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback"))):
            if got not in supported:
                raise ValueError(f"{name} {short(got)} is not supported")
        self.stages = pre_tokenizers(whole["pre_tokenizer"])
        self.special = {token["content"]: token["id"] for token in added}
        byte = {c: bytes([i]) for i, c in enumerate(SPELLING)}
        ordinary = {token["content"] for token in added if not token["special"]}
        names = {id: b"".join(byte[c] for c in name) for name, id in model["vocab"].items() if name not in self.special or name in ordinary}
        vocab = {name: id for id, name in names.items()}
        ids = [*model["vocab"].values(), *(id for name, id in self.special.items() if name not in model["vocab"])]
        if bad := [id for id, count in Counter(ids).items() if count > 1 or type(id) is not int or id < 0]:
            raise ValueError(f"token id {short(bad[0])} is no natural number or there twice")
        if missing := [i for i in range(256) if bytes([i]) not in vocab]:
            raise ValueError(f"model.vocab has no token for byte {missing[0]}")
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        order = {(left, right): i for i, (left, right) in enumerate(tuple(b"".join(byte[c] for c in half) for half in pair) for pair in pairs)}
        for left, right in order:
            if left + right not in vocab:
                raise ValueError(f"model.merges makes {short((left + right).decode(errors='replace'))}, which is not in model.vocab")
        made = {name: merge([bytes([b]) for b in name], order) for name in vocab}
        ranks = {name: 256 + last if len(name) > 1 else name[0] for name, (tokens, last) in made.items() if len(tokens) == 1}
        self.encoding = tiktoken.Encoding("falcon", pat_str=r"(?s).+", mergeable_ranks=ranks, special_tokens={})
        self.ids = {rank: vocab[name] for name, rank in ranks.items()}
        self.whole_words = {name: id for name, id in vocab.items() if name not in ranks} if model.get("ignore_merges") else {}
        self.bytes = names | {id: content.encode() for content, id in self.special.items()}
        # Added tokens are cut out of the text first, the longest at a place: those with "normalized" false, then the others.
        self.added, self.cuts = {token["content"]: token for token in added}, []
        for normalized in (False, True):
            found = sorted((regex.escape(t["content"]) for t in added if t["normalized"] == normalized), key=len, reverse=True)
            self.cuts += [regex.compile("|".join(found))] if found else []
        self.vocab_size = max(self.bytes) + 1
        eos = config.get("eos_token")
        stop = dict.fromkeys([*STOP, eos["content"] if isinstance(eos, dict) else eos])
        self.stop_ids = tuple(self.special[name] for name in stop if name in self.special)

    @classmethod
    def byte_level(cls):
        """One token per byte (ids 0 to 255), then the special tokens: a vocabulary that needs no training."""
        names = [*CONTROL, *TAGS]
        # A vocabulary of a multiple of 16 tiles well. What fills it up are tokens too: whatever is sampled decodes.
        names += [f"<|reserved_{i}|>" for i in range(-(256 + len(names)) % 16)]
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE, "padding_side": "left",
                  "bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>",
                  "clean_up_tokenization_spaces": False}
        whole = tokenizer_json({name: 256 + i for i, name in enumerate(names)})
        return cls({"tokenizer.json": json.dumps(whole, ensure_ascii=False, indent=1),
                    "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=1)})

    def encode(self, text, *, special=False):
        """Ids of text, a list of int; no BOS is added. special: read special tokens, as the tokenizers library does; by default
        they are plain text, for `<|im_end|>` typed by a user must not end his turn. Tokens that were added to the vocabulary
        without being special are always read. Surrogates without a partner become U+FFFD."""
        pieces = [(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), None)]
        for pattern in self.cuts:
            pieces = [cut for piece, id in pieces for cut in ([(piece, id)] if id is not None else self._cut(piece, pattern, special))]
        ids = []
        for piece, id in pieces:
            words = [piece] if piece and id is None else []
            for stage in self.stages:
                words = [part for word in words for part in stage(word)]
            for word in words:
                known = self.whole_words.get(word.encode()) if self.whole_words else None
                ids += [self.ids[rank] for rank in self.encoding.encode_ordinary(word)] if known is None else [known]
            ids += [] if id is None else [id]
        return ids

    def _cut(self, text, pattern, special):
        """Cut text at its added tokens -> pairs (text between, None) and (spelling, id), with the token's own flags at work."""
        begin = 0
        for match in pattern.finditer(text):
            token, (start, end) = self.added[match[0]], match.span()
            inside_word = regex.match(r"\w", text[start - 1 : start]) or regex.match(r"\w", text[end : end + 1])
            control = token["special"] or match[0] in TAGS
            if control and not special or token["single_word"] and inside_word:
                continue
            start = regex.search(r"(?r)\s*", text, pos=begin, endpos=start).start() if token["lstrip"] else start
            end = regex.match(r"\s*", text, pos=end).end() if token["rstrip"] else end
            yield from ((text[begin:start], None), (match[0], token["id"]))
            begin = end
        yield text[begin:], None

    def decode(self, ids):
        """Text of ids, special tokens included; bytes that are not UTF-8 become U+FFFD. ValueError at an unknown id."""
        try:
            return b"".join(self.bytes[int(i)] for i in ids).decode(errors="replace")
        except KeyError as error:
            raise ValueError(f"cannot decode {error}: token ids are 0 to {self.vocab_size - 1}") from None

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, as the tokenizers library and transformers read them, and
        generation_config.json, without which they would stop at the ids that some other model stops at."""
        generation = json.dumps({"eos_token_id": list(self.stop_ids)}, indent=1)
        for name, text in {**self.files, "generation_config.json": generation}.items():
            write_text(Path(folder) / name, text)

    @classmethod
    def from_pretrained(cls, folder):
        """Read folder/tokenizer.json, a byte-level BPE, and tokenizer_config.json beside it where there is one. ValueError naming
        the component, if it holds one that is not supported. A post_processor is not read: encode() adds no token."""
        path = Path(folder) / "tokenizer.json"
        try:
            config = path.with_name("tokenizer_config.json")
            return cls({path.name: path.read_text("utf-8"), config.name: config.read_text("utf-8") if config.exists() else "{}"})
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError, regex.error) as error:
            raise ValueError(f"{path}: not a tokenizer.json: {type(error).__name__} {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def reply_text(ids, tokenizer):
    """What a model wrote, without the token that ends it. ids: the tokens of a trace."""
    ended = ids and ids[-1] in tokenizer.stop_ids
    return tokenizer.decode(ids[:-1] if ended else ids)


def short(value, limit=100):
    text = json.dumps(value)
    return text if len(text) <= limit else text[:limit] + "..."


# 2. Chat format: ChatML, as Falcon-H1's published template writes it --------------------------------------------------
#
#     <|begin_of_text|>\n                          once, here and nowhere else: encode() adds none
#     <|im_start|>user\n2+2?<|im_end|>\n
#     <|im_start|>assistant\n<think>2+2=4</think>\boxed{4}<|im_end|>\n
#
# The generation prompt ends in `<|im_start|>assistant\n`; the model opens <think> itself. What the published model does
# in that last point is unknown, as is its role for tool results, here `tool`.

# role -> the roles it may follow
FOLLOWS = {"system": {None}, "user": {None, "system", "assistant"}, "assistant": {"user", "tool"}, "tool": {"assistant", "tool"}}


def render_chat(messages, tokenizer, *, generation_prompt=False):
    """Token ids of a conversation, and which of them the model is trained to write (paper, section 2).

    - Usually: reasoning is removed from all assistant turns but the last, and the loss falls on the last one alone.
      The model meets the same history when it is used, since nobody sends old reasoning back.
    - Tool calling (a message of role "tool", or <tool_call> in an assistant turn): reasoning is kept and the loss
      falls on every assistant turn, since the turns are steps of one train of thought.

    The loss covers what an assistant writes and the <|im_end|> that ends it, and no header. TAGS are special tokens in
    assistant turns and plain text elsewhere; all other special tokens are plain text wherever they are typed.

    messages is a list of {"role", "content"}, see FOLLOWS for the order of roles; generation_prompt appends the header of the reply
    to come, and all turns are then earlier ones. Returns (ids, loss_mask), lists of int and bool: loss_mask[i] says whether ids[i] is
    to be predicted. ValueError names the message and its field."""
    check_messages(messages, generation_prompt)
    assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    calls = any("<tool_call>" in messages[i]["content"] for i in assistant)
    tools = calls or any(message["role"] == "tool" for message in messages)
    last = None if generation_prompt or not assistant else assistant[-1]

    for name in ("<|begin_of_text|>", "<|im_start|>", "<|im_end|>"):
        if name not in tokenizer.special:
            raise ValueError(f"tokenizer: it has no {name}, which a conversation needs")
    bos, start, end = (tokenizer.special[name] for name in ("<|begin_of_text|>", "<|im_start|>", "<|im_end|>"))
    newline, pieces = tokenizer.encode("\n"), []  # (ids, whether there is loss on them)
    pieces.append(([bos, *newline], False))
    for i, message in enumerate(messages):
        role, content, loss = message["role"], message["content"], i == last or (tools and i in assistant)
        if i in assistant:
            body = encode_tags(content if loss else without_reasoning(content), tokenizer)
        else:
            body = tokenizer.encode(content)
        header = [start, *tokenizer.encode(role + "\n")]
        pieces += [(header, False), ([*body, end], loss), (newline, False)]
    if generation_prompt:
        pieces.append(([start, *tokenizer.encode("assistant\n")], False))
    return [i for ids, _ in pieces for i in ids], [loss for ids, loss in pieces for _ in ids]


def check_messages(messages, generation_prompt):
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: must be a list of at least one message")
    before = None
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else message
        if role not in [*FOLLOWS]:
            raise ValueError(f"messages[{i}].role: {short(role)} is none of {', '.join(FOLLOWS)}")
        if type(message.get("content")) is not str:
            raise ValueError(f"messages[{i}].content: must be a string, not {short(message.get('content'))}")
        if before not in FOLLOWS[role]:
            raise ValueError(f"messages[{i}].role: {role} may not {f'follow {before}' if before else 'come first'}")
        before = role
    if generation_prompt and before not in FOLLOWS["assistant"]:
        raise ValueError(f"messages[{i}].role: {before} leaves nothing to reply to; end with user or tool")


def without_reasoning(content):
    """content without its <think> blocks, stripped. A block that never ends goes to the next one, or to the end."""
    head, *blocks = content.split("<think>")
    kept = [block.rpartition("</think>")[2] for block in blocks if "</think>" in block]
    return "".join([head.rpartition("</think>")[2], *kept]).strip()


def encode_tags(content, tokenizer):
    """Ids of content with TAGS as special tokens, where the tokenizer has them."""
    ids = []
    for piece in re.split(f"({'|'.join(TAGS)})", content):
        tag = tokenizer.special.get(piece) if piece in TAGS else None
        ids += tokenizer.encode(piece) if tag is None else [tag]
    return ids


# 3. Files, and problems read from them --------------------------------------------------------------------------------


def write_text(path, text):
    """Write a file whole or not at all: a reader never meets half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written: {error.strerror}") from None


def write_jsonl(path, records):
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def read_records(path):
    """Read .jsonl, .jsonl.gz or a JSON array of objects; blank lines are skipped, a byte order mark is tolerated.

    Yields (where, record): "FILE, line 3" (or "item 3" of an array, from 1), for error messages, and a dict. ValueError names file and
    line, at malformed JSON, invalid UTF-8, anything but objects, an empty file."""
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            lines = file.read().removeprefix(b"\xef\xbb\xbf").splitlines()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from None
    filled = [number for number, line in enumerate(lines) if line.strip()]
    if not filled:
        raise ValueError(f"{path}: empty; expected one JSON object a line")
    if lines[filled[0]].lstrip().startswith(b"["):
        items = parse_json(b"\n".join(lines), str(path))
        if not items:
            raise ValueError(f"{path}: an empty array")
        rows = ((f"{path}, item {number}", item) for number, item in enumerate(items, 1))
    else:
        rows = ((f"{path}, line {n + 1}", parse_json(lines[n], f"{path}, line {n + 1}")) for n in filled)
    for where, record in rows:
        yield where, check_record(record, where)


def check_record(record, where):
    if not isinstance(record, dict) or not record:
        raise ValueError(f"{where}: {short(record)} is not a JSON object with fields")
    return record


def parse_json(raw, where):
    try:
        return json.loads(raw.decode("utf-8-sig"))  # a byte order mark may come first
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: invalid UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:  # not only JSONDecodeError: also integers of thousands of digits
        raise ValueError(f"{where}: malformed JSON ({error})") from None


def text_field(record, name, where):
    """record[name] as a non-blank str; integers, which some files have as answers, are written out."""
    if name not in record:
        raise ValueError(f"{where}: field {name} is missing")
    value = record[name]
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: field {name} must be a string that is not empty, not {short(value)}")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{where}: field {name} holds half of a surrogate pair, which is no character")
    return value


@dataclass
class Problem:
    """One question whose answer can be verified."""

    id: str
    domain: str  # "math", "code", "science", ...: how the answer is verified, and the unit of the mixture
    prompt: str
    answer: str  # the reference; "" where only tests decide
    extra: dict = field(default_factory=dict)  # further fields: "tests" and "entry_point" of code, "solution", "level"
    where: str = field(default="", compare=False)  # "FILE, line 3", for errors

    def record(self):
        return {"id": self.id, "domain": self.domain, "prompt": self.prompt, "answer": self.answer, **self.extra}


PUBLIC = {"question": "prompt", "problem": "prompt", "unique_id": "id", "task_id": "id", "test": "tests",
          "canonical_solution": "solution", "answerKey": "answer", "ID": "id", "Problem": "prompt", "Solution": "solution",
          "Answer": "answer"}


def read_problems(path, limit=0, check=None):
    """The first limit problems (0: all) of a file, in our shape or a public one; what a line holds decides its shape.

        ours        id, domain, prompt, answer (or tests)
        GSM8K       question, answer: a worked solution whose last line is `#### 18`
        MATH        problem, answer; solution and unique_id if there
        HumanEval   task_id, prompt, test, entry_point; canonical_solution if there
        AIME        problem (or question), answer: a number
        MMLU, ARC   question, choices (or options), answer (or answerKey): see parse_choices

    A problem without an id is named after its file and line.

    check(problem): raises ValueError, saying why, if no reply could be compared with the problem's answer.

    Raises:
        ValueError that names file, line and field; also where two problems share an id.
    """
    problems, seen = [], {}
    for where, record in read_records(path):
        problem = parse_problem(record, where)
        if problem.id in seen:
            raise ValueError(f"{where}: field id: {short(problem.id)} is also the id of {seen[problem.id]}")
        seen[problem.id] = where.rpartition(", ")[2]
        try:
            if check is not None:
                check(problem)
        except ValueError as error:
            raise ValueError(f"{where}: field answer: {error}") from None
        problems.append(problem)
        if len(problems) == limit:
            break
    return problems


def parse_problem(record, where):
    """The Problem of one record; where is "FILE, line 3", for errors."""
    row, choices = dict(record), record.get("choices", record.get("options"))
    number = re.fullmatch(r"\s*-?[0-9.,]+\s*", str(record.get("answer")))
    gsm8k = "question" in record and "prompt" not in record and choices is None and not number
    if "prompt" not in record or "task_id" in record:  # a public shape: our names for its fields
        file, _, line = where.rpartition(", ")
        domain = "code" if "task_id" in record else "math" if choices is None else "science"
        row = {"id": f"{Path(file).name}:{line.split()[1]}", "domain": domain}
        for name, value in record.items():
            row[PUBLIC.get(name, name)] = text_field(record, name, where) if name in PUBLIC else value
    answer = "" if row.get("tests") and not row.get("answer") else text_field(row, "answer", where)
    if gsm8k:
        solution, hashes, answer = answer.rpartition("####")
        if not hashes or not answer.strip():
            raise ValueError(f"{where}: field answer must end in `#### x`, as GSM8K's; or call question prompt")
        row["solution"] = solution.strip()
    rest = {name: value for name, value in row.items() if name not in ("id", "domain", "prompt", "answer")}
    if choices is not None:
        rest.pop("options", None)
        rest["choices"], answer = parse_choices(choices, row.get("answer"), where)
        row["prompt"] = with_choices(text_field(row, "prompt", where), rest["choices"])
    named = [text_field(row, name, where) for name in ("id", "domain", "prompt")]
    return Problem(*named, answer.strip(), rest, where)


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def parse_choices(choices, answer, where):
    """The choices of a problem and the letter of the right one, whichever way a file writes them: choices as a list of texts,
    {"A": text, ...} or {"label": ["A", ...], "text": [text, ...]}; answer as a letter such as B or (B), a label, a choice's text,
    or its index, counted from 0. ValueError names the field."""
    labels = None
    if isinstance(choices, dict):
        labels = choices.get("label", sorted(choices))
        choices = choices.get("text", [choices[name] for name in sorted(choices)])
    texts = [str(text).strip() for text in choices] if isinstance(choices, list) else []
    if not 2 <= len(set(texts)) == len(texts) <= len(LETTERS) or "" in texts:
        raise ValueError(f"{where}: field choices must be 2 to {len(LETTERS)} different texts, not {short(choices)}")
    if not isinstance(labels, list) or len(labels) != len(texts):
        labels = list(LETTERS[: len(texts)])
    text, indices = str(answer).strip(), [str(i) for i in range(len(texts))]
    for known, name in ((labels, text.strip("().")), (texts, text), (indices, text)):
        if name in known and not (known is texts and isinstance(answer, int)):  # among numbers, 2 is the third and "2" itself
            return texts, LETTERS[known.index(name)]
    raise ValueError(f"{where}: field answer: {short(answer)} is no letter, text or index of the {len(texts)} choices")


def with_choices(prompt, choices):
    """The prompt, and the choices with their letters where it does not show them."""
    lettered = list(zip(LETTERS, choices))
    if all(re.search(rf"(?<!\w){letter}[).:]*\s*{re.escape(text)}", prompt) for letter, text in lettered):
        return prompt
    lines = "\n".join(f"{letter}. {text}" for letter, text in lettered)
    return f"{prompt.rstrip()}\n\n{lines}\n\nPut the letter of the right choice in \\boxed{{}}."


# 4. Problems made here: long division, every step of which can be checked -----------------------------------------------
#
#   family  level   prompt     answer  careful trace, one digit at a time    careless, some digits taken together
#   div     digits  43757/7=?  6251    43/7=6r1;17/7=2r3;35/7=5r0;07/7=1r0;  4375/7=625r0;07/7=1r0;
#   mod     digits  43758%7=?  1       43/7=6r1;17/7=2r3;35/7=5r0;08/7=1r1;  4375/7=625r0;08/7=1r1;
#
# A step brings down one digit or several behind the remainder so far; the first takes what it needs to reach the divisor. Every trace
# is true, but a step of several digits is more than a small model can do at once: there it errs, and its confidence falls. Careless
# traces are the more frequent the longer the number. So RL can learn to skip less, majority voting fails where hardly any trace is
# careful (the more so in mod, where wrong answers are few and collide), and DeepConf can find the one that is.

MIX = {(family, level): level - 4 for family in ("div", "mod") for level in range(5, 8)}  # weights: the longer, the more often
DIVISORS = (3, 6, 7, 9)  # 2, 4, 5, 8 divide powers of ten, so last digits give the remainder: careless steps would be learned in part
CAREFUL = 0.3, 0.015  # share of careful traces in the SFT data, at the easiest level and at the hardest
SKIP = 0.5  # in a careless trace: the probability that a step takes several digits, where as many are left
SKIP_WIDTHS = (4, 5)  # and how many, at random: of three at once a third would be learned
SPLIT = {"train": 0.6, "rl": 0.2, "heldout": 0.2}  # shares of all divisions there are


def make_problem(family, level, rng):
    """A random Problem. family: "div" (an exact division) or "mod" (its remainder); level: digits of the dividend."""
    low, high, divisor = 10 ** (level - 1), 10**level, rng.choice(DIVISORS)
    if family == "div":  # from ceil(low / divisor) on, the quotients of dividends of this many digits
        answer = rng.randrange(-(-low // divisor), -(-high // divisor))
        text = f"{answer * divisor}/{divisor}"
    elif family == "mod":
        dividend = rng.randrange(low, high)
        text, answer = f"{dividend}%{divisor}", dividend % divisor
    else:
        raise ValueError(f"family {family!r} is neither div nor mod")
    return Problem(text, "math", text + "=?", str(answer), {"family": family, "level": level})


def make_trace(problem, rng, careful):
    """A true computation of a made problem: steps `dividend/divisor=quotient r remainder`, see the table above."""
    digits, divisor = re.split("[/%]", problem.prompt.removesuffix("=?"))
    steps, remainder = [], ""
    while digits:
        several = [] if careful or rng.random() >= SKIP else [size for size in SKIP_WIDTHS if size <= len(digits)]
        size = rng.choice(several or [1 if steps or digits[0] >= divisor else 2])
        now, digits = f"{remainder}{digits[:size]}", digits[size:]
        quotient, remainder = divmod(int(now), int(divisor))
        steps.append(f"{now}/{divisor}={quotient:0{size if steps else 1}}r{remainder};")  # put together, the quotients are the answer
    return "".join(steps)


def random_point(text):
    """A number in [0, 1) that depends on text alone and is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def division_of(prompt):
    """What a made problem computes: 43758%7=? and 43758/7=? have one trace, and must not be told apart by a split."""
    return prompt.replace("%", "/")


def split_of(prompt):
    """ "train", "rl" or "heldout": decided by the division alone, so no seed or count can ever mix the three."""
    point = random_point(division_of(prompt))
    for name, share in SPLIT.items():
        point -= share
        if point < 0:
            return name
    return name  # rounding of the shares' sum


def make_problems(split, count, seed):
    """count different problems of one split, families and levels in the proportions of MIX. Where a level has too few different
    problems, others take its place; where all of them have, this is an error and not an endless search."""
    rng, problems = random.Random(f"{seed} {split}"), {}
    for _ in range(100 * count + 1000):
        if len(problems) == count:
            break
        problem = make_problem(*rng.choices(list(MIX), MIX.values())[0], rng)
        if split_of(problem.prompt) == split:
            problems[problem.id] = problem
    if len(problems) < count:
        raise ValueError(f"only {len(problems)} different {split} problems found, {count} wanted: ask for fewer")
    return list(problems.values())


def make_sft(problem, rng):
    """An SFT record with one trace. Its weight, and how likely it is careful, follow the level's place among MIX's levels."""
    levels = [level for _, level in MIX]
    ease = (max(levels) - problem.extra["level"]) / (max(levels) - min(levels) or 1)  # 1 is the easiest
    trace = make_trace(problem, rng, rng.random() < ease * CAREFUL[0] + (1 - ease) * CAREFUL[1])
    # The ease stands in for the pass rate that difficulty_weight takes: there is no model yet to measure one.
    record = sft_record(problem, f"<think>{trace}</think>\\boxed{{{problem.answer}}}", difficulty_weight(ease))
    return record | problem.extra


def check_disjoint(prompts):
    """Raise unless no division is in two of the sets. prompts: dict from a set's name to its prompts."""
    owner = {}
    for name, texts in prompts.items():
        for text in texts:
            if owner.setdefault(division_of(text), name) != name:
                raise ValueError(f"the problem {short(text)} is in both {owner[division_of(text)]} and {name}")


def make(args):
    """Generate long divisions: sft.jsonl, rl.jsonl and heldout.jsonl."""
    wanted = {"sft": ("train", args.sft), "rl": ("rl", args.rl), "heldout": ("heldout", args.heldout)}
    problems = {name: make_problems(split, count, args.seed) for name, (split, count) in wanted.items()}
    check_disjoint({name: [problem.prompt for problem in some] for name, some in problems.items()})
    rng, folder = random.Random(f"{args.seed} traces"), Path(args.out)
    write_jsonl(folder / "sft.jsonl", (make_sft(problem, rng) for problem in problems["sft"]))
    for name in ("rl", "heldout"):
        write_jsonl(folder / f"{name}.jsonl", (problem.record() for problem in problems[name]))
    print(f"{folder}: " + ", ".join(f"{name}.jsonl {len(some)} rows" for name, some in problems.items()))


def sft_record(problem, reply, weight):
    messages = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": reply}]
    return {"messages": messages, "domain": problem.domain, "weight": weight, "problem": problem.id}


# 5. Curation ----------------------------------------------------------------------------------------------------------

EASY, HARD = 0.75, 0.25  # pass rates: above is easy, below is hard


def difficulty_weight(pass_rate):
    """Weight of a sample in the SFT loss (paper, section 2): easy 0.5, medium 1, hard from 1.25 to 1.75 at rate 0."""
    if pass_rate > EASY:
        return 0.5
    return 1.0 if pass_rate >= HARD else 1.75 - 0.5 * pass_rate / HARD


def why_not_sft(record):
    """The paper's filters (section 2) for one SFT record: the reason to drop it, or None. Judged is its last message; where
    "correct" is there, it is the verdict on the reply: True, False, or None (unknown)."""
    if not record.get("correct", True):
        return "unknown verdict" if record["correct"] is None else "incorrect"
    _, opened, rest = record["messages"][-1]["content"].partition("<think>")
    reasoning, closed, reply = rest.partition("</think>")
    if not (opened and closed and reasoning.strip()):
        return "no reasoning"
    if not reply.strip():
        return "no answer"
    if record["domain"] == "math" and not re.search(r"\\boxed\s*\{\s*[^\s}]", reply):
        return "no \\boxed{}"
    fences = re.findall(r"^[ \t]*```(?:[Pp]ython3?|py)[ \t]*\n(.*?)(?:```|\Z)", reply, re.DOTALL | re.MULTILINE)
    if any(not is_python(textwrap.dedent(code)) for code in fences):
        return "python syntax error"
    return None


def is_python(code):
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last three: null bytes, absurd nesting
        return False
    return True


KEEP_TRUNCATED = 0.1  # "a small random subset"; the paper gives no number


def why_not_rl(problem_id, rollouts):
    """The paper's pass-rate filter (section 3) for one problem: the reason to drop it, or None.

    What every rollout solves teaches nothing. What none solves is kept if it is merely long (a random tenth of those
    where every rollout ran out of tokens), and dropped where the rollouts agree on a wrong answer, as the reference
    answer is then the likelier culprit. problem_id decides the random tenth, so that a second run keeps the same problems.
    rollouts: traces of this problem, dicts with "correct", "answer" (str or None) and "stop"; the paper takes
    8. Those of unknown verdict ("correct" is None) count nowhere."""
    if not rollouts:
        return "no rollouts"
    rollouts = [rollout for rollout in rollouts if rollout["correct"] is not None]
    if not rollouts:
        return "no known verdict"
    correct = sum(rollout["correct"] for rollout in rollouts)
    if correct == len(rollouts):
        return "solved by every rollout"
    if correct:
        return None
    if all(rollout["stop"] == "length" for rollout in rollouts):
        return None if random_point(f"truncated {problem_id}") < KEEP_TRUNCATED else "truncated in every rollout"
    # Answers are compared as text: too few agree if they are spelled differently, which errs on the side of keeping.
    answers = Counter(rollout["answer"] for rollout in rollouts if rollout["answer"] is not None)
    if answers and 2 * max(answers.values()) >= len(rollouts):  # half of them: the paper's 4 of 8
        return "wrong majority"
    return None


def read_rollouts(path, problems):
    """Traces of a file by problem: a dict id -> list of records, one entry for each of problems (possibly empty)."""
    rollouts = {problem.id: [] for problem in problems}
    kinds = {"problem": str, "text": str, "correct": bool | None, "stop": str, "answer": str | None}
    for where, record in read_records(path):
        for name, kind in kinds.items():
            if name not in record or not isinstance(record[name], kind):
                kind = getattr(kind, "__name__", kind)
                raise ValueError(f"{where}: field {name} must be {kind}, not {short(record.get(name, 'missing'))}")
        if record["problem"] not in rollouts:
            raise ValueError(f"{where}: field problem: {short(record['problem'])} is not in the file of problems")
        rollouts[record["problem"]].append(record)
    return rollouts


def curate(args):
    """Keep the problems that are neither solved nor hopeless, by the pass rate of rollouts."""
    problems = read_problems(args.problems)
    rollouts = read_rollouts(args.traces, problems)
    write_kept(args.out, [(problem.record(), why_not_rl(problem.id, rollouts[problem.id])) for problem in problems])


def convert(args):
    """Turn worked solutions, or correct rollouts, into SFT samples."""
    problems = read_problems(args.problems or args.source)
    records = from_rollouts(args.source, problems) if args.problems else map(from_solution, problems)
    write_kept(args.out, [(record, why_not_sft(record)) for record in records])


def write_kept(path, judged):
    """Write the records without a reason to drop them, print counts. judged: list of (record, reason or None)."""
    kept = [record for record, reason in judged if reason is None]
    write_jsonl(path, kept)
    reasons = Counter(reason for _, reason in judged if reason is not None).most_common()
    dropped = ", ".join(f"{count} {reason}" for reason, count in reasons) or "nothing"
    print(f"{path}: kept {len(kept)} of {len(judged)}; dropped {dropped}")


def from_solution(problem):
    """SFT record of a problem with a worked solution, which becomes the reasoning. Its difficulty is unknown: weight 1.

    GSM8K's calculator annotations, 48/2=<<48/2=24>>24, are taken out: no text that a model will meet has them.
    """
    solution = problem.extra.get("solution")
    if not isinstance(solution, str) or not problem.answer:
        raise ValueError(f"problem {short(problem.id)}: needs an answer and a worked one in the field solution")
    reasoning = re.sub(r"<<[^<>]*>>", "", solution).strip()
    return sft_record(problem, f"<think>{reasoning}</think>\\boxed{{{problem.answer}}}", 1.0)


def from_rollouts(path, problems):
    """SFT records of sampled replies, weighted by their problem's pass rate, that of its known verdicts.

    Unfinished replies count as incorrect; an unknown verdict stays unknown ("correct" is None)."""
    rollouts = read_rollouts(path, problems)
    for problem in problems:
        some = rollouts[problem.id]
        verdicts = [one["correct"] and one["stop"] == "stop" for one in some]  # None stays None
        known = [verdict for verdict in verdicts if verdict is not None]
        weight = difficulty_weight(sum(known) / max(1, len(known)))
        for rollout, correct in zip(some, verdicts):
            reply = rollout["text"].removesuffix("<|end_of_text|>").removesuffix("<|im_end|>")  # render_chat adds it
            yield sft_record(problem, reply, weight) | {"correct": correct}


# 6. Samples -----------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    ids: np.ndarray  # (t,) int32
    mask: np.ndarray  # (t,) bool: whether this token is to be predicted
    weight: float  # of each of its tokens in the loss
    domain: str
    trimmed: bool = False  # it was longer


class Place(NamedTuple):
    """A line of a file, known by its first byte. Only an error message takes the time to count the lines before it."""

    path: str
    offset: int

    def __str__(self):
        with open(self.path, "rb") as file:
            pieces = (file.read(min(2**20, self.offset - at)) for at in range(0, self.offset, 2**20))
            return f"{self.path}, line {1 + sum(piece.count(10) for piece in pieces)}"


BLOCK = 2**26  # bytes of a file that one rank checks at a time


def sizes_of(pattern):
    """Dict from files to their sizes in bytes. pattern: the files, separated by commas; * stands for any part of a name."""
    parts = [part.strip() for part in pattern.split(",")]
    paths = [path for part in parts for path in ([part] if os.path.exists(part) else sorted(glob.glob(part)) or [part])]
    if packed := [path for path in paths if path.endswith(".gz")]:
        raise ValueError(f"{packed[0]}: cannot be read from the middle; decompress it")
    return {path: os.path.getsize(path) for path in paths}


class SftFiles:
    """The samples of JSONL files, by number. Memory holds where each begins, and its domain; the files may be larger than memory.

    At the start every line is read and checked once, in blocks that ranks can share out among themselves. A sample is read
    again, and made into tokens, when it is asked for: so each rank reads its share, and nobody waits for hours of tokenising.

    pattern: the files, see sizes_of. A sample of more than max_tokens is an error, as silence would hide that its answer is never
    learned; trim cuts it on the right instead, as the paper does above 36K tokens, and marks it as trimmed. limit: so many samples
    only; 0: all. each(function, items, desc) -> list of function(item) shares work out among ranks; None: all of it here.
    rows: dict from each domain to an array of its samples' numbers; checksum: of all bytes. ValueError names file, line and field."""

    def __init__(self, pattern, tokenizer, max_tokens, trim=False, limit=0, each=None):
        self.tokenizer, self.max_tokens, self.trim = tokenizer, max_tokens, trim
        blocks = [Place(path, start) for path, size in sizes_of(pattern).items() for start in range(0, size or 1, BLOCK)]
        found = each(self._index, blocks, desc=f"reading {pattern}") if each else [self._index(block) for block in blocks]
        counts = [len(offsets) for offsets, _, _ in found]
        for path in {block.path: None for block in blocks}:
            if not any(count for count, block in zip(counts, blocks) if block.path == path):
                raise ValueError(f"{path}: empty; expected one JSON object a line")
        self.paths, self.block = [block.path for block in blocks], np.repeat(np.arange(len(blocks), dtype=np.int32), counts)
        self.offsets = np.concatenate([offsets for offsets, _, _ in found])[: limit or None]
        self.checksum = zlib.crc32(np.array([crc for _, _, crc in found]))
        rows = defaultdict(list)
        for first, (_, domains, _) in zip(np.cumsum([0, *counts]), found):
            for name, places in domains.items():
                rows[name].append(first + places[first + places < len(self)])
        self.rows = {name: np.concatenate(parts) for name, parts in sorted(rows.items()) if any(map(len, parts))}

    def _index(self, block):
        """The lines that begin in a block: their offsets, their places among them by domain, the checksum of their bytes."""
        offsets, domains, crc = [], defaultdict(list), 0
        with open(block.path, "rb") as file:
            if block.offset:  # to the first line that begins here: the end of the one that holds the byte before
                file.seek(block.offset - 1)
                file.readline()
            while (at := file.tell()) < block.offset + BLOCK and (line := file.readline()):
                crc = zlib.crc32(line, crc)
                if line.strip():
                    place = Place(block.path, at)
                    record = check_record(parse_json(line, place), place)
                    domain, _ = check_sft(record, place)
                    if len(line) > self.max_tokens and not self.trim:  # fewer bytes are fewer tokens, too
                        self._sample(record, place)
                    domains[domain].append(len(offsets))
                    offsets.append(at)
        return np.array(offsets, np.int64), {name: np.array(places) for name, places in domains.items()}, crc

    def _sample(self, record, place):
        sample, size = parse_sft(record, self.tokenizer, place), self.max_tokens
        if len(sample.ids) <= size:
            return sample
        if not self.trim:
            tokens = f"{len(sample.ids)} tokens, the limit is {size}"
            raise ValueError(f"{place}: field messages: {tokens}; raise it, allow trimming, or drop the line")
        return Sample(sample.ids[:size], sample.mask[:size], sample.weight, sample.domain, trimmed=True)

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i):
        """Sample number i, ValueError if its line is no sample any more, IndexError beyond the last."""
        place = Place(self.paths[self.block[i]], int(self.offsets[i]))
        with open(place.path, "rb") as file:
            file.seek(place.offset)
            return self._sample(check_record(parse_json(file.readline(), place), place), place)


def check_sft(record, where):
    """(domain, weight) of a record, after a look at all that a sample needs. where names it in errors."""
    domain, weight = text_field(record, "domain", where), record.get("weight", "missing")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < 1e6:
        raise ValueError(f"{where}: field weight must be a positive number, not {short(weight)}")
    try:
        check_messages(record.get("messages"), generation_prompt=False)
    except ValueError as error:
        raise ValueError(f"{where}: field {error}") from None
    if all(message["role"] != "assistant" for message in record["messages"]):
        raise ValueError(f"{where}: field messages: holds no assistant turn to learn from")
    return domain, float(weight)


def parse_sft(record, tokenizer, where):
    domain, weight = check_sft(record, where)
    ids, mask = render_chat(record["messages"], tokenizer)
    return Sample(np.array(ids, np.int32), np.array(mask), weight, domain)


def show(args):
    """Print a few rows of an SFT file or a file of problems, and a table by domain."""
    tokenizer = Tokenizer.from_pretrained(args.model) if args.model else Tokenizer.byte_level()
    table = defaultdict(list)  # domain -> [(tokens, tokens with loss, weight)]
    for n, (where, record) in enumerate(read_records(args.file)):
        if "messages" in record:
            sample, answer = parse_sft(record, tokenizer, where), ""
        else:
            problem = parse_problem(record, where)
            prompt = render_chat([{"role": "user", "content": problem.prompt}], tokenizer, generation_prompt=True)
            sample, answer = Sample(*map(np.array, prompt), 1.0, problem.domain), f"answer: {problem.answer}\n"
        table[sample.domain].append((len(sample.ids), sample.mask.sum(), sample.weight))
        if n < args.rows:
            print(f"--- {where}: {sample.domain}, {len(sample.ids)} tokens, weight {sample.weight:g}")
            print(tokenizer.decode(sample.ids), answer, sep="\n")
    print(f"{'domain':16}     rows   share      tokens  with loss     mean  longest  mean weight")
    for domain, rows in sorted(table.items()):
        (tokens, loss, weight), share = np.array(rows, float).T, len(rows) / sum(map(len, table.values()))
        line = f"{domain:16}{len(rows):9}{share:8.1%}{tokens.sum():12.0f}{loss.sum():11.0f}"
        print(f"{line}{tokens.mean():9.1f}{tokens.max():9.0f}{weight.mean():13.3f}")


# 7. Packing -----------------------------------------------------------------------------------------------------------


@dataclass
class Pack:
    """Documents end to end, without padding. What keeps them apart in attention and SSM is cu_seqlens."""

    input_ids: np.ndarray  # (t,) int64
    targets: np.ndarray  # (t,) int64: the next token of the same document; 0 at a document's last position
    weights: np.ndarray  # (t,) float32: weight of predicting targets; 0 where there is no loss
    cu_seqlens: np.ndarray  # (s + 1,) int32: document j is [cu_seqlens[j], cu_seqlens[j + 1])
    members: list  # (s,) the samples, in order: who needs more than a weight a token finds it there


def pack(samples, capacity, multiple_of=1):
    """First-fit decreasing: the longest sample first, each into the first pack with room for it.

    Needs at most 11/9 of the best possible number of packs, plus one. Quadratic in the number of packs, so meant for
    one global batch and not for a whole data set. capacity: tokens of a pack, at most.

    The number of packs is made a multiple of multiple_of, the number of teams of ranks: with FSDP, a rank that makes fewer passes
    than the others leaves them waiting for ever. Packs are split, the longest first; where none can be, dummies of one token and no
    weight fill up. Longest first is also the order of the list, so the packs of one pass take the ranks about equally long."""
    rows, room = [], []
    for sample in sorted(samples, key=lambda sample: -len(sample.ids)):  # stable, hence deterministic
        size = len(sample.ids)
        if size > capacity:
            raise ValueError(f"a sample of {size} tokens does not fit a pack of {capacity}")
        at = next((i for i, left in enumerate(room) if left >= size), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(capacity)
        rows[at].append(sample)
        room[at] -= size
    while len(rows) % multiple_of and any(len(row) > 1 for row in rows):
        at = max(range(len(rows)), key=lambda i: (len(rows[i]) > 1, tokens_of(rows[i])))
        halves = [], []
        for sample in rows.pop(at):
            min(halves, key=tokens_of).append(sample)
        rows += halves
    rows.sort(key=lambda row: -tokens_of(row))
    dummy = Sample(np.zeros(1, np.int32), np.zeros(1, bool), 1.0, "")
    return [join(row) for row in rows + [[dummy]] * (-len(rows) % multiple_of)]


def tokens_of(row):
    return sum(len(sample.ids) for sample in row)


def join(row):
    """Pack of a list of samples. Target and weight of position i are token and loss mask of i + 1."""
    zero = np.zeros(1)
    targets = [part for sample in row for part in (sample.ids[1:], zero)]
    weights = [part for sample in row for part in (sample.mask[1:] * sample.weight, zero)]
    return Pack(
        input_ids=np.concatenate([sample.ids for sample in row]).astype(np.int64),
        targets=np.concatenate(targets).astype(np.int64),
        weights=np.concatenate(weights).astype(np.float32),
        cu_seqlens=np.cumsum([0] + [len(sample.ids) for sample in row], dtype=np.int32),
        members=row,
    )


# 8. Loader ------------------------------------------------------------------------------------------------------------


class Loader:
    """Endless iterator of global batches, lists of batch_size samples' numbers, in the proportions of a mixture of domains.

    Every domain has its own epochs, each shuffled anew. After any number of draws, each domain has had its share of them, rounded
    up or down: so every batch has the proportions and not only the average one (paper, section 2). No random state is kept: the
    order follows from (seed, domain, epoch), the position from counts. So all ranks draw the same batches, and another number of
    ranks continues them.

    rows: dict from each domain to an array of its samples' numbers, as SftFiles has it. mixture: dict from each domain to its weight,
    whatever their sum; None takes the sizes of the domains, and then as many draws as there are samples take every sample exactly
    once. checksum: of what the numbers stand for: a stream is continued with the same samples, or not at all."""

    def __init__(self, rows, batch_size, seed, mixture=None, checksum=0):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.mixture, count = mixture or {domain: len(numbers) for domain, numbers in rows.items()}, sum(map(len, rows.values()))
        if not count or batch_size < 1:
            raise ValueError(f"batches of {batch_size} cannot be drawn from {count} samples")
        if set(self.mixture) != set(rows):
            raise ValueError(f"mixture: has {sorted(self.mixture)}, the data have the domains {sorted(rows)}")
        if empty := [name for name, numbers in rows.items() if not len(numbers) and self.mixture[name]]:
            raise ValueError(f"mixture: no sample of {empty[0]} is left to draw from; hold out fewer")
        if not all(0 <= weight < math.inf for weight in self.mixture.values()) or not any(self.mixture.values()):
            raise ValueError(f"mixture: weights must be numbers from 0 up, and not all 0, not {self.mixture}")
        self.drawn = dict.fromkeys(sorted(rows), 0)
        self.orders = {}  # domain -> (epoch, permutation)
        # What the stream depends on. Not the batch size: it may change where a run is resumed.
        self.identity = {"samples": count, "checksum": checksum, "seed": seed, "mixture": dict(self.mixture)}

    def __iter__(self):
        return self

    def __next__(self):
        return [self.draw() for _ in range(self.batch_size)]

    def draw(self):
        # After `step` draws a domain of share w should have had w * step of them. Its draw k + 1 is allowed once k < w * step, and due
        # when w * step reaches k + 1. Taking the allowed one that is due first keeps all within one draw (Pfair scheduling).
        total, step = sum(self.mixture.values()), sum(self.drawn.values()) + 1
        may = [name for name, k in self.drawn.items() if k * total < self.mixture[name] * step]
        domain = min(may, key=lambda name: (self.drawn[name] + 1) / self.mixture[name])
        rows = self.rows[domain]
        epoch, at = divmod(self.drawn[domain], len(rows))
        if self.orders.get(domain, (None,))[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, list(self.drawn).index(domain)])
            self.orders[domain] = epoch, rng.permutation(len(rows))
        self.drawn[domain] += 1
        return int(rows[self.orders[domain][1][at]])

    def state_dict(self):
        """A small dict, JSON-able: how far the stream is, and of what it is the stream."""
        return {"drawn": dict(self.drawn), **self.identity}

    def load_state_dict(self, state):
        """Continue a stream exactly. ValueError if it was one of other data, another seed or another mixture."""
        for name, here in self.identity.items():
            if state.get(name) != here:
                raise ValueError(f"data position: {name} was {short(state.get(name))} and is {short(here)} now")
        self.drawn = {domain: int(state["drawn"][domain]) for domain in self.drawn}


# 9. For the scripts that train and evaluate: arguments, folders of runs, a limit on unknown verdicts --------


def flag(default, text):
    """A field of a script's Args: its default, and a line for --help."""
    return field(default=default, metadata={"help": text})


class Flags(argparse.ArgumentParser):
    """Bad flags are a ValueError, as any other bad input is: one line and exit status 1 instead of argparse's usage and 2."""

    def error(self, message):
        raise ValueError(f"{message}; see --help")


def parse_args(cls, description, argv=None):
    """Flags of a dataclass: --kebab-case, its types, its defaults; unknown or abbreviated flags are errors."""
    parser = Flags(description=description, allow_abbrev=False)
    for f in fields(cls):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        text = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=text, **kind)
    return cls(**vars(parser.parse_args(argv)))


def open_run(out, identity, outputs, *, fresh, device, **about):
    """Make `out` the folder of a run: run.json then holds its identity (the arguments that two parts of one run must share), versions,
    hardware and commit. outputs: glob patterns of what such a run leaves in its folder; `fresh` deletes these and starts over.
    ValueError if the folder holds another run, or outputs of nobody knows what, or a process that works there; nothing is changed then.

    Returns:
        A file that keeps other processes out until it is closed or this process ends, be it by SIGKILL.
    """
    path = Path(out) / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path.with_name(".lock"), "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{out}: another process is working in this folder; stop it first, or choose another --out") from None
    except OSError:  # a file system without locks
        pass
    left = [old for pattern in outputs for old in Path(out).glob(pattern)]
    if not fresh and (left or path.exists()):
        try:
            before = json.loads(path.read_text())["identity"]
            other = next((name for name in identity if before.get(name) != identity[name]), None)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"holds {left[0].name if left else 'files'} of no known run ({type(error).__name__})"
            raise ValueError(f"{path}: {what}: choose another --out, or --fresh to start over") from None
        if other is not None:
            what = f"holds another run, with --{other.replace('_', '-')} {before.get(other)!r} and not {identity[other]!r}"
            raise ValueError(f"{path}: this folder {what}: choose another --out, or --fresh to start over")
        return lock
    for old in left:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = git.stdout.strip() or "unknown"
    except OSError:  # there is no git here
        commit = "unknown"
    hardware = f"{os.cpu_count()} CPU cores"
    if "cuda" in device:
        import torch

        hardware = torch.cuda.get_device_name(device)
    about |= {"torch": importlib.metadata.version("torch"), "python": platform.python_version(), "hardware": hardware,
              "commit": commit}
    write_text(path, json.dumps({"identity": identity, **about}, indent=2) + "\n")
    return lock


def model_folder(folder):
    """A checkpoint: the folder of a run, whose model/ is meant, or a folder in the published format."""
    return Path(folder) / "model" if (Path(folder) / "model").is_dir() else Path(folder)


def load_tokenizer(folder):
    """The tokenizer of a checkpoint. It must fit the model's vocabulary, checked before any weight is read."""
    folder = model_folder(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no checkpoint here (config.json is missing)")
    tokenizer = Tokenizer.from_pretrained(folder)
    words = json.loads((folder / "config.json").read_text())["vocab_size"]
    if words < tokenizer.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model room for {words} only")
    return tokenizer


def run_main(body):
    """Run a script's body; what a user can put right ends in one line on stderr. Returns the exit status."""
    try:
        body()
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130  # what shells report for Ctrl-C


MOST_UNKNOWN = 0.02  # of all verdicts: so few cannot hide, or make, an effect that is worth reporting


def check_unknown(where, reasons, verdicts):
    """ValueError, with the reasons, most common first, if more than MOST_UNKNOWN of the verdicts are unknown.

    Unknown verdicts have causes outside the replies (no sandbox, a judge that is down, no memory). A few are
    left out and counted; many mean that the run measures the machine and not the model.
    where: begins the message. reasons: Counter of why verdicts are unknown. verdicts: how many in all."""
    if reasons.total() > MOST_UNKNOWN * verdicts:
        counts = f"{reasons.total()} of {verdicts} verdicts are unknown, more than {MOST_UNKNOWN:.0%}"
        raise ValueError(f"{where}: {counts}: {describe(reasons)}")


def describe(reasons, most=5):
    """The most common reasons of unknown verdicts, in one line."""
    counts = reasons.most_common(most)
    return "; ".join(f"{count} x {reason.removeprefix('unknown: ')}" for reason, count in counts)


# 10. Commands ---------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = Flags(description=__doc__.partition("\n")[0])
    commands, flags = parser.add_subparsers(required=True, metavar="COMMAND"), {}
    for run in (make, convert, curate, show):
        options = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
        sub = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__, **options)
        sub.set_defaults(run=run)
        flags[run] = sub.add_argument
    flags[make]("--out", default="runs/tiny/data", help="folder to write")
    flags[make]("--seed", type=int, default=0, help="of problems and traces")
    for name, rows in [("sft", 20000), ("rl", 4000), ("heldout", 1000)]:
        flags[make](f"--{name}", type=int, default=rows, help=f"rows of {name}.jsonl")
    flags[convert]("source", help="problems with solutions; with --problems, a traces.jsonl")
    flags[convert]("--problems", help="the problems that the traces in SOURCE answer")
    flags[convert]("--out", required=True, help="the SFT file to write")
    flags[curate]("traces", help="a traces.jsonl, about 8 rollouts of each problem")
    flags[curate]("--problems", required=True, help="the problems that the traces answer")
    flags[curate]("--out", required=True, help="the file of kept problems to write")
    flags[show]("file", help="sft.jsonl, problems.jsonl, or a public shape")
    flags[show]("--rows", type=int, default=3, help="rows to print")
    flags[show]("--model", help="checkpoint folder whose tokenizer counts; bytes if not given")
    try:
        args = parser.parse_args(argv)
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
