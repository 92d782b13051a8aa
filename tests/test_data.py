"""Tests of data.py: hand-worked numbers, simple oracles, and every bad input named."""

import gzip
import json
import random
import re
from collections import Counter

import jinja2
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import data

TOKENIZER = data.Tokenizer.byte_level()
SPECIAL = TOKENIZER.special
GOOD = json.loads(TOKENIZER.files["tokenizer.json"])
MODEL = GOOD["model"]
SPLIT = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}

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
UNKNOWN = [{"answer": "1", "correct": None, "stop": "stop"}]

def learned(messages, **options):
    """The text under the loss mask, and the whole text."""
    ids, mask = data.render_chat(messages, TOKENIZER, **options)
    return TOKENIZER.decode([i for i, on in zip(ids, mask, strict=True) if on]), TOKENIZER.decode(ids)

# 1. Chat format ---------------------------------------------------------------------------------------------

def test_render_chat_by_hand():
    start, end = SPECIAL["<|im_start|>"], SPECIAL["<|im_end|>"]
    reply = [SPECIAL["<think>"], *b"a", SPECIAL["</think>"], *b"b", end]
    prompt = [SPECIAL["<|begin_of_text|>"], *b"\n", start, *b"user\nQ", end, *b"\n", start, *b"assistant\n"]
    ids, mask = data.render_chat(turns("Q", "<think>a</think>b"), TOKENIZER)
    assert ids == [*prompt, *reply, *b"\n"]
    assert mask == [False] * len(prompt) + [True] * len(reply) + [False]
    assert data.render_chat(turns("Q"), TOKENIZER, generation_prompt=True) == (prompt, [False] * len(prompt))

def test_earlier_turns_lose_their_reasoning_and_the_last_is_learned():
    loss, whole = learned(turns("p", "<think>old</think>\n\none", "q", "<think>new</think>two"))
    assert loss == "<think>new</think>two<|im_end|>"
    assert "<|im_start|>assistant\none<|im_end|>\n" in whole and "old" not in whole
    loss, whole = learned(turns("p", "<think>old</think>one", "q"), generation_prompt=True)
    assert loss == "" and "old" not in whole and whole.endswith("q<|im_end|>\n<|im_start|>assistant\n")

@pytest.mark.parametrize(("call", "role"), [("<tool_call>{}</tool_call>", "user"), ("calling", "tool")])
def test_tool_calling_keeps_reasoning_and_learns_every_reply(call, role):
    messages = turns("p", f"<think>x</think>{call}", "r", "<think>y</think>done")
    messages[2]["role"] = role
    assert learned(messages)[0] == f"<think>x</think>{call}<|im_end|><think>y</think>done<|im_end|>"
    ids, _ = data.render_chat(messages, TOKENIZER)
    assert (SPECIAL["<tool_call>"] in ids) == ("<" in call) and ids.count(SPECIAL["<think>"]) == 2

def test_special_tokens_that_are_typed_stay_text():
    everything = "".join(SPECIAL)
    messages = [{"role": "system", "content": everything}, {"role": "user", "content": everything}]
    prompt, _ = data.render_chat(messages, TOKENIZER, generation_prompt=True)
    counts = Counter(i for i in prompt if i >= 256)
    assert counts == {SPECIAL["<|begin_of_text|>"]: 1, SPECIAL["<|im_start|>"]: 3, SPECIAL["<|im_end|>"]: 2}
    ids, _ = data.render_chat([*messages, {"role": "assistant", "content": everything}], TOKENIZER)
    reply = [i for i in ids[len(prompt) :] if i >= 256]  # an assistant may write tags and end its turn once
    assert reply == [*(SPECIAL[tag] for tag in data.TAGS), SPECIAL["<|im_end|>"]]

@pytest.mark.parametrize(("content", "left"), [
    ("a", "a"), ("<think>x</think> a", "a"), ("a<think>x</think>b<think>y</think>c", "abc"),
    ("a<think>x", "a"), ("x</think>a", "a"), ("<think>x<think>y</think>a", "a"), ("<think>x</think>", "")])
