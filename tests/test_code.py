"""Tests of eval.py's verifier of code: what passes, what does not, and programs that try everything else."""

import json
import os
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import data
import eval as ev

MISSING = [f"{name}: {why}" for name, why in ev.sandbox_layers().items() if why != "on"]
needs_sandbox = pytest.mark.skipif(bool(MISSING), reason=f"no isolation here: {MISSING}")

# Finding the code -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("So:\n```python\nprint(1)\n```\nDone.", ("python", "print(1)\n")),
        ("```\nx\n```", ("python", "x\n")),
        ("```Py\nx\n```", ("python", "x\n")),
        ("```{.python title=a}\nx\n```", ("python", "x\n")),
        ("~~~python3\nx\n~~~~", ("python", "x\n")),
        ("````python\ns = '''\n```\n'''\n````", ("python", "s = '''\n```\n'''\n")),
        ("```python\na\n```\n```python\nb\n```", ("python", "b\n")),
        ("```python\na\n```\n```bash\nls\n```", ("python", "a\n")),
        ("```c++\nx\n```", ("c++", "x\n")),
        ("1. As follows\n   ```python\n   if x:\n       y\n   ```", ("python", "if x:\n    y\n")),
        ("```python\r\nx\r\n```\r\n", ("python", "x\n")),
        ("```python\ncut o", None),
        ("```python\nwhole\n```\n```python\ncut o", ("python", "whole\n")),
        ("print(1)", None),
        ("", None),
        ("<think>\n```python\na\n```\n</think>\n```python\nb\n```", ("python", "b\n")),
        ("<think>\n```python\na\n```\n</think>\nnone", None),
        ("<think>\n```python\na\n```", None),
        ("```python\n```", ("python", "\n")),
    ],
)
def test_extract_code(text, found):
    assert ev.extract_code(text) == found


def test_extract_code_takes_linear_time():
    start = time.perf_counter()
    assert ev.extract_code("```\n" * 200_001) == ("python", "\n")
    ev.extract_code("`" * 500_000)
    assert time.perf_counter() - start < 5


# Reading tests --------------------------------------------------------------------------------------------------------

CHECK = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(5) == 6\n"


def test_check_tests_reads_every_shape():
    program = {"kind": "stdin", "tests": [(1, "1\n2", "3"), (2, "", "4")]}
    assert ev.check_tests([{"input": ["1", "2"], "output": "3"}, {"input": "", "output": "4"}], "x") == program
    assert ev.check_tests({"inputs": ["1\n2", ""], "outputs": ["3", "4"]}, "x") == program
    calls = {"kind": "calls", "tests": [(1, "f", [1], [2])]}
    assert ev.check_tests([{"fn_name": "f", "args": [1], "expected": 2}], "x") == calls
    assert ev.check_tests([{"call": "f", "args": [1], "expected": 2}], "x") == calls
    assert ev.check_tests({"inputs": [[1]], "outputs": [2], "fn_name": "f"}, "x") == calls
    wrapped = ev.check_tests({"inputs": [[1]], "outputs": [[2]], "fn_name": "f"}, "x")
    assert wrapped["tests"] == [(1, "f", [1], [[2], 2])]
    assert ev.check_tests(CHECK, "x", "f")["kind"] == "check"


@pytest.mark.parametrize(
    ("tests", "entry_point", "error"),
    [
        ([], "", "no tests"),
        (None, "", "no tests"),
        (7, "", "unknown kind of tests: '7'"),
        ([1], "", "unknown kind"),
        ("assert f(1) == 2", "f", "must define check"),
        (CHECK, "", "entry_point"),
        (CHECK, "a.b", "entry_point"),
        (CHECK, None, "entry_point"),
        ({"inputs": ["1"]}, "", "inputs and outputs"),
        ({"inputs": ["1"], "outputs": []}, "", "same length"),
        ({"inputs": [1], "outputs": ["1"]}, "", "must be text, not '1'"),
        ([{"input": "1", "output": "1"}, {"input": "1"}], "", "test 1 has neither"),
        ([{"fn_name": "f", "args": [1], "expected": 1}, {"fn_name": "f", "args": 1, "expected": 1}], "", "test 2"),
        ([{"fn_name": "f g", "args": [1], "expected": 1}], "", "test 1"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}, "", "test 1"),
        ([{"fn_name": "f", "args": [print], "expected": 1}], "", "type builtin_function_or_method"),
    ],
)
def test_check_tests_names_what_is_wrong(tests, entry_point, error):
    with pytest.raises(ValueError, match=f"^problem 7: .*{error}"):
        ev.check_tests(tests, "problem 7", entry_point)


