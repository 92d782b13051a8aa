r"""Evaluation: sample replies, judge them, vote on their answers, and report accuracy against tokens.

    python eval.py                      # the small CPU run: runs/tiny/sft and runs/tiny/rl, minutes
    python eval.py --model FOLDER --problems FILE --out FOLDER --fresh --temperature 0.6 --top-p 0.95 \
        --samples 512 --max-new-tokens 65536 --window 2048      # the paper's setting (section 5)
    torchrun --nproc-per-node 8 eval.py --model FOLDER   # problems shared out; the same traces up to rounding
    python eval.py --check FILE         # can these problems be scored? Tries their own solutions
    python eval.py --chat --model FOLDER                 # talk to a checkpoint; Ctrl-D ends

What it writes to --out
    traces.jsonl            every sampled reply, with answer, verdict and confidences; traces-sft.jsonl of the
                            other checkpoint, traces-low.jsonl, traces-high.jsonl of DeepConf online
    report.json, report.md  the table that is also printed; run.json: arguments, versions, hardware, commit
    accuracy.png            accuracy against tokens, with majority votes of 1, 2, 4, ... replies for
                            comparison; needs matplotlib

Methods (rows of the report), n samples per problem
    pass@1                   the mean over samples
    majority@n               one vote each
    majority@equal-tokens    as many votes as DeepConf LOW's tokens pay for: the fair comparison
    deepconf-offline@n       the most confident tenth votes
    deepconf-low@n, -high@n  the same while generating, so tokens and seconds are measured: after 16 warm-up
                             traces, one is stopped when its confidence falls below the top 10% (LOW) or 90%
                             (HIGH) of theirs, and all sampling when 95% of the votes agree

An unknown verdict (no sandbox, a judge that is down) says nothing about the reply: `correct` is null. pass@1
is the mean over the other samples; a vote is right if a trace that gave its answer is known to be right.
Problems without a known verdict are left out of a row's mean and counted in its last column. More than 2%
unknown verdicts end the run, after the traces are written.

Deviations from the paper (arXiv 2601.02346): 32768 tokens or more, temperature 0.6 and top-p 0.95 are flags;
the defaults fit the small run. rewards.py and sandbox.py say how they differ from its verifiers.

To copy this, also take all other scripts but the two trainers.
"""

import itertools
import json
import math
import os
import re
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import deepconf
from data import flag
from model import FalconH1, generate
from rewards import check_code, check_scorable, chosen, decided_by_tests, extract_answer, extract_code
from rewards import is_equivalent, is_right, open_judge, verify
from sandbox import run_code

# torchrun sets both. Rank r takes the problems r, r + WORLD, r + 2 WORLD, ...
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

# 1. Estimators ----------------------------------------------------------------------------------------------


def pass_at_k(n, c, k):
    """The chance that at least one of k samples drawn from n is correct, c of which are. Unbiased for k <= n.

        1 - C(n-c, k) / C(n, k)                            Chen et al. 2021, arXiv 2107.03374, equation 1
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean_and_stderr(scores):
    """Mean over the m scores that are not None, and its standard error; None where undefined.

        s / sqrt(m),  s^2 = sum (x - mean)^2 / (m - 1)
    """
    known = [score for score in scores if score is not None]
    m = len(known)
    mean = math.fsum(known) / m if m else None
    if m < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in known) / (m - 1) / m)


# 2. Sampling ------------------------------------------------------------------------------------------------

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Samples(NamedTuple):
    """Replies to all problems, and what they cost."""
    ballots: list  # per problem (replies, same): see judge_all, and `same` of deepconf.vote
    n: int  # replies per problem, at most
    tokens: int
    seconds: float  # wall time of generation, on the slowest rank


def load(folder, device, dtype="auto"):
    """(model, tokenizer) of a checkpoint.

    dtype: a key of DTYPES; auto is bfloat16 on a GPU, and what is stored on a CPU."""
    tokenizer = data.load_tokenizer(folder)
    if dtype == "auto" and device.startswith("cuda"):
        dtype = "bfloat16"
    return FalconH1.from_pretrained(data.model_folder(folder), dtype=DTYPES[dtype], device=device), tokenizer


def reply_to(chats, model, tokenizer, args, **more):
    """Traces that continue conversations, each of which ends in a user's turn. more: for model.generate."""
    prompts = [data.render_chat(messages, tokenizer, generation_prompt=True)[0] for messages in chats]
    return generate(model, prompts, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                    top_p=args.top_p, seed=args.seed, stop_ids=tokenizer.stop_ids, **more)


