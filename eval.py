"""Answers and evaluation."""

import cmath
import itertools
import math
import re
import zlib
from fractions import Fraction
from functools import lru_cache

# 1. The answer in a text ----------------------------------------------------------------------------------------------


def extract_answer(text):
    r"""The final answer of a model's reply or of a worked solution.

    What stands in the last balanced `\boxed{}` after the reasoning, else what follows the last `####` (GSM8K).
    Reasoning is a draft: nothing inside <think> ... </think> counts, and a block that never ends hides all after it.

    Args:
        text: the reply, without the prompt.
    Returns:
        The answer as written, stripped; None where there is none or it is blank.
    """
    reply = text.rpartition("</think>")[2].partition("<think>")[0]
    # One pass with a stack of open braces, so that a text of nothing but `\boxed{` costs linear time. `\{` is a symbol.
    open_braces, last, answer = [], -1, None
    for brace in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", reply, re.S):
        if brace[0] == "}":
            start, boxed = open_braces.pop() if open_braces else (-1, False)
            if boxed and start > last:
                last, answer = start, reply[start : brace.start()]
        elif brace[0].endswith("{") and brace[0] != r"\{":
            open_braces.append((brace.end(), len(brace[0]) > 1))
    if answer is None:
        hashes = re.findall(r"####([^\n]*)", reply)
        answer = hashes[-1] if hashes else ""
    return answer.strip() or None


# 2. The same answer: characters -> tokens -> values -------------------------------------------------------------------
# A model writes whatever it likes, and a reward must not hang or raise on it: length, nesting, items and exact numbers
# are bounded (nesting by Python's own limit of 1000 frames, some 80 brackets). An answer beyond a bound, or outside the
# grammar, equals only one of the very same tokens.

MAX_CHARS = 1000  # the longest reference answers in use have some 150
MAX_ITEMS = 100  # of a list, set or matrix: comparing sets is quadratic
MAX_BITS = 4096  # of an exact numerator or denominator: 2^4000 and 500! fit
POINTS = 3  # expressions in variables are the same if they agree at this many points


class Unreadable(ValueError):
    """An answer outside the grammar, beyond a bound, or without a value."""


SEPARATOR = r",\\!\s*|\{,\}|\\,|\\\s|~"  # of thousands; a bare comma is one too, but may separate items as well
TOKEN = re.compile(
    rf"""(?P<skip>\s+|\\[!,;:()\[\]\s]|~|\\?\$|[£€]|\\(?:left|right)(?![A-Za-z])\.?
               |\\(?:[bB]igg?[lrm]?|displaystyle|q?quad)(?![A-Za-z]))
       |\\(?:text(?:bf|it|rm)?|mbox|math(?:rm|bf|it)|operatorname)\s*\{{(?P<text>[^{{}}]*)\}}
       |(?P<degree>\^\s*\\circ(?![a-z])|\^\s*\{{\s*\\circ\s*\}}|\\degree(?![a-z])|°)
       |(?P<thousands>[1-9][0-9]{{0,2}}(?:(?:{SEPARATOR}|,)[0-9]{{3}})+(?![0-9])(?:\.[0-9]+)?)
       |(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)
       |(?P<name>(?:[A-Za-z]|\\log)_(?:[A-Za-z0-9]|\{{[A-Za-z0-9]+\}}))
       |_(?P<base>[0-9]+|\{{[0-9]+\}})
       |(?P<matrix>\\(?:begin|end)\s*\{{[bpv]?matrix\}})
       |(?P<word>[A-Za-z]+)
       |(?P<symbol>\\[A-Za-z]+|\\.|\*\*|<=|>=|!=|.)""",
    re.X | re.S,
)
SPELLINGS = {
    "*": r"\cdot \times × · ⋅", "/": r"\div ÷", "-": "− –", "^": "**", "±": r"\pm", "∓": r"\mp", "%": r"\%",
    "<": r"\lt", "<=": r"\le \leq \leqslant ≤", ">": r"\gt", ">=": r"\ge \geq \geqslant ≥", "!=": r"\ne \neq ≠",
    "∈": r"\in", "∪": r"\cup", "∅": r"\emptyset \varnothing", "∞": r"\infty inf infinity", "π": r"\pi pi",
    r"\frac": r"\dfrac \tfrac \cfrac", r"\sqrt": "sqrt √", "(": r"\langle \lparen", ")": r"\rangle \rparen", r"\{": r"\lbrace", r"\}": r"\rbrace", ",": "; or and",
}  # fmt: skip
SPELLING = {other: one for one, others in SPELLINGS.items() for other in others.split()}
# Functions and Greek letters are variables like others: \log 8 equals itself, and not 3 \log 2.
NAMED = (
    r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc|log|ln|exp"
    r"|alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|varphi|psi|omega)"
)
UNITS = {
    "mm": "millimeter", "cm": "centimeter", "m": "meter", "km": "kilometer", "in": "inch inches", "ft": "foot feet",
    "yd": "yard", "mi": "mile", "g": "gram", "kg": "kilogram", "lb": "pound", "oz": "ounce", "s": "second sec",
    "min": "minute", "h": "hour hr", "day": "", "week": "", "year": "", "cent": "", "dollar": "", "degree": "",
}  # fmt: skip
UNIT = {
    spelling + plural: unit
    for unit, others in UNITS.items()
    for spelling in (unit, *others.split())
    for plural in ("", "s" * (len(spelling) > 1))
}


