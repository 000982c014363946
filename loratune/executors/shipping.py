"""Folders and files on their way between the driver and nodes without a shared disk.

What all trials read (the model's folder, the prepared data) is cut into blocks that a node fetches once, one at a time, and keeps
for all its workers. What a trial writes comes home as `Changes`: the files of its run's folder that are new.
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratune.errors import StorageError
from loratune.record.paths import RunPaths
from loratune.system.files import new_folder, write_atomically

BLOCK = 64 << 20  # bytes
_GONE = ".gone-"  # in the name of a folder that is being removed


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """A folder in blocks: `files` has each file's relative path and its blocks, as `put` names them."""

    origin: str  # where it lies on the driver's machine, as the recipe names it
    digest: str  # SHA-256 of names and contents
    files: tuple[tuple[str, tuple[Any, ...]], ...]


def parcel(folder: str, put: Callable[[bytes], Any]) -> Parcel:
    """Read a folder, and `put` its blocks where nodes can fetch them. Raises StorageError."""
    digest, files = hashlib.sha256(), []
    root = Path(folder).expanduser()
    try:
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            name, blocks = path.relative_to(root).as_posix(), []
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
                    blocks.append(put(block))
            files.append((name, tuple(blocks)))
    except OSError as error:
        raise StorageError(f"cannot read {folder} to send it to the nodes: {error.strerror or error}") from error
    return Parcel(origin=folder, digest=digest.hexdigest(), files=tuple(files))


def node_store(node: str) -> tuple[Path, int]:
    """(the folder where this node keeps what it fetched, a descriptor that keeps it while it is open).

    Folders that no living worker keeps, of dead clusters, are removed. Raises StorageError where somebody else's stands in its place.
    """
    base = Path(tempfile.gettempdir())
    for path in base.glob(f"loratune-node-{os.getuid()}-*"):
        _discard(path)
    store = base / f"loratune-node-{os.getuid()}-{node[:16]}"
    while True:
        with contextlib.suppress(FileNotFoundError):  # another worker removed it meanwhile
            store.mkdir(mode=0o700, exist_ok=True)
            if store.lstat().st_uid != os.getuid() or store.is_symlink():
                raise StorageError(f"{store} belongs to somebody else. Set TMPDIR to a folder of your own.")
            handle = os.open(store / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(handle, fcntl.LOCK_SH)
            if _is_lock_of(handle, store):
                return store, handle
            os.close(handle)


def fetch_parcel(given: Parcel, store: Path, get: Callable[[Any], bytes]) -> Path:
    """The folder on this node, fetched unless it is there. Workers of a node that ask together wait for the first."""
    target = store / given.digest[:32]
    with open(store / f"{given.digest[:32]}.lock", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if not target.is_dir():
            with new_folder(target) as fresh:
                for name, blocks in given.files:
                    path = fresh / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("wb") as file:
                        for block in blocks:
                            file.write(get(block))
    return target


def release(store: Path, handle: int) -> None:
    """Keep the node's folder no longer; the last one removes it."""
    os.close(handle)
    _discard(store)


def _discard(store: Path) -> None:
    """Remove a node's folder unless a worker keeps it. It gets another name first: nobody may find half of what is in it."""
    if _GONE in store.name:  # whoever removes it may have been killed
        shutil.rmtree(store, ignore_errors=True)
        return
    with contextlib.suppress(OSError), open(store / "lock") as lock:  # kept, gone, or another user's
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_lock_of(lock.fileno(), store):
            gone = store.with_name(f"{store.name}{_GONE}{secrets.token_hex(4)}")
            store.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def _is_lock_of(handle: int, store: Path) -> bool:
    """Whether the folder's lock is still this open file, and not that of a folder that was removed since."""
    try:
        return os.path.samestat(os.fstat(handle), (store / "lock").stat())
    except FileNotFoundError:
        return False


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What is new in a run's folder, told by one attempt of a segment."""

    key: str
    attempt: int
    files: dict[str, bytes] = field(default_factory=dict)
    log: bytes = b""  # what was added to log.txt
    checkpoints: tuple[str, ...] = ()  # all that are there now: others are superseded

    def __bool__(self) -> bool:
        return bool(self.files or self.log)


class RunWatch:
    """Tells what is new in the folder of a run since it was last asked."""

    def __init__(self, folder: Path, key: str, attempt: int) -> None:
        self._folder, self._log, self._key, self._attempt = folder, RunPaths(folder).log, key, attempt
        self._seen: dict[str, tuple[int, int]] = {}
        self._read = 0  # bytes of the log

    def begin(self, files: Iterable[tuple[str, bytes]]) -> None:
        """Make the folder hold these files, and nothing of an attempt before."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        for name, content in files:
            (self._folder / name).write_bytes(content)
            self._seen[name] = _state(self._folder / name)

    def has_new(self) -> bool:
        """Whether there is a checkpoint that was not told of."""
        for path in self._folder.glob("checkpoint-*"):
            with contextlib.suppress(FileNotFoundError):
                if self._seen.get(path.name) != _state(path):
                    return True
        return False

    def changes(self, everything: bool) -> Changes:
        """The new checkpoints and lines of the log; `everything`: the adapter and all else too."""
        paths = self._folder.rglob("*") if everything else self._folder.glob("checkpoint-*")
        files: dict[str, bytes] = {}
        for path in sorted(paths):
            name = path.relative_to(self._folder).as_posix()
            if path == self._log or any(part.startswith(".") for part in Path(name).parts):
                continue
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # a newer checkpoint has replaced it
                state = _state(path)
                if self._seen.get(name) != state:
                    files[name] = path.read_bytes()
                    self._seen[name] = state
        log = b""
        with contextlib.suppress(FileNotFoundError), self._log.open("rb") as file:
            file.seek(self._read)
            log = file.read()
            self._read += len(log)
        there = tuple(sorted(path.name for path in self._folder.glob("checkpoint-*")))
        return Changes(key=self._key, attempt=self._attempt, files=files, log=log, checkpoints=there)


def brought_home(changes: Changes, run: RunPaths) -> None:
    """Write what a node told into the run's folder, each file whole, the adapter as one. Raises StorageError."""
    inside = f"{run.adapter.name}/"
    adapter = {name: content for name, content in changes.files.items() if name.startswith(inside)}
    if adapter:
        with new_folder(run.adapter) as fresh:
            for name, content in adapter.items():
                path = fresh / name.removeprefix(inside)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    for name, content in changes.files.items():
        if name not in adapter:
            write_atomically(run.folder / name, content)
    if changes.log:
        append(run.log, changes.log)
    for path in run.checkpoints():
        if changes.checkpoints and path.name not in changes.checkpoints:
            path.unlink(missing_ok=True)


def append(path: Path, content: bytes) -> None:
    """Add to a log. Raises StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(content)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}. Free the disk, then run the same command again.") from error


def checkpoints_of(run: RunPaths) -> Iterator[tuple[str, bytes]]:
    """The run's checkpoints, for a node that goes on from them."""
    for path in run.checkpoints():
        yield path.name, path.read_bytes()


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
