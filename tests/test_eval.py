"""Estimators and methods by hand; whole evaluations with a stand-in for the model, a real one, two ranks."""

import itertools
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import deepconf
import eval as ev
import rewards
import sandbox
from model import PRESETS, FalconH1, Trace

ROOT = Path(__file__).parent.parent
MISSING = [f"{name}: {why}" for name, why in sandbox.sandbox_walls().items() if why != "on"]
needs_sandbox = pytest.mark.skipif(bool(MISSING), reason=f"no isolation here: {MISSING}")

# 1. Methods -------------------------------------------------------------------------------------------------

@settings(max_examples=50)
@given(st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_counts_the_draws_with_a_success(args):
    n, c, k = args
    draws = list(itertools.combinations(range(n), k))
    assert ev.pass_at_k(n, c, k) == pytest.approx(sum(min(draw) < c for draw in draws) / len(draws))

def test_pass_at_k_by_hand():
    assert ev.pass_at_k(4, 1, 2) == 0.5  # 1 - C(3,2)/C(4,2) = 1 - 3/6
    assert ev.pass_at_k(5, 3, 3) == 1.0  # two wrong samples cannot fill three places
    for bad in [(0, 0, 1), (4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)]:
        with pytest.raises(ValueError, match="0 <= c <= n"):
            ev.pass_at_k(*bad)

def samples_of(*verdicts, answers=None, same=rewards.is_equivalent):
    """Samples of one problem: a reply of 5 tokens and 2 seconds per verdict (True, False, None)."""
    replies = [SimpleNamespace(answer=answer, correct=verdict, tokens=5, confidences=[1.0] * 5)
               for answer, verdict in zip(answers or verdicts, verdicts)]
    return ev.Samples([(replies, same)], len(replies), 5 * len(replies), 2.0 * len(replies))

def test_pass_at_1_is_the_mean_over_known_samples():
    row = ev.pass_at_1(samples_of(True, False, None, True))
    assert row["accuracy"] == pytest.approx(2 / 3) and (row["problems"], row["unknown"]) == (1, 0)
    assert (row["tokens"], row["seconds"]) == (5, 2.0)  # an unknown sample costs as much
    assert ev.pass_at_1(samples_of(None, None))["unknown"] == 1

@pytest.mark.parametrize(("answers", "verdicts", "same", "expected"), [
    (["2", r"\frac12", "0.5", "1"], [False, True, True, False], rewards.is_equivalent, 1),  # one answer
    ([None, None, "1"], [False, False, True], rewards.is_equivalent, 1),  # no answer is no vote
    ([None, None], [False, False], rewards.is_equivalent, 0),
    (["1", "1.0", "2"], [None, True, False], rewards.is_equivalent, 1),  # 1 is 1.0, which is known
    (["3", "3", "2"], [None, None, False], rewards.is_equivalent, None),
    (["1", "1.0", "1.0"], [False, True, True], None, 1),  # programs are the same only word for word
])
def test_majority_by_hand(answers, verdicts, same, expected):
    row = ev.majority(samples_of(*verdicts, answers=answers, same=same))
    assert row["accuracy"] == expected and row["method"] == f"majority@{len(answers)}"

def test_majority_at_equal_tokens_pays_what_low_took():
    samples = samples_of(True, True, False, False, answers=["1", "1", "2", "2"])
    row = ev.majority_at_equal_tokens(samples, low=samples_of(True, True, True))
    assert (row["accuracy"], row["tokens"], row["seconds"]) == (1, 15, 6.0)

def test_majority_curve_by_hand():
    samples = samples_of(True, True, False, answers=["1", "1", "2"])  # of two replies there is one run
    assert ev.majority_curve(samples) == [(5, pytest.approx(2 / 3)), (10, 1)]

def test_a_row_leaves_out_and_counts_what_is_unknown():
    row = ev.report_row("m", samples_of(True), [1, None, 0, None], 10)
    assert (row["accuracy"], row["stderr"], row["problems"], row["unknown"]) == (0.5, 0.5, 2, 2)
    row = ev.report_row("m", samples_of(True), [None], 10)
    assert (row["accuracy"], row["stderr"], row["problems"], row["unknown"]) == (None, None, 0, 1)
    assert "|          - |      - |" in ev.table([{"checkpoint": "rl", **row}])

# 2. A whole evaluation --------------------------------------------------------------------------------------
# The stand-in for the model answers each problem by a script, so that every number of the report is known.
# It keeps generate()'s promises: callbacks in its order, and a trace depends on its own indices alone.

SCRIPT = {  # sample index -> (answer, confidence of every token)
    "easy": lambda i: ("5", 3.0),
    "split": lambda i: ("7", 2.0) if i % 2 else ("8", 1.0),
    "hard": lambda i: ("9", 1.0 + i / 100),
}
LENGTH = 20  # tokens before the answer

def scripted_generate(model, prompts, *, samples=1, stop_ids, admit=None, on_token=None, on_trace=None, **_):
    tokenizer = data.Tokenizer.byte_level()
    for prompt_index, prompt in enumerate(prompts):
        name = next(name for name in SCRIPT if name in tokenizer.decode(prompt))
        for index in range(samples):
            # One trace after the other: there is never anything to wait for.
            if admit and {"go": False, "done": True}[admit(prompt_index, index)]:
                break
            answer, confidence = SCRIPT[name](index)
            trace = Trace(prompt_index, index, stop="stop")
            for token in [*tokenizer.encode("." * LENGTH + rf"\boxed{{{answer}}}"), stop_ids[0]]:
                trace.tokens.append(token)
                trace.confidences.append(confidence)
                if on_token and on_token(trace):
                    trace.stop = "deepconf"
                    break
            if on_trace:
                on_trace(trace)
            yield trace

def write_problems(*problems, path="problems.jsonl"):
    """problems: pairs (prompt, answer), or dicts of further fields."""
    rows = [p if isinstance(p, dict) else {"prompt": p[0], "answer": p[1]} for p in problems]
    data.write_jsonl(path, [{"id": f"p{i}", "domain": "math", **row} for i, row in enumerate(rows)])

def write_checkpoint(folder, vocab_size=512):
    """A checkpoint that data.load_tokenizer takes; the stand-in for the model needs no weights."""
    data.Tokenizer.byte_level().save(folder)
    data.write_text(Path(folder, "config.json"), json.dumps({"vocab_size": vocab_size}))

@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with problems and a checkpoint, and the stand-in for every model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ev, "generate", lambda *args, **settings: list(scripted_generate(*args, **settings)))
    monkeypatch.setattr(ev.FalconH1, "from_pretrained", lambda folder, **settings: None)
    write_checkpoint("runs/x/rl/model")
    write_problems(("easy", "5"), ("split", "7"), ("hard", "1"))
    return tmp_path

