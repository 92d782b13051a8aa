"""Tests of eval.py: estimators, methods, and an evaluation from end to end with a stand-in for the model."""

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.test_train_sft import ROOT, run

import data
import deepconf
import eval as ev
import rewards
import sandbox
from model import PRESETS, FalconH1

MISSING = [f"{name}: {why}" for name, why in sandbox.sandbox_walls().items() if why != "on"]
needs_sandbox = pytest.mark.skipif(bool(MISSING), reason=f"no isolation here: {MISSING}")
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy

# Estimators -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (1, 0, 1, 0.0),
        (1, 1, 1, 1.0),
        (4, 1, 1, 0.25),
        (4, 1, 2, 0.5),  # 1 - C(3,2)/C(4,2) = 1 - 3/6
        (5, 2, 3, 0.9),  # 1 - C(3,3)/C(5,3) = 1 - 1/10
        (5, 3, 3, 1.0),  # two wrong samples cannot fill three places
        (10, 0, 10, 0.0),
    ],
)
def test_pass_at_k_by_hand(n, c, k, expected):
    assert ev.pass_at_k(n, c, k) == pytest.approx(expected)


@PATIENT
@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_counts_the_draws_with_a_success(args):
    n, c, k = args
    draws = list(itertools.combinations(range(n), k))
    assert ev.pass_at_k(n, c, k) == pytest.approx(sum(min(draw) < c for draw in draws) / len(draws))


