"""Optuna's own contract suite over NomadSampler.

Left out: MultiObjectiveSamplerTestCase, because the sampler is single-objective; SingleOnlySamplerTestCase
tests that it says so.
"""

import functools
from collections.abc import Callable

import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase

from loratune.samplers import NomadSampler


class TestNomadContract(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        # The suite wants ten trials of three choices, where NOMAD would rather say that it is done.
        return functools.partial(NomadSampler, seed=1, when_spent="random")


class TestNomadBlockContract(RelativeSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return functools.partial(NomadSampler, seed=1, block_size=3)
