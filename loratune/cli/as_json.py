"""`--json`, of every command: one JSON object on standard output, for programs and agents. All other text goes to standard error.

A command puts its results into `args.facts`; docs/reference/json.md lists them. However the command ends, but for --help, the object
is printed once: beside what was found before it has {"error": {"kind": "SpecError", "message": ...}} unless the exit code is 0, and
the exit code is the same as without --json.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loratune.system.masking import masked

_PRINTING = 2.0  # seconds that a process about to be ended gives an object that is being printed


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object; all other text goes to standard error")


class Answer:
    """The object of one command; nothing is printed where `argv` does not ask for it."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.wanted = "--json" in argv
        self.facts: dict[str, Any] = {}
        self._taken, self._printed = threading.Lock(), threading.Event()

    def run(self, command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
        """The command, its words aside and its facts kept. Returns its exit code; raises what it raises."""
        args.facts = self.facts
        with contextlib.redirect_stdout(sys.stderr) if self.wanted else contextlib.nullcontext():
            try:
                return command(args)
            finally:
                self.facts = args.facts

    def failed(self, kind: str, message: str) -> None:
        self.facts["error"] = {"kind": kind, "message": masked(message)}

    def give(self) -> None:
        """Print the object, once."""
        if self.wanted and self._taken.acquire(blocking=False):
            print(json.dumps(_plain(self.facts), indent=1, default=str), flush=True)
            self._printed.set()

    def give_at_once(self) -> None:
        """For a process that is ended while it is at work, from whichever thread: the error alone, past Python's buffers."""
        if not self.wanted:
            return
        if not self._taken.acquire(blocking=False):
            self._printed.wait(_PRINTING)
            return
        error = {"kind": INTERRUPTION, "message": "Ended at once. Nothing that was computed is lost; the same command continues."}
        with contextlib.suppress(OSError):
            os.write(1, (json.dumps({"error": error}) + "\n").encode())


INTERRUPTION = "Interrupted"
"""The kind of error of a command that Ctrl-C or SIGTERM ended."""


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null, also as `Json.to_plain` spells them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value in ("nan", "inf", "-inf") or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return str(value) if isinstance(value, Path) else value
