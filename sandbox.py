"""Run a program that a model wrote."""

import atexit
import ctypes
import inspect
import itertools
import json
import marshal
import math
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import lru_cache

# 3. Code --------------------------------------------------------------------------------------------------------------
# What decides is the verdict rule, before any wall: expected outputs never come near the program that a model wrote. It
# gets inputs and returns data, and what compares is another process. Four processes, three of them for each verdict:
#
#   this one      holds problems and models; it starts a supervisor, waits for one line of JSON, kills it when it is late
#   supervisor    forks the sandbox and only then reads the tests, so that its child cannot have them; sends inputs, parses
#                 what comes back, compares, runs HumanEval's `check`; it kills and reaps the sandbox before it answers
#   init          the first process of the sandbox's namespaces: builds the walls, forks the candidate, reports its end
#   candidate     runs the model's code under every limit, with two descriptors besides the standard three
#
# Whatever the candidate writes, prints or forges is data that must equal an expectation it has never seen. Its exit code
# means nothing, and where no answer comes the score is 0. The functions below that run in those processes are ordinary
# ones whose source is handed over (child_program), so that a child starts as a bare `python -I -S` without torch: some 40
# ms in all. They use nothing but the standard library and each other.

OUTPUT = 8 << 20  # bytes that a program may print, a file may have, or an answer may take
DISK = 64 << 20  # bytes of its file system, which lies in memory
PROCESSES = 64  # threads, for it may not fork
DEPTH = 50  # of nested results
NOBODY = 65534
# Numbers of Linux calls (x86-64, arm64) that no solution needs and that reach out of the sandbox or around its limits.
# fork, vfork, execve, ptrace and the like: the tree stays one process. Sockets, keys, shared memory that no limit counts,
# mounts and further namespaces, in which the candidate would be root again. clone is let through for threads only.
CLONE = (56, 220)
FORBIDDEN = {
    "socket": (41, 198), "socketpair": (53, 199), "fork": (57,), "vfork": (58,), "execve": (59, 221), "ptrace": (101, 117),
    "execveat": (322, 281), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "memfd_create": (319, 279), "shmget": (29, 194),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "personality": (135, 92), "fanotify_init": (300, 262),
}
NEWER = 424  # calls from here on (2019: pidfd, io_uring, clone3, new mounts) "do not exist"; C libraries know how to do without
NAMESPACES = {"user": 0x10000000, "mount": 0x20000, "pid": 0x20000000, "network": 0x40000000, "ipc": 0x08000000}


class Failed(Exception):
    """The candidate did not pass; its text is the verdict's reason."""


class TimeIsUp(BaseException):
    """Raised by the supervisor's alarm, wherever it is."""


