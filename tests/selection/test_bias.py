"""The raw minimum is too low; each correction is not."""

import math

import numpy as np
import pytest

from loratune.selection import expected_optimism, from_cross_fit, from_fresh_seeds, from_held_out
from loratune.statistics import student_mean


def test_expected_optimism_of_two_is_known() -> None:
    # E[max of two standard normals] = 1 / sqrt(pi)
    assert expected_optimism(0.5, 2) == pytest.approx(0.5 / math.sqrt(math.pi), rel=1e-6)


def test_the_raw_minimum_is_biased_and_fresh_seeds_are_not() -> None:
    rng = np.random.default_rng(0)
    raw, honest, covered = [], [], 0
    for _ in range(300):
        observed = 1 + 0.01 * rng.standard_normal(30)
        told = from_fresh_seeds(observed.min(), 1 + 0.01 * rng.standard_normal(4))
        raw.append(told.raw - 1)
        honest.append(told.loss.value - 1)
        covered += not told.loss.excludes(1)
    assert np.mean(raw) == pytest.approx(-expected_optimism(0.01, 30), rel=0.1)
    assert not student_mean(honest, level=0.999).excludes(0)
    assert 0.91 <= covered / 300 <= 0.985


def test_held_out_items_are_unbiased_too() -> None:
    rng = np.random.default_rng(1)
    raw, honest = [], []
    for seed in range(70):
        tokens = rng.integers(1, 20, 80)
        nll = tokens * (2 + rng.standard_normal((10, 80)))
        by = nll[:, :40].sum(axis=1) / tokens[:40].sum()
        winner, told = from_held_out(by, nll[:, 40:], tokens[40:], seed)
        assert winner == by.argmin()
        assert told.loss.value == pytest.approx(nll[winner, 40:].sum() / tokens[40:].sum())
        raw.append(told.raw - 2)
        honest.append(told.loss.value - 2)
    assert student_mean(raw, level=0.999).high < 0
    assert not student_mean(honest, level=0.999).excludes(0)
    with pytest.raises(ValueError, match="needed is shape"):
        from_held_out([1.0, 2.0], [[1.0]], [1.0], 0)


def test_cross_fitting_of_equal_candidates_is_unbiased() -> None:
    rng = np.random.default_rng(2)
    told = [from_cross_fit(rng.standard_normal((8, 5))) for _ in range(400)]
    assert student_mean([one.raw for one in told], level=0.999).high < -0.4
    assert not student_mean([one.loss.value for one in told], level=0.999).excludes(0)
    with pytest.raises(ValueError, match="repeats >= 2"):
        from_cross_fit([[1.0], [2.0]])


def test_it_says_so() -> None:
    assert "run after the choice; 0.90000, by which it was chosen, is 0.1 too low" in str(from_fresh_seeds(0.9, [0.99, 1.0, 1.01]))
