"""Run a program that a model wrote, and score it by tests that it never sees.

    verdict = run_code("print(int(input()) + 1)", [{"input": "1", "output": "2"}])    # .score 1.0

The rule matters more than the walls: expected results never enter the process that runs the program. It gets
inputs and returns data, and what compares is another process. Whatever it prints, returns or forges must equal
an expectation that it has never seen; its exit code means nothing; no answer is a 0. Four processes:

    caller     this one: starts `python -I -S sandbox.py`, sends one job, reads one line, kills what is late
    referee    forks the launcher and only then reads the tests; sends inputs, compares what comes back, watches
    launcher   forks a fresh player for every run of the program, and reads what it printed
    player     runs the program: it sees Python's libraries and an empty folder of its own (Landlock), has no
               network, no children, no signals for others (seccomp), no rights, and little of everything (limits)

A player cannot leave its process group, so killing that ends everything. No root, no namespaces, no container:
it works as any user and inside a container. Linux 5.13 or newer, x86-64 or arm64; elsewhere it refuses.

Promised: the program cannot read, write or delete files of others, reach the network, start or signal processes,
nor learn what is expected; it ends within 4 times its limit of processor time and half a second, and nothing of it
is left. Not stopped: seeing names, sizes and times of files; using one core, its memory and, in files that it has
deleted but holds open, at most 512 MB of disk until it ends; holes in the kernel; guessing right.

Standard library only; copy this file alone.
"""

import ctypes
import functools
import json
import os
import random
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field

OUTPUT = 8 << 20  # bytes that a program may print, a file may have, or an answer may take
INPUT = 1 << 30  # bytes of one message to it
DISK = 64 << 20  # bytes of its folder
FILES = 1000  # entries in it
THREADS = 256
DEPTH = 50  # of nested results
PATIENCE = 4  # seconds of wall clock per second of processor time
TICK = 0.05  # seconds between two looks of the referee
LIMITS = {"FSIZE": OUTPUT, "NOFILE": 64, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0}

# 1. The walls -----------------------------------------------------------------------------------------------

# Linux's numbers (x86-64, arm64) of the calls that fail with "not permitted". They make processes, send signals,
# reach out, look into other processes, change their priority, share memory, change files that Landlock leaves
# alone (their mode, owner, times), or undo what the parent has set.
FORBIDDEN = """
    fork 57 - vfork 58 - execve 59 221 execveat 322 281 kill 62 129 tkill 200 130 tgkill 234 131 rt_sigqueueinfo 129 138
    rt_tgsigqueueinfo 297 240 setpgid 109 154 setsid 112 157 prctl 157 167 socket 41 198 socketpair 53 199 ptrace 101 117
    process_vm_readv 310 270 process_vm_writev 311 271 kcmp 312 272 perf_event_open 298 241 userfaultfd 323 282
    unshare 272 97 setns 308 268 mount 165 40 umount2 166 39 pivot_root 155 41 chroot 161 51 bpf 321 280 syslog 103 116
    personality 135 92 fanotify_init 300 262 name_to_handle_at 303 264 open_by_handle_at 304 265 memfd_create 319 279
    add_key 248 217 request_key 249 218 keyctl 250 219 shmget 29 194 shmat 30 196 shmctl 31 195 semget 64 190
    semop 65 193 semctl 66 191 semtimedop 220 192 msgget 68 186 msgsnd 69 189 msgrcv 70 188 msgctl 71 187
    mq_open 240 180 mq_unlink 241 181 chmod 90 - fchmod 91 52 fchmodat 268 53 chown 92 - fchown 93 55 lchown 94 -
    fchownat 260 54 utime 132 - utimes 235 - futimesat 261 - utimensat 280 88 truncate 76 45 setxattr 188 5
    lsetxattr 189 6 fsetxattr 190 7 removexattr 197 14 lremovexattr 198 15 fremovexattr 199 16 setpriority 141 140
    sched_setparam 142 118 sched_setscheduler 144 119 sched_setattr 314 274 sched_setaffinity 203 122 ioprio_set 251 30
    migrate_pages 256 238 move_pages 279 239 setuid 105 146 setgid 106 144 setreuid 113 145 setregid 114 143
    setresuid 117 147 setresgid 119 149 setgroups 116 159""".split()
