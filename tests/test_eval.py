"""Tests of eval.py: estimators, methods, and an evaluation from end to end with a stand-in for the model."""

import itertools
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.test_train_sft import ROOT, run

import data
import deepconf
import eval as ev
import rewards
import sandbox
from model import PRESETS, FalconH1

MISSING = [f"{name}: {why}" for name, why in sandbox.sandbox_layers().items() if why != "on"]
needs_sandbox = pytest.mark.skipif(bool(MISSING), reason=f"no isolation here: {MISSING}")
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
    assert rewards.extract_answer(text) == answer


def test_extract_answer_takes_linear_time():
    start = time.perf_counter()
    assert rewards.extract_answer(r"\boxed{" * 30_000) is None
    assert rewards.extract_answer("#### 1\n" * 30_000 + "#### 7") == "7"
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
2.5 million == 2500000
\$3\text{ million dollars} == 3000000
864 \mbox{ inches}^2 == 864
15\mbox{ cm}^2 == 15 \text{ square centimeters}
10 \text{ miles per hour} == 10
2516_8 == 2516
4210_{5} == 4210_5
$5$ == \(5\)
\displaystyle \frac{3}{4} == 0.75
9^{9^{9^9}} == 9^{9^{9^9}}
5 = x == 5
5\ \ == 5
1.5e3 == 1500
2.5E-3 == 0.0025
\frac{\pi}{2} == 90^\circ
\tan^{-1}(1) == 45^\circ
e^{-x}\sin x == \frac{\sin x}{e^x}
\sqrt{x^2} == |x|
\ln 2x == \ln(2x)
x > 3 == (3, \infty)
3 \le x == [3,\infty)
x < \sqrt2 == (-\infty, \sqrt{2})
1 < x \le 3 == (1,3]
3 \ge x > 1 == (1,3]
x < 1 \text{ or } x \ge 3 == (-\infty,1)\cup[3,\infty)
\frac{\ln 8}{\ln 2} == 3
\log 8 == 3\log 2
\frac{\log 8}{\log 2} == 3
\log_2 8 == 3
\log_{10} 1000 == 3
\log_28 == 3
\log_{2}(8) == 3
\log_2 3 == \frac{\ln 3}{\ln 2}
\log_{\frac12} 8 == -3
\lg 100 == 2
\ln e^5 == 5
\ln(e) == 1
\log_2 2^{2000} == 2000
e^{\ln 3} == 3
\exp(2) == e^2
\sin 30^\circ == \frac12
\sin(30^\circ) == 0.5
\cos \frac{\pi}{3} == 1/2
\tan 45^{\circ} == 1
\cot \frac{\pi}{4} == 1
\sec 60° == 2
\csc 30^\circ == 2
\sin^2 x + \cos^2 x == 1
\sin^2\theta == 1-\cos^2\theta
\sin 2x == 2\sin x\cos x
\sin{2x} == 2\sin(x)\cos(x)
\cos 2\theta == 2\cos^2\theta-1
\tan x == \frac{\sin x}{\cos x}
\sin^{-1} \frac12 == \frac{\pi}{6}
\arctan 1 == \pi/4
\text{arcsin}(1) == \frac\pi2
\operatorname{arctan}(1) == \pi/4
2\arctan\frac13 == \arctan\frac34
\sin(-x) == -\sin x
\sin -x == -\sin x
\cos 36^\circ == \frac{1+\sqrt5}{4}
\sqrt{7+4\sqrt3} == 2+\sqrt3
\sqrt[3]{2+\sqrt5} == \frac{1+\sqrt5}{2}
\sqrt[3]{-\pi} == -\sqrt[3]{\pi}
|{-5}| == 5
|-5| == 5
\left|-5\right| == 5
\lvert -5\rvert == 5
|3+4i| == 5
|x-3| == |3-x|
|x||y| == |xy|
2|x| == |2x|
\left|x\left|y\right|\right| == |xy|
\lfloor 3.7 \rfloor == 3
\left\lceil \pi \right\rceil == 4
\lfloor \sqrt{2}\cdot\sqrt{2} \rfloor == 2
\binom{5}{2} == 10
\dbinom{100}{50} == \frac{100!}{50!50!}
\binom{n}{2} == \frac{n(n-1)}{2}
\binom{2n}{n} == \frac{(2n)!}{n!^2}
(n+1)! == (n+1)n!
5!! == 15
e^{2\pi i/3} == -\frac12+\frac{\sqrt3}{2}i
(1+i)^2 == 2i
\frac{1}{i} == -i
-\frac{1}{x} == \frac{1}{-x}
0.\overline{3} == 1/3
0.1\overline{6} == \frac16
.\overline{27} == \frac{3}{11}
2.\bar{9} == 3
three == 3
\text{three} == 3
Twenty-one == 21
five dollars == \$5
two million == 2000000
$1,234.50 == 1234.5
\$1,234.50 == 1234.5
12\text{ cm} == 12
12\,\mathrm{cm} == 12 cm
5€ == 5
€5 == 5
$-\$5$ == -5
20^\circ\text{C} == 20
20°C == 20
50\% == 50
12.5\% == \frac{1}{8}
5\sqrt2 \approx 7.07 == 5\sqrt{2}
x \approx 7.07 == 7.07
\approx 7 == 7
B. 12 == B
(B) 12 == \text{(B)}
\textbf{(B) }12 == B
\text{(B)} == B
B) == (B)
(-\infty, 3] == (-\infty,3]
+\infty == \infty
\{1,2\} == \{2,1\}
\{x=1, x=2\} == 1,2
x = \pm 2 == 2,-2
\pm 2 == 2, -2
\pm\sqrt{3} == \sqrt3,-\sqrt3
x=-2 \text{ or } x=2 == \pm 2
x_1=1, x_2=3 == 1,3
(x+1)(x-1) == x^2-1
1010_2 == 1010_{2}
\frac15\begin{pmatrix}1\\2\end{pmatrix} == \begin{pmatrix}1/5\\0.4\end{pmatrix}
\begin{bmatrix}1&2\end{bmatrix} == \begin{pmatrix}1&2\end{pmatrix}
\left(\begin{array}{cc}1&2\\3&4\end{array}\right) == \begin{pmatrix}1&2\\3&4\end{pmatrix}
\vec{v} == v
\mathbb{R} == \mathbb R
073 == 73
60 \text{ miles per hour} == 60 miles
60 \text{ km/h} == 60
x \equiv 3 == x \equiv 3
\frac{2}{\sqrt{3}} == \frac{2\sqrt{3}}{3}
(2^{10}-1)/3 == 341
10^{-3} == 0.001
6.02\times 10^{23} == 602000000000000000000000
\sqrt{-4} == 2i
1{,}234 == 1234
x \geq 3 == 3 \leq x
-x+5 == 5-x
a^2-b^2 == (a-b)(a+b)
2^{n+1} == 2\cdot 2^n
\frac{3^{x+2}}{9} == 3^x
e^{x^3} == \exp(x^3)
\sinh x == \frac{e^x-e^{-x}}{2}
\pi r^2 h == r^2 \pi h
\infty == infinity
""".strip().split("\n")


@pytest.mark.parametrize("line", SAME)
def test_the_same(line):
    a, b = line.split(" == ")
    assert rewards.is_equivalent(a, b)
    assert rewards.is_equivalent(b, a)


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
2 million != 2
5\text{ or more} != 5
not 5 != 5
10:30 != 10:31
\frac{1}{2 != \frac12
1/0 != 1/0+1
9^{9^{9^9}} != 9^{9^{9^8}}
2 != 23
x2 != 2x
42 = 41 = x != 41
90^\circ != \pi
90^\circ\text{C} != \frac{\pi}{2} + 1
\{90^\circ\} != \{\pi\}
1.5e3 != 1.5
x > 3 != [3, \infty)
x > 3 != (-\infty,3)
2x > 6 != (6,\infty)
x > 3 != y > 3
x \ne 3 != (3,\infty)
1 < x > 3 != (1,3)
1 < 2 < 3 != (1,3)
x < y != (-\infty, y)
x < 1, 3 != (-\infty,1)\cup(3,\infty)
\log 100 != 2
\log e != 1
\log 2 != \ln 2
\log_2 3 != \log_3 2
\sin 30 != 1/2
\sin 30^\circ != 30
\sin x != \cos x
\sin 2x != 2\sin x
\sin x != x
\sin^{-1} x != \frac{1}{\sin x}
\ln x^2 != (\ln x)^2
\arctan 1 != 45.1
\ln 2 != 0.693
|x| != x
|-5| != -5
\lfloor 3.7\rfloor != 4
\lceil 3.2\rceil != 3
\binom{5}{2} != \binom52 + 1
\binom{n}{2} != \frac{n^2}{2}
5!! != 120
n! != n
(n+1)! != n!
41=42 != 42
42=41 != 42
\pi = 3 != 3
x\pi=6 != 6
\sin x = 1 != 1
2x = 10 != 5
0.333 != 1/3
0.3333333333333 != 1/3
0.3 != 0.\overline{3}
0.\overline{3} != 0.\overline{33}1
2\pi != 6.28
6.283185 != 2\pi
[1,2) != (1,2]
\{1,2\} != \{1,3\}
\pm 2 != 2
2 != \pm 2
2,-2,0 != \pm 2
1010_2 != 1011_2
1010_2 != 10
1010_2 != 1010_3
\infty != 1
(-\infty,3] != (-\infty,3)
(-\infty,3] != [3,\infty)
\$1,234.50 != 123450
5\text{ dollars} != 5\text{ cents}
\$36 != 36^\circ
€5 != \$5
60\text{ km/h} != 60\text{ mi}
20°C != 20°F
12\text{ cm} != 12\text{ inches}
three != 4
twenty-one != 201
twenty != 2
50\% != 0.05
A != B. 12
(A) != (B) 12
(A) and (B) != B
(A) (B) != A
A, B != B
A or B != A
B. 12 != 12
AB != B
5\sqrt2 \approx 7.07 != 7.07
41 \approx 42 != 42
x=41 \approx 42 != 42
\frac12, 3 != 3
3; 4 != 3
3 or 4 != 4
\text{3 or 4} != 4
x \ne 5 != 5
x > 5 != 5
x \ge 5 != 5
\sqrt{2} != -\sqrt{2}
\sqrt{2} != 1.4142135
i != 1
i != -i
e != 2.71828
e != 2.718281828
\pi != 3.14159265
22/7 != \pi
x+1 != x+1.0000001
x^2 != x^3
\begin{pmatrix}1&2\\3&4\end{pmatrix} != \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{vmatrix}1&2\\3&4\end{vmatrix} != \begin{pmatrix}1&2\\3&4\end{pmatrix}
2\begin{pmatrix}1\\2\end{pmatrix} != \begin{pmatrix}2\\2\end{pmatrix}
\mathbb{R} != \mathbb{Q}
\mathbb{R} != R
1/0 != 0
\frac{0}{0} != 0
1/0 != \infty
\tan 90^\circ != 0
10^{100} != 10^{101}
5^2 != 10
-3^2 != 9
\frac{1}{2}x != \frac{1}{2x}
x=5, y=6 != 6, 6
x=5 != 5=6
5=5=6 != 5
5 \text{ or more} != 5
at least 5 != 5
no != 0
none != 0
nothing != 1
\text{undefined} != 0
3 apples and 4 pears != 3
3:4 != 3/5
f(x)=x != x^2
\vec{v} != \vec{w}
\text{B} != \text{b}
""".strip().split("\n")


