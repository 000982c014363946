"""The TPE tuner of Microsoft's NNI, itself, as an Optuna sampler.

NNI (github.com/microsoft/nni, dormant since 2023) has the tree-structured Parzen estimator that arXiv
2312.00949 compared NOMAD with. It is imported when the first proposal is asked for.

The tuner is deterministic but keeps its state in memory. What it was told before each proposal is
kept on the trial that it was asked for, and a process that has no tuner makes one and tells it
the same again:

    trial "nni_tpe"   {"ask": 7, "space": ..., "told": [[trial number, loss or null], ...], "params": {name: number}}
"""

import importlib
import json
import logging
import math
import sys
import threading
from typing import Any, Literal

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution, distribution_to_json
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from loratune.errors import MissingExtraError, SearchSpentError
from loratune.samplers.base import (
    Space,
    answer,
    from_internal,
    index_of,
    known_search_space,
    number_of_values,
    random_value,
    to_internal,
    value_at,
)

KEY = "nni_tpe"
Told = list[tuple[int, float | None]]  # trial number, loss to minimise; None: failed


class NniTpeSampler(BaseSampler):
    """Proposes with `nni.algorithms.hpo.tpe_tuner.TpeTuner`. Single-objective.

    Each parameter is given to NNI as what makes its values equally likely at first:

    categorical                `choice` of the index
    int, float with a step     `quniform` of the index over [-1/2, n - 1/2]. The published study drew a real
                               and cut its decimals, which never yields the upper bound; rounding over [0, n - 1]
                               would make both bounds half as likely.
    int on a log scale         `qloguniform` over [low - 1/2, high + 1/2]
    float, float on a log scale   `uniform`, `loguniform`. The latter is uniform in ln x, as the published
                               exponent was in log10 x: Parzen windows do not notice the factor.

    Trials that it did not propose (enqueued ones, and those that took the place of a known point) are imported into its
    history. Failed trials are forgotten, as NNI does; pruned ones count with their last intermediate value, and those that
    violate a constraint with an infinite loss. Pending trials are NNI's constant liar's.

    search_space: None takes the intersection of the study's trials, the first of which is then random.
    n_startup_jobs ... constant_liar_type: NNI's `TpeArguments`, with NNI's defaults.
    when_spent: after the last point of a finite space, "raise" SearchSpentError or propose "random" points.

    Raises MissingExtraError when nni is not installed.
    """

    def __init__(
        self,
        *,
        search_space: Space | None = None,
        seed: int | None = None,
        n_startup_jobs: int = 20,
        n_ei_candidates: int = 24,
        linear_forgetting: int = 25,
        prior_weight: float = 1.0,
        gamma: float = 0.25,
        constant_liar_type: Literal["best", "worst", "mean"] = "best",
        when_spent: Literal["raise", "random"] = "raise",
    ) -> None:
        if constant_liar_type not in ("best", "worst", "mean"):
            raise ValueError(f"NniTpeSampler: constant_liar_type must be best, worst or mean, got {constant_liar_type!r}")
        self._space = search_space
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._arguments = {
            "n_startup_jobs": n_startup_jobs,
            "n_ei_candidates": n_ei_candidates,
            "linear_forgetting": linear_forgetting,
            "prior_weight": prior_weight,
            "gamma": gamma,
            "constant_liar_type": constant_liar_type,
        }
        self._when_spent = when_spent
        self._replay: _Replay | None = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_replay": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Space:
        self._raise_error_if_multi_objective(study)
        return known_search_space(study, self._space)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Space) -> dict[str, Any]:
        self._raise_error_if_multi_objective(study)
        if not search_space:
            return {}
        earlier = trial.system_attrs.get(KEY)
        if earlier is not None and earlier["params"].keys() == search_space.keys():  # killed before its parameters were stored
            return from_internal(earlier["params"], search_space)
        with self._lock:
            trials = study.get_trials(deepcopy=False)
            replay = self._replayed(search_space, trials)
            told = [
                (t.number, _loss(t, study))
                for t in trials
                if t.state.is_finished() and t.number not in replay.told and replay.knows_or_can_import(t)
            ]
            self._replay = None  # until the proposal is stored: an interrupted one must be made again
            params = replay.ask(trial.number, told, trials)
            if params is None:
                if self._when_spent == "raise":
                    raise SearchSpentError("The search is over: NNI's TPE has proposed every point of the search space.")
                params = {name: random_value(self._seed, trial, name, d) for name, d in search_space.items()}
            record: dict[str, Any] = {
                "ask": len(replay.asks) - 1,
                "space": replay.key,
                "told": told,
                "params": to_internal(params, search_space),
            }
            study._storage.set_trial_system_attr(trial._trial_id, KEY, record)
            self._replay = replay
            return params

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        self._raise_error_if_multi_objective(study)
        return random_value(self._seed, trial, param_name, param_distribution)

    def _replayed(self, space: Space, trials: list[FrozenTrial]) -> "_Replay":
        """A tuner that has been asked and told exactly what the trials say."""
        key = _key(space)
        asked = [(t.system_attrs[KEY], t.number) for t in trials if t.system_attrs.get(KEY, {}).get("space") == key]
        asks = [
            (number, [(int(n), loss) for n, loss in record["told"]])
            for record, number in sorted(asked, key=lambda pair: (pair[0]["ask"], pair[1]))
        ]
        replay = self._replay
        if replay is None or replay.key != key or replay.asks != asks[: len(replay.asks)]:
            replay = _Replay(space, self._seed, self._arguments)
        for number, told in asks[len(replay.asks) :]:
            replay.ask(number, told, trials)
        return replay


