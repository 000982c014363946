"""The one writer of a study's folder, and the lock that keeps it the only one."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from loratune.errors import StorageError
from loratune.files import write_atomically
from loratune.record.trials import Trial, outcome_path, text_of
from loratune.work import Outcome, Recipe, Segment, State


class Record:
    """The one writer of a study's folder. Make it with `open_record`."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self.lock = lock  # file descriptor; workers inherit it, so that the lock outlives a killed driver until they are gone

    def recipe(self, recipe: Recipe) -> None:
        write_atomically(self.folder / "recipe.json", recipe.to_json())

    def outcome(self, segment: Segment) -> Outcome | None:
        """The segment's outcome, if it was ever recorded."""
        path = outcome_path(self.folder, segment.key)
        return Outcome.from_json(text_of(path)) if path.exists() else None

    def keep(self, outcome: Outcome) -> None:
        """Record a final outcome. Cancelled segments and bad input are not final: the same command tries again."""
        if outcome.state not in (State.CANCELLED, State.BAD_INPUT):
            write_atomically(outcome_path(self.folder, outcome.key), outcome.to_json())

    def trial(self, trial: Trial) -> None:
        """Write `trial.json`, unless what stands there knows of more segments: then this is a replay."""
        path = self.folder / "trials" / f"{trial.number:04d}" / "trial.json"
        content = json.loads(trial.to_json())
        content["segments"] = len(content.pop("outcomes"))  # each has a file of its own
        text = json.dumps(content, indent=1)
        old = text_of(path) if path.exists() else ""
        if old != text and (not old or json.loads(old)["segments"] <= content["segments"]):
            write_atomically(path, text)

    def begin(self, number: int, settled: int) -> None:
        """Note, before the sampler is asked for trial `number`, how many segments had been settled by then."""
        write_atomically(self.folder / "trials" / f"{number:04d}" / "began", str(settled))

    def began_at(self) -> dict[int, int]:
        """What `begin` noted, by trial: a replayed study starts each trial at the same point."""
        return {int(path.parent.name): int(text_of(path)) for path in (self.folder / "trials").glob("*/began")}

    def kept(self, name: Literal["slots", "workers"], chosen: int) -> int:
        """How many slots a process has, or how many processes train: what the study began with, else `chosen`, from now on.

        It decides what the sampler knows when it proposes, so it must not follow a change of machine or budget.
        """
        path = self.folder / f"{name}.txt"
        if not path.exists() or not (self.folder / "trials").exists():
            write_atomically(path, str(chosen))
        return int(text_of(path))

    def prompt(self, prompt: dict[str, Any]) -> None:
        """The prompt that the examples were given (`finetune.prepared.PromptUsed`)."""
        write_atomically(self.folder / "prompt.json", json.dumps(prompt))

    def date(self) -> str:
        """The date that a chat template shows: of the day when the study began; empty before its first trial."""
        begun = (self.folder / "trials").exists() and (self.folder / "prompt.json").exists()
        return str(json.loads(text_of(self.folder / "prompt.json"))["date"]) if begun else ""

    def progress(self, progress: dict[str, Any]) -> None:
        write_atomically(self.folder / "progress.json", json.dumps(progress))

    def session(self, session: dict[str, Any]) -> None:
        write_atomically(self.folder / "sessions" / f"{session['number']:04d}.json", json.dumps(session, indent=1))


@contextmanager
def open_record(folder: Path) -> Iterator[Record]:
    """Open a study's folder for writing, alone.

    A driver that was killed leaves the lock to its workers, which notice within a second and exit; they
    are waited for. A driver that lives is respected. Raises StorageError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"cannot write the study's folder {folder}: {error.strerror}. Choose another with --output.folder.") from error
    try:
        _acquire(handle, folder)
        os.set_inheritable(handle, True)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": os.uname().nodename}).encode(), 0)
        yield Record(folder, handle)
    finally:
        os.close(handle)


def _acquire(handle: int, folder: Path, patience: float = 60.0) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            try:
                holder = json.loads(os.pread(handle, 4096, 0) or b"{}")
            except ValueError:
                holder = {}
            here = holder.get("host") == os.uname().nodename
            if not here or _alive(holder.get("pid", 0)) or time.monotonic() > deadline:
                who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
                raise StorageError(
                    f"{folder} is being written by {who}. Watch it with `loratune status {folder}`, or stop that process first."
                ) from None
            time.sleep(0.1)


def _alive(pid: int) -> bool:
    """Whether the process exists and is no zombie (a killed driver whose parent has not reaped it yet)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True
