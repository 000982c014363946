"""Whether a study's process is at work: what its lock, its last heartbeat and its progress say together."""

import fcntl
import json
import os
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from loratune.record.paths import StudyPaths
from loratune.record.reader import read_sessions
from loratune.system.files import alive

_SILENT = 60.0  # seconds; a driver's loop, and that of `select`, gives a heartbeat each second


class StudyState(StrEnum):
    """Of a study."""

    STARTING = "starting"  # reads data, loads libraries: no heartbeat is due yet
    RUNNING = "running"
    NO_HEARTBEAT = "no heartbeat"  # the process that holds the study's lock has not come round for a minute: it is stuck, or waits
    GONE = "killed"  # the process is gone; workers of it hold the lock, and end within a second
    STOPPED = "stopped"
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True)
class Activity:
    """Of the process that holds a study's lock."""

    state: StudyState
    held: bool  # the lock, by a driver or workers that a killed one left
    command: str | None = None  # run or select
    pid: int | None = None
    host: str | None = None
    silent: float | None = None  # seconds since the last heartbeat, or since the process took the lock; of what is over, the last progress


def activity(folder: Path, progress: dict[str, Any], *, spent: bool) -> Activity:
    """What the study in `folder` is doing; spent: its budget is, so it is finished when nobody works on it. progress: progress.json."""
    updated, now = progress.get("updated", 0.0), time.time()
    if not is_locked(folder):
        silent = now - updated if updated else None
        return Activity(state=StudyState.FINISHED if spent else StudyState.STOPPED, held=False, silent=silent)
    holder, beat = _holder(folder)
    pid, host, command = holder.get("pid"), holder.get("host"), holder.get("command", "run")
    gone = host == os.uname().nodename and isinstance(pid, int) and not alive(pid)
    # A search has begun when its own process, in this session, has come to its loop. A selection comes there at once.
    own = (progress.get("pid"), progress.get("host")) == (pid, host) and updated > _started(folder)
    begun = own or command == "select"
    silent = max(0.0, now - (max(updated, beat) if own else beat))
    if gone:
        state = StudyState.GONE
    elif not begun:
        state = StudyState.STARTING
    else:
        state = StudyState.NO_HEARTBEAT if silent > _SILENT else StudyState.RUNNING
    return Activity(state=state, held=True, command=command, pid=pid, host=host, silent=silent)


def is_locked(folder: Path) -> bool:
    """Whether a process holds the study's lock: a driver, or workers that a killed one left, for a second."""
    try:
        with open(StudyPaths(folder).lock) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    except OSError:
        return False


def _started(folder: Path) -> float:
    """When the latest session of the driver began, seconds since the epoch; 0 where none is told."""
    told = [session.get("started") for session in read_sessions(StudyPaths(folder))]
    return max((moment for moment in told if isinstance(moment, int | float)), default=0.0)


def _holder(folder: Path) -> tuple[dict[str, Any], float]:
    """(What the lock's holder wrote, when it gave its last heartbeat.)"""
    path = StudyPaths(folder).lock
    try:
        found = json.loads(path.read_text())
        return (found if isinstance(found, dict) else {}), path.stat().st_mtime
    except (OSError, ValueError, RecursionError):
        return {}, 0.0
