"""Run a program that a model wrote, and score it by tests that it never sees.

    verdict = run_code("print(int(input()) + 1)", [{"input": "1", "output": "2"}])    # .score 1.0

The verdict rule matters more than the walls: expected results never enter the process that runs the program.
It gets inputs and returns data, and another process compares. Whatever the program prints, returns or forges
must equal an expectation that it has never seen. Its exit code means nothing; no answer scores 0.

    caller     this process: starts `python -I -S sandbox.py`, sends it tests, reads a line, kills it if late
    referee    forks the launcher and only then reads the tests; compares what comes back with them
    launcher   forks a fresh player for every run of the program, watches its limits, reads what it printed
    player     runs the program: it sees Python's libraries and an empty folder of its own (Landlock), has no
               network, no children, no signals for others (seccomp), and little of everything (limits)

A fork inherits its parent's memory, so no process that knows the tests may fork a player: hence the launcher.
A player cannot leave its process group, so killing the group ends everything. No root, no namespaces, no
container: it works as any user and inside a container. Linux 5.13 or newer, x86-64 or arm64.

Promised: the program cannot read, write or delete files of others, reach the network, start or signal
processes, nor learn what is expected; it ends within 4 times its limit of processor time and half a second
(and what a slow disk takes to delete 1,000 entries), and nothing of it is left. Not stopped: reading what is
installed beside Python's libraries; seeing sizes and times of files whose names it guesses; using one core,
its memory and, until it ends, as much disk as files take that it has deleted but holds open (512 MB) or
mapped (its memory again); holes in the kernel; guessing.
Standard library only; to copy it, take this file alone.
"""

import builtins
import collections
import contextlib
import functools
import json
import math
import os
import re
import select
import signal
import site
import struct
import sys
import threading
import time

with contextlib.suppress(ImportError):  # not every platform has them
    import ctypes
    import resource
if __name__ != "__main__":  # only the caller needs these; without them the referee starts 10 ms sooner
    import random
    import subprocess
    import tempfile

# Bytes that a program may print, a file may have, or a result may take.
OUTPUT = 8 << 20
# Bytes in a program's folder, and entries.
DISK = 64 << 20
FILES = 1000
# Seconds of wall clock per second of processor time.
PATIENCE = 4

# 1. The caller ----------------------------------------------------------------------------------------------

