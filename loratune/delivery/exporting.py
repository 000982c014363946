"""Taking one adapter out of a study: an ordinary PEFT folder with its model card, or the whole model with the adapter merged in."""

from dataclasses import dataclass
from pathlib import Path

from loratune.delivery.handover import chosen_trial
from loratune.delivery.verify import as_measured, prepared_data
from loratune.errors import StorageError
from loratune.record import read
from loratune.record.adapters import adapter_of, find_adapter
from loratune.record.paths import MAIN
from loratune.system.files import AnyPath


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    folder: Path
    trial: int
    run: str  # of the trial's: main, or one of the selection's with a fresh seed

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


def export(
    folder: AnyPath, destination: AnyPath, *, trial: int | None = None, merged: bool = False, trust_remote_code: bool = False
) -> Path:
    """Write an adapter of the study in `folder` to `destination`, and return it.

    trial: its number; by default the one that a selection chose, as long as the study did not go on since, else the one with the
    lowest validation loss. merged: write the base model with the adapter added to its weights, W + scale * B A, and its tokenizer.

    Before, the adapter is loaded by plain PEFT and compared with what was measured; a merged model, by plain Transformers, too.
    Raises StorageError when `destination` holds something, when there is no such trial, or its adapter was not kept; ModelError.
    """
    return exported(folder, destination, trial=trial, merged=merged, trust_remote_code=trust_remote_code).folder


def exported(
    folder: AnyPath, destination: AnyPath, *, trial: int | None = None, merged: bool = False, trust_remote_code: bool = False
) -> Exported:
    """As `export`; tells also which trial and run it was."""
    record, destination = read(folder, trust_remote_code=trust_remote_code), Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise StorageError(f"{destination} exists and is not an empty folder. Choose another destination.")
    found, chosen = chosen_trial(record, trial)
    if chosen is not None:
        shipped = find_adapter(record, found, chosen.shipped.run)
        if shipped is None:  # another seed's would be another adapter than the one that was chosen, measured and described
            raise StorageError(
                f"the adapter that `loratune select` chose, of trial {found.number} ({chosen.shipped.run}), is not on disk. "
                f"`loratune select {record.folder}` trains it again; --trial {found.number} exports that of the study's own run."
            )
        adapter = shipped
    else:
        adapter = adapter_of(record, found)
    as_measured(record, found, adapter)
    from loratune.delivery.merge import export_adapter, merge
    from loratune.delivery.model_card import model_card

    card = model_card(record, found, chosen, merged=merged)
    if merged:
        prompt = record.prompt.get("template") or record.prompt["kind"]
        merge(record.base_model, adapter, destination, card, data=prepared_data(record), prompt=prompt)
    else:
        export_adapter(adapter, destination, card)
    return Exported(folder=destination, trial=found.number, run=chosen.shipped.run if chosen is not None else MAIN)
