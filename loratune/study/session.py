"""One start of the driver on a study's folder: whether it may go on there, and what is noted of the start."""

import os
import sys
import time
from pathlib import Path

from loratune.data.prepared import Prepared
from loratune.errors import SpecError, StorageError
from loratune.record import Record
from loratune.record.paths import StudyPaths
from loratune.record.progress import ProgressTracker
from loratune.record.reader import read_sessions
from loratune.spec import StudySpec, differences
from loratune.system.files import text_of, write_atomically
from loratune.system.machine import environment
from loratune.system.masking import masked_command


def adopt(spec: StudySpec, record: Record) -> None:
    """Make the folder this study's, or see that it is."""
    same_description(spec)
    fresh = not (record.paths.spec.exists() and record.paths.begun)
    if fresh and not record.paths.sessions.exists() and _strangers(record.folder):
        raise StorageError(f"{record.folder} is neither empty nor a study's folder. Choose another --output.folder.")
    write_atomically(record.paths.spec, spec.masked().to_yaml())


def same_description(spec: StudySpec) -> None:
    """See that the study which began in the spec's folder, if one did, is this one. Raises StorageError naming what differs."""
    paths = StudyPaths(spec.folder)
    if not (paths.spec.exists() and paths.begun):  # before the first trial, mending the description is free
        return
    try:
        old = StudySpec.load(paths.spec)
    except SpecError as error:
        raise StorageError(f"the study's own description {paths.spec} cannot be read:\n{error}") from error
    changed = differences(old, spec.masked())
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise StorageError(
            f"{spec.folder} holds a study with another description:\n{lines}\n"
            "Only a larger budget continues a study. Undo the change, or choose another --output.folder."
        )


def _strangers(folder: Path) -> list[str]:
    """What lies in a folder that no start of ours can have left there before its first session."""
    paths = StudyPaths(folder)
    ours = {paths.lock.name} | ({paths.spec.name} if _as_written(paths.spec) else set())
    return [name for name in os.listdir(folder) if name not in ours and not name.startswith(f".{paths.spec.name}.")]


def _as_written(path: Path) -> bool:
    try:
        return path.read_text(encoding="utf-8") == StudySpec.load(path).to_yaml()
    except (OSError, UnicodeDecodeError, SpecError):
        return False


def same_data(record: Record, data: Prepared) -> None:
    """Refuse to go on when the data files changed since the study began: their losses could not be compared."""
    path = record.paths.data
    began = text_of(path) if path.exists() else data.folder.name
    if began != data.folder.name and record.paths.begun:
        raise StorageError(
            f"the data or the tokenizer changed since {record.folder} began, or this version of loratune prepares them otherwise: "
            f"{path} says {began!r}, it is {data.folder.name}. Restore the files, or finish the study with the version that began it, "
            "or begin a new one with another --output.folder."
        )
    write_atomically(path, data.folder.name)


class Session:
    """One start of the driver: when, by which command, on what, for how long."""

    def __init__(self, record: Record) -> None:
        earlier = read_sessions(record.paths)
        self.earlier_seconds = sum(session["seconds"] for session in earlier)
        self.earlier_device_seconds = max((session["device_seconds"] for session in earlier), default=0.0)
        self.meter: ProgressTracker | None = None  # once there is one
        self._spent_before = earlier[-1].get("spent") if earlier else None
        self._record, self._began, self._written = record, time.monotonic(), 0.0
        self._facts = {
            "number": max((session["number"] for session in earlier), default=0) + 1,
            "started": time.time(),
            "command": masked_command(["loratune", *sys.argv[1:]] if Path(sys.argv[0]).name == "__main__.py" else sys.argv),
            "environment": environment(),
            "spent": None,  # the budget, once it is: StudyRecord.budget_spent
        }
        self.end()

    def all_spent(self, spec: StudySpec) -> bool:
        """Whether the session before came to the end of this budget, so that little or nothing is left to train."""
        return self._spent_before == spec.budget.model_dump(mode="json")

    def spent(self, spec: StudySpec) -> None:
        """The study ran to the end of its budget."""
        self._facts["spent"] = spec.budget.model_dump(mode="json")

    def tick(self) -> None:
        """Now and then note the time spent, lest a kill forgets it."""
        if time.monotonic() - self._written > 5:
            self.end()

    def end(self) -> None:
        self._written = time.monotonic()
        spent = self.earlier_device_seconds if self.meter is None else self.meter.spent_device_seconds  # of all starts so far
        self._record.session(self._facts | {"seconds": self._written - self._began, "device_seconds": spent})
