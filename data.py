r"""Data for the whole pipeline: chat format, problems, curation, packing, tokenizer.

    python data.py make --out runs/tiny/data --seed 0             # long divisions: sft, rl and heldout.jsonl
    python data.py convert train.jsonl --out sft.jsonl            # worked solutions (GSM8K, MATH) -> samples
    python data.py convert traces.jsonl --problems rl.jsonl --out sft.jsonl    # correct rollouts -> samples
    python data.py curate traces.jsonl --problems rl.jsonl --out kept.jsonl    # the RL pass-rate filter
    python data.py show sft.jsonl                                 # a few rows, and a table by domain

Data travels as JSON lines, one object per line, in three formats:

    problems  {"id": "43757/7", "domain": "math", "prompt": "43757/7=?", "answer": "6251"}
              Further fields are kept: "tests" of code, "choices", a worked "solution", "level", ...
    sft       {"messages": [{"role": "user", "content": "43757/7=?"},
                            {"role": "assistant", "content": "<think>43/7=6r1;...</think>\\boxed{6251}"}],
               "domain": "math", "weight": 1.0}
    traces    {"problem": "43757/7", "text": "<think>43/7=6r1;...</think>\\boxed{6251}<|im_end|>",
               "answer": "6251", "correct": true, "stop": "stop", ...}
              One sampled reply, written by eval.py; "correct" is null if the verdict is unknown.

A *sample* is one tokenized conversation. A *document* is a sample inside a *pack*: documents laid end to end
that share one forward pass. A *rollout* is a reply sampled from a model.

Deviations from the paper (Falcon-H1R, arXiv 2601.02346): only correct rollouts become SFT samples; the paper
makes exceptions for very hard problems and theorems. Its filters for wrong languages and unreliable tool
calls are left out. It gives no thresholds for easy and hard, no size for the "small random subset" it keeps
(EASY, HARD and KEEP_TRUNCATED below), and no packing method.

This file can be copied alone. It needs numpy and tiktoken, which brings regex.
"""

import argparse
import ast
import fcntl
import gzip
import hashlib
import inspect
import json
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import regex
import tiktoken

# 1. Problems and samples ------------------------------------------------------------------------------------

@dataclass
class Problem:
    """One question whose answer can be verified."""
    id: str
    domain: str  # "math", "code", "science", ...: how the answer is verified, and the unit of the mixture
    prompt: str
    answer: str  # the reference; "" if tests decide
    extra: dict = field(default_factory=dict)  # further fields, such as "tests", "solution", "level"
    where: str = field(default="", compare=False)  # "FILE, line 3", for error messages

    def record(self):
        """The line of a problems file."""
        return dict(id=self.id, domain=self.domain, prompt=self.prompt, answer=self.answer, **self.extra)

@dataclass
class Sample:
    """One tokenized conversation."""
    ids: np.ndarray  # (t,) int32
    mask: np.ndarray  # (t,) bool: whether the model learns to predict this token
    weight: float  # of each of its tokens in the loss
    domain: str
    trimmed: bool = False  # cut off at the context length

def sft_record(problem, reply, weight):
    """The line of an SFT file: a problem and a reply to learn."""
    messages = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": reply}]
    return {"messages": messages, "domain": problem.domain, "weight": weight, "problem": problem.id}

# 2. Chat format and loss mask -------------------------------------------------------------------------------
#
# ChatML, as in Falcon-H1's published template:
#
#     <|begin_of_text|>\n                          only here: encode() adds no BOS
#     <|im_start|>user\n2+2?<|im_end|>\n
#     <|im_start|>assistant\n<think>2+2=4</think>\boxed{4}<|im_end|>\n
#
# The generation prompt ends in `<|im_start|>assistant\n`; the model opens <think> itself. Whether the
# published model does so is unknown, and so is its role for tool results, here `tool`.

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # a model may write these inside its own turn
CONTROL = ("<|pad|>", "<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")
FOLLOWS = {  # role -> the roles it may follow; None is the beginning
    "system": {None}, "user": {None, "system", "assistant"},
    "assistant": {"user", "tool"}, "tool": {"assistant", "tool"}}

def render_chat(messages, tokenizer, *, generation_prompt=False):
    """Token ids of a conversation, and which of them the model learns to write (paper, section 2).

    - Usually only the last assistant turn is learned, and earlier ones lose their reasoning: in use, the
      model meets the same history, as nobody sends old reasoning back.
    - With tools (a message of role "tool", or <tool_call> in an assistant turn) all reasoning is kept and
      every assistant turn is learned: the turns are steps of one train of thought.

    The loss covers what an assistant writes and the <|im_end|> that ends it, but no header. TAGS are special
    tokens in assistant turns only; elsewhere they and all other special tokens are plain text.

    messages: list of {"role", "content"}, in the order of FOLLOWS. generation_prompt: append the header of
    the next reply; every turn is then an earlier one. Returns the lists (ids, loss_mask) of int and bool;
    loss_mask[i] says whether ids[i] is to be predicted."""
    check_messages(messages)
    if generation_prompt and messages[-1]["role"] not in FOLLOWS["assistant"]:
        raise ValueError(f"messages: {messages[-1]['role']} leaves nothing to reply to; end in user or tool")
    bos, start, end = map(tokenizer.special.get, ("<|begin_of_text|>", "<|im_start|>", "<|im_end|>"))
    if None in (bos, start, end):
        raise ValueError("tokenizer: a conversation needs <|begin_of_text|>, <|im_start|> and <|im_end|>")
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    tools = any(message["role"] == "tool" for message in messages)
    tools = tools or any("<tool_call>" in messages[i]["content"] for i in replies)
    last = [] if generation_prompt else replies[-1:]
    learned = replies if tools else last
    # The conversation in pieces: their ids, and whether the model learns to write them.
    newline = tokenizer.encode("\n")
    pieces = [([bos, *newline], False)]
    for i, message in enumerate(messages):
        content = message["content"]
        if i in replies and i not in learned:
            content = without_reasoning(content)
        header = [start, *tokenizer.encode(message["role"] + "\n")]
        body = tokenizer.encode(content, special="tags" if i in replies else False)
        pieces += [(header, False), ([*body, end], i in learned), (newline, False)]
    if generation_prompt:
        pieces.append(([start, *tokenizer.encode("assistant\n")], False))
    return [i for ids, _ in pieces for i in ids], [loss for ids, loss in pieces for _ in ids]

