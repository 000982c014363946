"""A trial by its number, and where its adapter lies."""

import json
from pathlib import Path

from loratune.errors import StorageError
from loratune.record.trials import StudyRecord, Trial
from loratune.system.files import text_of

FILES = ("adapter_config.json", "adapter_model.safetensors")


def best_of(record: StudyRecord) -> Trial:
    """The trial with the lowest loss. Raises StorageError when none was trained to its end yet."""
    if record.best is None:
        raise StorageError(f"{record.folder} has no trial that was trained to its end yet. See `loratune status {record.folder}`.")
    return record.best


def trial_of(record: StudyRecord, number: int) -> Trial:
    """Raises StorageError when there is none of that number."""
    found = next((trial for trial in record.trials if trial.number == number), None)
    if found is None:
        has = f"its trials are 0 to {record.trials[-1].number}" if record.trials else "it has none yet"
        raise StorageError(f"{record.folder} has no trial {number}; {has}.")
    return found


def shipped_run(record: StudyRecord) -> tuple[int, str] | None:
    """(trial, its run: main, race-01, ...) whose adapter `loratune select` hands over; None before it, and when the study went on since.

    Of the selection's file these two facts alone, without the room that makes it, which takes a second to import. Raises StorageError.
    """
    path = record.folder / "selection.json"
    if not path.is_file():
        return None
    try:
        made = json.loads(text_of(path))
        chosen = int(made["chosen"]), str(made["shipped"]["run"])
        return chosen if made["finished"] == len(record.finished) else None
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"cannot read {path}: {error}. Remove it; `loratune select {record.folder}` writes it anew.") from error


def adapter_of(record: StudyRecord, trial: Trial) -> Path:
    """The folder of the trial's adapter: where it was trained, else the one handed over. Raises StorageError."""
    places = [record.folder / "trials" / f"{trial.number:04d}" / "main" / "adapter"]
    if record.best is not None and trial.number == record.best.number and not (record.folder / "selection.json").exists():
        places.append(record.folder / "adapter")
    for place in places:
        if all((place / name).is_file() for name in FILES):
            return place
    kept = sorted(int(path.parents[2].name) for path in record.folder.glob(f"trials/*/main/adapter/{FILES[0]}"))
    raise StorageError(
        f"the adapter of trial {trial.number} ({trial.state}) is not on disk; adapters there: {', '.join(map(str, kept)) or 'none'}. "
        "The field output.keep_adapters says how many a study keeps."
    )
