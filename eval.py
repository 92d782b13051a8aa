r"""Evaluation: answers, how they are compared, pass@k, votes, DeepConf, and the report.

    python eval.py                                          # the small CPU run: runs/tiny/sft and runs/tiny/rl, minutes
    python eval.py --model FOLDER --problems FILE --out FOLDER --fresh --temperature 0.6 --top-p 0.95 \
        --samples 512 --max-new-tokens 65536 --window 2048                             # the paper's setting (section 5)
    torchrun --nproc-per-node 8 eval.py --model FOLDER      # problems dealt out to ranks; up to rounding the same traces
    python eval.py --check FILE                             # can these problems be scored? Tries their own solutions
    python eval.py --chat --model FOLDER                    # talk to a checkpoint; Ctrl-D ends

What it writes to --out
    traces.jsonl            every sampled reply, one a line, with its answer and confidences; traces-sft.jsonl the other
                            checkpoint's, traces-low.jsonl and traces-high.jsonl those of DeepConf online
    report.json, report.md  the table that is also printed at the end
    accuracy.png            accuracy against tokens; training.png: the runs' log.jsonl. Both need matplotlib
    run.json                arguments, versions, hardware, commit

Methods (rows of the report), n samples a problem
    pass@1                   the mean over samples
    majority@n               one vote each
    majority@equal-tokens    as many votes as DeepConf LOW's tokens pay for: the fair comparison
    deepconf-offline@n       the most confident tenth votes
    deepconf-low@n, -high@n  the same while generating: after 16 warm-up traces one is stopped when its confidence falls
                             below the top 10% (LOW) or 90% (HIGH) of the warm-up's, and all of it when 95% agree.
                             Run live, so tokens and seconds are measured, not simulated

Deviations from the paper (arXiv 2601.02346)
- Its first tier compares strings and uses a computer algebra system, its second is a model. Here one parser of its own
  evaluates both answers, rational numbers exactly and others to 1e-13, variables at three points: expressions that agree
  there are the same but for a chance that can be neglected (Schwartz and Zippel, for polynomials). So it simplifies
  nothing and cannot hang. It knows no calculus and never runs eval().
- Its code rewards come from a service; here a sandbox of Linux's namespaces, limits and call filter, Python only.
- Its 32768 tokens or more, temperature 0.6 and top-p 0.95 are flags; the defaults fit the small run.

To copy sections 1, 2, 3 and 5 (answers, code, estimators) nothing else is needed; to copy all, also take the other five files that
it builds on: model.py, ssm_scan.py, data.py, deepconf.py, train_sft.py (ranks).
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
    Judge, check_code, check_gold, check_problem, chosen, extract_answer, extract_code, is_equivalent, verify,
)


def verify_many(jobs, workers=0, progress=False, **settings):
    """Verdicts on (text, problem) pairs, in their order, several at once.

    A thread for each does little but wait, so one that hangs keeps one of them, and no processor, until its limit.
    workers: 0 is two for each processor. progress: whether to show a bar. settings: those of verify.
    """
    pool = ThreadPoolExecutor(workers or 2 * (os.cpu_count() or 1))
    try:
        verdicts = pool.map(lambda job: verify(*job, **settings), jobs)
        return list(tqdm(verdicts, "verifying", len(jobs), leave=False, disable=not (progress and jobs)))
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for thousands


def open_judge(args):
    """The Judge that --judge names, or None. It is tried here: an endpoint that is down is an error before any work."""
    if not args.judge:
        return None
    return Judge(args.judge, args.judge_model, args.judge_cache, os.environ.get("OPENAI_API_KEY", ""))


def check_file(path, unsafe=False):
    """Print how many problems of a file the verifier can score, and the first it cannot; ValueError if there are any."""
    counts, failed, notes = defaultdict(Counter), [], set()
    problems = data.read_problems(path)
    check_code(problems, path, unsafe)
    for problem in tqdm(problems, "checking", leave=False, disable=all(problem.answer for problem in problems)):
        status, why = check_problem(problem, unsafe)
        counts[problem.domain][status] += 1
        if status == "failed":
            failed.append(f"{problem.id}: {why}")
        elif why:
            notes.add(why)
    print("| domain     |   rows |  right | failed | not checked |\n|------------|--------|--------|--------|-------------|")
    for domain, count in sorted(counts.items()):
        print(f"| {domain:10} | {count.total():6} | {count['right']:6} | {count['failed']:6} | {count['not checked']:11} |")
    print(*sorted(notes), *failed[:10], sep="\n", end="\n" if notes or failed else "")
    if failed:
        raise ValueError(f"{path}: {len(failed)} rows cannot be scored")


# 5. Estimators --------------------------------------------------------------------------------------------------------


def pass_at_k(n, c, k):
    """The chance that one at least of k samples drawn from n is correct, of which c are: unbiased for any k <= n.

        1 - C(n-c, k) / C(n, k)                                            Chen et al. 2021, arXiv 2107.03374, eq. 1

    Raises:
        ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean_and_stderr(scores):
    """Mean over m problems and its standard error s / sqrt(m), s^2 = sum (x - mean)^2 / (m - 1); None for m = 1."""
    m = len(scores)
    if m == 0:
        raise ValueError("there are no problems to average over")
    mean = math.fsum(scores) / m
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in scores) / (m - 1) / m) if m > 1 else None


