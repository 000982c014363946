"""Raw records out of files, folders and the hub, each with the place it was found at.

Knows JSON, JSONL, CSV and Parquet, not what the fields mean (that is `sources.py`). A file that cannot
be read at all raises one DataError; a single record that cannot be parsed is handed on with its
problem, for the caller to refuse or to skip.
"""

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from loratune.data.locations import data_suffix, local
from loratune.errors import DataError
from loratune.system import hub


class RawRecord(NamedTuple):
    """One record as found, or the problem that kept it from being parsed."""

    file: str  # path as the user would find it, or hub id
    place: str  # "line 17" (JSONL, CSV), "record 17" (JSON array), "row 17" (Parquet, datasets); from 1
    value: Any = None
    problem: str = ""


def records(path: str, split: str | None = None) -> Iterator[RawRecord]:
    """All records of a local file, a local folder or a hub data set. Raises DataError."""
    if (found := local(path, split)) is None:
        yield from _rows(path, _load_hub(path, split))
    elif isinstance(found, Path):
        yield from _saved(found, split)
    else:
        for file in found:
            yield from _file(file)


def source_digests(path: str, split: str | None = None) -> list[str]:
    """SHA-256 of each file behind a source, in reading order; for a hub data set, `datasets`' own fingerprint."""
    found = local(path, split)
    if found is None:
        return [str(_load_hub(path, split)._fingerprint)]
    files = sorted(p for p in found.rglob("*") if p.is_file()) if isinstance(found, Path) else found
    digests = []
    for file in files:
        try:
            with open(file, "rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}.") from error
    return digests


# ---- datasets ----


def _saved(folder: Path, split: str | None) -> Iterator[RawRecord]:
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever a damaged Arrow file makes of it
        raise DataError(f"{folder}: cannot be read as a saved `datasets` folder: {_short(error)}") from error
    if isinstance(data, datasets.DatasetDict):
        data = data[_choose(str(folder), list(data), split)]
    yield from _rows(str(folder), data)


def _load_hub(path: str, split: str | None) -> Any:
    import datasets

    try:
        with hub.asked_once(path):
            data = datasets.load_dataset(path, split=split)  # a slice such as train[:1000] is understood too
    except Exception as error:  # network, permission, unknown name, missing configuration: each with its own class
        raise DataError(f"{path}: neither a local file or folder nor a hub data set that can be loaded: {_short(error)}") from error
    return data if split else data[_choose(path, list(data), None)]


def _choose(path: str, names: list[str], split: str | None) -> str:
    if split is None and (len(names) == 1 or "train" in names):
        return names[0] if len(names) == 1 else "train"
    if split not in names:
        asked = f"no split {split}" if split else "several splits"
        raise DataError(f"{path}: {asked}. Available: {', '.join(names)}.")
    return split


def _rows(name: str, data: Any) -> Iterator[RawRecord]:
    for number, row in enumerate(data, 1):
        yield RawRecord(name, f"row {number}", _unfilled(row))


# ---- reading one file ----


def _file(file: Path) -> Iterator[RawRecord]:
    kind = data_suffix(file)
    if kind == ".parquet":
        return _parquet(file)
    text = _text(file)
    if not text.strip():
        raise DataError(f"{file}: the file is empty.")
    if kind in (".csv", ".tsv"):
        return _csv(file, text, "," if kind == ".csv" else "\t")
    return _json(file, text) if kind == ".json" else _jsonl(file, text)


def _text(file: Path) -> str:
    try:
        data = file.read_bytes()
        if file.suffix == ".gz":
            data = gzip.decompress(data)
    except (EOFError, zlib.error) as error:
        raise DataError(f"{file}: the gzip file is cut off or damaged. Copy or download it again.") from error
    except gzip.BadGzipFile as error:
        raise DataError(f"{file}: not a gzip file, though its name ends in .gz.") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}.") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file}: the file is UTF-16; UTF-8 is expected. Convert it: iconv -f UTF-16 -t UTF-8.")
    try:
        return data.decode("utf-8-sig")  # a byte order mark is forgiven
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise DataError(
            f"{file}, line {line}: not UTF-8 (byte 0x{byte:02x}). Convert the file, for example: iconv -f LATIN1 -t UTF-8."
        ) from error