# What passes ----------------------------------------------------------------------------------------------------------

ADD = [{"input": "1 2\n", "output": "3\n"}, {"input": "10 20", "output": "30"}]


@needs_sandbox
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("a, b = map(int, input().split())\nprint(a + b)", "passed"),
        ("import sys\nsys.stdout.write(f'{sum(map(int, sys.stdin.read().split()))}   \\n\\n')", "passed"),
        ("import os\nos.write(1, b'%d' % sum(map(int, os.read(0, os.fstat(0).st_size).split())))", "passed"),
        ("print(sum(map(int, open(0).read().split())))\nraise SystemExit(1)", "passed"),
        ("if __name__ == '__main__': print(sum(map(int, input().split())))", "passed"),
        ("import threading\nthreading.Thread(target=lambda: print(sum(map(int, input().split())))).start()", "passed"),
        ("import atexit\natexit.register(lambda: print(sum(map(int, input().split()))))", "passed"),
        ("import dataclasses, pickle\n@dataclasses.dataclass\nclass A:\n  x: int\n"
         "print(pickle.loads(pickle.dumps(A(sum(map(int, input().split()))))).x)", "passed"),
        ("import re, heapq, bisect, decimal, datetime, functools, itertools, random, string, tempfile\n"
         "with tempfile.TemporaryFile('w+') as f:\n  print(input(), file=f); f.seek(0)\n"
         "  print(sum(map(int, f.read().split())))", "passed"),
        ("import sys\nsys.setrecursionlimit(10**6)\nf = lambda n: n and 1 + f(n - 1)\n"
         "print(f(50_000) - 50_000 + sum(map(int, input().split())))", "passed"),
        ("from concurrent.futures import ThreadPoolExecutor as T\nimport time\n"
         "list(T(40).map(time.sleep, [0.1] * 40))\nprint(sum(T(1).map(int, input().split())))", "passed"),
        ("print(3)", "wrong output in test 2"),
        ("print('3', 30)", "wrong output in test 1"),
        ("print(sum(map(int, input().split())), file=__import__('sys').stderr)", "wrong output in test 1"),
        ("", "wrong output in test 1"),
        ("print(sum(map(int, input().split())))\n1 / 0", "raised ZeroDivisionError in test 1"),
        ("1 +", "raised SyntaxError in test 1"),
        ("input(); input()", "raised EOFError in test 1"),
        ("x = '\0'", "raised SyntaxError in test 1" if sys.version_info >= (3, 11, 4) else "raised ValueError in test 1"),
        ("x = '\udcff'", "raised UnicodeEncodeError in test 1"),
        ("x = [0] * 10**10", "memory limit"),
        ("while True: print('x' * 1000)", "output limit"),
        ("import os\nprint(sum(map(int, input().split())), flush=True)\nos._exit(0)", "died"),
        ("import os\nos.abort()", "died"),
    ],
)
def test_programs(source, reason):
    assert ev.run_code(source, ADD, seconds=5).reason == reason


