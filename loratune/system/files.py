"""Files that a crash leaves whole, and files that are read back with their damage named.

What is written stands aside first, in `.<name>.<host>@<process>.<random>.tmp`, and is renamed: at any moment there is the old file
or the new one, never half of it. What a killed process left aside, `sweep` removes: the folder may be shared by machines, and a
process's number says something on its own machine alone.
"""

import contextlib
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from loratune.errors import StorageError

AnyPath = str | os.PathLike[str]
"""How a caller may name a file or folder."""

T = TypeVar("T")

_cleared: set[Path] = set()  # folders that this process has written to
_clearing = threading.Lock()
_HOST = re.sub(r"[^A-Za-z0-9-]", "_", os.uname().nodename)[:64]
_ASIDE = re.compile(r"\..+\.(?:([A-Za-z0-9_-]*)@)?(\d+)\.[0-9a-f]{8}\.tmp")
_FORGOTTEN = 86400.0  # seconds after which nobody on another machine still writes a file


def aside(path: Path) -> Path:
    """A new name beside `path`, for a file or folder that will be renamed to it."""
    return path.with_name(f".{path.name}.{writer()}.{secrets.token_hex(4)}.tmp")


def writer() -> str:
    """This process, on this machine, as a temporary file's name has it: `<host>@<process>`."""
    return f"{_HOST}@{os.getpid()}"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` beside `path`, flush it to the disk, and rename it into place.

    The file's mode follows the umask. Raises StorageError naming the path when the folder is read-only, the disk is full, and the
    like.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path.parent)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}. Nothing before it was lost; "
            "free the disk or open the folder, then run the same command again."
        ) from error


@contextlib.contextmanager
def new_folder(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """A folder beside `target`, to be filled; at the block's end it takes the place of `target`, after an error it is gone.

    replace: False leaves a `target` that another process has put there meanwhile.
    Its mode follows the umask, and its content is on the disk before it is renamed. Raises StorageError for an OSError of the block too.
    """
    fresh, old = aside(target), aside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target.parent)
        fresh.mkdir()
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            _flush(path)
        if replace and target.exists():
            os.rename(target, old)
        try:
            os.rename(fresh, target)
        except OSError:
            if replace or not target.is_dir():
                raise
        _flush(target.parent)
    except OSError as error:
        raise StorageError(
            f"cannot write {target}: {error.strerror or error}. Free the disk or open the folder, then run the same command again."
        ) from error
    finally:
        if old.exists() and not target.exists():  # the second rename failed
            os.rename(old, target)
        for path in (fresh, old):
            shutil.rmtree(path, ignore_errors=True)


def scratch(kind: str, parent: str | None = None) -> str:
    """A new folder for what need not last, `loratune-<kind>-<process>-...` in the system's folder for such, this user's alone.

    What killed processes left of the same kind is removed. Raises OSError.
    """
    parent = parent or tempfile.gettempdir()
    for path in Path(parent).glob(f"loratune-{kind}-*"):
        pid = path.name.removeprefix(f"loratune-{kind}-").partition("-")[0]
        if pid.isdigit() and int(pid) != os.getpid() and not alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)  # another user's stays
    return tempfile.mkdtemp(prefix=f"loratune-{kind}-{os.getpid()}-", dir=parent)


def working_folder() -> str:
    """This process's working folder. Raises StorageError where it was removed: PyTorch's libraries and Ray do not work there."""
    try:
        return os.getcwd()
    except FileNotFoundError as error:
        raise StorageError("the working folder was removed. Change to one that exists (cd), then run the same command again.") from error


def has_working_folder() -> bool:
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False


def text_of(path: Path) -> str:
    """The file's text, UTF-8. Raises StorageError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise StorageError(f"{path} is damaged (it is not UTF-8 text, byte {error.start}).") from error


def parsed(path: Path, parse: Callable[[str], T], remedy: str) -> T:
    """What `parse` makes of the file's text. Raises StorageError: the file, its damage, and `remedy`, a sentence on what to do."""
    try:
        text = text_of(path)
    except StorageError as error:
        raise StorageError(f"{error} {remedy}") from error
    try:
        return parse(text)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = "it is empty" if not text.strip() else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise StorageError(f"{path} is damaged ({what}). {remedy}") from error


def sweep(folder: Path) -> None:
    """Remove what killed processes left aside in `folder` itself; of another machine's, what is a day old. What cannot be removed,
    stays."""
    for path in folder.glob(".*.tmp"):
        match = _ASIDE.fullmatch(path.name)
        if match is None or _in_use(path, match[1], int(match[2])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def written_elsewhere(path: Path) -> bool:
    """Whether another living process, by the temporary file's name (`writer`), is writing it."""
    match = re.search(r"\.([A-Za-z0-9_-]*)@(\d+)\.", path.name)
    return match is not None and _in_use(path, match[1], int(match[2]))


def _in_use(path: Path, host: str | None, pid: int) -> bool:
    if host in (None, _HOST):
        return pid != os.getpid() and alive(pid)  # a container gives the same number again
    try:
        return time.time() - path.stat().st_mtime < _FORGOTTEN
    except OSError:
        return True


def _clear(folder: Path) -> None:
    """Sweep a folder before this process writes to it for the first time: later, what stands aside may be its own."""
    with _clearing:
        if folder not in _cleared:
            _cleared.add(folder)
            sweep(folder)


def alive(pid: int) -> bool:
    """Whether the process exists here and is no zombie (killed, and not reaped by its parent yet)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
