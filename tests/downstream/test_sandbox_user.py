"""The sandbox as an ordinary user has it: a program runs as that user, and still reaches none of the user's other processes and files.

Under root every program is a user of its own, which hides what the walls must do, so these tests run the sandbox as a user who is not root.
"""

# ruff: noqa: E501
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import loratune
from loratune.downstream.sandbox import walls
from loratune.downstream.sandbox.system_calls import AUDIT_ARCH, _filter

USER = 64_203  # nobody's, hopefully; where the tests run as root
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is Linux only")

# Runs with the standard library alone, by any Python that the user may execute.
DRIVER = r"""
import ctypes, json, os, resource, subprocess, sys, time
from loratune.downstream import sandbox
from loratune.downstream.sandbox.runner import Limits, ProgramTest, run_program

order = json.loads(sys.stdin.read())
if order["mode"] == "weaker":
    sandbox.namespaces_missing = lambda: "made so by the test"
elif sandbox.namespaces_missing():
    print(json.dumps({"missing": sandbox.namespaces_missing()}))
    sys.exit()
libc = ctypes.CDLL(None)
os.chdir(order["home"])
with open("file", "w") as file:
    file.write("secret")
os.chmod("file", 0o600)
os.utime("file", (1000, 1000))
neighbour = subprocess.Popen([sys.executable, "-c", "import os, time\np = os.getppid()\nwhile os.getppid() == p: time.sleep(.05)"])
time.sleep(0.5)
targets = [neighbour.pid, os.getpid()]

def limits_of(process):
    # Read from /proc: asking by prlimit needs what the program must not have.
    lines = open(f"/proc/{process}/limits").read().splitlines()
    return [line.split("  ")[0] + ":" + " ".join(line.split()[-3:]) for line in lines]

def seen():
    found = os.stat("file")
    return {
        "limits": [limits_of(one) for one in targets],
        "nice": [os.getpriority(os.PRIO_PROCESS, one) for one in targets],
        "affinity": [sorted(os.sched_getaffinity(one)) for one in targets],
        "policy": [os.sched_getscheduler(one) for one in targets],
        "ioprio": [libc.syscall(order["ioprio_get"], 1, one) for one in targets],
        "oom": [open(f"/proc/{one}/oom_score_adj").read() for one in targets],
        "alive": neighbour.poll() is None,
        "file": [open("file").read(), found.st_mode, found.st_mtime, found.st_uid],
    }

before = seen()
text = order["program"].replace("{targets}", repr(targets)).replace("{home}", order["home"]).replace("{driver}", repr(os.getpid()))
ran = run_program(ProgramTest(program=text, entry_point="f", tests=order["tests"]), limits=Limits(**order["limits"]), weaker=True)
time.sleep(0.3)
after = seen()
neighbour.kill()
print(json.dumps({"uid": os.getuid(), "kind": ran.kind, "why": ran.why, "before": before, "after": after}))
"""

