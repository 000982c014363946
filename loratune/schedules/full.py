"""Everyone to the end: each configuration is one full training, as in the published study."""

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
        return Fate.DROPPED if value is None else Fate.COMPLETE
