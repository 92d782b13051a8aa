r"""Evaluation: sample replies, judge them, vote on their answers, and report accuracy against tokens.

    python eval.py                      # the small CPU run: runs/tiny/sft and runs/tiny/rl, minutes
    python eval.py --model FOLDER --problems FILE --out FOLDER --temperature 0.6 --top-p 0.95 \
        --samples 512 --max-new-tokens 65536 --window 2048      # the paper's setting (section 5)
    torchrun --nproc-per-node 8 eval.py --model FOLDER   # problems shared out; the same traces up to rounding
    python eval.py --server http://localhost:8000/v1 --server-model NAME --problems FILE   # vLLM, SGLang, ...
    python eval.py --traces FILE        # every vote and filter again on recorded traces, without a model
    python eval.py --check FILE         # can these problems be scored? Tries their own solutions
    python eval.py --chat --model FOLDER                 # talk to a checkpoint; Ctrl-D ends

What it writes to --out, which all ranks must see
    traces.jsonl            every sampled reply, with answer, verdict and confidences; traces-sft.jsonl of the
                            other checkpoint, traces-low.jsonl and traces-high.jsonl of DeepConf online
    traces.part0.jsonl      while it runs: every reply of rank 0 that has ended, not yet judged. After an
                            interruption the same command goes on from there, and samples none again
    report.json, report.md  the table that is also printed; run.json: arguments, versions, hardware, commit
    accuracy.png            accuracy against tokens, with majority votes of 1, 2, 4, ... replies for
                            comparison; needs matplotlib

Methods (rows of the report), n samples per problem; the names for --methods on the right
    pass@1, pass@k           the mean over samples; the chance that one of k is right        pass@1, pass@8
    majority@n               one vote each                                                   majority
    majority@equal-tokens    as many votes as DeepConf LOW's tokens pay for: the fair        majority, online
                             comparison
    weighted@n               all vote, weighted by their lowest groups                       weighted
    deepconf-offline@n       the most confident tenth votes, weighted; -bottom@n, -tail@n    offline
                             and -mean@n by other measures of confidence                     offline-bottom
    deepconf-low@n, -high@n  the same while generating: after the first 16 traces of         online
                             traces.jsonl, its warm-up, a trace is stopped when its confidence falls below the
                             top 10% (LOW) or 90% (HIGH) of theirs, and all sampling stops when 95% of the
                             votes agree. The warm-up counts: its tokens, and their share of the seconds

A server is given no seed, so there DeepConf online, after the warm-up, samples traces of its own, not the
beginnings of others. A token counts if the server sends its log-probabilities.

With several domains rows of each follow; replies cut off at --max-new-tokens are counted.

An unknown verdict (no sandbox, a judge that is down) says nothing about the reply: `correct` is null. pass@1
is the mean over the other samples; a vote is right if a trace that gave its answer is known to be right.
Problems without a known verdict are left out of a row's mean and counted in its last column. If more than 2%
of the verdicts are unknown, the run ends with an error, after it has written the traces.

Deviations from the paper (arXiv 2601.02346): 32768 tokens or more, temperature 0.6 and top-p 0.95 are flags;
the defaults fit the small run. rewards.py and sandbox.py say how they differ from its verifiers.
To copy this, also take all other scripts but the two trainers and curate.py.
"""

import json
import math
import os
import re
import sys
import time
import zlib
from collections import ChainMap, Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import deepconf
from data import flag
from model import FalconH1, generate, replacing, set_threads
from rewards import check_code, check_scorable, chosen, decided_by_tests, extract_answer, extract_code
from rewards import is_equivalent, is_right, open_judge, verify
from sandbox import run_code
from tokenizer import ask, render_chat

# torchrun sets both. Rank r samples all replies to the problems r, r + WORLD, r + 2 WORLD, ...
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

# 1. Sampling ------------------------------------------------------------------------------------------------

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}

@dataclass
class Reply:
    """What the report needs to know of a trace, some hundred bytes; its text stays in the file."""
    tokens: int
    answer: str | None
    correct: bool | None
    reason: str  # of the verdict
    stop: str
    seconds: float  # of generation, when it ended
    tie: float  # nats below a threshold that still reach it: rounding here, or the noise of a server
    measures: dict  # its confidence by the names of deepconf.MEASURES
    confidences: object = None  # of its tokens, float32 (tokens,), only where replay() needs them

class Ballot(NamedTuple):
    """The replies to one problem."""
    domain: str
    replies: list  # in sample order
    same: object  # whether two answers are one vote, as for deepconf.vote

class Samples(NamedTuple):
    """Replies to all problems."""
    ballots: list  # per problem
    n: int  # replies per problem, at most
    seconds: float  # wall time of generation, on the slowest rank
    voted: list = ()  # per problem, the answer that DeepConf online decided for

    def tie(self):
        """That of the noisiest reply, see Reply."""
        return max(reply.tie for ballot in self.ballots for reply in ballot.replies)

    def tokens(self):
        """Tokens of all replies, per problem. Those of stopped traces count, as they were generated."""
        return [sum(reply.tokens for reply in ballot.replies) for ballot in self.ballots]

