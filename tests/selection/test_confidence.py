"""How sure a choice is: an interval for every number of seeds, and no share of resamples where seeds are few."""

import math

import numpy as np
import pytest
from scipy import stats

from loratune.selection.confidence import ENOUGH, confidence, gap


def of(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_is_students_over_paired_seeds(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    own, other = list(rng.normal(1, 0.01, seeds)), list(rng.normal(1.02, 0.01, seeds))
    found = gap("trial 5", of(own), of(other))
    assert found is not None
    theirs = stats.ttest_rel(other, own).confidence_interval(0.95)
    assert (found.behind.low, found.behind.high) == pytest.approx((theirs.low, theirs.high))
    assert found.seeds == seeds


def test_only_seeds_of_both_count() -> None:
    found = gap("trial 5", {0: 1.0, 1: 1.1, 2: 1.2}, {0: 1.2, 1: 1.2})
    assert found is not None
    assert (found.seeds, found.behind.value) == (2, pytest.approx(0.15))
    assert gap("trial 5", {0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("own", "other", "says"),
    [
        ([1.0, 1.0], [1.02, 1.03], "Its loss is 0.025 below that of trial 5, the mean over 2 seeds of both, too few to tell them apart"),
        (
            [1.0, 1.0, 1.0],
            [1.02, 1.03, 1.025],
            "Its loss is 0.025 below that of trial 5, the mean over 3 seeds of both (95 % interval 0.013 to",
        ),
        (
            [1.05, 1.04, 1.05],
            [1.0, 1.0, 1.0],
            "Its loss is 0.047 above that of trial 5, the mean over 3 seeds of both (95 % interval 0.032 to",
        ),
        ([1.0], [1.02], "Its loss is 0.02 below that of trial 5, by one seed, which does not tell a difference from noise."),
        ([1.0, 1.0], [1.0, 1.0], "Its loss is 0 below that of trial 5, the mean over 2 seeds of both, too few to tell them apart"),
    ],
)
def test_what_is_said_of_few_seeds(own: list[float], other: list[float], says: str) -> None:
    for share in (1.0, 0.0, 0.5):
        told = confidence(gap("trial 5", of(own), of(other)), share)
        assert told.startswith(says)
        assert "resamples" not in told
        assert "nan" not in told


def test_one_seed_has_the_interval_of_a_noise_from_elsewhere() -> None:
    found = gap("trial 5", {0: 1.0}, {0: 1.02}, noise=(0.01, "assumed until the first repeats tell"))
    assert found is not None
    half = stats.norm.ppf(0.975) * math.sqrt(2) * 0.01
    assert (found.behind.low, found.behind.high) == pytest.approx((0.02 - half, 0.02 + half), rel=1e-5)
    assert str(found).endswith("with a noise of 0.01 (sd, assumed until the first repeats tell), the 95 % interval is −0.0077 to 0.048.")
    worse = gap("trial 5", {0: 1.02}, {0: 1.0}, noise=(0.01, "given"))
    assert str(worse).endswith("the 95 % interval is −0.0077 to 0.048.")  # of how far above


def test_many_seeds_may_tell_their_share() -> None:
    rng = np.random.default_rng(0)
    own, other = rng.normal(1, 0.01, ENOUGH), rng.normal(1.01, 0.01, ENOUGH)
    assert confidence(gap("b", of(list(own)), of(list(other))), 0.93).endswith("The rule picks it in 93% of resamples.")
    assert confidence(None, 1.0) == "No other candidate can be compared with it."
