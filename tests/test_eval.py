"""Tests of eval.py: answers, estimators, and an evaluation from end to end with a stand-in for the model."""

import itertools
import math
import time
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eval as ev

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy

# Finding the answer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{7", None),
        (r"\boxed{6} and \boxed{7", "6"),
        (r"a } stray \boxed{6}", "6"),
        (r"a { stray \boxed{6}", "6"),
        (r"\boxed{}", None),
        ("It is 18.\n#### 18", "18"),
        ("#### 1\n#### 2,000\n", "2,000"),
        (r"#### 1 \boxed{2}", "2"),
        ("the answer is 5", None),
        ("", None),
        (r"<think>\boxed{1}</think>\boxed{2}", "2"),
        (r"<think>\boxed{1}</think> none", None),
        (r"<think>\boxed{1}", None),
        (r"\boxed{1}</think>\boxed{2}", "2"),
        (r"\boxed{1}</think> none", None),
        (r"<think>a</think>\boxed{1}<think>\boxed{2}", "1"),
        ("<think>#### 1", None),
    ],
)
def test_extract_answer(text, answer):
    assert ev.extract_answer(text) == answer


def test_extract_answer_takes_linear_time():
    start = time.perf_counter()
    assert ev.extract_answer(r"\boxed{" * 30_000) is None
    assert ev.extract_answer("#### 1\n" * 30_000 + "#### 7") == "7"
    assert time.perf_counter() - start < 2


# Comparing answers ----------------------------------------------------------------------------------------------------

SAME = r"""
1/2 == 0.5
\frac{1}{2} == \dfrac12
-\frac{1}{2} == \frac{-1}{2}
1\frac{4}{5} == 9/5
-1\frac12 == -1.5
137 \frac{1}{2} == 137.5
1 4/5 == 1.8
1,000 == 1000
32,\!348 == 32348
11,\! 111,\! 100 == 11111100
1{,}000{,}000 == 10^6
5\,000 == 5000
\$32,348.50 == 32348.5
+5 == 5
5. == 5
.5 == 0.50
−3 == -3
50\% == 0.5
50% == 50
25\text{ percent} == 25\%
2\frac{1}{3}\% == 7/300
2^{10} == 1024
2**10 == 1024
2^10 == 1024
3 \times 10^{-2} == 0.03
6 \div 4 == 3 / 2
2 \cdot 3 == 6
5! == 120
2\cos 20^\circ == \cos(20^\circ) \cdot 2
\log_2 3 == \log_{2} 3
\sqrt{8} == 2\sqrt2
\sqrt[3]{-8} == -2
8^{1/3} == 2
\sqrt{\frac{1}{4}} == \frac12
\frac{\sqrt{3}}{3} == 1/\sqrt3
7\pi == 7 pi
\frac{\pi}{6} == π/6
e^{i\pi} == -1
6+9i == 9i+6
90^\circ == 90
90^{\circ} == 90°
\frac{270}7\text{ degrees} == \frac{270}{7}
x^2+2x+1 == (x+1)^2
\frac{1}{2}x == x/2
xy == yx
x_1+x_2 == x_{2}+x_1
6r^2-4r-24 == 2(3r^2-2r-12)
\frac{x^2-1}{x-1} == x+1
x=5 == 5
x = 5 == 5 = x
x = 2 + 3 = 5 == 5
6 \cdot 7 = 42 == 42
y=2x+3 == 2y-4x=6
y=2x+3 == 2x+3
f(x) = 2x == 2x
x+1=0 == x=-1
x > 3 == 3 < x
1 < x \le 3 == 3 \ge x > 1
(1,2) == \left( 1, 2 \right)
(1,234) == (1, 234)
(0.5, 1] == \left(\frac12,1\right]
(x,y) = (1,2) == (1,2)
(-\infty, 2) \cup (3, \infty) == (3,\infty) ∪ (-\infty,2)
x \in [0,1) == [0,1)
\{1,2,3\} == \{3,2,1\}
\{1,2,2\} == \{2,1\}
\{5\} == 5
\emptyset == \{\}
3, 5, 7 == 7,5,3
3, 5, and 7 == 3,5,7
x=1\text{ or }x=2 == 1, 2
1,234 == 1, 234
1 \pm \sqrt{19} == 1-\sqrt{19}, 1+\sqrt{19}
\frac{1 \pm \sqrt5}{2} == \frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2}
\{1\pm\sqrt{5},-2\} == \{-2, 1-\sqrt5, 1+\sqrt5\}
\begin{pmatrix} -1 & 0 \\ 0 & 1/2 \end{pmatrix} == \begin{pmatrix}-1&0\\0&0.5\\\end{pmatrix}
(A) == A
\text{(A)} == A
\text{A} == (A)
\textbf{(B)} == B
A. == A
\text{east} == East
\text{Yes} == yes
\text{no solution} == No solution.
10:30 \text{ p.m.} == 10:30 p.m.
5\text{ cm} == 5
5 cm == 5 centimeters
5 apples == 5
864 \mbox{ inches}^2 == 864
15\mbox{ cm}^2 == 15 \text{ square centimeters}
10 \text{ miles per hour} == 10
2516_8 == 2516
4210_{5} == 4210_5
$5$ == \(5\)
\displaystyle \frac{3}{4} == 0.75
9^{9^{9^9}} == 9^{9^{9^9}}
""".strip().split("\n")


