"""Estimators and methods by hand; whole evaluations with a stand-in for the model, a real one, two ranks."""

import contextlib
import gc
import io
import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import eval as ev
import rewards
import sandbox
from model import PRESETS, FalconH1, Trace
from tests.server import Server, chat, event

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

def samples_of(*verdicts, answers=None, same=rewards.is_equivalent, domain="math"):
    """Samples of one problem: a reply of 5 tokens and 2 seconds per verdict (True, False, None)."""
    replies = [ev.Reply(5, answer, verdict, "", "stop", 0.0, 0.0, {"lowest": 1.0})
               for answer, verdict in zip(answers or verdicts, verdicts)]
    return ev.Samples([ev.Ballot(domain, replies, same)], len(replies), 2.0 * len(replies))

def test_pass_at_1_is_the_mean_over_known_samples():
    row = ev.report_row(ev.pass_at(samples_of(True, False, None, True), 1))
    assert row["accuracy"] == pytest.approx(2 / 3) and (row["problems"], row["unknown"]) == (1, 0)
    assert (row["tokens"], row["seconds"]) == (5, 2.0)  # an unknown sample costs as much
    assert ev.pass_at(samples_of(None, None), 1).scores == [None]
    row = ev.report_row(ev.pass_at(samples_of(True, False, None, True), 2))
    assert (row["method"], row["accuracy"], row["tokens"]) == ("pass@2", 1, 10)  # one of two is right
    assert ev.pass_at(samples_of(True, None), 2).scores == [None]  # of two samples one is known

@pytest.mark.parametrize(("answers", "verdicts", "same", "expected"), [
    (["2", r"\frac12", "0.5", "1"], [False, True, True, False], rewards.is_equivalent, 1),  # one answer
    ([None, None, "1"], [False, False, True], rewards.is_equivalent, 1),  # no answer is no vote
    ([None, None], [False, False], rewards.is_equivalent, 0),
    (["1", "1.0", "2"], [None, True, False], rewards.is_equivalent, 1),  # 1 is 1.0, which is known
    (["3", "3", "2"], [None, None, False], rewards.is_equivalent, None),
    (["1", "1.0", "1.0"], [False, True, True], None, 1),  # programs are the same only word for word
])
def test_majority_by_hand(answers, verdicts, same, expected):
    outcome = ev.majority(samples_of(*verdicts, answers=answers, same=same))
    assert outcome.scores == [expected] and outcome.method == f"majority@{len(answers)}"

def test_majority_at_equal_tokens_pays_what_low_took():
    samples = samples_of(True, True, False, False, answers=["1", "1", "2", "2"])
    row = ev.report_row(ev.majority(samples, low=samples_of(True, True, True)))
    assert row["method"] == "majority@equal-tokens"
    assert (row["accuracy"], row["tokens"], row["seconds"]) == (1, 15, 6.0)

def test_majority_curve_by_hand():
    samples = samples_of(True, True, False, answers=["1", "1", "2"])  # of two replies there is one run
    assert ev.majority_curve(samples) == [(5, pytest.approx(2 / 3)), (10, 1)]

def test_rows_by_domain_and_what_is_unknown_or_cut_off():
    samples = ev.Samples([*samples_of(True).ballots, *samples_of(None, domain="code").ballots], 1, 2.0)
    samples.ballots[0].replies[0].stop = "length"
    rows = ev.report_rows("rl", samples, [ev.Outcome("m", samples, [0.5, None], [5, 5])])
    names = ("domain", "accuracy", "tokens", "seconds", "problems", "unknown", "cut_off")
    assert [[row[name] for name in names] for row in rows] == [
        ["all", 0.5, 10, 2.0, 1, 1, 0.5], ["code", None, 5, 1.0, 0, 1, 0], ["math", 0.5, 5, 1.0, 1, 0, 1]]
    table = ev.table(rows)
    assert "|          - |      - |" in table and "|      50.0 | all " in table
    plain = ev.table([rows[0] | {"cut_off": 0}])  # one domain, nothing cut off
    assert "cut off" in table and "cut off" not in plain and "domain" not in plain
    four = ev.Outcome("m", ev.Samples(samples_of(True).ballots * 4, 1, 2.0), [1, None, 0, None], [1] * 4)
    row = ev.report_row(four)
    assert (row["accuracy"], row["stderr"], row["problems"], row["unknown"]) == (0.5, 0.5, 2, 2)

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
            verdict = admit(prompt_index, index) if admit else "go"
            if verdict == "done":
                break
            if verdict == "skip":
                continue
            answer, confidence = SCRIPT[name](index)
            trace = Trace(prompt_index, index, stop="stop")
            for token in [*("." * LENGTH + rf"\boxed{{{answer}}}").encode(), stop_ids[0]]:  # no WORDS
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
    model = SimpleNamespace(config=PRESETS["tiny"])
    monkeypatch.setattr(ev.FalconH1, "from_pretrained", lambda folder, **settings: model)
    write_checkpoint("runs/x/rl/model")
    write_problems(("easy", "5"), ("split", "7"), ("hard", "1"))
    return tmp_path

