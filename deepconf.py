"""DeepConf (arXiv 2508.15260): many traces of one problem, weighted, filtered and stopped by confidence.

    python deepconf.py runs/tiny/eval/traces.jsonl          # every method on recorded traces, without a model
    python deepconf.py replies.jsonl --problems FILE        # the same on replies that a server's client saved
    python deepconf.py --server http://localhost:8000/v1 --model NAME --problems FILE --out traces.jsonl

The last one samples from vLLM, SGLang, llama-server or OpenAI, and stops a trace by closing its connection.
All the server needs is log-probabilities in its stream, of the 20 most likely tokens, before any tempering.

Terms
    token confidence   C_i = -mean log P over the k = 20 most likely tokens; the more peaked, the higher
    group              the last `window` tokens at some position; groups overlap; a shorter trace is one group
    eta                the percentage KEPT: 10 is DeepConf-LOW, 90 is DeepConf-HIGH
    warm-up            the first n_init traces, run to the end; s is a percentile of their lowest groups
    consensus          the best answer's share of the votes has reached tau: nothing more is sampled

Differences from the authors' public code, which strays from their paper: the consensus stop is there; votes
are weighted; stopping and voting use one number, so a stopped trace never votes; nothing is generated after
the stop; answers are compared by equivalence; a confidence that is not finite is an error.

Choices that the paper leaves open
    short traces   A trace shorter than the window is one group, known only at its end. It is never stopped,
                   and votes if its mean reaches s. So a window longer than most traces stops hardly any.
    ties           A group within TIE of s counts as reaching it: identical traces pass their own threshold.
                   A server's noise is larger (SERVER_TIE): the same text comes back with other confidences.
    no answer      Such a trace counts in no percentile. Loops are confident: two among 16 warm-up traces
                   would set a threshold that silences the other 14, and nobody would vote.
    no voter       The paper's algorithm would return nothing. Here, if no warm-up trace has an answer, no
                   trace is stopped and all vote; if all voters have confidence 0, each has one vote.

To copy this, take this file alone; it needs numpy. With data.py, tokenizer.py, rewards.py and sandbox.py
beside it, it reads more shapes of problems and compares answers by value; alone, word for word.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import math
import os
import queue
import re
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

# 1. Confidence of tokens, groups and traces -----------------------------------------------------------------

def _finite(values, name):
    """values as float64 (t,). Raises ValueError if there are none, or if one is not a finite number."""
    try:
        values = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}: expected a list of numbers") from None
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name}: shape {values.shape}, expected (t,) with t >= 1")
    for i in np.flatnonzero(~np.isfinite(values)):
        raise ValueError(f"{name}: value {i} is {values[i]}, not finite")
    return values

def token_confidence(top_logprobs):
    """top_logprobs (t, k): log P of the k most likely tokens per step, untempered -> (t,) nats. Eq. 2."""
    top = np.asarray(top_logprobs, np.float64)
    if top.ndim != 2 or not top.shape[1] or not np.isfinite(top).all():
        raise ValueError(f"top_logprobs: shape {top.shape}, expected (t, k) finite numbers with k >= 1")
    return -top.mean(1)

def group_confidence(conf, window):
    """conf (t,) -> means of `window` consecutive tokens, (t - window + 1,); a shorter trace has one mean."""
    conf = _finite(conf, "conf")
    if window < 1:
        raise ValueError(f"window: {window}, expected at least 1")
    if len(conf) <= window:
        return conf.mean(keepdims=True)
    totals = np.concatenate([[0.0], conf.cumsum()])
    return (totals[window:] - totals[:-window]) / window

def lowest_group(conf, window):
    """The weakest moment of a trace; the measure that online DeepConf stops and votes by."""
    return float(group_confidence(conf, window).min())

def bottom_groups(conf, window, fraction=0.1):
    """Mean of the max(1, int(fraction * groups)) lowest groups."""
    groups = np.sort(group_confidence(conf, window))
    return float(groups[: max(1, int(fraction * len(groups)))].mean())

def tail(conf, tokens):
    """Mean of the last `tokens` tokens, which are the last group of that size."""
    return float(group_confidence(conf, tokens)[-1])

def mean(conf):
    """Mean over all tokens."""
    return float(_finite(conf, "conf").mean())

MEASURES = {"lowest": lowest_group, "bottom": bottom_groups, "tail": tail, "mean": lambda conf, _: mean(conf)}

# 2. Votes and filters ---------------------------------------------------------------------------------------
# Nats. Far below any meaningful difference; above what a confidence changes by in float32 when a trace is
# sampled in another batch, as after an interruption (8e-6 at 12 nats, on a CPU).
TIE = 1e-5

def vote(answers, weights=None, same=None):
    """Weighted vote -> (answer, its share of all weight); (None, 0.0) when nobody votes.

    answers: None abstains. weights: not negative; 1 each if None, or if every voter's weight is 0.
    same(a, b): whether two answers are equivalent (default ==); need not be symmetric or transitive. Answers
    join the first group whose first member they match; that member names the group. Ties, up to TIE: the
    first group wins, whatever order the weights were added in."""
    weights = np.ones(len(answers)) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (len(answers),) or not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(f"weights: {weights}, expected {len(answers)} finite numbers that are not negative")
    votes = [(answer, float(weight)) for answer, weight in zip(answers, weights) if answer is not None]
    if not votes:
        return None, 0.0
    if not any(weight for _, weight in votes):
        votes = [(answer, 1.0) for answer, _ in votes]
    # Equal answers share a sum. Where sums tie, the group that came first wins.
    sums = {}  # first answer of a group -> weight of the group
    for answer, weight in votes:
        group = next((first for first in sums if first == answer or same and same(answer, first)), answer)
        sums[group] = sums.get(group, 0.0) + weight
    most = max(sums.values())
    best = next(answer for answer, total in sums.items() if total >= most - TIE)
    return best, sums[best] / sum(sums.values())

def stop_threshold(lowest, eta):
    """s = percentile 100 - eta of the warm-up traces' lowest groups, by linear interpolation."""
    if not 0 < eta <= 100:
        raise ValueError(f"eta: {eta}, expected the percentage kept, above 0 and up to 100")
    return float(np.percentile(_finite(lowest, "lowest"), 100 - eta))

