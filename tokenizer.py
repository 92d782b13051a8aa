r"""From conversations to token ids and back: the folder's chat template, the loss mask, byte-level BPE.

    tokenizer = Tokenizer.from_pretrained(folder)             # what a published folder holds
    tokenizer = Tokenizer.byte_level()                        # one token per byte: nothing to train
    ids, loss_mask = render_chat(messages, tokenizer)         # a sample for training
    ids, _ = render_chat(ask("2+2?"), tokenizer, generation_prompt=True)                     # a prompt

Glossary
    message      {"role": "user", "content": "2+2?"}, with more fields where a template reads them
    template     the text of tokenizer_config.json or chat_template.jinja that turns messages into one text
    rendering    that text; a server that loads the folder renders the same
    added token  one that is found in a text before anything else, such as <|im_end|>; many are *special*
    piece        what the split patterns leave of a text; BPE merges bytes inside of a piece only

One path: nothing here knows a chat format, the tiny model's is a template as well. What transformers and the
tokenizers library would do with a folder, this does, or it refuses the folder in one line.

This file can be copied alone. It needs numpy, jinja2, regex and tiktoken.
"""

import json
import os
import re
from datetime import datetime
from functools import partial
from itertools import zip_longest
from pathlib import Path

import jinja2
import numpy as np
import regex
import tiktoken
from jinja2.sandbox import ImmutableSandboxedEnvironment

