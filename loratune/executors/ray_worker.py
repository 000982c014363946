"""What stands on a node of a Ray cluster: an actor that runs a worker process and passes on what it says.

The actor trains nothing. Its worker process is the one of the `local` executor (`worker.py`), so the engine's loop, torchrun groups
and lost devices are as there; when the actor goes, because its driver or its node went, the process sees its socket close and ends.
"""

import contextlib
import os
import shutil
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratune.errors import StorageError
from loratune.executors.base import News
from loratune.executors.process import WorkerProcess
from loratune.executors.shipping import Changes, Parcel, RunWatch, fetch_parcel, node_store, release
from loratune.record.paths import ADAPTER_CONFIG, StudyPaths
from loratune.system.files import scratch
from loratune.system.machine import threads_for
from loratune.work import Outcome, Recipe, Segment, State

_GATHER = 2.0  # seconds for which signs of life wait for others, to travel together
_LOOK = 0.25  # seconds between two looks at the worker
_FAREWELL = 60.0  # seconds that a preempted worker has for its checkpoints; clouds give 30 to 120
_DELIVERY = 3.0  # seconds for its last words to reach the driver


@dataclass(frozen=True, kw_only=True)
class Home:
    """The study, as a node must know it."""

    folder: str  # on the driver's machine; on every machine where it is shared
    cwd: str  # of the driver when it began, from which the recipe's relative paths count
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


class NodeWorker:
    """The actor: a worker process on `size` devices of this node. Raises what keeps it from starting: StorageError, TrainingError."""

    def __init__(self, *, number: int, home: Home, gpu: bool, size: int, threads: int | None) -> None:
        import ray

        self._shared, self._node = home.shared, ray.get_runtime_context().get_node_id()
        self._watched: dict[str, RunWatch] = {}  # the runs of the segments that train here, where nothing is shared
        self._answers: list[News] = []  # of our own
        self._lock = threading.Lock()
        self._store: tuple[Path, int] | None = None
        self._renamed: list[tuple[str, str]] = []  # folders: here, and as the driver calls them
        self._read = 0  # bytes of the worker's log
        self._told = threading.Event()  # that the process ended
        self._said_leaving = False
        self._root = self._see(home) if home.shared else self._fetch(home, ray.get)
        if threads is None:
            (node,) = (node for node in ray.nodes() if node["NodeID"] == self._node)
            threads = threads_for(int(node["Resources"].get("GPU", 1)))
        cwd = home.cwd if home.shared and Path(home.cwd).is_dir() else None
        self._process = WorkerProcess(
            number=number, root=self._root, lock=None, devices=None if gpu else [], size=size, threads=threads, cwd=cwd
        )
        self._process.launch()
        # Ray's own handler would end this process at once.
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=self._preempted, daemon=True).start())

    def place(self) -> dict[str, Any]:
        """Where it is."""
        return {"node": self._node, "host": os.uname().nodename, "pid": os.getpid()}

    def take(self, segment: Segment, checkpoints: list[tuple[str, bytes]]) -> None:
        """Train the segment, from its run's checkpoints."""
        try:
            if not self._shared:
                watch = RunWatch(StudyPaths(self._root).of(segment).folder, segment.key, segment.attempt)
                watch.begin(checkpoints)
                with self._lock:
                    self._watched[segment.key] = watch
        except OSError as error:
            why = f"cannot write on {os.uname().nodename}: {error}"
            with self._lock:
                self._answers.append(Outcome(key=segment.key, state=State.CRASHED, message=why, attempt=segment.attempt))
            return
        self._process.send(segment)

    def hear(self, patience: float) -> Heard:
        """What happened since the last call: an outcome, a checkpoint, a farewell at once, signs of life together, nothing after
        `patience` seconds."""
        deadline, news, ended = time.monotonic() + patience, list[News](), ""
        while True:
            try:
                if self._process.connection is None:
                    raise EOFError
                if self._process.connection.poll(_LOOK):
                    news += self._process.receive()
            except (EOFError, OSError):
                self._process.end(5.0)
                ended = f"the worker process died{self._process.ending}"
            with self._lock:
                news, self._answers = news + self._answers, []
                written = any(watch.has_new() for watch in self._watched.values())
            if news:
                deadline = min(deadline, time.monotonic() + _GATHER)
            leaves = self._process.leaving and not self._said_leaving
            if ended or leaves or written or any(isinstance(item, Outcome) for item in news) or time.monotonic() > deadline:
                break
        self._said_leaving |= leaves
        heard = Heard(news=tuple(news), changes=self._changes(news), log=self._log(), leaving=self._process.leaving, ended=ended)
        if ended:
            self._told.set()
        return heard

    def stop(self) -> None:
        """Let running segments finish their step and write a checkpoint."""
        self._process.send(None)

    def close(self) -> None:
        """End the worker process, and leave nothing on the node."""
        with contextlib.suppress(OSError):  # `hear`, in another thread, may close the connection at the same time
            self._process.kill()
        if not self._shared:
            shutil.rmtree(self._root, ignore_errors=True)
        if self._store is not None:
            release(*self._store)
            self._store = None

    def _see(self, home: Home) -> Path:
        named = (home.recipe.data, home.recipe.model.name_or_path)
        for needed in (home.folder, *(() if all(map(os.path.isabs, named)) else (home.cwd,))):
            if not Path(needed).is_dir():
                raise StorageError(
                    f"executor.shared_folder is true, but {os.uname().nodename} does not see {needed}. "
                    "Mount it there under the same path, or set shared_folder: false."
                )
        return Path(home.folder)

    def _fetch(self, home: Home, get: Any) -> Path:
        """A study's folder of this worker's own, with a recipe that names the fetched folders."""
        root, recipe = Path(scratch("ray")), home.recipe
        self._store = node_store(self._node)
        for parcel in home.parcels:
            here = str(fetch_parcel(parcel, self._store[0], get))
            self._renamed.append((here, parcel.origin))
            if parcel.origin == recipe.data:
                recipe = replace(recipe, data=here)
            else:
                recipe = replace(recipe, model=replace(recipe.model, name_or_path=here))
        StudyPaths(root).recipe.write_text(recipe.to_json())
        return root

    def _changes(self, news: list[News]) -> tuple[Changes, ...]:
        answered = {item.key for item in news if isinstance(item, Outcome)}
        with self._lock:
            found = [watch.changes(everything=key in answered) for key, watch in self._watched.items()]
            self._watched = {key: watch for key, watch in self._watched.items() if key not in answered}
        for changes in found:
            name = f"adapter/{ADAPTER_CONFIG}"
            for here, origin in self._renamed if name in changes.files else ():
                changes.files[name] = changes.files[name].replace(here.encode(), origin.encode())
        return tuple(filter(None, found))

    def _log(self) -> bytes:
        """What the worker process printed since the last call; nothing where the driver can read it itself."""
        content = b""
        if not self._shared:
            with contextlib.suppress(FileNotFoundError), self._process.log.open("rb") as file:
                file.seek(self._read)
                content = file.read()
                self._read += len(content)
        return content

    def _preempted(self) -> None:
        """The machine is taken away: checkpoints go to the driver, then this process ends."""
        self._process.preempt()
        self._told.wait(_FAREWELL)
        time.sleep(_DELIVERY)
        os._exit(1)