class _Repeated(dict[str, Any]):
    """An object of which a key stands twice: JSON readers keep the last, and nobody hears of the first."""

    key: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated, names = _Repeated(found), [name for name, _ in pairs]
    repeated.key = next(name for place, name in enumerate(names) if name in names[:place])
    return repeated


def _repeated(value: Any) -> str:
    """A problem: the first key that stands twice in an object, at any depth; else empty."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _Repeated):
            return f"the key {value.key} appears twice in an object; keep one"
        if isinstance(value, dict | list):
            waiting += reversed(list(value.values()) if isinstance(value, dict) else value)
    return ""


def _json(file: Path, text: str) -> Iterator[RawRecord]:
    try:
        whole = json.loads(text, object_pairs_hook=_object)
    except (json.JSONDecodeError, RecursionError) as error:
        # Many a .json file is JSONL: its first lines are objects by themselves.
        lines = [line for line in text.split("\n", 50) if line.strip()][:2]
        if text.lstrip().startswith("{") and any(isinstance(_parsed(line), dict) for line in lines):
            yield from _jsonl(file, text)
            return
        if not isinstance(error, json.JSONDecodeError):
            raise DataError(f"{file}: nested too deeply to be instruction data.") from error
        cut = (
            " The file seems cut off: copy or download it again."
            if error.pos >= len(text.rstrip()) - 1 or "Unterminated" in error.msg
            else ""
        )
        raise DataError(f"{file}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}.{cut}") from error
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        if isinstance(whole, _Repeated):
            raise DataError(f"{file}: the key {whole.key} appears twice in the outermost object; keep one.")
        whole = whole["data"]
    if isinstance(whole, dict):
        whole = [whole]
    if not isinstance(whole, list):
        raise DataError(f"{file}: expected an array of records, found {described(whole)}.")
    for number, value in enumerate(whole, 1):
        yield RawRecord(str(file), f"record {number}", value, _repeated(value))


def _jsonl(file: Path, text: str) -> Iterator[RawRecord]:
    lines = text.rstrip().split("\n")  # not splitlines(): U+2028 may stand inside a JSON string
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_object)
            yield RawRecord(str(file), f"line {number}", value, _repeated(value))
        except (json.JSONDecodeError, RecursionError) as error:
            cut = " (the last line; is the file cut off?)" if number == len(lines) > 1 else ""
            why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            yield RawRecord(str(file), f"line {number}", problem=f"not valid JSON: {why}{cut}: {described(line)}")


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return None


def _csv(file: Path, text: str, delimiter: str) -> Iterator[RawRecord]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is below a long document
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        _once(file, list(reader.fieldnames or ()))
        for row in reader:
            line = reader.line_num
            if None in row:
                fields = len(reader.fieldnames or ())
                problem = f"{fields + len(row[None])} fields, but the header has {fields}; is a quote missing?"
                yield RawRecord(str(file), f"line {line}", problem=problem)
            else:
                yield RawRecord(str(file), f"line {line}", {name: value for name, value in row.items() if value is not None})
    except csv.Error as error:
        raise DataError(f"{file}, the row after line {line}: not valid CSV: {error}. Is a quote missing?") from error


def _once(file: Path, names: list[str]) -> None:
    for place, name in enumerate(names):
        if name and name in names[:place]:
            raise DataError(f"{file}: the column {name} appears twice. Keep one, or give them different names.")


def _parquet(file: Path) -> Iterator[RawRecord]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {_short(error)}") from error
    number = 0
    for batch in table.to_batches(max_chunksize=1000):
        for row in batch.to_pylist():
            number += 1
            yield RawRecord(str(file), f"row {number}", _unfilled(row))


def _unfilled(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table without the inner fields that are null. Arrow gives each object of a column the fields of all others:
    the tools of one row would be shown with the parameters of another row's, each null."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(inner) for key, inner in value.items() if inner is not None}
        return [without(inner) for inner in value] if isinstance(value, list) else value

    return {name: without(value) for name, value in row.items()}


# ---- words ----


def described(value: Any) -> str:
    """A value in a few words, for an error message: its JSON type and its shortened content."""
    kinds = {str: "text", bool: "a boolean", int: "the number", float: "the number", list: "a list", dict: "an object", type(None): "null"}
    if value is None:
        return "null"
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return f"{kinds.get(type(value), type(value).__name__)} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
