"""The metrics of a choice, one entry each: what it is, and how it is read from a trial. A benchmark's name stands for its score."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from loratune import plugs
from loratune.errors import SpecError
from loratune.record import Trial
from loratune.spec import limits
from loratune.spec.limits import Constraint
from loratune.spec.validation_errors import shown
from loratune.system.names import nearest

_BYTES = 4  # of an adapter's parameter: float32


@dataclass(frozen=True)
class TrialMetric:
    """`read`: its value in its unit, NaN where it was not measured; None for the metrics that come by repeat or by item."""

    description: str  # with its unit
    read: Callable[[Trial], float] | None = None
    higher_is_better: bool = False


def _adapter_mb(trial: Trial) -> float:
    return max((o.trainable_parameters for o in trial.outcomes), default=0) * _BYTES / 1e6 or math.nan


def _peak_memory_gib(trial: Trial) -> float:
    return max((o.peak_memory_bytes for o in trial.outcomes), default=0) / 2**30 or math.nan


METRICS = {
    "validation_loss": TrialMetric("mean negative log-likelihood of a response token, nats"),
    "score": TrialMetric("mean of the benchmarks' scores, 0 to 1", higher_is_better=True),
    "adapter_mb": TrialMetric("size of the adapter's file, 10^6 bytes", _adapter_mb),
    "seconds": TrialMetric("device-seconds of training", lambda trial: trial.device_seconds),
    "tokens": TrialMetric("training tokens", lambda trial: float(trial.tokens)),
    "peak_memory_gib": TrialMetric("peak memory of training, 2^30 bytes", _peak_memory_gib),
}


def known_metrics() -> dict[str, TrialMetric]:
    """`METRICS`, and those of other packages (docs/plugs.md); a benchmark is no entry."""
    others = [name for name in plugs.METRICS.names if name not in plugs.METRICS.builtin and name not in plugs.BENCHMARKS]
    return METRICS | {name: _plugged(name) for name in others}


def _plugged(name: str) -> TrialMetric:
    def read(trial: Trial) -> float:
        parameters = float(max((o.trainable_parameters for o in trial.outcomes), default=0))
        measured = plugs.Measured(hyperparameters=trial.hyperparameters, run=trial.last_run, parameters=parameters)
        return plugs.METRICS.read(name, measured)

    return TrialMetric(plugs.METRICS[name].unit, read, higher_is_better=plugs.METRICS[name].direction == "maximize")


def parse_constraint(text: str, benchmarks: Collection[str] = ()) -> Constraint:
    """`"adapter_mb <= 50"` -> Constraint("adapter_mb", "<=", 50.0). benchmarks: names of scores that count as metrics too.

    Raises SpecError: what was given, what is allowed, the nearest name.
    """
    try:
        return limits.parse(text, [*known_metrics(), *benchmarks])
    except ValueError as error:
        raise SpecError(f"constraint {shown(text)}: {error}") from None


def known(metric: str, benchmarks: Collection[str] = ()) -> str:
    """The metric's name, if it is one. Raises SpecError with the nearest otherwise."""
    names = [*known_metrics(), *benchmarks]
    if metric not in names:
        raise SpecError(f"unknown metric {metric!r}; allowed: {', '.join(names)}{nearest(metric, names)}")
    return metric


def higher_is_better(metric: str) -> bool:
    """Scores and benchmarks; every other metric is better when lower."""
    known = known_metrics()
    return metric not in known or known[metric].higher_is_better