# 6. Sampling ----------------------------------------------------------------------------------------------------------


DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def load(folder, device, dtype="auto"):
    """(model, tokenizer) of a checkpoint folder. dtype: of DTYPES; auto is bfloat16 on a GPU, else what is stored."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder}: no checkpoint here (config.json is missing); train one, or name one with --model")
    tokenizer = train_sft.load_tokenizer(folder)
    if dtype == "auto" and device.startswith("cuda"):
        dtype = "bfloat16"
    return FalconH1.from_pretrained(folder, dtype=DTYPES[dtype], device=device), tokenizer


def reply_text(trace, tokenizer):
    """What a model wrote, without the token that ends it."""
    ended = trace.tokens and trace.tokens[-1] in tokenizer.stop_ids
    return tokenizer.decode(trace.tokens[:-1] if ended else trace.tokens)


def write(model, tokenizer, chats, args, samples=1, admit=None, on_token=None, on_trace=None, progress=False):
    """model.generate() on conversations that end in a user's turn."""
    prompts = [data.render_chat(messages, tokenizer, generation_prompt=True)[0] for messages in chats]
    return generate(
        model, prompts, samples=samples, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
        top_p=args.top_p, seed=args.seed, stop_ids=tokenizer.stop_ids, admit=admit, on_token=on_token,
        on_trace=on_trace, progress=progress,
    )


def answer_of(text, problem):
    """What is voted on: the answer, the letter of the choice that it names, or for a problem with tests the code."""
    if not problem.answer:
        return (extract_code(text) or (None, None))[1]
    answer, choices = extract_answer(text), problem.extra.get("choices")
    named = chosen(answer, choices) if answer and choices else None
    return answer if named is None else data.LETTERS[named]