CLONE = (56, 220)
FCNTL = (72, 25)
PRLIMIT = (302, 261)
NEWER = 424  # newer calls (2019: pidfds, io_uring, clone3) fail with "no such call"; C libraries fall back


def libc(function, *args):
    """Call the C library; OSError where it returns -1."""
    result = getattr(ctypes.CDLL(None, use_errno=True), function)(*args)
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
    return result


def confine(folder, memory, seconds):
    """From here on this process can compute, and write to folder, and nothing else.

    Returns:
        dict: of each wall "on", or why it could not be built.
    """
    walls = {
        "no rights": drop_rights,
        "limits": functools.partial(set_limits, memory, seconds),
        "no new rights": functools.partial(libc, "prctl", 38, 1, 0, 0, 0),  # the next two walls ask for it
        "Landlock": functools.partial(restrict_files, folder),
        "seccomp": filter_calls,
    }
    states = {}
    for name, build in walls.items():
        try:
            build()
            states[name] = "on"
        except (OSError, AttributeError, ValueError, KeyError) as error:
            states[name] = str(error) or type(error).__name__
    return states


def drop_rights():
    """No capabilities, neither now nor after anything that may come, and a look whether they are gone."""
    header = struct.pack("Ii", 0x20080522, 0)
    for capability in range(64):
        try:
            libc("prctl", 24, capability, 0, 0, 0)  # of the bounding set; refused where there are none to drop
        except OSError:
            break
    libc("prctl", 47, 4, 0, 0, 0)  # the ambient ones
    libc("capset", header, bytes(24))
    left = ctypes.create_string_buffer(b"?" * 24, 24)
    libc("capget", header, left)
    if left.raw != bytes(24):
        raise OSError("capabilities are left")


def set_limits(memory, seconds):
    import resource

    limits = LIMITS | {"AS": memory, "CPU": int(seconds) + 2}  # whole seconds; the referee is more exact
    for name, limit in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(number, (limit, limit))


def restrict_files(folder):
    """Landlock: no file can be opened but Python's libraries, for reading, and what lies in folder.

    Each version of the kernel's interface knows more: 3 truncation, 4 TCP, 5 devices, 6 abstract sockets and signals.
    """
    version = libc("syscall", 444, None, 0, 1)
    kinds = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)  # of access to files, a bit each
    attributes = struct.pack("3Q", (1 << kinds) - 1, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = libc("syscall", 444, attributes, len(attributes), 0)
    read_file, read_folder, write_file, truncate = 1 << 2, 1 << 3, 1 << 1, 1 << 14
    change = write_file | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12  # remove and make folders, files, symbolic links
    change |= truncate if kinds > 14 else 0
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo"]
    allowed = dict.fromkeys([*libraries, f"{sys.base_prefix}/lib", *sys.path], read_file | read_folder)
    allowed |= {"/dev/null": read_file | write_file, folder: read_file | read_folder | change}
    for path, access in allowed.items():
        if os.path.exists(path):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            access &= -1 if os.path.isdir(path) else read_file | write_file
            libc("syscall", 445, rules, 1, struct.pack("=Qi", access, fd), 0)
            os.close(fd)
    libc("syscall", 446, rules, 0)
    os.close(rules)


def filter_calls():
    """seccomp: forbidden calls fail with EPERM, newer ones with ENOSYS; another instruction set kills."""
    column = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
    load, equal, at_least, any_bit, leave = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions of the filter's machine
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x00050001
    program = [
        (load, 0, 0, 4), (equal, 1, 0, (0xC000003E, 0xC00000B7)[column]), (leave, 0, 0, kill),
        (load, 0, 0, 0), (at_least, 0, 1, NEWER), (leave, 0, 0, 0x00050000 | 38),
    ]
    for number in FORBIDDEN[1 + column :: 3]:
        program += [(equal, 0, 1, int(number)), (leave, 0, 0, refuse)] if number != "-" else []
    # clone: for threads only. fcntl: not its signals, leases and pipe sizes. prlimit64: of oneself. The arguments lie at
    # 16 + 8 i, their lower halves first.
    program += [(equal, 0, 4, CLONE[column]), (load, 0, 0, 16), (any_bit, 1, 0, 0x10000), (leave, 0, 0, refuse)]
    program += [(leave, 0, 0, allow), (equal, 0, 5, FCNTL[column]), (load, 0, 0, 24), (at_least, 0, 2, 8)]
    program += [(equal, 1, 0, 1030), (leave, 0, 0, refuse), (leave, 0, 0, allow)]
    program += [(equal, 0, 3, PRLIMIT[column]), (load, 0, 0, 16), (equal, 1, 0, 0), (leave, 0, 0, refuse)]
    program += [(leave, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    libc("prctl", 22, 2, ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code))), 0, 0)


