"""A hub out of reach: names that are no local path fail at once, not after retries."""

import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from loratune.data import records
from loratune.data.tokenizers import load_tokenizer
from loratune.errors import DataError, ModelError
from loratune.system import hub


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An address where nothing listens, and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub.reachable.cache_clear()
    yield
    hub.reachable.cache_clear()


def test_a_model_and_data_of_the_hub(no_hub: None) -> None:
    began = time.monotonic()
    with pytest.raises(ModelError, match="nosuch/model: the tokenizer cannot be loaded"):
        load_tokenizer("nosuch/model")
    with pytest.raises(DataError, match="nosuch/data: neither a local file or folder nor a hub data set"):
        records._load_hub("nosuch/data", None)
    assert time.monotonic() - began < 15  # 54 and 27 s with the hub client's retries
    assert not huggingface_hub.constants.HF_HUB_OFFLINE  # as it was found


def test_a_local_path_asks_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("asked the hub about a local path"))
    with hub.asked_once(str(tmp_path)):
        pass
