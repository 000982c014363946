"""Constraints and metrics of a choice by name: `adapter_mb <= 50`, read from text."""

from collections.abc import Collection

from loratune import plugs
from loratune.errors import SpecError
from loratune.spec.limits import Constraint
from loratune.spec.limits import parse as parse_limit
from loratune.spec.validation_errors import nearest, shown

__all__ = ["METRICS", "Constraint", "higher_is_better", "known", "parse"]

METRICS = {
    "validation_loss": "mean negative log-likelihood of a response token, nats; lower is better",
    "score": "mean of the benchmarks' scores, 0 to 1; higher is better",
    "adapter_mb": "size of the adapter's file, 10^6 bytes; lower is better",
    "seconds": "device-seconds of training; lower is better",
    "tokens": "training tokens; lower is better",
    "peak_memory_gib": "peak memory of training, 2^30 bytes; lower is better",
}


def others() -> list[str]:
    """Metrics of other packages (docs/plugs.md), which a choice may name too."""
    return [name for name in plugs.METRICS.names if name not in plugs.METRICS.builtin and name not in plugs.BENCHMARKS]


def parse(text: str, benchmarks: Collection[str] = ()) -> Constraint:
    """`"adapter_mb <= 50"` -> Constraint("adapter_mb", "<=", 50.0). benchmarks: names of scores that count as metrics too.

    Raises SpecError: what was given, what is allowed, the nearest name.
    """
    try:
        return parse_limit(text, [*METRICS, *others(), *benchmarks])
    except ValueError as error:
        raise SpecError(f"constraint {shown(text)}: {error}") from None


def known(metric: str, benchmarks: Collection[str] = ()) -> str:
    """The metric's name, if it is one. Raises SpecError with the nearest otherwise."""
    names = [*METRICS, *others(), *benchmarks]
    if metric not in names:
        raise SpecError(f"unknown metric {metric!r}; allowed: {', '.join(names)}{nearest(metric, names)}")
    return metric


def higher_is_better(metric: str) -> bool:
    """Scores and benchmarks, and what another package declares so; every other metric is better when lower."""
    if metric in others():
        return plugs.METRICS[metric].direction == "maximize"
    return metric == "score" or metric not in METRICS
