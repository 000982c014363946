"""The steps of a selection on studies made up of known losses: who is let in, who is out, what takes part in the choice."""

import json
import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratune.errors import SpecError, TrainingError
from loratune.plugs import METRICS, MetricPlug, register
from loratune.record import COMPLETE, StudyRecord, Trial
from loratune.selection import Planned, Selected, SelectionRecord
from loratune.selection import workflow as decide_module
from loratune.selection.candidates import allowed, candidates, noise_of, ranked_trials, rule_of, scores_of, shared_benchmarks
from loratune.selection.finalists import Noise
from loratune.selection.rerun import CHECK, RACE, fresh_seed, run_name
from loratune.work import Hyperparameters, Message, Outcome, State


def trial(number: int, loss: float, *, rank: int = 8, rate: float = 1e-4) -> Trial:
    outcome = Outcome(
        key=f"{number:04d}/main/0000010",
        state=State.COMPLETED,
        validation_loss=loss,
        tokens=1000,
        train_seconds=2.0,
        trainable_parameters=1000 * rank,
        peak_memory_bytes=2**30,
    )
    h = Hyperparameters(lora_r=rank, learning_rate=rate)
    params = {"lora_r": rank, "learning_rate": rate}
    return Trial(number=number, hyperparameters=h, params=params, state=COMPLETE, value=loss, outcomes=(outcome,))


def made_up(folder: Path, losses: list[float], ranks: list[int] | None = None) -> StudyRecord:
    ranks = ranks or [8] * len(losses)
    trials = tuple(trial(n, loss, rank=rank, rate=1e-4 * 1.1**n) for n, (loss, rank) in enumerate(zip(losses, ranks, strict=True)))
    spec = {"seed": 0, "budget": {"trials": len(losses)}, "sampler": {"defaults_first": True}, "output": {"keep_adapters": None}}
    return StudyRecord(folder=folder, name="made up", spec=spec, trials=trials)


class Blackbox:
    """In place of the trainer: true loss + what the seed does to all + the run's own noise. Infinite where told so."""

    def __init__(self, truth: list[float], sd: float, infinite: Iterable[tuple[int, str]] = (), luck: int = 0) -> None:
        self.truth, self.sd, self.infinite, self.luck = truth, sd, set(infinite), luck
        self.asked: list[tuple[int, str]] = []
        self.outcomes: dict[str, Outcome] = {}

    def train(self, wanted: Iterable[tuple[Trial, str]], *, adapters: bool = False) -> Generator[Any, None, list[float]]:
        yield from ()
        losses = []
        for one, run in wanted:
            seed = fresh_seed(0, run)
            own = np.random.default_rng([seed, one.number, self.luck]).standard_normal() * self.sd
            loss = self.truth[one.number] + np.random.default_rng(seed).standard_normal() * 0.01 + own
            losses.append(math.inf if (one.number, run) in self.infinite else float(loss))
            self.asked.append((one.number, run))
        return losses

    def keep_adapters(self, part: str, keep: set[tuple[int, str]]) -> None:
        pass


Selecting = Callable[..., tuple[SelectionRecord, list[str], Blackbox]]


@pytest.fixture
def selecting(tmp_path: Path) -> Selecting:
    """Select from a study of these losses: (the record, the notes, what was trained)."""

    def run(study: StudyRecord, blackbox: Blackbox, **options: Any) -> tuple[SelectionRecord, list[str], Blackbox]:
        settings = {"most": 8, "runs": None, "rerun": True, "require": (), "prefer": None, "tolerance": 0.001} | options
        events = list(decide_module._Selection(study, blackbox, **settings).run())  # type: ignore[arg-type]
        assert isinstance(events[0], Planned)
        assert isinstance(events[-1], Selected)
        assert events[0].most.runs >= len(set(blackbox.asked))
        return events[-1].record, [event.text for event in events if isinstance(event, Message)], blackbox

    return run


def test_more_are_let_in_when_the_noise_turns_out_larger(selecting: Selecting, tmp_path: Path) -> None:
    losses = [2.0, *(1.0 + 0.002 * n for n in range(12))]
    quiet, _, _ = selecting(made_up(tmp_path, losses), Blackbox(losses, sd=1e-5))
    assert len(quiet.candidates) == 4
    assert quiet.chosen == 1
    noisy, notes, blackbox = selecting(made_up(tmp_path, losses), Blackbox(losses, sd=0.05))
    assert len(noisy.candidates) == 8
    assert "So 8 race." in notes[0]
    assert len(blackbox.asked) > len(set(blackbox.asked))  # asked for again, with the same seeds: a trainer has them on disk
    assert noisy.noise.low < 0.05 < noisy.noise.high


