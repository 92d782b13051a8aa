"""Tests of sandbox.py: what passes, what does not, and programs that try everything else."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import sandbox
from sandbox import OUTPUT, check_tests, run_code, same_output, same_value

MISSING = [f"{name}: {why}" for name, why in sandbox.sandbox_walls().items() if why != "on"]
needs_sandbox = pytest.mark.skipif(bool(MISSING), reason=f"no isolation here: {MISSING}")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")

# Reading tests ----------------------------------------------------------------------------------------------

CHECK = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(5) == 6\n"


def test_check_tests_reads_every_shape():
    program = {"kind": "stdin", "tests": [(1, "1\n2", "3"), (2, "", "4")]}
    assert check_tests([{"input": ["1", "2"], "output": "3"}, {"input": "", "output": "4"}], "x") == program
    assert check_tests({"inputs": ["1\n2", ""], "outputs": ["3", "4"]}, "x") == program
    calls = {"kind": "calls", "tests": [(1, "f", [1], [2])]}
    assert check_tests([{"fn_name": "f", "args": [1], "expected": 2}], "x") == calls
    assert check_tests([{"call": "f", "args": [1], "expected": 2}], "x") == calls
    assert check_tests({"inputs": [[1]], "outputs": [2], "fn_name": "f"}, "x") == calls
    wrapped = check_tests({"inputs": [[1]], "outputs": [[2]], "fn_name": "f"}, "x")
    assert wrapped["tests"] == [(1, "f", [1], [[2], 2])]
    mixed = check_tests({"inputs": [[1], [2]], "outputs": [[2], [3, 4]], "fn_name": "f"}, "x")
    assert mixed["tests"] == [(1, "f", [1], [[2]]), (2, "f", [2], [[3, 4]])]
    assert check_tests(CHECK, "x", "f")["kind"] == "check"


@pytest.mark.parametrize(
    ("tests", "entry_point", "error"),
    [
        ([], "", "no tests"),
        ({}, "", "no tests"),
        ("", "f", "no tests"),
        (None, "", "no tests"),
        (7, "", "unknown kind of tests: '7'"),
        ([1], "", "unknown kind"),
        ("assert f(1) == 2", "f", "must define check"),
        (CHECK, "", "entry_point"),
        (CHECK, "a.b", "entry_point"),
        (CHECK, None, "entry_point"),
        ({"inputs": ["1"]}, "", "inputs and outputs"),
        ({"inputs": ["1"], "outputs": []}, "", "same length"),
        ({"inputs": [], "outputs": []}, "", "same length"),
        ({"inputs": "1", "outputs": "1"}, "", "inputs and outputs"),
        ({"inputs": [1], "outputs": ["1"]}, "", "must be text, not '1'"),
        ([{"input": "1", "output": 1}], "", "must be text, not '1'"),
        ([{"input": "1", "output": "1"}, {"input": "1"}], "", "test 1 has neither"),
        ([{"fn_name": "f", "args": [1], "expected": 1}, {"fn_name": "f", "args": 1, "expected": 1}], "", "test 2"),
        ([{"fn_name": "f", "args": [1]}], "", "test 1"),
        ([{"fn_name": "f g", "args": [1], "expected": 1}], "", "test 1"),
        ([{"fn_name": ["f"], "args": [1], "expected": 1}], "", "test 1"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}, "", "test 1"),
        ({"inputs": [[1]], "outputs": ["1"], "fn_name": 5}, "", "test 1"),
        ([{"fn_name": "f", "args": [print], "expected": 1}], "", "type builtin_function_or_method"),
        ([{"fn_name": "f", "args": [1], "expected": 1j}], "", "type complex"),
        ([{"fn_name": "f", "args": [10**5000], "expected": 1}], "", "test 1: .*digits"),
        ([{"input": 10**5000, "output": "1"}], "", "digits"),
        ([10**5000], "", "digits"),
        ([{"fn_name": "f", "args": eval("[" * 60 + "]" * 60), "expected": 1}], "", "test 1: .*deep"),
    ],
)
def test_check_tests_names_what_is_wrong(tests, entry_point, error):
    with pytest.raises(ValueError, match=f"^problem 7: .*{error}"):
        check_tests(tests, "problem 7", entry_point)
    with pytest.raises(ValueError, match=error):
        run_code("print(1)", tests, entry_point=entry_point)


# What passes ------------------------------------------------------------------------------------------------

ADD = [{"input": "1 2\n", "output": "3\n"}, {"input": "10 20", "output": "30"}]
READ = "a, b = map(int, input().split())\n"
TOTAL = "print(sum(map(int, input().split())))"


@needs_sandbox
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (READ + "print(a + b)", "passed"),
        ("import sys\nsys.stdout.write(f'{sum(map(int, sys.stdin.read().split()))}   \\n\\n')", "passed"),
        ("import os\nos.write(1, b'%d' % sum(map(int, os.read(0, os.fstat(0).st_size).split())))", "passed"),
        ("print(sum(map(int, open(0).read().split())))\nraise SystemExit(1)", "passed"),
        ("print(sum(map(int, open('/dev/stdin').read().split())))", "passed"),
        (f"if __name__ == '__main__': {TOTAL}", "passed"),
        (f"import threading\nthreading.Thread(target=lambda: {TOTAL}).start()", "passed"),
        (f"import atexit\natexit.register(lambda: {TOTAL})", "passed"),
        (f"class A:\n  def __del__(self): {TOTAL}\nkept = A()", "passed"),
        ("import dataclasses, pickle\n@dataclasses.dataclass\nclass A:\n  x: int\n"
         "print(pickle.loads(pickle.dumps(A(sum(map(int, input().split()))))).x)", "passed"),
        ("import re, heapq, bisect, decimal, datetime, functools, itertools, random, string, tempfile\n"
         "with tempfile.TemporaryFile('w+') as f:\n  print(input(), file=f); f.seek(0)\n"
         "  print(sum(map(int, f.read().split())))", "passed"),
        ("import sys\nsys.setrecursionlimit(10**6)\nf = lambda n: n and 1 + f(n - 1)\n"
         "print(f(50_000) - 50_000 + sum(map(int, input().split())))", "passed"),
        ("import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\n"
         f"t = threading.Thread(target=lambda: {TOTAL})\nt.start(); t.join()", "passed"),
        ("from concurrent.futures import ThreadPoolExecutor as T\nimport time\n"
         "list(T(40).map(time.sleep, [0.1] * 40))\nprint(sum(T(1).map(int, input().split())))", "passed"),
        (f"{TOTAL}; exit()", "passed"),
        (f"{TOTAL}; quit(3)", "passed"),
        (f"{TOTAL}\nimport os\nassert os.path.basename(__file__) == 'solution.py'", "passed"),
        ("import sys\nprint(sum(map(int, input().split())), file=sys.__stdout__)", "passed"),
        ("with open(1, 'w') as out: print(sum(map(int, input().split())), file=out)", "passed"),
        (f"import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\n{TOTAL}", "passed"),
        (f"import io, sys\nreal, sys.stdout = sys.stdout, io.StringIO()\n{TOTAL}\n"
         "real.write(sys.stdout.getvalue())", "passed"),
        (f"import sys\nclass W:\n  def __init__(s, f): s.f = f\n  def write(s, x): s.f.write(x)\n"
         f"  def flush(s): s.f.flush()\nsys.stdout = W(sys.stdout)\n{TOTAL}", "passed"),
        (f"import sys\nsys.stdin = open(0, closefd=False)\nsys.stdout.reconfigure(line_buffering=True)\n{TOTAL}",
         "passed"),
        (f"import os\n{TOTAL}\nos.mkdir('work'); open('work/x', 'w').write('y')", "passed"),
        (f"import sys\n{TOTAL}\nsys.stdout.flush()\nimport os; os._exit(0)", "passed"),  # as under Python
        (f"import sys\nassert sys.argv == ['solution.py'] and sys.modules['__main__'].READ is None\n{TOTAL}",
         "raised AttributeError in test 1"),
        ("print(List)", "raised NameError in test 1"),
        ("print(3)", "wrong output in test 2"),
        ("print('3', 30)", "wrong output in test 1"),
        ("print(sum(map(int, input().split())), file=__import__('sys').stderr)", "wrong output in test 1"),
        ("", "wrong output in test 1"),
        (f"{TOTAL}\n1 / 0", "raised ZeroDivisionError in test 1"),
        (f"{TOTAL}\nimport sys; sys.stdout.flush(); raise type('E' * 10**6, (Exception,), {{}})",
         f"raised {'E' * 80} in test 1"),
        ("1 +", "raised SyntaxError in test 1"),
        ("input(); input()", "raised EOFError in test 1"),
        ("x = '\0'", f"raised {'SyntaxError' if sys.version_info >= (3, 11, 4) else 'ValueError'} in test 1"),
        ("x = '\udcff'", "raised UnicodeEncodeError in test 1"),
        ("x = [0] * 10**10", "memory limit"),
        ("while True: print('x' * 1000)", "output limit"),
        ("import os\nprint(sum(map(int, input().split())))\nos._exit(0)", "wrong output in test 1"),
        ("import os\nos.abort()", "died"),
    ],
)
def test_programs(source, reason):
    verdict = run_code(source, ADD, seconds=5)
    assert (verdict.reason, verdict.score) == (reason, float(reason == "passed"))


@needs_sandbox
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f(x): return x + 1", "passed"),
        ("class Solution:\n  def f(self, x): return x + 1", "passed"),
        ("def f(x):\n  print('seen', x)\n  return x + 1\nif __name__ == '__main__': 1 / 0", "passed"),
        ("import os\ndef f(x):\n  os.mkdir('work')\n  return x + 1", "passed"),  # each test has its own folder
        ("def f(x): return 2", "wrong output in test 2"),
        ("def f(x): return x + 1.0", "wrong output in test 1"),
        ("def f(x): return str(x + 1)", "wrong output in test 1"),
        ("def f(x): return [2, 6]", "wrong output in test 1"),
        ("def f(x): return 1 / 0", "raised ZeroDivisionError in test 1"),
        ("def f(x): exit()", "raised SystemExit in test 1"),
        ("def f(x): raise SystemExit", "raised SystemExit in test 1"),
        ("def f(x): raise type('a\\n\\x1b[2J', (Exception,), {})", "raised something in test 1"),
        ("def f(x, y): return 2", "raised TypeError in test 1"),
        ("def g(x): return 2", "raised NameError in test 1"),
        ("def f(x): return lambda: 1", "raised TypeError in test 1"),
        ("def f(x): return 1j", "raised TypeError in test 1"),
        ("def f(x): return [[]] and f(x)", "raised RecursionError in test 1"),
        ("raise SystemExit", "raised SystemExit in test 1"),
        ("def f(x):\n  a = []\n  for _ in range(60): a = [a]\n  return a", "raised ValueError in test 1"),
        ("def f(x):\n  a = []\n  a.append(a)\n  return a", "raised ValueError in test 1"),
        ("def f(x): return 10**5000", "raised ValueError in test 1"),
        ("def f(x): return [0] * 10**7", "output limit"),
        ("def f(x): import os; os._exit(0)", "died"),
    ],
)
def test_functions(source, reason):
    tests = [{"fn_name": "f", "args": [x], "expected": x + 1} for x in (1, 5)]
    assert run_code(source, tests, seconds=5).reason == reason


@needs_sandbox
@pytest.mark.parametrize(
    ("source", "tests"),
    [  # the reply's code, its tests; what was judged wrong at some time
        (READ + "print(a + b); exit()", ADD),
        ("print(1 / 3)", [{"input": "", "output": "0.333333333"}]),
        ("import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\n" + READ + "print(a + b)", ADD),
        ("import os\nos.mkdir('work')\n" + READ + "print(a + b)", ADD),
        ("s = 'a\u2028b'\n" + READ + "print(a + b)", ADD),
        ("class Solution:\n    def total(self, xs: List[int]) -> int:\n        d = defaultdict(int)\n"
         "        for x in xs: d[0] += x\n        return d[0]\n",
         [{"fn_name": "total", "args": [[1, 2, 3]], "expected": 6}]),
    ],
)
def test_cases_that_were_judged_wrong(source, tests):
    assert run_code(source, tests).reason == "passed"
    assert run_code("print(0.51)", [{"input": "", "output": "0.50"}]).reason == "wrong output in test 1"


@needs_sandbox
def test_the_usual_names_are_there_and_override_nothing():
    names = "List Optional Counter defaultdict deque heappush heapq math itertools accumulate functools lru_cache cache"
    names += " reduce bisect bisect_left string re inf collections random gcd sqrt"
    used = "class Solution:\n  def f(self, x: List[int]) -> Optional[int]: return [" + ",".join(names.split()) + "] and x"
    assert run_code(used, [{"fn_name": "f", "args": [1], "expected": 1}]).reason == "passed"

    def f(source, prompt="", name="f", args=(2,), expected=8):
        return run_code(source, [{"fn_name": name, "args": list(args), "expected": expected}], prompt=prompt).reason

    assert f("def f(x): return pow(x, 3, 5) + 5") == "passed"  # the builtin and not math's, which takes two
    assert f("def f(x): return gcd", prompt="gcd = 8") == "passed"
    assert f("gcd = 8\ndef f(x): return gcd") == "passed"
    assert f("class Solution:\n  def gcd(self, x): return 8", name="gcd") == "passed"
    assert f("class Solution:\n  def print(self, x): return 8", name="print") == "passed"
    assert f("", name="gcd", args=(8, 16)) == "raised NameError in test 1"
    assert f("def f(x): return 8", prompt="Write f, please!") == "passed"
    assert f("from __future__ import annotations\ndef f(x: Nothing): return 8") == "passed"


PLAIN = [None, True, 0, -(10**30), 0.1, -0.0, 1e300, float("inf"), "\udcff\0é\n", [[], [1, [2]]], (1, (2,)),
         {1, 2}, set(), {"a": [1], (1, 2): {3: 4}, None: ()}, {"set": [1]}, {"dict": []}, {}]


@needs_sandbox
def test_every_plain_type_crosses_the_pipe():
    tests = [{"fn_name": "f", "args": [value], "expected": value} for value in PLAIN]
    assert run_code("def f(x): return x", tests).reason == "passed"
    kinds = [type(value).__name__ for value in PLAIN]
    named = [{"fn_name": "f", "args": [value], "expected": kind} for value, kind in zip(PLAIN, kinds)]
    assert run_code("def f(x): return type(x).__name__", named).reason == "passed"
    for kind, expected in [("Counter", {"a": 2, "b": 1}), ("OrderedDict.fromkeys", {"a": None, "b": None})]:
        tests = [{"fn_name": "f", "args": ["aab"], "expected": expected}]
        assert run_code(f"import collections\nf = collections.{kind}", tests).reason == "passed"


@needs_sandbox
def test_large_tests():
    long = "x" * (20 << 20)
    assert run_code("print(len(input()))", [{"input": long, "output": str(len(long))}]).reason == "passed"
    assert run_code("f = len", [{"fn_name": "f", "args": [long], "expected": len(long)}]).reason == "passed"
    assert run_code("def f(x):\n  1 / 0", [{"fn_name": "f", "args": [long], "expected": 1}] * 2).score == 0
    for body in ("os._exit(0)", "os.closerange(0, 9)", "os.close(4)"):  # it is gone, or no longer listens
        start = time.perf_counter()
        tests = [{"fn_name": "f", "args": ["x"], "expected": 1}, {"fn_name": "f", "args": [long], "expected": 1}]
        assert run_code(f"import os\ndef f(x):\n  {body}\n  return 1", tests, seconds=0.3).score == 0
        assert time.perf_counter() - start < 4 * 0.3 + 0.5 + 0.5  # half a second to prepare the tests
    numbers = list(range(10**6))
    assert run_code("f = sorted", [{"fn_name": "f", "args": [numbers], "expected": numbers}]).reason == "passed"


@needs_sandbox
def test_output_up_to_the_limit():
    expected = "x" * (OUTPUT - 1)
    for source, reason in [
        (f"print('x' * {OUTPUT - 1})", "passed"),  # and the end of the line is the last byte that it may print
        (f"print('x' * {OUTPUT - 1} + ' ')", "output limit"),
        (f"import os\nos.write(1, b'x' * {OUTPUT + 5})", "output limit"),
        (f"print(chr(233) * {OUTPUT // 2 - 1})", "wrong output in test 1"),
        (f"print('a' + chr(233) * {OUTPUT // 2})", "output limit"),
        ("import sys\nsys.stdout.buffer.write(bytes(range(256)) * 99)", "wrong output in test 1"),
    ]:
        assert run_code(source, [{"input": "", "output": expected}]).reason == reason, source
    odd = "é\udcff\udc80\n"
    assert run_code("import sys\nsys.stdout.buffer.write('é'.encode() + b'\\xff\\x80')",
                    [{"input": "", "output": odd}]).reason == "passed"


# How results are compared -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("3", "3\n"), ("3 \t\r\n\n \n", "3"), ("", ""), ("\n", ""), ("a b\nc", "a b  \nc\n"), ("\n1", "\n1"),
        ("0.3333333333333333", "0.333333333"), ("3", "3.0"), ("1e3", "1000.0"), ("1000000.4", "1000000.0"),
        ("0.0000009", "0.0"), ("-0.0", "0.0"), ("x = 0.50000001", "x = 0.5"), ("1 2.00 a", "1 2.0 a"),
        ("nan", "nan"), ("1e999", "1e999"), (".5", "0.5"), ("+1.0", "1.0"), ("a\u2028b", "a\u2028b"),
    ],
)
def test_same_output(printed, expected):
    assert same_output(printed, expected)


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("3", "4"), ("", "3"), ("3", ""), ("3\n3", "3"), (" 3", "3"), ("\n3", "3"), ("a  b", "a b"), ("a\tb", "a b"),
        ("a\n\nb", "a\nb"), ("0.51", "0.50"), ("3.0", "3"), ("3.0000001", "3"), ("1e0", "1"), ("03", "3"),
        ("1000001.1", "1000000.0"), ("0.000002", "0.0"), ("0.333", "0.333333333"), ("nan", "1.0"), ("1.0", "nan"),
        ("inf", "1e308"), ("1e308", "inf"), ("5", "1e999"), ("1e999", "5.0"), ("1e999", "2e999"), ("-inf", "inf"),
        ("1e9999999", "1.0"), ("1.0", "1e99999"), ("1_0.0", "10.0"), ("\u0661.0", "1.0"), ("a\u2028b", "a\nb"),
        ("a\x0cb", "a\nb"), ("a\x85", "a\n"), ("a\u2028", "a"), ("a\xa0", "a"), ("0x1.8p0", "1.5"), ("1.5,", "1.5"),
        ("True", "1.0"), ("A", "a"), ("1.0 2", "1.0"),
    ],
)
def test_other_output(printed, expected):
    assert not same_output(printed, expected)


def test_outputs_are_compared_in_linear_time():
    start = time.perf_counter()
    assert same_output("1.0 " * 200_000, "1.00 " * 200_000)
    assert not same_output("1" * 10**6 + ".0", "2" * 10**6 + ".0")
    assert not same_output(" " * 10**6 + "x", " " * 10**6 + "y")
    assert time.perf_counter() - start < 5


def test_same_value():
    nan = float("nan")
    for result, expected in [
        (1, 1), (1, 1.0), (1.0, 1.0), (0.1 + 0.2, 0.3), (nan, nan), (float("inf"), float("inf")), ((1, 2), [1, 2]),
        ([(1, 2)], [[1, 2]]), ({"a": 0.5}, {"a": 0.5}), ({1}, {1}), (None, None), ((1,), (1,)), (10**400, 10**400),
        (1e-13, 0.0), (1e9 + 1, 1e9), (-0.0, 0.0), ({"a": (1,)}, {"a": [1]}), ([], []), ("a", "a"), ({}, {}),
    ]:
        assert same_value(result, expected), (result, expected)
    for result, expected in [
        (True, 1), (1, True), (1.0, 1), ("1", 1), (True, 1.0), (1.001, 1.0), (nan, 1.0), (1.0, nan),
        (float("inf"), 1e308), (1e308, float("inf")), (10**400, 1.0), (10**400, float("inf")), ([1, 2], (1, 2)),
        ([1], [1, 2]), ({True: 1}, {1: 1}), ({1: True}, {1: 1}), ([True], [1]), ({"a": 1, "b": 2}, {"a": 1}),
        (None, False), (float("inf"), float("-inf")), ([], None), (0.0, 1e-9), (1e-9, 0.0), (2e-9, 1e-9), ({1}, [1]),
        ({True}, {1}), ([1.0], [1]), ("a", ["a"]), ({"a": 1}, {"b": 1}), ([[1]], [[2]]), (1e9 + 2001, 1e9),
    ]:
        assert not same_value(result, expected), (result, expected)


# HumanEval's checks -----------------------------------------------------------------------------------------

PROMPT = "def helper(n):\n    return n * 2\n\ndef f(n):\n    \"\"\"Twice, and one more.\"\"\"\n"
HELPED = "def check(candidate):\n    for i in range(5):\n        assert abs(candidate(i) - helper(i) - 1) < 1e-6\n"


@needs_sandbox
@pytest.mark.parametrize(
    ("test", "source", "reason"),
    [
        (HELPED, PROMPT + "    return helper(n) + 1", "passed"),
        (HELPED, "def f(n):\n  return helper(n) + 1", "passed"),
        (HELPED, "def f(n: List[int]):\n  return helper(n) + 1", "passed"),
        (HELPED, "def helper(n): return 99\ndef f(n): return 100", "wrong output in test 1"),
        (HELPED, PROMPT, "the check raised TypeError in test 1"),
        (HELPED, "def f(n): return 2 * n + (n < 3)", "wrong output in test 4"),
        ("def check(candidate): assert candidate([1, 2], key=(3, 4)) == ([1, 2], (3, 4))",
         "def f(*a, key): return (*a, key)", "passed"),
        ("def check(candidate):\n  x = [1]\n  assert candidate(x) == [1, 2] and x == [1]",
         "def f(x):\n  x.append(2)\n  return x", "passed"),
        ("def check(candidate): assert f(1) == candidate(1) == 1", "def f(n): return n", "passed"),
        ("def check(candidate): assert True", "def f(n): pass", "the check never calls its candidate"),
        ("def check(candidate):\n  print('noise')\n  assert candidate(1) == 1", "def f(n): return n", "passed"),
        ("def check(candidate):\n  try: candidate(1)\n  except: pass", "def f(n): 1 / 0",
         "raised ZeroDivisionError in test 1"),
        ("def check(candidate):\n  candidate(1)\n  import sys; sys.exit()", "def f(n): return n",
         "the check raised SystemExit in test 1"),
        ("def check(candidate):\n  candidate(1)\n  while True: pass", "def f(n): return n", "time limit"),
        ("def check(candidate):\n  while True:\n    try: candidate(1)\n    except: pass", "def f(n): 1 / 0",
         "raised ZeroDivisionError in test 1"),
        ("def check(candidate): assert 0 < 10 ** 10 ** candidate(1)", "def f(n): return 9", "time limit"),
    ],
)
def test_checks(test, source, reason):
    seconds = 0.3 if reason == "time limit" else 3
    start = time.perf_counter()
    verdict = run_code(source, test, entry_point="f", prompt=PROMPT, seconds=seconds)
    assert (verdict.reason, verdict.score) == (reason, float(reason == "passed"))
    assert verdict.components == {"passed": int(reason == "passed"), "tests": 1}
    assert time.perf_counter() - start < 4 * seconds + 0.5


# Limits -----------------------------------------------------------------------------------------------------


@needs_sandbox
def test_all_tests_count_and_samples_depend_on_the_seed_alone():
    tests = [{"input": str(i), "output": "0" if i == 7 else str(i)} for i in range(30)]
    verdict = run_code("print(input())", tests)
    assert (verdict.reason, verdict.components) == ("wrong output in test 8", {"passed": 7, "tests": 30})
    assert run_code("print(input())", tests, limit=30).reason == "wrong output in test 8"
    verdicts = [run_code("print(input())", tests, limit=2, seed=seed) for seed in range(3)]
    assert all(v.reason == "passed" and v.components == {"passed": 2, "tests": 2} for v in verdicts)
    for seed in range(3):
        random.seed(seed)  # which must not matter
        drawn = [run_code("1 / 0", tests, limit=2, seed=seed).reason for _ in range(2)]
        assert drawn[0] == drawn[1]
    firsts = {run_code("1 / 0", tests, limit=1, seed=seed).reason for seed in range(9)}
    assert len(firsts) > 2


BUSY = "import time\nwhile time.process_time() < {}: pass\nprint(1)"
ONE = [{"input": "", "output": "1"}]


@needs_sandbox
def test_processor_time_is_what_counts():
    start = time.perf_counter()
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        judge = lambda _: run_code(BUSY.format(1.0), ONE, seconds=1.6)  # noqa: E731
        verdicts = list(pool.map(judge, range(16)))
    assert [verdict.reason for verdict in verdicts] == ["passed"] * 16
    assert all(verdict.seconds < 4 * 1.6 + 0.5 for verdict in verdicts)  # waiting for a core does not count
    assert time.perf_counter() - start > 16 / (os.cpu_count() or 1)  # or the programs did not use what they say


@needs_sandbox
def test_never_more_programs_than_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    most = 0
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(run_code, "import time\ntime.sleep(0.3)\nprint(1)", ONE, seconds=1) for _ in range(8)]
        while not all(future.done() for future in running):
            most = max(most, len(list(tmp_path.iterdir())))
    assert 0 < most <= len(os.sched_getaffinity(0))
    assert [future.result().reason for future in running] == ["passed"] * 8


@needs_sandbox
def test_processor_time_across_processes():
    script = f"import sandbox\nprint([sandbox.run_code({BUSY.format(0.5)!r}, {ONE}, seconds=0.8).reason for _ in range(2)])"
    started = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path(sandbox.__file__).parent)
        for _ in range(2 * (os.cpu_count() or 1))
    ]
    assert [process.communicate()[0] for process in started] == ["['passed', 'passed']\n"] * len(started)


@needs_sandbox
def test_time_is_of_all_tests_together():
    verdict = run_code(BUSY.format(0.25), ONE * 3, seconds=0.6)
    assert (verdict.reason, verdict.components) == ("time limit", {"passed": 2, "tests": 3})
    start = time.perf_counter()
    verdict = run_code("import time\ntime.sleep(60)", ONE, seconds=0.4)
    assert verdict.reason == "time limit" and 1.4 < time.perf_counter() - start < 4 * 0.4 + 0.5


@needs_sandbox
@pytest.mark.parametrize(
    "source",
    ["while True: pass", "import threading\nfor _ in range(3): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()"],
)
def test_a_busy_loop_ends_after_its_processor_time(source):
    start = time.perf_counter()
    assert run_code(source, ONE, seconds=0.6).reason == "time limit"
    assert 0.6 < time.perf_counter() - start < 4 * 0.6 + 0.5


@needs_sandbox
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("for i in range(999): open(str(i), 'w').close()\nprint(1)", "passed"),
        ("for i in range(1100): open(str(i), 'w').close()\nprint(1)", "disk limit"),
        ("for i in range(7): open(str(i), 'wb').write(bytes(8 << 20))\nprint(1)", "passed"),
        ("for i in range(9): open(str(i), 'wb').write(bytes(8 << 20))\nprint(1)", "disk limit"),
        ("import threading, time\nthreading.stack_size(1 << 16)\n"
         "for _ in range(400): threading.Thread(target=time.sleep, args=(9,)).start()", "thread limit"),
        ("x = bytearray(900 << 20)\nprint(1)", "passed"),
        ("x = bytearray(1100 << 20)\nprint(1)", "memory limit"),
        ("f = open('x', 'wb')\nf.write(bytes(9 << 20))\nprint(1)", "raised OSError in test 1"),
        ("import os\nfor i in range(3000):\n  os.mkdir('d')\n  os.chdir('d')", "disk limit"),
        ("import itertools, os, threading\nos.mkdir('0')\ninner = os.open('0', os.O_RDONLY)\n"
         "def fill():\n  for i in itertools.count():\n    fd = os.open(str(i), 1 | 64, dir_fd=inner)\n"
         "    os.write(fd, bytes(1 << 20)); os.close(fd)\nthreading.Thread(target=fill).start()\n"
         "for i in itertools.count(): os.rename(str(i), str(i + 1))", "disk limit"),
        ("import os\nos.umask(0o777)\nos.mkdir('d')\nopen('f', 'w').close()\nprint(1)", "passed"),
        ("import os, tempfile\nassert os.listdir('.') == []\nd = tempfile.mkdtemp()\n"
         "os.rename(d, 'e')\nos.symlink('e', 'f')\nassert sorted(os.listdir('.')) == ['e', 'f']\nprint(1)", "passed"),
    ],
)
def test_resources(body, reason, tmp_path, monkeypatch):
    if "umask" in body and os.getuid():
        reason = "disk limit"  # a folder that cannot be looked into
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_code(body, ONE, seconds=5).reason == reason
    assert list(tmp_path.iterdir()) == []


# Attacks ----------------------------------------------------------------------------------------------------
# Each is the body of f(x). The right result is one that no attack can compute, but many look for. SECRET-97531
# stands for "the attack has worked", MARKED for a file name that must not appear anywhere.

SECRET = "SECRET-" + "97531"
SEARCH = """
import os, sys
half = "SECRET-"
def found(text):
    text = text if isinstance(text, str) else text.decode("latin-1")
    at = text.find(half + "9")
    return text[at:at + 12] if at >= 0 else None
