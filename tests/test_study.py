"""The loop, with every kind of sampler and schedule, on an executor that answers from a formula in any order.

The formula stands for training so that a whole study takes a second and can be broken off at every single
write; the same is done to real training in `test_kill.py`.
"""

import itertools
import math
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from loratune import samplers
from loratune.executors import Executor
from loratune.plugs import SAMPLERS
from loratune.record import COMPLETE, DIVERGED, FAILED, INFEASIBLE, PRUNED, StudyRecord, Trial, open_record, read
from loratune.record import writer as record_writer
from loratune.record.progress import ProgressTracker
from loratune.record.storage import open_study
from loratune.spec import StudySpec
from loratune.study.loop import Event, Loop, SegmentFinished, TrialStarted
from loratune.work import CurvePoint, Hyperparameters, Message, Outcome, Progress, Segment, State

EXAMPLES, VALIDATION = 640, 60


class Formula(Executor):
    """Answers each segment with a loss that falls along the run; among segments in flight, in random order."""

    def __init__(self, capacity: int, seed: int) -> None:
        super().__init__(max_retries=0)
        self.capacity = capacity
        self.trained: list[str] = []
        self._waiting: list[Segment] = []
        self._random = random.Random(seed)

    def _start(self, segment: Segment) -> None:
        self._waiting.append(segment)

    def _poll(self, timeout: float) -> list[Progress | Outcome]:
        self._random.shuffle(self._waiting)
        return [self._answer(self._waiting.pop())] if self._waiting else []

    def _answer(self, segment: Segment) -> Outcome:
        self.trained.append(segment.key)
        return answer(segment)

    def close(self, grace: float = 60.0) -> None:
        self._waiting.clear()


def answer(segment: Segment) -> Outcome:
    h = segment.hyperparameters
    if h.lora_r == 512:
        return Outcome(key=segment.key, state=State.OUT_OF_MEMORY, message="does not fit")
    if h.learning_rate > 8e-4:
        return Outcome(key=segment.key, state=State.DIVERGED, message="loss is nan")
    if h.lora_dropout == 1e-3:
        return Outcome(key=segment.key, state=State.CRASHED, message="killed")
    points = sorted({*segment.validate_at, segment.stop_step})
    curve = tuple(CurvePoint(step=p, tokens=100 * p, train_loss=None, validation_loss=loss(h, p / segment.total_steps)) for p in points)
    return Outcome(
        key=segment.key, state=State.COMPLETED, validation_loss=curve[-1].validation_loss, curve=curve, tokens=100, train_seconds=1.0
    )


def loss(h: Hyperparameters, share: float) -> float:
    strength = math.log10(h.learning_rate) + 0.5 * math.log10(h.lora_alpha / h.lora_r)
    return 1.0 + 0.2 * (strength + 3.5) ** 2 + 0.1 * h.lora_dropout + 0.3 * (1 - share)


def spec_of(
    folder: Path, sampler: str | dict[str, Any], schedule: dict[str, Any] | None = None, trials: int = 12, **more: Any
) -> StudySpec:
    given = {
        "model": "m",
        "data": {"train": ["d.json"], "validation_fraction": 0.1},
        "training": {"batch_size": 16, "epochs": 1, "validations": 2},
        "sampler": sampler,
        "schedule": schedule or {"name": "full"},
        "budget": {"trials": trials},
        "output": {"folder": str(folder)},
        "storage": str(folder / "study.log"),  # Optuna's journal: a tenth of SQLite's time
    }
    return StudySpec.load(base={**given, **more})


def events(spec: StudySpec, executor: Formula, **more: Any) -> Iterator[Event]:
    """A session of the study, as `tune` runs it."""
    ordinals = samplers.ordinals(spec.sampler.name)
    with open_record(spec.folder) as record:
        (spec.folder / "spec.yaml").write_text(spec.to_yaml())
        sampler = samplers.build(
            spec.sampler.name,
            search_space=spec.search_space.distributions(ordinals),
            seed=spec.seed,
            options=spec.sampler.options,
            x0=spec.search_space.defaults(ordinals),
            workers=executor.capacity,
        )
        study = open_study(url=spec.storage, folder=spec.folder, name=spec.name, sampler=sampler)
        objectives = {objective.name: objective.direction for objective in spec.objectives}
        meter = ProgressTracker(budget_trials=spec.budget.trials, workers=executor.capacity, objectives=objectives)
        stop = threading.Event()
        counts = {"examples": EXAMPLES, "validation_examples": VALIDATION}
        yield from Loop(spec=spec, record=record, study=study, executor=executor, meter=meter, stop=stop, **counts, **more).run()


def outline(record: StudyRecord) -> list[tuple[Any, ...]]:
    """What must be the same however the study was interrupted."""
    return [(t.number, t.hyperparameters, t.state, t.value, [(o.key, o.validation_loss) for o in t.outcomes]) for t in record.trials]


