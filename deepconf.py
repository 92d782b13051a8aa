"""DeepConf: many traces of one problem, weighed, filtered and stopped by the model's own confidence (arXiv 2508.15260).

    python deepconf.py runs/tiny/eval/traces.jsonl              every method on recorded traces; needs no model
    python deepconf.py traces.jsonl --window 2048 --budget 512

Terms
    token confidence   C_i = -mean log P over the k = 20 most likely tokens; high is peaked is confident
    group              the last `window` tokens at some position; groups overlap; a shorter trace is one group
    eta                the percentage KEPT: 10 is DeepConf-LOW, 90 is DeepConf-HIGH
    warm-up            the first n_init traces, run to their end; the threshold s is a percentile of their lowest groups
    consensus          the best answer's share of the votes has reached tau: nothing more is sampled

What differs from the authors' public code, which strays from their paper: the consensus stop is there; votes
are weighted; stopping and voting use one number, so a stopped trace never votes; nothing is generated after
the stop; answers are compared by equivalence; a confidence that is not finite is an error.

What the paper leaves open, and is chosen here
    short traces   a trace shorter than the window is one group, known only at its end: never stopped, it
                   votes if its mean reaches s. Dropping it, as the public code does, loses concise answers.
    ties           a group within TIE of s counts as reaching it: identical traces pass their own threshold.
    no answer      such a trace counts in no percentile. Loops are confident: two of them among 16 warm-ups
                   would set a threshold that silences the other 14, and nobody would vote.
    no voter       where the paper's algorithm returns nothing: if no warm-up has an answer, none is stopped
                   and every completed trace votes; if all voters have confidence 0, each has one vote.

To copy this, nothing else is needed: numpy. The command above also takes data.py and rewards.py.
"""

import math
import sys
from collections import deque
from dataclasses import dataclass, field

import numpy as np

# 1. Confidence of tokens, groups and traces -----------------------------------------------------------------


def _finite(values, name):
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name}: shape {values.shape}, expected (t,) with t >= 1")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: value {int(np.argmin(np.isfinite(values)))} is {values[~np.isfinite(values)][0]}, not finite")
    return values


def token_confidence(top_logprobs):
    """top_logprobs (t, k): log-probabilities of the k most likely tokens at each step, untempered -> (t,). Equation 2."""
    top = np.asarray(top_logprobs, np.float64)
    if top.ndim != 2 or not top.shape[1]:
        raise ValueError(f"top_logprobs: shape {top.shape}, expected (t, k) with k >= 1")
    if not np.isfinite(top).all():
        raise ValueError("top_logprobs: a value is not finite")
    return -top.mean(1)


def group_confidence(conf, window):
    """conf (t,) -> means over each `window` consecutive tokens, (t - window + 1,); one mean for a shorter trace."""
    conf = _finite(conf, "conf")
    if window < 1:
        raise ValueError(f"window: {window}, expected at least 1")
    if len(conf) <= window:
        return conf.mean(keepdims=True)
    sums = np.concatenate([[0.0], conf.cumsum()])
    return (sums[window:] - sums[:-window]) / window


def lowest_group(conf, window):
    """The weakest moment of a trace: the measure that stops it."""
    return float(group_confidence(conf, window).min())


def bottom_groups(conf, window, fraction=0.1):
    """Mean of the max(1, int(fraction * groups)) lowest groups."""
    groups = np.sort(group_confidence(conf, window))
    return float(groups[: max(1, int(fraction * len(groups)))].mean())


def tail(conf, tokens):
    """Mean of the last `tokens` tokens."""
    if tokens < 1:
        raise ValueError(f"tokens: {tokens}, expected at least 1")
    return float(_finite(conf, "conf")[-tokens:].mean())


def mean(conf):
    """Mean over all tokens."""
    return float(_finite(conf, "conf").mean())


# 2. Votes and filters ---------------------------------------------------------------------------------------

TIE = 1e-6  # nats; far below any difference that means something, far above the rounding of a mean


