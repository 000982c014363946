"""From what the user writes (tuned, default, base, trial:17, a folder) to an adapter on disk."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from loratune.errors import ModelError, StorageError
from loratune.record import StudyRecord, Trial
from loratune.record.adapters import adapter_of, best_of, trial_of
from loratune.record.paths import ADAPTER_FILES, MAIN
from loratune.work import Json, ModelRecipe

NAMES = ("tuned", "default", "base")


@dataclass(frozen=True, kw_only=True)
class Contestant(Json):
    """One of the two models: the base model, alone or with an adapter."""

    label: str  # for people: "trial 17 (tuned)"
    name: str  # for folders: "trial-17"
    adapter: str | None  # PEFT folder; None: the base model alone
    weights: str = ""  # SHA-256 of the adapter's config and weights: whether it is still the same


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What `tuned` stands for: a trial and one of its adapters, which a selection chose."""

    trial: Trial
    adapter: Path  # PEFT folder
    run: str = MAIN  # of the trial: main, the study's own; else with another seed, a model of its own


def contestant_of(given: str, study: StudyRecord | None, tuned: Tuned | None = None) -> Contestant:
    """The contestant that `given` names. tuned: by default the study's trial with the lowest validation loss.

    Raises StorageError when the study has no such trial or its adapter is gone, ModelError for a folder
    without an adapter.
    """
    if given == "base":
        return Contestant(label="base model", name="base", adapter=None)
    chosen = tuned if given == "tuned" else None
    trial = _trial(given, study) if chosen is None else chosen.trial
    if trial is not None and study is not None:
        adapter = adapter_of(study, trial).resolve() if chosen is None else chosen.adapter.resolve()
        again = chosen.run if chosen is not None and chosen.run != MAIN else ""
        roles = ", ".join(filter(None, [given if given in NAMES else "", again]))
        label = f"trial {trial.number}" + (f" ({roles})" if roles else "")
        name = f"trial-{trial.number}" + (f"-{again}" if again else "")
        return Contestant(label=label, name=name, adapter=str(adapter), weights=_digest(adapter))
    folder = Path(given)
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        what = f"as an adapter's folder it has no {' and no '.join(missing)}" if folder.is_dir() else "there is no such folder"
        raise ModelError(f"{given!r} is none of {', '.join(NAMES)}, trial:NUMBER, and {what}.")
    weights = _digest(folder)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-.") or "adapter"
    return Contestant(label=given, name=f"{name}-{weights[:6]}", adapter=str(folder.resolve()), weights=weights)


def base_of(*contestants: Contestant) -> ModelRecipe:
    """The base model that the adapters name, when there is no study to say it. Raises ModelError."""
    named: dict[str, str] = {}
    for contestant in contestants:
        if contestant.adapter is not None:
            config = json.loads((Path(contestant.adapter) / ADAPTER_FILES[0]).read_text())
            named[str(config.get("base_model_name_or_path") or "")] = contestant.label
    if len(named) != 1 or "" in named:
        said = ", ".join(f"{label}: {name or 'none'}" for name, label in named.items()) or "no adapter is given"
        raise ModelError(f"which base model? The adapters do not tell ({said}). Give --model, or --study with the study's folder.")
    return ModelRecipe(name_or_path=next(iter(named)))


def _trial(given: str, study: StudyRecord | None) -> Trial | None:
    """The study's trial that `given` names; None when it names none."""
    number = re.fullmatch(r"trial[:-](\d+)", given)
    if given not in NAMES and number is None:
        return None
    if study is None:
        raise StorageError(f"{given!r} belongs to a study: name the study's folder with --study.")
    if given == "default":
        if study.default is None:
            raise StorageError(
                f"{study.folder} did not begin with the defaults (sampler.defaults_first). Choose a trial with trial:NUMBER."
            )
        return study.default
    if given == "tuned":
        return best_of(study)
    return trial_of(study, int(number[1]) if number else -1)


def _digest(adapter: Path) -> str:
    digest = hashlib.sha256()
    for name in ADAPTER_FILES:
        with open(adapter / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
