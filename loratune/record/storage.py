"""The Optuna storage behind a study: opened, checked, and its errors put into words."""

import contextlib
import sqlite3
import threading
import time
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.samplers import BaseSampler

from loratune.errors import StorageError
from loratune.record.one_writer import OneWriterStorage
from loratune.record.paths import StudyPaths
from loratune.record.trials import objectives_of
from loratune.system.files import text_of
from loratune.system.masking import masked, unmasked

PATIENCE = 20.0  # seconds that a locked database is waited for, at the start and at each later statement
_ON = "Nothing is lost: the same command goes on."


def open_study(*, url: str | None, folder: Path, name: str, sampler: BaseSampler) -> optuna.Study:
    """Create or load the Optuna study called `name`.

    Without a `url` it lies in `study.db` (SQLite) in the study's folder. A path that ends in `.log` or
    `.journal` is Optuna's journal file, everything else goes to Optuna's RDB storage. A study found in the
    storage must have been begun by this folder. Its objectives are those of the folder's `spec.yaml`. Raises StorageError.
    """
    spec = StudyPaths(folder).spec
    objectives: dict[str, Any] = objectives_of(yaml.safe_load(text_of(spec)) if spec.exists() else {})
    where, directions = place_of(url, folder), list(objectives.values())
    with explained(url, folder, opening=True):
        storage = OneWriterStorage(_journal(where) if journal_of(where) else _database(where), name)
        study = optuna.create_study(study_name=name, storage=storage, sampler=sampler, directions=directions, load_if_exists=True)
        owner = study.user_attrs.get("folder")
        if owner is None:
            study.set_user_attr("folder", str(folder.resolve()))
            with warnings.catch_warnings():  # experimental since Optuna 3.2
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(list(objectives))  # as optuna-dashboard and Optuna's plots show them
    started = StudyPaths(folder).begun
    if owner is not None and not started and study.get_trials(deepcopy=False):
        raise StorageError(
            f"storage {masked(where)} already holds a study named {name!r}, begun in {owner}. "
            "Continue it there, or choose another name for this one."
        )
    return study


def open_to_read(*, url: str | None, folder: Path, name: str) -> tuple[optuna.storages.BaseStorage, int]:
    """The storage of the study called `name`, and the study's number in it. Nothing is made. Raises StorageError."""
    where = place_of(url, folder)
    file = Path(where) if journal_of(where) else file_of(where)
    if file is not None and not file.is_file():  # which either would make, empty
        raise StorageError(f"the study has no storage yet: {file} does not exist. `loratune run` creates it.")
    with explained(url, folder, opening=True):
        # An RDBStorage makes the tables that are missing, unless told not to.
        storage = _journal(where) if journal_of(where) else optuna.storages.RDBStorage(where, skip_table_creation=True)
        with contextlib.suppress(KeyError):
            return storage, storage.get_study_id_from_name(name)
    raise StorageError(f"storage {masked(where)} holds no study named {name!r}.")


def until_free(url: str | None, folder: Path, stop: threading.Event) -> Generator[str, None, None]:
    """Wait, at most `PATIENCE` seconds, while another program holds an SQLite file; a line for the user when it begins to.

    Raises StorageError when it is held for longer, cannot be written, or is none.
    """
    path = file_of(place_of(url, folder))
    if path is None or not path.exists():
        return
    deadline, pause = time.monotonic() + PATIENCE, 0.1
    while not stop.is_set():
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
            return
        except sqlite3.Error as error:
            if not _busy(str(error)) or time.monotonic() >= deadline:
                raise StorageError(_sentence(place_of(url, folder), str(error))) from error
        if pause == 0.1:
            yield f"another program holds the database {path}; waiting for it, at most {PATIENCE:.0f} s"
        stop.wait(pause)
        pause = min(2 * pause, 2.0)


@contextlib.contextmanager
def explained(url: str | None, folder: Path, *, opening: bool = False) -> Iterator[None]:
    """While open, errors of Optuna's storage and of the database behind it come as StorageError, in a sentence that helps."""
    from sqlalchemy.exc import SQLAlchemyError

    where = place_of(url, folder)
    try:
        yield
    except (optuna.exceptions.OptunaError, SQLAlchemyError, sqlite3.Error) as error:
        reason = _reason(error)
        if opening and not _known(reason) and isinstance(error, optuna.exceptions.OptunaError):
            raise StorageError(f"storage {masked(where)}: {reason}") from error
        raise StorageError(_sentence(where, reason, opening=opening)) from error
    except Exception as error:
        if not opening or isinstance(error, StorageError):
            raise
        raise StorageError(_sentence(where, _reason(error), opening=True)) from error  # each database driver has errors of its own


def _sentence(where: str, reason: str, *, opening: bool = False) -> str:
    if known := _known(reason):
        return f"storage {masked(where)}: {known} ({reason})"
    if opening:
        return f"storage {masked(where)}: {reason}. Allowed: an Optuna storage URL such as sqlite:///path/study.db"
    return f"storage {masked(where)}: it failed while the study ran: {reason}. {_ON}"


def _known(reason: str) -> str:
    """What the error of an SQLite file means; "" for others."""
    low = reason.lower()
    if _busy(low):
        return (
            "another program holds the database: a dashboard, a backup or copy tool, another study, or a network file system whose locks "
            f"do not work. Close that program. {_ON}"
        )
    if "readonly" in low or "read-only" in low:
        return f"the database cannot be written: the file or its folder is read-only for this user. Make both writable. {_ON}"
    if "disk is full" in low or "no space left" in low:
        return f"the disk is full. Free some of it. {_ON}"
    if "not a database" in low or "malformed" in low:
        return "the file is damaged or no SQLite database. Put back a copy of it, or begin anew with another --output.folder."
    if "disk i/o error" in low:
        return f"the disk, or the network file system, fails. {_ON}"
    return ""


def _busy(reason: str) -> bool:
    return "database is locked" in reason or "database table is locked" in reason or "database is busy" in reason


def _reason(error: BaseException) -> str:
    """The first line of the database's own error, beneath SQLAlchemy's and Optuna's."""
    while (inner := getattr(error, "orig", None) or error.__cause__) is not None:
        error = inner
    return (str(error).splitlines() or [type(error).__name__])[0]


def place_of(url: str | None, folder: Path) -> str:
    """The storage's URL, or a journal's path, passwords filled in."""
    return unmasked(url) if url else f"sqlite:///{StudyPaths(folder.resolve()).database}"


def file_of(where: str) -> Path | None:
    """The file of an SQLite URL; None for other storages."""
    if not where.startswith("sqlite") or ":///" not in where:
        return None
    path = where.partition(":///")[2].partition("?")[0]
    return Path(path) if path and path != ":memory:" and not path.startswith("file:") else None


def _database(where: str) -> optuna.storages.RDBStorage:
    """Optuna's storage in a database. A locked file, and a server that went away, are waited for."""
    from loratune.record.database import DatabaseStorage, ServerStorage

    if file_of(where) is None:
        return ServerStorage(where)
    timeout = {} if "timeout=" in where else {"connect_args": {"timeout": PATIENCE}}  # SQLite's own is 5 seconds
    return DatabaseStorage(where, engine_kwargs=timeout)


def journal_of(where: str) -> Path | None:
    """The file of Optuna's journal; None for other storages."""
    return Path(where) if where.endswith((".log", ".journal")) else None


def _journal(path: str) -> optuna.storages.BaseStorage:
    from optuna.storages.journal import JournalFileBackend

    return optuna.storages.JournalStorage(JournalFileBackend(path))