def vote(answers, weights=None, same=None):
    """Weighted vote -> (answer, its share of all weight); (None, 0.0) when nobody votes.

    answers: None abstains. weights: not negative; 1 each if None or if every voter's is 0. same(a, b): whether
    two answers are one (default ==); it need not be symmetric or transitive: an answer joins the first group
    whose first member it matches. A group goes by that member, and the first of equal groups wins."""
    same = same or (lambda a, b: a == b)
    weights = np.ones(len(answers)) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (len(answers),) or not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(f"weights: {weights}, expected {len(answers)} finite numbers that are not negative")
    votes = [(answer, float(weight)) for answer, weight in zip(answers, weights) if answer is not None]
    if not votes:
        return None, 0.0
    if not any(weight for _, weight in votes):
        votes = [(answer, 1.0) for answer, _ in votes]
    sums = []  # [answer, weight]
    for answer, weight in votes:
        group = next((g for g in sums if g[0] == answer or same(answer, g[0])), None)
        if group is None:
            sums.append(group := [answer, 0.0])
        group[1] += weight
    best = max(sums, key=lambda g: g[1])
    return best[0], best[1] / sum(g[1] for g in sums)


def stop_threshold(lowest, eta):
    """s = percentile 100 - eta of the warm-up traces' lowest groups, by linear interpolation."""
    if not 0 < eta <= 100:
        raise ValueError(f"eta: {eta}, expected the percentage kept, above 0 and up to 100")
    return float(np.percentile(_finite(lowest, "lowest"), 100 - eta))


def keep_top(conf, eta):
    """conf (traces,) -> mask (traces,) of those at or above the percentile; ties are kept."""
    return np.asarray(conf, np.float64) >= stop_threshold(conf, eta) - TIE


def check_tokens(traces):
    """ValueError that names a trace without a token: it has no confidence, and no sampler makes one."""
    for i, t in enumerate(traces):
        if not len(t.confidences):
            raise ValueError(f"trace {i}: it has no token, so no confidence; expected at least one")


def offline(traces, *, eta=10, window=2048, measure=lowest_group, same=None):
    """All traces at hand: keep the eta percent that are most confident, then vote by confidence -> (answer, share).

    Only traces with an answer are ranked; if there is none, nobody votes: (None, 0.0).
    traces: objects with .answer and .confidences. measure(conf, window) -> float."""
    check_tokens(traces)
    answered = [t for t in traces if t.answer is not None]
    if not answered:
        return None, 0.0
    conf = np.array([measure(t.confidences, window) for t in answered])
    keep = keep_top(conf, eta)
    return vote([t.answer for t, k in zip(answered, keep) if k], conf[keep], same)


def majority_at(traces, tokens, same=None):
    """What plain voting makes of the first traces that fit into a budget of tokens -> (answer, tokens used). At least one."""
    check_tokens(traces)
    used, answers = 0, []
    for t in traces:
        if answers and used + len(t.confidences) > tokens:
            break
        used += len(t.confidences)
        answers.append(t.answer)
    return vote(answers, same=same)[0], used


def auroc(scores, correct):
    """Probability that a right trace scores above a wrong one, ties counting half; nan when there is only one kind."""
    scores, correct = np.asarray(scores, np.float64), np.asarray(correct, bool)
    right, wrong = np.sort(scores[correct]), scores[~correct]
    if not len(right) or not len(wrong):
        return math.nan
    below, up_to = np.searchsorted(right, wrong, side="left"), np.searchsorted(right, wrong, side="right")
    return float((len(right) - (below + up_to) / 2).mean() / len(right))


# 3. Online: decide while sampling (Algorithm 2) -------------------------------------------------------------

UNIT = 2**30  # running sums are integers of 2^-30 nats: adding and taking away again leaves no rounding behind


@dataclass
class _Trace:
    """What the machine keeps of one trace."""
    last: deque = field(default_factory=deque)  # confidences in the window, in units
    total: int = 0  # their sum
    tokens: int = 0
    lowest: float = math.inf  # over the full windows so far
    stopped: bool = False
    ended: bool = False
    answer: object = None


