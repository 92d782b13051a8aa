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
    accuracy.png            accuracy against tokens; training.png: the runs' log.jsonl. Both need matplotlib

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

To copy this, also take all other scripts but train_rl.py.
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
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import deepconf
import train_sft
from data import flag
from model import FalconH1, generate
from rewards import (
    check_code, check_scorable, chosen, decided_by_tests, extract_answer, extract_code, is_equivalent,
    is_right, open_judge, verify,
)
from sandbox import run_code

# 1. Verdicts ------------------------------------------------------------------------------------------------


def verify_many(jobs, workers=0, progress=False, **settings):
    """Verdicts on (text, problem) pairs, in their order, several at once.

    Threads only wait, for programs or a judge: the sandbox limits how many programs run at a time.
    workers: 0 is two per core. progress: show a bar. settings: those of verify."""
    pool = ThreadPoolExecutor(workers or 2 * (os.cpu_count() or 1))
    try:
        verdicts = pool.map(lambda job: verify(*job, **settings), jobs)
        return list(tqdm(verdicts, "verifying", len(jobs), leave=False, disable=not (progress and jobs)))
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for thousands


def check_problem(problem, unsafe=False):
    """("right", None) if a problem's own solution is found right, else "failed" or "not checked", and why."""
    solution = problem.extra.get("solution")
    if decided_by_tests(problem):
        if not isinstance(solution, str):
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
    answer = extract_answer(solution) if isinstance(solution, str) else None
    answer = answer or problem.answer  # GSM8K's solutions have no box
    if is_right(answer, problem):
        return "right", None
    return "failed", f"its solution answers {answer!r}, its answer is {problem.answer!r}"


def check_file(path, unsafe=False):
    """Print how many problems of a file the verifier can score, and the first it cannot; ValueError if there are any."""
    counts, failed, notes = defaultdict(Counter), [], set()
    problems = data.read_problems(path)
    check_code(problems, path, unsafe)
    for problem in tqdm(problems, "checking", leave=False, disable=not any(map(decided_by_tests, problems))):
        status, why = check_problem(problem, unsafe)
        counts[problem.domain][status] += 1
        if status == "failed":
            failed.append(f"{problem.where}: {problem.id}: {why}")
        elif why:
            notes.add(why)
    print("| domain     |   rows |  right | failed | not checked |\n|------------|--------|--------|--------|-------------|")
    for domain, count in sorted(counts.items()):
        print(f"| {domain:10} | {count.total():6} | {count['right']:6} | {count['failed']:6} | {count['not checked']:11} |")
    print(*sorted(notes), *failed[:10], sep="\n", end="\n" if notes or failed else "")
    if failed:
        raise ValueError(f"{path}: {len(failed)} rows cannot be scored")


# 2. Estimators ----------------------------------------------------------------------------------------------


def pass_at_k(n, c, k):
    """The chance that one at least of k samples drawn from n is correct, of which c are: unbiased for any k <= n.

        1 - C(n-c, k) / C(n, k)                                            Chen et al. 2021, arXiv 2107.03374, eq. 1

    ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean_and_stderr(scores):
    """Mean over m problems and its standard error s / sqrt(m), s^2 = sum (x - mean)^2 / (m - 1); None for m = 1."""
    m = len(scores)
    if not m:
        raise ValueError("there are no problems to average over")
    mean = math.fsum(scores) / m
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in scores) / (m - 1) / m) if m > 1 else None


# 3. Sampling ------------------------------------------------------------------------------------------------

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def load(folder, device, dtype="auto"):
    """(model, tokenizer) of a checkpoint folder. dtype: of DTYPES; auto is bfloat16 on a GPU, else what is stored."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder}: no checkpoint here (config.json is missing); train one, or name one with --model")
    tokenizer = data.load_tokenizer(folder)
    if dtype == "auto" and device.startswith("cuda"):
        dtype = "bfloat16"
    return FalconH1.from_pretrained(folder, dtype=DTYPES[dtype], device=device), tokenizer


def write(model, tokenizer, chats, args, samples=1, admit=None, on_token=None, on_trace=None, progress=False):
    """model.generate() on conversations that end in a user's turn."""
    prompts = [data.render_chat(messages, tokenizer, generation_prompt=True)[0] for messages in chats]
    settings = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    return generate(model, prompts, samples=samples, stop_ids=tokenizer.stop_ids, admit=admit,
                    on_token=on_token, on_trace=on_trace, progress=progress, **settings)


