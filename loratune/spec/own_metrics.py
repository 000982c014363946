"""Measures of the user's own: a function of what a trial's adapter writes, by its address `my_module:exact_match`.

The function gets a list of dicts, each with the texts `prompt`, `reference` (the answer in the data) and `answer` (what the adapter
wrote), and returns one finite number. Nothing is imported here; `downstream/metric_functions.py` does that when a study begins.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from loratune.plugs import BENCHMARKS, METRICS, MetricPlug
from loratune.spec.sections import Section
from loratune.spec.validation_errors import MistakesError, shown

_ADDRESS = re.compile(r"(?P<where>[^:]+):(?P<name>[A-Za-z_]\w*)")
_TAKEN = ("loss", "score", "seconds")  # words of `loratune select`
_LOCK = "lock"  # in a study's folder, from which no code is taken (record/paths.py)


class OwnMetric(Section):
    """A measure of your own. May be written as the function's address alone."""

    function: str = Field(description="my_module:exact_match or my_module.py:exact_match; of [{prompt, reference, answer}], gives a number")
    name: str = Field(
        "",
        pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$|^$",
        description="as objectives and tables call it; empty: the function's name",
    )
    direction: Literal["maximize", "minimize"] = Field("maximize", description="maximize: more is better | minimize")
    data: str | None = Field(
        None, min_length=1, description="file of questions with reference answers, in a row format of data.train; null: the validation set"
    )
    examples: int = Field(200, ge=1, description="examples that are answered, drawn with the seed once for all trials")
    max_new_tokens: int = Field(128, ge=1, description="length of a generated answer, at most; generation is greedy")

    @property
    def shortest(self) -> str | dict[str, Any]:
        """As one would write it: the function's address alone, or with the fields that are not the defaults."""
        plain = OwnMetric(function=self.function)
        others = {name: value for name, value in self.model_dump().items() if value != getattr(plain, name)}
        return {"function": self.function, **others} if others else self.function

    @model_validator(mode="before")
    @classmethod
    def _by_address(cls, given: Any) -> Any:
        fields = {"function": given} if isinstance(given, str) or callable(given) else given
        if isinstance(fields, Mapping) and "tokens" in fields and "max_new_tokens" not in fields:
            fields = {("max_new_tokens" if key == "tokens" else key): value for key, value in fields.items()}
        if isinstance(fields, Mapping) and callable(fields.get("function")):
            try:
                fields = {**fields, "function": address_of(fields["function"])}
            except ValueError as error:
                raise MistakesError(((("function",), str(error)),)) from None
        return fields

    @field_validator("function")
    @classmethod
    def _readable(cls, given: str) -> str:
        if not _ADDRESS.fullmatch(given):
            raise ValueError(f"got {shown(given)}; needed: a module or file, a colon and a function, like my_module:exact_match")
        return given

    @model_validator(mode="after")
    def _named(self) -> Self:
        if not self.name:
            object.__setattr__(self, "name", self.function.rpartition(":")[2])
        if self.name in METRICS.known or self.name in BENCHMARKS or self.name in _TAKEN:
            raise MistakesError(((("name",), f"there is a metric {self.name!r} already; give it another name"),))
        return self


def address_of(function: Any) -> str:
    """`my_module:exact_match` of a function. Raises ValueError for one that cannot be found by its name again."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not module or not _ADDRESS.fullmatch(f"{module}:{name}"):
        raise ValueError(f"got {shown(function)}; needed: a function at the top level of a module, which a later start finds by its name")
    return f"{module}:{name}"


def listed_metrics(given: Any) -> Any:
    """One metric as a list of it; a list as it is."""
    return [given] if isinstance(given, str | Mapping) or callable(given) else given


def declare(given: Any) -> None:
    """Let objectives, constraints and choices know the metrics of a description by their names; mistakes are told elsewhere."""
    several, found = listed_metrics(given), []
    for one in several if isinstance(several, list | tuple) else ():
        try:
            metric = one if isinstance(one, OwnMetric) else OwnMetric.model_validate(one)
        except ValueError:
            continue
        found.append(
            MetricPlug(
                name=metric.name,
                make=functools.partial(_read, name=metric.name),
                unit=f"what {metric.function} makes of generated answers",
                direction=metric.direction,
                one_direction=f"metrics says {metric.direction} of {metric.name}; change it there",
                own=True,
            )
        )
    METRICS.declare(found)


def beside(given: Any, folder: Path) -> Any:
    """The metrics of a description in `folder`: a module that is beside it, and not here, by its file, so that it is found from here.

    A study's own folder is no place for code: it may come from somebody else.
    """
    if (folder / _LOCK).exists():
        return given
    if isinstance(given, list):
        return [beside(one, folder) for one in given]
    if isinstance(given, Mapping):
        return {key: beside(value, folder) if key == "function" else value for key, value in given.items()}
    found = _ADDRESS.fullmatch(given) if isinstance(given, str) else None
    if found is None or found["where"].endswith(".py"):
        return given
    file = Path(found["where"].replace(".", "/") + ".py")
    return f"{folder / file}:{found['name']}" if (folder / file).is_file() and not file.is_file() else given


def _read(trial: Any, *, name: str) -> float:
    return float(trial.run[-1].scores.get(name, float("nan"))) if trial.run else float("nan")