def without_reasoning(content):
    """content without its <think> blocks, stripped. A block that is never closed ends at the next one."""
    blocks = ("</think>" + content).split("<think>")
    return "".join(block.rpartition("</think>")[2] for block in blocks if "</think>" in block).strip()

def check_messages(messages, where=""):
    """Raise ValueError, naming the message and its field, unless render_chat can render the messages."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}messages: must be a list of at least one message")
    before = None
    for i, message in enumerate(messages):
        message = message if isinstance(message, dict) else {}
        role, content = message.get("role"), message.get("content")
        if role not in list(FOLLOWS):
            raise ValueError(f"{where}messages[{i}].role: {shorten(role)} is none of {', '.join(FOLLOWS)}")
        if not isinstance(content, str):
            raise ValueError(f"{where}messages[{i}].content: must be a string, not {shorten(content)}")
        if before not in FOLLOWS[role]:
            raise ValueError(f"{where}messages[{i}].role: {role} may not follow {before or 'the beginning'}")
        before = role

def check_sft(record, where):
    """(domain, weight) of a record. ValueError names file, line and field if it cannot become a sample."""
    domain = text_field(record, "domain", where)
    weight = record.get("weight")
    if type(weight) not in (int, float) or not 0 < weight < 1e6:
        raise ValueError(f"{where}: field weight must be a positive number, not {shorten(weight)}")
    check_messages(record.get("messages"), f"{where}: field ")
    if all(message["role"] != "assistant" for message in record["messages"]):
        raise ValueError(f"{where}: field messages: holds no assistant turn to learn from")
    return domain, float(weight)

def parse_sft(record, tokenizer, where, max_tokens=None, trim=False):
    """The Sample of a record. One of more than max_tokens is a ValueError, or trimmed if trim is set."""
    domain, weight = check_sft(record, where)
    ids, mask = render_chat(record["messages"], tokenizer)
    trimmed = max_tokens is not None and len(ids) > max_tokens
    if trimmed and not trim:
        tokens = f"{len(ids)} tokens, the limit is {max_tokens}"
        raise ValueError(f"{where}: field messages: {tokens}; raise it, allow trimming, or drop the line")
    return Sample(np.array(ids[:max_tokens], np.int32), np.array(mask[:max_tokens]), weight, domain, trimmed)

# render_chat as a Jinja template, for those who load a checkpoint with other software: ns.all keeps all
# reasoning, ns.last is the turn that keeps its own. Line breaks and indents are removed, as engines differ in
# whether those count.
CHAT_TEMPLATE = "".join(line.strip() for line in r"""
    {{ bos_token + '\n' }}
    {% set ns = namespace(all=false, last=-1, text='') %}
    {% for m in messages %}
        {% set ns.all = ns.all or m.role == 'tool' or m.role == 'assistant' and '<tool_call>' in m.content %}
        {% if m.role == 'assistant' and not add_generation_prompt %}{% set ns.last = loop.index0 %}{% endif %}
    {% endfor %}
    {% for m in messages %}
        {% set ns.text = m.content %}
        {% if m.role == 'assistant' and not ns.all and loop.index0 != ns.last %}
            {% set ns.text = '' %}
            {% for part in ('</think>' + m.content).split('<think>') %}
                {% if '</think>' in part %}{% set ns.text = ns.text + part.split('</think>')[-1] %}{% endif %}
            {% endfor %}
            {% set ns.text = ns.text.strip() %}
        {% endif %}
        {{ '<|im_start|>' + m.role + '\n' + ns.text + '<|im_end|>\n' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
""".splitlines())

# 3. Problems made here: long division, every step of which can be checked -----------------------------------
#
#   family  level   prompt     answer  careful trace, one digit per step     careless, skipping steps
#   div     digits  43757/7=?  6251    43/7=6r1;17/7=2r3;35/7=5r0;07/7=1r0;  4375/7=625r0;07/7=1r0;
#   mod     digits  43758%7=?  1       43/7=6r1;17/7=2r3;35/7=5r0;08/7=1r1;  4375/7=625r0;08/7=1r1;
#
# A step appends the next digit or digits to the remainder so far; the first step takes as many digits as
# reach the divisor. Every trace is true, but several digits at once are too hard for a small model: it errs
# there, and its confidence falls. Longer numbers have fewer careful traces. So RL can learn to skip less,
# majority voting fails on problems with hardly any careful trace (above all in mod, whose few wrong answers
# collide), and DeepConf can find the careful one.

MIX = {(family, level): level - 4 for family in ("div", "mod") for level in (5, 6, 7)}  # weights by level
DIVISORS = (3, 6, 7, 9)  # for 2, 4, 5, 8 the last digits alone give the remainder: a model could skip steps
CAREFUL = 0.3, 0.015  # share of careful traces in the SFT data, at the easiest level and at the hardest
SKIP = 0.5  # probability that a step of a careless trace takes several digits
SKIP_WIDTHS = (4, 5)  # how many, at random; not three: a small model learns a third of such steps
SPLIT = {"train": 0.6, "rl": 0.2, "heldout": 0.2}  # shares of all divisions

def make_problem(family, level, rng):
    """A random Problem. family: "div" (without remainder) or "mod"; level: digits of the dividend."""
    low, high = 10 ** (level - 1), 10**level
    divisor = rng.choice(DIVISORS)
    if family == "div":  # quotients from ceil(low / divisor) on: the dividend has this many digits
        answer = rng.randrange(-(-low // divisor), -(-high // divisor))
        text = f"{answer * divisor}/{divisor}"
    else:
        dividend = rng.randrange(low, high)
        answer = dividend % divisor
        text = f"{dividend}%{divisor}"
    return Problem(text, "math", text + "=?", str(answer), {"family": family, "level": level})

def make_trace(problem, rng, careful):
    """A true computation of a made problem: steps `dividend/divisor=quotient r remainder`, see the table."""
    digits, divisor = re.split("[/%]", problem.prompt.removesuffix("=?"))
    trace, remainder = "", ""
    while digits:
        # One digit; two at first if one does not reach the divisor; several if careless and enough are left.
        widths = [1 if trace or digits[0] >= divisor else 2]
        if not careful and rng.random() < SKIP:
            widths = [width for width in SKIP_WIDTHS if width <= len(digits)] or widths
        width = rng.choice(widths)
        dividend = f"{remainder}{digits[:width]}"
        quotient, remainder = divmod(int(dividend), int(divisor))
        # Zeros in front of later quotients stay, so that all of them, joined, are the answer.
        trace += f"{dividend}/{divisor}={str(quotient).zfill(width if trace else 1)}r{remainder};"
        digits = digits[width:]
    return trace

def hash_to_unit(text):
    """A number in [0, 1) that depends on text alone and is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64

def split_of(prompt):
    """ "train", "rl" or "heldout". The division alone decides, so no seed or count can ever mix the three."""
    point = hash_to_unit(prompt.replace("%", "/"))  # 43758%7=? and 43758/7=? have the same trace
    if point < SPLIT["train"]:
        return "train"
    return "rl" if point < SPLIT["train"] + SPLIT["rl"] else "heldout"

def make_problems(split, count, seed):
    """List of `count` different problems of one split, in the proportions of MIX; ValueError if too few."""
    rng = random.Random(f"{seed} {split}")
    problems = {}
    # If a level has too few problems, the others fill in, until all levels together have too few.
    for _ in range(100 * count + 1001):
        if len(problems) == count:
            return list(problems.values())
        family, level = rng.choices(list(MIX), MIX.values())[0]
        problem = make_problem(family, level, rng)
        if split_of(problem.prompt) == split:
            problems[problem.id] = problem
    raise ValueError(f"only {len(problems)} different {split} problems found, {count} wanted")

def make_sft(problem, rng):
    """An SFT record with one trace. The level decides its weight, and how likely the trace is careful."""
    levels = [level for _, level in MIX]
    ease = (max(levels) - problem.extra["level"]) / (max(levels) - min(levels))  # easiest level 1, hardest 0
    trace = make_trace(problem, rng, rng.random() < ease * CAREFUL[0] + (1 - ease) * CAREFUL[1])
    reply = f"<think>{trace}</think>\\boxed{{{problem.answer}}}"
    # The ease stands in for the pass rate: there is no model yet to measure one.
    return sft_record(problem, reply, difficulty_weight(ease)) | problem.extra

# 4. Curation ------------------------------------------------------------------------------------------------

EASY, HARD = 0.75, 0.25  # pass rates: above is easy, below is hard
KEEP_TRUNCATED = 0.1  # "a small random subset"; the paper gives no number

def difficulty_weight(pass_rate):
    """Weight in the SFT loss (paper, section 2): easy 0.5, medium 1, hard from 1.25 to 1.75 at rate 0."""
    if pass_rate > EASY:
        return 0.5
    return 1.0 if pass_rate >= HARD else 1.75 - 0.5 * pass_rate / HARD

def why_not_sft(record):
    """The paper's filters (section 2) for one SFT record: the reason to drop it, or None.

    They judge the last message. "correct", if present, is its verdict: True, False or None (unknown)."""
    if not record.get("correct", True):
        return "unknown verdict" if record["correct"] is None else "incorrect"
    _, _, rest = record["messages"][-1]["content"].partition("<think>")
    reasoning, closed, reply = rest.partition("</think>")
    if not closed or not reasoning.strip():
        return "no reasoning"
    if not reply.strip():
        return "no answer"
    if record["domain"] == "math" and not re.search(r"\\boxed\s*\{\s*[^\s}]", reply):
        return "no \\boxed{}"
    try:
        for code in re.findall(r"(?ms)^[ \t]*```(?:[Pp]ython3?|py)[ \t]*\n(.*?)(?:```|\Z)", reply):
            ast.parse(textwrap.dedent(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the others: null bytes, absurd nesting
        return "python syntax error"
    return None

def why_not_rl(problem_id, rollouts):
    """The paper's pass-rate filter (section 3) for one problem: the reason to drop it, or None.

    A problem that every rollout solves teaches nothing. One that no rollout solves is dropped if at least
    half of them agree on a wrong answer: the reference is then the likelier culprit. If every rollout ran out
    of tokens, it may be merely long: a random tenth is kept (the id decides, so a second run keeps the same).
    rollouts: traces of this problem, the paper takes 8; those of unknown verdict do not count."""
    known = [rollout for rollout in rollouts if rollout["correct"] is not None]
    if not known:
        return "no known verdict" if rollouts else "no rollouts"
    correct = sum(rollout["correct"] for rollout in known)
    if correct:
        return "solved by every rollout" if correct == len(known) else None
    if all(rollout["stop"] == "length" for rollout in known):
        kept = hash_to_unit(f"truncated {problem_id}") < KEEP_TRUNCATED
        return None if kept else "truncated in every rollout"
    # Compared as text, one answer in two spellings counts as two: that errs on the side of keeping.
    answers = Counter(rollout["answer"] for rollout in known if rollout["answer"] is not None)
    agreed = max(answers.values(), default=0) >= len(known) / 2  # the paper's 4 of 8
    return "wrong majority" if agreed else None

def from_solution(problem):
    """SFT record with a worked solution as the reasoning. Its difficulty is unknown: weight 1."""
    solution = problem.extra.get("solution")
    if not isinstance(solution, str) or not problem.answer:
        raise ValueError(f"{problem.where}: needs an answer, and a worked one in the field solution")
    # GSM8K's calculator annotations, 48/2=<<48/2=24>>24, are removed: no prompt has them.
    reasoning = re.sub(r"<<[^<>]*>>", "", solution).strip()
    return sft_record(problem, f"<think>{reasoning}</think>\\boxed{{{problem.answer}}}", 1.0)

def from_rollouts(problem, rollouts):
    """SFT records of a problem's rollouts, weighted by its pass rate over known verdicts."""
    # Unfinished replies count as incorrect; an unknown verdict (None) stays unknown.
    verdicts = [rollout["correct"] and rollout["stop"] == "stop" for rollout in rollouts]
    known = [verdict for verdict in verdicts if verdict is not None]
    weight = difficulty_weight(sum(known) / max(1, len(known)))
    for rollout, correct in zip(rollouts, verdicts):
        reply = rollout["text"].removesuffix("<|end_of_text|>").removesuffix("<|im_end|>")
        yield sft_record(problem, reply, weight) | {"correct": correct}

# 5. Packing -------------------------------------------------------------------------------------------------

@dataclass
class Pack:
    """Documents end to end, without padding; cu_seqlens keeps them apart in attention and SSM."""
    input_ids: np.ndarray  # (t,) int64
    targets: np.ndarray  # (t,) int64: the next token of the same document; 0 at a document's last position
    weights: np.ndarray  # (t,) float32: weight of predicting targets; 0 where there is no loss
    cu_seqlens: np.ndarray  # (s + 1,) int32: document j is [cu_seqlens[j], cu_seqlens[j + 1])
    members: list  # (s,) the samples in order, for losses that need more than one weight per token

def pack(samples, capacity, multiple_of=1):
    """Packs of one global batch, by first-fit decreasing: longest sample first, into the first that has room.

    That takes at most 11/9 of the optimal number of packs plus one, in quadratic time. Under FSDP all ranks
    must make the same number of passes: split the longest packs, then pad with one-token dummies of weight 0.
    Packs come longest first, so that those of one pass are about equally long on all ranks.

    samples: list of Sample, or of anything with ids, mask and weight. capacity: most tokens per pack; a
    longer sample is a ValueError. multiple_of: the number of packs becomes a multiple of this."""
    rows = [[] for _ in samples]  # never more packs than samples
    room = [capacity] * len(samples)  # tokens left in each row
    for sample in sorted(samples, key=lambda sample: -len(sample.ids)):  # stable, hence deterministic
        size = len(sample.ids)
        if size > capacity:
            raise ValueError(f"a sample of {size} tokens does not fit a pack of {capacity}")
        first = next(i for i, left in enumerate(room) if left >= size)
        rows[first].append(sample)
        room[first] -= size
    rows = [row for row in rows if row]
    # Split the longest packs: their samples, longest first, go to the shorter half.
    while len(rows) % multiple_of and any(len(row) > 1 for row in rows):
        longest = max(range(len(rows)), key=lambda i: (len(rows[i]) > 1, tokens_of(rows[i])))
        halves = [], []
        for sample in rows.pop(longest):
            min(halves, key=tokens_of).append(sample)
        rows += halves
    rows.sort(key=tokens_of, reverse=True)
    dummy = Sample(np.zeros(1, np.int32), np.zeros(1, bool), 1.0, "")
    return [join(row) for row in rows + [[dummy]] * (-len(rows) % multiple_of)]

def tokens_of(row):
    """Number of tokens of a list of samples."""
    return sum(len(sample.ids) for sample in row)

def join(row):
    """Pack of a list of samples. Target and weight of position i are token and loss mask of i + 1."""
    cu_seqlens = np.cumsum([0] + [len(sample.ids) for sample in row], dtype=np.int32)
    ids = np.concatenate([sample.ids for sample in row]).astype(np.int64)
    weights = np.concatenate([sample.mask * sample.weight for sample in row]).astype(np.float32)
    targets, weights = np.roll(ids, -1), np.roll(weights, -1)
    targets[cu_seqlens[1:] - 1] = 0
    weights[cu_seqlens[1:] - 1] = 0
    return Pack(ids, targets, weights, cu_seqlens, row)

# 6. Reading problems and traces -----------------------------------------------------------------------------

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of choices
PUBLIC = {  # field of a public data set -> ours
    "question": "prompt", "problem": "prompt", "Problem": "prompt", "answerKey": "answer", "Answer": "answer",
    "unique_id": "id", "task_id": "id", "ID": "id", "test": "tests",
    "canonical_solution": "solution", "Solution": "solution"}

def read_problems(path, limit=0, check=lambda problem: None):
    """The first `limit` problems (0: all) of a file, in our shape or a public one, recognised line by line:

        ours        id, domain, prompt, answer (or tests)
        GSM8K       question, answer: a worked solution whose last line is `#### 18`
        MATH        problem, answer; solution and unique_id if present
        HumanEval   task_id, prompt, test, entry_point; canonical_solution if present
        AIME        problem (or question), answer: a number
        MMLU, ARC   question, choices (or options), answer (or answerKey): see parse_choices

    check(problem) raises ValueError if no reply could be compared with the problem's answer."""
    problems = {}
    for where, record in read_records(path):
        problem = parse_problem(record, where)
        if twin := problems.get(problem.id):
            raise ValueError(f"{where}: field id: {shorten(problem.id)} is also the id of {twin.where}")
        try:
            check(problem)
        except ValueError as error:
            raise ValueError(f"{where}: field answer: {error}") from None
        problems[problem.id] = problem
        if len(problems) == limit:
            break
    return list(problems.values())

def parse_problem(record, where):
    """The Problem of one record. where: "FILE, line 3"; a problem without an id is named after it."""
    row = dict(record) if "prompt" in record and "task_id" not in record else from_public(record, where)
    # Choices go into the prompt, and the answer becomes the letter of the right one.
    choices = row.get("choices", row.pop("options", None))
    if choices is not None:
        row["choices"], row["answer"] = parse_choices(choices, row.get("answer"), where)
        row["prompt"] = with_choices(text_field(row, "prompt", where), row["choices"])
    # Code that tests decide needs no answer.
    only_tests = row.get("tests") and not row.get("answer")
    answer = "" if only_tests else text_field(row, "answer", where).strip()
    id, domain, prompt = (text_field(row, name, where) for name in ("id", "domain", "prompt"))
    extra = {name: row[name] for name in row if name not in ("id", "domain", "prompt", "answer")}
    return Problem(id, domain, prompt, answer, extra, where)

def from_public(record, where):
    """A record of a public data set with our names for its fields, an id and a domain."""
    row = {"id": re.sub(", (line|item) ", ":", Path(where).name), "domain": "math"}
    if "task_id" in record:
        row["domain"] = "code"
    elif record.get("choices", record.get("options")) is not None:
        row["domain"] = "science"
    for name, value in record.items():
        row[PUBLIC.get(name, name)] = text_field(record, name, where) if name in PUBLIC else value
    # A question with neither choices nor a number as the answer is GSM8K's; with a number it is AIME's.
    number = re.fullmatch(r"\s*-?[0-9.,]+\s*", str(row.get("answer")))
    if "question" in record and row["domain"] == "math" and not number:
        solution, hashes, answer = text_field(row, "answer", where).rpartition("####")
        if not hashes or not answer.strip():
            raise ValueError(f"{where}: field answer must end in `#### x`, or call question prompt")
        row |= {"solution": solution.strip(), "answer": answer}
    return row

def parse_choices(choices, answer, where):
    """The texts of the choices and the letter of the right one.

    choices: [text, ...], {"A": text, ...} or {"label": ["A", ...], "text": [text, ...]}. answer: a letter, B
    or (B), a label, the text of a choice, or its index, counted from 0. ValueError names the field."""
    labels = None
    if isinstance(choices, dict):
        labels = choices.get("label", sorted(choices))
        choices = choices.get("text", [choices[name] for name in sorted(choices)])
    texts = [str(text).strip() for text in choices] if isinstance(choices, list) else []
    if not 2 <= len(set(texts)) == len(texts) <= len(LETTERS) or "" in texts:
        raise ValueError(f"{where}: field choices must be 2 to 26 different texts, not {shorten(choices)}")
    if not isinstance(labels, list) or len(labels) != len(texts):
        labels = list(LETTERS[: len(texts)])
    # Labels come first: with ARC's labels 1 to 4, "1" is the first choice. Among the texts 1, 2 and 3, "2" is
    # itself, and the number 2 is an index, hence the third choice.
    name = str(answer).strip()
    label = name.strip("().")
    if label in labels:
        return texts, LETTERS[labels.index(label)]
    if name in texts and not isinstance(answer, int):
        return texts, LETTERS[texts.index(name)]
    if name in map(str, range(len(texts))):
        return texts, LETTERS[int(name)]
    raise ValueError(f"{where}: field answer: {shorten(answer)} is no letter, text or index of a choice")

def with_choices(prompt, choices):
    """The prompt, followed by the choices and their letters unless it shows them."""
    lettered = list(zip(LETTERS, choices))
    if all(re.search(rf"(?<!\w){letter}[).:]*\s*{re.escape(text)}", prompt) for letter, text in lettered):
        return prompt
    lines = "\n".join(f"{letter}. {text}" for letter, text in lettered)
    return f"{prompt.rstrip()}\n\n{lines}\n\nPut the letter of the right choice in \\boxed{{}}."

def read_rollouts(path, problems_path):
    """List of (problem, its traces) for all problems of one file, with the traces of another."""
    problems = read_problems(problems_path)
    rollouts = {problem.id: [] for problem in problems}
    kinds = {"problem": str, "text": str, "correct": bool | None, "stop": str, "answer": str | None}
    for where, record in read_records(path):
        for name, kind in kinds.items():
            if not isinstance(record.get(name, ...), kind):
                kind = getattr(kind, "__name__", kind)
                raise ValueError(f"{where}: field {name} must be {kind}, not {shorten(record.get(name))}")
        if record["problem"] not in rollouts:
            raise ValueError(f"{where}: field problem: {shorten(record['problem'])} is not in the problems")
        rollouts[record["problem"]].append(record)
    return [(problem, rollouts[problem.id]) for problem in problems]

def read_records(path):
    """Yield (where, dict) of a .jsonl, .jsonl.gz or JSON array. where: "FILE, line 3" or "FILE, item 3".

    Blank lines are skipped, a byte order mark is tolerated. ValueError names file and line."""
    check_exists(path)
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            raw = file.read().removeprefix(b"\xef\xbb\xbf")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from None
    if not raw.strip():
        raise ValueError(f"{path}: empty; expected one JSON object per line")
    unit = "item" if raw.lstrip().startswith(b"[") else "line"
    if unit == "item":  # the items of an array become lines, and are checked the same way
        raw = b"\n".join(json.dumps(item).encode() for item in parse_json(raw, path, list))
    for number, line in enumerate(raw.splitlines(), 1):
        if line.strip():
            where = f"{path}, {unit} {number}"
            yield where, parse_json(line, where)

def parse_json(raw, where, kind=dict):
    """The value that bytes of JSON hold: a dict, or a list if that is the kind, and not empty."""
    try:
        value = json.loads(raw.decode("utf-8-sig"))  # a byte order mark may come first
    except (ValueError, RecursionError) as error:  # ValueError: also bytes that are not UTF-8, huge integers
        raise ValueError(f"{where}: malformed JSON ({error})") from None
    if not isinstance(value, kind) or not value:
        name = "object with fields" if kind is dict else "array with items"
        raise ValueError(f"{where}: {shorten(value)} is not a JSON {name}")
    return value

def text_field(record, name, where):
    """record[name] as a non-blank str; integers, which some files have as answers, become text."""
    if name not in record:
        raise ValueError(f"{where}: field {name} is missing")
    value = str(record[name]) if type(record[name]) is int else record[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: field {name} must be a string that is not empty, not {shorten(value)}")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{where}: field {name} holds half of a surrogate pair, which is no character")
    return value

def shorten(value):
    """JSON of a value, cut off for an error message."""
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:100] + "..."

# 7. Tokenizer -----------------------------------------------------------------------------------------------

# How tokenizer.json spells bytes, as in GPT-2: visible ones as Latin-1 does, the others from U+0100 on.
VISIBLE = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
SPELLING = {chr(byte): byte for byte in VISIBLE} | {chr(256 + i): byte for i, byte in enumerate(HIDDEN)}
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of ByteLevel

class Tokenizer:
    """Text <-> token ids: byte-level BPE by tiktoken, and the special tokens that a chat needs.

    Attributes: special (dict from an added token's text to its id), vocab_size (the largest id plus one),
    stop_ids (tuple of the ids that end a generation)."""

    def __init__(self, files):
        """files: dict of the texts of tokenizer.json and, for save, tokenizer_config.json."""
        self.files = files
        spec = json.loads(files["tokenizer.json"])
        check_supported(spec)
        model, added = spec["model"], spec["added_tokens"]
        self.stages = pre_tokenizers(spec["pre_tokenizer"])
        self.special = {token["content"]: token["id"] for token in added}
        self.control = {token["content"] for token in added if token["special"]}
        # Added tokens are found before anything else: those not "normalized" first, of these the longest.
        added = sorted(added, key=lambda token: (token["normalized"], -len(token["content"])))
        self.added = {}  # argument `special` of encode -> pattern of the added tokens that it reads
        unread = {True: set(), "tags": self.control - {*TAGS}, False: self.control | {*TAGS}}
        for special, plain in unread.items():
            read = [regex.escape(token["content"]) for token in added if token["content"] not in plain]
            self.added[special] = regex.compile("|".join(read) or "(?!)")
        # All other text: tiktoken's ranks are the order of merging, and not the ids.
        vocab = {name: id for name, id in model["vocab"].items() if name not in self.control}
        self.bytes = {id: bytes(SPELLING[c] for c in name) for name, id in vocab.items()}
        whole = self.bytes if model.get("ignore_merges") else {}
        self.whole_words = {name: [id] for id, name in whole.items()}  # tokens found before any merging
        ranks = tiktoken_ranks(vocab, model["merges"])
        self.ids = {rank: vocab[name] for name, rank in ranks.items()}
        ranks = {self.bytes[vocab[name]]: rank for name, rank in ranks.items()}
        self.encoding = tiktoken.Encoding("bpe", pat_str=r"(?s).+", mergeable_ranks=ranks, special_tokens={})
        self.bytes |= {id: name.encode() for name, id in self.special.items()}
        self.vocab_size = max(self.bytes) + 1
        ends = ("<|im_end|>", "<|end_of_text|>")
        self.stop_ids = tuple(self.special[name] for name in ends if name in self.special)

    @classmethod
    def byte_level(cls):
        """One token per byte (ids 0 to 255), then the special tokens: a vocabulary that needs no training."""
        names = [*CONTROL, *TAGS]
        # GPUs like multiples of 16. The padding is made of real tokens, so that every sampled id decodes.
        names += [f"<|reserved_{i}|>" for i in range(-(256 + len(names)) % 16)]
        # TAGS are not "special": servers hide special tokens by default, and reasoning would be unmarked.
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added = [{"id": i, "content": name, "special": name not in TAGS, **flags}
                 for i, name in enumerate(names, 256)]
        bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        vocab = dict(sorted(SPELLING.items(), key=lambda item: item[1]))
        model = {"type": "BPE", "vocab": vocab, "merges": []}
        spec = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": bytewise,
                "decoder": bytewise, "model": model}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE,
            "padding_side": "left", "bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>",
            "pad_token": "<|pad|>", "clean_up_tokenization_spaces": False}
        contents = {"tokenizer.json": spec, "tokenizer_config.json": config}
        return cls({name: json.dumps(content, indent=1) for name, content in contents.items()})

    def encode(self, text, *, special=False):
        """List of ids of text, without a BOS; half a surrogate pair becomes U+FFFD.

        special: True reads special tokens, as the tokenizers library does, "tags" only TAGS. By default both
        are plain text, so that a user typing <|im_end|> cannot end the turn. Other added tokens are always
        read."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = []
        end = 0
        for match in self.added[special].finditer(text):
            ids += [*self._encode_plain(text[end : match.start()]), self.special[match[0]]]
            end = match.end()
        return ids + self._encode_plain(text[end:])

    def _encode_plain(self, text):
        """Ids of text that holds no added token to read."""
        words = [text] if text else []
        for stage in self.stages:
            words = [piece for word in words for piece in stage(word)]
        ids = []
        for word in words:
            whole = self.whole_words.get(word.encode())
            ids += whole or [self.ids[rank] for rank in self.encoding.encode_ordinary(word)]
        return ids

    def decode(self, ids):
        """Text of ids, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        try:
            return b"".join(self.bytes[int(i)] for i in ids).decode(errors="replace")
        except KeyError as error:
            raise ValueError(f"cannot decode {error}: token ids are 0 to {self.vocab_size - 1}") from None

    def save(self, folder):
        """Write the files of a published tokenizer; generation_config.json says where generation stops."""
        generation = json.dumps({"eos_token_id": list(self.stop_ids)}, indent=1)
        for name, text in {**self.files, "generation_config.json": generation}.items():
            write_text(Path(folder) / name, text)

    @classmethod
    def from_pretrained(cls, folder):
        """Read a published byte-level BPE: tokenizer.json, and tokenizer_config.json if present.

        ValueError names what is not supported. A post_processor is ignored: encode() adds no token."""
        path = Path(folder) / "tokenizer.json"
        check_exists(path)
        files = [file for file in (path, path.with_name("tokenizer_config.json")) if file.exists()]
        try:
            return cls({file.name: file.read_text("utf-8") for file in files})
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, regex.error) as error:
            raise ValueError(f"{path}: this code cannot read it as a tokenizer: {error!r}") from None

