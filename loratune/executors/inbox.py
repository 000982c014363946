"""The queue between whoever receives segments and the engine that trains them."""

import queue

from loratune.work import Segment


class QueueInbox:
    """An engine's inbox (`finetune.segment.Inbox`) that another thread fills, and ends."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Segment | None] = queue.SimpleQueue()
        self._ended = False

    def put(self, segment: Segment) -> None:
        self._queue.put(segment)

    def end(self) -> None:
        """Nothing comes after what was put."""
        self._queue.put(None)

    def __call__(self, wait: bool) -> Segment | None:
        if self._ended:
            return None
        try:
            segment = self._queue.get(block=wait)
        except queue.Empty:
            return None
        self._ended = segment is None
        return segment
