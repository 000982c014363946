"""Writing files so that a crash at any moment leaves the old one or the new one, never half of it."""

import os
import tempfile
from pathlib import Path

from loratune.errors import StorageError

AnyPath = str | os.PathLike[str]
"""How a caller may name a file or folder."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` beside `path`, flush it to the disk, and rename it into place.

    Raises StorageError naming the path when the folder is read-only, the disk is full, and the like.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes 0600; a study's folder is shared with colleagues
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}. Nothing before it was lost; "
            "free the disk or open the folder, then run the same command again."
        ) from error
