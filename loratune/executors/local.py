"""One long-lived worker process per device (or per group of devices): the base model is loaded once.

A segment goes to the worker with most free slots. A worker that dies is replaced when there is work for
it; the segments that it had are answered as crashed. One that sends nothing for `hang_timeout`
seconds is killed. A killed driver takes its workers along.
"""

import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

from loratune.executors.base import Executor, News
from loratune.executors.crashes import LOG
from loratune.executors.placement import dispatch
from loratune.executors.process import WorkerProcess
from loratune.system.machine import threads_for
from loratune.work import Outcome, Recipe, Segment, State


class LocalExecutor(Executor):
    def __init__(
        self,
        *,
        recipe: Recipe,
        root: Path,
        lock: int,
        devices: Sequence[int],
        workers: int,
        threads: int | None,
        max_retries: int,
        hang_timeout: float | None,
        ahead: WorkerProcess | None = None,
    ) -> None:
        """`devices`: CUDA indices, empty on CPU; `threads` per process, by default the usable cores shared evenly (system/machine.py).

        ahead: what `start_ahead` gave; where it fits it is the first worker, and loads the model from now on.
        """
        super().__init__(max_retries=max_retries)
        processes = _processes(root, lock, devices, recipe.devices_per_trial, workers, threads)
        if ahead is not None and ahead.same(processes[0]):
            processes[0] = ahead
            ahead.launch()
        self._workers = [_Worker(process) for process in processes]
        self._slots, self._hang_timeout = recipe.slots, hang_timeout
        self._waiting: list[Segment] = []
        self.processes = len(self._workers)
        self.capacity = self.processes * self._slots

    def _start(self, segment: Segment) -> None:
        for worker in self._workers:  # all at the first segment: while one trains, the others import torch
            worker.process.launch()
        self._waiting.append(segment)
        self._dispatch()

    def _dispatch(self) -> None:
        if staying := [worker for worker in self._workers if not worker.process.leaving]:
            dispatch(self._waiting, staying, self._slots, self._again)

    def _poll(self, timeout: float) -> list[News]:
        deadline = time.monotonic() + timeout
        items: list[News] = []
        while not items and (left := deadline - time.monotonic()) > 0:
            working = {worker.process.connection: worker for worker in self._workers if worker.owed or worker.process.leaving}
            ready = wait([c for c in working if c is not None], min(left, 1.0))  # hangs are looked for every second
            for connection, worker in working.items():
                if connection in ready:
                    try:
                        items += worker.hear()
                    except EOFError:
                        worker.process.end(5.0)
                        items += self._lost(worker, f"the worker process died{worker.process.ending}")
                elif self._hang_timeout and time.monotonic() - worker.heard > self._hang_timeout:
                    worker.process.kill()
                    items += self._lost(worker, f"no heartbeat for {self._hang_timeout:g} s")
            self._dispatch()
        return items

    def _lost(self, worker: "_Worker", why: str) -> list[Outcome]:
        """The answers that a dead worker owed."""
        keys, worker.owed = sorted(worker.owed), set()
        message = f"{why}. {LOG} {worker.process.log}"
        state = State.CANCELLED if worker.process.leaving else State.CRASHED
        worker.process.leaving = False
        return [Outcome(key=key, state=state, message=message) for key in keys]

    def close(self, grace: float = 60.0) -> None:
        self._waiting.clear()
        deadline = time.monotonic() + grace
        for worker in self._workers:
            if worker.process.used:
                worker.process.send(None)
            else:  # importing or loading, for seconds, with nothing to write
                worker.process.kill()
        for worker in self._workers:
            worker.process.end(deadline - time.monotonic())


def start_ahead(
    *, root: Path, lock: int, devices: Sequence[int], workers: int, threads: int | None, devices_per_trial: int
) -> WorkerProcess | None:
    """The first worker of an executor that will be made with the same arguments, started: it imports torch while the driver reads data.

    None where torchrun starts the workers, which imports torch itself. The caller ends it with `discard`, which does nothing to
    one that an executor took over.
    """
    if devices_per_trial > 1:
        return None
    first = _processes(root, lock, devices, devices_per_trial, workers, threads)[0]
    first.start()
    return first


def _processes(root: Path, lock: int, devices: Sequence[int], size: int, workers: int, threads: int | None) -> list[WorkerProcess]:
    """One per group of `size` devices; on a CPU as many as `workers`. None runs yet."""
    groups = [list(devices[i : i + size]) for i in range(0, len(devices) - size + 1, size)] or [[]] * workers
    threads = threads or threads_for(len(groups) * size)
    return [WorkerProcess(number=n, root=root, lock=lock, devices=group, size=size, threads=threads) for n, group in enumerate(groups)]


class _Worker:
    """A worker process and the segments it still owes an answer for."""

    def __init__(self, process: WorkerProcess) -> None:
        self.process = process
        self.owed: set[str] = set()
        self.heard = 0.0  # when it last spoke, in monotonic seconds

    def take(self, segment: Segment) -> None:
        self.process.launch()
        if not self.owed:
            self.heard = time.monotonic()
        self.owed.add(segment.key)
        self.process.send(segment)

    def hear(self) -> list[News]:
        """What came in. Raises EOFError when the process is gone."""
        self.heard = time.monotonic()
        items = self.process.receive()
        self.owed -= {item.key for item in items if isinstance(item, Outcome)}
        return items
