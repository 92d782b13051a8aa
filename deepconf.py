"""DeepConf (arXiv 2508.15260): many traces of one problem, weighted, filtered and stopped by confidence.

    python deepconf.py runs/tiny/eval/traces.jsonl          # every method on recorded traces, without a model

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
                   and votes if its mean reaches s. The public code drops it, which loses concise answers.
    ties           A group within TIE of s counts as reaching it: identical traces pass their own threshold.
    no answer      Such a trace counts in no percentile. Loops are confident: two among 16 warm-up traces
                   would set a threshold that silences the other 14, and nobody would vote.
    no voter       The paper's algorithm would return nothing. Here, if no warm-up trace has an answer, no
                   trace is stopped and all vote; if all voters have confidence 0, each has one vote.

To copy this, take this file alone; it needs numpy. The command above also takes data.py, tokenizer.py and
rewards.py.
"""

import math
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from types import SimpleNamespace

import numpy as np

# 1. Confidence of tokens, groups and traces -----------------------------------------------------------------

def _finite(values, name):
    """values as float64 (t,). Raises ValueError if there are none, or if one is not a finite number."""
    try:
        values = np.asarray(values, np.float64)
    except (TypeError, ValueError):
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

def keep_top(conf, eta):
    """conf (traces,) -> mask (traces,) of the traces at or above the percentile; ties are kept."""
    return np.asarray(conf, np.float64) >= stop_threshold(conf, eta) - TIE

def filtered_vote(answers, conf, eta=10, same=None):
    """Of the answered traces the eta percent most confident vote, weighted by confidence -> (answer, share).

    answers: None for a trace without one; it is not ranked. Without any answer nobody votes: (None, 0.0).
    conf (traces,): a confidence of each trace. eta 100 filters nothing."""
    answered = np.array([answer is not None for answer in answers], bool)
    if not answered.any():
        return None, 0.0
    conf = np.asarray(conf, np.float64)
    keep = np.flatnonzero(answered)[keep_top(conf[answered], eta)]
    return vote([answers[i] for i in keep], conf[keep], same)

def offline(traces, *, eta=10, window=2048, measure=lowest_group, same=None):
    """filtered_vote of objects with .answer and .confidences. measure(conf, window) -> float."""
    conf = [measure(t.confidences, window) if t.answer is not None else 0.0 for t in traces]
    return filtered_vote([t.answer for t in traces], conf, eta, same)

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

    def __post_init__(self):
        for name in ("n_init", "window", "batch", "budget"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 1")
        stop_threshold([0.0], self.eta)  # checks eta
        self.n_init = min(self.n_init, self.budget)
        self.traces = [_Progress() for _ in range(self.budget)]
        self.threshold = None  # s, once warm-up is over; -inf, which stops nothing, if it brought no answer
        self.finished = False

    def admit(self, index):
        """May trace `index` start? GO, WAIT (until the running ones have ended) or DONE. Ask in order."""
        if self.finished or index >= self.budget:
            return DONE
        if index >= self.n_init and (index - self.n_init) % self.batch == 0:  # the first of a batch
            if not all(trace.ended for trace in self.traces[:index]):
                return WAIT
            answer, share = self.result()
            self.finished = self.tau is not None and answer is not None and share >= self.tau - TIE
        return DONE if self.finished else GO

    def on_token(self, index, confidence):
        """Record one token's confidence. True: stop the trace now. Warm-up traces are never stopped."""
        if not math.isfinite(confidence):
            raise ValueError(f"trace {index}: token confidence is {confidence}, not finite")
        trace = self.traces[index]
        trace.last.append(confidence)
        trace.total += confidence
        trace.tokens += 1
        if len(trace.last) > self.window:
            trace.total -= trace.last.popleft()
        if len(trace.last) == self.window:
            trace.lowest = min(trace.lowest, trace.total / self.window)
        return index >= self.n_init and self.threshold is not None and trace.lowest < self.threshold - TIE

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
        # Python's float64 numbers: sums of NumPy's float32 would stay float32.
        confidences = np.asarray(confidences, np.float64).tolist()
        stopped = any(self.on_token(index, confidence) for confidence in confidences)
        self.finish(index, None if stopped else answer)

    def result(self):
        """(answer, share): ended traces that reach s vote with their lowest group; (None, 0.0) in warm-up."""
        if self.threshold is None:
            return None, 0.0
        # The condition is the opposite of on_token's, so that stopped traces do not vote.
        voters = [t for t in self.traces if t.ended and t.lowest >= self.threshold - TIE]
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
    return "-" if share is None else f"{100 * share:.1f}"

# 5. Every method on recorded traces: python deepconf.py traces.jsonl ----------------------------------------

FIELDS = {"problem": str, "sample": int, "answer": str | None, "correct": bool | None, "confidences": list}

def check_trace(record, where, fields=FIELDS):
    """Raise ValueError, naming line and field, unless a record has these fields and finite confidences."""
    for name, kind in fields.items():
        if not isinstance(record.get(name, ...), kind):
            raise ValueError(f"{where}: field {name}: missing or not {getattr(kind, '__name__', kind)}")
    _finite(record["confidences"], f"{where}: field confidences")

def to_trace(record):
    """A record as an object, as the votes above take it."""
    return SimpleNamespace(**record | {"tokens": len(record["confidences"])})

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

def compare(traces, window, same):
    """Yield (method, answer, tokens) for every method on the traces of one problem."""
    everything = sum(t.tokens for t in traces)
    yield "majority", *majority_at(traces, everything, same)
    for eta in (10, 90):
        for name, measure in MEASURES.items():
            answer, _ = offline(traces, eta=eta, window=window, measure=measure, same=same)
            yield f"offline {eta}%, {name}", answer, everything
    for level, eta in (("LOW", 10), ("HIGH", 90)):
        for name, tau in ((f"{level}, no consensus", None), (level, 0.95)):
            machine = replay(traces, eta=eta, window=window, tau=tau, same=same)
            yield f"online {name}", machine.result()[0], machine.tokens
        yield f"majority at {level}'s tokens", *majority_at(traces, machine.tokens, same)

def show(problems, window, same):
    """Print accuracy and cost of every method, and the calibration."""
    results = {}  # method -> [(verdict, tokens) per problem]
    for traces in problems.values():
        for method, answer, tokens in compare(traces, window, same):
            results.setdefault(method, []).append((is_right(answer, traces, same), tokens))
    whole = sum(tokens for _, tokens in results["majority"])
    print("| method | accuracy % | stderr | tokens / majority | problems | unknown |\n" + "| --- " * 6 + "|")
    for method, result in results.items():
        verdicts = [verdict for verdict, _ in result]
        accuracy, stderr = map(percent, mean_and_stderr(verdicts))
        cost = sum(tokens for _, tokens in result) / whole
        unknown = verdicts.count(None)
        print(f"| {method} | {accuracy} | {stderr} | {cost:.2f} | {len(result) - unknown} | {unknown} |")
    pairs = [(t.correct, lowest_group(t.confidences, window)) for traces in problems.values() for t in traces]
    print("\n" + calibration_sentence(pairs))

def main(argv=None):
    from data import Flags, read_records, run_main
    from rewards import is_equivalent
    def body():
        parser = Flags(description=__doc__.partition("\n")[0], allow_abbrev=False)
        parser.add_argument("traces", help="traces.jsonl, complete traces")
        parser.add_argument("--window", type=int, default=16, help="tokens per group (the paper: 2048)")
        args = parser.parse_args(argv)
        show(to_traces(read_records(args.traces)), args.window, is_equivalent)
    return run_main(body)

if __name__ == "__main__":
    sys.exit(main())