def test_without_reasoning(content, left):
    assert data.without_reasoning(content) == left

def roles(*names):
    return [{"role": name, "content": "x"} for name in names]

@pytest.mark.parametrize(("messages", "error"), [
    ([], "messages: "), ("hi", "messages: "), (["user"], r"messages\[0\]\.role: null"),
    ([{"content": "x"}], r"messages\[0\]\.role: null"), (roles("bot"), '"bot" is none of'),
    (roles(["user"]), r"messages\[0\]\.role"), ([{"role": "user"}], r"messages\[0\]\.content"),
    ([{"role": "user", "content": 3}], r"messages\[0\]\.content: must be a string, not 3"),
    (roles("assistant"), "not follow the beginning"), (roles("tool"), "not follow the beginning"),
    (roles("user", "system"), r"messages\[1\]\.role: system may not follow user"),
    (roles("user", "user"), "user may not follow user"), (turns("a", "b"), "assistant leaves nothing")])
def test_render_chat_names_the_bad_message(messages, error):
    with pytest.raises(ValueError, match=error):
        data.render_chat(messages, TOKENIZER, generation_prompt=True)

TEMPLATES = [jinja2.Environment(trim_blocks=trim, lstrip_blocks=trim).from_string(data.CHAT_TEMPLATE)
             for trim in (False, True)]
content = st.lists(st.sampled_from([*data.TAGS, "a", "b ", "\n"]), max_size=6).map("".join)

@given(st.lists(content, min_size=1, max_size=5), st.booleans())
def test_saved_chat_template_agrees(contents, tool):
    messages = turns(*contents)
    if tool and len(messages) > 2:
        messages[2]["role"] = "tool"
    prompt = len(messages) % 2 == 1
    expected = learned(messages, generation_prompt=prompt)[1]
    known = {"messages": messages, "bos_token": "<|begin_of_text|>", "add_generation_prompt": prompt}
    assert [template.render(known) for template in TEMPLATES] == [expected] * 2

def test_parse_sft():
    sample = data.parse_sft(SFT, TOKENIZER, "")
    ids, mask = data.render_chat(SFT["messages"], TOKENIZER)
    assert (sample.ids.tolist(), sample.mask.tolist()) == (ids, mask) and sample.ids.dtype == np.int32
    assert (sample.weight, sample.domain, sample.trimmed) == (1.5, "math", False)
    short = data.parse_sft(SFT, TOKENIZER, "", len(ids) - 2, trim=True)
    assert short.trimmed and (short.ids.tolist(), short.mask.tolist()) == (ids[:-2], mask[:-2])
    with pytest.raises(ValueError, match=f"^x, line 1: .*{len(ids)} tokens, the limit is {len(ids) - 2};"):
        data.parse_sft(SFT, TOKENIZER, "x, line 1", len(ids) - 2)

@pytest.mark.parametrize(("change", "error"), [
    ({"messages": None}, "messages: must be a list"), ({"domain": ""}, "domain must be a string"),
    ({"messages": turns("q")}, "messages: holds no assistant"),
    ({"messages": [{"role": "x", "content": ""}]}, r"messages\[0\]\.role"),
    *[({"weight": bad}, "weight must be") for bad in (0, -1, "1", None, True, float("nan"), 1e999, 9**400)]])
def test_parse_sft_names_the_field(change, error):
    with pytest.raises(ValueError, match=f"^x, line 1: field {error}"):
        data.parse_sft(SFT | change, TOKENIZER, "x, line 1")

# 2. Made problems -------------------------------------------------------------------------------------------

