"""One driver for a study in a storage, whichever folders drivers were started with.

The folder's own lock (`writer.py`) says nothing to a driver that has a copy of the folder and the same `storage`. So a driver holds
a lock in the storage too: of PostgreSQL and MySQL a lock of the session, which ends with the driver's connection; of a file a lock
on one beside it. Also here: whether a file lies on a network disk, where SQLite's locks may not work.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loratune.errors import StorageError
from loratune.record.database import PATIENCE
from loratune.record.storage import file_of, journal_of, place_of
from loratune.system.masking import masked

_NETWORK = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs", "panfs", "wekafs", "virtiofs"),
    *(f"fuse.{kind}" for kind in ("glusterfs", "sshfs", "ceph", "s3fs", "gcsfuse", "juicefs", "beegfs", "rclone")),
}
_FAREWELL = 2.0  # seconds in which a server notices that a killed driver is gone


@contextlib.contextmanager
def only_driver(url: str | None, folder: Path, name: str) -> Iterator["StorageLock"]:
    """Hold the study `name` in the storage for this driver alone. Raises StorageError while another one has it.

    A study in its own folder's `study.db` needs no other lock than the folder's.
    """
    place = place_of(url, folder)
    lock = StorageLock(place, name)
    if url is not None:
        lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


class StorageLock:
    """A lock on one study of a storage."""

    def __init__(self, place: str, name: str) -> None:
        self._place, self._name = place, name
        self._handle: int | None = None
        self._engine: Any = None
        self._connection: Any = None
        self._tried = 0.0

    def acquire(self) -> None:
        """Take the lock. Raises StorageError where another driver holds it."""
        path = file_of(self._place) or journal_of(self._place)
        deadline = time.monotonic() + _FAREWELL
        while not (held := self._acquire_file(path) if path is not None else self._acquire_session(wait=0.0)):
            self.release()
            if time.monotonic() > deadline:
                break
            time.sleep(0.25)
        if not held:
            raise StorageError(
                f"storage {masked(self._place)}: another driver is writing the study {self._name!r}{self._holder(path)}. Stop it first, or "
                "choose another name for this study. After a crash of its machine, the database server keeps the lock until it notices."
            )

    def keep(self) -> None:
        """Take it again where the database server was restarted, now and then. Raises StorageError where another driver was faster."""
        if self._connection is None or time.monotonic() - self._tried < 5.0:
            return
        from sqlalchemy import text
        from sqlalchemy.exc import SQLAlchemyError

        self._tried = time.monotonic()
        try:
            self._connection.execute(text("SELECT 1"))
            return
        except SQLAlchemyError:
            with contextlib.suppress(SQLAlchemyError):
                self._connection.close()
            self._engine.dispose()
        if not self._acquire_session(wait=PATIENCE):
            raise StorageError(f"storage {masked(self._place)}: another driver took the study {self._name!r} while the server was away.")

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        if self._engine is not None:
            with contextlib.suppress(Exception):  # the server is gone, and the lock with it
                self._connection.close()
            self._engine.dispose()
            self._engine = self._connection = None

    def _acquire_file(self, path: Path) -> bool:
        beside = self._beside(path)
        try:
            beside.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(beside, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(f"storage {masked(self._place)}: cannot write {beside}: {error.strerror}") from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        return True

    def _holder(self, path: Path | None) -> str:
        """Of a file's lock, in brackets; a server does not tell."""
        try:
            who = self._beside(path).read_text() if path is not None else ""
        except (OSError, UnicodeDecodeError):
            who = ""
        return f" ({who})" if who else ""

    def _beside(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.{_digest(self._name)}.lock")

    def _acquire_session(self, wait: float) -> bool:
        """Of a database server; True also of a kind that has no such locks, where the folder's must do."""
        from sqlalchemy import create_engine, text
        from sqlalchemy.exc import OperationalError
        from sqlalchemy.pool import NullPool

        number = int.from_bytes(hashlib.sha256(f"loratune/{self._name}".encode()).digest()[:8], "big", signed=True)
        questions = {
            "postgresql": text("SELECT pg_try_advisory_lock(:number)").bindparams(number=number),
            "mysql": text("SELECT GET_LOCK(:name, 0)").bindparams(name=f"loratune/{_digest(self._name)}"),
        }
        questions["mariadb"] = questions["mysql"]
        deadline, pause = time.monotonic() + wait, 0.25
        while True:
            self._engine = create_engine(self._place, poolclass=NullPool, isolation_level="AUTOCOMMIT")
            question = questions.get(self._engine.dialect.name)
            if question is None:
                return True
            try:
                self._connection = self._engine.connect()
                return bool(self._connection.execute(question).scalar())
            except OperationalError:
                if time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 5.0)


def network_warning(url: str | None, folder: Path) -> str:
    """A warning where an SQLite file lies on a network disk; "" where it does not."""
    path = file_of(place_of(url, folder))
    kind = filesystem(path) if path is not None else ""
    if kind not in _NETWORK:
        return ""
    return (
        f"warning: {path} lies on a network disk ({kind}), where SQLite's locks may not work and a commit is slow. Better: "
        "--storage FILE.journal (Optuna's journal, made for such disks), or a server: --storage postgresql+psycopg://..."
    )


def filesystem(path: Path, table: Path = Path("/proc/self/mountinfo")) -> str:
    """The kind of file system that `path` lies on, or will, as the kernel names it; "" where the system does not tell."""
    try:
        lines = table.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    inside = path.expanduser().resolve()
    best, kind = -1, ""
    for line in lines:
        mount, _, about = line.partition(" - ")
        point = Path(mount.split()[4].replace("\\040", " "))
        if (point == inside or point in inside.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), about.split()[0]
    return kind


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:12]
