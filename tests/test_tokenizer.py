"""Tests of tokenizer.py: other templates, loss masks by hand, ids as those of the tokenizers library."""

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data
from tests.test_data import turns, write
from tokenizer import (
    GPT2_WORDS, JOINED, TAGS, WORDS, Tokenizer, ask, render_chat, splitter, tiktoken_ranks, write_text)

TOKENIZER = Tokenizer.byte_level()
SPECIAL = TOKENIZER.special
GOOD = json.loads(TOKENIZER.files["tokenizer.json"])
MODEL = GOOD["model"]
SPLIT = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}

def learned(messages, tokenizer=TOKENIZER, **options):
    """The text under the loss mask, and the whole text."""
    ids, mask = render_chat(messages, tokenizer, **options)
    return tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]), tokenizer.decode(ids)

# 1. Chat template and loss mask -----------------------------------------------------------------------------

CHAT = Path(__file__).parent / "cases" / "chat"
NINE = [json.loads(line) for line in (CHAT / "conversations.jsonl").read_text().splitlines()]
GOLDEN = Path(__file__).parent / "golden"

def folder_of(folder, template, *, tokenizer=None, plain=(), **config):
    """A model's folder with a template. plain: added tokens that tokenizer.json does not call special."""
    spec = json.loads(tokenizer.read_text()) if tokenizer else GOOD
    added = list(spec["added_tokens"])
    taken = max([*spec["model"]["vocab"].values(), *(token["id"] for token in added)])
    names = [*re.findall(r"<\|\w+\|>", template), *plain]
    new = [name for name in dict.fromkeys(names) if name not in {token["content"] for token in added}]
    added += [GOOD["added_tokens"][0] | {"id": taken + i, "content": name, "special": name not in plain}
              for i, name in enumerate(new, 1)]
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>", "chat_template": template} | config
    write(folder / "tokenizer.json", spec | {"added_tokens": added})
    write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | config)
    return folder

def published(folder, name):
    """A folder with one of the templates of tests/cases/chat, or the tiny model's."""
    if name == "tiny":
        TOKENIZER.save(folder)
        return folder
    eos = "<|eot_id|>" if name == "llama3" else "<|im_end|>"
    kind = "falcon" if name == "falcon-h1r" else "llama3"
    tokenizer = GOLDEN / f"tokenizer-{kind}" / "tokenizer.json"
    return folder_of(folder, (CHAT / f"{name}.jinja").read_text(), tokenizer=tokenizer, eos_token=eos)

def chat_of(template, messages, **options):
    """(learned text, whole text) under a template of the test's own."""
    files = dict(TOKENIZER.files, **{"chat_template.jinja": template})
    return learned(messages, tokenizer=Tokenizer(files), **options)

@pytest.mark.parametrize("conversation", NINE, ids=lambda conversation: conversation["name"])
@pytest.mark.parametrize("name", ["falcon-h1r", "chatml", "llama3", "tiny"])
def test_conversations_under_published_templates(tmp_path, name, conversation):
    """Loss by hand; text and ids those of transformers, of the folder and of the one that is saved."""
    tokenizer = Tokenizer.from_pretrained(published(tmp_path, name))
    messages, tools = conversation["messages"], conversation["tools"]
    prompt, expected = conversation["add_generation_prompt"], conversation["learned"][name]
    if expected.startswith("refused: "):
        expected = re.escape(expected.removeprefix("refused: ") + "the chat template drops")
        with pytest.raises(ValueError, match="^" + expected):
            render_chat(messages, tokenizer, tools=tools)
        return
    ids, _ = render_chat(messages, tokenizer, tools=tools, generation_prompt=prompt)
    loss, text = learned(messages, tokenizer=tokenizer, tools=tools, generation_prompt=prompt)
    assert loss == expected
    if name == "falcon-h1r":
        system = re.search('"(You are Falcon.*)"', (CHAT / "falcon-h1r.jinja").read_text())[1]
        assert text == conversation["text"].replace("SYSTEM", system)
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "saved")
    for folder in (tmp_path, tmp_path / "saved"):
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        options = dict(tools=tools, add_generation_prompt=prompt)
        assert theirs.apply_chat_template(messages, tokenize=False, **options) == text
        assert theirs.apply_chat_template(messages, return_dict=False, **options) == ids