"""
FORGE = """
import json, os
def forge(message, fd=4):
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    try: os.write(fd, len(body).to_bytes(8, "big") + body)
    except OSError: pass
"""
REFUSED = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def must_fail(call, *args):
    try: result = call(*args)
    except OSError: return
    if result != -1: raise SystemExit(print("SECRET-97531"))
"""
ATTACKS = {
    # results that are none
    "sys.exit": "import sys; sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "return None": "return None",
    "always equal": "class E:\n  __eq__ = lambda s, o: True\n  __ne__ = lambda s, o: False\n"
                    "  __hash__ = lambda s: 0\nreturn E()",
    "equal int": "class E(int):\n  __eq__ = lambda s, o: True\n  __hash__ = lambda s: 0\nreturn E(5)",
    "equal str": "class E(str):\n  __eq__ = lambda s, o: True\n  __str__ = __repr__ = lambda s: s\n"
                 "  __hash__ = lambda s: 0\nreturn E('x')",
    "lying type": "class E:\n  __class__ = str\n  __eq__ = lambda s, o: True\n  __hash__ = lambda s: 0\nreturn E()",
    "lying metaclass": "class M(type):\n  __eq__ = lambda s, o: True\n  __hash__ = type.__hash__\n"
                       "class E(metaclass=M):\n  __eq__ = lambda s, o: True\nreturn [E()]",
    "pickle": """
import os, pickle
class P:
    def __reduce__(self): return os.system, ("touch /tmp/MARKED",)
    __getstate__ = None
print(pickle.dumps(P()))
pickle.loads(pickle.dumps(P()))
return P()
""",
    # looking for the expected result
    "command line": SEARCH + "return next(filter(None, map(found, sys.argv + sys.orig_argv)), 0)",
    "environment": SEARCH + "return next(filter(None, map(found, os.environ.values())), 0)",
    "files": SEARCH + """
for top in ("/tmp", "/srv", "/home", "/root", "/var", "/dev", "/proc", "/etc", "/run", "/mnt", "/opt", ".", ".."):
    for folder, _, names in os.walk(top):
        for name in names:
            try: hit = found(open(os.path.join(folder, name), "rb").read(1 << 20))
            except OSError: continue
            if hit: return hit
""",
    "stack frames": SEARCH + """
frame = sys._getframe()
while frame:
    for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
        hit = found(repr(value)[:10**6])
        if hit: return hit
    frame = frame.f_back
""",
    "all objects": SEARCH + """
import gc
for thing in gc.get_objects():
    if thing.__class__ in (dict, list, tuple):
        hit = found(repr(thing)[:10**6])
        if hit: return hit
""",
    "all that objects refer to": SEARCH + """
import gc
seen, todo = set(), gc.get_objects()
while todo:
    thing = todo.pop()
    if id(thing) in seen: continue
    seen.add(id(thing))
    todo += gc.get_referents(thing)
    if thing.__class__ in (str, bytes) and len(thing) < 200 and found(thing): return found(thing)
""",
    "own memory": SEARCH + """
import ctypes
try: maps = open("/proc/self/maps").read()
except OSError: maps = ""
for line in maps.splitlines():
    begin, end = (int(x, 16) for x in line.split()[0].split("-"))
    hit = found(ctypes.string_at(begin, end - begin)) if " rw" in line else None
    if hit: return hit
""",
    "/proc": SEARCH + """
for who in ("self", "thread-self", "1", "2", str(os.getppid()), str(os.getpid())):
    for what in ("cmdline", "environ", "maps", "mem", "cwd", "root", "root/proc/1/environ", "task", "stack",
                 *(f"fd/{fd}" for fd in range(9))):
        try: hit = found(open(f"/proc/{who}/{what}", "rb").read(1 << 20))
        except OSError: continue
        if hit: return hit
""",
    "the parent's descriptors": REFUSED + """
for fd in range(20):
    for mode in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, 3):
        must_fail(os.open, f"/proc/{os.getppid()}/fd/{fd}", mode)
    must_fail(libc.syscall, 438, os.getppid(), fd, 0)
must_fail(os.listdir, f"/proc/{os.getppid()}/fd")
must_fail(libc.syscall, 434, os.getppid(), 0)
""",
    "parent memory": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
done = [libc.ptrace(16, os.getppid(), 0, 0), libc.ptrace(16, 1, 0, 0), libc.process_vm_readv(1, None, 0, None, 0, 0),
        libc.process_vm_writev(os.getppid(), None, 0, None, 0, 0)]
return "attached" if 0 in done else "SECRET-0"
""",
    "other programs' folders": SEARCH + """
folder = os.getcwd()
while folder != "/":
    folder = os.path.dirname(folder)
    try: names = os.listdir(folder)
    except OSError: continue
    return "SECRET-97531"
for name in ("..", "../run", "../../" + os.path.basename(os.path.dirname(os.getcwd())), "../x"):
    try: open(name + "/MARKED", "w")
    except OSError: continue
    if name != "../run": return "SECRET-97531"
""",
    "sys.settrace": SEARCH + """
hits = []
def trace(frame, event, arg):
    hits.extend(filter(None, map(found, map(repr, [arg, *frame.f_locals.values()]))))
    if hits: raise SystemExit(print(hits[0]))
    return trace
sys.settrace(trace)
frame = sys._getframe()
while frame:
    frame.f_trace, frame = trace, frame.f_back
return x
""",
    # forged messages
    "forged verdict": """
import json, os
for fd in range(1, 100):
    walls = {"no rights": "on", "limits": "on", "no new rights": "on", "Landlock": "on", "seccomp": "on"}
    try: os.write(fd, json.dumps({"reason": "passed", "passed": 2, "walls": walls}).encode() + b"\\n")
    except OSError: pass
""",
    "forged messages": FORGE + """
for reply in (["ended"], ["gone", 0], ["value", True], {"reason": "passed"}, ["value", {"tuple": [[]]}], ["raised", 1], []):
    forge(reply)
os.write(4, (1 << 60).to_bytes(8, "big"))
""",
    "forged walls": FORGE + "forge(['walls', {}])\nforge(['walls', {'Landlock': 'off'}])\nforge(['loaded'])\nreturn 1",
    "forged ends": FORGE + """
for fd in (3, 4, 5, 6, 7, 8):
    for reply in (["started", 1], ["ended", False, 0.0, "SECRET-0"], [None, "SECRET-0"], ["loaded"], None, "", 0):
        forge(reply, fd)
return 2
""",
    "forged after the end": FORGE + """
import atexit
atexit.register(lambda: [forge(["value", y]) for y in ("x", 1, None)])
atexit.register(forge, [None, "x"])
""",
    "forged orders": FORGE + """
for fd in range(9):
    for name in (f"/proc/self/fd/{fd}", f"/dev/fd/{fd}"):
        try: own = os.open(name, os.O_WRONLY)
        except OSError: continue
        for order in ("", "1", {"dict": []}, {"dict": [["stdin", ""], ["base", "/tmp/MARKED"], ["unsafe", True],
                      ["source", "import os; os.mkdir('/tmp/MARKED')"], ["prompt", ""], ["is_module", False]]}):
            forge(order, own)
""",
    "half a message": "import os\nos.write(4, (99).to_bytes(8, 'big') + b'[')\nos._exit(0)",
    "one byte": "import os\nos.write(4, b'x')\nos._exit(0)",
    "deep message": FORGE + "forge(b'[' * 10**6)",
    "deep dictionaries": FORGE + "forge(b'{\"set\":[' * 10**5)",
    "wrong types": FORGE + """
import random
for body in random.sample([{"bytes": 10**12}, {"tuple": 5}, {"set": [[]]}, {"dict": 1}, {"dict": [[1, 2, 3]]}, {"x": []}, {},
                           {"frozenset": {"list": []}}, ["value"], ["value", 1, 2], [["value"], 1], 1e999, "value"], 1):
    forge(body)
""",
    "colliding hashes": FORGE + "forge(['value', {'set': [i * (2**61 - 1) for i in range(150_000)]}])",
    "a flood of messages": FORGE + "while True: forge(['value', 1])",
    "reading the requests": "import os\nwhile os.read(3, 1 << 20): pass",
    "closed pipes": "import os\nos.closerange(0, 100)",
    "exchanged pipes": "import os\nos.dup2(4, 1); os.dup2(3, 0); os.dup2(2, 4)\nprint('x' * 10**6)\nreturn 'x'",
    "patched builtins": """
import builtins, sys
builtins.open = builtins.print = builtins.type = builtins.len = builtins.compile = lambda *a, **k: True
builtins.isinstance = builtins.all = builtins.any = lambda *a: True
""",
    "patched json": """
import json, os
json.dumps = lambda *a, **k: '["value", true]'
json.loads = lambda *a, **k: True
os._exit = os.write = lambda *a: 0
""",
    "modules in its folder": """
import os, sys
for name in ("json", "encodings", "os", "sitecustomize", "usercustomize", "sandbox"):
    open(f"{name}.py", "w").write("def dumps(*a): return 'x'\\nloads = dumps")
sys.path.insert(0, os.getcwd())
sys.modules.pop("json", None)
import json
return json.dumps(1)
""",
    # processes and signals
    "fork bomb": "import os\nwhile True: os.fork()",
    "quiet fork bomb": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "raw forks": "import ctypes\nlibc = ctypes.CDLL(None)\n"
                 "while True: libc.syscall(57), libc.syscall(56, 17, 0, 0, 0, 0), libc.syscall(435, 0, 0)",
    "forks of another instruction set": """
import ctypes, mmap, os
if os.uname().machine != "x86_64": return
code = mmap.mmap(-1, 4096, prot=7)
code.write(bytes.fromhex("b802000000cd80c3"))  # mov eax, 2; int 0x80; ret: fork() of i386
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
open("/dev/null").close()
return "SECRET-97531"
""",
    "thread bomb": """
import threading, time
threading.stack_size(32768)
while True:
    try: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    except RuntimeError: pass
""",
    "threads left running": "import threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\nreturn 1",
    "only threads left running": """
import ctypes, threading
threading.Thread(target=lambda: [0 for _ in iter(int, 1)], daemon=True).start()
ctypes.CDLL(None).syscall(60 if __import__("os").uname().machine == "x86_64" else 93, 0)
""",
    "setsid survivor": """
import os, time, signal
try:
    os.setsid()
    if os.fork() == 0: pass
except OSError: pass
for number in (signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
time.sleep(60)
""",
    "subprocess": "import subprocess\nreturn subprocess.run(['/bin/sh', '-c', 'sleep 60 &'], capture_output=True).stdout",
    "exec": "import os, sys\nos.execv(sys.executable, ['python', '-c', 'while True: pass'])",
    "signals ignored": """
import signal, resource
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
for limit in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
    try: resource.setrlimit(limit, (-1, -1))
    except (OSError, ValueError): pass
    else: print("SECRET-97531")
while True: pass
""",
    "killing": "import os, signal\nfor pid in (-1, 0, 1, os.getppid()):\n  try: os.kill(pid, 9)\n  except OSError: pass\n"
               "while True: pass",
    "signals by way of fcntl": REFUSED + """
import fcntl, signal
r, w = os.pipe()
for fd in (r, w, 0, 1, 3, 4):
    must_fail(fcntl.fcntl, fd, fcntl.F_SETOWN, os.getppid())
    must_fail(fcntl.fcntl, fd, fcntl.F_SETOWN, -os.getpgid(0))
    must_fail(fcntl.fcntl, fd, 10, signal.SIGKILL)
    must_fail(fcntl.fcntl, fd, 15, bytes(8))
    must_fail(fcntl.fcntl, fd, 1031, 1 << 20)
    must_fail(fcntl.fcntl, fd, 1024, 1)
""",
    "timers": """
import ctypes, signal, struct, time
libc = ctypes.CDLL(None)
signal.signal(signal.SIGALRM, signal.SIG_IGN)
for kind in (0, 1, 2): signal.setitimer(kind, 0.01, 0.01)
libc.timer_create(1, struct.pack("QiiQ", 0, 9, 0, 0) + bytes(64), ctypes.create_string_buffer(8))
while True: time.sleep(0.01)
""",
    "ending itself by a timer": """
import ctypes, struct
libc, timer = ctypes.CDLL(None), ctypes.create_string_buffer(8)
if libc.timer_create(1, struct.pack("QiiQ", 0, 9, 0, 0) + bytes(64), timer) == 0:
    libc.timer_settime(ctypes.c_void_p(int.from_bytes(timer.raw, "little")), 0, struct.pack("4q", 0, 1, 0, 1), None)
while True: pass
""",
    "a bomb of timers": REFUSED + """
import struct
kept = [ctypes.create_string_buffer(8) for _ in range(1000)]
if all(libc.timer_create(1, struct.pack("QiiQ", 0, 10, 0, 0) + bytes(64), timer) == 0 for timer in kept): return "SECRET-97531"
""",
    "stopping itself": """
import ctypes, struct
libc, timer = ctypes.CDLL(None), ctypes.create_string_buffer(8)
if libc.timer_create(1, struct.pack("QiiQ", 0, 19, 0, 0) + bytes(64), timer) == 0:
    libc.timer_settime(ctypes.c_void_p(int.from_bytes(timer.raw, "little")), 0, struct.pack("4q", 0, 10**7, 0, 10**7), None)
while True: open("x", "w").write("y")
""",
    "prctl": REFUSED + """
for option, value in ((1, 0), (4, 0), (22, 0), (38, 0), (36, 1), (24, 0), (15, b"x"), (0x59616d61, -1)):
    must_fail(libc.prctl, option, value, 0, 0, 0)
""",
    "rights": REFUSED + """
import struct
must_fail(libc.capset, struct.pack("Ii", 0x20080522, 0), b"\\xff" * 24)
for call in (os.setuid, os.setgid, os.setgroups): must_fail(call, 0) if call is not os.setgroups else must_fail(call, [0])
""",
    "the parent's limits": REFUSED + """
import resource
for limit in range(16):
    must_fail(resource.prlimit, os.getppid(), limit, (1, 1))
    must_fail(resource.prlimit, os.getppid(), limit)
""",
    "the parent's priority": REFUSED + """
import struct
for who in (os.getppid(), os.getpid(), 0):
    must_fail(os.setpriority, os.PRIO_PROCESS, who, 19)
    must_fail(os.setpriority, os.PRIO_PGRP, who, 19)
    must_fail(os.sched_setaffinity, who, [0])
    must_fail(os.sched_setscheduler, who, os.SCHED_IDLE, os.sched_param(0))
    must_fail(libc.syscall, 251 if os.uname().machine == "x86_64" else 30, 1, who, 0)
    must_fail(libc.syscall, 314 if os.uname().machine == "x86_64" else 274, who, struct.pack("IIQiIQQQ", 48, 5, 0, 19, 0, 0, 0, 0), 0)
""",
    "namespaces": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
if max(libc.unshare(0x10000000), libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.chroot(b"/tmp"), libc.setuid(0),
       libc.syscall(0x40000000 + 57), libc.setns(0, 0), libc.syscall(425, 1, None),
       libc.syscall(442, -100, b"/", 0, b"", 32)) >= 0:
    return "SECRET-97531"
""",
    "ctypes": "import ctypes\nctypes.string_at(0)",
    "sockets": """
import socket, itertools, ctypes
for family, kind in itertools.product(range(46), (1, 2, 3, 5, 10)):
    try: socket.socket(family, kind)
    except OSError: continue
    return "SECRET-97531"
try: socket.socketpair()
except OSError: pass
else: return "SECRET-97531"
if ctypes.CDLL(None).socket(2, 1, 0) >= 0: return "SECRET-97531"
""",
    "shared memory": REFUSED + """
from multiprocessing import shared_memory
for call in (libc.shmget, libc.semget, libc.msgget): must_fail(call, 0x4D41524B, 1 << 20, 0o1666)
must_fail(libc.shmat, 0, None, 0)
must_fail(libc.mq_open, b"/MARKED", 0o102, 0o666, None)
must_fail(lambda: shared_memory.SharedMemory("MARKED", True, 1 << 20).close())
must_fail(os.memfd_create, "MARKED")
""",
    "kernel memory of others": REFUSED + """
context = ctypes.create_string_buffer(8)
must_fail(libc.syscall, 206 if os.uname().machine == "x86_64" else 0, 60000, context)
must_fail(libc.inotify_init1, 0)
must_fail(libc.syscall, 425, 8, ctypes.create_string_buffer(200))
must_fail(libc.syscall, 321 if os.uname().machine == "x86_64" else 280, 0, bytes(64), 64)
""",
    # time
    "huge ints": "return str(9 ** 9 ** 9)",
    "sleep": "import time\ntime.sleep(60)",
    "swallowed": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "an atexit handler that loops": "import atexit\natexit.register(lambda: [0 for _ in iter(int, 1)])",
    "a __del__ that loops": "import sys\nclass D:\n  def __del__(self):\n    while True: pass\nsys.kept = D()",
    "a result that takes long": "class D(dict): pass\nD.__module__ = 'collections'\nD.items = lambda s: iter(int, 1)\nreturn D()",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
    "deep recursion in C": "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nreturn repr(x)",
    # memory and output
    "memory bomb": "x = []\nwhile True: x.append(bytearray(10**7))",
    "quiet memory bomb": "x = []\nwhile True:\n  try: x.append(bytearray(10**6))\n  except MemoryError: pass",
    "memory in memfds": "import os\nfds = [os.memfd_create('x') for _ in range(9)]\n"
                        "while True: [os.write(fd, bytes(10**6)) for fd in fds]",
    "infinite output": "while True: print('x' * 10**5)",
    "infinite bytes": "import os\nwhile True:\n  try: os.write(1, bytes(10**6))\n  except OSError: pass",
    "one gigabyte on one line": "import os\nprint('x' * (2**30 - 10**8))",
    "one gigabyte as result": "return 'x' * (2**30 - 10**8)",
    "bytes of no text": "import os\nos.write(1, b'\\xff\\xfe\\x80' + bytes(99))\nreturn b'\\xff\\0'.decode('latin-1')",
    "NUL": "print('\\0' * 99)\nreturn '\\0'",
    # files
    "files outside": """
import os
for top in ("/", "/tmp", "/var/tmp", "/dev/shm", "/root", "/home", "/srv", "/etc", "/usr/lib", "/lib",
            os.path.dirname(os.__file__), "..", "../.."):
    try: open(os.path.join(top, "MARKED"), "w").write("x")
    except OSError: pass
    try: os.mkdir(os.path.join(top, "MARKED"))
    except OSError: pass
""",
    "libraries": REFUSED + """
library = os.__file__
for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, 3, 3 | os.O_TRUNC, os.O_WRONLY | os.O_TRUNC):
    must_fail(os.open, library, flags)
for call, args in ((os.chmod, (0o777,)), (os.chown, (0, 0)), (os.truncate, (0,)), (os.utime, ((0, 0),)),
                   (os.setxattr, ("user.x", b"x")), (os.unlink, ()), (os.rename, ("x",)), (os.link, ("x",))):
    must_fail(call, library, *args)
must_fail(libc.syscall, 452, -100, library.encode(), 0o777, 0)
""",
    "devices": REFUSED + """
for name in ("/dev/zero", "/dev/tty", "/dev/mem", "/dev/kvm", "/dev/nvidia0", "/dev/nvidiactl", "/dev/random", "/dev/shm/MARKED"):
    for flags in (os.O_RDONLY, os.O_RDWR, 3, os.O_RDWR | os.O_CREAT): must_fail(os.open, name, flags)
""",
    "memory in files": "import os\nwhile True:\n  try: open(os.urandom(8).hex(), 'wb').write(bytes(10**6))\n  except OSError: pass",
    "100 MB in files of 8 MB": "for i in range(13): open(f'MARKED-{i}', 'wb').write(bytes(8 << 20))\nreturn 1",
    "many files": "import os\nfor i in range(10**5):\n  os.mkdir(f'MARKED-{i}')",
    "many small files": "for i in range(5000): open(f'MARKED-{i}', 'w').write('x')\nreturn 1",
    "unlinked files": """
import os
kept = []
while True:
    try: kept.append(open("MARKED", "wb")); kept[-1].write(bytes(8 << 20)); os.unlink("MARKED")
    except OSError: kept = kept[10:]
""",
    "folders on the move": """
import os, itertools, threading
os.makedirs("0/MARKED")
def fill():
    os.chdir("0/MARKED")
    for i in itertools.count(): open(f"{i}", "wb").write(bytes(1 << 20))
threading.Thread(target=fill).start()
for i in itertools.count():
    try: os.rename(f"/proc/self/cwd/../../{i}" if 0 else f"{os.environ['TMPDIR']}/{i}", f"{os.environ['TMPDIR']}/{i + 1}")
    except OSError: pass
""",
    "folders that cannot be read": """
import os
os.makedirs("MARKED/inner")
for i in range(50): open(f"MARKED/inner/{i}", "wb").write(bytes(1 << 20))
os.mkdir("locked", 0)
os.umask(0o777)
os.makedirs("a"); open("b", "w").close()
return 1
""",
    "nested folders": "import os\nfor _ in range(5000):\n  os.mkdir('MARKED')\n  os.chdir('MARKED')\nreturn 1",
    "long nested folders": "import os\nfor _ in range(900):\n  os.mkdir('M' * 250)\n  os.chdir('M' * 250)\nopen('x', 'w')\nreturn 1",
    "big file": "f = open('MARKED', 'wb')\nwhile True: f.write(bytes(10**6))",
    "big hole": "import os\nfd = os.open('MARKED', os.O_RDWR | os.O_CREAT)\nos.ftruncate(fd, 1 << 40)",
    "symlinks": "import os\nos.symlink('/', 'MARKED')\nos.link('MARKED', 'again', follow_symlinks=False)\n"
                "return open('MARKED/etc/passwd').read()",
    "links into the folder": """
import os
for name in ("/etc/passwd", "/etc/shadow", "/usr/bin/env", os.path.dirname(os.__file__), "/proc/self/fd", ".."):
    os.symlink(name, name.replace("/", "_"))
    try: os.link(name, "MARKED")
    except OSError: continue
    return "SECRET-97531"
""",
    "fifo": "import os\ntry: os.mkfifo('MARKED')\nexcept OSError: return 1\nopen('MARKED')",
    "special files": REFUSED + """
import stat
for kind in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK): must_fail(os.mknod, "MARKED", kind | 0o666, os.makedev(1, 3))
""",
    "own folder": "import os, shutil\nos.chdir('/')\nshutil.rmtree('/tmp', ignore_errors=True)\n"
                  "shutil.rmtree('/', ignore_errors=True)",
    "its folder renamed": REFUSED + """
here = os.getcwd()
for name in (here, os.path.dirname(here), os.environ["TMPDIR"]):
    try: os.rename(name, name + "-MARKED")
    except OSError: pass
    try: os.rmdir(name)
    except OSError: pass
must_fail(os.rename, os.environ["TMPDIR"], os.path.dirname(os.environ["TMPDIR"]) + "/MARKED")
""",
}
MODES = {
    "program": ("print(f(1))", [{"input": "1", "output": SECRET}, {"input": "2", "output": SECRET}], ""),
    "function": ("", [{"fn_name": "f", "args": [x], "expected": SECRET} for x in (1, 2)], ""),
    "check": ("", f"def check(candidate):\n    assert candidate(1) == {SECRET!r}\n    assert candidate(2) == {SECRET!r}\n", "f"),
}
SECONDS = 0.2
RUNNER = """
import json, resource, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, sys.argv[1])
import sandbox
sandbox.SLOTS = threading.BoundedSemaphore(3)  # one more than the usual two cores, as some attacks only wait

def judge(job):
    start = time.perf_counter()
    verdict = sandbox.run_code(job["source"], job["tests"], entry_point=job["entry_point"], seconds=job["seconds"])
    return [verdict.score, verdict.reason, time.perf_counter() - start]

jobs = json.load(sys.stdin)
judge(jobs[0])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with ThreadPoolExecutor(3) as pool:
    verdicts = list(pool.map(judge, jobs))
print(json.dumps([verdicts, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


def processes(text):
    """Those that have text on their command line, which forks share."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def readable():
    """A folder that every user may look into, with a copy of sandbox.py and an empty folder to work in."""
    folder = Path(tempfile.mkdtemp(prefix="readable-", dir="/tmp"))
    shutil.copy(sandbox.__file__, folder)
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def run_as(user, folder, script, argument="", stdin=""):
    """Run a script as this or an ordinary user, in fresh folders that must be empty in the end. What it printed."""
    python = [sys.executable, os.path.realpath(sys.executable), "/usr/bin/python3"]
    others = {}
    if user != "this user":
        if os.getuid():
            pytest.skip("the tests already run as an ordinary user")
        others = {"user": 65534, "group": 65534, "extra_groups": []}
    places = {}
    for name in ("cwd", "tmp"):
        # In memory where possible: a disk that others keep busy may take a second to delete 1,000 folders.
        places[name] = tempfile.mkdtemp(prefix=f"{name}-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp")
        if others:
            os.chown(places[name], 65534, 65534)
    environment = {"PATH": os.environ["PATH"], "TMPDIR": places["tmp"]}
    for command in python if others else python[:1]:
        try:
            subprocess.run([command, "-c", "import ctypes, resource, concurrent.futures"], check=True, **others)
        except (OSError, subprocess.CalledProcessError):
            continue
        command = [command, "-c", script, str(folder), argument]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=places["cwd"], env=environment, **others)
        assert done.returncode == 0, done.stderr
        assert not processes(places["tmp"])
        for place in places.values():
            assert os.listdir(place) == []
            os.rmdir(place)
        return done.stdout
    pytest.skip("no Python that an ordinary user may run")