# 2. Messages: eight bytes of length, then JSON. Of a program's results nothing but Python's own types pass. ---------


def send(fd, value):
    data = json.dumps(plain(value)).encode()
    data = len(data).to_bytes(8, "big") + data
    while data:
        data = data[os.write(fd, data[: 1 << 20]) :]


def receive(fd, most=OUTPUT):
    """The next message. Failed for whatever is none: a stray write to the pipe, its end, too much."""

    def read(count):
        parts = []
        while count:
            parts.append(os.read(fd, min(count, 1 << 20)))
            if not parts[-1]:
                raise Failed("died")
            count -= len(parts[-1])
        return b"".join(parts)

    length = int.from_bytes(read(8), "big")
    if length > most:
        raise Failed("output limit")
    try:
        return json.loads(read(length), object_hook=revive)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise Failed("died: something else than a result came back") from None


def plain(value, depth=0):
    """value in JSON's types, what JSON lacks as {type: content}. Of subclasses only the dictionaries of collections pass,
    as plain ones."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if depth == DEPTH:
        raise ValueError(f"a result nested more than {DEPTH} deep")
    if kind is list:
        return [plain(x, depth + 1) for x in value]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [plain(x, depth + 1) for x in value]}
    if kind is dict or issubclass(kind, dict) and kind.__module__ == "collections":
        return {"dict": [[plain(k, depth + 1), plain(v, depth + 1)] for k, v in value.items()]}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is bytes:
        return {"bytes": value.hex()}
    raise TypeError(f"a result of type {kind.__name__}")


def revive(tagged):
    """What plain() made of a value, back again, in json.loads(object_hook=revive)."""
    ((kind, content),) = tagged.items()
    if kind == "dict":
        return dict(content)
    if kind in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](content)
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    raise ValueError(f"an unknown type {kind!r}")


class Failed(BaseException):  # so that no `except Exception` of a test swallows it
    """The program did not pass; the text is the verdict's reason."""


# 3. Launcher and player -------------------------------------------------------------------------------------

# What LeetCode and its like import beforehand. math.pow would hide the built-in pow.
PREAMBLE = """
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string
from bisect import *; from collections import *; from functools import *; from heapq import *; from itertools import *
from math import *; from typing import *
del pow
"""


