"""Asks a sampler for configurations that no trial of the study has had.

All trials share data order, initialisation and dropout, so a configuration seen before has a known result, whatever that
was: it teaches nothing to train it again. Where the sampler proposes one, it is asked again under other seeds, a few times;
then a random configuration that was not tried takes the trial. What takes the place of the sampler's own proposal is
written beside the trial (Optuna's `fixed_params`) before any parameter is stored, so that a killed study goes on with it.

Configurations are compared as what is trained: the hyperparameters, in which parameters that are not active have no part, and the
length of the run, where the sampler asks for a short one.
"""

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol, cast

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage

from loratune.errors import SearchSpentError
from loratune.samplers.base import derived_seed, number_of_values, value_at
from loratune.samplers.factory import length, ordinals
from loratune.samplers.seeded import SeededSampler
from loratune.spec import StudySpec
from loratune.spec.parameters import Parameter
from loratune.work import Hyperparameters

_RETRIES = 5  # proposals of the sampler beyond its first
_DRAWS = 200  # random configurations, before a finite space is gone through
_Key = tuple[Any, ...]


class Tried(Protocol):
    """A trial, whatever became of it."""

    @property
    def number(self) -> int: ...
    @property
    def hyperparameters(self) -> Hyperparameters: ...


def _key_of(hyperparameters: Hyperparameters) -> _Key:
    """Equal for equal configurations: numbers to 12 digits, since a grid's are not always computed alike."""
    return tuple(float(f"{v:.12g}") if isinstance(v, float) else v for v in dataclasses.astuple(hyperparameters))


class Distinct:
    """Asks for the configurations of the study that `spec` describes."""

    def __init__(self, spec: StudySpec) -> None:
        self._space, self._ordinals = spec.search_space, ordinals(spec.sampler.name)
        self._hyperparameters, self._seed = spec.hyperparameters, spec.seed
        distributions = self._space.distributions(self._ordinals).values()
        self._finite = all(d.single() or number_of_values(d) is not None for d in distributions)
        self._noted = 0  # trials
        self._seen: dict[Fraction, set[_Key]] = {}  # their keys, by the length of their runs
        self._untried_keys = self._keys() if self._finite else iter(())
        self._untried_key = next(self._untried_keys, None)  # no full run had it when it was last looked at

    def used_up(self, trials: Collection[Tried], short: Mapping[int, Fraction] | None = None) -> str:
        """Why there is no configuration left that no full run of these trials has; "" where there is one. Arguments as `suggest`."""
        self._note(trials, short or {})
        seen = self._seen.get(Fraction(1), set())
        while self._untried_key in seen:
            self._untried_key = next(self._untried_keys, None)
        if not self._finite or self._untried_key is not None:
            return ""
        count = len(set(self._keys()))
        all_of = f"all {count} configurations were" if count > 1 else "its only configuration was"
        return f"The search space is used up: {all_of} tried."

    def suggest(
        self, asked: optuna.Trial, trials: Collection[Tried], short: Mapping[int, Fraction] | None = None
    ) -> tuple[optuna.Trial, dict[str, Any]]:
        """The trial that the study was `asked` for and its values, now stored: a configuration that none of these trials has.

        trials: those of earlier calls and, behind them, new ones. short: of trials that had a short run by the sampler's wish, its length.
        """
        self._note(trials, short or {})
        if not asked.params:  # else a start that was killed while it stored them had decided already
            asked = self._decided(asked, self._seen)
        return asked, self._space.suggest(asked, self._ordinals)

    def _note(self, trials: Collection[Tried], short: Mapping[int, Fraction]) -> None:
        for trial in itertools.islice(trials, self._noted, None):
            self._seen.setdefault(short.get(trial.number, Fraction(1)), set()).add(_key_of(trial.hyperparameters))
        self._noted = len(trials)

    def _decided(self, asked: optuna.Trial, by_length: Mapping[Fraction, Collection[_Key]]) -> optuna.Trial:
        """The trial, such that its parameters will be new ones."""
        sampler = asked.study.sampler
        again = _RETRIES if isinstance(sampler, SeededSampler) and not asked._fixed_params else 0
        with contextlib.suppress(SearchSpentError):  # NNI gives up where it drew known points for a while
            for attempt in range(1 + again):
                trial = asked if not attempt else optuna.Trial(asked.study, asked._trial_id)
                values = self._drafted(trial, attempt)
                seen = by_length.get(length(asked.study, asked.number), ())
                if _key_of(self._hyperparameters(values)) not in seen:
                    return asked if not attempt else self._instead(asked, values)
        untried = self._untried(asked.number, by_length.get(Fraction(1), ()))
        return asked if untried is None else self._instead(asked, untried)

    def _drafted(self, trial: optuna.Trial, attempt: int) -> dict[str, Any]:
        """The values that the sampler would give the trial, which are not stored."""
        sampler, draft = trial.study.sampler, copy.copy(trial)
        draft.storage = _WithoutParameters(trial.storage)  # type: ignore[assignment]
        draft._cached_frozen_trial = copy.deepcopy(trial._cached_frozen_trial)
        if attempt:
            with cast(SeededSampler, sampler).asked_again(attempt):
                return self._space.suggest(draft, self._ordinals)
        values = self._space.suggest(draft, self._ordinals)
        trial.relative_search_space, trial._relative_params = draft.relative_search_space, draft._relative_params
        return values

    def _instead(self, asked: optuna.Trial, values: dict[str, Any]) -> optuna.Trial:
        given = self._space.encode(values, self._ordinals)
        asked.storage.set_trial_system_attr(asked._trial_id, "fixed_params", given)
        return optuna.Trial(asked.study, asked._trial_id)

    def _untried(self, number: int, seen: Collection[_Key]) -> dict[str, Any] | None:
        """A random configuration that is not among those `seen`, a function of (study seed, trial number, those); None for none."""
        chance = RandomSampler(seed=derived_seed(self._seed, number, "untried"))
        for _ in range(_DRAWS):
            values = next(self._walk(lambda d: [chance.sample_independent(None, None, "", d)]))  # type: ignore[arg-type]  # unused there
            if _key_of(self._hyperparameters(values)) not in seen:
                return values
        every = self._walk(_values) if self._finite else iter(())
        return next((values for values in every if _key_of(self._hyperparameters(values)) not in seen), None)

    def _keys(self) -> Iterator[_Key]:
        return (_key_of(self._hyperparameters(values)) for values in self._walk(_values))

    def _walk(self, choose: Callable[[BaseDistribution], Iterable[Any]]) -> Iterator[dict[str, Any]]:
        """Real values of the points whose active parameters have the raw values that `choose` names."""

        def further(parameters: Sequence[Parameter], values: dict[str, Any]) -> Iterator[dict[str, Any]]:
            if not parameters:
                yield values
                return
            first, *rest = parameters
            if not first.active(values):
                yield from further(rest, values)
                return
            distribution = first.distribution(self._ordinals)
            for raw in [None] if distribution is None else choose(distribution):
                yield from further(rest, {**values, first.name: first.decode(raw, self._ordinals)})

        return further(list(self._space.parameters.values()), {})


class _WithoutParameters:
    """A storage that takes no parameters of trials; everything else is the storage's own."""

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def set_trial_param(self, *_: Any) -> None:
        pass


def _values(distribution: BaseDistribution) -> Iterator[Any]:
    """All values of a distribution that has a number of them."""
    count = number_of_values(distribution)
    if count is None:
        yield getattr(distribution, "low")  # noqa: B009  # a range of one number
    for index in range(count or 0):
        yield value_at(distribution, index)