def open_checkpoint(folder, problems, args):
    """(name in the report, model, tokenizer, prompts) of a checkpoint. Prompts are lists of token ids.

    --dtype auto: bfloat16 on a GPU, on a CPU the stored one."""
    # "rl" for runs/tiny/rl and for runs/tiny/rl/model
    name = Path(folder).resolve().as_posix().removesuffix("/model").rpartition("/")[2]
    tokenizer = data.load_tokenizer(folder)
    dtype = torch.bfloat16 if args.device == "cuda" and args.dtype == "auto" else DTYPES[args.dtype]
    model = FalconH1.from_pretrained(data.model_folder(folder), dtype=dtype, device=args.device)
    set_threads(model.config)
    # What the sampler would refuse shows here, before --fresh deletes anything.
    prompts = data.prompts_of(problems, args, tokenizer)
    longest = max(map(len, prompts), default=0)
    room = model.config.max_position_embeddings
    if longest + args.max_new_tokens > room:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} and the longest prompt, {longest} tokens, "
                         f"exceed max_position_embeddings {room} of {folder}")
    return name, model, tokenizer, prompts

def open_server(problems, args):
    """The same of a server: a deepconf.Server, no tokenizer, and prompts that are lists of messages.

    Asks the longest problem for one token: what is wrong with server, name, key or length shows here, before
    any work."""
    server = deepconf.Server(args.server, args.server_model)
    chats = [ask(problem.prompt, args.system, args.suffix) for problem in problems]
    longest = max(chats, key=lambda chat: len(chat[-1]["content"]))
    reply_to([longest], server, None, args, on_token=lambda trace: True)
    return args.server_model, server, None, chats

def reply_to(prompts, model, tokenizer, args, **more):
    """Traces of replies to prompts, by a model here or by a server. more: for model.generate."""
    settings = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p}
    if tokenizer is None:
        return deepconf.generate(model, prompts, **settings, **more)
    return generate(model, prompts, seed=args.seed, stop_ids=tokenizer.stop_ids,
                    vocab_size=tokenizer.vocab_size, **settings, **more)

def sample(model, tokenizer, prompts, problems, args, judge, mark, n, file, settings=None, complete=None):
    """Sample n replies to every problem, judge them, and write them to `file` in --out -> Samples on rank 0.

    Each rank samples and judges its share of the problems. prompts: see reply_to; mark: see open_out.
    settings: of deepconf.Online, which decides during generation which traces start and which stop early; up
    to its stop a trace is the same as without, but for a server's. None: n complete replies.
    complete: on rank 0, the Samples of traces.jsonl, which begin with the warm-up of deepconf.Online.
    Raises ValueError if too many verdicts are unknown, after the file is written."""
    path = Path(args.out) / file
    run = f"{mark} {path.stem}"
    online = []  # per problem
    if settings is not None:
        online = [deepconf.Online(n, same=same_of(problem), **settings) for problem in problems]
        with together():
            if RANK == 0 and not parts(path):  # otherwise an earlier process has done it
                copy_warm_up(path, run, settings["n_init"], complete)
    sample_share(path, model, tokenizer, prompts, problems, args, run, n, online)
    with together():
        # Of every trace: where it is, and the verdict of an earlier process.
        found = {key: (place, record["correct"]) for key, place, record in recorded(path, problems)}
        verdicts = judge_share(found, problems, args, judge)
    # Rank 0 merges what all ranks have written.
    verdicts = ChainMap(*gather(verdicts))
    votes = gather([machine.result()[0] for machine in online])
    with together():
        if RANK == 0:
            ballots = merge(path, found, verdicts, problems, args)
            replies = [reply for ballot in ballots for reply in ballot.replies]
            # Write before checking: samples are expensive and must not be lost.
            data.check_unknown(f"{path} holds every reply, but", unknown_reasons(replies), len(replies))
            # Only the rank that sampled problem i knows the result of its vote.
            voted = [votes[i % WORLD][i] for i in range(len(online))]
            return Samples(ballots, n, max(reply.seconds for reply in replies), voted)

