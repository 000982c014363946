"""A configuration is trained once, whatever the sampler proposes; a space that is used up ends the study; so does a common cause."""

from pathlib import Path
from typing import Any

import pytest
from test_study import Formula, events, outline, spec_of, until_it_ends

from loratune.errors import TrainingError
from loratune.plugs import SAMPLERS
from loratune.record import COMPLETE, FAILED, INFEASIBLE, read
from loratune.spec import StudySpec
from loratune.work import Message, Outcome, Segment, State

TWO = {"lora_r": [4, 8], "learning_rate": 1e-4}
SIX = {"lora_r": [4, 8, 16], "use_rslora": [True, False], "learning_rate": 1e-4}
STEPPED = {"warmup_ratio": {"low": 0.0, "high": 0.3, "step": 0.1, "default": 0.1}, "epochs": {"low": 1, "high": 3, "type": "int"}}
CONDITIONAL = {
    "use_rslora": [False, True],
    "lora_r": [4, 8],
    "loraplus_lr_ratio": {"values": [1.0, 4.0], "when": {"use_rslora": True}},
    "learning_rate": 1e-4,
}


def needs(sampler: str) -> None:
    if sampler == "nni_tpe":
        pytest.importorskip("nni")


def noted(spec: StudySpec, executor: Formula) -> list[str]:
    return [event.text for event in events(spec, executor) if isinstance(event, Message)]


@pytest.mark.parametrize(("space", "size", "first"), [(TWO, 2, True), (SIX, 6, False)], ids=["two", "six"])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS.names if name != "bracket"])  # which stops by itself
def test_a_space_that_is_used_up_ends_the_study(sampler: str, space: dict[str, Any], size: int, first: bool, tmp_path: Path) -> None:
    needs(sampler)
    spec = spec_of(tmp_path / "s", {"name": sampler, "defaults_first": first}, trials=size + 4, search_space=space)
    executor = Formula(1 if first else 2, seed=1)
    last = noted(spec, executor)[-1]
    assert last == f"The search space is used up: all {size} configurations were tried. The study ends after {size} of {size + 4} trials."
    trials = read(spec.folder).trials
    assert len({t.hyperparameters for t in trials}) == len(trials) == len(executor.trained) == size
    assert {t.state for t in trials} == {COMPLETE}


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS.names if name not in ("bracket", "nomad", "nni_tpe")])
def test_parameters_that_are_not_active_make_no_other_configuration(sampler: str, tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", sampler, trials=20, search_space=CONDITIONAL)
    last = noted(spec, Formula(1, seed=1))[-1]
    assert "all 6 configurations were tried" in last
    assert len({t.hyperparameters for t in read(spec.folder).trials}) == 6


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS.names if name != "bracket"])  # which stops by itself
def test_in_most_of_a_space_nothing_is_trained_twice(sampler: str, tmp_path: Path) -> None:
    needs(sampler)
    spec = spec_of(tmp_path / "s", sampler, trials=9, search_space={**STEPPED, "learning_rate": 1e-4})  # of 12
    assert noted(spec, Formula(1, seed=1)) == []
    trials = read(spec.folder).trials
    assert len({t.hyperparameters for t in trials}) == len(trials) == 9


@pytest.mark.parametrize(
    ("sampler", "width"), [("random", 1), ("tpe", 2), ("nsga2", 1), ("nni_tpe", 1), ("nomad", 1), ("qmc", 2), ("cmaes", 1)]
)
def test_killed_at_any_write_the_same_configurations_are_tried(
    sampler: str, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(sampler)
    whole, broken = (spec_of(tmp_path / name, sampler, trials=10, search_space=SIX) for name in ("whole", "broken"))
    list(events(whole, Formula(width, seed=1)))
    until_it_ends(monkeypatch, lambda attempt: list(events(broken, Formula(width, seed=attempt))), between=(2, 6), at_least=3)
    assert outline(read(broken.folder)) == outline(read(whole.folder))


def test_what_failed_is_not_proposed_again(tmp_path: Path) -> None:
    space: dict[str, Any] = {"lora_r": [4, 8, 512], "lora_dropout": [0.0, 0.001], "learning_rate": 1e-4}  # 512 does not fit, 0.001 crashes
    spec = spec_of(tmp_path / "s", "tpe", trials=10, search_space=space)
    assert "all 6 configurations" in noted(spec, Formula(1, seed=1))[-1]
    trials = read(spec.folder).trials
    assert [sum(t.state == state for t in trials) for state in (COMPLETE, FAILED, INFEASIBLE)] == [2, 2, 2]


@pytest.mark.parametrize("fidelity", ["steps", "budget"])
def test_halving_brings_somebody_to_the_end_of_a_space_that_is_used_up(fidelity: str, tmp_path: Path) -> None:
    spec = spec_of(
        tmp_path / "s", {"name": "random", "defaults_first": False}, {"name": "halving", "fidelity": fidelity}, trials=9, search_space=TWO
    )
    assert "all 2 configurations were tried" in noted(spec, Formula(1, seed=1))[-1]
    record = read(spec.folder)
    assert len(record.trials) == 2
    assert record.best is not None


def test_a_larger_budget_goes_on_where_the_space_is_not_used_up(tmp_path: Path) -> None:
    list(events(spec_of(tmp_path / "s", "random", trials=3, search_space=SIX), Formula(1, seed=1)))
    executor = Formula(1, seed=1)
    list(events(spec_of(tmp_path / "s", "random", trials=8, search_space=SIX), executor))
    assert len(executor.trained) == 3


class Hopeless(Formula):
    """Every trial crashes, from the third on for another reason if there is one."""

    def __init__(self, *messages: str) -> None:
        super().__init__(1, seed=1)
        self._messages = messages

    def _answer(self, segment: Segment) -> Outcome:
        self.trained.append(segment.key)
        message = self._messages[min(len(self.trained), len(self._messages)) - 1]
        return Outcome(key=segment.key, state=State.CRASHED, message=message)


def test_a_cause_that_is_the_same_for_all_trials_stops_the_study(tmp_path: Path) -> None:
    spec, executor = spec_of(tmp_path / "s", "random", trials=20), Hopeless("Traceback\nIndexError: index 7 is out of range")
    for attempt in range(2):  # and again on the next start, from the record
        with pytest.raises(TrainingError, match=r"first 3 trials failed for the same reason.*IndexError: index 7 is out of range"):
            list(events(spec, executor))
        assert len(executor.trained) == 3, attempt
    assert all(trial.state == FAILED for trial in read(spec.folder).trials)


def test_different_causes_do_not(tmp_path: Path) -> None:
    spec, executor = spec_of(tmp_path / "s", "random", trials=5), Hopeless("IndexError: 1", "KeyError: 1")
    list(events(spec, executor))
    assert len(executor.trained) == 5
