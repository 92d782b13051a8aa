r"""Data for the whole pipeline: problems, samples, packing, files and folders.

    python data.py make --out runs/tiny/data --seed 0             # made problems: sft, rl and heldout.jsonl
    python data.py show runs/tiny/data/sft.jsonl                  # a few rows, and a table by domain
    python data.py convert SOURCE --out sft.jsonl                 # this and what follows: see curate.py
    python data.py curate TRACES --problems rl.jsonl --out kept.jsonl
    python data.py overlap sft.jsonl benchmark.jsonl --out kept.jsonl

Data travels as JSON lines, one object per line, or as one JSON array, in three formats:

    problems  {"id": "43758%7", "domain": "math", "prompt": "43758%7=?", "answer": "1"}
              Further fields are kept: "tests" of code, "choices", a worked "solution", "level", ...
    sft       {"messages": [{"role": "user", "content": "43758%7=?"},
                            {"role": "assistant", "content": "<think>43=6r1;...</think>\\boxed{1}"}],
               "domain": "math", "weight": 1.0}
              Also "conversations" of ShareGPT; messages alone are of domain "other" and weight 1.
    traces    {"problem": "43758%7", "text": "<think>43=6r1;...</think>\\boxed{1}",
               "answer": "1", "correct": true, "stop": "stop", ...}
              One sampled reply, written by eval.py; "correct" is null if the verdict is unknown.

A *sample* is one tokenized conversation. A *document* is a sample inside a *pack*: documents laid end to end
that share one forward pass. A *rollout* is a reply sampled from a model.

The packing method is ours, as the paper (Falcon-H1R, arXiv 2601.02346) names none.

This file can be copied with tokenizer.py; convert, curate and overlap need curate.py. It needs numpy.
"""

import argparse
import contextlib
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
import zlib
from collections import defaultdict
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from tokenizer import (
    Tokenizer, ask, check_exists, encode_chat, render_chat, render_text, shorten, write_text)

# 1. Problems and samples ------------------------------------------------------------------------------------

EASY, HARD = 0.75, 0.25  # pass rates: above is easy, below is hard; the paper gives no thresholds

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

def difficulty_weight(pass_rate):
    """Weight in the SFT loss (paper, section 2): easy 0.5, medium 1, hard from 1.25 to 1.75 at rate 0."""
    if pass_rate > EASY:
        return 0.5
    return 1.0 if pass_rate >= HARD else 1.75 - 0.5 * pass_rate / HARD

def sft_record(problem, reply, weight):
    """The line of an SFT file: a problem and a reply to learn."""
    messages = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": reply}]
    return {"messages": messages, "domain": problem.domain, "weight": weight, "problem": problem.id}

# 2. Samples: from a row to tokens ---------------------------------------------------------------------------

def check_sft(record, tokenizer, where):
    """(sft_row of the record, what render_text returns). ValueError names file, line and field if it cannot
    become a sample."""
    row = sft_row(record, where)
    try:
        rendered = render_text(row["messages"], tokenizer, row.get("tools"))
    except ValueError as error:
        raise ValueError(f"{where}: field {error}") from None
    if not rendered[2]:
        raise ValueError(f"{where}: field messages: holds no assistant turn to learn from")
    return row, rendered

def parse_sft(record, tokenizer, where, max_tokens=None, trim=False):
    """The Sample of a record. One of more than max_tokens is a ValueError, or trimmed if trim is set."""
    return to_sample(*check_sft(record, tokenizer, where), tokenizer, where, max_tokens, trim)

def to_sample(row, rendered, tokenizer, where, max_tokens, trim):
    """parse_sft of what check_sft returned."""
    ids, mask = encode_chat(rendered, tokenizer)
    trimmed = max_tokens is not None and len(ids) > max_tokens
    if trimmed and not trim:
        tokens = f"{len(ids)} tokens, the limit is {max_tokens}"
        raise ValueError(f"{where}: field messages: {tokens}; raise it, allow trimming, or drop the line")
    ids = np.array(ids[:max_tokens], np.int32)
    return Sample(ids, np.array(mask[:max_tokens]), row["weight"], row["domain"], trimmed)

# 3. Problems made here: remainders of long divisions, every step of which can be checked --------------------
#
#   level   prompt     answer  careful trace, one digit per step  careless, skipping steps
#   digits  43758%7=?  1       43=6r1;17=2r3;35=5r0;08=1r1;       4375=625r0;08=1r1;
#
# A step appends the next digit or digits to the remainder so far; the first step takes as many digits as
# reach the divisor. Every trace is true, but several digits at once are too hard for a small model: it errs
# there, and its confidence falls. Longer numbers have fewer careful traces. So RL can learn to skip less, and
# DeepConf can find the careful trace. Majority voting fails where there is hardly any careful trace: a
# remainder has only 5 to 8 wrong values, so wrong answers agree.
#
# All digits of a dividend differ. So the next digit to bring down is the one after the digit used last, which
# an induction head finds. If digits repeated, the model would have to count.

