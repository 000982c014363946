"""What our samplers share: a trial's answer, the values of a distribution, stateless randomness."""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

Space = dict[str, BaseDistribution]


def derived_seed(seed: int, trial_number: int, purpose: str = "") -> int:
    """A 32-bit seed that depends on its arguments only: the same in every process and on every machine."""
    return int(np.random.SeedSequence([seed, trial_number, zlib.crc32(purpose.encode())]).generate_state(1)[0])


def random_value(seed: int, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
    """A random value of one parameter, a function of (seed, trial number, name) alone."""
    sampler = RandomSampler(seed=derived_seed(seed, trial.number, name))
    return sampler.sample_independent(None, trial, name, distribution)  # type: ignore[arg-type]  # the study is unused


def known_search_space(study: Study, given: Space | None) -> Space:
    """`given`, or else what all trials so far have in common; parameters with a single value left out."""
    space = given if given is not None else intersection_search_space(study.get_trials(deepcopy=False), include_pruned=True)
    return {name: distribution for name, distribution in space.items() if not distribution.single()}


SO_FAR = "loratune:so_far"
"""System attribute of a trial of several objectives that is paused: {"values": [...], "constraints": {...}} as of now.

With one objective, a paused trial's latest intermediate value says it; with several, Optuna keeps none.
"""


def answer(trial: FrozenTrial, directions: Sequence[StudyDirection]) -> tuple[tuple[float, ...], float] | None:
    """A finished trial's (values to minimise, constraint violation >= 0), or None where it failed.

    A pruned trial answers with its last intermediate value. The violation is the Euclidean norm of
    the violated constraints, 0 when feasible.
    """
    values = None
    if trial.state == TrialState.COMPLETE:
        values = trial.values
    elif trial.state == TrialState.PRUNED and trial.intermediate_values:
        values = [trial.intermediate_values[max(trial.intermediate_values)]]
    if values is None or any(math.isnan(value) for value in values):
        return None
    violation = math.hypot(*(max(0.0, c) for c in trial.constraints.values()))
    return tuple(-v if d == StudyDirection.MAXIMIZE else v for v, d in zip(values, directions, strict=True)), violation


def to_internal(params: dict[str, Any], space: Space) -> dict[str, float]:
    """Parameter values as JSON numbers, in Optuna's internal representation."""
    return {name: distribution.to_internal_repr(params[name]) for name, distribution in space.items()}


def from_internal(numbers: dict[str, float], space: Space) -> dict[str, Any]:
    return {name: distribution.to_external_repr(numbers[name]) for name, distribution in space.items()}


def number_of_values(distribution: BaseDistribution) -> int | None:
    """How many values a distribution has; None for a continuum."""
    match distribution:
        case CategoricalDistribution():
            return len(distribution.choices)
        case IntDistribution():
            return (distribution.high - distribution.low) // distribution.step + 1
        case FloatDistribution(step=float(step)):
            return round((distribution.high - distribution.low) / step) + 1
    return None


def value_at(distribution: BaseDistribution, index: int) -> Any:
    """The value with this index, counted from 0 in ascending (or the choices') order."""
    match distribution:
        case CategoricalDistribution():
            return distribution.choices[index]
        case IntDistribution():
            return distribution.low + index * distribution.step
        case FloatDistribution(step=float(step)):
            return min(distribution.low + index * step, distribution.high)
    raise TypeError(f"{distribution} has no countable values")


def index_of(distribution: BaseDistribution, value: Any) -> int:
    """The inverse of `value_at`. Raises ValueError for a value that is not among the choices."""
    match distribution:
        case CategoricalDistribution():
            return int(distribution.to_internal_repr(value))
        case IntDistribution() | FloatDistribution(step=float()):
            return round((value - distribution.low) / (distribution.step or 1))
    raise TypeError(f"{distribution} has no countable values")
