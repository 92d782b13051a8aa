r"""Curation: which solutions, conversations and rollouts to learn from, which problems to practise on.

    python data.py convert train.jsonl --out sft.jsonl            # worked solutions (GSM8K, MATH) -> samples
    python data.py convert chats.json --out sft.jsonl             # conversations -> samples
    python data.py convert traces.jsonl --problems rl.jsonl --out sft.jsonl    # right rollouts -> samples
    python data.py curate traces.jsonl --problems rl.jsonl --out kept.jsonl    # the RL pass-rate filter
    python data.py overlap sft.jsonl benchmark.jsonl --out kept.jsonl          # decontamination

convert and curate print how many rows each filter drops. With `--limit 100`, convert reads the first 100 rows
(or problems) only; with `--heldout 0.02` a fiftieth of the questions goes to sft-heldout.jsonl, with all of
their samples.

Terms: a *rollout* is a reply sampled from a model, a *verdict* whether it is right (None: unknown), a *pass
rate* the share of a problem's rollouts that are right.

Deviations from the paper (Falcon-H1R, arXiv 2601.02346): it gives no size for the "small random subset" of
truncated problems (KEEP_TRUNCATED), does not say which problems are "very hard" (VERY_HARD), nor how it finds
the language of code or duplicates. It keeps theorems that nobody can verify: here a row without a verdict is
kept, but a rollout whose verdict is unknown is not.

To copy this, also take data.py and tokenizer.py.
"""

import ast
import json
import re
import textwrap
import unicodedata
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path

import data
from tokenizer import check_messages

# 1. Samples from solutions, conversations and rollouts ------------------------------------------------------

VERY_HARD = 8  # rollouts of a problem, at least, none of them right: then wrong ones are kept, too
VERDICTS = {"correct": bool | None, "stop": str}  # optional fields of a sample; a trace must have them
TRACE = {"problem": str, "text": str, "answer": str | None, **VERDICTS}

def check_types(record, kinds, where):
    """Raise ValueError, naming the field, unless record[name] is of kinds[name] for every name."""
    for name, kind in kinds.items():
        if not isinstance(record.get(name, ...), kind):
            kind = getattr(kind, "__name__", kind)
            raise ValueError(f"{where}: field {name} must be {kind}, not {data.shorten(record.get(name))}")

def from_row(record, where):
    """The SFT record of a line of any kind: a conversation, or a problem with a worked solution."""
    if record.get("messages") is None and record.get("conversations") is None:
        if not {"answer", "tests"} & {data.PUBLIC.get(name, name) for name in record}:
            found = data.shorten([*record])
            raise ValueError(f"{where}: needs messages, conversations or a problem and answer, has {found}")
        return from_solution(data.parse_problem(record, where))
    row = data.sft_row(record, where)
    try:
        check_messages(row["messages"])
    except ValueError as error:
        raise ValueError(f"{where}: field {error}") from None
    if not replies_of(row):
        raise ValueError(f"{where}: field messages: holds no assistant turn to learn from")
    # Many files have other columns of these names; what no filter will look at may be anything.
    check_types(row, {name: kind for name, kind in VERDICTS.items() if name in row}, where)
    rate = row.get("pass_rate", 1) if row.get("correct") is False else 1
    if type(rate) not in (int, float) or not 0 <= rate <= 1:
        raise ValueError(f"{where}: field pass_rate must be from 0 to 1, not {data.shorten(rate)}")
    return row

def from_solution(problem):
    """SFT record with a worked solution as the reasoning. Its difficulty is unknown: weight 1."""
    solution = problem.extra.get("solution")
    if not isinstance(solution, str) or not problem.answer:
        raise ValueError(f"{problem.where}: needs an answer, and a worked one in the field solution")
    # GSM8K's calculator annotations, 48/2=<<48/2=24>>24, are removed: no prompt has them.
    reasoning = re.sub(r"<<[^<>]*>>", "", solution).strip()
    return data.sft_record(problem, f"<think>{reasoning}</think>\\boxed{{{problem.answer}}}", 1.0)

