"""Ctrl-C and SIGTERM: the first asks the command to stop after the running steps, the second ends it at once."""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Self

from loratune.system.masking import masked_command

INTERRUPTED = 130  # the exit code
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"


class Interrupt:
    """A context in which the signals set `stop`. `show` shows a line to the user."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.show: Callable[[str], None] = print
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.stop.is_set():
            # Nothing needs closing: what is on disk is whole, and workers end when their driver is gone.
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), _SHOW_CURSOR.encode())
            os._exit(130)
        self.stop.set()
        # Elsewhere than in the handler, which may have interrupted a print.
        line = "Stopping after the running steps. Press Ctrl-C again to stop at once."
        threading.Thread(target=self.show, args=(line,), daemon=True).start()


def stopped(command_line: Sequence[str]) -> int:
    """Tell how to continue; returns the exit code."""
    print(f"Stopped; nothing is lost. To continue: {shlex.join(masked_command(command_line))}")
    return INTERRUPTED