HERE = os.path.abspath(__file__)  # now, as the working folder may change
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# No more programs run at a time than there are cores, which torchrun's processes share. The time that a
# program waits for a slot is not the program's.
SLOTS = threading.BoundedSemaphore(max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
NO_VERDICT = "no verdict came back"


class Verdict(collections.namedtuple("Verdict", "score reason seconds", defaults=[0.0])):
    """What a verifier says about one reply:

    score: 1.0, 0.0, or None: unknown, which says nothing about the reply.
    reason: "passed", or why not: "wrong output in test 3", "time limit", "unknown: ...", ...
    seconds: that judging took.
    """


def run_code(source, tests, *, entry_point="", prompt="", seconds=10.0, memory=1 << 30, limit=0, seed=0,
             unsafe=False):
    """Run a program on tests, isolated from everything. The first test that fails ends the run.

    Args:
        source: Python, any text.
        tests: in a shape that check_tests() reads.
        entry_point: the function to test, for HumanEval's shape.
        prompt: code that runs before source, and beside HumanEval's check; ignored if it is not code.
        seconds: of processor time, for all tests together. The verdict comes after 4 times that of wall clock
            and half a second at the latest.
        memory: bytes of address space.
        limit: tests to take, 0 for all; a sample of them depends on seed alone.
        unsafe: run even where walls are missing.
    Returns:
        Verdict, score 1 if every test passes. None if the machine is to blame: no process or folder could be
        made, memory ran out, or not even the probe of the walls runs any more.
    Raises:
        ValueError: tests in no known shape; no isolation here, and unsafe does not allow that.
    """
    kind, tests = check_tests(tests, "tests", entry_point)
    if 0 < limit < len(tests):
        tests = sorted(random.Random(seed).sample(tests, limit))
    program = {"source": source, "prompt": prompt, "seconds": seconds, "memory": memory, "unsafe": unsafe}
    try:
        require_sandbox(unsafe)
        reason, seconds = judge(kind, tests, program)
        if reason == NO_VERDICT:
            # The program is to blame if the probe, tried anew, finds everything as it was.
            healthy = sandbox_walls.__wrapped__() == sandbox_walls()
            reason = "died" if healthy else "unknown: no program runs any more"
    except (OSError, MemoryError) as error:
        return Verdict(None, f"unknown: {type(error).__name__}: {error}")
    score = None if reason.startswith("unknown") else float(reason == "passed")
    return Verdict(score, reason, seconds)


def check_tests(tests, where, entry_point=""):
    """Read the tests of a code problem.

    Args:
        tests: in one of these shapes
            HumanEval   a text that defines check(candidate); entry_point names the function
            programs    [{"input": text for standard input, "output": text expected on standard output}, ...]
            functions   [{"fn_name" or "call": name, "args": [...], "expected": value}, ...]
            APPS        {"inputs": [...], "outputs": [...]}, texts (or lists of lines) as above; with
                        "fn_name", inputs are lists of arguments and outputs values, or lists of one value
        where: what to name in errors.
        entry_point: of HumanEval's shape.
    Returns:
        "check" and [(1, text, entry_point)], "programs" and [(number, input, [output]), ...], or "functions"
        and [(number, name, args, results of which each is right), ...].
    Raises:
        ValueError: any other shape.
    """

    def check(condition, problem):
        if not condition:
            raise ValueError(f"{where}: {problem}")

    check(tests, "there are no tests")
    if isinstance(tests, str):
        check(re.search(r"^def check\(", tests, re.MULTILINE), "a text must define check(candidate)")
        named = isinstance(entry_point, str) and entry_point.isidentifier()
        check(named, "entry_point must name the function that check() is given")
        return "check", [(1, tests, entry_point)]
    wrapped = False
    if isinstance(tests, dict):  # APPS becomes one of the other two
        inputs, outputs, name = (tests.get(key) for key in ("inputs", "outputs", "fn_name"))
        lists = isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs) > 0
        check(lists, "inputs and outputs must be lists of the same length, at least 1")
        wrapped = all(isinstance(output, list) and len(output) == 1 for output in outputs)
        keys = ("input", "output") if name is None else ("args", "expected")
        tests = [dict(zip(keys, pair), fn_name=name) for pair in zip(inputs, outputs)]
    # Now a list, all of programs or all of functions.
    known = isinstance(tests, list) and all(isinstance(test, dict) for test in tests)
    check(known, f"tests must be a text, a dictionary or a list of dictionaries, not {type(tests).__name__}")

    programs = all({"input", "output"} <= test.keys() for test in tests)
    read = []
    for i, test in enumerate(tests, 1):
        name = test.get("fn_name", test.get("call"))
        named = isinstance(name, str) and name.isidentifier()
        shaped = programs or named and isinstance(test.get("args"), list) and "expected" in test
        check(shaped, f"test {i} has neither input and output nor fn_name (or call), args, expected")
        try:
            # A text stays a text; what APPS wraps in a list may also be the result itself.
            if programs:
                row = as_text(test["input"]), [as_text(test["output"])]
            else:
                expected = test["expected"]
                row = name, test["args"], [expected, *expected] if wrapped else [expected]
            encode(row)
        except (TypeError, ValueError, RecursionError) as error:
            check(False, f"test {i}: {error}")
        read.append((i, *row))
    return "programs" if programs else "functions", read


def as_text(value):
    text = "\n".join(value) if isinstance(value, list) else value
    if not isinstance(text, str):
        raise TypeError("input and output must be text")
    return text


# Emulated kernels (gVisor) may accept the calls that build walls without enforcing them, so all are tried.
PROBE = """
import os, resource, socket
attempts = ["open('/etc/passwd')", "os.open('/tmp', os.O_RDWR | os.O_TMPFILE)", "os.listdir('/')",
    "os.fork()", "os.execv('/bin/true', ['true'])", "os.kill(os.getppid(), 0)", "os.setsid()",
    "socket.socket()", "resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))"]
for attempt in attempts:
    try:
        eval(attempt)
    except (PermissionError, ValueError):  # ValueError: of a limit
        continue
    raise type(attempt.split("(")[0].replace(".", "_"), (Exception,), {})  # the reason will name it
print(open("own", "w").write("x"), os.listdir("."))
"""


