"""DeepConf: every formula by hand, the machine against a brute-force reading of the rules, the traps of other code."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deepconf as d

FAST = settings(deadline=None, max_examples=200, derandomize=True)


def trace(answer, *conf):
    return SimpleNamespace(answer=answer, confidences=list(conf))


def test_formulas_by_hand():
    assert d.token_confidence([[-1, -3], [0, -1]]).tolist() == [2, 0.5]
    conf = [1, 2, 6, 3]
    assert d.group_confidence(conf, 2).tolist() == [1.5, 4, 4.5]
    assert d.group_confidence(conf, 9).tolist() == [3]  # a short trace is one group
    assert d.lowest_group(conf, 2) == 1.5 and d.tail(conf, 2) == 4.5 and d.mean(conf) == 3
    assert d.bottom_groups(conf, 2) == 1.5  # max(1, int(0.3)) = 1 group
    assert d.bottom_groups(conf, 1, 0.5) == 1.5  # the two lowest of four: 1 and 2
    assert d.stop_threshold([1, 2, 3, 4, 5], 10) == pytest.approx(4.6)  # percentile 90
    assert d.stop_threshold([1, 2, 3, 4, 5], 90) == pytest.approx(1.4)  # percentile 10: HIGH keeps most
    assert d.keep_top([1, 2, 3, 4, 5], 10).tolist() == [False] * 4 + [True]
    assert d.keep_top([2, 2, 2], 10).all()  # ties are kept
    assert d.auroc([1, 2, 3, 3], [0, 1, 0, 1]) == pytest.approx((1 + 0.0 + 1 + 0.5) / 4)
    assert math.isnan(d.auroc([1, 2], [1, 1]))


def test_votes_by_hand():
    assert d.vote(["a", "b", "a"]) == ("a", pytest.approx(2 / 3))
    assert d.vote(["a", "b", "a"], [1, 5, 1]) == ("b", pytest.approx(5 / 7))
    assert d.vote(["b", "a"]) == ("b", 0.5)  # the first of equals
    assert d.vote([None, "a", None]) == ("a", 1) and d.vote([None]) == (None, 0) and d.vote([]) == (None, 0)
    assert d.vote(["1/2", "3", "0.5"], same=lambda a, b: {a, b} == {"1/2", "0.5"}) == ("1/2", pytest.approx(2 / 3))
    kept = d.offline([trace("wrong", 1, 1)] * 9 + [trace("right", 3, 3)], eta=10, window=2)
    assert kept == ("right", 1)
    assert d.majority_at([trace("a", 1, 1), trace("b", 1), trace("b", 1)], 3) == ("a", 3)
    assert d.majority_at([trace("a", 1, 1)], 1) == ("a", 2)  # at least one


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_confidence_that_is_not_finite(bad):
    for call in (lambda: d.lowest_group([1, bad], 1), lambda: d.vote(["a"], [bad]), lambda: d.token_confidence([[bad]]),
                 lambda: d.Online(4).on_token(0, bad), lambda: d.stop_threshold([bad], 10)):
        with pytest.raises(ValueError, match="finite"):
            call()


@pytest.mark.parametrize("bad", [{"n_init": 0}, {"window": 0}, {"eta": 0}, {"eta": 101}, {"batch": 0}])
def test_settings_that_make_no_sense(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        d.Online(4, **bad)


def test_online_by_hand():
    warm = [trace("a", 2, 2), trace("b", 4, 4)]  # lowest 2 and 4; eta 50: s = 3; only b votes, consensus is there
    m = d.replay([*warm, trace("c", 9, 9)], n_init=2, eta=50, window=2, tau=0.95)
    assert (m.threshold, m.result(), m.tokens) == (3, ("b", 1.0), 4)  # the third trace was never started
    m = d.replay([*warm, trace("c", 9, 9, 1, 9, 9), trace("c", 5, 5)], n_init=2, eta=50, window=2, tau=None)
    # The third: windows 9, 9, then (9 + 1) / 2 = 5, 5, 9 stay above 3; the fourth has 5: c gets 5 + 5 of 14.
    assert m.tokens == 4 + 5 + 2 and m.result() == ("c", pytest.approx(10 / 14))
    m = d.replay([*warm, trace("c", 9, 9, 1, 1, 9, 9)], n_init=2, eta=50, window=2, tau=None)
    assert m.tokens == 4 + 4 and m.result() == ("b", 1.0)  # stopped at the fourth token, which counts; it does not vote
    m = d.replay([*warm, trace("c", 1)], n_init=2, eta=50, window=2, tau=None)
    assert m.tokens == 5 and m.result() == ("b", 1.0)  # short: runs to its end, its mean 1 does not reach 3
    m = d.replay([*warm, trace("c", 9)], n_init=2, eta=50, window=2, tau=None)
    assert m.result() == ("c", pytest.approx(9 / 13))  # short and confident: votes
    assert d.replay([trace("a", 2, 2)] * 5, n_init=2, eta=10, window=2, tau=None).tokens == 10  # identical traces: no stop


def test_admission_does_not_depend_on_the_order_of_endings():
    m = d.Online(6, n_init=2, eta=90, window=1, tau=None, batch=2)
    assert [m.admit(0), m.admit(1), m.admit(2)] == ["go", "go", "wait"]
    for i in (1, 0):
        m.on_token(i, 1.0)
        m.finish(i, "a")
    assert [m.admit(2), m.admit(3), m.admit(4)] == ["go", "go", "wait"]
    for i in (3, 2):
        m.on_token(i, 1.0)
        m.finish(i, "a")
    assert [m.admit(4), m.admit(5), m.admit(6)] == ["go", "go", "done"]


LOOPS = [trace(None, 9, 9)] * 2  # confident, and without an answer
SOBER = [trace("7" if i % 2 else "8", 2 + i / 10, 4) for i in range(14)]  # the odd ones are more confident


def test_two_confident_loops_among_sixteen_silence_nobody():
    # Ranked are the 14 with an answer, 3.0, 3.05, ..., 3.65; the top tenth, from index 11.7 on: 3.6 and 3.65.
    answer, share = d.offline([*SOBER, *LOOPS], eta=10, window=2)
    assert (answer, share) == ("7", pytest.approx(3.65 / 7.25))
    assert d.offline(LOOPS, eta=10, window=2) == (None, 0.0)  # nobody has an answer
    more = [trace("7", 3.5, 3.5), trace("9", 9, 9)]
    m = d.replay([*LOOPS, *SOBER, *more], n_init=16, eta=10, window=2, tau=None)
    assert m.threshold == pytest.approx(3.585)  # 70% of the way from 3.55 to 3.6
    assert m.tokens == 18 * 2  # the 17th is stopped, at its second token; its 7 is no vote
    assert m.result() == ("9", pytest.approx(9 / 16.25))


def test_a_warm_up_without_answers_stops_nothing():
    warm = [trace(None, 9, 9)] * 2
    more = [trace("a", 1, 1, 1), trace("a", 2), trace("b", 9, 9)]
    m = d.replay([*warm, *more], n_init=2, eta=10, window=2, tau=None)
    assert m.threshold == -math.inf and m.tokens == 4 + 3 + 1 + 2  # none is stopped, all vote: a 1 + 2, b 9
    assert m.result() == ("b", pytest.approx(9 / 12))
    m = d.replay([*warm, trace(None, 1), trace("a", 1), trace("b", 1)], n_init=2, eta=10, window=2, tau=0.95)
    assert m.tokens == 4 + 1 + 1 and m.result() == ("a", 1.0)  # no votes are no consensus; one vote is
    m = d.replay([*warm, trace(None, 1)], n_init=2, eta=10, window=2, tau=0.0)
    assert m.tokens == 5 and m.result() == (None, 0.0)  # not even for tau = 0


def test_voters_without_confidence_have_one_vote_each():
    traces = [trace("a", 0, 0), trace("b", 0, 0), trace("b", 0, 0)]
    assert d.offline(traces, eta=10, window=2) == ("b", pytest.approx(2 / 3))
    assert d.replay(traces, n_init=2, eta=10, window=2, tau=0.95).result() == ("b", pytest.approx(2 / 3))
    assert d.vote(["a", None], [0, 5]) == ("a", 1.0)


def test_a_trace_below_the_threshold_everywhere():
    warm = [trace("a", 4, 4)] * 2
    m = d.replay([*warm, trace("b", 1, 1, 1, 1)], n_init=2, eta=10, window=2, tau=None)
    assert m.tokens == 4 + 2 and m.traces[2].stopped  # at its first full window
    assert m.result() == ("a", 1.0)
    assert d.offline([*warm, trace("b", 1, 1)], eta=10, window=2) == ("a", 1.0)


@pytest.mark.parametrize("call", [
    lambda: d.offline([trace("a", 1), trace("b")]), lambda: d.majority_at([trace("a", 1), trace("b")], 9),
    lambda: d.replay([trace("a", 1), trace("b")], n_init=1, tau=None), lambda: d.Online(4).finish(1, "b")])
def test_a_trace_without_a_token_is_named(call):
    with pytest.raises(ValueError, match="trace 1: it .* token"):
        call()


def lopsided(a, b):
    """Neither symmetric nor transitive: x is the same as y if it is y's neighbour from above."""
    return ord(a) - ord(b) in (0, 1)