def keep_top(conf, eta, tie=TIE):
    """conf (traces,) -> mask (traces,) of the traces at or above the percentile; ties are kept."""
    return np.asarray(conf, np.float64) >= stop_threshold(conf, eta) - tie

def filtered_vote(answers, conf, eta=10, same=None, tie=TIE):
    """Of the answered traces the eta percent most confident vote, weighted by confidence -> (answer, share).

    answers: None for a trace without one; it is not ranked. Without any answer nobody votes: (None, 0.0).
    conf (traces,): a confidence of each trace. eta 100 filters nothing."""
    answered = np.array([answer is not None for answer in answers], bool)
    if not answered.any():
        return None, 0.0
    conf = np.asarray(conf, np.float64)
    keep = np.flatnonzero(answered)[keep_top(conf[answered], eta, tie)]
    return vote([answers[i] for i in keep], conf[keep], same)

def offline(traces, *, eta=10, window=2048, measure=lowest_group, same=None, tie=TIE):
    """filtered_vote of objects with .answer and .confidences. measure(conf, window) -> float."""
    conf = [measure(t.confidences, window) if t.answer is not None else 0.0 for t in traces]
    return filtered_vote([t.answer for t in traces], conf, eta, same, tie)

def majority_at(traces, tokens, same=None):
    """Unweighted vote of the first traces that fit a token budget, at least one -> (answer, tokens).

    traces: objects with .answer and .tokens, the number of tokens."""
    used = np.cumsum([t.tokens for t in traces])
    voters = max(1, int(np.searchsorted(used, tokens, side="right")))
    return vote([t.answer for t in traces[:voters]], same=same)[0], int(used[voters - 1])

# 3. Online: decide while sampling (Algorithm 2) -------------------------------------------------------------

GO, WAIT, DONE = "go", "wait", "done"  # what Online.admit answers; model.generate understands it

@dataclass
class _Progress:
    """What Online knows of one trace."""
    last: deque = field(default_factory=deque)  # confidences in the window
    total: float = 0.0  # their running sum; its accumulated rounding error stays far below TIE
    tokens: int = 0
    lowest: float = math.inf  # over the full windows so far; inf before the first
    ended: bool = False
    answer: object = None

