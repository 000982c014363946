"""Copy a trial's adapter as an ordinary PEFT folder, or save the base model with the adapter merged into it."""

import argparse
import shutil
import tempfile
from pathlib import Path

from loratune.errors import StorageError
from loratune.record import StudyRecord, Trial, read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="the study's folder")
    parser.add_argument("destination", metavar="DESTINATION", help="folder to make")
    parser.add_argument("--trial", type=int, metavar="N", help="default: the best trial")
    parser.add_argument("--merged", action="store_true", help="the whole model, with the adapter merged into its weights")


def main(args: argparse.Namespace) -> int:
    record = read(Path(args.folder))
    destination = Path(args.destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise StorageError(f"{destination} exists and is not an empty folder. Choose another destination.")
    trial = _choose(record, args.trial)
    adapter = _adapter(record, trial)
    if args.merged:
        _merge(record, adapter, destination)
    else:
        _copy(adapter, destination)
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
    if record.best is not None and trial.number == record.best.number:
        places.append(record.folder / "adapter")
    for place in places:
        if (place / "adapter_config.json").is_file():
            return place
    kept = [f"{path.parents[2].name.lstrip('0') or '0'}" for path in sorted(record.folder.glob("trials/*/main/adapter/adapter_config.json"))]
    raise StorageError(
        f"the adapter of trial {trial.number} ({trial.state}) is not on disk; adapters there: {', '.join(kept) or 'none'}. "
        "The field output.keep_adapters says how many a study keeps."
    )


def _copy(adapter: Path, destination: Path) -> None:
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as aside:
            made = shutil.copytree(adapter, Path(aside) / "adapter")
            made.rename(destination)
    except OSError as error:
        raise StorageError(f"cannot write {destination}: {error.strerror or error}.") from error


def _merge(record: StudyRecord, adapter: Path, destination: Path) -> None:
    from loratune.finetune.export import merge
    from loratune.work import ModelRecipe

    merge(ModelRecipe(**record.spec["model"]), adapter, destination)
