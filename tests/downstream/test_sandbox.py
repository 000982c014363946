"""Good programs pass, a zoo of hostile ones is contained in both modes, and nothing of theirs stays behind."""

# ruff: noqa: E501
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from loratune.downstream.sandbox import runner, walls
from loratune.downstream.sandbox.runner import Limits, ProgramResult, ProgramTest, run_program, run_programs
from loratune.downstream.sandbox.values import NotPlainError, decode, encode
from loratune.errors import SandboxError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is Linux only")
TESTS = "assert candidate(1) == 2"
GOOD = "def f(x):\n    return x + 1"
LIMITS = Limits(timeout=4.0, memory_bytes=256 << 20)  # generous: the machine may be busy

# name: (program, verdict, part of the reason). A program that steals or breaks out returns the right answer, 2, when it
# has succeeded, so "ok" would be a breach; those that do harm on the side and answer rightly are marked "ok".
# {decoy}, {port}: a folder and a TCP port of the test's, which any user may use.
ZOO: dict[str, tuple[str, str, str]] = {
    "endless loop": ("def f(x):\n    while True: pass", "timeout", ""),
    "endless loop before the function": ("while True: pass\ndef f(x): return 2", "timeout", ""),
    "sleeps": ("import time\ndef f(x):\n    time.sleep(1e4)", "timeout", ""),
    "ignores SIGTERM": (
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "def f(x):\n    while True: time.sleep(1)",
        "timeout",
        "",
    ),
    "fork bomb": ("import os\ndef f(x):\n    while True:\n        try: os.fork()\n        except OSError: pass", "timeout", ""),
    "threads without end": (
        "import threading, time\ndef f(x):\n    while True: threading.Thread(target=time.sleep, args=(1e4,)).start()",
        "failed",
        "can't start new thread",
    ),
    "memory hog": ("def f(x):\n    a = []\n    while True: a.append(bytearray(1 << 24))", "memory", ""),
    "fills the disk": (
        "def f(x):\n    n = 0\n    while True:\n        n += 1\n        with open(str(n), 'wb') as h: h.write(bytes(1 << 20))",
        "failed|output",  # a full file system; or, where the scratch folder is on the disk, found by the warden
        "",
    ),
    "one large file": ("def f(x):\n    with open('a', 'wb') as h:\n        while True: h.write(bytes(1 << 20))", "failed|output", ""),
    "prints gigabytes": ("def f(x):\n    while True: print('x' * (1 << 16))", "output", "printed more than"),
    "prints to stderr": ("import os\ndef f(x):\n    while True: os.write(2, bytes(1 << 16))", "output", "printed more than"),
    "answers with 32 MiB": ("def f(x):\n    return 'x' * (1 << 25)", "failed", "no plain value"),
    "deletes a home folder": (
        "import os, shutil\ndef f(x):\n    for p in ('{decoy}', os.path.expanduser('~root'), '/usr/lib/python3'):\n"
        "        shutil.rmtree(p, ignore_errors=True)\n    return 2",
        "ok",
        "",
    ),
    "overwrites a file outside": ("def f(x):\n    open('{decoy}/secret', 'w').write('gone'); return 2", "failed", "Error"),
    "writes through a link": (
        "import os\ndef f(x):\n    os.symlink('{decoy}/secret', 'a'); open('a', 'a').write('gone'); return 2",
        "failed",
        "Error",
    ),
    "reads a secret file": ("def f(x):\n    return 2 if open('{decoy}/secret').read() else 0", "failed", "Error"),
    "reads the environment": (
        "import glob, os\ndef f(x):\n    seen = str(os.environ).encode()\n    for p in glob.glob('/proc/*/environ'):\n"
        "        try: seen += open(p, 'rb').read()\n        except OSError: pass\n    return 2 if b'hidden-token' in seen else 0",
        "failed",
        "AssertionError",
    ),
    "TCP": ("import socket\ndef f(x):\n    socket.create_connection(('127.0.0.1', {port}), 1); return 2", "failed", "Error"),
    "UDP": (
        "import socket\ndef f(x):\n    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port})); return 2",
        "failed",
        "PermissionError",
    ),
    "UNIX socket": ("import socket\ndef f(x):\n    socket.socket(socket.AF_UNIX).connect('{decoy}/socket'); return 2", "failed", "PermissionError"),
    "kills its parent": ("import os\ndef f(x):\n    os.kill(os.getppid(), 9)", "failed", ""),
    "kills everybody": ("import os\ndef f(x):\n    os.kill(-1, 9)", "failed", ""),
    "traces its parent": (
        "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\ndef f(x):\n    assert c.ptrace(16, os.getppid(), 0, 0) == 0; return 2",
        "failed",
        "AssertionError",
    ),
    "reads its parent's memory": (
        "import os\ndef f(x):\n    open(f'/proc/{os.getppid()}/mem', 'rb').read(1); return 2",
        "failed",
        "Error",
    ),
    "makes itself root": (
        "import ctypes\nc = ctypes.CDLL(None)\ndef f(x):\n    assert c.unshare(0x10000000) == 0 or c.setuid(0) == 0; return 2",
        "failed",
        "AssertionError",
    ),
    "shared memory that stays": ("import ctypes\nc = ctypes.CDLL(None)\ndef f(x):\n    assert c.shmget(7, 1 << 20, 0o1777) >= 0; return 2", "failed", ""),
    "memory in files without a name": (
        "import os\ndef f(x):\n    a = []\n    while True:\n        a.append(os.memfd_create('a'))\n        os.write(a[-1], bytes(1 << 23))",
        "failed",
        "PermissionError",
    ),
    "memory in removed files": (
        "import os\ndef f(x):\n    a = []\n    while True:\n        a.append(os.open('a', os.O_RDWR | os.O_CREAT)); os.unlink('a')\n        os.write(a[-1], bytes(1 << 20))\n        if len(a) > 40: __import__('time').sleep(1e4)",
        "failed|output",
        "",
    ),
    "memory in pipes": (
        "import ctypes, mmap, os\nc = ctypes.CDLL(None)\ndef f(x):\n    b = mmap.mmap(-1, 1 << 20); r, w = os.pipe()\n"
        "    v = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.c_char.from_buffer(b)), 1 << 20)\n"
        "    assert c.vmsplice(w, v, ctypes.c_size_t(1), 0) > 0; return 2",
        "failed",
        "AssertionError",
    ),
    "large pipes": ("import fcntl, os\ndef f(x):\n    fcntl.fcntl(os.pipe()[0], 1031, 1 << 20); return 2", "failed", "PermissionError"),
    "limits its parent": (
        "import os, resource\ndef f(x):\n    resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1)); return 2",
        "failed",
        "PermissionError",
    ),
    "slows the user's processes down": ("import os\ndef f(x):\n    os.setpriority(os.PRIO_USER, os.getuid(), 19); return 2", "failed", "PermissionError"),
    "binds its parent to a processor": ("import os\ndef f(x):\n    os.sched_setaffinity(os.getppid(), [0]); return 2", "failed", "PermissionError"),
    "sends signals through a pipe": (
        "import fcntl, os, time\ndef f(x):\n    r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid()); return 2",
        "failed",
        "PermissionError",
    ),
    "becomes a daemon": (
        "import os, time\ndef f(x):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
        "            os.closerange(0, 64); time.sleep(1)\n            open('{decoy}/daemon', 'w').write('here')\n            time.sleep(1e4)\n"
        "        os._exit(0)\n    time.sleep(.2)\n    return 2",
        "ok",
        "",
    ),
    "becomes another program": ("import os\ndef f(x):\n    os.execv('/usr/bin/sleep', ['sleep', '31557.25'])", "timeout|failed", ""),
    "deep recursion": ("def f(x):\n    return f(x)", "failed", "RecursionError"),
    "deep answer": ("def f(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a", "failed", ""),
    "segmentation fault": ("import ctypes\ndef f(x):\n    ctypes.string_at(0)", "killed", "SIGSEGV"),
    "aborts": ("import os\ndef f(x):\n    os.abort()", "killed", "SIG"),
    "does not parse": ("def f(x) return 2", "failed", "SyntaxError"),
    "has no such function": ("def g(x): return 2", "failed", "no function 'f'"),
    "os._exit(0) before the tests": ("import os\nos._exit(0)\ndef f(x): return 2", "failed", "exit status 0"),
    "os._exit(0) in the tests": ("import os\ndef f(x): os._exit(0)", "failed", "exit status 0"),
    "sys.exit(0) before the tests": ("import sys\ndef f(x): return 0\nsys.exit(0)", "failed", "SystemExit"),
    "sys.exit(0) in the tests": ("import sys\ndef f(x): sys.exit(0)", "failed", "SystemExit"),
    "forges the verdict": (
        "import json, os, struct\ndef f(x):\n    d = json.dumps(dict(kind='ok', why='')).encode()\n    for fd in range(64):\n"
        "        try: os.write(fd, struct.pack('!I', len(d)) + d)\n        except OSError: pass\n    print('ok 1 passed'); os._exit(0)",
        "failed",
        "",
    ),
    "patches what tests use": (
        "import builtins, sys, types, unittest\nbuiltins.AssertionError = type('Never', (BaseException,), {})\nbuiltins.compile = lambda *a: ''\n"
        "unittest.TestCase.fail = lambda *a: None\nsys.modules['math'] = types.ModuleType('math')\ndef f(x): return 0",
        "failed",
        "AssertionError",
    ),
    "equals everything": ("class A:\n    def __eq__(self, o): return True\ndef f(x): return A()", "failed", "type A"),
    "a number that equals everything": ("class A(int):\n    def __eq__(self, o): return True\ndef f(x): return A(0)", "failed", "AssertionError"),
    "looks for the tests": (
        "import gc\ndef f(x):\n    return 2 if any('2 == )1(etadidnac'[::-1] in str(o) for o in gc.get_objects() if type(o) in (list, dict, tuple)) else 0",
        "failed",
        "AssertionError",
    ),
    "closes its channels": ("import os, time\ndef f(x):\n    os.closerange(0, 64)\n    time.sleep(1e4)", "failed", "closed its channel"),
    "leaves locked folders": (
        "import os\ndef f(x):\n    os.makedirs('a/b/c'); open('a/b/c/d', 'w').close(); os.chmod('a/b', 0); os.chmod('a', 0); return 2",
        "ok",
        "",
    ),
}  # fmt: skip