@dataclass
class Online:
    """Online DeepConf for one problem, as a state machine that the sampler drives.

    The sampler asks admit() before it starts a trace, reports each token to on_token(), which may stop the
    trace, and each end to finish(). Decisions depend on the traces' confidences and answers alone, not on
    when or in what order they run."""
    budget: int  # traces at most
    _: KW_ONLY
    n_init: int = 16  # warm-up traces
    eta: float = 10  # percentage kept
    window: int = 2048  # tokens per group
    tau: float | None = 0.95  # share of the votes that is a consensus; None: sample the whole budget
    batch: int = 1  # traces that start together after warm-up; consensus is checked between batches
    same: Callable | None = None  # equality of answers, as in vote
    tie: float = TIE  # nats below s that still reach it

    def __post_init__(self):
        for name in ("n_init", "window", "batch", "budget"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 1")
        if self.tau is not None and not 0 <= self.tau <= 1:
            raise ValueError(f"tau: {self.tau}, expected a share of the votes, 0 to 1")
        stop_threshold([0.0], self.eta)  # checks eta
        self.n_init = min(self.n_init, self.budget)
        self.traces = [_Progress() for _ in range(self.budget)]
        self.threshold = None  # s, once warm-up is over; -inf, which stops nothing, if it brought no answer
        self.finished = False

    def admit(self, index):
        """May trace `index` start? GO, WAIT (until the running ones have ended) or DONE. Ask in order."""
        if self.finished or index >= self.budget:
            return DONE
        if not self.traces[index].ended:
            self.traces[index] = _Progress()  # if its connection broke: its tokens are void, it starts anew
        if index >= self.n_init and (index - self.n_init) % self.batch == 0:  # the first of a batch
            if not all(trace.ended for trace in self.traces[:index]):
                return WAIT
            answer, share = self.result(index)  # others of its batch may have ended before a restart
            self.finished = self.tau is not None and answer is not None and share >= self.tau - TIE
        return DONE if self.finished else GO

    def reaches(self, trace):
        """One condition for stopping and voting, so that stopped traces do not vote."""
        return trace.lowest >= self.threshold - self.tie

    def on_token(self, index, confidence):
        """Record one token's confidence. True: stop the trace now. Warm-up traces are never stopped."""
        if not math.isfinite(confidence):
            raise ValueError(f"trace {index}: token confidence is {confidence}, not finite")
        confidence = float(confidence)  # sums of NumPy's float32 would stay float32
        trace = self.traces[index]
        trace.last.append(confidence)
        trace.total += confidence
        trace.tokens += 1
        if len(trace.last) > self.window:
            trace.total -= trace.last.popleft()
        if len(trace.last) == self.window:
            trace.lowest = min(trace.lowest, trace.total / self.window)
        return index >= self.n_init and self.threshold is not None and not self.reaches(trace)

    def finish(self, index, answer):
        """Trace `index` has ended. answer: None if it has none; that of a stopped trace does not matter."""
        trace = self.traces[index]
        if not trace.tokens:
            raise ValueError(f"trace {index}: it ended without a token; on_token must see each token first")
        if trace.tokens < self.window:  # short: one group
            trace.lowest = trace.total / trace.tokens
        trace.last.clear()  # a window of 2048 numbers takes 80 KB, for each of thousands of traces
        trace.ended = True
        trace.answer = answer
        # The last warm-up trace to end sets s.
        warm_up = self.traces[: self.n_init]
        if self.threshold is None and all(t.ended for t in warm_up):
            lowest = [t.lowest for t in warm_up if t.answer is not None]
            self.threshold = stop_threshold(lowest, self.eta) if lowest else -math.inf

    def record(self, index, confidences, answer):
        """Take a recorded trace, up to where it would be stopped."""
        stopped = any(self.on_token(index, confidence) for confidence in confidences)
        self.finish(index, None if stopped else answer)

    def result(self, first=None):
        """(answer, share): ended traces that reach s vote with their lowest group; (None, 0.0) in warm-up.
        first: only so many traces, from the first on, may vote."""
        if self.threshold is None:
            return None, 0.0
        voters = [t for t in self.traces[:first] if t.ended and self.reaches(t)]
        return vote([t.answer for t in voters], [max(t.lowest, 0.0) for t in voters], self.same)

    @property
    def tokens(self):
        """All generated tokens: of warm-up, complete and stopped traces."""
        return sum(t.tokens for t in self.traces)

def online(sample, budget, **settings):
    """Run online DeepConf, one trace after another -> the Online (.result(), .tokens, .threshold).

    sample(index, stop) generates trace `index`, calls stop(confidence) after each token, ends at once if that
    is True, and returns the answer, or None. settings: those of Online."""
    machine = Online(budget, **settings)
    for index in range(budget):
        if machine.admit(index) == DONE:
            break
        machine.finish(index, sample(index, partial(machine.on_token, index)))
    return machine

def replay(traces, **settings):
    """`online` on recorded complete traces: each is cut where it would have been stopped."""
    def sample(index, stop):
        return None if any(map(stop, traces[index].confidences)) else traces[index].answer
    return online(sample, len(traces), **settings)

# 4. Scores --------------------------------------------------------------------------------------------------

def is_right(answer, traces, same=None):
    """Whether a voted answer is right: whether any trace that gave it is; None if none of those is judged.

    Traces that gave it word for word come first. Those with a `same` answer count only if no verdict on the
    former is known: `same` need not be transitive, as 50 is 50% and 50% is 0.5, but 50 is not 0.5."""
    if answer is None:  # nobody voted
        return False
    known = [t for t in traces if t.correct is not None and t.answer is not None]
    verdicts = [t.correct for t in known if t.answer == answer]
    if not verdicts and same:
        verdicts = [t.correct for t in known if same(t.answer, answer)]
    return any(verdicts) if verdicts else None

def mean_and_stderr(scores):
    """Mean of the m scores that are not None, and its standard error. None: m is 0, or for the error 1."""
    known = [score for score in scores if score is not None]
    m = len(known)
    center = math.fsum(known) / m if m else None
    if m < 2:
        return center, None
    return center, math.sqrt(math.fsum((x - center) ** 2 for x in known) / (m - 1) / m)

def _mean(values):
    """NaN for no values, without NumPy's warning."""
    return float(np.mean(values)) if len(values) else math.nan

def calibration_sentence(pairs):
    """Whether confidence separates right traces from wrong ones; if not, no vote weighted by it can gain.

    pairs: (correct, lowest group) per trace. AUROC: the chance that a right trace's group is above a wrong
    one's; ties count half."""
    right = np.array([lowest for correct, lowest in pairs if correct is True])
    wrong = [lowest for correct, lowest in pairs if correct is False]
    auroc = _mean([_mean(right > w) + _mean(right == w) / 2 for w in wrong])
    return (f"lowest group against correctness: AUROC {auroc:.3f}, "
            f"mean of right traces {_mean(right):.3f}, of wrong ones {_mean(wrong):.3f}")

def percent(share):
    """A share for a table."""
    return "-" if share is None else f"{100 * share:.1f}"

# 5. Traces from any server ----------------------------------------------------------------------------------
# A server streams a reply as events, each with a token or several and the log-probabilities of alternatives.
# Each running trace has a thread and a connection. To close that is the only way to stop a reply that every
# server has, and it frees the server's slot at once.

SERVER_TIE = 0.01  # nats, for Online.tie: what bfloat16 in another batch may change in a group's confidence
FLOOR = -100.0  # nats; servers write log 0 as -9999 or -3.4e38, and one such number in a mean decides a vote

# Where a choice keeps its tokens, and where a token keeps its alternatives ("": it is {text: alternative}).
READERS = (
    (("logprobs", "content"), "top_logprobs"),  # chat everywhere; completions of llama-server
    (("logprobs", "content"), "top_probs"),  # llama-server with post_sampling_probs
    (("logprobs", "top_logprobs"), ""),  # completions of OpenAI, vLLM, SGLang
    (("completion_probabilities",), "top_logprobs"),  # llama-server's own /completion
    (("completion_probabilities",), "top_probs"),
    (("completion_probabilities",), "probs"),  # llama-server until 2024
    (("logprobs",), ""))  # vLLM's Python objects: [{token id: {"logprob": -0.1, "rank": 1}}]
RAW = "vLLM: --logprobs-mode raw_logprobs; llama-server: post_sampling_probs off"
# What a server's answer mentions, and the option that helps; the first row that fits.
HINTS = {
    "context|too long|maximum length": "vLLM: --max-model-len; llama-server: -c; or fewer tokens per trace",
    "logprob": "vLLM: --max-logprobs 20; llama-server needs nothing; transformers serve has none",
    "api.?key|auth": "set OPENAI_API_KEY",
    "http 429|http 503|timed out|no token": "fewer traces at a time, or wait until it is up",
    "errno": "is it up, at this address and port?",
    "": "--server ends in /v1 as a rule; its /models lists the names of its models"}
# What may be wrong with parsed JSON that is not as expected.
MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)

def read_confidence(top, k, say):
    """Token confidence of one token's alternatives, as servers send them.
    top: numbers, or objects with "logprob" or "prob", in a list or as values of a dict. k: how many count.
    say(text): told if there are fewer, or if they were tempered. Raises ValueError unless they are log P."""
    top = list(top.values() if isinstance(top, dict) else top)
    if top and isinstance(top[0], dict):
        if "prob" in top[0]:
            say(f"sends probabilities as they are after tempering and cuts; switch that off ({RAW})")
        top = [x["logprob"] if "logprob" in x else math.log(x["prob"] or 1e-99) for x in top]
    # max(x, FLOOR) keeps NaN. vLLM sends k + 1 if the sampled token is not among the k most likely.
    top = sorted((max(x, FLOOR) for x in top), reverse=True)[:k]
    if not top or math.isnan(sum(top)) or top[0] > 1e-3:
        raise ValueError(f"logprobs that are missing, NaN or positive: {top[:3]}; {RAW}")
    if len(top) < k:
        say(f"sends {len(top)} alternatives per token and not {k}: confidence is over these")
    return float(np.float32(token_confidence([top])[0]))  # files hold the 9 digits that identify a float32