def sample_share(path, model, tokenizer, prompts, problems, args, run, n, online):
    """Sample this rank's problems; each trace is appended to the rank's part of `path` as soon as it ends.

    What is recorded, by earlier processes on whatever number of ranks or as the warm-up, is not sampled
    again. DeepConf online is fed it: it decides by the traces alone, and goes on as if it had seen them end.
    run: the field of each trace. online: a deepconf.Online per problem, or nothing."""
    ended = set()  # of pairs (index of the problem, sample)
    before = 0.0  # seconds that what is recorded took
    with together():
        # Whatever rank sampled them, the traces of this rank's problems count as its own.
        for (i, index), _, record in recorded(path, problems):
            if i % WORLD == RANK:
                ended.add((i, index))
                before = max(before, record["seconds"])
                if online:
                    online[i].record(index, np.float32(record["confidences"]), record["answer"])
    begun = time.perf_counter() - before

    def admit(i, index):  # may reply `index` to problem i start?
        if i % WORLD != RANK:  # another rank samples this problem
            return deepconf.DONE
        if (i, index) in ended:
            return "skip"
        return online[i].admit(index) if online else deepconf.GO

    def on_token(trace):  # must it stop?
        return online[trace.prompt_index].on_token(trace.sample_index, trace.confidences[-1])

    def on_trace(trace):  # it has ended
        problem = problems[trace.prompt_index]
        text = data.reply_text(trace.tokens, tokenizer) if tokenizer else trace.text
        answer = answer_of(text, problem)
        append(path.with_suffix(f".part{RANK}.jsonl"), {
            "problem": problem.id, "domain": problem.domain, "sample": trace.sample_index, "run": run,
            "gold": "" if decided_by_tests(problem) else problem.answer, "seed": args.seed,
            "seconds": round(time.perf_counter() - begun, 2), "text": text,
            "tokens": len(trace.confidences), "answer": answer, "correct": None, "reason": "not judged yet",
            "stop": trace.stop, "tie": deepconf.SERVER_TIE if args.server else deepconf.TIE,
            # 9 digits identify a float32, so that a replay decides as the live run did.
            "confidences": [float(f"{confidence:.9g}") for confidence in trace.confidences]})
        # generate() returns all traces that ended; only the file is to hold what is in them.
        trace.tokens = trace.text = trace.logprobs = trace.confidences = ()
        if online:
            online[trace.prompt_index].finish(trace.sample_index, answer)  # it may vote

    # From here on files grow: all ranks have read what earlier processes left in them.
    with together():
        # For the bar an upper bound: DeepConf online may start fewer.
        expected = n * len(problems[RANK::WORLD]) - len(ended) if RANK == 0 else 0
        # Without DeepConf nothing has to be looked at while a trace runs.
        reply_to(prompts, model, tokenizer, args, samples=n, slots=args.slots, admit=admit, on_trace=on_trace,
                 on_token=on_token if online else None, progress=expected)

def copy_warm_up(path, run, n_init, complete):
    """Begin `path` with the first n_init traces of each problem in traces.jsonl: sampled again, with the same
    seeds, they would be the same up to rounding. Their share of the seconds is that of the tokens."""
    warm_up = sum(reply.tokens for ballot in complete.ballots for reply in ballot.replies[:n_init])
    seconds = round(complete.seconds * warm_up / sum(complete.tokens()), 2)
    with replacing(path.with_suffix(".part0.jsonl")) as part:
        for number, (_, _, line) in enumerate(data.read_rows(path.with_name("traces.jsonl"))):
            if number % complete.n < n_init:  # merge() has sorted them by problem and sample
                record = json.loads(line) | {"run": run, "seconds": seconds}
                part.write(json.dumps(record).encode() + b"\n")

# 2. Files of traces -----------------------------------------------------------------------------------------
# While it samples, rank r appends to traces.part<r>.jsonl. In the end rank 0 merges all parts, sorted and
# with verdicts, into traces.jsonl and deletes them. A kill at any moment leaves every ended trace in one file
# or, after the merge and before the deletion, in two; the first one counts. Files are read a line at a time:
# a trace of 65536 tokens takes 1 MB as text and a few MB as Python's numbers.

# What every line must have, and what those of earlier versions and of deepconf.py may lack; sample_share
# has all fields.
EARLIER = {"run": "none", "reason": "", "seconds": 0.0, "tie": deepconf.TIE}
FIELDS = {**dict.fromkeys(("domain", "gold", "stop", "reason"), str), "seconds": float, "tie": float,
          **deepconf.FIELDS}

def read_traces(path, run=None):
    """Yield (where, offset of the line, record) of a traces file, one line in memory at a time.

    run: what the field `run` must be; None: the same in all lines. ValueError names line and field."""
    for where, offset, line in data.read_rows(path):
        record = EARLIER | data.parse_json(line, where)
        deepconf.check_trace(record, where, FIELDS)
        run = run or record["run"]
        if record["run"] != run:
            raise ValueError(f"{where}: field run: {record['run']}, expected {run}: this trace is of another "
                             "model or file, or was sampled with other settings")
        yield where, offset, record

def parts(path):
    """The files that hold the traces of `path`: itself, which has verdicts, and what ranks have appended."""
    files = [path, *sorted(path.parent.glob(f"{path.stem}.part*.jsonl"))]
    return [file for file in files if file.exists()]

def recorded(path, problems):
    """Yield ((index of the problem, sample), place, record) of each trace in the parts of `path`.

    place: (file, offset), for read_line."""
    index = {problem.id: i for i, problem in enumerate(problems)}
    seen = set()
    for part in parts(path):
        for _, offset, record in read_traces(part):
            key = index[record["problem"]], record["sample"]
            if key not in seen:
                seen.add(key)
                yield key, (part, offset), record

