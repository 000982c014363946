"""Downstream scores among the objectives and constraints: on scripted training, and in a real study of the embedded model."""

import json
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_study import Broken, Formula, events, load, outline, spec_of, until_it_ends
from test_study_objectives import HALVING, SEVERAL, Measured, parameters

from loratune.downstream import search_scoring
from loratune.downstream.job import EvaluationJob
from loratune.downstream.results.search_items import search_items
from loratune.errors import EvaluationError, SpecError, StorageError
from loratune.record import COMPLETE, DIVERGED, INFEASIBLE, PRUNED, StudyRecord, read
from loratune.spec import StudySpec
from loratune.study import loop
from loratune.study.loop import Event
from loratune.work import ModelRecipe

OBJECTIVES = ["validation_loss", "mmlu"]
SECONDS = 2.0


class Scores:
    """Scores that fall with the loss, told after two batches."""

    def __init__(self) -> None:
        self.scored: list[int] = []

    def __call__(self, trial: int, adapter: Path, loss: float | None, stop: threading.Event) -> Iterator[search_scoring.ScoringProgress]:
        assert loss is not None
        assert adapter.as_posix().endswith(f"trials/{trial:04d}/main/adapter")
        for batch in range(2):
            yield search_scoring.ScoringProgress(done=batch, total=2, seconds=batch / 2)
        if not stop.is_set():
            self.scored.append(trial)
            yield search_scoring.ScoringProgress(done=2, total=2, seconds=SECONDS, scores={"mmlu": score(loss)})


def score(loss: float) -> float:
    return round(math.exp(-loss) + 0.01 * math.sin(1e4 * loss), 3)


def run(spec: StudySpec, scores: Scores, executor: Formula | None = None) -> Iterator[Event]:
    return events(spec, executor or Measured(1, seed=1), sizes=parameters, score=scores)


def outlines(record: StudyRecord) -> list[tuple[Any, ...]]:
    return [(*row, t.values, t.message, [o.scores for o in t.outcomes]) for row, t in zip(outline(record), record.trials, strict=True)]


@pytest.mark.parametrize(("sampler", "schedule", "width"), [("nomad", None, 1), ("tpe", HALVING, 3), ("gp", None, 2)])
def test_an_interrupted_study_ends_as_the_uninterrupted_one(
    sampler: str, schedule: dict[str, Any] | None, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"objectives": OBJECTIVES, "constraints": "mmlu >= 0.05", "trials": 12, "schedule": schedule}
    whole = spec_of(tmp_path / "whole", SEVERAL[sampler], **asked)
    list(run(whole, Scores(), Measured(width, seed=1)))
    expected = outlines(read(whole.folder))
    assert any(row[-1] and row[-1][-1] for row in expected)

    broken, scores = spec_of(tmp_path / "broken", SEVERAL[sampler], **asked), Scores()
    until_it_ends(monkeypatch, lambda n: list(run(broken, scores, Measured(width, seed=n))), between=(6, 20), at_least=2, seed=5)
    assert outlines(read(broken.folder)) == expected
    stored = [[(t.params, t.values, t.constraints) for t in load(spec).trials] for spec in (broken, whole)]
    assert stored[0] == stored[1]

    again = Scores()
    list(run(broken, again))
    assert again.scored == [], "a score on disk is not computed again"


@pytest.mark.parametrize(("sampler", "schedule", "width"), [("nomad", HALVING, 1), ("tpe", HALVING, 3), ("gp", None, 2)])
def test_an_own_metric_that_is_minimised(sampler: str, schedule: dict[str, Any] | None, width: int, tmp_path: Path) -> None:
    class Words(Scores):
        def __call__(self, *given: Any) -> Iterator[search_scoring.ScoringProgress]:
            for now in super().__call__(*given):
                yield replace(now, scores={"words": 30 * now.scores["mmlu"]} if now.scores else {})

    asked: dict[str, Any] = {"metrics": {"function": "mine:words", "direction": "minimize"}, "constraints": "words < 100", "trials": 12}
    spec = spec_of(tmp_path / "s", SEVERAL[sampler], schedule, objectives=["validation_loss", "words"], **asked)
    list(run(spec, Words(), Measured(width, seed=1)))
    record = read(spec.folder)
    assert record.objectives == {"validation_loss": "minimize", "words": "minimize"}
    assert record.finished
    assert all(t.values == (t.value, t.scores["words"]) for t in record.finished)
    without = [t for t in record.trials if t.values and not t.scores]
    told = {words for t in record.finished for words in t.scores.values()} | {math.inf}
    assert {t.values[1] for t in without} <= told, "the highest that was measured, infinite before any"