@pytest.fixture(scope="module", params=["this user", "an ordinary user"])
def attacked(request, readable):
    """The verdicts on all attacks in all modes, {(attack, mode): (score, reason, seconds)}, of one user."""
    if MISSING:
        pytest.skip(f"no isolation here: {MISSING}")
    keys = list(itertools.product(ATTACKS, MODES))
    jobs = []
    for name, mode in keys:
        body = ATTACKS[name].replace("MARKED", f"marked-{os.getpid()}")
        source = "def f(x):\n" + "".join(f"    {line}\n" for line in body.splitlines()) + "\n"
        extra, tests, entry_point = MODES[mode]
        jobs.append({"source": source + extra, "tests": tests, "entry_point": entry_point, "seconds": SECONDS})
    verdicts, growth = json.loads(run_as(request.param, readable, RUNNER, stdin=json.dumps(jobs)))
    assert growth < 50_000  # KiB of the caller's memory
    return dict(zip(keys, verdicts))


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name, attacked):
    for mode in MODES:
        score, reason, took = attacked[name, mode]
        assert score == 0 and reason != "passed", (mode, reason)
        assert took < 4 * SECONDS + 0.5, (mode, reason, took)
    outside = ["/", "/tmp", "/var/tmp", "/dev/shm", "/root", "/home", "/srv", "/etc", "/usr/lib", "/lib"]
    assert not [path for top in outside for path in Path(top).glob(f"marked-{os.getpid()}*")]


