"""DeepConf: each formula by hand, Online against a brute-force reading of the rules, traps of other code."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deepconf as d

def trace(answer, *conf, correct=None):
    return SimpleNamespace(answer=answer, confidences=list(conf), correct=correct, tokens=len(conf))

def test_formulas_by_hand():
    assert d.token_confidence([[-1, -3], [0, -1]]).tolist() == [2, 0.5]
    conf = [1, 2, 6, 3]
    assert d.group_confidence(conf, 2).tolist() == [1.5, 4, 4.5]
    assert d.group_confidence(conf, 9).tolist() == [3]  # a short trace is one group
    assert d.lowest_group(conf, 2) == 1.5 and d.tail(conf, 2) == 4.5 and d.mean(conf) == d.tail(conf, 9) == 3
    assert d.bottom_groups(conf, 2) == 1.5  # max(1, int(0.3)) = 1 group
    assert d.bottom_groups(conf, 1, 0.5) == 1.5  # the two lowest of four: 1 and 2
    assert d.stop_threshold([1, 2, 3, 4, 5], 10) == pytest.approx(4.6)  # percentile 90
    assert d.stop_threshold([1, 2, 3, 4, 5], 90) == pytest.approx(1.4)  # percentile 10: HIGH keeps most
    assert d.keep_top([1, 2, 3, 4, 5], 10).tolist() == [False] * 4 + [True]
    assert d.keep_top([2, 2, 2], 10).all()  # ties are kept
    # mean 0.5; squares 4 * 0.25 = 1; variance 1/3; over 4 problems 1/12
    assert d.mean_and_stderr([1, 0, None, 1, 0]) == (0.5, pytest.approx(math.sqrt(1 / 12)))
    assert d.mean_and_stderr([0.25]) == (0.25, None) and d.mean_and_stderr([None]) == (None, None)

def test_calibration_by_hand():
    # Lowest groups of right traces: 2, 3, of wrong ones: 1, 3. Of four pairs two are in order, one ties.
    assert d.calibration_sentence([(True, 2), (False, 1), (None, 9), (True, 3), (False, 3)]).startswith(
        "lowest group against correctness: AUROC 0.625, mean of right traces 2.500, of wrong ones 2.000")
    one_sided = d.calibration_sentence([(True, 2), (True, 3)])
    assert "AUROC nan, mean of right traces 2.500, of wrong ones nan" in one_sided

def test_votes_by_hand():
    assert d.vote(["a", "b", "a"]) == ("a", pytest.approx(2 / 3))
    assert d.vote(["a", "b", "a"], [1, 5, 1]) == ("b", pytest.approx(5 / 7))
    assert d.vote(["b", "a"]) == ("b", 0.5)  # the first of equals
    assert d.vote([None, "a", None]) == ("a", 1) and d.vote([None]) == (None, 0) and d.vote([]) == (None, 0)
    same = {("1/2", "0.5"), ("0.5", "1/2")}
    assert d.vote(["1/2", "3", "0.5"], same=lambda *pair: pair in same) == ("1/2", pytest.approx(2 / 3))
    kept = d.offline([trace("wrong", 1, 1)] * 9 + [trace("right", 3, 3)], eta=10, window=2)
    assert kept == ("right", 1)
    assert d.majority_at([trace("a", 1, 1), trace("b", 1), trace("b", 1)], 3) == ("a", 3)
    assert d.majority_at([trace("a", 1, 1)], 1) == ("a", 2)  # at least one
    # Unfiltered, a wins by numbers; of the most confident tenth only b is left; None is not ranked.
    for eta, expected in ((100, ("a", pytest.approx(4 / 7))), (10, ("b", 1))):
        assert d.filtered_vote(["a", None, "b", "a"], [2, 9, 3, 2], eta) == expected
    assert d.filtered_vote([None], [1]) == (None, 0)
    assert d.vote(["a", "b", "b", "b"], [0.3, 0.1, 0.1, 0.1 + 1e-9])[0] == "a"  # a tie but for rounding

@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_confidence_that_is_not_finite(bad):
    for call in (lambda: d.lowest_group([1, bad], 1), lambda: d.vote(["a"], [bad]),
                 lambda: d.token_confidence([[bad]]), lambda: d.Online(4).on_token(0, bad),
                 lambda: d.stop_threshold([bad], 10)):
        with pytest.raises(ValueError, match="finite"):
            call()

@pytest.mark.parametrize(("name", "value"), [
    ("n_init", 0), ("window", 0), ("eta", 0), ("eta", 101), ("batch", 0), ("budget", 0)])
def test_settings_that_make_no_sense(name, value):
    with pytest.raises(ValueError, match=f"{name}: {value}, expected"):
        d.Online(**({"budget": 4} | {name: value}))

WARM = [trace("a", 2, 2), trace("b", 4, 4)]  # lowest 2 and 4; eta 50: s = 3, only b votes

@pytest.mark.parametrize(("more", "tau", "tokens", "result"), [
    ([trace("c", 9, 9)], 0.95, 0, ("b", 1.0)),  # consensus: the third trace is never started
    # Windows 9, 9, then (9 + 1) / 2 = 5, 5, 9 stay above 3; the fourth trace has 5: c gets 5 + 5 of 14.
    ([trace("c", 9, 9, 1, 9, 9), trace("c", 5, 5)], None, 5 + 2, ("c", 10 / 14)),
    ([trace("c", 9, 9, 1, 1, 9, 9)], None, 4, ("b", 1.0)),  # stopped at a token that counts; it does not vote
    ([trace("c", 1, 1, 1, 1)], None, 2, ("b", 1.0)),  # stopped at its first full window
    ([trace("c", 1)], None, 1, ("b", 1.0)),  # short: runs to its end, its mean 1 does not reach 3
    ([trace("c", 9)], None, 1, ("c", 9 / 13)),  # short and confident: votes
    ([trace("b", 3, 3)] * 3, None, 3 * 2, ("b", 1.0)),  # a tie with the threshold is no stop
    ([trace("c", *[3 - 1e-7] * 3)], None, 3, ("b", 4 / 7)),  # nor is one but for rounding; c votes
])
def test_online_by_hand(more, tau, tokens, result):
    m = d.replay([*WARM, *more], n_init=2, eta=50, window=2, tau=tau)
    assert (m.threshold, m.tokens, m.result()) == (3, 4 + tokens, (result[0], pytest.approx(result[1])))

def test_admission_does_not_depend_on_the_order_of_endings():
    m = d.Online(6, n_init=2, eta=90, window=1, tau=None, batch=2)
    for first, after in ((0, d.WAIT), (2, d.WAIT), (4, d.DONE)):
        assert [m.admit(first + i) for i in range(3)] == [d.GO, d.GO, after]
        for i in (first + 1, first):
            m.on_token(i, 1.0)
            m.finish(i, "a")

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

def test_a_trace_that_ends_without_a_token_is_named():
    with pytest.raises(ValueError, match="trace 1: it ended without a token"):
        d.replay([trace("a", 1), trace("b")], n_init=1, tau=None)

def lopsided(a, b):
    """Neither symmetric nor transitive: x is the same as y if it is y's neighbour from above."""
    return ord(a) - ord(b) in (0, 1)

