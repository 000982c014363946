"""Building samplers by name: mistakes, laziness, and the view of a study with paused trials."""

import subprocess
import sys
from typing import Any

import optuna
import pytest
import surfaces
from optuna.trial import TrialState

from loratune.errors import SpecError
from loratune.plugs import SAMPLERS
from loratune.samplers import StudyView, build, ordinals


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nomat", {}, "did you mean 'nomad'"),
        ("nomad", {"latin_hyper_cube": 3}, "sampler nomad has no option .* did you mean 'latin_hypercube'"),
        ("nomad", {"latin_hypercube": "ten"}, "latin_hypercube = 'ten' must be int"),
        ("nomad", {"block_size": 0}, "block_size must be at least 1, got 0"),
        ("tpe", {"gamma": 1}, "sampler tpe has no option 'gamma'"),
        ("tpe", {"n_startup_trials": True}, "must be int"),
        ("random", {"n": 1}, "it has none"),
        ("qmc", {"qmc_type": "sobel"}, "sobel"),
    ],
)
def test_mistakes(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build(name, search_space=surfaces.space(), seed=0, options=options)


def test_conditional_spaces_are_refused_where_they_cannot_be_searched() -> None:
    with pytest.raises(SpecError, match="these can: tpe, gp, cmaes, qmc, random, nsga2"):
        build("nomad", search_space=surfaces.space(), seed=0, options={}, conditional=True)


def test_ordinals() -> None:
    assert {name: ordinals(name) for name in SAMPLERS.names if ordinals(name) == "index"}.keys() == {"tpe", "gp", "cmaes", "qmc"}


def test_importing_the_room_imports_no_sampler() -> None:
    program = "import loratune.samplers, sys; print([m for m in ('nni', 'PyNomad', 'torch', 'optuna') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_the_view_shows_paused_and_pruned_trials_as_complete() -> None:
    study = optuna.create_study()
    paused, pruned, silent = study.ask(), study.ask(), study.ask()
    paused.report(3.0, 1)
    paused.report(2.0, 5)
    pruned.report(4.0, 1)
    study.tell(pruned, state=TrialState.PRUNED)
    view = StudyView(study)
    assert [(trial.state, trial.value) for trial in view.trials[:2]] == [(TrialState.COMPLETE, 2.0), (TrialState.COMPLETE, 4.0)]
    assert view._get_trials(states=(TrialState.RUNNING,), use_cache=True)[0].number == silent.number
    assert study.trials[0].state is TrialState.RUNNING
