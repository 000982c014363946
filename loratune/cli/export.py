"""Copy a trial's adapter as an ordinary PEFT folder, or save the base model with the adapter merged into it."""

import argparse
from pathlib import Path
from typing import Any

from loratune.errors import StorageError
from loratune.record import StudyRecord, Trial, read
from loratune.work import ModelRecipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="the study's folder")
    parser.add_argument("destination", metavar="DESTINATION", help="folder to make")
    parser.add_argument("--trial", type=int, metavar="N", help="default: the one that `loratune select` chose, else the best")
    parser.add_argument("--merged", action="store_true", help="the whole model, with the adapter merged into its weights")


def main(args: argparse.Namespace) -> int:
    record = read(Path(args.folder))
    destination = Path(args.destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise StorageError(f"{destination} exists and is not an empty folder. Choose another destination.")
    from loratune import selection
    from loratune.report.handover import model_card

    chosen = selection.read(record.folder) if args.trial is None else None
    card: dict[str, Any] | str
    if chosen is not None and chosen.holds_for(record):
        trial = chosen.trial_of(record)
        adapter = selection.adapter_folder(record, trial, chosen.shipped.run) or _adapter(record, trial)
        card = _card(record, trial) if args.merged else model_card(record, trial, chosen)
    else:
        trial = _choose(record, args.trial)
        adapter, card = _adapter(record, trial), _card(record, trial)
    from loratune.finetune.export import export_adapter, merge  # torch

    if args.merged:
        merge(ModelRecipe(**record.spec["model"]), adapter, destination, card)
    else:
        export_adapter(adapter, destination, card)
    print(destination)
    return 0


def _choose(record: StudyRecord, number: int | None) -> Trial:
    if number is None:
        if record.best is None:
            raise StorageError(f"{record.folder} has no trial that was trained to its end yet. See `loratune status {record.folder}`.")
        return record.best
    found = next((trial for trial in record.trials if trial.number == number), None)
    if found is None:
        has = f"its trials are 0 to {record.trials[-1].number}" if record.trials else "it has none yet"
        raise StorageError(f"{record.folder} has no trial {number}; {has}.")
    return found


def _adapter(record: StudyRecord, trial: Trial) -> Path:
    """The folder of the trial's adapter: where it was trained, else the one handed over."""
    places = [record.folder / "trials" / f"{trial.number:04d}" / "main" / "adapter"]
    if record.best is not None and trial.number == record.best.number and not (record.folder / "selection.json").exists():
        places.append(record.folder / "adapter")
    for place in places:
        if (place / "adapter_config.json").is_file():
            return place
    kept = [
        f"{path.parents[2].name.lstrip('0') or '0'}" for path in sorted(record.folder.glob("trials/*/main/adapter/adapter_config.json"))
    ]
    raise StorageError(
        f"the adapter of trial {trial.number} ({trial.state}) is not on disk; adapters there: {', '.join(kept) or 'none'}. "
        "The field output.keep_adapters says how many a study keeps."
    )


def _card(record: StudyRecord, trial: Trial) -> dict[str, Any]:
    """What the model card says of where the adapter comes from."""
    facts = {
        "study": record.name,
        "trial": trial.number,
        "validation loss": trial.value,
        "validation loss of the base model": record.base_loss,
    }
    if record.default is not None:
        facts["validation loss of the defaults"] = record.default.value
    return {name: value for name, value in facts.items() if value is not None}