def check_supported(spec):
    """Raise ValueError naming the first part of a tokenizer.json that this code would get wrong."""
    model = spec["model"]
    wrong = {"model": model["type"] != "BPE", "normalizer": spec["normalizer"]}
    wrong["decoder"] = (spec["decoder"] or {}).get("type") != "ByteLevel"
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        wrong[f"model.{name}"] = model.get(name)
    for name in ("single_word", "lstrip", "rstrip"):
        wrong[f"flag {name} of an added token"] = any(token[name] for token in spec["added_tokens"])
    if names := [name for name, found in wrong.items() if found]:
        raise ValueError(f"this {names[0]} is not supported")

def tiktoken_ranks(vocab, merges):
    """dict from tokens, as spelled, to tiktoken's ranks: the place of the last merge that makes the token."""
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]  # "a b" or ["a", "b"]
    order = {(left, right): place for place, (left, right) in enumerate(pairs)}
    # tiktoken merges any neighbours that form a token, the tokenizers library only listed pairs. Given only
    # tokens that BPE can itself produce, the two always pick the same pair.
    ranks = dict(SPELLING)
    for token in vocab:
        pieces, last = bpe_merge(token, order)
        if pieces == [token] and len(token) > 1:
            ranks[token] = 256 + last
    return ranks

