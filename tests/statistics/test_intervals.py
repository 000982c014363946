"""Intervals against hand-computed values and scipy, and their coverage by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from loratune.statistics import Interval, bootstrap_mean, paired_difference, student_mean, wilson


def coverage(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def test_an_interval_prints_itself() -> None:
    assert f"{Interval(0.41234, 0.4, 0.43):.3f}" == "0.412 [0.400, 0.430]"
    assert "no interval: one value" in str(student_mean([1.0]))


def test_an_unknown_interval_excludes_nothing() -> None:
    assert not Interval(1.0, math.nan, math.nan).excludes(0)
    assert Interval(1.0, 0.5, 1.5).excludes(0)
    assert not Interval(1.0, -0.5, 1.5).excludes(0)


def test_wilson_against_a_published_value() -> None:
    # 15 of 148: Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    found = wilson(15, 148)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0624, 0.1605)
    assert found.value == 15 / 148


def test_wilson_at_the_ends() -> None:
    # p = 0: high = z^2 / (n + z^2)
    z2 = stats.norm.ppf(0.975) ** 2
    assert wilson(0, 20).high == pytest.approx(z2 / (20 + z2))
    assert wilson(0, 20).low == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson(3, 2)


def test_the_bootstrap_agrees_with_the_normal_interval_on_many_items() -> None:
    x = (np.random.default_rng(0).random(5000) < 0.3).astype(float)
    found = bootstrap_mean(x, seed=1)
    half = 1.96 * math.sqrt(x.mean() * (1 - x.mean()) / len(x))
    assert found.value == x.mean()
    assert found.low == pytest.approx(x.mean() - half, abs=0.001)
    assert found.high == pytest.approx(x.mean() + half, abs=0.001)


@pytest.mark.parametrize("n", [8, 12, 60])
def test_the_bootstrap_keeps_its_level_in_small_samples(n: int) -> None:
    rng = np.random.default_rng(n)
    hits = [not bootstrap_mean(rng.normal(1, 2, n), seed, resamples=600).excludes(1) for seed in range(300)]
    assert 0.91 <= coverage(hits) <= 0.985


def test_coverage_of_right_or_wrong_answers() -> None:
    rng = np.random.default_rng(3)
    hits = [not bootstrap_mean(rng.random(40) < 0.15, seed, resamples=600).excludes(0.15) for seed in range(300)]
    assert 0.91 <= coverage(hits) <= 0.99


def test_grouped_means_are_unweighted_and_cover() -> None:
    groups = ["a"] * 5 + ["b"] * 45
    assert bootstrap_mean([1.0] * 5 + [0.0] * 44 + [1.0], 0, groups).value == pytest.approx((1 + 1 / 45) / 2)
    rng = np.random.default_rng(4)
    hits = [
        not bootstrap_mean(np.r_[rng.normal(0, 1, 20), rng.normal(4, 1, 30)], seed, ["a"] * 20 + ["b"] * 30, resamples=600).excludes(2)
        for seed in range(300)
    ]
    assert 0.91 <= coverage(hits) <= 0.985


def test_what_no_resample_can_tell() -> None:
    assert bootstrap_mean([0.0] * 30, 0) == wilson(0, 30)
    assert bootstrap_mean([1.0] * 30, 0) == wilson(30, 30)
    equal = bootstrap_mean([0.5] * 30, 0)
    assert (equal.low, equal.high) == (0.5, 0.5)
    assert "all 30 values are equal" in equal.why
    grouped = bootstrap_mean([0.0, 0.0, 1.0], 0, ["a", "a", "b"])
    assert grouped.value == 0.5
    assert not grouped.known
    assert "within each group" in grouped.why
    assert "differences are equal" in paired_difference([1.0, 0.0], [1.0, 0.0], 0).why


def test_pairing_narrows() -> None:
    rng = np.random.default_rng(5)
    hardness = rng.normal(size=200)
    a, b = hardness + rng.normal(0.1, 0.1, 200), hardness + rng.normal(0, 0.1, 200)
    paired = paired_difference(a, b, 0)
    assert paired.excludes(0)
    assert paired.value == pytest.approx(a.mean() - b.mean())
    alone = bootstrap_mean(a, 0)
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)


@given(arrays(float, st.integers(2, 40), elements=st.floats(-1e6, 1e6)), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_bootstrap_properties(x: np.ndarray, seed: int) -> None:
    found = bootstrap_mean(x, seed, resamples=100)
    assert found == bootstrap_mean(x, seed, resamples=100)
    slack = 1e-9 * (1 + np.abs(x).max())
    if x.min() != x.max():
        assert x.min() - slack <= found.low <= found.high <= x.max() + slack


def test_students_interval_is_scipys() -> None:
    x = [3.0, 1.0, 4.0, 1.0, 5.0]
    low, high = stats.t.interval(0.9, 4, loc=np.mean(x), scale=stats.sem(x))
    found = student_mean(x, level=0.9)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"values\[1\] is not a finite"):
        bootstrap_mean([1.0, math.nan], 0)
    with pytest.raises(ValueError, match="at least one number"):
        student_mean([])
    with pytest.raises(ValueError, match="side by side; got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0], 0)
    with pytest.raises(ValueError, match="1 labels for 2"):
        bootstrap_mean([1.0, 2.0], 0, ["a"])


def test_many_continuous_values_fit_in_memory() -> None:
    found = bootstrap_mean(np.random.default_rng(0).normal(size=14_042), seed=0, resamples=300)
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(14_042), rel=0.2)