def check_trace(problem, trace):
    """Parse and verify every step; return how many digits each took. Independent of how traces are made."""
    digits, sign, divisor = re.fullmatch(r"(\d+)([/%])(\d)=\?", problem.prompt).groups()
    taken, quotients, remainder, sizes = "", "", "", []
    for step in trace.removesuffix(";").split(";"):
        now, quotient, rest = re.fullmatch(rf"(\d+)/{divisor}=(\d+)r(\d)", step).groups()
        assert now.startswith(remainder) and int(rest) < int(divisor)
        assert int(quotient) * int(divisor) + int(rest) == int(now)
        new = now[len(remainder) :]  # only the first quotient has no zeros in front
        assert len(quotient) == len(new) if sizes else quotient == str(int(quotient))
        taken, quotients, remainder = taken + new, quotients + quotient, rest
        sizes.append(len(new))
    assert taken == digits and trace.endswith(";") and (sign == "%" or remainder == "0")
    assert problem.answer == (quotients if sign == "/" else remainder)
    return sizes

@given(st.sampled_from(["div", "mod"]), st.integers(1, 12), st.integers(0, 999), st.booleans())
def test_every_step_is_true(family, level, seed, careful):
    rng = random.Random(seed)
    problem = data.make_problem(family, level, rng)
    sizes = check_trace(problem, data.make_trace(problem, rng, careful))
    assert sum(sizes) == level
    if 1 < level and sizes[0] <= 2:  # the first step takes two digits only if one does not reach the divisor
        assert sizes[0] == 1 + (problem.prompt[0] < problem.prompt[-3])
    widths = {1} if careful else {1, *data.SKIP_WIDTHS}
    assert set(sizes[1:]) <= widths and sizes[0] in {2, *widths}

@pytest.mark.parametrize(("prompt", "answer", "careful", "trace"), [
    ("4375/7=?", "625", True, "43/7=6r1;17/7=2r3;35/7=5r0;"),
    ("4376%7=?", "1", True, "43/7=6r1;17/7=2r3;36/7=5r1;"),
    ("9063%9=?", "0", True, "9/9=1r0;00/9=0r0;06/9=0r6;63/9=7r0;"),  # the first digit reaches the divisor
    ("4375/7=?", "625", False, "437/7=62r3;35/7=5r0;"), ("4376%7=?", "1", False, "437/7=62r3;36/7=5r1;"),
    ("9006306%9=?", "6", False, "900/9=100r0;0630/9=070r0;06/9=0r6;")])  # zeros of a later quotient stay
def test_traces_by_hand(monkeypatch, prompt, answer, careful, trace):
    monkeypatch.setattr(data, "SKIP", 1.0)
    monkeypatch.setattr(data, "SKIP_WIDTHS", (3,))
    assert data.make_trace(data.Problem("", "math", prompt, answer), random.Random(0), careful) == trace

def test_small_spaces_end(monkeypatch):
    monkeypatch.setattr(data, "MIX", {("mod", 2): 1})  # 360 problems in all
    with pytest.raises(ValueError, match=r"only \d+ different train problems found, 300 wanted"):
        data.make_problems("train", 300, 0)
    assert len({problem.prompt for problem in data.make_problems("train", 20, 0)}) == 20

def test_splits_have_their_shares_and_no_division_in_common():
    counts = Counter(data.split_of(str(i)) for i in range(5000))
    assert {name: count / 5000 for name, count in counts.items()} == pytest.approx(data.SPLIT, abs=0.03)
    assert all(data.split_of(f"{i}/7=?") == data.split_of(f"{i}%7=?") for i in range(99))

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
        assert data.why_not_sft(row) is None and data.parse_sft(row, TOKENIZER, "", 200)
    assert {1, 2, *data.SKIP_WIDTHS} == set().union(*sizes)
    assert any(1 in some and max(some) > 2 for some in sizes)  # careless traces are mixtures
    careful = [some for some in sizes if some[0] <= 2 and set(some[1:]) <= {1}]
    assert 0.15 < len(careful) / 300 < 0.5  # a ninth, and careless ones that skip nothing
    assert {row["weight"] for row in sft} == {0.5, 1.0, 1.75}

