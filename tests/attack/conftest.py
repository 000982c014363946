"""A small study of the embedded model, finished, for tests that damage or forge its folder."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratune.cli import main

SMALL = ["--training.epochs", "1", "--data.train_count", "24", "--data.validation.0.count", "12", "--training.batch_size", "4"]
HALVING = [
    "--schedule.name",
    "halving",
    "--schedule.min_resource",
    "1/3",
    "--sampler",
    "random",
    "--trials",
    "3",
    "--executor.name",
    "inline",
]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its trials have short runs and long ones."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    assert main(["run", "--demo", "--output", str(folder), *SMALL, "--training.validations", "2", *HALVING]) == 0
    return folder


@pytest.fixture
def keep_figures() -> Callable[[str, dict[str, Any]], None]:
    """Adds an attack's figures to the file that ATTACK_RESULTS names, if it names one."""

    def keep(name: str, figures: dict[str, Any]) -> None:
        if "ATTACK_RESULTS" in os.environ:
            path = Path(os.environ["ATTACK_RESULTS"])
            before = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(before | {name: figures}, indent=1) + "\n")

    return keep