MIX = {5: 1, 6: 2, 7: 3}  # weights by level
DIVISORS = (6, 7, 9)  # for 2, 4, 5, 8 the last digits alone give the remainder; for 3 a guess is often right
CAREFUL = 0.3, 0.015  # share of careful traces in the SFT data, at the easiest level and at the hardest
SKIP = 0.6  # probability that a step of a careless trace takes several digits
SKIP_WIDTHS = (4, 5)  # how many, at random; not three: a small model learns a third of such steps
SPLIT = {"train": 0.6, "rl": 0.2, "heldout": 0.2}  # shares of all problems

def make_problem(level, rng):
    """A random Problem. level: digits of the dividend, at most 10."""
    first = rng.choice("123456789")
    dividend = first + "".join(rng.sample("0123456789".replace(first, ""), level - 1))
    divisor = rng.choice(DIVISORS)
    text = f"{dividend}%{divisor}"
    return Problem(text, "math", text + "=?", str(int(dividend) % divisor), {"level": level})

def make_trace(problem, rng, careful):
    """A true computation of a made problem: steps `dividend=quotient r remainder`, see the table."""
    digits, divisor = problem.prompt.removesuffix("=?").split("%")
    trace, remainder = "", ""
    while digits:
        # One digit; two at first if one does not reach the divisor; several if careless and enough are left.
        widths = [1 if trace or digits[0] >= divisor else 2]
        if not careful and rng.random() < SKIP:
            widths = [width for width in SKIP_WIDTHS if width <= len(digits)] or widths
        width = rng.choice(widths)
        dividend = f"{remainder}{digits[:width]}"
        quotient, remainder = divmod(int(dividend), int(divisor))
        # Later quotients keep their leading zeros: joined, the quotients are that of the whole division.
        trace += f"{dividend}={str(quotient).zfill(width if trace else 1)}r{remainder};"
        digits = digits[width:]
    return trace