def answer_of(text, problem):
    """What is voted on: the answer, the letter of the choice that it names, or for a problem with tests the code."""
    if decided_by_tests(problem):
        return (extract_code(text) or (None, None))[1]
    answer, choices = extract_answer(text), problem.extra.get("choices")
    named = chosen(answer, choices) if answer and choices else None
    return answer if named is None else data.LETTERS[named]


def sample(model, tokenizer, problems, args, samples, ranks, judge, file, online=None):
    """Sample replies to every problem, judge them, write them to `file` in --out; each rank takes its share.

    judge: None, or a Judge. online: None, or a deepconf.Online per problem, which decides during generation
    which traces start and which stop early; until then they hold what they would hold without it.

    Returns (groups, seconds): each problem's records, as traces.jsonl holds them, on all ranks; and the wall
    time of the slowest. ValueError if too many verdicts are unknown, after the file is written."""

    def record(trace, text, verdict):
        problem = problems[trace.prompt_index]
        correct = None if verdict.score is None else verdict.score == 1
        return {
            "problem": problem.id, "domain": problem.domain, "gold": problem.answer, "sample": trace.sample_index,
            "seed": args.seed, "text": text, "tokens": len(trace.tokens), "answer": answer_of(text, problem),
            "correct": correct, "reason": verdict.reason, "stop": trace.stop,
            "confidences": [round(confidence, 4) for confidence in trace.confidences],
        }

    def admit(prompt, index):
        if prompt % ranks.world != ranks.rank:
            return "done"
        return online[prompt].admit(index) if online else "go"

    def on_token(trace):
        return online[trace.prompt_index].on_token(trace.sample_index, trace.confidences[-1])

    def on_trace(trace):
        answer = answer_of(data.reply_text(trace.tokens, tokenizer), problems[trace.prompt_index])
        online[trace.prompt_index].finish(trace.sample_index, answer)

    chats = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    start = time.perf_counter()
    callbacks = (admit, on_token, on_trace) if online else (admit,)
    traces = write(model, tokenizer, chats, args, samples, *callbacks, progress=ranks.rank == 0)
    seconds = max(ranks.all_values(time.perf_counter() - start))

    texts = [data.reply_text(trace.tokens, tokenizer) for trace in traces]
    jobs = [(text, problems[trace.prompt_index]) for trace, text in zip(traces, texts)]
    verdicts = verify_many(jobs, progress=ranks.rank == 0, judge=judge, limit=args.code_tests, seed=args.seed,
                           unsafe=args.unsafe_local_execution)
    groups = [[] for _ in problems]
    for trace, text, verdict in zip(traces, texts, verdicts):
        groups[trace.prompt_index].append(record(trace, text, verdict))
    groups = ranks.gather(groups)

    path = Path(args.out) / file
    if ranks.rank == 0:
        data.write_jsonl(path, itertools.chain(*groups))
    ranks.gather([])  # the others wait: one that gave up now would end rank 0 while it writes
    data.check_unknown(f"{path} holds every reply, but", unknown_reasons(groups), sum(map(len, groups)))
    return groups, seconds


def count_tokens(groups):
    return sum(record["tokens"] for record in itertools.chain(*groups))


def unknown_reasons(groups):
    """Counter of why verdicts are unknown."""
    return Counter(record["reason"] for record in itertools.chain(*groups) if record["correct"] is None)


# 4. Methods -------------------------------------------------------------------------------------------------

WARM_UP = 16  # traces before DeepConf online stops any (its paper, arXiv 2508.15260)
BATCH = 4  # traces of a problem that start together after that; one by one halves the tokens per second and saves few


def row(checkpoint, method, scores, tokens, seconds):
    """A row of report.json. scores: per problem, 0 to 1, or None (unknown). tokens, seconds: in total."""
    known = [score for score in scores if score is not None]
    accuracy, stderr = mean_and_stderr(known) if known else (None, None)
    return {
        "checkpoint": checkpoint, "method": method, "accuracy": accuracy, "stderr": stderr, "tokens": round(tokens),
        "seconds": round(seconds, 2), "problems": len(known), "unknown": len(scores) - len(known),
    }


same_answer = lru_cache(maxsize=1 << 16)(is_equivalent)  # every method compares the same answers again


def sameness(problem):
    """When two answers are one vote; None: when they are the same text, as programs must be."""
    return None if decided_by_tests(problem) else same_answer


