"""What the search makes small, and what it must keep: the objectives and constraints of a study.

The first objective is always the validation loss; the others make it a search for a front, on which no
trial is better than another in everything. A benchmark's name stands for its score on some of its items
(`scoring.items`), which `loratune evaluate` then leaves out: what chose is not what reports.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import Field, model_serializer, model_validator

from loratune.spec.limits import Constraint, parse
from loratune.spec.mistakes import FieldPath, MistakesError, not_allowed, shown
from loratune.spec.sections import Section

Cost = Literal["validation_loss", "tokens", "train_seconds", "adapter_mb", "peak_memory_gib", "inference_cost"]
Score = Literal["mmlu", "mmlu_loglikelihood", "bbh", "drop", "humaneval", "humaneval_fenced", "demo_choice", "demo_match", "demo_code"]
Metric = Literal[Cost, Score]
METRICS: dict[str, str] = {
    "validation_loss": "nats per response token",
    "tokens": "training tokens of the trial's last run, prompt and response",
    "train_seconds": "device-seconds of that run's training, validation excluded",
    "adapter_mb": "trainable parameters x 4 bytes, 10^6 bytes",
    "peak_memory_gib": "that training takes on a GPU by itself, the model included (on a CPU its process, all slots together), 2^30 bytes",
    "inference_cost": "multiply-adds per token that the adapter adds to the base: its trainable parameters",
    **dict.fromkeys(get_args(Score), "the benchmark's score on the items that guide the search, 0 to 1; more is better"),
}
SCORES: tuple[str, ...] = get_args(Score)
RUN_CODE = ("humaneval", "humaneval_fenced", "demo_code")  # scoring them runs programs that the model writes
KNOWN = ("adapter_mb", "inference_cost")  # follow from the hyperparameters and the model, without training
GROWING = ("tokens", "train_seconds", "peak_memory_gib")  # once above a bound, more training does not bring them below
SINGLE_OBJECTIVE = ("bracket", "nni_tpe", "cmaes")  # samplers


class Objective(Section):
    """One number that the search makes small, or large. May be written as its name alone."""

    name: Metric = Field(description=" | ".join(METRICS))
    direction: Literal["minimize", "maximize"] = Field("minimize", description="minimize | maximize; of a score always maximize")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        fields = {"name": given} if isinstance(given, str) else given
        name = fields.get("name") if isinstance(fields, Mapping) else None
        if isinstance(name, str) and name.startswith("lm_eval:"):
            raise ValueError(f"{name!r}: the items of such a task cannot be kept apart for the search; allowed are {', '.join(SCORES)}")
        if isinstance(given, str) and given not in METRICS:
            raise ValueError(not_allowed(given, METRICS))
        if name in SCORES and isinstance(fields, Mapping) and "direction" not in fields:
            return {**fields, "direction": "maximize"}
        return fields

    @model_validator(mode="after")
    def _has_a_natural_direction(self) -> "Objective":
        if self.name == "validation_loss" and self.direction == "maximize":
            raise MistakesError(((("direction",), "validation_loss is minimised"),))
        if self.name in SCORES and self.direction == "minimize":
            raise MistakesError(((("direction",), f"{self.name} is a score, and maximised"),))
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
            limit = parse(text, METRICS)
            if limit.metric in SCORES and not 0 <= limit.bound <= 1:
                raise ValueError(f"{limit}: a score is a share, from 0 to 1")
            found.append(limit)
        except ValueError as error:
            mistakes.append(((place,), str(error)))
        except TypeError:
            mistakes.append(((place,), f"got {shown(text)}; needed: text like 'adapter_mb <= 50'"))
    if mistakes:
        raise MistakesError(mistakes)
    return tuple(found)