@pytest.mark.parametrize("line", SAME)
def test_the_same(line):
    a, b = line.split(" == ")
    assert ev.is_equivalent(a, b)
    assert ev.is_equivalent(b, a)


OTHER = r"""
41 = 42 != 42
41 = 42 != 41
2+2=5 != 5
1=2 != 3=4
0=0 != 1=1
x = 41 = 42 != 42
x=5 != y=5
x=5 != x=6
x>3 != x<3
x>3 != x \ge 3
x+1=0 != x+1>0
0.33 != 1/3
3.14 != \pi
\sqrt2 != 1.41421
\sqrt{10^{10}+1} != 10^5
5 != -5
1,000 != 1.000
1,5 != 1.5
12 != 1 2
12 != 21
10 != 100
50\% != 5
50\% != 5000
50 != 0.5
5 \text{ cm} != 5\text{ m}
5 \text{ cm}^2 != 5\text{ cm}
2516_8 != 2516_7
2516_8 != 2517
90^\circ != 100^\circ
(1,2) != [1,2]
(1,2) != (2,1)
(1,2] != (1,2)
(1,2) != 1,2
(1,2) != (1,2,3)
(1,234) != 1234
(1,2) \cup (3,4) != (1,2),(3,4)
\{1,2\} != \{1,2,3\}
\{1,2\} != (1,2)
1, 2 != 1, 3
1 \pm 2 != 3
\begin{pmatrix}1\\2\end{pmatrix} != \begin{pmatrix}2\\1\end{pmatrix}
\begin{pmatrix}1&2\end{pmatrix} != \begin{pmatrix}1\\2\end{pmatrix}
x != y
x != -x
x != X
x != \sqrt{x^2}
2x != x^2
x_1 != x_2
\infty != -\infty
\infty != 10^{300}
east != seat
east != west
\text{yes} != no
A != B
(A) != (B)
None != none of these
5 apples != 6 apples
10:30 != 10:31
\frac{1}{2 != \frac12
1/0 != 1/0+1
9^{9^{9^9}} != 9^{9^{9^8}}
2 != 23
x2 != 2x
""".strip().split("\n")


@pytest.mark.parametrize("line", OTHER)
def test_not_the_same(line):
    a, _, b = line.partition(" != ")
    assert not ev.is_equivalent(a, b)
    assert not ev.is_equivalent(b, a)


@pytest.mark.parametrize("blank", ["", " ", "$", r"\!", ".", None])
def test_blank_answers_equal_nothing(blank):
    assert not ev.is_equivalent(blank, "")
    assert not ev.is_equivalent(blank, "1")
    assert not ev.is_equivalent(blank, blank or " ")


