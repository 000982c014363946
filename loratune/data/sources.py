"""Instruction data: what the user names (`DataSource`, `DataRecipe`) and what is read from it (`Example`).

What the fields of a record mean is in `formats.py`. Every bad row has one message that says the file, the place in it,
the field, what was expected and what was found.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from loratune.data.conversations import Exchange
from loratune.data.fields import BadError
from loratune.data.formats import FORMATS, NO_MARKERS, Markers, detect_format, is_preference, parse_record
from loratune.data.records import described, records
from loratune.errors import DataError
from loratune.system.names import nearest
from loratune.work import Json

SKIPPED = 0.01  # of a source's rows: so many bad ones are left out without being asked


@dataclass(frozen=True, kw_only=True)
class DataSource(Json):
    """Where instruction data comes from and how much of it is used: a source of `data` in the description (spec/sections.py)."""

    path: str
    format: str = "auto"
    split: str | None = None
    weight: float | None = None
    count: int | None = None
    validation_count: int | None = None
    columns: dict[str, str] = field(default_factory=dict)  # over those of the recipe


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
    on_bad_rows: str = "auto"
    seed: int = 0
    columns: dict[str, str] = field(default_factory=dict)  # field -> the data's name of it
    response_marker: str = ""
    instruction_marker: str = ""

    def read(self, source: DataSource) -> "tuple[list[Example], list[BadRow]]":
        """`read_source`, as this recipe says. Raises DataError."""
        markers = Markers(self.response_marker, self.instruction_marker)
        return read_source(source, self.on_bad_rows, columns={**self.columns, **source.columns}, markers=markers)


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
    plain: bool = False  # whether it is plain text, `system` being what it begins with


class BadRow(NamedTuple):
    """A row that cannot be used, and why."""

    source: str
    place: str
    problem: str

    def __str__(self) -> str:
        return f"{self.source}, {self.place}: {self.problem}"


def read_source(
    source: DataSource, on_bad_rows: str = "error", *, columns: Mapping[str, str] | None = None, markers: Markers = NO_MARKERS
) -> tuple[list[Example], list[BadRow]]:
    """All usable examples of a source, in file order, and the bad rows.

    columns: field -> the name that it has in this source. Raises DataError for a source that cannot be read, whose format is unknown
    or that holds no usable row, and for bad rows: at the first with `on_bad_rows` "error", naming all where they are more than 1 %
    with "auto", never with "skip".
    """
    name = source.format
    if name != "auto" and name not in FORMATS:
        raise DataError(f"{source.path}: unknown format {name!r}; allowed: auto, {', '.join(FORMATS)}{nearest(name, FORMATS) or '.'}")
    columns = columns or {}
    examples: list[Example] = []
    bad: list[BadRow] = []
    seen: dict[tuple[str, ...], tuple[str, ...]] = {}  # the same fields in each row: one tuple
    named: dict[str, None] = {}  # the fields of all rows
    for file, place, value, problem in records(source.path, source.split):
        try:
            if problem:
                raise BadError(problem)
            if not isinstance(value, dict):
                raise BadError(f"expected an object with fields, found {described(value)}")
            if columns:
                named.update(dict.fromkeys(map(str, value)))
                value = _renamed(value, columns)
            if name == "auto":
                _refuse_preferences(source.path, value)
                name = detect_format(value)
            if name == "text" and not markers.response:
                raise DataError(
                    f"{source.path}: plain text (field text) needs data.response_marker, the words behind which an answer begins, "
                    "such as '### Response:'; what stands before is not scored."
                )
            found = parse_record(value, name, markers)
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
                    plain=name == "text",
                )
            )
        except BadError as error:
            bad.append(BadRow(file, place, str(error)))
            if on_bad_rows == "error" and not columns:
                refuse(source.path, bad, 1, on_bad_rows)
    _refuse_unknown_columns(source.path, columns, named)
    if not examples:
        raise DataError(
            f"{source.path}: no usable row among {len(bad)}. The first: {bad[0]}." if bad else f"{source.path}: holds no records."
        )
    refuse(source.path, bad, len(examples) + len(bad), on_bad_rows)
    return _opened(examples) if name == "text" and not markers.instruction else examples, bad


def refuse(path: str, bad: Sequence[BadRow], rows: int, on_bad_rows: str) -> None:
    """Raises DataError, naming each bad row, where these are more than `on_bad_rows` lets pass: none, 1 % of the rows, or any number."""
    allowed = {"error": 0.0, "auto": SKIPPED, "skip": 1.0}[on_bad_rows] * rows
    if len(bad) <= allowed:
        return
    if on_bad_rows == "error" or len(bad) == 1:
        more = f" (Up to {SKIPPED:.0%} of a source's rows, here {rows:,}, are skipped.)" if on_bad_rows == "auto" else ""
        raise DataError(f"{bad[0]}. Fix the row, or leave such rows out with data.on_bad_rows: skip.{more}")
    listed = "\n".join(f"  {line}" for line in grouped(bad))
    raise DataError(
        f"{path}: {len(bad):,} of {rows:,} rows cannot be used, more than the {SKIPPED:.0%} that are skipped:\n{listed}\n"
        "Fix the rows, or leave them out with data.on_bad_rows: skip."
    )


def grouped(bad: Sequence[BadRow], most: int | None = None) -> list[str]:
    """A line for each problem, with the places of all rows that have it; `most` problems, and as many places of each."""
    places: dict[tuple[str, str], list[str]] = {}
    for row in bad:
        places.setdefault((row.source, row.problem), []).append(row.place)
    lines = []
    for (source, problem), found in list(places.items())[:most]:
        others = [place.rpartition(" ")[2] for place in found[1:]]
        kind = found[0].partition(" ")[0] + "s" * (len(others) > 1)
        more = f", and {len(others) - most:,} more" if most is not None and len(others) > most else ""
        also = f"; also {kind} {', '.join(others[:most])}{more}" if others else ""
        lines.append(f"{BadRow(source, found[0], problem)}{also}")
    return lines


def _renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under the names of its format. A field that gives up its name to a column is kept under another, to be counted as unread."""
    taken = set(columns.values())
    found = {(f"{name} (replaced by {columns[name]})" if name in columns else name): v for name, v in row.items() if name not in taken}
    return found | {field: row[column] for field, column in columns.items() if column in row}