def tokenize(answer, thousands=True):
    """A list of (kind, text), kind one of number, name, text, base, op. Any text at all becomes tokens.

    thousands says how `1,234` is read: as one number, or as the two that a comma may also separate. Between brackets it
    is always two: points and intervals are more common there than numbers above 999.
    """
    tokens, brackets, at = [], 0, 0
    answer = answer.replace("²", "^2").replace("³", "^3")
    while match := TOKEN.match(answer, at):
        kind, text, at = match.lastgroup, match[0], match.end()
        if kind == "thousands":
            if "," in re.sub(SEPARATOR, "", text) and (brackets or not thousands):
                text = text[: text.index(",")]
                at = match.start() + len(text)
            tokens.append(("number", re.sub(rf"{SEPARATOR}|,", "", text)))
        elif kind == "text":
            tokens += text_tokens(match["text"])
        elif kind in ("number", "name", "base"):
            tokens.append((kind, text.strip("_{}") if kind == "base" else re.sub("[{}]", "", text)))
        elif kind == "word":
            tokens += word_tokens(text)
        elif kind != "skip":
            text = SPELLING.get(text, text)
            text = {"degree": "°", "matrix": "begin" if "begin" in text else "end"}.get(kind, text)
            brackets += (text in ("(", "[", r"\{")) - (text in (")", "]", r"\}"))
            tokens.append(("name" if text in ("π", "∞") or re.fullmatch(NAMED, text) else "op", text))
    return tokens


def word_tokens(word):
    r"""Letters outside \text{}: a constant, a function, a unit, a word of four letters or more; else variables."""
    if word in SPELLING:
        return tokenize(SPELLING[word])
    if re.fullmatch(NAMED, "\\" + word):
        return [("name", "\\" + word)]
    if len(word) > 3 or len(word) > 1 and word in UNIT:
        return [("text", word.casefold())]
    return [("name", letter) for letter in word]


def text_tokens(text):
    r"""What stands in \text{}: mathematics if it holds a digit or is one letter, as in (C); else a word or a unit."""
    if re.search("[0-9]", text) or len(text.strip(" ().")) < 2:
        return tokenize(text.strip(" ."))
    text = " ".join(text.casefold().split())
    return [("op", {"and": ",", "or": ",", "percent": "%"}[text])] if text in ("and", "or", "percent") else [("text", text)]


