"""Files that a crash leaves whole: their modes follow the umask, what killed processes left is removed, an error changes nothing."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from loratune.errors import StorageError
from loratune.system import files


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "plain", "x")
    with files.new_folder(tmp_path / "folder") as fresh:
        (fresh / "file").write_text("x")
    assert mode(tmp_path / "plain") == 0o666 & ~umask
    assert mode(tmp_path / "folder") == 0o777 & ~umask
    assert mode(tmp_path / "folder" / "file") == 0o666 & ~umask


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path, dead: int) -> None:
    left = tmp_path / f".progress.json.{dead}.0123abcd.tmp"  # as versions wrote it that had no host in the name
    left.write_text("half")
    host = files.writer().partition("@")[0]
    (tmp_path / f".spec.yaml.{host}@{dead}.0123abcd.tmp").write_text("half")
    old = tmp_path / f".spec.yaml.node7@{dead}.0123abcd.tmp"
    old.write_text("half")
    os.utime(old, (0, 0))
    folder = tmp_path / f".adapter.{dead}.0123abcd.tmp"
    folder.mkdir()
    (folder / "file").write_text("half")
    others = [tmp_path / f".progress.json.{os.getppid()}.0123abcd.tmp", tmp_path / ".own.tmp", tmp_path / f"x.{dead}.0123abcd.tmp"]
    others.append(tmp_path / f".spec.yaml.node8@{dead}.0123abcd.tmp")  # of another machine, where that number may live
    for path in others:
        path.write_text("kept")
    files.sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_scratch_folders_of_the_dead_are_removed(tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, living = tmp_path / f"loratune-probe-{dead}-x", tmp_path / f"loratune-probe-{os.getppid()}-x"
    left.mkdir()
    living.mkdir()
    made = Path(files.scratch("probe"))
    assert sorted(tmp_path.iterdir()) == sorted([living, made])
    assert mode(made) == 0o700


def test_a_folder_takes_the_place_of_another_whole(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with files.new_folder(tmp_path / "target") as fresh:
            (fresh / content).write_text(content)
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["second"]

    def fill() -> None:
        with files.new_folder(tmp_path / "target") as fresh:
            (fresh / "third").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fill()
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]"])
def test_damage_is_named_with_its_remedy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.txt").write_bytes(content)
    with pytest.raises(StorageError, match=r"file\.txt is damaged .*Remove it\."):
        files.parsed(tmp_path / "file.txt", int, "Remove it.")
