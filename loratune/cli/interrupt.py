"""Ctrl-C and SIGTERM: the first asks the study to stop after the running steps, the second ends it at once."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"


class Interrupt:
    """A context in which the signals set `stop`. `tell` shows a line to the user."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.tell: Callable[[str], None] = print
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
        threading.Thread(target=self.tell, args=("Stopping after the running steps; once more to stop at once.",), daemon=True).start()