def launch(requests, replies, control):
    """Answer requests, each to run the program once. To control go its process and, at its end, how it went."""
    libc("prctl", 1, signal.SIGKILL, 0, 0, 0)  # do not outlive the referee
    try:
        with open("/proc/self/oom_score_adj", "w") as file:  # if memory runs out, this goes first and not the trainer
            file.write("1000")
    except OSError:
        pass
    while True:
        request = receive(requests, INPUT)
        stdin = os.memfd_create("stdin")  # files: no pipe that could be full or empty
        stdout = os.memfd_create("stdout")
        os.write(stdin, request["stdin"].encode("utf-8", "surrogatepass")) if request["stdin"] else None
        os.lseek(stdin, 0, os.SEEK_SET)
        folder = f"{request['base']}/run"
        os.mkdir(folder)
        player = os.fork()
        if player == 0:
            libc("prctl", 1, signal.SIGKILL, 0, 0, 0)
            os.chdir(folder)
            null = os.open("/dev/null", os.O_WRONLY)
            for fd, place in ((stdin, 0), (stdout, 1), (null, 2), (requests, 100), (replies, 101), (100, 3), (101, 4)):
                os.dup2(fd, place)
            os.closerange(5, 1 << 16)
            play(request, folder)
            sys.exit()  # as at the end of any program: threads are waited for, exit handlers run, output is written
        send(control, ["started", player])
        _, status, usage = os.wait4(player, 0)
        printed = os.pread(stdout, OUTPUT, 0).decode("utf-8", "surrogateescape")
        os.close(stdin)
        os.close(stdout)
        remove(folder)
        send(control, ["ended", os.WIFSIGNALED(status), usage.ru_utime + usage.ru_stime, printed])


def play(request, folder):
    """Run the program: as `python solution.py`, or as a module whose functions are called until the pipe ends.

    Replies are ["walls", states], ["loaded"], ["value", result] and ["raised", name of the exception's type].
    """
    import _sitebuiltins
    import builtins

    is_module = request["is_module"]
    builtins.exit = _sitebuiltins.Quitter("exit", "Ctrl-D")
    builtins.quit = _sitebuiltins.Quitter("quit", "Ctrl-D")
    module = type(sys)("solution" if is_module else "__main__")
    module.__file__ = "solution.py"
    sys.modules[module.__name__] = module
    sys.argv = ["solution.py"]
    os.environ.clear()
    os.environ["TMPDIR"] = folder
    if is_module:
        exec(PREAMBLE, module.__dict__)
    walls = confine(folder, request["memory"], request["seconds"])
    send(4, ["walls", walls])
    if set(walls.values()) != {"on"} and not request["unsafe"]:
        os._exit(0)

    try:
        try:
            exec(compile(request["prompt"], "prompt.py", "exec"), module.__dict__)
        except Exception:
            pass  # it is a question in words
        exec(compile(request["source"], "solution.py", "exec"), module.__dict__)
        if is_module:
            send(4, ["loaded"])
        while is_module:
            name, args, kwargs = receive(3, INPUT)
            holder = module if hasattr(module, name) else module.Solution()
            send(4, ["value", getattr(holder, name)(*args, **kwargs)])
    except BaseException as error:  # a program may raise anything
        if is_module or not isinstance(error, SystemExit):
            send(4, ["raised", type(error).__name__])
            os._exit(1)


def remove(folder):
    """Delete a folder, however deep a program has nested it: what is in a folder is moved up before it goes."""
    pending = [folder]
    for number, path in enumerate(pending):
        for entry in os.scandir(path):
            if entry.is_dir(follow_symlinks=False):
                pending.append(f"{folder}-{number}-{len(pending)}")
                os.rename(entry.path, pending[-1])
            else:
                os.unlink(entry.path)
        os.rmdir(path)


# 4. Referee -------------------------------------------------------------------------------------------------