ARGV = ["--model", "runs/x/rl/model", "--problems", "problems.jsonl", "--out", "out", "--window", "4"]

def report(out="out"):
    """The rows of a report.json over all domains, by method."""
    rows = json.loads(Path(out, "report.json").read_text())["rows"]
    return {row["method"]: row for row in rows if row["domain"] == "all"}

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
        "confidences": [3.0] * each, "run": traces[95]["run"], "seconds": traces[0]["seconds"], "tie": 1e-5,
    }
    assert not [*Path("out").glob("*part*")]
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

    in_order = contextlib.nullcontext(SimpleNamespace(map=map))
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

    # --traces and curation read such traces as well.
    assert ev.main(["--traces", "out/traces.jsonl", "--window", "4"]) == 0
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

    # Given again, the command samples nothing and judges these three again.
    monkeypatch.setattr(ev, "verify", Mock(side_effect=rewards.verify))
    sampled = count_samples(monkeypatch)
    assert ev.main([*ARGV, "--methods", "pass@1,majority,offline,online"]) == 0
    assert sampled["traces.part0.jsonl"] == 0 and all(trace["correct"] is not None for trace in traces_of())

def test_a_judge_may_move_but_not_go(place, monkeypatch, capsys):
    """What it left unknown is judged again, wherever it is now; without it verdicts would be others."""
    monkeypatch.setattr(ev, "open_judge", lambda args: None)
    with monkeypatch.context() as patched:
        unknown_at(patched, 0, 1, 3)
        assert ev.main([*ARGV, "--judge", "http://one/v1"]) == 1
    assert ev.main(ARGV) == 1
    assert "with --judge 'an address' and not ''" in capsys.readouterr().err
    assert ev.main([*ARGV, "--judge", "http://other/v1"]) == 0

def count_samples(monkeypatch, die_after=None):
    """Counter of the traces that end, by the file they are appended to; after so many a kill."""
    counts = Counter()
    append = ev.append

    def counted(path, record):
        if counts.total() == die_after:
            raise Killed
        append(path, record)
        counts[path.name] += 1
    monkeypatch.setattr(ev, "append", counted)
    return counts

def counts_without_repeats():
    """What count_samples counts over all runs: DeepConf online takes its warm-up, 16 traces of each of the
    three problems, from traces.jsonl."""
    sizes = {name: len(traces_of(f"out/{name}.jsonl")) for name in ("traces", "traces-low", "traces-high")}
    warm_up = {"traces-low": 48, "traces-high": 48}
    return Counter({f"{name}.part0.jsonl": size - warm_up.get(name, 0) for name, size in sizes.items()})

class Killed(BaseException):
    """No handler sees it, as with SIGKILL."""

