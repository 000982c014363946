"""The working folder is removed: before a command, which says so, and under a study, which goes on where its paths are absolute."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import loratune
from loratune import demo
from loratune.cli import main
from loratune.errors import StorageError
from loratune.record import read
from loratune.spec import StudySpec

GONE = "loratune: the working folder was removed. Change to one that exists (cd), then run the same command again.\n"


@pytest.fixture
def removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()


@pytest.mark.usefixtures("removed")
def test_it_is_told_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "study")
    for command in (
        ["run", "--demo", "--output", folder],
        ["run", "--demo", "--dry-run"],
        ["report", folder],
        ["export", folder, folder],
        ["doctor"],
    ):
        assert main(command) == StorageError.exit_code, command
        assert capsys.readouterr().err == GONE, command
    assert main(["run", "--help"]) == 0
    assert main(["status", folder]) != 70, "it needs none"
    with pytest.raises(StorageError, match="the working folder was removed"):
        next(loratune.tune(StudySpec.load(None, (), demo.study() | {"output": folder})))
    assert not Path(folder).exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_study_goes_on_without_it(tmp_path: Path) -> None:
    """Its worker is killed, so that another one must start where there is no working folder any more."""
    here, folder = tmp_path / "here", tmp_path / "study"
    here.mkdir()
    options = ["--output", str(folder), "--sampler", "random", "--trials", "3", "--data.train_count", "160", "--executor.workers", "1"]
    study = subprocess.Popen(
        [sys.executable, "-m", "loratune", "run", "--demo", *options], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while study.poll() is None and not list(folder.glob("trials/*/*/outcomes/*.json")):
        time.sleep(0.1)
    here.rmdir()
    workers = subprocess.run(["pgrep", "-f", f"executors.worker .*{folder}"], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(workers[0]), signal.SIGKILL)
    text, _ = study.communicate()
    assert study.returncode == 0, text
    assert "Traceback" not in text
    record = read(folder)
    assert record.finished
    assert len(record.trials) == 3
    assert (folder / "adapter" / "adapter_config.json").is_file()
