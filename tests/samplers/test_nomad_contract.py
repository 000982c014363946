"""Optuna's own contract suite over NomadSampler. Left out: SingleOnlySamplerTestCase, for it takes several objectives."""

import functools
from collections.abc import Callable

import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, MultiObjectiveSamplerTestCase, RelativeSamplerTestCase

from loratune.samplers import NomadSampler


class TestNomadContract(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        # The suite wants ten trials of three choices, where NOMAD would rather say that it is done.
        return functools.partial(NomadSampler, seed=1, when_spent="random")


class TestNomadBlockContract(RelativeSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return functools.partial(NomadSampler, seed=1, block_size=3)