def sample(model, tokenizer, problems, args, judge, n, file, online=None):
    """Sample n replies to every problem, judge them, and write them to `file` in --out.

    Args:
        judge: a rewards.Judge, or None.
        online: a deepconf.Online per problem, which decides during generation which traces start and which
            stop early; until then they hold what they would hold without it. None: n whole replies.

    Returns Samples, the same on every rank; each rank samples its share of the problems.
    Raises ValueError if too many verdicts are unknown, after the file is written."""

    def admit(i, index):  # may reply `index` to problem i start?
        if i % WORLD != RANK:
            return deepconf.DONE
        return online[i].admit(index) if online else deepconf.GO

    def on_token(trace):  # must it stop?
        return online[trace.prompt_index].on_token(trace.sample_index, trace.confidences[-1])

    def on_trace(trace):
        answer = answer_of(data.reply_text(trace.tokens, tokenizer), problems[trace.prompt_index])
        online[trace.prompt_index].finish(trace.sample_index, answer)

    callbacks = {"admit": admit, "on_token": on_token, "on_trace": on_trace} if online else {"admit": admit}
    chats = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    with together():
        start = time.perf_counter()
        traces = reply_to(chats, model, tokenizer, args, samples=n, progress=RANK == 0, **callbacks)
        seconds = time.perf_counter() - start
        replies = judge_all(traces, tokenizer, problems, args, judge)

    # Every rank gets the replies of all, by problem.
    groups = {problem.id: [] for problem in problems}
    for reply in itertools.chain(*gather(replies)):
        groups[reply.problem].append(reply)
    replies = [*itertools.chain(*groups.values())]
    with together():
        if RANK == 0:  # write before complaining: what was sampled must not be lost
            path = Path(args.out) / file
            data.write_jsonl(path, map(vars, replies))
            data.check_unknown(f"{path} holds every reply, but", unknown_reasons(replies), len(replies))

    # Answers are one vote if they are equivalent, programs only if they are the same text.
    same = [None if decided_by_tests(problem) else same_answer for problem in problems]
    tokens = sum(reply.tokens for reply in replies)
    return Samples([*zip(groups.values(), same)], n, tokens, max(gather(seconds)))


# 3. Verdicts ------------------------------------------------------------------------------------------------

same_answer = lru_cache(maxsize=1 << 16)(is_equivalent)  # every method compares the same answers again


def judge_all(traces, tokenizer, problems, args, judge):
    """The replies in traces of model.generate: objects whose attributes are a line of traces.jsonl.

    With .answer, .correct and .confidences they are also what deepconf.py takes as traces."""
    jobs = [(data.reply_text(trace.tokens, tokenizer), problems[trace.prompt_index]) for trace in traces]
    judge_one = partial(verify, judge=judge, limit=args.code_tests, seed=args.seed,
                        unsafe=args.unsafe_local_execution)
    # Threads only wait, for programs or a judge; the sandbox limits how many programs run at a time.
    pool = ThreadPoolExecutor(2 * (os.cpu_count() or 1))
    try:
        verdicts = pool.map(lambda job: judge_one(*job), jobs)
        verdicts = list(tqdm(verdicts, "verifying", len(jobs), leave=False, disable=RANK > 0 or not jobs))
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for thousands

    return [SimpleNamespace(
        problem=problem.id, domain=problem.domain, gold=problem.answer, sample=trace.sample_index,
        seed=args.seed, text=text, tokens=len(trace.tokens), answer=answer_of(text, problem),
        correct=None if verdict.score is None else verdict.score == 1, reason=verdict.reason, stop=trace.stop,
        # All digits of a float32: a replay must decide as the live run did.
        confidences=[float(f"{confidence:.9g}") for confidence in trace.confidences],
    ) for trace, (text, problem), verdict in zip(traces, jobs, verdicts)]


