"""`--json`: one object on standard output, with the keys of docs/reference/json.md; words go to standard error, errors too."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from loratune.cli import COMMANDS, main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "json.md"


def keys_of(row: str) -> set[str]:
    """The keys that the page lists for a command, those before a colon alone (what follows describes a value)."""
    line = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {row} "))
    told = re.sub(r": (per|`trials|paths).*", "", line.split("|")[2])
    return set(re.findall(r"`(\w+)`", told))


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]):
    def run(*command: str) -> tuple[int, dict[str, Any], str]:
        code = main([*command, "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    return run


def test_a_study_from_run_to_export(tmp_path: Path, said: Any) -> None:
    study = str(tmp_path / "study")
    flags = ["--trials", "2", "--sampler", "random", "--executor", "inline", "--data.train_count", "24", "--data.validation_count", "12"]
    code, run, words = said("run", "--demo", "--output", study, *flags)
    assert code == 0
    assert run.keys() == keys_of("`run`, `status`") | keys_of("`run`, besides")
    assert run["finished"]
    assert Path(run["adapter"]).is_dir()
    assert "trial 1: validation loss" in words
    code, status, words = said("status", study)
    assert (code, words) == (0, "")
    assert status.keys() == keys_of("`run`, `status`")
    assert status["best"] == run["best"]
    code, select, words = said("select", study, "--no-rerun")
    assert code == 0
    assert keys_of("`select`") <= select.keys() | {"selection", "json"}
    assert select["chosen"] == run["best"]["trial"]
    code, export, _ = said("export", study, str(tmp_path / "adapter"))
    assert export == {"folder": str(tmp_path / "adapter")}
    code, report, _ = said("report", study, "--output", str(tmp_path / "report.html"))
    assert report == {"report": str(tmp_path / "report.html")}


def test_an_error_is_told_in_both_places(tmp_path: Path, said: Any) -> None:
    code, facts, words = said("run", "--demo", "--budget.trails", "3")
    assert code == 2
    assert facts["error"]["kind"] == "SpecError"
    assert "trails" in facts["error"]["message"]
    assert facts["error"]["message"] in words
    code, facts, _ = said("status", str(tmp_path))
    assert (code, facts["error"]["kind"]) == (5, "StorageError")


def test_without_a_study(tmp_path: Path, said: Any) -> None:
    assert said("init", str(tmp_path / "study.yaml"))[1] == {"file": str(tmp_path / "study.yaml")}
    assert said("schema")[1]["title"] == "StudySpec"
    facts = said("recommend", "--demo")[1]
    assert facts.keys() == keys_of("`recommend`")
    assert facts["recommended"]["learning_rate"] > 0


def test_the_page_names_every_command() -> None:
    page = PAGE.read_text()
    assert [name for name in COMMANDS if name != "dashboard" and f"`{name}`" not in page] == []
