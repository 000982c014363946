"""What an executor is given and what it then holds."""

from abc import ABC, abstractmethod
from dataclasses import replace

from loratune.executors.crashes import cause, certain
from loratune.work import Message, Outcome, Progress, Segment, State

News = Progress | Outcome | Message


class Executor(ABC):
    """Trains segments. The caller submits no more than `capacity` at once and collects what comes, in any order.

    A segment that crashed is sent again, to go on from its last checkpoint, `max_retries` times, but once only where the
    same exception of the program comes again. One whose worker was preempted (cancelled, and nobody here asked for that) is sent
    again as often as that happens. Each time is an *attempt*, and what an older one says is dropped: every segment submitted is
    answered by exactly one outcome, unless the executor is closed before.
    """

    capacity: int = 1  # segments that train at the same time, in all processes
    processes: int = 1  # that train at the same time, each on devices of its own

    @property
    def where(self) -> dict[str, int]:
        """Nodes and devices that train now, for `loratune status`; empty where they never change."""
        return {}

    def __init__(self, *, max_retries: int) -> None:
        self._max_retries = max_retries
        self._tries: dict[str, int] = {}
        self._segments: dict[str, Segment] = {}
        self._crashes: dict[str, str] = {}  # the message of each segment's latest
        self._left_by: dict[str, list[str]] = {}  # nodes that left the segment
        self._messages: set[Message] = set()

    def submit(self, segment: Segment) -> None:
        """Take a segment, and return at once."""
        self._tries[segment.key] = 1
        self._segments[segment.key] = segment = replace(segment, attempt=1)
        self._start(segment)

    def collect(self, timeout: float) -> list[News]:
        """What came in, waiting at most `timeout` seconds for the first of it. A message comes once, not from every process."""
        news: list[News] = []
        for item in self._poll(timeout):
            if isinstance(item, Message):
                if item in self._messages:
                    continue
                self._messages.add(item)
            elif not self._current(item.key, item.attempt):
                continue  # a worker that was given up sent something after all
            if isinstance(item, Outcome):
                if item.state is State.CANCELLED:
                    if item.node:
                        self._left_by.setdefault(item.key, []).append(item.node)
                    self._send_again(item.key)
                    continue
                if item.state is State.CRASHED and self._may_retry(item):
                    self._tries[item.key] += 1
                    self._send_again(item.key)
                    continue
                tries = self._tries.pop(item.key)
                del self._segments[item.key]
                self._crashes.pop(item.key, None)
                item = replace(item, lost=tuple(self._left_by.pop(item.key, ())))
                if item.state is State.CRASHED:
                    item = replace(item, message=f"gave up after {tries} tries. {item.message}")
            news.append(item)
        return news

    def _current(self, key: str, attempt: int) -> bool:
        """Whether the segment waits for an answer, and from this attempt; 0: from whichever was sent last."""
        segment = self._segments.get(key)
        return segment is not None and attempt in (0, segment.attempt)

    def _send_again(self, key: str) -> None:
        segment = self._segments[key]
        self._segments[key] = segment = replace(segment, attempt=segment.attempt + 1)
        self._start(segment)

    def _may_retry(self, crash: Outcome) -> bool:
        before = self._crashes.get(crash.key)
        self._crashes[crash.key] = crash.message
        if before is not None and certain(crash.message) and cause(before) == cause(crash.message):
            return False
        return self._tries[crash.key] <= self._max_retries

    def _again(self, key: str) -> bool:
        """Whether the segment crashed before."""
        return self._tries[key] > 1

    @abstractmethod
    def _start(self, segment: Segment) -> None:
        """Train the segment as soon as a slot is free."""

    @abstractmethod
    def _poll(self, timeout: float) -> list[News]:
        """As `collect`, crashes included."""

    @abstractmethod
    def close(self, grace: float = 60.0) -> None:
        """Ask what runs to stop at the next step and write a checkpoint; after `grace` seconds, kill it."""
