"""The one writer of a study's folder, and the lock that keeps it the only one."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from loratune.errors import StorageError
from loratune.record.paths import StudyPaths
from loratune.record.reader import TRAINED_ANEW, outcome_of
from loratune.record.trials import Trial
from loratune.system.files import AnyPath, alive, parsed, sweep, text_of, write_atomically
from loratune.system.formatting import duration
from loratune.system.masking import masked
from loratune.work import Outcome, Recipe, Segment, State


class Record:
    """The one writer of a study's folder. Make it with `open_record`."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder, self.paths = folder, StudyPaths(folder)
        self.lock = lock  # file descriptor; workers inherit it, so that the lock outlives a killed driver until they are gone

    def recipe(self, recipe: Recipe) -> None:
        write_atomically(self.paths.recipe, recipe.to_json())

    def outcome(self, segment: Segment) -> Outcome | None:
        """The segment's outcome, if it was ever recorded."""
        path = self.paths.outcome(segment.key)
        return parsed(path, outcome_of, TRAINED_ANEW) if path.exists() else None

    def keep(self, outcome: Outcome) -> None:
        """Record a final outcome. Cancelled segments and bad input are not final: the same command tries again."""
        if outcome.state not in (State.CANCELLED, State.BAD_INPUT):
            write_atomically(self.paths.outcome(outcome.key), replace(outcome, message=masked(outcome.message)).to_json())

    def trial(self, trial: Trial) -> None:
        """Write `trial.json`, unless what stands there knows of more segments: then this is a replay."""
        path = self.paths.trial(trial.number).record
        content = replace(trial, message=masked(trial.message)).to_plain()
        content["segments"] = len(content.pop("outcomes"))  # each has a file of its own
        text = json.dumps(content, indent=1)
        old, known = _standing(path)
        if old != text and known <= content["segments"]:
            write_atomically(path, text)

    def begin(self, number: int, settled: int) -> None:
        """Note, before the sampler is asked for trial `number`, how many segments had been settled by then."""
        write_atomically(self.paths.trial(number).began, str(settled))

    def began_at(self) -> dict[int, int]:
        """What `begin` noted, by trial: a replayed study starts each trial at the same point."""
        remedy = "Restore it from a copy, or begin a new study: the sampler cannot be asked again as it was."
        return {trial.number: parsed(trial.began, int, remedy) for trial in self.paths.trials_there() if trial.began.exists()}

    def pin(self, name: Literal["slots", "workers"], chosen: int) -> int:
        """How many slots a process has, or how many processes train: what the study began with, else `chosen`, from now on.

        It decides what the sampler knows when it proposes, so it must not follow a change of machine or budget.
        """
        path = {"slots": self.paths.slots, "workers": self.paths.workers}[name]
        if not path.exists() or not self.paths.begun:
            write_atomically(path, str(chosen))
        remedy = f"Write into it the number of {name} that the study began with, as sessions/ and workers/ may tell."
        return parsed(path, _count, remedy)

    def device(self, chosen: str) -> str:
        """The kind of device that a cluster's trials train on: what the study began with, else `chosen`. It decides the dtype."""
        if not (self.paths.begun and self.paths.recipe.exists()):
            return chosen
        return parsed(self.paths.recipe, Recipe.from_json, "Remove it: it is written anew.").device

    def prompt(self, prompt: dict[str, Any]) -> None:
        """The prompt that the examples were given (`data.prepared.PromptUsed`)."""
        write_atomically(self.paths.prompt, json.dumps(prompt))

    def date(self) -> str:
        """The date that a chat template shows: of the day when the study began; empty before its first trial."""
        remedy = "Restore it from a copy: with another date the chat template would show another prompt."
        if not (self.paths.begun and self.paths.prompt.exists()):
            return ""
        return parsed(self.paths.prompt, lambda text: str(json.loads(text)["date"]), remedy)

    def progress(self, progress: dict[str, Any]) -> None:
        with contextlib.suppress(StorageError):  # a cache; where the disk is full, the next result says so
            write_atomically(self.paths.progress, json.dumps(progress))

    def beat(self) -> None:
        """Show that the lock's holder is at work: the lock's time is its last heartbeat."""
        with contextlib.suppress(OSError):
            os.utime(self.lock)

    def session(self, session: dict[str, Any]) -> None:
        write_atomically(self.paths.session(session["number"]), json.dumps(session, indent=1))


def _standing(path: Path) -> tuple[str, int]:
    """(A `trial.json`'s text, how many outcomes it knows of); -1 where there is none or it is damaged: it is then written anew."""
    try:
        text = text_of(path)
        return text, int(json.loads(text)["segments"])
    except (StorageError, ValueError, TypeError, KeyError, RecursionError):
        return "", -1


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise ValueError(f"found {count}, expected 1 or more")
    return count


@contextmanager
def open_record(folder: AnyPath, command: str = "run") -> Iterator[Record]:
    """Open a study's folder for writing, alone. command: of loratune, that does so.

    A driver that was killed leaves the lock to its workers, which notice within a second and exit; they
    are waited for. A driver that lives is respected. Raises StorageError.
    """
    folder, paths = Path(folder), StudyPaths(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(paths.lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"cannot write the study's folder {folder}: {error.strerror}. Choose another with --output.folder.") from error
    try:
        _acquire(handle, folder)
        os.set_inheritable(handle, True)
        os.ftruncate(handle, 0)
        holder = {"pid": os.getpid(), "host": os.uname().nodename, "command": command}
        os.pwrite(handle, json.dumps(holder).encode(), 0)
        for inside in (folder, paths.sessions, *(trial.folder for trial in paths.trials_there())):
            sweep(inside)
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
            if not here or alive(holder.get("pid", 0)) or time.monotonic() > deadline:
                who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
                beat = duration(max(0.0, time.time() - os.fstat(handle).st_mtime))
                raise StorageError(
                    f"{folder} is being written by {who} (loratune {holder.get('command', 'run')}, last heartbeat {beat} ago). Watch it "
                    f"with `loratune status {folder}`, or stop that process first."
                ) from None
            time.sleep(0.1)
