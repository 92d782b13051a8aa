r"""Evaluation: sample replies, judge them, vote on their answers, and report accuracy against tokens.

    python eval.py                      # the small CPU run: runs/tiny/sft and runs/tiny/rl, minutes
    python eval.py --model FOLDER --problems FILE --out FOLDER --fresh --temperature 0.6 --top-p 0.95 \
        --samples 512 --max-new-tokens 65536 --window 2048      # the paper's setting (section 5)
    torchrun --nproc-per-node 8 eval.py --model FOLDER   # problems shared out; the same traces up to rounding
    python eval.py --check FILE         # can these problems be scored? Tries their own solutions
    python eval.py --chat --model FOLDER                 # talk to a checkpoint; Ctrl-D ends

What it writes to --out
    traces.jsonl            every sampled reply, with answer, verdict and confidences; traces-sft.jsonl of the
                            other checkpoint, traces-low.jsonl and traces-high.jsonl of DeepConf online
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
                             (HIGH) of theirs, and all sampling stops when 95% of the votes agree

An unknown verdict (no sandbox, a judge that is down) says nothing about the reply: `correct` is null. pass@1
is the mean over the other samples; a vote is right if a trace that gave its answer is known to be right.
Problems without a known verdict are left out of a row's mean and counted in its last column. If more than 2%
of the verdicts are unknown, the run ends with an error, after it has written the traces.

Deviations from the paper (arXiv 2601.02346): 32768 tokens or more, temperature 0.6 and top-p 0.95 are flags;
the defaults fit the small run. rewards.py and sandbox.py say how they differ from its verifiers.
To copy this, also take all other scripts but the two trainers.
"""

import json
import math
import os
import sys
import time
from collections import Counter
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

# torchrun sets both. Rank r samples all replies to the problems r, r + WORLD, r + 2 WORLD, ...
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

# 1. Sampling ------------------------------------------------------------------------------------------------

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}

class Samples(NamedTuple):
    """Replies to all problems, and what they cost."""
    ballots: list  # per problem: (replies as from judge_all, `same` as for deepconf.vote)
    n: int  # replies per problem, at most
    tokens: int  # of all replies
    seconds: float  # wall time of generation, on the slowest rank

def load(folder, device, dtype="auto"):
    """(model, tokenizer) of a checkpoint. dtype auto: bfloat16 on a GPU, on a CPU the stored one."""
    tokenizer = data.load_tokenizer(folder)
    if dtype == "auto" and device.startswith("cuda"):
        dtype = "bfloat16"
    return FalconH1.from_pretrained(data.model_folder(folder), dtype=DTYPES[dtype], device=device), tokenizer

def reply_to(chats, model, tokenizer, args, **more):
    """Traces of replies to chats, each of which ends with a user's turn. more: for model.generate."""
    prompts = [data.render_chat(messages, tokenizer, generation_prompt=True)[0] for messages in chats]
    return generate(model, prompts, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                    top_p=args.top_p, seed=args.seed, stop_ids=tokenizer.stop_ids, **more)

def sample(model, tokenizer, problems, args, judge, n, file, online=None):
    """Sample n replies to every problem, judge them, and write them to `file` in --out.

    Args:
        judge: a rewards.Judge, or None.
        online: a deepconf.Online per problem, which decides during generation which traces start and which
            stop early; up to its stop a trace is the same as without. None: n complete replies.
    Returns: Samples, the same on every rank; each rank samples its share of the problems.
    Raises: ValueError if too many verdicts are unknown, after the file is written.
    """
    def admit(i, index):  # may reply `index` to problem i start?
        if i % WORLD != RANK:  # another rank samples this problem
            return deepconf.DONE
        return online[i].admit(index) if online else deepconf.GO

    def on_token(trace):  # must it stop?
        return online[trace.prompt_index].on_token(trace.sample_index, trace.confidences[-1])

    def on_trace(trace):  # its answer may vote
        answer = answer_of(data.reply_text(trace.tokens, tokenizer), problems[trace.prompt_index])
        online[trace.prompt_index].finish(trace.sample_index, answer)

    # Without DeepConf nothing has to be looked at while a trace runs.
    callbacks = {"admit": admit, "on_token": on_token, "on_trace": on_trace} if online else {"admit": admit}
    chats = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    with together():
        start = time.perf_counter()
        traces = reply_to(chats, model, tokenizer, args, samples=n, progress=RANK == 0, **callbacks)
        seconds = time.perf_counter() - start
        replies = judge_all(traces, tokenizer, problems, args, judge)

    # Every rank gets the replies of all ranks, in the order of the problems.
    groups = {problem.id: [] for problem in problems}
    for reply in sum(gather(replies), []):
        groups[reply.problem].append(reply)
    replies = [reply for group in groups.values() for reply in group]
    with together():
        if RANK == 0:  # write before checking: samples are expensive and must not be lost
            path = Path(args.out) / file
            data.write_jsonl(path, map(vars, replies))
            data.check_unknown(f"{path} holds every reply, but", unknown_reasons(replies), len(replies))

    # Equivalent answers are one vote. Programs are one vote only if they are the same text.
    same = [None if decided_by_tests(problem) else same_answer for problem in problems]
    tokens = sum(reply.tokens for reply in replies)
    return Samples([*zip(groups.values(), same)], n, tokens, max(gather(seconds)))