def test_votes_and_verdicts_survive_an_equality_that_is_none():
    assert d.vote(["a", "b", "c"], same=lopsided) == ("a", pytest.approx(2 / 3))
    assert d.vote(["c", "b", "a"], same=lopsided) == ("c", pytest.approx(1 / 3))
    traces = [trace("a", 1, correct=False), trace("b", 1, correct=True), trace(None, 1, correct=False)]
    votes = [d.offline(traces, eta=eta, window=2, same=lopsided) for eta in (10, 90)]
    for answer, _ in [*votes, d.replay(traces, window=2, n_init=2, same=lopsided).result()]:
        assert d.is_right(answer, traces, lopsided) in (True, False)

@pytest.mark.parametrize(("answer", "rows", "expected"), [
    ("1/2", [("1/2", True)], True),
    (None, [(None, None)], False),  # nobody voted
    ("x", [("x", None), ("x", True), ("y", False)], True),  # one verdict is known
    ("x", [("x", None), ("y", True)], None),  # none is
    ("1/2", [("1/2", None), ("0.5", True)], True),  # one on the same answer is
    ("50", [("50", False), ("50%", True)], False),  # word for word comes first
    ("2", [("1", True)], None),  # nobody gave it
])
def test_is_right_by_hand(answer, rows, expected):
    def alike(a, b):
        return {a, b} in ({"0.5", "1/2"}, {"50%", "0.5"}, {"50%", "50"})

    traces = [trace(given, 1.0, correct=correct) for given, correct in rows]
    assert d.is_right(answer, traces, alike) is expected