def test_render_chat_by_hand():
    start, end = SPECIAL["<|im_start|>"], SPECIAL["<|im_end|>"]
    assistant, user, boxed = map(SPECIAL.get, WORDS)
    reply = [SPECIAL["<think>"], *b"a", SPECIAL["</think>"], boxed, *b"b}", end]
    begin, line = SPECIAL["<|begin_of_text|>"], ord("\n")
    prompt = [begin, line, start, user, line, ord("Q"), end, line, start, assistant, line]
    ids, mask = render_chat(turns("Q", r"<think>a</think>\boxed{b}"), TOKENIZER)
    assert ids == [*prompt, *reply, *b"\n"]
    assert mask == [False] * len(prompt) + [True] * len(reply) + [False]
    assert render_chat(turns("Q"), TOKENIZER, generation_prompt=True) == (prompt, [False] * len(prompt))

def test_earlier_turns_lose_their_reasoning_and_the_last_is_learned():
    loss, whole = learned(turns("p", "<think>old</think>\n\none", "q", "<think>new</think>two"))
    assert loss == "<think>new</think>two<|im_end|>"
    assert "<|im_start|>assistant\none<|im_end|>\n" in whole and "old" not in whole
    loss, whole = learned(turns("p", "<think>old</think>one", "q"), generation_prompt=True)
    assert loss == "" and "old" not in whole and whole.endswith("q<|im_end|>\n<|im_start|>assistant\n")

@pytest.mark.parametrize(("content", "left"), [
    ("a", "a"), ("<think>x</think> a", "a"), ("a<think>x", "a"), ("x</think>a", "a"),
    ("<think>x</think>", ""), ("<think>x<think>y</think>a", "a")])
def test_what_is_left_of_an_earlier_reply(content, left):
    _, whole = learned(turns("p", content, "q"), generation_prompt=True)
    assert whole.split("assistant\n")[1].startswith(left + "<|im_end|>\n<|im_start|>user\nq")

def test_tool_calling_keeps_reasoning_and_learns_every_reply():
    for call in ("<tool_call>{}</tool_call>", "calling"):
        messages = turns("p", f"<think>x</think>{call}", "r", "<think>y</think>done")
        messages[2]["role"] = "tool"
        assert learned(messages)[0] == f"<think>x</think>{call}<|im_end|><think>y</think>done<|im_end|>"
        ids, _ = render_chat(messages, TOKENIZER)
        assert (SPECIAL["<tool_call>"] in ids) == ("<" in call) and ids.count(SPECIAL["<think>"]) == 2
        # A later question: the replies whose reasoning is gone are context.
        loss, _ = learned([*messages, *turns("q", "<think>z</think>more")])
        assert loss == "<think>z</think>more<|im_end|>"

def test_special_tokens_that_are_typed_stay_text():
    everything = "".join(name for name in SPECIAL if name not in WORDS)  # those may be typed
    call = {"name": "f", "arguments": {everything: everything}}
    messages = [{"role": "system", "content": everything}, {"role": "user", "content": everything}]
    prompt, _ = render_chat(messages, TOKENIZER, generation_prompt=True)
    counts = Counter(i for i in prompt if i >= 256)
    assert {TOKENIZER.decode([i]): count for i, count in counts.items()} == {
        "<|begin_of_text|>": 1, "<|im_start|>": 3, "<|im_end|>": 2, "user": 1, "assistant": 1}
    ids, _ = render_chat([*messages, {"role": "assistant", "content": everything}], TOKENIZER)
    reply = [i for i in ids[len(prompt) :] if i >= 256]  # an assistant may write tags and end its turn once
    assert reply == [*(SPECIAL[tag] for tag in TAGS), SPECIAL["<|im_end|>"]]
    reply = {"role": "assistant", "content": None, "reasoning_content": everything, "tool_calls": [call]}
    ids, _ = render_chat([*messages, reply], TOKENIZER, tools=[call])
    tags = [i for i in ids if SPECIAL["<think>"] <= i <= SPECIAL["</tool_call>"]]
    assert tags == [SPECIAL[tag] for tag in TAGS] and ids.count(SPECIAL["<|im_end|>"]) == 4