def append(path, record):
    """Add a line. The file is closed at once: a process that is killed loses what is in its buffers."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")

def read_line(path, offset):
    """The record that begins there."""
    with open(path, "rb") as file:
        file.seek(offset)
        return json.loads(file.readline())

def judge_share(found, problems, args, judge):
    """Verify this rank's traces that have no verdict -> {(index of the problem, sample): fields to set}.

    found: (index of the problem, sample) -> (place, verdict)."""
    # Texts stay in the files until their turn. What was sampled has no verdict yet: it may take long, and an
    # ended trace is written at once. After an interruption what a judge has said before comes from its cache.
    waiting = {key: place for key, (place, verdict) in found.items()
               if key[0] % WORLD == RANK and verdict is None}
    settings = {"limit": args.code_tests, "seed": args.seed, "unsafe": args.unsafe_local_execution}
    def judge_one(key):
        verdict = verify(read_line(*waiting[key])["text"], problems[key[0]], judge=judge, **settings)
        return {"correct": None if verdict.score is None else verdict.score == 1, "reason": verdict.reason}

    # The threads only wait for programs or for a judge; the sandbox limits how many programs run at once.
    # map() cancels what has not begun: an error or Ctrl-C does not wait for thousands.
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        verdicts = pool.map(judge_one, waiting)
        silent = RANK > 0 or not waiting
        return dict(zip(waiting, tqdm(verdicts, "verifying", len(waiting), leave=False, disable=silent)))

def merge(path, found, verdicts, problems, args):
    """Put the traces of all parts into `path`, in order and with verdicts; delete the parts -> Ballots.

    found: as for judge_share."""
    # Another node may have written to a disk of its own.
    if not verdicts.keys() <= found.keys():
        raise ValueError(f"{path.parent}: not all ranks write to this folder; --out must be shared")
    ballots = [Ballot(problem.domain, [], same_of(problem)) for problem in problems]
    # Lines are copied one by one, as all of them may not fit into memory.
    with replacing(path) as out:
        for key in sorted(found):
            place, _ = found[key]
            record = read_line(*place) | verdicts.get(key, {})
            out.write(json.dumps(record).encode() + b"\n")
            ballots[key[0]].replies.append(to_reply(record, args.window))
    # From here on the parts are not needed.
    for part in parts(path)[1:]:
        part.unlink()
    return ballots

def to_reply(record, window, keep=False):
    """The Reply of a record. keep: with the confidences of its tokens."""
    confidences = np.float32(record["confidences"])  # as the sampler computed them
    measures = {name: measure(confidences, window) for name, measure in deepconf.MEASURES.items()}
    return Reply(len(confidences), record["answer"], record["correct"], record["reason"], record["stop"],
                 record["seconds"], record["tie"], measures, confidences if keep else None)

def checksum(folder):
    """CRC-32 of the files of a model."""
    value = 0
    for path in sorted(data.model_folder(folder).iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja"):
            value = zlib.crc32(np.memmap(path, mode="r"), value)
    return value

# 3. Answers and votes ---------------------------------------------------------------------------------------

# Every method compares the same answers, and a comparison parses two expressions.
same_answer = lru_cache(maxsize=1 << 16)(is_equivalent)

def same_of(problem):
    """Equivalent answers are one vote. Programs are one vote only if they are the same text."""
    return None if decided_by_tests(problem) else same_answer

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

# 4. Methods: each gives an Outcome --------------------------------------------------------------------------
# A method is a function of Samples, so recorded ones serve as well as live ones. It scores every problem. The
# report takes mean and standard error, over all problems and over those of each domain.

class Outcome(NamedTuple):
    """What a row of the report is computed from."""
    method: str
    samples: Samples
    scores: list  # per problem, 0 to 1, or None where unknown
    tokens: list  # per problem, what the method takes

def pass_at_k(n, c, k):
    """The chance that at least one of k samples is correct, if c of n are. Unbiased for k <= n.

        1 - C(n-c, k) / C(n, k)                            Chen et al. 2021, arXiv 2107.03374, equation 1
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)

def pass_at(samples, k):
    """pass@k over the replies of known verdict, unknown with fewer than k; it costs k replies per problem."""
    scores = []
    for ballot in samples.ballots:
        known = [reply.correct for reply in ballot.replies if reply.correct is not None]
        scores.append(pass_at_k(len(known), sum(known), k) if len(known) >= k else None)
    tokens = [k * total / len(ballot.replies) for total, ballot in zip(samples.tokens(), samples.ballots)]
    return Outcome(f"pass@{k}", samples, scores, tokens)

def by_vote(method, samples, answers, tokens):
    """The Outcome of a vote: an answer per problem, right if a reply that gives it is; None: no vote."""
    scores = [deepconf.is_right(answer, ballot.replies, ballot.same)
              for answer, ballot in zip(answers, samples.ballots)]
    return Outcome(method, samples, scores, tokens)

def majority(samples, low=None):
    """One vote per reply: the usual self-consistency.

    low: the Samples of DeepConf LOW. Then as many replies vote as its tokens for a problem pay for: the
    baseline at DeepConf's price."""
    budgets = low.tokens() if low else [math.inf] * len(samples.ballots)
    votes = [deepconf.majority_at(b.replies, tokens, b.same) for b, tokens in zip(samples.ballots, budgets)]
    answers, tokens = zip(*votes)
    return by_vote("majority@equal-tokens" if low else f"majority@{samples.n}", samples, answers, tokens)

def majority_curve(samples):
    """(tokens, accuracy) of the majority of 1, 2, 4, ... replies: what more samples gain without DeepConf."""
    points = []
    for m in (2**i for i in range(samples.n.bit_length())):
        scores = []
        for _, replies, same in samples.ballots:
            # Cut the replies into disjoint runs of m. The score of a problem is the mean over its runs.
            runs = [replies[i : i + m] for i in range(0, len(replies) - m + 1, m)]
            answers = [deepconf.majority_at(run, math.inf, same)[0] for run in runs]
            right = [deepconf.is_right(answer, replies, same) for answer in answers]
            scores.append(deepconf.mean_and_stderr(right)[0])
        points.append((sum(samples.tokens()) * m / samples.n, deepconf.mean_and_stderr(scores)[0]))
    return points

