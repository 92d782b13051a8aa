"""Tests of curate.py: the filters by hand, the commands, and the same question in many spellings."""

import json
import random
import re
import time
from collections import Counter

import pytest

import curate
import data
from tests.test_data import GSM8K, HUMANEVAL, MATH, OURS, turns, write

NO_PYTHON, NO_CPP, WRONG = "python syntax error", "unbalanced c++ brackets", "wrong language"
NO_JSON, NO_TOOL = "tool call is no JSON", "call of no declared tool"
UNKNOWN = [{"answer": "1", "correct": None, "stop": "stop"}]

# 1. Filters -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("reply", "domain", "reason"), [
    ("<think>x</think>\\boxed{1}", "math", None), ("<think>x</think>A", "science", None),
    *[(text + "\\boxed{1}", "math", "no reasoning") for text in ("", "<think> \n</think>", "<think>")],
    ("<think>x</think> \n", "science", "no answer"), ("<think>\\boxed{1}</think>1", "math", "no \\boxed{}"),
    ("<think>x</think>\\boxed{ }", "math", "no \\boxed{}"),
    ("<think>```python\nif:\n```</think>ok", "code", None),
    *[("<think>x</think>" + code, "code", reason) for code, reason in [
        ("```python\nprint(1)\n```", None), ("1.\n   ```py\n   if 1:\n       print(1)\n   ```", None),
        ("```cpp\nint x;\n```", None), ("```python\nprint(1\n```", NO_PYTHON),
        ("```python\nok=1\n```\n```python\nif:", NO_PYTHON),
        ("```python\n\0\n```", NO_PYTHON)]]])
def test_sft_filters(reply, domain, reason):
    record = {"messages": turns("q", reply), "domain": domain}
    assert curate.why_not_sft(record) == curate.why_not_sft(record | {"correct": True}) == reason
    assert curate.why_not_sft(record | {"correct": False}) == "incorrect"
    assert curate.why_not_sft(record | {"correct": None}) == "unknown verdict"

def code(tag, text):
    return f"<think>x</think>\n```{tag}\n{text}\n```"

@pytest.mark.parametrize(("question", "reply", "reason"), [
    ("Write it in C++.", code("python", "x = 1"), WRONG),
    ("Write it in C++.", code("python", "x = 1") + "\n```cpp\nint x;\n```", None),
    ("A Python function?", code("java", "int x;"), WRONG), ("A function?", code("java", "("), None),
    ("A Python function?", code("bash", "ls ("), None), ("Use JavaScript", code("java", "x"), WRONG),
    ("def f(x: int) -> int:\n    ...", code("c++", "int x;"), WRONG),
    ("#include <map>", code("", "def f(x):\n    return x"), WRONG),
    ("Port this Python to C++", code("c++", "int x;"), None), ("q", code("", "3 ( 4"), None),
    ("q", code("", "def f(x):\n    return ("), NO_PYTHON),
    ("q", code("Python3", "re.match('\\d', x)"), None), ("q", code("python", "print 1"), NO_PYTHON),
    ("q", code("python", "print('```')"), None), ("q", code("python", "print('```'"), NO_PYTHON),
    ("q", code("cpp", 'f("```(");'), None),
    ("q", code("cpp", "int f() { return a[(1)]; }"), None), ("q", code("c", "f({)}"), NO_CPP),
    ("q", code("cpp", "int f() { return 1;"), NO_CPP),
    ("q", code("cpp", "}"), NO_CPP), ("q", code("cpp", "f(')', \"(\\\")\", '\\'');"), None),
    ("q", code("cpp", "// (\n/* [\n { */ x = R\"a(()\" )a\";"), None),
    ("q", code("cpp", "int x = 1'000'000; f('a', 1'0);"), None),
    ("q", code("cpp", "int x = 1'000; f(("), NO_CPP),
    *[("q", code("cpp", f"f(); {text}"), NO_CPP) for text in ("/* cut", 'R"(cut')],
    ("q", code("cpp", "#ifdef A\nif (a) {\n#else\nif (b) {\n#endif\n}"), None)])
