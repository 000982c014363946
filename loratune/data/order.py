"""The order of training examples and the length of a run: pure functions, no state.

Every engine and the study use these two, so that a trial sees the same examples at the same step
wherever it runs, and after any interruption.
"""

import math

import numpy as np


def order(seed: int, n: int, count: int) -> np.ndarray:
    """Which example stands at each place of a run: successive permutations of range(n), cut to `count`.

    Step s (from 0) of a run with batch size B trains on `order(seed, n, count)[s * B : (s + 1) * B]`.
    A longer order begins with the shorter one, so a run may be lengthened without changing its start.

    Returns int64 [count]. Raises ValueError unless n >= 1 and count >= 0.
    """
    if n < 1 or count < 0:
        raise ValueError(f"order needs n >= 1 and count >= 0, got n = {n}, count = {count}")
    generator = np.random.default_rng(seed)
    passes = max(1, math.ceil(count / n))
    return np.concatenate([generator.permutation(n) for _ in range(passes)])[:count]


def total_steps(n: int, batch_size: int, epochs: float) -> int:
    """Optimiser steps of a run over `n` examples: floor(epochs * n / batch_size), at least 1.

    What does not fill a last batch is not trained on; it is never padded.
    """
    # The small term keeps 0.3 * 1000 / 100 at 3 steps, where floating point says 2.9999999999999996.
    return max(1, math.floor(epochs * n / batch_size + 1e-9))
