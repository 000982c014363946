"""The view of a running study: a live table on a terminal, plain lines elsewhere (a pipe, a log file).

The numbers come from `progress.json`, which `loratune status` reads too, so both show the same.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO

from loratune.cli.trial_lines import clock, ended, params, totals
from loratune.record import StudyRecord, Trial, read
from loratune.system.formatting import loss, plural
from loratune.work import Outcome, Progress

if TYPE_CHECKING:
    from rich.console import RenderableType

    from loratune.spec import StudySpec
    from loratune.study.loop import Event

_LINE_EVERY = 30.0  # seconds between lines of progress, where lines stay
_SHOWN = 10  # latest trials in the live table


class View:
    """Shows the events of a study."""

    def __init__(self, spec: "StudySpec") -> None:
        from loratune.record.paths import StudyPaths

        self._folder = spec.folder
        told = {"sampler": {"defaults_first": spec.sampler.defaults_first}}
        self.record = StudyRecord(folder=spec.folder, name=spec.name, spec=told, trials=())  # as far as it was told
        earlier = read(self._folder).trials if StudyPaths(self._folder).spec.is_file() else ()
        self._replayed = {outcome.key for trial in earlier for outcome in trial.outcomes}  # shown when they came, in an earlier start
        self._numbers = {trial.number for trial in earlier if trial.outcomes}
        self._begun = {trial.number for trial in earlier}

    def show(self, event: "Event") -> None:
        """Take one event. The events of an earlier start are summed up in a line."""
        from loratune.study.loop import Message, SegmentFinished, TrialStarted

        match event:
            case Message(text=text):
                self.note(text)
            case TrialStarted(trial):
                self._keep(trial)
                if trial.number not in self._numbers:
                    self.trial_started(trial)
            case SegmentFinished(trial, outcome):
                self._keep(trial)
                improved = self.record.best is trial
                if outcome.key not in self._replayed:
                    self.segment_finished(trial, outcome, improved)
                    return
                self._replayed.remove(outcome.key)
                if not self._replayed:
                    best = self.record.best
                    standing = f"; best so far: trial {best.number}, {loss(best.value)}" if best is not None else ""
                    self.note(f"{plural(len(self._numbers), 'trial')} of an earlier start{standing}")
            case Progress():
                self.progressed(event)

    def _keep(self, trial: Trial) -> None:
        trials = {**{t.number: t for t in self.record.trials}, trial.number: trial}
        self.record = replace(self.record, trials=tuple(trials[number] for number in sorted(trials)))

    def snapshot(self) -> dict[str, Any]:
        """progress.json; empty before this start has written it."""
        from loratune.record.paths import StudyPaths

        try:
            snapshot = json.loads(StudyPaths(self._folder).progress.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return snapshot if snapshot["pid"] == os.getpid() else {}

    def note(self, text: str) -> None:
        raise NotImplementedError

    def trial_started(self, trial: Trial) -> None:
        pass

    def segment_finished(self, trial: Trial, outcome: Outcome, improved: bool) -> None:
        pass

    def progressed(self, progress: Progress) -> None:
        pass


class Lines(View):
    """One line for each thing that happens, each with the time since the start."""

    def __init__(self, spec: "StudySpec", stream: TextIO) -> None:
        super().__init__(spec)
        self._stream = stream
        self._started = self._said = time.monotonic()

    def note(self, text: str) -> None:
        for line in text.splitlines():
            print(f"[{clock(time.monotonic() - self._started):>7}] {line}", file=self._stream, flush=True)

    def trial_started(self, trial: Trial) -> None:
        steps = [int(path.stem.rpartition("-")[2]) for path in self.record.paths.run(trial.number).checkpoints()]
        begins = f"continues at step {max(steps)}" if steps and trial.number in self._begun else "begins"
        self.note(f"trial {trial.number} {begins}: {params(trial.params)}")

    def segment_finished(self, trial: Trial, outcome: Outcome, improved: bool) -> None:
        first = next(trial for trial in self.record.trials if trial.outcomes)
        base = self.record.base_loss if trial is first else None
        self.note(ended(trial, outcome, base) + ("  <- best so far" if improved else ""))
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

    def __init__(self, spec: "StudySpec", stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__(spec)
        self._console = Console(file=stream, highlight=False)
        self._live = Live(console=self._console, get_renderable=self.render, refresh_per_second=2, vertical_overflow="ellipsis")

    def __enter__(self) -> "Table":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def render(self) -> "RenderableType":
        from loratune.cli.live_tables import live

        return live(self.snapshot(), self.record, shown=_SHOWN)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def segment_finished(self, trial: Trial, outcome: Outcome, improved: bool) -> None:
        if trial.message:
            self.note(ended(trial, outcome, None))


@contextlib.contextmanager
def open_view(spec: "StudySpec", stream: TextIO) -> Iterator[View]:
    """The view that fits where the output goes."""
    if stream.isatty():
        with Table(spec, stream) as view:
            yield view
    else:
        yield Lines(spec, stream)