confidence = st.just(0.0) | st.floats(1 / 64, 20, width=32)
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

@settings(max_examples=100, derandomize=True)
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

def test_running_sums_do_not_drift():
    m = d.Online(2, n_init=1, window=3)
    confidences = np.random.default_rng(0).uniform(0, 50, 65536).astype(np.float32).tolist()
    for confidence in confidences:
        m.on_token(0, confidence)
    assert abs(m.traces[0].total / 3 - math.fsum(confidences[-3:]) / 3) < 1e-9
    assert abs(m.traces[0].lowest - d.lowest_group(confidences, 3)) < 1e-9

A, B, C = ("1/2", True, 1.0), ("0.5", None, 1.0), ("7", None, 1.0)  # 0.5 is 1/2, which is known to be right

@pytest.mark.parametrize(("traces", "unknown", "expected"), [
    ({"p": [("8", False, 1.0) if i % 3 else ("7", True, 5.0) for i in range(20)]}, 0,
     ["| majority | 0.0 | - |", "| online LOW | 100.0 | - |", "AUROC 1.000"]),
    ({"known": [A, A, B, B, B], "unknown": [C, C, C]}, 1, ["| majority | 100.0 | - | 1.00 | 1 | 1 |"]),
])
def test_command_line(tmp_path, capsys, traces, unknown, expected):
    records = [{"problem": name, "sample": i, "answer": answer, "correct": correct, "confidences": [conf] * 4}
               for name, given in traces.items() for i, (answer, correct, conf) in enumerate(given)]
    (tmp_path / "traces.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert d.main([str(tmp_path / "traces.jsonl"), "--window", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count(f"| 1 | {unknown} |\n") == 15 and all(text in out for text in expected)

LINE = '{"problem":"p","sample":0,"answer":"1","correct":true,"confidences":[1]}'

@pytest.mark.parametrize(("text", "message"), [
    ("", "empty"),
    ("{", "line 1: malformed JSON"),
    ("3", "line 1: 3 is not"),
    (LINE + '\n{"problem": "p"}', "line 2: field sample"),
    (LINE.replace("true", "1"), "line 1: field correct"),
    (LINE + "\n" + LINE, "line 2: fields problem, sample, stop"),  # twice
    (LINE.replace("{", '{"stop":"deepconf",'), "line 1: fields problem, sample, stop: expected complete"),
    (LINE.replace("[1]", "[NaN]"), "line 1: field confidences: value 0 is nan"),
    (LINE.replace("[1]", "[]"), "line 1: field confidences: shape (0,)"),
    (LINE.replace("[1]", "[{}]"), "line 1: field confidences: expected a list of numbers"),
])
def test_malformed_traces(tmp_path, capsys, text, message):
    path = tmp_path / "traces.jsonl"
    path.write_text(text)
    assert d.main([str(path)]) == 1
    assert message in capsys.readouterr().err
