"""A study as data: its trials, what they cost, the best and the default."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratune.errors import ModelError, StorageError
from loratune.record import notebook
from loratune.record.paths import StudyPaths
from loratune.record.states import TrialState
from loratune.work import CurvePoint, Hyperparameters, Json, ModelRecipe, Outcome

LOSS = "validation_loss"


@dataclass(frozen=True, kw_only=True)
class Trial(Json):
    """One configuration and what became of it; `trial.json` holds all fields but the outcomes."""

    number: int
    hyperparameters: Hyperparameters
    params: dict[str, Any]  # searched values only, by the search space's own names (alpha_ratio, ...)
    state: TrialState = TrialState.RUNNING
    # Validation loss, the latest or the lowest (training.keep); the worst seen of a trial that diverged or did not fit; None: not trained.
    value: float | None = None
    values: tuple[float, ...] = ()  # as Optuna is told them, in the order of the spec's objectives
    message: str = ""
    length: float = 1.0  # share of a full run that its sampler wanted
    outcomes: tuple[Outcome, ...] = ()  # in the order they were trained

    @property
    def last_run(self) -> tuple[Outcome, ...]:
        """The outcomes of the trial's last run."""
        return tuple(o for o in self.outcomes if o.run == self.outcomes[-1].run)

    @property
    def curve(self) -> tuple[CurvePoint, ...]:
        """The learning curve of the trial's last run, ascending steps."""
        return tuple(point for outcome in self.last_run for point in outcome.curve)

    @property
    def kept_step(self) -> int | None:
        """The step of the curve's point whose loss is the value and whose adapter is kept, where that need not be the last one."""
        return self.outcomes[-1].kept_step if self.outcomes else None

    @property
    def short(self) -> bool:
        """Whether the sampler wanted a complete short run, and no longer one will follow."""
        return self.length < 1

    @property
    def scores(self) -> dict[str, float]:
        """Benchmarks and own metrics that were measured when the full run ended, by name."""
        return self.outcomes[-1].scores if self.outcomes else {}

    @property
    def device_seconds(self) -> float:
        """Of training and validation, on every device, and of scoring, on one."""
        return sum((o.train_seconds + o.validation_seconds) * o.devices + o.scoring_seconds for o in self.outcomes)

    @property
    def tokens(self) -> int:
        return sum(o.tokens for o in self.outcomes)


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """A study as read back from its folder."""

    folder: Path
    name: str
    spec: dict[str, Any]  # spec.yaml
    trials: tuple[Trial, ...]
    sessions: tuple[dict[str, Any], ...] = ()
    manifest: dict[str, Any] = field(default_factory=dict)  # of the prepared data: counts, hash
    prompt: dict[str, Any] = field(default_factory=dict)  # that the examples were given: kind, note, date, thinking
    progress: dict[str, Any] = field(default_factory=dict)
    trusted: bool = False  # whether the reader lets code run that comes with the base model; the folder has no say in it

    @property
    def paths(self) -> StudyPaths:
        return StudyPaths(self.folder)

    @property
    def base_model(self) -> ModelRecipe:
        """The base model, to be loaded. Raises ModelError for one that brings code along, unless the reader trusts it."""
        try:
            recipe = ModelRecipe(**self.spec["model"])
        except (KeyError, TypeError) as error:
            raise StorageError(f"{self.paths.spec} is damaged (model: {error}). Restore it from a copy.") from error
        kernel = recipe.attn_implementation is not None and "/" in recipe.attn_implementation  # code of a hub's repository
        if (recipe.trust_remote_code or kernel) and not self.trusted:
            what = f"attention from {recipe.attn_implementation}" if kernel else "Python code that comes with the model"
            raise ModelError(
                f"the study in {self.folder} asks to run {what}, {recipe.name_or_path}. A folder cannot allow that by itself: if you trust "
                "its source, add --trust-remote-code (in Python trust_remote_code=True)."
            )
        return recipe

    @property
    def finished(self) -> list[Trial]:
        """Trials trained to the end of the full run and within every constraint, in order of number."""
        return [t for t in self.trials if t.state is TrialState.COMPLETE]

    @property
    def best(self) -> Trial | None:
        """The first of the ranking, which keeps every constraint."""
        return next(iter(self.ranking), None)

    @property
    def ranking(self) -> list[Trial]:
        """The finished trials by the first objective, the best first; ties go to the lower validation loss, then to the earlier one."""
        return sorted(self.finished, key=ranking_key(self.objectives))

    @property
    def own_objective(self) -> str:
        """The user's metric that is the first objective in place of the validation loss; "" where there is none."""
        first = next(iter(self.objectives))
        return "" if first == LOSS else first

    @property
    def budget_spent(self) -> bool:
        """Whether the study is finished: all its trials ended, or its last start ran to the end of the budget that it has now."""
        budget: dict[str, Any] = self.spec.get("budget", {})
        if sum(trial.state.ended for trial in self.trials) >= budget.get("trials", 0):
            return True
        last = self.sessions[-1] if self.sessions else {}
        return bool(last["spent"] == budget) if "spent" in last else self.paths.best.is_file()  # an older loratune's

    @property
    def objectives(self) -> dict[str, str]:
        """The names of the objectives and their directions, `minimize` or `maximize`."""
        return objectives_of(self.spec)

    @property
    def front(self) -> list[Trial]:
        """The finished trials that no other beats in every objective, in the order of the ranking. With one objective, the best."""
        if len(self.objectives) == 1:
            return [] if self.best is None else [self.best]
        from loratune.statistics.pareto import non_dominated  # numpy and scipy, for several objectives only

        trials = [t for t in self.ranking if t.values]
        maximise = [direction == "maximize" for direction in self.objectives.values()]
        if not trials:
            return []
        return [trial for trial, on in zip(trials, non_dominated([t.values for t in trials], maximise), strict=True) if on]

    @property
    def default(self) -> Trial | None:
        """Trial 0, when the study began with the search space's defaults; after a guard of short runs, the first full one."""
        first = bool(self.spec.get("sampler", {}).get("defaults_first", True))
        return next((t for t in self.trials if not t.short and (t.number == 0 or self.trials[0].short)), None) if first else None

    @property
    def base_loss(self) -> float | None:
        """Validation loss of the base model, measured before the first step of the first trial that was trained."""
        first = next((t.outcomes[0] for t in self.trials if t.outcomes), None)
        return next((p.validation_loss for p in first.curve if p.step == 0), None) if first is not None else None

    @property
    def device_seconds(self) -> float:
        return sum(t.device_seconds for t in self.trials)

    @property
    def tokens(self) -> int:
        return sum(t.tokens for t in self.trials)

    @property
    def spent_device_seconds(self) -> float:
        """With what running and paused trials took so far, which no outcome tells yet."""
        return max([self.device_seconds, *(s.get("device_seconds", 0.0) for s in self.sessions)])

    @property
    def cost(self) -> float | None:
        """That, at `budget.price_per_device_hour`; None without a price."""
        price = self.spec.get("budget", {}).get("price_per_device_hour")
        return None if price is None else self.spent_device_seconds / 3600 * price

    @property
    def currency(self) -> str:
        return str(self.spec.get("budget", {}).get("currency") or "")

    @property
    def wall_seconds(self) -> float:
        return sum(s.get("seconds", 0.0) for s in self.sessions)

    def to_dataframe(self) -> Any:
        """A pandas DataFrame, one trial a row: number, state, what was searched, validation loss, cost."""
        return notebook.dataframe(self)

    def __repr__(self) -> str:
        return notebook.line(self)

    def _repr_html_(self) -> str:
        return notebook.html(self)


def ranking_key(objectives: dict[str, str]) -> Callable[[Trial], Any]:
    """What finished trials are sorted by; objectives: name -> direction, the first one counts."""
    first, direction = next(iter(objectives.items()))
    sign = -1.0 if direction == "maximize" else 1.0
    if first == LOSS:
        return lambda trial: (trial.value, trial.number)
    return lambda trial: (sign * trial.values[0] if trial.values else math.inf, trial.value, trial.number)


def objectives_of(spec: dict[str, Any]) -> dict[str, str]:
    """The objectives of a `spec.yaml` by name, with their directions; of one from before there were several, the loss."""
    given = spec.get("objectives") or [LOSS]
    return dict((o, "minimize") if isinstance(o, str) else (o["name"], o["direction"]) for o in given)
