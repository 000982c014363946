"""What the winner's loss really is: the lowest of many noisy values is too low, and by how much is learnt from other data.

Choosing i = argmin of noisy values picks luck as well as merit: E[min_i y_i] <= min_i mu_i, with equality only without
noise (the "optimizer's curse", Smith and Winkler, Management Science 52, 2006). Data that took no part in the choice are
free of it. Three kinds, the first preferred:
- `from_fresh_seeds`: repeats of the winner that were run after it was chosen;
- `from_held_out`: a part of the validation items on which nothing was chosen (removes the luck of items, not of seeds);
- `from_cross_fit`: no data left over: choose on all repeats but one, tell on that one, each repeat in turn.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from loratune.statistics import Interval, bootstrap_mean, student_mean
from loratune.statistics.intervals import Floats, finite


@dataclass(frozen=True, kw_only=True)
class Honest:
    """`raw`: the value by which the winner was chosen. `loss`: what it really is, with its interval."""

    raw: float
    loss: Interval
    source: str

    @property
    def optimism(self) -> float:
        """How much too low the raw value is thought to be; negative when it happens to be too high."""
        return self.loss.value - self.raw

    def __str__(self) -> str:
        way = "low" if self.optimism >= 0 else "high"
        return f"Loss {self.loss:.5f} {self.source}; {self.raw:.5f}, by which it was chosen, is {abs(self.optimism):.2g} too {way}."


def from_fresh_seeds(raw: float, fresh: ArrayLike, *, level: float = 0.95) -> Honest:
    """raw: the value chosen by. fresh: (n,) losses of the winner with seeds run after the choice. Student's interval."""
    loss = student_mean(fresh, level=level)
    return Honest(raw=float(raw), loss=loss, source=f"with {np.size(fresh)} seeds run after the choice")


def from_held_out(chosen_by: ArrayLike, nll: ArrayLike, tokens: ArrayLike, seed: int, *, level: float = 0.95) -> tuple[int, Honest]:
    """The winner's place, and its loss on held-out items.

    chosen_by: (K,) losses on the items that choose. nll: (K, items) summed negative log-likelihoods on the held-out items,
    tokens: (items,) their response tokens. The loss is sum nll / sum tokens; its bootstrap over items takes the linearised
    values  L + (nll - L tokens) / mean(tokens),  whose mean is L (the ratio estimator, Cochran, Sampling Techniques, 6.4).
    Raises ValueError when the shapes do not fit.
    """
    raw, length = finite(chosen_by, "chosen_by"), finite(tokens, "tokens")
    sums = np.asarray(nll, dtype=float)
    if sums.shape != (len(raw), len(length)):
        raise ValueError(f"nll: needed is shape {(len(raw), len(length))}; got {sums.shape}")
    winner = int(raw.argmin())
    loss = sums[winner].sum() / length.sum()
    told = bootstrap_mean(loss + (sums[winner] - loss * length) / length.mean(), seed, level=level)
    return winner, Honest(raw=float(raw[winner]), loss=told, source=f"on {len(length)} validation items that chose nothing")


def from_cross_fit(losses: ArrayLike, *, level: float = 0.95) -> Honest:
    """losses: (K, R) of K candidates in the same R >= 2 repeats.

    For each repeat r: w(r) = argmin_i of the mean over the other repeats, and y[w(r), r] is told. Each is unbiased for its
    w(r); their mean is so for the choice by R - 1 repeats, never lower than the best. Student's interval over repeats.
    """
    table = np.asarray(losses, dtype=float)
    if table.ndim != 2 or table.shape[1] < 2 or not np.isfinite(table).all():
        raise ValueError(f"losses: needed are finite numbers of shape (candidates, repeats >= 2); got shape {table.shape}")
    total = table.sum(axis=1)
    told = [float(column[int((total - column).argmin())]) for column in table.T]
    return Honest(raw=float(table.mean(axis=1).min()), loss=student_mean(told, level=level), source="by cross-fitting over repeats")


def expected_optimism(noise_sd: float, n: int) -> float:
    """E[min mu - min y] for n equally good candidates with Gaussian noise: noise_sd * E[max of n standard normals].

    The most that picking the minimum can cost on average; 2.5 sd for n = 100. By numerical integration.
    """
    x: Floats = np.linspace(-9, 9, 4001)
    return float(noise_sd * np.trapezoid(x * n * stats.norm.pdf(x) * stats.norm.cdf(x) ** (n - 1), x))