def libc(function, *args):
    """Call the C library; OSError where it says -1."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, function)(*args) == -1:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")


def attempt(layers, name, build, *args):
    """layers[name] = "on", or why this wall could not be built."""
    try:
        build(*args)
        layers[name] = "on"
    except (OSError, AttributeError, ValueError) as error:  # AttributeError: a C library without this function
        layers[name] = str(error) or type(error).__name__


def die_with_parent():
    libc("prctl", 1, signal.SIGKILL, 0, 0, 0)


def send(fd, nonce, data):
    """A frame: nonce, length, bytes; data that are not bytes go as packed()."""
    data = data if type(data) is bytes else packed(data)
    data = nonce + len(data).to_bytes(8, "big") + data
    while data:
        data = data[os.write(fd, data) :]


def receive(fd, nonce, raw=False, most=OUTPUT):
    """The next frame. Raises Failed at whatever is none: a stray write to the pipe, its end, too much."""

    def read(count):
        parts = []
        while count:
            parts.append(os.read(fd, min(count, 1 << 20)))
            if not parts[-1]:
                raise Failed("died")
            count -= len(parts[-1])
        return b"".join(parts)

    if read(len(nonce)) != nonce:
        raise Failed("died: something else than an answer came back")
    length = int.from_bytes(read(8), "big")
    if length > most:
        raise Failed("output limit")
    data = read(length)
    try:
        return data if raw else json.loads(data, object_hook=revive)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise Failed("died: something else than an answer came back") from None


def packed(value):
    return json.dumps(plain(value)).encode()


def plain(value, depth=0):
    """value in JSON's types: lists as they are, what JSON lacks as {type: content}. Exactly Python's own types pass: of a
    subclass nothing but its name is known, except the dictionaries of collections, which go as plain ones."""
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
    """What plain() made of a value, back again, within json.loads(object_hook=revive)."""
    ((kind, content),) = tagged.items()
    if kind == "dict":
        return {key: value for key, value in content}
    if kind in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](content)
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    raise ValueError(f"an unknown type {kind!r}")


# In the sandbox: init and candidate


def sandbox(nonce, memory, seconds, unsafe):
    """From the fork to the end of the child of the supervisor. Requests are read from descriptor 3, replies go to 4."""
    layers = {}
    for name, number in NAMESPACES.items():
        attempt(layers, f"{name} namespace", libc, "unshare", number)
    attempt(layers, "killed with its parent", die_with_parent)
    try:
        with open("/proc/self/oom_score_adj", "w") as file:  # where memory runs out it goes first, not the trainer
            file.write("1000")
    except OSError:
        pass
    send(4, nonce, layers)
    layers = receive(3, nonce)  # by now the supervisor has mapped the users
    init = os.fork()  # a pid namespace begins with the children of the process that asked for it
    if init:
        os.closerange(3, 5)
        os.waitpid(init, 0)
        return
    folder = os.getcwd()
    attempt(layers, "private file system", private_root, layers["mount namespace"])
    if layers["private file system"] != "on":
        os.chdir(folder)
    attempt(layers, "no rights", drop_rights)
    attempt(layers, "killed with its parent", die_with_parent)  # a change of user has cleared it
    limits = {"AS": memory, "CPU": int(seconds) + 1, "FSIZE": OUTPUT, "NOFILE": 64, "NPROC": PROCESSES, "CORE": 0, "MEMLOCK": 0,
              "MSGQUEUE": 0}
    while True:
        request = receive(3, nonce, most=2 * DISK)
        stdin, stdout = unnamed_file(request["stdin"].encode("utf-8", "surrogatepass")), unnamed_file(b"")
        if child := os.fork():
            status = os.waitpid(child, 0)[1]
            if os.getpid() == 1:  # alone in a namespace; elsewhere this would end all of the user's processes
                try:
                    os.kill(-1, signal.SIGKILL)
                    while True:
                        os.wait()
                except (ProcessLookupError, ChildProcessError):
                    pass
            send(4, nonce, ["gone", status])
            send(4, nonce, os.pread(stdout.fileno(), OUTPUT, 0))
        else:
            os.dup2(1, 2)  # 0 and 1 are still /dev/null
            os.dup2(stdin.fileno(), 0)
            os.dup2(stdout.fileno(), 1)
            os.closerange(5, 1 << 16)
            attempt(layers, "limits", set_limits, limits)
            attempt(layers, "killed with its parent", die_with_parent)
            attempt(layers, "no new privileges", libc, "prctl", 38, 1, 0, 0, 0)
            attempt(layers, "system call filter", filter_calls)
            send(4, nonce, ["layers", layers])
            if unsafe or set(layers.values()) == {"on"}:
                candidate(nonce, request)
            os._exit(0)


def unnamed_file(content):
    """Standard input and output are files: no pipe to fill or to wait for, and a limit on files limits the output."""
    file = open(".unnamed", "w+b")
    os.unlink(".unnamed")
    file.write(content)
    file.seek(0)
    return file


def private_root(namespace):
    """A file system of its own: Python's and C's libraries, read-only, and an empty /tmp in memory. No /proc, no devices."""
    if namespace != "on":
        raise OSError("no mount namespace")
    recursive, private, bind, no_suid_no_dev, detach = 0x4000, 1 << 18, 0x1000, 6, 2
    new = "/proc"  # hidden from here on: a folder that is there on every Linux, and not needed any more

    def memory(path, options):
        os.makedirs(path, exist_ok=True)
        libc("mount", b"tmpfs", path.encode(), b"tmpfs", no_suid_no_dev, options)

    def read_only(path, flags):  # by mount_setattr: unlike a second mount() it reaches the mounts below. A device must stay one.
        attributes = struct.pack("4Q", 1 | 2 | 4 * (not path.endswith("/dev/null")), 0, 0, 0)
        libc("syscall", 442, -100, path.encode(), flags, attributes, len(attributes))

    libc("mount", b"none", b"/", None, recursive | private, None)
    memory(new, b"size=1m,nr_inodes=1024,mode=755")
    memory(f"{new}/tmp", f"size={DISK},nr_inodes=1024,mode=1777".encode())
    bound = []
    for path in ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/dev/null", f"{sys.base_prefix}/lib", *sys.path]:
        if any(path == b or path.startswith(b + "/") for b in bound) or not os.path.exists(path):
            continue
        bound.append(path)
        target = new + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):  # /lib is /usr/lib on most systems
            os.symlink(os.readlink(path), target)
            continue
        os.mkdir(target) if os.path.isdir(path) else open(target, "x").close()
        libc("mount", path.encode(), target.encode(), None, bind | recursive, None)
        read_only(target, 0x8000)
    os.chdir(new)
    libc("syscall", FORBIDDEN["pivot_root"][machine()], b".", b".")
    libc("umount2", b".", detach)
    read_only("/", 0)
    os.chdir("/tmp")


def drop_rights():
    """No user that owns anything, and none of the rights that come with a new user namespace."""
    try:
        os.setgroups([])
    except PermissionError:
        pass  # refused where somebody other than root made the namespace
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    libc("capset", struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))


def set_limits(limits):
    for name, limit in limits.items():
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is not None:  # not every system knows all
            hard = resource.getrlimit(number)[1]
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(number, (limit, limit))


def machine():
    """Which column of the call numbers holds."""
    try:
        return {"x86_64": 0, "aarch64": 1}[os.uname().machine]
    except KeyError:
        raise OSError(f"no table of system calls for {os.uname().machine}") from None


def filter_calls():
    """A seccomp filter. Forbidden calls fail with EPERM, unknown ones with ENOSYS; another instruction set kills."""
    column = machine()
    load, equal, at_least, any_bit, leave = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF's instructions
    kill, allow, fail = 0x80000000, 0x7FFF0000, 0x00050000
    program = [
        (load, 0, 0, 4), (equal, 1, 0, (0xC000003E, 0xC00000B7)[column]), (leave, 0, 0, kill),  # the architecture
        (load, 0, 0, 0), (at_least, 0, 1, NEWER), (leave, 0, 0, fail | 38),  # its number
    ]
    for numbers in FORBIDDEN.values():
        program += [(equal, 0, 1, numbers[column]), (leave, 0, 0, fail | 1)] if len(numbers) > column else []
    program += [(equal, 1, 0, CLONE[column]), (leave, 0, 0, allow), (load, 0, 0, 16)]  # the first argument: flags
    program += [(any_bit, 1, 0, 0x10000), (leave, 0, 0, fail | 1), (leave, 0, 0, allow)]  # CLONE_THREAD
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    libc("prctl", 22, 2, header, 0, 0)


def candidate(nonce, request):
    """Run the model's code: as a program that ends, or as a module whose functions are called until the pipe ends.

    Replies are ["loaded"] or ["ended"], ["value", result], ["raised", name of the exception's type].
    """
    as_module = request["module"]
    module = type(sys)("solution" if as_module else "__main__")
    sys.modules[module.__name__], sys.argv = module, ["solution.py"]
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
    os.environ.clear()

    def report(function, *args, **kwargs):
        try:
            reply = packed(function(*args, **kwargs))
        except BaseException as error:  # the code of a model may raise anything
            reply = packed(["raised", type(error).__name__])
        send(4, nonce, reply)

    def call(name, args, kwargs):
        functions = module.__dict__
        function = functions[name] if name in functions else getattr(functions["Solution"](), name)
        return ["value", function(*args, **kwargs)]

    def load():
        try:
            exec(compile(request["prompt"], "prompt.py", "exec"), module.__dict__)
        except Exception:
            pass  # it is a question in words
        try:
            exec(compile(request["source"], "solution.py", "exec"), module.__dict__)
        except SystemExit:
            if as_module:
                raise
        if as_module:
            return ["loaded"]
        if "threading" in sys.modules:  # what the interpreter does at its end; programs print in threads and exit handlers
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        return ["ended"]

    report(load)
    while as_module:
        report(call, *receive(3, nonce, most=2 * DISK))


# Outside the sandbox: the supervisor


def supervise():
    """Main function of the supervisor. Its input is a job (see run_code), its output two lines of JSON: the layers as soon as
    the sandbox stands, and [reason, tests passed]."""
    memory, seconds, unsafe = json.loads(sys.argv[1])
    try:
        die_with_parent()
        libc("prctl", 36, 1, 0, 0, 0)  # processes that lose their parent become its children, so that it can wait for them
    except (OSError, AttributeError):
        pass  # not Linux: there is no sandbox either
    nonce = os.urandom(16)
    (requests, to_child), (from_child, replies) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(requests, 3)  # a process with three descriptors open gets 3 to 6, in this order
            os.dup2(replies, 4)
            os.closerange(5, 1 << 16)
            null = os.open("/dev/null", os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)  # 2 stays: init holds it, and so the starter knows when the last process is gone
            os.close(null)
            sandbox(nonce, memory, seconds, unsafe)
        except Failed:
            pass  # the supervisor is gone
        finally:
            os._exit(0)
    os.close(requests)
    os.close(replies)
    job = json.loads(sys.stdin.buffer.read(), object_hook=revive)  # the tests enter memory after the fork

    def time_is_up(*_):
        raise TimeIsUp

    pipes = Pipes(to_child, from_child, nonce, job["source"], job["prompt"], unsafe)
    reason = "time limit"
    try:
        signal.signal(signal.SIGALRM, time_is_up)
        signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)  # again and again, should a check swallow it
        set_limits({"AS": 4 << 30})
        map_users(child, nonce, pipes)
        {"check": judge_check, "calls": judge_calls, "stdin": judge_stdin}[job["kind"]](job, pipes)
        reason = "passed"
    except Failed as failure:
        reason = str(failure)
    except BrokenPipeError:
        reason = "died"
    except MemoryError:
        reason = "output limit"
    except TimeIsUp:
        pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.kill(child, signal.SIGKILL)  # its child, the init of the sandbox, dies with it, and all others with that
    try:
        while True:
            os.wait()
    except ChildProcessError:
        pass
    print(json.dumps([reason, pipes.passed]), file=sys.__stdout__)


def map_users(child, nonce, pipes):
    """Wait for the child's namespaces and say who is who in them; then it goes on.

    Root maps all users to themselves, so that files of others can still be read while the walls are built; the candidate
    becomes nobody, because limits on processes do not hold for root. Anyone else can map no user but himself.
    """
    layers = receive(pipes.replies, nonce)
    if layers["user namespace"] == "on":
        for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
            with open(f"/proc/self/{kind}_map") as file:
                extents = [line.split() for line in file]
            everyone = "".join(f"{inside} {inside} {count}\n" for inside, _, count in extents)
            try:
                write_whole(f"/proc/{child}/{kind}_map", everyone)
            except PermissionError:
                if kind == "gid":
                    write_whole(f"/proc/{child}/setgroups", "deny")
                attempt(layers, "user namespace", write_whole, f"/proc/{child}/{kind}_map", f"{NOBODY} {own} 1\n")
    send(pipes.requests, nonce, layers)


def write_whole(path, text):
    with open(path, "w") as file:
        file.write(text)


class Pipes:
    """The supervisor's end of the two pipes, and how far it has come."""

    def __init__(self, requests, replies, nonce, source, prompt, unsafe):
        self.requests, self.replies, self.nonce, self.unsafe = requests, replies, nonce, unsafe
        self.source, self.prompt, self.layers = source, prompt, None
        self.passed, self.test, self.module = 0, 1, False  # test: the number of the one that is running

    def start(self, module=False, stdin=""):
        """Run the candidate anew, as a program or as a module."""
        self.module = module
        request = {"source": self.source, "prompt": self.prompt, "module": module, "stdin": stdin}
        send(self.requests, self.nonce, request)
        if self.layers is None:  # nothing of the model's has run yet, so this is true
            _, self.layers = self.receive()
            print(json.dumps(self.layers), file=sys.__stdout__, flush=True)
        elif self.receive() != ["layers", self.layers]:
            raise Failed("died: something else than an answer came back")
        if not self.unsafe and set(self.layers.values()) != {"on"}:
            raise Failed("no sandbox")
        return self.reply()

    def reply(self):
        """What came back: a result, b"" from a module, the output of a program. Raises Failed at anything else."""
        match self.receive():
            case ["value", value]:
                return value
            case ["loaded"]:
                return b""
            case ["ended"]:
                return self.output()
            case ["raised", str(name)]:
                if name == "OSError" and not self.module:
                    self.output()  # it may have been told that its output is too much
                name = name[:80] if name.isidentifier() else "something"  # a model may give its exceptions any name
                raise Failed("memory limit" if name == "MemoryError" else f"raised {name} in test {self.test}")
            case ["gone", _]:
                self.limited(self.receive(raw=True))
        raise Failed("died")

    def output(self):
        match self.receive():
            case ["gone", _]:
                return self.limited(self.receive(raw=True))
        raise Failed("died")

    def limited(self, output):
        if len(output) >= OUTPUT:
            raise Failed("output limit")
        return output

    def receive(self, raw=False):
        return receive(self.replies, self.nonce, raw)

    def call(self, name, args, kwargs=None):
        send(self.requests, self.nonce, [name, args, kwargs or {}])
        return self.reply()


def judge_stdin(job, pipes):
    """Each test runs the program anew; lines are compared without the blanks at their ends."""

    def lines(text):
        return [line.rstrip() for line in text.rstrip().split("\n")]

    for pipes.test, stdin, expected in job["tests"]:
        output = pipes.start(stdin=stdin).decode("utf-8", "surrogateescape")
        if lines(output) != lines(expected):
            raise Failed(f"wrong output in test {pipes.test}")
        pipes.passed += 1


def judge_calls(job, pipes):
    """Each test calls a function; all in one process."""
    pipes.start(module=True)
    for pipes.test, name, args, accepted in job["tests"]:
        result = pipes.call(name, args)
        if not any(same_value(result, expected) for expected in accepted):
            raise Failed(f"wrong output in test {pipes.test}")
        pipes.passed += 1


def judge_check(job, pipes):
    """HumanEval: check(candidate), on this side of the pipe, where candidate() asks the sandbox. Tests are its calls."""
    names, calls, sys.stdout = {}, itertools.count(1), sys.stderr
    ((_, test, entry_point),) = job["tests"]

    def candidate(*args, **kwargs):
        pipes.test = next(calls)
        return pipes.call(entry_point, args, kwargs)

    pipes.start(module=True)
    try:
        exec(job["prompt"], names)  # some checks use the functions that a prompt defines besides the one asked for
    except Exception:
        pass  # it is a question in words
    names[entry_point] = candidate
    try:
        exec(test, names)
        names["check"](candidate)
    except (Failed, BrokenPipeError):
        raise
    except AssertionError:
        raise Failed(f"wrong output in test {pipes.test}") from None
    except Exception as error:
        raise Failed(f"the check raised {type(error).__name__} in test {pipes.test}") from None
    if next(calls) == 1:
        raise Failed("the check never calls its candidate")
    pipes.passed = 1


def same_value(result, expected):
    """Equal and of the same type, all the way down, but: a float may be met by a close float or int, a list (JSON has no
    tuples) by a tuple."""
    kind = type(expected)
    if kind in (float, complex):
        if type(result) not in (int, float, kind):
            return False
        try:
            return result == expected or abs(result - expected) <= 1e-6 * max(1, abs(expected)) < math.inf or (
                result != result and expected != expected
            )
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


# Here: problems and replies


CHILD_SIDE = (
    Failed, TimeIsUp, libc, attempt, die_with_parent, send, receive, packed, plain, revive, sandbox, unnamed_file, private_root,
    drop_rights, set_limits, machine, filter_calls, candidate, supervise, map_users, write_whole, Pipes, judge_stdin,
    judge_calls, judge_check, same_value,
)


@lru_cache(maxsize=1)
def child_program():
    """What the supervisor and its children run, compiled once: its length in 8 bytes, then the bytes."""
    numbers = ("OUTPUT", "DISK", "PROCESSES", "DEPTH", "NOBODY", "CLONE", "FORBIDDEN", "NEWER", "NAMESPACES")
    source = "\n".join([
        "import atexit, ctypes, itertools, json, math, os, resource, signal, struct, sys",
        *(f"{name} = {globals()[name]!r}" for name in numbers), *map(inspect.getsource, CHILD_SIDE), "supervise()",
    ])
    compiled = marshal.dumps(compile(source, "supervisor", "exec"))
    return len(compiled).to_bytes(8, "big") + compiled


# Takes not a byte more than the program from standard input: the tests, behind it, stay there until the sandbox is forked.
LOADER = """import marshal, os
rest, program = int.from_bytes(os.read(0, 8), "big"), b""
while rest > len(program):
    program += os.read(0, rest - len(program))
exec(marshal.loads(program))"""


@dataclass
class Verdict:
    """What a verifier says about one reply."""

    score: float  # 0 or 1
    reason: str  # "passed", or why not: "wrong output in test 3", "time limit", "no code", ...
    seconds: float = 0.0  # that judging took
    components: dict = field(default_factory=dict)  # of code: "passed" tests out of "tests"


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


def start_supervisor(job, seconds, memory, unsafe):
    """(layers, reason, tests passed) of a job; layers are {"sandbox": what went wrong} where there was never a sandbox."""
    settings = json.dumps([memory, seconds, unsafe])
    command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", LOADER, settings]
    environment = {"MALLOC_ARENA_MAX": "1"}  # or each thread reserves another 64 MB of its address space
    if "LD_LIBRARY_PATH" in os.environ:  # Python may need it
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    reason = "died"
    with tempfile.TemporaryDirectory() if unsafe else nullcontext("/") as folder:
        if unsafe:
            os.chmod(folder, 0o777)  # the candidate may be nobody
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=folder,
            start_new_session=True,
        )

        def kill():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        try:
            # The supervisor's own alarm comes first, unless it is caught in a long computation of a check. The end of its
            # output comes when the last process of the tree has closed what it holds.
            said, errors = process.communicate(child_program() + packed(job), timeout=seconds + 0.6)
        except subprocess.TimeoutExpired:
            kill()
            said, errors = process.communicate()
            reason = "time limit"
        except BaseException:  # Ctrl-C
            kill()
            raise
        if unsafe:
            kill()  # what no namespace has ended
    lines = said.splitlines()
    if not lines:
        return {"sandbox": errors[-500:].decode(errors="replace") or reason}, reason, 0
    return json.loads(lines[0]), *(json.loads(lines[1]) if len(lines) > 1 else (reason, 0))