def test_votes_and_verdicts_survive_an_equality_that_is_none():
    assert d.vote(["a", "b", "c"], same=lopsided) == ("a", pytest.approx(2 / 3))
    assert d.vote(["c", "b", "a"], same=lopsided) == ("c", pytest.approx(1 / 3))
    rows = [("a", False), ("b", True), (None, False)]
    recorded = [d.Recorded("p", i, answer, right, [1.0]) for i, (answer, right) in enumerate(rows)]
    for name, method in d.methods(2, 2, 0.95, lopsided).items():
        assert d.is_right(method(recorded)[0], recorded, lopsided) in (True, False), name


def test_is_right_by_hand():
    def traces(*rows):
        return [d.Recorded("p", i, answer, correct, [1.0]) for i, (answer, correct) in enumerate(rows)]
    same = {("0.5", "1/2"), ("50%", "0.5"), ("50%", "50")}
    def alike(a, b):
        return (a, b) in same or (b, a) in same
    assert d.is_right("1/2", traces(("1/2", True))) is True
    assert d.is_right(None, traces((None, None))) is False  # nobody voted
    assert d.is_right("x", traces(("x", None), ("x", True), ("y", False))) is True  # one verdict is known
    assert d.is_right("x", traces(("x", None), ("y", True))) is None  # none is
    assert d.is_right("1/2", traces(("1/2", None), ("0.5", True)), alike) is True  # one on the same answer is
    assert d.is_right("50", traces(("50", False), ("50%", True)), alike) is False  # word for word comes first
    assert d.is_right("2", traces(("1", True)), alike) is None  # nobody gave it