# 2. Verdicts ------------------------------------------------------------------------------------------------

# Every method compares the same answers, and a comparison parses two expressions.
same_answer = lru_cache(maxsize=1 << 16)(is_equivalent)

def judge_all(traces, tokenizer, problems, args, judge):
    """Traces of model.generate -> replies: objects whose attributes are the fields of traces.jsonl.

    deepconf.py takes them as traces: it reads .answer, .correct and .confidences."""
    texts = [data.reply_text(trace.tokens, tokenizer) for trace in traces]
    asked = [problems[trace.prompt_index] for trace in traces]
    settings = {"limit": args.code_tests, "seed": args.seed, "unsafe": args.unsafe_local_execution}
    # The threads only wait for programs or for a judge; the sandbox limits how many programs run at once.
    pool = ThreadPoolExecutor(2 * (os.cpu_count() or 1))
    try:
        verdicts = pool.map(partial(verify, judge=judge, **settings), texts, asked)
        verdicts = [*tqdm(verdicts, "verifying", len(texts), leave=False, disable=RANK > 0 or not texts)]
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for thousands
    return [SimpleNamespace(
        problem=problem.id, domain=problem.domain, gold=problem.answer, sample=trace.sample_index,
        seed=args.seed, text=text, tokens=len(trace.tokens), answer=answer_of(text, problem),
        correct=None if verdict.score is None else verdict.score == 1, reason=verdict.reason, stop=trace.stop,
        # 9 digits identify a float32, so that a replay decides as the live run did.
        confidences=[float(f"{confidence:.9g}") for confidence in trace.confidences],
    ) for trace, text, problem, verdict in zip(traces, texts, asked, verdicts)]

def answer_of(text, problem):
    """What a reply votes for: its program if tests decide, else its answer, or the letter of its choice."""
    if decided_by_tests(problem):
        code = extract_code(text)
        return code[1] if code else None
    answer = extract_answer(text)
    choices = problem.extra.get("choices")
    choice = chosen(answer, choices) if answer and choices else None
    return answer if choice is None else data.LETTERS[choice]

def unknown_reasons(replies):
    """Counter of the reasons of unknown verdicts."""
    return Counter(reply.reason for reply in replies if reply.correct is None)

# 3. Methods: one function per row of the report -------------------------------------------------------------

WARM_UP = 16  # traces before DeepConf online stops any (its paper, arXiv 2508.15260)
BATCH = 4  # traces that then start together; starting them one by one halves throughput, saves few tokens

