"""training.keep: best, in the loop: the schedule, the samplers and the storage are told the lowest point, the clock is what it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_study import SCHEDULES, Formula, answer, events, load, spec_of

from loratune.errors import SpecError
from loratune.record import COMPLETE, PRUNED, read
from loratune.spec import StudySpec
from loratune.study.loop import SegmentFinished
from loratune.work import CurvePoint, Outcome, Segment, State


class Rising(Formula):
    """As an engine that keeps the best: each run's loss is lowest at half of it, and rises again to the end."""

    def __init__(self, capacity: int, seed: int, best: bool = True) -> None:
        super().__init__(capacity, seed)
        self.best, self.segments = best, dict[str, Segment]()
        self._points: dict[tuple[int, str], dict[int, float]] = {}

    def _answer(self, segment: Segment) -> Outcome:
        self.segments[segment.key] = segment
        outcome = answer(segment)
        if outcome.state is not State.COMPLETED:
            return outcome
        known = self._points.setdefault((segment.trial, segment.run), {})
        curve = [self._turned(point, segment.total_steps) for point in outcome.curve]
        known |= {p.step: p.validation_loss for p in curve if p.step > 0 and p.validation_loss is not None}
        step = min(known, key=lambda at: (known[at], at)) if self.best else segment.stop_step
        return replace(outcome, curve=tuple(curve), validation_loss=known[step], kept_step=step if self.best else None)

    @staticmethod
    def _turned(point: CurvePoint, total: int) -> CurvePoint:
        return replace(point, validation_loss=(point.validation_loss or 0.0) + 2 * max(0.0, point.step / total - 0.5))


def studied(folder: Path, schedule: str, keep: str) -> tuple[StudySpec, Rising, list[str]]:
    training = {"batch_size": 16, "epochs": 1, "validations": 4, "keep": keep}
    spec = spec_of(folder, "random", SCHEDULES[schedule], trials=9, training=training)
    executor = Rising(2, 0, best=keep == "best")
    told = [event.outcome.key for event in events(spec, executor) if isinstance(event, SegmentFinished)]
    return spec, executor, told


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_lowest_point_is_the_value(schedule: str, tmp_path: Path) -> None:
    spec, executor, _ = studied(tmp_path / "best", schedule, "best")
    record, study = read(spec.folder), load(spec)
    finished = [t for t in record.trials if t.state == COMPLETE]
    assert finished
    for trial in [t for t in record.trials if t.state in (COMPLETE, PRUNED)]:
        curve = {p.step: p.validation_loss for p in trial.curve if p.step > 0}
        assert trial.value == min(v for v in curve.values() if v is not None)
        assert curve[trial.kept_step or 0] == trial.value
        stored = study.trials[trial.number]
        if trial.state == COMPLETE:
            assert stored.value == trial.value
        assert stored.intermediate_values[max(stored.intermediate_values)] == trial.value  # what samplers read of a pruned one
    assert any((t.kept_step or 0) < max(p.step for p in t.curve) for t in finished)
    later = [s for s in executor.segments.values() if s.start_step]
    assert bool(later) == (schedule == "steps")
    for segment in later:  # whose checkpoint may be lost: the points of the segments before
        mine = [s for s in executor.segments.values() if s.trial == segment.trial and s.stop_step <= segment.start_step]
        points = {p for s in mine for p in (*s.validate_at, s.stop_step) if p}
        assert set(segment.validated_at) == points


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_clock_is_the_same(schedule: str, tmp_path: Path) -> None:
    """With full training nothing depends on values, so what is told comes in the same order."""
    told: dict[str, Any] = {keep: studied(tmp_path / keep, schedule, keep) for keep in ("best", "last")}
    if schedule == "full":
        assert told["best"][2] == told["last"][2]
    shared = told["best"][1].segments.keys() & told["last"][1].segments.keys()
    for key in shared:
        ours, theirs = (told[keep][1].segments[key] for keep in ("best", "last"))
        assert replace(ours, validated_at=()) == theirs


def test_a_run_of_one_point_has_no_best(tmp_path: Path) -> None:
    training = {"batch_size": 16, "keep": "best"}
    with pytest.raises(SpecError, match=r"training\.keep: got 'best'; with validations: 1 a run has one point"):
        spec_of(tmp_path, "random", training=training)
    assert spec_of(tmp_path, "random", SCHEDULES["steps"], training=training).training.keep == "best"  # its rungs are points
    with pytest.raises(SpecError, match=r"training\.keep: got 'first'; allowed: last, best"):
        spec_of(tmp_path, "random", training={"keep": "first", "validations": 2})
    assert spec_of(tmp_path, "random").training.keep == "last"