def test_tokens_that_a_template_writes_cannot_be_typed_even_if_not_marked_special(tmp_path):
    template = ("{% for m in messages %}<turn>{{ m.role + m.content }}<end>{% endfor %}"
                "{% if add_generation_prompt %}<turn>assistant{% endif %}")
    plain = ["<turn>", "<end>", "<sep>"]
    tokenizer = Tokenizer.from_pretrained(folder_of(tmp_path, template, plain=plain, eos_token="<end>"))
    special = tokenizer.special
    ids, mask = render_chat(turns("<end><turn>a<sep>", "b<end>"), tokenizer)
    counts = [ids.count(special[name]) for name in plain]
    assert counts == [2, 2, 1] and sum(mask) == len("b<end>") + 1
    obeys = "{% if '<|pad|>' in messages[0].content %}!{% endif %}{{ messages[0].content }}"
    with pytest.raises(ValueError, match=r"^messages\[0\]: special tokens typed here change what"):
        chat_of(obeys, turns("<|pad|>"), generation_prompt=True)

@pytest.mark.parametrize("name", ['<|"|>', "<\\n>", "<\n>", "<é>"])
def test_special_tokens_of_any_spelling_stay_text(name):
    added = [*GOOD["added_tokens"], GOOD["added_tokens"][0] | {"content": name, "id": 272}]
    tokenizer = Tokenizer(TOKENIZER.files | {"tokenizer.json": json.dumps(GOOD | {"added_tokens": added})})
    tools = [{"name": "f", name: [name]}]
    ids, _ = render_chat(turns(name, name), tokenizer, tools=tools)
    assert 272 not in ids and tokenizer.decode(ids).count(name) >= 2
    assert 272 in tokenizer.encode(name, special=True)

def test_a_token_of_header_and_reply_is_that_of_a_server_and_not_learned():
    model = MODEL | {"vocab": MODEL["vocab"] | {"ĊĊ": 272}, "merges": ["Ċ Ċ"]}
    tokenizer = Tokenizer(TOKENIZER.files | {"tokenizer.json": json.dumps(GOOD | {"model": model})})
    ids, mask = render_chat(turns("q", "\n\na"), tokenizer)
    assert ids.count(272) == 1 and not mask[ids.index(272)]
    assert tokenizer.decode([i for i, on in zip(ids, mask) if on]) == "\na<|im_end|>"

def roles(*names):
    return [{"role": name, "content": "x"} for name in names]

CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}

