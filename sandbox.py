"""Run a program that a model wrote, and score it on tests that it never sees.

    verdict = run_code("print(int(input()) + 1)", [{"input": "1", "output": "2"}])    # .score 1.0

The verdict rule matters more than the walls: expected results never enter the process that runs the program.
It gets inputs and returns data; another process compares. Whatever the program prints, returns or forges must
equal an expectation that it has never seen. Its exit code means nothing; no answer scores 0.

    caller     this process: starts `python -I -S sandbox.py`, sends it tests, reads a line, kills it if late
    referee    forks the launcher and only then reads the tests; compares what comes back with them
    launcher   forks a fresh player for every run of the program, enforces its limits, reads what it printed
    player     runs the program: it sees Python's libraries and an empty folder of its own (Landlock), has no
               network, child processes or signals for others (seccomp), and little of the rest (limits)

A fork inherits its parent's memory, so no process that knows the tests may fork a player: hence the launcher.
A player cannot leave its process group, so killing the group ends everything. This needs no root, namespaces
or container, and works inside one. Linux 5.13 or newer, x86-64 or arm64. Standard library only; to copy it,
take this file alone.

Promised: the program cannot read, write or delete other files, reach the network, start or signal processes,
or learn what is expected. It ends within 4 times its limit of processor time plus half a second (and the time
a slow disk takes to delete 1,000 entries), and leaves nothing behind. Not prevented: reading what lies beside
Python's libraries; seeing sizes and times of files whose names it guesses; using one core, its memory and,
until it ends, disk space for files that it deleted but holds open (512 MB) or mapped (its memory again);
holes in the kernel; guessing.
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

if __name__ == "__main__":  # only the processes behind the caller need these, and not every platform has them
    import ctypes
    import resource
else:  # only the caller needs these; without them the referee starts 10 ms sooner
    import random
    import subprocess
    import tempfile

OUTPUT = 8 << 20  # bytes that a program may print, that each of its files may hold, or that a result may take
DISK = 64 << 20  # bytes in a program's folder
FILES = 1000  # entries in it
PATIENCE = 4  # seconds of wall clock per second of processor time

# 1. The caller ----------------------------------------------------------------------------------------------

HERE = os.path.abspath(__file__)  # resolved now, as the working folder may change
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# One program per core at a time; torchrun's processes share the cores. Waiting for a slot is not timed.
SLOTS = threading.BoundedSemaphore(max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
NO_VERDICT = "no verdict came back"

# score: 1.0, 0.0, or None for unknown, which says nothing about the reply. seconds: how long judging took.
# reason: "passed", or why not: "wrong output in test 3", "time limit", "unknown: ...", ...
Verdict = collections.namedtuple("Verdict", "score reason seconds", defaults=[0.0])

def run_code(source, tests, *, entry_point="", prompt="", seconds=10.0, memory=1 << 30, limit=0, seed=0,
             unsafe=False):
    """Run a program on tests, isolated from everything else. The first test that fails ends the run.

    Args:
        source: Python, any text.
        tests, entry_point: see check_tests().
        prompt: code that runs before source, and beside HumanEval's check; ignored if it is not code.
        seconds: of processor time, for all tests together. The verdict takes at most 4 times that plus 0.5.
        memory: bytes of address space.
        limit: how many tests to sample, by seed alone; 0 takes all.
        unsafe: run even where Linux lacks some of the walls.
    Returns:
        Verdict. Score None: the machine had no process, folder or memory, or not even the probe still runs;
        or HumanEval's check passes its candidate what no pipe carries, such as a range or a function.
    Raises:
        ValueError: tests in no known shape, or walls are missing and unsafe is not set.
    """
    kind, tests = check_tests(tests, "tests", entry_point)
    if 0 < limit < len(tests):
        tests = sorted(random.Random(seed).sample(tests, limit))
    try:
        require_sandbox(unsafe)
        reason, seconds = judge(kind, tests, source, prompt, seconds, memory, unsafe)
        if reason == NO_VERDICT:
            # Blame the program only if a new probe finds the machine as it was.
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
        where: the place that a ValueError names if tests have another shape.
    Returns:
        "check" and [(1, text, entry_point)], "programs" and [(number, input, [output]), ...], or "functions"
        and [(number, name, args, accepted results), ...].
    """

    def check(condition, problem):
        if not condition:
            raise ValueError(f"{where}: {problem}")

    check(tests, "there are no tests")
    if isinstance(tests, str):
        check(re.search(r"^def check\(", tests, re.MULTILINE), "a text must define check(candidate)")
        check(isinstance(entry_point, str) and entry_point.isidentifier(), "entry_point must name a function")
        return "check", [(1, tests, entry_point)]
    wrapped = False
    if isinstance(tests, dict):  # APPS becomes a list of programs or functions
        inputs, outputs, name = map(tests.get, ("inputs", "outputs", "fn_name"))
        lists = isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs) > 0
        check(lists, "inputs and outputs must be lists of the same length, at least 1")
        wrapped = all(isinstance(output, list) and len(output) == 1 for output in outputs)
        keys = ("input", "output") if name is None else ("args", "expected")
        tests = [dict(zip(keys, pair), fn_name=name) for pair in zip(inputs, outputs)]
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
            if programs:
                row = as_text(test["input"]), [as_text(test["output"])]
            else:
                # A list of one value may be APPS's wrapping of that value, or the expected list itself.
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