def sample(model, tokenizer, problems, args, samples, ranks, judge, file, online=None):
    """Sample replies to every problem, judge them and write them to `file` in --out. Rank r takes every world-th problem.

    Args:
        judge: None, or a Judge.
        online: None, or a deepconf.Online for each problem. It decides during generation which traces start and which
            stop early; what they hold until then is what they would hold without it.
    Returns:
        (groups, seconds): for each problem the records of its traces, as traces.jsonl holds them, and the wall time of
        the slowest rank. All ranks get all groups.
    """

    def record(trace, text, verdict):
        problem = problems[trace.prompt_index]
        return {
            "problem": problem.id, "domain": problem.domain, "gold": problem.answer, "sample": trace.sample_index,
            "seed": args.seed, "text": text, "tokens": len(trace.tokens), "answer": answer_of(text, problem),
            "correct": verdict.score == 1, "reason": verdict.reason, "stop": trace.stop,
            "confidences": [round(confidence, 4) for confidence in trace.confidences],
        }

    def admit(prompt, index):
        if prompt % ranks.world != ranks.rank:
            return "done"
        return online[prompt].admit(index) if online else "go"

    def on_token(trace):
        return online[trace.prompt_index].on_token(trace.sample_index, trace.confidences[-1])

    def on_trace(trace):
        online[trace.prompt_index].finish(
            trace.sample_index, answer_of(reply_text(trace, tokenizer), problems[trace.prompt_index])
        )

    chats = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    start = time.perf_counter()
    callbacks = (admit, on_token, on_trace) if online else (admit,)
    traces = write(model, tokenizer, chats, args, samples, *callbacks, progress=ranks.rank == 0)
    seconds = max(ranks.all_values(time.perf_counter() - start))
    texts, groups = [reply_text(trace, tokenizer) for trace in traces], [[] for _ in problems]
    jobs = [(text, problems[trace.prompt_index]) for trace, text in zip(traces, texts)]
    verdicts = verify_many(jobs, progress=ranks.rank == 0, judge=judge, unsafe=args.unsafe_local_execution)
    for trace, text, verdict in zip(traces, texts, verdicts):
        groups[trace.prompt_index].append(record(trace, text, verdict))
    groups = ranks.gather(groups)
    if ranks.rank == 0:
        data.write_jsonl(Path(args.out) / file, itertools.chain(*groups))
    return groups, seconds


# 7. Methods -----------------------------------------------------------------------------------------------------------


WARM_UP = 16  # traces before DeepConf online stops any (its paper, arXiv 2508.15260)
BATCH = 4  # traces of a problem that start together after that; one by one halves the tokens per second and saves few


def row(checkpoint, method, scores, tokens, seconds):
    """A row of report.json. scores: one per problem, from 0 to 1; tokens, seconds: what all of them cost together."""
    accuracy, stderr = mean_and_stderr(scores)
    return {
        "checkpoint": checkpoint, "method": method, "accuracy": accuracy, "stderr": stderr, "tokens": round(tokens),
        "seconds": round(seconds, 2), "problems": len(scores),
    }


def count_tokens(groups):
    return sum(record["tokens"] for record in itertools.chain(*groups))


def ballot(group):
    """The traces of a problem as deepconf takes them, equivalent answers spelled alike: votes then compare plain text."""
    spelling, traces = {}, []
    for record in group:
        answer = record["answer"]
        if answer not in spelling:
            others = () if record.get("gold") == "" else spelling.values()  # programs are the same if they are spelled the same
            spelling[answer] = next((one for one in others if is_equivalent(answer, one)), answer)
        traces.append(deepconf.Recorded(**{f.name: record[f.name] for f in fields(deepconf.Recorded)}))
        traces[-1].answer = spelling[answer]
    return traces


def majority_score(traces, m):
    """How often a majority of m traces is right: the mean over the n // m disjoint runs of m among a problem's n."""
    runs = [traces[i : i + m] for i in range(0, len(traces) - m + 1, m)]
    votes = [deepconf.vote([trace.answer for trace in run])[0] for run in runs]
    return sum(deepconf.is_right(answer, traces) for answer in votes) / len(votes)


def calibration(ballots, window):
    """Whether confidence tells right traces from wrong ones; where it does not, a vote by confidence must fail.

    Returns:
        dict: "auroc", the chance that a right trace's lowest group confidence is above a wrong one's (0.5: it says
        nothing), and its means over right and wrong traces; None where there are no such traces.
    """
    pooled = [(deepconf.lowest_group(t.confidences, window), t.correct) for t in itertools.chain(*ballots)]
    lowest, correct = np.array([c for c, _ in pooled]), np.array([right for _, right in pooled])
    means = [float(lowest[side].mean()) if side.any() else None for side in (correct, ~correct)]
    auroc = None if None in means else deepconf.auroc(lowest, correct)
    return {"auroc": auroc, "confidence_right": means[0], "confidence_wrong": means[1]}


