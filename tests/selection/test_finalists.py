"""Who may be the best, given the noise."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from loratune.errors import SpecError
from loratune.selection.finalists import Noise, finalists, noise_from_twins, scaled

KNOWN = Noise(sd=1.0, source="known")


def test_the_margin_of_two_is_that_of_their_difference() -> None:
    # y1 - y2 has sd sqrt 2: c = sqrt(2) z(0.95)
    assert finalists([0.0, 9.0], KNOWN).margin == pytest.approx(math.sqrt(2) * 1.6449, abs=1e-3)


def test_the_best_is_inside_as_often_as_promised() -> None:
    rng = np.random.default_rng(0)
    inside = [0 in finalists(rng.standard_normal(40), KNOWN, most=40).chosen for _ in range(600)]
    assert 0.92 <= sum(inside) / 600 <= 0.975


def test_lowest_first_failed_ones_never_and_at_most_so_many() -> None:
    found = finalists([3.0, math.nan, 0.0, 0.5, math.inf, 99.0, 0.1], KNOWN, most=2)
    assert found.chosen == (2, 6)
    assert found.within == 4
    assert "the 2 lowest race" in str(found)
    with pytest.raises(SpecError, match="no trial has a finite"):
        finalists([math.nan], KNOWN)


def test_twins_tell_the_noise_and_without_them_the_prior_holds() -> None:
    rng = np.random.default_rng(1)
    points = np.repeat(rng.random((60, 3)), 2, axis=0)
    points[1::2, 0] += 1e-4
    losses = np.repeat(rng.normal(size=60), 2) + 0.01 * rng.standard_normal(120)
    found = noise_from_twins(points, losses)
    assert found.sd == pytest.approx(0.01, rel=0.3)
    assert "60 pairs" in found.source
    assert noise_from_twins(points[::2], losses[::2], prior_sd=0.5) == Noise(sd=0.5, source="assumed until the first repeats tell")


def test_the_published_study(shared_data: Path) -> None:
    rows = list(csv.reader((shared_data / "published" / "nomad_llama2_7b_100_evaluations.csv").open()))[1:]
    table = np.array([[float(x) for x in row] for row in rows])
    dropout = np.array([0, 1e-4, 1e-3, 1e-2, 1e-1, 1])[table[:, 1].astype(int) - 1]
    losses = table[:, 4]
    found = noise_from_twins(scaled([table[:, 0], dropout, table[:, 2], table[:, 3]]), losses)
    assert "pairs" in found.source
    assert 0.0001 < found.sd < 0.003
    assert finalists(losses, found).chosen[0] == losses.argmin()
