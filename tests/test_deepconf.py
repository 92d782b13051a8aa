"""DeepConf: each formula by hand, Online against a brute-force reading of the rules, traps of other code, and
traces from servers that speak every dialect, well and badly."""

import doctest
import fcntl
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deepconf as d
import rewards
from tests.server import DONE, Server, chat, entry, event, reply

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

def test_a_consensus_counts_no_trace_of_its_own_batch():
    """Trace 2 starts anew, after a kill or before its first token, when trace 3 of its batch has ended."""
    m = d.Online(6, n_init=2, eta=90, window=1, tau=0.6, batch=2)
    for index, answer in ((0, "a"), (1, "b"), (3, "a")):
        m.record(index, [1.0], answer)
    assert m.admit(2) == d.GO  # 1 of 2 votes is no consensus, and it was none when trace 2 first started
    m.record(2, [1.0], "a")
    assert m.admit(4) == d.DONE

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

@pytest.mark.parametrize("kind", [np.ndarray.tolist, np.asarray])
def test_running_sums_do_not_drift(kind):
    m = d.Online(2, n_init=1, window=3)
    confidences = kind(np.random.default_rng(0).uniform(0, 50, 65536).astype(np.float32))
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

def test_programs_are_one_vote_only_if_they_are_the_same_text(tmp_path, capsys):
    early = "def f(x):\n    for y in x:\n        z = y\n        return z"
    late = early.replace("        return", "    return")  # the same words, but another program
    right = "def f(x):\n    return x[-1]"
    records = [{"problem": "p", "sample": i, "gold": "", "answer": answer, "correct": answer == right,
                "confidences": [1.0] * 4} for i, answer in enumerate((early, late, right, right))]
    (tmp_path / "traces.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert d.main([str(tmp_path / "traces.jsonl"), "--window", "2"]) == 0
    assert "| majority | 100.0 | - |" in capsys.readouterr().out

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
    (LINE.replace("[1]", f"[{10**400}]"), "line 1: field confidences: expected a list of numbers"),
])
def test_malformed_traces(tmp_path, capsys, text, message):
    path = tmp_path / "traces.jsonl"
    path.write_text(text)
    assert d.main([str(path)]) == 1
    assert message in capsys.readouterr().err

def test_the_gallery_of_failures_in_the_notes():
    notes = Path(d.__file__).with_name("NOTES.md").read_text("utf-8")
    gallery = notes.partition("\n## A gallery of DeepConf's failures\n")[2].partition("\n## ")[0]
    examples = doctest.DocTestParser().get_doctest(gallery, {}, "gallery", "NOTES.md", 0)
    wrong = []
    failed, tried = doctest.DocTestRunner(verbose=False).run(examples, out=wrong.append)
    assert tried > 20 and not failed, "".join(wrong)

# From here on: traces from a server, see tests/server.py

HELLO = [{"role": "user", "content": "1+1=?"}]

@pytest.fixture
def serve():
    """serve(respond): a started test server."""
    servers = []
    def start(respond):
        servers.append(Server(respond))
        return servers[-1]
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()

def sample(server, prompts=(HELLO,), tokens=9, retries=2, timeout=5.0, **more):
    """Traces of prompts from a test server, without long pauses."""
    client = d.Server(server.url, "m", key="secret", retries=retries, timeout=timeout, wait=0.01)
    return d.generate(client, list(prompts), max_new_tokens=tokens, **more)

def post(confidence):
    return [{"prob": math.exp(-confidence)}] * 20

PLAIN = "1+1="

def choice_of(*tokens, **more):
    """The choice of one chunk with all tokens."""
    return {"delta": {"content": "ab"}, "logprobs": {"content": tokens}, "finish_reason": "stop", **more}

def own(tokens, **more):
    """An event of llama-server's own /completion."""
    chunk = {"content": "ab", "completion_probabilities": tokens, **more}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"

