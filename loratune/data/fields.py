"""The fields of one record or message: read with a check of their type, and remembered as read."""

import json
from collections.abc import Callable
from typing import Any

from loratune.data.records import described


class BadError(ValueError):
    """A problem inside one record; its text lacks only the place."""


class Fields:
    """A record or a message, and which of its fields were read. null, and a field that is missing, are the same."""

    def __init__(self, values: dict[str, Any], where: str = "field ") -> None:
        self.values, self.where = values, where  # `where` begins the name of a field in a message to people
        self._read: set[str] = set()
        self.inner: dict[str, None] = {}  # unread fields of the messages inside

    def get(self, name: str) -> Any:
        self._read.add(name)
        return self.values.get(name)

    def unread(self) -> tuple[str, ...]:
        return (*(str(name) for name, value in self.values.items() if name not in self._read and not empty(value)), *self.inner)


_FLAGS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}  # also as a CSV file spells them


def flag_of(fields: Fields, names: tuple[str, ...]) -> bool | None:
    """What the first of these fields says of scoring; None where none is there."""
    found: dict[str, bool] = {}
    for name in names:
        value = fields.get(name)
        if empty(value):
            continue
        flag = _FLAGS.get(str(value).lower()) if isinstance(value, bool | int | float | str) else None
        if flag is None:
            raise BadError(
                f"{fields.where}{name}: expected 0 or 1, false or true (an answer is context, or it is scored), found {described(value)}"
            )
        found[name] = flag
    if len(set(found.values())) > 1:
        raise BadError(f"{fields.where}{' and '.join(found)}: contradict each other")
    return next(iter(found.values()), None)


def list_field(fields: Fields, name: str, wanted: str) -> list[Any]:
    """A list that may also be given as JSON text, as in a CSV file; empty where there is nothing."""
    value = fields.get(name)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            raise BadError(f"field {name}: expected {wanted}, found {described(value)}") from None
    if isinstance(value, str) or empty(value):
        return []
    if not isinstance(value, list):
        raise BadError(f"field {name}: expected {wanted}, found {described(value)}")
    return value


def agreed(fields: Fields, names: tuple[str, ...], read: Callable[[Fields, str], str]) -> str:
    """The text of several spellings of one field. Raises BadError where two say different things."""
    found = {read(fields, name): name for name in reversed(names)}
    found.pop("", None)
    if len(found) > 1:
        raise BadError(f"{fields.where}{' and '.join(reversed(found.values()))}: mean the same but hold different texts; keep one")
    return next(iter(found), "")


def text_field(fields: Fields, name: str) -> str:
    if name not in fields.values:
        raise BadError(
            f"field {name} is missing: expected text, found only the fields {', '.join(map(str, fields.values))[:200] or '(none)'}"
        )
    value = fields.get(name)
    if not isinstance(value, str):
        raise BadError(f"{fields.where}{name}: expected text, found {described(value)}")
    return checked_text(value, f"{fields.where}{name}")


def optional_text(fields: Fields, name: str) -> str:
    return "" if fields.get(name) is None else text_field(fields, name)


def checked_text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadError(f"{where}: holds half of a surrogate pair, which is no character: {ascii(text)[:60]}") from None
    return text


def empty(value: Any) -> bool:
    return value is None or value in ("", [], {})