def test_code_filters(question, reply, reason):
    assert curate.why_not_sft({"messages": turns(question, reply), "domain": "code"}) == reason

CALL = {"name": "f", "arguments": {"a": 1}}
DECLARED = [{"type": "function", "function": {"name": "f"}}]
CALLS_NO_JSON = ["", "{", "3", '{"name": "f", "arguments": 3}', '{"name": 3}', '{"arguments": {}}', "[[]]",
                 '{"name": "f", "arguments": "{"}', "[" * 100000, '{"name": "f"} and more']

@pytest.mark.parametrize(("calls", "tools", "reason"), [
    ([json.dumps(CALL)], DECLARED, None), ([json.dumps(CALL)], [{"name": "f"}], None),
    ([json.dumps([CALL, CALL])], DECLARED, None), ([json.dumps(CALL)] * 2, DECLARED, None),
    ([json.dumps({"name": "f", "arguments": '{"a": 1}'})], DECLARED, None),
    ([json.dumps(CALL)], None, NO_TOOL),
    ([json.dumps(CALL), json.dumps(CALL | {"name": "g"})], DECLARED, NO_TOOL),
    *[([call], DECLARED, NO_JSON) for call in CALLS_NO_JSON]])
def test_tool_call_filters(calls, tools, reason):
    text = "".join(f"<tool_call>{call}</tool_call>" for call in calls)
    messages = turns("q", f"<think><tool_call></think>{text}", "r", "<think>x</think>a")
    record = {"messages": messages, "domain": "other"} | ({"tools": tools} if tools else {})
    assert curate.why_not_sft(record) == reason

def test_tool_calls_in_fields_and_tools_in_a_system_prompt():
    reply = {"role": "assistant", "content": None, "reasoning_content": "x",
             "tool_calls": [{"function": CALL}]}
    record = {"messages": [*turns("q"), reply], "domain": "other", "tools": DECLARED}
    assert curate.why_not_sft(record) is None
    assert curate.why_not_sft(record | {"tools": [{"name": "g"}]}) == NO_TOOL
    system = {"role": "system", "content": f"<tools>\n{json.dumps(DECLARED)}\n</tools>"}
    assert curate.why_not_sft({"messages": [system, *turns("q"), reply], "domain": "other"}) is None
    assert curate.why_not_sft(record | {"messages": [*turns("q"),
                                                     reply | {"tool_calls": None}]}) == "no answer"

def test_wrong_replies_to_very_hard_problems_are_kept():
    record = {"messages": turns("q", "<think>x</think>a"), "domain": "code", "correct": False, "pass_rate": 0}
    assert curate.why_not_sft(record) is None
    for change, reason in [({"pass_rate": 0.125}, "incorrect"), ({"stop": "length"}, "unfinished"),
                           ({"correct": None}, "unknown verdict"),
                           ({"messages": turns("q", "a")}, "no reasoning")]:
        assert curate.why_not_sft(record | change) == reason
    problem = data.Problem("1", "math", "1+1?", "2")
    for wrong, right, kept in [(8, 0, 8), (7, 0, 0), (7, 1, 1)]:
        traces = [trace("1", "3")] * wrong + [trace("1", "2")] * right
        samples = [*curate.from_rollouts(problem, traces)]
        assert sum(curate.why_not_sft(sample) is None for sample in samples) == kept
    assert samples[0]["pass_rate"] == 1 / 8 and samples[0]["weight"] == 1.5
    [*samples, last] = curate.from_rollouts(problem, [trace("1", "3")] * 7 + [trace("1", "3", "length")])
    assert curate.why_not_sft(samples[0]) is None and curate.why_not_sft(last) == "unfinished"

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
    assert curate.why_not_rl("a", some) == reason

