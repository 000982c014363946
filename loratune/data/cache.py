"""A study's prepared data, from the cache where it is there."""

import os
from pathlib import Path

from loratune.data.prepare import prepare
from loratune.data.prepared import Prepared
from loratune.data.sources import DataRecipe
from loratune.spec import StudySpec
from loratune.system import hub


def prepare_data(spec: StudySpec, notes: list[str], date: str = "") -> Prepared:
    """The study's tokenised, split data, from the cache where it is there. What happened is appended to `notes`.

    date: of the day when the study began, for a chat template that shows one; empty: today.
    Raises DataError; ModelError for the tokenizer, and for a base model that has an adapter beside it.
    """
    hub.refuse_adapter(spec.model.name_or_path, spec.model.revision)
    return prepare(
        DataRecipe.from_plain(spec.data_recipe_dict()),
        tokenizer=spec.model.name_or_path,
        revision=spec.model.revision,
        trust_remote_code=spec.model.trust_remote_code,
        cache=cache_folder() / "data",
        date=date,
        report=notes.append,
    )


def cache_folder() -> Path:
    """`$LORATUNE_CACHE`, else `loratune` in the user's cache folder."""
    chosen = os.environ.get("LORATUNE_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "loratune"