# 3. Curation ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("rate", "weight"), [
    (1, 0.5), (0.76, 0.5), (0.75, 1), (0.5, 1), (0.25, 1), (0.24, 1.27), (0.125, 1.5), (0, 1.75)])
def test_difficulty_weight(rate, weight):
    assert data.difficulty_weight(rate) == pytest.approx(weight)

@pytest.mark.parametrize(("reply", "domain", "reason"), [
    ("<think>x</think>\\boxed{1}", "math", None), ("<think>x</think>A", "science", None),
    *[(text + "\\boxed{1}", "math", "no reasoning") for text in ("", "<think> \n</think>", "<think>")],
    ("<think>x</think> \n", "science", "no answer"), ("<think>\\boxed{1}</think>1", "math", "no \\boxed{}"),
    ("<think>x</think>\\boxed{ }", "math", "no \\boxed{}"),
    ("<think>```python\nif:\n```</think>ok", "code", None),
    *[("<think>x</think>" + code, "code", reason) for code, reason in [
        ("```python\nprint(1)\n```", None), ("1.\n   ```py\n   if 1:\n       print(1)\n   ```", None),
        ("```cpp\nint x;\n```", None), ("```python\nprint(1\n```", "python syntax error"),
        ("```python\nok=1\n```\n```python\nif:", "python syntax error"),
        ("```python\n\0\n```", "python syntax error")]]])
def test_sft_filters(reply, domain, reason):
    record = {"messages": turns("q", reply), "domain": domain}
    assert data.why_not_sft(record) == data.why_not_sft(record | {"correct": True}) == reason
    assert data.why_not_sft(record | {"correct": False}) == "incorrect"
    assert data.why_not_sft(record | {"correct": None}) == "unknown verdict"

def rollouts(answers, gold="1", stop="stop"):
    return [{"answer": answer, "correct": answer == gold, "stop": stop} for answer in answers]

@pytest.mark.parametrize(("some", "reason"), [
    ([], "no rollouts"), (rollouts("11111111"), "solved by every rollout"), (rollouts("11111112"), None),
    (rollouts("12222222"), None), (rollouts("22223456"), "wrong majority"), (rollouts("22233345"), None),
    (rollouts([None] * 8), None), (rollouts([*"2222", *[None] * 4]), "wrong majority"),
    (rollouts([None] * 7, stop="length") + rollouts("2"), None),
    (UNKNOWN * 8, "no known verdict"), (rollouts("1111") + UNKNOWN * 4, "solved by every rollout"),
    (rollouts("12") + UNKNOWN * 6, None), (rollouts("2234") + UNKNOWN * 4, "wrong majority")])
def test_rl_filter(some, reason):
    assert data.why_not_rl("a", some) == reason

def test_rl_filter_keeps_some_of_the_truncated():
    reasons = Counter(data.why_not_rl(str(i), rollouts("22222222", stop="length")) for i in range(1000))
    assert set(reasons) == {None, "truncated in every rollout"} and 70 < reasons[None] < 130

def trace(problem, answer, stop="stop", **changes):
    text = f"<think>hm</think>\\boxed{{{answer}}}<|im_end|>"
    return dict(problem=problem, text=text, answer=answer, correct=answer == "2", stop=stop) | changes

