"""`--json`: one object on standard output, with the keys of docs/reference/json.md; words go to standard error, errors too."""

import argparse
import errno
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loratune.cli import COMMANDS, main
from loratune.errors import DataError

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
    code, told, words = said("run", "--demo", "--output", study, *flags, "--dry-run", "--budget.price_per_device_hour", "2")
    assert code == 0
    totals = told["plan"]["totals"]
    shared = {"seconds", "cost", "device_hours", "tokens", "full_runs", "currency"}
    assert totals.keys() == shared | {"start_seconds", "limits", "select", "all"}
    assert totals["select"].keys() == totals["all"].keys() == shared
    assert (totals["full_runs"], totals["select"]["full_runs"]) == (2, 12)  # three runs each of both, and of the choice and the default
    assert 0 < totals["seconds"][0] <= totals["seconds"][1]
    assert totals["start_seconds"] > 0
    assert "12 full runs with fresh seeds" in words
    code, run, words = said("run", "--demo", "--output", study, *flags)
    assert code == 0
    assert run.keys() == keys_of("`run`, `status`") | keys_of("`run`, besides")
    assert run["finished"]
    assert Path(run["adapter"]).is_dir()
    assert "trial 1: validation loss" in words
    code, again, words = said("run", study, "--trials", "5", "--dry-run")
    assert code == 0
    assert (again["plan"]["done_trials"], again["plan"]["trials"]) == (2, 3), "what is on disk is not planned again"
    assert again["plan"]["full_runs"] == pytest.approx(3, abs=0.1)
    assert "2 are in its folder already" in words
    assert said("run", study, "--dry-run")[1]["plan"]["totals"]["tokens"] == 0
    code, status, words = said("status", study)
    assert (code, words) == (0, "")
    assert status.keys() == keys_of("`run`, `status`")
    assert status["best"] == run["best"]
    code, select, words = said("select", study, "--no-rerun")
    assert code == 0
    assert keys_of("`select`") <= select.keys() | {"selection", "json"}
    assert select["chosen"] == run["best"]["trial"]
    assert select["planned"]["runs"] == 0
    code, export, _ = said("export", study, str(tmp_path / "adapter"))
    folder = tmp_path / "adapter"
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert export == {"folder": str(folder), "trial": select["chosen"], "run": "main", "bytes": size}
    code, file, _ = said("export", study, str(tmp_path / "a.yml"), "--format", "axolotl")
    assert (code, file["trial"], file["file"]) == (0, select["chosen"], str(tmp_path / "a.yml"))
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


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["run", "--modl", "x"], "unknown argument --modl; did you mean --model?"),
        (["run", "--training.epochs"], "expected one argument"),
        (["runn"], "no command 'runn'; did you mean 'run'?"),
        (["export"], "the following arguments are required: FOLDER"),
        (["export", "a", "b", "--format", "hf"], "leave --format out for PEFT's folder; add --merged for the whole model"),
        (["export", "a", "b", "--format", "onnx"], "invalid choice: 'onnx' (choose from 'trl', 'axolotl', 'llamafactory', 'peft')"),
        (["select", "a", "--runs", "many"], "invalid int value: 'many'"),
        ([], "no command '--json'"),
    ],
)
def test_a_command_line_that_cannot_be_read(said: Any, command: list[str], told: str) -> None:
    code, facts, words = said(*command)
    assert (code, facts.keys(), facts["error"]["kind"]) == (2, {"error"}, "UsageError")
    assert told in facts["error"]["message"]
    assert words == f"loratune: {facts['error']['message']}\n"


@pytest.mark.parametrize(
    ("raised", "code", "kind", "message"),
    [
        (ZeroDivisionError("division by zero"), 70, "Bug", "ZeroDivisionError: division by zero. This is a bug of loratune"),
        (RuntimeError("hf_0123456789abcdefghij was refused"), 70, "Bug", "RuntimeError: *** was refused"),
        (OSError(errno.ENOSPC, "No space left on device", "x.db"), 5, "StorageError", "No space left on device: x.db. Nothing computed"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 70, "Bug", "PermissionError"),
        (DataError("data.json, line 3: wrong"), 3, "DataError", "data.json, line 3: wrong"),
        (KeyboardInterrupt(), 130, "Interrupted", "the same command"),
        (SystemExit(3), 3, "SystemExit", "ended with 3"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_however_a_command_fails(
    said: Any, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, kind: str, message: str
) -> None:
    """What was found before is there too; what was printed is not on standard output."""

    def fail(args: argparse.Namespace) -> int:
        print("a word")
        args.facts["found"] = float("nan")
        raise raised

    monkeypatch.setattr("loratune.cli.schema.main", fail)
    ended, facts, words = said("schema")
    assert (ended, facts["error"]["kind"], facts["found"]) == (code, kind, None)
    assert message in facts["error"]["message"]
    assert "a word" in words


def test_help_and_version(capsys: pytest.CaptureFixture[str], said: Any) -> None:
    assert main(["status", "--json", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: loratune status")
    assert said("--version")[1].keys() == {"version"}


def test_an_output_that_takes_nothing() -> None:
    """A full disk is an error, a reader that went away is none."""
    command = [sys.executable, "-m", "loratune", "schema", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (5, "loratune: No space left on device: the output\n")
    done = subprocess.run(["bash", "-o", "pipefail", "-c", '"$0" "$@" | head -1', *command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


def test_without_a_study(tmp_path: Path, said: Any) -> None:
    assert said("init", str(tmp_path / "study.yaml"))[1] == {"file": str(tmp_path / "study.yaml")}
    assert said("schema")[1]["title"] == "StudySpec"
    facts = said("recommend", "--demo")[1]
    assert facts.keys() == keys_of("`recommend`")
    assert facts["recommended"]["learning_rate"] > 0


def test_the_page_names_every_command() -> None:
    page = PAGE.read_text()
    assert [name for name in COMMANDS if name != "dashboard" and f"`{name}`" not in page] == []