def filtered(method, samples, measure, eta):
    """Of all replies the eta percent most confident vote, weighted by that confidence."""
    answers = []
    tie = samples.tie()
    for _, replies, same in samples.ballots:
        conf = [reply.measures[measure] for reply in replies]
        answers.append(deepconf.filtered_vote([r.answer for r in replies], conf, eta, same, tie)[0])
    return by_vote(f"{method}@{samples.n}", samples, answers, samples.tokens())

def deepconf_online(level, samples):
    """Traces were stopped while they were sampled. The tokens of stopped traces count.

    Seconds fall less than tokens, as the last batches are small. level: see level_of."""
    return by_vote(f"deepconf-{level}@{samples.n}", samples, samples.voted, samples.tokens())

def level_of(eta):
    """The name of DeepConf online with a percentage kept; the authors call two of them low and high."""
    return {10: "low", 90: "high"}.get(eta, f"eta{eta:g}")

def evaluate(sample, args):
    """All methods on one checkpoint -> (Samples, Outcomes), on rank 0; None elsewhere.

    sample(file, settings=None, complete=None): sample() for it."""
    samples = sample("traces.jsonl")
    settings = {"n_init": args.warm_up, "window": args.window, "tau": args.tau or None, "batch": args.batch,
                "tie": samples.tie() if samples else deepconf.TIE}
    online = {}  # level: Samples
    # With too few samples it would never stop a trace.
    useful = "online" in args.methods and args.samples > args.warm_up
    for eta in args.eta if useful else []:
        # The same seeds: up to its stop a trace is that of traces.jsonl. What is measured is the cost.
        online[level_of(eta)] = sample(f"traces-{level_of(eta)}.jsonl", settings | {"eta": eta}, samples)
    if RANK > 0:
        return None

    outcomes = []
    # The name of a row has what it depends on: samples, and eta where it is not the paper's 10.
    kept = "" if args.eta[0] == 10 else f"-{level_of(args.eta[0])}"
    for method in args.methods:
        if method.startswith("pass@"):
            outcomes.append(pass_at(samples, int(method[5:])))
        elif method == "majority":
            outcomes.append(majority(samples))
            outcomes += [majority(samples, low) for low in [*online.values()][:1]]
        elif method == "weighted":
            outcomes.append(filtered("weighted", samples, "lowest", 100))
        elif method == "online":
            outcomes += [deepconf_online(*pair) for pair in online.items()]
        else:
            measure = method.partition("-")[2] or "lowest"
            outcomes.append(filtered(f"deepconf-{method}{kept}", samples, measure, args.eta[0]))
    return samples, outcomes

def replay(path, args):
    """evaluate() on the complete traces that a file holds -> (Samples, Outcomes). Nothing is written."""
    kinds = {}  # problem: (domain, whether two answers are one vote)
    def make(record):
        kinds[record["problem"]] = record["domain"], same_answer if record["gold"] else None
        return to_reply(record, args.window, keep=True)

    groups = deepconf.to_traces(((where, record) for where, _, record in read_traces(path)), make)
    ballots = [Ballot(domain, groups[name], same) for name, (domain, same) in kinds.items()]
    args.samples = max(map(len, groups.values()))
    check_methods(args)
    whole = Samples(ballots, args.samples, max(r.seconds for group in groups.values() for r in group))

    # In place of sample(): the recorded traces, for DeepConf online each up to where it would be stopped.
    def again(_, settings=None, complete=None):
        if settings is None:
            return whole
        machines = [deepconf.replay(b.replies, same=b.same, **settings) for b in ballots]
        voted = [machine.result()[0] for machine in machines]
        # Nothing is generated here: seconds are a share of those of the recorded run.
        seconds = whole.seconds * sum(machine.tokens for machine in machines) / sum(whole.tokens())
        return Samples([*map(stopped, ballots, machines)], whole.n, seconds, voted)
    return evaluate(again, args)

def stopped(ballot, machine):
    """The ballot with what a deepconf.Online has seen of its replies: some in part, some not at all."""
    seen = [(reply, trace.tokens) for reply, trace in zip(ballot.replies, machine.traces) if trace.tokens]
    return ballot._replace(replies=[reply if n == reply.tokens else replace(reply, tokens=n, stop="deepconf")
                                    for reply, n in seen])

# 5. Report and plot -----------------------------------------------------------------------------------------

def report_row(outcome, domain="all"):
    """A row of report.json: of all problems, or of those of a domain."""
    samples = outcome.samples
    problems = [i for i, ballot in enumerate(samples.ballots) if domain in ("all", ballot.domain)]
    scores = [outcome.scores[i] for i in problems]
    unknown = scores.count(None)
    accuracy, stderr = deepconf.mean_and_stderr(scores)
    tokens = sum(outcome.tokens[i] for i in problems)
    seconds = samples.seconds * tokens / sum(samples.tokens())  # the method's share of the sampling time
    stops = [reply.stop for i in problems for reply in samples.ballots[i].replies]
    return {"method": outcome.method, "domain": domain, "accuracy": accuracy, "stderr": stderr,
            "tokens": round(tokens), "seconds": round(seconds, 2), "problems": len(scores) - unknown,
            "unknown": unknown, "cut_off": stops.count("length") / len(stops)}

