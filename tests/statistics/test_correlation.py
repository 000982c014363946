"""Rank correlations against scipy, their coverage, and the sentences."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from loratune.statistics import kendall, sentence, spearman

RNG = np.random.default_rng(0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=5, max_size=30))
@settings(max_examples=60, deadline=None)
def test_values_are_scipys_with_ties(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, dtype=float).T
    for ours, theirs in ((spearman, stats.spearmanr), (kendall, stats.kendalltau)):
        found = ours(x, y, 0, resamples=50)
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            assert math.isnan(found.value)
            assert "are equal" in found.why
        else:
            assert found.value == pytest.approx(theirs(x, y).statistic, abs=1e-9)
            assert -1 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(("measure", "true"), [(spearman, 6 / math.pi * math.asin(0.3)), (kendall, 2 / math.pi * math.asin(0.6))])
def test_coverage_for_a_bivariate_normal(measure, true: float) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(250):
        x = rng.normal(size=14)
        y = 0.6 * x + 0.8 * rng.normal(size=14)
        hits += not measure(x, y, seed, resamples=300).excludes(true)
    assert 0.9 <= hits / 250 <= 0.99


def test_a_perfect_ranking_of_few_is_no_certainty() -> None:
    x = np.arange(6.0)
    for measure in (spearman, kendall):
        up, down = measure(x, x, 0), measure(x, -x, 0)
        assert (up.value, up.high) == (1, 1)
        assert 0.1 < up.low < 0.95
        assert (down.low, down.high) == (-1, -up.low)
    assert spearman(np.arange(100.0), np.arange(100.0), 0).low > 0.99


def test_degenerate_input_says_why() -> None:
    few = spearman([1.0, 2.0, 3.0], [1.0, 3.0, 2.0], 0)
    assert few.value == pytest.approx(0.5)
    assert not few.known
    assert "3 pairs are too few" in few.why
    assert "second are equal" in kendall([1.0, 2.0], [1.0, 1.0], 0).why
    assert math.isnan(spearman([1.0], [1.0], 0).value)
    with pytest.raises(ValueError, match="got 2 and 1"):
        spearman([1.0, 2.0], [1.0], 0)


def test_the_same_seed_gives_the_same_interval() -> None:
    x, y = RNG.normal(size=(2, 20))
    assert spearman(x, y, 3) == spearman(x, y, 3)
    assert spearman(x, y, 3) != spearman(x, y, 4)


def test_the_sentence_follows_the_data() -> None:
    loss = np.linspace(1, 2, 12)
    noise = np.random.default_rng(2).normal(0, 0.05, 12)
    assert sentence(loss, 1 - loss / 4 + noise / 10, 0, name="MMLU").startswith(
        "A lower validation loss goes with a higher MMLU score (Spearman -"
    )
    assert "goes with a lower BBH" in sentence(loss, loss / 4 + noise / 10, 0, name="BBH")
    assert sentence(loss, noise, 0, name="DROP").startswith("The data cannot tell whether validation loss predicts DROP (Spearman")
    many, unrelated = np.random.default_rng(5).normal(size=(2, 300))
    assert "tells little about MMLU" in sentence(many, unrelated, 0, name="MMLU", resamples=300)


def test_the_sentence_about_nothing() -> None:
    loss = np.linspace(1, 2, 12)
    assert "because all 12 scores are equal" in sentence(loss, [0.25] * 12, 0, name="MMLU")
    assert "because all 12 losses are equal" in sentence([1.0] * 12, loss, 0, name="MMLU")
    assert "3 pairs are too few" in sentence([1.0, 2.0, 3.0], [1.0, 3.0, 2.0], 0, name="MMLU")


def test_a_spread_that_items_explain_is_said() -> None:
    loss, noise = np.linspace(1, 2, 12), np.random.default_rng(2).normal(0, 0.05, 12)
    assert "no more than those of equally good models" in sentence(loss, noise, 0, name="DROP", standard_error=0.05)
    assert "equally good" not in sentence(loss, noise, 0, name="DROP", standard_error=0.01)