WHOLE = b"".join(reply("ab", 3, 4))
TOP = [{str(i): -3 if i < 20 else -9 for i in range(21)}, dict.fromkeys("abcdefghijklmnopqrst", -4)]
DIALECTS = {
    "chat": (HELLO, reply("ab", 3, 4)),
    "several tokens per event": (HELLO, [event(choice_of(entry(3), entry(4)))]),
    "completions": (PLAIN, [event({"text": "ab", "logprobs": {"top_logprobs": TOP}}), DONE]),
    "completions of llama-server": (PLAIN, [event(choice_of(entry(3), entry(4), delta=None, text="ab"))]),
    "llama-server's own": (PLAIN, [own([entry(3)]), own([entry(4)], content="", stop=True, stop_type="eos")]),
    "post-sampling": (HELLO, [event(choice_of({"prob": 1, "top_probs": post(3)}, {"top_probs": post(4)}))]),
    "llama-server of 2024": (PLAIN, [own([{"probs": post(3)}, {"probs": post(4)}], stop=True)]),
    "lines end in CR LF": (HELLO, [WHOLE.replace(b"\n", b"\r\n")]),
    "comments": (HELLO, [b": keep-alive\n\n", *reply("ab", 3)[:2], b": ping\n\nevent: x\n\n", *reply("", 4)]),
    "half events": (HELLO, [WHOLE[i : i + 7] for i in range(0, len(WHOLE), 7)]),
    "counted tokens": (HELLO, [b'data: {"choices": [], "usage": {}}\n\n', *reply("ab", 3, 4)]),
}

@pytest.mark.parametrize("name", DIALECTS)
def test_a_dialect(serve, capsys, name):
    prompt, pieces = DIALECTS[name]
    server = serve(lambda body, number: pieces)
    [trace] = sample(server, [prompt])
    assert trace.text == "ab" and trace.stop == "stop" and (trace.prompt_index, trace.sample_index) == (0, 0)
    assert trace.confidences == pytest.approx([3, 4], rel=1e-6)
    path, body = server.requests[-1]
    assert path == ("/v1/chat/completions" if prompt is HELLO else "/v1/completions")
    asked = {"messages": HELLO, "logprobs": True, "top_logprobs": 20} if prompt is HELLO else {
        "prompt": PLAIN, "logprobs": 20}
    assert body.items() >= {**asked, "model": "m", "stream": True, "max_tokens": 9, "top_k": -1}.items()
    probabilities = capsys.readouterr().err.count("tempering and cuts")
    assert probabilities == (name in ("post-sampling", "llama-server of 2024"))

def test_reasoning_that_is_sent_apart_and_characters_that_are_cut(serve):
    euro = "€".encode()
    cut = [b'data: {"choices": [{"delta": {"content": "%s"}}]}\n\n' % part for part in (euro[:1], euro[1:])]
    def thought(name, text):
        return event({"delta": {name: text}, "logprobs": {"content": [entry(1)]}})
    replies = [[thought("reasoning_content", "so "), thought("reasoning", "2"), *reply("2", 1)],
               [thought("reasoning", r"\boxed{1}"), event({"delta": {}, "finish_reason": "length"})],
               [chat("1 ", 1), *cut, DONE],
               [chat("1 ", 1) + chat("€", 2, end="stop").decode().encode()],
               [chat("1 \ud83d", 1), chat("\ude00", 2, end="stop")]]  # halves of a surrogate pair
    server = serve(lambda body, number: replies[max(number, 0)])
    traces = sample(server, samples=5, slots=1)
    texts = ["<think>so 2</think>2", r"<think>\boxed{1}", "1 €", "1 €", "1 \ufffd\ufffd"]
    assert [t.text for t in traces] == texts
    assert [t.stop for t in traces] == ["stop", "length", "stop", "stop", "stop"]

def test_what_a_server_gives_less_or_lower(serve, capsys):
    low = entry(1)
    low["top_logprobs"] = [{"logprob": x} for x in (-1, -9999.0, -3.4e38, -1, -1)]
    server = serve(lambda body, number: [event({"delta": {"content": "a"}, "logprobs": {"content": [low] * 2},
                                                "finish_reason": "stop"})])
    [trace] = sample(server)
    assert trace.confidences == pytest.approx([203 / 5] * 2)  # log 0 counts as -100
    assert capsys.readouterr().err == (
        f"{server.url} sends 5 alternatives per token and not 20: confidence is over these\n")  # once

def test_tempered_log_probabilities_are_noticed(serve, capsys):
    server = serve(lambda body, number: reply("a", 3 / body["temperature"]))
    sample(server)
    assert [body["temperature"] for _, body in server.requests] == [1.0, 0.5, 1.0]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--logprobs-mode raw_logprobs" in err

def refuse(status, message, **headers):
    return status, headers, [json.dumps({"error": {"message": message}}).encode()]