def bpe_merge(word, order):
    """BPE by definition: while a pair is listed, join the leftmost of those listed first.

    Returns the tokens of a spelled word, and the place of the last pair joined, or None."""
    tokens, last = list(word), None
    while pairs := [(order[pair], i) for i, pair in enumerate(zip(tokens, tokens[1:])) if pair in order]:
        last, i = min(pairs)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
    return tokens, last

def pre_tokenizers(spec):
    """The "pre_tokenizer" of a tokenizer.json -> list of functions from text to pieces, to apply in turn."""
    kind = spec["type"] if spec else "Sequence"
    if kind == "Sequence":
        parts = spec["pretokenizers"] if spec else []
        return [stage for part in parts for stage in pre_tokenizers(part)]
    if kind == "Split":
        ((syntax, pattern),) = spec["pattern"].items()
        pattern = regex.escape(pattern) if syntax == "String" else pattern
        return [splitter(pattern, spec["behavior"], spec["invert"])]
    if kind == "Digits":
        return [splitter(r"\p{N}", "Isolated" if spec["individual_digits"] else "Contiguous")]
    if kind == "Punctuation":
        return [splitter(r"[!-/:-@\[-`{-~]|\p{P}", spec["behavior"])]
    if kind == "ByteLevel" and not spec["add_prefix_space"]:
        return [splitter(GPT2_WORDS, "Isolated")] if spec["use_regex"] else []
    raise ValueError(f"pre_tokenizer {kind} is not supported: {shorten(spec)}")