def test_rl_filter_keeps_some_of_the_truncated():
    reasons = Counter(curate.why_not_rl(str(i), rollouts("22222222", stop="length")) for i in range(1000))
    assert set(reasons) == {None, "truncated in every rollout"} and 70 < reasons[None] < 130

# 2. Commands ------------------------------------------------------------------------------------------------

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
    assert "kept 4 of 16; dropped 7 unknown verdict, 3 incorrect, 2 unfinished" in capsys.readouterr().out

def test_traces_that_deepconf_stopped_count_in_no_pass_rate(tmp_path, capsys):
    stopped = trace("1", None, "deepconf")
    files = [str(write(tmp_path / "t.jsonl", *[trace("1", "2")] * 2, *[stopped] * 6)),
             "--problems", str(write(tmp_path / "p.jsonl", OURS)), "--out", str(tmp_path / "out.jsonl")]
    assert data.main(["curate", *files]) == 0
    assert "kept 0 of 1; dropped 1 solved by every rollout" in capsys.readouterr().out
    assert data.main(["convert", *files]) == 0
    assert "kept 2 of 8; dropped 6 unfinished" in capsys.readouterr().out
    assert [record["weight"] for _, record in data.read_records(tmp_path / "out.jsonl")] == [0.5, 0.5]

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

GOOD = "<think>r</think>\\boxed{1}"
ROWS = [{"messages": turns("1?", GOOD)}, {"messages": turns("1?", "a"), "domain": "math"},
        {"conversations": [{"from": "human", "value": "2?"}, {"from": "gpt", "value": GOOD}], "weight": 2},
        {"messages": turns("q", GOOD), "correct": False}, {"messages": turns("q", GOOD), "pass_rate": "n/a"},
        GSM8K]

@pytest.mark.parametrize("array", [False, True])
def test_convert_filters_rows_of_messages(tmp_path, capsys, array):
    path = write(tmp_path / "x.json", ROWS) if array else write(tmp_path / "x.jsonl", *ROWS)
    out = tmp_path / "out.jsonl"
    assert data.main(["convert", str(path), "--out", str(out)]) == 0
    assert "kept 4 of 6; dropped 1 no reasoning, 1 incorrect" in capsys.readouterr().out
    one, two, three, four = (row for _, row in data.read_records(out))
    assert one == {"messages": turns("1?", GOOD), "domain": "other", "weight": 1.0}
    assert two == {"messages": turns("2?", GOOD), "domain": "other", "weight": 2.0}
    assert three["pass_rate"] == "n/a" and four["problem"] == f"{path.name}:6"
    assert data.main(["convert", str(path), "--out", str(out), "--limit", "2"]) == 0
    assert "kept 1 of 2" in capsys.readouterr().out

def test_convert_limits_problems_and_splits_by_question(tmp_path, capsys):
    problems = [OURS | {"id": str(i), "prompt": f"{i}+1?"} for i in range(200)]
    traces = [trace(str(i), "2") for i in range(200) for _ in range(2)]
    files = [str(write(tmp_path / "t.jsonl", *traces)), "--problems",
             str(write(tmp_path / "p.jsonl", *problems))]
    out = str(tmp_path / "out.jsonl")
    assert data.main(["convert", *files, "--out", out, "--limit", "3"]) == 0
    assert "kept 6 of 6" in capsys.readouterr().out
    assert data.main(["convert", *files, "--out", out, "--heldout", "0.25"]) == 0
    rows, rest = ([row for _, row in data.read_records(tmp_path / f"out{part}.jsonl")]
                  for part in ("-heldout", ""))
    ids, others = ({row["problem"] for row in some} for some in (rows, rest))
    assert not ids & others and len(rows) == 2 * len(ids) and len(rest) == 2 * len(others) == 400 - len(rows)
    assert 35 <= len(ids) <= 65
    for row in rows:  # another spelling of a question is in the same split
        row = row | {"messages": turns(f" ${row['problem']} + 1$ ?", GOOD)}
        assert curate.split_point(row) < 0.25
    assert 0 <= curate.split_point({"messages": turns("q", "a")[1:]}) < 1  # nobody asks