def report_rows(checkpoint, samples, outcomes):
    """The rows of a checkpoint: over all problems, then, if there are several, by domain."""
    domains = sorted({ballot.domain for ballot in samples.ballots})
    return [{"checkpoint": checkpoint, **report_row(outcome, domain)}
            for domain in ["all", *(domains if len(domains) > 1 else [])] for outcome in outcomes]

def markdown(line, rows):
    """A table that also lines up in a terminal. line: the format string of a row; rows: the head first."""
    lines = [line.format(*row) for row in rows]
    lines.insert(1, "".join("|" if c == "|" else "-" for c in lines[0]))
    return "\n".join(lines)

def table(rows):
    """The rows of report.json as Markdown, shares in percent."""
    cells = [("checkpoint", "method", "accuracy %", "stderr", "tokens", "seconds", "problems", "unknown",
              "cut off %", "domain")]
    for r in rows:
        accuracy, stderr, cut_off = map(deepconf.percent, (r["accuracy"], r["stderr"], r["cut_off"]))
        cells.append((r["checkpoint"], r["method"], accuracy, stderr, f"{r['tokens']:,}",
                      f"{r['seconds']:.1f}", r["problems"], r["unknown"], cut_off, r["domain"]))
    first = max(10, *(len(r["checkpoint"]) for r in rows))
    width = max(21, *(len(r["method"]) for r in rows))
    form = f"| {{:{first}}} | {{:{width}}} | {{:>10}} | {{:>6}} | {{:>10}} | {{:>7}} | {{:>8}} | {{:>7}} |"
    # The last two say nothing in the small run, which has one domain and cuts nothing off.
    if any(r["cut_off"] or r["domain"] != "all" for r in rows):
        form += " {:>9} | {:10} |"
    return markdown(form, cells)

def report_text(rows, samples):
    """The table, and what it does not say about the replies."""
    replies = [reply for ballot in samples.ballots for reply in ballot.replies]
    calibration = deepconf.calibration_sentence([(r.correct, r.measures["lowest"]) for r in replies])
    report = f"{table(rows)}\n\n{calibration}\n"
    if samples.tie() > deepconf.TIE:
        report += f"Traces of a server: groups within {samples.tie():g} nats of a threshold reach it.\n"
    if reasons := unknown_reasons(replies):
        report += f"{reasons.total()} of {len(replies)} verdicts unknown: {data.describe(reasons)}.\n"
    return report

def write_report(args, rows, samples, problem):
    """Write report.json, report.md and accuracy.png; print the table, and the first reply to `problem`."""
    report = report_text(rows, samples)
    out = Path(args.out)
    data.write_text(out / "report.json", json.dumps({"rows": rows}, indent=1) + "\n")
    data.write_text(out / "report.md", f"# Evaluation on {args.problems}\n\n{report}")
    plot(out / "accuracy.png", rows, majority_curve(samples))
    # A sample text, from the file: replies in memory have none.
    _, _, first = next(read_traces(out / "traces.jsonl"))
    print(f"\n{problem.prompt}\n{first['text']}\nanswer {first['answer']}, correct: {first['correct']}\n")
    print(report)

def new_figure(width, height):
    """An empty figure of this size in inches; None, after a line that says so, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return None
    # A Figure of its own: pyplot would look for a display.
    return Figure(figsize=(width, height), layout="constrained")

def plot(path, rows, curve):
    """Accuracy against generated tokens: majority votes as a curve, DeepConf's rows as points with errors."""
    figure = new_figure(6, 4)
    if figure is None:
        return
    axes = figure.subplots()
    known = [(tokens, 100 * accuracy) for tokens, accuracy in curve if accuracy is not None]
    axes.plot(*zip(*known), "o-", label="majority of 1, 2, 4, ...")
    for r in rows:
        if "deepconf" in r["method"] and r["domain"] == "all" and r["accuracy"] is not None:
            stderr = 100 * (r["stderr"] or 0)
            axes.errorbar(r["tokens"], 100 * r["accuracy"], stderr, fmt="s", label=r["method"])
    axes.set(xlabel="generated tokens, all problems", ylabel="accuracy, %")
    axes.legend()
    figure.savefig(path, dpi=150)

# 6. --check and --chat --------------------------------------------------------------------------------------

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
    _, model, tokenizer, _ = open_checkpoint(args.model or SMALL_RUN[-1], [], args)
    # One byte that is not UTF-8 must not end the conversation; no template would take it.
    if hasattr(sys.stdin, "reconfigure"):  # what stands in for it in a notebook or a test has none
        sys.stdin.reconfigure(errors="replace")
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
            turn = ask(question, args.system, args.suffix)
            messages += turn[-1:] if messages else turn  # the system prompt comes once
            shown = ""
            prompt, _ = render_chat(messages, tokenizer, generation_prompt=True)
            reply_to([prompt], model, tokenizer, args, on_token=stream)
            messages.append({"role": "assistant", "content": shown})
            print()

