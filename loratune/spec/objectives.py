"""What the search makes small, and what it must keep: the objectives and constraints of a study.

The first objective is always the validation loss; the others make it a search for a front, on which no
trial is better than another in everything. Downstream scores do not guide the search: choose by them
among its trials, with `loratune select`.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import Field, model_serializer, model_validator

from loratune.spec.limits import Constraint, parse
from loratune.spec.mistakes import FieldPath, MistakesError, not_allowed, shown
from loratune.spec.sections import Section

Metric = Literal["validation_loss", "tokens", "train_seconds", "adapter_mb", "peak_memory_gib", "inference_cost"]
METRICS: dict[str, str] = {
    "validation_loss": "nats per response token",
    "tokens": "training tokens of the trial's last run, prompt and response",
    "train_seconds": "device-seconds of that run's training, validation excluded",
    "adapter_mb": "trainable parameters x 4 bytes, 10^6 bytes",
    "peak_memory_gib": "of the device (on CPU of the process) in training, 2^30 bytes, all slots of the process together",
    "inference_cost": "multiply-adds per token that the adapter adds to the base: its trainable parameters",
}
KNOWN = ("adapter_mb", "inference_cost")  # follow from the hyperparameters and the model, without training
GROWING = ("tokens", "train_seconds", "peak_memory_gib")  # once above a bound, more training does not bring them below
SINGLE_OBJECTIVE = ("nni_tpe", "cmaes")  # samplers
_SCORES = ("score", "mmlu", "bbh", "drop", "humaneval")


class Objective(Section):
    """One number that the search makes small, or large. May be written as its name alone."""

    name: Metric = Field(description=" | ".join(METRICS))
    direction: Literal["minimize", "maximize"] = Field("minimize", description="minimize | maximize")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        fields = {"name": given} if isinstance(given, str) else given
        name = fields.get("name") if isinstance(fields, Mapping) else None
        if name in _SCORES:
            raise ValueError(f"{name!r}: a downstream score cannot guide the search; choose by it afterwards: loratune select --prefer")
        if isinstance(given, str) and given not in METRICS:
            raise ValueError(not_allowed(given, METRICS))
        return fields

    @model_validator(mode="after")
    def _loss_is_minimised(self) -> "Objective":
        if self.name == "validation_loss" and self.direction == "maximize":
            raise MistakesError(((("direction",), "validation_loss is minimised"),))
        return self

    @model_serializer
    def _written(self) -> str | dict[str, str]:
        return self.name if self.direction == "minimize" else {"name": self.name, "direction": self.direction}


def not_for(sampler: str, objectives: int, constrained: bool) -> str:
    """Why the sampler cannot search this; "" when it can."""
    if objectives > 1 and sampler in SINGLE_OBJECTIVE:
        return f"got {sampler!r}, which takes one objective, not {objectives}; these take several: nomad, tpe, gp, qmc, random, nsga2"
    if constrained and sampler == "cmaes":  # Optuna's ignores them
        return "got 'cmaes', which knows no constraints; all others do"
    return ""


def listed(given: Any) -> Any:
    """One objective or constraint as a list of it; a list as it is."""
    return [given] if isinstance(given, str | Mapping) else given


def checked(objectives: tuple[Objective, ...]) -> tuple[Objective, ...]:
    """The objectives, if they go together: the validation loss first, none twice. Raises ValueError."""
    names = [objective.name for objective in objectives]
    if len(set(names)) < len(names):
        raise ValueError(f"got {', '.join(names)}; each may stand once")
    if names[0] != "validation_loss":
        raise ValueError(f"got {', '.join(names)}; validation_loss must be the first of them")
    return objectives


def limits(texts: Any) -> tuple[Constraint, ...]:
    """The constraints of a description. Raises MistakesError with every mistake."""
    found, mistakes = [], list[tuple[FieldPath, str]]()
    for place, text in enumerate(texts):
        try:
            found.append(parse(text, get_args(Metric)))
        except ValueError as error:
            mistakes.append(((place,), str(error)))
        except TypeError:
            mistakes.append(((place,), f"got {shown(text)}; needed: text like 'adapter_mb <= 50'"))
    if mistakes:
        raise MistakesError(mistakes)
    return tuple(found)
