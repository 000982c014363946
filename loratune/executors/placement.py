"""Which of the waiting segments goes to which place."""

from collections.abc import Callable, Sequence
from typing import Protocol

from loratune.work import Segment


class Place(Protocol):
    """Where several segments train together."""

    owed: set[str]  # keys of those that it has and did not answer yet

    def take(self, segment: Segment) -> None: ...


def dispatch(waiting: list[Segment], places: Sequence[Place], slots: int, again: Callable[[str], bool]) -> None:
    """Hand over what finds room of `waiting`, up to `slots` segments to a place, each where most slots are free.

    Of several that crashed together, nobody knows whose fault it was. So a segment that is tried `again` comes
    first and has an empty place to itself: the guilty one then fails alone.
    """
    emptying: Place | None = None  # is given nothing more, so that what waits for an empty place will have it

    def free(place: Place) -> int:
        return 0 if place is emptying or any(map(again, place.owed)) else slots - len(place.owed)

    for segment in sorted(waiting, key=lambda segment: not again(segment.key)):
        place, alone = max(places, key=free), again(segment.key)
        if free(place) >= (slots if alone else 1):
            waiting.remove(segment)
            place.take(segment)
        elif alone:
            emptying = emptying or place