def answer_of(text, problem):
    """What is voted on: the answer, the letter of the choice that it names, or with tests the program."""
    if decided_by_tests(problem):
        return (extract_code(text) or (None, None))[1]
    answer = extract_answer(text)
    choices = problem.extra.get("choices")
    named = chosen(answer, choices) if answer and choices else None
    return answer if named is None else data.LETTERS[named]


def unknown_reasons(replies):
    """Counter of why verdicts are unknown."""
    return Counter(reply.reason for reply in replies if reply.correct is None)


# 4. Methods: a function per row of the report ---------------------------------------------------------------

WARM_UP = 16  # traces before DeepConf online stops any (its paper, arXiv 2508.15260)
BATCH = 4  # traces that start together after that; one by one halves throughput and saves few tokens


def report_row(method, samples, scores, tokens):
    """A row of report.json. scores: per problem, 0 to 1, or None (unknown). tokens: what the method takes."""
    accuracy, stderr = mean_and_stderr(scores)
    unknown = scores.count(None)
    seconds = samples.seconds * tokens / samples.tokens
    return {"method": method, "accuracy": accuracy, "stderr": stderr, "tokens": round(tokens),
            "seconds": round(seconds, 2), "problems": len(scores) - unknown, "unknown": unknown}


def vote_row(method, samples, votes, tokens):
    """The row of a vote: an answer is right if a reply that gives it is. votes: per problem (answer, _)."""
    scores = [deepconf.is_right(answer, *ballot) for (answer, _), ballot in zip(votes, samples.ballots)]
    return report_row(method, samples, scores, tokens)


def pass_at_1(samples):
    """The mean over the replies. It costs one reply per problem."""
    scores = []
    for replies, _ in samples.ballots:
        known = [reply.correct for reply in replies if reply.correct is not None]
        scores.append(pass_at_k(len(known), sum(known), 1) if known else None)
    return report_row("pass@1", samples, scores, samples.tokens / samples.n)


def majority(samples):
    """One vote per reply, the usual self-consistency."""
    votes = []
    for replies, same in samples.ballots:
        votes.append(deepconf.vote([reply.answer for reply in replies], same=same))
    return vote_row(f"majority@{samples.n}", samples, votes, samples.tokens)


def majority_curve(samples):
    """(tokens, accuracy) of the majority of 1, 2, 4, ... replies: what more samples buy without DeepConf.

    Of m replies a problem with n has n / m disjoint runs, over which its score is the mean."""
    points = []
    for m in (2**i for i in range(samples.n.bit_length())):
        scores = []
        for replies, same in samples.ballots:
            answers = [reply.answer for reply in replies]
            runs = [answers[i : i + m] for i in range(0, len(answers) - m + 1, m)]
            right = [deepconf.is_right(deepconf.vote(run, same=same)[0], replies, same) for run in runs]
            scores.append(mean_and_stderr(right)[0])
        points.append((samples.tokens * m / samples.n, mean_and_stderr(scores)[0]))
    return points


def majority_at_equal_tokens(samples, low):
    """As many votes per problem as fit into the tokens that DeepConf LOW took for it. low: its Samples."""
    votes = []
    for (replies, same), (stopped, _) in zip(samples.ballots, low.ballots):
        budget = sum(reply.tokens for reply in stopped)
        votes.append(deepconf.majority_at(replies, budget, same))
    return vote_row("majority@equal-tokens", samples, votes, sum(tokens for _, tokens in votes))


def deepconf_offline(samples, window):
    """All is sampled; then the most confident tenth votes, weighted by confidence: its lowest group."""
    votes = [deepconf.offline(replies, eta=10, window=window, same=same) for replies, same in samples.ballots]
    return vote_row(f"deepconf-offline@{samples.n}", samples, votes, samples.tokens)


def deepconf_online(level, eta, sample, args, ballots):
    """Traces are stopped while they are sampled -> (row, Samples).

    The tokens of stopped traces count. Time falls less than tokens do, as batches grow thin at the end.
    eta: percentage of the warm-up traces that is kept. sample: as for evaluate. ballots: of any Samples."""
    settings = {"n_init": WARM_UP, "eta": eta, "window": args.window, "batch": BATCH}
    online = [deepconf.Online(args.samples, same=same, **settings) for _, same in ballots]
    samples = sample(args.samples, f"traces-{level}.jsonl", online)
    results = gather([machine.result() for machine in online])
    votes = [results[i % WORLD][i] for i in range(len(online))]  # from the rank that sampled problem i
    return vote_row(f"deepconf-{level}@{args.samples}", samples, votes, samples.tokens), samples


