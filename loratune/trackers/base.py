"""What a tracker can do."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STUDY = "study"
"""The name of the study's own run; a trial's is `trial-0007`."""


class Tracker(ABC):
    """Writes runs to an experiment tracker. Called from one thread; any exception switches the tracker off, and the study goes on.

    Runs are named within the study. `id` is the study's, drawn once: with the run's name it identifies a run for ever, so that a
    study that goes on after an interruption adds to the runs that it began.
    """

    def __init__(self, *, name: str, id: str, folder: Path) -> None:
        """name: the study's; folder: the study's, for trackers that write files."""
        self.name, self.id, self.folder = name, id, folder

    @abstractmethod
    def begin(self, run: str, config: Mapping[str, Any]) -> None:
        """Open a run with its hyperparameters (of the study, its description), or open it again in a later start."""

    @abstractmethod
    def log(self, run: str, step: int, values: Mapping[str, float]) -> None:
        """Add a point to an open run. Of each name, steps ascend."""

    @abstractmethod
    def finish(self, run: str, summary: Mapping[str, Any], *, failed: bool) -> None:
        """Close an open run for good, with its final numbers and texts."""

    def close(self) -> None:  # noqa: B027  # where runs are written at once, there is nothing to do
        """The session ends: write out what is buffered; open runs may go on in a later one."""
