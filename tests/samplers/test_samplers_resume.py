"""For every sampler: the same seed gives the same study, and a sampler rebuilt before every proposal changes nothing.

A rebuilt sampler is what a resumed process has, so that the second says that after a kill at any trial
the next points are those of an uninterrupted study: by induction over the trials.
"""

from pathlib import Path
from typing import Any

import optuna
import pytest
import surfaces
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from loratune.plugs import SAMPLERS
from loratune.samplers import build, ordinals

LENGTH = {"nomad": 30, "nni_tpe": 30, "gp": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "nni_tpe": {"n_startup_jobs": 6},
    "tpe": {"n_startup_trials": 5},
    "gp": {"n_startup_trials": 4},
    "cmaes": {"popsize": 5},
    "nsga2": {"population_size": 5},
}


def history(name: str, *, rebuild: bool, seed: int = 3, workers: int = 1, folder: Path | None = None) -> list[dict[str, Any]]:
    """What a study proposes that meets failures, a pruned, a paused, a diverged and an infeasible trial."""
    if name == "nni_tpe":
        pytest.importorskip("nni", reason="the extra loratune[nni] is not installed")
    kind = ordinals(name)
    space, x0 = surfaces.space(kind), surfaces.default(kind)

    def sampler() -> optuna.samplers.BaseSampler:
        return build(name, search_space=space, seed=seed, options=OPTIONS.get(name, {}), x0=x0, workers=workers)

    storage = JournalStorage(JournalFileBackend(str(folder / "journal.log"))) if folder else None
    study = optuna.create_study(storage=storage, study_name="s", sampler=sampler())
    study.enqueue_trial(x0)
    paused: list[optuna.Trial] = []
    for batch in range(LENGTH.get(name, 20) // workers):
        trials = []
        for _ in range(workers):
            if rebuild:
                study.sampler = sampler()
            if trials and not getattr(study.sampler, "ready", lambda study: True)(study):
                break
            trials.append(study.ask(space))
        for trial in trials:
            loss = surfaces.SURFACES["ridge"](surfaces.values(trial.params, kind), seed)
            event = (batch * workers + trials.index(trial)) % 17
            if event in (2, 9):
                study.tell(trial, state=TrialState.FAIL)
            elif event == 4:
                trial.report(loss + 0.1, 1)
                study.tell(trial, state=TrialState.PRUNED)
            elif event == 5:
                trial.report(loss + 0.05, 1)  # paused: told to the sampler, still running
                paused.append(trial)
            elif event == 6:
                study.tell(trial, float("inf"))
            elif event == 7:
                trial.set_constraint("fits_in_memory", 1.0)
                study.tell(trial, loss)
            else:
                study.tell(trial, loss)
        if batch % 4 == 3 and paused:
            study.tell(paused.pop(), 0.9)  # better than when the sampler heard of it
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("name", SAMPLERS.names)
def test_resumed_at_every_trial_the_study_is_the_same(name: str) -> None:
    uninterrupted = history(name, rebuild=False)
    assert history(name, rebuild=True) == uninterrupted
    assert history(name, rebuild=False, seed=4)[1:] != uninterrupted[1:]


@pytest.mark.parametrize("name", ["nomad", "nni_tpe"])
def test_the_log_survives_a_storage_on_disk(name: str, tmp_path: Path) -> None:
    assert history(name, rebuild=True, folder=tmp_path) == history(name, rebuild=False)


@pytest.mark.parametrize("name", ["nomad", "nni_tpe", "tpe", "qmc"])
def test_parallel_studies_resume_at_every_trial(name: str) -> None:
    uninterrupted = history(name, rebuild=False, workers=3)
    assert history(name, rebuild=True, workers=3) == uninterrupted


@pytest.mark.parametrize("name", SAMPLERS.names)
def test_a_trial_killed_before_its_parameters_were_stored_gets_the_same_ones(name: str) -> None:
    if name == "nni_tpe":
        pytest.importorskip("nni", reason="the extra loratune[nni] is not installed")
    kind = ordinals(name)
    space, x0 = surfaces.space(kind), surfaces.default(kind)

    def proposals(stored: int, uninterrupted: bool) -> dict[str, Any]:
        def sampler() -> optuna.samplers.BaseSampler:
            return build(name, search_space=space, seed=1, options={}, x0=x0)

        study = optuna.create_study(sampler=sampler())
        study.enqueue_trial(x0)
        for _ in range(4):
            trial = study.ask(space)
            study.tell(trial, surfaces.SURFACES["gentle"](surfaces.values(trial.params, kind), 0))
        trial = study.ask()
        for parameter in list(space)[:stored]:
            trial._suggest(parameter, space[parameter])
        if not uninterrupted:
            _ = trial.relative_params  # the sampler has proposed; the parameters are not stored
            study.sampler = sampler()
            trial = optuna.Trial(study, trial._trial_id)
        for parameter, distribution in space.items():
            trial._suggest(parameter, distribution)
        return trial.params

    for stored in range(3):
        assert proposals(stored, uninterrupted=False) == proposals(stored, uninterrupted=True)
