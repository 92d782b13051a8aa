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
from sandbox import OUTPUT, check_tests, same_output, same_value
from tests.cases.attacks import ATTACKS, MODES, RUNNER, SECRET, attack_source

MISSING = [f"{name}: {why}" for name, why in sandbox.sandbox_walls().items() if why != "on"]
needs_sandbox = pytest.mark.skipif(bool(MISSING), reason=f"no isolation here: {MISSING}")
FOLDER = Path(sandbox.__file__).parent
SECONDS = 0.1  # for an attack

def python(script, folder, **more):
    """What a script prints, run in a folder by another process."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()

def run_code(*args, **settings):
    if MISSING:
        pytest.skip(f"no isolation here: {MISSING}")
    return sandbox.run_code(*args, **settings)

# 1. Reading tests -------------------------------------------------------------------------------------------

NAN = float("nan")
INF = float("inf")
ENDLESS = [1]
ENDLESS[0] = ENDLESS
CHECK = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(5) == 6\n"
ONE = [{"input": "", "output": "1"}]
ADD = [{"input": "1 2\n", "output": "3\n"}, {"input": "10 20", "output": "30"}]
SUM = "sum(map(int, input().split()))"
TOTAL = f"print({SUM})"
RIGHT, WRONG = "passed", "wrong output in test 1"

def calls(*pairs, name="f"):
    """Tests of a function of one argument."""
    return [{"fn_name": name, "args": [argument], "expected": result} for argument, result in pairs]

@pytest.mark.parametrize(
    ("tests", "read"),
    [
        ([{"input": ["1", "2"], "output": "3"}, {"input": "", "output": "4"}],
         ("programs", [(1, "1\n2", ["3"]), (2, "", ["4"])])),
        ({"inputs": ["1\n2", ""], "outputs": ["3", "4"]}, ("programs", [(1, "1\n2", ["3"]), (2, "", ["4"])])),
        (calls((1, 2)), ("functions", [(1, "f", [1], [2])])),
        ([{"call": "f", "args": [1], "expected": 2}], ("functions", [(1, "f", [1], [2])])),
        ({"inputs": [[1]], "outputs": [2], "fn_name": "f"}, ("functions", [(1, "f", [1], [2])])),
        ({"inputs": [[1]], "outputs": [[2]], "fn_name": "f"}, ("functions", [(1, "f", [1], [[2], 2])])),
        ({"inputs": [[1], [2]], "outputs": [[2], [3, 4]], "fn_name": "f"},
         ("functions", [(1, "f", [1], [[2]]), (2, "f", [2], [[3, 4]])])),
        (CHECK, ("check", [(1, CHECK, "f")])),
    ],
)
def test_check_tests_reads_every_shape(tests, read):
    assert check_tests(tests, "x", "f") == read

@pytest.mark.parametrize(
    ("tests", "entry_point", "error"),
    [
        ([], "", "no tests"), ({}, "", "no tests"), ("", "f", "no tests"), (None, "", "no tests"),
        (7, "", "not int"), ([1], "", "list of dictionaries"), ([10**5000], "", "list of dictionaries"),
        ("assert f(1) == 2", "f", "must define check"), (CHECK, "", "entry_point"),
        (CHECK, "a.b", "entry_point"), (CHECK, None, "entry_point"),
        ({"inputs": ["1"]}, "", "inputs and outputs"), ({"inputs": ["1"], "outputs": []}, "", "same length"),
        ({"inputs": [], "outputs": []}, "", "same length"),
        ({"inputs": "1", "outputs": "1"}, "", "inputs and outputs"),
        ({"inputs": [1], "outputs": ["1"]}, "", "test 1: .* must be text"),
        ([{"input": "1", "output": 1}], "", "test 1: .* must be text"),
        ([{"input": 10**5000, "output": "1"}], "", "test 1: .* must be text"),
        ([{"input": ["1", 2], "output": "1"}], "", "test 1: .* int found"),
        ([{"input": "1", "output": "1"}, {"input": "1"}], "", "test 1 has neither"),
        ([*calls((1, 1)), {"fn_name": "f", "args": 1, "expected": 1}], "", "test 2 has neither"),
        ([{"fn_name": "f", "args": [1]}], "", "test 1 has neither"),
        (calls((1, 1), name="f g"), "", "test 1 has neither"),
        (calls((1, 1), name=["f"]), "", "test 1 has neither"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}, "", "test 1 has neither"),
        ({"inputs": [[1]], "outputs": ["1"], "fn_name": 5}, "", "test 1 has neither"),
        (calls((print, 1)), "", "test 1: .*type builtin_function_or_method"),
        (calls((1, 1j)), "", "test 1: .*type complex"), (calls((10**5000, 1)), "", "test 1: .*digits"),
        (calls((1, ENDLESS)), "", "test 1: .*recursion"),
    ],
)
def test_check_tests_names_what_is_wrong(tests, entry_point, error):
    with pytest.raises(ValueError, match=f"^problem 7: .*{error}"):
        check_tests(tests, "problem 7", entry_point)
    with pytest.raises(ValueError, match=error):
        sandbox.run_code("print(1)", tests, entry_point=entry_point)

# 2. What passes ---------------------------------------------------------------------------------------------

def rows(table):
    return [(source, reason) for reason, sources in table.items() for source in sources]

PROGRAMS = {
    RIGHT: [
        "a, b = map(int, input().split())\nprint(a + b)", f"if __name__ == '__main__': {TOTAL}",
        "import sys\nsys.stdout.write(f'{sum(map(int, sys.stdin.read().split()))}   \\n\\n')",
        "import os\nos.write(1, b'%d' % sum(map(int, os.read(0, os.fstat(0).st_size).split())))",
        "print(sum(map(int, open(0).read().split())))\nraise SystemExit(1)",
        "print(sum(map(int, open('/dev/stdin').read().split())))",
        f"import threading\nthreading.Thread(target=lambda: {TOTAL}).start()",
        f"import atexit\natexit.register(lambda: {TOTAL})",
        f"class A:\n  def __del__(self): {TOTAL}\nkept = A()",
        f"import dataclasses, pickle\n@dataclasses.dataclass\nclass A:\n  x: int\n"
        f"print(pickle.loads(pickle.dumps(A({SUM}))).x)",
        "import re, heapq, bisect, decimal, datetime, functools, itertools, random, string, tempfile\n"
        "with tempfile.TemporaryFile('w+') as f:\n  print(input(), file=f); f.seek(0)\n"
        "  print(sum(map(int, f.read().split())))",
        "import sys\nsys.setrecursionlimit(10**6)\nf = lambda n: n and 1 + f(n - 1)\n"
        f"print(f(50_000) - 50_000 + {SUM})",
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\n"
        f"t = threading.Thread(target=lambda: {TOTAL})\nt.start(); t.join()",
        "from concurrent.futures import ThreadPoolExecutor as T\nimport time\n"
        "list(T(40).map(time.sleep, [0.1] * 40))\nprint(sum(T(1).map(int, input().split())))",
        f"{TOTAL}; exit()", f"{TOTAL}; quit(3)", f"s = 'a\u2028b'\n{TOTAL}",
        f"{TOTAL}\nimport os\nassert os.path.basename(__file__) == 'solution.py'",
        f"import sys\nprint({SUM}, file=sys.__stdout__)", f"with open(1, 'w') as out: print({SUM}, file=out)",
        f"import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\n{TOTAL}",
        f"import io, sys\nreal, sys.stdout = sys.stdout, io.StringIO()\n{TOTAL}\n"
        "real.write(sys.stdout.getvalue())",
        "import sys\nclass W:\n  def __init__(s, f): s.f = f\n  def write(s, x): s.f.write(x)\n"
        f"  def flush(s): s.f.flush()\nsys.stdout = W(sys.stdout)\n{TOTAL}",
        f"import sys\nsys.stdin = open(0, closefd=0)\nsys.stdout.reconfigure(line_buffering=True)\n{TOTAL}",
        f"import os\n{TOTAL}\nos.mkdir('work'); open('work/x', 'w').write('y')",
        f"import sys\n{TOTAL}\nsys.stdout.flush()\nimport os; os._exit(1)",
    ],
    WRONG: ["print('3', 30)", f"print({SUM}, file=__import__('sys').stderr)", "",
            f"import os\nprint({SUM})\nos._exit(0)"],
    "wrong output in test 2": ["print(3)"],
    "raised AttributeError in test 1": [
        f"import sys\nassert sys.argv == ['solution.py'] and sys.modules['__main__'].READ is None\n{TOTAL}"],
    "raised NameError in test 1": ["print(List)"],
    "raised ZeroDivisionError in test 1": [f"{TOTAL}\n1 / 0"],
    f"raised {'E' * 80} in test 1": [
        f"{TOTAL}\nimport sys; sys.stdout.flush(); raise type('E' * 10**6, (Exception,), {{}})"],
    "raised EOFError in test 1": ["input(); input()"],
    "raised UnicodeEncodeError in test 1": ["x = '\udcff'"],
    "raised SyntaxError in test 1": ["1 +"] + ["x = '\0'"] * (sys.version_info >= (3, 11, 4)),
    "raised ValueError in test 1": ["x = '\0'"] * (sys.version_info < (3, 11, 4)),
    "memory limit": ["x = [0] * 10**10"], "output limit": ["while True: print('x' * 1000)"],
    "died": ["import os\nos.abort()"],
}

@pytest.mark.parametrize(("source", "reason"), rows(PROGRAMS))
def test_programs(source, reason):
    verdict = run_code(source, ADD, seconds=5)
    assert (verdict.reason, verdict.score) == (reason, float(reason == "passed"))

FUNCTIONS = {
    RIGHT: ["def f(x): return x + 1", "class Solution:\n  def f(self, x): return x + 1",
            "def f(x):\n  print('seen', x)\n  return x + 1\nif __name__ == '__main__': 1 / 0",
            "import os\ndef f(x):\n  os.mkdir('work')\n  os.chdir('work')\n  return x + 1",
            "import os\ndef f(x):\n  os.makedirs('a/b/c')\n  open('a/b/x', 'w')\n  return x + 1"],
    WRONG: ["def f(x): return x + 1.0", "def f(x): return str(x + 1)", "def f(x): return [2, 6]"],
    "wrong output in test 2": ["def f(x): return 2"],
    "raised ZeroDivisionError in test 1": ["def f(x): return 1 / 0"],
    "raised SystemExit in test 1": ["def f(x): exit()", "def f(x): raise SystemExit", "raise SystemExit"],
    "raised something in test 1": ["def f(x): raise type('a\\n\\x1b[2J', (Exception,), {})"],
    "raised TypeError in test 1": ["def f(x, y): return 2", "def f(x): return lambda: 1",
                                   "def f(x): return 1j"],
    "raised AttributeError in test 1": ["def g(x): return 2"],
    "raised RecursionError in test 1": ["def f(x): return [[]] and f(x)",
                                        "def f(x):\n  a = []\n  a.append(a)\n  return a"],
    "raised ValueError in test 1": ["def f(x): return 10**5000"],
    "output limit": ["def f(x): return '0' * 10**7"], "died": ["def f(x): import os; os._exit(0)"],
}

@pytest.mark.parametrize(("source", "reason"), rows(FUNCTIONS))
def test_functions(source, reason):
    assert run_code(source, calls((1, 2), (5, 6)), seconds=5).reason == reason

NAMES = """List Optional Counter defaultdict deque heappush heapq math itertools accumulate functools cache
    lru_cache reduce bisect bisect_left string re inf collections random gcd sqrt"""

@pytest.mark.parametrize(
    ("source", "prompt", "name", "reason"),
    [
        ("class Solution:\n  def f(self, x: List[int]) -> Optional[int]:\n    return ["
         + ",".join(NAMES.split()) + "] and 8", "", "f", RIGHT),
        ("def f(x): return pow(x, 3, 5) + 5", "", "f", RIGHT),
        ("def f(x): return gcd", "gcd = 8", "f", RIGHT), ("gcd = 8\ndef f(x): return gcd", "", "f", RIGHT),
        ("class Solution:\n  def gcd(self, x): return 8", "", "gcd", RIGHT),
        ("class Solution:\n  def print(self, x): return 8", "", "print", RIGHT),
        ("", "", "gcd", "raised AttributeError in test 1"),
        ("def f(x): return 8", "Write f, please!", "f", RIGHT),
        ("from __future__ import annotations\ndef f(x: Nothing): return 8", "", "f", RIGHT),
    ],
)
def test_the_usual_names_are_there_and_override_nothing(source, prompt, name, reason):
    assert run_code(source, calls((2, 8), name=name), prompt=prompt).reason == reason

def test_every_plain_type_crosses_the_pipe():
    values = [None, True, 0, -(10**30), 0.1, -0.0, 1e300, INF, "\udcff\0é\n", [[], [1, [2]]], (1, (2,)),
              {1, 2}, set(), frozenset(), {"a": [1], (1, 2): {3: 4}, None: ()}, {"set": [1]}, {"dict": []}]
    assert run_code("def f(x): return x", calls(*((value, value) for value in values))).reason == "passed"
    kinds = calls(*((value, type(value).__name__) for value in values))
    assert run_code("def f(x): return type(x).__name__", kinds).reason == "passed"
    for kind, expected in [("Counter", {"a": 2, "b": 1}), ("OrderedDict.fromkeys", {"a": None, "b": None})]:
        assert run_code(f"import collections\nf = collections.{kind}", calls(("aab", expected))).score == 1

def test_large_tests():
    long = "x" * (10 << 20)
    assert run_code("print(len(input()))", [{"input": long, "output": str(len(long))}]).reason == "passed"
    assert run_code("f = len", calls((long, len(long)))).reason == "passed"
    numbers = list(range(3 * 10**5))
    assert run_code("f = sorted", calls((numbers, numbers))).reason == "passed"

@pytest.mark.parametrize("body", ["os._exit(0)", "os.closerange(0, 9)", "os.close(4)", "time.sleep(9)"])
def test_a_large_test_for_a_program_that_does_not_listen(body):
    start = time.perf_counter()
    tests = calls(("x", 1), ("x" * (5 << 20), 1))
    assert run_code(f"import os, time\ndef f(x):\n  {body}\n  return 1", tests, seconds=0.2).score == 0
    assert time.perf_counter() - start < 4 * 0.2 + 0.5 + 0.3  # to prepare the tests

@pytest.mark.parametrize(
    ("source", "expected", "reason"),
    [
        (f"print('x' * {OUTPUT - 1})", "x" * (OUTPUT - 1), RIGHT),
        (f"print('x' * {OUTPUT - 1} + ' ')", "", "output limit"),
        (f"import os\nos.write(1, b'x' * {OUTPUT + 5})", "", "output limit"),
        (f"print(chr(233) * {OUTPUT // 2 - 1})", "", WRONG),
        (f"print('a' + chr(233) * {OUTPUT // 2})", "", "output limit"),
        ("import sys\nsys.stdout.buffer.write(bytes(range(256)) * 99)", "", WRONG),
        ("import sys\nsys.stdout.buffer.write('é'.encode() + b'\\xff\\x80')", "é\udcff\udc80\n", RIGHT),
    ],
)
def test_output_up_to_the_limit(source, expected, reason):
    assert run_code(source, [{"input": "", "output": expected}]).reason == reason

# 3. How results are compared --------------------------------------------------------------------------------

SAME_OUTPUT = [
    ("3", "3\n"), ("3 \t\r\n\n \n", "3"), ("", ""), ("\n", ""), ("a b\nc", "a b  \nc\n"), ("\n1", "\n1"),
    ("0.3333333333333333", "0.333333333"), ("3", "3.0"), ("1e3", "1000.0"), ("1000000.4", "1000000.0"),
    ("0.0000009", "0.0"), ("-0.0", "0.0"), ("x = 0.50000001", "x = 0.5"), ("1 2.00 a", "1 2.0 a"),
    ("nan", "nan"), ("1e999", "1e999"), (".5", "0.5"), ("+1.0", "1.0"), ("a\u2028b", "a\u2028b"),
]
OTHER_OUTPUT = [
    ("3", "4"), ("", "3"), ("3", ""), ("3\n3", "3"), (" 3", "3"), ("\n3", "3"), ("a  b", "a b"), ("A", "a"),
    ("a\tb", "a b"), ("a\n\nb", "a\nb"), ("0.51", "0.50"), ("3.0", "3"), ("3.0000001", "3"), ("1e0", "1"),
    ("03", "3"), ("1000001.1", "1000000.0"), ("0.000002", "0.0"), ("0.333", "0.333333333"), ("nan", "1.0"),
    ("1.0", "nan"), ("inf", "1e308"), ("1e308", "inf"), ("5", "1e999"), ("1e999", "5.0"), ("1e999", "2e999"),
    ("-inf", "inf"), ("1e9999999", "1.0"), ("1.0", "1e99999"), ("1_0.0", "10.0"), ("\u0661.0", "1.0"),
    ("a\u2028b", "a\nb"), ("a\x0cb", "a\nb"), ("a\x85", "a\n"), ("a\u2028", "a"), ("a\xa0", "a"),
    ("0x1.8p0", "1.5"), ("1.5,", "1.5"), ("True", "1.0"), ("1.0 2", "1.0"), ("a b", "a\nb"),
]
SAME_VALUE = [
    (1, 1), (1, 1.0), (1.0, 1.0), (0.1 + 0.2, 0.3), (NAN, NAN), (INF, INF), ((1, 2), [1, 2]), ((1,), (1,)),
    ([(1, 2)], [[1, 2]]), ({"a": 0.5}, {"a": 0.5}), ({1}, {1}), (None, None), (10**400, 10**400), ({}, {}),
    (1e-13, 0.0), (1e9 + 1, 1e9), (-0.0, 0.0), ({"a": (1,)}, {"a": [1]}), ([], []), ("a", "a"),
    ({(1, (2,)): 3}, {(1, (2,)): 3}), ({frozenset([8, 16])}, {frozenset([16, 8])}),
]
OTHER_VALUE = [
    (True, 1), (1, True), (1.0, 1), ("1", 1), (True, 1.0), (1.001, 1.0), (NAN, 1.0), (1.0, NAN),
    (INF, 1e308), (1e308, INF), (10**400, 1.0), (10**400, INF), (-(10**400), -INF), (INF, -INF),
    (1e9 + 2001, 1e9), (0.0, 1e-9), (1e-9, 0.0), (2e-9, 1e-9), ([1, 2], (1, 2)), ([1], [1, 2]),
    ({True: 1}, {1: 1}), ({1: True}, {1: 1}), ([True], [1]), ({"a": 1, "b": 2}, {"a": 1}), (None, False),
    ([], None), ({1}, [1]), ({True}, {1}), ([1.0], [1]), ("a", ["a"]), ({"a": 1}, {"b": 1}), ([[1]], [[2]]),
    ({(True,)}, {(1,)}), ({(1, True): 0}, {(1, 1): 0}), ({frozenset([True])}, {frozenset([1])}),
]

@pytest.mark.parametrize(
    ("compare", "pairs", "same"),
    [(same_output, SAME_OUTPUT, True), (same_output, OTHER_OUTPUT, False),
     (same_value, SAME_VALUE, True), (same_value, OTHER_VALUE, False)],
)
def test_results_are_compared(compare, pairs, same):
    for result, expected in pairs:
        assert compare(result, expected) is same, (result, expected)

def test_outputs_are_compared_in_linear_time():
    start = time.perf_counter()
    assert same_output("1.0 " * 100_000, "1.00 " * 100_000)
    assert not same_output("1" * 10**6 + ".0", "2" * 10**6 + ".0")
    assert not same_output(" " * 10**6 + "x", " " * 10**6 + "y")
    assert time.perf_counter() - start < 5

# 4. HumanEval's checks --------------------------------------------------------------------------------------

PROMPT = "def helper(n):\n    return n * 2\n\ndef f(n):\n    \"\"\"Twice, and one more.\"\"\"\n"
HELPED = "for i in range(5): assert abs(candidate(i) - helper(i) - 1) < 1e-6"
SAME = "def f(n): return n"

@pytest.mark.parametrize(
    ("body", "source", "reason"),
    [
        (HELPED, PROMPT + "    return helper(n) + 1", RIGHT),
        (HELPED, "def f(n):\n  return helper(n) + 1", RIGHT),
        (HELPED, "def f(n: List[int]):\n  return helper(n) + 1", RIGHT),
        (HELPED, "def helper(n): return 99\ndef f(n): return 100", WRONG),
        (HELPED, PROMPT, "the check raised TypeError in test 1"),
        (HELPED, "def f(n): return 2 * n + (n < 3)", "wrong output in test 4"),
        ("assert candidate([1], key=(3, 4)) == ([1], (3, 4))", "def f(*a, key): return (*a, key)", RIGHT),
        ("x = []; assert candidate(x) == [2] and x == []", "def f(x):\n  x.append(2)\n  return x", RIGHT),
        ("assert f(1) == candidate(1) == 1", SAME, RIGHT),
        ("assert True", "def f(n): pass", "the check never calls its candidate"),
        ("print('noise'); assert candidate(1) == 1", SAME, RIGHT),
        ("try: candidate(1)\n  except: pass", "def f(n): 1 / 0", "raised ZeroDivisionError in test 1"),
        ("candidate(1); import sys; sys.exit()", SAME, "the check raised SystemExit in test 1"),
        ("candidate(1)\n  while True: pass", SAME, "time limit"),
        ("while True:\n    try: candidate(1)\n    except: pass", "def f(): 1", "raised TypeError in test 1"),
        ("assert 0 < 10 ** 10 ** candidate(1)", "def f(n): return 9", "time limit"),
        ("assert candidate(range(3)) == 3", "def f(n): return len(n)",
         "unknown: the check passes data of type range"),
        ("assert candidate(max, [1, 2]) == 2", "def f(key, n): return key(n)",
         "unknown: the check passes data of type builtin_function_or_method"),
    ],
)
def test_checks(body, source, reason):
    test = f"def check(candidate):\n  {body}"
    seconds = 0.2 if reason == "time limit" else 3
    start = time.perf_counter()
    verdict = run_code(source, test, entry_point="f", prompt=PROMPT, seconds=seconds)
    score = None if "unknown" in reason else float(reason == "passed")
    assert (verdict.reason, verdict.score) == (reason, score)
    assert time.perf_counter() - start < 4 * seconds + 0.5

# 5. Limits --------------------------------------------------------------------------------------------------

def test_all_tests_count_and_samples_depend_on_the_seed_alone():
    tests = [{"input": str(i), "output": "0" if i == 7 else str(i)} for i in range(20)]
    assert run_code("print(input())", tests).reason == "wrong output in test 8"
    assert run_code("print(input())", tests, limit=20).reason == "wrong output in test 8"
    assert run_code("print(input())", tests, limit=2, seed=0).reason == "passed"
    firsts = set()
    for seed in range(5):
        random.seed(seed)  # which must not matter
        drawn = {run_code("1 / 0", tests, limit=2, seed=seed).reason for _ in range(2)}
        assert len(drawn) == 1
        firsts |= drawn
    assert len(firsts) > 2

BUSY = "import time\nwhile time.process_time() < {}: pass\nprint(1)"

def test_processor_time_is_what_counts():
    """Whatever else runs: twice as many jobs as cores, in two processes that do not know of each other."""
    script = f"import sandbox\nprint(sandbox.run_code({BUSY.format(0.5)!r}, {ONE}, seconds=0.8).reason)"
    cores = os.cpu_count() or 1
    others = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=FOLDER)
              for _ in range(cores)]
    start = time.perf_counter()
    with ThreadPoolExecutor(2 * cores) as pool:
        verdicts = list(pool.map(lambda _: run_code(BUSY.format(0.5), ONE, seconds=0.8), range(2 * cores)))
    assert [verdict.reason for verdict in verdicts] == ["passed"] * 2 * cores
    assert all(verdict.seconds < 4 * 0.8 + 0.5 for verdict in verdicts)  # waiting for a core does not count
    assert time.perf_counter() - start > 2 * 0.5  # or the programs did not use what they say
    assert [process.communicate()[0] for process in others] == ["passed\n"] * cores

@needs_sandbox
def test_never_more_programs_than_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    most = 0
    with ThreadPoolExecutor(8) as pool:
        source = "import time\ntime.sleep(0.1)\nprint(1)"
        running = [pool.submit(run_code, source, ONE, seconds=1) for _ in range(8)]
        while not all(future.done() for future in running):
            most = max(most, len(list(tmp_path.iterdir())))
    assert 0 < most <= len(os.sched_getaffinity(0))
    assert [future.result().reason for future in running] == ["passed"] * 8

@pytest.mark.parametrize(
    ("source", "tests", "least"),
    [
        (BUSY.format(0.15), ONE * 3, 0.2),  # of all tests together
        ("while True: pass", ONE, 0.3),
        ("import threading\nfor _ in range(3):\n"
         "  threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()", ONE, 0.3),
        ("import time\ntime.sleep(60)", ONE, 4 * 0.3),
    ],
)
def test_a_program_ends_after_its_time(source, tests, least):
    start = time.perf_counter()
    assert run_code(source, tests, seconds=0.3).reason == "time limit"
    assert least < time.perf_counter() - start < 4 * 0.3 + 0.5

@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("for i in range(999): open(str(i), 'w').close()\nprint(1)", RIGHT),
        ("for i in range(1100): open(str(i), 'w').close()\nprint(1)", "disk limit"),
        ("for i in range(7): open(str(i), 'wb').write(bytes(8 << 20))\nprint(1)", RIGHT),
        ("for i in range(9): open(str(i), 'wb').write(bytes(8 << 20))\nprint(1)", "disk limit"),
        ("import threading, time\nthreading.stack_size(1 << 16)\n"
         "for _ in range(400): threading.Thread(target=time.sleep, args=(9,)).start()", "thread limit"),
        ("x = bytearray(900 << 20)\nprint(1)", RIGHT),
        ("x = bytearray(1100 << 20)\nprint(1)", "memory limit"),
        ("f = open('x', 'wb')\nf.write(bytes(9 << 20))\nprint(1)", "raised OSError in test 1"),
        ("import os\nfor i in range(3000):\n  os.mkdir('d')\n  os.chdir('d')", "disk limit"),
        ("import os\nfor n in [63] * 15 + [12]:\n  os.mkdir('\U0001f600' * n)\n  os.chdir('\U0001f600' * n)\n"
         "open('\U0001f600' * 63, 'w')", "disk limit"),  # 1,000 characters, 4,000 bytes
        ("import itertools, os, threading\nos.mkdir('0')\ninner = os.open('0', os.O_RDONLY)\n"
         "def fill():\n  for i in itertools.count():\n    fd = os.open(str(i), 1 | 64, dir_fd=inner)\n"
         "    os.write(fd, bytes(1 << 20)); os.close(fd)\nthreading.Thread(target=fill).start()\n"
         "for i in itertools.count(): os.rename(str(i), str(i + 1))", "disk limit"),
        ("import os\nos.umask(0o777)", "raised OSError in test 1"),
        ("import os, tempfile\nassert os.listdir('.') == []\nd = tempfile.mkdtemp()\nos.umask(0o077)\n"
         "os.rename(d, 'e')\nos.symlink('e', 'f')\nassert sorted(os.listdir('.')) == ['e', 'f']\nprint(1)",
         RIGHT),
    ],
)
def test_resources(body, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_code(body, ONE, seconds=5).reason == reason
    assert list(tmp_path.iterdir()) == []

# 6. Attacks -------------------------------------------------------------------------------------------------

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

def all_gone(text, seconds=1):
    """Whether these processes have ended, for which the killed may need a moment."""
    deadline = time.monotonic() + seconds
    while (left := processes(text)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not left

@pytest.fixture(scope="module")
def readable():
    """A folder that every user may look into, with a copy of sandbox.py and an empty folder to work in."""
    folder = Path(tempfile.mkdtemp(prefix="readable-", dir="/tmp"))
    shutil.copy(sandbox.__file__, folder)
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)

def run_as(user, folder, script, stdin=""):
    """What a script prints, run as this or an ordinary user, in fresh folders that it must leave empty."""
    others = {"user": 65534, "group": 65534, "extra_groups": []} if user != "this user" else {}
    if others and os.getuid():
        pytest.skip("the tests already run as an ordinary user")
    # In memory where possible: a disk that others keep busy may take a second to delete 1,000 folders.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
    places = [tempfile.mkdtemp(prefix="attacks-", dir=memory) for _ in range(2)]
    for place in places:
        os.chown(place, others.get("user", -1), others.get("group", -1))
    environment = {"PATH": os.environ["PATH"], "TMPDIR": places[1]}
    for python in [sys.executable, os.path.realpath(sys.executable), "/usr/bin/python3"]:
        try:
            subprocess.run([python, "-c", "import ctypes, concurrent.futures"], check=True, **others)
        except (OSError, subprocess.CalledProcessError):
            continue
        done = subprocess.run([python, "-c", script, folder], input=stdin, capture_output=True, text=True,
                              cwd=places[0], env=environment, **others)
        assert done.returncode == 0, done.stderr
        assert all_gone(places[1]) and os.listdir(places[0]) == os.listdir(places[1]) == []
        for place in places:
            os.rmdir(place)
        return done.stdout
    pytest.skip("no Python that an ordinary user may run")

@pytest.fixture(scope="module", params=["this user", "an ordinary user"])
def attacked(request, readable):
    """The verdicts on all attacks, {(attack, mode): (score, reason, seconds)}, of one user."""
    if MISSING:
        pytest.skip(f"no isolation here: {MISSING}")
    # An ordinary user does without the check: it differs from a function in the referee only.
    modes = list(MODES) if request.param == "this user" else ["program", "function"]
    keys = list(itertools.product(ATTACKS, modes))
    jobs = [[attack_source(name) + MODES[mode][0], MODES[mode][1]] for name, mode in keys]
    verdicts, growth = json.loads(run_as(request.param, readable, RUNNER, stdin=json.dumps([jobs, SECONDS])))
    assert growth < 50_000  # KiB of the caller's memory
    return dict(zip(keys, verdicts))

@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name, attacked):
    for mode in MODES:
        score, reason, took = attacked.get((name, mode), (0, "not tried", 0))
        assert score == 0 and reason != "passed", (mode, reason)
        assert took < 4 * SECONDS + 0.5, (mode, reason, took)
    outside = ["/", "/tmp", "/var/tmp", "/dev/shm", "/root", "/home", "/srv", "/etc", "/usr/lib", "/lib"]
    assert not [path for top in outside for path in Path(top).glob(f"marked-{os.getpid()}*")]

@pytest.mark.parametrize("name", ["all objects", "devices"])
def test_attacks_can_succeed_without_the_walls(name):
    """They find the secret, or the device: otherwise the attacks above would show nothing."""
    names = {}
    exec(attack_source(name), names)
    assert names["f"](1) == SECRET

@pytest.mark.parametrize("forged", [[None, "30"], ["unknown: x", ""], 5, {"bytes": 5}, {"dict": 1}, {}, [[]]])
def test_a_right_program_that_forges_what_comes_next(forged):
    source = f"{TOTAL}\nimport os, sys\nsys.stdout.flush()\nfor fd in range(3, 20):\n  try: "
    source += f"os.write(fd, {json.dumps(forged).encode()!r} + b'\\n')\n  except OSError: pass\n1 / 0"
    assert run_code(source, ADD, seconds=3).score == 0

SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.just(1j)
KEYS = st.text() | st.integers()
VALUES = st.recursive(SIMPLE, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner)
                      | st.tuples(inner, inner), max_leaves=9)

@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.characters(), max_size=60), st.text(max_size=9), VALUES)
@example("import os; os._exit(0)", "", {"tuple": []})
@example("print(1)\n```\n```", "\ud800", {"set": {"dict": None}})
def test_nothing_but_value_errors_leaves_run_code(source, text, value):
    for tests in ([{"input": text, "output": text}], calls((value, value)), value, [value],
                  {"inputs": value, "outputs": [value]}, [{"fn_name": text, "args": value, "expected": 1}]):
        for code in (source, f"def f(x):\n  return x, {source}"):
            try:
                verdict = run_code(code, tests, seconds=5, prompt=text, entry_point="f")
            except ValueError as error:
                assert str(error).startswith("tests: ")
            else:
                assert verdict.score in (0, 1) and verdict.reason

# 7. What is not the program's fault -------------------------------------------------------------------------

@pytest.fixture
def fresh_probe(monkeypatch):
    """As in a process that has not yet looked which walls there are."""
    sandbox.sandbox_walls.cache_clear()
    yield
    monkeypatch.undo()
    sandbox.sandbox_walls.cache_clear()

@pytest.mark.parametrize("probed", [True, False])
@pytest.mark.parametrize(
    ("module", "name", "error"),
    [(subprocess, "Popen", BlockingIOError(11, "no more")), (subprocess, "Popen", MemoryError()),
     (tempfile, "mkdtemp", OSError(28, "No space")), (tempfile, "mkdtemp", FileNotFoundError(2, "no such"))],
)
def test_unknown_without_a_process_or_folder(fresh_probe, monkeypatch, module, name, error, probed):
    def fail(*_, **__):
        raise error

    if probed:
        sandbox.sandbox_walls()
    monkeypatch.setattr(module, name, fail)
    verdict = run_code("print(1)", ONE)
    assert verdict.score is None and verdict.reason == f"unknown: {type(error).__name__}: {error}"
    monkeypatch.undo()
    assert run_code("print(1)", ONE).score == 1  # and the failure is not remembered

UNDER_NPROC = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
import sandbox
sandbox.sandbox_walls()
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
    assert all(score is None or reason == "passed" for _, score, reason in found), found
    assert [score for most, score, _ in found if most < 3] == [None] * 6
    assert [score for most, score, _ in found if most == 99] == [1, 1]

@pytest.mark.parametrize("entries", [1, 2, 3])  # the mounted folder, the job's folder, its program
def test_unknown_on_a_full_disk(tmp_path, monkeypatch, entries):
    command = ["mount", "-t", "tmpfs", "-o", f"nr_inodes={entries}", "tmpfs", tmp_path]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        verdict = run_code("print(1)", ONE)
        assert verdict.score is None and "No space left" in verdict.reason
    finally:
        subprocess.run(["umount", tmp_path], check=True)

@pytest.mark.parametrize("which", [0, 1])  # the referee, the launcher
@pytest.mark.parametrize("tests", [ONE, "def check(candidate):\n    candidate()\n"])
def test_no_verdict_without_a_fault_of_the_machine(monkeypatch, tmp_path, tests, which):
    def kill():
        while len(found := sorted(processes(str(tmp_path)))) != 3:  # referee, launcher, player
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(found[which], signal.SIGKILL)

    sandbox.sandbox_walls()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    thread = threading.Thread(target=kill)
    thread.start()
    source = "def f():\n  while True: pass\nif __name__ == '__main__': f()"
    verdict = run_code(source, tests, seconds=5, entry_point="f")
    thread.join()
    assert (verdict.score, verdict.reason) == (0, "died")  # as the probe finds everything as it was
    assert verdict.seconds < 5 and all_gone(str(tmp_path)) and not list(tmp_path.iterdir())

@pytest.mark.parametrize("starved", [False, True])
def test_no_verdict_on_a_machine_in_trouble(monkeypatch, starved):
    sandbox.sandbox_walls()
    kills = itertools.count() if starved else itertools.repeat(0)
    monkeypatch.setattr(sandbox, "out_of_memory_kills", lambda: next(kills))
    monkeypatch.setattr(subprocess.Popen, "communicate", lambda *_: (b"", None))
    reason = "the machine ran out of memory" if starved else "no program runs any more"
    assert run_code("print(1)", ONE)[:2] == (None, f"unknown: {reason}")

def test_a_referee_ends_if_its_caller_ended_before_it_started(monkeypatch):
    sandbox.sandbox_walls()
    monkeypatch.setattr(os, "getpid", lambda: 1)  # not the referee's parent
    assert run_code("print(1)", ONE)[:2] == (None, "unknown: no program runs any more")

@needs_sandbox
@pytest.mark.parametrize("source", ["while True: pass", "import time\ntime.sleep(99)", "def f(): return 1"])
def test_no_process_outlives_a_caller_that_is_killed(source, tmp_path):
    check = "def check(candidate):\n    candidate()\n    while True: pass\n"
    tests = check if "def f" in source else ONE
    script = f"import sandbox\nsandbox.run_code({source!r}, {tests!r}, entry_point='f', seconds=30)"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    caller = subprocess.Popen([sys.executable, "-c", script], cwd=FOLDER, env=environment)
    while len(processes(str(tmp_path))) != 3:
        time.sleep(0.01)
    time.sleep(0.1)
    caller.kill()
    caller.wait()
    assert all_gone(str(tmp_path))

# 8. Many at once, and platforms without walls ---------------------------------------------------------------

@pytest.fixture
def altered(tmp_path):
    """A copy of sandbox.py, changed in one place, as a function that runs a script beside it."""

    def run(old, new, script):
        text = Path(sandbox.__file__).read_text()
        assert text.count(old) == 1
        (tmp_path / "sandbox.py").write_text(text.replace(old, new))
        return python(script, tmp_path)

    return run

VERSION = 'version = libc("syscall", 444, None, 0, 1)'

@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (VERSION, 'version = libc("syscall", 999, None, 0, 1)', "Landlock ("),
        ('"seccomp": filter_calls', '"seccomp": id', "raised os_fork"),
        ('"Landlock": restrict_files', '"Landlock": id', "raised open"),
    ],
)
def test_without_walls_it_refuses_or_is_told_to_run(altered, tmp_path, old, new, named):
    loop = "import os\nopen('x', 'w')\nos.setpgid\nwhile True: pass"
    script = f"""
