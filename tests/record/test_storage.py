"""A database that another program holds, that cannot be written, or that is none: each in a true sentence."""

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest

from loratune.errors import StorageError
from loratune.record import storage
from loratune.record.storage import explained, open_study, until_free


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    opened(tmp_path)
    return tmp_path


def opened(folder: Path, url: str | None = None) -> optuna.Study:
    return open_study(url=url, folder=folder, name="s", sampler=optuna.samplers.RandomSampler())


@contextmanager
def held(folder: Path, kind: str = "EXCLUSIVE") -> Iterator[None]:
    connection = sqlite3.connect(folder / "study.db", isolation_level=None, check_same_thread=False)
    connection.execute(f"BEGIN {kind}")
    try:
        yield
    finally:
        connection.close()


def waited(folder: Path, stop: threading.Event | None = None) -> list[str]:
    return list(until_free(None, folder, stop or threading.Event()))


@pytest.mark.parametrize("kind", ["EXCLUSIVE", "IMMEDIATE"])
def test_a_locked_database_is_waited_for_and_then_named(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE", 0.3)
    with held(folder, kind), pytest.raises(StorageError) as caught:
        waited(folder)
    text = str(caught.value)
    assert str(folder / "study.db") in text
    for words in ("another program holds the database", "dashboard", "network file system", "Nothing is lost: the same command goes on"):
        assert words in text
    assert "valid" not in text
    assert "Allowed" not in text


def test_a_lock_that_ends_in_time_costs_a_line(folder: Path) -> None:
    with held(folder):
        waiting = until_free(None, folder, threading.Event())
        assert "another program holds the database" in next(waiting)
    assert list(waiting) == []
    assert waited(folder) == []


def test_who_stops_while_waiting_is_heard(folder: Path) -> None:
    stop = threading.Event()
    with held(folder):
        waiting = until_free(None, folder, stop)
        next(waiting)
        stop.set()
        began = time.monotonic()
        assert list(waiting) == []
        assert time.monotonic() - began < 1


def test_no_file_no_waiting(tmp_path: Path) -> None:
    assert waited(tmp_path) == []
    for url in ("journal.log", "mysql://user:secret@host/x", "sqlite://", "sqlite:///:memory:"):
        assert list(until_free(url, tmp_path, threading.Event())) == []


def test_a_lock_in_mid_run_says_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE", 0.2)
    study = opened(folder)
    trial = study.ask()
    with held(folder), pytest.raises(StorageError, match=r"another program holds .* Nothing is lost"), explained(None, folder):
        trial.suggest_float("x", 0, 1)
    assert trial.suggest_float("x", 0, 1) >= 0, "and it goes on"


def test_a_full_disk_in_mid_run(folder: Path) -> None:
    study = opened(folder)

    @optuna.storages._rdb.storage.sqlalchemy.event.listens_for(study._storage._backend.engine, "connect")
    def limited(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # SQLite keeps to the pages there are

    study._storage._backend.engine.dispose()
    trial = study.ask()
    with pytest.raises(StorageError, match=r"the disk is full\. Free some of it\. Nothing is lost"), explained(None, folder):
        trial.set_user_attr("x", "y" * 100_000)


def test_a_read_only_database(folder: Path) -> None:
    with pytest.raises(StorageError, match=r"read-only for this user.* Nothing is lost"), explained(None, folder):
        sqlite3.connect(f"file:{folder / 'study.db'}?mode=ro", uri=True).execute("CREATE TABLE t (x)")


@pytest.mark.parametrize("content", [b"no database at all, whatever it was before " * 100, None], ids=["other file", "torn"])
def test_a_file_that_is_none(folder: Path, content: bytes | None) -> None:
    path = folder / "study.db"
    path.write_bytes(content or path.read_bytes()[:4096] + b"\xff" * 8192)

    def start() -> None:
        waited(folder)
        opened(folder)

    with pytest.raises(StorageError, match=r"damaged or no SQLite database\. Put back a copy"):
        start()


def test_no_sentence_holds_the_password(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        opened(tmp_path, "mysql+nosuchdriver://user:secret@host/x")
    assert "secret" not in str(caught.value)
    assert "user" in str(caught.value)
