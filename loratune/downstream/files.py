"""Where a benchmark's data lie: a local folder, in several layouts, or a data set of the Hugging Face hub."""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from loratune.errors import DataError


def find(data: Path, name: str, places: Iterable[str], wanted: str) -> Path:
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


def hub(path: str, config: str | None, split: str) -> list[dict[str, Any]]:
    """The rows of a data set of the hub, or of its cache on this machine. Raises DataError, naming the local alternative."""
    import datasets

    reachable = _reachable()
    try:
        with contextlib.nullcontext() if reachable else _offline():
            return list(datasets.load_dataset(path, config, split=split))
    except Exception as error:  # whatever the hub, the network or the builder raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}" if reachable else "it cannot be reached from here."
        where = f"{path}, {config}" if config else path
        raise DataError(
            f"cannot load {where} ({split}) from the Hugging Face hub: {reason} Give a folder with the data instead: --data FOLDER."
        ) from error


@functools.cache
def _reachable() -> bool:
    """Whether the hub answers anything. Asked once and briefly: its own client tries for half a minute per data set."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of whatever library carries it: no network, no name, no proxy, no answer
        return False
    return True


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """As if HF_HUB_OFFLINE were set, which both libraries read when they are imported: from the cache or not at all."""
    import datasets
    from huggingface_hub import constants

    places: tuple[Any, ...] = (constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
