"""The hub that cannot be reached: one clear error within seconds."""

import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest

from loratune.downstream.tasks.bbh import Bbh
from loratune.downstream.tasks.drop import DropBenchmark
from loratune.downstream.tasks.mmlu import Mmlu
from loratune.errors import DataError
from loratune.system.hub import reachable


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An address where nothing listens, and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    reachable.cache_clear()
    yield
    reachable.cache_clear()


@pytest.mark.parametrize("benchmark", [Mmlu, Bbh, DropBenchmark])
def test_unreachable(benchmark: type, no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"from the Hugging Face hub: it cannot be reached from here. Give a folder .*--data FOLDER"):
        benchmark().items()
    assert time.monotonic() - began < 10
    assert "Retry" not in said.getvalue()
    assert not huggingface_hub.constants.HF_HUB_OFFLINE  # as it was found


def test_asked_to_stay_offline(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="--data FOLDER"):
        Mmlu().items()
    assert huggingface_hub.constants.HF_HUB_OFFLINE