def load(spec: StudySpec) -> optuna.Study:
    ordinals = samplers.ordinals(spec.sampler.name)
    sampler = samplers.build(spec.sampler.name, search_space=spec.search_space.distributions(ordinals), seed=0, options={})
    return open_study(url=spec.storage, folder=spec.folder, name=spec.name, sampler=sampler)


def stored(spec: StudySpec) -> list[tuple[Any, ...]]:
    study = load(spec)
    return [(t.number, t.state.name, t.params, t.value, t.intermediate_values) for t in study.trials]


SCHEDULES = {
    "full": {"name": "full"},
    "steps": {"name": "halving", "fidelity": "steps"},
    "budget": {"name": "halving", "fidelity": "budget"},
}
CASES = [(sampler, "full", width) for sampler, width in zip(SAMPLERS.names, itertools.cycle([1, 3]), strict=False)]
CASES += [("nomad", "full", 3), ("nomad", "steps", 1), ("nomad", "budget", 3), ("tpe", "steps", 3), ("random", "budget", 4)]


class Broken(BaseException):
    """Stands for kill -9."""


def until_it_ends(
    monkeypatch: pytest.MonkeyPatch, start: Callable[[int], object], *, between: tuple[int, int], at_least: int, seed: int = 7
) -> None:
    """Start again and again, each time broken off after one of so many writes, until a start ends. start: given its number."""
    write, chance = record_writer.write_atomically, random.Random(seed)
    left = 0

    def fragile(path: Path, content: str | bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Broken
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(record_writer, "write_atomically", fragile)
        for attempt in range(100):
            left = chance.randint(*between)
            try:
                start(attempt)
            except Broken:
                continue
            assert attempt >= at_least, "it was interrupted several times"
            return
    raise AssertionError("the study never ended")


@pytest.mark.parametrize(("sampler", "schedule", "width"), CASES)
def test_an_interrupted_study_ends_as_the_uninterrupted_one(
    sampler: str, schedule: str, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sampler == "nni_tpe":
        pytest.importorskip("nni")
    whole = spec_of(tmp_path / "whole", sampler, SCHEDULES[schedule])
    list(events(whole, Formula(width, seed=1)))
    expected = outline(read(whole.folder))
    assert len(expected) == 12

    broken = spec_of(tmp_path / "broken", sampler, SCHEDULES[schedule])
    until_it_ends(monkeypatch, lambda attempt: list(events(broken, Formula(width, seed=attempt))), between=(3, 9), at_least=3)
    assert outline(read(broken.folder)) == expected
    assert [(n, p, v) for n, _, p, v, _ in stored(broken)] == [(n, p, v) for n, _, p, v, _ in stored(whole)]


@pytest.mark.parametrize(("sampler", "schedule"), [("tpe", "steps"), ("nomad", "steps"), ("random", "budget")])
def test_the_order_in_which_workers_answer_does_not_matter(sampler: str, schedule: str, tmp_path: Path) -> None:
    outlines = []
    for seed in (1, 2):
        spec = spec_of(tmp_path / str(seed), sampler, SCHEDULES[schedule], trials=15)
        list(events(spec, Formula(3, seed=seed)))
        outlines.append(outline(read(spec.folder)))
    assert outlines[0] == outlines[1]


class Machine(Formula):
    """Answers each segment once its work, give or take a tenth, is done; the clock is a number. Counts how busy it was."""

    now = busy = 0.0

    def _start(self, segment: Segment) -> None:
        super()._start(segment)
        work = 3 * segment.stop_step * segment.hyperparameters.batch_size + (len(segment.validate_at) + 1) * VALIDATION
        work *= self._random.uniform(0.9, 1.1)
        self.busy += work
        self._ends = {**getattr(self, "_ends", {}), segment.key: self.now + work}

    def _poll(self, timeout: float) -> list[Progress | Outcome]:
        self._waiting.sort(key=lambda segment: -self._ends[segment.key])
        segment = self._waiting.pop()
        self.now = max(self.now, self._ends[segment.key])
        return [self._answer(segment)]

    @property
    def utilisation(self) -> float:
        return self.busy / (self.now * self.capacity)


def test_slots_hardly_idle_although_segments_differ_ninefold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("clock", "order-sent"):
        machine = Machine(4, seed=1)
        list(events(spec_of(tmp_path / name, "random", SCHEDULES["budget"], trials=60), machine))
        found.append(machine.utilisation)
        monkeypatch.setattr(Loop, "_work", lambda self, segment: 0)  # all end at once: the order sent
    assert found[0] > 0.85
    assert found[0] > found[1] + 0.1, found


def test_a_short_trial_that_diverges_beside_the_first_is_told_the_untuned_models_loss(tmp_path: Path) -> None:
    space = {"learning_rate": {"low": 1e-5, "high": 1e-1, "log": True, "default": 1e-5}, "epochs": [0.5, 1.0]}
    spec = spec_of(tmp_path / "s", "random", trials=8, search_space=space)
    list(events(spec, Formula(4, seed=1)))
    values = [t.value for t in read(spec.folder).trials if t.state == DIVERGED]
    assert values
    assert all(value is not None and math.isfinite(value) for value in values)


def test_the_first_trial_is_the_default_and_measures_the_base_model(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", "random")
    happened = list(events(spec, Formula(1, seed=1)))
    assert isinstance(happened[0], TrialStarted)
    record = read(spec.folder)
    assert record.default is not None
    default = record.default.hyperparameters
    assert (default.lora_r, default.lora_alpha, default.lora_dropout, default.learning_rate) == (8, 32.0, 0.1, 1e-5)
    assert record.base_loss == loss(default, 0.0)
    assert [len([p for p in t.curve if p.step == 0]) for t in record.trials] == [1] + [0] * 11


def test_defaults_can_be_switched_off(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", {"name": "random", "defaults_first": False})
    list(events(spec, Formula(1, seed=1)))
    record = read(spec.folder)
    assert record.default is None
    assert record.trials[0].hyperparameters.learning_rate != 1e-5


def test_failures_have_kinds_and_the_study_goes_on(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", "random", trials=60)
    list(events(spec, Formula(2, seed=1)))
    trials = read(spec.folder).trials
    by_state: dict[str, list[Trial]] = {}
    for trial in trials:
        by_state.setdefault(trial.state, []).append(trial)
    assert set(by_state) == {COMPLETE, DIVERGED, FAILED, INFEASIBLE}, "the draw has all four"
    finite = max(p.validation_loss for t in trials for p in t.curve if p.validation_loss is not None)
    told = {n: (state, value) for n, state, _, value, _ in stored(spec)}
    for trial in by_state[DIVERGED] + by_state[INFEASIBLE]:
        state, value = told[trial.number]
        assert state == "COMPLETE", "a worst value, not a hole"
        assert value == trial.value
        assert value is not None
        assert value <= finite
    assert all(told[t.number] == ("FAIL", None) for t in by_state[FAILED])
    study = load(spec)
    for trial in by_state[INFEASIBLE]:
        assert study.trials[trial.number].constraints == {"fits_in_memory": 1.0}


@pytest.mark.parametrize("sampler", SAMPLERS.names)
def test_every_sampler_survives_a_study_where_much_fails(sampler: str, tmp_path: Path) -> None:
    if sampler == "nni_tpe":
        pytest.importorskip("nni")
    space = {"preset": "published", "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True, "default": 1e-3}}
    spec = spec_of(tmp_path / "s", sampler, trials=16, search_space=space)  # most diverge, the first included
    *_, last = events(spec, Formula(2, seed=1))
    trials = read(spec.folder).trials
    ended = isinstance(last, Message) and last.text.startswith("The search is over")  # by itself, as a further run would gain nothing
    assert len(trials) == 16 or (sampler == "bracket" and ended)
    assert {DIVERGED, COMPLETE} <= {t.state for t in trials}


def test_a_larger_budget_continues(tmp_path: Path) -> None:
    small = spec_of(tmp_path / "s", "tpe", trials=6)
    list(events(small, Formula(1, seed=1)))
    executor = Formula(1, seed=2)
    list(events(spec_of(tmp_path / "s", "tpe", trials=9), executor))
    assert len(executor.trained) == 3
    whole = spec_of(tmp_path / "whole", "tpe", trials=9)
    list(events(whole, Formula(1, seed=3)))
    assert outline(read(small.folder)) == outline(read(whole.folder))


def test_halving_leaves_paused_trials_pruned_in_optuna(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", "random", SCHEDULES["steps"], trials=20)
    happened = list(events(spec, Formula(1, seed=1)))
    trials = read(spec.folder).trials
    pruned = [t for t in trials if t.state == PRUNED]
    assert pruned
    states = {n: state for n, state, _, _, _ in stored(spec)}
    assert all(states[t.number] == "PRUNED" for t in pruned)
    assert all(t.value is not None for t in pruned)
    assert sum(isinstance(e, SegmentFinished) for e in happened) == sum(len(t.outcomes) for t in trials)


def test_time_budgets_end_the_study(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", "random", budget={"trials": 50, "max_device_hours": 6 / 3600})
    happened = list(events(spec, Formula(1, seed=1)))
    record = read(spec.folder)
    assert record.device_seconds == pytest.approx(6, abs=1), "one second per trained segment"
    assert "The time budget is spent after" in str(happened[-1])