def evaluate(sample, args):
    """All methods on one checkpoint -> (rows, Samples). sample(n, file, online=None): sample() for it."""
    samples = sample(args.samples, "traces.jsonl")
    rows = [pass_at_1(samples), majority(samples), deepconf_offline(samples, args.window)]
    if args.samples > WARM_UP:
        low_row, low = deepconf_online("low", 10, sample, args, samples.ballots)
        high_row, _ = deepconf_online("high", 90, sample, args, samples.ballots)
        rows.insert(2, majority_at_equal_tokens(samples, low))
        rows += [low_row, high_row]
    return rows, samples


# 5. Report and plot -----------------------------------------------------------------------------------------

LINE = "| {:10} | {:21} | {:>10} | {:>6} | {:>10} | {:>7} | {:>8} | {:>7} |"


def table(rows):
    """The rows as Markdown, with columns that also line up in a terminal."""
    names = ("checkpoint", "method", "accuracy %", "stderr", "tokens", "seconds", "problems", "unknown")
    head = LINE.format(*names)
    lines = [head, re.sub("[^|]", "-", head)]
    for r in rows:
        accuracy, stderr = ("-" if x is None else f"{100 * x:.1f}" for x in (r["accuracy"], r["stderr"]))
        lines.append(LINE.format(r["checkpoint"], r["method"], accuracy, stderr, f"{r['tokens']:,}",
                                 f"{r['seconds']:.1f}", r["problems"], r["unknown"]))
    return "\n".join(lines)


def write_report(args, rows, samples, problem):
    """Write report.json, report.md and accuracy.png; print the table, and the first reply to `problem`."""
    replies = [*itertools.chain(*(replies for replies, _ in samples.ballots))]
    report = f"{table(rows)}\n\n{deepconf.calibration_sentence(replies, args.window)}\n"
    if reasons := unknown_reasons(replies):
        report += f"{reasons.total()} of {len(replies)} verdicts unknown: {data.describe(reasons)}.\n"
    out = Path(args.out)
    data.write_text(out / "report.json", json.dumps({"rows": rows}, indent=1) + "\n")
    data.write_text(out / "report.md", f"# Evaluation on {args.problems}\n\n{report}")
    plot(out / "accuracy.png", rows, majority_curve(samples))
    first = replies[0]
    print(f"\n{problem.prompt}\n{first.text}\nanswer {first.answer}, correct: {first.correct}\n\n{report}")


def plot(path, rows, curve):
    """Accuracy against generated tokens: majority votes as a curve, DeepConf's rows as points with errors."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    known = [(tokens, 100 * accuracy) for tokens, accuracy in curve if accuracy is not None]
    axes.plot([tokens for tokens, _ in known], [accuracy for _, accuracy in known], "o-",
              label="majority of 1, 2, 4, ...")
    for r in rows:
        if "deepconf" in r["method"] and r["accuracy"] is not None:
            stderr = 100 * (r["stderr"] or 0)
            axes.errorbar(r["tokens"], 100 * r["accuracy"], stderr, fmt="s", label=r["method"])
    axes.set(xlabel="generated tokens, all problems", ylabel="accuracy, %")
    axes.legend()
    figure.savefig(path, dpi=150)


# 6. --check and --chat --------------------------------------------------------------------------------------


def check_problem(problem, unsafe=False):
    """("right", None) if a problem's own solution is found right, else "failed" or "not checked", and why."""
    solution = problem.extra.get("solution")
    solution = solution if isinstance(solution, str) else ""
    if decided_by_tests(problem):
        if not solution:
            return "not checked", "code without a solution: only its tests were read"
        entry_point = problem.extra.get("entry_point", "")
        start = problem.prompt if entry_point else ""  # HumanEval's solutions continue the prompt
        tests = problem.extra.get("tests")
        verdict = run_code(start + solution, tests, entry_point=entry_point, prompt=start, unsafe=unsafe)
        status = {1: "right", 0: "failed", None: "not checked"}[verdict.score]
        return status, None if status == "right" else verdict.reason

    try:
        check_scorable(problem)
    except ValueError as error:
        if problem.domain == "math":
            return "failed", str(error)
        return "not checked", "answers in words: they need --judge"
    answer = extract_answer(solution) or problem.answer  # GSM8K's solutions have no box
    if is_right(answer, problem):
        return "right", None
    return "failed", f"its solution answers {answer!r}, its answer is {problem.answer!r}"


