"""How sure a choice is, said as an interval: the paired difference of two candidates' losses over the seeds that both ran.

With few seeds no resample says much: two seeds of two candidates leave one degree of freedom, and whatever is drawn from those
residuals picks the same candidate every time, or nearly. Student's interval knows how few they are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from loratune.statistics import Interval, student_mean

ENOUGH = 8  # seeds from which shares of resamples are told (statistics/intervals.py: of fewer values they say too much)
_NORMAL = 1.959964  # its 97.5 % quantile


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How far another candidate's loss is above the chosen one's: `behind`, mean over `seeds` that both ran; below 0 it is lower.

    Its 95 % interval is Student's; of one seed that of a Gaussian noise whose standard deviation is taken from elsewhere, or none.
    """

    other: str
    seeds: int
    behind: Interval

    def __str__(self) -> str:
        way = "below" if self.behind.value >= 0 else "above"
        said = f"Its loss is {abs(self.behind.value):.2g} {way} that of {self.other}"
        low, high = sorted((abs(self.behind.low), abs(self.behind.high)))
        if self.seeds == 1:
            said += ", by one seed, which does not tell a difference from noise"
            return f"{said}{f'; {self.behind.why}, the 95 % interval is {self._range}' if self.behind.known else ''}."
        if self.behind.excludes(0):
            return f"{said}, the mean over {self.seeds} seeds of both (95 % interval {low:.2g} to {high:.2g})."
        return f"{said}, the mean over {self.seeds} seeds of both, too few to tell them apart (95 % interval {self._range})."

    @property
    def _range(self) -> str:
        low, high = sorted((self.behind.low, self.behind.high), reverse=self.behind.value < 0)
        sign = -1 if self.behind.value < 0 else 1
        return f"{sign * low:.2g} to {sign * high:.2g}".replace("-", "−")


def gap(other: str, chosen: Mapping[int, float], others: Mapping[int, float], noise: tuple[float, str] | None = None) -> Gap | None:
    """chosen, others: seed, or number of the repeat -> finite loss. None where the two have no seed in common.

    noise: the standard deviation of one run's loss and where it is from, in words; for a single seed.
    """
    both = sorted(chosen.keys() & others.keys())
    if not both:
        return None
    behind = student_mean([others[seed] - chosen[seed] for seed in both])
    if len(both) == 1 and noise is not None:
        half = _NORMAL * math.sqrt(2) * noise[0]
        why = f"with a noise of {noise[0]:.2g} (sd, {noise[1]})"
        behind = Interval(behind.value, behind.value - half, behind.value + half, why=why)
    return Gap(other=other, seeds=len(both), behind=behind)


def confidence(found: Gap | None, share: float) -> str:
    """How sure the choice is, in a sentence or two; `share`: of the resamples in which the rule picks it."""
    if found is None:
        return "No other candidate can be compared with it."
    return f"{found} The rule picks it in {share:.0%} of resamples." if found.seeds >= ENOUGH else str(found)