@needs_sandbox
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f(x): return x + 1", "passed"),
        ("class Solution:\n  def f(self, x): return x + 1", "passed"),
        ("def f(x):\n  print('seen', x)\n  return x + 1\nif __name__ == '__main__': 1 / 0", "passed"),
        ("def f(x): return 2", "wrong output in test 2"),
        ("def f(x): return x + 1.0", "wrong output in test 1"),
        ("def f(x): return str(x + 1)", "wrong output in test 1"),
        ("def f(x): return [2, 6]", "wrong output in test 1"),
        ("def f(x): return 1 / 0", "raised ZeroDivisionError in test 1"),
        ("def f(x): exit()", "raised NameError in test 1"),  # site, which defines it, is not there
        ("def f(x): raise SystemExit", "raised SystemExit in test 1"),
        ("def f(x): raise type('a\\n\\x1b[2J', (Exception,), {})", "raised something in test 1"),
        ("def f(x, y): return 2", "raised TypeError in test 1"),
        ("def g(x): return 2", "raised KeyError in test 1"),
        ("def f(x): return lambda: 1", "raised TypeError in test 1"),
        ("def f(x): return [[]] and f(x)", "raised RecursionError in test 1"),
        ("raise SystemExit", "raised SystemExit in test 1"),
        ("def f(x):\n  a = []\n  for _ in range(60): a = [a]\n  return a", "raised ValueError in test 1"),
        ("def f(x):\n  a = []\n  a.append(a)\n  return a", "raised ValueError in test 1"),
        ("def f(x): return 10**5000", "raised ValueError in test 1"),
        ("def f(x): return [0] * 10**7", "output limit"),
    ],
)
def test_functions(source, reason):
    tests = [{"fn_name": "f", "args": [x], "expected": x + 1} for x in (1, 5)]
    assert ev.run_code(source, tests, seconds=5).reason == reason


@needs_sandbox
def test_every_plain_type_crosses_the_pipe():
    values = [None, True, 0, -(10**30), 0.1, -0.0, 1e300, float("inf"), 1 - 2j, "\udcff\0é\n", b"\0\xff", [[], [1, [2]]],
              (1, (2,)), {1, 2}, set(), frozenset("ab"), {"a": [1], (1, 2): {3: 4}, None: ()}, {"set": [1]}]
    tests = [{"fn_name": "f", "args": [value], "expected": value} for value in values]
    assert ev.run_code("def f(x): return x", tests, limit=99).reason == "passed"
    kinds = [type(value).__name__ for value in values]
    named = [{"fn_name": "f", "args": [value], "expected": kind} for value, kind in zip(values, kinds)]
    assert ev.run_code("def f(x): return type(x).__name__", named, limit=99).reason == "passed"
    counted = [{"fn_name": "f", "args": ["aab"], "expected": {"a": 2, "b": 1}}]
    assert ev.run_code("import collections\nf = collections.Counter", counted).reason == "passed"


@needs_sandbox
def test_large_tests():
    long = "x" * (20 << 20)
    assert ev.run_code("print(len(input()))", [{"input": long, "output": str(len(long))}]).reason == "passed"
    short = long[: ev.OUTPUT - 2]
    assert ev.run_code(f"print('x' * {len(short)})", [{"input": "", "output": short}]).reason == "passed"
    assert ev.run_code(f"print('x' * {ev.OUTPUT})", [{"input": "", "output": short}]).reason == "output limit"
    numbers = list(range(10**6))
    assert ev.run_code("f = sorted", [{"fn_name": "f", "args": [numbers], "expected": numbers}]).reason == "passed"


def test_same_value():
    nan = float("nan")
    for result, expected in [
        (1, 1), (1, 1.0), (1.0, 1.0), (0.1 + 0.2, 0.3), (nan, nan), (float("inf"), float("inf")), ((1, 2), [1, 2]),
        ([(1, 2)], [[1, 2]]), ({"a": 0.5}, {"a": 0.5}), ({1}, {1}), (None, None), (1j, 1j), ((1,), (1,)), (10**400, 10**400),
    ]:
        assert ev.same_value(result, expected), (result, expected)
    for result, expected in [
        (True, 1), (1, True), (1.0, 1), ("1", 1), (True, 1.0), (1.001, 1.0), (nan, 1.0), (1.0, nan), (float("inf"), 1e308),
        (10**400, 1.0), ([1, 2], (1, 2)), ([1], [1, 2]), ({True: 1}, {1: 1}), ({1: True}, {1: 1}), ({1}, frozenset({1})),
        ([True], [1]), ({"a": 1, "b": 2}, {"a": 1}), (None, False), ("a", b"a"), (float("inf"), float("-inf")), ([], None),
    ]:
        assert not ev.same_value(result, expected), (result, expected)


PROMPT = "def helper(n):\n    return n * 2\n\ndef f(n):\n    \"\"\"Twice, and one more.\"\"\"\n"
HELPED = "def check(candidate):\n    for i in range(5):\n        assert abs(candidate(i) - helper(i) - 1) < 1e-6\n"