def read_choice(choice, k, say):
    """A chunk of a stream, or a saved reply -> (reasoning, text, confidences, why it ended or None).

    It may have no token, one or several. k and say: see read_confidence."""
    said = choice.get("delta") or choice.get("message") or choice
    thought = said.get("reasoning_content") or said.get("reasoning") or ""
    text = said.get("content") or said.get("text") or ""
    if not (isinstance(thought, str) and isinstance(text, str)):
        raise ValueError("content: expected a text")
    end = choice.get("finish_reason")
    if choice.get("stop") is True:  # llama-server's own
        end = "length" if choice.get("stop_type") == "limit" else "stop"
    # The first reader that finds tokens is the server's.
    for path, name in READERS:
        tokens = choice
        for key in path:
            tokens = tokens.get(key) if isinstance(tokens, dict) else None
        # A token without alternatives, the first of an echoed prompt, is none of the reply's.
        if isinstance(tokens, list) and tokens and (not name or name in tokens[0]):
            return thought, text, [read_confidence(t[name] if name else t, k, say) for t in tokens if t], end
    return thought, text, [], end

def join_reply(pieces):
    """Pairs (reasoning, text) as one text, the way a model writes it: reasoning first.

    An answer within reasoning that did not end does not count, hence no </think> before an empty text."""
    thought, text = map("".join, zip(*pieces))
    if thought:
        text = f"<think>{thought}" + (f"</think>{text}" if text else "")
    text = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)  # half of a surrogate pair is no character
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

@dataclass
class Server:
    """An endpoint that speaks OpenAI's API. What it refuses is left out of further requests; what it does
    otherwise than DeepConf needs is said once."""
    url: str  # http://localhost:8000/v1; what follows the version is left off
    model: str
    key: str = field(default_factory=lambda: os.environ.get("OPENAI_API_KEY", ""), repr=False)
    top_logprobs: int = 20  # alternatives to ask for; lowered if the server refuses so many
    timeout: float = 600.0  # seconds without a token
    retries: int = 5  # after a broken connection, HTTP 429 or 5xx
    wait: float = 1.0  # seconds before the first retry, doubled each time

    def __post_init__(self):
        if not re.match("https?://[^/]", self.url) or self.top_logprobs < 1:
            raise ValueError(f"server {self.url}: expected http://HOST:PORT/v1, and top_logprobs above 0")
        self.url = re.sub("((/chat)?/completions)?/*$", "", self.url)
        # llama-server has a top-k and min-p of its own, vLLM those of generation_config.json. The third keeps
        # alternatives of equal text apart. All are left out if the server refuses one.
        self.extra = {"top_k": -1, "min_p": 0.0, "return_tokens_as_token_ids": True}
        self.say = lru_cache(partial(print, self.url, file=sys.stderr))  # the cache says everything once
        self.reached = None  # whether it has answered; None: it was not asked

    def error(self, said):
        """The ValueError for an answer: one line, the server's own words first, then what helps."""
        hint = next(hint for words, hint in HINTS.items() if re.search(words, said.lower()))
        return ValueError(f"{self.url}: {' '.join(said.split())[:200]} ({hint})")

    def refusal(self, status, said, pause=""):
        """The exception for an answer that is no reply: a ConnectionError if another request may succeed.

        What the server says it refuses is asked for no more: so many alternatives, or fields that OpenAI's
        API does not have. pause: the header Retry-After, in seconds."""
        again = ConnectionError(f"HTTP {status} {said}")
        fewer = [int(n) for n in re.findall(r"\d+", said) if 0 < int(n) < self.top_logprobs]
        if status in (408, 429) or status >= 500:
            again.pause = min(float(pause), self.timeout) if pause.isdigit() else 0.0
        elif status in (400, 422) and "logprob" in said and fewer:  # "Expected a value <= 5, but got 20"
            self.top_logprobs = max(fewer)
            self.say(f"allows {self.top_logprobs} alternatives per token: confidence is over these")
        elif status in (400, 422) and any(name in said for name in self.extra):
            self.extra = {}
        else:
            return self.error(f"HTTP {status} {said}")
        return again

    def send(self, prompt, settings):
        """Send a request -> its connection."""
        # Chat and plain completions ask for alternatives in two ways.
        path = "/completions"
        asked = {"prompt": prompt, "logprobs": self.top_logprobs}
        if not isinstance(prompt, str):
            path = "/chat/completions"
            asked = {"messages": prompt, "logprobs": True, "top_logprobs": self.top_logprobs}
        body = json.dumps({"model": self.model, "stream": True, **asked, **settings, **self.extra})
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key.strip()}"
        scheme, _, host, *folders = self.url.split("/")
        kind = http.client.HTTPSConnection if scheme == "https:" else http.client.HTTPConnection
        connection = kind(host, timeout=self.timeout)
        connection.request("POST", "/".join(["", *folders]) + path, body, headers)
        return connection

    def events(self, prompt, settings):
        """Generator of read_choice() of each event of a reply. Closing it closes the connection."""
        with contextlib.closing(self.send(prompt, settings)) as connection:
            response = connection.getresponse()
            self.reached = True
            if response.status != 200:
                said = response.read(10_000).decode("utf-8", "replace")
                raise self.refusal(response.status, said, response.headers.get("Retry-After", ""))
            heard = time.monotonic()
            line = b""
            for line in response:
                # Other lines are empty, or comments that keep the connection alive.
                if line.startswith((b"data:", b"error:")):
                    event = self.read(line.partition(b":")[2].strip())
                    heard = time.monotonic() if event[2] else heard
                    if event[3] in ("abort", "error"):  # vLLM and SGLang, as when they shut down
                        raise ConnectionError(f"it gave up: finish_reason {event[3]}")
                    yield event
                if time.monotonic() > heard + self.timeout:
                    raise TimeoutError(f"no token for {self.timeout:g} seconds")
            raise ConnectionError(f"the stream broke off after {line[:200]}")

    def read(self, value):
        """read_choice() of an event."""
        if value == b"[DONE]":
            return "", "", [], "stop"
        # A character may be cut between two events: join_reply() mends it.
        chunk = json.loads(value.decode("utf-8", "surrogateescape"))
        try:
            error = chunk.get("error") or "code" in chunk and chunk
            if not error:
                # The chunk that counts tokens has no choices. Those of llama-server's own API are the choice.
                return read_choice((chunk.get("choices") or [chunk])[0], self.top_logprobs, self.say)
        except MALFORMED as problem:
            raise self.error(str(problem)) from None
        status = error.get("code") if isinstance(error, dict) else None
        raise self.refusal(status if isinstance(status, int) else 500, json.dumps(error))

    def stream(self, prompt, settings, sleep):
        """events(), anew after a failure that may pass: then it first yields None, as what came is void."""
        for attempt in range(self.retries + 1):
            try:
                yield from self.events(prompt, settings)
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                # A server that never answered is down, or its address is wrong.
                if attempt == self.retries or not self.reached:
                    raise self.error(str(error) or repr(error)) from None
                sleep(max(getattr(error, "pause", 0.0), self.wait * 2**attempt))
            yield None