@dataclass
class Outside:
    """What the hostile programs aim at, and where to look for traces of them."""

    folder: Path
    marker: str
    tcp: socket.socket
    unix: socket.socket

    def processes(self) -> list[str]:
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if self.marker in command or "31557.25" in command:
                found.append(command[-200:])
        return found

    def assert_clean(self) -> None:
        assert self.processes() == []
        assert (self.folder / "secret").read_text() == "secret"
        assert {path.name for path in self.folder.iterdir()} == {"secret", "socket", "temporary"}
        assert list((self.folder / "temporary").iterdir()) == []
        for one in (self.tcp, self.unix):
            with pytest.raises(BlockingIOError):  # nobody has called
                one.accept()


@pytest.fixture(params=["namespaces", "weaker"], scope="module")
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "weaker":
            patch.setattr(runner, "namespaces_missing", lambda: "made so by the test")
        elif runner.namespaces_missing():
            pytest.skip(f"no namespaces here: {runner.namespaces_missing()}")
        yield request.param


@pytest.fixture(scope="module")
def outside(mode: str) -> Iterator[Outside]:
    # Not below pytest's own folder, whose mode alone would keep another user out.
    folder = Path(tempfile.mkdtemp(prefix="loratune-decoy-"))
    folder.chmod(0o777)
    (folder / "secret").write_text("secret")
    (folder / "secret").chmod(0o666)
    (folder / "temporary").mkdir()
    tcp, unix, marker = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), uuid.uuid4().hex
    unix.bind(str(folder / "socket"))
    (folder / "socket").chmod(0o777)
    unix.listen()
    for one in (tcp, unix):
        one.setblocking(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder / "temporary"))
        patch.setattr(runner, "START", f"{runner.START}# {marker}\n")  # stays in the command line of whatever it forks
        patch.setenv("API_TOKEN", "hidden-token")
        yield Outside(folder, marker, tcp, unix)
    tcp.close()
    unix.close()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def verdicts(mode: str, outside: Outside) -> dict[str, ProgramResult]:
    """The whole zoo, side by side, between good programs."""
    port = outside.tcp.getsockname()[1]
    texts = {name: text.replace("{decoy}", str(outside.folder)).replace("{port}", str(port)) for name, (text, _, _) in ZOO.items()}
    jobs = [ProgramTest(program=text, entry_point="f", tests=TESTS) for text in (GOOD, *texts.values(), GOOD)]
    results = run_programs(jobs, limits=LIMITS, weaker=mode == "weaker", workers=4)
    return dict(zip(("good before", *texts, "good after"), results, strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_hostile_program_gets_its_verdict(name: str, verdicts: dict[str, ProgramResult], mode: str) -> None:
    _, kinds, why = ZOO[name]
    if mode == "weaker" and not walls.landlock_version() and "{decoy}" in ZOO[name][0]:
        pytest.skip("files are not protected without namespaces and Landlock, as documented")
    assert verdicts[name].kind in kinds.split("|"), verdicts[name]
    assert why in verdicts[name].why
    assert verdicts[name].seconds < LIMITS.timeout + 1


def test_the_run_goes_on_and_nothing_stays(verdicts: dict[str, ProgramResult], outside: Outside, mode: str) -> None:
    assert verdicts["good before"].kind == verdicts["good after"].kind == "ok"
    time.sleep(1.2)  # by now the daemon would have written its file
    outside.assert_clean()
    assert run_program(ProgramTest(program=GOOD, entry_point="f", tests=TESTS), weaker=mode == "weaker").kind == "ok"


def test_everything_ends_with_loratune(outside: Outside, mode: str) -> None:
    """kill -9 of the process that called the sandbox, while a program that hides runs."""
    program = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1e4)\nopen('a', 'w').close()\ndef f(x):\n    time.sleep(1e4)"
    )
    text = (
        "from loratune.downstream.sandbox import runner\n"
        f"runner.START = {runner.START!r}\n"
        f"runner._run(runner.ProgramTest(program={program!r}, entry_point='f', tests='candidate(1)'), runner.Limits(timeout=60), "
        f"namespaces={mode == 'namespaces'})"
    )
    environment = {**os.environ, "TMPDIR": str(outside.folder / "temporary")}
    caller = subprocess.Popen([sys.executable, "-c", text], env=environment, stdin=subprocess.DEVNULL)
    wait_until(lambda: len(outside.processes()) >= 5)  # caller, warden, judge, program, its child
    caller.kill()
    caller.wait()
    if mode == "weaker":  # the child that hid is nobody's child: only its own limits and walls hold it, as documented
        for place in Path("/proc").glob("[0-9]*"):
            if outside.marker.encode() in place.joinpath("cmdline").read_bytes():
                os.kill(int(place.name), signal.SIGKILL)
        shutil.rmtree(outside.folder / "temporary")
        (outside.folder / "temporary").mkdir()
    wait_until(lambda: not outside.processes())
    outside.assert_clean()


