"""Passes a study's events on to its trackers.

A study that goes on replays what happened before, so what was passed on stands in the study's folder, `trackers.json`, by tracker:
the runs that were finished, and of every run how far each curve is. What stands there is not passed on again; a tracker that is
named later, or was switched off for a while, gets what it lacks. It is noted after it was passed on, so nothing is lost; a kill
just between repeats what was at hand (of a running segment the points of a second), in the same run, at the same step, with the
same values.
"""

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loratune.errors import MissingExtraError
from loratune.plugs import TRACKERS
from loratune.record import COMPLETE, FAILED, Trial, TrialState
from loratune.record.trials import objectives_of, ranking_key
from loratune.spec import StudySpec
from loratune.system.files import parsed, write_atomically
from loratune.trackers.base import STUDY, Tracker
from loratune.work import Message, Outcome, Progress

_EVERY = 1.0  # seconds between two batches of points


def check(names: Sequence[str]) -> None:
    """See that what the trackers need is installed. Raises MissingExtraError with the command that installs it."""
    for name in names:
        plug = TRACKERS[name]
        if plug.package and not any(map(find_spec, plug.modules or (plug.package,))):
            raise MissingExtraError(f"{plug.package}, which report_to: {name} needs,", command=f"pip install {plug.package}")


class Feed:
    """The trackers of one study, in one session."""

    def __init__(self, spec: StudySpec, folder: Path) -> None:
        """Raises MissingExtraError, StorageError."""
        check(spec.training.report_to)
        self._config, self._path = spec.masked().model_dump(mode="json"), folder / "trackers.json"
        remedy = "Remove it: the trackers are then told the whole study again, in new runs."
        state: dict[str, Any] = {"id": secrets.token_hex(6), "trackers": {}}
        self._state = state = parsed(self._path, json.loads, remedy) if self._path.exists() else state
        given = {"name": spec.name, "id": state["id"], "folder": folder.resolve()}
        self._streams = [
            _Stream(TRACKERS.make(name, Tracker, given), state["trackers"].setdefault(name, {"curves": {}, "finished": []}))
            for name in spec.training.report_to
        ]
        self._names = list(spec.training.report_to)
        self._trials: dict[int, Trial] = {}
        self._points: list[Progress] = []
        self._passed_on = time.monotonic()
        self._ended = 0
        self._best: Trial | None = None

    def started(self, trial: Trial) -> None:
        self._trials[trial.number] = trial

    def progressed(self, progress: Progress) -> Iterator[Message]:
        """A point of a running segment; some of them are passed on together."""
        self._points.append(progress)
        if time.monotonic() - self._passed_on >= _EVERY:
            yield from self._pass_points()

    def finished(self, trial: Trial, outcome: Outcome) -> Iterator[Message]:
        """A segment's result was applied to the trial."""
        yield from self._pass_points()
        self._trials[trial.number] = trial
        points = [(p.step, {"train_loss": p.train_loss, "validation_loss": p.validation_loss}) for p in outcome.curve]
        for number, stream in enumerate(self._streams):
            yield from self._guarded(number, lambda stream=stream: stream.log(trial, outcome.key, points))
        if trial.state.ended:
            yield from self._end(trial)
        self._save()

    def close(self, *, over: bool) -> Iterator[Message]:
        """The session ends; `over`: and the study with it, so that trials which are still paused are pruned."""
        yield from self._pass_points()
        if over:
            for trial in self._trials.values():
                if trial.state is TrialState.PAUSED:
                    yield from self._end(trial)
        for number, stream in enumerate(self._streams):
            yield from self._guarded(number, lambda stream=stream: stream.close(self._config, over))
        self._save()

    def _end(self, trial: Trial) -> Iterator[Message]:
        self._ended += 1
        if trial.state is COMPLETE and trial.value is not None:
            self._best = min(filter(None, (self._best, trial)), key=ranking_key(objectives_of(self._config)))
        numbers = {
            "trial": trial.number,
            "value": trial.value,
            "best_value": self._best and self._best.value,
            "device_seconds": trial.device_seconds,
        }
        numbers |= trial.scores
        for number, stream in enumerate(self._streams):
            yield from self._guarded(number, lambda stream=stream: stream.end(trial, self._ended, numbers, self._config))

    def _pass_points(self) -> Iterator[Message]:
        points, self._points, self._passed_on = self._points, [], time.monotonic()
        for number, stream in enumerate(self._streams):
            yield from self._guarded(number, lambda stream=stream: stream.pass_on(points, self._trials))
        if points:
            self._save()

    def _guarded(self, number: int, call: Any) -> Iterator[Message]:
        """A tracker is no reason for a study to end: its server may be away."""
        stream = self._streams[number]
        if stream.off:
            return
        try:
            call()
        except Exception as error:  # of whatever library, network or disk
            stream.off = True
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            yield Message(text=f"The tracker {self._names[number]} is switched off until the next start: {why}")

    def _save(self) -> None:
        if self._streams:
            write_atomically(self._path, json.dumps(self._state))