def from_rollouts(problem, rollouts):
    """SFT records of a problem's rollouts, weighted by its pass rate over known verdicts."""
    # Unfinished replies count as incorrect; an unknown verdict (None) stays unknown.
    verdicts = [rollout["correct"] and rollout["stop"] == "stop" for rollout in rollouts]
    known = [verdict for verdict in verdicts if verdict is not None]
    rate = sum(known) / max(1, len(known))
    # Fewer rollouts say too little for the exception for very hard problems.
    measured = {"pass_rate": rate} if len(known) >= VERY_HARD else {}
    for rollout in rollouts:
        reply = rollout["text"].removesuffix("<|end_of_text|>").removesuffix("<|im_end|>")
        record = data.sft_record(problem, reply, data.difficulty_weight(rate))
        yield record | {"correct": rollout["correct"], "stop": rollout["stop"]} | measured

def read_rollouts(path, problems_path):
    """List of (problem, its traces) for all problems of one file, with the traces of another."""
    problems = data.read_problems(problems_path)
    rollouts = {problem.id: [] for problem in problems}
    for where, record in data.read_records(path):
        check_types(record, TRACE, where)
        if record["problem"] not in rollouts:
            name = data.shorten(record["problem"])
            raise ValueError(f"{where}: field problem: {name} is not in the problems")
        # DeepConf stops a trace before its answer: that says nothing about the problem.
        unknown = {"correct": None} if record["stop"] == "deepconf" else {}
        rollouts[record["problem"]].append(record | unknown)
    return [(problem, rollouts[problem.id]) for problem in problems]

# 2. Filters of samples (paper, section 2) -------------------------------------------------------------------

def why_not_sft(record):
    """The paper's filters for one SFT record: the reason to drop it, or None.

    They judge the last reply, and the tool calls of all. Optional fields: "correct", the verdict; "stop",
    which is "stop" unless the reply was cut off; "pass_rate" of the problem. Wrong replies are kept where
    that is 0: on very hard problems the reasoning still teaches something."""
    if record.get("stop", "stop") != "stop":
        return "unfinished"
    correct = record.get("correct", True)
    if correct is None:
        return "unknown verdict"
    if not correct and record.get("pass_rate") != 0:
        return "incorrect"

    # A tool call is an answer, too: the run goes on after it.
    last = replies_of(record)[-1]
    reasoning, answer = split_reply(last)
    if not reasoning.strip():
        return "no reasoning"
    if not answer.strip() and not last.get("tool_calls"):
        return "no answer"
    if record["domain"] == "math" and not re.search(r"\\boxed\s*\{\s*[^\s}]", answer):
        return "no \\boxed{}"
    return why_not_code(record, answer) or why_not_calls(record)

def replies_of(record):
    """The messages that an assistant wrote."""
    return [message for message in record["messages"] if message["role"] == "assistant"]

def text_of(record, roles):
    """What these roles say, in one text."""
    return "\n".join(turn.get("content") or "" for turn in record["messages"] if turn["role"] in roles)

def split_reply(message):
    """(reasoning, answer) of an assistant's message; the reasoning is "" if its block is not closed."""
    content = message.get("content") or ""
    if message.get("reasoning_content"):
        return message["reasoning_content"], content
    reasoning, closed, answer = content.partition("<think>")[2].partition("</think>")
    return (reasoning, answer) if closed else ("", content)

LANGUAGES = {  # the tags of its fenced blocks; what shows that a question or an untagged block is about it
    "python": ("py python python2 python3", r"\bpython[23]?\b|^[ \t]*def \w+\(.*:[ \t]*$"),
    "c++": ("c cc cpp c++ cxx", r"\bc\+\+|\bcpp\b|^[ \t]*#[ \t]*include\b|\bstd::"),
    "java": ("java", r"\bjava\b|\bpublic class\b"),
    "javascript": ("js javascript ts typescript", r"\b(?:java|type)script\b"),
}
# No pattern here may try twice what does not match: a model that loops writes megabytes of one token.
FENCE = r"(?ms)^[ \t]*```[ \t]*+([\w+#.-]*+)[^\n`]*+\n(.*?)(?:^[ \t]*+```|\Z)"

def languages_in(text):
    """The programming languages that a text names or shows."""
    return {name for name, (_, sign) in LANGUAGES.items() if re.search(sign, text, re.I | re.M)}

def why_not_code(record, answer):
    """The reason to drop an answer for its fenced code, or None.

    Its language is wrong if the questions name or show some, and no block of the answer is in any of them.
    Only Python and C++ are parsed, which are the languages of the paper's code."""
    blocks = []  # (language, code); blocks in other languages, such as bash, do not count
    for tag, code in re.findall(FENCE, answer):
        names = {name for name, (tags, _) in LANGUAGES.items() if tag.lower() in tags.split()}
        # An untagged block may be output or a sketch: it counts if it shows one language beyond doubt.
        if not tag and len(languages_in(code)) == 1:
            names = languages_in(code)
        blocks += [(name, code) for name in names]
    asked = languages_in(text_of(record, ("system", "user")))
    written = {name for name, _ in blocks}
    if asked and written and not asked & written:
        return "wrong language"
    for name, code in blocks:
        if name == "python" and not parses(code):
            return "python syntax error"
        if name == "c++" and not balanced(code):
            return "unbalanced c++ brackets"
    return None