@dataclass
class Trace:
    """One sampled reply of len(confidences) tokens. Tokens without an entry are not counted: llama-server has
    none for the stop token and for a token that ends inside a character."""
    prompt_index: int
    sample_index: int
    text: str = ""  # once it has ended; with the reasoning, in <think></think> if the server sends it apart
    confidences: list = field(default_factory=list)  # float32 numbers
    stop: str = ""  # "stop" | "length" | "deepconf" (the callback said so)

def generate(server, prompts, *, max_new_tokens, temperature=1.0, top_p=1.0, samples=1, slots=16, admit=None,
             on_token=None, on_trace=None, progress=0):
    """Sample `samples` traces of each prompt from a Server: model.generate, for a model that runs elsewhere.

    prompts: lists of messages {"role", "content"} for chat; texts for plain completions.
    slots: traces that run together.
    admit(prompt_index, sample_index) is called in sample order, before a trace starts. It answers "go",
        "wait" (ask again when a trace has ended), "skip" (not this trace) or "done" (no further trace of this
        prompt). It is asked again before a trace whose connection broke starts anew.
    on_token(trace) is called after each token, in the trace's thread; True stops the trace.
    on_trace(trace) is called at its end. One callback runs at a time.
    progress: traces to expect, for a line that counts them on a terminal; 0: none.
    Returns a list of Trace, by prompt, then by sample. Raises ValueError, see Server.error."""
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens {max_new_tokens} is below 1")
    # Once per server. The longest prompt shows best whether the context takes it.
    if prompts and server.reached is None:
        server.reached = False
        probe(server, max(prompts, key=lambda prompt: len(str(prompt))), max_new_tokens)
    settings = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    run = _Run(server, prompts, settings, admit or (lambda prompt, sample: GO), on_token)
    waiting = dict.fromkeys(range(len(prompts)), 0)
    running = 0
    ended = []
    try:
        while True:
            # Fill free slots. A daemon thread does not hold up the interpreter's exit after Ctrl-C.
            with run.lock:
                while running < slots and (trace := next_trace(waiting, samples, run.admit)):
                    threading.Thread(target=run.follow, args=(trace,), daemon=True).start()
                    running += 1
            if not running:
                break
            # Sleep until a trace has ended; its end may admit others.
            trace, error = run.finished.get()
            running -= 1
            if error:
                raise error
            if trace.stop:
                ended.append(trace)
                if on_trace:
                    with run.lock:
                        on_trace(trace)
                if progress and sys.stderr.isatty():
                    print(f"\r{len(ended)} of {progress} traces ", end="", file=sys.stderr, flush=True)
    finally:
        run.halt.set()  # threads that still run close their connections at their next token
    if waiting:
        raise RuntimeError(f"generate: prompt {min(waiting)} waits to be admitted, but nothing runs")
    return sorted(ended, key=lambda trace: (trace.prompt_index, trace.sample_index))

def probe(server, prompt, max_new_tokens):
    """Sample a token at two temperatures, to learn before any work whether the server is there, knows the
    model, takes so long a prompt, sends log-probabilities, and sends those of the untempered distribution."""
    usual, cold = (generate(server, [prompt], max_new_tokens=max_new_tokens, temperature=temperature,
                            on_token=lambda trace: True)[0].confidences[0] for temperature in (1.0, 0.5))
    # Half the temperature doubles the distances between logits. An empty reply has confidence 0.
    # Noise changes it by thousandths.
    if usual and cold and abs(cold - usual) > 0.1 * usual:
        server.say(f"sends log-probabilities as they are after tempering; switch that off ({RAW})")

def next_trace(waiting, samples, admit):
    """The next trace that may start, or None. Prompts that wait are passed over, and asked again next time.

    waiting: {prompt index: its next sample}, which this brings up to date."""
    for i, sample in list(waiting.items()):
        verdict = "skip"
        while verdict == "skip":
            verdict = admit(i, sample) if sample < samples else DONE
            sample += verdict in ("skip", GO)
        waiting[i] = sample
        if verdict == DONE:
            del waiting[i]
        if verdict == GO:
            return Trace(i, sample - 1)

