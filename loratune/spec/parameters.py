"""The kinds of parameter that a search space is made of: int, float, ordinal, categorical, fixed."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loratune.spec.hyperparameters import NAMES
from loratune.spec.validation_errors import MistakesError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import BaseTrial


class _Kind(BaseModel, ABC):
    """What the kinds of parameter share. `name` is the key it stands under, not a field that people write."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)

    name: str = Field(exclude=True)
    type: str
    default: Any
    when: dict[str, Annotated[tuple[Any, ...], Field(strict=False, min_length=1)]] = Field(
        default_factory=dict, description="other, earlier parameter: the values of it for which this one exists"
    )

    @classmethod
    def type_name(cls) -> str:
        return str(cls.model_fields["type"].default)

    @classmethod
    @abstractmethod
    def middle(cls, fields: Mapping[str, Any], published: Any) -> Any:
        """The default of a definition that gives none."""

    def active(self, values: Mapping[str, Any]) -> bool:
        """Whether this parameter exists, given the values of the earlier ones."""
        return all(other in values and values[other] in allowed for other, allowed in self.when.items())

    def key(self, ordinals: str) -> str:
        """Its name in Optuna."""
        return self.name

    def encode(self, value: Any, ordinals: str) -> Any:
        """Optuna's value for a real one."""
        return value

    def decode(self, raw: Any, ordinals: str) -> Any:
        """The real value for Optuna's."""
        return raw

    @abstractmethod
    def distribution(self, ordinals: str) -> "BaseDistribution | None":
        """Optuna's distribution; None when there is nothing to sample."""

    def suggest(self, trial: "BaseTrial", ordinals: str) -> Any:
        """Ask `trial` for a value; returns the real one."""
        distribution = self.distribution(ordinals)
        return self.decode(None if distribution is None else _ask(trial, self.key(ordinals), distribution), ordinals)

    @abstractmethod
    def holds(self, value: Any) -> bool:
        """Whether the parameter can have this value."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        found: dict[str, str] = {}
        for field, sentence in self._mistakes():
            found.setdefault(field, sentence)  # a field's first mistake explains the others
        if not found and not self.holds(self.default):
            found["default"] = f"got {self.default!r}; allowed: {self.allowed}"
        if found:
            raise MistakesError(((field,), sentence) for field, sentence in found.items())
        return self

    @property
    @abstractmethod
    def allowed(self) -> str:
        """The allowed values in words."""

    @abstractmethod
    def _mistakes(self) -> Iterator[tuple[str, str]]:
        """(field, sentence) of each mistake that the fields' own types do not show."""

    def _refused(self, field: str, values: Iterable[Any]) -> Iterator[tuple[str, str]]:
        for value in values:
            if sentence := NAMES[self.name].refusal(value):
                yield field, sentence


class _Range(_Kind):
    """`low` to `high`, both included; `log` samples the logarithm evenly."""

    low: float
    high: float
    step: float | None = None
    log: bool = False

    @classmethod
    def middle(cls, fields: Mapping[str, Any], published: Any) -> Any:
        """The published default where it fits, else the (geometric, for log) middle, on the grid of `step`."""
        low, high, step = fields["low"], fields["high"], fields.get("step")
        value = published
        if not low <= published <= high:
            value = math.sqrt(low * high) if fields.get("log") else (low + high) / 2
        if step:
            value = min(high, low + round((value - low) / step) * step)
        return round(value) if cls.type_name() == "int" else float(value)

    @property
    def allowed(self) -> str:
        return f"{self.low:g} to {self.high:g}" + (f" in steps of {self.step:g}" if self.step else "")

    def holds(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-8

    def _mistakes(self) -> Iterator[tuple[str, str]]:
        for field, bound in (("low", self.low), ("high", self.high)):
            yield from self._refused(field, [bound])
        if self.low > self.high:
            yield "high", f"got {self.high!r}; allowed: numbers >= low, which is {self.low!r}"
        if self.log and self.low <= 0:
            yield "low", f"got {self.low!r}; allowed: numbers > 0, because of log: true"
        if self.step is not None and self.step <= 0:
            yield "step", f"got {self.step!r}; allowed: numbers > 0"
        elif self.step is not None and self.log:
            yield "step", "a range with log: true cannot have steps; give one of them"
        elif self.step is not None and (_decimal(self.high) - _decimal(self.low)) % _decimal(self.step):
            yield "step", f"got {self.step!r}, which does not lead from {self.low!r} to {self.high!r}"


class IntRange(_Range):
    """Whole numbers from `low` to `high`."""

    type: Literal["int"] = "int"
    low: int
    high: int
    step: int | None = None
    default: int

    def distribution(self, ordinals: str) -> "BaseDistribution":
        from optuna.distributions import IntDistribution

        return IntDistribution(self.low, self.high, log=self.log, step=self.step or 1)


class FloatRange(_Range):
    """Real numbers from `low` to `high`."""

    type: Literal["float"] = "float"
    default: float

    def _mistakes(self) -> Iterator[tuple[str, str]]:
        if NAMES[self.name].kind == "int":
            yield "type", f"got 'float'; {self.name} is a whole number: int, ordinal or fixed"
        else:
            yield from super()._mistakes()

    def distribution(self, ordinals: str) -> "BaseDistribution":
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)