def hash_to_unit(text):
    """A number in [0, 1) that depends on text alone and is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64

def split_of(prompt):
    """ "train", "rl" or "heldout". The prompt alone decides, so no seed or count can ever mix the three."""
    point = hash_to_unit(prompt)
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
        level = rng.choices(list(MIX), MIX.values())[0]
        problem = make_problem(level, rng)
        if split_of(problem.prompt) == split:
            problems[problem.id] = problem
    raise ValueError(f"only {len(problems)} different {split} problems found, {count} wanted")

def make_sft(problem, rng):
    """An SFT record with one trace. The level decides its weight, and how likely the trace is careful."""
    ease = (max(MIX) - problem.extra["level"]) / (max(MIX) - min(MIX))  # easiest level 1, hardest 0
    trace = make_trace(problem, rng, rng.random() < ease * CAREFUL[0] + (1 - ease) * CAREFUL[1])
    reply = f"<think>{trace}</think>\\boxed{{{problem.answer}}}"
    # The ease stands in for the pass rate: there is no model yet to measure one.
    return sft_record(problem, reply, difficulty_weight(ease)) | problem.extra

# 4. Packing -------------------------------------------------------------------------------------------------

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

# 5. Reading problems and conversations ----------------------------------------------------------------------

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
    choices = choices_of(row)
    row.pop("options", None)
    if choices is not None:
        row["choices"], row["answer"] = parse_choices(choices, row.get("answer"), where)
        row["prompt"] = with_choices(text_field(row, "prompt", where), row["choices"])
    # Code that tests decide needs no answer.
    only_tests = row.get("tests") and not row.get("answer")
    answer = "" if only_tests else text_field(row, "answer", where).strip()
    id, domain, prompt = (text_field(row, name, where) for name in ("id", "domain", "prompt"))
    extra = {name: row[name] for name in row if name not in ("id", "domain", "prompt", "answer")}
    return Problem(id, domain, prompt, answer, extra, where)

def choices_of(record):
    """The choices of a record, in whichever of two fields; in joined files the other one is null."""
    return record.get("options") if record.get("choices") is None else record["choices"]

def from_public(record, where):
    """A record of a public data set with our names for its fields, an id and a domain."""
    row = {"id": re.sub(", (line|item) ", ":", Path(where).name), "domain": "math"}
    if "task_id" in record:
        row["domain"] = "code"
    elif choices_of(record) is not None:
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
        labels = LETTERS[: len(texts)]
    labels = [str(label) for label in labels]  # ARC's may be numbers
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

SHAREGPT = {  # "from" of a ShareGPT turn -> role
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "model": "assistant", "function_call": "assistant", "system": "system",
    "tool": "tool", "observation": "tool"}

def sft_row(record, where):
    """An SFT record in our shape: messages (or None), domain, weight, "tools" as a list, all other fields.

    Read are `messages` or `conversations`, with turns of role and content or of from and value. A `system`
    text beside them becomes the first message; `tools` may be a list or its JSON. ValueError names file, line
    and field, also where two fields contradict each other. check_messages judges the messages themselves."""
    # The paper's fourth domain takes what names none; difficulty is unknown then, so the weight is 1.
    row = {"domain": "other", "weight": 1.0} | record
    row["domain"] = text_field(row, "domain", where)
    weight = row["weight"]
    if type(weight) not in (int, float) or not 0 < weight < 1e6:
        raise ValueError(f"{where}: field weight must be a positive number, not {shorten(weight)}")
    row["weight"] = float(weight)

    # Files that were joined from several sources have columns of all of them, with null where one is unused.
    names = [name for name in ("messages", "conversations") if row.get(name) is not None]
    found = [to_messages(row[name], f"{where}: field {name}") for name in names]
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError(f"{where}: field conversations contradicts field messages")
    row.pop("conversations", None)
    row["messages"] = messages = found[0] if found else None

    # LLaMA-Factory writes system prompt (maybe "") and tools (as a text of JSON) beside the conversation.
    if row.get("system") not in (None, "") and messages:
        system = {"role": "system", "content": text_field(row, "system", where)}
        if messages[0].get("role") != "system":
            messages.insert(0, system)
        elif messages[0].get("content") != system["content"]:
            raise ValueError(f"{where}: field system contradicts the first message, which is another")
        del row["system"]
    if row.get("tools") in ("", "[]"):
        del row["tools"]
    if isinstance(row.get("tools"), str):
        row["tools"] = parse_json(row["tools"].encode("utf-8", "replace"), f"{where}: field tools", list)
    # Shapes only: the chat template decides what can be rendered, curate.py which calls are reliable.
    lists = {"tools": row.get("tools")}
    for i, message in enumerate(messages or []):
        lists[f"messages[{i}].tool_calls"] = message.get("tool_calls")
    for name, value in lists.items():
        if value and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
            raise ValueError(f"{where}: field {name}: must be a list of objects, not {shorten(value)}")
    return row

def to_messages(turns, where):
    """Turns of role and content or of from and value -> messages, with all their other fields."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: must be a list of at least one message, not {shorten(turns)}")
    sharegpt = "from" in turns[0]
    messages = []
    for i, turn in enumerate(turns):
        if {"from", "value"} & turn.keys() and (not sharegpt or {"role", "content"} & turn.keys()):
            raise ValueError(f"{where}[{i}]: mixes from and value with role and content")
        if sharegpt:
            rest = dict(turn)
            speaker, text = rest.pop("from", None), rest.pop("value", None)
            if str(speaker) not in SHAREGPT:
                raise ValueError(f"{where}[{i}].from: {shorten(speaker)} is none of {', '.join(SHAREGPT)}")
            if not isinstance(text, str):
                raise ValueError(f"{where}[{i}].value: must be a string, not {shorten(text)}")
            # In Falcon-H1R's template, and most others, a call is this text at the end of a reply.
            if speaker == "function_call":
                text = f"<tool_call>\n{text}\n</tool_call>"
            turn = {"role": SHAREGPT[speaker], "content": text} | rest
        # JSON can spell it as \ud800, but no tokenizer can encode it.
        if any(isinstance(text, str) and re.search("[\ud800-\udfff]", text) for text in turn.values()):
            raise ValueError(f"{where}[{i}]: holds half of a surrogate pair, which is no character")
        messages.append(turn)
    return messages

def read_records(path):
    """Yield (where, dict) of the rows of a .jsonl, .jsonl.gz or JSON array; where: see read_rows."""
    for where, _, row in read_rows(path):
        yield where, parse_json(row, where)

BLANK = b" \t\r\n\xef\xbb\xbf"  # the last three are a byte order mark