def check_file(path, unsafe=False):
    """Print how many problems of a file the verifier can score; ValueError if it fails on any."""
    problems = data.read_problems(path)
    check_code(problems, path, unsafe)
    counts = defaultdict(Counter)  # domain -> status -> problems
    reasons = defaultdict(list)  # status -> why
    for problem in tqdm(problems, "checking", leave=False, disable=not any(map(decided_by_tests, problems))):
        status, why = check_problem(problem, unsafe)
        counts[problem.domain][status] += 1
        reasons[status].append(f"{problem.where}: {problem.id}: {why}" if status == "failed" else why)

    print("| domain     |   rows |  right | failed | not checked |")
    print("|------------|--------|--------|--------|-------------|")
    for domain, count in sorted(counts.items()):
        right, wrong, unchecked = (count[status] for status in ("right", "failed", "not checked"))
        print(f"| {domain:10} | {count.total():6} | {right:6} | {wrong:6} | {unchecked:11} |")
    # Each reason for not checking once, and the first ten failures.
    for line in [*sorted(set(reasons["not checked"])), *reasons["failed"][:10]]:
        print(line)
    if reasons["failed"]:
        raise ValueError(f"{path}: {len(reasons['failed'])} rows cannot be scored")


def chat(args):
    """Talk to a checkpoint; replies are shown as they are written.

    The history holds whole replies: render_chat drops the reasoning of earlier turns."""
    model, tokenizer = load(args.model or RL, args.device, args.dtype)
    messages = []
    shown = ""

    def stream(trace):
        nonlocal shown
        text = data.reply_text(trace.tokens, tokenizer)
        if not text.endswith("\ufffd"):  # the bytes of an unfinished character wait for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text

    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return print()
        if question:
            messages.append({"role": "user", "content": question})
            shown = ""
            trace = reply_to([messages], model, tokenizer, args, on_token=stream)[0]
            messages.append({"role": "assistant", "content": data.reply_text(trace.tokens, tokenizer)})
            print()


# 7. Ranks ---------------------------------------------------------------------------------------------------


