"""Fronts and hypervolumes by hand, and against Optuna's on random points."""

import numpy as np
import pytest
from optuna._hypervolume import compute_hypervolume

from loratune.statistics import front_ranks, hypervolume, non_dominated


def test_a_front_by_hand() -> None:
    points = [[1, 4], [2, 2], [4, 1], [3, 3], [2, 2], [np.nan, 0]]
    assert non_dominated(points).tolist() == [True, True, True, False, True, False]
    assert non_dominated([[1, 1], [2, 2], [1, 3]], maximise=[False, True]).tolist() == [False, False, True]


def test_a_volume_by_hand() -> None:
    assert hypervolume([[1, 4], [2, 2], [4, 1]], [5, 5]) == 4 + 3 * 2 + 1 * 1
    assert hypervolume([[6, 0]], [5, 5]) == 0
    assert hypervolume([[2.0, 3.0]], [0, 5], maximise=[True, False]) == 4.0


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_volumes_are_optunas(objectives: int) -> None:
    points = np.random.default_rng(objectives).random((12, objectives)) * 1.1
    points[3] = points[4]
    inside = points[(points < 1).all(axis=1)]
    assert hypervolume(points, [1.0] * objectives) == pytest.approx(compute_hypervolume(inside, np.ones(objectives)))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="objectives"):
        non_dominated([1.0, 2.0])
    with pytest.raises(ValueError, match="one flag for each of 2"):
        non_dominated([[1.0, 2.0]], maximise=[True])
    with pytest.raises(ValueError, match="reference"):
        hypervolume([[1.0, 2.0]], [1.0])


def test_fronts_behind_fronts() -> None:
    points = [[1, 4], [2, 2], [3, 3], [4, 4], [2, 2], [np.nan, 0]]
    assert front_ranks(points).tolist() == [0, 0, 1, 2, 0, 6]
    assert front_ranks([[1.0, 1.0], [2.0, 1.0]], maximise=[True, False]).tolist() == [1, 0]
