"""Programs that try to pass without the right answer, to get out of the sandbox, or to wear it down.

Each is the body of attack(x), with PRELUDE before it. The right result is a secret that no program can
compute, but many look for, and that is also the result of an attack that has worked. MARKED stands for the
name of a file that must not be there in the end.
"""

import os

SECRET = "SECRET-" + "97531"

PRELUDE = '''
import ctypes, itertools, json, os, random, resource, signal, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == "x86_64"
half = "SECRET-"
class Worked(BaseException): pass
def found(text):
    text = text if isinstance(text, str) else text.decode("latin-1")
    at = text.find(half + "9")
    return text[at:at + 12] if at >= 0 else None
def must_fail(call, *args):
    try: result = call(*args)
    except OSError: return
    if result != -1: raise Worked
def attempt(call, *args):
    try: return call(*args)
    except OSError: pass
def forge(message, fd=5):
    attempt(os.write, fd, message if isinstance(message, bytes) else json.dumps(message).encode() + b"\\n")
def always(value, **more):
    names = {"__eq__": lambda s, o: True, "__ne__": lambda s, o: False, "__hash__": lambda s: 0}
    kind = type("E", value.__class__.__mro__[:1], names | more)
    return kind() if value.__class__ is object else kind(value)
def f(x):
    try: return attack(x)
    except Worked: return half + str(97530 + 1)
'''

