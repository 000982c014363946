"""Fixtures shared by all tests, and what lets those that need a GPU run where pytest's plugins and Optuna are absent."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "of pytest-timeout, which is not installed")


def pytest_configure(config: pytest.Config) -> None:
    # Packages are installed uncompiled. Where Python must not keep what it compiles, each of the many processes that tests start
    # would compile torch and Transformers again, which takes ten seconds.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    if importlib.util.find_spec("optuna") is not None:
        config.addinivalue_line("filterwarnings", "ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture(scope="session", autouse=True)
def _disk_is_not_waited_for() -> Iterator[None]:
    """No test cuts the power, and thousands of small files would be waited for. Processes that tests start, and kill, do wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data and tiny real models (Alpaca, Dolly, tinystories656k, ...); not in the repository."""
    folder = Path(os.environ.get("LORATUNE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set LORATUNE_TEST_DATA to the folder that holds alpaca/, dolly/, models/")
    return folder


@pytest.fixture(scope="session")
def tinystories(shared_data: Path) -> Path:
    """A real pretrained Llama with 656k parameters and its tokenizer."""
    return shared_data / "models" / "tinystories656k"


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared folder of a small part of the demo's instruction data: 96 training and 32 validation examples."""
    from loratune import demo
    from loratune.data.prepare import prepare
    from loratune.data.sources import DataRecipe, DataSource

    train, _ = demo.data_files()
    recipe = DataRecipe(train=(DataSource(path=str(train)),), train_count=96, validation_count=32, max_length=128)
    return prepare(recipe, tokenizer=str(demo.model_folder()), cache=tmp_path_factory.mktemp("cache")).folder