def _refuse_unknown_columns(path: str, columns: Mapping[str, str], named: Mapping[str, None]) -> None:
    missing = [column for column in columns.values() if column not in named]
    if missing and named:
        hints = "".join(f" {column}{nearest(column, list(named))}." for column in missing)
        raise DataError(f"{path}: data.columns names {', '.join(missing)}, which no row has; the fields there: {', '.join(named)}.{hints}")


def _refuse_preferences(path: str, row: dict[str, Any]) -> None:
    if is_preference(row):
        raise DataError(
            f"{path}: the rows are preference data (chosen, rejected), from which loratune does not learn yet: it trains on one answer. "
            "To train on the preferred ones, write data.columns: {completion: chosen}, or {messages: chosen} where chosen is a "
            "conversation."
        )


def _opened(examples: list[Example]) -> list[Example]:
    """Plain text whose common beginning, the template, stands apart: it is no part of a question, which are compared."""
    asked = {example.exchanges[0].instruction for example in examples}
    first, last = min(asked), max(asked)  # what these two share, all share
    common = first[: next((place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), 0)]
    common = common[: max(common.rfind(" "), common.rfind("\n")) + 1]
    if not common:
        return examples
    return [
        replace(e, system=common, exchanges=(e.exchanges[0]._replace(instruction=e.exchanges[0].instruction.removeprefix(common)),))
        for e in examples
    ]


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