import sandbox
for _ in range(2):
    try: print("ran", sandbox.run_code("print(3)", {ADD!r}))
    except ValueError as error: print(error)
print(sandbox.run_code({TOTAL!r}, {ADD!r}, unsafe=True).reason)
verdict = sandbox.run_code({loop!r}, {ADD!r}, seconds=0.3, unsafe=True)
print(verdict.reason, verdict.seconds < 4 * 0.3 + 0.5)
"""
    first, second, right, late = altered(old, new, script).splitlines()
    assert first == second and all(text in first for text in ("isolate", named, "--unsafe-local-execution"))
    assert (right, late) == ("passed", "time limit True") and all_gone(str(tmp_path))

@needs_sandbox
@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6])
def test_older_versions_of_landlock(altered, version):
    source = "\n".join(attack_source(name) + "assert f(1) is None" for name in ("libraries", "devices"))
    script = f"import sandbox\nprint(sandbox.require_sandbox())\nsource = {source!r} + '\\nprint(1)'\n"
    script += f"print(sandbox.run_code(source, {ONE!r}).reason)"
    found = altered(VERSION, f'version = min({version}, libc("syscall", 444, None, 0, 1))', script)
    assert found.splitlines()[-1] == "passed"

@pytest.mark.parametrize("missing", ["resource", "_ctypes", "fcntl"])
def test_importing_it_elsewhere(missing):
    script = f"""
import sys
sys.modules[{missing!r}] = None
sys.platform = "darwin"
for name in ("sched_getaffinity", "memfd_create", "waitid"): delattr(__import__("os"), name)
import sandbox
for unsafe in (False, True):
    try: print(sandbox.run_code("print(1)", {ONE!r}, unsafe=unsafe))
    except ValueError as error: print(error)
"""
    first, second = python(script, FOLDER).splitlines()
    assert first == second and "cannot isolate" in first and "darwin" in first and "--unsafe" not in first

@needs_sandbox
def test_a_caller_may_ignore_signals():
    script = "import signal, sandbox\nfor name in ('SIGCHLD', 'SIGTERM', 'SIGUSR1'):\n"
    script += "  signal.signal(getattr(signal, name), signal.SIG_IGN)\n"
    assert python(script + f"print(sandbox.run_code('print(1)', {ONE!r}).reason)", FOLDER) == "passed"

@needs_sandbox
def test_it_is_found_from_another_folder(readable):
    script = "import os, sys\nsys.path.insert(0, '.')\nimport sandbox\nos.chdir('/')\n"
    script += f"print(sandbox.run_code('print(1)', {ONE!r}).reason)"
    assert python(script, readable) == "passed"
