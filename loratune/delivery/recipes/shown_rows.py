"""Where a study's model and rows lie, and how the rows are shown, for a recipe that another tool reads in another folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratune.data.fields import BadError
from loratune.data.formats import detect_format
from loratune.data.prompts import alpaca_chat_template, as_chat_template
from loratune.data.records import records
from loratune.data.tokenizers import load_tokenizer
from loratune.errors import DataError, ModelError
from loratune.record import StudyRecord

TALKS = ("messages", "sharegpt")  # formats of rows that a chat template shows
_LARGEST = 100 << 20  # bytes of a file that is read for its first row


def builder(path: str) -> str:
    """The `datasets` builder of a file; empty for a hub id."""
    suffix = Path(path.removesuffix(".gz")).suffix.lower()
    return {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}.get(suffix, "")


def place(record: StudyRecord, name: str) -> str:
    """A file or folder by its absolute path, a hub id as it is.

    Relative paths are those of the folder where the search ran: told by the study's folder where that is where it was made, else the
    working folder.
    """
    path = Path(name).expanduser()
    if "://" in name or path.is_absolute():
        return str(path) if path.is_absolute() else name
    roots = [*_where_it_ran(record), Path.cwd()]
    there = next((root for root in roots if (root / path).exists()), None)
    if there is None and not (builder(name) or name.startswith(".")):
        return name
    return os.path.normpath((there or roots[0]) / path)


def _where_it_ran(record: StudyRecord) -> list[Path]:
    given = Path(str((record.spec.get("output") or {}).get("folder") or ""))
    folder = record.folder.resolve()
    if given.is_absolute() or not given.parts or folder.parts[-len(given.parts) :] != given.parts:
        return []
    return [folder.parents[len(given.parts) - 1]]


def row_format(record: StudyRecord, source: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """The format of a source's rows (`FORMATS`), by its description or its first row; empty where neither tells."""
    if source.get("format", "auto") != "auto":
        return str(source["format"])
    path = Path(place(record, str(source["path"])))
    if path.is_file() and path.stat().st_size <= _LARGEST:
        try:
            row = next(iter(records(str(path))), None)
        except DataError:
            row = None
        if row is not None and isinstance(row.value, dict):
            return _detected(row.value | {ours: row.value[theirs] for ours, theirs in columns.items() if theirs in row.value})
    return _detected(dict(columns))


def _detected(row: dict[str, Any]) -> str:
    try:
        return detect_format(row)
    except BadError:
        return ""


def chat_template(record: StudyRecord, *, tagged: bool = False) -> str:
    """The chat template that shows messages as the study did; empty where it is the tokenizer's own, or the tokenizer is out of reach.

    tagged: with {% generation %} around the answers, where loratune writes the template itself.
    """
    own, kind = str(record.prompt.get("template") or ""), record.prompt.get("kind")
    if not own and kind != "alpaca":
        return ""
    tokenizer = _tokenizer(record)
    if tokenizer is None:
        return ""
    return as_chat_template(own, tokenizer) if own else alpaca_chat_template(tokenizer, tagged=tagged)


def tokenizers_template(record: StudyRecord) -> str:
    """The tokenizer's own chat template; empty where it has none, or is out of reach."""
    found = getattr(_tokenizer(record), "chat_template", None)
    return found if isinstance(found, str) else ""


def _tokenizer(record: StudyRecord) -> Any:
    model = record.spec.get("model", {})
    try:
        return load_tokenizer(place(record, str(model.get("name_or_path"))), model.get("revision"))
    except ModelError:  # settings can be written without the model; a note says what is left to do
        return None