def splitter(pattern, behavior, invert=False):
    """Function from text to a list of pieces, cut at delimiters: the matches of a pattern.

    behavior: what becomes of a delimiter, in the tokenizers library's words. invert: swap matches and the
    text between them. `regex` may know a newer Unicode than that library, which knows 16: text with newer
    characters may be cut differently and get other ids, but they decode to the same text."""
    delimiter = f"(?>{pattern})"  # atomic: no match shrinks so that what follows it can match
    text = f"(?>(?:(?!{delimiter})(?s:.))+)"  # anything up to the next delimiter
    if invert:
        delimiter, text = text, delimiter
    piece = regex.compile({
        "Removed": f"{delimiter}(*SKIP)(*FAIL)|{text}",
        "Isolated": f"{delimiter}|{text}",
        "Contiguous": f"{delimiter}+|{text}+",
        "MergedWithPrevious": f"{text}{delimiter}?|{delimiter}",
        "MergedWithNext": f"{delimiter}?{text}|{delimiter}",
    }[behavior])
    return lambda text: [match[0] for match in piece.finditer(text)]

# 8. What the scripts share: flags, files, run and checkpoint folders, exit, unknown verdicts ----------------

MADE_BY = {"runs/tiny/data": "train_sft.py", "runs/tiny/sft": "train_sft.py", "runs/tiny/rl": "train_rl.py"}
MOST_UNKNOWN = 0.02  # of all verdicts: so few can neither hide nor fake an effect worth reporting

