"""Optuna's quasi-random sampler, with a trial's place in the sequence given by its number.

Optuna counts in the study's system attributes, so that a process killed between counting and storing
the parameters skips a place. Here trial n has place n, whoever asks and however often.
"""

from typing import Any

from optuna.samplers import QMCSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from loratune.samplers.base import Space


class NumberedQmcSampler(QMCSampler):
    """`QMCSampler` without state. `sequence_seed` scrambles the sequence; `seed` is for parameters outside it."""

    def __init__(
        self,
        *,
        qmc_type: str = "sobol",
        scramble: bool = True,
        search_space: Space | None = None,
        sequence_seed: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            qmc_type=qmc_type,
            scramble=scramble,
            seed=sequence_seed,
            independent_sampler=RandomSampler(seed=seed),
            warn_asynchronous_seeding=False,
            warn_independent_sampling=False,
        )
        self._space = search_space
        self._place = 0

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Space:
        if self._space is not None:  # known from the start, so that parallel first trials are spread as well
            return {name: distribution for name, distribution in self._space.items() if not distribution.single()}
        return super().infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Space) -> dict[str, Any]:
        self._place = trial.number
        return super().sample_relative(study, trial, search_space)

    def _find_sample_id(self, study: Study, search_space: Space) -> int:
        return self._place