@functools.lru_cache(maxsize=1)
def sandbox_walls():
    """The walls on this machine, tried once: {name: "on", or why it is not}. Raises OSError if the machine
    could not even start the probe; the next call tries again."""
    if sys.platform != "linux":
        return {"Landlock and seccomp": f"Linux has them, this is {sys.platform}"}
    program = {"source": PROBE, "prompt": "", "seconds": 10.0, "memory": 1 << 30, "unsafe": False}
    reason, _ = judge("programs", [(1, "", ["1 ['own']"])], program)
    if reason.startswith("unknown") and "walls" not in reason:
        raise OSError(reason)
    return dict.fromkeys(WALLS, "on") if reason == "passed" else {"walls that hold": reason}


def require_sandbox(unsafe=False):
    """sandbox_walls(), or ValueError where some are missing and unsafe does not allow that."""
    walls = sandbox_walls()
    missing = ", ".join(f"{name} ({why})" for name, why in walls.items() if why != "on")
    if missing and not unsafe:
        why = f"this platform cannot isolate programs that a model wrote, it lacks: {missing}"
        raise ValueError(f"{why}; --unsafe-local-execution runs them all the same, with this user's rights")
    return walls


def judge(kind, tests, program):
    """Let a referee judge a program. Returns the verdict's reason and the seconds that it took. Raises
    OSError or MemoryError where there is no process or no folder to be had."""
    # Python may need the one; without the other each thread reserves another 64 MB of address space.
    environment = {"LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""), "MALLOC_ARENA_MAX": "1"}
    with SLOTS:
        start = time.perf_counter()
        kills = out_of_memory_kills()
        base = tempfile.mkdtemp(prefix="sandbox-")
        try:
            # What the program may know lies in a file. The tests go through a pipe to the referee alone.
            inputs = [test[1] for test in tests] if kind == "programs" else [""]
            with open(f"{base}/program.json", "w") as file:
                json.dump(program | {"base": base, "kind": kind, "inputs": inputs}, file)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", HERE, base], stdin=subprocess.PIPE, cwd="/",
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, start_new_session=True,
            )
            try:
                said, _ = process.communicate(encode(tests), PATIENCE * program["seconds"] + 0.2)
                reason = said.decode() or NO_VERDICT
            except subprocess.TimeoutExpired:
                reason = "time limit"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # nobody in it could leave the group
                process.wait()
        finally:
            remove(base)
        # Whom the kernel ends for want of memory, the program did not end.
        if reason in ("died", NO_VERDICT) and out_of_memory_kills() != kills:
            reason = "unknown: the machine ran out of memory"
        return reason, time.perf_counter() - start


def out_of_memory_kills():
    """The kernel's line on how many processes it ended for want of memory; none where it does not count."""
    with contextlib.suppress(OSError), open("/proc/vmstat") as file:
        return re.findall("oom_kill .*", file.read())


# 2. The referee ---------------------------------------------------------------------------------------------


class Failed(Exception):
    """The program did not pass; the text is the verdict's reason."""


def main():
    """Judge the program in the folder that is named, by the tests on standard input; print the reason."""
    try:
        libc("prctl", 1, signal.SIGKILL, 0, 0, 0)  # do not outlive the parent
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # where memory runs out we go first, and not the trainer
        with open(f"{sys.argv[1]}/program.json") as file:
            program = json.load(file)
        referee = Referee(program)
        tests = receive(sys.stdin.buffer)  # not a moment sooner
        sys.stdout = sys.stderr  # a check may print
        set_limits(4 << 30, PATIENCE * program["seconds"])  # a check may count to what comes back
        compare = run_check if program["kind"] == "check" else compare_tests
        compare(referee, program, tests)
        finish("passed")
    except Exception as error:  # not SystemExit, by which a player, a fork of this process, ends
        finish(error)


def finish(outcome):
    """Print the verdict's reason and end."""
    if isinstance(outcome, (OSError, MemoryError)):
        outcome = f"unknown: {type(outcome).__name__}: {outcome}"
    elif not isinstance(outcome, (str, Failed)):
        os._exit(1)  # EOFError: the launcher is gone, which no program can bring about. No verdict
    print(outcome, end="", file=sys.__stdout__, flush=True)
    os._exit(0)


