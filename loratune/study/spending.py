"""What a study's trials have cost of its budget, in the units that it may be given in."""

import math
from collections.abc import Collection

from loratune.data.order import total_steps
from loratune.record.progress import ProgressTracker
from loratune.record.trials import Trial
from loratune.spec import StudySpec
from loratune.system.formatting import money, plural
from loratune.work import Segment

_ROUNDING = 1e-6  # full runs


class Spending:
    """Counts the full runs' worth of training that was sent, and says when a budget other than the trials' is spent.

    A full run is one at the space's defaults, trained to its end; what a segment is of it is told by the examples it trains on.
    meter: knows the time, and what runs now has cost.
    """

    def __init__(self, spec: StudySpec, examples: int, meter: ProgressTracker) -> None:
        default = spec.hyperparameters(spec.search_space.default_values())
        self._budget, self._meter = spec.budget, meter
        self._full_run = total_steps(examples, default.batch_size, default.epochs) * default.batch_size  # examples
        self.runs = 0.0

    def share(self, segment: Segment) -> float:
        """The segment's training, in full runs."""
        return (segment.stop_step - segment.start_step) * segment.hyperparameters.batch_size / self._full_run

    def sent(self, segment: Segment) -> None:
        self.runs += self.share(segment)

    def limit(self) -> str:
        """Which hard limit is reached, of time or money, so that what runs is paused; "" for none."""
        budget = self._budget
        if self._meter.wall_seconds / 3600 >= (budget.max_hours or math.inf):
            return "The time budget is spent"
        if budget.max_device_hours is not None and self._meter.spent_device_seconds / 3600 >= budget.max_device_hours:
            return "The time budget is spent"
        price = budget.price_per_device_hour or 0.0
        if budget.max_cost is not None and self._meter.spent_device_seconds / 3600 * price >= budget.max_cost:
            return f"The budget of {money(budget.max_cost, budget.currency)} is spent"
        return ""

    def spent(self) -> str:
        """Which budget is spent, so that no further trial begins; "" for none."""
        budget = self._budget
        if reached := self.limit():
            return reached
        if budget.max_tokens is not None and self._meter.tokens >= budget.max_tokens:
            return f"The budget of {budget.max_tokens:,} tokens is spent"
        if budget.full_runs is not None and self.runs >= budget.full_runs - _ROUNDING:
            return f"The budget of {budget.full_runs:g} full runs is spent"
        return ""

    def after(self, trials: Collection[Trial]) -> str:
        """What the study's end says was done."""
        if self._budget.full_runs is None:
            return f"after {len(trials)} of {self._budget.most} trials"
        return f"after {plural(len(trials), 'trial')}, the work of {self.runs:.3g} full runs"