def flag(default, text):
    """A field of a script's Args: its default, and a line for --help."""
    return field(default=default, metadata={"help": text})

class Flags(argparse.ArgumentParser):
    """Bad flags are a ValueError, like any other bad input: one line and exit status 1, not usage and 2."""
    def error(self, message):
        raise ValueError(f"{message}; see --help")

def parse_args(cls, description, argv=None):
    """Flags of a dataclass: --kebab-case, its types and defaults; unknown or abbreviated flags are errors."""
    parser = Flags(description=description, allow_abbrev=False)
    for f in fields(cls):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        text = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=text, **kind)
    return cls(**vars(parser.parse_args(argv)))

def write_text(path, text):
    """Write a file whole or not at all: a reader never meets half of it."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()  # the disk may be full
        raise OSError(f"{path}: could not be written: {error.strerror}") from None

def write_jsonl(path, records):
    """Write dicts as JSON lines."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))

def check_exists(path):
    """Raise ValueError if a file is missing; for files of the small run it names the command to run."""
    if not Path(path).exists():
        scripts = [script for folder, script in MADE_BY.items() if Path(path).is_relative_to(folder)]
        raise ValueError(f"{path} is missing" + (f": run python {scripts[0]} first" if scripts else ""))

def open_run(out, identity, outputs, *, fresh, device, **about):
    """Make `out` the folder of a run. Its run.json then holds identity, versions, hardware and commit.

    identity: dict of the arguments that two parts of one run must share. outputs: glob patterns of what such
    a run leaves in its folder; `fresh` deletes these and starts over. about: further entries of run.json.
    Returns a file that keeps other processes out until it is closed or this process ends, even by SIGKILL.
    ValueError if the folder belongs to another run, holds unknown files, or is in use; nothing is changed."""
    path = Path(out) / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path.with_name(".lock"), "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{out}: another process is working here; stop it, or take another --out") from None
    except OSError:  # a file system without locks
        pass
    old = [found for pattern in outputs for found in Path(out).glob(pattern)]
    if fresh:
        for found in old:
            shutil.rmtree(found) if found.is_dir() else found.unlink()
    elif old or path.exists():  # the same run goes on: nothing is written
        advice = "choose another --out, or --fresh to start over"
        try:
            before = json.loads(path.read_text())["identity"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: this folder holds files of no known run: {advice}") from None
        for name, now in identity.items():
            if before.get(name) != now:
                # A flag as it is typed; anything else, such as a checksum, is described by its name.
                label = "--" + name.replace("_", "-") if name.isidentifier() else name
                what = f"{label} {before.get(name)!r} and not {now!r}"
                raise ValueError(f"{path}: this folder holds another run, with {what}: {advice}")
        return lock
    # What the figures of this run depend on. Nothing else in this file needs torch.
    import torch
    gpu = "cuda" in device
    about["hardware"] = torch.cuda.get_device_name(device) if gpu else f"{os.cpu_count()} CPU cores"
    about |= {"torch": torch.__version__, "python": sys.version.split()[0]}
    # Through a shell: if git is not installed, this prints nothing instead of raising.
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True)
    about["commit"] = git.stdout.decode().strip() or "unknown"
    write_text(path, json.dumps({"identity": identity, **about}, indent=2) + "\n")
    return lock

