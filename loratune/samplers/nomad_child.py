"""The process that NOMAD runs in, seen from the sampler: start it, hear its points, tell it their values."""

import contextlib
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any, NamedTuple

from loratune.errors import LoratuneError
from loratune.samplers.nomad_points import Answer, Point


class Run(NamedTuple):
    """One NOMAD optimisation: how it was started, and what each of its blocks was answered."""

    start: dict[str, Any]
    told: list[list[Answer]]


class Child:
    """A NOMAD process. `block` holds the points it waits for, None once it has ended, `reason` says why."""

    def __init__(self, start: dict[str, Any]) -> None:
        self.start = start
        self.told: list[list[Answer]] = []
        self.block: list[Point] | None = None
        self.reason = ""
        program = Path(__file__).with_name("nomad_process.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(program)],  # -P: our folder must not shadow other modules
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # the terminal's Ctrl-C is not for it
        )
        self.close = weakref.finalize(self, _end, self._process, os.getpid())
        self._send(start)
        self._receive()

    def can_follow(self, run: Run) -> bool:
        return self.start == run.start and self.told == run.told[: len(self.told)]

    def tell(self, answers: list[Answer]) -> None:
        self.told.append(answers)
        self._send(answers)
        self._receive()

    def _send(self, message: Any) -> None:
        if self._process.stdin is None:
            raise RuntimeError("the NOMAD process has no input")
        with contextlib.suppress(BrokenPipeError):  # it died; `_receive` says how
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _receive(self) -> None:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        message: dict[str, Any] = json.loads(line) if line.endswith("\n") else self._post_mortem()
        if "error" in message:
            self.close()
            raise LoratuneError(f"NOMAD could not start: {message['error']}. Try: pip install --force-reinstall PyNomadBBO")
        self.block = message.get("block")
        self.reason = message.get("end", "")

    def _post_mortem(self) -> dict[str, str]:
        """NOMAD answers some searches (one integer parameter, ...) with a crash, always at the same point: its end."""
        status = self._process.wait()
        if status in (-6, -11):  # abort, segmentation fault
            return {"end": f"it crashed with signal {-status}"}
        self.close()
        raise LoratuneError(f"The NOMAD process was killed from outside (status {status}). Run the same command again to continue.")


def _end(process: subprocess.Popen[str], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the process that the child belongs to
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was left unsent has no reader
                pipe.close()