@pytest.mark.parametrize(("message", "left"), [
    ("Invalid 'top_logprobs': Expected a value <= 5, but got 20 instead.", {"top_logprobs": 5, "top_k": -1}),
    ("Requested sample logprobs of 20, which is greater than max allowed: 5", {"top_logprobs": 5}),
    ("Unrecognized request argument supplied: top_k", {"top_logprobs": 20}),
])
def test_requests_that_a_server_refuses_are_put_differently(serve, capsys, message, left):
    def respond(body, number):
        ok = body["top_logprobs"] == left["top_logprobs"] and ("top_k" in left or "logprob" in message
                                                               or "top_k" not in body)
        return reply("a", 3) if ok else refuse(400, message)
    server = serve(respond)
    [trace] = sample(server)
    assert trace.confidences == [3] and server.requests[-1][1].items() >= left.items()
    assert len(server.requests) == 4  # one refusal
    assert ("allows 5" in capsys.readouterr().err) == ("logprob" in message)

FAR = "The model `m` does not exist." + "x" * 300
ERRORS = {
    "no logprobs": (lambda: [event({"delta": {"content": "2"}, "finish_reason": "stop"})], "--max-logprobs"),
    "no logprobs, long": (lambda: [event({"delta": {"content": "2" * 300}})] * 9, "transformers serve"),
    "no alternatives": (lambda: [event(choice_of({"logprob": -1, "top_logprobs": []}))], "--max-logprobs"),
    "NaN": (lambda: reply("a", math.nan), "missing, NaN or positive"),
    "positive": (lambda: reply("a", -1.0), "--logprobs-mode raw_logprobs"),
    "huge": (lambda: reply("a", -10**400), "too large"),
    "null": (lambda: [event(choice_of({"top_logprobs": [{"logprob": None}]}))], "NoneType"),
    "no text": (lambda: [event({"delta": "a"})], "str"),
    "parts": (lambda: [event(choice_of(entry(3), delta={"content": [{"text": "a"}]}))], "content: .* text"),
    "another model": (lambda: refuse(404, FAR), "`m` does not exist.x+ "),
    "no key": (lambda: refuse(401, "Incorrect API key"), "HTTP 401 .*OPENAI_API_KEY"),
    "too long": (lambda: refuse(400, "maximum context length is 8 tokens"), "--max-model-len"),
    "error in a stream": (lambda: [b'error: {"code": 400, "message": "the context"}\n\n'], "server: -c"),
    "another error": (lambda: [b'data: {"error": {"message": "out of memory"}}\n\n'], "500 .*of memory"),
    "an error that is a text": (lambda: [b'data: {"error": "no GPU"}\n\n'], "HTTP 500 .*no GPU"),
    "gave up": (lambda: [chat("a", 1), chat("", end="abort")], "finish_reason abort"),
    "no JSON": (lambda: [b"data: <html>\n\n"], "Expecting value"),
    "no object": (lambda: [b"data: 3\n\n"], "int"),
    "no stream": (lambda: [b'{"choices": []}'], "broke off after .*choices"),
    "silence": (lambda: [lambda: time.sleep(0.5)], "timed out .*fewer traces"),
    "comments for ever": (lambda: itertools.repeat(b": ping\n\n"), "no token for 0.2 seconds"),
    "500": (lambda: refuse(500, "overloaded"), "HTTP 500 .*overloaded"),
    "503": (lambda: refuse(503, "Loading model"), "HTTP 503 .*wait until it is up"),
}

@pytest.mark.parametrize("name", ERRORS)
def test_an_error_names_the_server_and_the_option_that_helps(serve, name):
    answer, message = ERRORS[name]
    server = serve(lambda body, number: answer())
    with pytest.raises(ValueError, match=message) as error:
        sample(server, timeout=0.2)
    text = str(error.value)
    assert text.startswith(server.url) and len(text) < 450 and "\n" not in text and "secret" not in text

def test_a_server_that_is_down_or_no_url(serve):
    server = serve(None)
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match=f"{server.url}: .*refused .is it up"):
        sample(server)
    for url in ("localhost:8000/v1", "ftp://x/v1", "http:///v1", ""):
        with pytest.raises(ValueError, match="expected http://HOST:PORT/v1"):
            d.Server(url, "m")

