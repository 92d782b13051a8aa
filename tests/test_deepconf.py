"""DeepConf: every formula by hand, the machine against a brute-force reading of the rules, the traps of other code."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deepconf as d

FAST = settings(deadline=None, max_examples=60, derandomize=True)


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


traces_of = st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.lists(st.floats(0, 20, width=32), min_size=1, max_size=12)),
                     min_size=3, max_size=12)


@FAST
@given(traces_of, st.integers(1, 5), st.sampled_from([10, 50, 90]), st.sampled_from([None, 0.6, 0.95]))
def test_online_against_the_rules(rows, window, eta, tau):
    """The oracle recomputes everything from whole prefixes at every token."""
    traces = [trace(a, *c) for a, c in rows]
    machine = d.replay(traces, n_init=2, eta=eta, window=window, tau=tau)
    s = np.percentile([d.lowest_group(t.confidences, window) for t in traces[:2]], 100 - eta)
    tokens, votes = sum(len(t.confidences) for t in traces[:2]), []
    close = any(abs(np.mean(t.confidences[max(0, i - window) : i]) - s) < 1e-5 for t in traces for i in range(1, len(t.confidences) + 1))
    for i, t in enumerate(traces):
        if i >= 2:
            answer, share = d.vote([a for a, _ in votes], [w for _, w in votes])
            if tau is not None and share >= tau:
                break
            cut = next((n for n in range(window, len(t.confidences) + 1) if np.mean(t.confidences[n - window : n]) < s - d.TIE), None)
            tokens += cut or len(t.confidences)
            if cut:
                continue
        if d.lowest_group(t.confidences, window) >= s - d.TIE:
            votes.append((t.answer, d.lowest_group(t.confidences, window)))
    if close:  # at the threshold itself rounding decides; the tie rule has its own test
        return
    answer, share = d.vote([a for a, _ in votes], [w for _, w in votes])
    assert machine.tokens == tokens
    assert machine.result()[0] == answer and machine.result()[1] == pytest.approx(share, abs=1e-6)


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


@pytest.mark.parametrize(("text", "message"), [
    ("", "no trace"), ("{", ":1: not JSON"), ('{"problem": "p"}', ":1: field sample"), ("[]", ":1: field problem"),
    ('{"problem":"p","sample":0,"answer":"1","correct":true,"confidences":[NaN]}', ":1: field confidences"),
    ('{"problem":"p","sample":0,"answer":"1","correct":true,"confidences":[]}', ":1: field confidences"),
])
def test_malformed_traces(tmp_path, capsys, text, message):
    path = tmp_path / "traces.jsonl"
    path.write_text(text)
    assert d.main([str(path)]) == 1
    assert message in capsys.readouterr().err
