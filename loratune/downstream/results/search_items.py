"""The benchmark items that guided a study's search, which must not be reported as held-out evidence.

scoring/items.json     benchmark -> ids of the items, drawn before the first trial, the same for all trials
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from loratune.errors import StorageError
from loratune.record.paths import StudyPaths
from loratune.system.files import write_atomically

_ALIKE = (
    {"mmlu", "mmlu_loglikelihood"},
    {"humaneval", "humaneval_fenced"},
    {"demo_choice", "demo_match"},
)  # ask the same questions, under the same ids


def search_items(study: Path) -> dict[str, set[str]]:
    """Benchmark -> ids of the items that guided the search of the study in that folder; empty when no score did.

    Benchmarks that ask the same questions in another form share them. Raises StorageError.
    """
    drawn = _drawn(study)
    found = {name: set(ids) for name, ids in drawn.items()}
    for alike in _ALIKE:
        both = {item for name in alike for item in drawn.get(name, ())}
        found |= dict.fromkeys(alike, both) if both else {}
    return found


def keep_search_items(study: Path, drawn: Mapping[str, Sequence[str]]) -> None:
    """Write down the items drawn. Raises StorageError when a trial was scored on other items."""
    path = StudyPaths(study).scoring / "items.json"
    if _drawn(study) != drawn:
        if any(path.parent.glob("*/*.jsonl")):
            raise StorageError(f"{path}: the items of {', '.join(drawn)} have changed. Restore the benchmarks' data, or start a new study.")
        write_atomically(path, json.dumps(drawn))


def _drawn(study: Path) -> dict[str, list[str]]:
    path = StudyPaths(study).scoring / "items.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"cannot read {path}: {error}. It lists the items that must not be reported; restore it.") from error