confidence = st.just(0.0) | st.floats(1 / 64, 20, width=32)  # what is smaller vanishes in the machine's units
one = st.tuples(st.sampled_from(["a", "b", None]), st.lists(confidence, min_size=1, max_size=12))
traces_of = st.lists(one, min_size=3, max_size=12)


def poll(votes):
    """(answer, share) of [(answer, weight)]: the oracle's own count."""
    sums = {}
    if not any(weight for _, weight in votes):
        votes = [(answer, 1) for answer, _ in votes]
    for answer, weight in votes:
        sums[answer] = sums.get(answer, 0) + weight
    best = max(sums, key=sums.get, default=None)
    return best, sums[best] / sum(sums.values()) if sums else 0.0


@FAST
@given(traces_of, st.integers(1, 5), st.sampled_from([10, 50, 90]), st.sampled_from([None, 0.6, 0.95]))
def test_online_against_the_rules(rows, window, eta, tau):
    """The oracle recomputes everything from whole prefixes at every token."""
    def means(conf):
        return [np.mean(conf[max(0, i - window) : i]) for i in range(min(window, len(conf)), len(conf) + 1)]
    answered = [min(means(conf)) for answer, conf in rows[:2] if answer is not None]
    s = np.percentile(answered, 100 - eta) if answered else -math.inf
    if any(abs(mean - (s - d.TIE)) < 1e-8 for _, conf in rows for mean in means(conf)):
        return  # where the decision falls, rounding decides
    tokens, votes = 0, []
    for i, (answer, conf) in enumerate(rows):
        best, share = poll(votes)
        if i >= 2 and tau is not None and best is not None and share >= tau:
            break
        low = [n for n, mean in enumerate(means(conf), min(window, len(conf))) if mean < s - d.TIE]
        tokens += low[0] if low and i >= 2 else len(conf)
        if not low and answer is not None:
            votes.append((answer, min(means(conf))))
    traces = [trace(answer, *conf) for answer, conf in rows]
    machine = d.replay(traces, n_init=2, eta=eta, window=window, tau=tau)
    assert machine.tokens == tokens
    assert machine.result() == (poll(votes)[0], pytest.approx(poll(votes)[1], abs=1e-6))


