"""Constraints as people write them: `adapter_mb <= 50`."""

import math
import operator
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from loratune.spec.validation_errors import shown
from loratune.system.names import nearest

OPERATORS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_WRITTEN = re.compile(r"\s*(?P<metric>[^<>=\s]+)\s*(?P<op>[<>=!]+)\s*(?P<bound>\S+)\s*")


@dataclass(frozen=True)
class Constraint:
    """`metric op bound`, in the metric's unit."""

    metric: str
    op: str
    bound: float

    def holds(self, value: float) -> bool:
        """Whether `value` keeps it; NaN, a value nobody measured, does not."""
        return OPERATORS[self.op](value, self.bound)

    def excess(self, value: float) -> float:
        """By how much of the bound `value` is on the wrong side: above 0 where it does not hold, below or at 0 where it does.

        (value - bound) / |bound| for `<=`, the negative for `>=`; a bound of 0 divides by 1. A value on a strict bound is over
        by the least that counts; infinite for NaN.
        """
        gap = (value - self.bound) / (abs(self.bound) or 1.0) * (1 if "<" in self.op else -1)
        if self.holds(value):
            return gap
        return math.inf if math.isnan(gap) else max(gap, 1e-12)

    @property
    def lasting(self) -> bool:
        """Whether more of the metric can only break it further: an upper bound."""
        return "<" in self.op

    def __str__(self) -> str:
        return f"{self.metric} {self.op} {self.bound:.12g}"


def parse(text: str, metrics: Collection[str], hint: Callable[[str], str] | None = None) -> Constraint:
    """`"adapter_mb <= 50"` -> Constraint("adapter_mb", "<=", 50.0).

    hint: the end of the sentence on a metric that is not there; by default the nearest name.
    Raises ValueError: what was given, what is allowed, the nearest name.
    """
    found = _WRITTEN.fullmatch(text)
    if not found:
        raise ValueError(f"got {shown(text)}; needed: a metric, a comparison and a number, like 'adapter_mb <= 50'")
    metric, op, bound = found["metric"], found["op"], found["bound"]
    if metric not in metrics:
        raise ValueError(f"unknown metric {metric!r}; allowed: {', '.join(metrics)}{hint(metric) if hint else nearest(metric, metrics)}")
    if op not in OPERATORS:
        raise ValueError(f"{op!r} is not a comparison; allowed: {', '.join(OPERATORS)}")
    try:
        number = float(bound)
    except ValueError:
        raise ValueError(f"{bound!r} is not a number; write it in the unit of {metric}, without the unit") from None
    if not math.isfinite(number):
        raise ValueError(f"the bound must be finite, got {bound}")
    return Constraint(metric, op, number)