# Emulated kernels (gVisor) may accept the calls that build walls without enforcing them, so try to break each
# wall. The attempt that succeeds becomes the name of an exception, which the verdict then reports.
PROBE = """
import os, resource, socket
for attempt in ["open('/etc/passwd')", "os.open('/tmp', os.O_RDWR | os.O_TMPFILE)", "os.listdir('/')",
                "os.fork()", "os.execv('/bin/true', ['true'])", "os.kill(os.getppid(), 0)", "os.setsid()",
                "socket.socket()", "resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))"]:
    try: eval(attempt)
    except (PermissionError, ValueError): continue  # ValueError: from setrlimit
    raise type(attempt.split("(")[0].replace(".", "_"), (Exception,), {})
print(open("own", "w").write("x"), os.listdir("."))
"""

@functools.lru_cache(maxsize=1)
def sandbox_walls():
    """{wall: "on", or what is wrong}, tried once. OSError if the machine could not even start the probe; the
    next call tries again."""
    if sys.platform != "linux":
        return {"Landlock and seccomp": f"Linux has them, this is {sys.platform}"}
    reason, _ = judge("programs", [(1, "", ["1 ['own']"])], PROBE)
    if reason.startswith("unknown") and "walls" not in reason:
        raise OSError(reason)
    return dict.fromkeys(WALLS, "on") if reason == "passed" else {"walls that hold": reason}

def require_sandbox(unsafe=False):
    """sandbox_walls(), or ValueError if some are missing and unsafe does not allow that."""
    walls = sandbox_walls()
    missing = ", ".join(f"{name} ({why})" for name, why in walls.items() if why != "on")
    error = f"this platform cannot isolate programs that a model wrote, it lacks: {missing}"
    if sys.platform != "linux":  # what judges a program needs Linux, too
        raise ValueError(error)
    if missing and not unsafe:
        raise ValueError(f"{error}; --unsafe-local-execution runs them all the same, with this user's rights")
    return walls

def judge(kind, tests, source, prompt="", seconds=10.0, memory=1 << 30, unsafe=False):
    """Let a referee judge a program. Returns the verdict's reason and the seconds it took; OSError or
    MemoryError if the machine has no process or folder to give."""
    # Python may need the first. Without the second, each thread reserves another 64 MB of address space.
    environment = {"LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""), "MALLOC_ARENA_MAX": "1"}
    with SLOTS:
        start = time.perf_counter()
        kills = out_of_memory_kills()
        base = tempfile.mkdtemp(prefix="sandbox-")
        try:
            # What the program may know lies in a file; the tests go through a pipe to the referee alone.
            inputs = [test[1] for test in tests] if kind == "programs" else [""]
            program = {"kind": kind, "source": source, "prompt": prompt, "inputs": inputs, "seconds": seconds,
                       "memory": memory, "folder": f"{base}/run", "unsafe": unsafe, "caller": os.getpid()}
            with open(f"{base}/program.json", "w") as file:
                json.dump(program, file)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", HERE, base], stdin=subprocess.PIPE, cwd="/",
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, start_new_session=True,
            )
            try:
                said, _ = process.communicate(encode(tests), PATIENCE * seconds + 0.2)
                reason = said.decode() or NO_VERDICT
            except subprocess.TimeoutExpired as late:
                reason = (late.stdout or b"").decode() or "time limit"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # nothing in it could leave the group
                process.wait()
        finally:
            remove(base)
        # The kernel may have killed it because the whole machine ran out of memory.
        if reason in ("died", NO_VERDICT) and out_of_memory_kills() != kills:
            reason = "unknown: the machine ran out of memory"
        return reason, time.perf_counter() - start

