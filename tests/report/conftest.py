"""Fixtures of the report's tests."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from report_studies import Point, spec_of, write_study

from loratune.record import StudyRecord


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., StudyRecord]:
    """study(points, name=..., base=..., **changes of the spec) -> StudyRecord, each in a folder of its own."""

    def make(points: Sequence[Point], *, name: str = "a-study", base: float | None = 1.9, folder: str = "", **changes: Any) -> StudyRecord:
        return write_study(tmp_path / (folder or name), points, spec_of(name, **changes), base)

    return make
