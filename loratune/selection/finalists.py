"""Which trials become finalists: those whose loss may differ from the best only by noise.

| N | trials | y | their losses | sigma | sd of the noise of one loss, the same seed for all: what remains of it between two trials |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import integrate, optimize, stats

from loratune.errors import SpecError
from loratune.statistics.intervals import finite

PRIOR_SD = 0.001  # nats per token: pairs of the published study that differ by dropout 0 against 1e-4 (arXiv 2312.00949)
FEWEST_PAIRS = 5  # near-twins from which the noise is believed rather than the prior


@dataclass(frozen=True, kw_only=True)
class Noise:
    """sd of one run's loss, and where the figure comes from, in words."""

    sd: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Finalists:
    """`chosen`: indices into the losses, the lowest first. `within`: how many lay inside `margin` before the limit `most`."""

    chosen: tuple[int, ...]
    margin: float
    within: int
    noise: Noise

    def __str__(self) -> str:
        cut = f"; the {len(self.chosen)} lowest race" if self.within > len(self.chosen) else ""
        near = f"{self.within} trial{' lies' if self.within == 1 else 's lie'} within {self.margin:.2g} of the lowest loss"
        return f"{near}, which noise may explain (sd {self.noise.sd:.2g}, {self.noise.source}){cut}."


def finalists(losses: ArrayLike, noise: Noise, *, most: int = 8, error_rate: float = 0.05) -> Finalists:
    """All trials with y <= min y + c sigma, at most `most` of them, the lowest first; failed ones (NaN, inf) never.

    c solves  integral Phi(x + c)^(N-1) phi(x) dx = 1 - error_rate:  then the truly best trial is among those inside the
    margin with that probability, whatever the others' true losses (Gupta's subset selection, Technometrics 7, 1965).
    When more than `most` lie inside, that promise holds for them, not for those that race.
    Raises SpecError when no loss is finite or a setting is out of range.
    """
    if most < 1 or not 0 < error_rate < 0.5 or not noise.sd >= 0:
        raise SpecError(f"needed: most >= 1, 0 < error_rate < 0.5, noise sd >= 0; got {most}, {error_rate}, {noise.sd}")
    y = np.asarray(losses, dtype=float)
    sound = np.flatnonzero(np.isfinite(y))
    if not len(sound):
        raise SpecError("no trial has a finite validation loss: there is nothing to choose from")
    margin = gupta(len(sound), error_rate) * noise.sd
    order = sound[np.argsort(y[sound], kind="stable")]
    within = int((y[order] <= y[order[0]] + margin).sum())
    return Finalists(chosen=tuple(int(n) for n in order[: min(within, most)]), margin=margin, within=within, noise=noise)


def noise_from_twins(points: ArrayLike, losses: ArrayLike, *, closeness: float = 0.01, prior_sd: float = PRIOR_SD) -> Noise:
    """The noise, from trials that differ only by negligible amounts; the prior when there are fewer than five pairs.

    points: (N, d) hyperparameters, each scaled to [0, 1]. Two trials are twins when no coordinate differs by more than
    `closeness`; each trial is in one pair at most, the closest pairs first. sigma = median |y1 - y2| / (0.6745 sqrt 2), which
    a few pairs that do differ hardly move. (Identical points give a difference of exactly 0 under common seeds and would
    tell nothing: they are left out.)
    Raises ValueError unless `points` has a row per loss.
    """
    x, y = np.asarray(points, dtype=float), finite(losses, "losses")
    if x.ndim != 2 or len(x) != len(y):
        raise ValueError(f"points: needed: a row for each of {len(y)} losses; got shape {x.shape}")
    apart = np.abs(x[:, None] - x[None]).max(axis=-1)
    i, j = np.triu_indices(len(y), 1)
    near = np.flatnonzero((apart[i, j] > 0) & (apart[i, j] <= closeness))
    free, apart_by = set(range(len(y))), []
    for n in near[np.argsort(apart[i, j][near], kind="stable")]:
        a, b = int(i[n]), int(j[n])
        if {a, b} <= free:
            free -= {a, b}
            apart_by.append(abs(float(y[a] - y[b])))
    if len(apart_by) < FEWEST_PAIRS:
        return Noise(sd=prior_sd, source="assumed until the first repeats tell")
    return Noise(sd=float(np.median(apart_by)) / (0.6745 * math.sqrt(2)), source=f"from {len(apart_by)} pairs of nearly equal trials")


def scaled(columns: Sequence[ArrayLike]) -> np.ndarray:
    """Columns of numbers to points (N, d) in [0, 1], by each column's range; a constant column becomes 0."""
    x = np.column_stack([np.asarray(column, dtype=float) for column in columns])
    span = np.ptp(x, axis=0)
    found: np.ndarray = (x - x.min(axis=0)) / np.where(span > 0, span, 1)
    return found


@lru_cache(maxsize=256)
def gupta(n: int, error_rate: float) -> float:
    if n < 2:
        return 0.0

    def missed(c: float) -> float:
        inside, _ = integrate.quad(lambda x: stats.norm.pdf(x) * stats.norm.cdf(x + c) ** (n - 1), -8, 8, limit=200)
        return float(inside) - (1 - error_rate)

    return float(optimize.brentq(missed, 0, 20, xtol=1e-6))
