"""What an evaluation tells while it runs, and one orderly stream of it out of several processes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """Something worth a line."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a benchmark is, all models together."""

    benchmark: str
    done: int  # answers
    total: int
    seconds: float  # since the benchmark began in this run
    seconds_left: float | None  # of this benchmark; None before the first answers


@dataclass(frozen=True)
class Began:
    """A process has come to the benchmark of this number; `Story` makes a Note of it."""

    number: int


Event = Note | Progress


class Story:
    """Merges the events of processes that go through the same benchmarks, each for models of its own.

    A benchmark begins when the last process has come to it; what others have done of later ones is told then.
    """

    def __init__(self, beginnings: Sequence[str], parts: Sequence[Sequence[Progress]]) -> None:
        """beginnings: a line for the beginning of each benchmark. parts: how far each process is with each benchmark."""
        self._beginnings, self._known = beginnings, [list(own) for own in parts]
        self._at = [-1] * len(parts)

    def tell(self, part: int, event: Event | Began) -> Iterator[Event]:
        """What is to be told when process `part` says `event`."""
        if isinstance(event, Note):
            yield event
        elif isinstance(event, Began):
            before, self._at[part] = min(self._at), event.number
            for number in range(before + 1, min(self._at) + 1):
                yield Note(self._beginnings[number])
                if any(own[number].seconds_left is not None for own in self._known):
                    yield self._together(number)
        else:
            number = self._at[part]
            self._known[part][number] = event
            if number == min(self._at):
                yield self._together(number)

    def _together(self, number: int) -> Progress:
        known = [own[number] for own in self._known]
        return Progress(
            benchmark=known[0].benchmark,
            done=sum(one.done for one in known),
            total=sum(one.total for one in known),
            seconds=max(one.seconds for one in known),
            seconds_left=max((one.seconds_left for one in known if one.seconds_left is not None), default=None),
        )
