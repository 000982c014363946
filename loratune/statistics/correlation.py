"""Rank correlations with intervals, and the sentence that a careful reader would write about loss and score.

| n | number of pairs | rho | Spearman's: Pearson's of the mid-ranks | tau | Kendall's tau-b, which counts ties |
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from loratune.statistics.intervals import CELLS, Floats, Interval, finite

FEWEST = 5  # pairs below which no rank correlation is given an interval
LITTLE = 0.3  # an interval within -+ this says that the one tells little about the other


def spearman(x: ArrayLike, y: ArrayLike, seed: int, *, level: float = 0.95, resamples: int = 2000) -> Interval:
    """Spearman's rho of the pairs (x, y), each (n,), with its percentile bootstrap interval over pairs.

    Of 400 simulated bivariate normal samples each, n = 8, 12, 30, and rho = 0 to 0.95, the 95 % interval held the true
    value in 92 to 98 %. At rho = -+1 no resample differs; the interval is then that of the next smaller value that n
    pairs can have, by Fisher's z with variance (1 + rho^2 / 2) / (n - 3) (Bonett and Wright, Psychometrika 65, 2000).

    Degenerate input (n < 5, or one side constant) gives NaN and says why. Raises ValueError for unequal lengths and
    values that are not finite.
    """
    n = np.size(x)
    step = 12 / (n * (n**2 - 1)) if n > 1 else 0.0  # one exchange of neighbours
    return _resampled(x, y, _spearman, step, lambda r: (1 + r**2 / 2) / (n - 3), seed, level, resamples)


def kendall(x: ArrayLike, y: ArrayLike, seed: int, *, level: float = 0.95, resamples: int = 2000) -> Interval:
    """Kendall's tau-b of the pairs (x, y), as `spearman`; at -+1 with variance 0.437 / (n - 4) (the same source)."""
    n = np.size(x)
    step = 4 / (n * (n - 1)) if n > 1 else 0.0
    return _resampled(x, y, _kendall, step, lambda _: 0.437 / (n - 4), seed, level, resamples)


def sentence(loss: ArrayLike, score: ArrayLike, seed: int, *, name: str, standard_error: float | None = None, resamples: int = 2000) -> str:
    """What may be said about validation loss (n,) and the downstream score `name` (n,) of n models: one or two sentences.

    standard_error: of one model's score, from the sampling of items. With it a spread of the scores that equal models
    would show as well is said to be just that: chi^2 = sum (score - mean)^2 / standard_error^2 against its 95 % quantile
    with n - 1 degrees. (Models answer the same items, so the test is cautious.)
    """
    rho, tau = (measure(loss, score, seed, resamples=resamples) for measure in (spearman, kendall))
    n = np.size(loss)
    for what, values in (("losses", loss), ("scores", score)):
        if np.ptp(values) == 0:
            return f"Nothing can be said about validation loss and {name}, because all {n} {what} are equal."
    if not rho.known:
        return f"Nothing can be said about validation loss and {name}, because {rho.why}."
    figures = f"Spearman {rho:.2f}, Kendall {tau:.2f} over {n} models"
    if rho.excludes(0):
        better = "higher" if rho.value < 0 else "lower"
        said = f"A lower validation loss goes with a {better} {name} score ({figures})."
    elif max(-rho.low, rho.high) < LITTLE:
        said = f"Validation loss tells little about {name}: if there is a relation it is weak ({figures})."
    else:
        said = f"The data cannot tell whether validation loss predicts {name} ({figures})."
    if standard_error and _equal_models_would(finite(score, "score"), standard_error):
        said += " The scores differ no more than those of equally good models would, for so few items."
    return said


def _equal_models_would(score: Floats, standard_error: float) -> bool:
    spread = float(((score - score.mean()) ** 2).sum()) / standard_error**2
    return spread <= stats.chi2.ppf(0.95, len(score) - 1)


def _resampled(
    x: ArrayLike,
    y: ArrayLike,
    measure: Callable[[Floats, Floats], Floats],
    step: float,
    variance: Callable[[float], float],
    seed: int,
    level: float,
    resamples: int,
) -> Interval:
    a, b = finite(x, "x"), finite(y, "y")
    n = len(a)
    if n != len(b):
        raise ValueError(f"pairs must stand side by side; got {n} and {len(b)} values")
    for side, values in (("first", a), ("second", b)):
        if np.ptp(values) == 0:
            return Interval(math.nan, math.nan, math.nan, level, f"all {n} values of the {side} are equal")
    value = float(np.clip(measure(a[None], b[None])[0], -1, 1))
    if n < FEWEST:
        return Interval(value, math.nan, math.nan, level, f"{n} pairs are too few; at least {FEWEST} are needed")
    if 1 - abs(value) < 1e-12:
        nearest = 1 - step
        far = math.tanh(math.atanh(nearest) - stats.norm.ppf((1 + level) / 2) * math.sqrt(variance(nearest)))
        return Interval(value, *((far, 1.0) if value > 0 else (-1.0, -far)), level)
    rng = np.random.default_rng(seed)
    at_once = max(1, CELLS // n**2)
    found = []
    for done in range(0, resamples, at_once):
        picks = rng.integers(n, size=(min(at_once, resamples - done), n))
        found.append(measure(a[picks], b[picks]))
    kept = np.concatenate(found)
    kept = kept[np.isfinite(kept)]  # a resample in which one side is constant has no correlation
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(min(low, value)), float(max(high, value)), level)


def _spearman(x: Floats, y: Floats) -> Floats:
    """rho of each row: x, y (rows, n) -> (rows,); NaN where a row is constant."""
    a, b = stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1)
    return _cosine(a - a.mean(axis=-1, keepdims=True), b - b.mean(axis=-1, keepdims=True))


def _kendall(x: Floats, y: Floats) -> Floats:
    """tau-b of each row: the cosine between the signs of all pairs' differences, sum sx sy / sqrt(sum sx^2 sum sy^2)."""
    i, j = np.triu_indices(x.shape[-1], 1)
    return _cosine(np.sign(x[:, i] - x[:, j]), np.sign(y[:, i] - y[:, j]))


def _cosine(a: Floats, b: Floats) -> Floats:
    length = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    with np.errstate(invalid="ignore"):
        found: Floats = (a * b).sum(axis=-1) / length
    return found
