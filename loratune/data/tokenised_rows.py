"""The rows of one source on their way to a prepared folder: read, tokenised, the unusable ones counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loratune.data import split
from loratune.data.prepared import SourceCounts
from loratune.data.prompts import Encoded, UnfitError, has_reasoning
from loratune.data.sources import BadRow, DataRecipe, DataSource, Example, fields_of, grouped, refuse
from loratune.errors import DataError

_LISTED = 20  # problems of bad rows that are quoted per source, and places of each
_ENDLESS = 1 << 40  # tokens
_CUT = 0.05  # of the examples that are cut at max_length is told with what would keep them


@dataclass(kw_only=True)
class SourceRows:
    """One source's usable examples. `questions`, `texts`, `encoded`, `truncated` and `left_out` run in parallel."""

    source: DataSource
    role: str  # train | validation
    rows: int
    bad: list[BadRow]
    fields: dict[str, Any]  # data.fields_of
    questions: list[split.Questions] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # split.identity
    encoded: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # (ids, response_mask)
    truncated: list[bool] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # tokens before they were cut, of these rows and the dropped ones
    left_out: list[int] = field(default_factory=list)  # thinking parts that the template does not show
    thinking: bool = False  # whether any answer has a thinking part
    dropped: int = 0
    overlapping: int = 0
    duplicates: int = 0
    pool: list[int] = field(default_factory=list)  # places that may train
    train: list[int] = field(default_factory=list)  # places drawn, repeats included
    validation: list[int] = field(default_factory=list)

    def counts(self) -> SourceCounts:
        return SourceCounts(
            path=self.source.path,
            role=self.role,
            rows=self.rows,
            bad=len(self.bad),
            bad_rows=tuple(grouped(self.bad, _LISTED)),
            dropped=self.dropped,
            overlapping=self.overlapping,
            duplicates=self.duplicates,
            train=len(self.train),
            validation=len(self.validation),
            repeats=len(self.train) - len(set(self.train)),
            cut=sum(self.truncated[i] for i in (*self.train, *self.validation)),
            **self.fields,
            reasoning_left_out=sum(self.left_out[i] for i in (*self.train, *self.validation)),
        )


def tokenised(
    source: DataSource, role: str, recipe: DataRecipe, encode: Callable[[Example, int], Encoded | None], report: Callable[[str], None]
) -> SourceRows:
    """The source's rows in tokens. Raises DataError for more bad rows than `recipe.on_bad_rows` allows, and where none can be used."""
    report(f"reading {source.path}")
    examples, bad = recipe.read(source)
    rows = SourceRows(source=source, role=role, rows=len(examples) + len(bad), bad=bad, fields=fields_of(examples))
    for number, example in enumerate(examples):
        if number and number % 10_000 == 0:
            report(f"tokenised {number:,} of {len(examples):,} rows of {source.path}")
        try:
            encoded = encode(example, recipe.max_length)
        except UnfitError as error:
            rows.bad.append(BadRow(example.source, example.place, error.problem))
            if recipe.on_bad_rows == "error":
                refuse(source.path, rows.bad, rows.rows, recipe.on_bad_rows)
            continue
        if encoded is None:
            whole = encode(example, _ENDLESS)
            rows.lengths += [whole.length] if whole else []
            rows.dropped += 1
            continue
        rows.questions.append(split.questions_of(example))
        rows.texts.append(split.identity(example))
        rows.encoded.append((np.array(encoded.input_ids, dtype=np.int32), np.array(encoded.response_mask)))
        rows.truncated.append(encoded.truncated)
        rows.lengths.append(encoded.length)
        rows.left_out.append(encoded.reasoning_left_out)
        rows.thinking = rows.thinking or has_reasoning(example)
    if rows.encoded or rows.dropped:
        refuse(source.path, rows.bad, rows.rows, recipe.on_bad_rows)
    else:
        raise DataError(f"{source.path}: no usable row among {len(rows.bad)}. The last: {rows.bad[-1]}.")
    if not rows.encoded:
        raise DataError(f"{source.path}: every prompt alone fills max_length = {recipe.max_length} tokens. Raise max_length.")
    return rows


def cut_note(sources: Sequence[SourceRows], max_length: int) -> list[str]:
    """A warning where more than 5 % of the usable examples do not fit, with the max_length that would keep 95 % and 99 % of them whole."""
    lengths = np.sort(np.array([length for rows in sources for length in rows.lengths]))
    cut = int((lengths > max_length).sum())
    if cut <= _CUT * len(lengths):
        return []
    keep = [int(lengths[int(np.ceil(part * len(lengths))) - 1]) for part in (0.95, 0.99)]
    return [
        f"warning: {cut / len(lengths):.0%} of the examples are longer than max_length, {max_length:,} tokens, and lose their end; "
        f"max_length: {keep[0]:,} keeps 95 % of them whole, {keep[1]:,} 99 %"
    ]