@dataclass
class _Run:
    """What the threads of generate() share: the main one starts traces and hears of their ends; each trace
    has its own, which sleeps in a read of its connection. Callbacks hold the lock."""
    server: Server
    prompts: list
    settings: dict
    admit: Callable
    on_token: Callable | None
    lock: threading.Lock = field(default_factory=threading.Lock)
    halt: threading.Event = field(default_factory=threading.Event)  # all are to end
    finished: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)  # (trace, its error or None)

    def follow(self, trace):
        """A thread: take what comes for a trace until it ends. Without .stop: admit or `halt` gave it up."""
        pieces = []
        prompt = self.prompts[trace.prompt_index]
        try:
            # A pause before another try ends at once if everything ends.
            with contextlib.closing(self.server.stream(prompt, self.settings, self.halt.wait)) as events:
                for event in events:
                    with self.lock:
                        if self.halt.is_set() or self.take(trace, pieces, event):
                            break
            trace.text = join_reply(pieces) if trace.stop else ""
            self.finished.put((trace, None))
        except BaseException as error:  # of callbacks, too: the main thread raises it
            self.finished.put((trace, error))

    def take(self, trace, pieces, event):
        """Add an event to its trace, and its text to the pieces. True: the trace ends here."""
        if event is None:  # its connection broke: what came is void, for the callbacks too
            pieces.clear()
            trace.confidences.clear()
            return self.admit(trace.prompt_index, trace.sample_index) != GO
        thought, text, confidences, end = event
        pieces.append((thought, text))
        # The first events may hold no token: a role, or text that the server still holds back.
        if not confidences and not trace.confidences:
            text = join_reply(pieces)
            if text and (end or len(text) > 1000):
                raise self.server.error("its replies hold no logprobs")
            confidences = [0.0] if end else []  # an empty reply: its stop token has no entry
        for confidence in confidences:
            trace.confidences.append(confidence)
            if self.on_token and self.on_token(trace):
                end = "deepconf"
                break
            if len(trace.confidences) == self.settings["max_tokens"]:  # not every server counts them
                end = end or "length"
                break
        # Other words for an end are "tool_calls", "eos", and whatever a server makes up.
        if end:
            trace.stop = end if end in ("length", "deepconf") else "stop"
        return bool(end)

# 6. Files of traces -----------------------------------------------------------------------------------------
# One trace per line, as eval.py writes it too, with at least these fields. A server's have `tie` and `run`
# as well; `run` marks those that were sampled with the same settings.

FIELDS = {"problem": str, "sample": int, "answer": str | None, "correct": bool | None, "confidences": list}

def check_trace(record, where, fields=FIELDS):
    """Raise ValueError, naming line and field, unless a record has these fields and finite confidences."""
    for name, kind in fields.items():
        if not isinstance(record.get(name, ...), kind):
            raise ValueError(f"{where}: field {name}: missing or not {getattr(kind, '__name__', kind)}")
    if "confidences" in fields:
        _finite(record["confidences"], f"{where}: field confidences")

def to_trace(record, **changes):
    """A record as an object, as the votes above take it."""
    return SimpleNamespace(**record | {"tokens": len(record["confidences"])} | changes)

def to_traces(records, make=to_trace):
    """{problem: its traces in sample order} from the lines of a traces.jsonl, of complete traces.

    records: (where, dict) pairs as data.read_records yields them. make: dict -> trace."""
    problems = {}
    for where, record in records:
        check_trace(record, where)
        traces = problems.setdefault(record["problem"], {})
        if record.get("stop") == "deepconf" or record["sample"] in traces:
            raise ValueError(f"{where}: fields problem, sample, stop: expected complete traces, each once")
        traces[record["sample"]] = make(record)
    return {name: [traces[i] for i in sorted(traces)] for name, traces in problems.items()}

def to_record(problem, trace, rewards):
    """A line of traces.jsonl: a reply, its answer (to choices a letter), and whether it is right.
    problem: with id, domain, answer and extra, as data.Problem. rewards: the module, or Alone.
    `tie` says that confidences carry a server's noise."""
    answer = rewards.extract_answer(trace.text)
    choices = problem.extra.get("choices")
    choice = rewards.chosen(answer, choices) if answer and choices else None
    correct = bool(rewards.is_right(answer, problem))
    answer = answer if choice is None else rewards.LETTERS[choice]
    return {"problem": problem.id, "domain": problem.domain, "sample": trace.sample_index,
            "gold": problem.answer, "text": trace.text, "tokens": len(trace.confidences), "answer": answer,
            "correct": correct, "stop": trace.stop, "tie": SERVER_TIE, "confidences": trace.confidences}

def from_choices(records, problems, rewards):
    """Replies that clients of vLLM and OpenAI saved, as lines of a traces.jsonl; such lines stay as they are.
    A record is a completion with "choices", a line of a batch's output, or one choice. Its field problem or
    custom_id names the problem. Without it, the only problem is meant, or the n-th completion is a reply to
    the n-th problem."""
    numbers = itertools.count()  # over all records: the index of a choice starts anew in each
    say = lru_cache(partial(print, "the server", file=sys.stderr))
    for n, (where, record) in enumerate(records):
        if not {"choices", "response", "logprobs", "completion_probabilities"} & record.keys():
            yield where, record
            continue
        try:
            reply = (record.get("response") or {}).get("body") or record
            replies = [read_choice(choice, 20, say) for choice in reply.get("choices", [reply])]
        except MALFORMED as error:
            raise ValueError(f"{where}: field choices or logprobs: {error!r}") from None
        name = record.get("problem") or record.get("custom_id")
        if name is None and (len(problems) == 1 or "choices" in reply and n < len(problems)):
            name = [*problems][n % len(problems)]
        if not isinstance(name, str) or name not in problems:
            raise ValueError(f"{where}: fields problem, custom_id: {name} is no problem of --problems")
        for thought, text, confidences, end in replies:
            trace = Trace(0, next(numbers), join_reply([(thought, text)]), confidences, end or "stop")
            yield where, to_record(problems[name], trace, rewards)

# 7. The commands --------------------------------------------------------------------------------------------
# On complete traces every method can be tried, as in the paper's tables. Sampled with DeepConf online, traces
# are cut where they were stopped: then there is only what the warm-up would have voted to compare with.

def compare(traces, window, same, tie):
    """Yield (method, answer, tokens) for every method on the traces of one problem."""
    everything = sum(t.tokens for t in traces)
    yield "majority", *majority_at(traces, everything, same)
    for eta in (10, 90):
        for name, measure in MEASURES.items():
            answer, _ = offline(traces, eta=eta, window=window, measure=measure, same=same, tie=tie)
            yield f"offline {eta}%, {name}", answer, everything
    for level, eta in (("LOW", 10), ("HIGH", 90)):
        for name, tau in ((f"{level}, no consensus", None), (level, 0.95)):
            machine = replay(traces, eta=eta, window=window, tau=tau, same=same, tie=tie)
            yield f"online {name}", machine.result()[0], machine.tokens
        # What the same money would buy without DeepConf.
        yield f"majority at {level}'s tokens", *majority_at(traces, machine.tokens, same)