@pytest.mark.parametrize(("row", "error"), [
    ({"messages": turns("q")}, "field messages: holds no assistant turn"),
    ({"messages": 3}, "field messages: must be"),
    ({"messages": [{"role": "user"}]}, r"field messages\[0\].content: must be a string"),
    ({"messages": turns("q", "a"), "correct": "yes"}, 'field correct must be .*, not "yes"'),
    ({"messages": turns("q", "a"), "stop": None}, "field stop must be str, not null"),
    ({"messages": turns("q", "a"), "weight": -1}, "field weight must be a positive number"),
    ({"messages": turns("q", "a"), "pass_rate": 2, "correct": False},
     "field pass_rate must be from 0 to 1, not 2"),
    ({"messages": turns("q", "a"), "conversations": turns("q", "b")}, "field conversations contradicts"),
    ({"instruction": "q", "output": "a"}, "needs messages, conv.*, has .*instruction"),
    ({"problem": "q", "answer": ""}, "field answer must be"), ([1], r"\[1\] is not a JSON object")])
def test_convert_names_file_line_and_field(tmp_path, capsys, row, error):
    path = str(write(tmp_path / "x.jsonl", ROWS[0], row))
    assert data.main(["convert", path, "--out", f"{tmp_path}/out.jsonl"]) == 1
    assert re.match(rf"error: .*x\.jsonl, line 2: ({error}).*\n\Z", capsys.readouterr().err)
    assert not (tmp_path / "out.jsonl").exists()

@pytest.mark.parametrize("flag",
                         ["--limit=-1", "--heldout=1", "--heldout=-0.1", "--heldout=nan", "--heldout=x"])
def test_convert_names_bad_flags(tmp_path, capsys, flag):
    assert data.main(["convert", str(write(tmp_path / "x.jsonl", *ROWS)), "--out", f"{tmp_path}/o",
                      flag]) == 1
    assert re.match(f"error: .*{flag.partition('=')[0]}.*\n\\Z", capsys.readouterr().err)

# 3. Overlap -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spellings", [
    ["Is  it 5?", "is it\n\t5 ?", "IS IT\u00a05?", "is it $5$?", r"Is it \(5\)?", r"Is it \$5?",
     r"Is\ it~\,5?"],
    ["1/2 of x", r"\frac{1}{2} of x", r"$\frac12$ of $x$", r"\tfrac 1 2 of x", "½ of x",
     r"\dfrac{1}2 of \text{x}"],
    [r"(a+b)/c", r"\frac{a+b}{c}", r"\left(a + b\right) / c"],
    ["50% of 1,000", r"$50\%$ of $1{,}000$", "50 % of 1000"],
    ["x^2 ≤ 3 × 4", r"x^{2}\le 3\cdot 4", "x² <= 3*4", r"x^2\leq{3}\times4", "X^2 ≤ 3 x 4"],
    ["40° and π, √2", r"40^\circ and \pi, \sqrt{2}", r"40^{\circ} and $\pi$, \sqrt 2"],
    ["λ - φ", r"\lambda−\varphi"], ["x⁻¹ + 10⁺²", "x^{-1} + 10^{+2}"],
    ["3 cm, 1, 2, ...", r"3\text{ cm}, 1, 2, \ldots", r"3 \mathrm{cm}, 1, 2, \dots"],
    [r"\frac{\frac{a}{b}}{c+1}", r"\dfrac{\tfrac ab}{c+1}"], [r"\[ 2^{10} \]", "$$2^{10}$$"]])
def test_spellings_of_one_question(spellings):
    assert len({curate.Question(text).text for text in spellings}) == 1