def test_curate_and_convert_rollouts(tmp_path, capsys):
    problems = [OURS | {"id": id} for id in "12345"]
    traces = [trace("1", "2"), trace("1", "2"), trace("1", "2", "length"),
              trace("2", "2"), trace("2", "3"), trace("2", "3"), trace("2", "3", "length"),
              trace("4", "2", correct=None), trace("5", "2"), trace("5", "3"),
              *[trace("5", "2", correct=None)] * 6]  # unknown verdicts count in no pass rate
    write(tmp_path / "t.jsonl", *traces)
    files = [f"{tmp_path}/t.jsonl", "--problems", str(write(tmp_path / "p.jsonl", *problems))]
    out = tmp_path / "out.jsonl"
    assert data.main(["curate", *files, "--out", str(out)]) == 0
    assert [problem.record() for problem in data.read_problems(out)] == [problems[1], problems[4]]
    why = "dropped 1 solved by every rollout, 1 no rollouts, 1 no known verdict"
    assert f"kept 2 of 5; {why}" in capsys.readouterr().out
    assert data.main(["convert", *files, "--out", str(out)]) == 0
    samples = [record for _, record in data.read_records(out)]
    assert [(sample["problem"], sample["weight"]) for sample in samples] == [(id, 1.0) for id in "1125"]
    assert samples[0]["messages"] == turns("1+1?", "<think>hm</think>\\boxed{2}") and samples[0]["correct"]
    assert "kept 4 of 16; dropped 7 unknown verdict, 5 incorrect" in capsys.readouterr().out

@pytest.mark.parametrize(("change", "error"), [
    ({"problem": "9"}, "field problem: \"9\" is not in"), ({"problem": 3}, "field problem must be str"),
    ({"correct": 1}, "field correct must be bool"), ({"answer": 2}, "field answer must be"),
    ({"stop": None}, "field stop must be str"), ({"text": None}, "field text must be str")])
def test_bad_traces_are_named(tmp_path, capsys, change, error):
    problems = str(write(tmp_path / "p.jsonl", OURS))
    traces = str(write(tmp_path / "t.jsonl", trace("1", "2"), trace("1", "2") | change))
    assert data.main(["curate", traces, "--problems", problems, "--out", f"{tmp_path}/out.jsonl"]) == 1
    assert re.match(rf"error: .*t\.jsonl, line 2: {error}.*\n\Z", capsys.readouterr().err)
    assert not (tmp_path / "out.jsonl").exists()

def test_convert_worked_solutions(tmp_path, capsys):
    out = str(tmp_path / "sft.jsonl")
    assert data.main(["convert", str(write(tmp_path / "x.jsonl", GSM8K, MATH)), "--out", out]) == 0
    assert [record["messages"] for _, record in data.read_records(out)] == [
        turns("Half of 48?", "<think>48/2=24.</think>\\boxed{24}"),
        turns("1+1?", "<think>It is $\\boxed{2}$.</think>\\boxed{2}")]
    for bad in (OURS, HUMANEVAL):
        assert data.main(["convert", str(write(tmp_path / "y.jsonl", bad)), "--out", out]) == 1
        assert re.search(r"y\.jsonl, line 1: .*field solution", capsys.readouterr().err)

# 4. Packing -------------------------------------------------------------------------------------------------

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

# 5. Reading problems ----------------------------------------------------------------------------------------

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

# 6. Tokenizer -----------------------------------------------------------------------------------------------

def test_byte_level_ids_are_bytes_and_specials_follow():
    assert sorted(SPECIAL.values()) == [*range(256, 272)] and TOKENIZER.vocab_size == 272
    assert TOKENIZER.stop_ids == (SPECIAL["<|im_end|>"], SPECIAL["<|end_of_text|>"])

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
    raw = b"".join(bytes([i]) if i < 256 else names[i].encode() for i in ids)
    assert TOKENIZER.decode(np.array(ids, int)) == raw.decode(errors="replace")
    for bad in (272, -1, 2**40):
        with pytest.raises(ValueError, match=f"decode {bad}: token ids are 0 to 271"):
            TOKENIZER.decode([*ids, bad])

def test_tokenizer_survives_saving(tmp_path):
    TOKENIZER.save(tmp_path)
    again = data.Tokenizer.from_pretrained(tmp_path)
    assert (again.special, again.bytes, again.stop_ids) == (SPECIAL, TOKENIZER.bytes, TOKENIZER.stop_ids)
    assert {path.name for path in tmp_path.iterdir()} == {*TOKENIZER.files, "generation_config.json"}