class Referee:
    """Forks the launcher, and holds the other ends of three pipes:

    control    from the launcher, per run: [why it failed or None, what the program printed]
    requests   to the player, of a module: calls of its functions
    replies    from the player: their results
    """

    def __init__(self, program):
        self.test = 0  # the number of the one that is running
        control, requests, replies = (os.pipe() for _ in range(3))
        theirs = [control[1], requests[0], replies[1]]
        if os.fork() == 0:
            os.dup2(2, 1)  # only the referee has a say
            Launcher(program, *theirs).serve()
        for fd in theirs:
            os.close(fd)
        self.control = open(control[0], "rb")
        self.requests = requests[1]
        self.replies = open(replies[0], "rb")

    def printed(self):
        """What the program printed in its next run; Failed if that went wrong."""
        reason, text = receive(self.control)
        if reason is None:
            return text
        raise Failed(f"{reason} in test {self.test}" if reason.startswith("raised") else reason)

    def call(self, name, args, kwargs):
        """The result of one of the program's functions. Failed if it does not return one."""
        try:
            send(self.requests, [name, args, kwargs])
            return receive(self.replies, OUTPUT)
        except (EOFError, BrokenPipeError):
            self.printed()  # the player has ended, and most likely for a reason
            raise Failed("died") from None
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            raise Failed("died: something else than a result came back") from None


def compare_tests(referee, program, tests):
    """Each test is a run of the program or a call of one of its functions."""
    functions = program["kind"] == "functions"
    same = same_value if functions else same_output
    # A run of the program ends by itself, in the order of the tests; a call is asked for.
    for referee.test, *question, accepted in tests:
        result = referee.call(*question, {}) if functions else referee.printed()
        if not any(same(result, expected) for expected in accepted):
            raise Failed(f"wrong output in test {referee.test}")


def run_check(referee, program, tests):
    """HumanEval: check(candidate), on this side of the pipe, where candidate() asks the player."""
    ((_, test, entry_point),) = tests

    def candidate(*args, **kwargs):
        referee.test += 1
        try:
            return referee.call(entry_point, args, kwargs)
        except Exception as error:
            finish(error)  # now, as the check might catch it

    names = {}
    run_prompt(program["prompt"], names)  # some checks use a function that it defines
    names[entry_point] = candidate
    try:
        exec(test, names)
        names["check"](candidate)
    except BaseException as error:
        what = "wrong output" if type(error) is AssertionError else f"the check raised {type(error).__name__}"
        raise Failed(f"{what} in test {referee.test}") from None
    if referee.test == 0:
        raise Failed("the check never calls its candidate")


BLANKS = " \t\r\f\v"
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def same_output(printed, expected):
    """As judges compare: blanks at the ends of lines and empty lines at the end do not count; a number for a
    decimal may be 1e-6 off, relative or absolute; everything else is exact. Lines end at \\n only."""
    # Words and what lies between them, in turn.
    sides = []
    for text in (printed, expected):
        lines = [line.rstrip(BLANKS) for line in text.rstrip(BLANKS + "\n").split("\n")]
        sides.append(re.split(f"([{BLANKS}\n]+)", "\n".join(lines)))
    return len(sides[0]) == len(sides[1]) and all(map(same_word, *sides))


def same_word(printed, expected):
    """Equal, or a number that is close to an expected decimal."""
    numbers = NUMBER.fullmatch(printed) and NUMBER.fullmatch(expected) and re.search("[.eE]", expected)
    if printed == expected or not numbers:
        return printed == expected
    value = float(expected)
    return math.isfinite(value) and math.isclose(float(printed), value, rel_tol=1e-6, abs_tol=1e-6)


def same_value(result, expected):
    """Equal and of the same type, all the way down, but: a float may be met by a close float or int, a list
    (JSON has no tuples) by a tuple."""
    kind = type(expected)
    if kind is float and type(result) in (int, float):
        # The absolute difference is for sums that cancel: 0.0 is not 1e-9. A float has no ints beyond 1e308.
        close = abs(result) < 1e308 and math.isclose(result, expected, rel_tol=1e-6, abs_tol=1e-12)
        return close or result == expected or result != result and expected != expected  # nan is nan
    if kind is list and type(result) is tuple:
        result = list(result)
    if type(result) is not kind:
        return False
    if kind in (list, tuple):
        return len(result) == len(expected) and all(map(same_value, result, expected))
    if kind in (dict, set, frozenset):
        if {(type(key), key) for key in result} != {(type(key), key) for key in expected}:  # as True == 1
            return False
        return kind is not dict or all(same_value(result[key], expected[key]) for key in expected)
    return result == expected


