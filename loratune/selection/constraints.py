"""Constraints and metrics by name: `adapter_mb <= 50`, read from text."""

import operator
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from loratune.errors import SpecError
from loratune.spec.mistakes import nearest, shown

METRICS = {
    "validation_loss": "mean negative log-likelihood of a response token, nats; lower is better",
    "score": "mean of the benchmarks' scores, 0 to 1; higher is better",
    "adapter_mb": "size of the adapter's file, 10^6 bytes; lower is better",
    "seconds": "device-seconds of training; lower is better",
    "tokens": "training tokens; lower is better",
    "peak_memory_gib": "peak memory of training, 2^30 bytes; lower is better",
}
OPERATORS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
WRITTEN = re.compile(r"\s*(?P<metric>[^<>=\s]+)\s*(?P<op>[<>=!]+)\s*(?P<bound>\S+)\s*")


@dataclass(frozen=True)
class Constraint:
    """`metric op bound`, in the metric's unit."""

    metric: str
    op: str
    bound: float

    def holds(self, value: float) -> bool:
        """Whether `value` keeps it; NaN, a value nobody measured, does not."""
        return OPERATORS[self.op](value, self.bound)

    def __str__(self) -> str:
        return f"{self.metric} {self.op} {self.bound:g}"


def parse(text: str, benchmarks: Collection[str] = ()) -> Constraint:
    """`"adapter_mb <= 50"` -> Constraint("adapter_mb", "<=", 50.0). benchmarks: names of scores that count as metrics too.

    Raises SpecError: what was given, what is allowed, the nearest name.
    """
    found = WRITTEN.fullmatch(text)
    if not found:
        raise SpecError(f"constraint {shown(text)}: needed is a metric, a comparison and a number, like 'adapter_mb <= 50'")
    metric, op, bound = found["metric"], found["op"], found["bound"]
    known(metric, benchmarks)
    if op not in OPERATORS:
        raise SpecError(f"constraint {shown(text)}: {op!r} is no comparison; allowed: {', '.join(OPERATORS)}")
    try:
        number = float(bound)
    except ValueError:
        raise SpecError(f"constraint {shown(text)}: {bound!r} is no number; write it without a unit, in that of {metric}") from None
    if number != number or abs(number) == float("inf"):
        raise SpecError(f"constraint {shown(text)}: the bound must be finite")
    return Constraint(metric, op, number)


def known(metric: str, benchmarks: Collection[str] = ()) -> str:
    """The metric's name, if it is one. Raises SpecError with the nearest otherwise."""
    names = [*METRICS, *benchmarks]
    if metric not in names:
        raise SpecError(f"unknown metric {metric!r}; allowed: {', '.join(names)}{nearest(metric, names)}")
    return metric


def higher_is_better(metric: str) -> bool:
    """Scores and benchmarks; every other metric is better when lower."""
    return metric == "score" or metric not in METRICS