@pytest.mark.parametrize("moments", [(0, 1, 95), (96, 5, 3), (30, 66, 8)])
def test_a_killed_evaluation_goes_on_and_samples_no_trace_twice(place, monkeypatch, moments):
    assert ev.main([*ARGV[:-4], "--out", "whole", *ARGV[-2:]]) == 0
    whole, total = report("whole"), Counter()
    for moment in [*moments, None]:
        with monkeypatch.context() as patched:
            counts = count_samples(patched, moment)
            with contextlib.nullcontext() if moment is None else pytest.raises(Killed):
                assert ev.main(ARGV) == 0
        total += counts
        for part in Path("out").glob("*.part0.jsonl"):
            with open(part, "a") as file:  # half a line; it is cut off
                file.write('{"problem": "p0", "sam')
        if moment is not None:
            Path("out/traces-low.part7.jsonl").touch()  # killed before its first line
            if not Path("out/traces-low.jsonl").exists():  # killed while it copied the warm-up
                Path("out/traces-low.part0.jsonl.tmp").write_text('{"problem')
    assert total == counts_without_repeats()
    for row in [*whole.values(), *report().values()]:
        del row["seconds"]
    assert report_without_seconds("out") == report_without_seconds("whole")
    assert not [*Path("out").glob("*part*")]
    for file in ("traces.jsonl", "traces-low.jsonl", "traces-high.jsonl"):
        one, other = (traces_of(f"{out}/{file}") for out in ("whole", "out"))
        for trace in [*one, *other]:
            del trace["seconds"]
        assert one == other

def report_without_seconds(out):
    return [{name: row[name] for name in row if name != "seconds"} for row in report(out).values()]

def test_command_line(place, capsys):
    """--traces: the rows of the live run again, and all others."""
    assert ev.main(ARGV) == 0
    live = report_without_seconds("out")
    samples, outcomes = ev.replay("out/traces.jsonl", checked(["--window", "4"]))
    again = ev.report_rows("rl", samples, outcomes)
    assert [{name: row[name] for name in row if name != "seconds"} for row in again] == live
    capsys.readouterr()
    methods = "pass@2,weighted,offline-bottom,offline-tail,offline-mean,online"
    flags = ["--window", "4", "--methods", methods, "--eta", "50", "--tau", "0", "--warm-up", "8"]
    assert ev.main(["--traces", "out/traces.jsonl", *flags, "--batch", "1"]) == 0
    out = capsys.readouterr().out
    each = LENGTH + len(r"\boxed{5}") + 1
    # Of split the 12 wrong ones after the warm-up are stopped, at their 4th token. Of easy and hard none is:
    # no confidence is below those before.
    stopped = f"{(32 * 3 - 12) * each + 12 * 4:,}"
    for text in ("pass@2 ", "weighted@32", "deepconf-offline-mean-eta50@32", "deepconf-eta50@32", stopped):
        assert text in out, out

def test_a_folder_that_not_all_ranks_see_is_named(place):
    """Rank 1 has judged a trace that rank 0 does not find."""
    problems = data.read_problems("problems.jsonl")
    with pytest.raises(ValueError, match="not all ranks write to this folder; --out must be shared"):
        ev.merge(Path("traces.jsonl"), {}, {(1, 0): {"correct": True}}, problems, checked([]))

def test_recorded_traces_on_two_ranks_are_reported_once(place, monkeypatch, capsys):
    Path("traces.jsonl").write_text(LINE)
    for rank, tables in (0, 1), (1, 0):
        monkeypatch.setattr(ev, "RANK", rank)
        assert ev.main(["--traces", "traces.jsonl"]) == 0
        assert capsys.readouterr().out.count("| traces     | pass@1 ") == tables

def test_a_running_evaluation_can_be_looked_at(place, monkeypatch, capsys):
    count_samples(monkeypatch, 40)
    with pytest.raises(Killed):
        ev.main(ARGV)
    capsys.readouterr()
    assert ev.main(["--traces", "out/traces.part0.jsonl"]) == 0
    assert "40 of 40 verdicts unknown: 40 x not judged yet." in capsys.readouterr().out

def checked(argv):
    args = data.parse_args(ev.Args, "", [*argv, "--traces", "x"])
    ev.check_args(args)
    return args

LINE = ('{"problem":"p","domain":"math","gold":"1","sample":0,"answer":"1","stop":"stop","correct":true,'
        '"confidences":[1]}')