# 7. Ranks ---------------------------------------------------------------------------------------------------

def gather(value):
    """The list of all ranks' values, by rank; every rank gets it."""
    values = [value] * WORLD
    if WORLD > 1:
        try:
            dist.all_gather_object(values, value)
        except RuntimeError:  # it says only that a connection is closed
            raise ValueError("another rank has ended, and so does this one") from None
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

# 8. The command line ----------------------------------------------------------------------------------------

SMALL_RUN = ["runs/tiny/sft", "runs/tiny/rl"]  # its checkpoints, from the first to the last
OUTPUTS = ("traces*.jsonl", "traces*.tmp", "report.*", "accuracy.png")

@dataclass
class Args:
    model: str = flag("", "folder of a run or of a model; empty: runs/tiny/rl, and pass@1 of runs/tiny/sft")
    server: str = flag("", "URL of an endpoint that samples in place of --model; gets OPENAI_API_KEY")
    server_model: str = flag("", "name of the model there")
    problems: str = flag("runs/tiny/data/heldout.jsonl", "file of problems, in any shape that data.py reads")
    out: str = flag("runs/tiny/eval", "folder to write")
    limit: int = flag(None, "problems to take, 0: all; None: 200 of the small run's file, all of another")
    samples: int = flag(32, "traces per problem; DeepConf online needs more than --warm-up")
    temperature: float = flag(0.85, "of sampling, 0 is greedy; the paper evaluates at 0.6")
    top_p: float = flag(1.0, "sample from the most likely tokens of this total probability; the paper: 0.95")
    max_new_tokens: int = flag(256, "per trace; the paper: 32768 or 65536")
    system: str = flag("", "system prompt: a text or the name of a file; the one of training")
    suffix: str = flag("", "instruction to add to every question, on a line of its own; the one of training")
    window: int = flag(16, "tokens per confidence group, for traces of about 35 tokens; the paper: 2048")
    methods: str = flag("pass@1,majority,offline,online", "rows of the report; also pass@K for any K, "
                        "weighted, offline-bottom, offline-tail, offline-mean")
    eta: str = flag("10,90", "percentages that DeepConf online keeps; offline and equal-tokens: the first")
    tau: float = flag(0.95, "share of the votes that ends DeepConf online; 0: none, all --samples are taken")
    warm_up: int = flag(16, "traces that DeepConf online completes before it stops any")
    batch: int = flag(4, "traces that it then starts together; one by one would halve throughput")
    slots: int = flag(0, "traces that decode at a time; 0: as many as fit into memory, of a server 16")
    seed: int = flag(0, "of sampling")
    device: str = flag("", "cpu or cuda; empty: cuda where there is one")
    dtype: str = flag("auto", "float32, bfloat16, or auto: bfloat16 on a GPU, as in RL; on a CPU as stored")
    fresh: bool = flag(False, "replace what another evaluation left in --out")
    traces: str = flag("", "only report on all traces of this file, by --methods, --eta, --window, ...")
    check: str = flag("", "only check that the verifier accepts the solutions in this file of problems")
    code_tests: int = flag(0, "tests to run per code problem, a random sample; 0: all")
    judge: str = flag("", "URL of a chat endpoint that compares answers in words; gets the same key")
    judge_model: str = flag("judge", "name of the model there")
    judge_cache: str = flag("runs/judge.jsonl", "file of its verdicts")
    unsafe_local_execution: bool = flag(False, "run the model's programs even where they cannot be isolated")
    chat: bool = flag(False, "talk to the checkpoint instead; Ctrl-D ends")

# What --methods takes, besides pass@K
VOTES = ("majority", "weighted", "offline", "online", "offline-bottom", "offline-tail", "offline-mean")