@pytest.mark.parametrize("line", OTHER)
def test_not_the_same(line):
    a, _, b = line.partition(" != ")
    assert not rewards.is_equivalent(a, b)
    assert not rewards.is_equivalent(b, a)


@pytest.mark.parametrize("blank", ["", " ", "$", r"\!", ".", "\\", r"\ ", None])
def test_blank_answers_equal_nothing(blank):
    assert not rewards.is_equivalent(blank, "")
    assert not rewards.is_equivalent(blank, "1")
    assert not rewards.is_equivalent(blank, blank or " ")


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
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_another_answer_and_takes_no_time(text):
    start = time.perf_counter()
    rewards.extract_answer(text)
    rewards.extract_answer(rf"\boxed{{{text}}}")
    assert not rewards.is_equivalent(text, "17")
    assert not rewards.is_equivalent("17", text)
    assert not rewards.is_equivalent(text, text + " + 19")
    assert time.process_time() - start < 0.5


PIECES = r"\frac \sqrt \pm \cup \{ \} \pi \infty \text{ \left \right \% \\ \begin{pmatrix} \end{pmatrix} 1,000 2^{9^9} cm"
PIECES += r" \sin \log \log_ \ln^ \left| \right| \lfloor \rfloor \binom \overline{3} \approx \$ ^\circ !! (B) three \exp"
LATEX = st.lists(st.sampled_from([*"0123456789xyieE+-*/^_(){}[]|,.;:=<>!%&$ ~'²∞\ud800", *PIECES.split()])).map("".join)


