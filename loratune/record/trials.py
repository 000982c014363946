"""A study as read back from its folder: its trials, what they cost, the best and the default.

`read` needs neither the lock nor Optuna: it serves `status` and the report while the study runs.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loratune.errors import ModelError, StorageError
from loratune.record import notebook
from loratune.record.paths import MAIN, StudyPaths, TrialPaths
from loratune.record.states import TrialState
from loratune.system.files import AnyPath, parsed
from loratune.work import CurvePoint, Hyperparameters, Json, ModelRecipe, Outcome, State


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
        """The finished trial of the lowest validation loss, which keeps every constraint; ties go to the earlier one."""
        return next(iter(self.ranking), None)

    @property
    def ranking(self) -> list[Trial]:
        """The finished trials, the lowest validation loss first; ties go to the earlier one."""
        return sorted(self.finished, key=lambda t: (t.value, t.number))

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
        """The finished trials that no other beats in every objective, lowest validation loss first. With one objective, the best."""
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


def objectives_of(spec: dict[str, Any]) -> dict[str, str]:
    """The objectives of a `spec.yaml` by name, with their directions; of one from before there were several, the loss."""
    given = spec.get("objectives") or ["validation_loss"]
    return dict((o, "minimize") if isinstance(o, str) else (o["name"], o["direction"]) for o in given)


def read(folder: AnyPath, *, trust_remote_code: bool = False) -> StudyRecord:
    """Read a study's folder; safe while it is being written.

    trust_remote_code: let code run that comes with the base model, when the study asks for it and its model is loaded.
    Raises StorageError when it is not one, and for a damaged file of it: which, and what to do.
    """
    folder, paths = Path(folder), StudyPaths(folder)
    if not paths.spec.is_file():
        raise StorageError(f"{folder} is not a study's folder: it has no spec.yaml. `loratune run` makes one.")
    spec = parsed(paths.spec, _spec, "Restore it from a copy, or give the same `loratune run` command again with every flag.")
    return StudyRecord(
        folder=folder,
        name=spec.get("name") or folder.name,
        spec=spec,
        trials=tuple(_read_trial(trial) for trial in paths.trials_there() if trial.record.exists()),
        sessions=tuple(read_sessions(paths)),
        manifest=_manifest(paths),
        prompt=_prompt(paths, spec),
        progress=_progress(paths),
        trusted=trust_remote_code,
    )


def read_sessions(paths: StudyPaths) -> list[dict[str, Any]]:
    """Every start of the driver, in order. Raises StorageError."""
    files = (path for path in paths.sessions.glob("*.json") if path.stem.isdigit())
    remedy = "Remove the file: it holds the command and the duration of one start, no result."
    return [parsed(path, _session, remedy) for path in sorted(files, key=lambda path: int(path.stem))]


def _session(text: str) -> dict[str, Any]:
    session = _mapping(json.loads(text))
    seconds = {name: float(session.get(name, 0.0)) for name in ("seconds", "device_seconds")}
    return session | seconds | {"number": int(session.get("number", 0))}


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected a mapping, found {type(value).__name__}")
    return dict(_harmless(value))


def _harmless(value: Any) -> Any:
    """The value without control characters in its texts: a folder may come from somebody else, and terminals obey escape sequences."""
    if isinstance(value, str):
        return _CONTROL.sub("", value)
    if isinstance(value, list):
        return [_harmless(item) for item in value]
    if isinstance(value, dict):
        return {_harmless(key): _harmless(item) for key, item in value.items()}
    return value


# What to do about a damaged file, by what `loratune run` makes of its absence.
TRAINED_ANEW = "Remove the file; the same `loratune run` command trains this segment again, to the same result."
WRITTEN_ANEW = "Remove the file; the same `loratune run` command writes it again."

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but the tab and the line feed

_READ: dict[str, dict[str, Any]] = {  # what readers take from a description without looking at it again: section, field, type
    "": {"name": (str, type(None)), "seed": int},
    "sampler": {"name": str},
    "schedule": {"name": str},
    "budget": {"trials": int, "price_per_device_hour": (int, float, type(None))},
    "model": {"name_or_path": str, "revision": (str, type(None))},
    "executor": {"device": str},
    "output": {},
    "data": {},
    "training": {},
}


def _spec(text: str) -> dict[str, Any]:
    try:
        spec = _mapping(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from error
    for section, fields in _READ.items():
        within = _mapping(spec.get(section) or {}) if section else spec
        for name, kind in fields.items():
            if name in within and not isinstance(within[name], kind):
                raise TypeError(f"{section}{'.' * bool(section)}{name}: found {within[name]!r:.60}")
    objectives_of(spec)
    return spec


def _manifest(paths: StudyPaths) -> dict[str, Any]:
    """The prepared data's manifest; empty where the data or the way to them are gone, since `loratune run` makes both again."""
    data = _cached(paths.recipe).get("data")
    return _cached(Path(data) / "manifest.json") if isinstance(data, str) else {}


