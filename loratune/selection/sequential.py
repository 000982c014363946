"""The test behind the race: paired comparisons looked at after every repeat, with one error rate for all of them together.

Model: candidate i's loss in repeat r is  y[i, r] = mu[i] + s[r] + e[i, r],  s[r] what the seed of repeat r does to every
candidate alike, e independent N(0, sigma^2). It cancels in d[r] = y[i, r] - y[j, r], whose mean is mu[i] - mu[j].

| K | candidates | n0 | repeats that every candidate gets | R | repeats at most: the last look | r | repeats so far, n0 <= r <= R |
| SS0 | residual sum of squares of the K x n0 table, (K-1)(n0-1) degrees | P(r) | sum over r repeats of (d - mean d)^2 / 2 |

The noise of the pair (i, j) after r repeats is taken from everyone's first n0 repeats and from the pair's own later ones,
    V = (SS0 - P(n0) + P(r)) / v,    v = (K - 2)(n0 - 1) + (r - 1),
so that (mean d - (mu[i] - mu[j])) / sqrt(2 V / r) is exactly Student's t with v degrees, whoever else has dropped out:
the statistic of a pair uses nothing that depends on another pair's fate. The lower confidence bound is
    L(i, j, r) = mean d - t(p, v) sqrt(2 V / r),    t(p, v) the upper p-quantile.
p is the same for every look, and so small that, for the true best b,
    P(L(b, j, r) > mu[b] - mu[j] for any j, at any look r = n0, ..., R) = error rate.
It is found by simulating the K x R table of noise, which accounts for both correlations: of looks at the same growing data,
and of comparisons with the same best. Only comparisons with the best matter (Hsu, Annals of Statistics 12, 1984), so K - 1
count, not K(K-1)/2. Equal levels at all looks: Pocock, Biometrika 64, 1977. Pooled first-stage variance in sequential
selection: Paulson, Annals of Mathematical Statistics 35, 1964; Kim and Nelson, ACM TOMACS 11, 2001.

Why not a confidence sequence without a last look (Robbins 1970; Howard et al. 2021)? For three to ten repeats it pays for
all the looks after the tenth, and the versions for unknown variance start wide at 2 degrees of freedom.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
DRAWS = 40_000  # simulated tables: the error rate is met to +- 0.001 (one standard error at 0.05)
CELLS = 4_000_000  # numbers simulated at once: 32 MB


@lru_cache(maxsize=64)
def level_per_look(candidates: int, first: int, repeats: int, error_rate: float) -> float:
    """p: the one-sided level of each bound, for K = candidates >= 2, n0 = first >= 2, R = repeats >= first."""
    rng = np.random.default_rng([candidates, first, repeats])  # the same race has the same bounds on every machine
    at_once = max(1, CELLS // (candidates * repeats))
    smallest = []
    for done in range(0, DRAWS, at_once):
        noise = rng.standard_normal((min(at_once, DRAWS - done), candidates, repeats))
        t, degrees = _statistics(noise[:, :1] - noise[:, 1:], _residual_squares(noise[:, :, :first]), candidates, first)
        smallest.append(stats.t.sf(t.max(axis=1), degrees).min(axis=1))  # over the rivals, then over the looks
    return float(np.quantile(np.concatenate(smallest), error_rate))


def lower_bounds(table: Floats, rows: list[int], first: int, repeats: int, error_rate: float) -> Floats:
    """L(i, j, r) of all pairs of `rows` after their r = number of complete columns: shape (len(rows), len(rows)).

    table: (K, R) losses, NaN where not run; the first n0 columns are complete, and so are `rows` up to column r.
    """
    run = table[rows]
    r = int(np.isfinite(run).all(axis=0).sum())
    d = run[:, None, :r] - run[None, :, :r]
    squares = _residual_squares(table[None, :, :first])
    p = level_per_look(len(table), first, repeats, error_rate)
    variance, degrees = _variance(d, squares, len(table), first)
    half = stats.t.isf(p, degrees[-1]) * np.sqrt(2 * variance[..., -1] / r)
    bounds: Floats = d.mean(axis=-1) - half
    return bounds


def _statistics(d: Floats, squares: Floats, candidates: int, first: int) -> tuple[Floats, Floats]:
    """t at every look and its degrees: d (draws, pairs, R) -> (draws, pairs, looks), (looks,)."""
    variance, degrees = _variance(d, squares[:, None], candidates, first)
    r = np.arange(first, d.shape[-1] + 1)
    mean = (np.cumsum(d, axis=-1) / np.arange(1, d.shape[-1] + 1))[..., first - 1 :]
    return mean / np.sqrt(2 * variance / r), degrees


def _variance(d: Floats, squares: Floats, candidates: int, first: int) -> tuple[Floats, Floats]:
    """V at every look and its degrees v: d (..., R) -> (..., looks), (looks,)."""
    n = np.arange(1, d.shape[-1] + 1)
    within = (np.cumsum(d**2, axis=-1) - np.cumsum(d, axis=-1) ** 2 / n) / 2  # P(1), ..., P(R)
    degrees = (candidates - 2) * (first - 1) + (n[first - 1 :] - 1.0)
    total = squares[..., None] - within[..., first - 1, None] + within[..., first - 1 :]
    return np.maximum(total, 0) / degrees, degrees


def _residual_squares(table: Floats) -> Floats:
    """SS0 of each table: (draws, K, n0) -> (draws,)."""
    rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=2, keepdims=True) + table.mean(axis=(1, 2), keepdims=True)
    return (rest**2).sum(axis=(1, 2))
