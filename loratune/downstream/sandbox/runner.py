"""Runs Python programs that a model wrote, and tests them, without trusting them.

**Who decides.** A program passes when the test code, running in a process of its own (the judge), ends without an
error. The program's process only answers calls of its one function, arguments and results travelling as plain values;
it never holds the tests or a way to say "passed". So exiting early, printing a marker, patching `assert` or returning an
object that equals everything gains nothing: only right answers pass.

**Walls, in both modes.** The program starts with an empty environment and no open files but its pipes. It and all it
starts are ended when the verdict is in, the wall-clock time is up, too much is printed, or loratune itself is killed.
Per process: address space, CPU time, file size, 64 open files. Per program: number of processes and threads. System calls
are those that `system_calls.py` lists (seccomp, on x86-64 and AArch64) and no others: no sockets but pairs inside the program,
nothing that reaches or looks into the user's other processes (ptrace, prlimit64, setpriority, sched_setaffinity, F_SETOWN, ...), no
new namespaces or mounts, and no memory that the limits do not count (memfd_create, System V shared memory, large pipes, descriptors
in flight). What pipes and pairs of sockets hold comes on top, 32 MiB per process at most. Under root each program is a user
of its own without capabilities.

**With namespaces** (the rule): it sees of the machine's files the Python installation with its packages, and /usr and
/lib, all read-only, and a /tmp in memory, limited in size, that vanishes with it; no other file, no other process, no
network device. Killing the first process of its PID namespace ends all of its processes, whatever they did.

**Weaker** (only when namespaces are missing and the caller says `weaker=True`; containers often forbid them):
Landlock (Linux 5.13) confines reading to the same folders and writing to a scratch folder, which is removed
afterwards; signals may not be sent, and a change of a file's mode, owner or times has no effect; orphaned and daemonised
processes are found through a subreaper. The scratch folder's total, files that are open and removed included, is looked at
every 0.1 s, so what is written in between, at most 64 files of `scratch_bytes` per process, comes on top; where TMPDIR is in
memory, that is memory. Also not covered: when loratune is killed by SIGKILL, the scratch folder and processes that the program had
detached stay behind (still within their walls); whether a file exists, and its size. On a kernel without Landlock also
not covered: removed files that stay open, reading whatever this user may read and, unless loratune runs as root, writing whatever this
user may write, /proc and /dev/shm included. On other processors than x86-64 and AArch64 the weaker walls are refused.

Not covered in either mode: a flaw in the kernel; several processes together using `processes` x `memory_bytes`; load on
processors and caches for `timeout` seconds, so a machine under load may time out a slow program. Linux only.
"""

import functools
import json
import os
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from loratune.errors import SandboxError
from loratune.system.machine import usable_cores

Kind = Literal["ok", "failed", "timeout", "memory", "output", "killed"]
AT_ONCE = usable_cores()  # programs, unless `run_programs` is told; less in a process that shares the processors with others
PACKAGE = Path(__file__).parents[2]
LEEWAY = 30.0  # seconds beyond the program's own after which the warden itself is taken for dead

