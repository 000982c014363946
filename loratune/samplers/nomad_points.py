"""The search space and the study's trials as NOMAD sees them: points of integers (I) and reals (R) between bounds."""

import contextlib
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution, distribution_to_json
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

from loratune.samplers.base import Space, answer, derived_seed, from_internal, index_of, number_of_values, value_at
from loratune.statistics.pareto import non_dominated

KEY = "nomad"
Point = list[float]  # coordinates as NOMAD sees them
Answer = float | list[float] | None  # value to minimise, or values, when there are several; None: failed
Slot = tuple[int, int, int]  # run, block, index in the block


def told_of(trial: FrozenTrial, directions: Sequence[StudyDirection]) -> Answer:
    """A finished trial's values as NOMAD is told them: None where the trial failed, is infeasible, or a value is infinite.

    Infeasible is failed (an extreme barrier): as a PB constraint, one violation among many points that
    violate nothing sent NOMAD 4.6's quadratic models into sub-searches of minutes.
    """
    told = answer(trial, directions)
    if told is None or told[1] > 0 or not all(map(math.isfinite, told[0])):
        return None
    return list(told[0]) if len(directions) > 1 else told[0][0]


class Code:
    """The search space as NOMAD sees it: integers (I) and reals (R) between bounds, parameters in their given order."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.key = json.dumps({name: json.loads(distribution_to_json(d)) for name, d in space.items()})
        self.counts = [number_of_values(d) for d in space.values()]
        self.types = "".join("R" if count is None else "I" for count in self.counts)
        self.size = None if None in self.counts else int(np.prod([float(c) for c in self.counts if c is not None]))
        bounds = [_bounds(distribution) for distribution in space.values()]
        self.lower: Point = [low for low, _ in bounds]
        self.upper: Point = [high for _, high in bounds]

    def encode(self, params: dict[str, Any]) -> Point:
        """Raises KeyError for a missing parameter, ValueError for a value outside its distribution."""
        return [
            _real(d, params[name]) if count is None else float(index_of(d, params[name]))
            for (name, d), count in zip(self.space.items(), self.counts, strict=True)
        ]

    def encode_checked(self, params: dict[str, Any]) -> Point:
        """`encode` for a user's starting point. Raises ValueError naming the parameter that does not fit."""
        for name, distribution in self.space.items():
            if name not in params:
                raise ValueError(f"NomadSampler: x0 has no value for {name!r}")
            try:
                fits = distribution._contains(distribution.to_internal_repr(params[name]))
            except (ValueError, TypeError):
                fits = False
            if not fits:
                raise ValueError(f"NomadSampler: x0 has {name} = {params[name]!r}, which is not in {distribution}")
        return self.encode(params)

    def contains(self, point: Point) -> bool:
        return all(low <= x <= high for low, x, high in zip(self.lower, point, self.upper, strict=True))

    def decode(self, point: Point) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for (name, d), count, x in zip(self.space.items(), self.counts, point, strict=True):
            if count is not None:
                values[name] = value_at(d, round(x))
            elif isinstance(d, FloatDistribution):
                values[name] = min(max(10.0**x if d.log else x, d.low), d.high)
        return values


def _bounds(distribution: BaseDistribution) -> tuple[float, float]:
    count = number_of_values(distribution)
    if count is not None:
        return 0.0, count - 1.0
    if not isinstance(distribution, FloatDistribution):
        raise TypeError(f"NomadSampler cannot search {distribution}")
    return _real(distribution, distribution.low), _real(distribution, distribution.high)


def _real(distribution: BaseDistribution, value: float) -> float:
    return float(np.log10(value)) if getattr(distribution, "log", False) else float(value)


class Evaluated:
    """The study's trials as points: who evaluates which."""

    def __init__(self, study: Study, space: Space, code: Code) -> None:
        self._code = code
        self._directions = study.directions
        self._trials: list[FrozenTrial] = []
        self._slots: dict[Slot, FrozenTrial] = {}
        points: list[Point] = []
        for trial in study.get_trials(deepcopy=False):
            record = trial.system_attrs.get(KEY)
            if record is not None and record["slot"] is not None:
                self._slots[tuple(record["slot"])] = trial
            params = trial.params
            if not trial.state.is_finished():  # its parameters may not be stored yet
                proposed = from_internal(record["params"], space) if record is not None and record["params"].keys() == space.keys() else {}
                params = {**proposed, **trial.system_attrs.get("fixed_params", {}), **params}
            with contextlib.suppress(KeyError, ValueError, TypeError):  # of another search space
                point = code.encode(params)
                if code.contains(point):
                    points.append(point)
                    self._trials.append(trial)
        self._points = np.array(points).reshape(len(points), len(space))
        # NOMAD's mesh and our logarithms are exact to about 1e-15 of a range; two points this near are one.
        self._near = 1e-12 * (np.array(code.upper) - np.array(code.lower))

    def owner(self, slot: Slot, point: Point) -> FrozenTrial | None:
        """The trial that was asked for this slot, or else the first one at this point."""
        if slot in self._slots:
            return self._slots[slot]
        found = np.flatnonzero(np.all(np.abs(self._points - point) <= self._near, axis=1))
        return self._trials[found[0]] if len(found) else None

    def promising(self) -> list[Point]:
        """Points that did not fail: evaluated or about to be."""
        return [
            point.tolist()
            for point, trial in zip(self._points, self._trials, strict=True)
            if not trial.state.is_finished() or told_of(trial, self._directions) is not None
        ]

    def best(self) -> list[Point]:
        """The feasible point of least loss; of several objectives the points that no other beats, the least first objective first."""
        ranked = []
        for number, trial in enumerate(self._trials):
            told = told_of(trial, self._directions) if trial.state.is_finished() else None
            if told is not None:
                ranked.append((told if isinstance(told, list) else [told], number))
        if not ranked:
            return []
        ranked.sort()
        front = non_dominated([values for values, _ in ranked]) if len(self._directions) > 1 else [True]
        return [self._points[number].tolist() for (_, number), best in zip(ranked, front, strict=False) if best]

    def unseen(self, seed: int, run: int) -> Point | None:
        """A random point that no trial has; None when the finite space is exhausted."""
        rng = np.random.default_rng(derived_seed(seed, run, "unseen"))
        for _ in range(100):
            point = [
                float(rng.uniform(low, high) if kind == "R" else rng.integers(int(low), int(high) + 1))
                for kind, low, high in zip(self._code.types, self._code.lower, self._code.upper, strict=True)
            ]
            if self.owner((-1, -1, -1), point) is None:
                return point
        seen = {tuple(point) for point in self._points.tolist()}
        every = itertools.product(*(range(int(high) + 1) for high in self._code.upper))
        left = (point for point in every if point not in seen) if "R" not in self._code.types else iter(())
        first = next(left, None)
        return None if first is None else [float(x) for x in first]
