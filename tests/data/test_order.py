"""The order of training examples and the length of a run."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.data.order import order, total_steps


@given(seed=st.integers(0, 99), n=st.integers(1, 40), count=st.integers(0, 200))
def test_every_epoch_is_a_permutation(seed, n, count):
    places = order(seed, n, count)
    assert len(places) == count
    for start in range(0, count - n + 1, n):
        assert sorted(places[start : start + n].tolist()) == list(range(n))
    assert len(set(places[count // n * n :].tolist())) == count % n


@given(seed=st.integers(0, 99), n=st.integers(1, 40), count=st.integers(0, 100), more=st.integers(0, 100))
def test_a_longer_run_begins_like_the_shorter(seed, n, count, more):
    assert np.array_equal(order(seed, n, count + more)[:count], order(seed, n, count))


def test_epochs_and_seeds_differ_and_the_order_is_pinned():
    assert order(0, 5, 10).tolist() == [2, 4, 3, 0, 1, 4, 1, 2, 0, 3]  # a change here changes every study's results
    assert order(1, 100, 100).tolist() != order(0, 100, 100).tolist()
    assert order(0, 5, 1).dtype == np.int64


def test_orders_that_cannot_be():
    for n, count in ((0, 1), (1, -1)):
        with pytest.raises(ValueError, match="order needs"):
            order(0, n, count)


@pytest.mark.parametrize(
    ("n", "batch_size", "epochs", "steps"),
    [
        (53_610, 128, 2.0, 837),
        (100, 8, 1.0, 12),
        (1000, 100, 0.3, 3),
        (10, 1, 0.7, 7),
        (3, 128, 1.0, 1),
        (100, 8, 0.001, 1),
    ],
)
def test_total_steps(n, batch_size, epochs, steps):
    assert total_steps(n, batch_size, epochs) == steps