def _prompt(paths: StudyPaths, spec: dict[str, Any]) -> dict[str, Any]:
    """As recorded; of a study older than such records, as its description says."""
    path, kind = paths.prompt, spec.get("data", {}).get("prompt", "alpaca")
    remedy = "Remove the file; the same `loratune run` command writes it again, with the day's date for a template that shows one."
    recorded = parsed(path, lambda text: _mapping(json.loads(text)), remedy) if path.is_file() else {"note": kind}
    return {"kind": kind, "note": "", "date": "", "thinking": False, "end": ""} | recorded


def _cached(path: Path) -> dict[str, Any]:
    """The mapping in a file that is only a copy of other knowledge: missing or damaged, it is empty."""
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _progress(paths: StudyPaths) -> dict[str, Any]:
    """`ProgressTracker.snapshot` as last written; empty where one of the numbers that are read from it is none."""
    found = _cached(paths.progress)
    numbers = [found.get("updated"), found.get("wall_seconds")]
    numbers += [
        found[name] for name in ("heard", "full_runs", "left_to_find", "tokens_per_second", "seconds_left") if found.get(name) is not None
    ]
    rows = found.get("running", [])
    fits = isinstance(rows, list) and all(isinstance(row, dict) and {"trial", "step", "total_steps"} <= row.keys() for row in rows)
    return found if fits and all(isinstance(number, int | float) for number in numbers) else {}


def _read_trial(paths: TrialPaths) -> Trial:
    outcomes, path = read_outcomes(paths), paths.record
    plain = [o.to_plain() for o in outcomes]
    remedy = "Remove the file; the same `loratune run` command writes it again from the trial's outcomes."
    trial = parsed(path, lambda text: _trial_of(text, plain), remedy)
    if trial.number != paths.number:
        raise StorageError(f"{path} is damaged (it is of trial {trial.number}). {remedy}")
    return trial


def _trial_of(text: str, outcomes: list[dict[str, Any]]) -> Trial:
    trial = Trial.from_plain(_mapping(json.loads(text)) | {"outcomes": outcomes})
    if trial.state is TrialState.COMPLETE and trial.value is None:
        raise ValueError("complete without a value")
    return trial


def read_outcomes(trial: TrialPaths) -> list[Outcome]:
    """The outcomes in a trial's folder, in the order they were trained: shorter runs first, `main` last, each by its steps.

    A run of a larger share comes later (`schedules/halving.py`); its last step says how large. Times of files say nothing: a copy
    has others. Raises StorageError.
    """
    found = [parsed(file, outcome_of, TRAINED_ANEW) for file in trial.outcomes()]
    length: dict[str, int] = {}
    for outcome in found:
        length[outcome.run] = max(outcome.stop_step, length.get(outcome.run, 0))
    return sorted(found, key=lambda o: (o.run == MAIN, length[o.run], o.run, o.stop_step))


def outcome_of(text: str) -> Outcome:
    """An outcome as it lies on disk. Raises ValueError and the like, for `parsed`."""
    found = _mapping(json.loads(text))
    if not re.fullmatch(r"\d+/[^/]+/\d+", str(found.get("key"))):
        raise ValueError("its key is no trial/run/step")
    outcome = Outcome.from_plain(found)
    if outcome.state is State.COMPLETED and outcome.validation_loss is None:
        raise ValueError("completed without a validation loss")
    return outcome