@given(st.text())
def test_tokenizers_library_reads_the_same_ids(tmp_path_factory, text):
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.getbasetemp()
    TOKENIZER.save(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert theirs.encode(text).ids == TOKENIZER.encode(text)
    ids, _ = data.render_chat(turns("1+1?", "<think>two</think>2"), TOKENIZER)
    assert theirs.encode(TOKENIZER.decode(ids)).ids == ids
    assert theirs.get_vocab_size() == TOKENIZER.vocab_size
    theirs.save(str(folder / "tokenizer.json"))
    assert data.Tokenizer.from_pretrained(folder).special == SPECIAL
    assert theirs.decode(ids, skip_special_tokens=True).count("<think>") == 1

def test_a_tag_behind_what_is_not_read_is_found():
    added = GOOD["added_tokens"]
    added = [*added, dict(added[0], content=">>X<<", id=max(token["id"] for token in added) + 1)]
    tokenizer = data.Tokenizer({"tokenizer.json": json.dumps(GOOD | {"added_tokens": added})})
    assert tokenizer.encode(">>X<<think>", special="tags")[-1] == tokenizer.special["<think>"]

@pytest.mark.parametrize(("behavior", "pieces", "inverted", "single"), [
    ("Removed", "a b", "-- -", "b"), ("Isolated", "a -- b -", "a -- b -", "- - b"),
    ("Contiguous", "a -- b -", "a -- b -", "-- b"), ("MergedWithPrevious", "a-- b-", "a --b -", "- - b"),
    ("MergedWithNext", "a --b -", "a-- b-", "- -b")])
def test_splitter_by_hand(behavior, pieces, inverted, single):
    assert data.splitter("-+", behavior)("a--b-") == pieces.split()
    assert data.splitter("-+", behavior, invert=True)("a--b-") == inverted.split()
    assert data.splitter("-", behavior)("--b") == single.split()

def test_tokens_that_bpe_cannot_produce_are_never_used():
    """Merging b with c first leaves a and bc; tiktoken alone would join them, though no merge does."""
    assert [*data.tiktoken_ranks(["bc", "ab", "abc"], ["b c", "a b", "ab c"])][256:] == ["bc", "ab"]
    assert data.tiktoken_ranks(["bc", "ab", "abc"], [["a", "b"], ["b", "c"], ["ab", "c"]])["abc"] == 258

@pytest.mark.parametrize(("change", "error"), [
    ({"normalizer": {"type": "NFC"}}, "this normalizer is not"), ({"decoder": None}, "this decoder is not"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer Metaspace is not supported"),
    ({"model": MODEL | {"type": "Unigram"}}, "this model is not"),
    ({"model": MODEL | {"dropout": 0.1}}, "this model.dropout is not"),
    *[({"added_tokens": [GOOD["added_tokens"][0] | {name: True}]}, f"this flag {name} of an added")
      for name in ("single_word", "lstrip", "rstrip")],
    ({"model": MODEL | {"vocab": {"ab": 0}}}, "cannot read it as a tokenizer: KeyError"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "ByteLevel is not supported: {"),
    *[(bad, "cannot read it as a tokenizer") for bad in (
        {"model": None}, {"pre_tokenizer": SPLIT}, b"", b"[]", b"{", b"3", b"\xed\xa0\x80")]])
def test_from_pretrained_names_what_it_does_not_support(tmp_path, change, error):
    TOKENIZER.save(tmp_path)
    text = change if isinstance(change, bytes) else json.dumps(GOOD | change).encode()
    (tmp_path / "tokenizer.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{error}"):
        data.Tokenizer.from_pretrained(tmp_path)

# 7. Scripts and commands ------------------------------------------------------------------------------------

def test_show(tmp_path, capsys):
    path = write(tmp_path / "s.jsonl", SFT, SFT, SFT | {"domain": "code"})
    assert data.main(["show", str(path), "--rows", "1"]) == 0
    out = capsys.readouterr().out
    size = len(data.render_chat(SFT["messages"], TOKENIZER)[0])
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