def pass_row(name, groups, seconds):
    """pass@1 from n samples a problem. Its cost is that of one sample, a share 1/n of what was measured."""
    n = len(groups[0])
    scores = [pass_at_k(n, sum(record["correct"] for record in group), 1) for group in groups]
    return row(name, "pass@1", scores, count_tokens(groups) / n, seconds / n)


def evaluate(name, model, tokenizer, problems, args, ranks, judge):
    """All methods on one checkpoint.

    Returns:
        (rows, calibration, curve): curve lists (tokens, accuracy) of the majority of 1, 2, 4, ... traces.
    """
    groups, seconds = sample(model, tokenizer, problems, args, args.samples, ranks, judge, "traces.jsonl")
    n, tokens, ballots = args.samples, count_tokens(groups), [ballot(group) for group in groups]

    def majority(m):
        return [majority_score(traces, m) for traces in ballots]

    answers = [deepconf.offline(traces, eta=10, window=args.window)[0] for traces in ballots]
    right = [float(deepconf.is_right(*pair)) for pair in zip(answers, ballots)]
    rows = [
        pass_row(name, groups, seconds),
        row(name, f"majority@{n}", majority(n), tokens, seconds),
        row(name, f"deepconf-offline@{n}", right, tokens, seconds),
    ]
    for level, eta in (("low", 10), ("high", 90)) if n > WARM_UP else ():
        settings = {"n_init": WARM_UP, "eta": eta, "window": args.window, "batch": BATCH}
        online = [deepconf.Online(n, **settings, same=is_equivalent if problem.answer else None) for problem in problems]
        stopped, spent = sample(model, tokenizer, problems, args, n, ranks, judge, f"traces-{level}.jsonl", online)
        answers = ranks.gather([machine.result()[0] for machine in online])
        right = [float(deepconf.is_right(answer, ballot(group))) for answer, group in zip(answers, stopped)]
        rows.append(row(name, f"deepconf-{level}@{n}", right, count_tokens(stopped), spent))
        if level == "low":  # what plain voting makes of the tokens that LOW took for each problem
            plain = [deepconf.majority_at(traces, count_tokens([group])) for traces, group in zip(ballots, stopped)]
            right, used = [float(deepconf.is_right(a, t)) for (a, _), t in zip(plain, ballots)], sum(u for _, u in plain)
            rows.insert(2, row(name, "majority@equal-tokens", right, used, seconds * used / tokens))
    curve = [(tokens * m / n, sum(majority(m)) / len(problems)) for m in (2**i for i in range(n.bit_length()))]
    return rows, calibration(ballots, args.window), curve


# 8. The report --------------------------------------------------------------------------------------------------------


def table(rows):
    """A Markdown table whose columns also line up in a terminal."""
    lines = ["| checkpoint | method                | accuracy % | stderr |     tokens | seconds | problems |"]
    lines.append(re.sub("[^|]", "-", lines[0]))
    for r in rows:
        stderr = "-" if r["stderr"] is None else f"{100 * r['stderr']:.1f}"
        lines.append(
            f"| {r['checkpoint']:10} | {r['method']:21} | {100 * r['accuracy']:10.1f} | {stderr:>6} "
            f"| {r['tokens']:10,} | {r['seconds']:7.1f} | {r['problems']:8} |"
        )
    return "\n".join(lines)


def explain(name, measured):
    """calibration() as a sentence."""
    if measured["auroc"] is None:
        return f"{name}: all traces are right, or all are wrong; confidence cannot tell them apart."
    return (
        f"{name}: lowest group confidence of right traces {measured['confidence_right']:.2f}, of wrong ones "
        f"{measured['confidence_wrong']:.2f} on average; AUROC {measured['auroc']:.3f}."
    )