def model_folder(folder):
    """Where a checkpoint lies: in model/ of a run's folder, or in `folder` itself (the published format)."""
    return Path(folder) / "model" if (Path(folder) / "model").is_dir() else Path(folder)

def load_tokenizer(folder):
    """The tokenizer of a checkpoint, after a check that the model's vocabulary has room for it."""
    folder = model_folder(folder)
    check_exists(folder)
    check_exists(folder / "config.json")
    tokenizer = Tokenizer.from_pretrained(folder)
    room = json.loads((folder / "config.json").read_text())["vocab_size"]
    if room < (size := tokenizer.vocab_size):
        raise ValueError(f"{folder}: the tokenizer has {size} tokens, the model room for {room} only")
    return tokenizer

def reply_text(ids, tokenizer):
    """What a model wrote, without the token that ends it. ids: the tokens of a trace."""
    ended = ids and ids[-1] in tokenizer.stop_ids
    return tokenizer.decode(ids[:-1] if ended else ids)

def run_main(body):
    """Run a script's body; user errors print one line. Returns the exit status."""
    try:
        body()
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130  # what shells report for Ctrl-C

def check_unknown(where, reasons, verdicts):
    """Raise ValueError if more than MOST_UNKNOWN of the verdicts are unknown; it begins with `where`.

    Their causes lie outside the replies (no sandbox, a judge that is down, no memory): with many, the run
    measures the machine and not the model. reasons: Counter of causes. verdicts: number of all verdicts."""
    if reasons.total() > MOST_UNKNOWN * verdicts:
        counts = f"{reasons.total()} of {verdicts} verdicts are unknown, more than {MOST_UNKNOWN:.0%}"
        raise ValueError(f"{where}: {counts}: {describe(reasons)}")

