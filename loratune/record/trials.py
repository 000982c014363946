"""A study as read back from its folder: its trials, what they cost, the best and the default.

`read` needs neither the lock nor Optuna: it serves `status` and the report while the study runs.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loratune.errors import StorageError
from loratune.work import CurvePoint, Hyperparameters, Json, Outcome

# What a trial's `state` says, beyond the states of one segment.
RUNNING, PAUSED, COMPLETE, PRUNED = "running", "paused", "complete", "pruned"
FAILED, DIVERGED, INFEASIBLE = "failed", "diverged", "infeasible"


@dataclass(frozen=True, kw_only=True)
class Trial(Json):
    """One configuration and what became of it; `trial.json` holds all fields but the outcomes."""

    number: int
    hyperparameters: Hyperparameters
    params: dict[str, Any]  # searched values only, by the search space's own names (alpha_ratio, ...)
    state: str = RUNNING
    value: float | None = None  # latest validation loss; the worst seen of a trial that diverged or did not fit; None: not trained
    values: tuple[float, ...] = ()  # as Optuna is told them, in the order of the spec's objectives
    message: str = ""
    outcomes: tuple[Outcome, ...] = ()  # in the order they were trained

    @property
    def curve(self) -> tuple[CurvePoint, ...]:
        """The learning curve of the trial's last run, ascending steps."""
        runs = [outcome.key.split("/")[1] for outcome in self.outcomes]
        return tuple(p for run, o in zip(runs, self.outcomes, strict=True) if run == runs[-1] for p in o.curve)

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

    @property
    def finished(self) -> list[Trial]:
        """Trials trained to the end of the full run and within every constraint, in order of number."""
        return [t for t in self.trials if t.state == COMPLETE]

    @property
    def best(self) -> Trial | None:
        """The finished trial of the lowest validation loss, which keeps every constraint; ties go to the earlier one."""
        return min(self.finished, key=lambda t: (t.value, t.number), default=None)

    @property
    def objectives(self) -> dict[str, str]:
        """The names of the objectives and their directions, `minimize` or `maximize`."""
        return objectives_of(self.spec)

    @property
    def front(self) -> list[Trial]:
        """The finished trials that no other beats in every objective, lowest validation loss first. With one objective, the best."""
        if len(self.objectives) == 1:
            return [] if self.best is None else [self.best]
        from loratune.statistics.pareto import non_dominated  # numpy and scipy, for several objectives only

        trials = sorted((t for t in self.finished if t.values), key=lambda t: (t.value, t.number))
        maximise = [direction == "maximize" for direction in self.objectives.values()]
        if not trials:
            return []
        return [trial for trial, on in zip(trials, non_dominated([t.values for t in trials], maximise), strict=True) if on]

    @property
    def default(self) -> Trial | None:
        """Trial 0, when the study began with the search space's defaults."""
        first = bool(self.spec.get("sampler", {}).get("defaults_first", True))
        return self.trials[0] if first and self.trials else None

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
    def wall_seconds(self) -> float:
        return sum(s.get("seconds", 0.0) for s in self.sessions)


def objectives_of(spec: dict[str, Any]) -> dict[str, str]:
    """The objectives of a `spec.yaml` by name, with their directions; of one from before there were several, the loss."""
    given = spec.get("objectives") or ["validation_loss"]
    return dict((o, "minimize") if isinstance(o, str) else (o["name"], o["direction"]) for o in given)


def read(folder: Path) -> StudyRecord:
    """Read a study's folder; safe while it is being written. Raises StorageError when it is not one."""
    if not (folder / "spec.yaml").is_file():
        raise StorageError(f"{folder} is not a study's folder: it has no spec.yaml. `loratune run` makes one.")
    spec = yaml.safe_load(text_of(folder / "spec.yaml"))
    recipe = folder / "recipe.json"
    manifest = Path(json.loads(text_of(recipe))["data"]) / "manifest.json" if recipe.is_file() else recipe
    return StudyRecord(
        folder=folder,
        name=spec.get("name") or folder.name,
        spec=spec,
        trials=tuple(_read_trial(path) for path in sorted((folder / "trials").glob("*/trial.json"))),
        sessions=tuple(json.loads(text_of(path)) for path in sorted((folder / "sessions").glob("*.json"))),
        manifest=json.loads(text_of(manifest)) if manifest.is_file() else {},
        prompt=_prompt(folder, spec),
        progress=json.loads(text_of(folder / "progress.json")) if (folder / "progress.json").is_file() else {},
    )


def _prompt(folder: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """As recorded; of a study older than such records, as its description says."""
    if (folder / "prompt.json").is_file():
        return dict(json.loads(text_of(folder / "prompt.json")))
    kind = spec.get("data", {}).get("prompt", "alpaca")
    return {"kind": kind, "note": kind, "date": "", "thinking": False}


def _read_trial(path: Path) -> Trial:
    outcomes = [(file.stat().st_mtime_ns, Outcome.from_json(text_of(file))) for file in path.parent.glob("*/outcomes/*.json")]
    outcomes.sort(key=lambda pair: (pair[0], pair[1].key))
    trial = json.loads(text_of(path)) | {"outcomes": [json.loads(o.to_json()) for _, o in outcomes]}
    return Trial.from_json(json.dumps(trial))


def outcome_path(folder: Path, key: str) -> Path:
    """Where the outcome of the segment `key` lies in the study's folder."""
    trial, run, stop = key.split("/")
    return folder / "trials" / trial / run / "outcomes" / f"{stop}.json"


def text_of(path: Path) -> str:
    """The file's text. Raises StorageError."""
    try:
        return path.read_text()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
