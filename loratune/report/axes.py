"""Where a hyperparameter's value stands on an axis from 0 to 1, and where its ticks are.

An axis spans what the search space allows, so that a figure also shows what was not tried. Values that
have no order, and ordinals, stand evenly apart; ranges are linear or logarithmic as they were searched.
"""

import math
from dataclasses import dataclass
from typing import Any

from loratune.spec.parameters import Categorical, Fixed, FloatRange, IntRange, Ordinal, Parameter
from loratune.system.formatting import label, show

ABSENT = -0.11  # where a trial stands that does not have the hyperparameter


@dataclass(frozen=True, kw_only=True)
class Axis:
    name: str
    places: tuple[Any, ...] = ()  # the values of an ordinal or categorical axis; () for a range
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    whole: bool = False  # whole numbers, which double rather than grow tenfold: 4, 8, 16

    @property
    def label(self) -> str:
        return label(self.name)

    def place(self, value: Any) -> float:
        """Position in [0, 1]; ABSENT for None and for what the axis does not know."""
        if self.places:
            return (self.places.index(value) + 0.5) / len(self.places) if value in self.places else ABSENT
        if not isinstance(value, int | float) or (self.log and value <= 0):
            return ABSENT
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return 0.5 if high == low else min(1.0, max(0.0, (at - low) / (high - low)))

    def ticks(self) -> list[tuple[float, str]]:
        """(position, text), ascending."""
        values = self.places or self._range_ticks()
        return [(self.place(value), show(value)) for value in values]

    def _range_ticks(self) -> list[float]:
        if not self.log:
            return _even_ticks(self.low, self.high)
        return _doubling_ticks(self.low, self.high) if self.whole else _log_ticks(self.low, self.high)


def axis_of(name: str, parameter: Parameter) -> Axis:
    if isinstance(parameter, IntRange | FloatRange):
        return Axis(name=name, low=parameter.low, high=parameter.high, log=parameter.log, whole=parameter.type == "int")
    if isinstance(parameter, Ordinal):
        return Axis(name=name, places=parameter.values)
    if isinstance(parameter, Categorical):
        return Axis(name=name, places=parameter.choices)
    if isinstance(parameter, Fixed):
        return Axis(name=name, places=(parameter.value,))
    raise TypeError(f"no axis for {parameter!r}")


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    mantissas = (1,) if math.log10(high / low) >= 2.5 else (1, 2, 5)
    ticks = [float(f"{m}e{d}") for d in decades for m in mantissas if low * 0.999 <= float(f"{m}e{d}") <= high * 1.001]
    return ticks if len(ticks) > 1 else [low, high]


def _doubling_ticks(low: float, high: float) -> list[float]:
    """Powers of two, at most nine of them."""
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    ticks = [2.0**p for p in powers[:: math.ceil(len(powers) / 9) or 1]]
    return ticks if len(ticks) > 1 else [low, high]


def _even_ticks(low: float, high: float) -> list[float]:
    """About five round numbers, the ends always among them."""
    if high == low:
        return [low]
    rough = (high - low) / 4
    size = 10 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= rough * 0.99)
    inner = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [low, *(t for t in inner if low + step / 2 <= t <= high - step / 2), high]