class _Stream:
    """One tracker, and what it was told: `curves`, run -> name -> last step; `finished`, runs."""

    def __init__(self, tracker: Tracker, told: dict[str, Any]) -> None:
        self._tracker, self._curves, self._finished = tracker, told["curves"], told["finished"]
        self._open: set[str] = set()
        self.off = False

    def pass_on(self, points: Sequence[Progress], trials: Mapping[int, Trial]) -> None:
        """Points of running segments."""
        for point in points:
            number, prefix = _place(point.key)
            values = {"train_loss": point.train_loss, "validation_loss": point.validation_loss}
            if number in trials:
                self._log(_run(number), point.step, {prefix + n: v for n, v in values.items()}, _config(trials[number]))

    def log(self, trial: Trial, key: str, points: Sequence[tuple[int, Mapping[str, float | None]]]) -> None:
        """The curve of a segment that ended."""
        number, prefix = _place(key)
        for step, values in points:
            self._log(_run(number), step, {prefix + n: v for n, v in values.items()}, _config(trial))

    def end(self, trial: Trial, ended: int, numbers: Mapping[str, float | None], config: Mapping[str, Any]) -> None:
        """A trial ended, the so many'th."""
        run = _run(trial.number)
        if run not in self._finished:
            self._begin(run, _config(trial))
            state = TrialState.PRUNED if trial.state is TrialState.PAUSED else trial.state
            summary = {"state": state.value, "value": trial.value, "tokens": trial.tokens, "device_seconds": trial.device_seconds}
            summary |= trial.scores
            self._tracker.finish(run, {k: v for k, v in summary.items() if v is not None}, failed=state is FAILED)
            self._finished.append(run)
            self._open.discard(run)
        self._log(STUDY, ended, numbers, config)

    def close(self, config: Mapping[str, Any], over: bool) -> None:
        if over and STUDY not in self._finished:
            self._begin(STUDY, config)
            self._tracker.finish(STUDY, {"state": "complete"}, failed=False)
            self._finished.append(STUDY)
        self._tracker.close()

    def _begin(self, run: str, config: Mapping[str, Any]) -> None:
        if run not in self._open:
            self._tracker.begin(run, config)
            self._open.add(run)

    def _log(self, run: str, step: int, values: Mapping[str, float | None], config: Mapping[str, Any]) -> None:
        """What of these values the tracker was not told."""
        curves = self._curves.setdefault(run, {})
        fresh = {name: value for name, value in values.items() if value is not None and step > curves.get(name, -1)}
        if fresh and run not in self._finished:
            self._begin(run, config)
            self._tracker.log(run, step, fresh)
            curves.update(dict.fromkeys(fresh, step))


def _run(number: int) -> str:
    return f"trial-{number:04d}"


def _place(key: str) -> tuple[int, str]:
    """(trial, prefix of its curves' names) of a segment: shorter runs have curves of their own."""
    trial, run, _ = key.split("/")
    return int(trial), "" if run == "main" else f"{run}/"


def _config(trial: Trial) -> dict[str, Any]:
    return {**trial.hyperparameters.to_plain(), **trial.params}