def test_the_warm_up_is_copied_by_hand(place):
    """Two samples of 1 and 3 tokens in 2.0 s; the first is the warm-up: 1 of 4 tokens, so 0.5 s."""
    records = [ev.EARLIER | json.loads(LINE) | {"sample": i, "seconds": seconds, "confidences": [1.0] * n}
               for i, (seconds, n) in enumerate([(0.8, 1), (2.0, 3)])]
    data.write_jsonl("traces.jsonl", records)
    replies = [ev.to_reply(record, 1) for record in records]
    ev.copy_warm_up(Path("traces-low.jsonl"), "mark traces-low", 1,
                    ev.Samples([ev.Ballot("math", replies, None)], 2, 2.0))
    assert traces_of("traces-low.part0.jsonl") == [records[0] | {"run": "mark traces-low", "seconds": 0.5}]

@pytest.mark.parametrize(("text", "message"), [
    ("", "empty"), ("{\n", "line 1: malformed JSON"), ("3\n", "line 1: 3 is not"),
    (LINE + '\n{"problem": "p"}', "line 2: field domain"),
    (LINE.replace("true", "1"), "line 1: field correct"),
    (LINE.replace("[1]", "[NaN]"), "line 1: field confidences: value 0 is nan"),
    (LINE.replace("[1]", "[]"), "line 1: field confidences: shape (0,)"),
    (LINE.replace("[1]", "[{}]"), "line 1: field confidences: expected a list of numbers"),
    (LINE + "\n" + LINE, "line 2: fields problem, sample"),  # twice
    (LINE.replace("{", '{"tie": null,', 1), "line 1: field tie: missing or not float"),
    (LINE.replace("{", '{"seconds": "1",', 1), "line 1: field seconds"),
    (LINE.replace("{", '{"reason": 3,', 1), "line 1: field reason"),
    (LINE.replace('"stop":"stop"', '"stop":"deepconf"'), "complete"),
    (LINE.replace('"correct":true,', ""), "line 1: field correct: missing"),
    (LINE + '\n{"prob', "line 2: malformed JSON"),
    (LINE + "\n" + LINE.replace("0", "1").replace("{", '{"run": "ab",'), "line 2: field run: ab, expected"),
])
def test_malformed_traces(tmp_path, capsys, text, message):
    path = tmp_path / "traces.jsonl"
    path.write_text(text)
    assert ev.main(["--traces", str(path)]) == 1
    assert message in capsys.readouterr().err

def test_traces_of_another_model_or_setting_are_named_before_any_work(place, capsys):
    """A file that was put there, and another model at the old place."""
    assert ev.main([*ARGV, "--samples", "17"]) == 0
    shutil.copytree("out", "other")
    argv = [*ARGV, "--samples", "17", "--seed", "1"]
    assert ev.main([*argv, "--fresh"]) == 0
    shutil.copy("other/traces-low.jsonl", "out/traces-low.part3.jsonl")
    capsys.readouterr()
    assert ev.main(argv) == 1
    assert "error: out/traces-low.part3.jsonl, line 1: field run: " in capsys.readouterr().err
    Path("out/traces-low.part3.jsonl").unlink()
    data.write_text(Path("runs/x/rl/model/config.json"), json.dumps({"vocab_size": 513}))
    assert ev.main(argv) == 1
    assert "with a checksum of runs/x/rl/model of " in capsys.readouterr().err

def test_memory_does_not_grow_with_recorded_tokens(place, monkeypatch):
    """500,000 tokens cost less than 4 MB beside the 4 MB of one line: held as numbers, they would take 16."""
    write_problems(("easy", "5"))
    def generate(*_, on_trace, samples, **__):
        traces = []
        for i in range(samples):
            confidences = [i + n / 8 for n in range(20000)]
            traces.append(Trace(0, i, [65] * 20000, [-float(i)] * 20000, confidences, "stop"))
            on_trace(traces[-1])
        held, _ = tracemalloc.get_traced_memory()
        assert held < 2e6
        return traces
    monkeypatch.setattr(ev, "generate", generate)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # its import would count
    tracemalloc.start()
    assert ev.main([*ARGV, "--samples", "25", "--methods", "majority"]) == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6 and len(traces_of()) == 25

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
    ("--device gpu", "--device gpu: expected cuda or" if torch.cuda.is_available() else "expected cpu here"),
    ("--temperature 1e-9", "--temperature"),
    ("--traces x", "--traces takes"), ("--tau 2", "--tau 2.0"), ("--eta 0", "--eta [0.0]: eta: 0.0"),
    ("--eta x", "--eta x"), ("--warm-up 0", "--warm-up 0"), ("--batch 0", "--batch 0"),
    ("--slots -1", "--slots -1"), ("--methods pass@0", "pass@0: K must"),
    ("--seed -1", "--seed -1: must be at least 0"),
    ("--methods online --samples 16", "--methods online: needs more samples per problem than --warm-up 16"),
    ("--methods best", "--methods 'best': expected pass@K, majority"),
    ("--methods pass@33", "--methods pass@33: K must be 1 to 32"),
    ("--dtype float16", "--dtype float16: expected auto or float32 or bfloat16 here"),
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