def test_broken_connections_and_busy_servers_are_tried_again(serve):
    answers = [refuse(429, "slow down", **{"Retry-After": "1"}), [chat("lost", 9, 9)], refuse(503, "loading"),
               reply("kept", 3, 4)]
    times = []
    def respond(body, number):
        times.append(time.monotonic())
        return answers[number] if number >= 0 else reply("a", 1)
    machine = d.Online(1, n_init=1, window=2)
    asked = []
    def admit(i, index):
        asked.append(index)
        return machine.admit(index)
    server = serve(respond)
    [trace] = sample(server, admit=admit, retries=3,
                        on_token=lambda t: machine.on_token(0, t.confidences[-1]))
    machine.finish(0, "a")
    assert (trace.text, trace.confidences, trace.stop) == ("kept", [3, 4], "stop")
    assert machine.tokens == 2 and machine.threshold == 3.5  # not of the lost tokens
    assert asked == [0] * 4 and times[3] - times[2] >= 1  # Retry-After
    assert not sample(serve(lambda body, number: [chat("a", 1)] if number == 0 else reply("a", 1)),
                      admit=lambda i, n: "go" if asked.append(n) or len(asked) < 6 else "done")

def test_a_stopped_trace_closes_its_connection_and_frees_the_slot(serve):
    closed = []
    def endless():
        try:
            for number in itertools.count():
                yield chat("a", 5.0 - number)
                yield lambda: time.sleep(0.005)
        finally:
            closed.append(time.monotonic())
    server = serve(lambda body, number: reply("a", 5) if number < 0 else endless())
    stopped = []
    def on_token(trace):
        if trace.confidences[-1] < 2:
            stopped.append(time.monotonic())
        return trace.confidences[-1] < 2
    [trace] = sample(server, on_token=on_token, tokens=900)
    while not closed:
        time.sleep(0.01)
    assert trace.stop == "deepconf" and trace.confidences == [5, 4, 3, 2, 1] and trace.text == "aaaaa"
    assert closed[0] - stopped[0] < 0.5
    # A server that ignores max_tokens is cut off as well.
    [trace] = sample(server, tokens=3)
    assert trace.stop == "length" and trace.confidences == [5, 4, 3]

def test_an_empty_reply_has_one_token_of_no_confidence(serve):
    [trace] = sample(serve(lambda body, number: [event({"delta": {}, "finish_reason": "stop"}), DONE]))
    assert (trace.text, trace.confidences, trace.stop) == ("", [0.0], "stop")

def test_admission(serve):
    server = serve(lambda body, number: reply("a", 1))
    asked, ended = [], []
    def admit(i, index):
        asked.append((i, index))
        if i == 0:
            return "skip" if index == 1 else "go"
        if i == 1:
            return "go" if index == 0 else "wait" if (1, 0) not in ended else "done"
        return "done"
    traces = sample(server, [HELLO] * 3, samples=3, slots=2, admit=admit,
                       on_trace=lambda t: ended.append((t.prompt_index, t.sample_index)))
    assert [(t.prompt_index, t.sample_index) for t in traces] == [(0, 0), (0, 2), (1, 0)] == sorted(ended)
    assert asked.count((2, 0)) == 1 and (1, 2) not in asked
    with pytest.raises(RuntimeError, match="prompt 0 waits"):
        sample(server, admit=lambda i, index: "wait")
    assert sample(server, []) == []

def test_an_error_ends_all_and_nothing_that_has_ended_is_lost(serve):
    def respond(body, number):
        if number == 2:
            return refuse(404, "gone")
        return reply("a", 1) if number < 2 else itertools.repeat(chat("a", 1))
    ended = []
    with pytest.raises(ValueError, match="gone"):
        sample(serve(respond), samples=9, slots=1, on_trace=ended.append)
    assert len(ended) == 2
    def full(trace):
        raise OSError("disk is full")
    with pytest.raises(OSError, match="full"):  # an error of a callback is no broken connection
        sample(serve(lambda body, number: reply("a", 1)), on_token=full)
    def talks(body, number):
        return reply("a", 1) if number in (-2, -1, 1) else itertools.repeat(chat("a", 1))
    server = serve(talks)
    def interrupt(trace):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        sample(server, samples=9, slots=4, tokens=10**9, on_trace=interrupt)
    until = time.monotonic() + 5
    while server.open and time.monotonic() < until:
        time.sleep(0.01)
    assert not server.open  # the others hung up

