"""What an executor is given and what it then holds."""

from abc import ABC, abstractmethod
from dataclasses import replace

from loratune.work import Outcome, Pack, Progress, Segment, State


class Executor(ABC):
    """Runs packs. The caller submits no more than `capacity` at once and collects what comes.

    A segment that crashed is sent again, to go on from its last checkpoint, `max_retries` times; every
    segment submitted is answered by exactly one outcome, unless the executor is closed before.
    """

    capacity: int = 1  # packs that run at the same time

    def __init__(self, *, max_retries: int) -> None:
        self._max_retries = max_retries
        self._tries: dict[str, int] = {}
        self._segments: dict[str, Segment] = {}

    def submit(self, pack: Pack) -> None:
        """Take a pack and return at once."""
        for segment in pack.segments:
            self._tries[segment.key] = 1
            self._segments[segment.key] = segment
        self._start(pack)

    def collect(self, timeout: float) -> list[Progress | Outcome]:
        """What came in, waiting at most `timeout` seconds for the first of it."""
        news: list[Progress | Outcome] = []
        for item in self._poll(timeout):
            if isinstance(item, Outcome) and item.key not in self._tries:
                continue  # answered already: a worker that was given up spoke after all
            if isinstance(item, Outcome) and item.state is State.CRASHED and self._tries[item.key] <= self._max_retries:
                self._tries[item.key] += 1
                self._start(Pack(segments=(self._segments[item.key],)))
                continue
            if isinstance(item, Outcome):
                tries = self._tries.pop(item.key)
                del self._segments[item.key]
                if item.state is State.CRASHED:
                    item = replace(item, message=f"gave up after {tries} tries. {item.message}")
            news.append(item)
        return news

    @abstractmethod
    def _start(self, pack: Pack) -> None:
        """Run the pack as soon as there is a free place."""

    @abstractmethod
    def _poll(self, timeout: float) -> list[Progress | Outcome]:
        """As `collect`, crashes included."""

    @abstractmethod
    def close(self, grace: float = 60.0) -> None:
        """Ask what runs to stop at the next step and write a checkpoint; after `grace` seconds, kill it."""