def out_of_memory_kills():
    """The kernel's line with the number of processes killed for lack of memory; None if it keeps no count."""
    with contextlib.suppress(OSError), open("/proc/vmstat") as file:
        return re.findall("oom_kill .*", file.read())

# 2. The referee ---------------------------------------------------------------------------------------------

def main():
    """Judge the program in the folder named on the command line by the tests on standard input."""
    try:
        with open(f"{sys.argv[1]}/program.json") as file:
            program = json.load(file)
        end_with_parent(program["caller"])
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if memory runs out, the kernel kills us first, not the trainer
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, players would leave no status
        referee = Referee(program)
        tests = receive(sys.stdin.buffer)  # only now: the launcher, forked above, must not know them
        sys.stdout = sys.stderr  # a check may print
        set_limits(program | {"memory": 4 << 30, "seconds": PATIENCE * program["seconds"]})
        (run_check if program["kind"] == "check" else compare_tests)(referee, program, tests)
        finish("passed")
    except Exception as error:  # not SystemExit, with which a player ends: it is a fork of this process
        finish(error)

def finish(outcome):
    """Print the verdict's reason and exit. Errors that are not the machine's give no reason: the launcher is
    gone (EOFError). The caller then finds out whose fault it is."""
    if isinstance(outcome, (OSError, MemoryError)):
        outcome = f"unknown: {type(outcome).__name__}: {outcome}"
    if isinstance(outcome, str):
        print(outcome, end="", file=sys.__stdout__, flush=True)
    os._exit(0)

class Referee:
    """Forks the launcher, and holds the other ends of three pipes:

    control    from the launcher, per run: [why it failed or None, what the program printed]
    requests   to the player, if it is a module: calls of its functions
    replies    from the player: their results
    """

    def __init__(self, program):
        self.test = 0  # the number of the running test
        (ours, control), (requests, self.requests), (answers, replies) = (os.pipe() for _ in range(3))
        if os.fork() == 0:
            launch(program, control, [requests, replies])
        for fd in (control, requests, replies):
            os.close(fd)
        self.control = open(ours, "rb")
        self.replies = open(answers, "rb")

    def printed(self):
        """What the program printed in its next run."""
        reason, text = receive(self.control)
        if reason:
            finish(f"{reason} in test {self.test}" if reason.startswith("raised") else reason)
        return text

    def call(self, name, args, kwargs):
        """The result of one of the program's functions."""
        try:
            try:
                send(self.requests, [name, args, kwargs])
            except TypeError as error:  # no program sends such a value: it is the check's own
                finish(f"unknown: the check passes {error}")
            return receive(self.replies, OUTPUT)
        except (EOFError, BrokenPipeError):
            self.printed()  # the player has ended, most likely for a reason
            finish("died")
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            finish("died")  # it sent something that is no message

def compare_tests(referee, program, tests):
    """Each test is a run of the program, or a call of one of its functions."""
    functions = program["kind"] == "functions"
    same = same_value if functions else same_output
    # The launcher runs a program on all inputs in turn, unasked; functions are called from here.
    for referee.test, *question, accepted in tests:
        result = referee.call(*question, {}) if functions else referee.printed()
        if not any(same(result, expected) for expected in accepted):
            finish(f"wrong output in test {referee.test}")

def run_check(referee, program, tests):
    """HumanEval: check(candidate) runs in this process, and candidate() asks the player."""
    ((_, test, entry_point),) = tests

    def candidate(*args, **kwargs):
        referee.test += 1
        try:
            return referee.call(entry_point, args, kwargs)
        except Exception as error:
            finish(error)  # here, as the check could catch it

    names = {}
    run_prompt(program["prompt"], names)  # some checks use a function that it defines
    names[entry_point] = candidate
    try:
        exec(test, names)
        names["check"](candidate)
    except BaseException as error:
        what = "wrong output" if type(error) is AssertionError else f"the check raised {type(error).__name__}"
        finish(f"{what} in test {referee.test}")
    if referee.test == 0:
        finish("the check never calls its candidate")

