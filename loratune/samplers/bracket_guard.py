"""The guard of the bracket search: complete short runs over decades of u, weighed against the prior.

They go from coarse to fine: every second point of a grid, then the neighbours of the best.

Each short run has its own warmup and decay. Their best u, moved by what the optimum falls from a short run to a full one
(`prior.json`, length), is one measurement of the full run's best u; its error is the spread of the short runs that are about
as good, the grid's, and that of the move. The posterior is prior times likelihood. Beyond what it knows the prior is a
Student distribution of three degrees of freedom, since it has been seen to be wrong by two orders of magnitude: near its
centre it counts, far from it the short runs do.
"""

import math
from collections.abc import Sequence

from loratune.samplers.bracket_rule import Options, PlacedRun
from loratune.samplers.prior import Prior, public_findings

_FREEDOM = 3  # degrees of
_DEPTH = 0.05  # short runs within this share of what the best one gained are about as good
_BEYOND = 4  # points by which the grid grows where its best one is its last
_ROUNDING = 1e-9


def missing(guards: Sequence[PlacedRun], centre: float, options: Options) -> list[float]:
    """What is to be run next: every second point of the grid, then the neighbours of the best one, until both were run."""
    points, spacing = grid(centre, options)
    todo = _unseen(points[::2], guards, spacing)
    if todo or any(run.loss is None for run in guards):
        return todo
    best = min(guards, key=lambda run: (run.loss if run.loss is not None else math.inf, run.u))
    reach = (_BEYOND + 0.25) * spacing
    low, high = max(options.low - _ROUNDING, points[0] - reach), min(options.high + _ROUNDING, points[-1] + reach)
    near = [u for u in (best.u - spacing, best.u + spacing) if low <= u <= high]
    return _unseen(near, guards, spacing)


def _unseen(points: Sequence[float], guards: Sequence[PlacedRun], spacing: float) -> list[float]:
    return [u for u in points if not any(abs(u - run.u) < spacing / 4 for run in guards)]


def grid(centre: float, options: Options) -> tuple[list[float], float]:
    """(points, spacing): evenly over the decades around the centre, moved into the bounds."""
    low = max(options.low, centre - options.guard_decades / 2)
    high = min(options.high, low + options.guard_decades)
    low = max(options.low, high - options.guard_decades)
    spacing = (high - low) / max(1, options.guard_points - 1)
    return [low + i * spacing for i in range(options.guard_points if spacing > 0 else 1)], spacing or 1.0


def weighed(prior: Prior, guards: Sequence[PlacedRun], options: Options) -> Prior:
    """The posterior of u, as mean and standard deviation. The prior, where no short run has a finite loss."""
    finite = [(run.u, run.loss) for run in sorted(guards, key=lambda run: run.u) if run.loss is not None and math.isfinite(run.loss)]
    if not finite:
        return prior
    lowest = min(loss for _, loss in finite)
    untuned = options.untuned if options.untuned is not None else finite[0][1]
    softness = max(3 * options.noise, _DEPTH * (untuned - lowest))
    weights = [math.exp((lowest - loss) / softness) for _, loss in finite]
    mean = _mean([u for u, _ in finite], weights)
    _, spacing = grid(prior.centre, options)
    length = public_findings()["length"]
    factor = -math.log10(options.guard_length)
    spread = math.sqrt(
        _mean([(u - mean) ** 2 for u, _ in finite], weights) + spacing**2 / 12 + length["sd_per_factor_3"] ** 2 * factor / math.log10(3)
    )
    return _posterior(prior, mean + length["shift"] * factor, spread)


def _posterior(prior: Prior, centre: float, sd: float) -> Prior:
    reach = 5 * max(prior.sd, sd)
    low, high = min(prior.centre, centre) - reach, max(prior.centre, centre) + reach
    points = [low + (high - low) * i / 2000 for i in range(2001)]
    weights = [_density((u - prior.centre) / prior.sd, prior.outside) * math.exp(-(((u - centre) / sd) ** 2) / 2) for u in points]
    mean = _mean(points, weights)
    return Prior(centre=mean, sd=math.sqrt(_mean([(u - mean) ** 2 for u in points], weights)), outside=prior.outside)


def _density(z: float, heavy: bool) -> float:
    return (1 + z * z / _FREEDOM) ** (-(_FREEDOM + 1) / 2) if heavy else math.exp(-z * z / 2)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
