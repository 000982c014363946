"""Constraints from text."""

import math

import pytest

from loratune.errors import SpecError
from loratune.selection.trial_metrics import Constraint, parse_constraint


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("adapter_mb <= 50", Constraint("adapter_mb", "<=", 50.0)),
        (" peak_memory_gib<24 ", Constraint("peak_memory_gib", "<", 24.0)),
        ("mmlu >= 2.5e-1", Constraint("mmlu", ">=", 0.25)),
    ],
)
def test_reading_and_writing(text: str, found: Constraint) -> None:
    assert parse_constraint(text, benchmarks=["mmlu"]) == found
    assert parse_constraint(str(found), benchmarks=["mmlu"]) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adaptor_mb <= 50", "unknown metric 'adaptor_mb'.*did you mean 'adapter_mb'"),
        ("adapter_mb == 50", "'==' is not a comparison; allowed: <=, >=, <, >"),
        ("adapter_mb <= 50MB", "'50MB' is not a number; write it in the unit of adapter_mb"),
        ("adapter_mb <= nan", "must be finite"),
        ("small please", "like 'adapter_mb <= 50'"),
    ],
)
def test_mistakes(text: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        parse_constraint(text)


def test_what_nobody_measured_keeps_nothing() -> None:
    limit = parse_constraint("adapter_mb <= 50")
    assert limit.holds(50)
    assert not limit.holds(50.1)
    assert not limit.holds(math.nan)