def test_traces_too_long_for_the_model_are_an_error_before_fresh_deletes(place, capsys):
    assert ev.main([*ARGV, "--samples", "2"]) == 0
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    room = PRESETS["tiny"].max_position_embeddings
    assert ev.main([*ARGV, "--samples", "2", "--max-new-tokens", str(room), "--fresh"]) == 1
    message = f"--max-new-tokens {room} and the longest prompt, 15 tokens, exceed max_position_embeddings"
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before

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

def test_a_byte_that_is_not_utf8_does_not_end_a_chat(place, monkeypatch, capsys):
    for errors in ("strict", "surrogateescape"):  # Python's own choices, by locale
        stdin = io.TextIOWrapper(io.BytesIO(b"easy \xff?\neasy!\n"), encoding="utf-8", errors=errors)
        monkeypatch.setattr("sys.stdin", stdin)
        generate = Mock(side_effect=ev.generate)
        monkeypatch.setattr(ev, "generate", generate)
        assert ev.main([*ARGV, "--chat"]) == 0 and capsys.readouterr().err == ""
        _, prompt = [data.Tokenizer.byte_level().decode(call.args[1][0]) for call in generate.call_args_list]
        assert "easy \ufffd?" in prompt and "easy!" in prompt

def test_system_prompt_and_suffix_come_with_every_question(place, monkeypatch, capsys):
    Path("system.txt").write_text("Be brief.\n")
    generate = Mock(side_effect=ev.generate)
    monkeypatch.setattr(ev, "generate", generate)
    monkeypatch.setattr("builtins.input", Mock(side_effect=["easy?", "easy!", EOFError]))
    flags = [*ARGV, "--samples", "1", "--system", "system.txt", "--suffix", "Box it."]
    assert ev.main(flags) == 0 and ev.main([*flags, "--chat"]) == 0
    one, *_ = generate.call_args_list[0].args[1]
    last = generate.call_args.args[1][0]
    one, last = map(data.Tokenizer.byte_level().decode, (one, last))
    assert "system\nBe brief.<|im_end|>\n<|im_start|>user\neasy\nBox it.<|im_end|>\n" in one
    assert last.count("Be brief.") == 1 and last.count("\nBox it.") == 2
    identity = json.loads(Path("out/run.json").read_text())["identity"]
    assert (identity["system"], identity["suffix"]) == ("Be brief.", "Box it.")
    assert ev.main([*ARGV, "--system", "none.txt"]) == 1
    assert capsys.readouterr().err.endswith("error: none.txt is missing\n")

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
    for name in ("main", "open_checkpoint", "generate"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        fresh = ["--fresh"] if name == "open_checkpoint" else []
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
        for trace in [*one, *two]:
            del trace["seconds"], trace["run"]  # the runs differ in --device
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

def test_what_is_skipped_changes_no_other_trace(babbler):
    model = FalconH1.from_pretrained(babbler / "run/model")
    skipped = {(0, 0), (0, 1), (1, 2), (2, 0), (2, 1), (2, 2)}
    def admit(*place):
        return "skip" if place in skipped else "go"

    whole, some = (ev.generate(model, [[1], [2], [3]], max_new_tokens=4, samples=3, slots=2, admit=given)
                   for given in (None, admit))
    whole, some = ({(t.prompt_index, t.sample_index): t.tokens for t in traces} for traces in (whole, some))
    assert some == {place: tokens for place, tokens in whole.items() if place not in skipped}

@pytest.mark.parametrize("where", ["open_checkpoint", "generate"])
def test_an_error_on_one_rank_ends_all_and_deletes_nothing(two_ranks, where):
    (status, _, err, files), (other, _, silence, _) = two_ranks[where]
    assert status == other == 1
    assert err.endswith("error: this rank fails\n") and "error" not in silence
    assert files == two_ranks["main"][0][3]

def test_a_rank_that_is_killed_ends_the_other_with_one_line(monkeypatch, capsys):
    def gather(values, value):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    monkeypatch.setattr(ev, "WORLD", 2)
    monkeypatch.setattr(ev.dist, "all_gather_object", gather)
    monkeypatch.setattr(ev.dist, "init_process_group", lambda *args, **more: None)
    assert ev.main([*BABBLE, "--out", "killed"]) == 1
    assert capsys.readouterr().err == "error: another rank has ended, and so does this one\n"

# 4. Code, and --check ---------------------------------------------------------------------------------------

@needs_sandbox
@pytest.mark.parametrize("away", [False, True])
def test_an_evaluation_with_code(server, monkeypatch, capsys, away):
    """Here, or from a server, which is asked one question more about the longest problem."""
    programs = ["print(input())", "print(7)", "print(input())"]  # by sample: right, wrong, right, right, ...
    monkeypatch.setitem(SCRIPT, "program", lambda i: (f"\n```python\n{programs[i % 3]}\n```\n", 1.0))
    code = {"prompt": "program", "domain": "code", "tests": [{"input": "1", "output": "1"}]}
    write_problems(("an easy one", "5"), code)
    argv = from_server(server, "--slots", "1") if away else ARGV
    assert ev.main([*argv, "--samples", "17"]) == 0
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

# 5. A server ------------------------------------------------------------------------------------------------

@pytest.fixture
def server(place):
    """A server that replies as the stand-in does, to each prompt in the order of its requests: 20 of
    traces.jsonl, and of each further file the four after the warm-up.

    Its `refusal` (status, body), if any, is for requests that are no probe for one token."""
    def respond(body, _):
        bodies = [body for _, body in server.requests if body["max_tokens"] > 1]
        if server.refusal and body["max_tokens"] > 1:
            status, said = server.refusal
            return status, {}, [said]
        prompt = body["messages"][-1]["content"]
        name = next(name for name in SCRIPT if name in prompt)
        # The longest prompt, split, is also tried before all others.
        asked = [other["messages"][-1]["content"] for other in bodies].count(prompt) - 1 - (name == "split")
        answer, confidence = SCRIPT[name](asked if asked < 20 else 16 + asked % 4)
        text = "." * LENGTH + rf"\boxed{{{answer}}}"
        return [*(chat(character, confidence) for character in text), chat("", confidence, end="stop")]
    server = Server(respond)
    server.handle_error = lambda *_: None  # who asked has hung up
    server.refusal = None
    yield server
    server.shutdown()
    server.server_close()

def from_server(server, *flags):
    return ["--server", server.url, "--server-model", "org/name", *ARGV[2:], *flags]

def test_a_server_gets_the_report_of_the_same_model_here(server, monkeypatch, capsys):
    """Also where traces are stopped; without its folder, and with messages in place of token ids."""
    flags = ["--tau", "0", "--samples", "20", "--slots", "1", "--temperature", "0.6", "--top-p", "0.9"]
    assert ev.main([*ARGV, *flags]) == 0
    here = report_without_seconds("out"), traces_of(), traces_of("out/traces-low.jsonl")
    assert "deepconf" in {trace["stop"] for trace in here[2]}
    shutil.rmtree("runs")
    monkeypatch.setattr(ev, "generate", None)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    ask = ["--system", "Be brief.", "--suffix", "Box it."]
    assert ev.main(from_server(server, *flags, *ask, "--fresh")) == 0
    there = report_without_seconds("out"), traces_of(), traces_of("out/traces-low.jsonl")
    assert {row.pop("checkpoint") for row in here[0]} == {"rl"}
    assert {row.pop("checkpoint") for row in there[0]} == {"org/name"} and here[0] == there[0]
    for one, other in zip([*here[1], *here[2]], [*there[1], *there[2]], strict=True):
        for name in ("seconds", "run"):
            del one[name], other[name]
        assert (one.pop("tie"), other.pop("tie")) == (1e-5, 0.01)
        one["confidences"] = pytest.approx(one["confidences"])
        assert one == other
    wanted = {"model": "org/name", "temperature": 0.6, "top_p": 0.9, "max_tokens": 256, "messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hard\nBox it."}]}
    path, body = server.requests[-1]
    assert path == "/v1/chat/completions" and body | wanted == body
    assert "secret" not in Path("out/run.json").read_text() + capsys.readouterr().out

