"""Trains in this process, in a thread, so that the caller sees its progress."""

import queue
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loratune.executors.base import Executor, News
from loratune.executors.devices import seen_as
from loratune.executors.inbox import QueueInbox
from loratune.executors.placement import dispatch
from loratune.work import Message, Outcome, Recipe, Segment


class InlineExecutor(Executor):
    def __init__(self, *, recipe: Recipe, root: Path, max_retries: int, threads: int | None = None, devices: Sequence[int] = ()) -> None:
        """`devices`: CUDA indices, of which the first is used; empty: as `recipe.device` says."""
        super().__init__(max_retries=max_retries)
        if devices:
            recipe = replace(recipe, device=seen_as(devices[0]))
        self.capacity = recipe.slots
        self._recipe, self._root, self._threads = recipe, root, threads
        self._waiting: list[Segment] = []
        self.owed: set[str] = set()  # as its own only worker
        self._inbox = QueueInbox()
        self._news: queue.SimpleQueue[News | BaseException] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loratune-inline", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            from loratune.finetune.engines import limit_threads, load_engine  # torch: seconds to import

            limit_threads(self._threads)
            engine = load_engine(self._recipe, self._root)
            if engine.notice:
                self._news.put(Message(text=engine.notice))
            engine.run(self._inbox, self._news.put, self._stop)
            engine.close()
        except BaseException as error:
            self._news.put(error)  # raised in the caller's thread

    def _start(self, segment: Segment) -> None:
        self._waiting.append(segment)
        self._dispatch()

    def _dispatch(self) -> None:
        dispatch(self._waiting, [self], self.capacity, self._again)

    def take(self, segment: Segment) -> None:
        self.owed.add(segment.key)
        self._inbox.put(segment)

    def _poll(self, timeout: float) -> list[News]:
        items = self._heard(timeout)
        self.owed -= {item.key for item in items if isinstance(item, Outcome)}
        self._dispatch()
        return items

    def _heard(self, timeout: float) -> list[News]:
        items: list[News] = []
        try:
            item = self._news.get(timeout=timeout)
            while True:
                if isinstance(item, BaseException):
                    raise item
                items.append(item)
                item = self._news.get_nowait()
        except queue.Empty:
            return items

    def close(self, grace: float = 60.0) -> None:
        self._stop.set()
        self._inbox.end()
        self._thread.join(grace)
