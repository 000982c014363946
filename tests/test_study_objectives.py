"""The loop with several objectives and constraints, on the scripted executor of `test_study`."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_study import Formula, answer, events, load, outline, spec_of, until_it_ends

from loratune.record import COMPLETE, DIVERGED, INFEASIBLE, PRUNED, StudyRecord, read
from loratune.spec import StudySpec
from loratune.study.loop import Event, SegmentFinished, TrialStarted
from loratune.work import Hyperparameters, Message, Outcome, Segment, State

OBJECTIVES = ["validation_loss", "adapter_mb"]
WIDTH = 1000  # of the layers: parameters per rank
SEVERAL = {
    "nomad": "nomad",
    "tpe": {"name": "tpe", "n_startup_trials": 4},
    "gp": {"name": "gp", "n_startup_trials": 10},
    "nsga2": {"name": "nsga2", "population_size": 4},
    "random": "random",
    "qmc": "qmc",
}
SAFE = {"lora_r": [4, 8, 16, 32], "learning_rate": {"low": 1e-5, "high": 5e-4, "log": True}}  # nothing fails
HALVING = {"name": "halving", "fidelity": "steps"}


def parameters(h: Hyperparameters) -> int:
    return h.lora_r * WIDTH


def megabytes(h: Hyperparameters) -> float:
    return h.lora_r * WIDTH * 4 / 1e6


class Measured(Formula):
    """Answers with a loss that falls and a memory that grows with the rank, and half a second for each step."""

    def _answer(self, segment: Segment) -> Outcome:
        self.trained.append(segment.key)
        found = replace(answer(segment), trainable_parameters=parameters(segment.hyperparameters))
        if found.state is not State.COMPLETED:
            return found
        steps, rank = segment.stop_step - segment.start_step, segment.hyperparameters.lora_r
        curve = tuple(replace(p, validation_loss=(p.validation_loss or 0.0) - 0.1 * math.log2(rank)) for p in found.curve)
        found = replace(found, curve=curve, validation_loss=curve[-1].validation_loss)
        return replace(found, peak_memory_bytes=rank * 2**26, train_seconds=0.5 * steps, tokens=100 * steps)


def run(spec: StudySpec, width: int = 1, seed: int = 1) -> Iterator[Event]:
    return events(spec, Measured(width, seed=seed), sizes=parameters)


def outlines(record: StudyRecord) -> list[tuple[Any, ...]]:
    return [(*row, t.values, t.message) for row, t in zip(outline(record), record.trials, strict=True)]


CASES = [(name, "full", width) for name, width in zip(SEVERAL, itertools.cycle([1, 3]), strict=False)]
CASES += [("tpe", "halving", 3), ("nomad", "halving", 1), ("nsga2", "halving", 1)]


@pytest.mark.timeout(60)  # it once asked for the refused rank for ever
@pytest.mark.parametrize("limit", [0.6, 0.3])
def test_the_bracket_ends_where_a_constraint_refuses_the_next_rank(limit: float, tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", "bracket", search_space="recommended", constraints=[f"adapter_mb <= {limit}"], trials=40)
    list(run(spec))
    record = read(spec.folder)
    refused = [t.params for t in record.trials if t.state == INFEASIBLE]
    assert refused, "or nothing is tested"
    assert all(refused.count(params) == 1 for params in refused)
    assert record.best is not None
    assert megabytes(record.best.hyperparameters) <= limit


@pytest.mark.parametrize(("sampler", "schedule", "width"), CASES)
def test_an_interrupted_study_of_two_objectives_ends_as_the_uninterrupted_one(
    sampler: str, schedule: str, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"objectives": OBJECTIVES, "constraints": ["adapter_mb <= 0.6", "peak_memory_gib < 8"], "trials": 12}
    asked["schedule"] = HALVING if schedule == "halving" else None
    whole = spec_of(tmp_path / "whole", SEVERAL[sampler], **asked)
    list(run(whole, width))
    expected = outlines(read(whole.folder))
    assert len(expected) == 12

    broken = spec_of(tmp_path / "broken", SEVERAL[sampler], **asked)
    until_it_ends(monkeypatch, lambda attempt: list(run(broken, width, seed=attempt)), between=(6, 20), at_least=2)
    assert outlines(read(broken.folder)) == expected
    stored = [[(t.params, t.values, t.constraints) for t in load(spec).trials] for spec in (broken, whole)]
    assert stored[0] == stored[1]


def test_a_known_constraint_costs_no_training(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", "random", constraints="adapter_mb <= 0.1", trials=20)
    executor = Measured(2, seed=1)
    happened = list(events(spec, executor, sizes=parameters))
    trials = read(spec.folder).trials
    large = [t for t in trials if megabytes(t.hyperparameters) > 0.1]
    assert 0 < len(large) < 20
    assert {t.number for t in trials} - {int(key[:4]) for key in executor.trained} == {t.number for t in large}
    study = load(spec)
    for trial in large:
        assert (trial.state, trial.outcomes, trial.value) == (INFEASIBLE, (), None)
        assert trial.message == f"it breaks adapter_mb <= 0.1: {megabytes(trial.hyperparameters):.4g}"
        told = study.trials[trial.number]
        assert told.state.name == "COMPLETE"
        assert told.constraints == {"adapter_mb <= 0.1": pytest.approx(megabytes(trial.hyperparameters) / 0.1 - 1)}
    assert sum(isinstance(e, Message) and "is infeasible and not trained: it breaks adapter_mb" in e.text for e in happened) == len(large)
    again = list(events(spec, Measured(2, seed=2), sizes=parameters))
    assert not any(isinstance(e, Message) for e in again), "what was told in an earlier start is not told again"
    assert sum(isinstance(e, SegmentFinished) for e in again) == 20 - len(large)


def test_the_first_trained_trial_measures_the_base_model_when_the_default_cannot_be_trained(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", "random", constraints="adapter_mb >= 0.05", trials=6, search_space=SAFE)  # the default has 0.032
    list(run(spec))
    record = read(spec.folder)
    assert record.default is not None
    assert (record.default.state, record.default.outcomes) == (INFEASIBLE, ())
    assert record.base_loss is not None
    assert record.best is not None
    assert record.base_loss > (record.best.value or math.inf)


def test_nothing_feasible_ends(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", "tpe", constraints="adapter_mb < 0.001", trials=8)
    happened = list(run(spec))
    assert [type(e) for e in happened] == [TrialStarted, Message] * 8
    assert read(spec.folder).best is None


def test_a_measured_constraint_is_told_after_the_run_and_no_best_breaks_it(tmp_path: Path) -> None:
    free = spec_of(tmp_path / "free", "random", trials=24)
    list(run(free))
    bounded = spec_of(tmp_path / "bounded", "random", constraints="peak_memory_gib < 1", trials=24)  # rank 16 has exactly 1
    list(run(bounded))
    record = read(bounded.folder)
    broke = [t for t in record.trials if t.outcomes and t.outcomes[-1].peak_memory_bytes >= 2**30]
    assert broke
    study = load(bounded)
    for trial in broke:
        assert trial.state == INFEASIBLE
        assert trial.message.startswith("it breaks peak_memory_gib < 1: ")
        assert trial.value == trial.outcomes[-1].validation_loss, "it was trained, and its loss is known"
        assert study.trials[trial.number].constraints["peak_memory_gib < 1"] > 0
    unbounded, best = read(free.folder).best, record.best
    assert unbounded is not None
    assert best is not None
    assert (unbounded.hyperparameters.lora_r >= 16) > (best.hyperparameters.lora_r >= 16), "the constraint bites"


def test_a_constraint_broken_on_the_way_ends_the_trial_there(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", "random", HALVING, constraints=["peak_memory_gib < 1", "validation_loss < 1.2"], trials=27)
    list(run(spec))
    trials = read(spec.folder).trials
    heavy = [t for t in trials if "peak" in t.message]
    assert heavy
    assert all(len(t.outcomes) == 1 for t in heavy), "memory does not fall"
    lossy = [t for t in trials if t.message.startswith("it breaks validation_loss")]
    assert all(len(t.outcomes) == 3 for t in lossy), "a loss may still fall"
    assert any(t.state == PRUNED for t in trials)


def test_the_front_is_of_finished_trials_and_the_best_is_on_it(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", SEVERAL["nsga2"], objectives=OBJECTIVES, trials=24)
    list(run(spec, 2))
    record = read(spec.folder)
    for trial in record.finished:
        assert trial.values == (trial.value, megabytes(trial.hyperparameters))
    by_hand = {
        t.number
        for t in record.finished
        if not any(all(b <= a for a, b in zip(t.values, o.values, strict=True)) and o.values != t.values for o in record.finished)
    }
    assert {t.number for t in record.front} == by_hand
    assert record.best is not None
    assert record.front[0].number == record.best.number
    assert len(by_hand) > 1


def test_what_diverged_is_told_as_the_worst_of_everything(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", "random", objectives=OBJECTIVES, trials=24)
    list(run(spec))
    record = read(spec.folder)
    diverged = [t for t in record.trials if t.state == DIVERGED]
    assert diverged
    study = load(spec)
    for trial in diverged:
        earlier = [t for t in record.trials[: trial.number] if t.state == COMPLETE]
        assert study.trials[trial.number].values == list(trial.values)
        assert all(t.values[0] <= trial.values[0] and t.values[1] <= trial.values[1] for t in earlier)


def test_a_maximised_objective(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", "random", objectives=["validation_loss", {"name": "inference_cost", "direction": "maximize"}], trials=30)
    list(run(spec))
    record = read(spec.folder)
    assert record.objectives == {"validation_loss": "minimize", "inference_cost": "maximize"}
    assert max(t.hyperparameters.lora_r for t in record.finished) == max(t.hyperparameters.lora_r for t in record.front)
    assert [d.name for d in load(spec).directions] == ["MINIMIZE", "MAXIMIZE"]


def test_costs_are_those_of_the_last_run(tmp_path: Path) -> None:
    schedule = {"name": "halving", "fidelity": "budget"}
    spec = spec_of(tmp_path / "s", "random", schedule, objectives=["validation_loss", "tokens", "train_seconds"], trials=12)
    list(run(spec))
    finished = read(spec.folder).finished
    assert finished
    assert {t.values[1:] for t in finished} == {(4000.0, 20.0)}, "40 steps, whatever the short runs before"


def test_a_real_study_of_loss_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model, trained: sizes told beforehand are those trained, the front is shown, what is too large costs nothing."""
    from loratune import demo
    from loratune.cli import main
    from loratune.study.driver import tune

    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    given = demo.study()
    given["data"] |= {"train_count": 24, "validation_count": 12}
    given |= {
        "objectives": OBJECTIVES,
        "constraints": ["adapter_mb <= 0.3", "peak_memory_gib <= 64"],
        "search_space": {"lora_r": [1, 4, 16], "learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}},
        "sampler": "random",
        "executor": "inline",
        "budget": {"trials": 8},
        "output": {"folder": str(tmp_path / "study")},
    }
    happened = list(tune(StudySpec.load(base=given)))
    record = read(tmp_path / "study")
    trained = [t for t in record.trials if t.outcomes]
    assert {t.hyperparameters.lora_r for t in record.trials} == {1, 4, 16}
    assert {t.hyperparameters.lora_r for t in trained} == {1, 4}
    for trial in trained:
        assert trial.state == COMPLETE
        assert trial.values == (trial.outcomes[-1].validation_loss, trial.outcomes[-1].trainable_parameters * 4 / 1e6)
    assert sum(isinstance(e, Message) and "not trained" in e.text for e in happened) == len(record.trials) - len(trained)
    capsys.readouterr()
    assert main(["status", str(tmp_path / "study")]) == 0
    shown = capsys.readouterr().out
    assert f"front of {len(record.front)}: no trial is better in every objective" in shown
    assert "adapter mb" in shown