# 1. Chat template and loss mask -----------------------------------------------------------------------------
#
# The tiny model's template is ChatML. Like Falcon-H1R's, it drops the reasoning of replies to earlier
# questions, since in use nobody sends that back:
#
#     <|begin_of_text|>\n
#     <|im_start|>user\n2+2?<|im_end|>\n
#     <|im_start|>assistant\n<think>2+2=4</think>\boxed{4}<|im_end|>\n

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # a model may write these inside its own turn
WORDS = ("assistant", "user", r"\boxed{")  # in every sample: as bytes, 28% of its tokens
CONTROL = ("<|pad|>", "<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = "".join(line.strip() for line in r"""
    {{ bos_token + '\n' }}
    {% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}
    {% set ns = namespace(question=-1) %}
    {% for m in messages %}{% if m.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}{% endfor %}
    {% for m in messages %}
        {% set text = m.content or '' %}
        {% if m.role == 'assistant' and loop.index0 < ns.question %}
            {% set text = text.split('</think>')[-1].split('<think>')[0].strip() %}
        {% elif m.role == 'assistant' and m.reasoning_content %}
            {% set text = '<think>' + m.reasoning_content + '</think>' + text %}
        {% endif %}
        {{ '<|im_start|>' + m.role + '\n' + text }}
        {% for call in m.tool_calls or [] %}
            {% set call = call.function or call %}
            {% set arguments = call.arguments if call.arguments is string else call.arguments | tojson %}
            {{ '<tool_call>{"name": "' + call.name + '", "arguments": ' + arguments + '}</tool_call>' }}
        {% endfor %}
        {{ '<|im_end|>\n' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
""".splitlines())

def render_chat(messages, tokenizer, *, tools=None, generation_prompt=False):
    """Token ids of a conversation, and which of them the model learns to write (paper, section 2).

    - Usually only the last reply is learned. With tools every reply is, as they are steps of one train of
      thought; one whose reasoning the template drops, as it answers an earlier question, is context only.
    - The loss covers what an assistant writes and the token that ends it, but no header.
    - Special tokens that a user types stay text; of an assistant's content all but TAGS do.

    messages: list of {"role", "content"}, also with "reasoning_content" or "tool_calls". tools: schemas of
    functions. generation_prompt: append the header of the next reply; nothing is learned then. Returns the
    lists (ids, loss_mask) of int and bool; loss_mask[i] says whether ids[i] is to be predicted. ValueError
    names the message, and the field if the template drops one."""
    return encode_chat(render_text(messages, tokenizer, tools, generation_prompt), tokenizer)

def encode_chat(rendered, tokenizer):
    """(ids, loss_mask) of what render_text returns."""
    text, readable, spans = rendered
    ids = tokenizer.encode_as(text, readable)
    sizes = np.array([len(tokenizer.bytes[i]) for i in ids], int)  # in bytes, as tokens cut characters
    ends = np.cumsum(sizes)
    if sizes.sum() != len(text.encode()):
        raise ValueError("messages: this tokenizer drops text, so the loss mask is unknown")
    # A token that spans a header's end and a reply's beginning, such as two line breaks, is not learned: no
    # model that is given the header writes it.
    mask = np.zeros(len(ids), bool)
    for start, end in spans:
        mask |= (ends - sizes >= len(text[:start].encode())) & (ends <= len(text[:end].encode()))
    return ids, mask.tolist()

def render_text(messages, tokenizer, tools=None, generation_prompt=False):
    """(text, readable, spans): the conversation as transformers renders it, a copy in which typed special
    tokens are hidden (Tokenizer.hide), and the (start, end) of every reply that is learned."""
    check_messages(messages, tools)
    text = tokenizer.render(messages, tools, generation_prompt)

    # Typed special tokens stay text. That must not change what the template does, or a server would send
    # another text.
    typed = [messages, tools]
    hidden = tokenizer.hide(typed)
    for message, copy in zip(messages, hidden[0]):
        if message["role"] == "assistant" and message.get("content"):
            copy["content"] = tokenizer.hide(message["content"], but=TAGS)
    readable = tokenizer.render(*hidden, generation_prompt) if hidden != typed else text
    if readable != text and any(a not in (b, VEIL) for a, b in zip_longest(readable, text)):
        i = next((i for i, copy in enumerate(hidden[0]) if copy != messages[i]), 0)
        raise ValueError(f"messages[{i}]: special tokens typed here change what the chat template does")

    # Only the reasoning of replies to earlier questions may be missing; such replies are not learned.
    forgotten = set()
    for i, name in dropped_fields(messages, tokenizer, tools, generation_prompt, text):
        earlier = generation_prompt or any(message["role"] == "user" for message in messages[i + 1 :])
        if "reasoning" not in name or not earlier or messages[i]["role"] != "assistant":
            raise ValueError(f"messages[{i}].{name}: the chat template drops it")
        forgotten.add(i)

    # A reply is learned from the end of the prompt that a model would answer to the token that ends it. What
    # follows that token, such as a line break, is the template's.
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    calls = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
    calls = calls or any("<tool_call>" in messages[i]["content"] for i in replies)
    learned = replies if calls else replies[-1:]
    spans = []
    for i in [] if generation_prompt else sorted({*learned} - forgotten):
        prompt = tokenizer.render(messages[:i], tools, True)
        whole = text if i + 1 == len(messages) else tokenizer.render(messages[: i + 1], tools)
        end = tokenizer.ending.search(readable, len(prompt), len(whole))
        if not text.startswith(prompt):
            raise ValueError(f"messages[{i}]: the chat template puts other text before it than in a prompt")
        if not end:
            raise ValueError(f"messages[{i}]: the chat template ends it in no token that ends a generation")
        spans.append((len(prompt), end.end()))
    return text, readable, spans

PLUMBING = ("role", "tool_call_id", "name")  # fields that a template may leave out

def dropped_fields(messages, tokenizer, tools, generation_prompt, text):
    """Yield (index of a message, field) for what the template leaves out: a change there does not show."""
    def unseen(changed, tools):
        # What a template refuses, it looks at: its rendering is None.
        return tokenizer.try_to_render(changed, tools, generation_prompt)[0] == text
    if tools and unseen(messages, None):
        raise ValueError("tools: the chat template drops them")
    for i, message in enumerate(messages):
        fields = {name: value for name, value in message.items() if value and name not in PLUMBING}
        # Of tool calls the last goes: many templates allow a single one.
        changes = {name: {name: v + "x" if isinstance(v, str) else v[:-1]} for name, v in fields.items()}
        # Of a reply, the reasoning may be left out alone. Reasoning that was cut off is never closed.
        reply = fields.get("content", "") if message["role"] == "assistant" else ""
        if reply.rfind("<think>") > reply.rfind("</think>"):
            changes["content (reasoning)"] = changes.pop("content")
        elif "</think>" in reply:
            changes["content (reasoning)"] = {"content": reply.replace("</think>", "x</think>", 1)}
        for name, change in changes.items():
            if unseen([*messages[:i], message | change, *messages[i + 1 :]], tools):
                yield i, name

def check_messages(messages, tools=None):
    """Raise ValueError, naming the message and its field, if no template could render them."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: must be a list of at least one message")
    if not isinstance(tools, list | None):
        raise ValueError(f"tools: must be a list, not {shorten(tools)}")
    for i, message in enumerate(messages):
        message = message if isinstance(message, dict) else {}
        calls = message.get("tool_calls")
        for name in dict.fromkeys(["role", "content", *message]):
            kind = list if name == "tool_calls" else str
            needed = name == "role" or name == "content" and not calls
            # null is as good as no field, but 0 and false may mean something: a weight of 0, say.
            if not isinstance(value := message.get(name), kind) and (value is not None or needed):
                kind = "string" if kind is str else "list"
                raise ValueError(f"messages[{i}].{name}: must be a {kind}, not {shorten(value)}")
        for name, tag in {"reasoning_content": "think>", "tool_calls": "tool_call>"}.items():
            if message.get(name) and tag in (message.get("content") or ""):
                raise ValueError(f"messages[{i}].{name}: contradicts content, which holds <{tag} too")

def ask(question, system="", suffix=""):
    """The messages of a prompt: a system prompt if any, the question, and on a line of its own the suffix."""
    user = {"role": "user", "content": f"{question}\n{suffix}" if suffix else question}
    return [{"role": "system", "content": system}, user] if system else [user]

# 2. Tokenizer -----------------------------------------------------------------------------------------------

# How tokenizer.json spells bytes, as in GPT-2: visible ones as Latin-1 does, the others from U+0100 on.
VISIBLE = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
SPELLING = {chr(byte): byte for byte in VISIBLE} | {chr(256 + i): byte for i, byte in enumerate(HIDDEN)}
FILES = (  # what decides on prompts and replies; the last is the model's and not saved here
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja", "generation_config.json", "config.json")
VEIL = "\uffff"  # hides a special token in place of its first character; no text has this code point
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of ByteLevel

class Tokenizer:
    """Text <-> token ids: byte-level BPE by tiktoken, special tokens, and the folder's chat template.

    Attributes: special (dict from an added token's text to its id), vocab_size (the largest id plus one),
    stop_ids (tuple of the ids that end a generation)."""

    def __init__(self, files):
        """files: dict from the names of FILES to their texts; only tokenizer.json must be there."""
        self.files = files
        spec = self._json("tokenizer.json")
        check_supported(spec)
        model, added = spec["model"], spec["added_tokens"]
        self.stages = pre_tokenizers(spec["pre_tokenizer"])
        self.special = {token["content"]: token["id"] for token in added}
        self.control = {token["content"] for token in added if token["special"]}
        # Added tokens are found before anything else: those not "normalized" first, of these the longest.
        added = sorted(added, key=lambda token: (token["normalized"], -len(token["content"])))
        self.added = any_of(token["content"] for token in added)
        # All other text: tiktoken's ranks are the order of merging, and not the ids.
        vocab = {name: id for name, id in model["vocab"].items() if name not in self.control}
        self.bytes = {id: bytes(SPELLING[c] for c in name) for name, id in vocab.items()}
        whole = self.bytes if model.get("ignore_merges") else {}
        self.whole_words = {name: [id] for id, name in whole.items()}  # tokens found before any merging
        ranks = tiktoken_ranks(vocab, model["merges"])
        self.ids = {rank: vocab[name] for name, rank in ranks.items()}
        ranks = {self.bytes[vocab[name]]: rank for name, rank in ranks.items()}
        self.encoding = tiktoken.Encoding("bpe", pat_str=r"(?s).+", mergeable_ranks=ranks, special_tokens={})
        self.bytes |= {id: name.encode() for name, id in self.special.items()}
        self.vocab_size = max(self.bytes) + 1
        self._read_config(self._json("tokenizer_config.json"))

    def _json(self, name):
        """What one of the folder's files of JSON holds; nothing if it is missing."""
        try:
            return dict(json.loads(self.files.get(name, "{}")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} is no JSON object: {error}") from None

    def _read_config(self, config):
        """Compile the chat templates; find the tokens that end a reply and those that nobody may type."""
        # transformers would add tokens that only this file has.
        for id, token in config.get("added_tokens_decoder", {}).items():
            if self.special.get(token["content"]) != int(id):
                raise ValueError(f"tokenizer.json lacks the added token {id} of tokenizer_config.json")
        # One template or a list of named ones. Those in files of their own come first, as in transformers.
        named = config.get("chat_template") or []
        named = [{"name": "default", "template": named}] if isinstance(named, str) else named
        sources = {template["name"]: template["template"] for template in named}
        own = {Path(name).stem: text for name, text in self.files.items() if name.endswith(".jinja")}
        sources = {name.replace("chat_template", "default"): text for name, text in own.items()} or sources
        self.templates = {name: compile_template(source) for name, source in sources.items()}
        # What templates call bos_token, eos_token, ...: a string, or a dict of its properties.
        # In folders without "added_tokens_decoder" special_tokens_map.json comes first.
        if "added_tokens_decoder" not in config:
            config = config | self._json("special_tokens_map.json")
        names = {name: v["content"] if isinstance(v, dict) else v for name, v in config.items()
                 if name.endswith("_token")}
        self.names = {name: value for name, value in names.items() if isinstance(value, str)}

        # A generation ends where transformers ends it, and at the tokens that end a turn. Ids come from the
        # first of the two files that has any; the older folders have config.json only.
        ids = [self._json(name).get("eos_token_id") for name in ("generation_config.json", "config.json")]
        ids = next((found for found in ids if found is not None), [])
        ids = ids if isinstance(ids, list) else [ids]
        if unknown := [i for i in ids if i not in self.bytes]:
            raise ValueError(f"generation_config.json or config.json: eos_token_id {unknown[0]} is no token")
        ids += map(self.special.get, (self.names.get("eos_token"), "<|im_end|>", "<|end_of_text|>"))
        self.stop_ids = tuple(dict.fromkeys(i for i in ids if i is not None))
        ends = {name for name, i in self.special.items() if i in self.stop_ids}
        self.ending = any_of(ends)
        # Some folders do not mark all of them as special: what a template writes in brackets is one, too.
        text = "".join(sources.values())
        written = {name for name in self.special if name[0] in "<[" and name in text}
        typed = self.control | ends | written | {*CONTROL, *TAGS}
        self.typed = {but: any_of(typed.difference(but), first_character=True) for but in ((), TAGS)}

    @classmethod
    def byte_level(cls):
        """One token per byte (ids 0 to 255), then CONTROL, TAGS and WORDS: nothing has to be trained."""
        names = [*CONTROL, *TAGS, *WORDS]
        # GPUs like multiples of 16. The padding is made of real tokens, so that every sampled id decodes.
        names += [f"<|reserved_{i}|>" for i in range(-(257 + len(names)) % 16)]
        # TAGS and WORDS are not "special": servers hide special tokens by default, and a reply would lose the
        # marks of its reasoning and the \boxed{ of its answer.
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added = [{"id": i, "content": name, "special": name not in TAGS + WORDS, **flags}
                 for i, name in enumerate(names, 256)]
        bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        # llama.cpp loads no BPE without merges. This one joins two bytes FF, spelled ÿ, which no text has.
        # Its token takes the last id. The added tokens are in vocab as well, or transformers would
        # renumber them.
        vocab = SPELLING | {name: id for id, name in enumerate([*names, "ÿÿ"], 256)}
        model = {"type": "BPE", "vocab": vocab, "merges": ["ÿ ÿ"]}
        spec = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": bytewise,
                "decoder": bytewise, "model": model}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE,
            "padding_side": "left", "bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>",
            "pad_token": "<|pad|>", "clean_up_tokenization_spaces": False}
        contents = {"tokenizer.json": spec, "tokenizer_config.json": config}
        return cls({name: json.dumps(content, indent=1) for name, content in contents.items()})

    def render(self, messages, tools=None, generation_prompt=False):
        """The text of a conversation under the folder's chat template, as transformers renders it."""
        text, reason = self.try_to_render(messages, tools, generation_prompt)
        if reason:
            # At fault is the last message without which this does not happen.
            count = len(messages)
            while count > 1 and self.try_to_render(messages[: count - 1], tools)[1] == reason:
                count -= 1
            raise ValueError(f"messages[{max(0, count - 1)}]: the chat template refuses it: {reason}")
        return text

    def try_to_render(self, messages, tools, generation_prompt=False):
        """(text, ""), or (None, the reason if the template raises)."""
        template = self.templates.get("tool_use" if tools and "tool_use" in self.templates else "default")
        if template is None:
            raise ValueError("messages: the model's folder has no chat template; add a chat_template.jinja")
        try:
            text = template.render(messages=messages, tools=tools or None, documents=None,
                                   add_generation_prompt=generation_prompt, **self.names)
            text.encode()  # half of a surrogate pair is no character
            return text, ""
        except Exception as error:  # a template may raise anything
            return None, f"{type(error).__name__}: {shorten(str(error))}"

    def hide(self, value, but=()):
        """A text with VEIL for the first character of every special token that nobody may type; or lists and
        dictionaries of such texts."""
        if isinstance(value, str):
            return self.typed[but].sub(VEIL, value)
        if isinstance(value, list | tuple):
            return [self.hide(item, but) for item in value]
        if isinstance(value, dict):
            return {self.hide(name, but): self.hide(item, but) for name, item in value.items()}
        return value

    def encode(self, text, *, special=False):
        """List of ids of text, without a BOS; half a surrogate pair becomes U+FFFD.

        special: read special tokens, as the tokenizers library does. By default they are plain text, so that
        a user typing <|im_end|> cannot end the turn. Other added tokens are always read."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.encode_as(text, text if special else self.hide(text))

    def encode_as(self, text, readable):
        """List of ids of text, with the added tokens that `readable`, a copy from hide, still shows.

        Text between two of them is encoded as a whole, like on a server: of a header and what follows it."""
        ids = []
        end = 0
        for match in self.added.finditer(readable):
            ids += [*self._encode_plain(text[end : match.start()]), self.special[match[0]]]
            end = match.end()
        return ids + self._encode_plain(text[end:])

    def _encode_plain(self, text):
        """Ids of text that holds no added token to read."""
        words = [text] if text else []
        for stage in self.stages:
            words = [piece for word in words for piece in stage(word)]
        ids = []
        for word in words:
            whole = self.whole_words.get(word.encode())
            ids += whole or [self.ids[rank] for rank in self.encoding.encode_ordinary(word)]
        return ids

    def decode(self, ids):
        """Text of ids, special tokens included. Not UTF-8 becomes U+FFFD; an id without a token, nothing."""
        return b"".join(self.bytes.get(int(i), b"") for i in ids).decode(errors="replace")

    def token_ids(self):
        """The ids of the tokens called bos, eos and pad, under the names of config.json."""
        names = [name for name in ("bos_token", "eos_token", "pad_token") if name in self.names]
        return {f"{name}_id": self.special.get(self.names[name]) for name in names}

    def save(self, folder):
        """Write the files of a published tokenizer; generation_config.json says where generation stops."""
        generation = self.token_ids() | self._json("generation_config.json")
        generation["eos_token_id"] = list(self.stop_ids)
        files = {**self.files, "generation_config.json": json.dumps(generation, indent=1)}
        files.pop("config.json", None)
        for name, text in files.items():
            write_text(Path(folder) / name, text)

    @classmethod
    def from_pretrained(cls, folder):
        """Read a published byte-level BPE: tokenizer.json, and the others of FILES if present.

        ValueError names what is not supported. A post_processor is ignored: encode() adds no token."""
        path = Path(folder) / "tokenizer.json"
        check_exists(path)
        files = [file for name in FILES for file in sorted(path.parent.glob(name))]
        try:
            return cls({str(file.relative_to(folder)): file.read_text("utf-8") for file in files})
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError, regex.error) as error:
            what = error if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{folder}: this code cannot read its tokenizer: {what}") from None

def compile_template(source):
    """A jinja2 template with transformers' settings, in a sandbox: a stranger may have written it."""
    def raise_exception(message):
        raise jinja2.TemplateError(message)
    # {% generation %} marks replies and adds no text; jinja2 does not know it. Like {% with %}, it is a scope
    # of its own for {% set %}.
    source = re.sub(r"({%[-+]?\s*(?:end)?)generation(?=\s*[-+]?%})", r"\1with", source)
    loops = ["jinja2.ext.loopcontrols"]
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    jinja.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja2's own escapes HTML
    jinja.globals["raise_exception"] = raise_exception
    jinja.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return jinja.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        what = f"line {error.lineno}: {error.message}"
    except (SyntaxError, RecursionError) as error:  # in the Python code that jinja2 makes of it
        what = f"{type(error).__name__}: {error.args[0]}"
    raise ValueError(f"chat template, {what}")

def any_of(texts, first_character=False):
    """Pattern of any of these texts, the first that fits; or of its first character alone."""
    parts = map(regex.escape, texts)
    if first_character:
        parts = [f"{regex.escape(text[:1])}(?={regex.escape(text[1:])})" for text in texts]
    return regex.compile("|".join(parts) or "(?!)")

# 3. The parts of a tokenizer.json ---------------------------------------------------------------------------

def check_supported(spec):
    """Raise ValueError naming the first part of a tokenizer.json that this code would get wrong."""
    model = spec["model"]
    wrong = {"model": model["type"] != "BPE", "normalizer": spec["normalizer"]}
    wrong["decoder"] = (spec["decoder"] or {}).get("type") != "ByteLevel"
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        wrong[f"model.{name}"] = model.get(name)
    for name in ("single_word", "lstrip", "rstrip"):
        wrong[f"flag {name} of an added token"] = any(token[name] for token in spec["added_tokens"])
    # The tokenizers library numbers such tokens anew.
    ids = model["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}
    wrong["id of two tokens"] = len({*ids.values()}) < len(ids)
    if names := [name for name, found in wrong.items() if found]:
        raise ValueError(f"this {names[0]} is not supported")

def tiktoken_ranks(vocab, merges):
    """dict from tokens, as spelled, to tiktoken's ranks: the place of the last merge that makes the token."""
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]  # "a b" or ["a", "b"]
    order = {(left, right): place for place, (left, right) in enumerate(pairs)}
    # tiktoken merges any neighbours that form a token, the tokenizers library only listed pairs. Given only
    # tokens that BPE can itself produce, the two always pick the same pair.
    ranks = dict(SPELLING)
    for token in vocab:
        pieces, last = bpe_merge(token, order)
        if pieces == [token] and len(token) > 1:
            ranks[token] = 256 + last
    return ranks

def bpe_merge(word, order):
    """BPE by definition: while a pair is listed, join the leftmost of those listed first.

    Returns the tokens of a spelled word, and the place of the last pair joined, or None."""
    tokens, last = list(word), None
    while pairs := [(order[pair], i) for i, pair in enumerate(zip(tokens, tokens[1:])) if pair in order]:
        last, i = min(pairs)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
    return tokens, last

def pre_tokenizers(spec):
    """The "pre_tokenizer" of a tokenizer.json -> list of functions from text to pieces, to apply in turn."""
    if not spec:
        return []
    kind = spec["type"]
    if kind == "Sequence":
        return [stage for part in spec["pretokenizers"] for stage in pre_tokenizers(part)]
    if kind == "Split":
        ((syntax, pattern),) = spec["pattern"].items()
        pattern = regex.escape(pattern) if syntax == "String" else pattern
        return [splitter(pattern, spec["behavior"], spec["invert"])]
    if kind == "Digits":
        return [splitter(r"\p{N}", "Isolated" if spec["individual_digits"] else "Contiguous")]
    if kind == "Punctuation":
        return [splitter(r"[!-/:-@\[-`{-~]|\p{P}", spec["behavior"])]
    if kind == "ByteLevel" and not spec["add_prefix_space"]:
        return [splitter(GPT2_WORDS, "Isolated")] if spec["use_regex"] else []
    raise ValueError(f"pre_tokenizer {kind} is not supported: {shorten(spec)}")

# The tokenizers library gives a Split pattern to Oniguruma, which reads some constructs as Ruby does: \h is a
# hexadecimal digit, x{2}+ repeats x{2}, [[ab]&&b] is a set. This is what it and `regex` read alike, given the
# flags m ($ ends any line) and V1 (sets), and what is translated. Anything else is refused.
ALIKE = r"\\[dDsSnrtfwWhH]|\\\W|\\u[0-9A-Fa-f]{4}|\\x[0-7][0-9A-Fa-f]|\\[pP]\{\^?(?!Word)[A-Z][a-z]*}"
SET = rf"(?<set>\[\^?(?!&&|[]:])(?:{ALIKE}|(?&set)|&&(?!])|[^][\\&|~-]|&(?!&)|\|(?!\|)|~(?!~)|-(?!-))+])"
PATTERN = regex.compile(rf"(?:{ALIKE}|{SET}|\((?:\?(?:[:=!>]|<[=!])|(?!\?))|[).|$]|[?*+][?+]?" r"""
    |\{(?:\d+,\d*|,\d+)}\??+(?!\+)|\{\d+}(?![?+])|[^][\\(){}?*+^$]
    |\(\?i:(?![^)]*(?i:ss|st|ff|fl))['’|[\]a-hj-zA-HJ-Z]+\))*+  # others have more forms""", regex.X)
WORD = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}²³¹¼½¾"  # Oniguruma's \w; its [\w] lacks the last six
TRANSLATED = {r"\w": f"[{WORD}]", r"\W": f"[^{WORD}]", r"\h": "[0-9A-Fa-f]", r"\H": "[^0-9A-Fa-f]"}
JOINED = {  # behavior: neighbours that become one piece, each a delimiter (True) or not
    "Removed": (), "Isolated": (), "Contiguous": ((True, True), (False, False)),
    "MergedWithPrevious": ((False, True),), "MergedWithNext": ((True, False),)}

def from_oniguruma(pattern):
    """A Split pattern for `regex`. ValueError names what the two may read differently."""
    if rest := pattern[PATTERN.match(pattern).end() :]:
        raise ValueError(f"{shorten(rest)} in the pattern {shorten(pattern)} is not supported")
    def translate(match):  # a set, or one escape outside of sets
        text = re.sub(r"(?s)\\.", lambda escape: TRANSLATED.get(escape[0], escape[0]), match[0])
        return text.replace(WORD[-6:], "") if match["set"] else text
    return "(?mV1)" + regex.sub(rf"{SET}|\\(?s:.)", translate, pattern)

def splitter(pattern, behavior, invert=False):
    """Function from text to a list of pieces, cut at delimiters: the matches of a pattern.

    behavior: what becomes of a delimiter, in the tokenizers library's words. invert: swap matches and the
    text between them. `regex` may know a newer Unicode than that library, which knows 16: newer characters
    may be cut differently and get other ids, which decode to the same text."""
    find = regex.compile(from_oniguruma(pattern)).finditer
    joined = JOINED[behavior]
    if any(find("")):
        raise ValueError(f"the pattern {shorten(pattern)} matches empty text, which is not supported")
    def split(text):
        cuts = [0, *(edge for match in find(text) for edge in match.span()), len(text)]
        pieces, before = [], None
        for i, (start, end) in enumerate(zip(cuts, cuts[1:])):  # text and matches in turn
            if start < end or i % 2:  # an empty match, of lookarounds alone, keeps its neighbours apart
                is_delimiter = (i % 2 == 1) != invert
                if (before, is_delimiter) in joined:
                    pieces[-1] += text[start:end]
                elif not is_delimiter or behavior != "Removed":
                    pieces.append(text[start:end])
                before = is_delimiter
        return [piece for piece in pieces if piece]
    return split

# 4. Files, and values in messages of errors -----------------------------------------------------------------

MADE_BY = {"runs/tiny/data": "train_sft.py", "runs/tiny/sft": "train_sft.py", "runs/tiny/rl": "train_rl.py"}

def shorten(value):
    """JSON of a value, cut off for an error message."""
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:100] + "..."

def write_text(path, text):
    """Write a file whole or not at all: a reader never meets half of it."""
    path = Path(path)
    temporary = Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()  # the disk may be full
        raise OSError(f"{path}: could not be written: {error.strerror}") from None

def check_exists(path):
    """Raise ValueError if a file is missing; for files of the small run it names the command to run."""
    if not Path(path).exists():
        scripts = [script for folder, script in MADE_BY.items() if Path(path).is_relative_to(folder)]
        raise ValueError(f"{path} is missing" + (f": run python {scripts[0]} first" if scripts else ""))
