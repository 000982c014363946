"""The hand-over: the chosen configuration as a file, its adapter as an ordinary PEFT folder with a model card.

Chosen is what `loratune select` chose, as long as the study did not go on since; before that, the best trial of the study's
first objective, as a rule the lowest validation loss.
"""

import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from loratune.delivery.verify import as_measured
from loratune.errors import StorageError, TrainingError
from loratune.record import StudyRecord, Trial
from loratune.record.adapters import best_of, find_adapter, trial_of
from loratune.record.paths import MAIN, StudyPaths
from loratune.report import spec_summary, tables
from loratune.system.files import AnyPath, new_folder, write_atomically
from loratune.system.machine import version_of_loratune

if TYPE_CHECKING:
    from loratune.selection import SelectionRecord


Check = Callable[[StudyRecord, Trial, Path], None]


def hand_over(record: StudyRecord, folder: AnyPath, check: Check | None = as_measured) -> tuple[Path, Path]:
    """Write `best.yaml` and `adapter/` of the study's chosen trial into `folder`; returns their paths.

    An adapter of an earlier call is replaced once the new one is complete.
    check: raises unless the adapter is the one that was measured; None: nothing is checked.
    Raises TrainingError when no trial was trained to the end, StorageError when its adapter is missing, and whatever `check` raises,
    with nothing written.
    """
    from loratune.delivery.model_card import model_card  # scipy: a second of import

    paths, found, selection = StudyPaths(folder), tables.headline(record), selection_of(record)
    best = selection.trial_of(record) if selection is not None else found.best
    if best is None:
        raise TrainingError(
            f"{record.name} has no trial that was trained to the end, so there is nothing to hand over. "
            f"See their outcomes with `loratune status {record.folder}`."
        )
    source = find_adapter(record, best, selection.shipped.run if selection else MAIN)
    if source is None:
        raise StorageError(
            f"no adapter of trial {best.number}, the {'chosen' if selection else 'best'}, in {record.paths.trials}: it was removed, or "
            f"training did not write it. `loratune select {record.folder}` trains that of its choice again."
        )
    if check is not None:
        check(record, best, source)
    card = model_card(record, best, selection)
    with new_folder(paths.adapter) as fresh:
        for path in source.iterdir():
            if path.is_file():
                shutil.copyfile(path, fresh / path.name)
        (fresh / "README.md").write_text(card, encoding="utf-8")
    content = _best(record, replace(found, best=best), best, paths.adapter.name, selection)
    write_atomically(paths.best, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000))
    return paths.best, paths.adapter


def selection_of(record: StudyRecord) -> "SelectionRecord | None":
    """What `loratune select` chose; None where it did not, or the study went on since."""
    if not record.paths.selection.is_file():
        return None
    from loratune import selection  # scipy: seconds of import

    made = selection.read_selection(record.folder)
    return made if made is not None and made.holds_for(record) else None


def chosen_trial(record: StudyRecord, trial: int | None = None) -> "tuple[Trial, SelectionRecord | None]":
    """The trial of this number; by default the one that a selection chose, with it, else the best. Raises StorageError."""
    if trial is not None:
        return trial_of(record, trial), None
    selection = selection_of(record)
    return (selection.trial_of(record), selection) if selection is not None else (best_of(record), None)


def refresh_card(record: StudyRecord) -> Path | None:
    """Write the card of `adapter/` anew, where that is still the adapter to ship: what was measured since belongs on it."""
    from loratune.delivery.model_card import model_card

    selection = selection_of(record)
    chosen = selection.trial_of(record) if selection is not None else tables.headline(record).best
    best, card = record.paths.best, record.paths.adapter / "README.md"
    if chosen is None or not (best.is_file() and card.is_file()):
        return None
    told = yaml.safe_load(best.read_text(encoding="utf-8"))
    handed = (told["trial"], told["chosen"]["run"] if isinstance(told["chosen"], dict) and "run" in told["chosen"] else None)
    if handed != (chosen.number, selection.shipped.run if selection is not None else None):
        return None
    write_atomically(card, model_card(record, chosen, selection))
    return card


_LOWEST = "the lowest validation loss"


def _best(record: StudyRecord, found: tables.Headline, best: Trial, adapter: str, selection: "SelectionRecord | None") -> dict[str, Any]:
    from loratune.delivery.model_card import load_call, load_options

    hyperparameters = {f.name: getattr(best.hyperparameters, f.name) for f in fields(best.hyperparameters)}
    return {
        "study": record.name,
        "trial": best.number,
        "validation_loss": selection.shipped.validation_loss if selection else best.value,
        "default_trial": found.default.number if found.default else None,
        "default_validation_loss": found.default_loss,
        "base_validation_loss": found.base,
        **({"scores": {record.own_objective: best.scores.get(record.own_objective)}} if record.own_objective else {}),
        "chosen": _chosen(selection) if selection else f"the best {record.own_objective}" if record.own_objective else _LOWEST,
        "hyperparameters": {name: list(value) if isinstance(value, tuple) else value for name, value in hyperparameters.items()},
        "base_model": spec_summary.base_model(record),
        "base_model_revision": record.spec.get("model", {}).get("revision"),
        "prompt": record.prompt.get("template") or record.prompt.get("kind"),
        "prompt_date": record.prompt.get("date") or None,
        "adapter": adapter,
        "load": f"peft.{load_call(adapter, load_options(record))}",
        "command": spec_summary.command(record),
        "loratune": version_of_loratune(),
    }


def _chosen(selection: "SelectionRecord") -> dict[str, Any]:
    unbiased = selection.unbiased
    return {
        "rule": selection.rule,
        "seed": selection.shipped.seed,
        "run": selection.shipped.run,
        "how_sure": selection.confidence,
        "loss_with_fresh_seeds": unbiased.chosen.value if unbiased else None,
        "gain_over_default_with_fresh_seeds": unbiased.gain.value if unbiased and unbiased.gain else None,
    }