@PATIENT
@given(st.one_of(LATEX, st.text()), LATEX)
def test_any_two_texts_can_be_compared(a, b):
    assert rewards.is_equivalent(a, b) == rewards.is_equivalent(b, a)
    assert rewards.is_equivalent(a, a) == bool(rewards.tokenize(a.strip().rstrip(".")))


@PATIENT
@given(st.fractions(max_denominator=10**6))
def test_a_fraction_is_read_in_every_spelling(x):
    p, q = x.numerator, x.denominator
    for text in (f"{p}/{q}", rf"\frac{{{p}}}{{{q}}}", rf"\left(\tfrac{{{-p}}}{{{-q}}}\right)", f"{p:,} / {q:,}"):
        assert rewards.is_equivalent(text, f"{p}/{q}")
        assert not rewards.is_equivalent(text, f"{p + 1}/{q}")


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
    assert rewards.is_equivalent(horner(a), expanded) == (stripped(a) == stripped(b))


LEAVES = st.integers(0, 20).map(lambda n: (str(n), float(n))) | st.sampled_from([(r"\pi", math.pi), ("e", math.e)])
SHAPES = {
    r"({})+({})": lambda a, b: a + b, r"\left({}\right)-\left({}\right)": lambda a, b: a - b, r"{{{}}}\cdot{{{}}}": lambda a, b: a * b,
    r"({})({})": lambda a, b: a * b, r"\sin({})\cos({})": lambda a, b: math.sin(a) * math.cos(b),
    r"\sin^2 {{{}}}+({})": lambda a, b: math.sin(a) ** 2 + b, r"2|({})|({})": lambda a, b: 2 * abs(a) * b,
    r"\left|{}\right|\cos\left[{}\right]": lambda a, b: abs(a) * math.cos(b), r"-\sqrt{{|({})|}}+{}": lambda a, b: b - math.sqrt(abs(a)),
    r"\frac{{{}}}{{1+({})^2}}": lambda a, b: a / (1 + b * b), r"\ln{{(1+|({})|)}}\arctan({})": lambda a, b: math.log(1 + abs(a)) * math.atan(b),
    r"\log_3\left(2+\left|{}\right|\right)+({})": lambda a, b: math.log(2 + abs(a), 3) + b,
    r"\tanh{{({})}}\sqrt[3]{{{}}}": lambda a, b: math.tanh(a) * math.copysign(abs(b) ** (1 / 3), b),
}


@PATIENT
@given(
    st.recursive(
        LEAVES,
        lambda inner: st.tuples(st.sampled_from([*SHAPES]), inner, inner).map(
            lambda t: (t[0].format(t[1][0], t[2][0]), SHAPES[t[0]](t[1][1], t[2][1]))
        ),
        max_leaves=6,
    )
)
def test_functions_have_the_values_that_python_gives(expression):
    text, expected = expression
    (kind, values), _, _ = rewards.read(text, True, rewards.Fraction(1, 100))
    assert kind == "number"
    assert [complex(x) for x in values] == [pytest.approx(complex(expected), rel=1e-9, abs=1e-9)] * rewards.POINTS


def test_check_gold_accepts_what_can_be_compared():
    for gold in ("42", r"\text{east}", r"(-\infty, 0]", "10:30", "no real solution", r"1 \pm \sqrt{19}", r"\$36"):
        rewards.check_gold(gold)


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
        rewards.check_gold(gold)


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


