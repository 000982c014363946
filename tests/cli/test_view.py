"""What a running study shows, driven by the events of a study."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from loratune.cli import view as views
from loratune.cli.trial_lines import clock, counts, params, result, totals, varied_parameters
from loratune.cli.view import Lines, Table, open_view
from loratune.record import COMPLETE, DIVERGED, FAILED, INFEASIBLE, PAUSED, RUNNING, StudyRecord, Trial, open_record
from loratune.spec import StudySpec
from loratune.study.loop import SegmentFinished, TrialStarted
from loratune.work import CurvePoint, Hyperparameters, Message, Outcome, Progress, State

SNAPSHOT = {
    "pid": os.getpid(),
    "trials_ended": 1,
    "trials_started": 2,
    "budget_trials": 30,
    "running": [{"trial": 1, "run": "main", "step": 40, "total_steps": 120, "tokens": 9, "train_loss": 1.25, "validation_loss": None}],
    "best": None,
    "default": 1.3,
    "tokens_per_second": 1234.5,
    "device_seconds": 5400.0,
    "wall_seconds": 3700.0,
    "seconds_left": 7200.0,
    "updated": 0.0,
}


@pytest.fixture
def spec(tmp_path: Path) -> StudySpec:
    (tmp_path / "progress.json").write_text(json.dumps(SNAPSHOT))
    given = {"model": "m", "data": {"train": ["d"], "validation_fraction": 0.1}, "output": {"folder": str(tmp_path)}}
    return StudySpec.load(None, (), given)


def trial(number: int, **changes: object) -> Trial:
    rank = 8 * (number + 1)
    return replace(
        Trial(number=number, hyperparameters=Hyperparameters(lora_r=rank), params={"lora_r": rank, "learning_rate": 1e-5}), **changes
    )


def settled(number: int, value: float, state: str = COMPLETE, message: str = "", base: float | None = None) -> SegmentFinished:
    curve = (CurvePoint(step=0, tokens=0, train_loss=None, validation_loss=base),) if base is not None else ()
    outcome = Outcome(key=f"{number:04d}/main/0000120", state=State.COMPLETED, validation_loss=value, curve=curve, train_seconds=70.0)
    return SegmentFinished(trial(number, state=state, value=value, message=message, outcomes=(outcome,)), outcome)


EVENTS = [
    Message(text="10 train / 2 validation examples\nno duplicates"),
    TrialStarted(trial(0)),
    settled(0, 1.3, base=2.5),
    TrialStarted(trial(1)),
    Progress(key="0001/main/0000120", step=40, total_steps=120, tokens=9, train_loss=1.25),
    settled(1, 1.2),
    settled(2, 1.4),
    settled(3, 2.5, DIVERGED, "the loss became NaN at step 7"),
]


def test_the_base_model_is_that_of_the_first_trial_that_was_trained(spec: StudySpec) -> None:
    stream = io.StringIO()
    view = Lines(spec, stream)
    for event in (
        TrialStarted(trial(0, state=INFEASIBLE, message="it breaks adapter_mb <= 1: 2")),
        TrialStarted(trial(1)),
        settled(1, 1.2, base=2.5),
    ):
        view.show(event)
    assert view.record.base_loss == 2.5
    assert "trial 1: validation loss 1.2000 (base model 2.5000), " in stream.getvalue()
    view.show(settled(2, 1.4))
    assert stream.getvalue().count("base model") == 1


def test_scores_are_told_with_the_loss(spec: StudySpec) -> None:
    stream = io.StringIO()
    event = settled(0, 1.3)
    Lines(spec, stream).show(replace(event, outcome=replace(event.outcome, scores={"mmlu": 0.41}, scoring_seconds=50.0)))
    assert stream.getvalue()[10:] == "trial 0: validation loss 1.3000, mmlu 0.410, 2 min  <- best so far\n"


def test_lines_tell_each_event_once(spec: StudySpec) -> None:
    stream = io.StringIO()
    view = Lines(spec, stream)
    for event in EVENTS:
        view.show(event)
    assert [line[10:] for line in stream.getvalue().splitlines()] == [
        "10 train / 2 validation examples",
        "no duplicates",
        "trial 0 begins: rank 8, learning rate 1e-5",
        "trial 0: validation loss 1.3000 (base model 2.5000), 70 s  <- best so far",
        "trial 1 begins: rank 16, learning rate 1e-5",
        "trial 1: validation loss 1.2000, 70 s  <- best so far",
        "trial 2: validation loss 1.4000, 70 s",
        "trial 3 diverged after 70 s: the loss became NaN at step 7",
    ]
    assert all(line.startswith("[   0:0") for line in stream.getvalue().splitlines())


def test_lines_of_progress_come_at_most_every_half_minute(spec: StudySpec, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(views.time, "monotonic", lambda: now)
    stream = io.StringIO()
    view = Lines(spec, stream)
    for second in range(95):
        now = 1000.0 + second
        view.show(EVENTS[4])
    lines = stream.getvalue().splitlines()
    assert [line[:9] for line in lines] == ["[   0:30]", "[   1:00]", "[   1:30]"]
    assert lines[0][
        10:
    ] == "trial 1 at step 40/120; 1/30 trials; 1.23 k tokens/s; 62 min elapsed; 1.50 device-hours; about 2 h 0 min left".replace(
        "62 min", "1 h 2 min"
    )


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_shows_all_and_fits(spec: StudySpec, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    stream = io.StringIO()
    view = Table(spec, stream)
    for event in EVENTS:
        view.show(event)
    view._console.print(view.render())
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for said in (
        "10 train / 2 validation examples",
        "trial 3 diverged after 70 s: the loss became NaN at step 7",  # stays above the table
        "* 1   complete   1.2000     16   70 s",
        "3   diverged",
        "40/120  1.2500           –  rank 16, learning rate 1e-5",
        "best, trial 1        1.2000  rank 16, learning rate 1e-5",
        "default, trial 0     1.3000  0.1000 above the best; rank 8, learning rate 1e-5",
        "base model, untuned  2.5000",
        "1/30 trials · 1.23 k tokens/s · 1 h 2 min elapsed · 1.50 device-hours",
    ):
        assert said in text, text


def test_the_table_before_anything_happened(spec: StudySpec) -> None:
    (spec.folder / "progress.json").write_text(json.dumps(SNAPSHOT | {"pid": 1}))  # of an earlier start
    stream = io.StringIO()
    view = Table(spec, stream)
    view._console.print(view.render())
    assert stream.getvalue().strip() == "preparing ..."


def test_the_output_decides_the_view(spec: StudySpec) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with open_view(spec, io.StringIO()) as plain, open_view(spec, Terminal()) as live:
        assert (type(plain), type(live)) == (Lines, Table)


def test_result_compares_best_default_and_base(tmp_path: Path) -> None:
    trials = tuple(event.trial for event in EVENTS if isinstance(event, SegmentFinished))
    lines = result(StudyRecord(folder=tmp_path, name="x", spec={}, trials=trials))
    assert lines == [
        "Validation loss after 4 trials (3 complete, 1 diverged):",
        "  best, trial 1        1.2000  rank 16, learning rate 1e-5",
        "  default, trial 0     1.3000  0.1000 above the best; rank 8, learning rate 1e-5",
        "  base model, untuned  2.5000",
        "Cost: 0.08 device-hours, 0 training tokens.",
    ]


def test_result_without_a_finished_trial_says_why(tmp_path: Path) -> None:
    failed = trial(0, state=FAILED, message="the worker died")
    lines = result(StudyRecord(folder=tmp_path, name="x", spec={}, trials=(failed,)))
    assert lines == ["No trial was trained to its end (1 failed).", "The last message, of trial 0: the worker died"]


def test_words() -> None:
    assert [clock(s) for s in (0, 7.9, 60, 3599, 3600, 36125)] == ["0:00", "0:07", "1:00", "59:59", "1:00:00", "10:02:05"]
    assert params({"learning_rate": 3e-4, "lora_r": 8, "use_rslora": True}) == "rank 8, learning rate 3e-4, rsLoRA yes"
    mixed = [trial(0, state=RUNNING), trial(1, state=PAUSED), trial(2, state=COMPLETE), trial(3, state=COMPLETE)]
    assert counts(mixed) == "2 complete, 1 paused, 1 running"
    assert counts(mixed, active=False) == "2 complete, 1 paused, 1 interrupted"
    assert varied_parameters(mixed) == ["lora_r"]
    assert varied_parameters(mixed[:1]) == ["lora_r", "learning_rate"]


def test_a_trial_that_has_a_checkpoint_continues(spec: StudySpec) -> None:
    spec.folder.joinpath("spec.yaml").write_text(spec.to_yaml())
    with open_record(spec.folder) as record:
        for number in range(2):
            record.begin(number, 0)
            record.trial(trial(number))
        run = record.paths.run(0)
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "checkpoint-0000120.safetensors").write_bytes(b"")
    stream = io.StringIO()
    view = Lines(spec, stream)
    for number in range(2):
        view.show(TrialStarted(trial(number)))
    first, second = stream.getvalue().splitlines()
    assert "trial 0 continues at step 120: rank 8" in first
    assert "trial 1 begins: rank 16" in second


def test_small_sums_are_in_seconds_and_a_cost_without_a_currency_is_named() -> None:
    numbers = {"full_runs": 0.2, "budget_full_runs": 3.0, "wall_seconds": 20.0, "device_seconds": 6.5}
    told = totals(numbers | {"cost": 0.0, "spent": {"device_seconds": 13.7, "cost": 0.04}, "budget_max_cost": None, "currency": ""})
    assert told[-2:] == ["14 device-seconds", "a cost of 0.04"], "with what runs"
    assert "0.04 EUR" in totals(numbers | {"spent": {"device_seconds": 13.7, "cost": 0.04}, "currency": "EUR"})