def parses(code):
    """Whether Python can parse the code, which may be indented as a whole."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes such as "\d"
            ast.parse(textwrap.dedent(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the others: null bytes, absurd nesting
        return False
    return True

# Text of C++ in which brackets do not count. Numbers are here as the apostrophes of 1'000'000 begin nothing.
CPP_TEXT = re.compile(r"""
    //[^\n]* | /\*.*?\*/                       # comments
    | R"([^()\\\s]{0,16})\(.*?\)\1"            # raw strings
    | (?P<open>(?:/\*|R"[^()\\\s]{0,16}\().*)  # one of these that never ends
    | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])+'  # strings and characters
    | \b\d[\w.']*                             # numbers
""", re.X | re.S)

def balanced(code):
    """Whether the brackets of C++ code close each other in order."""
    # Of the alternatives #if ... #else ... #endif only the first counts.
    code = re.sub(r"(?ms)^[ \t]*#[ \t]*el(?:se|if).*?(?:^[ \t]*#[ \t]*endif|\Z)", "", code)
    code = CPP_TEXT.sub(lambda text: "(" if text["open"] else "", code)
    closing = {"(": ")", "[": "]", "{": "}"}
    expected = []  # the brackets that must come, the next one last
    for bracket in re.findall(r"[][(){}]", code):
        if bracket in closing:
            expected.append(closing[bracket])
        elif not expected or expected.pop() != bracket:
            return False
    return not expected

def why_not_calls(record):
    """The reason to drop a record for its tool calls, or None: each must be JSON and name a declared tool.

    Tools are declared in the field tools, or as JSON in a system prompt."""
    # Of a schema only the function has a text called name.
    schemas = json.dumps(record.get("tools")) + text_of(record, ("system",))
    declared = set(re.findall(r'"name"\s*:\s*"([^"]*)"', schemas))
    # Every reply counts: with tools, all are learned.
    for reply in replies_of(record):
        try:
            names = called_names(reply)
        except (ValueError, RecursionError):
            return "tool call is no JSON"
        if not declared.issuperset(names):
            return "call of no declared tool"

def called_names(reply):
    """The names of the tools that a reply calls, in tool_calls or in text; ValueError if one is no JSON."""
    calls = [call.get("function", call) for call in reply.get("tool_calls") or []]
    # Reasoning may quote the tag, unless it is cut off.
    text = re.sub(r"(?s)<think>(?:.*?</think>|(.*))", r"\1", reply.get("content") or "")
    for block in re.findall(r"(?s)<tool_call>(.*?)(?:</tool_call>|\Z)", text):
        value = json.loads(block)
        calls += value if isinstance(value, list) else [value]
    for call in calls:
        arguments = call.get("arguments", {}) if isinstance(call, dict) else None
        if isinstance(arguments, str):  # OpenAI's servers send them as text
            arguments = json.loads(arguments)
        if not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
            raise ValueError("a call must have a name and an object of arguments")
    return [call["name"] for call in calls]

# 3. The filter of problems (paper, section 3) ---------------------------------------------------------------

KEEP_TRUNCATED = 0.1  # "a small random subset"; the paper gives no number

def why_not_rl(problem_id, rollouts):
    """The paper's pass-rate filter for one problem: the reason to drop it, or None.

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
        kept = data.hash_to_unit(f"truncated {problem_id}") < KEEP_TRUNCATED
        return None if kept else "truncated in every rollout"
    # Compared as text, one answer in two spellings counts as two: that errs on the side of keeping.
    answers = Counter(rollout["answer"] for rollout in known if rollout["answer"] is not None)
    agreed = max(answers.values(), default=0) >= len(known) / 2  # the paper's 4 of 8
    return "wrong majority" if agreed else None

# 4. Overlap: the same question in two files -----------------------------------------------------------------
#
# Two questions are the same if their normalised texts are equal: in lower case, without spaces, in one of the
# spellings that LaTeX allows.
#
# They are also the same if they share half of the shorter one's 13-grams of words, and one has all numbers of
# the other. The numbers tell edited copies from problems made to a pattern, which have other answers: "A
# train travels 360 miles in 3 hours. How long ..." and "A plane travels 1200 miles in 3 hours. How long ...".
# A copy that is shorter than 13 words, or edited every few words, is not found.

GRAM = 13  # words, as in GPT-3's decontamination (arXiv 2005.14165, appendix C)
SHARED = 0.5  # of the 13-grams; ours
BOILERPLATE = 10  # a 13-gram of more questions than this is an instruction; from the same appendix

STYLE = r"\\(?:text|math|operatorname|emph|[hm]box|rm\b|bf\b|it\b)[a-z]*"
SPELLINGS = [  # (pattern, spelling), applied in this order to lower-case text after NFKC
    (r"(?<=\d)(?:\{,\}|\\,|,)(?=\d{3}(?!\d))", ""),  # 1,000
    (r"\\[()\[\]]|\\?\$|\\(?:begin|end)\s*\{[^{}]*\}", " "),  # where formulas begin and end; \$5
    (r"\\([%#&_])", r"\1"),
    (STYLE + r"\s*\{([^{}]*)\}", r" \1 "), (STYLE, " "),
    (r"\\(?:left|right|bigg?[lrm]?|displaystyle|q?quad|limits|[lcd]?dots[bcmio]?)(?![a-z])", " "),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°", " "),
    (r"\\(?:[dtc]|nice|x)frac(?![a-z])", r"\\frac"),
    (r"\\(?:times|cdot|ast)(?![a-z])|[×·⋅∗]|(?<=\d)\s*x\s*(?=\d)", "*"),
    (r"\\div(?![a-z])|[÷⁄∕]", "/"), (r"[‐-―−]", "-"),
    (r"\\(?:leq?|leqslant)(?![a-z])|≤", "<="), (r"\\(?:geq?|geqslant)(?![a-z])|≥", ">="),
    (r"\\neq?(?![a-z])|≠", "!="), (r"\\(?:[lr]?vert|mid)(?![a-z])", "|"),
    ("√", r"\\sqrt "), ("∞", r"\\infty "), ("lamda", "lambda"),  # as Unicode's name of λ has it
    (r"\\var(?=[a-z])", r"\\"), (r"\\[^a-z]", " "),  # \varphi is \phi; spaces such as \; and braces of sets
]
ARGUMENT = r"\s*(?:\{([^{}]*)\}|(\w))"
WORD = re.compile(r"[\u3040-\u9fff\uac00-\ud7a3]|[^\W\d_]+|\d+(?:\.\d+)?|[-+*/=<>^%()|]|!=|(?<=[\d)])!")

def normalise(text):
    """The words, numbers and operators of a question as a list, the same for all of its usual spellings."""
    text = re.sub("[²³¹⁰⁴-⁹⁺⁻]+", r"^{\g<0>}", text)  # before NFKC makes x² x2
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub("[α-ω]", lambda letter: f" {unicodedata.name(letter[0]).split()[-1].lower()} ", text)
    for pattern, spelling in SPELLINGS:
        text = re.sub(pattern, spelling, text)
    # From the innermost braces outwards: \frac{a}{b} becomes (a)/(b), and x^{2} becomes x^(2).
    for _ in range(8):
        text = re.sub(r"\\frac" + ARGUMENT * 2, r" (\1\2)/(\3\4) ", text)
        text = re.sub(r"(?<!\\frac)(?<!\})\{([^{}]*)\}", r"(\1)", text)
    # Parentheses around a single word or number say nothing: (2) is 2.
    text = re.sub(r"\(\s*([^\W_]+)\s*\)", r" \1 ", text)
    return WORD.findall(text)

class Question:
    """A question in the forms that are compared."""
    def __init__(self, text, where=""):
        words = normalise(text)
        self.where = where
        # Spaces within formulas must not count, but 2 10 is not 210.
        self.text = re.sub(r"(?<!\d) | (?!\d)", "", " ".join(words))
        self.grams = {" ".join(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}
        self.numbers = Counter(word for word in words if word[0].isdigit())

def questions_of(record, where):
    """The texts that ask something: the prompt of a problem, or what users say in a conversation."""
    if record.get("messages") is None and record.get("conversations") is None:
        name = next((name for name in record if data.PUBLIC.get(name) == "prompt"), "prompt")
        text = data.text_field(record, name, where)
        try:  # models are asked with the choices; any index will do here, as a benchmark may hide its answers
            choices, _ = data.parse_choices(data.choices_of(record), 0, where)
            return [text, data.with_choices(text, choices)]
        except ValueError:  # no choices, or some that could not be asked
            return [text]
    messages = data.sft_row(record, where)["messages"]
    texts = [message.get("content") for message in messages if message.get("role") == "user"]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: field messages: needs a user's message, and a text in each")
    # Two users may both say "go on" later: after the first question only long texts count.
    return texts[:1] + [text for text in texts[1:] if len(text.split()) >= GRAM]

class Index:
    """The questions of a file, found by their text or by their 13-grams."""
    def __init__(self, path):
        self.by_text = {}
        for where, record in data.read_records(path):
            for text in questions_of(record, where):
                question = Question(text, where)
                self.by_text.setdefault(question.text, question)
        self.by_gram = {}
        for question in self.by_text.values():
            for gram in question.grams:
                self.by_gram.setdefault(gram, []).append(question)
        # A question with choices is here twice, but counts once.
        self.boilerplate = {gram for gram, found in self.by_gram.items()
                            if len({question.where for question in found}) > BOILERPLATE}
        for question in self.by_text.values():
            question.grams -= self.boilerplate

    def find(self, question):
        """(what is alike, where) of the same question in this file, or None."""
        if question.text and question.text in self.by_text:  # it is empty if there is no word or number
            return "same text", self.by_text[question.text].where
        grams = question.grams - self.boilerplate
        common = Counter(other for gram in grams for other in self.by_gram.get(gram, ()))
        for other, count in common.most_common():
            share = count / min(len(grams), len(other.grams))
            same_numbers = question.numbers <= other.numbers or other.numbers <= question.numbers
            if share >= SHARED and same_numbers:
                return f"{share:.0%} of 13-grams", other.where

# 5. Commands of data.py -------------------------------------------------------------------------------------

def convert(source, *, out, problems="", limit=0, heldout=0.0):
    """Turn solutions or conversations, or rollouts of PROBLEMS, into SFT samples, and filter them."""
    if limit < 0 or not 0 <= heldout < 1:
        raise ValueError(f"--limit {limit} and --heldout {heldout}: must be from 0, and from 0 to below 1")
    if problems:
        pairs = read_rollouts(source, problems)[: limit or None]
        records = [record for pair in pairs for record in from_rollouts(*pair)]
    else:
        rows = islice(data.read_records(source), limit or None)
        records = [from_row(record, where) for where, record in rows]
    parts = {False: [], True: []}  # held out? -> [(record, reason)]
    for record in records:
        parts[heldout > 0 and split_point(record) < heldout].append((record, why_not_sft(record)))
    write_kept(out, parts[False])
    if heldout:
        write_kept(Path(out).with_stem(f"{Path(out).stem}-heldout"), parts[True])

def curate(traces, *, problems, out):
    """Keep the problems that are neither solved nor hopeless, by about 8 rollouts of each in TRACES."""
    pairs = read_rollouts(traces, problems)
    write_kept(out, [(problem.record(), why_not_rl(problem.id, rollouts)) for problem, rollouts in pairs])

def overlap(a, b, *, out=""):
    """Find the rows of A that ask a question of B; with OUT, write the other rows of A."""
    index = Index(b)
    kept = []
    rows = [*data.read_records(a)]
    for where, record in rows:
        found = [index.find(Question(text, where)) for text in questions_of(record, where)]
        if not any(found):
            kept.append(record)
        for what, there in dict.fromkeys(filter(None, found)):
            print(f"{where} = {there}: {what}")
    print(f"{a}: {len(rows) - len(kept)} of {len(rows)} rows ask a question of {b}")
    if out:
        data.write_jsonl(out, kept)

def split_point(record):
    """A number in [0, 1) that an SFT record's question alone decides, so no order of rows mixes splits."""
    users = [message.get("content") or "" for message in record["messages"] if message["role"] == "user"]
    return data.hash_to_unit("split " + Question("".join(users[:1])).text)

def write_kept(path, judged):
    """Write the records without a reason to drop them, print counts. judged: list of (record, reason)."""
    data.write_jsonl(path, [record for record, reason in judged if reason is None])
    reasons = Counter(reason for _, reason in judged)
    kept = reasons.pop(None, 0)
    dropped = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "nothing"
    print(f"{path}: kept {kept} of {len(judged)}; dropped {dropped}")
