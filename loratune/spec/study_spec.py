"""The study's description: one YAML file, or flags, or Python, checked as a whole before anything starts.

`StudySpec.load` reads it and raises one SpecError that names every mistake; `sections.py` says what each
field means. Paths are relative to the current directory, as on every command line.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from loratune.errors import SpecError
from loratune.plugs import BENCHMARKS, EXECUTORS, METRICS, SAMPLERS, SCHEDULES
from loratune.spec.hyperparameters import ALIASES, NAMES
from loratune.spec.limits import Constraint
from loratune.spec.loading import DEFAULT, SECTION_ALIASES, SHORTHAND, Written, lines_of
from loratune.spec.objectives_and_constraints import Objective, checked, limits, listed, not_for
from loratune.spec.own_metrics import OwnMetric, beside, declare, listed_metrics
from loratune.spec.sections import Budget, Data, ExecutorSection, Model, Output, Sampler, ScheduleSection, Scoring, Section, Training
from loratune.spec.space import PRESETS, SearchSpace
from loratune.spec.validation_errors import MistakesError, found_in
from loratune.system.files import AnyPath
from loratune.system.masking import masked
from loratune.work import Hyperparameters, ModelRecipe, Recipe, TrainingRecipe


class StudySpec(Section):
    """A whole study. All fields but the model and the data have defaults."""

    name: str = Field(
        "", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$|^$", description="name of the study; empty: made from the model and the data"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of everything: data order, initialisation, dropout, sampler")
    storage: str | None = Field(
        None, description="Optuna storage URL, ${NAME} in it an environment variable; null: SQLite in the study's folder"
    )
    objectives: Annotated[tuple[Objective, ...], Field(strict=False, min_length=1)] = Field(
        ("validation_loss",),
        validate_default=True,
        description=f"what to improve, one or several (Pareto), first validation_loss or one of `metrics`: {' | '.join(METRICS.builtin)}",
    )
    constraints: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="limits on the same metrics, by <=, >=, < or >: [adapter_mb <= 50, peak_memory_gib <= 24]"
    )
    metrics: Annotated[tuple[OwnMetric, ...], Field(strict=False)] = Field(
        (), description="measures of your own, functions of generated answers: [my_module:exact_match]"
    )
    model: Model
    data: Data
    training: Training = Field(default_factory=Training)
    search_space: SearchSpace = Field(default_factory=lambda: SearchSpace.of("recommended"))
    sampler: Sampler = Field(default_factory=Sampler)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    scoring: Scoring = Field(default_factory=Scoring)
    executor: ExecutorSection = Field(default_factory=ExecutorSection)
    budget: Budget = Field(default_factory=Budget)
    output: Output = Field(default_factory=Output)

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        written = Written()
        written.add_mapping(given)
        if written.mistakes:
            raise MistakesError(written.mistakes)
        declare(written.values.get("metrics"))
        return _with_space(_with_sampler(written.values))

    @field_validator("objectives", mode="before")
    @classmethod
    def _one_objective(cls, given: Any) -> Any:
        return listed(given)

    @field_validator("objectives")
    @classmethod
    def _together(cls, given: tuple[Objective, ...]) -> tuple[Objective, ...]:
        return checked(given)

    @field_validator("metrics", mode="before")
    @classmethod
    def _one_metric(cls, given: Any) -> Any:
        return listed_metrics(given)

    @model_validator(mode="after")
    def _each_metric_once(self) -> Self:
        names = [metric.name for metric in self.metrics]
        if len(set(names)) < len(names):
            raise MistakesError(((("metrics",), f"got {', '.join(names)}; each name may stand once"),))
        return self

    @field_validator("constraints", mode="before")
    @classmethod
    def _readable(cls, given: Any) -> Any:
        several = listed(given)
        return tuple(map(str, limits(several, METRICS.names))) if isinstance(several, list | tuple) else several

    @model_validator(mode="after")
    def _sampler_is_able(self) -> Self:
        unable = not_for(self.sampler.name, len(self.objectives), bool(self.constraints), self.own_objective)
        if unable:
            raise MistakesError(((("sampler", "name"), unable),))
        return self

    @model_validator(mode="after")
    def _sampler_has_its_schedule(self) -> Self:
        name, plug = self.sampler.name, SAMPLERS[self.sampler.name]
        if plug.sets_length and self.schedule.name != "full":
            what = f"got {self.schedule.name!r}; the sampler {name} sets the length of its runs itself; write full, or another sampler"
            raise MistakesError(((("schedule", "name"), what),))
        if self.sampler.warm_start and not plug.starts_itself:
            able = " or ".join(SAMPLERS.those(lambda other: other.starts_itself))
            what = f"the sampler {name} takes no earlier studies; only {able} does"
            raise MistakesError(((("sampler", "warm_start"), what),))
        return self

    @model_validator(mode="after")
    def _completed(self) -> Self:
        """What depends on the sampler: whether the recommendation takes the place of defaults, and how much is spent."""
        plug, budget = SAMPLERS[self.sampler.name], self.budget
        if plug.starts_itself and not self.search_space.to_fill:
            object.__setattr__(self, "search_space", self.search_space.opened())
        runs = plug.full_runs if budget.trials is None and budget.full_runs is None else budget.full_runs
        object.__setattr__(self, "budget", budget.model_copy(update={"trials": budget.most, "full_runs": runs}))
        return self

    @model_validator(mode="after")
    def _has_points_to_keep_the_best_of(self) -> Self:
        paused = SCHEDULES[self.schedule.name].pauses(self.schedule.fidelity)  # each pause is a point of the run
        if self.training.keep == "best" and self.training.validations == 1 and not paused:
            what = "got 'best'; with validations: 1 a run has one point, its last; write validations above 1, or keep: last"
            raise MistakesError(((("training", "keep"), what),))
        return self

    @model_validator(mode="after")
    def _code_is_allowed(self) -> Self:
        running = [name for name in self.scores if BENCHMARKS[name].runs_code]
        if running and not self.scoring.allow_code_execution:
            what = f"{', '.join(running)} runs programs that the models write; write true to let them run in a sandbox, or leave it out"
            raise MistakesError(((("scoring", "allow_code_execution"), what),))
        return self

    @model_validator(mode="after")
    def _named(self) -> Self:
        if not self.name:
            parts = [Path(self.model.name_or_path).name, *(Path(source.path).stem for source in self.data.train)]
            object.__setattr__(self, "name", re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-._")[:100] or "study")
        return self

    @classmethod
    def load(cls, path: AnyPath | None = None, overrides: Iterable[tuple[str, str]] = (), base: Mapping[str, Any] | None = None) -> Self:
        """The description in a YAML file, laid over `base`, under flags such as ("training.epochs", "2").

        Raises SpecError with every mistake, one line each: field, place, what was given, what is allowed.
        """
        written = Written()
        if base is not None:
            written.add_mapping(base)
        if path is not None:
            written.add_file(Path(path))
            if "metrics" in written.values:
                written.values["metrics"] = beside(written.values["metrics"], Path(path).parent)
        for name, text in overrides:
            written.add_flag(name, text)
        if written.unread:  # of a file that says nothing, every field would be missing
            raise SpecError(lines_of(written, ()))
        try:
            spec = cls.model_validate(written.values)
        except ValidationError as error:
            raise SpecError(lines_of(written, found_in(error, cls, _home))) from None
        if written.mistakes:
            raise SpecError(lines_of(written, ()))
        return spec

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(self.output.folder or f"runs/{self.name}")

    @property
    def limits(self) -> tuple[Constraint, ...]:
        """The constraints, read."""
        return limits(self.constraints, METRICS.ever)

    @property
    def own_objective(self) -> str:
        """The metric of the user's own that is the first objective in place of the validation loss; "" where there is none."""
        first = self.objectives[0].name
        return "" if first == "validation_loss" else first

    @property
    def scores(self) -> tuple[str, ...]:
        """The benchmarks among the objectives and constraints, which every finished trial is scored on."""
        metrics = [*(objective.name for objective in self.objectives), *(limit.metric for limit in self.limits)]
        return tuple(name for name in dict.fromkeys(metrics) if name in BENCHMARKS)

    @property
    def scored(self) -> tuple[str, ...]:
        """All that a finished trial's adapter is asked to write for: those, and the description's own metrics."""
        return (*self.scores, *(metric.name for metric in self.metrics))

    def masked(self) -> Self:
        """The description as it may be written down: without the password in the storage's URL."""
        return self if self.storage is None else self.model_copy(update={"storage": masked(self.storage)})

    def to_yaml(self) -> str:
        """The complete description, every default written out; `load` reads it back as an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    def recipe(self, prepared_folder: str) -> Recipe:
        """What the workers need; `prepared_folder` holds the tokenised, split data."""
        training = {name: getattr(self.training, name) for name in TrainingRecipe.__dataclass_fields__ if name != "seed"}
        return Recipe(
            model=ModelRecipe(**self.model.model_dump()),
            training=TrainingRecipe(seed=self.seed, **training),
            data=prepared_folder,
            engine=self.training.engine if self.training.devices_per_trial == 1 else "hf",
            devices_per_trial=self.training.devices_per_trial,
            device=self.executor.device,
        )

    def hyperparameters(self, params: Mapping[str, Any]) -> Hyperparameters:
        """A trial's hyperparameters from the real values that the space suggested.

        What the space does not hold is a constant of `training`, else the published value; with
        alpha_ratio, lora_alpha = alpha_ratio * lora_r.
        """
        values = {name: getattr(self.training, name) for name in Hyperparameters.__dataclass_fields__ if name in Training.model_fields}
        values.update(params)
        ratio = values.pop("alpha_ratio", None)
        if ratio is not None:
            values["lora_alpha"] = ratio * values.get("lora_r", Hyperparameters().lora_r)
        for name in ("lora_alpha", "lora_dropout", "learning_rate", "weight_decay", "warmup_ratio", "epochs"):
            if name in values:
                values[name] = float(values[name])
        return Hyperparameters(**values)

    def data_recipe_dict(self) -> dict[str, Any]:
        """The data section with the study's seed, as plain values."""
        return {**self.data.model_dump(mode="json"), "seed": self.seed}

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema (draft 2020-12) of the YAML, for editors: shorthands included, other tools' names left out."""
        schema = cls.model_json_schema()
        text = {"type": "string"}
        fields = schema["$defs"]["Data"]["properties"]
        for sources in ("train", "validation"):
            fields[sources]["items"] = {"anyOf": [text, fields[sources]["items"]]}
            fields[sources] = {"anyOf": [text, {"$ref": "#/$defs/Source"}, fields[sources]]}
        metric = {"anyOf": [{"enum": [*METRICS.known, *BENCHMARKS.names]}, text]}  # or one of `metrics`
        schema["$defs"]["Objective"]["properties"]["name"] |= metric
        del schema["$defs"]["Objective"]["properties"]["name"]["enum"]
        for name in ("objectives", "constraints"):  # one may stand without its list
            field = schema["properties"][name]
            one = metric if name == "objectives" else text
            several = {**field, "items": {"anyOf": [one, field["items"]]}}
            schema["properties"][name] = {
                "anyOf": [one, field["items"], several],
                **{key: field[key] for key in ("description", "default")},
            }
        own = schema["properties"]["metrics"]
        own["items"] = {"anyOf": [text, own["items"]]}
        schema["properties"]["metrics"] = {"anyOf": [text, {"$ref": "#/$defs/OwnMetric"}, own], "description": own["description"]}
        for section, meant in SHORTHAND.items():
            if section != "search_space":  # which knows its short forms
                shorthand = schema["$defs"][_section_class(section)]["properties"][meant]
                schema["properties"][section] = {"anyOf": [shorthand, schema["properties"][section]]}
        for section, registry in {"sampler": None, "schedule": SCHEDULES, "executor": EXECUTORS}.items():
            if registry is None or registry.names != registry.builtin:
                schema["$defs"][_section_class(section)]["additionalProperties"] = True  # its own options may stand beside its name
        known = {"anyOf": [metric["anyOf"][0], {"type": "object"}]}  # all there are, where the description has no metrics of its own
        strict = {"objectives": {"anyOf": [*known["anyOf"], {"type": "array", "items": known}]}}
        schema |= {"if": {"not": {"required": ["metrics"]}}, "then": {"properties": strict}}
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _section_class(section: str) -> str:
    """The name of a section's class, by which the JSON Schema defines it."""
    return str(getattr(StudySpec.model_fields[section].annotation, "__name__", ""))


