"""The events of an evaluation, and one ordered stream of them from several processes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loratune.work import Json, Message


@dataclass(frozen=True, kw_only=True)
class BenchmarkProgress(Json):
    """How far a benchmark is, all models together."""

    benchmark: str
    done: int  # answers
    total: int
    seconds: float  # since the benchmark began in this run
    seconds_left: float | None  # of this benchmark; None before the first answers


@dataclass(frozen=True)
class BenchmarkBegan(Json):
    """A process has come to the benchmark of this number; `EventMerger` makes a Message of it."""

    number: int


@dataclass(frozen=True, kw_only=True)
class JobEnded(Json):
    """The last event of a process."""

    stopped: bool = False
    error: str = ""  # the name of its LoratuneError
    text: str = ""


Event = Message | BenchmarkProgress
JobEvent = Event | BenchmarkBegan | JobEnded
_KINDS = {kind.__name__: kind for kind in (Message, BenchmarkProgress, BenchmarkBegan, JobEnded)}


def to_line(event: JobEvent) -> str:
    """The event as one line, for a pipe between processes: `BenchmarkBegan {"number": 0}`."""
    return f"{type(event).__name__} {event.to_json()}\n"


def from_line(line: str) -> JobEvent | None:
    """The inverse of `to_line`; None for any other line: a library's output, or half of an event whose writer died."""
    kind, _, text = line.partition(" ")
    if kind not in _KINDS or not line.endswith("\n"):
        return None
    event: JobEvent = _KINDS[kind].from_json(text)
    return event


class EventMerger:
    """Merges the events of processes that go through the same benchmarks, each with its own models.

    A benchmark begins when the last process has come to it; progress that others have made on later ones is reported then.
    """

    def __init__(self, titles: Sequence[str], jobs: Sequence[Sequence[BenchmarkProgress]]) -> None:
        """titles: the line that announces each benchmark. jobs: how far each process is with each benchmark."""
        self._titles, self._known = titles, [list(job) for job in jobs]
        self._at = [-1] * len(jobs)

    def merge(self, job: int, event: Event | BenchmarkBegan) -> Iterator[Event]:
        """The events of the stream that follow from an event of process `job`."""
        if isinstance(event, Message):
            yield event
        elif isinstance(event, BenchmarkBegan):
            before, self._at[job] = min(self._at), event.number
            for number in range(before + 1, min(self._at) + 1):
                yield Message(text=self._titles[number])
                if any(known[number].seconds_left is not None for known in self._known):
                    yield self._together(number)
        else:
            number = self._at[job]
            self._known[job][number] = event
            if number == min(self._at):
                yield self._together(number)

    def _together(self, number: int) -> BenchmarkProgress:
        known = [progress[number] for progress in self._known]
        return BenchmarkProgress(
            benchmark=known[0].benchmark,
            done=sum(one.done for one in known),
            total=sum(one.total for one in known),
            seconds=max(one.seconds for one in known),
            seconds_left=max((one.seconds_left for one in known if one.seconds_left is not None), default=None),
        )
