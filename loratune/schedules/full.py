"""Everyone to the end: each configuration is one full training, as in the published study.

A sampler may want a trial shorter (the guard of the bracket search): the study then asks for a complete short run in its place.
"""

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
        return Decision.COMPLETE if result.loss is not None and slice.length == 1 else Decision.DROPPED