def test_attacks_can_succeed_without_the_walls():
    """The search for the secret finds it, or the attacks above would show nothing."""
    names = {}
    exec("def f(x):\n" + "".join(f"    {line}\n" for line in ATTACKS["all objects"].splitlines()), names)
    assert names["f"](1) == SECRET


@needs_sandbox
@pytest.mark.parametrize("forged", [["walls", {"Landlock": "off"}], ["loaded"], 5, {"bytes": 5}, {"dict": 1}, {}, [[]], [None, "30"]])
def test_a_right_program_that_forges_what_comes_next(forged):
    source = f"""
import json, os, sys
print(sum(map(int, input().split())), flush=True)
for body in (b'["ended"]', b'["gone", 0]', b'3', {json.dumps(forged).encode()}):
    os.write(4, len(body).to_bytes(8, "big") + body)
"""
    assert run_code(source, ADD, seconds=3).score == 0


@needs_sandbox
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.characters(), max_size=60), st.text(max_size=9), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner), max_leaves=9))
@example("import os; os._exit(0)", "", {"tuple": []})
@example("print(1)\n```\n```", "\ud800", {"set": {"dict": None}})
def test_nothing_but_value_errors_leaves_run_code(source, text, value):
    for tests in ([{"input": text, "output": text}], [{"call": "f", "args": [value], "expected": value}], value,
                  {"inputs": value, "outputs": [value]}, [value], [{"fn_name": text, "args": value, "expected": value}]):
        for code in (source, f"def f(x):\n  return x, {source}"):
            try:
                verdict = run_code(code, tests, seconds=5, prompt=text, entry_point="f")
            except ValueError as error:
                assert str(error).startswith("tests: ")
            else:
                assert verdict.score in (0, 1) and verdict.reason and json.dumps(verdict.components)


