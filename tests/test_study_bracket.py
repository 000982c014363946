"""The bracket search in the loop: short runs that are never followed up, budgets in full runs and tokens, exact replay."""

from pathlib import Path
from typing import Any

import pytest
from test_study import Formula, events, outline, spec_of, stored, until_it_ends

from loratune.errors import SpecError
from loratune.record import COMPLETE, DIVERGED, PRUNED, read
from loratune.spec import StudySpec
from loratune.study.loop import SegmentFinished
from loratune.work import Message

GUARDED = {"name": "bracket", "guard": "always"}


def study_of(folder: Path, sampler: Any = GUARDED, **more: Any) -> StudySpec:
    space = {
        "lora_r": [8, 16, 32],
        "alpha_ratio": [0.5, 1.0],
        "lora_dropout": [0.0, 0.1],
        "learning_rate": {"low": 1e-6, "high": 7e-4, "log": True, "default": 3e-4},
    }
    return spec_of(folder, sampler, **{"search_space": space, "budget": {"full_runs": 4}, **more})


@pytest.mark.parametrize("width", [1, 3])
def test_an_interrupted_study_ends_as_the_uninterrupted_one(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = study_of(tmp_path / "whole")
    list(events(whole, Formula(width, seed=1)))
    expected = outline(read(whole.folder))
    assert sum(state == PRUNED for _, _, state, _, _ in expected) >= 6
    broken = study_of(tmp_path / "broken")
    until_it_ends(monkeypatch, lambda attempt: list(events(broken, Formula(width, seed=attempt))), between=(3, 9), at_least=3)
    assert outline(read(broken.folder)) == expected
    assert [(n, p, v) for n, _, p, v, _ in stored(broken)] == [(n, p, v) for n, _, p, v, _ in stored(whole)]


def test_short_runs_are_complete_runs_that_nobody_follows_up(tmp_path: Path) -> None:
    spec = study_of(tmp_path / "s")
    list(events(spec, Formula(1, seed=1)))
    record = read(spec.folder)
    short = [trial for trial in record.trials if trial.short]
    assert len(short) == 6, "five over the decades, and the one neighbour that the best at the bound of the space has"
    assert {trial.state for trial in short} <= {PRUNED, DIVERGED}
    for trial in short:
        (outcome,) = trial.outcomes
        assert outcome.key.split("/")[1] == "budget-1-27"
        assert outcome.key.endswith("/0000002"), "40 steps / 27, rounded up"
        assert [point.step for point in outcome.curve if point.step] == [2], "validated at the end alone"
    assert record.default is not None
    assert not record.default.short, "the first full run stands for the default"
    assert record.best is not None
    assert record.best.length == 1
    assert all(trial.state == COMPLETE for trial in record.trials if not trial.short)


def test_the_run_that_reaches_the_budget_of_full_runs_is_the_last(tmp_path: Path) -> None:
    spec = study_of(tmp_path / "s", {"name": "bracket", "guard": "never", "tolerance": 1e-9}, budget={"full_runs": 2.5})
    happened = list(events(spec, Formula(1, seed=1)))
    assert sum(isinstance(event, SegmentFinished) for event in happened) == 3
    notes = [event.text for event in happened if isinstance(event, Message)]
    assert "The budget of 2.5 full runs is spent after 3 trials, the work of 3 full runs." in notes
    assert any(note.startswith("With 90 % probability at most") for note in notes)
    list(
        events(
            study_of(tmp_path / "s", {"name": "bracket", "guard": "never", "tolerance": 1e-9}, budget={"full_runs": 5}), Formula(1, seed=1)
        )
    )
    assert len(read(spec.folder).trials) == 5, "a larger budget continues"


def test_a_run_counts_by_the_examples_it_trains_on(tmp_path: Path) -> None:
    space = {"epochs": [0.5, 1.0], "learning_rate": {"low": 1e-5, "high": 1e-4, "log": True, "default": 1e-5}}
    spec = spec_of(tmp_path / "s", "random", search_space=space, budget={"full_runs": 4})
    list(events(spec, Formula(1, seed=1)))
    trials = read(spec.folder).trials
    halves = [trial.hyperparameters.epochs for trial in trials]
    assert 0.5 in halves
    default = spec.search_space.default_values()["epochs"]
    assert 4 <= sum(halves) / default < 4 + 1 / default


def test_a_budget_of_tokens_ends_the_study(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", "random", budget={"trials": 20, "max_tokens": 450})
    happened = list(events(spec, Formula(1, seed=1)))
    assert len(read(spec.folder).trials) >= 5
    assert "The budget of 450 tokens is spent after" in str(happened[-1])


def test_it_stops_before_its_budget_and_says_why(tmp_path: Path) -> None:
    spec = study_of(tmp_path / "s", {"name": "bracket", "guard": "never"}, budget={"full_runs": 40})
    happened = list(events(spec, Formula(1, seed=1)))
    notes = [event.text for event in happened if isinstance(event, Message)]
    assert any("is expected to lower the loss by" in note and "The study ends after" in note for note in notes), notes
    assert len(read(spec.folder).trials) < 15


def test_every_slot_works_in_a_wave(tmp_path: Path) -> None:
    class Counting(Formula):
        most = 0

        def _poll(self, timeout: float) -> Any:
            self.most = max(self.most, len(self._waiting))
            return super()._poll(timeout)

    executor = Counting(3, seed=1)
    list(events(study_of(tmp_path / "s"), executor))
    assert executor.most == 3


BASE = {"model": "m", "data": {"train": ["d.json"], "validation_fraction": 0.1}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"budget": {"full_runs": 0}}, "budget.full_runs: got 0; needed: a number > 0"),
        ({"budget": {"full_runs": "three"}}, "budget.full_runs: got 'three'; needed: a number"),
        ({"budget": {"fullruns": 3}}, "budget.fullruns: unknown field; did you mean 'full_runs'?"),
        ({"budget": {"max_tokens": 0.5}}, "budget.max_tokens: got 0.5; needed: a whole number"),
        ({"sampler": "bracket", "objectives": ["validation_loss", "tokens"]}, "got 'bracket', which takes one objective, not 2"),
        (
            {"sampler": "bracket", "schedule": "halving"},
            "schedule.name: got 'halving'; the sampler bracket sets the length of its runs itself",
        ),
        ({"sampler": {"name": "tpe", "warm_start": ["runs/a"]}}, "the sampler tpe takes no earlier studies; only bracket does"),
    ],
)
def test_mistakes(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        StudySpec.load(base={**BASE, **sections})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, ("bracket", 100, 3.0)),
        ({"budget": {"trials": 20}}, ("bracket", 20, None)),
        ({"budget": {"full_runs": 5}}, ("bracket", 100, 5.0)),
        ({"budget": {"max_hours": 2.0}}, ("bracket", 100, 3.0)),
        ({"sampler": "nomad"}, ("nomad", 100, None)),
        ({"sampler": {"defaults_first": False}}, ("bracket", 100, 3.0)),
        ({"objectives": ["validation_loss", "tokens"]}, ("nomad", 100, None)),
        ({"schedule": "halving"}, ("nomad", 100, None)),
    ],
)
def test_the_budget_and_the_sampler_that_nobody_wrote(sections: dict[str, Any], expected: tuple[str, int, float | None]) -> None:
    spec = StudySpec.load(base={**BASE, **sections})
    assert (spec.sampler.name, spec.budget.trials, spec.budget.full_runs) == expected
    assert StudySpec.model_validate(spec.model_dump(mode="json")) == spec
    assert ("alpha_ratio" in spec.search_space.parameters) == (expected[0] == "bracket")