class Ballot:
    """What is voted on: a problem's traces, and when two of their answers are the same."""

    def __init__(self, problem, group):
        names = [f.name for f in fields(deepconf.Recorded)]
        self.traces = [deepconf.Recorded(**{name: record[name] for name in names}) for record in group]
        self.same = sameness(problem)

    def score(self, answer):
        """Whether a voted answer is right: True, False, or None if that is unknown."""
        return deepconf.is_right(answer, self.traces, self.same)


def mean_known(scores):
    """The mean of the scores that are known, None where none is."""
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None


def majority_score(ballot, m):
    """How often a majority of m traces is right: the mean over the n // m disjoint runs of m among a problem's n."""
    answers = [trace.answer for trace in ballot.traces]
    runs = [answers[i : i + m] for i in range(0, len(answers) - m + 1, m)]
    return mean_known([ballot.score(deepconf.vote(run, same=ballot.same)[0]) for run in runs])


def calibration(ballots, window):
    """Whether confidence tells right traces from wrong ones; where it does not, a vote by confidence must fail.

    A dict: "auroc", the chance that a right trace's lowest group confidence is above a wrong one's (0.5: it
    says nothing), and its means over right and over wrong traces; None where there are no such traces."""
    known = [trace for ballot in ballots for trace in ballot.traces if trace.correct is not None]
    lowest = np.array([deepconf.lowest_group(trace.confidences, window) for trace in known])
    correct = np.array([trace.correct for trace in known], bool)
    means = [float(lowest[side].mean()) if side.any() else None for side in (correct, ~correct)]
    auroc = None if None in means else deepconf.auroc(lowest, correct)
    return {"auroc": auroc, "confidence_right": means[0], "confidence_wrong": means[1]}


def pass_row(name, groups, seconds):
    """pass@1 from n samples a problem. Its cost is that of one sample, a share 1/n of what was measured."""
    n = len(groups[0])
    scores = []
    for group in groups:
        known = [record["correct"] for record in group if record["correct"] is not None]
        scores.append(pass_at_k(len(known), sum(known), 1) if known else None)
    return row(name, "pass@1", scores, count_tokens(groups) / n, seconds / n)


def sample_online(level, eta, model, tokenizer, problems, args, ranks, judge):
    """DeepConf online: (answers, groups, seconds), each problem's voted answer and what sample() returns."""
    settings = {"n_init": WARM_UP, "eta": eta, "window": args.window, "batch": BATCH}
    online = [deepconf.Online(args.samples, **settings, same=sameness(problem)) for problem in problems]
    file = f"traces-{level}.jsonl"
    groups, seconds = sample(model, tokenizer, problems, args, args.samples, ranks, judge, file, online)
    return ranks.gather([machine.result()[0] for machine in online]), groups, seconds


def evaluate(name, model, tokenizer, problems, args, ranks, judge):
    """All methods on one checkpoint: (rows, calibration, curve, groups).

    curve: (tokens, accuracy) of the majority of 1, 2, 4, ... traces; groups: these traces, as of sample()."""
    n = args.samples
    groups, seconds = sample(model, tokenizer, problems, args, n, ranks, judge, "traces.jsonl")
    tokens = count_tokens(groups)
    ballots = list(map(Ballot, problems, groups))

    def majority(m):
        return [majority_score(ballot, m) for ballot in ballots]

    votes = [deepconf.offline(b.traces, eta=10, window=args.window, same=b.same) for b in ballots]
    scores = [b.score(answer) for b, (answer, _) in zip(ballots, votes)]
    rows = [
        pass_row(name, groups, seconds),
        row(name, f"majority@{n}", majority(n), tokens, seconds),
        row(name, f"deepconf-offline@{n}", scores, tokens, seconds),
    ]
    for level, eta in (("low", 10), ("high", 90)) if n > WARM_UP else ():
        answers, stopped, spent = sample_online(level, eta, model, tokenizer, problems, args, ranks, judge)
        scores = [b.score(answer) for b, answer in zip(map(Ballot, problems, stopped), answers)]
        rows.append(row(name, f"deepconf-{level}@{n}", scores, count_tokens(stopped), spent))
        if level == "low":  # what plain voting makes of the tokens that LOW took for each problem
            budgets = [count_tokens([group]) for group in stopped]
            votes = [deepconf.majority_at(b.traces, most, b.same) for b, most in zip(ballots, budgets)]
            scores = [b.score(answer) for b, (answer, _) in zip(ballots, votes)]
            used = sum(count for _, count in votes)
            rows.insert(2, row(name, "majority@equal-tokens", scores, used, seconds * used / tokens))
    curve = [(tokens * m / n, mean_known(majority(m))) for m in (2**i for i in range(n.bit_length()))]
    return rows, calibration(ballots, args.window), curve, groups