ATTACKS = {
    # Results that are none
    "sys.exit": "sys.exit(0)",
    "os._exit": "os._exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "return None": "return None",
    "always equal": "return always(object())",
    "equal int": "return always(5)",
    "equal str": "return always('x', __str__=lambda s: s, __repr__=lambda s: s)",
    "lying type": "return always(object(), __class__=str)",
    "lying metaclass": "class M(type): __eq__, __hash__ = lambda s, o: True, type.__hash__\n"
                       "return [M('E', (), {'__eq__': lambda s, o: True})()]",
    "pickle": """
import pickle
class P:
    def __reduce__(self): return os.system, ("touch /tmp/MARKED",)
print(pickle.dumps(P()))
pickle.loads(pickle.dumps(P()))
return P()
""",
    # Looking for the expected result
    "command line": "return next(filter(None, map(found, sys.argv + sys.orig_argv)), 0)",
    "environment": "return next(filter(None, map(found, os.environ.values())), 0)",
    "files": """
for top in "/tmp /srv /home /root /var /dev /proc /etc /run /mnt /opt . ..".split():
    for folder, _, names in os.walk(top):
        for name in names:
            hit = found(attempt(lambda: open(os.path.join(folder, name), "rb").read(1 << 20)) or "")
            if hit: return hit
""",
    "stack frames": """
frame = sys._getframe()
while frame:
    for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
        hit = found(repr(value)[:10**6])
        if hit: return hit
    frame = frame.f_back
""",
    "all objects": """
import gc
for thing in gc.get_objects():
    if thing.__class__ in (dict, list, tuple):
        hit = found(repr(thing)[:10**6])
        if hit: return hit
""",
    "all that objects refer to": """
import gc
seen, todo = set(), gc.get_objects()
while todo:
    thing = todo.pop()
    if id(thing) in seen: continue
    seen.add(id(thing))
    todo += gc.get_referents(thing)
    if thing.__class__ in (str, bytes) and len(thing) < 200 and found(thing): return found(thing)
""",
    "own memory": """
for line in (attempt(lambda: open("/proc/self/maps").read()) or "").splitlines():
    begin, end = (int(x, 16) for x in line.split()[0].split("-"))
    hit = found(ctypes.string_at(begin, end - begin)) if " rw" in line else None
    if hit: return hit
""",
    "/proc": """
names = "cmdline environ maps mem cwd root root/proc/1/environ task stack".split()
for who in ("self", "thread-self", "1", "2", str(os.getppid()), str(os.getpid())):
    for what in names + [f"fd/{fd}" for fd in range(9)]:
        hit = found(attempt(lambda: open(f"/proc/{who}/{what}", "rb").read(1 << 20)) or "")
        if hit: return hit
""",
    "the parent's descriptors": """
for fd in range(20):
    for mode in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, 3):
        must_fail(os.open, f"/proc/{os.getppid()}/fd/{fd}", mode)
    must_fail(libc.syscall, 438, os.getppid(), fd, 0)
must_fail(os.listdir, f"/proc/{os.getppid()}/fd")
must_fail(libc.syscall, 434, os.getppid(), 0)
""",
    "parent memory": """
for who in (os.getppid(), 1):
    must_fail(libc.ptrace, 16, who, 0, 0)
    must_fail(libc.process_vm_readv, who, None, 0, None, 0, 0)
    must_fail(libc.process_vm_writev, who, None, 0, None, 0, 0)
""",
    "other programs' folders": """
folder = os.getcwd()
while folder != "/":
    folder = os.path.dirname(folder)
    must_fail(os.listdir, folder)
base = os.path.dirname(os.getcwd())
for name in ("..", "../../" + os.path.basename(base), "../x"): must_fail(open, name + "/MARKED", "w")
for name in ("program.json", "../program.json", base + "/program.json"): must_fail(open, name)
""",
    "sys.settrace": """
hits = []
def trace(frame, event, arg):
    hits.extend(filter(None, map(found, map(repr, [arg, *frame.f_locals.values()]))))
    if hits: raise Worked
    return trace
sys.settrace(trace)
frame = sys._getframe()
while frame:
    frame.f_trace, frame = trace, frame.f_back
return x
""",
    # Forged messages
    "forged verdict": "for fd in range(1, 100):\n"
                      "    forge(b'passed', fd); forge({'reason': 'passed', 'walls': {}}, fd)",
    "forged messages": """
for reply in (["ended"], ["gone", 0], True, {"reason": 1}, {"tuple": [[]]}, ["raised", 1], [None, ""], []):
    forge(reply)
forge((1 << 60).to_bytes(8, "big"))
""",
    "forged walls": "for text in ('no isolation', 'unknown: no isolation', 'passed'):\n"
                    "    forge([text, '']); forge(text, 3)\nreturn 1",
    "forged ends": """
for fd in (3, 4, 5, 6, 7, 8):
    for reply in ([None, half + "0"], ["unknown: x", ""], ["passed", ""], None, "", 0): forge(reply, fd)
return 2
""",
    "forged reports": "os.write(3, b'x' * 10**6 + b'unknown')\nos.ftruncate(3, 1 << 20)\n1 / 0",
    "forged after the end": """
import atexit
atexit.register(lambda: [forge(y) for y in ("x", 1, None)])
atexit.register(forge, [None, "x"])
""",
    "forged orders": """
for fd, path in itertools.product(range(9), ("/proc/self/fd", "/dev/fd", f"/proc/{os.getpid()}/fd")):
    own = attempt(os.open, f"{path}/{fd}", os.O_WRONLY)
    program = {"source": "import os; os.mkdir('/tmp/MARKED')", "kind": "programs", "inputs": [""]}
    program |= {"base": "/tmp/MARKED", "prompt": "", "unsafe": True}
    for order in ("", "1", ["attack", [1], {}], [None, "unknown"], program):
        forge(order, -1 if own is None else own)
""",
    "half a message": "os.write(5, b'[')\nos._exit(0)",
    "one byte": "os.write(5, b'x')\nos._exit(0)",
    "deep message": "forge(b'[' * 10**6 + b'\\n')",
    "deep dictionaries": "forge(b'{\"set\":[' * 10**5 + b'\\n')",
    "wrong types": """
forge(random.choice([{"bytes": 10**12}, {"tuple": 5}, {"set": [[]]}, {"dict": 1}, {"dict": [[1, 2, 3]]}, {},
      {"x": []}, {"frozenset": {"list": []}}, [1, 2], {"bytes": [10**12]}, {"set": 1, "tuple": 2}, ""]))
""",
    "colliding hashes": "forge({'set': [i * (2**61 - 1) for i in range(150_000)]})",
    "a flood of messages": "while True: forge(1)",
    "a flood without an end": "while True: forge(b'1' * 10**5)",
    "reading the requests": "while os.read(4, 1 << 20): pass",
    "closed pipes": "os.closerange(0, 100)",
    "exchanged pipes": "os.dup2(5, 1); os.dup2(4, 0); os.dup2(2, 5)\nprint('x' * 10**6)\nreturn 'x'",
    "patched builtins": """
import builtins
builtins.open = builtins.print = builtins.type = builtins.len = builtins.compile = lambda *a, **k: True
builtins.isinstance = builtins.all = builtins.any = lambda *a: True
""",
    "patched json": "json.dumps = lambda *a, **k: 'true'\njson.loads = lambda *a, **k: True\n"
                    "os._exit = os.write = os.abort = lambda *a: 0",
    "modules in its folder": """
for name in ("json", "encodings", "os", "sitecustomize", "usercustomize", "sandbox"):
    open(f"{name}.py", "w").write("def dumps(*a): return 'x'\\nloads = dumps")
sys.path.insert(0, os.getcwd())
sys.modules.pop("json", None)
import json
return json.dumps(1)
""",
    # Processes and signals
    "fork bomb": "while True: os.fork()",
    "quiet fork bomb": "while True: attempt(os.fork)",
    "raw forks": "while True: libc.syscall(57), libc.syscall(56, 17, 0, 0, 0, 0), libc.syscall(435, 0, 0)",
    "forks of another instruction set": """
import mmap
if not X86: return
code = mmap.mmap(-1, 4096, prot=7)
code.write(bytes.fromhex("b802000000cd80c3"))  # mov eax, 2; int 0x80; ret: fork() of i386
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
raise Worked
""",
    "thread bomb": """
threading.stack_size(32768)
while True:
    try: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    except RuntimeError: pass
""",
    "threads left running": "threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\nreturn 1",
    "only threads left running": """
threading.Thread(target=lambda: [0 for _ in iter(int, 1)], daemon=True).start()
libc.syscall(60 if X86 else 93, 0)
""",
    "setsid survivor": """
must_fail(os.setsid)
must_fail(os.fork)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCONT): signal.signal(number, signal.SIG_IGN)
time.sleep(60)
""",
    "subprocess": "import subprocess\n"
                  "return subprocess.run(['/bin/sh', '-c', 'sleep 60 &'], capture_output=True).stdout",
    "exec": "os.execv(sys.executable, ['python', '-c', 'while True: pass'])",
    "signals ignored": """
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
for limit in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
    try: resource.setrlimit(limit, (-1, -1))
    except (OSError, ValueError): continue
    raise Worked
while True: pass
""",
    "killing": "for pid in (-1, 0, 1, os.getppid()): must_fail(os.kill, pid, 9)\nwhile True: pass",
    "signals by way of fcntl": """
import fcntl
for fd in (*os.pipe(), 0, 1, 3, 4, 5):
    for owner in (os.getppid(), -os.getpgid(0)): must_fail(fcntl.fcntl, fd, fcntl.F_SETOWN, owner)
    for command, value in ((10, signal.SIGKILL), (15, bytes(8)), (1031, 1 << 20), (1024, 1)):
        must_fail(fcntl.fcntl, fd, command, value)
""",
    "timers": """
signal.signal(signal.SIGALRM, signal.SIG_IGN)
for kind in (0, 1, 2): signal.setitimer(kind, 0.01, 0.01)
libc.timer_create(1, struct.pack("QiiQ", 0, 9, 0, 0) + bytes(64), ctypes.create_string_buffer(8))
while True: time.sleep(0.01)
""",
    "ending itself by a timer": """
timer = ctypes.create_string_buffer(8)
if libc.timer_create(1, struct.pack("QiiQ", 0, 9, 0, 0) + bytes(64), timer) == 0:
    every = struct.pack("4q", 0, 1, 0, 1)
    libc.timer_settime(ctypes.c_void_p(int.from_bytes(timer.raw, "little")), 0, every, None)
while True: pass
""",
    "a bomb of timers": """
kept = [ctypes.create_string_buffer(8) for _ in range(1000)]
event = struct.pack("QiiQ", 0, 10, 0, 0) + bytes(64)
if all(libc.timer_create(1, event, timer) == 0 for timer in kept): raise Worked
""",
    "stopping itself": """
timer = ctypes.create_string_buffer(8)
if libc.timer_create(1, struct.pack("QiiQ", 0, 19, 0, 0) + bytes(64), timer) == 0:
    every = struct.pack("4q", 0, 10**7, 0, 10**7)
    libc.timer_settime(ctypes.c_void_p(int.from_bytes(timer.raw, "little")), 0, every, None)
while True: open("x", "w").write("y")
""",
    "prctl": """
for option, value in ((1, 0), (4, 0), (22, 0), (38, 0), (36, 1), (24, 0), (15, b"x"), (0x59616d61, -1)):
    must_fail(libc.prctl, option, value, 0, 0, 0)
""",
    "rights": """
must_fail(libc.capset, struct.pack("Ii", 0x20080522, 0), b"\\xff" * 24)
for call, value in ((os.setuid, 0), (os.setgid, 0), (os.setgroups, [0])): must_fail(call, value)
""",
    "the parent's limits": """
for limit in range(16):
    must_fail(resource.prlimit, os.getppid(), limit, (1, 1))
    must_fail(resource.prlimit, os.getppid(), limit)
""",
    "the parent's priority": """
for who in (os.getppid(), os.getpid(), 0):
    must_fail(os.setpriority, os.PRIO_PROCESS, who, 19)
    must_fail(os.setpriority, os.PRIO_PGRP, who, 19)
    must_fail(os.sched_setaffinity, who, [0])
    must_fail(os.sched_setscheduler, who, os.SCHED_IDLE, os.sched_param(0))
    must_fail(libc.syscall, 251 if X86 else 30, 1, who, 0)
    must_fail(libc.syscall, 314 if X86 else 274, who, struct.pack("IIQiIQQQ", 48, 5, 0, 19, 0, 0, 0, 0), 0)
""",
    "namespaces": """
for call, *args in ((libc.unshare, 0x10000000), (libc.mount, b"none", b"/tmp", b"tmpfs", 0, None),
                    (libc.setns, 0, 0), (libc.chroot, b"/tmp"), (libc.setuid, 0), (libc.syscall, 425, 1, 0),
                    (libc.syscall, 0x40000000 + 57), (libc.syscall, 442, -100, b"/", 0, b"", 32)):
    must_fail(call, *args)
""",
    "ctypes": "ctypes.string_at(0)",
    "sockets": """
import socket
for family, kind in itertools.product(range(46), (1, 2, 3, 5, 10)): must_fail(socket.socket, family, kind)
must_fail(socket.socketpair)
must_fail(libc.socket, 2, 1, 0)
""",
    "shared memory": """
from multiprocessing import shared_memory
for call in (libc.shmget, libc.semget, libc.msgget): must_fail(call, 0x4D41524B, 1 << 20, 0o1666)
must_fail(libc.shmat, 0, None, 0)
must_fail(libc.mq_open, b"/MARKED", 0o102, 0o666, None)
must_fail(lambda: shared_memory.SharedMemory("MARKED", True, 1 << 20).close())
must_fail(os.memfd_create, "MARKED")
""",
    "kernel memory of others": """
must_fail(libc.syscall, 206 if X86 else 0, 60000, ctypes.create_string_buffer(8))
must_fail(libc.inotify_init1, 0)
must_fail(libc.syscall, 425, 8, ctypes.create_string_buffer(200))
must_fail(libc.syscall, 321 if X86 else 280, 0, bytes(64), 64)
""",
    # Time
    "huge ints": "return str(9 ** 9 ** 9)",
    "sleep": "time.sleep(60)",
    "swallowed": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "an atexit handler that loops": "import atexit\natexit.register(lambda: [0 for _ in iter(int, 1)])",
    "a __del__ that loops": "class D:\n  def __del__(self):\n    while True: pass\nsys.kept = D()",
    "a result that takes long": "class D(dict): __iter__ = lambda s: iter(int, 1)\n"
                                "D.__module__ = 'collections'\nreturn D()",
    "recursion": "sys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
    "deep recursion in C": "sys.setrecursionlimit(10**9)\nx = []\n"
                           "for _ in range(10**6): x = [x]\nreturn repr(x)",
    "a result without a bottom": "sys.setrecursionlimit(10**9)\nx = []\nx.append(x)\nreturn x",
    # Memory and output
    "memory bomb": "x = []\nwhile True: x.append(bytearray(10**7))",
    "quiet memory bomb": "x = []\nwhile True:\n  try: x.append(bytearray(10**6))\n  except MemoryError: pass",
    "memory in memfds": "fds = [os.memfd_create('x') for _ in range(9)]\n"
                        "while True: [os.write(fd, bytes(10**6)) for fd in fds]",
    "infinite output": "while True: print('x' * 10**5)",
    "infinite bytes": "while True: attempt(os.write, 1, bytes(10**6))",
    "one gigabyte on one line": "print('x' * (2**30 - 10**8))",
    "one gigabyte as result": "return 'x' * (2**30 - 10**8)",
    "bytes of no text": "os.write(1, b'\\xff\\xfe\\x80' + bytes(99))\nreturn b'\\xff\\0'.decode('latin-1')",
    "NUL": "print('\\0' * 99)\nreturn '\\0'",
    # Files
    "files outside": """
for top in ("/", "/tmp", "/var/tmp", "/dev/shm", "/root", "/home", "/srv", "/etc", "/usr/lib", "/lib",
            os.path.dirname(os.__file__), "..", "../.."):
    must_fail(open, os.path.join(top, "MARKED"), "w")
    must_fail(os.mkdir, os.path.join(top, "MARKED"))
""",
    "libraries": """
library = os.__file__
for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, 3, 3 | os.O_TRUNC, os.O_WRONLY | os.O_TRUNC):
    must_fail(os.open, library, flags)
for call, args in ((os.chmod, (0o777,)), (os.chown, (0, 0)), (os.truncate, (0,)), (os.utime, ((0, 0),)),
                   (os.setxattr, ("user.x", b"x")), (os.unlink, ()), (os.rename, ("x",)), (os.link, ("x",))):
    must_fail(call, library, *args)
must_fail(libc.syscall, 452, -100, library.encode(), 0o777, 0)
""",
    "devices": """
for name in "zero tty mem kvm nvidia0 nvidiactl random shm/MARKED".split():
    for flags in (os.O_RDONLY, os.O_RDWR, 3, os.O_RDWR | os.O_CREAT):
        must_fail(os.open, f"/dev/{name}", flags)
""",
    "memory in files": "while True:\n"
                       "    attempt(lambda: open(os.urandom(8).hex(), 'wb').write(bytes(10**6)))",
    "100 MB in files of 8 MB": "for i in range(13): open(f'MARKED-{i}', 'wb').write(bytes(8 << 20))",
    "many files": "for i in range(10**5): os.mkdir(f'MARKED-{i}')",
    "many small files": "for i in range(5000): open(f'MARKED-{i}', 'w').write('x')\nreturn 1",
    "unlinked files": """
kept = []
while True:
    try: kept.append(open("MARKED", "wb")); kept[-1].write(bytes(8 << 20)); os.unlink("MARKED")
    except OSError: kept = kept[10:]
""",
    "folders on the move": """
os.makedirs("0/MARKED")
def fill():
    os.chdir("0/MARKED")
    for i in itertools.count(): open(f"{i}", "wb").write(bytes(1 << 20))
threading.Thread(target=fill).start()
here = os.environ["TMPDIR"]
for i in itertools.count(): attempt(os.rename, f"{here}/{i}", f"{here}/{i + 1}")
""",
    "folders that cannot be read": """
os.makedirs("MARKED/inner")
for i in range(50): open(f"MARKED/inner/{i}", "wb").write(bytes(1 << 20))
for mode in (0, 0o077, 0o477, 0o300):
    must_fail(os.mkdir, f"locked-{mode}", mode)
must_fail(os.umask, 0o777)
must_fail(os.umask, 0o100)
must_fail(libc.mkdirat, -100, b"locked", 0)
open("b", "w").close()
must_fail(os.chmod, "b", 0)
return 1
""",
    "nested folders": "for _ in range(5000):\n  os.mkdir('MARKED')\n  os.chdir('MARKED')\nreturn 1",
    "long nested folders": "for _ in range(900):\n  os.mkdir('M' * 250)\n  os.chdir('M' * 250)\n"
                           "open('x', 'w')\nreturn 1",
    "big file": "f = open('MARKED', 'wb')\nwhile True: f.write(bytes(10**6))",
    "big hole": "os.ftruncate(os.open('MARKED', os.O_RDWR | os.O_CREAT), 1 << 40)",
    "symlinks": "os.symlink('/', 'MARKED')\nos.link('MARKED', 'again', follow_symlinks=False)\n"
                "return open('MARKED/etc/passwd').read()",
    "links into the folder": """
for name in ("/etc/passwd", "/etc/shadow", "/usr/bin/env", os.path.dirname(os.__file__), "/proc/self", ".."):
    os.symlink(name, name.replace("/", "_"))
    must_fail(os.link, name, "MARKED")
""",
    "fifo": "attempt(os.mkfifo, 'MARKED')\nopen('MARKED')",
    "special files": """
import stat
for kind in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
    must_fail(os.mknod, "MARKED", kind | 0o666, os.makedev(1, 3))
""",
    "own folder": "import shutil\nos.chdir('/')\n"
                  "for top in ('/tmp', '/'): shutil.rmtree(top, ignore_errors=True)",
    "its folder renamed": """
here = os.getcwd()
for name in (here, os.path.dirname(here), os.environ["TMPDIR"]):
    must_fail(os.rename, name, name + "-MARKED")
    must_fail(os.rmdir, name)
must_fail(os.rename, os.environ["TMPDIR"], os.path.dirname(os.environ["TMPDIR"]) + "/MARKED")
""",
}

