"""A trial by its number, and where its adapter lies."""

import json
from pathlib import Path

from loratune.errors import StorageError
from loratune.record.paths import ADAPTER_FILES, MAIN
from loratune.record.trials import StudyRecord, Trial
from loratune.system.files import text_of


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
    path = record.paths.selection
    if not path.is_file():
        return None
    try:
        made = json.loads(text_of(path))
        chosen = int(made["chosen"]), str(made["shipped"]["run"])
        return chosen if made["finished"] == len(record.finished) else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StorageError(f"cannot read {path}: {error}. Remove it; `loratune select {record.folder}` writes it anew.") from error


def find_adapter(record: StudyRecord, trial: Trial, run: str = MAIN, *, handed_over: bool = False) -> Path | None:
    """The folder of the adapter of the trial's run: where the study trained it, else where a selection did; None where neither is there.

    handed_over: else `adapter/`, of the best trial, as long as nothing was selected.
    """
    paths = record.paths
    places = [paths.run(trial.number, run).adapter, paths.finalists.run(trial.number, run).adapter]
    best = record.best is not None and trial.number == record.best.number
    if handed_over and best and run == MAIN and not paths.selection.exists():
        places.append(paths.adapter)
    return next((place for place in places if all((place / name).is_file() for name in ADAPTER_FILES)), None)


def adapter_of(record: StudyRecord, trial: Trial) -> Path:
    """The folder of the trial's adapter: where it was trained, else the one handed over. Raises StorageError."""
    found = find_adapter(record, trial, handed_over=True)
    if found is None:
        kept = [t.number for t in record.trials if find_adapter(record, t) is not None]
        raise StorageError(
            f"the adapter of trial {trial.number} ({trial.state}) is not on disk; adapters there: {', '.join(map(str, kept)) or 'none'}. "
            "The field output.keep_adapters sets how many a study keeps."
        )
    return found
