"""What a running study shows: a live table on a terminal, plain lines elsewhere (a pipe, a log file).

The numbers come from `progress.json`, which `loratune status` reads too, so both say the same.
"""

import contextlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from loratune.cli.words import clock, count, duration, loss, params
from loratune.record import COMPLETE, PAUSED, RUNNING, Trial
from loratune.work import Outcome, Progress

if TYPE_CHECKING:
    from rich.console import RenderableType

    from loratune.study import Event

_LINE_EVERY = 30.0  # seconds between lines of progress, where lines stay
_SHOWN = 10  # latest trials in the live table


class View(ABC):
    """Shows the events of a study."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.trials: dict[int, Trial] = {}
        self._best: Trial | None = None

    def show(self, event: "Event") -> None:
        from loratune.study import Asked, Note, Settled

        match event:
            case Note(text):
                self.note(text)
            case Asked(trial):
                self.trials[trial.number] = trial
                self.asked(trial)
            case Settled(trial, outcome):
                self.trials[trial.number] = trial
                improved = trial.state == COMPLETE and (self._best is None or _rank(trial) < _rank(self._best))
                if improved:
                    self._best = trial
                self.settled(trial, outcome, improved)
            case Progress():
                self.progressed(event)

    @property
    def base_loss(self) -> float | None:
        """The untuned model's, measured at the start of trial 0."""
        outcomes = self.trials[0].outcomes if 0 in self.trials else ()
        return next((p.validation_loss for o in outcomes for p in o.curve if p.step == 0), None)

    def snapshot(self) -> dict[str, Any]:
        """progress.json; empty before it is there."""
        try:
            return json.loads((self._folder / "progress.json").read_text())
        except (OSError, ValueError):
            return {}

    @abstractmethod
    def note(self, text: str) -> None: ...

    @abstractmethod
    def asked(self, trial: Trial) -> None: ...

    @abstractmethod
    def settled(self, trial: Trial, outcome: Outcome, improved: bool) -> None: ...

    @abstractmethod
    def progressed(self, progress: Progress) -> None: ...


class Lines(View):
    """One line for each thing that happens, each with the time since the start."""

    def __init__(self, folder: Path, stream: TextIO) -> None:
        super().__init__(folder)
        self._stream = stream
        self._started = self._said = time.monotonic()

    def note(self, text: str) -> None:
        for line in text.splitlines():
            print(f"[{clock(time.monotonic() - self._started):>7}] {line}", file=self._stream, flush=True)

    def asked(self, trial: Trial) -> None:
        self.note(f"trial {trial.number} begins: {params(trial.params)}")

    def settled(self, trial: Trial, outcome: Outcome, improved: bool) -> None:
        self.note(ended(trial, outcome, self.base_loss if trial.number == 0 else None) + ("  <- best so far" if improved else ""))
        self._said = time.monotonic()

    def progressed(self, progress: Progress) -> None:
        if time.monotonic() - self._said < _LINE_EVERY:
            return
        self._said = time.monotonic()
        snapshot = self.snapshot()
        if snapshot:
            running = "; ".join(f"trial {row['trial']} at step {row['step']}/{row['total_steps']}" for row in snapshot["running"])
            self.note("; ".join(filter(None, [running, *totals(snapshot)])))


class Table(View):
    """A table that is redrawn in place."""

    def __init__(self, folder: Path, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__(folder)
        self._console = Console(file=stream, highlight=False)
        self._live = Live(console=self._console, get_renderable=self.render, refresh_per_second=2, vertical_overflow="ellipsis")

    def __enter__(self) -> "Table":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def render(self) -> "RenderableType":
        from loratune.cli.tables import live

        return live(self.snapshot(), dict(self.trials), self._best, self.base_loss, shown=_SHOWN)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def asked(self, trial: Trial) -> None:
        pass  # its row appears by itself

    def settled(self, trial: Trial, outcome: Outcome, improved: bool) -> None:
        if trial.message:
            self.note(ended(trial, outcome, None))

    def progressed(self, progress: Progress) -> None:
        pass


@contextlib.contextmanager
def open_view(folder: Path, stream: TextIO) -> Iterator[View]:
    """The view that fits where the output goes."""
    if stream.isatty():
        with Table(folder, stream) as view:
            yield view
    else:
        yield Lines(folder, stream)


def totals(snapshot: dict[str, Any]) -> list[str]:
    """Trials, speed, costs and time left, in words."""
    speed, left = snapshot.get("tokens_per_second"), snapshot.get("seconds_left")
    return [
        f"{snapshot['trials_ended']}/{snapshot['budget_trials']} trials",
        f"{count(speed)} tokens/s" if speed else "",
        f"{duration(snapshot['wall_seconds'])} elapsed",
        f"{snapshot['device_seconds'] / 3600:.2f} device-hours",
        f"about {duration(left)} left" if left is not None else "",
    ]


def ended(trial: Trial, outcome: Outcome, base: float | None) -> str:
    """What became of a trial's segment, in one line."""
    seconds = f"{duration(outcome.train_seconds + outcome.validation_seconds)}"
    if trial.state in (COMPLETE, PAUSED, RUNNING):
        first = f" (base model {loss(base)})" if base is not None else ""
        waits = f", paused at step {outcome.key.rpartition('/')[2].lstrip('0')}" if trial.state == PAUSED else ""
        return f"trial {trial.number}: validation loss {loss(trial.value)}{first}{waits}, {seconds}"
    return f"trial {trial.number} {trial.state} after {seconds}: {trial.message}".rstrip(": ")


def _rank(trial: Trial) -> tuple[float, int]:
    return (float("inf") if trial.value is None else trial.value, trial.number)