def test_noise_of_a_server_stops_nothing_live_nor_in_a_replay(server, monkeypatch, capsys):
    monkeypatch.setitem(SCRIPT, "easy", lambda i: ("5", 3.0 if i < 16 else 2.995))
    flags = ["--tau", "0", "--samples", "20", "--slots", "1"]
    stops = []
    for argv in ([*ARGV, *flags], from_server(server, *flags, "--fresh")):
        assert ev.main(argv) == 0
        stops.append([t["stop"] for t in traces_of("out/traces-low.jsonl")[:20]].count("deepconf"))
    assert stops == [4, 0]
    live = report_without_seconds("out")
    samples, outcomes = ev.replay("out/traces.jsonl", checked(["--window", "4", "--tau", "0"]))
    again = ev.report_rows("org/name", samples, outcomes)
    assert [{name: row[name] for name in row if name != "seconds"} for row in again] == live
    assert "server: groups within 0.01 nats of a threshold reach it" in Path("out/report.md").read_text()

def test_a_killed_evaluation_of_a_server_goes_on(server, monkeypatch, capsys):
    """Killed in traces.jsonl, and after two of the four traces that HIGH samples.

    The server moves meanwhile."""
    argv = from_server(server, "--samples", "20")
    total = Counter()
    for die_after in (25, 37, None):
        with monkeypatch.context() as patched:
            counts = count_samples(patched, die_after)
            with contextlib.nullcontext() if die_after is None else pytest.raises(Killed):
                assert ev.main(argv) == 0
        total += counts
        gc.collect()  # closes the file that locks --out, as the end of the process would
        argv[1] = server.url.replace("127.0.0.1", "localhost")
    assert total == counts_without_repeats()
    assert total["traces.part0.jsonl"] == 60 and " slots=16 " in capsys.readouterr().out  # 0 would be none
    assert {row["problems"] for row in report().values()} == {3}