def print_table(rows, whole):
    """Print every method's accuracy, over problems whose verdict is known (see is_right), and its cost.
    rows: each problem's traces, `same` and (method, answer, tokens). whole: tokens that are a cost of 1."""
    results = {}  # method: [(verdict, tokens) per problem]
    for traces, same, methods in rows:
        for method, answer, tokens in methods:
            results.setdefault(method, []).append((is_right(answer, traces, same), tokens))
    print("| method | accuracy % | stderr | tokens / majority | problems | unknown |\n" + "| --- " * 6 + "|")
    for method, result in results.items():
        verdicts = [verdict for verdict, _ in result]
        accuracy, stderr = map(percent, mean_and_stderr(verdicts))
        cost = sum(tokens for _, tokens in result) / whole
        unknown = verdicts.count(None)
        print(f"| {method} | {accuracy} | {stderr} | {cost:.2f} | {len(result) - unknown} | {unknown} |")

def show(problems, window, same):
    """Print accuracy and cost of every method on complete traces, and the calibration."""
    everything = sum(problems.values(), [])
    tie = max(getattr(t, "tie", TIE) for t in everything)
    # Programs, whose gold answer is empty, are one vote only if they are the same text.
    votes = [(traces, same if getattr(traces[0], "gold", True) else None) for traces in problems.values()]
    rows = [(traces, same, compare(traces, window, same, tie)) for traces, same in votes]
    print_table(rows, sum(t.tokens for t in everything))
    pairs = [(t.correct, lowest_group(t.confidences, window)) for t in everything]
    print(f"\n{calibration_sentence(pairs)}\ngroups within {tie} nats of a threshold reach it")

def to_prompt(problem, args):
    """Messages for chat; one text for plain completions, if the URL says so."""
    text = f"{problem.prompt}\n{args.suffix}" if args.suffix else problem.prompt
    # An empty system prompt is none: some chat templates put in one of their own.
    turns = [("system", args.system), ("user", text)][not args.system :]
    if re.search("(?<!/chat)/completions/*$", args.server):
        return "\n\n".join(text for _, text in turns)
    return [{"role": role, "content": text} for role, text in turns]

def read_out(file, mark):
    """Yield the records that earlier processes have appended; then cut off the line that a kill left half.

    ValueError, and the file stays as it is, if another process writes to it or if it holds something else."""
    # Two processes would both sample whatever is missing. The lock goes with the process.
    try:
        import fcntl  # Windows has none
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{file.name}: another process writes to it; choose another --out") from None
    except (ImportError, OSError):  # a file system without locks
        pass
    file.seek(0)
    start = f'{{"run": "{mark}", '.encode()
    for number, line in enumerate(file, 1):
        # Half a line may be shorter than this start.
        if not line.startswith(start[: len(line)]):
            raise ValueError(f"{file.name}, line {number}: field run: no trace, or sampled with other "
                             "settings; choose another --out")
        if line.endswith(b"\n"):
            yield json.loads(line)
        else:
            file.truncate(file.tell() - len(line))

