"""What the search makes small, and what it must keep: the objectives and constraints of a study.

The first objective is the validation loss, or a metric of the user's own in its place; the others make it a search for a front, on which no
trial is better than another in everything. A benchmark's name stands for its score on some of its items
(`scoring.items`), which `loratune evaluate` then leaves out: what chose is not what reports.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator

from loratune.plugs import BENCHMARKS, METRICS, SAMPLERS
from loratune.spec.limits import Constraint, parse
from loratune.spec.sections import OneOf, Section
from loratune.spec.validation_errors import FieldPath, MistakesError, shown
from loratune.system.names import close_names


class Objective(Section):
    """One number that the search makes small, or large. May be written as its name alone."""

    name: Annotated[str, OneOf(METRICS)] = Field(description=" | ".join(METRICS.builtin))
    direction: Literal["minimize", "maximize"] = Field("minimize", description="minimize | maximize; of a score always maximize")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        fields = {"name": given} if isinstance(given, str) else given
        name = fields.get("name") if isinstance(fields, Mapping) else None
        if isinstance(name, str) and name.startswith("lm_eval:"):
            allowed = ", ".join(BENCHMARKS.names)
            raise ValueError(f"{name!r}: the items of such a task cannot be kept apart for the search; allowed are {allowed}")
        if isinstance(name, str) and name not in METRICS:
            unknown = f"got {shown(name)}; allowed: {', '.join(METRICS.names)}{unknown_metric(name)}"
            raise MistakesError(((() if isinstance(given, str) else ("name",), unknown),))
        if isinstance(name, str) and name in METRICS and isinstance(fields, Mapping) and "direction" not in fields:
            return {**fields, "direction": METRICS[name].direction}
        return fields

    @model_validator(mode="after")
    def _has_a_natural_direction(self) -> "Objective":
        metric = METRICS[self.name]
        if metric.one_direction and self.direction != metric.direction:
            raise MistakesError(((("direction",), metric.one_direction),))
        return self

    @model_serializer
    def _written(self) -> str | dict[str, str]:
        return self.name if self.direction == "minimize" else {"name": self.name, "direction": self.direction}


def unknown_metric(name: str) -> str:
    """The end of a sentence on a name that no metric has: one that is near, or how a metric of the user's own gets its name."""
    near = close_names(name, METRICS.names)
    if near and (near[0] not in BENCHMARKS or close_names(name, near, cutoff=0.75)):
        return f"; did you mean {near[0]!r}?"
    return f"; a metric of your own is named by metrics: [my_module:{name if name.isidentifier() else 'function'}] (--metrics)"


def not_for(sampler: str, objectives: int, constrained: bool, own: str = "") -> str:
    """Why the sampler cannot search this; "" when it can. own: the metric that is the first objective in place of the loss."""
    plug = SAMPLERS[sampler]
    if own and not plug.any_objective:
        able = ", ".join(SAMPLERS.those(lambda other: other.any_objective))
        return f"got {sampler!r}, which searches by a loss in nats, not by {own}; these take any objective: {able}"
    if objectives > 1 and not plug.several_objectives:
        able = ", ".join(SAMPLERS.those(lambda other: other.several_objectives))
        return f"got {sampler!r}, which takes one objective, not {objectives}; these take several: {able}"
    if constrained and not plug.constraints:
        return (
            f"got {sampler!r}, which ignores constraints; these respect them: {', '.join(SAMPLERS.those(lambda other: other.constraints))}"
        )
    return ""


def listed(given: Any) -> Any:
    """One objective or constraint as a list of it; a list as it is."""
    return [given] if isinstance(given, str | Mapping) else given


def checked(objectives: tuple[Objective, ...]) -> tuple[Objective, ...]:
    """The objectives, if they go together: the validation loss first, or an own metric in its place; none twice. Raises ValueError."""
    names = [objective.name for objective in objectives]
    if len(set(names)) < len(names):
        raise ValueError(f"got {', '.join(names)}; each may stand once")
    if names[0] != "validation_loss" and (not METRICS[names[0]].own or "validation_loss" in names):
        raise ValueError(f"got {', '.join(names)}; validation_loss must be the first of them, or stand aside for a metric of your own")
    return objectives


def limits(texts: Any, metrics: Collection[str]) -> tuple[Constraint, ...]:
    """The constraints of a description on these metrics. Raises MistakesError with every mistake."""
    found, mistakes = [], list[tuple[FieldPath, str]]()
    for place, text in enumerate(texts):
        try:
            limit = parse(text, metrics, unknown_metric)
            if METRICS[limit.metric].benchmark and not 0 <= limit.bound <= 1:
                raise ValueError(f"{limit}: a score is a share, from 0 to 1")
            found.append(limit)
        except ValueError as error:
            mistakes.append(((place,), str(error)))
        except TypeError:
            mistakes.append(((place,), f"got {shown(text)}; needed: text like 'adapter_mb <= 50'"))
    if mistakes:
        raise MistakesError(mistakes)
    return tuple(found)