class Parser:
    r"""Recursive descent that computes as it reads. What it returns is

    ("number", [x, ...])      at each point, an exact Fraction as long as it is rational, else a float or complex
    ("tuple", brackets, [value, ...])         a point, an interval, a matrix of rows
    ("bag", [value, ...])     a set, or a bare list: no order, no duplicates, and a bag of one is that one
    ("union", [value, ...])   of intervals
    ("relation", operators, [value, ...], named)                              named: the left side is a name, x or f(x)
    ("word", text)

    list     item ("," item)*                          unary    sign unary | power
    item     union (relation union)*                   power    postfix ("^" unary)?
    union    sum ("∪" sum)*                            postfix  primary ("!" | "%" | "°" | base)*
    sum      product (sign product)*                   primary  number | name | word | matrix
    product  unary (("*" | "/") unary | power)*                 | bracket list bracket | \frac, \sqrt argument
    """

    SIGNS = ("+", "-", "±", "∓")
    RELATIONS = ("=", "<", "<=", ">", ">=", "!=", "∈")
    CLOSING = {"(": (")", "]"), "[": (")", "]"), "{": ("}",), r"\{": (r"\}",)}

    def __init__(self, tokens, either, percent):
        self.tokens, self.at, self.depth = [*tokens, ("end", "")], 0, 0
        self.sign = {"+": 1, "-": -1, "±": either, "∓": -either}
        self.percent = percent  # what % multiplies by
        self.units, self.met = set(), set()  # units and signs met on the way

    @property
    def kind(self):
        return self.tokens[self.at][0]

    @property
    def op(self):
        return self.tokens[self.at][1] if self.kind == "op" else None

    def take(self, *expected):
        text = self.tokens[self.at][1]
        if expected and self.op not in expected:
            raise Unreadable(f"expected {' or '.join(expected)}, found {text or 'the end'}")
        self.met.add(text)
        self.at += 1
        return text

    def chain(self, rule, operators):
        """rule (operator rule)*, as the operators and the values."""
        found, values = [], [rule()]
        while self.op in operators:
            found.append(self.take())
            values.append(rule())
        if len(values) > MAX_ITEMS:
            raise Unreadable(f"more than {MAX_ITEMS} items")
        return found, values

    def answer(self):
        value = bag(self.chain(self.item, [","])[1])
        if self.kind != "end":
            raise Unreadable(f"cannot read on from {self.take()!r}")
        return value

    def item(self):
        while self.op == ",":  # "a, b, and c"
            self.take()
        start = self.at
        relations, members = self.chain(self.union, self.RELATIONS)
        if not relations:
            return members[0]
        left = itertools.takewhile(lambda token: token[1] not in self.RELATIONS, self.tokens[start:])
        named = all(kind == "name" or text in ("(", ")", ",") for kind, text in left)
        return members[1] if relations == ["∈"] and named else ("relation", relations, members, named)

    def union(self):
        members = self.chain(self.sum, ["∪"])[1]
        return ("union", members) if len(members) > 1 else members[0]

    def sum(self):
        signs, terms = self.chain(self.product, self.SIGNS)
        total = terms[0]
        for sign, term in zip(signs, terms[1:]):
            total = number(lambda x, y: x + self.sign[sign] * y, total, term)
        return total

    def product(self):
        result = self.unary()
        while True:
            if self.op in ("*", "/"):
                operator = {"*": lambda x, y: x * y, "/": lambda x, y: x / y}[self.take()]
                result = number(operator, result, self.unary())
            elif self.starts_factor():
                result = number(lambda x, y: x * y, result, self.power())
            elif self.kind == "text":
                self.unit()
            else:
                return result

    def starts_factor(self):
        if self.kind == "number":  # "2 3" and "x2" are not meant as products, \log 3 is read as one
            return self.tokens[self.at - 1][0] == "op" or self.tokens[self.at - 1][1].startswith("\\")
        return self.kind == "name" or self.op in ("(", "[", "{", r"\frac", r"\sqrt")

    def unit(self):
        """`cm`, `square inches`, `inches^2`. A word that is no known unit (5 apples) is passed over."""
        power, _, unit = self.take().strip(".").rpartition(" ")
        exponent = constant({"square": 2, "sq": 2, "cubic": 3}.get(power, 1))
        if self.op == "^":
            self.take()
            exponent = self.argument()
        if unit in UNIT:
            self.units.add((UNIT[unit], str(exponent)))

    def unary(self):
        if self.op in self.SIGNS:
            sign = self.sign[self.take()]
            return number(lambda x: sign * x, self.unary())
        return self.power()

    def power(self):
        base = self.postfix()
        if self.op != "^":
            return base
        self.take()
        return number(power, base, self.unary())

    def postfix(self):
        value = self.primary()
        while self.op in ("!", "%", "°") or self.kind == "base" and self.tokens[self.at - 1][0] == "number":
            mark = self.take()
            if mark == "!":
                value = number(factorial, value)
            elif mark == "%":
                value = number(lambda x: x * self.percent, value)
            else:  # 90° is 90 with a unit, and so is 2516_8
                self.units.add((UNIT["degree"], str(constant(1))) if mark == "°" else ("base", mark))
        return value

    def primary(self):
        kind, text = self.kind, self.take()
        if kind == "number":
            return self.mixed_number(text)
        if kind == "name":
            return ("number", [value_of_name(text, point) for point in range(POINTS)])
        if kind == "text":
            return ("word", text)
        if kind == "op" and text in self.CLOSING:
            return self.bracket(text)
        if text == r"\frac":
            return number(lambda x, y: x / y, self.argument(), self.argument())
        if text == r"\sqrt":
            return self.root()
        if text == "begin":
            return self.matrix()
        if text == "∅":
            return ("bag", [])
        raise Unreadable(f"cannot read {text!r}" if text else "ends too early")

    def mixed_number(self, text):
        r"""A number; 1\frac{4}{5} and 1 4/5 mean 1 + 4/5."""
        value = constant(text)
        (kind, first), (_, over), (_, second) = [*self.tokens[self.at :], ("", ""), ("", "")][:3]
        if text.isdigit() and kind == "number" and over == "/" and first.isdigit() and second.isdigit():
            self.at += 3
            return number(lambda x: x + Fraction(int(first), int(second)), value)
        if text.isdigit() and first == r"\frac":
            fraction = self.primary()
            mixed = fraction[1] == fraction[1][:1] * POINTS and isinstance(fraction[1][0], Fraction)
            return number(lambda x, y: x + y if mixed else x * y, value, fraction)
        return value

    def argument(self):
        r"""Of a command: a group in braces, else one digit (\frac43 is four thirds), letter or command."""
        kind, text = self.tokens[self.at]
        if kind == "number" and len(text) > 1:
            self.tokens[self.at] = (kind, text[1:])
            return constant(text[0])
        return constant(self.take()) if kind == "number" else self.primary()

    def root(self):
        index = constant(2)
        if self.op == "[":
            self.take()
            index = self.sum()
            self.take("]")
        # \sqrt12 is meant as the root of 12, whatever LaTeX makes of it
        radicand = constant(self.take()) if self.kind == "number" else self.primary()
        return number(lambda x, n: power(x, 1 / n), radicand, index)

    def bracket(self, opening):
        items = [] if self.op in self.CLOSING[opening] else self.chain(self.item, [","])[1]
        brackets = opening + self.take(*self.CLOSING[opening])
        if opening == r"\{" or brackets == "{}" and len(items) > 1:
            return bag(items)
        if len(items) == 1 and brackets in ("()", "[]", "{}"):
            return items[0]
        if len(items) < 2:
            raise Unreadable(f"too little between {opening} and {brackets[-1]}")
        return ("tuple", brackets, items)

    def matrix(self):
        rows = []
        while self.op != "end":
            rows.append(("tuple", "row", self.chain(self.item, ["&"])[1]))
            if self.op != "end":
                self.take(r"\\")
        self.take("end")
        return ("tuple", "matrix", rows)