def test_the_lucky_one_is_found_out(selecting: Selecting, tmp_path: Path) -> None:
    """Trial 3 was lucky in the study: its fresh seeds are worse than those of trial 1, which is shipped."""
    truth = [1.2, 1.0, 1.05, 1.04, 1.06]
    record, _, _ = selecting(made_up(tmp_path, [1.2, 1.0, 1.05, 0.99, 1.06]), Blackbox(truth, sd=0.002))
    assert (record.lowest, record.chosen) == (3, 1)
    assert record.finalist(3).out
    assert record.unbiased is not None
    assert record.unbiased.gain is not None
    assert record.unbiased.gain.low < 0.2 < record.unbiased.gain.high


def test_who_diverges_with_a_fresh_seed_is_out(selecting: Selecting, tmp_path: Path) -> None:
    losses = [1.5, 1.0, 1.1, 1.2]
    in_race, _, _ = selecting(made_up(tmp_path, losses), Blackbox(losses, 0.001, [(1, run_name(RACE, 1))]))
    assert in_race.chosen == 2
    assert in_race.finalist(1).out == "trial 1 diverged with a fresh seed"
    after, _, _ = selecting(made_up(tmp_path, losses), Blackbox(losses, 0.001, [(1, run_name(CHECK, 2))]))
    assert after.chosen == 2
    assert "Trial 1 was chosen, and diverged with a seed after that; it is out." in after.notes
    default, _, _ = selecting(made_up(tmp_path, losses), Blackbox(losses, 0.001, [(0, run_name(CHECK, 0))]))
    assert default.chosen == 1
    assert default.unbiased is not None
    assert (default.unbiased.gain, default.unbiased.default) == (None, None)
    everyone = [(n, run_name(RACE, 0)) for n in range(4)]
    with pytest.raises(TrainingError, match="all of 4 finalists diverged"):
        selecting(made_up(tmp_path, losses), Blackbox(losses, 0.001, everyone))


def test_a_study_of_an_own_metric_is_chosen_by_it(selecting: Selecting, tmp_path: Path) -> None:
    """The lowest loss is trial 1's, the best metric that of trials 2 and 3, of which the lower loss ships: its own run, as measured."""
    losses, rates = [1.5, 1.0, 1.3, 1.2], [0.2, 0.1, 0.6, 0.6]
    study = made_up(tmp_path, losses)
    trials = tuple(
        replace(t, outcomes=(replace(t.outcomes[0], scores={"rate": rate}),), values=(rate,))
        for t, rate in zip(study.trials, rates, strict=True)
    )
    given = {"objectives": [{"name": "rate", "direction": "maximize"}], "metrics": [{"function": "mine:rate"}]}
    study = replace(study, trials=trials, spec=study.spec | given)
    assert [t.number for t in study.ranking] == [3, 2, 0, 1]
    record, _, blackbox = selecting(study, Blackbox(losses, sd=0.05))
    assert (record.chosen, record.lowest, record.race) == (3, 1, None)
    assert record.metrics == ("rate", "validation_loss", "adapter_mb")
    assert set(blackbox.asked) == {(n, run_name(CHECK, k)) for n in (0, 3) for k in range(3)} | {(3, "main")}  # the last kept no adapter
    assert (record.shipped.run, record.shipped.validation_loss, record.shipped.lowest_of) == ("main", 1.2, 1)
    said = record.explain()
    assert "Ship trial 3. Its rate is 0.6, that of trial 2, the best of the others, 0.6; each was measured once" in said
    assert "rate was measured of the study's own run alone, so that one is handed over" in said
    assert SelectionRecord.from_plain(json.loads(json.dumps(record.to_plain()))).confidence == record.confidence
    by_loss, _, _ = selecting(study, Blackbox(losses, sd=0.01), prefer="loss")
    assert by_loss.chosen == 1
    assert by_loss.race is not None