# 5. The report ----------------------------------------------------------------------------------------------


def table(rows):
    """A Markdown table whose columns also line up in a terminal."""
    head = "| checkpoint | method                | accuracy % | stderr |     tokens | seconds "
    head += "| problems | unknown |"
    lines = [head, re.sub("[^|]", "-", head)]
    for r in rows:
        accuracy, stderr = ("-" if x is None else f"{100 * x:.1f}" for x in (r["accuracy"], r["stderr"]))
        lines.append(
            f"| {r['checkpoint']:10} | {r['method']:21} | {accuracy:>10} | {stderr:>6} "
            f"| {r['tokens']:10,} | {r['seconds']:7.1f} | {r['problems']:8} | {r['unknown']:7} |"
        )
    return "\n".join(lines)


def explain(name, measured, groups):
    """calibration(), and the unknown verdicts if there are any, in words."""
    text = f"{name}: all known traces are right, or all are wrong; confidence cannot tell them apart.\n"
    auroc, right, wrong = (measured[key] for key in ("auroc", "confidence_right", "confidence_wrong"))
    if auroc is not None:
        text = f"{name}: lowest group confidence of right traces {right:.2f}, of wrong ones {wrong:.2f} "
        text += f"on average; AUROC {auroc:.3f}.\n"
    if reasons := unknown_reasons(groups):
        text += f"{reasons.total()} of {sum(map(len, groups))} verdicts unknown: {data.describe(reasons)}.\n"
    return text