@pytest.mark.parametrize(("messages", "error"), [
    ([], r"messages: must be a list of"), ("hi", "messages: "), (["user"], r"messages\[0\]\.role: .*null"),
    ([{"content": "x"}], r"messages\[0\]\.role: must be"), (roles(["user"]), r"messages\[0\]\.role"),
    ([{"role": "user"}], r"messages\[0\]\.content"), (turns("\ud800"), r"messages\[0\]: .*surrogates not"),
    ([{"role": "user", "content": 3}], r"messages\[0\]\.content: must be a string, not 3"),
    ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\.content: must be a string"),
    ([*turns("q"), {"role": "assistant", "content": None}], r"messages\[1\]\.content: must be"),
    ([*turns("q"), {"role": "assistant", "content": None, "tool_calls": "f()"}],
     r"messages\[1\]\.tool_calls: must be a list, not \"f"),
    ([*turns("q"), {"role": "assistant", "content": "", "tool_calls": [{}]}], r"messages\[1\]: .*TypeError"),
    ([*turns("q"), {"role": "assistant", "content": "<think>a</think>b", "reasoning_content": "c"}],
     r"messages\[1\]\.reasoning_content: contradicts content"),
    ([*turns("q"), {"role": "assistant", "content": "<tool_call>", "tool_calls": [CALL]}],
     r"messages\[1\]\.tool_calls: contradicts content"),
    ([{"role": "user", "content": "q", "thinking": "t"}], r"messages\[0\]\.thinking: the chat template dr"),
    *[([{"role": "user", "content": "q", name: bad}], rf"messages\[0\]\.{name}: must be a string")
      for name, bad in [("weight", 0.5), ("weight", 0), ("train", False)]],
    ([{"role": "user", "content": "q", "reasoning_content": "t"}], r"messages\[0\]\.reasoning_content: the")])
def test_render_chat_names_message_and_field(messages, error):
    with pytest.raises(ValueError, match="^" + error):
        render_chat(messages, TOKENIZER, generation_prompt=True)

PLAIN = "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
ASKS = "{% if add_generation_prompt %}assistant:{% endif %}"

@pytest.mark.parametrize(("template", "messages", "error"), [
    # The prompt opens the reasoning, but a reply has none; no token ends a reply; roles and fields left out.
    (PLAIN + ASKS.replace(":", ":<think>"), turns("q", "a"), r"\[1\]: .*other text before it than"),
    (PLAIN.replace("<|im_end|>", "") + ASKS, turns("q", "a"), r"\[1\]: .*in no token that ends"),
    (PLAIN.replace("messages", "messages if m.role != 'developer'") + ASKS,
     roles("developer", "user", "assistant"), r"\[0\].content: the chat template drops it"),
    (PLAIN.replace("m.content", "m.content.split('</think>')[-1]") + ASKS, turns("q", "<think>r</think>a"),
     r"\[1\].content \(reasoning\): the chat template drops it"),
    (PLAIN + ASKS, [*turns("q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}],
     r"\[1\].tool_calls: the chat template drops it"),
    # What a template refuses, and what the sandbox does.
    ("{% for m in messages if m.role != 'user' %}{{ raise_exception('roles') }}{% endfor %}", turns("q", "a"),
     r"\[1\]: the chat template refuses it: TemplateError: \"roles\""),
    (PLAIN.replace("m.content", "m.content + (m.tool_calls[0].name if m.tool_calls else '')") + ASKS,
     [*turns("q"), {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}, {"name": "g"}]}],
     r"\[1\].tool_calls: the chat template drops it"),
    ("{{ messages[0].nothing.x }}", turns("q") * 2000, r"\[0\]: .*UndefinedError"),
    ("{{ ''.__class__.__mro__ }}", turns("q"), r"\[0\]: the chat template refuses it: SecurityError"),
    ("{{ messages.append(1) }}", turns("q"), r"\[0\]: the chat template refuses it: SecurityError"),
    ("{{ nothing(1) }}", turns("q"), r"\[0\]: the chat template refuses it: UndefinedError: \"'nothing'"),
    ("{{ 1 // 0 }}", turns("q"), r"\[0\]: the chat template refuses it: ZeroDivisionError")])
def test_what_a_template_does_not_allow_is_named(template, messages, error):
    with pytest.raises(ValueError, match="^messages" + error):
        chat_of(template, messages)

def test_a_template_may_allow_a_single_tool_call():
    calls = "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one') }}{% endif %}"
    template = PLAIN.replace("{{ m", calls + "{{ m.tool_calls[0].name }}{% endif %}{{ m") + ASKS
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    template = template.replace("{{ m.tool", "{{ 'assistant:' + m.tool").replace("m.role", "(m.role")
    template = template.replace(" + ':' + m.content", " + ':' if not m.tool_calls else '') + m.content")
    assert chat_of(template, [*turns("q"), call])[0] == "f<|im_end|>"