def test_without_runs_the_losses_are_called_optimistic_and_seeds_of_before_count(selecting: Selecting, tmp_path: Path) -> None:
    losses = [1.5, 1.0, 1.1, 1.2]
    study = made_up(tmp_path, losses)
    record, _, blackbox = selecting(study, Blackbox(losses, sd=0.001), rerun=False)
    assert (record.chosen, record.unbiased, blackbox.asked) == (1, None, [])
    said = record.explain()
    assert "It was chosen as the lowest of 4 losses, so that is optimistic." in said
    assert "Its gain over the default in the study, 0.5000, is of one seed each, without an interval, and optimistic" in said
    (own,) = (record.gap_to(trial) for trial in [2])
    assert own is not None
    assert own.seeds == 1

    def measured(number: int, repeat: int, loss: float) -> None:
        paths = study.paths.finalists.run(number, run_name(CHECK, repeat))
        paths.outcomes.mkdir(parents=True)
        outcome = Outcome(key=f"{number:04d}/{run_name(CHECK, repeat)}/0000010", state=State.COMPLETED, validation_loss=loss)
        (paths.outcomes / "0000010.json").write_text(outcome.to_json())

    measured(0, 0, 1.5)
    measured(1, 0, 1.02)
    measured(0, 1, 1.52)
    one, _, _ = selecting(study, Blackbox(losses, sd=0.001), rerun=False)
    assert one.unbiased is None, "of one seed both have there is no interval"
    measured(1, 1, 1.01)
    two, _, blackbox = selecting(study, Blackbox(losses, sd=0.001), rerun=False)
    assert blackbox.asked == []
    assert two.unbiased is not None
    assert two.unbiased.gain is not None
    assert two.unbiased.gain.value == pytest.approx((0.48 + 0.51) / 2)
    assert two.unbiased.gain.known
    assert two.shipped.run == "main"
    assert "The 2 fresh seeds are those of an earlier selection." in two.notes
    assert "without an interval" not in two.explain()


def test_ties_go_to_the_score_and_then_to_the_smaller(selecting: Selecting, tmp_path: Path) -> None:
    losses = [2.0, 1.0, 1.0, 1.0, 1.0]
    study = made_up(tmp_path, losses, ranks=[8, 64, 32, 4, 16])
    smaller, _, _ = selecting(study, Blackbox(losses, sd=0.01, luck=2), tolerance=0.02)
    means = {finalist.trial: finalist.loss for finalist in smaller.candidates}
    assert smaller.chosen == 3
    assert min(means, key=means.__getitem__) == 4  # which is larger, and ties
    write_scores(tmp_path, {n: [1.0 if item < (90 if n == 2 else 10) else 0.0 for item in range(100)] for n in range(5)})
    better, _, _ = selecting(study, Blackbox(losses, sd=0.01, luck=2), tolerance=0.02)
    assert better.chosen == 2
    assert better.benchmarks == ("mmlu",)
    assert better.metrics == ("validation_loss", "score", "adapter_mb")
    assert better.finalist(2).scores == {"mmlu": pytest.approx(0.9)}


def test_a_rule_without_the_loss_in_front_races_nobody(selecting: Selecting, tmp_path: Path) -> None:
    losses = [2.0, 1.0, 1.1, 1.2]
    record, _, blackbox = selecting(made_up(tmp_path, losses, [8, 64, 16, 4]), Blackbox(losses, 0.001), prefer="adapter_mb,loss")
    assert record.chosen == 3
    assert record.race is None
    assert {run_name(CHECK, n) for n in range(3)} <= {run for _, run in blackbox.asked}
    assert not [run for _, run in blackbox.asked if run.startswith(RACE)]
    weighed, _, _ = selecting(made_up(tmp_path, losses, [8, 64, 16, 4]), Blackbox(losses, 0.001), prefer="loss=1,adapter_mb=0.001")
    assert weighed.chosen == 1


def test_a_metric_of_another_package_goes_through(selecting: Selecting, tmp_path: Path) -> None:
    register(MetricPlug(name="rank_of_trial", make=lambda trial: float(trial.hyperparameters.lora_r), unit="rank"))
    losses = [2.0, 1.0, 1.1, 1.2]
    try:
        chosen, _, _ = selecting(made_up(tmp_path, losses, [8, 64, 4, 16]), Blackbox(losses, 0.001), prefer="rank_of_trial,loss")
    finally:
        METRICS.unregister("rank_of_trial")
    assert (chosen.chosen, chosen.metrics) == (2, ("rank_of_trial", "validation_loss"))


