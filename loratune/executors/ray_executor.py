"""Workers on the nodes of a Ray cluster: an actor (`ray_worker.py`) for each device, or each group of devices that a trial needs.

As many actors are asked for as there are segments for; Ray places them as nodes come, and where a node goes its segments are sent
again. What a node's end takes along counts as no try of theirs, for it says nothing of them. Without a shared folder the driver
alone writes the study's: the nodes fetch model and data once, and send home what trials write (`shipping.py`).
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratune.errors import TrainingError
from loratune.executors.base import Executor, News
from loratune.executors.crashes import LOG
from loratune.executors.placement import dispatch
from loratune.executors.ray_cluster import connect, disconnect
from loratune.executors.ray_worker import Heard, Home, NodeWorker
from loratune.executors.shipping import append, brought_home, checkpoints_of, parcel
from loratune.record.paths import StudyPaths
from loratune.system.files import working_folder
from loratune.system.formatting import plural
from loratune.work import Message, Outcome, Recipe, Segment, State

_PATIENCE = 10.0  # seconds that an actor waits for something to tell
_HOPELESS = 3  # workers in a row that cannot start
_PAUSE = 5.0  # seconds before another one is asked for after that
_RESOURCES = {"num_cpus": "CPU", "num_gpus": "GPU"}  # as `ray status` names them
_SLOW = 120.0  # seconds after which it is told that a worker has not started


class RayExecutor(Executor):
    def __init__(
        self,
        *,
        recipe: Recipe,
        root: Path,
        devices: Sequence[int],
        workers: int,
        threads: int | None,
        max_retries: int,
        hang_timeout: float | None,
        address: str | None = None,
        shared_folder: bool = False,
        max_devices: int | None = None,
    ) -> None:
        """`devices`: not empty for GPUs. `workers`: places that are pinned when the study begins; some may wait for a device.

        `threads` of each process: by default 1 on a CPU, else the node's cores shared out among its GPUs.
        Raises MissingExtraError, TrainingError.
        """
        super().__init__(max_retries=max_retries)
        self._ray = connect(address)
        self._size, self._slots, self._gpu = recipe.devices_per_trial, recipe.slots, bool(devices)
        self._most = max(1, min(workers, max_devices // self._size if max_devices else workers))
        self._threads, self._hang_timeout = threads or (None if self._gpu else 1), hang_timeout
        self._recipe, self._root, self._shared, self._cwd = recipe, root, shared_folder, working_folder()
        self._needs = {"num_cpus": self._size * (1 if self._gpu else self._threads or 1)} | ({"num_gpus": self._size} if self._gpu else {})
        self._waiting: list[Segment] = []
        self._workers: list[_Hired] = []
        self._hired = self._failed = 0  # in all; in a row
        self._told = False  # that workers are long in coming
        self._pause_until = 0.0
        self._home: Any = None  # in the object store, once it is needed
        self.processes, self.capacity = self._most, workers * self._slots

    @property
    def where(self) -> dict[str, int]:
        ready = [worker for worker in self._workers if worker.node]
        return {"nodes": len({worker.node for worker in ready}), "devices": len(ready) * self._size}

    def _start(self, segment: Segment) -> None:
        if segment.attempt > 1:  # it is behind already, and the results of all who were sent after it wait for its own
            self._waiting.insert(0, segment)
        else:
            self._waiting.append(segment)
        self._dispatch()

    def _dispatch(self) -> None:
        unanswered = len(self._waiting) + sum(len(worker.owed) for worker in self._workers)
        while len(self._workers) < min(self._most, unanswered) and time.monotonic() >= self._pause_until:
            self._hire()
        if ready := [worker for worker in self._workers if worker.node and not worker.leaving]:
            dispatch(self._waiting, ready, self._slots, self._again)

    def _hire(self) -> None:
        if self._home is None:
            self._home = self._ray.put(self._packed())
        actor = self._ray.remote(NodeWorker).options(**self._needs, max_concurrency=4, max_restarts=0, max_task_retries=0)
        number, self._hired = self._hired, self._hired + 1
        made = actor.remote(number=number, home=self._home, gpu=self._gpu, size=self._size, threads=self._threads)
        self._workers.append(_Hired(number, made, None if self._shared else self._root))

    def _packed(self) -> Home:
        folders = [] if self._shared else [self._recipe.data]
        if not self._shared and Path(self._recipe.model.name_or_path).expanduser().is_dir():
            folders.append(self._recipe.model.name_or_path)
        return Home(
            folder=str(self._root),
            cwd=self._cwd,
            shared=self._shared,
            recipe=self._recipe,
            parcels=tuple(parcel(folder, self._ray.put) for folder in folders),
        )

    def _poll(self, timeout: float) -> list[News]:
        deadline = time.monotonic() + timeout
        items: list[News] = []
        while not items and (left := deadline - time.monotonic()) > 0:
            self._dispatch()
            items += self._heard(min(left, 1.0))  # hangs are looked for every second
            items += self._not_started()
            for worker in self._workers if self._hang_timeout else ():
                if worker.node and worker.owed and time.monotonic() - worker.heard > (self._hang_timeout or math.inf):
                    items += self._lost(worker, f"no heartbeat for {self._hang_timeout:g} s", State.CRASHED)
        self._dispatch()
        return items

    def _not_started(self) -> Iterator[News]:
        """A line where workers are long in coming, told once: Ray waits without a word for a node that has room."""
        late = [worker for worker in self._workers if not worker.node and time.monotonic() - worker.asked > _SLOW]
        if late and not self._told:
            self._told = True
            needs = " and ".join(f"{number} {_RESOURCES[kind]}" for kind, number in self._needs.items())
            yield Message(
                text=f"{len(late)} of {plural(self._most, 'worker')} did not start within {_SLOW:.0f} s: they wait for {needs} on one node "
                "(`ray status` shows what is free), or for the model and the data to arrive there"
            )

    def _heard(self, timeout: float) -> list[News]:
        """What the actors say that speak next."""
        asked = {worker.pending: worker for worker in self._workers}
        if not asked:
            time.sleep(min(timeout, 0.2))  # none can be hired now
            return []
        ready, _ = self._ray.wait(list(asked), num_returns=1, timeout=timeout)
        if ready and len(asked) > 1:
            ready, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=0)
        return [item for reference in ready for item in self._from(asked[reference])]

    def _from(self, worker: "_Hired") -> Iterator[News]:
        """What an actor's pending call gave. What it wrote is in the study's folder before its outcomes are told."""
        errors = self._ray.exceptions
        try:
            said = self._ray.get(worker.pending)
        except errors.RayActorError as error:
            yield from self._gone(worker, error)
            return
        except (errors.RayTaskError, errors.ObjectLostError, errors.RaySystemError) as error:
            yield from self._lost(worker, f"the worker failed: {error}", State.CRASHED)
            return
        if not isinstance(said, Heard):
            self._failed = 0
            worker.node, worker.host = said["node"], said["host"]
            worker.ask()
            return
        if said.news or said.changes:
            worker.heard = time.monotonic()
        for changes in said.changes:
            if self._current(changes.key, changes.attempt):
                brought_home(changes, StudyPaths(self._root).of(self._segments[changes.key]))
        worker.note(said.log)
        worker.leaving |= said.leaving
        worker.owed -= {item.key for item in said.news if isinstance(item, Outcome)}
        for item in said.news:
            yield replace(item, node=worker.name) if isinstance(item, Outcome) else item
        if not said.ended:
            worker.ask()
            return
        yield from self._lost(worker, said.ended, State.CANCELLED if worker.leaving else State.CRASHED)

    def _gone(self, worker: "_Hired", error: Any) -> Iterator[News]:
        """The actor does not answer any more: it could not start, its node went, or it died alone."""
        if getattr(error, "actor_init_failed", False) or getattr(error, "_actor_init_failed", False):
            self._failed += 1
            cause = getattr(error, "cause", None) or error
            why = str(cause).strip().splitlines()[-1]
            yield from self._lost(worker, f"a worker could not start: {why}", State.CANCELLED)
            if self._failed >= _HOPELESS:
                raise TrainingError(f"{_HOPELESS} workers in a row could not start on the Ray cluster. The last one: {cause}")
            self._pause_until = time.monotonic() + _PAUSE
            return
        text = str(error)
        alone = isinstance(error, self._ray.exceptions.ActorDiedError) and "its node has died" not in text and "preempted" not in text
        if alone:  # the node lives: killed, as for want of memory
            yield from self._lost(worker, f"the worker's actor died: {text.strip().splitlines()[-1]}", State.CRASHED)
        else:
            which = f"the node {worker.name}" if worker.name else "the node where it was to start"
            yield from self._lost(worker, f"{which} went away", State.CANCELLED)

    def _lost(self, worker: "_Hired", why: str, state: State) -> Iterator[News]:
        """Give the worker up: the answers that it owes, and a line where a place was taken away."""
        self._workers.remove(worker)
        with contextlib.suppress(Exception):  # whatever Ray says of an actor that may be gone
            self._ray.kill(worker.actor)
        if state is State.CANCELLED:
            left = f"{len(worker.owed)} segment{'s go' if len(worker.owed) != 1 else ' goes'} on elsewhere"
            yield Message(text=f"worker {worker.number}: {'it was preempted' if worker.leaving else why}; {left}")
        message = f"{why}. {LOG} {worker.log or self._root}"
        for key in sorted(worker.owed):
            yield Outcome(key=key, state=state, message=message, node=worker.name)

    def close(self, grace: float = 60.0) -> None:
        self._waiting.clear()
        deadline = time.monotonic() + grace
        with contextlib.suppress(Exception):  # nothing that is not on the disk by now may keep the driver here
            for worker in self._workers:
                worker.actor.stop.remote()
            while any(worker.node and worker.owed for worker in self._workers) and (left := deadline - time.monotonic()) > 0:
                self._heard(min(left, 1.0))
            self._ray.wait([worker.actor.close.remote() for worker in self._workers if worker.node], timeout=5.0)
        for worker in self._workers:
            with contextlib.suppress(Exception):
                self._ray.kill(worker.actor)
        self._workers.clear()
        disconnect()


class _Hired:
    """The driver's end of an actor, and the segments that it still owes an answer for. `root`: where the driver writes for it."""

    def __init__(self, number: int, actor: Any, root: Path | None) -> None:
        self.number, self.actor, self._root = number, actor, root
        self.log = StudyPaths(root).worker_logs / f"{number}.log" if root is not None else None
        self.owed: set[str] = set()
        self.node = self.host = ""  # empty until it has started; Ray's number
        self.leaving = False
        self.heard = 0.0  # when it last spoke, in monotonic seconds
        self.asked = time.monotonic()
        self.pending = actor.place.remote()

    @property
    def name(self) -> str:
        """Of its node, for people: several may be on one host, and a host may come again as another node."""
        return f"{self.host}/{self.node[:8]}" if self.node else ""

    def ask(self) -> None:
        self.pending = self.actor.hear.remote(_PATIENCE)

    def take(self, segment: Segment) -> None:
        if not self.owed:
            self.heard = time.monotonic()
        self.owed.add(segment.key)
        checkpoints = list(checkpoints_of(StudyPaths(self._root).of(segment))) if self._root is not None else []
        self.actor.take.remote(segment, checkpoints)

    def note(self, log: bytes) -> None:
        """Keep what the worker process printed."""
        if log and self.log is not None:
            append(self.log, log)