# Each attempt acts on the user's other processes, named by {targets}, or on the user's file, named {home}/file, and says whether the
# kernel let it. Numbers of system calls: x86-64, AArch64.
REACHES = r"""
import ctypes, fcntl, os, platform, resource, signal, struct
c = ctypes.CDLL(None, use_errno=True)
column = platform.machine() == "aarch64"
numbers = dict(ioprio_set=(251, 30), sched_setaffinity=(203, 122), sched_setscheduler=(144, 119), sched_setattr=(314, 274), sched_setparam=(142, 118),
               setpriority=(141, 140), kcmp=(312, 272), pidfd_open=(434, 434), pidfd_send_signal=(424, 424), process_madvise=(440, 440),
               process_mrelease=(448, 448), move_pages=(279, 239), migrate_pages=(256, 238), ptrace=(101, 117), process_vm_readv=(310, 270),
               process_vm_writev=(311, 271), kill=(62, 129), tkill=(200, 130), tgkill=(234, 131), rt_sigqueueinfo=(129, 138),
               rt_tgsigqueueinfo=(297, 240), prlimit64=(302, 261), get_robust_list=(274, 100), perf_event_open=(298, 241))

def call(name, *values):
    held = [ctypes.c_long(value) if isinstance(value, int) else value for value in values]
    return c.syscall(ctypes.c_long(numbers[name][column]), *held) >= 0

def owner(command, value, also=None):
    r, w = os.pipe()
    fcntl.fcntl(r, command, value)
    if also:
        fcntl.fcntl(r, also, signal.SIGKILL)
    fcntl.fcntl(r, fcntl.F_SETFL, fcntl.fcntl(r, fcntl.F_GETFL) | os.O_ASYNC)
    os.write(w, b"x")
    return True

def by_ioctl(target, number):
    import socket
    a, b = socket.socketpair()
    fcntl.ioctl(a, number, struct.pack("i", target))
    fcntl.fcntl(a, fcntl.F_SETFL, fcntl.fcntl(a, fcntl.F_GETFL) | os.O_ASYNC)
    b.send(b"x")
    return True

def write(path, text):
    with open(path, "w") as file:
        file.write(text)
    return True

def f(x):
    zeros, one_cpu = ctypes.create_string_buffer(128), ctypes.create_string_buffer(b"\1" + bytes(127), 128)
    attr = ctypes.create_string_buffer(struct.pack("IIQiIQQQ", 48, 3, 0, 19, 0, 0, 0, 0), 48)
    limit = ctypes.create_string_buffer(struct.pack("QQ", 1, 1), 16)
    tries = {}
    for t in {targets}:
        tries |= {
            f"prlimit CPU {t}": lambda t=t: resource.prlimit(t, resource.RLIMIT_CPU, (1, 1)),
            f"prlimit FSIZE {t}": lambda t=t: resource.prlimit(t, resource.RLIMIT_FSIZE, (0, 0)),
            f"prlimit by number {t}": lambda t=t: call("prlimit64", t, 0, limit, 0),
            f"setpriority {t}": lambda t=t: call("setpriority", 0, t, 19),
            f"ioprio_set {t}": lambda t=t: call("ioprio_set", 1, t, 3 << 13),
            f"sched_setaffinity {t}": lambda t=t: call("sched_setaffinity", t, 128, one_cpu),
            f"sched_setscheduler {t}": lambda t=t: call("sched_setscheduler", t, 5, zeros),
            f"sched_setparam {t}": lambda t=t: call("sched_setparam", t, zeros),
            f"sched_setattr {t}": lambda t=t: call("sched_setattr", t, attr, 0),
            f"kcmp {t}": lambda t=t: call("kcmp", t, t, 0, 0, 0),
            f"pidfd_open {t}": lambda t=t: call("pidfd_open", t, 0),
            f"migrate_pages {t}": lambda t=t: call("migrate_pages", t, 64, zeros, zeros),
            f"move_pages {t}": lambda t=t: call("move_pages", t, 0, 0, 0, 0, 0),
            f"ptrace {t}": lambda t=t: call("ptrace", 16, t, 0, 0),
            f"seize {t}": lambda t=t: call("ptrace", 0x4206, t, 0, 0),
            f"get_robust_list {t}": lambda t=t: call("get_robust_list", t, zeros, zeros),
            f"perf_event_open {t}": lambda t=t: call("perf_event_open", zeros, t, -1, -1, 0),
            f"F_SETOWN {t}": lambda t=t: owner(fcntl.F_SETOWN, t, 10),
            f"F_SETOWN_EX {t}": lambda t=t: owner(15, struct.pack("ii", 1, t), 10),
            f"FIOSETOWN {t}": lambda t=t: by_ioctl(t, 0x8901),
            f"SIOCSPGRP {t}": lambda t=t: by_ioctl(t, 0x8902),
            f"PR_SCHED_CORE {t}": lambda t=t: c.prctl(62, 2, t, 0, 0) == 0,
            f"oom_score_adj {t}": lambda t=t: write(f"/proc/{t}/oom_score_adj", "1000"),
            f"timerslack {t}": lambda t=t: write(f"/proc/{t}/timerslack_ns", "1000000"),
            f"memory {t}": lambda t=t: open(f"/proc/{t}/mem", "rb"),
            f"environment {t}": lambda t=t: open(f"/proc/{t}/environ", "rb"),
        }
        for name, values in dict(kill=(t, 9), tkill=(t, 9), tgkill=(t, t, 9), rt_sigqueueinfo=(t, 9, zeros), rt_tgsigqueueinfo=(t, t, 9, zeros)).items():
            tries[f"{name} {t}"] = lambda name=name, values=values: call(name, *values)
    tries |= {
        "setpriority of the user": lambda: call("setpriority", 2, 0, 19),
        "ioprio_set of the user": lambda: call("ioprio_set", 3, os.getuid(), 3 << 13),
        "a lease": lambda: fcntl.fcntl(os.open(os.__file__, os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK) == 0,
        "truncate": lambda: os.truncate("{home}/file", 0) or True,
        "write": lambda: write("{home}/file", "gone"),
        "unlink": lambda: os.unlink("{home}/file") or True,
        "read": lambda: open("{home}/file").read(),
    }
    done = []
    for name, attempt in tries.items():
        try:
            done += [name] * bool(attempt())
        except (OSError, ValueError):
            pass
    for attempt in (lambda: os.chmod("{home}/file", 0o777), lambda: os.utime("{home}/file", (5, 5)), lambda: os.chmod("{home}", 0)):
        try:
            attempt()  # may seem to succeed
        except OSError:
            pass
    return done
"""

