"""Fronts by hand."""

import numpy as np
import pytest

from loratune.statistics import front_ranks, non_dominated


def test_a_front_by_hand() -> None:
    points = [[1, 4], [2, 2], [4, 1], [3, 3], [2, 2], [np.nan, 0]]
    assert non_dominated(points).tolist() == [True, True, True, False, True, False]
    assert non_dominated([[1, 1], [2, 2], [1, 3]], maximise=[False, True]).tolist() == [False, False, True]


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="objectives"):
        non_dominated([1.0, 2.0])
    with pytest.raises(ValueError, match="one flag for each of 2"):
        non_dominated([[1.0, 2.0]], maximise=[True])


def test_fronts_behind_fronts() -> None:
    points = [[1, 4], [2, 2], [3, 3], [4, 4], [2, 2], [np.nan, 0]]
    assert front_ranks(points).tolist() == [0, 0, 1, 2, 0, 6]
    assert front_ranks([[1.0, 1.0], [2.0, 1.0]], maximise=[True, False]).tolist() == [1, 0]