def pass_at_k(n, c, k):
    """The chance that at least one of k samples is correct, if c of n are. Unbiased for k <= n.

        1 - C(n-c, k) / C(n, k)                            Chen et al. 2021, arXiv 2107.03374, equation 1
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)

def report_row(method, samples, scores, tokens):
    """A row of report.json.

    scores: per problem, 0 to 1, or None where unknown. tokens: what the method takes for all problems."""
    accuracy, stderr = deepconf.mean_and_stderr(scores)
    unknown = scores.count(None)
    seconds = samples.seconds * tokens / samples.tokens  # the method's share of the sampling time
    return {"method": method, "accuracy": accuracy, "stderr": stderr, "tokens": round(tokens),
            "seconds": round(seconds, 2), "problems": len(scores) - unknown, "unknown": unknown}

def vote_row(method, samples, votes, tokens):
    """The row of a vote. votes: per problem (answer, _). An answer is right if a reply that gives it is."""
    scores = [deepconf.is_right(answer, *ballot) for (answer, _), ballot in zip(votes, samples.ballots)]
    return report_row(method, samples, scores, tokens)

def pass_at_1(samples):
    """The mean over the replies; it costs one reply per problem."""
    scores = []
    for replies, _ in samples.ballots:
        known = [reply.correct for reply in replies if reply.correct is not None]
        scores.append(pass_at_k(len(known), sum(known), 1) if known else None)
    return report_row("pass@1", samples, scores, samples.tokens / samples.n)

def majority(samples):
    """One vote per reply, without a limit on tokens: the usual self-consistency."""
    votes = [deepconf.majority_at(replies, math.inf, same) for replies, same in samples.ballots]
    return vote_row(f"majority@{samples.n}", samples, votes, samples.tokens)

def majority_curve(samples):
    """(tokens, accuracy) of the majority of 1, 2, 4, ... replies: what more samples gain without DeepConf."""
    points = []
    for m in (2**i for i in range(samples.n.bit_length())):
        scores = []
        for replies, same in samples.ballots:
            # Cut the replies into disjoint runs of m. The score of a problem is the mean over its runs.
            runs = [replies[i : i + m] for i in range(0, len(replies) - m + 1, m)]
            answers = [deepconf.majority_at(run, math.inf, same)[0] for run in runs]
            right = [deepconf.is_right(answer, replies, same) for answer in answers]
            scores.append(deepconf.mean_and_stderr(right)[0])
        points.append((samples.tokens * m / samples.n, deepconf.mean_and_stderr(scores)[0]))
    return points

def majority_at_equal_tokens(samples, low):
    """As many votes per problem as LOW's tokens for it pay for: the baseline at DeepConf's price.

    low: the Samples of DeepConf LOW."""
    votes = []
    for (replies, same), (stopped, _) in zip(samples.ballots, low.ballots):
        budget = sum(reply.tokens for reply in stopped)
        votes.append(deepconf.majority_at(replies, budget, same))
    return vote_row("majority@equal-tokens", samples, votes, sum(tokens for _, tokens in votes))

def deepconf_offline(samples, window):
    """Of all replies the most confident tenth votes. Confidence and weight: the lowest group of a reply."""
    votes = [deepconf.offline(replies, eta=10, window=window, same=same) for replies, same in samples.ballots]
    return vote_row(f"deepconf-offline@{samples.n}", samples, votes, samples.tokens)

def deepconf_online(level, eta, sample, args, ballots):
    """Traces are stopped while they are sampled -> (row, Samples).

    The tokens of stopped traces count. Seconds fall less than tokens, as the last batches are small.
    eta: percentage of the warm-up traces that is kept. sample: as for evaluate. ballots: of any Samples."""
    settings = {"n_init": WARM_UP, "eta": eta, "window": args.window, "batch": BATCH}
    online = [deepconf.Online(args.samples, same=same, **settings) for _, same in ballots]
    samples = sample(args.samples, f"traces-{level}.jsonl", online)
    # Only the rank that sampled problem i knows the result of its vote.
    results = gather([machine.result() for machine in online])
    votes = [results[i % WORLD][i] for i in range(len(online))]
    return vote_row(f"deepconf-{level}@{args.samples}", samples, votes, samples.tokens), samples

def evaluate(sample, args):
    """All methods on one checkpoint -> (rows, Samples). sample(n, file, online=None): sample() for it."""
    samples = sample(args.samples, "traces.jsonl")
    rows = [pass_at_1(samples), majority(samples), deepconf_offline(samples, args.window)]
    if args.samples > WARM_UP:  # with fewer, online would never stop a trace
        low_row, low = deepconf_online("low", 10, sample, args, samples.ballots)
        high_row, _ = deepconf_online("high", 90, sample, args, samples.ballots)
        rows = [*rows[:2], majority_at_equal_tokens(samples, low), rows[2], low_row, high_row]
    return rows, samples

# 4. Report and plot -----------------------------------------------------------------------------------------

def markdown(line, rows):
    """A table that also lines up in a terminal. line: the format string of a row; rows: the head first."""
    lines = [line.format(*row) for row in rows]
    lines.insert(1, "".join("|" if c == "|" else "-" for c in lines[0]))
    return "\n".join(lines)

def table(rows):
    """The rows of report.json as Markdown, accuracies in percent."""
    cells = [("checkpoint", "method", "accuracy %", "stderr", "tokens", "seconds", "problems", "unknown")]
    for r in rows:
        accuracy, stderr = map(deepconf.percent, (r["accuracy"], r["stderr"]))
        cells.append((r["checkpoint"], r["method"], accuracy, stderr, f"{r['tokens']:,}",
                      f"{r['seconds']:.1f}", r["problems"], r["unknown"]))
    return markdown("| {:10} | {:21} | {:>10} | {:>6} | {:>10} | {:>7} | {:>8} | {:>7} |", cells)

def write_report(args, rows, samples, problem):
    """Write report.json, report.md and accuracy.png; print the table, and the first reply to `problem`."""
    replies = [reply for group, _ in samples.ballots for reply in group]
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
    # A Figure of its own: pyplot would look for a display.
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    known = [(tokens, 100 * accuracy) for tokens, accuracy in curve if accuracy is not None]
    axes.plot(*zip(*known), "o-", label="majority of 1, 2, 4, ...")
    for r in rows:
        if "deepconf" in r["method"] and r["accuracy"] is not None:
            stderr = 100 * (r["stderr"] or 0)
            axes.errorbar(r["tokens"], 100 * r["accuracy"], stderr, fmt="s", label=r["method"])
    axes.set(xlabel="generated tokens, all problems", ylabel="accuracy, %")
    axes.legend()
    figure.savefig(path, dpi=150)

# 5. --check and --chat --------------------------------------------------------------------------------------

STATUSES = {1: "right", 0: "failed", None: "not checked"}  # by the score of the verdict

def check_problem(problem, unsafe=False):
    """(status, why) of the verifier's verdict on a problem's own solution; no reason if it is right."""
    solution = problem.extra.get("solution")
    solution = solution if isinstance(solution, str) else ""
    if decided_by_tests(problem):
        if not solution:
            return "not checked", "code without a solution: only its tests were read"
        entry_point = problem.extra.get("entry_point", "")
        start = problem.prompt if entry_point else ""  # HumanEval's solutions continue the prompt
        tests = problem.extra.get("tests")
        verdict = run_code(start + solution, tests, entry_point=entry_point, prompt=start, unsafe=unsafe)
        return STATUSES[verdict.score], None if verdict.score == 1 else verdict.reason
    # Without tests: can the reference answer be compared at all, and does the solution arrive at it?
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
    # Programs take their time, hence a bar; disable=None keeps it out of log files.
    results = [(p, *check_problem(p, unsafe)) for p in tqdm(problems, "checking", leave=False, disable=None)]
    rows = [("domain", "rows", *STATUSES.values())]
    for domain in sorted({p.domain for p in problems}):
        found = [status for p, status, _ in results if p.domain == domain]
        rows.append((domain, len(found), *map(found.count, STATUSES.values())))
    # After the table, each reason for not checking once, and the first ten failures.
    unchecked = {why for _, status, why in results if status == "not checked"}
    failed = [f"{p.where}: {p.id}: {why}" for p, status, why in results if status == "failed"]
    form = "| {:10} | {:>6} | {:>6} | {:>6} | {:>11} |"
    print("\n".join([markdown(form, rows), *sorted(unchecked), *failed[:10]]))
    if failed:
        raise ValueError(f"{path}: {len(failed)} rows cannot be scored")

def chat(args):
    """Talk to a checkpoint; replies are printed while they are generated.

    The model sees the whole conversation, except for the reasoning in its earlier replies."""
    model, tokenizer = load(args.model or SMALL_RUN[-1], args.device, args.dtype)
    messages = []
    shown = ""  # of the reply so far
    def stream(trace):
        nonlocal shown
        text = data.reply_text(trace.tokens, tokenizer)
        if not text.endswith("\ufffd"):  # the first bytes of a character wait for the rest
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
            reply_to([messages], model, tokenizer, args, on_token=stream)
            messages.append({"role": "assistant", "content": shown})
            print()

# 6. Ranks ---------------------------------------------------------------------------------------------------

def gather(value):
    """The list of all ranks' values, by rank; every rank gets it."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values