def wait_until(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "did not come about in time"
        time.sleep(0.05)


def test_what_a_good_program_may_do(mode: str) -> None:
    program = (
        "import collections, os, subprocess, tempfile\nimport numpy\n"
        "def f(x, *, k):\n"
        "    with tempfile.TemporaryFile() as h: h.write(b'ok')\n"
        "    counts = collections.Counter(x)\n"
        "    return (numpy.sum([1.5, 2]), counts, {k}, float('inf'), 10**40, None, b'z', len(os.listdir('.')))"
    )
    tests = "got = candidate('aab', k=(1, 2))\nassert got == (3.5, {'a': 2, 'b': 1}, {(1, 2)}, float('inf'), 10**40, None, b'z', 0), got"
    assert (
        run_program(ProgramTest(program=program, entry_point="f", tests=tests), limits=Limits(timeout=20), weaker=mode == "weaker").kind
        == "ok"
    )


def test_verdicts_do_not_depend_on_hash_seeds(mode: str) -> None:
    job = ProgramTest(
        program="def f():\n    return list({'a', 'b', 'c', 'd', 'e', 'f', 'g'})",
        entry_point="f",
        tests="assert not candidate(), candidate()",
    )
    results = run_programs([job] * 4, weaker=mode == "weaker")
    assert len({ran.why for ran in results}) == 1


def test_refuses_without_namespaces_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "namespaces_missing", lambda: "unshare: Operation not permitted")
    with pytest.raises(SandboxError, match=r"unshare: Operation not permitted.*weaker=True"):
        run_program(ProgramTest(program=GOOD, entry_point="f", tests=TESTS))