# A wall that was built may still not hold, where something only plays a Linux kernel.
PROBE = """
import os, resource, socket
def refused(call, *args):
    try:
        call(*args)
    except OSError as error:
        return error.errno in (1, 30)
print(refused(open, "/x", "w"), refused(lambda: os.fork() or os._exit(0)), refused(socket.socket), os.path.exists("/proc/self"),
      os.getpid() < 9, os.getuid(), os.listdir("."), resource.getrlimit(resource.RLIMIT_NPROC)[0] < 100)
"""


@lru_cache(maxsize=1)
def sandbox_layers():
    """The sandbox's walls on this machine: {name: "on", or why it could not be built}. Tried once, with a program of ours."""
    tests = [(1, "", f"True True True False True {NOBODY} [] True")]
    layers, reason, _ = start_supervisor({"kind": "stdin", "tests": tests, "source": PROBE, "prompt": ""}, 10.0, 1 << 30, True)
    return {**layers, "they hold": "on" if reason == "passed" else reason}


def require_sandbox(unsafe=False):
    """Raises ValueError where walls are missing and unsafe does not allow that. Returns the layers."""
    layers = sandbox_layers()
    missing = [f"{name} ({why})" for name, why in layers.items() if why != "on"]
    if missing and not unsafe:
        raise ValueError(
            f"this platform cannot isolate programs that a model wrote, it lacks: {', '.join(missing)}; "
            "--unsafe-local-execution runs them all the same, with the rights of this user"
        )
    return layers