def describe(reasons):
    """The most common reasons of unknown verdicts, in one line."""
    return "; ".join(f"{n} x {reason.removeprefix('unknown: ')}" for reason, n in reasons.most_common(5))

# 9. Commands ------------------------------------------------------------------------------------------------

def make(*, out="runs/tiny/data", seed=0, sft=20000, rl=4000, heldout=1000):
    """Generate long divisions: SFT samples, RL problems and held-out problems, in the folder OUT."""
    counts = {"train": sft, "rl": rl, "heldout": heldout}
    problems = {split: make_problems(split, count, seed) for split, count in counts.items()}
    rng = random.Random(f"{seed} traces")
    write_jsonl(Path(out) / "sft.jsonl", [make_sft(problem, rng) for problem in problems["train"]])
    for split in ("rl", "heldout"):
        write_jsonl(Path(out) / f"{split}.jsonl", [problem.record() for problem in problems[split]])
    print(f"{out}: {sft} rows in sft.jsonl, {rl} in rl.jsonl, {heldout} in heldout.jsonl")

def convert(source, *, out, problems=""):
    """Turn the worked solutions in SOURCE, or with PROBLEMS the correct rollouts there, into SFT samples."""
    if problems:
        records = [record for pair in read_rollouts(source, problems) for record in from_rollouts(*pair)]
    else:
        records = [from_solution(problem) for problem in read_problems(source)]
    write_kept(out, [(record, why_not_sft(record)) for record in records])

def curate(traces, *, problems, out):
    """Keep the problems that are neither solved nor hopeless, by about 8 rollouts of each in TRACES."""
    pairs = read_rollouts(traces, problems)
    write_kept(out, [(problem.record(), why_not_rl(problem.id, rollouts)) for problem, rollouts in pairs])

def write_kept(path, judged):
    """Write the records without a reason to drop them, print counts. judged: list of (record, reason)."""
    write_jsonl(path, [record for record, reason in judged if reason is None])
    reasons = Counter(reason for _, reason in judged)
    kept = reasons.pop(None, 0)
    dropped = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "nothing"
    print(f"{path}: kept {kept} of {len(judged)}; dropped {dropped}")

def show(file, *, rows=3, model=""):
    """Print ROWS rows of SFT samples, and a table by domain, in tokens of MODEL or bytes."""
    tokenizer = load_tokenizer(model) if model else Tokenizer.byte_level()
    table = defaultdict(list)  # domain -> [(tokens, weight)]
    for n, (where, record) in enumerate(read_records(file)):
        sample = parse_sft(record, tokenizer, where)
        table[sample.domain].append((len(sample.ids), sample.weight))
        if n < rows:
            print(f"--- {where}: {sample.domain}, {len(sample.ids)} tokens, weight {sample.weight:g}")
            print(tokenizer.decode(sample.ids))
    print("domain               rows      tokens     longest  mean weight")
    for domain, of_domain in sorted(table.items()):
        tokens, weights = zip(*of_domain)
        mean = sum(weights) / len(weights)
        print(f"{domain:16}{len(tokens):9}{sum(tokens):12}{max(tokens):12}{mean:13.3f}")

def main(argv=None):
    """python data.py COMMAND ...; returns the exit status.

    A command's parameters are its flags; those without a default are required."""
    parser = Flags(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run in (make, convert, curate, show):
        about = {"help": run.__doc__, "description": run.__doc__}
        command = commands.add_parser(run.__name__, allow_abbrev=False, **about)
        command.set_defaults(run=run)
        for name, parameter in inspect.signature(run).parameters.items():
            default = parameter.default
            kind = {"default": default, "type": type(default), "help": f"default: {default!r}"}
            if default is parameter.empty:
                kind = {"required": True} if parameter.kind is parameter.KEYWORD_ONLY else {}
            command.add_argument("--" + name if parameter.kind is parameter.KEYWORD_ONLY else name, **kind)
    def body():  # flags are parsed in here, as bad ones are user errors too
        flags = vars(parser.parse_args(argv))
        flags.pop("run")(**flags)
    return run_main(body)

if __name__ == "__main__":
    sys.exit(main())