def number(function, *numbers):
    """function of numbers, at every point."""
    if any(value[0] != "number" for value in numbers):
        raise Unreadable("something else stands where a number should")
    results = [function(*xs) for xs in zip(*(value[1] for value in numbers))]
    for x in results:
        if isinstance(x, Fraction) and max(x.numerator.bit_length(), x.denominator.bit_length()) > MAX_BITS:
            raise Unreadable("a number too large")
    return ("number", results)


def constant(text):
    return ("number", [Fraction(text)] * POINTS)


def value_of_name(name, point):
    """A constant's value, or a variable's at this point."""
    if name in (known := {"π": math.pi, "e": math.e, "i": 1j, "∞": math.inf}):
        return known[name]
    # Rational, so that polynomials are compared exactly; of both signs, so that x is not sqrt(x^2); an odd number over
    # 1024, so that no root of a short equation is hit; the same in every run.
    sign = -1 if (zlib.crc32(name.encode()) + point) % 2 else 1
    return sign * Fraction(zlib.crc32(f"{name} {point}".encode()) % 5000 * 2 + 1, 1024)


def power(base, exponent):
    """base ** exponent: exact where it is rational; an odd root of a negative number is the real one."""
    if not (isinstance(base, Fraction) and isinstance(exponent, Fraction)):
        return complex(base) ** complex(exponent)
    p, q = exponent.numerator, exponent.denominator
    if abs(p) * max(base.numerator.bit_length(), base.denominator.bit_length()) > MAX_BITS or q > MAX_BITS:
        raise Unreadable("a power too large")
    if q == 1:
        return base**p
    if base < 0 and q % 2:
        return power(-base, exponent) * (-1) ** p
    if base > 0:
        root = Fraction(round(base.numerator ** (1 / q)), round(base.denominator ** (1 / q)))
        if root**q == base:
            return root**p
    return complex(base) ** float(exponent)