def test_templates_have_what_transformers_gives_them():
    text = ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}\n  {%- generation -%} \n"
            "{{ {'b': m.content, 'a': 1} | tojson(indent=1) }}{% endgeneration %}\n{% endfor %}"
            "{{ strftime_now('%Y')[:2] + eos_token }}")
    assert chat_of(text, turns("é<"))[1] == '{\n "b": "é<",\n "a": 1\n}20<|im_end|>'
    # What is set inside of a generation block stays there.
    scope = "{% set x = messages[0].content %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}"
    assert chat_of(scope, turns("1"))[1] == "1"

def test_which_template_and_which_ends(tmp_path):
    both = [{"name": "default", "template": "d{{ messages[0].content }}"},
            {"name": "tool_use", "template": "t{{ messages[0].content }}{{ tools }}"}]
    folder_of(tmp_path, "", chat_template=both, eos_token={"content": "<|pad|>"})
    write(tmp_path / "generation_config.json", {"eos_token_id": 97, "top_p": 0.95})
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    ends = [SPECIAL[name] for name in ("<|pad|>", "<|im_end|>", "<|end_of_text|>")]
    assert tokenizer.stop_ids == (97, *ends)
    assert learned(turns("q"), tokenizer=tokenizer)[1] == "dq"
    assert learned(turns("q"), tokenizer=tokenizer, tools=[CALL])[1].startswith("tq[{")
    # A file comes before tokenizer_config.json. What is saved is all that was read.
    (tmp_path / "chat_template.jinja").write_text("f{{ messages[0].content }}")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.from_pretrained(tmp_path / "saved")
    assert learned(turns("q"), tokenizer=again)[1] == "fq" and again.stop_ids == tokenizer.stop_ids
    assert json.loads((tmp_path / "saved/generation_config.json").read_text())["top_p"] == 0.95

def test_ends_and_names_come_from_all_files_that_transformers_reads(tmp_path):
    folder_of(tmp_path, "{{ bos_token }}", eos_token="<|pad|>")
    write(tmp_path / "config.json", {"eos_token_id": 0, "vocab_size": 272})
    write(tmp_path / "special_tokens_map.json", {"bos_token": {"content": "<think>"}})
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.stop_ids[:2] == (0, SPECIAL["<|pad|>"]) and tokenizer.render(turns("q")) == "<think>"
    tokenizer.save(tmp_path / "saved")  # config.json is the model's, not the tokenizer's
    assert Tokenizer.from_pretrained(tmp_path / "saved").stop_ids == tokenizer.stop_ids
    assert not (tmp_path / "saved/config.json").exists()
    write(tmp_path / "generation_config.json", {"eos_token_id": [1]})
    assert Tokenizer.from_pretrained(tmp_path).stop_ids[:2] == (1, SPECIAL["<|pad|>"])

@pytest.mark.parametrize(("files", "error"), [
    ({"chat_template.jinja": "{% break %}"}, r": .*chat template, SyntaxError: 'break' outside loop"),
    ({"chat_template.jinja": "{{ " + "(" * 3000}, ": .*chat template, RecursionError: "),
    ({"tokenizer_config.json": "{"}, ": .* tokenizer_config.json is no JSON object"),
    ({"tokenizer_config.json": '{"added_tokens_decoder": {"272": {"content": "<extra>"}}}'},
     ": .* tokenizer.json lacks the added token 272"),
    ({"config.json": '{"eos_token_id": 272}'}, ": .*eos_token_id 272 is no token"),
    ({"chat_template.jinja": "x\n{% switch x %}"}, r": .*chat template, line 2: .*unknown tag 'switch'"),
    ({"chat_template.jinja": "{{ x | shout }}"}, r": .*chat template, line 1: No filter named 'shout'"),
    ({"generation_config.json": '{"eos_token_id": [272]}'}, ": .*eos_token_id 272 is no token")])