class Player:
    """The referee's end of the pipes, and its watch over what the program uses."""

    def __init__(self, settings):
        self.settings = settings
        self.passed = 0
        self.test = 1  # the number of the one that is running
        self.pid = None  # of the process that runs it
        self.spent = 0.0  # seconds of processor time of those that ended
        self.walls = None
        self.deadline = time.monotonic() + PATIENCE * settings["seconds"]
        requests, self.requests = os.pipe()
        self.replies, replies = os.pipe()
        self.control, control = os.pipe()
        if os.fork() == 0:
            for fd in (self.requests, self.replies, self.control):
                os.close(fd)
            launch(requests, replies, control)
        for fd in (requests, control):  # but not replies: a program that closes its end must not look like a dead launcher
            os.close(fd)

    def watch(self, *_):
        """Every tick: Failed where a limit is broken."""
        reason = None
        try:
            used = self.spent + (time.clock_gettime(~self.pid << 3 | 2) if self.pid else 0)  # that process's clock
            threads = len(os.listdir(f"/proc/{self.pid}/task")) if self.pid else 0
        except OSError:
            return  # it has just ended
        if used > self.settings["seconds"] or time.monotonic() > self.deadline:
            reason = "time limit"
        elif threads > THREADS:
            reason = "thread limit"
        elif not fits(f"{self.settings['base']}/run"):
            reason = "disk limit"
        if reason:
            raise Failed(reason)

    def start(self, is_module=False, stdin=""):
        """Run the program anew."""
        send(self.requests, self.settings | {"is_module": is_module, "stdin": stdin})
        _, self.pid = receive(self.control)
        kind, walls = self.reply()
        self.walls = self.walls or walls  # of the first run, before which no line of the program has run
        if set(self.walls.values()) != {"on"} and not self.settings["unsafe"]:
            raise Failed("no sandbox")

    def reply(self):
        """The next reply of the player. Failed if it raised something or is gone."""
        while not select.select([self.replies], [], [], 0)[0]:
            if select.select([self.replies, self.control], [], [])[0] == [self.control]:
                self.end()
                raise Failed("died")
        message = receive(self.replies)
        match message:
            case ["raised", str(name)]:
                name = name[:80] if name.isidentifier() else "something"  # a program names its exceptions as it likes
                raise Failed("memory limit" if name == "MemoryError" else f"raised {name} in test {self.test}")
            case [str(kind), *content] if len(content) < 2:
                return kind, *content, *[None] * (1 - len(content))
        raise Failed("died: something else than a result came back")

    def end(self):
        """Wait for the end of a program; what it printed."""
        _, signaled, seconds, printed = receive(self.control, 8 * OUTPUT)
        self.pid = None
        self.spent += seconds
        if self.spent > self.settings["seconds"]:
            raise Failed("time limit")
        if len(printed) >= OUTPUT - 3:  # a character cut in the middle counts less
            raise Failed("output limit")
        if signaled:
            raise Failed("died")
        return printed

    def call(self, name, args, kwargs):
        send(self.requests, [name, args, kwargs])
        kind, value = self.reply()
        if kind != "value":
            raise Failed("died: something else than a result came back")
        return value


def fits(folder):
    """Whether a folder holds no more than DISK bytes and FILES entries."""
    size = entries = 0
    pending = [folder]
    try:
        while pending:
            for entry in os.scandir(pending.pop()):
                entries += 1
                size += 512 * entry.stat(follow_symlinks=False).st_blocks
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                if size > DISK or entries > FILES:
                    return False
    except FileNotFoundError:
        pass  # it has just been deleted
    except OSError:
        return False  # nested deeper than a path may be long
    return True


def judge_stdin(player, tests):
    """Each test runs the program anew and compares its output."""
    for player.test, stdin, expected in tests:
        player.start(stdin=stdin)
        if select.select([player.replies, player.control], [], [])[0] == [player.replies]:
            player.reply()
        if not same_output(player.end(), expected):
            raise Failed(f"wrong output in test {player.test}")
        player.passed += 1


def judge_calls(player, tests):
    """Each test calls a function; all in one process."""
    player.start(is_module=True)
    player.reply()
    for player.test, name, args, accepted in tests:
        result = player.call(name, args, {})
        if not any(same_value(result, expected) for expected in accepted):
            raise Failed(f"wrong output in test {player.test}")
        player.passed += 1


def judge_check(player, tests):
    """HumanEval: check(candidate), on this side of the pipe, where candidate() asks the player. Tests are its calls."""
    ((_, test, entry_point),) = tests
    calls = []

    def candidate(*args, **kwargs):
        calls.append(args)
        player.test = len(calls)
        return player.call(entry_point, args, kwargs)

    player.start(is_module=True)
    player.reply()
    names = {}
    try:
        exec(player.settings["prompt"], names)  # some checks use a function that the prompt defines
    except Exception:
        pass  # it is a question in words
    names[entry_point] = candidate
    try:
        exec(test, names)
        names["check"](candidate)
    except AssertionError:
        raise Failed(f"wrong output in test {player.test}") from None
    except Exception as error:
        raise Failed(f"the check raised {type(error).__name__} in test {player.test}") from None
    if not calls:
        raise Failed("the check never calls its candidate")
    player.passed = 1