# 3. The launcher and the player -----------------------------------------------------------------------------


class Launcher:
    """Runs the program, once per input. See Referee for the pipes."""

    def __init__(self, program, control, *channel):
        self.program = program
        self.control = control
        self.channel = list(channel)  # for the player: requests and replies
        self.folder = f"{program['base']}/run"
        self.used = 0.0  # seconds of processor time, by players that have ended

    def serve(self):
        """Run the program, answer, and so on; the referee ends all when it has seen enough."""
        libc("prctl", 1, signal.SIGKILL, 0, 0, 0)  # do not outlive the parent
        for stdin in self.program["inputs"]:
            try:
                answer = self.run(stdin)
            except OSError as error:
                answer = [f"unknown: {error}", ""]
            send(self.control, answer)
        os._exit(0)

    def run(self, stdin):
        """[why it failed or None, what it printed]"""
        # Files in memory instead of pipes, which could be full or empty.
        source, printed, report = map(os.memfd_create, ("stdin", "stdout", "report"))
        os.pwrite(source, stdin.encode("utf-8", "surrogatepass"), 0)
        os.mkdir(self.folder)
        player = os.fork()
        if player == 0:
            try:
                self.become_player([source, printed, 2, report, *self.channel])
                play(self.program, self.folder)
            except BaseException:
                os.abort()
            sys.exit()  # as any program ends: threads are waited for, exit handlers run, output is written
        while self.channel:
            os.close(self.channel.pop())  # the player alone holds these ends now: they close when it ends

        # What the program left behind says why it failed, but a limit that it broke says more.
        reason = self.watch(player)
        text = os.pread(printed, OUTPUT, 0).decode("utf-8", "surrogateescape")
        raised = os.pread(report, 99, 0).decode(errors="replace")
        if os.fstat(printed).st_size > OUTPUT:
            reason = reason or "output limit"
        if not fits(self.folder):
            reason = reason or "disk limit"
        if raised:  # a program names its exceptions as it likes
            raised = raised if raised.isidentifier() else "something"
            reason = reason or ("memory limit" if raised == "MemoryError" else f"raised {raised}")
        for fd in (source, printed, report):
            os.close(fd)
        remove(self.folder)
        return [reason, text]

    def become_player(self, files):
        """In the fork: build the walls; keep these files, as descriptors 0, 1, ..., and nothing else."""
        libc("prctl", 1, signal.SIGKILL, 0, 0, 0)  # do not outlive the parent
        os.chdir(self.folder)
        missing = confine(self.folder, self.program["memory"], self.program["seconds"])
        if missing and not self.program["unsafe"]:
            send(self.control, [f"unknown: walls are missing: {missing}", ""])
            os._exit(1)
        for place, fd in enumerate(files):
            os.dup2(fd, place)  # on none that is still to move: 3 and 4 are the pipe of control
        os.closerange(len(files), 1 << 10)  # numbers are given from 0 up, and few were

    def watch(self, player):
        """Wait for the player's end, and end it if it breaks a limit. Why it failed, or None. The limit of
        wall clock is the caller's to watch."""
        reason = None
        ended = os.pidfd_open(player)
        while not reason and not select.select([ended], [], [], 0.05)[0]:
            os.kill(player, signal.SIGSTOP)  # or it could rename folders to keep them out of our sight
            os.waitid(os.P_PID, player, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            # ~pid << 3 | 2 is the clock of that process.
            if self.used + time.clock_gettime(~player << 3 | 2) > self.program["seconds"]:
                reason = "time limit"
            elif len(os.listdir(f"/proc/{player}/task")) > 256:
                reason = "thread limit"
            elif not fits(self.folder):
                reason = "disk limit"
            os.kill(player, signal.SIGKILL if reason else signal.SIGCONT)
        os.close(ended)
        _, status, usage = os.wait4(player, 0)
        self.used += usage.ru_utime + usage.ru_stime
        if self.used > self.program["seconds"]:
            reason = reason or "time limit"
        return reason or ("died" if os.WIFSIGNALED(status) else None)


REPORT, REQUESTS, REPLIES = 3, 4, 5  # a player's descriptors after the standard three

# What LeetCode and its like import beforehand.
USUAL = """
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string
from bisect import *; from collections import *; from functools import *; from heapq import *
from itertools import *; from math import *; from typing import *
"""


def play(program, folder):
    """Run the program: as `python solution.py`, or as a module whose functions are called. If it raises an
    exception, that type's name is its report, which can but say why a 0 is a 0."""
    site.setquit()  # exit() and quit()
    sys.argv = ["solution.py"]
    os.environ.clear()
    os.environ["TMPDIR"] = folder
    is_module = program["kind"] != "programs"
    module = type(sys)("solution" if is_module else "__main__")
    module.__file__ = "solution.py"
    sys.modules[module.__name__] = module
    try:
        if is_module:
            # They go among the builtins, where they override nothing and are not the program's own.
            exec(USUAL, usual := {})
            vars(builtins).update(usual | vars(builtins))
        run_prompt(program["prompt"], vars(module))
        exec(compile(program["source"], "solution.py", "exec"), vars(module))
        requests = open(REQUESTS, "rb", closefd=False) if is_module else None
        while is_module:
            name, args, kwargs = receive(requests)
            os.chdir(folder)
            empty(folder)  # of what the call before has left
            owner = module if name in vars(module) else module.Solution()
            send(REPLIES, getattr(owner, name)(*args, **kwargs))
    except BaseException as error:  # a program may raise anything
        if is_module or not isinstance(error, SystemExit):
            os.write(REPORT, type(error).__name__[:80].encode("utf-8", "replace"))
            os._exit(1)


def run_prompt(prompt, names):
    """Define what a prompt defines, if it is code; others are a question in words."""
    with contextlib.suppress(Exception):
        exec(compile(prompt, "prompt.py", "exec"), names)


# 4. The walls -----------------------------------------------------------------------------------------------

WALLS = ["no rights", "no new rights", "Landlock", "seccomp", "limits"]


def confine(folder, memory, seconds):
    """From here on this process can compute, and write to folder, and nothing else. Returns the walls that
    could not be built, and why; an empty text if all stand."""
    builders = [
        lambda: libc("capset", struct.pack("Ii", 0x20080522, 0), bytes(24)),
        lambda: libc("prctl", 38, 1, 0, 0, 0),  # which the next two ask for
        lambda: restrict_files(folder),
        filter_calls,
        lambda: set_limits(memory, seconds),  # last, as building walls takes memory
    ]
    missing = []
    for name, build in zip(WALLS, builders):
        try:
            build()
        except Exception as error:
            missing.append(f"{name} ({error})")
    return ", ".join(missing)


def set_limits(memory, seconds):
    """The kernel's limits. That of time counts whole seconds: the launcher is more exact."""
    # Of a file one byte more than allowed, to tell too much from all.
    limits = {"AS": memory, "CPU": int(seconds) + 2, "FSIZE": OUTPUT + 1, "NOFILE": 64, "SIGPENDING": 64}
    limits |= {"CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0}
    for name, limit in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1] % (1 << 64)  # -1 stands for none. It cannot be raised
        resource.setrlimit(number, (min(limit, hard), min(limit, hard)))


# Landlock's rights, a bit each: 0 execute, 1 write or 2 read a file; 3 list a folder; remove 4 a folder or
# 5 a file; make 6 a device, 7 a folder, 8 a file, 9 a socket, 10 a fifo, 11 a block device, 12 a link; since
# version 2, 13 move between folders; since 3, 14 truncate; since 5, 15 control a device.
READ = sum(1 << right for right in (2, 3))
WRITE = sum(1 << right for right in (1, 4, 5, 7, 8, 12, 13, 14))
ON_FILES = sum(1 << right for right in (1, 2, 14))  # the others are for folders only


def restrict_files(folder):
    """Landlock: no file can be opened but Python's libraries, for reading, and what lies in folder."""
    # What is handled is refused: this many rights to files, TCP since version 4, other sockets since 6. The
    # kernel takes as many bytes of that as its version knows.
    version = libc("syscall", 444, None, 0, 1)
    rights, length = {1: (13, 8), 2: (14, 8), 3: (15, 8), 4: (15, 16), 5: (16, 16)}.get(version, (16, 24))
    known = (1 << rights) - 1
    rules = libc("syscall", 444, struct.pack("3Q", known, 3, 3)[:length], length, 0)
    # What is allowed of it:
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime"]
    libraries += ["/usr/share/zoneinfo", f"{sys.base_prefix}/lib", *sys.path]
    allowed = dict.fromkeys(libraries, READ) | {"/dev/null": READ | WRITE, folder: READ | WRITE}
    for path in filter(os.path.exists, allowed):
        rights = allowed[path] & known & (known if os.path.isdir(path) else ON_FILES)
        libc("syscall", 445, rules, 1, struct.pack("=Qi", rights, os.open(path, os.O_PATH)), 0)
    libc("syscall", 446, rules, 0)  # what is open now, become_player() closes


# The system calls that fail with "not permitted": name, number on x86-64, number on arm64.
FORBIDDEN = """
process   fork 57 -  vfork 58 -  execve 59 221  execveat 322 281  setpgid 109 154  setsid 112 157
signal    kill 62 129  tkill 200 130  tgkill 234 131  rt_sigqueueinfo 129 138  rt_tgsigqueueinfo 297 240
network   socket 41 198  socketpair 53 199
inspect   ptrace 101 117  process_vm_readv 310 270  process_vm_writev 311 271  kcmp 312 272
          perf_event_open 298 241  userfaultfd 323 282  syslog 103 116  fanotify_init 300 262
          inotify_init 253 -  inotify_init1 294 26  name_to_handle_at 303 264  open_by_handle_at 304 265
priority  setpriority 141 140  sched_setparam 142 118  sched_setscheduler 144 119  sched_setattr 314 274
          sched_setaffinity 203 122  ioprio_set 251 30  migrate_pages 256 238  move_pages 279 239
setting   prctl 157 167  personality 135 92  unshare 272 97  setns 308 268  bpf 321 280
user      setuid 105 146  setgid 106 144  setreuid 113 145  setregid 114 143  setresuid 117 147
          setresgid 119 149  setgroups 116 159  add_key 248 217  request_key 249 218  keyctl 250 219
mount     mount 165 40  umount2 166 39  pivot_root 155 41  chroot 161 51  sync 162 81  syncfs 306 267
memory    memfd_create 319 279  shmget 29 194  shmat 30 196  shmctl 31 195  semget 64 190  semop 65 193
          semctl 66 191  semtimedop 220 192  msgget 68 186  msgsnd 69 189  msgrcv 70 188  msgctl 71 187
          mq_open 240 180  mq_unlink 241 181  io_setup 206 0
file      chmod 90 -  fchmod 91 52  fchmodat 268 53  chown 92 -  fchown 93 55  lchown 94 -  fchownat 260 54
          utime 132 -  utimes 235 -  futimesat 261 -  utimensat 280 88  truncate 76 45  setxattr 188 5
          lsetxattr 189 6  fsetxattr 190 7  removexattr 197 14  lremovexattr 198 15  fremovexattr 199 16
"""
NEWER = 424  # newer calls (2019: pidfds, io_uring, clone3) fail with "no such call"; C libraries fall back

# Those that depend on an argument: the call's numbers as above, which argument, the bits of it that matter,
# and their values that pass. Of the ways to open a file, 3, to control a device, escapes Landlock, and so
# does reading with O_TRUNC before its version 3. A folder that its owner may not enter could not be deleted.
OPENING = [0, 1, 2, 1 | os.O_TRUNC, 2 | os.O_TRUNC]
CHECKED = {
    "open": (2, None, 1, 3 | os.O_TRUNC, OPENING),
    "openat": (257, 56, 2, 3 | os.O_TRUNC, OPENING),
    "mkdir": (83, None, 1, 0o700, [0o700]),
    "mkdirat": (258, 34, 2, 0o700, [0o700]),
    "umask": (95, 166, 0, 0o700, [0]),
    "clone": (56, 220, 0, 0x10000, [0x10000]),  # threads
    "prlimit64": (302, 261, 0, 0xFFFFFFFF, [0]),  # its own limits
    "fcntl": (72, 25, 1, 0xFFFFFFFF, [*range(8), 1030]),  # copies, flags, locks; not signals, leases
}


def filter_calls():
    """seccomp: a program for the kernel's little machine, which sees each call's number and arguments. An
    instruction says what to do, how many steps to skip if so, how many if not, and has an operand. The number
    lies at 0, the instruction set at 4, argument i at 16 + 8 i."""
    load, mask, equal, at_least, leave = 0x20, 0x54, 0x15, 0x35, 0x06
    allow = (leave, 0, 0, 0x7FFF0000)
    refuse = (leave, 0, 0, 0x00050000 | 1)  # EPERM
    column = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
    program = [
        # Another instruction set, as that of 32 bits, numbers its calls otherwise: the process is killed.
        (load, 0, 0, 4), (equal, 1, 0, (0xC000003E, 0xC00000B7)[column]), (leave, 0, 0, 0x80000000),
        (load, 0, 0, 0), (at_least, 0, 1, NEWER), (leave, 0, 0, 0x00050000 | 38),  # ENOSYS
    ]
    for number in re.findall([r"\w+ (\d+) ", r"\w+ \d+ (\d+)"][column], FORBIDDEN):
        program += [(equal, 0, 1, int(number)), refuse]
    for *numbers, argument, bits, passing in CHECKED.values():
        body = [(load, 0, 0, 16 + 8 * argument), (mask, 0, 0, bits)]
        for value in passing:
            body += [(equal, 0, 1, value), allow]
        if numbers[column] is not None:
            program += [(equal, 0, len(body) + 1, numbers[column]), *body, refuse]
    program.append(allow)
    # The kernel wants a pointer to the instructions, and how many there are.
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    pointer = struct.pack("HP", len(program), ctypes.addressof(code))
    libc("prctl", 22, 2, ctypes.create_string_buffer(pointer), 0, 0)


def libc(function, *args):
    """Call the C library; OSError where it returns -1."""
    result = getattr(ctypes.CDLL(None, use_errno=True), function)(*args)
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
    return result


# 5. Messages and folders ------------------------------------------------------------------------------------

TAGGED = {kind.__name__: kind for kind in (tuple, set, frozenset, bytes, dict)}


def send(fd, value):
    """Write a message, a line of JSON. os.write alone would end halfway in a player that is stopped."""
    with open(fd, "wb", closefd=False) as file:
        file.write(encode(value))


def receive(file, most=-1):
    """The next message, of at most so many bytes. EOFError if the writer is gone, ValueError, TypeError or
    LookupError if it is none."""
    line = file.readline(most)
    if not line.endswith(b"\n"):
        raise Failed("output limit") if len(line) == most else EOFError
    return json.loads(line, object_hook=revive)


def encode(value):
    return json.dumps(plain(value)).encode() + b"\n"


def plain(value):
    """value in JSON's types, what JSON lacks as {type: list}; dictionaries of collections become plain ones.
    TypeError for all that is not plain data: no object of a program's own class gets out."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [plain(item) for item in value]
    if issubclass(kind, dict) and kind.__module__ in ("builtins", "collections"):
        return {"dict": [[plain(key), plain(value[key])] for key in value]}
    if kind not in TAGGED.values():
        raise TypeError(f"data of type {kind.__name__}")
    return {kind.__name__: [plain(item) for item in value]}


def revive(tagged):
    """What plain() made of a value, back again."""
    ((kind, items),) = tagged.items()
    return TAGGED[kind](list(items))  # a list, as bytes(10**12) takes all memory


def fits(folder):
    """Whether a folder holds no more than DISK bytes and FILES entries, nested no deeper than paths go."""
    size = entries = 0
    pending = [folder]
    for path in pending:
        for entry in os.scandir(path):
            entries += 1
            size += 512 * entry.stat(follow_symlinks=False).st_blocks
            if size > DISK or entries > FILES or len(entry.path) > 1000:
                return False
            if entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
    return True


def remove(folder):
    """Delete a folder. Its processes have been killed, but the last may take a moment to be gone."""
    for _ in range(20):
        try:
            empty(folder)
            return os.rmdir(folder)
        except OSError:
            time.sleep(0.01)


def empty(folder):
    """Delete all that lies in a folder, however deep: what lies in its folders moves up into it first."""
    while entries := list(os.scandir(folder)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            for inner in os.scandir(entry.path):
                os.rename(inner.path, f"{folder}/{os.urandom(8).hex()}")
            os.rmdir(entry.path)


if __name__ == "__main__":
    main()
