"""Downstream scores in `loratune status`, from results that are written as an evaluation writes them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from loratune.downstream.results.scores import ResultWriter, read_results
from loratune.record import read
from loratune.record.paths import StudyPaths

ITEMS = 8


@pytest.fixture
def study(done: tuple[Path, str], tmp_path: Path) -> Path:
    shutil.copytree(done[0] / "study", tmp_path / "study")
    return tmp_path / "study"


def answer(study: Path, model: str, benchmark: str, right: list[int], *, of: int = ITEMS, grouped: bool = False) -> None:
    """One model's results: item n is right where right[n] is 1; groups of sizes 1 and the rest."""
    writer = ResultWriter(StudyPaths(study).evaluation, model, benchmark, {"adapter": model})
    writer.describe({"title": benchmark.upper(), "chance": 0.25, "items": of, "mean_over_groups": grouped})
    if right:
        writer.add([{"id": str(n), "group": str(min(n, 1)), "answer": "", "score": score} for n, score in enumerate(right)], 1.0)


def entry(loratune: Callable[..., Any], study: Path, benchmark: str) -> dict[str, Any]:
    found = json.loads(loratune("status", study, "--json").out)["scores"]
    return next(one for one in found if one["benchmark"] == benchmark)


def test_before_an_evaluation(loratune: Callable[..., Any], study: Path) -> None:
    assert json.loads(loratune("status", study, "--json").out)["scores"] == []
    assert "scores" not in loratune("status", study).out


def test_a_complete_evaluation(loratune: Callable[..., Any], study: Path) -> None:
    names = [f"{trial.number:04d}" for trial in read(study).finished]
    assert len(names) == 3
    for place, name in enumerate(names):
        answer(study, name, "mmlu", [1] * (place + 2) + [0] * (ITEMS - place - 2))
    answer(study, "base", "mmlu", [1] * ITEMS)
    answer(study, "0099", "mmlu", [0] * ITEMS)  # of no trial of the ranking
    found = entry(loratune, study, "mmlu")
    assert found["complete"]
    assert (found["items"], found["chance"], found["default"], found["base"]) == (ITEMS, 0.25, 2 / ITEMS, 1.0)
    values = [2 / ITEMS, 3 / ITEMS, 4 / ITEMS]
    assert found["best"] == pytest.approx({"n": 3, "min": values[0], "max": values[-1], "mean": 3 / ITEMS, "sd": stdev(values)})
    row = next(line for line in loratune("status", study).out.splitlines() if line.startswith("MMLU"))
    assert row.split() == ["MMLU", "8", "25.0", "100.0", "25.0", "25.0", "50.0", "37.5", "12.5", "complete"]


def test_one_that_is_not_complete(loratune: Callable[..., Any], study: Path) -> None:
    answer(study, "0000", "bbh", [1, 0, 0])
    answer(study, "base", "bbh", [])
    path = StudyPaths(study).evaluation / "0000" / "bbh.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": "3", "gro')  # being written, or torn by a crash
    found = entry(loratune, study, "bbh")
    assert (found["answered"], found["asked"], found["complete"]) == (3, 2 * ITEMS, False)
    assert found["base"] is None
    assert "3 of 16 answered" in loratune("status", study).out


def test_same_score_as_the_table_of_intervals(study: Path) -> None:
    answer(study, "0000", "plain", [1, 0, 0, 1, 0], of=5)
    answer(study, "0000", "grouped", [1, 0, 0, 1, 0], of=5, grouped=True)
    values = {result.benchmark: result.value for result in read_results(StudyPaths(study).evaluation)}
    assert values == pytest.approx({"plain": 2 / 5, "grouped": (1 + 1 / 4) / 2})
    for result in read_results(StudyPaths(study).evaluation):
        assert result.score.value == pytest.approx(result.value)


def test_light(study: Path) -> None:
    answer(study, "0000", "mmlu", [1] * ITEMS)
    code = (
        "import sys; from loratune.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or ' '.join({'torch', 'transformers', 'optuna', 'scipy'} & set(sys.modules)) or None)"
    )
    ran = subprocess.run([sys.executable, "-c", code, "status", str(study)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "MMLU" in ran.stdout