def same_output(printed, expected):
    """As judges compare: blanks at the ends of lines and empty lines at the end do not count; a number for a decimal may be
    1e-6 off, relative or absolute; everything else is exact. Lines end at \\n only."""
    lines = [[line.rstrip() for line in text.rstrip().split("\n")] for text in (printed, expected)]
    return len(lines[0]) == len(lines[1]) and all(map(same_line, *lines))


def same_line(printed, expected):
    if printed == expected:
        return True
    xs, ys = (re.split(r"(\s+)", line) for line in (printed, expected))
    return len(xs) == len(ys) and all(x == y or close_decimal(x, y) for x, y in zip(xs, ys))


def close_decimal(printed, expected):
    number = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
    if not (re.fullmatch(number, printed) and re.fullmatch(number, expected) and re.search("[.eE]", expected)):
        return False
    return abs(float(printed) - float(expected)) <= 1e-6 * max(1, abs(float(expected)))


def same_value(result, expected):
    """Equal and of the same type, all the way down, but: a float may be met by a close float or int, a list (JSON has no
    tuples) by a tuple."""
    kind = type(expected)
    if kind in (float, complex):
        if type(result) not in (int, float, kind):
            return False
        both_nan = result != result and expected != expected
        try:  # 1e-12 for sums that should be 0, and no more: 0.0 is not 1e-9
            return both_nan or result == expected or abs(result - expected) <= max(1e-12, 1e-6 * abs(expected)) < 1e300
        except OverflowError:  # an int beyond all floats
            return False
    if kind is list and type(result) is tuple:
        result = list(result)
    if type(result) is not kind:
        return False
    if kind in (list, tuple):
        return len(result) == len(expected) and all(map(same_value, result, expected))
    if kind in (dict, set, frozenset):
        typed = [{(type(key), key) for key in keys} for keys in (result, expected)]  # or True would be the key 1
        return typed[0] == typed[1] and (kind is not dict or all(same_value(result[k], expected[k]) for k in expected))
    return result == expected


def main():
    """The referee. Its input is a job, its output one line of JSON: {"reason", "passed", "walls"}."""
    settings = json.loads(sys.argv[1])
    player = Player(settings)  # forked before the tests are read
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    verdict, sys.stdout = sys.stdout, sys.stderr  # a check may print
    reason = "passed"
    try:
        job = json.loads(sys.stdin.buffer.read(), object_hook=revive)
        player.settings |= {"source": job["source"], "prompt": job["prompt"]}
        signal.signal(signal.SIGALRM, player.watch)
        signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
        {"stdin": judge_stdin, "calls": judge_calls, "check": judge_check}[job["kind"]](player, job["tests"])
    except Failed as failure:
        reason = str(failure)
    except BrokenPipeError:
        reason = "died"
    except MemoryError:
        reason = "output limit"
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps({"reason": reason, "passed": player.passed, "walls": player.walls}), file=verdict, flush=True)


# 5. Caller --------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What a verifier says about one reply."""

    score: float | None  # 1.0, 0.0, or None: unknown, it says nothing about the reply
    reason: str  # "passed", or why not: "wrong output in test 3", "time limit", "unknown: ...", ...
    seconds: float = 0.0  # that judging took
    components: dict = field(default_factory=dict)  # of code: "passed" tests out of "tests"