# ASCII only: Unicode's other blanks, line ends and digits are ordinary characters.
BLANKS = " \t\r\f\v"
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")

def same_output(printed, expected):
    """As online judges compare: blanks at the ends of lines and empty lines at the end do not count, and a
    number may differ from an expected decimal by 1e-6, relative or absolute. Only \\n ends a line."""
    sides = []
    for text in (printed, expected):
        lines = [line.rstrip(BLANKS) for line in text.rstrip(BLANKS + "\n").split("\n")]
        # Words, and the blanks between them, alternate.
        sides.append(re.split(f"([{BLANKS}\n]+)", "\n".join(lines)))
    return len(sides[0]) == len(sides[1]) and all(map(same_word, *sides))

def same_word(printed, expected):
    """Equal, or a number close to an expected decimal."""
    numbers = NUMBER.fullmatch(printed) and NUMBER.fullmatch(expected) and re.search("[.eE]", expected)
    if printed == expected or not numbers:
        return printed == expected
    value = float(expected)
    return math.isfinite(value) and math.isclose(float(printed), value, rel_tol=1e-6, abs_tol=1e-6)

def same_value(result, expected):
    """Equal and of the same type at every depth, but a float may be met by a close float or int, a list by a
    tuple (JSON has no tuples)."""
    kind = type(expected)
    if kind is float and type(result) in (int, float):
        # abs_tol allows for sums that cancel: 0.0 is not 1e-9. isclose() overflows on ints beyond 1e308.
        close = abs(result) < 1e308 and math.isclose(result, expected, rel_tol=1e-6, abs_tol=1e-12)
        return close or result == expected or result != result and expected != expected  # nan is nan
    if kind is list and type(result) is tuple:
        result = list(result)
    if type(result) is not kind:
        return False
    if kind in (list, tuple):
        return len(result) == len(expected) and all(map(same_value, result, expected))
    if kind in (dict, set, frozenset):
        keys = {key: key for key in result}
        # An equal key may be of another type, as True == 1.
        same = len(keys) == len(expected) and all(k in keys and same_value(keys[k], k) for k in expected)
        return same and all(same_value(result[k], expected[k]) for k in expected if kind is dict)
    return result == expected

# 3. The launcher and the player -----------------------------------------------------------------------------

def launch(program, control, channel):
    """The launcher: run the program once per input and report each run, until the referee ends us. Referee
    names the pipes; channel holds the player's ends of requests and replies."""
    end_with_parent(os.getpgrp())  # the referee leads the group
    launcher = os.getpid()
    for given in program["inputs"]:
        # Files in memory, not pipes: a pipe can be full or empty, and something would have to wait for it.
        stdin, stdout, report = map(os.memfd_create, ("stdin", "stdout", "report"))
        os.pwrite(stdin, given.encode("utf-8", "surrogatepass"), 0)
        os.mkdir(program["folder"])
        player = os.fork()
        if player == 0:
            try:
                become_player(program, launcher, control, [stdin, stdout, 2, report, *channel])
                play(program)
            except BaseException:
                os.abort()
            sys.exit()  # as any program ends: waits for threads, runs exit handlers, writes buffered output
        while channel:
            os.close(channel.pop())  # only the player holds these ends now, so they close when it ends

        reason = watch(program, player)
        text = os.pread(stdout, OUTPUT + 1, 0)
        raised = os.pread(report, 99, 0).decode(errors="replace")
        if len(text) > OUTPUT:
            reason = reason or "output limit"
        elif raised:  # the program controls this text
            raised = raised if raised.isidentifier() else "something"
            reason = reason or ("memory limit" if raised == "MemoryError" else f"raised {raised}")
        for fd in (stdin, stdout, report):
            os.close(fd)
        remove(program["folder"])
        send(control, [reason, text.decode("utf-8", "surrogateescape")])
    os._exit(0)