# The child starts without site-packages; bare packages stand in for loratune's, so that none of their code runs.
START = """
import sys, types
for name in ("loratune", "loratune.downstream", "loratune.downstream.sandbox"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [sys.argv[1] + name.removeprefix("loratune").replace(".", "/")]
from loratune.downstream.sandbox.processes import warden
warden()
"""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The resources of one program."""

    timeout: float = 3.0  # seconds of wall-clock time, from the program's start to the verdict
    memory_bytes: int = 512 << 20  # address space of each process, interpreter included
    scratch_bytes: int = 16 << 20  # its /tmp, and any one file
    processes: int = 8  # processes and threads at a time, judge included
    output_bytes: int = 1 << 20  # printed


@dataclass(frozen=True, kw_only=True)
class ProgramTest:
    """A program and its test.

    program: untrusted text that defines the function `entry_point`.
    tests: trusted text, run in the judge's process, where `candidate(...)` calls that function. Plain values only (None,
        numbers, text, bytes, lists, tuples, sets, dicts) pass either way; any other result fails the program, and what
        the function does to its arguments is not seen. An exception that leaves the tests fails the program.
    """

    program: str
    entry_point: str
    tests: str


@dataclass(frozen=True, kw_only=True)
class ProgramResult:
    """The result of a program.

    kind: "ok" (passed), "failed" (an exception, a wrong answer, or it ended by itself), "timeout" (wall-clock or CPU
        time), "memory", "output" (printed too much), "killed" (by a signal, such as a segmentation fault).
    why: one line for people; may quote the program. seconds: wall-clock.
    """

    kind: Kind
    why: str = ""
    seconds: float = 0.0


@functools.cache
def namespaces_missing() -> str:
    """Why namespaces cannot be used here, found out once by trying; "" when they can."""
    try:
        _run(
            ProgramTest(program="def one():\n    return 1", entry_point="one", tests="assert candidate() == 1"),
            Limits(timeout=20),
            namespaces=True,
        )
    except SandboxError as error:
        return str(error)
    return ""


def run_program(job: ProgramTest, *, limits: Limits = Limits(), weaker: bool = False) -> ProgramResult:
    """Run one program against its tests. For `weaker`, and what is raised, see `run_programs`."""
    return run_programs([job], limits=limits, workers=1, weaker=weaker)[0]


def run_programs(
    jobs: Sequence[ProgramTest],
    *,
    limits: Limits = Limits(),
    workers: int = 0,
    weaker: bool = False,
    settled: Callable[[int], None] = lambda number: None,
) -> list[ProgramResult]:
    """Run programs side by side, each in a sandbox of its own; the results stand in the order of the jobs.

    workers: programs at a time; 0: AT_ONCE, one per processor. weaker: accept the weaker walls where namespaces are missing.
    settled: told the number of programs done so far, after each.
    Raises SandboxError when namespaces are missing and `weaker` is false, or when a sandbox cannot be set up.
    """
    missing = namespaces_missing()
    if missing and not weaker:
        raise SandboxError(
            f"generated code cannot be isolated by namespaces here ({missing}). Run on a Linux machine or container that "
            "allows user namespaces, or accept the weaker walls with weaker=True; the docstring of "
            "loratune.downstream.sandbox.runner says what they do not cover."
        )
    pool = ThreadPoolExecutor(workers or AT_ONCE)
    try:
        futures = [pool.submit(_run, job, limits, namespaces=not missing) for job in jobs]
        for number, future in enumerate(as_completed(futures), 1):
            future.result()
            settled(number)
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def _run(job: ProgramTest, limits: Limits, *, namespaces: bool) -> ProgramResult:
    if not sys.platform.startswith("linux"):
        raise SandboxError(f"programs can only be isolated on Linux, this is {sys.platform}")
    with nullcontext("/tmp") if namespaces else tempfile.TemporaryDirectory(prefix="loratune-sandbox-") as scratch:
        order = {
            "namespaces": namespaces,
            "limits": asdict(limits),
            "readable": _readable(),
            "packages": _packages(),
            "scratch": scratch,
            "entry_point": job.entry_point,
        }
        environment = {
            "HOME": scratch,
            "TMPDIR": scratch,
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",  # the order of a set, and so a verdict, is the same every time
            "OMP_NUM_THREADS": "1",  # NumPy's pool of threads would count as processes
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]  # some Pythons need it to start
        command = [sys.executable, "-s", "-S", "-P", "-X", "utf8", "-c", START, str(PACKAGE)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
        try:
            said, complaint = process.communicate(b"".join(map(_framed, (order, job.program, job.tests))), limits.timeout + LEEWAY)
        except subprocess.TimeoutExpired:
            said, complaint = b"", b"the warden does not answer"
        finally:
            process.kill()  # takes everything below with it
            process.communicate()
    try:
        answer: dict[str, Any] = json.loads(said[4:])
    except ValueError:
        last = complaint.decode(errors="replace").strip().rpartition("\n")[2]
        raise SandboxError(f"the sandbox broke: {last or f'exit status {process.returncode}'}") from None
    if answer["kind"] == "setup":
        raise SandboxError(answer["why"])
    return ProgramResult(**answer)


def _framed(message: Any) -> bytes:
    data = json.dumps(message).encode()
    return struct.pack("!I", len(data)) + data


@functools.cache
def _packages() -> list[str]:
    """Where installed packages are imported from: programs may use NumPy, as in the published harness."""
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


@functools.cache
def _readable() -> list[str]:
    """What a program may read, shorter paths first: what Python needs to run and import."""
    system = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom"]
    return sorted({*system, sys.base_prefix, sys.base_exec_prefix, *_packages()}, key=len)