def test_what_a_server_refuses_is_one_line_and_deletes_nothing(server, monkeypatch, capsys):
    assert ev.main(from_server(server, "--samples", "1")) == 0
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    capsys.readouterr()
    unlogged = event({"delta": {"content": "Well"}, "finish_reason": "stop"})
    for refusal, message in {
            (404, b"The model `org/name` does not exist."): "does not exist. (--server ends in /v1",
            (400, b"maximum context length is 99 tokens"): "99 tokens (vLLM: --max-model-len",
            (401, b"no key"): "HTTP 401 no key", (200, unlogged): "no logprobs"}.items():
        server.refusal = refusal
        assert ev.main(from_server(server, "--samples", "1", "--fresh")) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {server.url}: ") and message in error and error.count("\n") == 1
    server.url = "http://127.0.0.1:9/v1"  # nobody listens on the discard port
    assert ev.main(from_server(server, "--samples", "1", "--fresh")) == 1
    assert "refused" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before

@pytest.mark.parametrize(("argv", "message"), [
    ("--server http://x/v1", "need each other"), ("--server-model x", "need each other"),
    ("--server http://x/v1 --server-model x --model y", "no --model"),
    ("--server http://x/v1 --server-model x --chat", "--model or --chat"),
    ("--server http://x/v1 --server-model x --traces y", "--traces takes no --model or --server"),
    ("--server x/v1 --server-model x", "server x/v1: expected http://HOST:PORT/v1"),
])
def test_flags_that_contradict_a_server(place, monkeypatch, capsys, argv, message):
    assert ev.main([*argv.split(), *ARGV[2:]]) == 1
    assert message in capsys.readouterr().err and not Path("out").exists()
    monkeypatch.setattr(ev, "WORLD", 2)
    assert ev.main(["--server", "http://x/v1", "--server-model", "x", *ARGV[2:]]) == 1
    assert "one rank" in capsys.readouterr().err