def watch(program, player):
    """Wait for the player's end, or end it if it exceeds a limit (the caller watches wall clock). Returns why
    it failed, or None."""
    reason = None
    ended = False
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # processor time of the players before it
    pidfd = os.pidfd_open(player)
    while not ended and not reason:
        ended = bool(select.select([pidfd], [], [], 0.05)[0])
        # Stop it while we look, or it could hide folders from us by renaming them. A player that has ended is
        # not affected; we look once more at what it left.
        os.kill(player, signal.SIGSTOP)
        os.waitid(os.P_PID, player, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        # ~pid << 3 | 2 names the clock of that process.
        if before + time.clock_gettime(~player << 3 | 2) > program["seconds"]:
            reason = "time limit"
        elif len(os.listdir(f"/proc/{player}/task")) > 256:
            reason = "thread limit"
        elif not fits(program["folder"]):
            reason = "disk limit"
        os.kill(player, signal.SIGKILL if reason else signal.SIGCONT)
    os.close(pidfd)
    _, status = os.waitpid(player, 0)
    return reason or ("died" if os.WIFSIGNALED(status) else None)

def become_player(program, launcher, control, files):
    """In the fork: build the walls, and keep only these files, as descriptors 0, 1, 2, ..."""
    end_with_parent(launcher)
    os.chdir(program["folder"])
    # Build all, even if one fails: an error that names everything that is missing helps most.
    missing = []
    for name, build in WALLS.items():
        try:
            build(program)
        except Exception as error:
            missing.append(f"{name} ({error})")
    if missing and not program["unsafe"]:
        send(control, [f"unknown: walls are missing: {', '.join(missing)}", ""])
        os._exit(1)
    for place, fd in enumerate(files):
        os.dup2(fd, place)  # overwrites none that is still to move: 3 and 4 are the pipe of control
    # The kernel gives out the lowest free number, so all that are open are far below 1,024.
    os.closerange(len(files), 1 << 10)

REPORT, REQUESTS, REPLIES = 3, 4, 5  # a player's descriptors after the standard three

# What LeetCode and its like import beforehand.
USUAL = """
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string
from bisect import *; from collections import *; from functools import *; from heapq import *
from itertools import *; from math import *; from typing import *
"""

def play(program):
    """Run the program: as `python solution.py`, or as a module whose functions are called. The type of an
    exception goes into the report. The program could forge that, but it only explains a score of 0."""
    site.setquit()  # exit() and quit()
    sys.argv = ["solution.py"]
    os.environ.clear()
    os.environ["TMPDIR"] = program["folder"]
    is_module = program["kind"] != "programs"
    module = type(sys)("solution" if is_module else "__main__")
    module.__file__ = "solution.py"
    sys.modules[module.__name__] = module
    try:
        if is_module:
            # As builtins they override nothing, and are not taken for the program's own functions.
            exec(USUAL, usual := {})
            vars(builtins).update(usual | vars(builtins))
        run_prompt(program["prompt"], vars(module))
        exec(compile(program["source"], "solution.py", "exec"), vars(module))
        requests = open(REQUESTS, "rb", closefd=False) if is_module else None
        while is_module:
            name, args, kwargs = receive(requests)
            os.chdir(program["folder"])
            empty(program["folder"])  # of what the previous call left
            owner = module if name in vars(module) else module.Solution()
            send(REPLIES, getattr(owner, name)(*args, **kwargs))
    except BaseException as error:  # a program may raise anything
        if is_module or not isinstance(error, SystemExit):
            os.write(REPORT, type(error).__name__[:80].encode("utf-8", "replace"))
            os._exit(1)

def run_prompt(prompt, names):
    """Define what a prompt defines, if it is code; it may also be a question in words."""
    with contextlib.suppress(Exception):
        exec(compile(prompt, "prompt.py", "exec"), names)

# 4. The walls -----------------------------------------------------------------------------------------------

def set_limits(program):
    """The kernel's limits. Its limit of processor time counts whole seconds: watch() is more exact."""
    limits = {"AS": program["memory"], "CPU": int(program["seconds"]) + 2, "NOFILE": 64, "SIGPENDING": 64}
    # One byte more than allowed, to tell too much output from just enough.
    limits |= {"FSIZE": OUTPUT + 1, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0}
    for name, limit in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        # An existing hard limit cannot be raised; -1 means that there is none.
        hard = resource.getrlimit(number)[1] % (1 << 64)
        resource.setrlimit(number, (min(limit, hard), min(limit, hard)))

# Landlock's rights, a bit each: 0 execute, 1 write or 2 read a file; 3 list a folder; remove 4 a folder or
# 5 a file; make 6 a device, 7 a folder, 8 a file, 9 a socket, 10 a fifo, 11 a block device, 12 a link; since
# version 2, 13 move between folders; since 3, 14 truncate; since 5, 15 control a device.
READ = sum(1 << right for right in (2, 3))
WRITE = sum(1 << right for right in (1, 4, 5, 7, 8, 12, 13, 14))
ON_FILES = sum(1 << right for right in (1, 2, 14))  # the others are for folders only

def restrict_files(program):
    """Landlock: no file can be opened but Python's libraries, for reading, and what lies in the folder."""
    version = libc("syscall", 444, None, 0, 1)
    # Refuse all rights to files that this version knows, TCP since version 4, other sockets since 6. Older
    # kernels accept the longer structure, as the fields that they do not know are 0.
    known = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    handled = struct.pack("3Q", known, 3 * (version >= 4), 3 * (version >= 6))
    rules = libc("syscall", 444, handled, len(handled), 0)
    # The exceptions:
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime"]
    libraries += ["/usr/share/zoneinfo", f"{sys.base_prefix}/lib", *sys.path]
    allowed = dict.fromkeys(libraries, READ) | dict.fromkeys(["/dev/null", program["folder"]], READ | WRITE)
    for path in filter(os.path.exists, allowed):
        rights = allowed[path] & known & (known if os.path.isdir(path) else ON_FILES)
        libc("syscall", 445, rules, 1, struct.pack("=Qi", rights, os.open(path, os.O_PATH)), 0)
    libc("syscall", 446, rules, 0)  # files opened before stay usable; become_player() closes them

# System calls that fail with "not permitted": name, then its number (or first:last) on x86-64 and on arm64,
# - where there is none.
FORBIDDEN = """
fork,vfork 57:58 -  execve 59 221  execveat 322 281  setpgid 109 154  setsid 112 157  kill 62 129
tkill 200 130  tgkill 234 131  rt_sigqueueinfo 129 138  rt_tgsigqueueinfo 297 240  socket 41 198
socketpair 53 199  ptrace 101 117  process_vm_readv,writev 310:311 270:271  kcmp 312 272
perf_event_open 298 241  syslog 103 116  userfaultfd 323 282  fanotify_init 300 262  inotify_init 253 -
inotify_init1 294 26  name_to_handle_at,open_by_handle_at 303:304 264:265  setpriority 141 140
sched_setparam 142 118  sched_setscheduler 144 119  sched_setattr 314 274  sched_setaffinity 203 122
ioprio_set 251 30  migrate_pages 256 238  move_pages 279 239  prctl 157 167  personality 135 92
unshare 272 97  setns 308 268  bpf 321 280  setuid 105 146  setgid 106 144  setreuid 113 145  setregid 114 143
setresuid 117 147  setresgid 119 149  setgroups 116 159  add_key,request_key,keyctl 248:250 217:219
mount,umount2 165:166 39:40  pivot_root 155 41  chroot 161 51  sync 162 81  syncfs 306 267
memfd_create 319 279  shm* 29:31 194:196  sem* 64:66 190:193  semtimedop 220 -  msg* 68:71 186:189
mq_open,unlink 240:241 180:181  io_setup 206 0  chmod,chown 90:94 52:55  fchownat 260 -  fchmodat 268 -
utime 132 -  utimes 235 -  futimesat 261 -  utimensat 280 88  truncate 76 45  *setxattr 188:190 5:7
*removexattr 197:199 14:16
"""
NEWER = 424  # newer calls (2019: pidfds, io_uring, clone3) fail with "no such call"; C libraries fall back

# Calls that depend on an argument: the two numbers as above, which argument, the bits of it that matter, and
# their values that pass. Opening with access mode 3, meant for device control, escapes Landlock, and so does
# reading with O_TRUNC before version 3. A folder that its owner may not enter could not be deleted.
OPENING = [0, 1, 2, 1 | os.O_TRUNC, 2 | os.O_TRUNC]
CHECKED = {
    "open": (2, None, 1, 3 | os.O_TRUNC, OPENING), "openat": (257, 56, 2, 3 | os.O_TRUNC, OPENING),
    "mkdir": (83, None, 1, 0o700, [0o700]), "mkdirat": (258, 34, 2, 0o700, [0o700]),
    "umask": (95, 166, 0, 0o700, [0]),
    "clone": (56, 220, 0, 0x10000, [0x10000]),  # threads
    "prlimit64": (302, 261, 0, 0xFFFFFFFF, [0]),  # its own limits
    "fcntl": (72, 25, 1, 0xFFFFFFFF, [*range(8), 1030]),  # copies, flags, locks; not signals, leases
}

def filter_calls(_):
    """seccomp: a program for the kernel's BPF machine. An instruction is (what to do, how many to skip if so,
    how many if not, operand). The call's number is at 0, the instruction set at 4, argument i at 16 + 8 i."""
    load, mask, equal, above, at_least, leave = 0x20, 0x54, 0x15, 0x25, 0x35, 0x06
    allow = (leave, 0, 0, 0x7FFF0000)
    refuse = (leave, 0, 0, 0x00050000 | 1)  # EPERM
    column = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
    program = [
        # Another instruction set, such as 32-bit x86, has other call numbers: kill the process.
        (load, 0, 0, 4), (equal, 1, 0, (0xC000003E, 0xC00000B7)[column]), (leave, 0, 0, 0x80000000),
        (load, 0, 0, 0), (at_least, 0, 1, NEWER), (leave, 0, 0, 0x00050000 | 38),  # ENOSYS
    ]
    entries = FORBIDDEN.split()[1 + column :: 3]
    for numbers in [entry.split(":") for entry in entries if entry != "-"]:
        program += [(at_least, 0, 2, int(numbers[0])), (above, 1, 0, int(numbers[-1])), refuse]
    for *numbers, argument, bits, passing in CHECKED.values():
        body = [(load, 0, 0, 16 + 8 * argument), (mask, 0, 0, bits)]
        for value in passing:
            body += [(equal, 0, 1, value), allow]
        if numbers[column] is not None:
            program += [(equal, 0, len(body) + 1, numbers[column]), *body, refuse]
    program.append(allow)
    # The kernel takes the number of instructions and a pointer to them.
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    pointer = struct.pack("HP", len(program), ctypes.addressof(code))
    libc("prctl", 22, 2, ctypes.create_string_buffer(pointer), 0, 0)

# In the order in which become_player() builds them.
WALLS = {
    "no rights": lambda _: libc("capset", struct.pack("Ii", 0x20080522, 0), bytes(24)),
    "no new rights": lambda _: libc("prctl", 38, 1, 0, 0, 0),  # the next two require it
    "Landlock": restrict_files,
    "seccomp": filter_calls,
    "limits": set_limits,  # last, as building the others takes memory
}

def end_with_parent(parent):
    """Let the kernel kill this process when its parent ends; end now if the parent already has."""
    libc("prctl", 1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)

def libc(function, *args):
    """Call the C library; OSError if it returns -1."""
    result = getattr(ctypes.CDLL(None, use_errno=True), function)(*args)
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
    return result

# 5. Messages and folders ------------------------------------------------------------------------------------

TAGGED = {kind.__name__: kind for kind in (tuple, set, frozenset, bytes, dict)}

def send(fd, value):
    """Write a message, a line of JSON. os.write() alone may stop halfway if the process is stopped."""
    with open(fd, "wb", closefd=False) as file:
        file.write(encode(value))

def receive(file, most=-1):
    """The next message, of at most so many bytes. EOFError if the writer is gone; ValueError, TypeError or
    LookupError if it is not a message."""
    line = file.readline(most)
    if not line.endswith(b"\n"):
        if len(line) == most:
            finish("output limit")
        raise EOFError
    return json.loads(line, object_hook=revive)

def encode(value):
    return json.dumps(plain(value)).encode() + b"\n"

def plain(value):
    """value in JSON's types; what JSON lacks becomes {type: list}, and collections' dictionaries plain ones.
    TypeError for everything else: no object of a program's own class gets out."""
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
    """The value that plain() turned into {type: list}."""
    ((kind, items),) = tagged.items()
    return TAGGED[kind](list(items))  # a list, as bytes(10**12) would take all memory

def fits(folder):
    """Whether a folder holds at most DISK bytes and FILES entries, nested no deeper than paths go."""
    size = entries = 0
    for path, folders, files in os.walk(folder):
        names = folders + files
        entries += len(names)
        if entries > FILES or len(os.fsencode(path)) > 1000:
            return False
        size += sum(512 * os.lstat(f"{path}/{name}").st_blocks for name in names)
    return size <= DISK

def remove(folder):
    """Delete a folder. Its processes have been killed, but the last may take a moment to be gone."""
    for _ in range(20):
        with contextlib.suppress(OSError):
            empty(folder)
            return os.rmdir(folder)
        time.sleep(0.01)

def empty(folder):
    """Delete all that lies in a folder, at any depth: what lies in its subfolders first moves up into it."""
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