def gather(value):
    """The values of all ranks, by rank, on every rank."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


@contextmanager
def together():
    """All ranks leave the block together. A user's error on one of them ends all, and rank 0 says which.

    Without this the others would wait in gather() for a rank that has ended."""
    error = None
    try:
        yield
    except (ValueError, OSError) as e:
        error = str(e)
    errors = [message for message in gather(error) if message is not None]
    if errors and RANK > 0:
        sys.exit(1)
    if errors:
        raise ValueError(errors[0])


# 8. The command line ----------------------------------------------------------------------------------------

SFT = "runs/tiny/sft/model"
RL = "runs/tiny/rl/model"
HELD_OUT = "runs/tiny/data/heldout.jsonl"
MADE_BY = {SFT: "train_sft.py", RL: "train_rl.py", HELD_OUT: "train_sft.py"}
OUTPUTS = ("traces*.jsonl", "report.*", "accuracy.png")


@dataclass
class Args:
    model: str = flag("", f"checkpoint, a run's folder or a model's; empty: {RL}, and {SFT} for pass@1")
    problems: str = flag(HELD_OUT, "file of problems, in any shape that data.py reads")
    out: str = flag("runs/tiny/eval", "folder to write")
    limit: int = flag(200, "problems to take, from the first on; 0 is all")
    samples: int = flag(32, "traces per problem; DeepConf online needs more than its 16 warm-up traces")
    temperature: float = flag(0.85, "of sampling, 0 is greedy; the paper evaluates at 0.6")
    top_p: float = flag(1.0, "sample from the likeliest tokens of this total probability; the paper: 0.95")
    max_new_tokens: int = flag(256, "per trace; the paper: 32768 or 65536")
    window: int = flag(16, "tokens per confidence group, for traces of some 100 tokens; the paper: 2048")
    seed: int = flag(0, "of sampling")
    device: str = flag("", "cpu or cuda; empty: cuda where there is one")
    dtype: str = flag("auto", "float32, bfloat16, or auto: bfloat16 on a GPU, as in RL, else what is stored")
    fresh: bool = flag(False, "replace what another evaluation left in --out")
    check: str = flag("", "only check that the verifier finds the solutions in this file of problems right")
    code_tests: int = flag(0, "tests per code problem to run, a random sample of them; 0: all")
    judge: str = flag("", "URL of a chat endpoint that compares answers in words; its key: OPENAI_API_KEY")
    judge_model: str = flag("judge", "name of the model there")
    judge_cache: str = flag("runs/judge.jsonl", "file of its verdicts")
    unsafe_local_execution: bool = flag(False, "run programs of the model even where they cannot be isolated")
    chat: bool = flag(False, "talk to the checkpoint instead; Ctrl-D ends")


def check_args(args):
    """Raise ValueError for flags out of range; choose the device."""
    for name, least in {"limit": 0, "code_tests": 0, "samples": 1, "max_new_tokens": 1, "window": 1}.items():
        if getattr(args, name) < least:
            flag_name = "--" + name.replace("_", "-")
            raise ValueError(f"{flag_name} must be at least {least}, not {getattr(args, name)}")
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        raise ValueError("--temperature must be 0 or more, and --top-p above 0 and at most 1")
    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype}: not one of {', '.join(DTYPES)}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device != "cpu" and (args.device != "cuda" or not torch.cuda.is_available()):
        raise ValueError(f"--device {args.device}: expected cpu, or cuda on a machine with a GPU")


def run(args):
    """Evaluate --model, or the two checkpoints of the small run. All ranks call this."""
    if args.device == "cuda":  # from here on "cuda" is the GPU of this rank
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # some ranks sample longer

    folders = [args.model] if args.model else [SFT, RL]
    needed = [(folder, data.model_folder(folder) / "config.json") for folder in folders]
    with together():  # a user's mistakes show here, cheap checks before the weights are read
        judge = open_judge(args)
        for path, file in [*needed, (args.problems, Path(args.problems))]:
            if not file.is_file():
                how = f": run python {MADE_BY[path]} first" if path in MADE_BY else ""
                raise ValueError(f"{path if how else file} is missing{how}")
        problems = data.read_problems(args.problems, args.limit, partial(check_scorable, judge=args.judge))
        check_code(problems, args.problems, args.unsafe_local_execution, quiet=RANK > 0)
        loaded = [load(folder, args.device, args.dtype) for folder in folders]
    with together():  # every rank has what it needs: only now may --fresh delete anything
        if RANK == 0:
            flags = vars(args)
            identity = {name: flags[name] for name in flags if name not in ("out", "fresh", "chat", "check")}
            about = {"device": args.device, "ranks": WORLD}
            lock = data.open_run(args.out, identity, OUTPUTS, fresh=args.fresh, **about)
            print(" ".join(f"{name}={value}" for name, value in flags.items()))

    # The last checkpoint gets all methods, the one before only what shows the gain by RL.
    rows = []
    for folder, checkpoint in zip(folders, loaded):
        path = data.model_folder(folder).resolve()
        name = path.parent.name if path.name == "model" else path.name  # "rl" for runs/tiny/rl/model
        sample_it = partial(sample, *checkpoint, problems, args, judge)
        if folder == folders[-1]:
            new, samples = evaluate(sample_it, args)
        else:
            new = [pass_at_1(sample_it(min(4, args.samples), f"traces-{name}.jsonl"))]
        rows += [{"checkpoint": name, **row} for row in new]
    if RANK == 0:
        write_report(args, rows, samples, problems[0])
        lock.close()


def main(argv=None):
    def body():
        args = data.parse_args(Args, __doc__.partition("\n")[0], argv)
        if args.check:
            return check_file(args.check, args.unsafe_local_execution)
        check_args(args)
        chat(args) if args.chat else run(args)

    status = data.run_main(body)
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