class Online:
    """Online DeepConf for one problem, as a machine that a sampler asks: may trace i start, must it stop, what is the answer.

    Its decisions follow from the traces' confidences and answers alone, not from when or in what order they run.
    budget: traces at most. n_init: warm-up traces. eta: percentage kept. tau: consensus, None for none. batch: traces that
    start together after warm-up; consensus is looked at between batches. same: equality of answers.

    threshold: None during warm-up; then of the warm-ups with an answer, or -inf, which stops nothing."""

    def __init__(self, budget, *, n_init=16, eta=10, window=2048, tau=0.95, batch=1, same=None):
        for name, value in (("n_init", n_init), ("window", window), ("batch", batch), ("budget", budget)):
            if value < 1:
                raise ValueError(f"{name}: {value}, expected at least 1")
        stop_threshold([0.0], eta)  # checks eta
        self.budget, self.n_init, self.eta, self.window = budget, min(n_init, budget), eta, window
        self.tau, self.batch, self.same = tau, batch, same
        self.traces, self.threshold, self.finished = {}, None, False

    def admit(self, index):
        """May trace `index` start? "go", "wait" until traces that run have ended, or "done". To be asked in order."""
        if self.finished or index >= self.budget:
            return "done"
        if index >= self.n_init and (index - self.n_init) % self.batch == 0:
            if any(i not in self.traces or not self.traces[i].ended for i in range(index)):
                return "wait"
            answer, share = self.result()
            if self.tau is not None and answer is not None and share >= self.tau:
                self.finished = True
                return "done"
        return "go"

    def _reaches(self, lowest):
        """The one test behind stopping and voting."""
        return lowest >= self.threshold - TIE

    def on_token(self, index, confidence):
        """Take in one token's confidence. True: stop the trace now. Warm-up traces are never stopped."""
        if not math.isfinite(confidence):
            raise ValueError(f"trace {index}: token confidence is {confidence}, not finite")
        trace = self.traces.setdefault(index, _Trace())
        trace.last.append(round(confidence * UNIT))
        trace.total += trace.last[-1]
        trace.tokens += 1
        if len(trace.last) > self.window:
            trace.total -= trace.last.popleft()
        if len(trace.last) == self.window:
            trace.lowest = min(trace.lowest, trace.total / (self.window * UNIT))
        trace.stopped |= index >= self.n_init and trace.lowest < math.inf and not self._reaches(trace.lowest)
        return trace.stopped

    def finish(self, index, answer):
        """Trace `index` has ended; answer is None when it was stopped or has none."""
        if index not in self.traces:
            raise ValueError(f"trace {index}: it ended without a token; on_token must see each token first")
        trace = self.traces[index]
        if trace.lowest == math.inf:  # short: one group
            trace.lowest = trace.total / (len(trace.last) * UNIT)
        trace.ended, trace.answer = True, None if trace.stopped else answer
        warm = [self.traces[i] for i in range(self.n_init) if i in self.traces and self.traces[i].ended]
        if self.threshold is None and len(warm) == self.n_init:
            lowest = [t.lowest for t in warm if t.answer is not None]
            self.threshold = stop_threshold(lowest, self.eta) if lowest else -math.inf

    def result(self):
        """(answer, share) of the traces that ended and reach the threshold, weighted by their lowest group. Before the
        threshold is known there is no answer: (None, 0.0)."""
        if self.threshold is None:
            return None, 0.0
        voters = [t for _, t in sorted(self.traces.items()) if t.ended and not t.stopped and self._reaches(t.lowest)]
        return vote([t.answer for t in voters], [max(t.lowest, 0.0) for t in voters], self.same)

    @property
    def tokens(self):
        """Everything that was generated: warm-up, complete and stopped traces."""
        return sum(t.tokens for t in self.traces.values())


def online(sample, budget, **settings):
    """Run online DeepConf, one trace after another -> the Online machine (.result(), .tokens, .threshold).

    sample(index, stop) generates trace `index`, calls stop(confidence) after each token and ends at once when that is True;
    it returns the answer, or None. settings: those of Online."""
    machine, index = Online(budget, **settings), 0
    while machine.admit(index) == "go":
        machine.finish(index, sample(index, lambda confidence: machine.on_token(index, confidence)))
        index += 1
    return machine


def replay(traces, **settings):
    """`online` on recorded complete traces: each is cut where it would have been stopped."""
    def sample(index, stop):
        return None if any(stop(c) for c in traces[index].confidences) else traces[index].answer
    return online(sample, len(traces), **settings)


# 4. python deepconf.py traces.jsonl -------------------------------------------------------------------------


@dataclass
class Recorded:
    problem: str
    sample: int
    answer: object
    correct: bool | None  # None: unknown
    confidences: list


def read_traces(path):
    """traces.jsonl -> {problem: its traces in sample order}. ValueError names file, line and field."""
    from data import read_records

    kinds = {"problem": str, "sample": int, "answer": str | None, "correct": bool | None, "confidences": list}
    problems = {}
    for where, record in read_records(path):
        for name, kind in kinds.items():
            if name not in record or not isinstance(record[name], kind):
                raise ValueError(f"{where}: field {name}: missing or not {getattr(kind, '__name__', kind)}")
        try:
            _finite(record["confidences"], "confidences")
        except (ValueError, TypeError) as e:
            raise ValueError(f"{where}: field {e}") from None
        problems.setdefault(record["problem"], []).append(Recorded(**{name: record[name] for name in kinds}))
    return {name: sorted(traces, key=lambda t: t.sample) for name, traces in problems.items()}