ARGV = ["--model", "runs/x/rl/model", "--problems", "problems.jsonl", "--out", "out", "--window", "4"]

def report(out="out"):
    """The rows of a report.json, by method."""
    return {row["method"]: row for row in json.loads(Path(out, "report.json").read_text())["rows"]}

def traces_of(path="out/traces.jsonl"):
    return [trace for _, trace in data.read_records(path)]

def test_report_of_the_script(place, capsys):
    assert ev.main(ARGV) == 0
    rows = report()
    assert list(rows) == ["pass@1", "majority@32", "majority@equal-tokens", "deepconf-offline@32",
                          "deepconf-low@32", "deepconf-high@32"]
    assert {(row["checkpoint"], row["problems"], row["unknown"]) for row in rows.values()} == {("rl", 3, 0)}
    each = LENGTH + len(r"\boxed{5}") + 1
    assert rows["pass@1"]["accuracy"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert rows["pass@1"]["tokens"] == 3 * each and rows["majority@32"]["tokens"] == 3 * 32 * each
    # Right in easy and split, whose right half is more confident; in hard all agree on a wrong answer.
    for method in ("deepconf-offline@32", "deepconf-low@32"):
        assert rows[method]["accuracy"] == pytest.approx(2 / 3)
        assert rows[method]["stderr"] == pytest.approx(math.sqrt((2 / 9 + 4 / 9) / 2 / 3))
    # easy and hard agree after the warm-up of 16. In split, LOW's votes are of the confident half and agree.
    assert rows["deepconf-low@32"]["tokens"] == rows["majority@equal-tokens"]["tokens"] == 3 * 16 * each
    # HIGH takes both halves of split, so that they never agree: all 32 traces.
    assert rows["deepconf-high@32"]["tokens"] == (16 + 32 + 16) * each

    traces = traces_of()
    assert len(traces) == 96
    assert traces[0] == {
        "problem": "p0", "domain": "math", "gold": "5", "sample": 0, "seed": 0, "tokens": each, "answer": "5",
        "text": "." * LENGTH + r"\boxed{5}", "correct": True, "reason": "right", "stop": "stop",
        "confidences": [3.0] * each,
    }
    table = ev.table(rows.values())
    for text in (Path("out/report.md").read_text(), capsys.readouterr().out):
        assert table in text and "AUROC 1.000" in text

def unknown_at(monkeypatch, *calls):
    """The verdicts of these calls of verify, counted from 0, are unknown."""
    count = itertools.count()
    def verify(text, problem, **settings):
        i = next(count)
        reason = "no sandbox" if i % 2 else "no memory"
        unknown = rewards.Verdict(None, f"unknown: {reason}")
        return unknown if i in calls else rewards.verify(text, problem, **settings)

    in_order = SimpleNamespace(map=map, shutdown=lambda **_: None)
    monkeypatch.setattr(ev, "verify", verify)
    monkeypatch.setattr(ev, "ThreadPoolExecutor", lambda workers: in_order)

def test_few_unknown_verdicts_are_left_out_and_counted(place, capsys, monkeypatch):
    unknown_at(monkeypatch, 32)  # the first sample of split, a wrong 8: 1 of 96
    assert ev.main(ARGV) == 0
    rows = report()
    assert rows["pass@1"]["accuracy"] == pytest.approx((1 + 16 / 31 + 0) / 3)
    assert rows["majority@32"]["accuracy"] == pytest.approx(1 / 3)  # 8 comes first, and is known to be wrong
    assert {(row["problems"], row["unknown"]) for row in rows.values()} == {(3, 0)}
    for text in (capsys.readouterr().out, Path("out/report.md").read_text()):
        assert "1 of 96 verdicts unknown: 1 x no memory." in text
    right, unknown = traces_of()[31:33]
    assert right["correct"] is True and unknown["correct"] is None
    assert unknown["reason"] == "unknown: no memory" and unknown["answer"] == "8"

    # The command of deepconf.py and curation read such traces as well.
    assert deepconf.main(["out/traces.jsonl", "--window", "4"]) == 0
    assert data.main(["curate", "out/traces.jsonl", "--problems", "problems.jsonl", "--out", "kept"]) == 0
    assert [problem.prompt for problem in data.read_problems("kept")] == ["split"]

def test_many_unknown_verdicts_end_the_evaluation_after_its_traces_are_written(place, capsys, monkeypatch):
    unknown_at(monkeypatch, 0, 1, 3)
    assert ev.main(ARGV) == 1
    why = "3 of 96 verdicts are unknown, more than 2%: 2 x no sandbox; 1 x no memory"
    assert capsys.readouterr().err.endswith(f"error: out/traces.jsonl holds every reply, but: {why}\n")
    correct = [trace["correct"] for trace in traces_of()]
    assert correct[:4] == [None, None, True, None] and len(correct) == 96
    assert not Path("out/report.json").exists()

def test_two_spellings_of_one_answer_are_one_vote_and_one_verdict(place, monkeypatch):
    """1/2 comes first but is less confident: DeepConf votes for 0.5, whose group plain voting calls 1/2."""
    monkeypatch.setitem(SCRIPT, "easy", lambda i: ("1/2", 1.0) if i < 8 else ("0.5", 3.0))
    write_problems(("easy", "0.5"))
    assert ev.main(ARGV) == 0
    assert {row["accuracy"] for row in report().values()} == {1.0}

def test_the_default_evaluates_both_checkpoints_or_names_the_missing_command(place, capsys):
    def make_heldout(path):
        write_problems(("easy", "5"), path=path)

    for missing, script, make in [("sft", "train_sft.py", write_checkpoint),
                                  ("rl", "train_rl.py", write_checkpoint),
                                  ("data/heldout.jsonl", "train_sft.py", make_heldout)]:
        assert ev.main([]) == 1 and not Path("runs/tiny/eval").exists()
        expected = f"error: runs/tiny/{missing} is missing: run python {script} first\n"
        assert capsys.readouterr().err == expected
        make(f"runs/tiny/{missing}")
    assert ev.main([]) == 0
    rows = json.loads(Path("runs/tiny/eval/report.json").read_text())["rows"]
    assert [row["checkpoint"] for row in rows] == ["sft"] + ["rl"] * 6
    assert [row["method"] for row in rows[:3]] == ["pass@1", "pass@1", "majority@32"]
    assert rows[0]["stderr"] is None  # of one problem
    assert len(traces_of("runs/tiny/eval/traces-sft.jsonl")) == 4

def test_another_evaluation_is_not_overwritten(place, capsys):
    assert ev.main([*ARGV, "--samples", "4"]) == 0
    assert list(report()) == ["pass@1", "majority@4", "deepconf-offline@4"]  # too few samples for online
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    assert ev.main([*ARGV, "--samples", "5"]) == 1
    assert "samples" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    assert ev.main([*ARGV, "--samples", "4"]) == 0  # the same arguments
    assert ev.main([*ARGV, "--samples", "5", "--fresh"]) == 0

@pytest.mark.parametrize(("argv", "message"), [
    ("--sam 4", "--sam"), ("--temperature -1", "--temperature"), ("--top-p 0", "--top-p"),
    ("--samples 0", "--samples 0: must be at least 1"), ("--limit -1", "--limit -1: must be at least 0"),
    ("--device gpu", "--device gpu: expected cuda or" if torch.cuda.is_available() else "expected cpu"),
    ("--dtype float16", "--dtype float16: expected auto or float32 or bfloat16"),
    ("--model nothing", "nothing is missing"), ("--model small", "room for 271 only"),
    ("--problems missing.jsonl", "missing.jsonl"), ("--problems broken.jsonl", "broken.jsonl, line 2"),
    ("--problems unreadable.jsonl", r"line 1: field answer: the answer '\\frac{1}{' can"),
    ("--problems code.jsonl", "code.jsonl: problem p0: field tests: test 1 "),
    ("--problems check.jsonl", "must define check"),
])
def test_bad_input_is_one_line_and_writes_nothing(place, capsys, argv, message):
    Path("broken.jsonl").write_text('{"id": "p", "domain": "math", "prompt": "q", "answer": "1"}\n{"id": \n')
    write_problems(("q", r"\frac{1}{"), path="unreadable.jsonl")
    write_problems({"prompt": "p", "domain": "code", "tests": [{"input": 1}]}, path="code.jsonl")
    write_problems({"prompt": "p", "domain": "code", "tests": "x"}, path="check.jsonl")
    write_checkpoint("small", vocab_size=271)
    assert ev.main(ARGV + argv.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not Path("out").exists()

def test_chat_streams_and_keeps_history(place, monkeypatch, capsys):
    generate = Mock(side_effect=ev.generate)
    monkeypatch.setitem(SCRIPT, "easy", lambda i: ("é", 1.0))
    monkeypatch.setattr("builtins.input", Mock(side_effect=["easy?", "", "easy again é?", EOFError]))
    monkeypatch.setattr(ev, "generate", generate)
    assert ev.main([*ARGV, "--chat"]) == 0 and not Path("out").exists()
    reply = "." * LENGTH + r"\boxed{é}"
    assert capsys.readouterr().out == f"{reply}\n{reply}\n\n"
    _, prompt = [data.Tokenizer.byte_level().decode(call.args[1][0]) for call in generate.call_args_list]
    assert reply in prompt and "easy?" in prompt

def test_plot(place, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    assert ev.main([*ARGV, "--samples", "4"]) == 0
    assert Path("out/accuracy.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    assert ev.main([*ARGV, "--samples", "4", "--fresh"]) == 0
    assert "pip install matplotlib" in capsys.readouterr().out and not Path("out/accuracy.png").exists()

# 3. A real model, and two ranks -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def babbler(tmp_path_factory):
    """A folder with three problems, and a model that has learned nothing."""
    folder = tmp_path_factory.mktemp("babbler")
    torch.manual_seed(0)
    FalconH1(PRESETS["tiny"]).save_pretrained(folder / "run/model")
    data.Tokenizer.byte_level().save(folder / "run/model")
    write_problems(*((c, "1") for c in "abc"), path=folder / "problems.jsonl")
    return folder

BABBLE = ["--model", "run", "--problems", "problems.jsonl", "--device", "cpu", "--samples", "20",
          "--max-new-tokens", "6", "--window", "2"]

# Every rank runs this, one evaluation after another: (port, what fails on rank 1 if not main, arguments).
# Answers depend on the text, so that the babbler's are not all alike.
RANKS = f"""
import contextlib, io, json, os, sys
from unittest import mock
sys.path.insert(0, {str(ROOT)!r})
import eval as ev
import rewards
ev.extract_answer = rewards.extract_answer = lambda text: str(len(text) % 3)
for port, name, argv in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = port
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        if ev.RANK == 1 and name != "main":
            stack.enter_context(mock.patch.object(ev, name, side_effect=ValueError("this rank fails")))
        try:
            status = ev.main(argv)
        except SystemExit as exit:
            status = exit.code
            ev.dist.destroy_process_group()
    files = sorted((file.name, file.stat().st_mtime_ns) for file in os.scandir(argv[-1]))
    print(json.dumps([status, out.getvalue(), err.getvalue(), files]), flush=True)
"""

@pytest.fixture(scope="module")
def two_ranks(babbler):
    """What each of two ranks made of each evaluation: {name: [(status, stdout, stderr, files) by rank]}."""
    jobs = []
    for name in ("main", "load", "generate"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        fresh = ["--fresh"] if name == "load" else []
        jobs.append((port, name, [*BABBLE, *fresh, "--out", "two"]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ranks = [subprocess.Popen([sys.executable, "-c", RANKS, json.dumps(jobs)], cwd=babbler, text=True,
                              env=env | {"RANK": rank}, stdout=subprocess.PIPE) for rank in "01"]
    lines = [rank.communicate(timeout=100)[0].splitlines() for rank in ranks]
    return {job[1]: [json.loads(line) for line in pair] for job, pair in zip(jobs, zip(*lines, strict=True))}

def test_two_ranks_evaluate_like_one(babbler, two_ranks, monkeypatch):
    monkeypatch.chdir(babbler)
    for module in (ev, rewards):
        monkeypatch.setattr(module, "extract_answer", lambda text: str(len(text) % 3))
    assert ev.main([*BABBLE, "--out", "one"]) == 0
    (status, out, err, _), (other, silence, _, _) = two_ranks["main"]
    assert status == other == 0, err
    assert out.count("seed=0") == out.count("majority@20") == 1 and not silence
    for file in ("traces", "traces-low", "traces-high"):
        one, two = (traces_of(f"{folder}/{file}.jsonl") for folder in ("one", "two"))
        for trace in two:  # batches of another size round otherwise
            trace["confidences"] = pytest.approx(trace["confidences"], abs=2e-4)
        assert one == two
    one, two = report("one"), report("two")
    for row in [*one.values(), *two.values()]:
        del row["seconds"]
    assert one == two and len({row["accuracy"] for row in one.values()}) > 1

    # Live, a stopped trace is the beginning of what it would have been.
    whole = {(t["problem"], t["sample"]): t["confidences"] for t in traces_of("one/traces.jsonl")}
    low = traces_of("one/traces-low.jsonl")
    assert "deepconf" in {t["stop"] for t in low}
    assert sum(t["tokens"] for t in low) == one["deepconf-low@20"]["tokens"] < one["majority@20"]["tokens"]
    for t in low:
        assert t["tokens"] == len(t["confidences"])
        assert t["confidences"] == pytest.approx(whole[t["problem"], t["sample"]][: t["tokens"]], abs=1e-3)

@pytest.mark.parametrize("where", ["load", "generate"])
def test_an_error_on_one_rank_ends_all_and_deletes_nothing(two_ranks, where):
    (status, _, err, files), (other, _, silence, _) = two_ranks[where]
    assert status == other == 1
    assert err.endswith("error: this rank fails\n") and "error" not in silence
    assert files == two_ranks["main"][0][3]

# 4. Code, and --check ---------------------------------------------------------------------------------------

@needs_sandbox
def test_an_evaluation_with_code(place, monkeypatch, capsys):
    programs = ["print(input())", "print(7)", "print(input())"]  # by sample: right, wrong, right, right, ...
    monkeypatch.setitem(SCRIPT, "program", lambda i: (f"\n```python\n{programs[i % 3]}\n```\n", 1.0))
    code = {"prompt": "program", "domain": "code", "tests": [{"input": "1", "output": "1"}]}
    write_problems(("easy", "5"), code)
    assert ev.main([*ARGV, "--samples", "17"]) == 0
    assert "sandbox: no rights: on, " in capsys.readouterr().out
    accuracy = {method: row["accuracy"] for method, row in report().items()}
    assert accuracy["pass@1"] == pytest.approx((1 + 11 / 17) / 2)
    assert accuracy["majority@17"] == accuracy["deepconf-low@17"] == 1
    outcomes = [(True, "passed"), (False, "wrong output in test 1"), (True, "passed")]
    for i, trace in enumerate(traces_of()[17:]):
        assert (trace["answer"], trace["gold"]) == (programs[i % 3] + "\n", "")
        assert (trace["correct"], trace["reason"]) == outcomes[i % 3]

@needs_sandbox
def test_check_of_solutions(tmp_path, capsys):
    code = {"prompt": "def f(x):\n", "entry_point": "f", "test": "def check(f):\n    assert f(2) == 4"}
    path = tmp_path / "code.jsonl"
    data.write_jsonl(path, [code | {"task_id": str(i), "canonical_solution": f"    return {body}\n"}
                            for i, body in enumerate(["2 * x", "x * x", "x"])])
    assert ev.main(["--check", str(path)]) == 1
    out = capsys.readouterr().out
    assert "| code       |      3 |      2 |      1 |           0 |" in out
    assert "2: wrong output in test 1" in out

def test_tests_are_sampled_as_the_flags_say(place, monkeypatch):
    verify = Mock(return_value=rewards.Verdict(1.0, "passed"))
    monkeypatch.setattr(ev, "check_code", Mock())
    monkeypatch.setattr(ev, "verify", verify)
    write_problems({"prompt": "easy", "domain": "code", "tests": [{"input": "1", "output": "1"}] * 9})
    for flags, limit, seed in [(["--code-tests", "3", "--seed", "7"], 3, 7), (["--fresh"], 0, 0)]:  # 0: all
        assert ev.main([*ARGV, "--samples", "2", *flags]) == 0
        assert verify.call_args.kwargs == {"judge": None, "limit": limit, "seed": seed, "unsafe": False}
    assert verify.call_count == 2 * 2

@needs_sandbox
def test_an_unreadable_answer_is_refused_only_if_no_tests_decide(place, capsys):
    unreadable = {"prompt": "easy", "answer": r"\frac{1}{"}
    write_problems(unreadable | {"tests": [{"input": "1", "output": "1"}]})
    assert ev.main([*ARGV, "--samples", "2"]) == 0
    write_problems(unreadable)
    assert ev.main(["--check", "problems.jsonl"]) == 1
    out = capsys.readouterr().out
    assert "problems.jsonl, line 1: p0: " in out and "frac{1}{" in out
