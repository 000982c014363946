"""NomadSampler beyond Optuna's contract: its child process, its log, pending results, restarts."""

import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import optuna
import pytest
import surfaces
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from loratune.errors import MissingExtraError, SearchSpentError
from loratune.samplers import NomadSampler

SPACE = surfaces.space()
X0 = surfaces.DEFAULT


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """A random point in place of NOMAD's is an error unless a test expects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def loss(params: dict[str, Any]) -> float:
    return surfaces.SURFACES["gentle"](params, 0)


def evaluate(study: optuna.Study, trials: int, space: Any = SPACE) -> None:
    for _ in range(trials):
        trial = study.ask(space)
        study.tell(trial, loss({**X0, **trial.params}))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def child_pid(sampler: NomadSampler) -> int:
    assert sampler._child is not None
    return sampler._child._process.pid


def test_the_enqueued_default_is_not_evaluated_twice() -> None:
    default = {**X0, "learning_rate": 3e-4}  # 10 ** log10(3e-4) != 3e-4
    study = optuna.create_study(sampler=NomadSampler(search_space=SPACE, x0=default, seed=1))
    study.enqueue_trial(default)
    evaluate(study, 25)
    points = [tuple(trial.params.values()) for trial in study.trials]
    assert len(set(points)) == 25


def test_a_study_with_trials_is_where_nomad_starts() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    evaluate(study, 10)
    study.sampler = NomadSampler(seed=1)
    evaluate(study, 1)
    start = study._storage.get_study_system_attrs(study._study_id)["nomad:0000"]
    assert len(start["x0"]) == 10


def test_while_results_are_pending_a_block_is_handed_out_and_then_nothing() -> None:
    sampler = NomadSampler(search_space=SPACE, x0=[X0, {**X0, "lora_r": 64}, {**X0, "lora_r": 256}], block_size=3, seed=1)
    study = optuna.create_study(sampler=sampler)
    asked = []
    while sampler.ready(study):
        asked.append(study.ask(SPACE))
    assert [trial.params["lora_r"] for trial in asked] == [8, 64, 256]
    with pytest.warns(UserWarning, match="trial 3 .* random"):
        extra = study.ask(SPACE)
    for trial in reversed(asked):
        assert not sampler.ready(study)
        study.tell(trial, loss(trial.params))
    assert sampler.ready(study)  # the extra trial holds up nothing
    study.tell(extra, loss(extra.params))


def test_an_enqueued_trial_needs_no_point() -> None:
    sampler = NomadSampler(search_space=SPACE, x0=X0, seed=1)
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial(X0)
    assert sampler.ready(study)
    first = study.ask(SPACE)
    assert not sampler.ready(study)  # NOMAD wants the same point, which is being evaluated
    study.tell(first, loss(first.params))
    assert sampler.ready(study)


def test_threads() -> None:
    warnings.simplefilter("ignore", UserWarning)
    study = optuna.create_study(sampler=NomadSampler(search_space=SPACE, x0=X0, block_size=2, seed=1))
    study.optimize(lambda trial: loss({name: trial._suggest(name, d) for name, d in SPACE.items()}), n_trials=20, n_jobs=2)
    assert len(study.trials) == 20
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)
    assert sum(trial.system_attrs["nomad"]["slot"] is not None for trial in study.trials) >= 10


def test_every_start_fails_and_the_search_goes_on() -> None:
    study = optuna.create_study(sampler=NomadSampler(search_space=SPACE, x0=X0, seed=1))
    for _ in range(4):
        study.tell(study.ask(SPACE), state=TrialState.FAIL)
    evaluate(study, 10)
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 14


def test_violated_constraints_are_avoided() -> None:
    study = optuna.create_study(sampler=NomadSampler(search_space=SPACE, x0=X0, seed=1))
    for _ in range(40):
        trial = study.ask(SPACE)
        trial.set_constraint("memory", trial.params["lora_r"] / 64 - 1)
        study.tell(trial, loss(trial.params))
    late = [trial.params["lora_r"] for trial in study.trials[20:]]
    assert sum(rank <= 64 for rank in late) > len(late) / 2
    assert max(trial.params["lora_r"] for trial in study.trials) > 64


def test_maximize_is_minimize_of_the_negative() -> None:
    found = []
    for direction, sign in (("minimize", 1.0), ("maximize", -1.0)):
        study = optuna.create_study(direction=direction, sampler=NomadSampler(search_space=SPACE, x0=X0, seed=1))
        for _ in range(15):
            trial = study.ask(SPACE)
            study.tell(trial, sign * loss(trial.params))
        found.append([trial.params for trial in study.trials])
    assert found[0] == found[1]


def test_a_finite_space_is_exhausted_and_says_so() -> None:
    space = {"a": CategoricalDistribution((1, 4)), "b": IntDistribution(0, 4, step=2), "c": FloatDistribution(0, 1, step=0.5)}
    study = optuna.create_study(sampler=NomadSampler(search_space=space, seed=1))
    for _ in range(18):
        trial = study.ask(space)
        study.tell(trial, trial.params["a"] + trial.params["b"] - trial.params["c"])
    with pytest.raises(SearchSpentError, match="all 18 points"):
        study.ask(space)
    finished = study.get_trials(states=(TrialState.COMPLETE,))
    assert len({tuple(trial.params.values()) for trial in finished}) == len(finished) == 18
    with pytest.raises(SearchSpentError):
        study.sampler.ready(study)


def test_without_restart_the_end_of_a_run_is_the_end() -> None:
    study = optuna.create_study(sampler=NomadSampler(search_space=SPACE, x0=X0, seed=1, max_evaluations=5, restart=False))
    with pytest.raises(SearchSpentError, match="evaluations"):
        evaluate(study, 6)


def test_a_new_run_starts_from_the_best_point() -> None:
    study = optuna.create_study(sampler=NomadSampler(search_space=SPACE, x0=X0, seed=1, max_evaluations=8))
    evaluate(study, 12)
    attrs = study._storage.get_study_system_attrs(study._study_id)
    best = min(study.trials[:8], key=lambda trial: trial.value or 0.0)
    assert attrs["nomad:0001"]["x0"][0][0] == surfaces.RANKS.index(best.params["lora_r"])
    assert attrs["nomad:0001"]["seed"] != attrs["nomad:0000"]["seed"]


@pytest.mark.parametrize(
    ("x0", "message"),
    [({"lora_r": 8}, "no value for 'lora_alpha'"), ({**X0, "lora_alpha": 65}, "lora_alpha = 65"), ({**X0, "lora_r": 5}, "lora_r = 5")],
)
def test_a_starting_point_outside_the_space_is_refused(x0: dict[str, Any], message: str) -> None:
    study = optuna.create_study(sampler=NomadSampler(search_space=SPACE, x0=x0, seed=1))
    with pytest.raises(ValueError, match=message):
        study.ask(SPACE)


def test_a_killed_child_is_an_error_and_the_next_one_goes_on() -> None:
    def points(kill: bool) -> list[dict[str, Any]]:
        sampler = NomadSampler(search_space=SPACE, x0=X0, seed=1)
        study = optuna.create_study(sampler=sampler)
        evaluate(study, 6)
        if kill:
            os.kill(child_pid(sampler), signal.SIGKILL)
            with pytest.raises(Exception, match="killed from outside"):
                sampler.ready(study)
        evaluate(study, 6)
        return [trial.params for trial in study.trials]

    assert points(kill=True) == points(kill=False)


def test_ctrl_c_does_not_reach_the_child() -> None:
    sampler = NomadSampler(search_space=SPACE, x0=X0, seed=1)
    study = optuna.create_study(sampler=sampler)
    evaluate(study, 3)
    pid = child_pid(sampler)
    assert os.getpgid(pid) != os.getpgid(0)
    os.kill(pid, signal.SIGINT)
    evaluate(study, 3)
    assert child_pid(sampler) == pid


def test_the_child_ends_with_its_sampler_and_pickles_without_it() -> None:
    sampler = NomadSampler(search_space=SPACE, x0=X0, seed=1)
    study = optuna.create_study(sampler=sampler)
    evaluate(study, 3)
    copied = pickle.loads(pickle.dumps(sampler))
    assert copied._child is None
    pid = child_pid(sampler)
    sampler.close()
    assert not alive(pid)  # not even a zombie
    study.sampler = copied
    evaluate(study, 2)
    pid = child_pid(copied)
    del copied, study, sampler
    assert not alive(pid)


ORPHAN = """
import optuna, sys, time
from loratune.samplers import NomadSampler
study = optuna.create_study(sampler=NomadSampler(seed=1))  # and no `if __name__ == "__main__"`
for _ in range(3):
    study.tell(study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}), 1.0)
print(study.sampler._child._process.pid, flush=True)
time.sleep(60)
"""


def test_kill_9_of_the_process_leaves_no_child() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert alive(child)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while alive(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(child)


def test_without_pynomad_it_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PyNomad", None)  # as if not installed
    with pytest.raises(MissingExtraError, match="NOMAD 4 is not installed"):
        NomadSampler()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(MissingExtraError, match="no wheel for Linux on aarch64"):
        NomadSampler()