def write_scores(folder: Path, scores: dict[int, list[float]]) -> None:
    for number, values in scores.items():
        own = folder / "evaluation" / f"{number:04d}"
        own.mkdir(parents=True, exist_ok=True)
        (own / "mmlu.json").write_text(json.dumps({"items": len(values)}))
        rows = ({"id": str(n), "group": "", "answer": "", "score": value} for n, value in enumerate(values))
        (own / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_scores_of_the_items_that_all_answered(tmp_path: Path) -> None:
    study = made_up(tmp_path, [1.0, 1.1, 1.2])
    write_scores(tmp_path, {0: [1, 0, 1], 1: [0, 0, 1]})
    scores = scores_of(study)
    assert shared_benchmarks(study.trials[:2], scores) == ["mmlu"]
    assert shared_benchmarks(study.trials, scores) == []
    (tmp_path / "evaluation" / "0001" / "mmlu.json").write_text(json.dumps({"items": 4}))
    assert shared_benchmarks(study.trials[:2], scores_of(study)) == []  # not all of its items are answered yet
    two = candidates(study.trials[:2], {0: [1.0], 1: [1.1]}, scores)
    assert [list(np.asarray(c.scores["mmlu"])) for c in two] == [[1, 0, 1], [0, 0, 1]]
    measured = {"tokens": 1000, "train_seconds": 2.0, "adapter_mb": 0.032, "peak_memory_gib": 1.0, "inference_cost": 8000, "seconds": 2.0}
    assert [c.measured for c in two] == [measured] * 2


def test_the_same_hyperparameters_race_once(tmp_path: Path) -> None:
    study = made_up(tmp_path, [1.2, 1.1, 1.0])
    again = replace(trial(3, 1.0), hyperparameters=study.trials[2].hyperparameters)
    unfinished = replace(trial(4, math.inf))
    assert [t.number for t in ranked_trials(replace(study, trials=(*study.trials, again, unfinished)))] == [2, 1, 0]


@pytest.mark.parametrize(
    ("prefer", "complaint"),
    [
        ("los", "'los' is no metric .* did you mean 'loss'"),
        ("mmlu", "no benchmark that `loratune evaluate` finished here .none did"),
        ("loss,loss", "give different metrics"),
        ("loss=1,adapter_mb", "each with a weight"),
        ("loss=much", "a weight must be a number"),
        ("loss=-1", "weights must be above 0"),
        ("loss=nan", "weights must be above 0"),
    ],
)
def test_rules_that_cannot_be_applied(prefer: str, complaint: str) -> None:
    with pytest.raises(SpecError, match=f"(?s){complaint}"):
        rule_of(prefer, (), [trial(0, 1.0)], {})


def test_a_metric_that_was_not_measured_keeps_no_constraint(tmp_path: Path) -> None:
    study = made_up(tmp_path, [1.0, 1.1])
    with pytest.raises(SpecError, match="score is measured for none"):
        allowed(study.trials, rule_of(None, ["score >= 0.5"], study.trials, {}), {})


def test_noise_of_nearly_equal_trials(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    twins = [trial(2 * n + k, 1 + 0.003 * rng.standard_normal(), rate=10 ** (-5 + 0.1 * n + 0.001 * k)) for n in range(30) for k in (0, 1)]
    assert 0.0015 < noise_of(twins).sd < 0.006
    assert noise_of(twins[:4]) == Noise(sd=0.001, source="assumed until the first repeats tell")


def test_fresh_seeds() -> None:
    seeds = [fresh_seed(study, run_name(part, n)) for study in range(10) for part in (RACE, CHECK) for n in range(10)]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert fresh_seed(7, "main") == 7


def test_settings_out_of_range(selecting: Selecting, tmp_path: Path) -> None:
    study = made_up(tmp_path, [1.0, 1.1, 1.2])
    with pytest.raises(SpecError, match="finalists: got"):
        selecting(study, Blackbox([1.0] * 3, 0.1), most=0)
    with pytest.raises(SpecError, match="tolerance"):
        selecting(study, Blackbox([1.0] * 3, 0.1), tolerance=-1.0)
    with pytest.raises(SpecError, match="no trial that was trained to its end"):
        selecting(made_up(tmp_path, [math.nan]), Blackbox([1.0], 0.1))
