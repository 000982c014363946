"""Minimum, maximum, mean and standard deviation: a row of the published table."""

from dataclasses import dataclass

from numpy.typing import ArrayLike

from loratune.statistics.intervals import finite


@dataclass(frozen=True, kw_only=True)
class Summary:
    """`sd` has the divisor n - 1 and is 0 for a single value."""

    n: int
    min: float
    max: float
    mean: float
    sd: float


def summarise(values: ArrayLike) -> Summary:
    """The summary of `values` (n,). Raises ValueError when it is empty or not finite."""
    x = finite(values, "values")
    sd = float(x.std(ddof=1)) if len(x) > 1 else 0.0
    return Summary(n=len(x), min=float(x.min()), max=float(x.max()), mean=float(x.mean()), sd=sd)