# A whole evaluation ---------------------------------------------------------------------------------------------------
# The stand-in for the model answers each problem by a script, so that every number of the report is known beforehand.
# It keeps generate()'s promises: callbacks in its order, and a trace that depends on its own indices alone.

SCRIPT = {  # sample index -> (answer, confidence of every token)
    "easy": lambda i: ("5", 3.0),
    "split": lambda i: ("7", 2.0) if i % 2 else ("8", 1.0),
    "hard": lambda i: ("9", 1.0 + i / 100),
}
LENGTH = 20  # tokens before the answer


def scripted_generate(model, prompts, *, samples, stop_ids, admit, on_token, on_trace, progress=False, **settings):
    tokenizer = data.Tokenizer.byte_level()
    traces = []
    for prompt_index, prompt in enumerate(prompts):
        name = next(name for name in SCRIPT if name in tokenizer.decode(prompt))
        for index in range(samples):
            state = admit(prompt_index, index) if admit else "go"
            assert state in ("go", "done")  # one trace after the other: there is never anything to wait for
            if state == "done":
                break
            answer, confidence = SCRIPT[name](index)
            tokens = [*tokenizer.encode("." * LENGTH + rf"\boxed{{{answer}}}"), stop_ids[0]]
            trace = SimpleNamespace(prompt_index=prompt_index, sample_index=index, tokens=[], confidences=[])
            trace.stop = "stop"
            for token in tokens:
                trace.tokens.append(token)
                trace.confidences.append(confidence)
                if on_token and on_token(trace):
                    trace.stop = "deepconf"
                    break
            if on_trace:
                on_trace(trace)
            traces.append(trace)
    return traces


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with problems and a checkpoint folder, to which the stand-in answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ev, "generate", scripted_generate)
    monkeypatch.setattr(ev, "load", lambda folder, device, dtype: (None, data.Tokenizer.byte_level()))
    golds = {"easy": "5", "split": "7", "hard": "1"}
    problems = [{"id": name, "domain": "math", "prompt": name, "answer": gold} for name, gold in golds.items()]
    data.write_jsonl("problems.jsonl", problems)
    return tmp_path


ARGV = ["--model", "runs/x/rl/model", "--problems", "problems.jsonl", "--out", "out", "--window", "4"]


