"""Reading a study's folder: every file of it that a person or another machine may have damaged, and what to do then.

`read` needs neither the lock nor Optuna: it serves `status` and the report while the study runs.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from loratune.errors import StorageError
from loratune.record.paths import MAIN, StudyPaths, TrialPaths
from loratune.record.states import TrialState
from loratune.record.trials import StudyRecord, Trial, objectives_of
from loratune.system.files import AnyPath, parsed
from loratune.work import Outcome, State


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