class Matches:
    """An own metric of few values; at a rung it is told which."""

    def __init__(self) -> None:
        self.scored: list[tuple[int, str]] = []

    def __call__(
        self, trial: int, adapter: Path, loss: float | None, stop: threading.Event, rung: str = ""
    ) -> Iterator[search_scoring.ScoringProgress]:
        assert adapter.parent.name == rung.rpartition("-")[0] or (not rung and adapter.parent.name == "main")
        if not stop.is_set():
            self.scored.append((trial, rung))
            yield search_scoring.ScoringProgress(done=1, total=1, seconds=SECONDS, scores={"matches": matches(loss)})


def matches(loss: float | None) -> float:
    """One of eleven values; the best is far from the lowest loss."""
    assert loss is not None
    return round(1 - min(1.0, abs(loss - 2.0)), 1)


OWN: dict[str, Any] = {"metrics": "mine:matches", "objectives": ["matches"], "trials": 16}


@pytest.mark.parametrize(
    ("sampler", "schedule", "width"),
    [("nomad", None, 1), ("tpe", None, 2), ("random", None, 1), ("tpe", HALVING, 3), ("nomad", {**HALVING, "fidelity": "budget"}, 1)],
)
def test_an_own_metric_may_be_the_only_objective(
    sampler: str, schedule: dict[str, Any] | None, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, scores = spec_of(tmp_path / "whole", SEVERAL[sampler], schedule, **OWN), Matches()
    list(run(whole, scores, Measured(width, seed=1)))
    record, study = read(whole.folder), load(whole)
    assert record.objectives == {"matches": "maximize"}
    assert [d.name for d in study.directions] == ["MAXIMIZE"]
    top = max(record.finished, key=lambda t: (t.scores["matches"], -(t.value or 0.0), -t.number))
    assert record.best == top
    assert min(record.finished, key=lambda t: t.value or 9.0).number != top.number, "or nothing is tested"
    for trial in record.finished:
        assert trial.value == trial.outcomes[-1].validation_loss, "the value stays the loss"
        assert trial.values == (trial.scores["matches"],) == (matches(trial.value),)
        assert study.trials[trial.number].value == trial.scores["matches"]
    for trial in (t for t in record.trials if t.state == DIVERGED):
        seen = [o.scores["matches"] for t in record.trials[: trial.number] for o in t.outcomes if o.scores]
        told = (
            {min(seen, default=0.0)} if width == 1 else {0.0, *(o.scores["matches"] for t in record.trials for o in t.outcomes if o.scores)}
        )
        assert trial.values[0] in told, "the lowest that was measured by then"
    assert json.loads((whole.folder / "progress.json").read_text())["best"]["trial"] == top.number
    pruned = [t for t in record.trials if t.state == PRUNED]
    assert bool(pruned) == bool(schedule)
    for trial in pruned:
        assert study.trials[trial.number].intermediate_values == {o.stop_step: o.scores["matches"] for o in trial.outcomes}
    if schedule is None:
        assert not any(rung for _, rung in scores.scored)

    broken, again = spec_of(tmp_path / "broken", SEVERAL[sampler], schedule, **OWN), Matches()
    until_it_ends(monkeypatch, lambda n: list(run(broken, again, Measured(width, seed=n))), between=(6, 20), at_least=2, seed=5)
    assert outlines(read(broken.folder)) == outlines(record)
    assert sorted(set(again.scored)) == sorted(scores.scored)


def test_halving_promotes_by_the_own_metric_and_breaks_ties_by_the_loss(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", "random", HALVING, **{**OWN, "trials": 27})
    list(run(spec, Matches()))
    record = read(spec.folder)
    rung = {t.number: t.outcomes[0] for t in record.trials if t.outcomes and t.outcomes[0].scores}
    promoted = {t.number for t in record.trials if len(t.outcomes) > 1} - {0}
    best = max(outcome.scores["matches"] for outcome in rung.values())
    leading = [number for number, outcome in rung.items() if outcome.scores["matches"] == best]
    assert min(leading, key=lambda number: rung[number].validation_loss or 9.0) in promoted
    lowest = min(rung, key=lambda number: rung[number].validation_loss or 9.0)
    assert lowest not in promoted | {0}, "the lowest loss is far from the best value"


def test_a_finished_trial_has_its_score_and_the_front_maximises_it(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", "random", objectives=OBJECTIVES, trials=24)
    scores = Scores()
    list(run(spec, scores))
    record = read(spec.folder)
    assert record.objectives == {"validation_loss": "minimize", "mmlu": "maximize"}
    assert [d.name for d in load(spec).directions] == ["MINIMIZE", "MAXIMIZE"]
    for trial in record.finished:
        assert trial.values == (trial.value, score(trial.value or 0.0))
        assert trial.device_seconds == pytest.approx(sum(o.train_seconds for o in trial.outcomes) + SECONDS), "scoring is paid for"
        assert load(spec).trials[trial.number].values == list(trial.values)
    assert sorted(scores.scored) == [t.number for t in record.finished], "nothing else is scored"
    top = max(record.finished, key=lambda t: t.values[1])
    assert top.number in {t.number for t in record.front}
    diverged = [t for t in record.trials if t.state == DIVERGED]
    assert diverged
    for trial in diverged:
        seen = [o.scores["mmlu"] for t in record.trials[: trial.number] for o in t.outcomes if o.scores]
        assert trial.values[1] == min(seen, default=0.0), "told as the lowest score seen"


def test_a_trial_that_is_scored_is_shown_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_SHOWN", 0.0)
    spec = spec_of(tmp_path / "s", "random", objectives=OBJECTIVES, trials=2)
    seen: list[dict[tuple[int, str], int]] = []

    class Watched(Measured):
        def _poll(self, timeout: float) -> list[Any]:
            if (spec.folder / "progress.json").exists():
                now = json.loads((spec.folder / "progress.json").read_text())["running"]
                seen.append({(row["trial"], row["run"]): row["step"] for row in now})
            return super()._poll(timeout)

    list(run(spec, Scores(), Watched(1, seed=1)))
    assert [rows[0, "scoring"] for rows in seen if (0, "scoring") in rows][:2] == [0, 1]
    assert not any((0, "scoring") in rows and (1, "scoring") in rows for rows in seen)


def test_a_score_may_be_a_constraint_alone(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", "tpe", constraints=["mmlu >= 0.3", "peak_memory_gib < 1"], trials=24)
    scores = Scores()
    list(run(spec, scores))
    record, study = read(spec.folder), load(spec)
    assert all(score(t.value or 9.0) >= 0.3 for t in record.finished)
    low = [t for t in record.trials if t.message.startswith("it breaks mmlu >= 0.3")]
    assert record.finished
    assert low
    for trial in low:
        assert trial.state == INFEASIBLE
        assert study.trials[trial.number].constraints["mmlu >= 0.3"] > 0
    heavy = [t for t in record.trials if "peak" in t.message]
    assert heavy
    assert not set(scores.scored) & {t.number for t in heavy}, "what is out already is not scored"


def test_trials_that_a_schedule_stopped_are_not_scored(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", "random", HALVING, objectives=OBJECTIVES, trials=27)
    scores = Scores()
    list(run(spec, scores))
    record = read(spec.folder)
    assert sorted(scores.scored) == [t.number for t in record.finished]
    assert 0 < len(record.finished) < 10
    stopped = [t for t in record.trials if t.state == PRUNED]
    assert stopped
    for trial in stopped:
        assert trial.values[1] in {0.0, *(o.scores["mmlu"] for t in record.finished for o in t.outcomes if o.scores)}
    free = spec_of(tmp_path / "free", "random", HALVING, trials=27)
    list(events(free, Measured(1, seed=1)))
    assert [len(t.outcomes) for t in read(free.folder).trials] == [len(t.outcomes) for t in record.trials], "rungs are ranked by loss"


def study_of(folder: Path, **more: Any) -> StudySpec:
    """Three trials of the embedded model."""
    from loratune import demo

    given = demo.study()
    given["data"] |= {"train_count": 24, "validation_count": 12}
    given |= {
        "objectives": ["validation_loss", "demo_choice"],
        "scoring": {"items": 16},
        "search_space": {"lora_r": [1, 4], "learning_rate": {"low": 1e-3, "high": 3e-2, "log": True}},
        "sampler": "nomad",
        "executor": "inline",
        "budget": {"trials": 3},
        "output": {"folder": str(folder)},
    }
    return StudySpec.load(base=given | more)


def test_a_real_study_of_loss_and_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped in the middle of a scoring, continued, shown, and evaluated on the items that did not guide it."""
    from loratune.cli import main
    from loratune.downstream.results.scores import ResultWriter, read_results
    from loratune.study.driver import tune

    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    spec = study_of(tmp_path / "study")
    keep = ResultWriter.add
    kept: list[str] = []

    def killed_in_the_second(self: ResultWriter, lines: list[dict[str, Any]], seconds: float) -> None:
        for line in lines:  # item by item, as if every batch had one
            if len(kept) == 20:
                raise Broken
            keep(self, [line], seconds / len(lines))
            kept.append(line["id"])

    monkeypatch.setattr(ResultWriter, "add", killed_in_the_second)
    with pytest.raises(Broken):
        list(tune(spec))
    first = read(spec.folder)
    assert [bool(o.scores) for t in first.trials for o in t.outcomes] == [True, False]
    before = (spec.folder / "scoring" / "0001" / "demo_choice.jsonl").read_text()
    assert len(before.splitlines()) == 4
    monkeypatch.setattr(ResultWriter, "add", keep)
    list(tune(spec))
    record = read(spec.folder)
    assert [t.state for t in record.trials] == [COMPLETE] * 3
    assert (spec.folder / "scoring" / "0001" / "demo_choice.jsonl").read_text().startswith(before), "what was answered is not asked again"

    guided = search_items(spec.folder)
    assert len(guided["demo_choice"]) == 16
    assert guided["demo_match"] == guided["demo_choice"], "the same questions in another form"
    for trial in record.trials:
        found = next(r for r in read_results(spec.folder / "scoring") if r.model == f"{trial.number:04d}")
        assert set(found.scores) == guided["demo_choice"]
        assert trial.values[1] == sum(found.scores.values()) / 16
        assert trial.outcomes[-1].scoring_seconds > 0
    assert len({t.values for t in record.trials}) > 1

    monkeypatch.setattr(search_scoring.Scorer, "score", lambda *_: pytest.fail("scored again"))
    list(tune(spec))
    assert outlines(read(spec.folder)) == outlines(record)

    capsys.readouterr()
    assert main(["status", str(spec.folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["front"]
    assert {row["trial"]: row["values"]["demo_choice"] for row in shown} == {t.number: t.values[1] for t in record.front}

    assert main(["evaluate", str(spec.folder), "--benchmarks", "demo_choice", "--top", "1", "--subset", "12"]) == 0
    assert "16 items guided the search and are left out" in capsys.readouterr().out
    reported = read_results(spec.folder / "evaluation")
    assert {len(result.scores) for result in reported} == {12}
    for result in reported:
        assert not set(result.scores) & guided["demo_choice"]


def test_what_cannot_be_scored_is_refused_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scorer(**more: Any) -> search_scoring.Scorer:
        given: dict[str, Any] = {"benchmarks": ("demo_choice",), "subset": 24, "recipe": ModelRecipe(name_or_path="m")}
        job = EvaluationJob(folder=tmp_path / "scoring", models=(), validation=tmp_path, leave_out={}, **{**given, **more})
        return search_scoring.Scorer(job=job)

    with pytest.raises(SpecError, match=r"scoring.items: got 16; demo_code has 30, of which at most half \(15\) may guide the search"):
        scorer(benchmarks=("demo_code",), subset=16).prepare()
    with pytest.raises(EvaluationError, match="demo_code runs programs"):
        scorer(benchmarks=("demo_code",), subset=15).prepare()
    scorer().prepare()
    scorer(subset=20).prepare()  # before the first trial, mending is free
    answers = tmp_path / "scoring" / "0000" / "demo_choice.jsonl"
    answers.parent.mkdir()
    answers.write_text("")
    scorer(subset=20).prepare()
    with pytest.raises(StorageError, match="the items of demo_choice have changed"):
        scorer(subset=24).prepare()