def is_right(answer, traces, same=None):
    """Whether a voted answer is right: True if a trace that gave it is, False if none is or nobody voted,
    None (unknown) if the verdict on no trace that gave it is known.

    Traces that gave it word for word are asked first, others with the `same` answer only if no verdict on
    those is known: `same` need not be transitive. 50 is 50%, 50% is 0.5, but if 0.5 is right, 50 is wrong."""
    if answer is None:
        return False
    known = [t for t in traces if t.correct is not None and t.answer is not None]
    verdicts = [t.correct for t in known if t.answer == answer]
    if not verdicts and same:
        verdicts = [t.correct for t in known if same(t.answer, answer)]
    return any(verdicts) if verdicts else None


def methods(window, n_init, tau, same):
    """{name: function(traces) -> (answer, tokens)} of everything the table compares."""
    def all_tokens(traces):
        return sum(len(t.confidences) for t in traces)
    table = {"majority": lambda ts: (vote([t.answer for t in ts], same=same)[0], all_tokens(ts))}
    measures = {"lowest": lowest_group, "bottom 10%": bottom_groups, "tail": tail, "mean": lambda c, _: mean(c)}
    for eta in (10, 90):
        for name, measure in measures.items():
            table[f"offline {eta}%, {name}"] = lambda ts, e=eta, m=measure: (
                offline(ts, eta=e, window=window, measure=m, same=same)[0], all_tokens(ts))
    def run(traces, eta, tau):
        machine = replay(traces, n_init=n_init, eta=eta, window=window, tau=tau, same=same)
        return machine.result()[0], machine.tokens
    for label, eta in (("LOW", 10), ("HIGH", 90)):
        table[f"online {label}, no consensus"] = lambda ts, e=eta: run(ts, e, None)
        table[f"online {label}"] = lambda ts, e=eta: run(ts, e, tau)
        table[f"majority at {label}'s tokens"] = lambda ts, e=eta: majority_at(ts, run(ts, e, tau)[1], same)
    return table


def show(problems, window, n_init, tau, same):
    """Print the table of methods, and how far confidence tells right traces from wrong ones."""
    print("| method | accuracy % | stderr | tokens / majority | problems | unknown |\n" + "| --- " * 6 + "|")
    whole = sum(len(t.confidences) for traces in problems.values() for t in traces)
    for name, method in methods(window, n_init, tau, same).items():
        results = [(traces, *method(traces)) for traces in problems.values()]
        verdicts = [is_right(answer, traces, same) for traces, answer, _ in results]
        right = np.array([verdict for verdict in verdicts if verdict is not None], float)
        accuracy = stderr = math.nan
        if len(right):
            accuracy, stderr = 100 * right.mean(), 100 * right.std() / len(right) ** 0.5
        tokens, unknown = sum(n for _, _, n in results) / whole, len(verdicts) - len(right)
        print(f"| {name} | {accuracy:.1f} | {stderr:.1f} | {tokens:.2f} | {len(right)} | {unknown} |")
    known = [t for traces in problems.values() for t in traces if t.correct is not None]
    conf = np.array([lowest_group(t.confidences, window) for t in known])
    correct = np.array([t.correct for t in known], bool)
    right, wrong = (side.mean() if len(side) else math.nan for side in (conf[correct], conf[~correct]))
    print(f"\nlowest group against correctness: AUROC {auroc(conf, correct):.3f}, "
          f"mean of right traces {right:.3f}, of wrong ones {wrong:.3f}")


def main(argv=None):
    from data import Flags
    from rewards import is_equivalent

    parser = Flags(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("traces", help="traces.jsonl, complete traces")
    parser.add_argument("--window", type=int, default=16, help="tokens of a group (the paper: 2048)")
    parser.add_argument("--budget", type=int, default=32, help="traces of a problem to use")
    parser.add_argument("--n-init", type=int, default=16, help="warm-up traces")
    parser.add_argument("--tau", type=float, default=0.95, help="consensus")
    try:
        args = parser.parse_args(argv)
        problems = {name: traces[: args.budget] for name, traces in read_traces(args.traces).items()}
        print(f"{len(problems)} problems, {args.budget} traces each, window {args.window}, consensus {args.tau}\n")
        show(problems, args.window, args.n_init, args.tau, is_equivalent)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
