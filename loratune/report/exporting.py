"""Taking one adapter out of a study: an ordinary PEFT folder with its model card, or the whole model with the adapter merged in."""

from pathlib import Path
from typing import Any

from loratune.errors import StorageError
from loratune.record import StudyRecord, Trial, read
from loratune.record.adapters import adapter_of, best_of, trial_of
from loratune.report.handover import model_card
from loratune.work import ModelRecipe


def export(folder: Path, destination: Path, *, trial: int | None = None, merged: bool = False) -> Path:
    """Write an adapter of the study in `folder` to `destination`, and return it.

    trial: its number; by default the one that a selection chose, as long as the study did not go on since, else the one with the
    lowest validation loss. merged: write the base model with the adapter added to its weights, W + scale * B A, and its tokenizer.

    Raises StorageError when `destination` holds something, when there is no such trial, or its adapter was not kept; ModelError.
    """
    record = read(folder)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise StorageError(f"{destination} exists and is not an empty folder. Choose another destination.")
    from loratune import selection  # scipy: a second of import

    chosen = selection.read(record.folder) if trial is None else None
    card: dict[str, Any] | str
    if chosen is not None and chosen.holds_for(record):
        found = chosen.trial_of(record)
        adapter = selection.adapter_folder(record, found, chosen.shipped.run) or adapter_of(record, found)
        card = _facts(record, found) if merged else model_card(record, found, chosen)
    else:
        found = best_of(record) if trial is None else trial_of(record, trial)
        adapter, card = adapter_of(record, found), _facts(record, found)
    from loratune.finetune.export import export_adapter, merge  # torch

    if merged:
        return merge(ModelRecipe(**record.spec["model"]), adapter, destination, card, prompt=record.prompt["kind"])
    return export_adapter(adapter, destination, card)


def _facts(record: StudyRecord, trial: Trial) -> dict[str, Any]:
    """What the model card says of where the adapter comes from."""
    facts = {
        "study": record.name,
        "trial": trial.number,
        "prompt": record.prompt.get("note"),
        "validation loss": trial.value,
        "validation loss of the base model": record.base_loss,
    }
    if record.default is not None:
        facts["validation loss of the defaults"] = record.default.value
    return {name: value for name, value in facts.items() if value is not None}