# What is not the program's fault ----------------------------------------------------------------------------


@pytest.fixture
def fresh_probe(monkeypatch):
    """As in a process that has not yet looked which walls there are."""
    sandbox.sandbox_walls.cache_clear()
    yield
    monkeypatch.undo()
    sandbox.sandbox_walls.cache_clear()


@needs_sandbox
@pytest.mark.parametrize("probed", [True, False])
@pytest.mark.parametrize("failing", ["process", "memory", "folder", "full disk"])
def test_unknown_without_a_process_or_folder(fresh_probe, monkeypatch, failing, probed, tmp_path):
    def fail(*_, **__):
        raise {"process": BlockingIOError(11, "no more"), "memory": MemoryError(), "full disk": OSError(28, "No space")}[failing]

    if probed:
        sandbox.sandbox_walls()
    if failing == "folder":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    elif failing == "full disk":
        monkeypatch.setattr(tempfile, "mkdtemp", fail)
    else:
        monkeypatch.setattr(subprocess, "Popen", fail)
    verdict = run_code("print(1)", ONE)
    assert verdict.score is None and verdict.reason.startswith("unknown: ")
    monkeypatch.undo()
    assert run_code("print(1)", ONE).score == 1  # and the failure is not remembered


UNDER_NPROC = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
import sandbox
found = []
for most in (0, 1, 2, 3, 4, 99):
    resource.setrlimit(resource.RLIMIT_NPROC, (most, 99))
    for tests in ([{"input": "", "output": "1"}], [{"fn_name": "f", "args": [], "expected": 1}]):
        verdict = sandbox.run_code("f = lambda: 1\\nprint(1)", tests, seconds=2)
        found.append([most, verdict.score, verdict.reason])