def test_what_training_says_is_not_searched() -> None:
    spec = StudySpec.load(base={**BASE, "training": {"batch_size": 16, "target_modules": ["q_proj"]}})
    assert not {"batch_size", "target_modules"} & spec.search_space.parameters.keys()
    flagged = StudySpec.load(base={**BASE, "training": {"batch_size": 16}}, overrides=[("search_space.lr.high", "1e-2")])
    assert flagged.search_space.parameters["learning_rate"].high == 1e-2  # type: ignore[union-attr]
    assert "batch_size" not in flagged.search_space.parameters


@pytest.mark.slow
def test_a_real_study_of_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line: told before, run, continued by the same command, shown, and the prior of a second study."""
    from loratune.cli import main

    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    small = ["--data.train_count", "96", "--data.validation.0.count", "24", "--training.validations", "1", "--executor.name", "inline"]
    command = ["run", "--demo", "--output", str(tmp_path / "study"), *small, "--budget.full_runs", "2"]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 full runs by bracket. Nothing is started." in said
    assert "First guess: rank 64" in said
    assert "the work of 2.259 full runs at the defaults" in said
    assert not (tmp_path / "study").exists()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "The budget of 2 full runs is spent after 9 trials" in said
    record = read(tmp_path / "study")
    assert [trial.short for trial in record.trials] == [True] * 7 + [False] * 2
    assert record.best is not None
    assert record.base_loss is not None
    assert record.best.value is not None
    assert record.best.value < record.base_loss - 1, "it learned"
    assert record.spec["search_space"]["lora_r"]["default"] == 64, "the first guess is written into the description"
    assert record.paths.guess.is_file()
    assert (tmp_path / "study" / "adapter" / "adapter_model.safetensors").is_file()
    trained = sorted((tmp_path / "study" / "trials").rglob("outcomes/*.json"))
    written = [path.stat().st_mtime_ns for path in trained]
    assert main(command) == 0
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "study" / "trials").rglob("outcomes/*.json"))] == written
    capsys.readouterr()
    assert main(["status", str(tmp_path / "study")]) == 0
    assert "of 2 full runs" in capsys.readouterr().out
    assert main(["recommend", "--demo", *small, "--warm-start", str(tmp_path / "study")]) == 0
    assert "its best lies at" in " ".join(capsys.readouterr().out.split())
