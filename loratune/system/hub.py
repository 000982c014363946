"""The Hugging Face hub, asked once and briefly whether it is there: its own client tries for half a minute per file."""

import contextlib
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loratune.errors import ModelError
from loratune.system.names import close_names

_FEW = 3  # models' folders that are worth naming though none has a near name
_MERGE = "merge the adapter first: `loratune export STUDY FOLDER --merged`, or PEFT's merge_and_unload() and save_pretrained()"


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
    return sum(path.stat().st_size for path in weight_files(name, revision)) or None


def weight_files(name: str, revision: str | None) -> list[Path]:
    """A model's weight files, in a local folder or the hub's cache; none where there are none yet."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            return []
    # Of a model in both forms, one is loaded.
    return list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))


def small_file(name: str, file: str, revision: str | None) -> Path | None:
    """A file of the model's folder or repository, downloaded where it is not there yet; None where it is out of reach."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    with asked_once(name):
        try:
            return Path(hf_hub_download(name, file, revision=revision))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            return None


def has_chat_template(name: str, revision: str | None) -> bool | None:
    """Whether the model's tokenizer brings a chat template; None where its files are out of reach."""
    config = small_file(name, "tokenizer_config.json", revision)
    if config is None:
        return None
    return small_file(name, "chat_template.jinja", revision) is not None or '"chat_template"' in config.read_text(
        encoding="utf-8", errors="replace"
    )


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


def is_local(name: str) -> bool:
    """Whether a model's name can only be a folder's: a hub id is one name, or owner/name."""
    return Path(name).expanduser().exists() or name.startswith((".", "~", "/")) or name.strip("/").count("/") > 1 or name.endswith("/")


def folders_near(name: str) -> str:
    """` Did you mean a/b?`: the models' folders beside where `name` would be, those of a near name first; "" where there are none."""
    place = Path(name).expanduser()
    if not place.parent.is_dir():
        return f" The folder {place.parent} does not exist either." if is_local(name) else ""
    there = [folder.name for folder in sorted(place.parent.iterdir()) if (folder / "config.json").is_file()]
    near = close_names(place.name, there, most=3) or (there if len(there) <= _FEW else [])
    if not near:
        return ""
    return f" Did you mean {' or '.join(str(place.parent / folder) for folder in near)}?"


def refuse_missing_folder(name: str) -> None:
    """Raises ModelError where `name` can only be a folder, and is none."""
    if is_local(name) and not Path(name).expanduser().is_dir():
        raise ModelError(
            f"model: there is no folder {name}.{folders_near(name)} "
            "Give a folder that holds config.json, or a hub id such as meta-llama/Llama-2-7b-hf."
        )


def refuse_adapter(name: str, revision: str | None) -> None:
    """Raise ModelError where `name`, a folder or a hub id, holds an adapter, with a model beside it or alone, or is a folder not there.

    Transformers' `from_pretrained` would put the adapter on without a word, and what is trained then is another model's.
    """
    refuse_missing_folder(name)
    from transformers.utils import CONFIG_NAME, cached_file
    from transformers.utils.peft_utils import find_adapter_config_file  # what from_pretrained itself asks

    folder = Path(name).expanduser()
    if folder.exists():
        found = find_adapter_config_file(str(folder))
        has_model = (folder / CONFIG_NAME).is_file()
    else:
        quiet: dict[str, Any] = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
        with asked_once(name):
            try:
                found = find_adapter_config_file(name, revision=revision)
                has_model = found is not None and cached_file(name, CONFIG_NAME, revision=revision, **quiet) is not None
            except (OSError, ValueError):
                return  # no such repository, or revision: loading it says so, with the reason
    if found is None:
        return
    try:
        base = json.loads(Path(found).read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    if has_model:
        made_for = f", made for {base}" if base else ""
        raise ModelError(
            f"model: {name} holds a model AND an adapter (adapter_config.json{made_for}), and both would be loaded. "
            f"Give a folder that holds one of them, the model; or {_MERGE}."
        )
    instead = f"Give the model that it was made for, {base}" if base and base != name else "Give the model that it was made for"
    raise ModelError(f"model: {name} holds an adapter (adapter_config.json) and no model. {instead}; or {_MERGE}.")