MANY = r"""
import re, sys, threading, time, deepconf
marks = []
def on_token(trace):
    marks.append((time.monotonic(), time.process_time()))
server = deepconf.Server(sys.argv[1], "m")
traces = deepconf.generate(server, ["1+1="], max_new_tokens=9, samples=64, slots=64, on_token=on_token)
assert len(traces) == 64 and all(t.confidences == [3, 4] for t in traces)
idle = max(zip(marks, marks[1:]), key=lambda pair: pair[1][0] - pair[0][0])
(t0, busy0), (t1, busy1) = idle
peak = int(re.search("VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) / 1024
print(t1 - t0, busy1 - busy0, peak)
"""

def test_64_traces_take_64_connections_little_memory_and_no_busy_thread(serve):
    def wait():
        while server.most < 64:
            time.sleep(0.02)
        time.sleep(1)
    held = [chat("a", 3), wait, chat("b", 4, end="stop")]
    server = serve(lambda body, number: reply("a", 3) if number < 0 else held)
    done = subprocess.run([sys.executable, "-c", MANY, server.url], cwd=Path(d.__file__).parent,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    seconds, busy, megabytes = map(float, done.stdout.split())
    assert server.most == 64 and seconds > 0.5 and busy < 0.1 * seconds and megabytes < 200

# The command line: server, files of saved replies, and this file alone

ROWS = [{"id": name, "domain": "math", "prompt": f"{name}=?", "answer": answer}
        for name, answer in (("1+1", "2"), ("1/2", "0.5"), ("5-2", "3"))]

def responder():
    """For a server: confident right answers, in several spellings; every third to a question is neither. They
    are counted per question, as its traces start in groups, but those of different questions in any order."""
    counts = defaultdict(itertools.count)
    def respond(body, number):
        question = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        name = question.partition("=")[0][-3:]
        right = {"1+1": "2", "1/2": r"\frac12", "5-2": "3"}[name]
        count = next(counts[name]) if number >= 0 else 0  # the probe's requests do not count
        if count % 3 == 2:
            return reply(r"\boxed{7}", *[1.5 + 0.001 * count] * 6)
        return reply(rf"\boxed{{{right}}}", *[3.0 + 0.0001 * count] * 4)
    return respond

@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*flags): exit status, output and errors of the command in a folder with problems.jsonl."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(d.Server, "wait", 0.01)
    Path("problems.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    def start(*flags):
        status = d.main(list(flags))
        return status, *capsys.readouterr()
    return start

SETTINGS = [*"--model m --problems problems.jsonl --budget 12 --warm-up 4 --window 2 --tau 0".split(),
            *"--max-tokens 50 --concurrency 3 --suffix".split(), "Box it.", "--system", "Be brief."]

def lines(path="traces.jsonl"):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]

def test_the_command_samples_from_a_server(serve, run):
    server = serve(responder())
    status, out, err = run("--server", server.url, *SETTINGS)
    assert status == 0, err
    traces = lines()
    assert sorted((t["problem"], t["sample"]) for t in traces) == sorted(
        (row["id"], i) for row in ROWS for i in range(12))
    wrong = [t for t in traces if t["stop"] == "deepconf"]
    assert wrong and all(t["tokens"] == 2 and t["sample"] >= 4 for t in wrong)  # at the first full window
    for t in traces:
        assert t["correct"] == (t["confidences"][0] > 2) and t["tie"] == d.SERVER_TIE
        assert t["confidences"] == [float(np.float32(c)) for c in t["confidences"]]
    assert server.requests[-1][1]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert server.requests[-1][1]["messages"][1]["content"].endswith("=?\nBox it.")
    assert server.requests[-1][1].items() >= {"temperature": 0.6, "top_p": 0.95, "max_tokens": 50}.items()
    tokens = sum(t["tokens"] for t in traces)
    assert f"36 traces, {len(wrong)} of them stopped: {tokens} tokens" in out
    assert "| DeepConf online | 100.0 |" in out and "groups within 0.01 nats" in out
    # The file replays as it was decided, and restarting it samples nothing.
    count = len(server.requests)
    assert run("--server", server.url, *SETTINGS)[1].splitlines()[:4] == out.splitlines()[:4]
    assert len(server.requests) == count + 2 and len(lines()) == 36
    status, _, err = run("--server", server.url, *SETTINGS, "--eta", "90")
    assert status == 1 and "line 1: field run: no trace, or sampled with other" in err