def test_a_broken_sandbox_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "START", "raise RuntimeError('no walls')")
    with pytest.raises(SandboxError, match="no walls"):
        runner._run(ProgramTest(program=GOOD, entry_point="f", tests=TESTS), LIMITS, namespaces=True)


def test_progress_is_told() -> None:
    told: list[int] = []
    run_programs([ProgramTest(program=GOOD, entry_point="f", tests=TESTS)] * 3, weaker=True, settled=told.append)
    assert told == [1, 2, 3]


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -1.5, float("-inf"), 1j, "ä\ud800", b"\0", [1, (2.0, [])], {1: {2, 3}}, {(1,): frozenset({"a"})}, 10**50],
    ids=repr,
)
def test_values_come_back_as_they_were(value: object) -> None:
    back = decode(encode(value))
    assert back == value
    assert repr(back) == repr(value)


@pytest.mark.parametrize("value", [object(), range(3), iter([1]), lambda: 1, [1, {2: object()}]])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(NotPlainError, match="cannot be compared"):
        encode(value)


@pytest.mark.parametrize(
    "written", [[1], 1.5, {"os": "x"}, {"dict": [[1]]}, {"set": [{"list": []}]}, {"float": 3}, {"bytes": "zz"}, {"a": 1, "b": 2}]
)
def test_forged_encodings_are_refused(written: object) -> None:
    with pytest.raises(NotPlainError):
        decode(written)
