"""Instruction data: what the user names (`DataSource`, `DataRecipe`) and what is read from it (`Example`).

What the fields of a record mean is in `formats.py`. Every bad row has one message that says the file, the place in it,
the field, what was expected and what was found.
"""

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from loratune.data.fields import BadError
from loratune.data.formats import FORMATS, Exchange, detect_format, parse_record
from loratune.data.records import described, records
from loratune.errors import DataError
from loratune.work import Json


@dataclass(frozen=True, kw_only=True)
class DataSource(Json):
    """Where instruction data comes from and how much of it is used: a source of `data` in the description (spec/sections.py)."""

    path: str
    format: str = "auto"
    split: str | None = None
    weight: float | None = None
    count: int | None = None
    validation_count: int | None = None


@dataclass(frozen=True, kw_only=True)
class DataRecipe(Json):
    """Which examples train, which validate, and how they become tokens.

    Validation data comes from exactly one of: `validation` sources; `validation_fraction` of every
    training source; `validation_count` examples, shared among the sources by weight (or by rows) unless
    a source has its own. Training draws from what is left: all of it, or `train_count` examples shared
    in the same way. A source asked for more training examples than it has repeats them: whole passes,
    then a random rest. Validation never repeats. `seed` is that of the split and of the draws, not of training.
    """

    train: tuple[DataSource, ...]
    validation: tuple[DataSource, ...] = ()
    validation_fraction: float | None = None
    train_count: int | None = None
    validation_count: int | None = None
    prompt: str = "auto"
    score_reasoning: bool = True
    max_length: int = 512
    on_bad_rows: str = "error"
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One training example: a conversation of one exchange or more."""

    exchanges: tuple[Exchange, ...]
    system: str = ""
    tools: str = ""  # the functions that the assistant may call, a JSON list, for a chat template
    category: str = ""  # Dolly's, for stratified reports
    source: str = ""  # file or hub id
    place: str = ""  # "line 17" and the like
    history: int = 0  # of the exchanges, those that the field `history` held
    unread: tuple[str, ...] = ()  # fields that held something and were not read


class BadRow(NamedTuple):
    """A row that cannot be used, and why."""

    source: str
    place: str
    problem: str

    def __str__(self) -> str:
        return f"{self.source}, {self.place}: {self.problem}"


def read_source(source: DataSource, on_bad_rows: str = "error") -> tuple[list[Example], list[BadRow]]:
    """All usable examples of a source, in file order, and the bad rows.

    Raises DataError for a source that cannot be read, whose format is unknown or that holds no usable
    row, and at the first bad row unless `on_bad_rows` is "skip".
    """
    name = source.format
    if name != "auto" and name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise DataError(f"{source.path}: unknown format {name}. Known: auto, {', '.join(FORMATS)}.{hint}")
    examples: list[Example] = []
    bad: list[BadRow] = []
    seen: dict[tuple[str, ...], tuple[str, ...]] = {}  # the same fields in each row: one tuple
    for file, place, value, problem in records(source.path, source.split):
        try:
            if problem:
                raise BadError(problem)
            if not isinstance(value, dict):
                raise BadError(f"expected an object with fields, found {described(value)}")
            if name == "auto":
                name = detect_format(value)
            found = parse_record(value, name)
            category = value.get("category")
            examples.append(
                Example(
                    exchanges=found.exchanges,
                    system=found.system,
                    tools=found.tools,
                    category=category if isinstance(category, str) else "",
                    source=file,
                    place=place,
                    history=found.history,
                    unread=seen.setdefault(found.unread, found.unread),
                )
            )
        except BadError as error:
            bad.append(BadRow(file, place, str(error)))
            if on_bad_rows != "skip":
                raise DataError(f"{bad[-1]}. Fix the row, or leave such rows out with data.on_bad_rows: skip.") from None
    if not examples:
        raise DataError(
            f"{source.path}: no usable row among {len(bad)}. The first: {bad[0]}." if bad else f"{source.path}: holds no records."
        )
    return examples, bad


def fields_of(examples: Sequence[Example]) -> dict[str, Any]:
    """What of the rows' fields is worth telling: the counts of `SourceCounts` by their names there."""
    exchanges = [exchange for example in examples for exchange in example.exchanges]
    return {
        "history": sum(example.history > 0 for example in examples),
        "unscored": sum(not exchange.scored for exchange in exchanges),
        "reasoning": sum(exchange.reasoning != "" for exchange in exchanges),
        "tools": sum(example.tools != "" for example in examples),
        "unread": dict(Counter(name for example in examples for name in example.unread).most_common()),
    }
