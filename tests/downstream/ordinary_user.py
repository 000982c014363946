"""Runs the sandbox as an ordinary user.

Under root every program is a user of its own, which hides what the walls must do.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import loratune
from loratune.downstream.sandbox import walls

USER = 64_203  # nobody's, hopefully; where the tests run as root

# Runs with the standard library alone, by any Python that the user may execute.
DRIVER = r"""
import ctypes, json, os, resource, subprocess, sys, time
from loratune.downstream.sandbox import runner

order = json.loads(sys.stdin.read())
if order["mode"] == "weaker":
    runner.namespaces_missing = lambda: "made so by the test"
elif runner.namespaces_missing():
    print(json.dumps({"missing": runner.namespaces_missing()}))
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
test = runner.ProgramTest(program=text, entry_point="f", tests=order["tests"])
ran = runner.run_program(test, limits=runner.Limits(**order["limits"]), weaker=True)
time.sleep(0.3)
after = seen()
neighbour.kill()
print(json.dumps({"uid": os.getuid(), "kind": ran.kind, "why": ran.why, "before": before, "after": after}))
"""


@contextlib.contextmanager
def user_home() -> Iterator[Path]:
    """A folder of the user's own, with a copy of what the sandbox needs."""
    folder = Path(tempfile.mkdtemp(prefix="loratune-user-"))
    folder.chmod(0o755)
    package, own = Path(loratune.__file__).parent, folder / "loratune"
    for path in ("__init__.py", "errors.py", "system/__init__.py", "system/machine.py", "downstream/__init__.py"):
        (own / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(package / path, own / path)
    shutil.copytree(package / "downstream" / "sandbox", own / "downstream" / "sandbox", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder / "home", folder / "temporary"):
        path.mkdir()
        if os.geteuid() == 0:
            os.chown(path, USER, USER)
    yield folder
    shutil.rmtree(folder)


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
