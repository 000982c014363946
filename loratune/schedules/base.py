"""What a schedule is given and what it then holds."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction

from loratune.work import CurvePoint, Outcome


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Train `trial` from share `start` to share `stop` of a run that is `length` of the full run long.

    Shares are exact fractions, so that a resumed study asks for the same steps: a run of `length` has
    ceil(length * total) steps, of which the slice ends at ceil(stop * those). It is validated at its end, and where
    `validate_at` says, in shares of the same run.
    """

    trial: int
    run: str = "main"
    length: Fraction = Fraction(1)
    start: Fraction = Fraction(0)
    stop: Fraction = Fraction(1)
    validate_at: tuple[Fraction, ...] = ()

    @property
    def ends_full_run(self) -> bool:
        return self.length * self.stop == 1

    def shortened(self, length: Fraction) -> "Slice":
        """A complete short run of this length in place of the full one."""
        return self if length == 1 else replace(self, run=short_run(length), length=length)


def short_run(length: Fraction) -> str:
    """The name of a complete run of this share of the full one."""
    return "main" if length == 1 else f"budget-{length.numerator}-{length.denominator}"


@dataclass(frozen=True, kw_only=True)
class SliceResult:
    """What became of a slice."""

    loss: float | None  # validation loss at its end; None: it failed, diverged or broke a constraint
    objectives: tuple[float, ...] = ()  # all of them as far as they are known there, each to be minimised
    outcome: Outcome | None = None  # with tokens and seconds; None: refused before training, or simulated
    curve: tuple[CurvePoint, ...] = ()  # the learning curve of the run so far, ascending steps


class Decision(StrEnum):
    """What a schedule says of a trial once a slice of it is done."""

    COMPLETE = "complete"  # trained to the end of the full run
    PAUSED = "paused"  # may go on later
    DROPPED = "dropped"  # never goes on: it failed or diverged, is not worth it, or was a short run that the sampler wanted


class Schedule(ABC):
    """Decides what to train next. Deterministic: the same calls in the same order give the same answers.

    The study calls `next` whenever a slot is free and `tell` with each result, in an order that depends on the slices alone,
    not on how long they took. Trials are numbered 0, 1, 2, ... in the order the schedule starts them.
    """

    @abstractmethod
    def next(self, may_start: bool) -> Slice | None:
        """The next slice to train; None when there is nothing to do until a result comes, or at all.

        `may_start` is False when the sampler cannot propose a new configuration now.
        """

    def no_more(self) -> None:  # noqa: B027  # most schedules need not know
        """No further trial will ever be started: the sampler has no configuration left."""

    @abstractmethod
    def tell(self, slice: Slice, result: SliceResult) -> Decision:
        """Take the result of a slice."""
