"""The line of the bracket search: where the best u lies, by what was run and what was known before.

Near its best u the loss of a full run is taken for a parabola,

    loss(u) = floor + k (u - v)^2 + error,     sd(error) = sqrt(noise^2 + (k (u - v)^2 / 4)^2)

with the vertex v normal by the prior, k lognormal around a third of what tuning gained (nats per squared factor of ten;
`prior.json`, curvature), and the floor unknown. The second part of the error is how far a valley is from a parabola. What
is believed is the posterior on a grid of (v, k), the floor integrated out; so of one run nothing, of two a vertex is known
as well as k is, of three as well as the noise allows (Box and Wilson, 1951, fitted a surface likewise; the prior is what
lets two runs do). From it follow the expected regret of any u, its lowest point, and what is left to find.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loratune.samplers.prior import Prior

_POINTS = 81  # of v
_REACH = 4.0  # standard deviations of the prior
_CURVATURES = np.array([(0.6, 0.25), (1.0, 0.5), (1.7, 0.25)])  # (factor, weight)
_NOISES = np.array([(1.0, 0.9), (6.0, 0.08), (36.0, 0.02)])  # likewise: a small problem has been seen at 57 times the published noise
_MISFIT = 0.25  # of a rise


@dataclass(frozen=True)
class Belief:
    """The posterior: of each hypothesis its weight, vertex and curvature; the weights sum to one."""

    weights: np.ndarray
    vertices: np.ndarray
    curvatures: np.ndarray
    noise: float  # of a full run, expected standard deviation

    @property
    def lowest(self) -> float:
        """The u of the lowest expected loss."""
        steep = self.weights * self.curvatures
        return float(steep @ self.vertices / steep.sum())

    def regret(self, u: float) -> float:
        """How far the loss at u is expected to be above the vertex's."""
        return float(self.weights @ (self.curvatures * (u - self.vertices) ** 2))

    def regret_quantile(self, u: float, share: float) -> float:
        """The regret that is not exceeded with this probability."""
        regrets = self.curvatures * (u - self.vertices) ** 2
        order = np.argsort(regrets, kind="stable")
        passed = int(np.searchsorted(np.cumsum(self.weights[order]), share))
        return float(regrets[order][min(passed, len(order) - 1)])


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
    v, (steeper, often), (louder, seldom) = np.linspace(low, high, _POINTS)[:, None, None], _CURVATURES.T, _NOISES.T
    k, sd = curvature * steeper[:, None], noise * louder
    log = -(((v - prior.centre) / prior.sd) ** 2) / 2 + np.log(often[:, None] * seldom)
    for runs in finite:
        if len(runs) > 1:  # one says its floor alone
            log = log + _likelihood(np.array(runs), v, k, sd)
    weights = np.exp(log - log.max())
    weights /= weights.sum()
    vertices, curvatures = (np.broadcast_to(values, weights.shape).ravel() for values in (v, k))
    return Belief(weights.ravel(), vertices, curvatures, noise=float((weights * sd).sum()))


def _likelihood(runs: np.ndarray, v: np.ndarray, k: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Log of the density of the losses, the floor integrated out: that of their weighted deviations from the parabola."""
    u, losses = (column[:, None, None, None] for column in runs.T)
    rises = k * (u - v) ** 2
    precisions = 1 / (noise**2 + (_MISFIT * rises) ** 2)
    total = precisions.sum(axis=0)
    above = losses - rises
    floor = (precisions * above).sum(axis=0) / total
    squares = (precisions * (above - floor) ** 2).sum(axis=0)
    return np.asarray((np.log(precisions).sum(axis=0) - np.log(total) - squares) / 2)
