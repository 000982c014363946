"""A program that runs as an ordinary user reaches none of the user's other processes and files, and does what good programs do."""

# ruff: noqa: E501
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ordinary_user import as_user, needs_landlock, user_home

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is Linux only")

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


@pytest.fixture
def home() -> Iterator[Path]:
    with user_home() as folder:
        yield folder


@pytest.fixture(params=["namespaces", "weaker"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_program_reaches_nothing_of_its_user(home: Path, mode: str) -> None:
    needs_landlock(mode)
    found = as_user(home, mode, REACHES, "got = candidate(1)\nassert got == [], got")
    assert (found["kind"], found["why"]) == ("ok", "")
    assert found["after"] == found["before"]
    assert found["before"]["file"][:2] == ["secret", 0o100600]


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