# Memory that no limit of a process counts. Each attempt holds what it gets; the sum of bytes is the answer.
HOARDS = r"""
import ctypes, fcntl, mmap, os, socket
c = ctypes.CDLL(None, use_errno=True)
held = []

def filled(fd, most=1 << 30):
    n, piece = 0, bytes(1 << 20)
    try:
        while n < most:
            n += os.write(fd, piece)
    except OSError:
        pass
    return n

def memfd():
    fd = os.memfd_create("a")
    held.append(fd)
    return filled(fd)

def secret():
    fd = c.syscall(ctypes.c_long(447), ctypes.c_long(0))
    if fd < 0:
        raise OSError
    os.ftruncate(fd, 1 << 20)
    held.append(mmap.mmap(fd, 1 << 20))
    return 1 << 20

def nameless():
    fd = os.open("b", os.O_RDWR | os.O_CREAT)
    os.unlink("b")
    held.append(fd)
    return filled(fd)

def tmpfile():
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR)
    held.append(fd)
    return filled(fd)

def posix_shm():
    fd = os.open("/dev/shm/loratune-test", os.O_RDWR | os.O_CREAT)
    held.append(fd)
    return filled(fd)

def pipe():
    r, w = os.pipe()
    held.extend((r, w))
    try:
        fcntl.fcntl(w, 1031, 1 << 20)
    except OSError:
        pass
    os.set_blocking(w, False)
    return filled(w)

def pair():
    a, b = socket.socketpair()
    held.extend((a, b))
    for one in (a, b):
        one.setblocking(False)
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 28)
        except OSError:
            pass
    return filled(a.fileno()) + filled(b.fileno())

def in_flight():
    a, b = socket.socketpair()
    held.extend((a, b))
    n = 0
    for _ in range(64):
        fd = os.open("c", os.O_RDWR | os.O_CREAT)
        os.unlink("c")
        n += filled(fd)
        socket.send_fds(a, [b"x"], [fd])
        os.close(fd)
    return n

def pinned():
    size = 1 << 21
    block = mmap.mmap(-1, size)
    block.write(bytes(size))
    r, w = os.pipe()
    held.extend((r, w))
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    vector = (ctypes.c_size_t * 2)(address, size)
    n = c.vmsplice(w, vector, ctypes.c_size_t(1), 0)
    if n < 0:
        raise OSError
    return n

def system_v():
    if (n := c.shmget(0, ctypes.c_size_t(1 << 24), 0o1600)) < 0:
        raise OSError
    held.append(c.shmat(n, 0, 0))
    return 1 << 24

def f(name):
    n = 0
    try:
        for _ in range(100):
            n += globals()[name]()
    except OSError:
        pass
    return n
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder of the user's own, with a copy of what the sandbox needs."""
    folder = Path(tempfile.mkdtemp(prefix="loratune-user-"))
    folder.chmod(0o755)
    package, own = Path(loratune.__file__).parent, folder / "loratune"
    (own / "downstream").mkdir(parents=True)
    for name in ("__init__.py", "errors.py", "system/machine.py", "downstream/__init__.py"):
        shutil.copy(package / name, own / name)
    for path in (package / "downstream").glob("sandbox*.py"):
        shutil.copy(path, own / "downstream")
    for path in (folder / "home", folder / "temporary"):
        path.mkdir()
        if os.geteuid() == 0:
            os.chown(path, USER, USER)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(params=["namespaces", "weaker"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def as_user(home: Path, mode: str, program: str, tests: str, **limits: Any) -> dict[str, Any]:
    """Run the program in the sandbox, the sandbox's caller being an ordinary user."""
    who: dict[str, Any] = {"user": USER, "group": USER, "extra_groups": []} if os.geteuid() == 0 else {}
    ask = [[python, "-I", "-c", "import sys; sys.exit(sys.version_info < (3, 11))"] for python in (sys.executable, "/usr/bin/python3")]
    able = [one[0] for one in ask if _runs(one, who)]
    if not able:
        pytest.skip("no Python 3.11 that an ordinary user may execute")
    order = {
        "mode": mode,
        "program": program,
        "tests": tests,
        "home": str(home / "home"),
        "limits": {"timeout": 6.0, "memory_bytes": 256 << 20, **limits},
        "ioprio_get": 31 if os.uname().machine == "aarch64" else 252,
    }
    environment = {"PYTHONPATH": str(home), "TMPDIR": str(home / "temporary"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [able[0], "-c", DRIVER],
        input=json.dumps(order),
        env=environment,
        capture_output=True,
        text=True,
        cwd="/",
        timeout=30,
        check=False,
        **who,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if "missing" in found:
        pytest.skip(f"no namespaces for an ordinary user: {found['missing']}")
    assert found["uid"] != 0
    return found


def _runs(command: list[str], who: dict[str, Any]) -> bool:
    try:
        return subprocess.run(command, cwd="/", check=False, capture_output=True, **who).returncode == 0
    except OSError:
        return False


def needs_landlock(mode: str) -> None:
    if mode == "weaker" and not walls.landlock_version():
        pytest.skip("files are not protected without namespaces and Landlock, as documented")


def test_a_program_reaches_nothing_of_its_user(home: Path, mode: str) -> None:
    needs_landlock(mode)
    found = as_user(home, mode, REACHES, "got = candidate(1)\nassert got == [], got")
    assert (found["kind"], found["why"]) == ("ok", "")
    assert found["after"] == found["before"]
    assert found["before"]["file"][:2] == ["secret", 0o100600]


@pytest.mark.parametrize(
    ("attempt", "most"),
    [
        ("memfd", 0),
        ("secret", 0),
        ("posix_shm", 0),
        ("system_v", 0),
        ("pinned", 0),
        ("nameless", 16 << 20),  # the scratch folder's own limit
        ("tmpfile", 16 << 20),
        ("in_flight", 16 << 20),
        ("pipe", 4 << 20),  # 64 open files
        ("pair", 32 << 20),
    ],
)
def test_memory_that_no_limit_counts(home: Path, mode: str, attempt: str, most: int) -> None:
    needs_landlock(mode)
    found = as_user(home, mode, HOARDS, f"import time\ngot = candidate({attempt!r})\nassert got <= {most}, got\ntime.sleep(0.3)")
    # Where the scratch folder is on the disk, the warden ends what holds more than its limit.
    allowed = ("ok", "output") if mode == "weaker" and attempt in ("nameless", "tmpfile") else ("ok",)
    assert found["kind"] in allowed, found


def test_good_programs_do_what_programs_do(home: Path, mode: str) -> None:
    """Event loops, threads, children, copies of files with their modes: nothing that a good program needs is denied."""
    program = (
        "import asyncio, concurrent.futures, multiprocessing, os, shutil, signal, subprocess, tempfile, threading, zipfile\n"
        "async def later(x):\n    await asyncio.sleep(0.01)\n    return x\n"
        "def f(x):\n"
        "    got = [asyncio.run(later(1))]\n"
        "    with concurrent.futures.ThreadPoolExecutor(2) as pool: got.append(sum(pool.map(abs, (-1, -1))))\n"
        "    got.append(int(subprocess.run(['echo', '3'], capture_output=True, check=True).stdout))\n"
        "    a, b = multiprocessing.Pipe(); a.send(4); got.append(b.recv())\n"
        "    if (child := os.fork()) == 0: os._exit(5)\n"
        "    got.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "    signal.signal(signal.SIGALRM, lambda *_: got.append(6)); signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()\n"
        "    with tempfile.TemporaryDirectory() as d:\n"
        "        open(d + '/a', 'w').write('7'); os.chmod(d + '/a', 0o640); shutil.copy2(d + '/a', d + '/b'); os.utime(d + '/b')\n"
        "        with zipfile.ZipFile(d + '/z', 'w') as z: z.write(d + '/b', 'b')\n"
        "        got.append(int(zipfile.ZipFile(d + '/z').read('b')))\n"
        "    return got"
    )
    found = as_user(home, mode, program, "got = candidate(1)\nassert got == [1, 2, 3, 4, 5, 6, 7], got")
    assert (found["kind"], found["why"]) == ("ok", "")


def answer(machine: str, alone: bool, number: int, *arguments: int, arch: int | None = None) -> int | str:
    """What the kernel would do with the call: "allow", "kill", or the errno. Interprets the filter as linux/filter.h says."""
    data = struct.pack("=iIQ6Q", number, AUDIT_ARCH[machine] if arch is None else arch, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    code, place, held = _filter(machine, alone), 0, 0
    assert len(code) < 4096  # the kernel's limit
    while True:
        opcode, true, false, value = code[place]
        assert max(true, false) < 256
        place += 1
        match opcode:
            case 0x20:
                (held,) = struct.unpack_from("=I", data, value)
            case 0x15 | 0x35 | 0x45:
                holds = {0x15: held == value, 0x35: held >= value, 0x45: bool(held & value)}[opcode]
                place += true if holds else false
            case 0x06:
                return {0x7FFF0000: "allow", 0x80000000: "kill"}.get(value, value & 0xFFFF)
            case _:
                raise AssertionError(f"no such instruction: {opcode:#x}")


@pytest.mark.parametrize("machine", AUDIT_ARCH)
@pytest.mark.parametrize("alone", [True, False])
def test_what_the_filter_answers(machine: str, alone: bool) -> None:
    """On both processors, whichever this machine has. Numbers: asm/unistd_64.h, asm-generic/unistd.h."""
    column = list(AUDIT_ARCH).index(machine)
    allow, eperm, enotty, enosys = "allow", 1, 25, 38
    for numbers, arguments, expected in (
        ((0, 63), (), allow),  # read
        ((302, 261), (0, 3), allow),  # prlimit64 of the caller
        ((302, 261), (77, 0, 1), eperm),  # of another
        ((302, 261), (1 << 32, 0, 1), allow),  # the kernel reads the lower half
        ((319, 279), (), eperm),  # memfd_create
        ((41, 198), (1, 1), eperm),  # socket
        ((53, 199), (1, 1), allow),  # socketpair, AF_UNIX
        ((53, 199), (2, 1), eperm),
        ((72, 25), (3, 1), allow),  # fcntl F_GETFD
        ((72, 25), (3, 8, 77), eperm),  # F_SETOWN
        ((72, 25), (3, 1024), eperm),  # F_SETLEASE
        ((16, 29), (3, 0x5421), allow),  # ioctl FIONBIO
        ((16, 29), (3, 0x8901), enotty),  # FIOSETOWN
        ((157, 167), (4, 1), allow),  # prctl PR_SET_DUMPABLE 1
        ((157, 167), (4, 0), eperm),
        ((157, 167), (62, 2, 77), eperm),  # PR_SCHED_CORE
        ((56, 220), (17,), allow),  # clone, as fork does
        ((56, 220), (0x10000000 | 17,), eperm),  # CLONE_NEWUSER
        ((435, 435), (), enosys),  # clone3
        ((425, 425), (), enosys),  # io_uring_setup
        ((9999, 9999), (), enosys),  # of a kernel to come
        ((62, 129), (77, 9), allow if alone else eperm),  # kill
        ((91, 52), (), allow if alone else 0),  # fchmod
        ((76, 45), (), allow if alone else eperm),  # truncate
        ((134, 180), (), eperm),  # uselib, mq_open
    ):
        assert answer(machine, alone, numbers[column], *arguments) == expected, (numbers, arguments)
    assert answer(machine, alone, 0x40000000 + 302, 0) == eperm  # x32
    assert answer(machine, alone, 0, arch=0x40000003) == "kill"  # 32-bit calls have other numbers
