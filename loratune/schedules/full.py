"""Everyone to the end: each configuration is one full training, as in the published study.

A sampler may want a trial shorter (the guard of the bracket search): the study then asks for a complete short run in its place.
"""

from collections.abc import Sequence

from loratune.schedules.base import Fate, Schedule, Stretch


class FullSchedule(Schedule):
    def __init__(self, *, trials: int) -> None:
        self._trials = trials
        self._started = 0

    def next(self, may_start: bool) -> Stretch | None:
        if not may_start or self._started == self._trials:
            return None
        self._started += 1
        return Stretch(trial=self._started - 1)

    def tell(self, stretch: Stretch, value: float | None, values: Sequence[float] = ()) -> Fate:
        if value is None:
            return Fate.DROPPED
        return Fate.COMPLETE if stretch.length == 1 else Fate.SHORT
