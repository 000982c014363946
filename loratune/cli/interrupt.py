"""Ctrl-C and SIGTERM: the first asks the command to stop after the running steps, the second ends it at once, and so does time.

Ending at once is safe: what is on disk is whole, and workers end when their driver is gone.
"""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn, Self

from loratune.cli.as_json import INTERRUPTION, Answer
from loratune.system.masking import masked_command

INTERRUPTED = 130  # the exit code
PATIENCE = 90.0  # seconds after the first signal; workers are given 60 of them for their checkpoints
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"
_answer: Answer | None = None  # of the command that runs


class Interrupt:
    """A context in which the signals set `stop`. `show` shows a line to the user.

    A thread listens, woken by what Python's own handler in C writes into a socket: the main thread may be in a computation, or in a
    library that waits for a server, and come to no handler in Python. A command that has not left the context `patience` seconds
    after the first signal is ended. Only C code that never gives up the interpreter's lock is beyond it.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.stop = threading.Event()
        self.show: Callable[[str], None] = print
        self._patience = patience
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        global _active
        heard, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        self._woken = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        _active = self
        threading.Thread(target=self._listen, args=(heard,), name="loratune-signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        _active = None
        signal.set_wakeup_fd(self._woken)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._wake.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Nothing to do, the thread has heard it; but where a library took the socket's place, as asyncio does, it is told."""
        ours = self._wake.fileno()
        theirs = signal.set_wakeup_fd(ours, warn_on_full_buffer=False)
        if theirs != ours:
            signal.set_wakeup_fd(theirs)
            with contextlib.suppress(BlockingIOError):
                self._wake.send(bytes([number]))

    def _listen(self, heard: socket.socket) -> None:
        deadline: float | None = None
        with heard:
            while True:
                heard.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
                try:
                    numbers = heard.recv(64)
                except TimeoutError:
                    end_at_once(f"not stopped within {self._patience:g} s")
                if not numbers:  # the context was left
                    return
                for _ in filter(_SIGNALS.__contains__, numbers):
                    if self.stop.is_set():
                        end_at_once()
                    self.stop.set()
                    deadline = time.monotonic() + self._patience
                    # In a thread of its own: a terminal that does not read must not keep this one from listening.
                    line = "Stopping after the running steps. Press Ctrl-C again to stop at once."
                    threading.Thread(target=self.show, args=(line,), daemon=True).start()


_active: Interrupt | None = None


def _hold() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _release() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _release_forked() -> None:
    """A process that is forked from this one has no such thread: signals are its own, and must not reach the parent's socket."""
    if _active is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _release()


os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_release_forked)


def end_at_once(why: str = "") -> NoReturn:
    """End the process with the exit code of an interrupt, its JSON object printed."""
    if sys.stdout is not None and sys.stdout.isatty():
        os.write(1, _SHOW_CURSOR.encode())
    if why:
        with contextlib.suppress(OSError):
            os.write(2, f"loratune: {why}; ended at once. Nothing that was computed is lost; the same command continues.\n".encode())
    if _answer is not None:
        _answer.give_at_once()
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def terminable(answer: Answer) -> Iterator[None]:
    """A context in which SIGTERM, elsewhere than in `Interrupt`, is a KeyboardInterrupt, the second one the end.

    Left alone where somebody else has a handler, and in another than the main thread.
    """
    global _answer
    _answer = answer
    main, term = threading.current_thread() is threading.main_thread(), signal.SIGTERM
    ours, owner, asked = main and signal.getsignal(term) is signal.SIG_DFL, os.getpid(), False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if os.getpid() != owner:  # forked from this one
            signal.signal(term, signal.SIG_DFL)
            os.kill(os.getpid(), term)
        elif asked:
            end_at_once()
        else:
            asked = True
            raise KeyboardInterrupt

    try:
        if ours:
            signal.signal(term, handle)
        yield
    finally:
        if ours:
            signal.signal(term, signal.SIG_DFL)
        _answer = None


def stopped(args: argparse.Namespace) -> int:
    """Tell how to continue; returns the exit code."""
    text = f"Stopped; nothing is lost. To continue: {shlex.join(masked_command(args.command_line))}"
    print(text)
    args.facts["error"] = {"kind": INTERRUPTION, "message": text}
    return INTERRUPTED
