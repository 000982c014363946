"""The machine's own troubles: a full disk behind the output, a folder for temporary files that is too deep, a start killed early."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from loratune.cli import main
from loratune.errors import StorageError, TrainingError
from loratune.executors import process
from loratune.record import open_record
from loratune.spec import StudySpec
from loratune.study.session import adopt


def spec(folder: Path, **changes: object) -> StudySpec:
    return StudySpec.load(base={"model": "m", "data": {"train": ["x.json"], "validation_fraction": 0.1}, "output": str(folder), **changes})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", [["init"], ["schema"], ["status", "STUDY"]])
def test_an_output_that_is_full_is_one_line(finished: Path, command: list[str]) -> None:
    words = [word.replace("STUDY", str(finished)) for word in command]
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "loratune", *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == StorageError.exit_code
    assert done.stderr.startswith("loratune: No space left on device")
    assert done.stderr.count("\n") == 1


def test_a_deep_tmpdir_gives_its_place_to_a_shorter_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    folder = Path(process._socket_folder())
    try:
        assert len(os.fsencode(folder / "socket")) < 108
        assert folder.stat().st_mode & 0o777 == 0o700
        assert not list(deep.iterdir())
    finally:
        folder.rmdir()


def test_where_no_place_is_short_enough_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    real = tempfile.mkdtemp

    def refused(prefix: str, dir: str) -> str:
        if dir == "/tmp":
            raise PermissionError(13, "Permission denied")
        return real(prefix=prefix, dir=dir)

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    with pytest.raises(TrainingError, match=r"TMPDIR is too long for a socket.*Set TMPDIR to a shorter folder"):
        process._socket_folder()


@pytest.mark.parametrize(
    "left", [["lock"], [".spec.yaml.99999999.0123abcd.tmp"], ["spec.yaml"], ["spec.yaml", ".spec.yaml.99999999.0123abcd.tmp"]]
)
def test_what_a_start_leaves_that_was_killed_at_once_is_taken_up(tmp_path: Path, left: list[str]) -> None:
    folder = tmp_path / "study"
    with open_record(folder) as record:
        adopt(spec(folder), record)
    written = (folder / "spec.yaml").read_text()
    (folder / "spec.yaml").unlink()
    for name in left:
        (folder / name).write_text(written if name == "spec.yaml" else written[:40])
    with open_record(folder) as record:
        adopt(spec(folder, seed=3), record)  # before the first trial, mending the description is free
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "spec.yaml"]


@pytest.mark.parametrize("name", ["spec.yaml", "notes.txt", ".git"])
def test_somebodys_folder_is_left_alone(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    own = "# my own comments\nmodel: m\ndata: {train: [x.json], validation_fraction: 0.1}\n"
    (folder / name).write_text(own)
    with open_record(folder) as record, pytest.raises(StorageError, match="neither empty nor a study's folder"):
        adopt(spec(folder), record)
    assert (folder / name).read_text() == own


def test_a_real_bug_is_called_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratune.cli._run", lambda _: (_ for _ in ()).throw(ZeroDivisionError("x")))
    assert main(["status"]) == 70
    assert "this is a bug" in capsys.readouterr().err