print(json.dumps(found))
"""


@needs_sandbox
def test_unknown_where_a_fork_fails(readable):
    found = json.loads(run_as("an ordinary user", readable, UNDER_NPROC))
    for most, score, reason in found:
        assert (score, reason) == (1, "passed") if most == 99 else score is None or reason == "passed", found
    assert [score for most, score, _ in found if most < 3] == [None] * 6


@needs_sandbox
def test_unknown_on_a_full_disk(tmp_path, monkeypatch):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=2", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # there is room for one folder
        verdict = run_code("print(1)", ONE)
        assert verdict.score is None and "No space left" in verdict.reason
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@needs_sandbox
@pytest.mark.parametrize("which", [0, 1])  # the referee, the launcher
@pytest.mark.parametrize("tests", [ONE, "def check(candidate):\n    candidate()\n"])
def test_no_verdict_without_a_fault_of_the_machine(monkeypatch, tmp_path, tests, which):
    def kill():
        for _ in range(500):
            time.sleep(0.01)
            found = sorted(processes(str(tmp_path)))
            if len(found) == 3:  # referee, launcher, player
                time.sleep(0.2)
                os.kill(found[which], signal.SIGKILL)
                return

    sandbox.sandbox_walls()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    thread = threading.Thread(target=kill)
    thread.start()
    source = "def f():\n  while True: pass\nif __name__ == '__main__': f()"
    verdict = run_code(source, tests, seconds=5, entry_point="f")
    thread.join()
    assert (verdict.score, verdict.reason) == (0, "died")  # as a program that is known to be right does pass
    assert verdict.seconds < 5 and not processes(str(tmp_path)) and not list(tmp_path.iterdir())


@needs_sandbox
@pytest.mark.parametrize("starved", [False, True])
def test_no_verdict_on_a_machine_in_trouble(monkeypatch, starved):
    sandbox.sandbox_walls()
    kills = itertools.count()
    if starved:
        monkeypatch.setattr(sandbox, "out_of_memory_kills", lambda: next(kills))
    monkeypatch.setattr(sandbox, "converse", lambda *_: (b"", False))
    verdict = run_code("print(1)", ONE, seconds=5)
    reason = "unknown: the machine ran out of memory" if starved else "unknown: no program runs any more"
    assert (verdict.score, verdict.reason) == (None, reason)


@needs_sandbox
@pytest.mark.parametrize("source", ["while True: pass", "import time\ntime.sleep(99)", "def f(): return 1"])
def test_no_process_outlives_a_caller_that_is_killed(source, tmp_path):
    check = "def check(candidate):\n    candidate()\n    while True: pass\n"
    tests = check if "def f" in source else ONE
    script = f"import sandbox\nsandbox.run_code({source!r}, {tests!r}, entry_point='f', seconds=30)"
    folder = Path(sandbox.__file__).parent
    caller = subprocess.Popen([sys.executable, "-c", script], cwd=folder, env=os.environ | {"TMPDIR": str(tmp_path)})
    for _ in range(500):
        time.sleep(0.01)
        if len(processes(str(tmp_path))) == 3:
            break
    time.sleep(0.3)
    caller.kill()
    caller.wait()
    for _ in range(100):
        if not processes(str(tmp_path)):
            break
        time.sleep(0.01)
    assert not processes(str(tmp_path))


# Many at once, and platforms without walls ------------------------------------------------------------------


@needs_sandbox
def test_one_that_hangs_delays_nobody():
    sources = [TOTAL, "import time\ntime.sleep(60)", "", "print(3)"] + [TOTAL] * 12
    start = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda source: run_code(source, ADD, seconds=0.5), sources))
    assert time.perf_counter() - start < 4 * 0.5 + 3
    reasons = ["passed", "time limit", "wrong output in test 1", "wrong output in test 2"] + ["passed"] * 12
    assert [v.reason for v in verdicts] == reasons and [v.score for v in verdicts] == [float(r == "passed") for r in reasons]


@pytest.fixture
def altered(tmp_path):
    """A copy of sandbox.py, changed in one place, as a function that runs a script beside it."""

    def run(old, new, script):
        text = Path(sandbox.__file__).read_text()
        assert text.count(old) == 1
        (tmp_path / "sandbox.py").write_text(text.replace(old, new))
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@on_linux
def test_without_walls_it_refuses_or_is_told_to_run(altered, tmp_path):
    script = f"""
