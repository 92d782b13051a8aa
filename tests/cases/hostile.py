"""Texts that try to hang the parser of answers, to exhaust its memory, or to raise.

Every one of HOSTILE_ANSWERS and HOSTILE_REPLIES is wrong. Random texts consist of PIECES of answers and of
FRAGMENTS of replies.
"""

HOSTILE_ANSWERS = [
    "9" * 200_000, "(" * 200_000, r"\frac{" * 100, "(" * 900, "{" * 450 + "1" + "}" * 450, r"\sqrt" * 190,
    "-" * 900 + "1", "2^" * 400 + "2", "5" + "!" * 900, "(500!)!", "9^{9^{9^9}}", "2^{4000}*" * 80 + "1",
    "+".join(rf"\frac{{1}}{{3^{{{i}}}}}" for i in range(2000, 2070)), "1," * 450 + "1", "x" * 900,
    r"\pm" * 300 + "1", "(1" + r"\pm(1" * 24 + ")" * 25, "\ud800\udfff", "\x00", "٣", "²", "\\", "_", "^",
    "x_", "x^", r"\frac", r"\frac1", r"\sqrt[", r"\sqrt[0]{2}", r"0^{-1}", r"0^{i}", r"\log 0", r"\log_1 5",
    r"\infty-\infty", "(x^x)^{x^x}", "e^{e^{e^{e^e}}}", r"10^{400}\pi", r"\begin{pmatrix}", "x" + "^{x" * 40,
    r"\begin{pmatrix}\\\end{pmatrix}", r"\sqrt[500]{2^{3000}}", "1/" * 450 + "7", "5" + "%" * 900,
    "5" + "°" * 900, "1_" * 300, "x=1" + "=1" * 200, "5 cm^", "5 cm^{}", r"5 cm^\{\}", r"\text{" * 100,
    r"\left" * 150, r"\sin" * 200 + "x", r"\boxed{5}", "|5|", "1e400", "(,)", "[]", "()", r"\{,\}", ",", "=",
    "1=", "=1", r"\frac{1}{3499!}+" * 60 + "1", "3499!*" * 150 + "1", "2^{39000}" * 100,
    "x^{3000}+" * 100 + "1", r"\binom{3499}{1700}" * 50, "(x+y+z)^{400}" * 60, "x!" * 400, '"' * 900,
    "1 " * 490, "cm " * 300, "±" * 900, r"\text{" * 150 + "x" + "}" * 150, "{" * 300 + "x" + "}" * 300,
    "1\\frac" * 150, "|x" * 400, "3.1e400", r"\log_" * 190 + "2", "twenty-" * 140, "5 " + "m/" * 400,
    "x+" * 450 + "=", "a b" * 300, "x<" * 300, "x∪" * 300,
    "\\\\" * 60 + "7_", "(" + "\\\\" * 60 + "x", "5 \\\\\\begin{pmatrix}" * 45, "x<" + "\n" * 900 + "?",
    r"\lfloor 10^{2^{19.5}} \rfloor", r"5 \begin{pmatrix}2\\3" * 20 + r"\end{pmatrix}" * 20,
    '\\text{a}' * 120 + "=1", "(x,x" * 200, "x'" * 400, "x_{" * 300, "1<x" * 300, "f(" * 300,
]

PIECES = r"""\frac \sqrt \pm \cup \{ \} \pi \infty \text{ \left \right \% \\ \begin{pmatrix}
    \end{pmatrix} 1,000 2^{9^9} cm \sin \log \log_ \ln^ \left| \right| \lfloor \rfloor \binom
    \overline{3} \approx \$ ^\circ !! (B) three \exp i \ln(3i) \lfloor i \rfloor i! |i| e^i \arctan m/s
    \over \choose 0.333... f(x)= \angle \in \mathbb{R} \text{and} square per \\[4pt] ** _{ 1e6 x<""".split()
PIECES += "0123456789xyieE+-*/^_(){}[]|,.;:=<>!%&$ ~'²∞\ud800"

N = 50_000
HOSTILE_REPLIES = [
    "", " " * N, "\n" * N, "\x00" * N, "\ud800" * N, "\ufdfa" * N, "a" * N, "9" * N, "да" * (N // 2), "`" * N,
    "```\n" * (N // 4), "~~~\n```\n" * (N // 8), "```python\n" * (N // 10), "`да" * (N // 3), "$" * N,
    "$$$" * (N // 3), r"\(" * (N // 2), r"\(\)" * (N // 4), "\\" * N, "{" * N, "}" * N, "{}" * (N // 2),
    r"\boxed{" * (N // 7), r"\boxed{}" * (N // 8), r"\boxed" + " " * N, r"\{" * (N // 2),
    r"\boxed{" * (N // 8) + "1" + "}" * (N // 8), "#" * N, "#### 1\n" * (N // 7), "<think>" * (N // 7),
    "</think>" * (N // 8), "<think></think>" * (N // 15), "<|" + "a" * N, "<|a" * (N // 3),
    "VERDICT: RIGHT\n" * (N // 15), "VERDICT" + " " * N, r"\boxed{" + "(A" * 400 + "}",
    r"\boxed{" + "A. " * 300 + "}", r"\boxed{" + r"\text{" * 160 + "}" * 161, r"\boxed{" + "*" * 999 + "}",
    r"\boxed{" + "the " * 240 + "answer}", r"\boxed{" + "answer " * 140 + "}", r"\boxed{A" + " " * 990 + "}",
    r"\boxed{" + "or A " * 190 + "}", r"\boxed{A" + "\\" * 990 + "}", r"\boxed{" + "x" * N + "}",
]

FRAGMENTS = [
    *"ABCb12 \n\r\t.,:;-()[]{}$*`#\\\x00\u2028\ud800да是", r"\boxed{", r"\text{", r"\frac{1}{2}", "####",
    "<think>", "</think>", "```python\n", "```", "~~~", "answer ", "option ", "Vitamin C",
    "VERDICT: RIGHT", "<|im_end|>", r"\(", r"\]",
]
