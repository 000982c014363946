"""Runs a server for as long as whoever asked for it lives: `python -m loratune.downstream.answering.server_process FOLDER COMMAND...`

The end of standard input means that the evaluation is over, or was killed: the server and all that it started are then told to end,
and after some seconds killed. Until they have ended the next evaluation of FOLDER waits (results/scores.py), for the device's memory
is theirs. Exits as the server did.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from loratune.downstream.results.scores import join_evaluation

_GRACE = 10.0  # seconds between asking and killing


def main() -> int:
    folder, *command = sys.argv[1:]
    join_evaluation(Path(folder))
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_input, args=(server,), daemon=True).start()
    code = server.wait()
    _signal_all(server, signal.SIGKILL)  # processes of its own that it left behind
    return code if code >= 0 else 128 - code


def _end_with_input(server: "subprocess.Popen[bytes]") -> None:
    while os.read(0, 1024):
        pass
    _signal_all(server, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(_GRACE)
    _signal_all(server, signal.SIGKILL)


def _signal_all(server: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, number)


if __name__ == "__main__":
    raise SystemExit(main())