def test_long_running_sums_do_not_drift():
    m = d.Online(2, n_init=1, window=3)
    for c in [1e6, 1e-6] * 20000 + [0.5, 0.25, 0.25]:
        m.on_token(0, c)
    assert m.traces[0].total / (3 * d.UNIT) == pytest.approx(1 / 3, rel=1e-8)


def test_command_line(tmp_path, capsys):
    path = tmp_path / "traces.jsonl"
    def line(i, answer, c):
        return json.dumps({"problem": "p", "sample": i, "answer": answer, "correct": answer == "7", "confidences": [c] * 4})
    path.write_text("\n".join(line(i, "7" if i % 3 == 0 else "8", 5.0 if i % 3 == 0 else 1.0) for i in range(20)))
    assert d.main([str(path), "--window", "2", "--budget", "20"]) == 0
    out = capsys.readouterr().out
    assert "| majority | 0.0 |" in out and "| online LOW | 100.0 |" in out and "AUROC 1.000" in out


def test_command_line_with_unknown_verdicts(tmp_path, capsys):
    path = tmp_path / "traces.jsonl"
    rows = [("known", "1/2", True)] * 2 + [("known", "0.5", None)] * 3 + [("unknown", "7", None)] * 3
    names = ("problem", "answer", "correct", "sample", "confidences")
    records = [dict(zip(names, (*row, i, [1.0]))) for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert d.main([str(path), "--window", "2"]) == 0
    out = capsys.readouterr().out
    assert "| majority | 100.0 | 0.0 | 1.00 | 1 | 1 |" in out  # 0.5 is 1/2, which is known
    assert out.count("| 1 | 1 |\n") == 15  # every row leaves one problem out
    assert "AUROC nan, mean of right traces 1.000, of wrong ones nan" in out


@pytest.mark.parametrize(("text", "message"), [
    ("", "empty"), ("{", "line 1: malformed JSON"), ("3", "line 1: 3 is not"),
    ('{"problem": "p"}', "line 1: field sample"),
    ('{"problem":"p","sample":0,"answer":"1","correct":1,"confidences":[1]}', "line 1: field correct"),
    ('{"problem":"p","sample":0,"answer":"1","correct":true,"confidences":[NaN]}', "field confidences: value 0 is nan"),
    ('{"problem":"p","sample":0,"answer":"1","correct":true,"confidences":[]}', "field confidences: shape (0,)"),
])
def test_malformed_traces(tmp_path, capsys, text, message):
    path = tmp_path / "traces.jsonl"
    path.write_text(text)
    assert d.main([str(path)]) == 1
    assert message in capsys.readouterr().err