def test_replies_such_as_go_on_are_no_overlap(tmp_path, capsys):
    rows = [{"messages": turns(question, "a", "Go on.", "b", "?!", "c")} for question in ("1?", "2?", "!?")]
    assert overlap(tmp_path, capsys, rows[:1], rows[1:]) == []
    assert overlap(tmp_path, capsys, rows, [{"prompt": "go on"}, {"prompt": "..."}]) == []

def test_different_questions_stay_different():
    texts = ["2^10", "210", "2*10", "2+10", "2-10", "2/10", "2.10", "21 0", "5", "5!", "(2+3)*4", "2+3*4",
             "x<4", "x<=4",
             "x!=4", "x=4", "50%", "50", "sqrt 2", "sin 2", "|x|", "x", "α", "β", "2 10"]
    texts = [f"What is {text}?" for text in texts]
    assert len({curate.Question(text).text for text in texts}) == len(texts)

STORY = ("Half of the {0} birds that sat on a fence flew away at noon, and {1} more flew away before the sun "
         "went down over the quiet hills. How many birds were left on the fence that night, "
         "if none of them came back?")

def overlap(tmp_path, capsys, rows, others, *flags):
    """The files' pairs of lines that overlap prints as alike, with what is alike."""
    files = [str(write(tmp_path / "a.jsonl", *rows)), str(write(tmp_path / "b.jsonl", *others))]
    assert data.main(["overlap", *files, *flags]) == 0
    printed = capsys.readouterr().out
    pairs = re.findall(r"a\.jsonl, line (\d+) = \S*b\.jsonl, line (\d+): (.*)", printed)
    assert f"{len({a for a, *_ in pairs})} of {len(rows)} rows ask a question of" in printed
    return [(int(a), int(b), what) for a, b, what in pairs]

def test_overlap_of_all_kinds_of_files(tmp_path, capsys):
    problems = [{"question": STORY.format(90 + i, i), "answer": "#### 1"} for i in range(5)]
    rows = [ROWS[0], {"prompt": STORY.format(92, 2).upper()}, {"problem": "Other?"}, HUMANEVAL,
            {"conversations": [{"from": "human", "value": "hi"},
                               {"from": "gpt", "value": STORY.format(91, 1)},
                               {"from": "human", "value": STORY.format(94, 4)}]}]
    out = tmp_path / "out.jsonl"
    others = [*problems, {"messages": turns("1 ?", GOOD)}]
    pairs = overlap(tmp_path, capsys, rows, others, "--out", str(out))
    assert pairs == [(1, 6, "same text"), (2, 3, "same text"), (5, 5, "same text")]
    assert [row for _, row in data.read_records(out)] == [rows[2], rows[3]]
    assert overlap(tmp_path, capsys, rows, [HUMANEVAL]) == [(4, 1, "same text")]

def test_overlap_finds_a_question_that_was_asked_with_its_choices(tmp_path, capsys):
    problem = {"question": "Which is the largest?", "choices": ["Mars", "Jupiter"], "answer": 1}
    asked = {"messages": turns(data.parse_problem(problem, "f, line 1").prompt, GOOD)}
    hidden = {"question": "Which is the largest?", "options": ["Jupiter", "Mars"]}  # in another order
    double = problem | {"choices": ["Mars", "Mars"]}  # which no problem could have
    rows = [asked, problem, hidden, double]
    for row in (problem, double | {"choices": ["Mars", "Jupiter"], "answer": -1}):
        pairs = overlap(tmp_path, capsys, rows, [{"problem": "Other?"}, row])
        assert pairs == [(i, 2, "same text") for i in range(1, 5)]