def test_an_interrupted_command_goes_on(serve, run):
    down = threading.Event()
    respond = responder()
    def dies(body, number):
        if number == 7 or down.is_set():
            down.set()
            return 404, {}, [b"gone"]
        return respond(body, number)
    server = serve(dies)
    status, _, err = run("--server", server.url, *SETTINGS)
    before = lines()
    assert status == 1 and "HTTP 404 gone" in err and 3 <= len(before) <= 7
    with open("traces.jsonl", "a") as file:
        file.write(f'{{"run": "{before[0]["run"]}", "sec')  # killed while it wrote
    server.respond = respond
    assert run("--server", server.url, *SETTINGS)[0] == 0
    assert lines()[: len(before)] == before and len({(t["problem"], t["sample"]) for t in lines()}) == 36
    assert max(t["seconds"] for t in lines()[len(before) :]) >= max(t["seconds"] for t in before)

@pytest.mark.parametrize("text", ['{"problem": "1', '{"run": "0"}', "notes\nmore", "\n", '{"id": "a"}\n{'])
def test_out_that_holds_something_else(serve, run, text):
    Path("other").write_text(text)
    server = serve(responder())
    status, _, err = run("--server", server.url, *SETTINGS, "--out", "other")
    assert status == 1 and "other, line 1: field run: no trace" in err
    assert Path("other").read_text() == text and not server.requests

def test_out_that_a_kill_left_with_half_a_line_or_that_is_in_use(serve, run):
    Path("traces.jsonl").write_text('{"run": ')
    server = serve(responder())
    with open("traces.jsonl") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, _, err = run("--server", server.url, *SETTINGS)
        assert status == 1 and "traces.jsonl: another process writes to it" in err and not server.requests
    assert run("--server", server.url, *SETTINGS)[0] == 0 and len(lines()) == 36
    Path("traces.jsonl").write_text("\n".join(map(json.dumps, lines() * 2)) + "\n")
    assert "\n36 traces" in run("--server", server.url, *SETTINGS)[1]  # the first of two counts
    # Traces are of certain problems, too.
    Path("problems.jsonl").write_text(Path("problems.jsonl").read_text().replace('"1+1", "d', '"2", "d'))
    status, _, err = run("--server", server.url, *SETTINGS)
    assert status == 1 and "sampled with other settings" in err

@pytest.mark.parametrize(("end", "path"), [
    ("/", "/v1/chat/completions"), ("/chat/completions", "/v1/chat/completions"),
    ("/completions/", "/v1/completions")])
def test_urls_that_end_otherwise(serve, run, end, path):
    server = serve(responder())
    assert run("--server", server.url + end, *SETTINGS)[0] == 0
    assert {asked for asked, _ in server.requests} == {path}

def test_consensus_and_plain_completions(serve, run):
    server = serve(lambda body, number: reply(r"\boxed{2}", 3, 3, 3))
    status, out, _ = run("--server", server.url + "/completions", *SETTINGS, "--tau", "0.95")
    assert status == 0 and len(lines()) == 12  # four of each problem, which agree
    assert "| DeepConf online | 33.3 | 33.3 | 0.33 | 3 | 0 |" in out
    assert server.requests[-1][0] == "/v1/completions"
    asked = {f"Be brief.\n\n{row['prompt']}\nBox it." for row in ROWS}
    assert {body["prompt"] for _, body in server.requests} == asked

@pytest.mark.parametrize(("text", "message"), [
    ("", "p.jsonl: expected problems"), ("{", "p.jsonl, line 1: expected a JSON object"),
    ("3", "p.jsonl, line 1: expected a JSON object"), ('{"id": "a", "prompt": "b"}', "line 1: field answer"),
    (f"{json.dumps(ROWS[0])}\n" * 2, "each with an id of its own"),
    (json.dumps(ROWS[0] | {"where": "x", "tests": ["assert f() == 1"]}), "p.jsonl, line 1: tests decide"),
    (json.dumps(ROWS[0]) + '\n{"id": "\udcff"}', "p.jsonl, line 2: expected a JSON object"),  # not UTF-8
    ('{"id":' + "[" * 10**5, "p.jsonl, line 1: expected a JSON object")])
def test_bad_problems_alone(run, monkeypatch, capsys, text, message):
    monkeypatch.setitem(sys.modules, "data", None)  # cannot be imported
    Path("p.jsonl").write_text(text, "utf-8", "surrogateescape")
    status = d.main(["--server", "http://x/v1", "--problems", "p.jsonl"])
    assert str(status).startswith("error: ") and message in status

