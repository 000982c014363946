"""loratune, killed at a chosen moment: `python dying.py MOMENT FOLDER COMMAND ...`.

Moments are the writes below FOLDER: a file opened for writing, a rename, a folder made, a file removed, a database opened. At the
MOMENT-th the process dies as by kill -9, just before it; with moment 0 it lives, and the last line on standard error counts them.
"""

import os
import signal
import sys
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MOMENT, FOLDER = int(sys.argv[1]), os.path.realpath(sys.argv[2])
count = 0


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    global count
    if event == "open":
        if not isinstance(arguments[2], int) or not arguments[2] & WRITES:
            return
    elif event not in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "sqlite3.connect"):
        return
    path = arguments[1] if event == "os.rename" else arguments[0]
    if not isinstance(path, str | bytes | os.PathLike):
        return
    place = os.path.abspath(os.fsdecode(path))
    if place != FOLDER and not place.startswith(FOLDER + os.sep):
        return
    count += 1
    if count == MOMENT:
        os.write(2, f"killed before write {count}: {event} {os.path.relpath(place, FOLDER)}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)


sys.argv = ["loratune", *sys.argv[3:]]
sys.addaudithook(hook)

from loratune.cli import main  # noqa: E402  # after the hook, so that no write escapes it

code = main()
os.write(2, f"\n{count} writes\n".encode())
os._exit(code)
