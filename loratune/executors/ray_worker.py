"""What stands on a node of a Ray cluster: an actor that runs a worker process and passes on what it says.

The actor trains nothing. Its worker process is the one of the `local` executor (`worker.py`), so torch, the engine's loop, torchrun
groups and lost devices are as there; when the actor goes, because its driver or its node went, the process sees its socket close
and ends. Ray is not imported here: the actor is a plain class, and Ray is where its caller is.
"""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratune.errors import StorageError
from loratune.executors.base import News
from loratune.executors.process import WorkerProcess
from loratune.executors.shipping import Changes, Parcel, RunWatch, fetched, node_store, release
from loratune.record.paths import StudyPaths
from loratune.system.files import scratch
from loratune.work import Outcome, Recipe, Segment, State

_GATHER = 2.0  # seconds for which signs of life wait for others, to travel together
_LOOK = 0.25  # seconds between two looks at the worker
_FAREWELL = 40.0  # seconds that a preempted worker has for its checkpoints; clouds give 30 to 120


@dataclass(frozen=True, kw_only=True)
class Home:
    """The study, as a node must know it."""

    folder: str  # on the driver's machine; on all machines where it is shared
    cwd: str  # of the driver, from which the recipe's relative paths count
    shared: bool
    recipe: Recipe
    parcels: tuple[Parcel, ...] = ()  # the folders that the recipe names, where nothing is shared


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What an actor has to tell."""

    news: tuple[News, ...] = ()
    changes: tuple[Changes, ...] = ()  # to be written before the outcomes among the news are recorded
    log: bytes = b""  # what the worker process printed
    leaving: bool = False  # preempted: it takes no more segments
    ended: str = ""  # how the worker process ended; nothing follows


@dataclass
class _Given:
    segment: Segment
    watch: RunWatch | None = field(default=None)


class NodeWorker:
    """The actor. Raises what keeps a worker from starting: StorageError, TrainingError."""

    def __init__(
        self, *, number: int, home: Home, get: Callable[[Any], bytes], node: str, gpu: bool, size: int, threads: int, patience: float
    ) -> None:
        self._shared, self._node, self._patience = home.shared, node, patience
        self._given: dict[str, _Given] = {}
        self._answers: list[News] = []  # of our own
        self._lock = threading.Lock()
        self._store: tuple[Path, int] | None = None
        self._renamed: dict[bytes, bytes] = {}  # folders of this node, as the driver calls them
        self._read = 0  # bytes of the worker's log
        self._root = Path(home.folder) if home.shared else self._moved_in(home)
        if home.shared:
            self._see(home)
        self._process = WorkerProcess(number=number, root=self._root, lock=None, devices=None if gpu else [], size=size, threads=threads)
        self._process.launch()
        # Ray's own handler would end the process at once.
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=self._preempted, daemon=True).start())

    def place(self) -> dict[str, Any]:
        """Where it is."""
        return {"node": self._node, "host": os.uname().nodename, "pid": os.getpid()}

    def take(self, segment: Segment, files: list[tuple[str, bytes]]) -> None:
        """Train the segment; `files`: its run's checkpoints."""
        given = _Given(segment)
        try:
            if not self._shared:
                given.watch = RunWatch(StudyPaths(self._root).of(segment).folder, segment.key, segment.attempt)
                given.watch.begin(files)
        except OSError as error:
            why = f"cannot write on node {os.uname().nodename}: {error}"
            with self._lock:
                self._answers.append(Outcome(key=segment.key, state=State.CRASHED, message=why, attempt=segment.attempt))
            return
        with self._lock:
            self._given[segment.key] = given
        self._process.send(segment)

    def hear(self) -> Heard:
        """What happened since the last call. An outcome, a checkpoint, a farewell come at once, signs of life together, nothing after
        `patience` seconds."""
        deadline, news, ended = time.monotonic() + self._patience, list[News](), ""
        first = None
        while True:
            connection = self._process.connection
            try:
                if connection is not None and connection.poll(_LOOK):
                    news += self._process.receive()
            except (EOFError, OSError):
                self._process.end(5.0)
                ended = f"the worker process died{self._process.ending}"
            with self._lock:
                news += self._answers
                self._answers = []
            changes = self._changes(news, all_of_them=bool(ended))
            first = first or (time.monotonic() if news else None)
            urgent = ended or any(changes) or any(isinstance(item, Outcome) for item in news) or self._process.leaving
            if urgent or time.monotonic() > min(deadline, (first or deadline) + _GATHER):
                heard = Heard(news=tuple(news), changes=tuple(filter(None, changes)), log=self._log(), leaving=self._process.leaving)
                if self._process.leaving and not ended and not news:
                    time.sleep(_LOOK)
                return replace(heard, ended=ended)

    def stop(self) -> None:
        """Let running segments finish their step and write a checkpoint."""
        self._process.send(None)

    def close(self) -> None:
        """End the worker process, and leave nothing on the node."""
        self._process.kill()
        if not self._shared:
            shutil.rmtree(self._root, ignore_errors=True)
        if self._store is not None:
            release(*self._store)
            self._store = None

    def _moved_in(self, home: Home, get: Callable[[Any], bytes]) -> Path:
        raise NotImplementedError

    def _log(self) -> bytes:
        """What the worker process printed since the last call; nothing where the driver can read it itself."""
        if self._shared:
            return b""
        with contextlib.suppress(FileNotFoundError), self._process.log.open("rb") as file:
            file.seek(self._read)
            content = file.read()
            self._read += len(content)
            return content
        return b""
