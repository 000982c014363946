"""Which files a source's path means: a file, the data files of a folder, a folder that `datasets` saved, or a hub id."""

import re
from pathlib import Path

from loratune.errors import DataError
from loratune.system.names import close_names

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "package.json"}
_HEAD = 100_000  # characters of a file that are looked at
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")


def local(path: str, split: str | None) -> list[Path] | Path | None:
    """The data files behind `path`; a folder for what `datasets` has saved to disk; None for a hub id."""
    if not path.strip():
        raise DataError("a source's path is empty; expected a file, a folder or a hub id.")
    place = Path(path).expanduser()
    if place.is_file():
        if split is not None:
            raise DataError(f"{path}: split: {split}: a single file has no splits, only folders and hub data sets have. Leave it out.")
        if not data_suffix(place):
            raise DataError(f"{path}: unknown kind of file. Known: {', '.join(SUFFIXES)}, each also with .gz (not Parquet).")
        return [place]
    if place.is_dir():
        saved = any((place / name).is_file() for name in ("dataset_dict.json", "state.json"))
        return place if saved else _folder(place, split)
    if data_suffix(place) or path.startswith((".", "/", "~")) or path.count("/") > 1 or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise DataError(_missing(place, path))
    return None


def data_suffix(file: Path) -> str:
    suffix = Path(file.name.removesuffix(".gz")).suffix.lower()
    return suffix if suffix in SUFFIXES else ""


def _missing(place: Path, path: str) -> str:
    parent = place.parent
    if not parent.is_dir():
        return f"{path}: no such file or folder; the folder {parent} does not exist either."
    near = close_names(place.name, [p.name for p in parent.iterdir() if p.is_dir() or _may_hold_rows(p)], most=3)
    return f"{path}: no such file or folder." + (f" Did you mean {' or '.join(near)}?" if near else "")


def _may_hold_rows(file: Path) -> bool:
    """Whether a file is worth suggesting: no settings, and no result that a command wrote as one JSON object."""
    if not file.is_file() or not data_suffix(file) or file.name in _NOT_DATA:
        return False
    if file.suffix.lower() != ".json":
        return True
    with file.open(encoding="utf-8", errors="replace") as opened:
        head = opened.read(_HEAD).lstrip("\ufeff \t\r\n")
    rows = head.split("\n", 1)[0].rstrip().endswith("}")  # JSONL by the name of JSON
    return not head.startswith("{") or rows or re.match(r'\{\s*"data"\s*:\s*\[', head) is not None


def _folder(folder: Path, split: str | None) -> list[Path]:
    inside = [p for p in folder.rglob("*") if p.is_file() and data_suffix(p) and p.name not in _NOT_DATA]
    files = sorted(p for p in inside if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    if not files:
        raise DataError(f"{folder}: the folder holds no data files. Known: {', '.join(SUFFIXES)}.")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[\W_]+", str(file.relative_to(folder)).lower())
        # A chosen split may have any name; unchosen, only the customary names tell splits apart.
        name = next((s for s in ((split,) if split else _SPLITS) if s.lower() in words), "")
        by_split.setdefault(name, []).append(file)
    if split:
        if split not in by_split:
            raise DataError(f"{folder}: no file name contains split {split}. Files: {', '.join(p.name for p in files[:8])}.")
        return by_split[split]
    if len(by_split) > 1:
        names = ", ".join(sorted(filter(None, by_split)))
        raise DataError(
            f"{folder}: the folder holds several splits ({names}). Name the one to use, for example split: {min(filter(None, by_split))}."
        )
    return files