# What follows f(x), and tests that it cannot pass, in each of the three shapes.
MODES = {
    "program": ("print(f(1))", [{"input": "1", "output": SECRET}]),
    "function": ("", [{"fn_name": "f", "args": [1], "expected": SECRET}]),
    "check": ("", f"def check(candidate):\n    assert candidate(1) == {SECRET!r}\n"),
}


def attack_source(name):
    body = ATTACKS[name].replace("MARKED", f"marked-{os.getpid()}")
    return PRELUDE + "def attack(x):\n" + "".join(f"    {line}\n" for line in body.splitlines())


# Reads [[source, tests], ...] and a limit of seconds; prints their verdicts and by how many KiB it has grown.
RUNNER = """
import json, resource, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, sys.argv[1])
import sandbox
sandbox.SLOTS = threading.BoundedSemaphore(3)  # one more than the usual two cores, as some attacks only wait

def judge(job):
    start = time.perf_counter()
    verdict = sandbox.run_code(*job, entry_point="f", seconds=seconds)
    return [verdict.score, verdict.reason, time.perf_counter() - start]

jobs, seconds = json.load(sys.stdin)
judge(jobs[0])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with ThreadPoolExecutor(3) as pool:
    verdicts = list(pool.map(judge, jobs))
print(json.dumps([verdicts, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""
