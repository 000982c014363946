"""Where a benchmark's data lie: a local folder, in several layouts, or a data set of the Hugging Face hub."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loratune.errors import DataError
from loratune.system.hub import asked_once, reachable


def find_data(data: Path, name: str, places: Iterable[str], wanted: str) -> Path:
    """The first of `places` that is a folder or file below `data`, or below `data`/`name`. Raises DataError.

    wanted: what should be there, in words, for the error.
    """
    places = tuple(places)
    if not data.is_dir():
        raise DataError(f"{name}: there is no folder {data}. Give the folder that holds the benchmarks' data with --data.")
    for root in (data / name, data):
        for place in places:
            if (root / place).exists():
                return root / place
    raise DataError(f"{name}: neither {data / name} nor {data} holds {' or '.join(places)} ({wanted}).")


def hub_rows(path: str, config: str | None, split: str) -> list[dict[str, Any]]:
    """The rows of a data set of the hub, or of its cache on this machine. Raises DataError, naming the local alternative."""
    import datasets

    try:
        with asked_once(path):
            return list(datasets.load_dataset(path, config, split=split))
    except Exception as error:  # whatever the hub, the network or the builder raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}" if reachable() else "it cannot be reached from here."
        where = f"{path}, {config}" if config else path
        raise DataError(
            f"cannot load {where} ({split}) from the Hugging Face hub: {reason} Give a folder with the data instead: --data FOLDER."
        ) from error