@pytest.mark.parametrize(("n", "c", "k"), [(0, 0, 1), (4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match="0 <= c <= n"):
        ev.pass_at_k(n, c, k)


def test_mean_and_stderr_by_hand():
    # mean 0.5; squares 4 * 0.25 = 1; variance 1/3; over 4 problems 1/12
    assert ev.mean_and_stderr([1, 0, 1, 0]) == (0.5, pytest.approx(math.sqrt(1 / 12)))
    assert ev.mean_and_stderr([0.25]) == (0.25, None)
    with pytest.raises(ValueError, match="no problems"):
        ev.mean_and_stderr([])


# A whole evaluation ---------------------------------------------------------------------------------------------------
# The stand-in for the model answers each problem by a script, so that every number of the report is known beforehand.
# It keeps generate()'s promises: callbacks in its order, and a trace that depends on its own indices alone.

SCRIPT = {  # sample index -> (answer, confidence of every token)
    "easy": lambda i: ("5", 3.0),
    "split": lambda i: ("7", 2.0) if i % 2 else ("8", 1.0),
    "hard": lambda i: ("9", 1.0 + i / 100),
}
LENGTH = 20  # tokens before the answer


def scripted_generate(model, prompts, *, samples, stop_ids, admit, on_token, on_trace, progress=False, **settings):
    tokenizer = data.Tokenizer.byte_level()
    traces = []
    for prompt_index, prompt in enumerate(prompts):
        name = next(name for name in SCRIPT if name in tokenizer.decode(prompt))
        for index in range(samples):
            state = admit(prompt_index, index) if admit else "go"
            assert state in ("go", "done")  # one trace after the other: there is never anything to wait for
            if state == "done":
                break
            answer, confidence = SCRIPT[name](index)
            tokens = [*tokenizer.encode("." * LENGTH + rf"\boxed{{{answer}}}"), stop_ids[0]]
            trace = SimpleNamespace(prompt_index=prompt_index, sample_index=index, tokens=[], confidences=[])
            trace.stop = "stop"
            for token in tokens:
                trace.tokens.append(token)
                trace.confidences.append(confidence)
                if on_token and on_token(trace):
                    trace.stop = "deepconf"
                    break
            if on_trace:
                on_trace(trace)
            traces.append(trace)
    return traces


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with problems and a checkpoint folder, to which the stand-in answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ev, "generate", scripted_generate)
    monkeypatch.setattr(ev, "load", lambda folder, device, dtype: (None, data.Tokenizer.byte_level()))
    golds = {"easy": "5", "split": "7", "hard": "1"}
    problems = [{"id": name, "domain": "math", "prompt": name, "answer": gold} for name, gold in golds.items()]
    data.write_jsonl("problems.jsonl", problems)
    return tmp_path


ARGV = ["--model", "runs/x/rl/model", "--problems", "problems.jsonl", "--out", "out", "--window", "4"]


def test_report_of_the_script(place, capsys):
    assert ev.main(ARGV) == 0
    report = json.loads(Path("out/report.json").read_text())
    rows = {r["method"]: r for r in report["rows"]}
    assert list(rows) == [
        "pass@1", "majority@32", "majority@equal-tokens", "deepconf-offline@32", "deepconf-low@32", "deepconf-high@32"
    ]
    assert {r["checkpoint"] for r in report["rows"]} == {"rl"}
    assert {r["problems"] for r in report["rows"]} == {3} and {r["unknown"] for r in report["rows"]} == {0}
    each = LENGTH + len(r"\boxed{5}") + 1
    assert rows["pass@1"]["accuracy"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert rows["pass@1"]["tokens"] == 3 * each
    assert rows["majority@32"]["tokens"] == 3 * 32 * each
    # Right in easy and split, where the right half is the more confident one; in hard all agree on a wrong answer.
    for method in ("deepconf-offline@32", "deepconf-low@32"):
        assert rows[method]["accuracy"] == pytest.approx(2 / 3)
        assert rows[method]["stderr"] == pytest.approx(math.sqrt(2 * (1 / 3) ** 2 + (2 / 3) ** 2) / math.sqrt(2 * 3))
    # easy and hard agree after the warm-up of 16. In split, LOW's votes come from the confident half and agree as well.
    assert rows["deepconf-low@32"]["tokens"] == 3 * 16 * each
    assert rows["majority@equal-tokens"]["tokens"] == rows["deepconf-low@32"]["tokens"]
    # HIGH takes both halves of split, so that they never agree: all 32 traces
    assert rows["deepconf-high@32"]["tokens"] == (16 + 32 + 16) * each
    # Right traces: 32 at 3.0, 16 at 2.0. Wrong: 16 at 1.0, 32 from 1.0 to 1.31.
    assert report["calibration"]["auroc"] == 1.0
    assert report["calibration"]["confidence_right"] == pytest.approx((32 * 3 + 16 * 2) / 48)
    traces = [json.loads(line) for line in Path("out/traces.jsonl").read_text().splitlines()]
    assert len(traces) == 96
    assert traces[0] == {
        "problem": "easy", "domain": "math", "gold": "5", "sample": 0, "seed": 0, "text": "." * LENGTH + r"\boxed{5}",
        "tokens": each, "answer": "5", "correct": True, "reason": "right", "stop": "stop", "confidences": [3.0] * each,
    }
    assert ev.table(report["rows"]) in Path("out/report.md").read_text()
    assert ev.table(report["rows"]) in capsys.readouterr().out


def unknown_at(monkeypatch, *calls):
    """The verdicts of these calls of verify, counted from 0, are unknown."""
    count = itertools.count()

    def verify(text, problem, **settings):
        i = next(count)
        if i in calls:
            return rewards.Verdict(None, f"unknown: {'no sandbox' if i % 2 else 'no memory'}")
        return rewards.verify(text, problem, **settings)

    monkeypatch.setattr(ev, "verify", verify)
    monkeypatch.setattr(ev, "ThreadPoolExecutor", lambda workers: OneThread())


class OneThread:
    """A pool whose jobs run in their order."""

    map = staticmethod(map)

    def shutdown(self, **_):
        pass


def test_few_unknown_verdicts_are_left_out_and_counted(place, capsys, monkeypatch):
    unknown_at(monkeypatch, 32)  # the first sample of split, a wrong 8: 1 of 96
    assert ev.main(ARGV) == 0
    out = capsys.readouterr().out
    rows = {r["method"]: r for r in json.loads(Path("out/report.json").read_text())["rows"]}
    assert rows["pass@1"]["accuracy"] == pytest.approx((1 + 16 / 31 + 0) / 3)
    assert rows["majority@32"]["accuracy"] == pytest.approx(1 / 3)  # 8 comes first, and is known to be wrong
    assert {(r["problems"], r["unknown"]) for r in rows.values()} == {(3, 0)}
    for text in (out, Path("out/report.md").read_text()):
        assert "1 of 96 verdicts unknown: 1 x no memory." in text
    traces = [json.loads(line) for line in Path("out/traces.jsonl").read_text().splitlines()]
    assert [t["correct"] for t in traces[31:34]] == [True, None, True]
    assert traces[32]["reason"] == "unknown: no memory" and traces[32]["answer"] == "8"
    assert deepconf.main(["out/traces.jsonl", "--window", "4"]) == 0  # and curation reads them as well
    argv = ["curate", "out/traces.jsonl", "--problems", "problems.jsonl", "--out", "kept.jsonl"]
    assert data.main(argv) == 0
    assert [problem.id for problem in data.read_problems("kept.jsonl")] == ["split"]


def test_a_vote_for_an_answer_of_unknown_verdict(place, capsys, monkeypatch):
    # The most confident trace of one problem is alone with its answer, and its verdict is unknown.
    monkeypatch.setitem(SCRIPT, "lonely", lambda i: ("3", 9.0) if i == 96 else (str(100 + i), 1.0))
    problems = [{"id": name, "domain": "math", "prompt": name, "answer": "5"} for name in ("easy", "lonely")]
    data.write_jsonl("problems.jsonl", problems)
    unknown_at(monkeypatch, 97 + 96)
    monkeypatch.setattr(ev, "WARM_UP", 97)  # without DeepConf online
    assert ev.main([*ARGV, "--samples", "97"]) == 0
    rows = {r["method"]: r for r in json.loads(Path("out/report.json").read_text())["rows"]}
    offline = rows["deepconf-offline@97"]
    assert (offline["accuracy"], offline["problems"], offline["unknown"]) == (1.0, 1, 1)
    assert (rows["majority@97"]["accuracy"], rows["majority@97"]["problems"]) == (0.5, 2)
    assert "| deepconf-offline@97   |      100.0 |      - |" in capsys.readouterr().out


def test_many_unknown_verdicts_end_the_evaluation_after_its_traces_are_written(place, capsys, monkeypatch):
    unknown_at(monkeypatch, 0, 1, 3)
    assert ev.main(ARGV) == 1
    why = "3 of 96 verdicts are unknown, more than 2%: 2 x no sandbox; 1 x no memory"
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: out/traces.jsonl holds every reply, but: {why}"
    traces = [trace for _, trace in data.read_records("out/traces.jsonl")]
    assert len(traces) == 96 and [trace["correct"] for trace in traces[:4]] == [None, None, True, None]
    assert not Path("out/report.json").exists()


def test_two_spellings_of_one_answer_are_one_vote_and_one_verdict(place, monkeypatch):
    """1/2 comes first but is less confident: DeepConf votes for 0.5, whose group plain voting calls 1/2."""
    monkeypatch.setitem(SCRIPT, "easy", lambda i: ("1/2", 1.0) if i < 8 else ("0.5", 3.0))
    data.write_jsonl("problems.jsonl", [{"id": "a", "domain": "math", "prompt": "easy", "answer": "0.5"}])
    assert ev.main(ARGV) == 0
    assert {r["accuracy"] for r in json.loads(Path("out/report.json").read_text())["rows"]} == {1.0}


def test_the_default_evaluates_both_checkpoints(place):
    data.write_jsonl("runs/tiny/data/heldout.jsonl", [{"id": "a", "domain": "math", "prompt": "easy", "answer": "5"}])
    assert ev.main([]) == 0
    rows = json.loads(Path("runs/tiny/eval/report.json").read_text())["rows"]
    assert [r["checkpoint"] for r in rows] == ["sft"] + ["rl"] * 6
    assert [r["method"] for r in rows[:3]] == ["pass@1", "pass@1", "majority@32"]
    assert Path("runs/tiny/eval/traces-sft.jsonl").is_file()
    assert rows[0]["stderr"] is None  # of one problem


def test_few_samples_leave_online_out(place):
    assert ev.main([*ARGV, "--samples", "4"]) == 0
    rows = json.loads(Path("out/report.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["pass@1", "majority@4", "deepconf-offline@4"]


def test_another_evaluation_is_not_overwritten(place, capsys):
    assert ev.main([*ARGV, "--samples", "4"]) == 0
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    capsys.readouterr()
    assert ev.main([*ARGV, "--samples", "5"]) == 1
    assert "samples" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    assert ev.main([*ARGV, "--samples", "4"]) == 0  # the same arguments
    assert ev.main([*ARGV, "--samples", "5", "--fresh"]) == 0
    Path("out/run.json").write_text("{")
    assert ev.main([*ARGV, "--samples", "5"]) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nonsense"], "--nonsense"),
        (["--sam", "4"], "--sam"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--limit", "-1"], "--limit must be at least 0"),
        (["--samples", "many"], "many"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--problems", "missing.jsonl"], "missing.jsonl"),
        (["--problems", "broken.jsonl"], "broken.jsonl, line 2"),
        (["--problems", "unreadable.jsonl"], r"unreadable.jsonl, line 1: field answer: the answer '\\frac{1}{' can"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(place, capsys, argv, message):
    Path("broken.jsonl").write_text('{"id": "p", "domain": "math", "prompt": "q", "answer": "1"}\n{"id": \n')
    Path("unreadable.jsonl").write_text('{"id": "p", "domain": "math", "prompt": "q", "answer": "\\\\frac{1}{"}\n')
    assert ev.main(ARGV + argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not Path("out").exists()


def test_missing_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.write_jsonl("problems.jsonl", [{"id": "a", "domain": "math", "prompt": "q", "answer": "5"}])
    assert ev.main(ARGV) == 1
    assert "runs/x/rl/model: no checkpoint here" in capsys.readouterr().err
    assert not Path("out").exists()


def test_chat_streams_and_keeps_history(place, monkeypatch, capsys):
    prompts, questions = [], iter(["easy?", "", "easy again é?"])

    def ask(_):
        try:
            return next(questions)
        except StopIteration:
            raise EOFError from None

    def generate(model, asked, **settings):
        prompts.append(data.Tokenizer.byte_level().decode(asked[0]))
        monkeypatch.setitem(SCRIPT, "easy", lambda i: ("é", 1.0))
        return scripted_generate(model, asked, **settings)

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(ev, "generate", generate)
    assert ev.main([*ARGV, "--chat"]) == 0
    reply = "." * LENGTH + r"\boxed{é}"
    assert capsys.readouterr().out == f"{reply}\n{reply}\n\n"
    assert len(prompts) == 2
    assert reply in prompts[1] and "easy?" in prompts[1]
    assert not Path("out").exists()


def test_chat_is_for_one_process(place, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ev.main([*ARGV, "--chat"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --chat is a talk with one process") and error.count("\n") == 1


@pytest.fixture
def babbler(tmp_path, monkeypatch):
    """A folder with three problems and a model that has learned nothing; the arguments that evaluate it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    FalconH1(PRESETS["tiny"]).save_pretrained("model")
    data.Tokenizer.byte_level().save("model")
    data.write_jsonl("problems.jsonl", [{"id": c, "domain": "math", "prompt": c, "answer": "1"} for c in "abc"])
    argv = ["--model", "model", "--problems", "problems.jsonl", "--out", "out", "--device", "cpu"]
    return [*argv, "--samples", "20", "--max-new-tokens", "6", "--window", "2"]


def test_a_tokenizer_larger_than_the_vocabulary(babbler, capsys):
    FalconH1(replace(PRESETS["tiny"], vocab_size=271)).save_pretrained("model")
    assert ev.main(babbler) == 1
    assert capsys.readouterr().err == "error: model: the tokenizer has 272 tokens, the model room for 271 only\n"
    assert not Path("out").exists()


# What torchrun starts below: an evaluation whose answers depend on the text, so that the babbler's are not all alike, and
# where rank 1 may fail in the function that FAIL names.
RANKS = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import eval as ev
import rewards

def fail(*args, **settings):
    time.sleep(0.5)  # the other rank waits for this one by now
    raise ValueError("this rank fails")

ev.extract_answer = rewards.extract_answer = lambda text: str(len(text) % 3)
if "UNKNOWN" in os.environ:
    ev.verify = lambda text, problem, **settings: rewards.Verdict(None, "unknown: no sandbox")
if "FAIL" in os.environ and os.environ["RANK"] == "1":
    setattr(ev, os.environ["FAIL"], fail)
sys.exit(ev.main())
"""


def test_two_ranks_evaluate_like_one(babbler, monkeypatch):
    for module in (ev, rewards):
        monkeypatch.setattr(module, "extract_answer", lambda text: str(len(text) % 3))
    assert ev.main(babbler) == 0
    Path("ranks.py").write_text(RANKS)
    status, out, err = run(Path("ranks.py").resolve(), *babbler, "--out", "two", ranks=2)
    assert status == 0, err
    assert out.count("seed=0") == out.count("majority@20") == 1
    for file in ("traces", "traces-low", "traces-high"):
        one, two = ([trace for _, trace in data.read_records(f"{folder}/{file}.jsonl")] for folder in ("out", "two"))
        for trace in two:
            trace["confidences"] = pytest.approx(trace["confidences"], abs=2e-4)  # batches of another size round otherwise
        assert one == two
    one, two = (json.loads(Path(folder, "report.json").read_text()) for folder in ("out", "two"))
    for row in one["rows"] + two["rows"]:
        del row["seconds"]
    assert len({row["accuracy"] for row in one["rows"]}) > 1
    assert one["rows"] == two["rows"]
    assert one["calibration"] == pytest.approx(two["calibration"], abs=2e-4)


@pytest.mark.parametrize(("where", "flags"), [("load", ["--fresh"]), ("generate", [])])
def test_an_error_on_one_rank_ends_all(babbler, where, flags):
    assert ev.main(babbler) == 0
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    Path("ranks.py").write_text(RANKS)
    status, _, err = run(Path("ranks.py").resolve(), *babbler, *flags, ranks=2, FAIL=where)
    assert status == 1
    assert err.count("error: this rank fails\n") == 1
    assert "[rank" not in err  # nowhere a traceback
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


def test_unknown_verdicts_end_two_ranks_after_the_traces_are_written(babbler):
    Path("ranks.py").write_text(RANKS)
    status, _, err = run(Path("ranks.py").resolve(), *babbler, ranks=2, UNKNOWN="1")
    assert status == 1
    why = "60 of 60 verdicts are unknown, more than 2%: 60 x no sandbox"
    assert err.count(f"error: out/traces.jsonl holds every reply, but: {why}\n") == 1
    assert len(Path("out/traces.jsonl").read_text().splitlines()) == 60


def test_a_real_model_from_end_to_end(babbler, monkeypatch):
    # It never answers, and traces without an answer set no threshold: DeepConf is told that it does.
    monkeypatch.setattr(ev, "extract_answer", lambda text: str(len(text) % 3))
    assert ev.main(babbler) == 0
    rows = json.loads(Path("out/report.json").read_text())["rows"]
    assert [r["accuracy"] for r in rows] == [0] * 6  # it babbles
    whole = {(t["problem"], t["sample"]): t for _, t in data.read_records("out/traces.jsonl")}
    assert len(whole) == 60
    assert {t["tokens"] == len(t["confidences"]) for t in whole.values()} == {True}
    low = [t for _, t in data.read_records("out/traces-low.jsonl")]
    assert "deepconf" in {t["stop"] for t in low}
    assert sum(t["tokens"] for t in low) == rows[4]["tokens"] < rows[1]["tokens"]
    for trace in low:  # stopped live, it is the beginning of what it would have been
        whole_confidences = whole[trace["problem"], trace["sample"]]["confidences"]
        assert trace["confidences"] == pytest.approx(whole_confidences[: trace["tokens"]], abs=1e-3)


# Methods --------------------------------------------------------------------------------------------------------------


PROBLEM = data.Problem("p", "math", "p", "1")


def ballot(*answers, gold="1", confidences=(1.0,), unknown=()):
    """The answers' ballot; unknown: indices of those of unknown verdict."""
    verdicts = [None if i in unknown else rewards.is_equivalent(a, gold) for i, a in enumerate(answers)]
    return ev.Ballot(PROBLEM, [
        {"problem": "p", "sample": i, "answer": answer, "correct": correct, "confidences": [*confidences]}
        for i, (answer, correct) in enumerate(zip(answers, verdicts))
    ])


def test_majority_score_by_hand():
    # One by one half are right; of the pairs (1, 1.0) and (2, 2) one.
    assert ev.majority_score(ballot("1", "1.0", "2", "2"), 1) == 0.5
    assert ev.majority_score(ballot("1", "1.0", "2", "2"), 2) == 0.5
    assert ev.majority_score(ballot("2", r"\frac12", "0.5", "1", gold="1/2"), 4) == 1  # spelled twice, counted as one
    assert ev.majority_score(ballot("1", "2", "2", "1"), 3) == 0  # one run of three; the last trace is left over
    assert ev.majority_score(ballot(None, None, "1"), 3) == 1  # no answer is no vote
    assert ev.majority_score(ballot(None, None), 2) == 0


def test_majority_score_with_unknown_verdicts():
    assert ev.majority_score(ballot("1", "1.0", "2", unknown=[0]), 3) == 1  # 1 is 1.0, which is known
    assert ev.majority_score(ballot("3", "3", "2", unknown=[0, 1]), 3) is None
    assert ev.majority_score(ballot("3", "1", "2", unknown=[0]), 1) == 0.5  # of two that are known


def test_programs_are_the_same_only_word_for_word():
    code = data.Problem("c", "code", "p", "", {"tests": [{"input": "", "output": "1"}]})
    rows = [
        {"problem": "c", "sample": i, "answer": answer, "correct": i > 0, "confidences": [1.0]}
        for i, answer in enumerate(["1", "1.0", "1.0"])
    ]
    assert ev.majority_score(ev.Ballot(code, rows), 3) == 1  # 1.0 has two votes and is right


def test_row_leaves_out_and_counts_what_is_unknown():
    row = ev.row("rl", "m", [1, None, 0, None], 10, 1.0)
    assert (row["accuracy"], row["stderr"], row["problems"], row["unknown"]) == (0.5, 0.5, 2, 2)
    row = ev.row("rl", "m", [None], 10, 1.0)
    assert (row["accuracy"], row["stderr"], row["problems"], row["unknown"]) == (None, None, 0, 1)
    assert "|          - |      - |" in ev.table([row])


def test_pass_row_is_the_mean_over_known_samples():
    group = [{"correct": correct, "tokens": 5} for correct in (True, False, None, True)]
    row = ev.pass_row("rl", [group, [{"correct": None, "tokens": 5}] * 4], 8.0)
    assert row["accuracy"] == pytest.approx(2 / 3) and (row["problems"], row["unknown"]) == (1, 1)
    assert (row["tokens"], row["seconds"]) == (10, 2.0)  # unknown samples cost as much


def test_calibration_by_hand():
    # Windows of two: right traces' lowest groups 1.5 and 3.5, the wrong one's 2.5. One of two pairs is in order.
    right, other, wrong = ballot("1", confidences=(2, 1, 3)), ballot("1", confidences=(3, 4)), ballot("2", confidences=(2, 3))
    unknown = ballot("1", confidences=(9, 9), unknown=[0])
    expected = {"auroc": 0.5, "confidence_right": 2.5, "confidence_wrong": 2.5}
    assert ev.calibration([right, other, wrong, unknown], 2) == expected
    assert ev.calibration([right], 2) == {"auroc": None, "confidence_right": 1.5, "confidence_wrong": None}
    assert "cannot tell" in ev.explain("rl", ev.calibration([right], 2), [])
    assert ev.calibration([unknown], 2) == {"auroc": None, "confidence_right": None, "confidence_wrong": None}


LOG = [{"step": 1, "loss": 1.0, "reward": 0.1}, {"step": 2, "loss": 0.9, "reward": 0.2}]


def test_without_matplotlib_there_are_no_plots_and_a_message(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    assert ev.main([*ARGV, "--samples", "4"]) == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    assert not list(Path("out").glob("*.png"))


def test_plots(place):
    pytest.importorskip("matplotlib")
    assert ev.main(ARGV) == 0
    assert {path.name for path in Path("out").glob("*.png")} == {"accuracy.png"}
    data.write_jsonl("runs/x/rl/log.jsonl", LOG)
    assert ev.main(ARGV) == 0
    assert {path.name for path in Path("out").glob("*.png")} == {"accuracy.png", "training.png"}
    assert Path("out/training.png").read_bytes().startswith(b"\x89PNG")


# Code ---------------------------------------------------------------------------------------------------


@needs_sandbox
def test_an_evaluation_with_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ev, "generate", scripted_generate)
    monkeypatch.setattr(ev, "load", lambda folder, device, dtype: (None, data.Tokenizer.byte_level()))
    codes = itertools.cycle(["print(input())", "print(7)", "print(input())"])  # by sample: right, wrong, right, right, ...
    fence = "\n```python\n{}\n```\n"
    monkeypatch.setitem(SCRIPT, "program", lambda i: (fence.format(["print(input())", "print(7)"][i % 3 == 1]), 1.0))
    problems = [
        {"id": "a", "domain": "math", "prompt": "easy", "answer": "5"},
        {"id": "b", "domain": "code", "prompt": "program", "tests": [{"input": "1", "output": "1"}]},
    ]
    data.write_jsonl("problems.jsonl", problems)
    assert ev.main([*ARGV, "--samples", "18"]) == 0, capsys.readouterr().err
    assert "sandbox: no rights: on, " in capsys.readouterr().out
    rows = {r["method"]: r["accuracy"] for r in json.loads(Path("out/report.json").read_text())["rows"]}
    assert rows["pass@1"] == pytest.approx((1 + 2 / 3) / 2) and rows["majority@18"] == rows["deepconf-low@18"] == 1
    traces = [json.loads(line) for line in Path("out/traces.jsonl").read_text().splitlines()]
    for trace, code in zip(traces[18:], codes):
        assert (trace["answer"], trace["gold"], trace["correct"]) == (code + "\n", "", code != "print(7)")
        assert trace["reason"] == ("passed" if trace["correct"] else "wrong output in test 1")
    assert {trace["reason"] for trace in traces if trace["gold"]} <= {"right", "wrong", "no answer"}


@pytest.mark.parametrize(
    ("tests", "message"), [([{"input": 1}], "problems.jsonl: problem b: field tests: test 1 has neither"), ("x", "must define check")]
)
def test_unknown_tests_are_an_error_before_sampling(tmp_path, monkeypatch, capsys, tests, message):
    monkeypatch.chdir(tmp_path)
    data.write_jsonl("problems.jsonl", [{"id": "b", "domain": "code", "prompt": "p", "tests": tests}])
    assert ev.main(ARGV) == 1 and message in capsys.readouterr().err


@needs_sandbox
def test_check_of_solutions(tmp_path, capsys):
    check = "def check(candidate):\n    assert candidate(2) == 4"
    rows = [{"task_id": str(i), "prompt": "def f(x):\n", "test": check, "entry_point": "f", "canonical_solution": f"    return {body}\n"}
            for i, body in enumerate(["2 * x", "x * x", "x"])]
    data.write_jsonl(tmp_path / "code.jsonl", rows)
    assert ev.main(["--check", str(tmp_path / "code.jsonl")]) == 1
    out = capsys.readouterr().out
    assert "| code       |      3 |      2 |      1 |           0 |" in out and "2: wrong output in test 1" in out


def test_tests_are_sampled_as_the_flags_say(place, monkeypatch):
    given = []
    monkeypatch.setattr(ev, "check_code", lambda *_, **__: None)

    def verify(text, problem, **settings):
        given.append(settings)
        return rewards.Verdict(1.0, "passed")

    monkeypatch.setattr(ev, "verify", verify)
    rows = [{"id": "a", "domain": "code", "prompt": "easy", "tests": [{"input": "1", "output": "1"}] * 9}]
    data.write_jsonl("problems.jsonl", rows)
    assert ev.main([*ARGV, "--samples", "2", "--code-tests", "3", "--seed", "7"]) == 0
    assert given == [{"judge": None, "limit": 3, "seed": 7, "unsafe": False}] * 2
    assert ev.main([*ARGV, "--samples", "2", "--fresh"]) == 0 and given[-1]["limit"] == 0  # all tests


@needs_sandbox
def test_a_problem_is_refused_only_if_nothing_could_score_it(place, capsys):
    unreadable = {"id": "a", "domain": "math", "prompt": "easy", "answer": r"\frac{1}{"}
    data.write_jsonl("problems.jsonl", [unreadable | {"tests": [{"input": "1", "output": "1"}]}])
    assert ev.main([*ARGV, "--samples", "2"]) == 0
    data.write_jsonl("problems.jsonl", [unreadable])
    assert ev.main([*ARGV, "--samples", "3", "--fresh"]) == 1
    assert "error: problems.jsonl, line 1: field answer: " in capsys.readouterr().err
    assert ev.main(["--check", "problems.jsonl"]) == 1
    out = capsys.readouterr().out
    assert "problems.jsonl, line 1: a: " in out and "frac{1}{" in out