HOSTILE = [
    "9" * 200_000, "(" * 200_000, r"\frac{" * 100, "(" * 900, "{" * 450 + "1" + "}" * 450, r"\sqrt" * 190,
    "-" * 900 + "1", "2^" * 400 + "2", "5" + "!" * 900, "(500!)!", "9^{9^{9^9}}", "2^{4000}*" * 80 + "1",
    "+".join(rf"\frac{{1}}{{3^{{{i}}}}}" for i in range(2000, 2070)), "1," * 450 + "1", "x" * 900, r"\pm" * 300 + "1",
    "(1" + r"\pm(1" * 24 + ")" * 25, "\ud800\udfff", "\x00", "٣", "²", "\\", "_", "^", "x_", "x^", r"\frac", r"\frac1",
    r"\sqrt[", r"\sqrt[0]{2}", r"0^{-1}", r"0^{i}", r"\log 0", r"\log_1 5", r"\infty-\infty", "(x^x)^{x^x}",
    "e^{e^{e^{e^e}}}", r"10^{400}\pi", r"\begin{pmatrix}", r"\begin{pmatrix}\\\end{pmatrix}", "x" + "^{x" * 40,
    r"\sqrt[500]{2^{3000}}", "1/" * 450 + "7", "5" + "%" * 900, "5" + "°" * 900, "1_" * 300, "x=1" + "=1" * 200,
    "5 cm^", "5 cm^{}", r"5 cm^\{\}", r"\text{" * 100, r"\left" * 150, r"\sin" * 200 + "x", r"\boxed{5}", "|5|", "1e400",
    "(,)", "[]", "()", r"\{,\}", ",", "=", "1=", "=1",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_another_answer_and_takes_no_time(text):
    start = time.perf_counter()
    ev.extract_answer(text)
    ev.extract_answer(rf"\boxed{{{text}}}")
    assert not ev.is_equivalent(text, "17")
    assert not ev.is_equivalent("17", text)
    assert not ev.is_equivalent(text, text + " + 19")
    assert time.perf_counter() - start < 0.5


PIECES = r"\frac \sqrt \pm \cup \{ \} \pi \infty \text{ \left \right \% \\ \begin{pmatrix} \end{pmatrix} 1,000 2^{9^9} cm"
LATEX = st.lists(st.sampled_from([*"0123456789xyieE+-*/^_(){}[]|,.;:=<>!%&$ ~'²∞\ud800", *PIECES.split()])).map("".join)


@PATIENT
@given(st.one_of(LATEX, st.text()), LATEX)
def test_any_two_texts_can_be_compared(a, b):
    assert ev.is_equivalent(a, b) == ev.is_equivalent(b, a)
    assert ev.is_equivalent(a, a) == bool(ev.tokenize(a.strip().rstrip(".")))


@PATIENT
@given(st.fractions(max_denominator=10**6))
def test_a_fraction_is_read_in_every_spelling(x):
    p, q = x.numerator, x.denominator
    for text in (f"{p}/{q}", rf"\frac{{{p}}}{{{q}}}", rf"\left(\tfrac{{{-p}}}{{{-q}}}\right)", f"{p:,} / {q:,}"):
        assert ev.is_equivalent(text, f"{p}/{q}")
        assert not ev.is_equivalent(text, f"{p + 1}/{q}")


POLYNOMIAL = st.lists(st.integers(-9, 9), min_size=1, max_size=5)


def horner(coefficients):
    text = "0"
    for c in coefficients:
        text = f"({text})x + ({c})"
    return text


@PATIENT
@given(POLYNOMIAL, POLYNOMIAL)
def test_polynomials_are_the_same_if_their_coefficients_are(a, b):
    def stripped(coefficients):
        return list(itertools.dropwhile(lambda c: c == 0, coefficients))

    expanded = " + ".join(f"({c})x^{len(b) - 1 - i}" for i, c in enumerate(b))
    assert ev.is_equivalent(horner(a), expanded) == (stripped(a) == stripped(b))


def test_check_gold_accepts_what_can_be_compared():
    for gold in ("42", r"\text{east}", r"(-\infty, 0]", "10:30", "no real solution", r"1 \pm \sqrt{19}", r"\$36"):
        ev.check_gold(gold)


@pytest.mark.parametrize(
    ("gold", "why"),
    [
        ("", "not blank"),
        ("  ", "not blank"),
        (None, "not blank"),
        (5, "must be text"),
        ("1" * 1001, "1001"),
        (r"\frac{1}{2", "cannot be checked: expected }"),
        ("1/0", "cannot be checked"),
        ("9^{9^9}", "too large"),
        ("41 +", "ends too early"),
        (r"\foo{3}", "cannot read"),
    ],
)
def test_check_gold_says_what_is_wrong(gold, why):
    with pytest.raises(ValueError, match=why):
        ev.check_gold(gold)


# Estimators -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (1, 0, 1, 0.0),
        (1, 1, 1, 1.0),
        (4, 1, 1, 0.25),
        (4, 1, 2, 0.5),  # 1 - C(3,2)/C(4,2) = 1 - 3/6
        (5, 2, 3, 0.9),  # 1 - C(3,3)/C(5,3) = 1 - 1/10
        (5, 3, 3, 1.0),  # two wrong samples cannot fill three places
        (10, 0, 10, 0.0),
    ],
)
def test_pass_at_k_by_hand(n, c, k, expected):
    assert ev.pass_at_k(n, c, k) == pytest.approx(expected)


@PATIENT
@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_counts_the_draws_with_a_success(args):
    n, c, k = args
    draws = list(itertools.combinations(range(n), k))
    assert ev.pass_at_k(n, c, k) == pytest.approx(sum(min(draw) < c for draw in draws) / len(draws))


@pytest.mark.parametrize(("n", "c", "k"), [(0, 0, 1), (4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match="0 <= c <= n"):
        ev.pass_at_k(n, c, k)


def test_mean_and_stderr_by_hand():
    # mean 0.5; squares 4 * 0.25 = 1; variance 1/3; over 4 problems 1/12
    assert ev.mean_and_stderr([1, 0, 1, 0]) == (0.5, pytest.approx(math.sqrt(1 / 12)))
    assert ev.mean_and_stderr([0.25]) == (0.25, None)
    with pytest.raises(ValueError, match="no problems"):
        ev.mean_and_stderr([])