def read_rows(path):
    """Yield (where, offset, bytes): the lines of a file that are not blank, or the items of a JSON array.

    where: "FILE, line 3" or "FILE, item 3". offset: in bytes. Lines are read one by one, so that a file may
    exceed memory. A byte order mark is tolerated. ValueError names the file and, if it can, the line."""
    check_exists(path)
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            first = next((line for line in file if line.strip(BLANK)), b"").lstrip(BLANK)
            file.seek(0)
            if not first:
                raise ValueError(f"{path}: empty; expected one JSON object per line")
            if first.startswith(b"["):
                yield from array_items(file.read(), path)
                return
            # Only \n ends a line: texts in JSON may hold U+2028 and other line breaks.
            offset = 0
            for number, line in enumerate(file, 1):
                if line.strip(BLANK):
                    yield f"{path}, line {number}", offset, line
                offset += len(line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from None

def array_items(raw, path):
    """read_rows of a JSON array. It is checked as a whole before the first item."""
    count = len(parse_json(raw, path, list))
    # In Latin-1 every byte is one character, so places in the text are offsets in the file. Quotes, commas
    # and brackets are the same bytes as in UTF-8, which uses them in no other character.
    text = raw.decode("latin-1")
    stop = text.index("[") + 1
    for number in range(1, count + 1):
        start = re.compile(r"[\s,]*").match(text, stop).end()
        _, stop = json.JSONDecoder().raw_decode(text, start)
        yield f"{path}, item {number}", start, raw[start:stop]

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

# 6. What the scripts share: flags, files, run and checkpoint folders, exit, unknown verdicts ----------------

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

def text_or_file(value):
    """The text of a flag that takes TEXT or FILE. A single word with a dot or slash must be a file."""
    if re.fullmatch(r"\S*[./]\S*\w", value):
        check_exists(value)
    return Path(value).read_text("utf-8").strip() if os.path.isfile(value) else value

def write_jsonl(path, records):
    """Write dicts as JSON lines, not compressed."""
    if str(path).endswith(".gz"):
        raise ValueError(f"{path}: files are written uncompressed; give a name without .gz")
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))

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
    room = json.loads((folder / "config.json").read_text()).get("vocab_size")
    if not isinstance(room, int):
        raise ValueError(f"{folder}: config.json has no vocab_size: it describes another kind of model")
    if room < (size := tokenizer.vocab_size):
        raise ValueError(f"{folder}: the tokenizer has {size} tokens, the model room for {room} only")
    return tokenizer

def prompts_of(problems, args, tokenizer):
    """Token ids of each problem's prompt, with --system and --suffix. ValueError names file and line of one
    that the chat template refuses."""
    prompts = []
    for problem in problems:
        try:
            chat = ask(problem.prompt, args.system, args.suffix)
            prompts.append(render_chat(chat, tokenizer, generation_prompt=True)[0])
        except ValueError as error:
            raise ValueError(f"{problem.where}: its prompt: {error}") from None
    return prompts

def reply_text(ids, tokenizer):
    """What a model wrote, without the token that ends it. ids: the tokens of a trace."""
    ended = ids and ids[-1] in tokenizer.stop_ids
    return tokenizer.decode(ids[:-1] if ended else ids)

def run_main(body):
    """Run a script's body; user errors print one line. Returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # not every terminal or pipe takes every character
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")  # a notebook's streams have none
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

# 7. Commands ------------------------------------------------------------------------------------------------

def make(*, out="runs/tiny/data", seed=0, sft=20000, rl=4000, heldout=1000):
    """Make problems: SFT samples, RL problems and held-out problems, in the folder OUT."""
    counts = {"train": sft, "rl": rl, "heldout": heldout}
    problems = {split: make_problems(split, count, seed) for split, count in counts.items()}
    for split in ("rl", "heldout"):
        write_jsonl(Path(out) / f"{split}.jsonl", [problem.record() for problem in problems[split]])
    # The last one: where it is, train_sft.py takes all three for made.
    rng = random.Random(f"{seed} traces")
    write_jsonl(Path(out) / "sft.jsonl", [make_sft(problem, rng) for problem in problems["train"]])
    print(f"{out}: {sft} rows in sft.jsonl, {rl} in rl.jsonl, {heldout} in heldout.jsonl")

def show(file, *, rows=3, model=""):
    """Print ROWS rows of SFT samples, and a table by domain, in tokens of MODEL or of the tiny model."""
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
    known = [make, show]
    with contextlib.suppress(ModuleNotFoundError):  # where data.py was copied alone
        import curate
        known += [curate.convert, curate.curate, curate.overlap]
    for run in known:
        about = run.__doc__
        command = commands.add_parser(run.__name__, help=about, description=about, allow_abbrev=False)
        command.set_defaults(run=run)
        for p in inspect.signature(run).parameters.values():
            if p.kind is not p.KEYWORD_ONLY:
                command.add_argument(p.name)
            elif p.default is p.empty:
                command.add_argument("--" + p.name, required=True)
            else:
                about = f"default: {p.default!r}"
                command.add_argument("--" + p.name, default=p.default, type=type(p.default), help=about)
    def body():  # flags are parsed in here, as bad ones are user errors too
        flags = vars(parser.parse_args(argv))
        flags.pop("run")(**flags)
    return run_main(body)

if __name__ == "__main__":
    sys.exit(main())
