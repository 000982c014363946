"""Runs packs in this process, one after the other, in a thread, so that the caller sees their progress."""

import queue
import threading
from pathlib import Path

from loratune.executors.base import Executor
from loratune.work import Outcome, Pack, Progress, Recipe


class InlineExecutor(Executor):
    def __init__(self, *, recipe: Recipe, root: Path, max_retries: int) -> None:
        super().__init__(max_retries=max_retries)
        self._recipe, self._root = recipe, root
        self._packs: queue.SimpleQueue[Pack | None] = queue.SimpleQueue()
        self._news: queue.SimpleQueue[Progress | Outcome | BaseException] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loratune-inline", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            from loratune.finetune.engine import load_engine  # torch: seconds to import

            engine = load_engine(self._recipe, self._root)
            while (pack := self._packs.get()) is not None:
                for outcome in engine.run(pack, self._news.put, self._stop):
                    self._news.put(outcome)
            engine.close()
        except BaseException as error:
            self._news.put(error)  # raised in the caller's thread

    def _start(self, pack: Pack) -> None:
        self._packs.put(pack)

    def _poll(self, timeout: float) -> list[Progress | Outcome]:
        items: list[Progress | Outcome] = []
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
        self._packs.put(None)
        self._thread.join(grace)