def test_bad_files_of_a_chat_are_named(tmp_path, files, error):
    for name, text in {"tokenizer.json": TOKENIZER.files["tokenizer.json"], **files}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"^{tmp_path}{error}"):
        Tokenizer.from_pretrained(tmp_path)

def test_a_folder_without_a_template_is_named():
    tokenizer = Tokenizer({"tokenizer.json": TOKENIZER.files["tokenizer.json"]})
    with pytest.raises(ValueError, match="^messages: .* no chat template; add a chat_template.jinja"):
        render_chat(turns("q"), tokenizer)

def test_prompts_with_a_system_prompt_and_a_suffix(tmp_path):
    (tmp_path / "system.txt").write_text("Be\nbrief.\n")
    system = data.text_or_file(str(tmp_path / "system.txt"))
    assert ask("q", system, "Box it.") == [
        {"role": "system", "content": "Be\nbrief."}, {"role": "user", "content": "q\nBox it."}]
    assert ask("q") == turns("q")
    for text in ("", "Brief.", "Be brief, e.g. 4/5.", "x" * 5000):
        assert data.text_or_file(text) == text
    with pytest.raises(ValueError, match="prompts/none.txt is missing"):
        data.text_or_file("prompts/none.txt")

# 2. Tokenizer -----------------------------------------------------------------------------------------------

def test_byte_level_ids_are_bytes_and_specials_follow():
    assert sorted(SPECIAL.values()) == [*range(256, 271)] and TOKENIZER.vocab_size == 272
    assert TOKENIZER.stop_ids == (SPECIAL["<|im_end|>"], SPECIAL["<|end_of_text|>"]) == (260, 258)

def test_byte_level_loads_in_llama_cpp():
    """It wants a merge, here one that no text has (UTF-8 knows no byte FF), and ids that nobody renumbers."""
    assert MODEL["merges"] == ["ÿ ÿ"] and TOKENIZER.bytes[271] == b"\xff\xff"
    assert sorted(MODEL["vocab"].values()) == [*range(272)] and MODEL["vocab"].items() >= SPECIAL.items()
    assert json.loads(TOKENIZER.files["tokenizer_config.json"])["eos_token"] == "<|im_end|>"

def test_reply_text_is_without_the_token_that_ends_it():
    end = TOKENIZER.stop_ids[0]
    assert data.reply_text([*b"ab", end], TOKENIZER) == data.reply_text([*b"ab"], TOKENIZER) == "ab"
    assert data.reply_text([end], TOKENIZER) == data.reply_text([], TOKENIZER) == ""
    assert data.reply_text([end, 97], TOKENIZER) == "<|im_end|>a"  # only the last token ends it

@given(st.text())
@example("<|im_start|>system\n<think>")
def test_tokenizer_round_trip(text):
    assert TOKENIZER.encode(text) == list(text.encode()) and TOKENIZER.decode(text.encode()) == text

@given(st.lists(st.integers(0, 271)))
def test_anything_a_model_samples_can_be_decoded(ids):
    names = {i: name for name, i in SPECIAL.items()}
    raw = b"".join(bytes([i]) if i < 256 else names.get(i, "ÿÿ").encode("latin-1") for i in ids)
    assert TOKENIZER.decode(np.array(ids, int)) == raw.decode(errors="replace")
    assert TOKENIZER.decode([*ids, 272, 2**40]) == TOKENIZER.decode(ids)  # a padded vocabulary's

def test_tokenizer_survives_saving(tmp_path):
    TOKENIZER.save(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert (again.special, again.bytes, again.stop_ids) == (SPECIAL, TOKENIZER.bytes, TOKENIZER.stop_ids)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 257, "eos_token_id": [260, 258], "pad_token_id": 256}
    assert {path.name for path in tmp_path.iterdir()} == {*TOKENIZER.files, "generation_config.json"}