import os, sandbox, time
for _ in range(2):
    try: print("ran", sandbox.run_code("print(3)", {ADD!r}))
    except ValueError as error: print(error)
print(sandbox.run_code({TOTAL!r}, {ADD!r}, unsafe=True).reason)
verdict = sandbox.run_code("import os\\nopen('x', 'w')\\nos.setpgid\\nwhile True: pass", {ADD!r}, seconds=0.5, unsafe=True)
print(verdict.reason, verdict.seconds < 4 * 0.5 + 0.5)
"""
    first, second, right, late = altered('    version = libc("syscall", 444', '    version = libc("syscall", 999', script).splitlines()
    assert first == second and "cannot isolate" in first and "Landlock (" in first and "--unsafe-local-execution" in first
    assert (right, late) == ("passed", "time limit True") and not processes(str(tmp_path))


@needs_sandbox
@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6])
def test_older_versions_of_landlock(altered, version):
    body = ATTACKS["libraries"] + ATTACKS["devices"].replace(REFUSED, "")
    script = f"import sandbox\nprint(sandbox.require_sandbox())\nprint(sandbox.run_code({body + 'print(1)'!r}, {ONE!r}).reason)"
    found = altered("    version = libc(\"syscall\", 444, None, 0, 1)", f"    version = min({version}, libc('syscall', 444, None, 0, 1))", script)
    assert found.splitlines()[-1] == "passed"


@pytest.mark.parametrize("missing", ["resource", "_ctypes", "fcntl"])
def test_importing_it_elsewhere(missing):
    script = f"""
import sys
sys.modules[{missing!r}] = None
sys.platform = "darwin"
for name in ("sched_getaffinity", "memfd_create", "waitid"): delattr(__import__("os"), name)
import sandbox
try: sandbox.run_code("print(1)", {ONE!r})
except ValueError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(sandbox.__file__).parent)
    assert done.returncode == 0 and "cannot isolate" in done.stdout and "darwin" in done.stdout, done.stderr


@needs_sandbox
def test_it_is_found_from_another_folder(readable):
    script = f"import os, sys\nsys.path.insert(0, '.')\nimport sandbox\nos.chdir('/')\nprint(sandbox.run_code('print(1)', {ONE!r}).reason)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=readable)
    assert done.stdout == "passed\n", done.stderr