@needs_sandbox
@pytest.mark.parametrize(
    ("test", "source", "reason"),
    [
        (HELPED, PROMPT + "    return helper(n) + 1", "passed"),
        (HELPED, "def f(n):\n  return helper(n) + 1", "passed"),
        (HELPED, "def helper(n): return 99\ndef f(n): return 100", "wrong output in test 1"),
        (HELPED, PROMPT, "the check raised TypeError in test 1"),
        (HELPED, "def f(n): return 2 * n + (n < 3)", "wrong output in test 4"),
        ("def check(candidate): assert candidate([1, 2], key=(3, 4)) == ([1, 2], (3, 4))", "def f(*a, key): return (*a, key)", "passed"),
        ("def check(candidate):\n  x = [1]\n  assert candidate(x) == [1, 2] and x == [1]",
         "def f(x):\n  x.append(2)\n  return x", "passed"),
        ("def check(candidate): assert True", "def f(n): pass", "the check never calls its candidate"),
        ("def check(candidate):\n  print('noise')\n  assert candidate(1) == 1", "def f(n): return n", "passed"),
        ("def check(candidate):\n  candidate(1)\n  while True: pass", "def f(n): return n", "time limit"),
        ("def check(candidate):\n  while True:\n    try: candidate(1)\n    except: pass", "def f(n): 1 / 0", "time limit"),
        ("def check(candidate): assert 0 < 10 ** 10 ** candidate(1)", "def f(n): return 9", "time limit"),
    ],
)
def test_checks(test, source, reason):
    start = time.perf_counter()
    verdict = ev.run_code(source, test, entry_point="f", prompt=PROMPT, seconds=1.5)
    assert (verdict.reason, verdict.score) == (reason, float(reason == "passed")) and time.perf_counter() - start < 2.5


@needs_sandbox
@pytest.mark.parametrize("forged", [["layers", {"user namespace": "off"}], ["layers"], 5, {"complex": [10**400, 0]}, {"dict": 1}, {}, [[]]])
def test_a_right_program_that_forges_what_comes_next(forged):
    source = f"""
import json, os, sys
print(sum(map(int, input().split())), flush=True)
frame, nonce = sys._getframe(), None
while frame:
    nonce = frame.f_locals.get("nonce", nonce)
    frame = frame.f_back
for body in (b'["ended"]', b'["gone", 0]', b'3', {json.dumps(forged).encode()}):
    os.write(4, nonce + len(body).to_bytes(8, "big") + body)
"""
    verdict = ev.run_code(source, ADD, seconds=3)
    assert verdict.score == 0 and verdict.reason.startswith("died") and verdict.components == {"passed": 1, "tests": 2}


@needs_sandbox
def test_tests_are_sampled():
    tests = [{"input": str(i), "output": "0" if i == 7 else str(i)} for i in range(30)]
    assert ev.run_code("print(input())", tests, limit=30).reason == "wrong output in test 8"
    verdicts = [ev.run_code("print(input())", tests, limit=2, seed=seed) for seed in range(3)]
    assert all(v.reason == "passed" and v.components == {"passed": 2, "tests": 2} for v in verdicts)


# Attacks --------------------------------------------------------------------------------------------------------------
# The right result is one no attack can compute, but many look for; `marked` is a file name that must not appear anywhere.