class Categorical(_Kind):
    """One of `choices`, which have no order."""

    type: Literal["categorical"] = "categorical"
    choices: tuple[Any, ...] = Field(strict=False, min_length=1)

    @classmethod
    def middle(cls, fields: Mapping[str, Any], published: Any) -> Any:
        """The published default where it is a choice, else the first."""
        return published if published in fields["choices"] else fields["choices"][0]

    @property
    def allowed(self) -> str:
        return ", ".join(map(str, self.choices))

    def holds(self, value: Any) -> bool:
        return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in self.choices)

    def _mistakes(self) -> Iterator[tuple[str, str]]:
        refused = list(self._refused("choices", self.choices))
        yield from refused
        if not refused and len(set(self.choices)) < len(self.choices):
            yield "choices", f"got {list(self.choices)!r}; each choice may stand once"

    def distribution(self, ordinals: str) -> "BaseDistribution":
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.choices)


class Ordinal(_Kind):
    """One of `values`, ascending numbers."""

    type: Literal["ordinal"] = "ordinal"
    values: tuple[Any, ...] = Field(strict=False, min_length=1)

    @classmethod
    def middle(cls, fields: Mapping[str, Any], published: Any) -> Any:
        """The published default where it is a value, else the middle one."""
        values = fields["values"]
        return published if published in values else values[(len(values) - 1) // 2]

    @property
    def allowed(self) -> str:
        return ", ".join(map(str, self.values))

    def holds(self, value: Any) -> bool:
        return not isinstance(value, bool) and value in self.values

    def _mistakes(self) -> Iterator[tuple[str, str]]:
        refused = list(self._refused("values", self.values))
        yield from refused
        if not refused and list(self.values) != sorted(set(self.values)):
            yield "values", f"got {list(self.values)!r}; needed: ascending numbers, {sorted(set(self.values))!r}"

    def key(self, ordinals: str) -> str:
        return f"{self.name}_index" if ordinals == "index" else self.name

    def encode(self, value: Any, ordinals: str) -> Any:
        return self.values.index(value) if ordinals == "index" else value

    def decode(self, raw: Any, ordinals: str) -> Any:
        return self.values[raw] if ordinals == "index" else raw

    def distribution(self, ordinals: str) -> "BaseDistribution":
        from optuna.distributions import CategoricalDistribution, IntDistribution

        return IntDistribution(0, len(self.values) - 1) if ordinals == "index" else CategoricalDistribution(self.values)


class Fixed(_Kind):
    """One `value`, the same in every trial; Optuna does not see it."""

    type: Literal["fixed"] = "fixed"
    value: Any
    default: Any = Field(exclude=True)

    @classmethod
    def middle(cls, fields: Mapping[str, Any], published: Any) -> Any:
        """The value itself."""
        return fields["value"]

    @property
    def allowed(self) -> str:
        return str(self.value)

    def holds(self, value: Any) -> bool:
        return value == self.value

    def _mistakes(self) -> Iterator[tuple[str, str]]:
        yield from self._refused("value", [self.value])

    def decode(self, raw: Any, ordinals: str) -> Any:
        return self.value

    def distribution(self, ordinals: str) -> None:
        return None


def _ask(trial: "BaseTrial", key: str, distribution: "BaseDistribution") -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match distribution:
        case IntDistribution():
            return trial.suggest_int(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
        case FloatDistribution():
            return trial.suggest_float(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
        case CategoricalDistribution():
            return trial.suggest_categorical(key, distribution.choices)


def _decimal(value: float) -> Decimal:
    """As written: Optuna counts steps so, and shortens a range that they do not divide."""
    return Decimal(str(value))


Parameter = Annotated[IntRange | FloatRange | Ordinal | Categorical | Fixed, Field(discriminator="type")]

KINDS: dict[str, type[_Kind]] = {kind.type_name(): kind for kind in (IntRange, FloatRange, Ordinal, Categorical, Fixed)}
