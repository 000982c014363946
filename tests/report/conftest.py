"""Fixtures of the report's tests."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from report_evidence import ANN, BOB, compared, evaluated, selected
from report_studies import Point, spec_of, spread, write_study

from loratune.record import StudyRecord, read
from loratune.report import write_report


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., StudyRecord]:
    """study(points, name=..., base=..., **changes of the spec) -> StudyRecord, each in a folder of its own."""

    def make(points: Sequence[Point], *, name: str = "a-study", base: float | None = 1.9, folder: str = "", **changes: Any) -> StudyRecord:
        return write_study(tmp_path / (folder or name), points, spec_of(name, **changes), base)

    return make


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> StudyRecord:
    """A study with all that can be measured of one: curves, scores on two benchmarks, a selection, votes of two people."""
    points = spread(12)
    for point in points:
        point.runs = (("main", (1.5, 1.3, point.value or 0.0)),)
    record = write_study(tmp_path_factory.mktemp("whole") / "study", points, spec_of("whole"))
    evaluated(record, {"mmlu": 0.25, "drop": 0.0})
    selected(record)
    compared(record, {"Ann": ANN, "Bob": BOB})
    return read(record.folder)


@pytest.fixture(scope="session")
def story(whole: StudyRecord, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its report."""
    return write_report([whole], tmp_path_factory.mktemp("story") / "report.html")