def _with_sampler(values: dict[str, Any]) -> dict[str, Any]:
    """The values with a sampler where nobody named one.

    tpe, which bears ties and noise, where the first objective is no loss; nomad, where several objectives or halving are asked for;
    else the default.
    """
    sampler, schedule = values.get("sampler", {}), values.get("schedule", {})
    if not (isinstance(sampler, Mapping) and isinstance(schedule, Mapping)) or "name" in sampler:
        return values
    objectives = listed(values.get("objectives"))
    first = objectives[0] if isinstance(objectives, list | tuple) and objectives else "validation_loss"
    if (first.get("name") if isinstance(first, Mapping) else first) != "validation_loss":
        return {**values, "sampler": {**sampler, "name": "tpe"}}
    several = isinstance(objectives, list | tuple) and len(objectives) > 1
    if several or schedule.get("name", "full") != "full":
        return {**values, "sampler": {**sampler, "name": "nomad"}}
    return values


def _with_space(values: dict[str, Any]) -> dict[str, Any]:
    """The values with a space where nobody wrote one: `published`, or `recommended` without what `training` says for the bracket search."""
    space, sampler, training = values.get("search_space", {"preset": DEFAULT}), values.get("sampler", {}), values.get("training", {})
    if not (isinstance(space, Mapping) and space.get("preset") == DEFAULT):
        return values
    guessing = SAMPLERS.those(lambda plug: plug.starts_itself)
    if isinstance(sampler, Mapping) and sampler.get("name", Sampler().name) not in guessing:
        return {**values, "search_space": {**space, "preset": "published"}}
    constant = [name for name in training if name in PRESETS["recommended"] and name not in space] if isinstance(training, Mapping) else []
    return {**values, "search_space": {**space, "preset": "recommended", **dict.fromkeys(constant)}}


def _home(name: str) -> str:
    """Where a name stands that was written in the wrong section; "" when nowhere, or in several."""
    homes = [f"search_space.{ALIASES.get(name, name)}"] if ALIASES.get(name, name) in NAMES else []
    for section, field in StudySpec.model_fields.items():
        own = SECTION_ALIASES.get(section, {}).get(name, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section) and own in field.annotation.model_fields:
            homes.insert(0, f"{section}.{own}")
    return homes[0] if len(homes) == 1 or homes[1:] == [f"search_space.{ALIASES.get(name, name)}"] else ""
