"""What a schedule is given and what it then holds."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Train `trial` from share `start` to share `stop` of a run that is `length` of the full run long.

    Shares are exact fractions, so that a resumed study asks for the same steps: a run of `length` has
    ceil(length * total) steps, of which the stretch ends at ceil(stop * those).
    """

    trial: int
    run: str = "main"
    length: Fraction = Fraction(1)
    start: Fraction = Fraction(0)
    stop: Fraction = Fraction(1)

    def shortened(self, length: Fraction) -> "Stretch":
        """A complete short run of this length in place of the full one."""
        return self if length == 1 else replace(self, run=short_run(length), length=length)


def short_run(length: Fraction) -> str:
    """The name of a complete run of this share of the full one."""
    return "main" if length == 1 else f"budget-{length.numerator}-{length.denominator}"


class Fate(StrEnum):
    """What a schedule says of a trial once a stretch of it is done."""

    COMPLETE = "complete"  # trained to the end of the full run
    PAUSED = "paused"  # may go on later
    SHORT = "short"  # a complete short run that is never followed by a longer one
    DROPPED = "dropped"  # failed or diverged: never goes on


class Schedule(ABC):
    """Decides what to train next. Deterministic: the same calls in the same order give the same answers.

    The study calls `next` whenever a place is free and `tell` with each result, in an order
    that depends on the stretches alone, not on how long they took. Trials are numbered 0, 1, 2, ... in the order the schedule starts them.
    """

    @abstractmethod
    def next(self, may_start: bool) -> Stretch | None:
        """The next stretch to train; None when there is nothing to do until a result comes, or at all.

        `may_start` is False when the sampler cannot propose a new configuration now.
        """

    def no_more(self) -> None:  # noqa: B027  # most schedules need not know
        """No further trial will ever be started: the sampler has no configuration left."""

    @abstractmethod
    def tell(self, stretch: Stretch, value: float | None, values: Sequence[float] = ()) -> Fate:
        """Take the validation loss at the end of a stretch; None when it failed, diverged or broke a constraint.

        values: of several objectives all of them as far as they are known there, each to be minimised, the loss among them.
        """