class _Replay:
    """A tuner and all that was said to it: `asks` holds (trial asked for, what was told before)."""

    def __init__(self, space: Space, seed: int, arguments: dict[str, Any]) -> None:
        self._space = space
        self.key = _key(space)
        self.asks: list[tuple[int, Told]] = []
        self.told: set[int] = set()
        self._proposed: set[int] = set()
        self._nni, tuner_module = _import_nni()
        self._tuner = tuner_module.TpeTuner("minimize", seed=seed, tpe_args=arguments)
        self._tuner.update_search_space({name: _as_nni(d) for name, d in space.items()})

    def knows_or_can_import(self, trial: FrozenTrial) -> bool:
        return trial.number in self._proposed or all(
            name in trial.params and d._contains(trial.distributions[name].to_internal_repr(trial.params[name]))
            for name, d in self._space.items()
            if type(trial.distributions.get(name)) is type(d) or name not in trial.params
        )

    def ask(self, number: int, told: Told, trials: list[FrozenTrial]) -> dict[str, Any] | None:
        """Tell, then propose. None when every point of a finite space has been proposed."""
        for told_number, loss in told:
            self._tell(told_number, loss, trials[told_number])
        self.asks.append((number, told))
        try:
            given = self._tuner.generate_parameters(number)
        except self._nni.NoMoreTrialError:
            return None
        self._proposed.add(number)
        return {name: _from_nni(d, given[name]) for name, d in self._space.items()}

    def _tell(self, number: int, loss: float | None, trial: FrozenTrial) -> None:
        self.told.add(number)
        replaced = "fixed_params" in trial.system_attrs  # another point was trained in place of a known one (distinct.py)
        if number in self._proposed and replaced:
            self._tuner.trial_end(number, False)
        if number in self._proposed and not replaced:
            if loss is not None:
                self._tuner.receive_trial_result(number, None, loss)
            self._tuner.trial_end(number, loss is not None)
        elif loss is not None:
            parameter = {name: _to_nni(d, trial.params[name]) for name, d in self._space.items()}
            self._tuner.import_data([{"parameter": parameter, "value": loss}])


def _loss(trial: FrozenTrial, study: Study) -> float | None:
    told = answer(trial, study.directions)
    if told is None:
        return None
    (loss,), violation = told
    return math.inf if violation > 0 else loss


def _key(space: Space) -> str:
    return json.dumps({name: json.loads(distribution_to_json(d)) for name, d in space.items()})


def _as_nni(distribution: BaseDistribution) -> dict[str, Any]:
    match distribution, number_of_values(distribution):
        case FloatDistribution(low=low, high=high, log=log), None:
            return {"_type": "loguniform" if log else "uniform", "_value": [low, high]}
        case IntDistribution(low=low, high=high, log=True), _:
            return {"_type": "qloguniform", "_value": [low - 0.5, high + 0.5, 1]}
        case IntDistribution() | FloatDistribution(), int(count):
            return {"_type": "quniform", "_value": [-0.5, count - 0.5, 1]}
        case _, int(count):
            return {"_type": "choice", "_value": list(range(count))}
    raise TypeError(f"NniTpeSampler cannot search {distribution}")


def _from_nni(distribution: BaseDistribution, given: float) -> Any:
    match distribution, number_of_values(distribution):
        case FloatDistribution(low=low, high=high), None:
            return min(max(float(given), low), high)
        case IntDistribution(low=low, high=high, log=True), _:
            return min(max(round(given), low), high)
        case _, int(count):
            return value_at(distribution, min(max(round(given), 0), count - 1))
    raise TypeError(f"NniTpeSampler cannot search {distribution}")


def _to_nni(distribution: BaseDistribution, value: Any) -> float:
    if number_of_values(distribution) is None or getattr(distribution, "log", False):
        return value
    return index_of(distribution, value)


def _import_nni() -> tuple[Any, Any]:
    """The modules nni and nni.algorithms.hpo.tpe_tuner, without what they print."""
    first = "nni" not in sys.modules
    try:
        nni, tuner = importlib.import_module("nni"), importlib.import_module("nni.algorithms.hpo.tpe_tuner")
    except ImportError as error:
        raise MissingExtraError("NNI", "nni", str(error)) from error
    if first:  # a program that uses NNI for itself keeps its log
        nni.silence_stdout()
        logging.getLogger("nni").setLevel(logging.WARNING)
    return nni, tuner
