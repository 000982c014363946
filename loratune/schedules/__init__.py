"""Schedules decide how far to train whom next: everyone to the end, or only those that deserve it.

Schedule   the contract, with `Slice`, what a schedule asks for, and `SliceResult`, what it is told
full       everyone to the end: the published protocol
halving    asynchronous successive halving

Which there are is declared in `loratune/plugs/builtin.py`.
"""

from collections.abc import Mapping
from typing import Any

from loratune.plugs import SCHEDULES
from loratune.schedules.base import Decision, Schedule, Slice, SliceResult
from loratune.spec import StudySpec

__all__ = ["Decision", "Schedule", "Slice", "SliceResult", "build", "of_study"]


def build(name: str, *, trials: int, baseline: bool, options: Mapping[str, Any] | None = None, **settings: Any) -> Schedule:
    """Make the schedule called `name` for a budget of `trials` configurations.

    baseline: trial 0 is the default that everything is compared with, so it is trained to the end.
    settings: `fidelity`, `reduction_factor`, `min_resource`, as in the study's YAML; options: the schedule's own.
    Raises SpecError.
    """
    return SCHEDULES.make(name, Schedule, {"trials": trials, "baseline": baseline, **settings}, options)


def of_study(spec: StudySpec) -> Schedule:
    """The schedule of the study that `spec` describes."""
    settings = spec.schedule.model_dump(exclude={"name", "options"})
    return build(
        spec.schedule.name, trials=spec.budget.most, baseline=spec.sampler.defaults_first, options=spec.schedule.options, **settings
    )