def run_code(source, tests, *, entry_point="", prompt="", seconds=10.0, memory=1 << 30, limit=0, seed=0, unsafe=False):
    """Run a program on tests, isolated from everything.

    Args:
        source: Python, any text.
        tests: in a shape that check_tests() reads.
        entry_point: the function to test, for HumanEval's shape.
        prompt: code that runs before source, and beside HumanEval's check. A text that is no code is passed over.
        seconds: of processor time, for all tests together; 4 times that of wall clock. The verdict comes half a second
            later at most. No more programs run at a time than there are cores; waiting for one does not count.
        memory: bytes of address space.
        limit: tests to take, 0 for all; a sample of them depends on seed alone.
        unsafe: run even where walls are missing.
    Returns:
        Verdict, score 1 where every test passes. The first that fails ends the run. None where the machine is to blame:
        no process or folder could be made, or not even a program that is known to be right passes any more.
    Raises:
        ValueError: tests in no known shape; no isolation here, and unsafe does not allow that.
    """
    start = time.perf_counter()
    job = check_tests(tests, "tests", entry_point) | {"source": source, "prompt": prompt}
    require_sandbox(unsafe)
    if 0 < limit < len(job["tests"]):
        job["tests"] = sorted(random.Random(seed).sample(job["tests"], limit), key=lambda test: test[0])
    found = referee(job, seconds, memory, unsafe)
    if found["reason"].startswith(("no sandbox", "no verdict")):
        known = {"kind": "stdin", "tests": [(1, "", "1")], "source": "print(1)", "prompt": ""}
        works = referee(known, 10.0, 1 << 30, unsafe)["reason"] == "passed"
        found["reason"] = "died" if works else f"unknown: {found['reason']}"
    score = None if found["reason"].startswith("unknown") else float(found["reason"] == "passed")
    components = {"passed": found["passed"], "tests": len(job["tests"])}
    return Verdict(score, found["reason"], time.perf_counter() - start, components)


def check_tests(tests, where, entry_point=""):
    """Tests of a code problem, read.

    Args:
        tests: in one of these shapes
            HumanEval     a text that defines check(candidate); entry_point names the function
            programs      [{"input": text for standard input, "output": text expected on standard output}, ...]
            functions     [{"fn_name" or "call": name, "args": [...], "expected": value}, ...]
            APPS          {"inputs": [...], "outputs": [...]}, texts (or lists of lines) as above; with "fn_name", inputs are
                          lists of arguments and outputs values, each in a list of one where all are
        where: what to name in errors.
        entry_point: of HumanEval's shape.
    Returns:
        dict: "kind" ("check", "calls" or "stdin") and "tests", a list of tuples that begin with the number of the test: of
        programs (number, input, output), of functions (number, name, args, results of which each is right).
    Raises:
        ValueError for any other shape.
    """

    def must(condition, message):
        if not condition:
            raise ValueError(f"{where}: {message}")

    def text(value):
        value = "\n".join(value) if isinstance(value, list) and all(isinstance(x, str) for x in value) else value
        must(isinstance(value, str), f"a test of a program must be text, not {str(value)[:80]!r}")
        return value

    wrapped = False
    must(tests, "there are no tests")
    if isinstance(tests, str):
        must(re.search(r"^def check\(", tests, re.MULTILINE), "tests that are a text must define check(candidate), as HumanEval's")
        must(isinstance(entry_point, str) and entry_point.isidentifier(), "entry_point must name the function that check() is given")
        return {"kind": "check", "tests": [(1, tests, entry_point)]}
    if isinstance(tests, dict):
        inputs, outputs = tests.get("inputs"), tests.get("outputs")
        must(isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs) > 0,
             "tests need lists inputs and outputs of the same length, at least 1")
        name = tests.get("fn_name")
        if name is None:
            tests = [{"input": text(a), "output": text(b)} for a, b in zip(inputs, outputs)]
        else:
            wrapped = all(isinstance(x, list) and len(x) == 1 for x in outputs)
            tests = [{"fn_name": name, "args": a, "expected": b} for a, b in zip(inputs, outputs)]
    must(isinstance(tests, list) and all(isinstance(test, dict) for test in tests), f"unknown kind of tests: {str(tests)[:80]!r}")
    if all({"input", "output"} <= {*test} for test in tests):
        return {"kind": "stdin", "tests": [(i, text(t["input"]), text(t["output"])) for i, t in enumerate(tests, 1)]}
    read = []
    for i, test in enumerate(tests, 1):
        name = test.get("fn_name", test.get("call"))
        must(isinstance(name, str) and name.isidentifier() and isinstance(test.get("args"), list) and "expected" in test,
             f"test {i} has neither input and output nor fn_name (or call), args and expected")
        try:
            json.dumps(plain([test["args"], test["expected"]], depth=5))  # deeper by then in what is sent
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: test {i}: {str(error).replace('result', 'value')}") from None
        read.append((i, name, test["args"], [test["expected"], *(test["expected"] if wrapped else [])]))
    return {"kind": "calls", "tests": read}