def test_overlap_by_13_grams(tmp_path, capsys):
    base = STORY.format(90, 7)
    edited = [base.replace("Half", "Just half"), f"Please solve this: {base} Think first.",
              base[len(base) // 3 :] + " 90",
              STORY.format(90, 8), base[: len(base) // 4], "Half of the birds"]
    pairs = overlap(tmp_path, capsys, [{"prompt": text} for text in edited], [{"prompt": base}])
    assert [(a, b) for a, b, _ in pairs] == [(1, 1), (2, 1), (3, 1)] and pairs[1][2] == "100% of 13-grams"

def test_instructions_are_no_overlap(tmp_path, capsys):
    order = "Please reason step by step, and put your final answer within a box at the very end of it all."
    questions = [{"prompt": f"What is the {word}? {order}"} for word in "abcdefghijklm"]
    assert overlap(tmp_path, capsys, [{"prompt": f"What is the z? {order}"}], questions) == []
    assert len(overlap(tmp_path, capsys, [{"prompt": f"What is the z? {order}"}], questions[:3])) == 1

def test_overlap_finds_50_of_50_near_copies(tmp_path, capsys):
    rng = random.Random(0)
    changes = [str.upper, str.title, lambda text: text.replace(" ", "  \n"), lambda text: f" {text}\t",
               lambda text: re.sub(r"(\d+)", r"$\1$", text),
               lambda text: re.sub(r"(\d+)/(\d)", r"\\frac{\1}{\2}", text),
               lambda text: text.replace("%", r"\%"), lambda text: re.sub(r"(\d)(\d{3})\b", r"\1{,}\2", text)]
    questions = [STORY.format(rng.randrange(10**3, 10**4),
                              f"{rng.randrange(99)}/7 or {i}%") for i in range(500)]
    copies = []
    for i in sorted(rng.sample(range(500), 50)):
        text = questions[i]
        for change in reversed(rng.sample(changes, 3)):
            text = change(text)
        copies.append((i, text))
    fresh = [{"prompt": STORY.format(rng.randrange(10**3, 10**4), f"{i}/9")} for i in range(100)]
    rows = [{"prompt": text} for _, text in copies] + fresh
    pairs = overlap(tmp_path, capsys, rows, [{"prompt": text} for text in questions])
    assert [(a, b) for a, b, _ in pairs] == [(n, i + 1) for n, (i, _) in enumerate(copies, 1)]

@pytest.mark.parametrize(("row", "error"), [
    ({"messages": [{"role": "system", "content": "q"}]}, "field messages: needs a user"),
    ({"answer": "1"}, "field prompt is"),
    ({"messages": [{"role": "user", "content": 3}]}, "field messages: needs a user"),
    ({"question": 3.5}, "field question"),
    ({"conversations": "q"}, "field conversations: must be a list"), ([], "is not a JSON object")])
@pytest.mark.parametrize("bad", ["a", "b"])
def test_overlap_names_file_line_and_field(tmp_path, capsys, row, error, bad):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", OURS, *([row] if name == bad else []))
    flags = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl", "--out", f"{tmp_path}/out.jsonl"]
    assert data.main(["overlap", *flags]) == 1
    assert re.search(rf"error: .*{bad}\.jsonl, line 2: .*{error}.*\n\Z", capsys.readouterr().err)
    assert not (tmp_path / "out.jsonl").exists()

HOSTILE = ["{" * 50000, "}" * 50000, "\\frac{" * 20000, "\\text{" * 20000, "1," * 50000, "\\" * 50000,
           "$" * 50000, "(" * 50000, "^" * 50000, "x " * 50000, "```\n" * 30000, "```" + " " * 99999,
           "<think>" * 50000, "<tool_call>" * 30000, "```\ndef f(" + "):" * 50000 + "x", "#" + " " * 99999,
           "\\boxed{ " * 50000]
HOSTILE += ["```cpp\n" + text for text in ("#if\n#else\n" * 30000, 'R"(' * 50000, "/*" * 50000, "1'" * 50000)]

@pytest.mark.parametrize("text", HOSTILE, ids=[text[:12] for text in HOSTILE])
def test_hostile_text_takes_no_time(text):
    begin = time.process_time()
    curate.Question(text)
    curate.why_not_sft({"messages": turns(text, f"<think>r</think>a\n{text}"), "domain": "code"})
    assert time.process_time() - begin < 2
