"""Optuna's own contract suite over NniTpeSampler.

Left out: MultiObjectiveSamplerTestCase, because NNI's tuner is single-objective; SingleOnlySamplerTestCase
tests that the sampler says so.
"""

import functools
from collections.abc import Callable

import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase

from loratune.samplers import NniTpeSampler

pytest.importorskip("nni", reason="the extra loratune[nni] is not installed")


class TestNniTpeContract(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        # The suite wants ten trials of three choices, where NNI has no more after three.
        return functools.partial(NniTpeSampler, seed=1, when_spent="random")