@contextmanager
def together():
    """All ranks leave the block together. A user's error on one of them ends all; rank 0 prints it.

    Otherwise the other ranks would wait in gather() for one that has ended."""
    error = None
    try:
        yield
    except (ValueError, OSError) as e:
        error = str(e)
    # The first error in order of ranks is the one that is printed.
    for message in gather(error):
        if message is not None:
            raise ValueError(message) if RANK == 0 else SystemExit(1)

# 7. The command line ----------------------------------------------------------------------------------------

SMALL_RUN = ["runs/tiny/sft", "runs/tiny/rl"]  # its checkpoints, from the first to the last
OUTPUTS = ("traces*.jsonl", "report.*", "accuracy.png")

@dataclass
class Args:
    model: str = flag("", "folder of a run or of a model; empty: runs/tiny/rl, and pass@1 of runs/tiny/sft")
    problems: str = flag("runs/tiny/data/heldout.jsonl", "file of problems, in any shape that data.py reads")
    out: str = flag("runs/tiny/eval", "folder to write")
    limit: int = flag(200, "problems to take, from the first on; 0 is all")
    samples: int = flag(32, "traces per problem; DeepConf online needs more than its 16 warm-up traces")
    temperature: float = flag(0.85, "of sampling, 0 is greedy; the paper evaluates at 0.6")
    top_p: float = flag(1.0, "sample from the most likely tokens of this total probability; the paper: 0.95")
    max_new_tokens: int = flag(256, "per trace; the paper: 32768 or 65536")
    window: int = flag(16, "tokens per confidence group, for traces of about 100 tokens; the paper: 2048")
    seed: int = flag(0, "of sampling")
    device: str = flag("", "cpu or cuda; empty: cuda where there is one")
    dtype: str = flag("auto", "float32, bfloat16, or auto: bfloat16 on a GPU, as in RL; on a CPU as stored")
    fresh: bool = flag(False, "replace what another evaluation left in --out")
    check: str = flag("", "only check that the verifier accepts the solutions in this file of problems")
    code_tests: int = flag(0, "tests to run per code problem, a random sample; 0: all")
    judge: str = flag("", "URL of a chat endpoint that compares answers in words; its key: OPENAI_API_KEY")
    judge_model: str = flag("judge", "name of the model there")
    judge_cache: str = flag("runs/judge.jsonl", "file of its verdicts")
    unsafe_local_execution: bool = flag(False, "run the model's programs even where they cannot be isolated")
    chat: bool = flag(False, "talk to the checkpoint instead; Ctrl-D ends")