def sample_online(args, problems, rewards, same, file):
    """Sample every problem from --server with DeepConf online -> (an Online per problem, the traces of each).

    Each trace is appended to the file when it ends. Those that earlier processes have appended are not
    sampled again, and Online decides as if it had seen them end."""
    server = Server(args.server, args.model, top_logprobs=args.top_logprobs)
    # One problem must keep all slots busy. Many do so together, and may start their traces one by one.
    batch = -(-args.concurrency // len(problems))
    machines = [Online(args.budget, n_init=args.warm_up, eta=args.eta, window=args.window, same=same,
                       batch=batch, tau=args.tau or None, tie=SERVER_TIE) for _ in problems]
    prompts = [to_prompt(problem, args) for problem in problems]
    names = [problem.id for problem in problems]
    # What the traces of one file have in common. A server may move, and how many run together changes none.
    apart = ("out", "concurrency", "server", "problems")
    identity = [{name: value for name, value in vars(args).items() if name not in apart}, prompts,
                names, [problem.answer for problem in problems]]
    mark = f"{zlib.crc32(json.dumps(identity).encode()):08x}"
    # Of ended traces memory holds little: thousands of long texts and lists would take gigabytes.
    ended = [[] for _ in problems]
    light = {"text": "", "confidences": ()}
    begun = time.monotonic()
    # What earlier processes have appended, Online takes as if it saw it now.
    for record in read_out(file, mark):
        i = names.index(record["problem"])
        # Where files have no locks, two processes may have written the same trace: the first one counts.
        if machines[i].traces[record["sample"]].ended:
            continue
        # Decimal digits of a float32 read back as the number that Online saw live.
        machines[i].record(record["sample"], record["confidences"], record["answer"])
        ended[i].append(to_trace(record, **light))
        begun = min(begun, time.monotonic() - record["seconds"])
    # The rest is sampled, with these callbacks.
    def admit(i, sample):
        return "skip" if machines[i].traces[sample].ended else machines[i].admit(sample)

    def on_trace(trace):
        i = trace.prompt_index
        record = {"run": mark, "seconds": round(time.monotonic() - begun, 2)}
        record |= to_record(problems[i], trace, rewards)
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()  # a process that is killed loses what is in its buffers
        machines[i].finish(trace.sample_index, record["answer"])
        ended[i].append(to_trace(record, **light))
        trace.text = trace.confidences = ()  # generate() returns all traces

    generate(server, prompts, max_new_tokens=args.max_tokens, temperature=args.temperature,
             top_p=args.top_p, samples=args.budget, slots=args.concurrency,
             admit=admit, on_trace=on_trace, progress=args.budget * len(problems) - sum(map(len, ended)),
             on_token=lambda t: machines[t.prompt_index].on_token(t.sample_index, t.confidences[-1]))
    return machines, [sorted(group, key=lambda trace: trace.sample) for group in ended]

def report(machines, groups, same):
    """Print what DeepConf online gained over a majority of as many traces as the budget allows."""
    rows = []
    whole = 0.0  # tokens of that majority, if its traces are as long as those of the warm-up
    for machine, traces in zip(machines, groups):
        answer, tokens = majority_at(traces[: machine.n_init], math.inf, same)
        whole += tokens * machine.budget / machine.n_init
        rows.append((traces, same, [("majority of the warm-up", answer, tokens),
                                    ("DeepConf online", machine.result()[0], machine.tokens)]))
    print_table(rows, whole)
    # Seconds are of the slots' wall clock: they fall less than tokens where slots wait for a consensus.
    everything = sum(groups, [])
    tokens = sum(machine.tokens for machine in machines)
    seconds = max(trace.seconds for trace in everything)
    stopped = sum(trace.stop == "deepconf" for trace in everything)
    print(f"\n{len(everything)} traces, {stopped} of them stopped: {tokens:,} tokens in {seconds:,.0f} s\n"
          f"a majority of {machines[0].budget} traces per problem, as long as those of the warm-up: "
          f"{whole:,.0f} tokens, at this rate {seconds * whole / tokens:,.0f} s\n"
          f"groups within {SERVER_TIE} nats of a threshold reach it")

class Alone:
    """data.py and rewards.py in short, where they are missing: answers in boxes, compared word for word."""
    Flags = argparse.ArgumentParser  # prints its usage with an error
    is_equivalent = str.__eq__
    check_scorable = None

    def is_right(answer, problem):
        """Whether they are the same text, which None, no answer, is not."""
        return answer == problem.answer

    def text_or_file(value):
        """The text of a file, if there is one of this name; otherwise the value itself."""
        return Path(value).read_text("utf-8").strip() if os.path.isfile(value) else value

    def extract_answer(text):
        """What the last box after the reasoning holds, up to the brace that closes it; None without one."""
        reply = text.rpartition("</think>")[2].partition("<think>")[0]
        _, box, rest = reply.rpartition(r"\boxed{")
        depth = 1
        for end, char in enumerate(rest if box else ""):
            depth += (char == "{") - (char == "}")
            if depth == 0:
                return rest[:end].strip() or None

    def read_records(path):
        """Yield (where, dict) for each line; of bytes, json takes a byte order mark, as Windows writes."""
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield f"{path}, line {number}", dict(json.loads(line))
                except (ValueError, TypeError, RecursionError):
                    raise ValueError(f"{path}, line {number}: expected a JSON object") from None

    def read_problems(path, check):
        """Only problems of the project's own shape. To choices, the letter is compared as a word."""
        for where, row in Alone.read_records(path):
            check_trace(row, where, {"id": str, "prompt": str, "answer": str})
            extra = {"tests": row.get("tests")}
            yield SimpleNamespace(**{"domain": "math"} | row | {"extra": extra, "where": where})

    def run_main(body):
        """Errors of the user's are one line; others keep their traceback."""
        try:
            return body()
        except (ValueError, OSError) as error:
            return f"error: {error}"  # sys.exit prints it
        except KeyboardInterrupt:
            return "interrupted"

# Name, default (its type is the flag's), and a line for --help.
FLAGS = (
    ("problems", "", "file of problems: what to sample, or what the replies in a file are to"),
    ("server", "", "sample from this URL, http://localhost:8000/v1; ending in /v1/completions: without chat"),
    ("model", "", "its name on the server"),
    ("out", "traces.jsonl", "file to append each trace to, when it ends; a restart samples what is missing"),
    ("budget", 64, "traces per problem at most (the paper: 512)"),
    ("eta", 10.0, "percentage of traces that DeepConf keeps: 10 is LOW, 90 is HIGH"),
    ("warm-up", 16, "traces per problem that always run to their end"),
    ("window", 0, "tokens per group; 0: the paper's 2048 from a server, 16 for a file of short traces"),
    ("tau", 0.95, "share of the votes that ends a problem; 0: never"),
    ("concurrency", 16, "traces that run together"),
    ("temperature", 0.6, "of sampling"),
    ("top-p", 0.95, "sample from the most likely tokens of this total probability"),
    ("max-tokens", 32768, "per trace"),
    ("system", "", "system prompt: a text or the name of a file"),
    ("suffix", "", "instruction to add to every question, on a line of its own"),
    ("top-logprobs", 20, "alternatives per token; fewer where the server gives fewer"))

def main(argv=None):
    """The exit status, or what sys.exit prints. argv: the flags, if not those of this process."""
    try:
        import data
        import rewards
    except ImportError:
        data = rewards = Alone

    def body():
        parser = data.Flags(description=__doc__.partition("\n")[0], allow_abbrev=False)
        parser.add_argument("traces", nargs="?", help="a traces.jsonl of complete traces, or saved replies")
        for name, default, text in FLAGS:
            parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
        args = parser.parse_args(argv)
        if bool(args.traces) == bool(args.server) or args.server and not args.problems:
            raise ValueError("expected a file of traces, or --server and --problems")
        # Both commands share flags; what one does not need, it ignores.
        args.window = args.window or (2048 if args.server else 16)
        args.system = data.text_or_file(args.system)
        problems = [*data.read_problems(args.problems, check=rewards.check_scorable)] if args.problems else []
        by_id = {problem.id: problem for problem in problems}
        if args.problems and len(by_id) != max(1, len(problems)):
            raise ValueError(f"{args.problems}: expected problems, each with an id of its own")
        # An answer can be compared here. To run programs takes a sandbox, which eval.py has.
        for problem in problems:
            if problem.extra.get("tests") or not problem.answer:
                raise ValueError(f"{problem.where}: tests decide here; python eval.py --server runs them")
        # The same answers are compared again and again.
        same = lru_cache(1 << 16)(rewards.is_equivalent)
        if args.server:
            with open(args.out, "ab+") as file:  # a lock holds until it is closed
                return report(*sample_online(args, problems, rewards, same, file), same)
        # Files of traces need no problems: their lines hold verdicts.
        groups = to_traces(from_choices(data.read_records(args.traces), by_id, rewards))
        if not groups:
            raise ValueError(f"{args.traces}: expected traces, found none")
        show(groups, args.window, same)
    return data.run_main(body)

if __name__ == "__main__":
    sys.exit(main())
