"""What `loratune status` says of the process behind a study, against processes that are there, stuck or gone."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratune.cli.activity import StudyState, activity
from loratune.errors import StorageError
from loratune.record import open_record
from loratune.record.paths import StudyPaths
from loratune.record.progress import ProgressTracker
from loratune.spec import StudySpec


def progress(folder: Path, **facts: Any) -> None:
    snapshot = ProgressTracker(budget_trials=4, workers=1).snapshot() | {"seconds_left": 77.0, "tokens_per_second": 5.0} | facts
    StudyPaths(folder).progress.write_text(json.dumps(snapshot))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    folder.mkdir()
    spec = StudySpec.load(None, (), {"model": "m", "data": {"train": ["d"], "validation_fraction": 0.1}, "output": {"folder": str(folder)}})
    StudyPaths(folder).spec.write_text(spec.to_yaml())
    return folder


@pytest.fixture
def status(study: Path, loratune: Callable[..., Any]) -> Callable[[], tuple[dict[str, Any], str]]:
    """(the facts, the text's first line)."""
    return lambda: (json.loads(loratune("status", study, "--json").out), loratune("status", study).out.splitlines()[0])


def old(folder: Path, seconds: float, **facts: Any) -> None:
    """Everything that the study's process does at each heartbeat was done so long ago."""
    then = time.time() - seconds
    progress(folder, updated=then, heard=then, **facts)
    lock = StudyPaths(folder).lock
    os.utime(lock, (then, then))


def test_from_the_start_to_the_end(study: Path, status: Any) -> None:
    facts, _ = status()
    assert (facts["state"], facts["running"], facts["command"], facts["seconds_since_update"]) == ("stopped", False, None, None)
    progress(study, updated=time.time() - 500, pid=1)  # of an earlier session, in another process
    with open_record(study) as record:
        assert status()[0]["state"] == "starting"
        progress(study, updated=time.time() - 500)  # in this one
        record.session({"number": 1, "seconds": 0.0, "started": time.time() - 5})
        facts, line = status()
        assert (facts["state"], facts["running"], facts["command"]) == ("starting", True, "run")
        assert facts["seconds_left"] is None  # that of the session before
        assert f"starting (process {os.getpid()} on {os.uname().nodename}, begun 0 s ago)" in line
        record.beat()
        progress(study)
        facts, line = status()
        assert (facts["state"], facts["seconds_left"], facts["tokens_per_second"]) == ("running", 77.0, 5.0)
        assert 0 <= facts["seconds_since_progress"] < 30
        assert "running (process" in line
        assert "last heartbeat 0 s ago)" in line
    facts, line = status()
    assert (facts["state"], facts["running"], facts["seconds_left"], facts["pid"]) == ("stopped", False, None, None)
    assert f"stopped; to continue: loratune run {study}" in line
    assert activity(study, {}, spent=True).state is StudyState.FINISHED


def test_a_loop_that_stands_still(study: Path, status: Any) -> None:
    row = {"trial": 0, "run": "main", "step": 3, "total_steps": 9, "tokens": 5, "train_loss": None, "validation_loss": None}
    with open_record(study):
        old(study, 300, running=[row])
        facts, line = status()
    assert (facts["state"], facts["running"], facts["seconds_left"], facts["tokens_per_second"]) == ("no heartbeat", True, None, None)
    assert 299 < facts["seconds_since_update"] < 330
    assert facts["in_training"] == [row]  # where it stands
    assert f"no heartbeat for 5 min: process {os.getpid()} on" in line
    assert f"kill -9 {os.getpid()}" in line


def test_a_worker_that_is_silent_is_told_apart(study: Path, status: Any) -> None:
    with open_record(study) as record:
        old(study, 300)
        record.beat()
        progress(study, heard=time.time() - 300)
        facts, line = status()
    assert (facts["state"], facts["seconds_left"]) == ("running", 77.0)
    assert 299 < facts["seconds_since_progress"] < 330
    assert "nothing from training for 5 min" in line


def test_the_workers_of_a_killed_driver(study: Path, status: Any) -> None:
    code = f"""
import subprocess, sys
from pathlib import Path
from loratune.record import open_record
with open_record(Path({str(study)!r})) as record:
    subprocess.Popen([sys.executable, "-c", "input()"], pass_fds=(record.lock,))
    print("held", flush=True)
    input()
"""
    driver = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    assert driver.stdin is not None
    assert driver.stdout.readline() == "held\n"
    progress(study)
    driver.kill()
    driver.wait()
    facts, line = status()
    driver.stdin.close()  # the worker ends
    assert (facts["state"], facts["running"], facts["pid"], facts["seconds_left"]) == ("killed", True, driver.pid, None)
    assert f"killed: process {driver.pid} on {os.uname().nodename} is gone" in line
    assert f"to continue: loratune run {study}" in line


def test_a_selection_is_no_search(study: Path, status: Any) -> None:
    with open_record(study, "select") as record:
        old(study, 300)  # the search is over
        record.beat()
        facts, line = status()
    assert (facts["state"], facts["command"], facts["seconds_left"], facts["in_training"]) == ("running", "select", None, [])
    assert "selecting (process" in line


def test_who_holds_the_lock_is_named_with_its_last_heartbeat(study: Path) -> None:
    with open_record(study, "select"):
        old(study, 300)
        said = rf"process {os.getpid()} on {re.escape(os.uname().nodename)} \(loratune select, last heartbeat 5 min ago\)"
        with pytest.raises(StorageError, match=said), open_record(study):
            pass


@pytest.mark.parametrize("content", ["", "[]", "{", '{"pid": "x"}', '{"pid": {}, "host": [], "command": 3}'])
def test_a_damaged_lock_is_no_obstacle(study: Path, status: Any, content: str) -> None:
    with open_record(study):
        StudyPaths(study).lock.write_text(content)
        assert status()[0]["running"]
        progress(study, heard={"x": []})
        assert status()[0]["seconds_since_progress"] is None