SECRET = "SECRET-" + "97531"
SEARCH = """
import os, sys
half = "SECRET-"
def found(text):
    text = text if isinstance(text, str) else text.decode("latin-1")
    at = text.find(half + "9")
    return text[at:at + 12] if at >= 0 else None
"""
ATTACKS = {
    "sys.exit": "import sys; sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "return None": "return None",
    "always equal": "class E:\n  __eq__ = lambda s, o: True\n  __ne__ = lambda s, o: False\n  __hash__ = lambda s: 0\nreturn E()",
    "equal int": "class E(int):\n  __eq__ = lambda s, o: True\n  __hash__ = lambda s: 0\nreturn E(5)",
    "equal str": "class E(str):\n  __eq__ = lambda s, o: True\n  __str__ = __repr__ = lambda s: s\n  __hash__ = lambda s: 0\nreturn E('x')",
    "lying type": "class E:\n  __class__ = str\n  __eq__ = lambda s, o: True\n  __hash__ = lambda s: 0\nreturn E()",
    "lying metaclass": "class M(type):\n  __eq__ = lambda s, o: True\n  __hash__ = type.__hash__\n"
                       "class E(metaclass=M):\n  __eq__ = lambda s, o: True\nreturn [E()]",
    "command line": SEARCH + "return next(filter(None, map(found, sys.argv + sys.orig_argv)), 0)",
    "environment": SEARCH + "return next(filter(None, map(found, os.environ.values())), 0)",
    "files": SEARCH + """
for top in ("/tmp", "/srv", "/home", "/root", "/var", "/dev", "/proc", "/etc", "/run", "/mnt", "/opt", "."):
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
        if hit and "SEARCH" not in hit: return hit
""",
    "/proc": SEARCH + """
for who in ("self", "1", "2", str(os.getppid())):
    for what in ("cmdline", "environ", "maps", "mem", "fd/0", "fd/3", "fd/4", "cwd", "root", "root/proc/1/environ"):
        try: hit = found(open(f"/proc/{who}/{what}", "rb").read(1 << 20))
        except OSError: continue
        if hit: return hit
""",
    "parent memory": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
done = [libc.ptrace(16, os.getppid(), 0, 0), libc.ptrace(16, 1, 0, 0), libc.process_vm_readv(1, None, 0, None, 0, 0)]
return "attached" if 0 in done else "SECRET-0"
""",
    "forged verdict": """
import json, os
for fd in range(1, 100):
    try: os.write(fd, json.dumps({"reason": "passed", "passed": 1, "layers": {"user namespace": "on"}}).encode() + b"\\n")
    except OSError: pass
""",
    "forged frames": """
import os, sys, json
frame, nonce = sys._getframe(), None
while frame:
    nonce = frame.f_locals.get("nonce", nonce)
    frame = frame.f_back
for reply in (["ended"], ["gone", 0], ["value", True], {"reason": "passed"}, ["value", {"tuple": [[]]}], ["raised", 1], []):
    body = json.dumps(reply).encode()
    os.write(4, nonce + len(body).to_bytes(8, "big") + body)
os.write(4, nonce + (1 << 60).to_bytes(8, "big"))
""",
    "deep frame": """
import os, sys
frame, nonce = sys._getframe(), None
while frame:
    nonce = frame.f_locals.get("nonce", nonce)
    frame = frame.f_back
body = b"[" * 10**6
os.write(4, nonce + len(body).to_bytes(8, "big") + body)
""",
    "closed pipes": "import os\nos.closerange(0, 100)",
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
    "fork bomb": "import os\nwhile True: os.fork()",
    "quiet fork bomb": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "raw forks": "import ctypes\nlibc = ctypes.CDLL(None)\nwhile True: libc.syscall(57), libc.syscall(56, 17, 0, 0, 0, 0), libc.syscall(435, 0, 0)",
    "thread bomb": """
import threading, time
threading.stack_size(32768)
while True:
    try: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    except RuntimeError: pass
""",
    "memory bomb": "x = []\nwhile True: x.append(bytearray(10**7))",
    "quiet memory bomb": "x = []\nwhile True:\n  try: x.append(bytearray(10**6))\n  except MemoryError: pass",
    "memory in files": "import os\nwhile True:\n  try: open(os.urandom(8).hex(), 'wb').write(bytes(10**6))\n  except OSError: pass",
    "memory in memfds": "import os\nfds = [os.memfd_create('x') for _ in range(9)]\nwhile True: [os.write(fd, bytes(10**6)) for fd in fds]",
    "huge ints": "return str(9 ** 9 ** 9)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
    "deep recursion in C": "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nreturn repr(x)",
    "infinite output": "while True: print('x' * 10**5)",
    "infinite bytes": "import os\nwhile True:\n  try: os.write(1, bytes(10**6))\n  except OSError: pass",
    "one gigabyte on one line": "import os\nprint('x' * (2**30 - 10**8))",
    "one gigabyte as result": "return 'x' * (2**30 - 10**8)",
    "bytes of no text": "import os\nos.write(1, b'\\xff\\xfe\\x80' + bytes(99))\nreturn b'\\xff\\0'.decode('latin-1')",
    "NUL": "print('\\0' * 99)\nreturn '\\0'",
    "files outside": """
import os
for top in ("/", "/tmp", "/var/tmp", "/dev/shm", "/root", "/home", "/srv", "/etc", "/usr/lib", "/lib", os.path.dirname(os.__file__), "..", "."):
    try: open(os.path.join(top, "MARKED"), "w").write("x")
    except OSError: pass
""",
    "many files": "import os\nfor i in range(10**5):\n  os.mkdir(f'MARKED-{i}')",
    "big file": "f = open('MARKED', 'wb')\nwhile True: f.write(bytes(10**6))",
    "symlinks": "import os\nos.symlink('/', 'MARKED')\nos.link('MARKED', 'again')\nreturn open('MARKED/etc/passwd').read()",
    "fifo": "import os\nos.mkfifo('MARKED')\nopen('MARKED')",
    "setsid survivor": """
import os, time
try:
    os.setsid()
    if os.fork() == 0: pass
except OSError: pass
for name in ("SIGTERM", "SIGHUP"): __import__("signal").signal(getattr(__import__("signal"), name), 1)
time.sleep(60)
""",
    "subprocess": "import subprocess\nreturn subprocess.run(['/bin/sh', '-c', 'sleep 60 &'], capture_output=True).stdout",
    "exec": "import os, sys\nos.execv(sys.executable, ['python', '-c', 'while True: pass'])",
    "signals ignored": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
    "killing": "import os, signal\nfor pid in (-1, 1, os.getppid()):\n  try: os.kill(pid, 9)\n  except OSError: pass\nwhile True: pass",
    "sleep": "import time\ntime.sleep(60)",
    "swallowed": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
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
    "ctypes": "import ctypes\nctypes.string_at(0)",
    "namespaces": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
if max(libc.unshare(0x10000000), libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.chroot(b"/tmp"), libc.setuid(0),
       libc.syscall(0x40000000 + 57), libc.setns(0, 0), libc.syscall(425, 1, None), libc.syscall(442, -100, b"/", 0, b"", 32)) >= 0:
    return "SECRET-97531"
""",
    "own folder": "import os, shutil\nos.chdir('/')\nshutil.rmtree('/tmp', ignore_errors=True)\nshutil.rmtree('/', ignore_errors=True)",
    "pickle": """
import os, pickle
class P:
    def __reduce__(self): return os.system, ("touch /tmp/MARKED",)
    __getstate__ = None
print(pickle.dumps(P()))
pickle.loads(pickle.dumps(P()))
return P()
""",
}


