"""Makes any Optuna sampler resumable, and shows it paused trials as complete.

`SeededSampler` builds a new sampler for every proposal, seeded by (study seed, trial number). A proposal
is then a function of the study's stored trials and that number, so that a resumed study goes on
exactly as an uninterrupted one.

`StudyView` is what the wrapped sampler is shown. A schedule pauses trials, but Optuna's states are
final, so that a paused trial stays RUNNING in the storage: the view has it COMPLETE with its last
intermediate value (of several objectives, with what `base.SO_FAR` says), and likewise a PRUNED one. A
constraint that only some trials have been told of counts as kept by the others: Optuna's GP refuses gaps.
"""

import contextlib
import copy
import math
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.study._constrained_optimization import _CONSTRAINTS_KEY
from optuna.trial import FrozenTrial, TrialState

from loratune.samplers.base import SO_FAR, Space, derived_seed


class StudyView:
    """A study in which trials that have reported count as complete. Everything but its trials is the study's own."""

    def __init__(self, study: Study) -> None:
        self._study = study

    def __getattr__(self, name: str) -> Any:
        if name == "_study":  # not yet set, while being copied
            raise AttributeError(name)
        return getattr(self._study, name)

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.get_trials()

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        return self._get_trials(deepcopy, states)

    def _get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False) -> list[FrozenTrial]:
        trials = self._study._get_trials(deepcopy=False, use_cache=use_cache)
        trials = _without_gaps([_seen(trial) for trial in trials])
        if states is not None:
            trials = [trial for trial in trials if trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials


def _seen(trial: FrozenTrial) -> FrozenTrial:
    if trial.state not in (TrialState.RUNNING, TrialState.PRUNED):
        return trial
    so_far = trial.system_attrs.get(SO_FAR)
    if so_far is None and not trial.intermediate_values:
        return trial
    values = so_far["values"] if so_far else [trial.intermediate_values[max(trial.intermediate_values)]]
    if any(math.isnan(value) for value in values):
        return trial
    trial = copy.copy(trial)
    trial.state, trial.values = TrialState.COMPLETE, values
    return _constrained(trial, so_far["constraints"]) if so_far else trial


def _without_gaps(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Every complete trial with the same constraints in the same order: Optuna's GP takes them for columns."""
    names = sorted({name for trial in trials for name in trial.constraints})
    if not names:
        return trials
    complete = TrialState.COMPLETE
    return [_constrained(t, {name: t.constraints.get(name, -1.0) for name in names}) if t.state == complete else t for t in trials]


def _constrained(trial: FrozenTrial, constraints: Mapping[str, float]) -> FrozenTrial:
    trial = copy.copy(trial)
    others = {key: value for key, value in trial.system_attrs.items() if not key.startswith(f"{_CONSTRAINTS_KEY}:")}
    trial.system_attrs = {**others, **{f"{_CONSTRAINTS_KEY}:{name}": value for name, value in constraints.items()}}
    return trial


class ViewSampler(BaseSampler):
    """Shows the wrapped sampler a `StudyView` instead of the study."""

    def __init__(self, inner: BaseSampler) -> None:
        self.inner = inner

    def __str__(self) -> str:
        return str(self.inner)

    def ready(self, study: Study) -> bool:
        """Whether the sampler can propose now; a sampler that does not say always can."""
        return not hasattr(self.inner, "ready") or self.inner.ready(_view(study))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Space:
        return self.inner.infer_relative_search_space(_view(study), trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Space) -> dict[str, Any]:
        return self.inner.sample_relative(_view(study), trial, search_space)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        return self.inner.sample_independent(_view(study), trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self.inner.before_trial(_view(study), trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self.inner.after_trial(_view(study), trial, state, values)

    def reseed_rng(self) -> None:
        self.inner.reseed_rng()


class SeededSampler(BaseSampler):
    """Proposes with `factory(seed)`, where the seed depends on (seed, trial number, parameter) alone.

    factory: makes a sampler from a 32-bit seed. What it keeps in memory between trials is lost;
        what it keeps in the storage is not.
    """

    def __init__(self, factory: Callable[[int], BaseSampler], seed: int) -> None:
        self._factory = factory
        self._seed = seed
        self._name = str(factory(seed))
        self._attempt = ""  # of proposals for a trial whose first was refused
        self._local = threading.local()  # the relative sampler between `infer_relative_search_space` and `sample_relative`

    def __str__(self) -> str:
        return f"SeededSampler({self._name})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())

    def _fresh(self, trial: FrozenTrial, purpose: str) -> BaseSampler:
        return self._factory(derived_seed(self._seed, trial.number, purpose + self._attempt))

    @contextlib.contextmanager
    def asked_again(self, attempt: int) -> Iterator[None]:
        """While open, proposals come from other seeds: those of this attempt (1, 2, ...) at the same trial."""
        self._attempt = f" again {attempt}"
        try:
            yield
        finally:
            self._attempt = ""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Space:
        # Some samplers keep what they infer for `sample_relative`.
        self._local.trial_id, self._local.sampler = trial._trial_id, self._fresh(trial, "relative")
        return self._local.sampler.infer_relative_search_space(_view(study), trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Space) -> dict[str, Any]:
        inferred = getattr(self._local, "trial_id", None) == trial._trial_id
        sampler = self._local.sampler if inferred else self._fresh(trial, "relative")
        self._local.trial_id = None
        return sampler.sample_relative(_view(study), trial, search_space)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        # A seed of its own for every parameter: a trial may be resumed with only some of them stored.
        sampler = self._fresh(trial, f"independent {param_name}")
        return sampler.sample_independent(_view(study), trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._fresh(trial, "before").before_trial(_view(study), trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._fresh(trial, "after").after_trial(_view(study), trial, state, values)


def _view(study: Study) -> Any:
    return study if isinstance(study, StudyView) else StudyView(study)