def plot(out, rows, curve, logs):
    """accuracy.png: accuracy against tokens. training.png: a curve for each log.jsonl in logs, a dict name -> path."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: matplotlib is not installed (pip install matplotlib)")
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*[(tokens, 100 * accuracy) for tokens, accuracy in curve]), "o-", label="majority of 1, 2, 4, ...")
    for r in rows:
        if "deepconf" in r["method"]:
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


# 9. The command line --------------------------------------------------------------------------------------------------


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
    dtype: str = flag(
        "auto",
        "of weights and activations: float32, bfloat16, or auto: on a GPU bfloat16, as RL samples, on a CPU what is "
        "stored. bfloat16 halves memory and uses a GPU's tensor cores; it rounds, so a seed gives other traces",
    )
    fresh: bool = flag(False, "replace what another evaluation left in --out")
    check: str = flag("", "only check that the verifier finds the solutions in this file of problems right")
    judge: str = flag("", "chat endpoint, http://host:8000/v1, of a model that compares answers in words; key: OPENAI_API_KEY")
    judge_model: str = flag("judge", "its name there")
    judge_cache: str = flag("runs/judge.jsonl", "file of its verdicts")
    unsafe_local_execution: bool = flag(False, "run programs of the model even where they cannot be isolated")
    chat: bool = flag(False, "talk to the checkpoint instead; Ctrl-D ends")


def check_args(args):
    for name, least in {"limit": 0, "samples": 1, "max_new_tokens": 1, "window": 1}.items():
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
    problems = data.read_problems(args.problems, args.limit, None if args.judge else check_gold)
    check_code(problems, args.problems, args.unsafe_local_execution, quiet=ranks.rank > 0)
    judge = open_judge(args)
    loaded = [(checkpoint_name(folder), *load(folder, ranks.device, args.dtype)) for folder in folders]
    identity = {name: value for name, value in asdict(args).items() if name not in ("out", "fresh", "chat", "check")}
    ranks.gather([])  # here all ranks could load what they need: only now may --fresh delete anything
    if ranks.rank == 0:
        _lock = data.open_run(args.out, identity, OUTPUTS, fresh=args.fresh, device=ranks.device, ranks=ranks.world)  # until the end
        print(" ".join(f"{name}={value}" for name, value in asdict(args).items()))
    out, rows = Path(args.out), []
    for name, model, tokenizer in loaded[:-1]:
        groups, seconds = sample(model, tokenizer, problems, args, min(4, args.samples), ranks, judge, f"traces-{name}.jsonl")
        rows.append(pass_row(name, groups, seconds))
    name, model, tokenizer = loaded[-1]
    more, measured, curve = evaluate(name, model, tokenizer, problems, args, ranks, judge)
    if ranks.rank != 0:
        return
    rows += more

    report = f"{table(rows)}\n\n{explain(name, measured)}\n"
    data.write_text(out / "report.json", json.dumps({"rows": rows, "calibration": measured}, indent=1) + "\n")
    data.write_text(out / "report.md", f"# Evaluation on {args.problems}\n\n{report}")
    logs = {checkpoint_name(folder): Path(folder).parent / "log.jsonl" for folder in folders}
    plot(out, rows, curve, {name: path for name, path in logs.items() if path.is_file()})
    example = json.loads((out / "traces.jsonl").open().readline())
    print(f"\n{problems[0].prompt}\n{example['text']}\nanswer {example['answer']}, correct: {example['correct']}\n")
    print(report)
    if judge:
        print(f"the judge's verdicts on this rank: {dict(judge.counts)}, unknown because of {dict(judge.reasons)}")


def chat(args):
    """Talk to a checkpoint. The history holds whole replies; render_chat drops the reasoning of earlier turns."""
    model, tokenizer = load(args.model or "runs/tiny/rl/model", args.device, args.dtype)
    messages, shown = [], ""

    def stream(trace):
        nonlocal shown
        text = reply_text(trace, tokenizer)
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
            messages.append({"role": "assistant", "content": reply_text(trace, tokenizer)})
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