def processes(seconds):
    """Of ours: the settings on the command line, which forks share, hold this number."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if b"marshal" in line and f" {seconds}, ".encode() in line:
            found.append(path)
    return found


@needs_sandbox
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seconds, marked = 0.5 + list(ATTACKS).index(name) / 1e4, f"marked-{os.getpid()}"
    body = ATTACKS[name].replace("MARKED", marked).replace("SECRET-97531", "SECRET-9" + "7531")
    source = "def f(x):\n" + "".join(f"    {line}\n" for line in body.splitlines()) + "\n"
    modes = [
        ("print(f(1))", [{"input": "1", "output": SECRET}, {"input": "2", "output": SECRET}], ""),
        ("", [{"fn_name": "f", "args": [1], "expected": SECRET}, {"fn_name": "f", "args": [2], "expected": SECRET}], ""),
        ("", f"def check(candidate):\n    assert candidate(1) == {SECRET!r}\n    assert candidate(2) == {SECRET!r}\n", "f"),
    ]

    def attack(mode):
        extra, tests, entry_point = mode
        start = time.perf_counter()
        return ev.run_code(source + extra, tests, entry_point=entry_point, seconds=seconds), time.perf_counter() - start

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ThreadPoolExecutor(3) as pool:
        for verdict, took in pool.map(attack, modes):
            assert verdict.score == 0 and verdict.reason != "passed", verdict
            assert took < seconds + 1, (took, verdict)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
    assert not processes(seconds)
    outside = [Path(top) / marked for top in ("/", "/tmp", "/var/tmp", "/dev/shm", "/root", "/home", "/etc", "/usr/lib", "/lib", "..")]
    assert not any(path.is_symlink() or path.exists() for path in outside) and not list(tmp_path.iterdir())


@needs_sandbox
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.characters(), max_size=60), st.text(max_size=9), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner), max_leaves=9))
@example("import os; os._exit(0)", "", {"tuple": []})
@example("print(1)\n```\n```", "\ud800", {"set": {"dict": None}})
def test_nothing_leaves_the_verifier(source, text, value):
    for tests in ([{"input": text, "output": text}], [{"call": "f", "args": [value], "expected": value}]):
        for code in (source, f"def f(x):\n  return x, {source}", f"print({source!r})"):
            problem = data.Problem("1", "code", "q", "", {"tests": tests})
            verdict = ev.verify_code(f"```python\n{code}\n```", problem, seconds=5)
            assert verdict.score in (0, 1) and verdict.reason and json.dumps(verdict.components)
    ev.extract_code(source)
    ev.extract_code(text.join(["```", "~~~", "```"]))


# Many at once, and platforms without walls ----------------------------------------------------------------------------


def reply(code, language="python"):
    return f"<think>Hm.</think>Here it is.\n```{language}\n{code}\n```\n"


@needs_sandbox
def test_one_that_hangs_delays_nobody():
    problem = data.Problem("1", "code", "Add.", "", {"tests": ADD})
    good, hangs = reply("print(sum(map(int, input().split())))"), reply("import time\ntime.sleep(60)")
    texts = [good, hangs, "none", reply("print(3)"), reply("int main", "c")] + [good] * 20
    start = time.perf_counter()
    verdicts = ev.verify_many([(text, problem) for text in texts], seconds=4)
    assert time.perf_counter() - start < 5
    reasons = ["passed", "time limit", "no code", "wrong output in test 2", "language not supported: c"] + ["passed"] * 20
    assert [v.reason for v in verdicts] == reasons and [v.score for v in verdicts] == [float(r == "passed") for r in reasons]


@needs_sandbox
def test_humaneval_reply_needs_no_imports_of_the_prompt():
    problem = data.Problem("1", "code", "from typing import List\n" + PROMPT, "", {"tests": HELPED, "entry_point": "f"})
    assert ev.verify_code(reply("def f(n: List) -> List:\n    return helper(n) + 1"), problem).reason == "passed"
    words = data.Problem("1", "code", "Write f, please!", "", {"tests": CHECK, "entry_point": "f"})
    assert ev.verify_code(reply("from __future__ import annotations\ndef f(n): return n + 1"), words).reason == "passed"


@pytest.fixture
def no_namespaces(monkeypatch):
    monkeypatch.setattr(ev, "NAMESPACES", {name: 1 for name in ev.NAMESPACES})  # flags that unshare() refuses
    ev.child_program.cache_clear()
    ev.sandbox_layers.cache_clear()
    yield
    monkeypatch.undo()
    ev.child_program.cache_clear()
    ev.sandbox_layers.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's namespaces")
def test_without_namespaces_it_refuses_or_is_told_to_run(no_namespaces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot isolate .* it lacks: user namespace .*Invalid argument.*--unsafe-local-execution"):
            ev.run_code("print(3)", ADD)
    assert ev.run_code("a, b = map(int, input().split())\nprint(a + b)", ADD, unsafe=True).reason == "passed"
    verdict = ev.run_code("import os\nopen('x', 'w')\nos.setsid()\nwhile True: pass", ADD, seconds=0.777, unsafe=True)
    assert verdict.reason == "time limit" and verdict.seconds < 1.4  # before its limit on processor time would end it
    assert not processes(0.777) and not list(tmp_path.iterdir())


def test_a_sandbox_that_fails_is_no_verdict(monkeypatch):
    monkeypatch.setattr(ev, "require_sandbox", lambda unsafe: None)
    monkeypatch.setattr(ev, "start_supervisor", lambda *_: ({"user namespace": "no space"}, "no sandbox", 0))
    monkeypatch.setattr(ev.time, "sleep", lambda _: None)
    with pytest.raises(OSError, match="no space"):
        ev.run_code("print(3)", ADD)
