"""Tests of data.py: hand-worked numbers, simple oracles, and every bad input named."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data
from curate import why_not_sft
from tokenizer import render_chat

TOKENIZER = data.Tokenizer.byte_level()

def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path

def turns(*contents):
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]

SFT = {"messages": turns("q", "<think>r</think>a"), "domain": "math", "weight": 1.5}
OURS = {"id": "1", "domain": "math", "prompt": "1+1?", "answer": "2"}
GSM8K = {"question": "Half of 48?", "answer": "48/2=<<48/2=24>>24.\n#### 24"}
MATH = {"problem": "1+1?", "answer": "2", "solution": "It is $\\boxed{2}$.", "unique_id": "a/1", "level": 1}
HUMANEVAL = {"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "def check(f): ...",
             "entry_point": "f", "canonical_solution": "    return 1\n"}
GZIP = gzip.compress(json.dumps(OURS).encode())

# 1. Samples -------------------------------------------------------------------------------------------------

def test_parse_sft():
    sample = data.parse_sft(SFT, TOKENIZER, "")
    ids, mask = render_chat(SFT["messages"], TOKENIZER)
    assert (sample.ids.tolist(), sample.mask.tolist()) == (ids, mask) and sample.ids.dtype == np.int32
    assert (sample.weight, sample.domain, sample.trimmed) == (1.5, "math", False)
    short = data.parse_sft(SFT, TOKENIZER, "", len(ids) - 2, trim=True)
    assert short.trimmed and (short.ids.tolist(), short.mask.tolist()) == (ids[:-2], mask[:-2])
    with pytest.raises(ValueError, match=f"^x, line 1: .*{len(ids)} tokens, the limit is {len(ids) - 2};"):
        data.parse_sft(SFT, TOKENIZER, "x, line 1", len(ids) - 2)

@pytest.mark.parametrize(("change", "error"), [
    ({"messages": None}, "messages: must be a list"), ({"domain": ""}, "domain must be a string"),
    ({"messages": turns("q")}, "messages: holds no assistant"),
    ({"messages": [{"role": 3, "content": ""}]}, r"messages\[0\]\.role"),
    *[({"weight": bad}, "weight must be") for bad in (0, -1, "1", None, True, float("nan"), 1e999, 9**400)]])
def test_parse_sft_names_the_field(change, error):
    with pytest.raises(ValueError, match=f"^x, line 1: field {error}"):
        data.parse_sft(SFT | change, TOKENIZER, "x, line 1")

def share_gpt(*turns):
    return [{"from": speaker, "value": text} for speaker, text in turns]

CHAT = share_gpt(("human", "q"), ("gpt", "<think>r</think>a"))
TOOLS = [{"name": "f"}]

@pytest.mark.parametrize(("record", "change"), [
    ({"messages": SFT["messages"]}, {}), ({"conversations": CHAT}, {}),
    ({"conversations": SFT["messages"]}, {}), ({"messages": CHAT, "conversations": None}, {}),
    *[({"conversations": [CHAT[0], CHAT[1] | {"from": name}]}, {}) for name in ("bot", "model")],
    ({"conversations": CHAT, "tools": "[]", "domain": 3}, {"domain": "3"}),
    ({"conversations": CHAT, "tools": "", "system": ""}, {"system": ""}),
    ({"messages": SFT["messages"], "conversations": CHAT, "weight": 2, "n": 3}, {"weight": 2.0, "n": 3}),
    ({"conversations": CHAT, "tools": "[{\"name\": \"f\"}]", "domain": "code"},
     {"tools": TOOLS, "domain": "code"}),
    ({"messages": SFT["messages"], "system": "s"},
     {"messages": [{"role": "system", "content": "s"}, *SFT["messages"]]}),
    ({"conversations": share_gpt(("system", "s"), *[turn.values() for turn in CHAT]), "system": "s"},
     {"messages": [{"role": "system", "content": "s"}, *SFT["messages"]]}),
    ({"conversations": [CHAT[0], CHAT[1] | {"reasoning_content": "x"}]},
     {"messages": [SFT["messages"][0], SFT["messages"][1] | {"reasoning_content": "x"}]}),
    ({"conversations": share_gpt(("user", "q"), ("function_call", "{}"), ("observation", "1"))},
     {"messages": [turns("q")[0], {"role": "assistant", "content": "<tool_call>\n{}\n</tool_call>"},
                   {"role": "tool", "content": "1"}]})])
def test_rows_as_people_have_them(record, change):
    before = json.dumps(record)
    expected = {"messages": SFT["messages"], "domain": "other", "weight": 1.0} | change
    assert data.sft_row(record, "") == expected and json.dumps(record) == before

@pytest.mark.parametrize(("record", "error"), [
    ({"messages": turns("q", "b"), "conversations": CHAT}, "conversations contradicts field messages"),
    ({"messages": [{"role": "system", "content": "s"}], "system": "t"},
     "system contradicts the first message"),
    ({"messages": SFT["messages"], "system": ["s"]}, "system must be a string"),
    ({"conversations": [CHAT[0], SFT["messages"][1]]}, r"conversations\[1\].from: null is none of human"),
    ({"messages": [SFT["messages"][0], CHAT[1]]}, r"messages\[1\]: mixes from and value with role"),
    ({"conversations": [CHAT[0] | {"role": "user"}]}, r"conversations\[0\]: mixes"),
    ({"conversations": share_gpt(("robot", "x"))}, r'conversations\[0\].from: "robot" is none of'),
    ({"conversations": share_gpt((["human"], "x"))}, r"conversations\[0\].from"),
    ({"conversations": "hi"}, 'conversations: must be a list of at least one message, not "hi"'),
    ({"conversations": ["hi"]}, "conversations: must be a list"),
    ({"messages": []}, "messages: must be a list"),
    ({"messages": SFT["messages"], "tools": "[{"}, "tools: malformed JSON"),
    *[({"messages": SFT["messages"], "tools": bad}, "tools: must be a list of objects") for bad in (3,
                                                                                                    ["f"])],
    ({"messages": [SFT["messages"][0], SFT["messages"][1] | {"tool_calls": [3]}]},
     r"messages\[1\].tool_calls: must be a list of objects, not \[3\]"),
    ({"conversations": share_gpt(("human", 3))}, r"conversations\[0\].value: must be a string, not 3"),
    ({"conversations": [{"from": "gpt"}]}, r"conversations\[0\].value: must be a string, not null"),
    *[({"messages": turns("q", bad)}, r"messages\[1\]: holds half of a surrogate") for bad in ("\ud800",
                                                                                               "a\udfff")],
    ({"messages": SFT["messages"], "tools": "{}"}, "tools: {} is not a JSON array")])
def test_rows_that_contradict_themselves_are_named(record, error):
    with pytest.raises(ValueError, match=f"^x, line 1: field {error}"):
        data.sft_row(record, "x, line 1")

@given(st.lists(st.dictionaries(st.text(), st.text() | st.lists(st.text()), min_size=1), min_size=1),
       st.sampled_from([None, 1]))
def test_items_of_an_array_are_found_by_their_bytes(tmp_path_factory, rows, indent):
    path = tmp_path_factory.getbasetemp() / "array.json"
    path.write_text("\ufeff \n" + json.dumps(rows, indent=indent, ensure_ascii=False), "utf-8",
                    "surrogatepass")
    found = [*data.read_rows(path)]
    raw = path.read_bytes()
    assert [json.loads(item) for _, _, item in found] == rows
    assert all(raw[offset:].startswith(item) for _, offset, item in found)
    assert [where for where, _, _ in found] == [f"{path}, item {n + 1}" for n in range(len(rows))]

# 2. Made problems -------------------------------------------------------------------------------------------

def check_trace(problem, trace):
    """Parse and verify every step; return how many digits each took. Independent of how traces are made."""
    digits, divisor = re.fullmatch(r"(\d+)%(\d)=\?", problem.prompt).groups()
    taken, quotients, remainder, sizes = "", "", "", []
    for step in trace.removesuffix(";").split(";"):
        now, quotient, rest = re.fullmatch(r"(\d+)=(\d+)r(\d)", step).groups()
        assert now.startswith(remainder) and int(rest) < int(divisor)
        assert int(quotient) * int(divisor) + int(rest) == int(now)
        new = now[len(remainder) :]  # only the first quotient has no zeros in front
        assert len(quotient) == len(new) if sizes else quotient == str(int(quotient))
        taken, quotients, remainder = taken + new, quotients + quotient, rest
        sizes.append(len(new))
    assert taken == digits and trace.endswith(";") and problem.answer == remainder
    assert int(quotients) == int(digits) // int(divisor)
    return sizes

@given(st.integers(1, 10), st.integers(0, 999), st.booleans())
def test_every_step_is_true(level, seed, careful):
    rng = random.Random(seed)
    problem = data.make_problem(level, rng)
    sizes = check_trace(problem, data.make_trace(problem, rng, careful))
    assert sum(sizes) == level == len({*problem.id.partition("%")[0]})
    if 1 < level and sizes[0] <= 2:  # the first step takes two digits only if one does not reach the divisor
        assert sizes[0] == 1 + (problem.prompt[0] < problem.prompt[-3])
    widths = {1} if careful else {1, *data.SKIP_WIDTHS}
    assert set(sizes[1:]) <= widths and sizes[0] in {2, *widths}

@pytest.mark.parametrize(("prompt", "answer", "careful", "trace"), [
    ("4375%7=?", "0", True, "43=6r1;17=2r3;35=5r0;"),
    ("4376%7=?", "1", True, "43=6r1;17=2r3;36=5r1;"),
    ("9063%9=?", "0", True, "9=1r0;00=0r0;06=0r6;63=7r0;"),  # the first digit reaches the divisor
    ("4376%7=?", "1", False, "437=62r3;36=5r1;"),
    ("9006306%9=?", "6", False, "900=100r0;0630=070r0;06=0r6;")])  # zeros of a later quotient stay
def test_traces_by_hand(monkeypatch, prompt, answer, careful, trace):
    monkeypatch.setattr(data, "SKIP", 1.0)
    monkeypatch.setattr(data, "SKIP_WIDTHS", (3,))
    assert data.make_trace(data.Problem("", "math", prompt, answer), random.Random(0), careful) == trace

@pytest.mark.parametrize(("rate", "weight"), [
    (1, 0.5), (0.76, 0.5), (0.75, 1), (0.5, 1), (0.25, 1), (0.24, 1.27), (0.125, 1.5), (0, 1.75)])
def test_difficulty_weight(rate, weight):
    assert data.difficulty_weight(rate) == pytest.approx(weight)

def test_small_spaces_end(monkeypatch):
    monkeypatch.setattr(data, "MIX", {2: 1})  # 243 problems in all
    with pytest.raises(ValueError, match=r"only \d+ different train problems found, 300 wanted"):
        data.make_problems("train", 300, 0)
    assert len({problem.prompt for problem in data.make_problems("train", 20, 0)}) == 20

def test_splits_have_their_shares():
    counts = Counter(data.split_of(str(i)) for i in range(5000))
    assert {name: count / 5000 for name, count in counts.items()} == pytest.approx(data.SPLIT, abs=0.03)

def test_make(tmp_path):
    flags = ["--seed", "1", "--sft", "300", "--rl", "80", "--heldout", "50"]
    assert [data.main(["make", *flags, "--out", f"{tmp_path}/{run}"]) for run in "ab"] == [0, 0]
    files = {}
    for name in ("sft", "rl", "heldout"):
        path, again = (tmp_path / run / f"{name}.jsonl" for run in "ab")
        assert path.read_bytes() == again.read_bytes()
        files[name] = [row for _, row in data.read_records(path)]
    sft = files.pop("sft")
    problems = [data.Problem("", "", row["messages"][0]["content"], row["problem"]) for row in sft]
    prompts = {name: {row["prompt"] for row in rows} for name, rows in files.items()}
    prompts["train"] = {problem.prompt for problem in problems}
    assert {split: len(some) for split, some in prompts.items()} == {"train": 300, "rl": 80, "heldout": 50}
    assert all({data.split_of(prompt) for prompt in some} == {split} for split, some in prompts.items())
    sizes = []
    for row, problem in zip(sft, problems):
        reply = row["messages"][1]["content"]
        trace, problem.answer = re.fullmatch(r"<think>(.+)</think>\\boxed\{(\d+)\}", reply).groups()
        sizes.append(check_trace(problem, trace))
        assert why_not_sft(row) is None and data.parse_sft(row, TOKENIZER, "", 200)
    assert {1, 2, *data.SKIP_WIDTHS} == set().union(*sizes)
    assert any(1 in some and max(some) > 2 for some in sizes)  # careless traces are mixtures
    careful = [some for some in sizes if some[0] <= 2 and set(some[1:]) <= {1}]
    assert 0.15 < len(careful) / 300 < 0.5  # a ninth, and careless ones that skip nothing
    assert {row["weight"] for row in sft} == {0.5, 1.0, 1.75}

# 3. Packing -------------------------------------------------------------------------------------------------

def make_sample(ids, loss=None, weight=1.0):
    mask = [False] + [True] * (len(ids) - 1) if loss is None else loss
    return data.Sample(np.array(ids, np.int32), np.array(mask, bool), weight, "math")

def test_pack_by_hand():
    samples = [make_sample([1, 2, 3], [0, 0, 1], 0.5), make_sample([4, 5, 6, 7], [0, 1, 0, 1], 1.5)]
    [first, second] = data.pack([*samples, make_sample([8, 9], [1, 1])], capacity=7)
    assert first.input_ids.tolist() == [4, 5, 6, 7, 1, 2, 3]
    assert first.targets.tolist() == [5, 6, 7, 0, 2, 3, 0]
    assert first.weights.tolist() == [1.5, 0, 1.5, 0, 0, 0.5, 0]
    assert first.cu_seqlens.tolist() == [0, 4, 7] and second.cu_seqlens.tolist() == [0, 2]
    assert second.weights.tolist() == [1, 0]
    assert [first.input_ids.dtype, first.targets.dtype] == [np.int64] * 2
    assert (first.weights.dtype, first.cu_seqlens.dtype) == (np.float32, np.int32)

def test_pack_splits_then_fills_up():
    samples = [make_sample([n] * 2) for n in range(1, 5)]
    assert [len(p.input_ids) for p in data.pack(samples, 8)] == [8]
    assert [len(p.input_ids) for p in data.pack(samples, 8, multiple_of=2)] == [4, 4]
    packs = data.pack(samples, 8, multiple_of=6)
    assert [len(p.input_ids) for p in packs] == [2, 2, 2, 2, 1, 1]
    assert packs[-1].weights.tolist() == [0] and packs[-1].cu_seqlens.tolist() == [0, 1]
    with pytest.raises(ValueError, match="sample of 2 tokens does not fit a pack of 1"):
        data.pack(samples, 1)

@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(20, 60), st.integers(1, 5))
def test_packing_keeps_every_document(lengths, capacity, multiple):
    start = np.cumsum([1, *lengths])
    samples = [make_sample(range(a, a + n), weight=0.5 + n) for a, n in zip(start, lengths)]
    packs = data.pack(samples, capacity, multiple)
    found = []
    for one in packs:
        assert len(one.input_ids) == len(one.targets) == len(one.weights) == one.cu_seqlens[-1] <= capacity
        for a, b in zip(one.cu_seqlens, one.cu_seqlens[1:]):
            found.append(one.input_ids[a:b].tolist())
            assert one.targets[a:b].tolist() == found[-1][1:] + [0]
            weight = 0 if found[-1] == [0] else 0.5 + b - a
            assert one.weights[a:b].tolist() == [weight] * (b - a - 1) + [0]
    assert sorted(doc for doc in found if doc != [0]) == [sample.ids.tolist() for sample in samples]
    again = data.pack(samples, capacity, multiple)
    assert all(np.array_equal(one.input_ids, two.input_ids) for one, two in zip(packs, again, strict=True))
    bins = len(data.pack(samples, capacity))  # no two of them could be one: more than half full on average
    assert bins == 1 or bins * capacity < 2 * sum(lengths)
    assert len(packs) % multiple == 0 and len(packs) < bins + multiple

# 4. Reading problems ----------------------------------------------------------------------------------------

def test_public_shapes(tmp_path):
    path = write(tmp_path / "x.jsonl", OURS | {"n": 3}, GSM8K, MATH, HUMANEVAL)
    ours, gsm8k, maths, code = data.read_problems(path)
    assert ours == data.Problem("1", "math", "1+1?", "2", {"n": 3}) and ours.record() == OURS | {"n": 3}
    assert (gsm8k.id, gsm8k.prompt, gsm8k.answer) == ("x.jsonl:2", "Half of 48?", "24")
    assert gsm8k.extra == {"solution": "48/2=<<48/2=24>>24."}
    assert maths == data.Problem("a/1", "math", "1+1?", "2", {"solution": MATH["solution"], "level": 1})
    assert (code.id, code.domain, code.prompt, code.answer) == ("HumanEval/0", "code", "def f():\n", "")
    assert code.extra == {"tests": HUMANEVAL["test"], "entry_point": "f", "solution": "    return 1\n"}
    assert data.read_problems(write(tmp_path / "y.jsonl", ours.record(), code.record())) == [ours, code]
    choice = {"question": "Which?", "choices": ["x", "y"], "answer": 1, "domain": "biology"}
    assert data.parse_problem(choice, "FILE, line 1").domain == "biology"  # a public shape may name its own
    assert data.parse_problem(MATH | {"choices": None}, "FILE, line 1").domain == "math"

@pytest.mark.parametrize("record", [
    {"question": "Which?", "choices": None, "options": ["x", "y"], "answer": "B"},  # of joined files
    {"question": "Which?", "choices": {"label": [1, 2], "text": ["x", "y"]}, "answerKey": "2"},
    OURS | {"prompt": "Which?", "choices": None, "options": ["x", "y"], "answer": "y", "domain": "science"}])
def test_choices_with_nulls_and_with_numbers_as_labels(record):
    problem = data.parse_problem(record, "FILE, line 1")
    assert (problem.answer, problem.extra, problem.domain) == ("B", {"choices": ["x", "y"]}, "science")

def test_containers(tmp_path):
    want = [data.Problem("1", "math", "1+1?", "2"), data.Problem("7", "math", "1+1?", "2")]
    text = f"\ufeff\n{json.dumps(OURS)}\r\n\n{json.dumps(OURS | {'id': 7, 'answer': 2})}"
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.json").write_text(json.dumps([OURS, OURS | {"id": "7"}], indent=1))
    assert [data.read_problems(path) for path in tmp_path.iterdir()] == [want] * 3

@pytest.mark.parametrize(("line", "error"), [
    *[(line, "malformed JSON") for line in (b"{", b'{"a": ', b"1" * 5000, b"[" * 100000, b"\xff")],
    *[(line, "is not a JSON object") for line in (b"3", b"null", b"{}")],
    *[({k: v for k, v in OURS.items() if k != name}, f"field {name} is missing") for name in OURS],
    *[(OURS | {name: " "}, f"field {name} must be a string that is not empty") for name in OURS],
    (OURS | {"answer": None}, "field answer"), (OURS | {"answer": True}, "field answer"),
    (OURS | {"prompt": ["x"]}, "field prompt"), (OURS | {"prompt": "\ud800"}, "field prompt holds half"),
    (OURS | {"id": "0"}, r"field id: \"0\" is also the id of .*bad.jsonl, line 1"),
    (GSM8K | {"answer": "48/2 = 24"}, "field answer must end in `#### x`"),
    (GSM8K | {"answer": "24 ####"}, "field answer must end in `#### x`"),
    (OURS | {"question": "x", "answer": ""}, "field answer must be"),
    (GSM8K | {"question": ""}, "field question"), ({"question": "x"}, "field answer is missing"),
    (MATH | {"answer": ""}, "field answer"), (HUMANEVAL | {"test": ""}, "field test"),
    ({k: v for k, v in HUMANEVAL.items() if k != "test"}, "field answer is missing")])
def test_read_problems_names_file_line_and_field(tmp_path, line, error):
    line = json.dumps(line).encode() if isinstance(line, dict) else line
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(OURS | {"id": "0"}).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 3: .*{error}"):
        data.read_problems(path)

@pytest.mark.parametrize(("name", "raw", "error"), [
    ("a.json", b"", "empty"), ("a.json", b"\n \n", "empty"), ("a.json", b"[]", "not a JSON array with items"),
    ("a.json", b"[{}", "malformed JSON"), ("a.json", b"[3]", "item 1: 3 is"),
    *[("a.gz", raw, "not a complete gzip") for raw in (GZIP[:-12], b"x" + GZIP, GZIP[:20] + bytes(30))]])
def test_read_problems_names_the_file(tmp_path, name, raw, error):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{name}.*{error}"):
        data.read_problems(tmp_path / name)

@pytest.mark.parametrize(("path", "hint"), [
    ("runs/tiny/data/rl.jsonl", ": run python train_sft.py first"), ("runs/tinier/x", ""), ("x.jsonl", "")])
def test_missing_files_of_the_small_run_say_what_makes_them(tmp_path, monkeypatch, path, hint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{path} is missing{hint}$"):
        data.read_problems(path)
    with pytest.raises(ValueError, match="^runs/tiny/rl is missing: run python train_rl.py first$"):
        data.load_tokenizer("runs/tiny/rl")

def test_a_problem_that_cannot_be_scored_is_named_by_its_line(tmp_path):
    bad = write(tmp_path / "bad.jsonl", OURS, OURS | {"id": "2", "answer": "x"})
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: field answer: could not convert .* 'x'"):
        data.read_problems(bad, check=lambda problem: float(problem.answer))
    # What is beyond the limit is not looked at.
    assert len(data.read_problems(bad, 1, check=lambda problem: float(problem.answer))) == 1
    assert [problem.where for problem in data.read_problems(bad)] == [f"{bad}, line {n}" for n in (1, 2)]

value = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text(), max_size=2)
names = st.sampled_from([*OURS, *GSM8K, *MATH, *HUMANEVAL, "tests", "choices"])
rows = st.dictionaries(names, value, max_size=5).map(lambda row: json.dumps(row).encode())

@given(st.lists(st.binary(max_size=20) | rows, max_size=4))
def test_malformed_lines_are_read_or_refused(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "malformed.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        problems = data.read_problems(path)
        assert problems
        for one in problems:
            assert one.id and one.domain and one.prompt and (one.answer or one.extra["tests"])
    except ValueError as error:
        assert "malformed.jsonl" in str(error) and "\n" not in str(error)

# 5. Scripts and commands ------------------------------------------------------------------------------------

def test_show(tmp_path, capsys):
    path = write(tmp_path / "s.jsonl", SFT, SFT, SFT | {"domain": "code"})
    assert data.main(["show", str(path), "--rows", "1"]) == 0
    out = capsys.readouterr().out
    size = len(render_chat(SFT["messages"], TOKENIZER)[0])
    assert out.count("<think>r</think>a<|im_end|>") == 1
    assert re.search(rf"\nmath +2 +{2 * size} +{size} +1\.500", out) and re.search("\ncode +1 ", out)

def test_commands_refuse_bad_flags_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    for arguments, message in [
        (["make", "--sftt", "3"], "unrecognized arguments: --sftt 3"), ([], "arguments are required"),
        (["make", "--sft", "x"], "argument --sft"), (["curate"], "arguments are required: traces"),
        (["make", "--out", f"{tmp_path}/file", "--sft", "3"], "file"), (["fetch"], "invalid choice: 'fetch'"),
        (["show", str(tmp_path / "none.jsonl")], "none.jsonl is missing")]:
        assert data.main(arguments) == 1
        printed = capsys.readouterr().err
        assert re.fullmatch("error: .+\n", printed) and message in printed

def test_a_folder_of_another_kind_of_model_is_named(tmp_path):
    TOKENIZER.save(tmp_path)
    for config in ({"text_config": {"vocab_size": 512}}, {"vocab_size": "512"}):
        data.write_text(tmp_path / "config.json", json.dumps(config))
        with pytest.raises(ValueError, match="config.json has no vocab_size: it describes another kind of"):
            data.load_tokenizer(tmp_path)

def test_a_prompt_that_the_template_refuses_is_named_by_its_line(tmp_path):
    args = SimpleNamespace(system="s", suffix="f")
    problems = data.read_problems(write(tmp_path / "p.jsonl", OURS, OURS | {"id": "2", "prompt": "bad"}))
    [ids] = data.prompts_of(problems[:1], args, TOKENIZER)
    assert "s<|im_end|>" in (text := TOKENIZER.decode(ids)) and "1+1?\nf<|im_end|>" in text
    template = "{% if 'bad' in messages[1].content %}{{ raise_exception('no') }}{% endif %}"
    files = TOKENIZER.files | {"chat_template.jinja": template + "{{ messages }}"}
    with pytest.raises(ValueError, match=r"p.jsonl, line 2: its prompt: messages\[1\]: .*TemplateError"):
        data.prompts_of(problems, args, data.Tokenizer(files))

def test_rows_are_not_written_into_a_name_that_says_compressed(tmp_path):
    with pytest.raises(ValueError, match="a.jsonl.gz: files are written uncompressed"):
        data.write_jsonl(tmp_path / "a.jsonl.gz", [OURS])

def test_many_unknown_verdicts_are_an_error_that_says_why():
    reasons = Counter({"unknown: no sandbox": 1, "unknown: no memory": 2})
    data.check_unknown("x", reasons, 150)  # 2% exactly
    data.check_unknown("x", Counter(), 0)
    with pytest.raises(ValueError, match="^x: 3 of 149 .*, more than 2%: 2 x no memory; 1 x no sandbox$"):
        data.check_unknown("x", reasons, 149)

def test_a_folder_is_opened_once_and_never_taken_from_another_run(tmp_path, monkeypatch):
    def open_run(seed=0, fresh=False):
        identity = {"seed": seed, "data": "a"}
        return data.open_run(tmp_path, identity, ("log.jsonl", "model"), fresh=fresh, device="cpu", ranks=1)

    def refused(why, seed=0):
        with pytest.raises(ValueError, match=why):
            open_run(seed)

    path = tmp_path / "run.json"
    lock = open_run()
    refused("another process is working here")
    lock.close()
    about = json.loads(path.read_text())
    assert about["identity"] == {"seed": 0, "data": "a"} and about["ranks"] == 1
    assert about["hardware"].endswith("CPU cores") and {"torch", "python", "commit"} <= set(about)
    (tmp_path / "model").mkdir()
    open_run()  # the same run goes on
    refused("run.json: this folder holds another run, with --seed 0 and not 1", seed=1)
    for broken in ("{", "[]", "{}"):
        path.write_text(broken)
        refused("holds files of no known run")
    path.unlink()
    refused("holds files of no known run")  # somebody's own work
    assert (tmp_path / "model").is_dir()
    monkeypatch.setenv("PATH", "")  # git cannot be found
    open_run(1, fresh=True)
    assert not (tmp_path / "model").exists() and json.loads(path.read_text())["commit"] == "unknown"

@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "gbk"])
def test_no_output_is_too_foreign_for_the_terminal(tmp_path, encoding):
    """Neither text nor the name of a file, nor half a surrogate pair in an error, ends a run."""
    path = tmp_path / "\u6f22\u00df.jsonl"
    write(path, {"messages": turns("漢 \U0001f308", "ß"), "domain": "math", "weight": 1})
    script, env = Path(data.__file__), os.environ | {"PYTHONIOENCODING": encoding}
    run = subprocess.run([sys.executable, script, "show", path], capture_output=True, env=env)
    assert run.returncode == 0, run.stderr
    shown = "漢 \U0001f308".encode(encoding, "backslashreplace")
    assert shown in run.stdout and b"mean weight" in run.stdout
    write(path, {"messages": turns("q", "a"), "domain": "\ud800", "weight": 1})
    run = subprocess.run([sys.executable, script, "show", path], capture_output=True, env=env)
    assert run.returncode == 1 and run.stderr.startswith(b"error: ") and b"Traceback" not in run.stderr