def plot(out, rows, curve, logs):
    """accuracy.png: accuracy against tokens. training.png: a curve for each log.jsonl in logs, a dict name -> path."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: matplotlib is not installed (pip install matplotlib)")
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    points = np.array([(tokens, 100 * accuracy) for tokens, accuracy in curve if accuracy is not None])
    axes.plot(*points.reshape(-1, 2).T, "o-", label="majority of 1, 2, 4, ...")  # reshape: none may be known
    for r in rows:
        if "deepconf" in r["method"] and r["accuracy"] is not None:
            axes.errorbar(r["tokens"], 100 * r["accuracy"], 100 * (r["stderr"] or 0), fmt="s", label=r["method"])
    axes.set(xlabel="generated tokens, all problems", ylabel="accuracy, %")
    axes.legend()
    save_figure(figure, out / "accuracy.png")

    if logs:
        figure = Figure(figsize=(6 * len(logs), 4), layout="constrained")
        for axes, (name, path) in zip(figure.subplots(1, len(logs), squeeze=False)[0], logs.items()):
            steps = [record for _, record in data.read_records(path)]
            measure = "reward" if "reward" in steps[-1] else "loss"
            axes.plot([step["step"] for step in steps], [step[measure] for step in steps])
            axes.set(title=name, xlabel="step", ylabel=measure)
        save_figure(figure, out / "training.png")


def save_figure(figure, path):
    temporary = path.with_name("unfinished-" + path.name)
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)


# 6. The command line ----------------------------------------------------------------------------------------


@dataclass
class Args:
    model: str = flag("", "checkpoint folder; empty: runs/tiny/rl/model, and runs/tiny/sft/model for pass@1")
    problems: str = flag("runs/tiny/data/heldout.jsonl", "file of problems, in any shape that data.py reads")
    out: str = flag("runs/tiny/eval", "folder to write")
    limit: int = flag(200, "problems to take, from the first on; 0 is all")
    samples: int = flag(32, "traces of a problem; DeepConf online needs more than its 16 warm-up traces")
    temperature: float = flag(0.85, "of sampling, 0 is greedy; the paper evaluates at 0.6")
    top_p: float = flag(1.0, "sample from the likeliest tokens of this total probability; the paper: 0.95")
    max_new_tokens: int = flag(256, "of a trace; the paper: 32768 or 65536")
    window: int = flag(16, "tokens of a confidence group, for traces of some 100 tokens; the paper: 2048")
    seed: int = flag(0, "of sampling")
    device: str = flag("", "cpu or cuda; empty: cuda where there is one")
    dtype: str = flag("auto", "float32, bfloat16 (half the memory; it rounds, so a seed gives other traces), "
                      "or auto: on a GPU bfloat16, as in RL, on a CPU what is stored")
    fresh: bool = flag(False, "replace what another evaluation left in --out")
    check: str = flag("", "only check that the verifier finds the solutions in this file of problems right")
    code_tests: int = flag(0, "tests of a code problem to run, a random sample of them; 0: all")
    judge: str = flag("", "chat endpoint, http://host:8000/v1, of a model that compares answers in words; "
                      "key: OPENAI_API_KEY")
    judge_model: str = flag("judge", "its name there")
    judge_cache: str = flag("runs/judge.jsonl", "file of its verdicts")
    unsafe_local_execution: bool = flag(False, "run programs of the model even where they cannot be isolated")
    chat: bool = flag(False, "talk to the checkpoint instead; Ctrl-D ends")


def check_args(args):
    for name, least in {"limit": 0, "code_tests": 0, "samples": 1, "max_new_tokens": 1, "window": 1}.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        raise ValueError("--temperature must be 0 or more, and --top-p above 0 and at most 1")
    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype}: not one of {', '.join(DTYPES)}")
    if args.chat and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--chat is a talk with one process: start it with python, or torchrun --nproc-per-node 1")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")


OUTPUTS = ("traces*.jsonl", "report.json", "report.md", "accuracy.png", "training.png")


def checkpoint_name(folder):
    """runs/tiny/rl/model is "rl": the folder's name, or its parent's where the folder is the `model` of a run."""
    path = Path(folder).resolve()
    return path.parent.name if path.name == "model" else path.name


def run(args):
    folders = [args.model] if args.model else ["runs/tiny/sft/model", "runs/tiny/rl/model"]
    ranks = train_sft.start_ranks(args.device)
    problems = data.read_problems(args.problems, args.limit, partial(check_scorable, judge=args.judge))
    check_code(problems, args.problems, args.unsafe_local_execution, quiet=ranks.rank > 0)
    judge = open_judge(args)
    loaded = [(checkpoint_name(folder), *load(folder, ranks.device, args.dtype)) for folder in folders]
    identity = {name: value for name, value in asdict(args).items() if name not in ("out", "fresh", "chat", "check")}
    ranks.gather([])  # here all ranks could load what they need: only now may --fresh delete anything
    if ranks.rank == 0:
        about = {"device": ranks.device, "ranks": ranks.world}
        _lock = data.open_run(args.out, identity, OUTPUTS, fresh=args.fresh, **about)  # held until the end
        print(" ".join(f"{name}={value}" for name, value in asdict(args).items()))
    out = Path(args.out)
    rows = []
    for name, model, tokenizer in loaded[:-1]:
        few = min(4, args.samples)
        groups, seconds = sample(model, tokenizer, problems, args, few, ranks, judge, f"traces-{name}.jsonl")
        rows.append(pass_row(name, groups, seconds))
    name, model, tokenizer = loaded[-1]
    more, measured, curve, groups = evaluate(name, model, tokenizer, problems, args, ranks, judge)
    if ranks.rank != 0:
        return
    rows += more
    report = f"{table(rows)}\n\n{explain(name, measured, groups)}"
    data.write_text(out / "report.json", json.dumps({"rows": rows, "calibration": measured}, indent=1) + "\n")
    data.write_text(out / "report.md", f"# Evaluation on {args.problems}\n\n{report}")
    logs = {checkpoint_name(folder): Path(folder).parent / "log.jsonl" for folder in folders}
    plot(out, rows, curve, {name: path for name, path in logs.items() if path.is_file()})
    example = json.loads((out / "traces.jsonl").open().readline())
    print(f"\n{problems[0].prompt}\n{example['text']}\nanswer {example['answer']}, correct: {example['correct']}\n")
    print(report)


def chat(args):
    """Talk to a checkpoint. The history holds whole replies; render_chat drops the reasoning of earlier turns."""
    model, tokenizer = load(args.model or "runs/tiny/rl/model", args.device, args.dtype)
    messages, shown = [], ""

    def stream(trace):
        nonlocal shown
        text = data.reply_text(trace.tokens, tokenizer)
        if not text.endswith("\ufffd"):  # the bytes of an unfinished character wait for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text
        return False

    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if question:
            messages.append({"role": "user", "content": question})
            shown = ""
            trace = write(model, tokenizer, [messages], args, on_token=stream)[0]
            messages.append({"role": "assistant", "content": data.reply_text(trace.tokens, tokenizer)})
            print()


def main(argv=None):
    def body():
        args = data.parse_args(Args, __doc__.partition("\n")[0], argv)
        if args.check:
            return check_file(args.check, args.unsafe_local_execution)
        check_args(args)
        chat(args) if args.chat else run(args)

    return train_sft.run_main(body)


if __name__ == "__main__":
    sys.exit(main())
