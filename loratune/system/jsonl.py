"""Files of one JSON object per line that only grow: a line that a kill cut short is dropped, what stands before it is whole."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loratune.errors import StorageError


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in the file; none when there is no file. Raises StorageError for a damaged line that is not the last."""
    try:
        whole, _, _ = path.read_bytes().rpartition(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise StorageError(f"{path}, line {number} is damaged: {error}. Remove the line; its result is then computed again.") from error
    return rows


def append_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add the objects and flush them to the disk. Raises StorageError."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            file.seek(max(0, file.tell() - 1))
            if file.read() not in (b"", b"\n"):  # what a kill left of a last line
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            file.write(text.encode(errors="backslashreplace"))  # a lone surrogate becomes JSON's own escape of it
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}. Nothing before it was lost; run again.") from error
