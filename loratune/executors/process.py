"""The driver's end of one worker process: start it, exchange JSON with it, notice its death."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from json import dumps, loads
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from loratune.errors import TrainingError
from loratune.executors.base import News
from loratune.executors.devices import only
from loratune.record.paths import StudyPaths
from loratune.system.files import has_working_folder, scratch
from loratune.system.machine import thread_variables
from loratune.work import Message, Outcome, Progress, Segment

ON_GPU = "LORATUNE_ON_GPU"  # set where a worker was given a GPU: should it see none, it must not train on the CPU instead
DEVICE_LOST = 4  # exit status of a worker whose device reported an error that no process survives
_KINDS: dict[str, type[News]] = {"progress": Progress, "outcome": Outcome, "message": Message}
_SOCKET_PATH = 107  # bytes, without the zero at the end
# What the allocator listens to. The first is obeyed by every torch; before 2.12 the others are not, on CUDA (pytorch issue 183387).
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_START_PATIENCE = 120.0  # seconds for a new process to call back; torchrun imports torch before it starts the workers


def _socket_folder() -> str:
    """A new folder that only this user can enter, with a path short enough for a socket: 108 bytes, the kernel's limit (unix(7)).

    Raises TrainingError where TMPDIR is too long and /tmp cannot be used.
    """
    folder = scratch("socket")
    if len(os.fsencode(folder)) <= _SOCKET_PATH - len("/socket"):
        return folder
    os.rmdir(folder)
    try:
        return scratch("socket", "/tmp")
    except OSError as error:
        raise TrainingError(
            f"TMPDIR is too long for a socket: {folder} has {len(os.fsencode(folder))} bytes, at most {_SOCKET_PATH - len('/socket')} fit, "
            f"and /tmp cannot be written ({error.strerror}). Set TMPDIR to a shorter folder."
        ) from error


class WorkerProcess:
    """A process running `worker.py`, or a torchrun group of `size` of them, on the given CUDA devices.

    lock: the study's, which it inherits; None on another machine than the driver's. devices: None for all that are visible here,
    empty for the CPU. cwd: by default this process's.
    """

    def __init__(
        self, *, number: int, root: Path, lock: int | None, devices: list[int] | None, size: int, threads: int, cwd: str | None = None
    ) -> None:
        self._root, self._lock, self._devices, self._size, self._threads, self._cwd = root, lock, devices, size, threads, cwd
        self._process: subprocess.Popen[bytes] | None = None
        self._server: socket.socket | None = None  # between `start` and the process's call
        self._folder = ""  # that the server's socket lies in
        self.connection: Connection | None = None  # None while no process runs
        self.leaving = False  # it was preempted: it cancels its segments and ends
        self.used = False  # it was given a segment
        self.log = StudyPaths(root).worker_logs / f"{number}.log"

    @property
    def ending(self) -> str:
        """How the process ended, to follow "the worker process died"."""
        code = self._process.returncode if self._process is not None else None
        if code == DEVICE_LOST:
            return ", because its device reported an unrecoverable error"
        if code is None or code >= 0:
            return f" with exit status {code}" if code else ""
        hint = ", probably by the system because memory ran out" if -code == signal.SIGKILL else ""
        return f", killed by {signal.Signals(-code).name}{hint}"

    def start(self) -> None:
        """Start the process, without waiting for it: it imports what it needs, and waits for `launch` before it reads the recipe."""
        self.log.parent.mkdir(exist_ok=True)
        self.leaving = self.used = False
        self._folder = _socket_folder()
        address = f"{self._folder}/socket"
        self._server = socket.socket(socket.AF_UNIX)
        try:
            self._server.bind(address)
            self._server.listen(1)
            self._server.settimeout(0.2)
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, *self._launcher(), "-m", "loratune.executors.worker", str(self._root), address],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=os.environ | self._environment(),
                    pass_fds=() if self._lock is None else (self._lock,),
                    cwd=self._cwd or (None if has_working_folder() else "/"),  # without one, PyTorch's libraries do not load
                    start_new_session=True,  # Ctrl-C is the driver's to answer; and the whole group can be killed
                )
        except BaseException:
            self._close_server()
            raise

    def launch(self) -> None:
        """Have the process run and load the model, which the study's recipe names. Raises TrainingError when it cannot start."""
        if self.connection is not None:
            return
        if self._server is None:
            self.start()
        try:
            self.connection = self._accept()
        finally:
            self._close_server()
        self._say({"load": True})

    def same(self, other: "WorkerProcess") -> bool:
        """Whether `other` would be started in the same way."""
        return self._started_as() == other._started_as()

    def discard(self) -> None:
        """End a process that `start` began and nobody launched."""
        if self._server is not None:
            self._close_server()
            self.kill()

    def send(self, segment: Segment | None) -> None:
        """Give it a segment; None: stop."""
        self.used |= segment is not None
        self._say({"stop": True} if segment is None else {"segment": segment.to_plain()})

    def _say(self, message: dict[str, Any]) -> None:
        if self.connection is not None:
            with contextlib.suppress(OSError):  # it died; whoever receives will see the end of the stream
                self.connection.send_bytes(dumps(message).encode())

    def receive(self) -> list[News]:
        """Everything that came in, without waiting. Raises EOFError when the process is gone."""
        items: list[News] = []
        try:
            while self.connection is not None and self.connection.poll():
                for kind, content in loads(self.connection.recv_bytes()).items():
                    if kind == "leaving":
                        self.leaving = True
                    else:
                        items.append(_KINDS[kind].from_plain(content))
        except OSError as error:  # EOFError is none of OSError; a reset is
            raise EOFError from error
        except EOFError:
            if not items:
                raise  # otherwise what it sent last counts first; the next call sees the end again
        return items

    def preempt(self) -> None:
        """Ask it to write checkpoints, cancel what it has and leave, as a machine does that is taken away."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def end(self, patience: float) -> None:
        """Wait for the process to leave, reading on so that it never blocks; then kill it and its group."""
        deadline = time.monotonic() + patience
        with contextlib.suppress(EOFError):
            while self.connection is not None and (left := deadline - time.monotonic()) > 0:
                if self.connection.poll(left):
                    self.receive()
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if self._process is not None:
            try:
                self._process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """Kill the whole process group, now."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def _started_as(self) -> tuple[object, ...]:
        return self._root, self._lock, self._devices, self._size, self._threads, self._cwd, self.log

    def _close_server(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            shutil.rmtree(self._folder, ignore_errors=True)

    def _launcher(self) -> list[str]:
        return [] if self._size == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self._size}"]

    def _environment(self) -> dict[str, str]:
        chosen = {**thread_variables(self._threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        if self._devices is None or self._devices:
            chosen |= {ON_GPU: "1"} | only(self._devices or [])
            if not any(name in os.environ for name in _ALLOCATOR):
                chosen[_ALLOCATOR[0]] = "expandable_segments:True"  # passes differ in size: fragments would fill the memory
        return chosen

    def _accept(self) -> Connection:
        deadline = time.monotonic() + _START_PATIENCE
        while self._server is not None and time.monotonic() < deadline:
            try:
                return Connection(self._server.accept()[0].detach())
            except TimeoutError:
                if self._process is not None and self._process.poll() is not None:
                    break
        self.kill()
        tail = self.log.read_text(errors="replace").strip().splitlines()[-5:]
        raise TrainingError(f"a worker process could not start. The end of {self.log}:\n  " + "\n  ".join(tail))
