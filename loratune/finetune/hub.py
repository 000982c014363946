"""The Hugging Face hub, asked once and briefly whether it is there: its own client tries for half a minute per file."""

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@functools.cache
def reachable() -> bool:
    """Whether the hub answers anything; False too where HF_HUB_OFFLINE says not to ask."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of whatever library carries it: no network, no name, no proxy, no answer
        return False
    return True


def weights_on_disk(name: str, revision: str | None) -> int | None:
    """Bytes of a model's weight files, in a local folder or the hub's cache; None where there are none yet."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            return None
    for pattern in ("*.safetensors", "*.bin"):  # of a model in both forms, one is loaded
        if sizes := [path.stat().st_size for path in folder.glob(pattern)]:
            return sum(sizes)
    return None


@contextlib.contextmanager
def asked_once(name: str) -> Iterator[None]:
    """Around the loading of `name`: where it is no local path and the hub is out of reach, from the cache or not at all.

    As if HF_HUB_OFFLINE were set, which the libraries read when they are imported.
    """
    if Path(name).expanduser().exists() or reachable():
        yield
        return
    from huggingface_hub import constants

    places: list[Any] = [constants]
    if "datasets" in sys.modules:
        places.append(sys.modules["datasets"].config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
