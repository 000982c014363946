"""Limits of time and money: what runs is paused, and a larger budget goes on exactly from there."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_study import Formula, answer, events, load, outline, spec_of

from loratune.cli import main
from loratune.cli.status import facts
from loratune.errors import SpecError
from loratune.record import COMPLETE, RUNNING, Trial, read
from loratune.record.progress import ProgressTracker
from loratune.spec import StudySpec, differences
from loratune.study.loop import Loop, SegmentFinished
from loratune.study.spending import Spending
from loratune.work import Hyperparameters, Message, Outcome, Progress, State


class Endless(Formula):
    """Answers, the newest first, all but trial `slow`; once that alone is left, an hour passes between two heartbeats."""

    def __init__(self, capacity: int, slow: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(capacity, seed=0)
        self.slow, self.passed = slow, 0.0
        clock = SimpleNamespace(monotonic=lambda: time.monotonic() + self.passed, time=time.time)
        monkeypatch.setattr("loratune.record.progress.time", clock)

    def _poll(self, timeout: float) -> list[Progress | Outcome]:
        for segment in reversed(self._waiting):
            if segment.trial != self.slow:
                self._waiting.remove(segment)
                self.trained.append(segment.key)
                return [answer(segment)]
        self.passed += 3600
        return [Progress(key=s.key, step=1, total_steps=s.total_steps, tokens=1) for s in self._waiting]


@pytest.mark.parametrize(
    "limit",
    [
        {"max_hours": 1.5},
        {"max_device_hours": 1.5},
        {"max_cost": 3.0, "price_per_device_hour": 2.0, "currency": "EUR"},
    ],
)
def test_what_runs_is_paused_and_a_larger_budget_goes_on(limit: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = spec_of(tmp_path / "whole", "tpe", trials=12)
    list(events(whole, Formula(1, seed=1)))

    spec = spec_of(tmp_path / "s", "tpe", budget={"trials": 12, **limit})
    happened = list(events(spec, Endless(1, 6, monkeypatch)))
    record = read(spec.folder)
    assert len(record.trials) == 7
    assert record.trials[-1].state == RUNNING
    assert isinstance(happened[-1], Message)
    assert happened[-1].text.endswith("is spent after 7 of 12 trials; 1 trial paused, which a larger budget continues.")
    assert ("3.00 EUR" in happened[-1].text) == ("max_cost" in limit)

    more = spec_of(tmp_path / "s", "tpe", trials=12)
    list(events(more, Formula(1, seed=2)))
    assert outline(read(spec.folder)) == outline(read(whole.folder))
    assert [t.params for t in load(more).trials] == [t.params for t in load(whole).trials]


def test_a_run_that_is_done_out_of_its_turn_counts_and_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = spec_of(tmp_path / "whole", "random", trials=9)
    list(events(whole, Formula(3, seed=1)))
    spec = spec_of(tmp_path / "s", "random", budget={"trials": 9, "max_hours": 1.5})
    first = Endless(3, 3, monkeypatch)
    list(events(spec, first))
    states = {t.number: t.state for t in read(spec.folder).trials}
    assert states[3] == RUNNING
    ahead = [number for number, state in states.items() if number > 3 and state == COMPLETE]
    assert ahead, "trials behind the slow one ended"
    assert load(spec).trials[ahead[0]].state.name == "RUNNING", "the sampler is told in its turn"
    again = Formula(3, seed=2)
    list(events(spec_of(tmp_path / "s", "random", trials=9), again))
    assert outline(read(spec.folder)) == outline(read(whole.folder))
    assert not set(again.trained) & set(first.trained)


def test_halving_pauses_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halving = {"name": "halving", "fidelity": "steps"}
    whole = spec_of(tmp_path / "whole", "tpe", halving, trials=9)
    list(events(whole, Formula(1, seed=1)))
    spec = spec_of(tmp_path / "s", "tpe", halving, budget={"trials": 9, "max_hours": 1.5})
    list(events(spec, Endless(1, 5, monkeypatch)))
    list(events(spec_of(tmp_path / "s", "tpe", halving, trials=9), Formula(1, seed=2)))
    assert outline(read(spec.folder)) == outline(read(whole.folder))


def test_a_device_counts_by_the_clock_until_its_segments_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("loratune.record.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    spec = spec_of(Path("s"), "random", budget={"trials": 2, "max_cost": 1.0, "price_per_device_hour": 0.5})
    meter = ProgressTracker(budget_trials=2, workers=1, devices=2, earlier_device_seconds=1800.0, price=0.5, _ticked=100.0)
    spending = Spending(spec, 10, meter)
    for trial in range(2):  # two slots of one process
        meter.began(f"{trial:04d}/main/0000010", 10, 0)
    now[0] += 600
    assert meter.spent_device_seconds == 1800, "a model that is loaded trains nothing yet"
    for trial in range(2):
        meter.progressed(Progress(key=f"{trial:04d}/main/0000010", step=1, total_steps=10, tokens=1))
    now[0] += 600
    assert meter.spent_device_seconds == 1800 + 2 * 600
    assert meter.cost == pytest.approx(0.5 * 3000 / 3600)
    meter.scoring(0, 1, 2)
    now[0] += 600
    assert meter.spent_device_seconds == 1800 + 2 * 600 + 3 * 600
    assert spending.limit() == ""
    now[0] += 800
    assert spending.limit() == "The budget of 1.00 is spent"


def test_the_time_left_is_known_with_the_first_result_of_a_start_and_costs_are_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("loratune.record.progress.time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0]))
    meter = ProgressTracker(budget_trials=3, workers=1, price=3600.0, _ticked=100.0, _settled_at=100.0)
    outcomes = [Outcome(key=f"{n:04d}/main/0000010", state=State.COMPLETED, validation_loss=1.0, train_seconds=10.0) for n in range(2)]
    trials = [
        Trial(number=n, hyperparameters=Hyperparameters(), params={}, state=COMPLETE, value=1.0, outcomes=(outcomes[n],)) for n in (0, 1)
    ]
    meter.settled(trials[0])  # replayed from the record
    assert meter.snapshot()["seconds_left"] is None
    meter.began(outcomes[1].key, 10, 0)
    meter.progressed(Progress(key=outcomes[1].key, step=1, total_steps=10, tokens=1))
    now[0] += 15
    told = meter.snapshot()
    assert (told["device_seconds"], told["cost"]) == (10.0, 10.0), "of results"
    assert told["spent"] == {"device_seconds": 15.0, "cost": 15.0}
    meter.came(outcomes[1])
    meter.settled(trials[1])
    assert meter.snapshot()["seconds_left"] == 10.0
    now[0] += 4
    assert meter.snapshot()["seconds_left"] == 6.0, "it runs down until the next result"


def test_a_cost_needs_a_price_which_may_change(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"budget.max_cost: got 20; needs price_per_device_hour"):
        spec_of(tmp_path, "random", budget={"max_cost": 20.0})
    priced = [
        spec_of(tmp_path, "random", budget={"max_cost": 20.0, "price_per_device_hour": price, "currency": currency})
        for price, currency in ((3.0, "EUR"), (2.0, "USD"))
    ]
    assert differences(*priced) == []
    assert (
        "budget.max_cost: was 20.0, now 10.0"
        in differences(priced[0], spec_of(tmp_path, "random", budget={"max_cost": 10.0, "price_per_device_hour": 2.0}))[0]
    )


def study(folder: Path, **budget: Any) -> StudySpec:
    """One real trial of the demo model."""
    from loratune import demo

    given = demo.study()
    given["data"] |= {"train_count": 24, "validation_count": 12}
    given["training"] |= {"epochs": 20, "validations": 2, "batch_size": 8}
    given |= {
        "search_space": {"lora_r": [1, 4], "learning_rate": {"low": 1e-3, "high": 3e-2, "log": True}},
        "sampler": "random",
        "executor": "inline",
        "budget": {"trials": 1, "price_per_device_hour": 3600.0, **budget},
        "output": {"folder": str(folder)},
    }
    return StudySpec.load(base=given)


@pytest.mark.slow
def test_a_real_trial_that_takes_longer_than_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from loratune.study.driver import tune

    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    list(tune(study(tmp_path / "whole")))
    whole = read(tmp_path / "whole")

    monkeypatch.setattr(Loop._listen, "__defaults__", (0.05,))  # seconds between two looks: the trial takes two on a fast machine
    spec = study(tmp_path / "s", max_cost=0.1)  # a unit of money a second, from the first heartbeat on
    happened = list(tune(spec))
    assert not any(isinstance(event, SegmentFinished) for event in happened)
    record = read(spec.folder)
    assert record.budget_spent
    assert [trial.state for trial in record.trials] == [RUNNING]
    assert not record.trials[0].outcomes
    assert record.cost is not None
    assert 0.1 <= record.cost < 60
    checkpoint = record.paths.run(0).checkpoints()
    assert checkpoint
    now = facts(record)
    assert (now["default"]["state"], now["trials"]) == ("interrupted", {"interrupted": 1})
    assert (now["device_seconds"], now["cost"], now["seconds_left"]) == (0, 0, None), "no result is there"
    assert now["spent"] == {"device_seconds": record.spent_device_seconds, "cost": record.cost}
    assert main(["status", str(spec.folder)]) == 0
    assert "the budget is spent, 1 trial paused; a larger one continues" in " ".join(capsys.readouterr().out.split())

    written = checkpoint[0].stat().st_mtime_ns
    list(tune(spec))
    assert read(spec.folder).budget_spent
    assert [path.stat().st_mtime_ns for path in record.paths.run(0).checkpoints()] == [written], "nothing is trained beyond it"

    list(tune(study(tmp_path / "s", max_cost=1e6)))
    again = read(spec.folder)
    assert [(t.state, t.value, t.curve) for t in again.trials] == [(t.state, t.value, t.curve) for t in whole.trials]
    assert again.trials[0].tokens == whole.trials[0].tokens