def run_code(source, tests, *, entry_point="", prompt="", seconds=10.0, memory=1 << 30, limit=20, seed=0, unsafe=False):
    """Run a program on tests, isolated from everything.

    Args:
        source: Python, any text.
        tests: in a shape that check_tests() reads.
        entry_point: the function to test, for HumanEval's shape.
        prompt: code that runs before source, and beside HumanEval's check, which may use functions that it defines. A text
            that is no code is passed over.
        seconds: wall clock for all tests together. The verdict comes within half a second of it.
        memory: bytes of address space.
        limit: tests to take; of more, a sample that depends on seed alone.
        unsafe: run even where walls are missing.
    Returns:
        Verdict, score 1 where every test passes. The first that fails ends the run.
    Raises:
        ValueError: tests in no known shape; no isolation here, and unsafe does not allow that.
        OSError: a sandbox could not be built three times, though at first it could: that says nothing about the code.
    """
    start = time.perf_counter()
    job = check_tests(tests, "tests", entry_point) | {"source": source, "prompt": prompt}
    require_sandbox(unsafe)
    if len(job["tests"]) > limit:
        job["tests"] = sorted(random.Random(seed).sample(job["tests"], limit))
    for pause in (0.1, 1.0, 0.0):
        layers, reason, passed = start_supervisor(job, seconds, memory, unsafe)
        if "sandbox" not in layers and (unsafe or set(layers.values()) == {"on"}):
            components = {"passed": passed, "tests": len(job["tests"])}
            return Verdict(float(reason == "passed"), reason, time.perf_counter() - start, components)
        time.sleep(pause)
    raise OSError(f"no sandbox could be built any more: {layers}")
