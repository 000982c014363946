"""Several objectives at once: which points no other beats."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def non_dominated(points: ArrayLike, maximise: Sequence[bool] | None = None) -> NDArray[np.bool_]:
    """Mask (n,) of the points (n, m) that no other is at least as good as everywhere and better somewhere.

    maximise: per objective; all are minimised by default. Equal points stay together; a point with NaN is never in.
    Raises ValueError for other shapes.
    """
    x = _minimised(points, maximise)
    no_worse = (x[:, None] <= x[None]).all(axis=-1)
    better = (x[:, None] < x[None]).any(axis=-1)
    return np.asarray(~((no_worse & better).any(axis=0) | np.isnan(x).any(axis=1)))


def front_ranks(points: ArrayLike, maximise: Sequence[bool] | None = None) -> NDArray[np.int64]:
    """Each point's front (n,): 0 for those that no other beats, 1 for those that only these beat, and so on.

    Non-dominated sorting (Deb et al., IEEE Transactions on Evolutionary Computation 6, 2002). Points with NaN come last.
    """
    x = _minimised(points, maximise)
    ranks = np.full(len(x), len(x), dtype=np.int64)
    left, rank = np.flatnonzero(~np.isnan(x).any(axis=1)), 0
    while len(left):
        here = non_dominated(x[left])
        ranks[left[here]] = rank
        left, rank = left[~here], rank + 1
    return ranks


def _minimised(points: ArrayLike, maximise: Sequence[bool] | None) -> Floats:
    x = np.asarray(points, dtype=np.float64)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"points: needed: shape (n, objectives); got {x.shape}")
    if maximise is None:
        return x
    if len(maximise) != x.shape[1]:
        raise ValueError(f"maximise: needed: one flag for each of {x.shape[1]} objectives; got {len(maximise)}")
    return np.where(np.asarray(maximise), -x, x)