def check_args(args):
    """Raise ValueError for flags out of range; choose the device."""
    # The small run has 1,000 held-out problems and takes minutes; whoever names a file wants all of it.
    if args.limit is None:
        args.limit = 200 if args.problems == Args.problems else 0
    least = {"limit": 0, "code_tests": 0, "slots": 0, "seed": 0, "samples": 1, "max_new_tokens": 1,
             "window": 1, "warm_up": 1, "batch": 1}
    for name, low in least.items():
        if getattr(args, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {low}")
    # Logits are divided by the temperature in float32: a tiny one would overflow.
    if args.temperature != 0 and not 1e-6 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        raise ValueError("--temperature must be 0, or 1e-6 or more, and --top-p above 0 and at most 1")
    if not 0 <= args.tau <= 1:
        raise ValueError(f"--tau {args.tau}: must be from 0 to 1")
    args.methods = args.methods.split(",")
    # Lists from here on; what is wrong with them shows before any work.
    try:
        args.eta = [float(text) for text in args.eta.split(",")]
        for eta in args.eta:
            deepconf.stop_threshold([0.0], eta)
    except ValueError as error:
        raise ValueError(f"--eta {args.eta}: {error}") from None
    if args.traces and (args.model or args.server):
        raise ValueError("--traces takes no --model or --server: traces are of the model that wrote them")
    if args.server or args.server_model:
        if not (args.server and args.server_model) or WORLD > 1 or args.model or args.chat:
            raise ValueError("--server and --server-model need each other and one rank, no --model or --chat")
        args.slots = args.slots or 16
    args.system = data.text_or_file(args.system)  # run.json holds the text
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    args.device = args.device or devices[0]
    for name, choices in {"device": devices, "dtype": DTYPES}.items():
        if getattr(args, name) not in choices:
            raise ValueError(f"--{name} {getattr(args, name)}: expected {' or '.join(choices)} here")

def check_methods(args):
    """Raise ValueError for an unknown method, or one that needs more samples per problem."""
    for method in args.methods:
        # At most 9 digits: int() refuses thousands of them with a message of its own.
        k = re.fullmatch(r"pass@(\d{1,9})", method)
        if method not in VOTES and not k:
            raise ValueError(f"--methods {method!r}: expected pass@K, {', '.join(VOTES)}")
        if k and not 1 <= int(k[1]) <= args.samples:
            raise ValueError(f"--methods {method}: K must be 1 to {args.samples}, the samples per problem")
    if {*args.methods} == {"online"} and args.samples <= args.warm_up:
        # With other methods beside it, there is something to report: online is left out.
        raise ValueError(f"--methods online: needs more samples per problem than --warm-up {args.warm_up}")

def run(args):
    """Evaluate --model, or the two checkpoints of the small run. All ranks call this."""
    check_methods(args)
    if args.device == "cuda":  # from here on "cuda" is the GPU of this rank
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # ranks wait for the slowest one
    # The user's mistakes show here, the cheap checks before the weights are read.
    folders = [args.model] if args.model else SMALL_RUN
    folders = [] if args.server else folders  # its weights are elsewhere
    with together():
        for folder in folders:
            data.check_exists(folder)
        judge = open_judge(args)
        problems = data.read_problems(args.problems, args.limit, partial(check_scorable, judge=args.judge))
        check_code(problems, args.problems, args.unsafe_local_execution, quiet=RANK > 0)
        checkpoints = [open_checkpoint(folder, problems, args) for folder in folders]
        if args.server:
            checkpoints = [open_server(problems, args)]
    # Every rank has what it needs: only now may --fresh delete anything.
    # All ranks need the mark of the traces, which only rank 0 computes: it reads the weights once more.
    mark = ""
    with together():
        if RANK == 0:
            mark, lock = open_out(args, folders, problems)
    mark = gather(mark)[0]

    # The last checkpoint gets all methods. The SFT checkpoint before it gets pass@1 from 4 samples, enough
    # to show what RL gains.
    rows = []
    *earlier, (name, *last) = checkpoints
    for before, *checkpoint in earlier:
        few = min(4, args.samples)
        samples = sample(*checkpoint, problems, args, judge, mark, few, f"traces-{before}.jsonl")
        if RANK == 0:
            rows += report_rows(before, samples, [pass_at(samples, 1)])
    results = evaluate(partial(sample, *last, problems, args, judge, mark, args.samples), args)
    if RANK == 0:
        rows += report_rows(name, *results)
        write_report(args, rows, results[0], problems[0])
        lock.close()

def open_out(args, folders, problems):
    """Make --out the folder of this evaluation, and check the traces that are there -> (mark, lock).

    mark: 8 hex digits, which stand for all that the traces depend on."""
    flags = vars(args)
    # Nothing that is sampled depends on these; a server may move, and a judge.
    apart = ("out", "fresh", "chat", "check", "traces", "slots", "server")
    identity = {name: flags[name] for name in flags if name not in apart}
    identity["judge"] = "an address" if args.judge else ""
    # A model may have been trained on, and a file of problems edited, in its old place.
    identity |= {f"a checksum of {folder} of": checksum(folder) for folder in folders}
    contents = json.dumps([problem.record() for problem in problems])
    identity[f"a checksum of {args.problems} of"] = zlib.crc32(contents.encode())
    lock = data.open_run(args.out, identity, OUTPUTS, fresh=args.fresh, device=args.device, ranks=WORLD)
    # run.json names what differs. But a file may have been copied here, so each trace has the mark and the
    # name of its file. They are checked before any work, not when a file's turn comes after hours.
    mark = f"{zlib.crc32(json.dumps(identity).encode()):08x}"
    for path in sorted(Path(args.out).glob("traces*.jsonl")):
        name = path.stem.partition(".part")[0]
        if name != path.stem:
            # Lines are to be appended: cut off what a killed process left behind the last line break.
            with open(path, "rb+") as file:
                file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))
        if path.stat().st_size == 0:
            path.unlink()  # of a process that was killed before its first line
            continue
        for _ in read_traces(path, f"{mark} {name}"):  # raises for traces of another run
            pass
    print(" ".join(f"{name}={value}" for name, value in flags.items()))
    return mark, lock

def main(argv=None):
    def body():
        args = data.parse_args(Args, __doc__.partition("\n")[0], argv)
        if args.check:
            return check_file(args.check, args.unsafe_local_execution)
        check_args(args)
        if args.chat:
            chat(args)
        elif not args.traces:
            run(args)
        elif RANK == 0:
            samples, outcomes = replay(args.traces, args)
            print(report_text(report_rows("traces", samples, outcomes), samples), end="")
    status = data.run_main(body)
    if dist.is_initialized():
        dist.destroy_process_group()
    return status

if __name__ == "__main__":
    sys.exit(main())
