"""The driver's storage: what is written of a trial at one time is one transaction, and what the driver knows is what is stored."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError
from optuna.trial import FrozenTrial, TrialState

from loratune.record.one_writer import OneWriterStorage, together
from loratune.record.paths import StudyPaths
from loratune.record.storage import open_study
from loratune.system.files import write_atomically

SPACE = {"lr": FloatDistribution(1e-5, 1e-1, log=True), "r": IntDistribution(1, 64), "layers": CategoricalDistribution(["qv", "all"])}
URLS = [None, "j.journal"]


def opened(folder: Path, url: str | None = None) -> optuna.Study:
    place = str(folder / url) if url else None
    if (folder / "study.db").exists() or (url and Path(str(place)).exists()):
        write_atomically(StudyPaths(folder).trial(0).began, "0")  # this folder began it
    return open_study(url=place, folder=folder, name="s", sampler=optuna.samplers.RandomSampler(seed=0))


def plain(trial: FrozenTrial) -> tuple[Any, ...]:
    kept = (trial.number, trial.state, trial.values, sorted(trial.params.items()), sorted(trial.distributions.items(), key=str))
    return (*kept, trial.user_attrs, trial.system_attrs, trial.intermediate_values)


def known(study: optuna.Study) -> list[tuple[Any, ...]]:
    return [plain(trial) for trial in study.get_trials(deepcopy=False)]


def ask_and_tell(study: optuna.Study) -> None:
    with together(study):
        trial = study.ask(SPACE)
        trial.set_user_attr("seen", {"by": (1, 2), 3: None})
    with together(study):
        trial.report(0.5, 3)
        trial.set_constraint("size", -1.0)
        study.tell(trial, 0.25)


@pytest.mark.parametrize("url", URLS)
def test_what_the_driver_knows_is_what_is_stored(url: str | None, tmp_path: Path) -> None:
    study = opened(tmp_path, url)
    study.enqueue_trial({"lr": 1e-3, "r": 8, "layers": "qv"}, user_attrs={"pair": (1, 2)})
    for _ in range(3):
        ask_and_tell(study)
    begun = study.ask(SPACE)  # outside of any block
    begun.report(0.1, 1)
    study._storage.set_study_system_attr(study._study_id, "untuned", [1.5])
    with together(study):
        study.ask(SPACE)
        with together(study):  # a block within a block
            study.tell(begun, state=TrialState.PRUNED)
        study.enqueue_trial({"lr": 1e-2})
    again = opened(tmp_path, url)
    assert known(again) == known(study)
    assert [trial.state.name for trial in again.trials] == ["COMPLETE"] * 3 + ["PRUNED", "RUNNING", "WAITING"]
    assert again._storage.get_study_system_attrs(again._study_id)["untuned"] == [1.5]
    assert again.best_trial.number == study.best_trial.number == 0
    ask_and_tell(again)
    assert known(opened(tmp_path, url)) == known(again)


def test_a_trial_is_two_transactions(tmp_path: Path) -> None:
    study, commits = opened(tmp_path), []
    sqlalchemy.event.listen(study._storage._backend.engine, "commit", commits.append)
    for _ in range(4):
        ask_and_tell(study)
    assert len(commits) == 8


KILLED = """
import os, sys
from pathlib import Path
import optuna
from loratune.record.one_writer import together
sys.path.insert(0, sys.argv[2])
from test_one_writer import SPACE, ask_and_tell, opened
study = opened(Path(sys.argv[1]))
ask_and_tell(study)
with together(study):
    trial = study.ask(SPACE)
with together(study):
    trial.report(0.5, 3)
    study.tell(trial, 0.25)
    study.ask(SPACE)
    os.kill(os.getpid(), 9)
"""


def test_a_kill_within_a_block_leaves_nothing_of_it(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)], check=False, env=dict(os.environ))
    first, second = opened(tmp_path).trials
    assert first.state is TrialState.COMPLETE
    assert second.state is TrialState.RUNNING
    assert sorted(second.params) == sorted(SPACE)
    assert not second.intermediate_values


def test_a_transaction_that_fails_leaves_nothing_of_it(tmp_path: Path) -> None:
    study = opened(tmp_path)
    with together(study):
        trial = study.ask(SPACE)
    study._storage._backend.set_trial_param(1, "other", 1.0, IntDistribution(0, 3))  # as another process might

    def write() -> None:
        with together(study):
            trial.report(0.5, 3)
            trial.suggest_int("other", 0, 3)
            study.tell(trial, 0.25)

    with pytest.raises(sqlalchemy.exc.IntegrityError):
        write()
    stored = opened(tmp_path).trials[0]
    assert stored.state is TrialState.RUNNING
    assert not stored.intermediate_values


def test_a_study_is_made_once_and_another_of_the_storage_is_left_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/several.db"
    other = optuna.create_study(storage=url, study_name="other")
    other.ask(SPACE)
    study = open_study(url=url, folder=tmp_path, name="s", sampler=optuna.samplers.RandomSampler(seed=0))
    ask_and_tell(study)
    assert [found.study_name for found in study._storage.get_all_studies()] == ["s"]
    with pytest.raises(DuplicatedStudyError):
        study._storage.create_new_study(study.directions, "s")
    assert isinstance(study._storage, OneWriterStorage)
    study._storage.delete_study(study._study_id)
    assert optuna.get_all_study_names(url) == ["other"]