def test_report_of_the_script(place, capsys):
    assert ev.main(ARGV) == 0
    report = json.loads(Path("out/report.json").read_text())
    rows = {r["method"]: r for r in report["rows"]}
    assert list(rows) == [
        "pass@1", "majority@32", "majority@equal-tokens", "deepconf-offline@32", "deepconf-low@32", "deepconf-high@32"
    ]
    assert {r["checkpoint"] for r in report["rows"]} == {"rl"}
    assert {r["problems"] for r in report["rows"]} == {3} and {r["unknown"] for r in report["rows"]} == {0}
    each = LENGTH + len(r"\boxed{5}") + 1
    assert rows["pass@1"]["accuracy"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert rows["pass@1"]["tokens"] == 3 * each
    assert rows["majority@32"]["tokens"] == 3 * 32 * each
    # Right in easy and split, where the right half is the more confident one; in hard all agree on a wrong answer.
    for method in ("deepconf-offline@32", "deepconf-low@32"):
        assert rows[method]["accuracy"] == pytest.approx(2 / 3)
        assert rows[method]["stderr"] == pytest.approx(math.sqrt(2 * (1 / 3) ** 2 + (2 / 3) ** 2) / math.sqrt(2 * 3))
    # easy and hard agree after the warm-up of 16. In split, LOW's votes come from the confident half and agree as well.
    assert rows["deepconf-low@32"]["tokens"] == 3 * 16 * each
    assert rows["majority@equal-tokens"]["tokens"] == rows["deepconf-low@32"]["tokens"]
    # HIGH takes both halves of split, so that they never agree: all 32 traces
    assert rows["deepconf-high@32"]["tokens"] == (16 + 32 + 16) * each
    # Right traces: 32 at 3.0, 16 at 2.0. Wrong: 16 at 1.0, 32 from 1.0 to 1.31.
    assert report["calibration"]["auroc"] == 1.0
    assert report["calibration"]["confidence_right"] == pytest.approx((32 * 3 + 16 * 2) / 48)
    traces = [json.loads(line) for line in Path("out/traces.jsonl").read_text().splitlines()]
    assert len(traces) == 96
    assert traces[0] == {
        "problem": "easy", "domain": "math", "gold": "5", "sample": 0, "seed": 0, "text": "." * LENGTH + r"\boxed{5}",
        "tokens": each, "answer": "5", "correct": True, "reason": "right", "stop": "stop", "confidences": [3.0] * each,
    }
    assert ev.table(report["rows"]) in Path("out/report.md").read_text()
    assert ev.table(report["rows"]) in capsys.readouterr().out


def unknown_at(monkeypatch, *calls):
    """The verdicts of these calls of verify, counted from 0, are unknown."""
    count = itertools.count()

    def verify(text, problem, **settings):
        i = next(count)
        if i in calls:
            return rewards.Verdict(None, f"unknown: {'no sandbox' if i % 2 else 'no memory'}")
        return rewards.verify(text, problem, **settings)

    monkeypatch.setattr(ev, "verify", verify)
    monkeypatch.setattr(ev, "ThreadPoolExecutor", lambda workers: OneThread())


class OneThread:
    """A pool whose jobs run in their order."""

    map = staticmethod(map)

    def shutdown(self, **_):
        pass


def test_few_unknown_verdicts_are_left_out_and_counted(place, capsys, monkeypatch):
    unknown_at(monkeypatch, 32)  # the first sample of split, a wrong 8: 1 of 96
    assert ev.main(ARGV) == 0
    out = capsys.readouterr().out
    rows = {r["method"]: r for r in json.loads(Path("out/report.json").read_text())["rows"]}
    assert rows["pass@1"]["accuracy"] == pytest.approx((1 + 16 / 31 + 0) / 3)
    assert rows["majority@32"]["accuracy"] == pytest.approx(1 / 3)  # 8 comes first, and is known to be wrong
    assert {(r["problems"], r["unknown"]) for r in rows.values()} == {(3, 0)}
    for text in (out, Path("out/report.md").read_text()):
        assert "1 of 96 verdicts unknown: 1 x no memory." in text
    traces = [json.loads(line) for line in Path("out/traces.jsonl").read_text().splitlines()]
    assert [t["correct"] for t in traces[31:34]] == [True, None, True]
    assert traces[32]["reason"] == "unknown: no memory" and traces[32]["answer"] == "8"
    assert deepconf.main(["out/traces.jsonl", "--window", "4"]) == 0  # and curation reads them as well
    argv = ["curate", "out/traces.jsonl", "--problems", "problems.jsonl", "--out", "kept.jsonl"]
    assert data.main(argv) == 0
    assert [problem.id for problem in data.read_problems("kept.jsonl")] == ["split"]


def test_a_vote_for_an_answer_of_unknown_verdict(place, capsys, monkeypatch):
    # The most confident trace of one problem is alone with its answer, and its verdict is unknown.
    monkeypatch.setitem(SCRIPT, "lonely", lambda i: ("3", 9.0) if i == 96 else (str(100 + i), 1.0))
    problems = [{"id": name, "domain": "math", "prompt": name, "answer": "5"} for name in ("easy", "lonely")]
    data.write_jsonl("problems.jsonl", problems)
    unknown_at(monkeypatch, 97 + 96)
    monkeypatch.setattr(ev, "WARM_UP", 97)  # without DeepConf online
    assert ev.main([*ARGV, "--samples", "97"]) == 0
    rows = {r["method"]: r for r in json.loads(Path("out/report.json").read_text())["rows"]}
    offline = rows["deepconf-offline@97"]
    assert (offline["accuracy"], offline["problems"], offline["unknown"]) == (1.0, 1, 1)
    assert (rows["majority@97"]["accuracy"], rows["majority@97"]["problems"]) == (0.5, 2)
    assert "| deepconf-offline@97   |      100.0 |      - |" in capsys.readouterr().out


def test_many_unknown_verdicts_end_the_evaluation_after_its_traces_are_written(place, capsys, monkeypatch):
    unknown_at(monkeypatch, 0, 1, 3)
    assert ev.main(ARGV) == 1
    why = "3 of 96 verdicts are unknown, more than 2%: 2 x no sandbox; 1 x no memory"
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: out/traces.jsonl holds every reply, but: {why}"
    traces = [trace for _, trace in data.read_records("out/traces.jsonl")]
    assert len(traces) == 96 and [trace["correct"] for trace in traces[:4]] == [None, None, True, None]
    assert not Path("out/report.json").exists()


def test_two_spellings_of_one_answer_are_one_vote_and_one_verdict(place, monkeypatch):
    """1/2 comes first but is less confident: DeepConf votes for 0.5, whose group plain voting calls 1/2."""
    monkeypatch.setitem(SCRIPT, "easy", lambda i: ("1/2", 1.0) if i < 8 else ("0.5", 3.0))
    data.write_jsonl("problems.jsonl", [{"id": "a", "domain": "math", "prompt": "easy", "answer": "0.5"}])
    assert ev.main(ARGV) == 0
    assert {r["accuracy"] for r in json.loads(Path("out/report.json").read_text())["rows"]} == {1.0}


def test_the_default_evaluates_both_checkpoints(place):
    data.write_jsonl("runs/tiny/data/heldout.jsonl", [{"id": "a", "domain": "math", "prompt": "easy", "answer": "5"}])
    assert ev.main([]) == 0
    rows = json.loads(Path("runs/tiny/eval/report.json").read_text())["rows"]
    assert [r["checkpoint"] for r in rows] == ["sft"] + ["rl"] * 6
    assert [r["method"] for r in rows[:3]] == ["pass@1", "pass@1", "majority@32"]
    assert Path("runs/tiny/eval/traces-sft.jsonl").is_file()
    assert rows[0]["stderr"] is None  # of one problem


def test_few_samples_leave_online_out(place):
    assert ev.main([*ARGV, "--samples", "4"]) == 0
    rows = json.loads(Path("out/report.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["pass@1", "majority@4", "deepconf-offline@4"]


def test_another_evaluation_is_not_overwritten(place, capsys):
    assert ev.main([*ARGV, "--samples", "4"]) == 0
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    capsys.readouterr()
    assert ev.main([*ARGV, "--samples", "5"]) == 1
    assert "samples" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    assert ev.main([*ARGV, "--samples", "4"]) == 0  # the same arguments
    assert ev.main([*ARGV, "--samples", "5", "--fresh"]) == 0
    Path("out/run.json").write_text("{")
    assert ev.main([*ARGV, "--samples", "5"]) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nonsense"], "--nonsense"),
        (["--sam", "4"], "--sam"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--limit", "-1"], "--limit must be at least 0"),
        (["--samples", "many"], "many"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--problems", "missing.jsonl"], "missing.jsonl"),
        (["--problems", "broken.jsonl"], "broken.jsonl, line 2"),
        (["--problems", "unreadable.jsonl"], r"unreadable.jsonl, line 1: field answer: the answer '\\frac{1}{' can"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(place, capsys, argv, message):
    Path("broken.jsonl").write_text('{"id": "p", "domain": "math", "prompt": "q", "answer": "1"}\n{"id": \n')
    Path("unreadable.jsonl").write_text('{"id": "p", "domain": "math", "prompt": "q", "answer": "\\\\frac{1}{"}\n')
    assert ev.main(ARGV + argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not Path("out").exists()


def test_missing_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.write_jsonl("problems.jsonl", [{"id": "a", "domain": "math", "prompt": "q", "answer": "5"}])
    assert ev.main(ARGV) == 1
    assert "runs/x/rl/model: no checkpoint here" in capsys.readouterr().err
    assert not Path("out").exists()


def test_chat_streams_and_keeps_history(place, monkeypatch, capsys):
    prompts, questions = [], iter(["easy?", "", "easy again é?"])

    def ask(_):
        try:
            return next(questions)
        except StopIteration:
            raise EOFError from None

    def generate(model, asked, **settings):
        prompts.append(data.Tokenizer.byte_level().decode(asked[0]))
        monkeypatch.setitem(SCRIPT, "easy", lambda i: ("é", 1.0))
        return scripted_generate(model, asked, **settings)

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(ev, "generate", generate)
    assert ev.main([*ARGV, "--chat"]) == 0
    reply = "." * LENGTH + r"\boxed{é}"
    assert capsys.readouterr().out == f"{reply}\n{reply}\n\n"
    assert len(prompts) == 2
    assert reply in prompts[1] and "easy?" in prompts[1]
    assert not Path("out").exists()


def test_chat_is_for_one_process(place, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ev.main([*ARGV, "--chat"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --chat is a talk with one process") and error.count("\n") == 1


@pytest.fixture
def babbler(tmp_path, monkeypatch):
    """A folder with three problems and a model that has learned nothing; the arguments that evaluate it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    FalconH1(PRESETS["tiny"]).save_pretrained("model")
    data.Tokenizer.byte_level().save("model")
    data.write_jsonl("problems.jsonl", [{"id": c, "domain": "math", "prompt": c, "answer": "1"} for c in "abc"])
    argv = ["--model", "model", "--problems", "problems.jsonl", "--out", "out", "--device", "cpu"]
    return [*argv, "--samples", "20", "--max-new-tokens", "6", "--window", "2"]


def test_a_tokenizer_larger_than_the_vocabulary(babbler, capsys):
    FalconH1(replace(PRESETS["tiny"], vocab_size=271)).save_pretrained("model")
    assert ev.main(babbler) == 1
    assert capsys.readouterr().err == "error: model: the tokenizer has 272 tokens, the model room for 271 only\n"
    assert not Path("out").exists()


# What torchrun starts below: an evaluation whose answers depend on the text, so that the babbler's are not all alike, and
# where rank 1 may fail in the function that FAIL names.
RANKS = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import eval as ev
import rewards

def fail(*args, **settings):
    time.sleep(0.5)  # the other rank waits for this one by now
    raise ValueError("this rank fails")

ev.extract_answer = rewards.extract_answer = lambda text: str(len(text) % 3)
if "UNKNOWN" in os.environ:
    ev.verify = lambda text, problem, **settings: rewards.Verdict(None, "unknown: no sandbox")
if "FAIL" in os.environ and os.environ["RANK"] == "1":
    setattr(ev, os.environ["FAIL"], fail)
sys.exit(ev.main())
"""


def test_two_ranks_evaluate_like_one(babbler, monkeypatch):
    for module in (ev, rewards):
        monkeypatch.setattr(module, "extract_answer", lambda text: str(len(text) % 3))
    assert ev.main(babbler) == 0
    Path("ranks.py").write_text(RANKS)
    status, out, err = run(Path("ranks.py").resolve(), *babbler, "--out", "two", ranks=2)
    assert status == 0, err
    assert out.count("seed=0") == out.count("majority@20") == 1
    for file in ("traces", "traces-low", "traces-high"):
        one, two = ([trace for _, trace in data.read_records(f"{folder}/{file}.jsonl")] for folder in ("out", "two"))
        for trace in two:
            trace["confidences"] = pytest.approx(trace["confidences"], abs=2e-4)  # batches of another size round otherwise
        assert one == two
    one, two = (json.loads(Path(folder, "report.json").read_text()) for folder in ("out", "two"))
    for row in one["rows"] + two["rows"]:
        del row["seconds"]
    assert len({row["accuracy"] for row in one["rows"]}) > 1
    assert one["rows"] == two["rows"]
    assert one["calibration"] == pytest.approx(two["calibration"], abs=2e-4)


@pytest.mark.parametrize(("where", "flags"), [("load", ["--fresh"]), ("generate", [])])
def test_an_error_on_one_rank_ends_all(babbler, where, flags):
    assert ev.main(babbler) == 0
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    Path("ranks.py").write_text(RANKS)
    status, _, err = run(Path("ranks.py").resolve(), *babbler, *flags, ranks=2, FAIL=where)
    assert status == 1
    assert err.count("error: this rank fails\n") == 1
    assert "[rank" not in err  # nowhere a traceback
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


def test_unknown_verdicts_end_two_ranks_after_the_traces_are_written(babbler):
    Path("ranks.py").write_text(RANKS)
    status, _, err = run(Path("ranks.py").resolve(), *babbler, ranks=2, UNKNOWN="1")
    assert status == 1
    why = "60 of 60 verdicts are unknown, more than 2%: 60 x no sandbox"
    assert err.count(f"error: out/traces.jsonl holds every reply, but: {why}\n") == 1
    assert len(Path("out/traces.jsonl").read_text().splitlines()) == 60


def test_a_real_model_from_end_to_end(babbler, monkeypatch):
    # It never answers, and traces without an answer set no threshold: DeepConf is told that it does.
    monkeypatch.setattr(ev, "extract_answer", lambda text: str(len(text) % 3))
    assert ev.main(babbler) == 0
    rows = json.loads(Path("out/report.json").read_text())["rows"]
    assert [r["accuracy"] for r in rows] == [0] * 6  # it babbles
    whole = {(t["problem"], t["sample"]): t for _, t in data.read_records("out/traces.jsonl")}
    assert len(whole) == 60
    assert {t["tokens"] == len(t["confidences"]) for t in whole.values()} == {True}
    low = [t for _, t in data.read_records("out/traces-low.jsonl")]
    assert "deepconf" in {t["stop"] for t in low}
    assert sum(t["tokens"] for t in low) == rows[4]["tokens"] < rows[1]["tokens"]
    for trace in low:  # stopped live, it is the beginning of what it would have been
        whole_confidences = whole[trace["problem"], trace["sample"]]["confidences"]
        assert trace["confidences"] == pytest.approx(whole_confidences[: trace["tokens"]], abs=1e-3)


# Methods --------------------------------------------------------------------------------------------------------------


PROBLEM = data.Problem("p", "math", "p", "1")


def ballot(*answers, gold="1", confidences=(1.0,), unknown=()):
    """The answers' ballot; unknown: indices of those of unknown verdict."""
    verdicts = [None if i in unknown else rewards.is_equivalent(a, gold) for i, a in enumerate(answers)]
    return ev.Ballot(PROBLEM, [
        {"problem": "p", "sample": i, "answer": answer, "correct": correct, "confidences": [*confidences]}
        for i, (answer, correct) in enumerate(zip(answers, verdicts))
    ])


def test_majority_score_by_hand():
    # One by one half are right; of the pairs (1, 1.0) and (2, 2) one.
    assert ev.majority_score(ballot("1", "1.0", "2", "2"), 1) == 0.5
    assert ev.majority_score(ballot("1", "1.0", "2", "2"), 2) == 0.5
    assert ev.majority_score(ballot("2", r"\frac12", "0.5", "1", gold="1/2"), 4) == 1  # spelled twice, counted as one
    assert ev.majority_score(ballot("1", "2", "2", "1"), 3) == 0  # one run of three; the last trace is left over
    assert ev.majority_score(ballot(None, None, "1"), 3) == 1  # no answer is no vote
    assert ev.majority_score(ballot(None, None), 2) == 0


def test_majority_score_with_unknown_verdicts():
    assert ev.majority_score(ballot("1", "1.0", "2", unknown=[0]), 3) == 1  # 1 is 1.0, which is known
    assert ev.majority_score(ballot("3", "3", "2", unknown=[0, 1]), 3) is None
    assert ev.majority_score(ballot("3", "1", "2", unknown=[0]), 1) == 0.5  # of two that are known


def test_programs_are_the_same_only_word_for_word():
    code = data.Problem("c", "code", "p", "", {"tests": [{"input": "", "output": "1"}]})
    rows = [
        {"problem": "c", "sample": i, "answer": answer, "correct": i > 0, "confidences": [1.0]}
        for i, answer in enumerate(["1", "1.0", "1.0"])
    ]
    assert ev.majority_score(ev.Ballot(code, rows), 3) == 1  # 1.0 has two votes and is right


def test_row_leaves_out_and_counts_what_is_unknown():
    row = ev.row("rl", "m", [1, None, 0, None], 10, 1.0)
    assert (row["accuracy"], row["stderr"], row["problems"], row["unknown"]) == (0.5, 0.5, 2, 2)
    row = ev.row("rl", "m", [None], 10, 1.0)
    assert (row["accuracy"], row["stderr"], row["problems"], row["unknown"]) == (None, None, 0, 1)
    assert "|          - |      - |" in ev.table([row])


def test_pass_row_is_the_mean_over_known_samples():
    group = [{"correct": correct, "tokens": 5} for correct in (True, False, None, True)]
    row = ev.pass_row("rl", [group, [{"correct": None, "tokens": 5}] * 4], 8.0)
    assert row["accuracy"] == pytest.approx(2 / 3) and (row["problems"], row["unknown"]) == (1, 1)
    assert (row["tokens"], row["seconds"]) == (10, 2.0)  # unknown samples cost as much


def test_calibration_by_hand():
    # Windows of two: right traces' lowest groups 1.5 and 3.5, the wrong one's 2.5. One of two pairs is in order.
    right, other, wrong = ballot("1", confidences=(2, 1, 3)), ballot("1", confidences=(3, 4)), ballot("2", confidences=(2, 3))
    unknown = ballot("1", confidences=(9, 9), unknown=[0])
    expected = {"auroc": 0.5, "confidence_right": 2.5, "confidence_wrong": 2.5}
    assert ev.calibration([right, other, wrong, unknown], 2) == expected
    assert ev.calibration([right], 2) == {"auroc": None, "confidence_right": 1.5, "confidence_wrong": None}
    assert "cannot tell" in ev.explain("rl", ev.calibration([right], 2), [])
    assert ev.calibration([unknown], 2) == {"auroc": None, "confidence_right": None, "confidence_wrong": None}


LOG = [{"step": 1, "loss": 1.0, "reward": 0.1}, {"step": 2, "loss": 0.9, "reward": 0.2}]


def test_without_matplotlib_there_are_no_plots_and_a_message(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    assert ev.main([*ARGV, "--samples", "4"]) == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    assert not list(Path("out").glob("*.png"))


def test_plots(place):
    pytest.importorskip("matplotlib")
    assert ev.main(ARGV) == 0
    assert {path.name for path in Path("out").glob("*.png")} == {"accuracy.png"}
    data.write_jsonl("runs/x/rl/log.jsonl", LOG)
    assert ev.main(ARGV) == 0
    assert {path.name for path in Path("out").glob("*.png")} == {"accuracy.png", "training.png"}
    assert Path("out/training.png").read_bytes().startswith(b"\x89PNG")


# Code ---------------------------------------------------------------------------------------------------


@needs_sandbox
def test_an_evaluation_with_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ev, "generate", scripted_generate)
    monkeypatch.setattr(ev, "load", lambda folder, device, dtype: (None, data.Tokenizer.byte_level()))
    codes = itertools.cycle(["print(input())", "print(7)", "print(input())"])  # by sample: right, wrong, right, right, ...
    fence = "\n```python\n{}\n```\n"
    monkeypatch.setitem(SCRIPT, "program", lambda i: (fence.format(["print(input())", "print(7)"][i % 3 == 1]), 1.0))
    problems = [
        {"id": "a", "domain": "math", "prompt": "easy", "answer": "5"},
        {"id": "b", "domain": "code", "prompt": "program", "tests": [{"input": "1", "output": "1"}]},
    ]
    data.write_jsonl("problems.jsonl", problems)
    assert ev.main([*ARGV, "--samples", "18"]) == 0, capsys.readouterr().err
    assert "sandbox: user namespace: on, " in capsys.readouterr().out
    rows = {r["method"]: r["accuracy"] for r in json.loads(Path("out/report.json").read_text())["rows"]}
    assert rows["pass@1"] == pytest.approx((1 + 2 / 3) / 2) and rows["majority@18"] == rows["deepconf-low@18"] == 1
    traces = [json.loads(line) for line in Path("out/traces.jsonl").read_text().splitlines()]
    for trace, code in zip(traces[18:], codes):
        assert (trace["answer"], trace["gold"], trace["correct"]) == (code + "\n", "", code != "print(7)")
        assert trace["reason"] == ("passed" if trace["correct"] else "wrong output in test 1")
    assert {trace["reason"] for trace in traces if trace["gold"]} <= {"right", "wrong", "no answer"}


@pytest.mark.parametrize(
    ("tests", "message"), [([{"input": 1}], "problems.jsonl: problem b: field tests: test 1 has neither"), ("x", "must define check")]
)
def test_unknown_tests_are_an_error_before_sampling(tmp_path, monkeypatch, capsys, tests, message):
    monkeypatch.chdir(tmp_path)
    data.write_jsonl("problems.jsonl", [{"id": "b", "domain": "code", "prompt": "p", "tests": tests}])
    assert ev.main(ARGV) == 1 and message in capsys.readouterr().err


@needs_sandbox
def test_check_of_solutions(tmp_path, capsys):
    check = "def check(candidate):\n    assert candidate(2) == 4"
    rows = [{"task_id": str(i), "prompt": "def f(x):\n", "test": check, "entry_point": "f", "canonical_solution": f"    return {body}\n"}
            for i, body in enumerate(["2 * x", "x * x", "x"])]
    data.write_jsonl(tmp_path / "code.jsonl", rows)
    assert ev.main(["--check", str(tmp_path / "code.jsonl")]) == 1
    out = capsys.readouterr().out
    assert "| code       |      3 |      2 |      1 |           0 |" in out and "2: wrong output in test 1" in out


def test_tests_are_sampled_as_the_flags_say(place, monkeypatch):
    given = []
    monkeypatch.setattr(ev, "check_code", lambda *_, **__: None)

    def verify(text, problem, **settings):
        given.append(settings)
        return rewards.Verdict(1.0, "passed")

    monkeypatch.setattr(ev, "verify", verify)
    rows = [{"id": "a", "domain": "code", "prompt": "easy", "tests": [{"input": "1", "output": "1"}] * 9}]
    data.write_jsonl("problems.jsonl", rows)
    assert ev.main([*ARGV, "--samples", "2", "--code-tests", "3", "--seed", "7"]) == 0
    assert given == [{"judge": None, "limit": 3, "seed": 7, "unsafe": False}] * 2
    assert ev.main([*ARGV, "--samples", "2", "--fresh"]) == 0 and given[-1]["limit"] == 0  # all tests


@needs_sandbox
def test_a_problem_is_refused_only_if_nothing_could_score_it(place, capsys):
    unreadable = {"id": "a", "domain": "math", "prompt": "easy", "answer": r"\frac{1}{"}
    data.write_jsonl("problems.jsonl", [unreadable | {"tests": [{"input": "1", "output": "1"}]}])
    assert ev.main([*ARGV, "--samples", "2"]) == 0
    data.write_jsonl("problems.jsonl", [unreadable])
    assert ev.main([*ARGV, "--samples", "3", "--fresh"]) == 1
    assert "error: problems.jsonl, line 1: field answer: " in capsys.readouterr().err
    assert ev.main(["--check", "problems.jsonl"]) == 1
    out = capsys.readouterr().out
    assert "problems.jsonl, line 1: a: " in out and "frac{1}{" in out
