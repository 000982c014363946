"""Schedules decide how far to train whom next: everyone to the end, or only those that deserve it.

Schedule   the contract, and `Stretch`, what a schedule asks for
full       everyone to the end: the published protocol
halving    asynchronous successive halving
"""

from fractions import Fraction

from loratune.schedules.base import Fate, Schedule, Stretch
from loratune.schedules.full import FullSchedule
from loratune.schedules.halving import HalvingSchedule

__all__ = ["Fate", "FullSchedule", "HalvingSchedule", "Schedule", "Stretch", "build"]


def build(name: str, *, trials: int, yardstick: bool, fidelity: str, reduction_factor: int, min_resource: float) -> Schedule:
    """Make the schedule called `name` for a budget of `trials` configurations.

    `yardstick`: trial 0 is the default that everything is compared with, so it is trained to the end.
    """
    if name == "full":
        return FullSchedule(trials=trials)
    smallest = Fraction(min_resource).limit_denominator(10_000)
    return HalvingSchedule(trials=trials, yardstick=yardstick, fidelity=fidelity, reduction_factor=reduction_factor, min_resource=smallest)
