"""The metrics of a choice: those that every trial has (`loratune.plugs`), and two more. A benchmark's name stands for its score."""

import math
from collections.abc import Collection

from loratune.errors import SpecError
from loratune.plugs import BENCHMARKS, METRICS, Measured, MetricPlug
from loratune.record import Trial
from loratune.spec import limits
from loratune.spec.limits import Constraint
from loratune.spec.validation_errors import shown


def _seconds(trial: Measured) -> float:
    return sum((o.train_seconds + o.validation_seconds) * o.devices + o.scoring_seconds for o in trial.run)


_OF_A_CHOICE = {
    "score": MetricPlug(name="score", unit="mean of the benchmarks' scores, 0 to 1", direction="maximize", make=lambda _: math.nan),
    "seconds": MetricPlug(name="seconds", unit="device-seconds of training, validation and scoring", make=_seconds),
}
_BY_REPEAT = ("validation_loss", "score")  # no single number: one by repeat, the other by item


def metric_names() -> list[str]:
    """All of them but the benchmarks."""
    return [*(name for name in METRICS.names if name not in BENCHMARKS), *_OF_A_CHOICE]


def measured_metrics(trial: Trial) -> dict[str, float]:
    """The metrics that are one number of a trial's last run, in their units; NaN where it was not measured."""
    parameters = max((o.trainable_parameters for o in trial.outcomes), default=0) or math.nan
    run = Measured(hyperparameters=trial.hyperparameters, run=trial.last_run, parameters=parameters)
    return {
        name: float(_OF_A_CHOICE[name].factory(run)) if name in _OF_A_CHOICE else METRICS.read(name, run)
        for name in metric_names()
        if name not in _BY_REPEAT
    }


def parse_constraint(text: str, benchmarks: Collection[str] = ()) -> Constraint:
    """`"adapter_mb <= 50"` -> Constraint("adapter_mb", "<=", 50.0). benchmarks: names of scores that count as metrics too.

    Raises SpecError: what was given, what is allowed, the nearest name.
    """
    try:
        return limits.parse(text, [*metric_names(), *benchmarks])
    except ValueError as error:
        raise SpecError(f"constraint {shown(text)}: {error}") from None


def higher_is_better(metric: str) -> bool:
    """Whether more of it is better, as of scores and benchmarks."""
    if metric not in metric_names():
        return True
    return (_OF_A_CHOICE.get(metric) or METRICS[metric]).direction == "maximize"