@functools.lru_cache(maxsize=1)
def slots():
    """As many as there are cores for this process, shared by all that torchrun started here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threading.BoundedSemaphore(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def referee(job, seconds, memory, unsafe):
    """What the referee says of a job: its dictionary, whose reason begins with "no verdict" where it said nothing."""
    with slots():
        try:
            with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as base:
                settings = {"base": base, "seconds": seconds, "memory": memory, "unsafe": unsafe}
                said, late = converse(settings, json.dumps(plain(job)).encode(), PATIENCE * seconds + 0.3)
                for left in os.listdir(base):
                    remove(os.path.join(base, left))
        except (OSError, MemoryError) as error:
            return {"reason": f"unknown: {type(error).__name__}: {error}", "passed": 0, "walls": None}
    if said:
        return json.loads(said)
    return {"reason": "time limit" if late else "no verdict came back", "passed": 0, "walls": None}


def converse(settings, job, timeout):
    """(the referee's output, whether it was too late). In the end all of its processes are gone."""
    command = [sys.executable, "-I", "-S", "-X", "utf8", os.path.abspath(__file__), json.dumps(settings)]
    environment = {"MALLOC_ARENA_MAX": "1"}  # or each thread reserves another 64 MB of address space
    if "LD_LIBRARY_PATH" in os.environ:  # Python may need it
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, cwd="/",
        start_new_session=True,
    )
    late = False
    said = b""
    try:
        said, _ = process.communicate(job, timeout=timeout)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # no one in it could leave the group
        except ProcessLookupError:
            pass
        process.wait()
    return said, late


# Emulated kernels (gVisor) may accept the calls without enforcing them, so every wall is tried.
PROBE = """
import os, resource, socket, signal, ctypes
def refused(call, *args):
    try:
        call(*args)
    except OSError as error:
        return error.errno in (1, 13)
open("own", "w").write("x")
libc = ctypes.CDLL(None, use_errno=True)
print(refused(open, "/etc/passwd"), refused(open, "/proc/self/status"), refused(open, "/tmp/x", "w"),
      refused(os.listdir, "/"), refused(os.fork), refused(socket.socket), refused(os.kill, os.getppid(), 0),
      refused(os.setsid), refused(os.execv, "/bin/true", ["true"]), libc.ptrace(0, 0, 0, 0), os.listdir("."),
      resource.getrlimit(resource.RLIMIT_NOFILE)[1] <= 64, resource.getrlimit(resource.RLIMIT_CPU)[1] < 99)
"""
PROBED = "True True True True True True True True True -1 ['own'] True True"


@functools.lru_cache(maxsize=1)
def sandbox_walls():
    """The walls on this machine: {name: "on", or why it could not be built}. Tried once, with a program of ours."""
    if sys.platform != "linux":
        return {"Landlock and seccomp": f"Linux has them, this is {sys.platform}"}
    found = referee({"kind": "stdin", "tests": [(1, "", PROBED)], "source": PROBE, "prompt": ""}, 10.0, 1 << 30, True)
    return {**(found["walls"] or {}), "they hold": "on" if found["reason"] == "passed" else found["reason"]}


def require_sandbox(unsafe=False):
    """ValueError where walls are missing and unsafe does not allow that. Returns the walls."""
    walls = sandbox_walls()
    missing = [f"{name} ({why})" for name, why in walls.items() if why != "on"]
    if missing and not unsafe:
        raise ValueError(
            f"this platform cannot isolate programs that a model wrote, it lacks: {', '.join(missing)}; "
            "--unsafe-local-execution runs them all the same, with the rights of this user"
        )
    return walls


if __name__ == "__main__":
    main()
