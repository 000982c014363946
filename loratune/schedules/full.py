"""Everyone to the end: each configuration is one full training, as in the published study."""

from loratune.schedules.base import Decision, Schedule, Slice, SliceResult


class FullSchedule(Schedule):
    def __init__(self, *, trials: int) -> None:
        self._trials = trials
        self._started = 0

    def next(self, may_start: bool) -> Slice | None:
        if not may_start or self._started == self._trials:
            return None
        self._started += 1
        return Slice(trial=self._started - 1)

    def tell(self, slice: Slice, result: SliceResult) -> Decision:
        return Decision.DROPPED if result.loss is None else Decision.COMPLETE