def factorial(n):
    if not isinstance(n, Fraction) or n.denominator != 1 or not 0 <= n <= 500:
        raise Unreadable("a factorial of something else than 0 to 500")
    return Fraction(math.factorial(int(n)))


def bag(items):
    members = []
    for member in itertools.chain(*(item[1] if item[0] == "bag" else [item] for item in items)):
        if not any(same(member, other) for other in members):
            members.append(member)
    return members[0] if len(members) == 1 else ("bag", members)


def close(a, b):
    """Exact for rationals. A float operation errs by some 1e-16, so 1e-13 leaves room for hundreds of them."""
    if isinstance(a, Fraction) and isinstance(b, Fraction) or not (cmath.isfinite(a) and cmath.isfinite(b)):
        return a == b
    return abs(complex(a) - complex(b)) <= 1e-13 * max(1, abs(a), abs(b))


def same(a, b):
    """Whether two values of the Parser are the same answer."""
    match (a, b):
        case (("number", xs), ("number", ys)):
            return all(map(close, xs, ys))
        case (("tuple", brackets, xs), ("tuple", others, ys)):
            return brackets == others and len(xs) == len(ys) and all(map(same, xs, ys))
        case (("bag", xs), ("bag", ys)) | (("union", xs), ("union", ys)):
            return same_in_any_order(xs, ys)
        case (("relation", *_), ("relation", *_)):
            return same_in_any_order(statements(*a[1:3]), statements(*b[1:3]))
        case (("relation", relations, members, named), value) | (value, ("relation", relations, members, named)):
            # x = 5 answers 5, and so do x = 2 + 3 = 5 and 2 + 3 = 5; 41 = 42 answers nothing
            return set(relations) == {"="} and all(same(member, value) for member in members[named:])
    return a == b


def same_in_any_order(xs, ys):
    """Each x is the same as a y of its own."""
    rest = list(ys)
    for x in xs:
        partner = next((i for i, y in enumerate(rest) if same(x, y)), None)
        if partner is None:
            return False
        del rest[partner]
    return not rest