def check_args(args):
    """Raise ValueError for flags out of range; choose the device."""
    for name, least in {"limit": 0, "code_tests": 0, "samples": 1, "max_new_tokens": 1, "window": 1}.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        raise ValueError("--temperature must be 0 or more, and --top-p above 0 and at most 1")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if args.device == "cuda" and "cuda" not in devices:
        raise ValueError("--device cuda: there is no GPU here")
    args.device = args.device or devices[0]
    for name, choices in {"device": devices, "dtype": DTYPES}.items():
        if getattr(args, name) not in choices:
            raise ValueError(f"--{name} {getattr(args, name)}: expected {' or '.join(choices)}")

def run(args):
    """Evaluate --model, or the two checkpoints of the small run. All ranks call this."""
    if args.device == "cuda":  # from here on "cuda" is the GPU of this rank
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # ranks wait for the slowest one
    # The user's mistakes show here, the cheap checks before the weights are read.
    folders = [args.model] if args.model else SMALL_RUN
    with together():
        for folder in folders:
            data.check_exists(folder)
        judge = open_judge(args)
        problems = data.read_problems(args.problems, args.limit, partial(check_scorable, judge=args.judge))
        check_code(problems, args.problems, args.unsafe_local_execution, quiet=RANK > 0)
        loaded = [load(folder, args.device, args.dtype) for folder in folders]
    # Every rank has what it needs: only now may --fresh delete anything.
    with together():
        if RANK == 0:
            flags = vars(args)
            identity = {name: flags[name] for name in flags if name not in ("out", "fresh", "chat", "check")}
            about = {"device": args.device, "ranks": WORLD}
            lock = data.open_run(args.out, identity, OUTPUTS, fresh=args.fresh, **about)
            print(" ".join(f"{name}={value}" for name, value in flags.items()))

    # The last checkpoint gets all methods. The SFT checkpoint before it gets pass@1 from 4 samples, enough
    # to show what RL gains.
    rows = []
    for folder, checkpoint in zip(folders, loaded):
        path = Path(folder).resolve()
        name = path.parent.name if path.name == "model" else path.name  # "rl" also for runs/tiny/rl/model
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
