"""The line of the bracket search: where the best u lies, by what was run and what was known before.

Near its best u the loss of a full run is taken for a parabola,

    loss(u) = floor + k (u - v)^2 + error,     sd(error) = sqrt(noise^2 + (k (u - v)^2 / 4)^2)

with the vertex v normal by the prior, k lognormal around a third of what tuning gained (nats per squared factor of ten;
`prior.json`, curvature), and the floor unknown. The second part of the error is how far a valley is from a parabola. What
is believed is the posterior on a grid of (v, k), the floor integrated out; so of one run nothing, of two a vertex is known
as well as k is, of three as well as the noise allows (Box and Wilson, 1951, fitted a surface likewise; the prior is what
lets two runs do). From it follow the expected regret of any u, its lowest point, and what is left to find.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from loratune.samplers.prior import Prior

_POINTS = 81  # of v
_REACH = 4.0  # standard deviations of the prior
_CURVATURES = ((0.6, 0.25), (1.0, 0.5), (1.7, 0.25))  # (factor, weight)
_NOISES = ((1.0, 0.9), (6.0, 0.08), (36.0, 0.02))  # likewise: a small problem has been seen at 57 times the published noise
_MISFIT = 0.25  # of a rise


@dataclass(frozen=True)
class Belief:
    """The posterior: (weight, vertex, curvature) of each hypothesis; the weights sum to one."""

    hypotheses: list[tuple[float, float, float]]
    noise: float  # of a full run, expected standard deviation

    @property
    def lowest(self) -> float:
        """The u of the lowest expected loss."""
        return sum(w * k * v for w, v, k in self.hypotheses) / sum(w * k for w, _, k in self.hypotheses)

    def regret(self, u: float) -> float:
        """How far the loss at u is expected to be above the vertex's."""
        return sum(w * k * (u - v) ** 2 for w, v, k in self.hypotheses)

    def regret_quantile(self, u: float, share: float) -> float:
        """The regret that is not exceeded with this probability."""
        passed = 0.0
        for regret, weight in sorted((k * (u - v) ** 2, w) for w, v, k in self.hypotheses):
            passed += weight
            if passed >= share:
                return regret
        return regret


def believe(
    places: Sequence[Sequence[tuple[float, float]]],
    prior: Prior,
    curvature: float,
    noise: float,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Belief:
    """What (u, loss) of full runs say, by their place on the other axes: of one vertex, and a floor at each place.

    An infinite loss, a diverged run, says that the vertex lies lower. bounds: of the vertex.
    """
    finite = [[(u, loss) for u, loss in runs if math.isfinite(loss)] for runs in places]
    seen = [u for runs in finite for u, _ in runs]
    ceiling = min((u for runs, kept in zip(places, finite, strict=True) if kept for u, loss in runs if math.isinf(loss)), default=math.inf)
    reach = _REACH * prior.sd
    low = min([prior.centre - reach, *(u - prior.sd for u in seen)])
    high = max([prior.centre + reach, *(u + prior.sd for u in seen)])
    low, high = (min(max(end, bounds[0]), bounds[1]) for end in (low, min(high, max(ceiling, low))))
    found = []
    for i in range(_POINTS):
        v = low + (high - low) * i / (_POINTS - 1)
        before = -(((v - prior.centre) / prior.sd) ** 2) / 2
        for (steeper, often), (louder, seldom) in itertools.product(_CURVATURES, _NOISES):
            k, log = curvature * steeper, math.log(often * seldom)
            found.append((before + log + sum(_likelihood(runs, v, k, noise * louder) for runs in finite), v, k, louder))
    top = max(log for log, *_ in found)
    weights = [math.exp(log - top) for log, *_ in found]
    total = sum(weights)
    hypotheses = [(weight / total, v, k) for weight, (_, v, k, _) in zip(weights, found, strict=True)]
    return Belief(hypotheses, noise * sum(w * louder for w, (*_, louder) in zip(weights, found, strict=True)) / total)


def _likelihood(runs: Sequence[tuple[float, float]], v: float, k: float, noise: float) -> float:
    """Log of the density of the losses, the floor integrated out: that of their weighted deviations from the parabola."""
    if len(runs) < 2:
        return 0.0  # one says its floor alone
    rises = [k * (u - v) ** 2 for u, _ in runs]
    precisions = [1 / (noise**2 + (_MISFIT * rise) ** 2) for rise in rises]
    above = [loss - rise for (_, loss), rise in zip(runs, rises, strict=True)]
    total = sum(precisions)
    floor = sum(p * a for p, a in zip(precisions, above, strict=True)) / total
    squares = sum(p * (a - floor) ** 2 for p, a in zip(precisions, above, strict=True))
    return (sum(map(math.log, precisions)) - math.log(total) - squares) / 2