def statements(relations, members):
    """a < b >= c says a - b < 0 and c - b <= 0, whatever these are multiplied by: each is divided by its first value.

    So y = 2x + 3 is 2y - 4x = 6. A relation without a variable (41 = 42) says nothing and equals none.
    """
    said = []
    for op, left, right in zip(relations, members, members[1:]):
        if op in (">", ">="):
            op, left, right = op.replace(">", "<"), right, left
        difference = number(lambda x, y: x - y, left, right)
        if all(close(x, difference[1][0]) for x in difference[1]):
            raise Unreadable("a relation without a variable")
        scale = abs(difference[1][0]) if "<" in op else difference[1][0]
        said.append(("tuple", op, [number(lambda x: x / scale, difference)]))
    return said


@lru_cache(maxsize=4096)
def read(answer, thousands, percent):
    """(values, units, whether a % was met) of an answer; raises Unreadable."""
    text = answer.strip().rstrip(".")
    words = " ".join(re.sub(r"\\(?:text(?:bf|it|rm)?|mbox)\s*\{([^{}]*)\}", r"\1", text).casefold().split()).rstrip(".")
    as_words = ("word", words), frozenset(), False
    if re.fullmatch(r"[a-z' -]*[a-z]{3}[a-z' -]*", words) and not {*words.split()} & {*SPELLING}:
        return as_words
    try:
        tokens = tokenize(text, thousands)
        parser = Parser(tokens, 1, percent)
        value = parser.answer()
        if parser.met & {"±", "∓"}:  # 1 ± 2 is read twice
            value = bag([value, Parser(tokens, -1, percent).answer()])
        return value, frozenset(parser.units), "%" in parser.met
    except (ArithmeticError, ValueError, RecursionError) as error:
        if re.fullmatch(r"[a-z0-9][a-z0-9 .,:;'?!&-]*", words) and re.search("[a-z]{2}|:", words):
            return as_words  # 10:30 p.m., a sentence, a name with a number
        raise Unreadable(str(error)) from None


def is_equivalent(prediction, gold):
    r"""Whether two answers are the same, as tokens or in value.

    Numbers, roots and expressions are compared by value, rationals exactly: 0.333 is not 1/3. Points, intervals and
    matrices keep their order and brackets; sets, bare lists, unions and the two values of \pm have no order. `x = 5`
    answers `5`. Units matter only where both sides have one: 5 cm is 5 but not 5 m. Beside an answer without %, 50\% is
    both 0.5 and 50. Words ignore case, variables do not.

    Args:
        prediction: text, or None (no answer was found), which equals nothing.  gold: the reference answer.
    Returns:
        False also for anything blank, too long or unreadable. Takes milliseconds and never raises, whatever the texts.
    """
    if prediction is None or max(len(prediction), len(gold)) > MAX_CHARS:
        return False
    tokens, gold_tokens = (tokenize(answer.strip().rstrip(".")) for answer in (prediction, gold))
    if not tokens or not gold_tokens:
        return False
    return tokens == gold_tokens or same_reading(prediction, gold, True) or same_reading(prediction, gold, False)


def same_reading(prediction, gold, thousands):
    try:
        (a, units, percent), (b, gold_units, gold_percent) = (
            read(answer, thousands, Fraction(1, 100)) for answer in (prediction, gold)
        )
        if units and gold_units and units != gold_units:
            return False
        if same(a, b) or percent == gold_percent:
            return same(a, b)
        return same(read(prediction, thousands, Fraction(1))[0], read(gold, thousands, Fraction(1))[0])
    except (ArithmeticError, ValueError):
        return False


def check_gold(answer):
    """Raises ValueError, saying why, where no prediction could be compared with this reference answer."""
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"an answer must be text that is not blank, found {answer!r}")
    if len(answer) > MAX_CHARS:
        raise ValueError(f"an answer may have {MAX_CHARS} characters, this one has {len(answer)}")
    try:
        read(answer, True, Fraction(1, 100))
    except Unreadable as error:
        raise ValueError(f"the answer {answer!r} cannot be checked: {error}") from None


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
    """Mean over m problems and its standard error s / sqrt(m), s^2 = sum (x - mean)^2 / (m - 1); (x, None) for m = 1."""
    m = len(scores)
    if m == 0:
        raise ValueError("there are no problems to average over")
    mean = math.fsum(scores) / m
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in scores) / (m - 1) / m) if m > 1 else None