@given(st.text())
def test_tokenizers_library_reads_the_same_ids(tmp_path_factory, text):
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.getbasetemp()
    TOKENIZER.save(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert theirs.encode(text).ids == TOKENIZER.encode(text)
    ids, _ = render_chat(turns("1+1?", "<think>two</think>2"), TOKENIZER)
    assert theirs.encode(TOKENIZER.decode(ids)).ids == ids
    assert theirs.get_vocab_size() == TOKENIZER.vocab_size
    theirs.save(str(folder / "tokenizer.json"))
    assert Tokenizer.from_pretrained(folder).special == SPECIAL
    assert theirs.decode(ids, skip_special_tokens=True).count("<think>") == 1

def test_a_tag_behind_what_is_not_read_is_found():
    added = GOOD["added_tokens"]
    added = [*added, dict(added[0], content=">>X<<", id=272)]
    tokenizer = Tokenizer({"tokenizer.json": json.dumps(GOOD | {"added_tokens": added})})
    readable = tokenizer.hide(">>X<<think>", but=TAGS)
    assert tokenizer.encode_as(">>X<<think>", readable)[-1] == tokenizer.special["<think>"]

@pytest.mark.parametrize(("behavior", "pieces", "inverted", "single"), [
    ("Removed", "a b", "-- -", "b"), ("Isolated", "a -- b -", "a -- b -", "- - b"),
    ("Contiguous", "a -- b -", "a -- b -", "-- b"), ("MergedWithPrevious", "a-- b-", "a --b -", "- - b"),
    ("MergedWithNext", "a --b -", "a-- b-", "- -b")])
def test_splitter_by_hand(behavior, pieces, inverted, single):
    assert splitter("-+", behavior)("a--b-") == pieces.split()
    assert splitter("-+", behavior, invert=True)("a--b-") == inverted.split()
    assert splitter("-", behavior)("--b") == single.split()

# The patterns of public models, as GPT-2, Llama 3, GPT-4o, DeepSeek, BLOOM, Kimi and SuperBPE have them; then
# what Oniguruma reads otherwise than Python's engines.
CONTRACTED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
PATTERNS = [
    GPT2_WORDS, rf"{CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{OTHERS}",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s",
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{CONTRACTED}?|\p{{N}}{{1,3}}|{OTHERS}",
    rf"\p{{Han}}+|[{UPPER}&&[^\p{{Han}}]]*[{LOWER}&&[^\p{{Han}}]]+{CONTRACTED}?|{OTHERS}",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+""",
    "[一-龥぀-ゟ゠-ヿ]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"(?=(\d{3})+(?!\d))", r"\d{1,3}(?=(?:\d{3})*(?:\D|$))",
    r"\w+", r"\W", r"[\w-]+", r"[^\w\s]", r"\h+", r"\H", r"[\h_]+", r"a$", r"[\w&&[^a-f]]", r"[^a-z&&[^ab]]",
    r"[a[bc]]+", r"[^[ab]&&[bc]]", r"[a|b~]+", r"a{,2}b", r"\p{L}{2,}?", r"(?<=a)b", r"\p{^L}+",
    r"\x41|\u4e00", r"\p{Greek}+"]
REFUSED = [
    r"\p{N}{1,3}+", "a{2}?", r"\bfoo", r"\R", r"\X", "[[:alpha:]]", r"\x{4e00}", r"(a)\1", "[]a]", "[a--b]",
    "^a", "[a||b]", "[&&a]", "[a&&]", r"\pL", r"\p{Word}", r"\p{XDigit}", "(?i:i)", "(?i:st)", r"(?i:\p{Lu})",
    "(?i)a", "(?m:.)", r"\z", r"\K", "(?<n>a)", "(?~a)", r"a\v", "a{b", "a*", r"\s*|b", "a??", "[a", "a)",
    "a+++", "(?x) a"]
# 16.0 is the Unicode of tokenizers; what came later, or changed, may differ.
KNOWN = [c for c in map(chr, range(0x20000)) if unicodedata.category(c) not in ("Cn", "Cs") and c != "\u0295"]
TYPED = st.sampled_from("aabbcsstTdmlvreKſ’''  \n\n\r\t12345.,!?()[]|&~-_²½ßıİﬆα中日가\u0301\u00a0\u0085")

@pytest.fixture(scope="module")
def theirs():
    tokenizers = pytest.importorskip("tokenizers")
    return lambda *split: tokenizers.pre_tokenizers.Split(tokenizers.Regex(split[0]), *split[1:])

@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=25)
@given(text=st.lists(TYPED | st.sampled_from(KNOWN), min_size=1, max_size=25).map("".join))
def test_patterns_mean_what_oniguruma_means(theirs, pattern, text):
    for name in JOINED:
        for invert in (False, True):
            split = theirs(pattern, re.sub("(?<!^)(?=[A-Z])", "_", name).lower(), invert)
            pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
            assert splitter(pattern, name, invert)(text) == pieces

@pytest.mark.parametrize("pattern", REFUSED)
def test_other_patterns_are_refused(pattern):
    with pytest.raises((ValueError, regex.error)):
        splitter(pattern, "Isolated")

def test_tokens_that_bpe_cannot_produce_are_never_used():
    """Merging b with c first leaves a and bc; tiktoken alone would join them, though no merge does."""
    assert [*tiktoken_ranks(["bc", "ab", "abc"], ["b c", "a b", "ab c"])][256:] == ["bc", "ab"]
    assert tiktoken_ranks(["bc", "ab", "abc"], [["a", "b"], ["b", "c"], ["ab", "c"]])["abc"] == 258

@pytest.mark.parametrize(("change", "error"), [
    ({"normalizer": {"type": "NFC"}}, "this normalizer is not"), ({"decoder": None}, "this decoder is not"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer Metaspace is not supported"),
    ({"model": MODEL | {"type": "Unigram"}}, "this model is not"),
    ({"model": MODEL | {"dropout": 0.1}}, "this model.dropout is not"),
    *[({"added_tokens": [GOOD["added_tokens"][0] | {name: True}]}, f"this flag {name} of an added")
      for name in ("single_word", "lstrip", "rstrip")],
    ({"model": MODEL | {"vocab": {"ab": 0}}}, "cannot read its tokenizer: KeyError"),
    ({"model": MODEL | {"vocab": MODEL["vocab"] | {"ab": 97}, "merges": ["a b"]}}, "this id of two tokens"),
    ({"added_tokens": [GOOD["added_tokens"][0] | {"id": 97}]}, "this id of two tokens"),
    ({"added_tokens": [GOOD["added_tokens"][0] | {"content": "", "id": 272}]}, "tokenizer: IndexError"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "ByteLevel is not supported: {"),
    *[(bad, "cannot read its tokenizer") for bad in (
        {"model": None}, {"pre_tokenizer": SPLIT}, b"", b"[]", b"{", b"3", b"\xed\xa0\x80")]])
def test_from_pretrained_names_what_it_does_not_support(tmp_path, change, error):
    TOKENIZER.save(tmp_path)
    text = change if isinstance(change, bytes) else json.dumps(GOOD | change).encode()
    (tmp_path / "tokenizer.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"^{tmp_path}: .*{error}"):
        Tokenizer.from_pretrained(tmp_path)

# 4. Files ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", ["", ".", "folder", "none/../folder", "file/x"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="^[a-z./]+: could not be written: [A-Z]"):
        write_text(path, "x")
    assert not [*tmp_path.glob("*.tmp"), *tmp_path.glob(".*")]
