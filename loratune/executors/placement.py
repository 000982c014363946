"""Which of the waiting segments goes to which worker."""

from collections.abc import Callable, Sequence
from typing import Protocol

from loratune.work import Segment


class Worker(Protocol):
    """Where several segments train together."""

    owed: set[str]  # keys of the segments that it was given and has not answered

    def take(self, segment: Segment) -> None: ...


def dispatch(waiting: list[Segment], workers: Sequence[Worker], slots: int, again: Callable[[str], bool]) -> None:
    """Hand over the segments of `waiting` that find room, up to `slots` to a worker, each where most slots are free.

    Of several that crashed together, nobody knows whose fault it was. So a segment that is tried `again` comes
    first and has an empty worker to itself: the guilty one then fails alone.
    """
    emptying: Worker | None = None  # is given nothing more, so that a segment that waits for an empty worker gets it

    def free(worker: Worker) -> int:
        return 0 if worker is emptying or any(map(again, worker.owed)) else slots - len(worker.owed)

    for segment in sorted(waiting, key=lambda segment: not again(segment.key)):
        worker, alone = max(workers, key=free), again(segment.key)
        if free(worker) >= (slots if alone else 1):
            waiting.remove(segment)
            worker.take(segment)
        elif alone:
            emptying = emptying or worker