def test_equal_texts_share_their_fate():
    """Bfloat16 noise around the threshold, which is the confidence of the most confident warm-up trace."""
    noisy = [trace("a", c, c) for c in (3.0, 3.004, 2.998, 3.002, 2.995, 3.001)] + [trace("b", 2.98, 2.98)]
    def decide(tie):
        return d.replay(noisy, n_init=2, eta=10, window=2, tau=None, tie=tie).tokens
    longer = [trace(t.answer, *t.confidences * 4) for t in noisy]
    machine = d.replay(longer, n_init=2, eta=10, window=2, tau=None, tie=d.SERVER_TIE)
    assert [t.tokens for t in machine.traces] == [8] * 6 + [2]
    machine = d.replay(longer, n_init=2, eta=10, window=2, tau=None)
    assert [t.tokens for t in machine.traces] == [8, 8, 2, 2, 2, 2, 2]
    assert d.offline(noisy, window=2, eta=10, tie=d.SERVER_TIE)[1] == 1
    assert d.keep_top([3.0, 3.004, 2.98], 10, d.SERVER_TIE).tolist() == [True, True, False]
    assert decide(d.TIE) == decide(d.SERVER_TIE)  # two tokens are one window

SAVED = choice_of(entry(3), entry(4), delta=None, message={"content": r"\boxed{2}"})
WRONG = SAVED | {"message": {"content": r"\boxed{7}"}}
OLD = {"text": r"\boxed{0.50}", "logprobs": {"top_logprobs": [{"a": -3, "b": -3}]}, "finish_reason": "length"}
VLLM = {"text": r"\boxed{3}", "logprobs": [{"17": {"logprob": -3.0, "rank": 1}}]}

BATCH = [{"custom_id": name, "response": {"body": {"choices": [choice, WRONG, choice]}}}
         for name, choice in (("5-2", VLLM), ("1+1", SAVED), ("1/2", OLD))]

@pytest.mark.parametrize(("records", "expected"), [
    ([{"choices": [SAVED, SAVED, WRONG]}, {"choices": [OLD]}, {"choices": [VLLM]}], "100.0 | 0.0 | 1.00 | 3"),
    (BATCH, "100.0 | 0.0 | 1.00 | 3"),
    ([choice | {"problem": name} for name, choice in (("1+1", SAVED), ("5-2", WRONG), ("1+1", SAVED))],
     "50.0 | 50.0 | 1.00 | 2"),
])
def test_saved_replies(run, records, expected):
    for text in ("\n".join(map(json.dumps, records)), json.dumps(records, indent=1)):
        Path("saved.json").write_text(text)
        status, out, err = run("saved.json", "--problems", "problems.jsonl", "--window", "2")
        assert status == 0, err
        assert out.count("\n| ") == 16 and "within 0.01 nats" in out
        assert f"| majority | {expected} | 0 |" in out

@pytest.mark.parametrize(("answer", "correct"), [("(A)", True), ("2", True), ("x = A", False), ("B", False)])
def test_an_answer_that_names_no_choice_is_wrong_as_in_an_evaluation(answer, correct):
    extra = {"choices": ["2", "3"]}
    problem = SimpleNamespace(id="1", domain="science", answer="A", extra=extra)
    record = d.to_record(problem, d.Trace(0, 0, rf"\boxed{{{answer}}}", [1.0], "stop"), rewards)
    assert record["correct"] == rewards.is_right(answer, problem) == correct

@pytest.mark.parametrize(("record", "message"), [
    (SAVED, "line 1: fields problem, custom_id: None is no problem of --problems"),
    ({"custom_id": "x", "choices": [SAVED]}, "line 1: fields problem, custom_id: x is no problem"),
    ({"choices": [SAVED | {"logprobs": None}]}, "line 1: field confidences"),
    ({"choices": [SAVED | {"logprobs": {"content": [entry(math.nan)]}}]}, "field choices or logprobs: .*NaN"),
    ({"choices": 3}, "line 1: field choices or logprobs"),
    (SAVED | {"message": {"content": [{"text": "2"}]}}, "field choices or logprobs: .*expected a text"),
    ({"problem": {"id": "1+1"}, "choices": [SAVED]}, "line 1: fields problem, custom_id: .* is no problem"),
    ({"problem": "1+1", "choices": []}, "saved.jsonl: expected traces, found none"),
])
def test_bad_saved_replies(run, record, message):
    Path("saved.jsonl").write_text(json.dumps(record))
    status, _, err = run("saved.jsonl", "--problems", "problems.jsonl")
    assert status == 1 and re.search(message, err) and err.count("\n") == 1
    status, _, err = run("saved.jsonl")
    assert status == 1 and re.search("is no problem of --problems|logprobs", err)

@pytest.mark.parametrize(("flags", "message"), [
    ("", "expected a file of traces, or --server"),
    ("traces.jsonl --server http://x/v1", "expected a file of traces, or --server"),
    ("--server http://x/v1", "expected a file of traces, or --server and --problems"),
    ("--server x --problems problems.jsonl", "expected http://HOST:PORT/v1"),
    ("--server http://x/v1 --problems problems.jsonl --eta 0", "eta: 0.0, expected"),
    ("--server http://x/v1 --problems problems.jsonl --tau 95", "tau: 95.0, expected a share"),
    ("--server http://x/v1 --problems problems.jsonl --warm-up 0", "n_init: 0, expected"),
    ("--server http://x/v1 --problems problems.jsonl --concurrency 0", "batch: 0, expected"),
    ("--server http://x/v1 --problems problems.jsonl --max-tokens 0", "max_new_tokens 0 is below 1"),
    ("--server http://x/v1 --problems problems.jsonl --top-logprobs 0", "top_logprobs above 0"),
    ("--server http://x/v1 --problems tests.jsonl", "line 1: tests decide"),
    ("--server http://x/v1 --problems none.jsonl", "none.jsonl"),
    ("--serve http://x/v1", "--serve"),
])
def test_flags_that_make_no_sense(run, flags, message):
    code = {"id": "c", "domain": "code", "prompt": "f", "tests": [{"input": "1", "output": "1"}]}
    Path("tests.jsonl").write_text(json.dumps(code))
    status, _, err = run(*flags.split())
    assert status == 1 and message in err and err.count("\n") == 1

@pytest.mark.parametrize(("text", "answer"), [
    (r"\boxed{1} or \boxed{\frac{\sqrt{3}}{2}}.", r"\frac{\sqrt{3}}{2}"), (r"\boxed{ 7 }", "7"),
    ("7", None), (r"\boxed{}", None), (r"\boxed{7", None), (r"<think>\boxed{7}", None),
    (r"<think>\boxed{7}</think>none", None), (r"<think>\boxed{7}</think>\boxed{8}", "8")])
def test_answers_alone(text, answer):
    assert d.Alone.extract_answer(text) == answer == rewards.extract_answer(text)

def test_alone_it_samples_and_compares_word_for_word(serve, run, tmp_path):
    shutil.copy(d.__file__, tmp_path)
    server = serve(responder())
    def alone(*flags):
        start = "import sys; sys.path.insert(0, '.'); import deepconf; sys.exit(deepconf.main())"
        return subprocess.run([sys.executable, "-I", "-c", start, *flags], capture_output=True, text=True)
    Path("brief.txt").write_text("Be brief.\n")
    done = alone("--server", server.url, *SETTINGS[:-1], "brief.txt")
    assert done.returncode == 0, done.stderr
    assert server.requests[-1][1]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "| DeepConf online | 66.7 |" in done.stdout  # \frac12 is not 0.5, word for word
    done = alone("traces.jsonl")
    assert done.returncode == 1 and "expected complete traces" in done.stderr
    Path("saved.jsonl").write_text(json.dumps({"choices": [SAVED, SAVED, WRONG]}))
    done = alone("saved.jsonl", "--problems", "problems.jsonl", "--window", "2")
    assert "| majority | 100.0 | - | 1.00 | 1 | 0 |" in done.stdout
    choice = {"id": "c", "prompt": "x or y?", "answer": "B", "extra": {"choices": ["x", "y"]}}
    Path("problems.jsonl").write_text(json.dumps(choice))
    letter = SAVED | {"message": {"content": r"\boxed{B}"}}
    Path("saved.jsonl").write_text(json.dumps({"choices": [letter, letter, WRONG]}))
    done = alone("saved.jsonl", "--problems", "problems.jsonl", "--window", "2")
    assert "| majority | 100.0 | - | 1.00 | 1 | 0 |" in done.stdout, done.stderr
