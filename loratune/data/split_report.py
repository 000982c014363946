"""What a split leaves in common between training and validation, in numbers and in words."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from loratune.data.near_duplicates import near_duplicates
from loratune.data.split import Questions, on_both_sides

_SHOWN = 2  # pairs quoted
_LARGE = 0.1  # of the rows in one group is told


class Common(NamedTuple):
    """How many validation rows have a question that training rows have too, or nearly have, and examples in words."""

    shared: int
    near: int
    examples: tuple[str, ...]


def common_questions(train: Sequence[Questions], validation: Sequence[Questions]) -> Common:
    """Compare the questions of the rows on both sides. Near is defined in `overlap.near_duplicates`."""
    both = on_both_sides(train, validation)
    examples = []
    if both:
        most = ", ".join(f"{_quoted(question)} ({rows:,} rows)" for question, rows in both.most_common(3))
        examples.append(f"in validation and in training, because they link too many conversations to keep these together: {most}")
    asked, others = (sorted({question for row in rows for question in row}) for rows in (validation, train))
    pairs = sorted(near_duplicates(asked, others), key=lambda pair: -pair.similarity)
    examples += [
        f"nearly the same: {_quoted(asked[pair.place])} in validation, {_quoted(others[pair.other])} in training" for pair in pairs[:_SHOWN]
    ]
    near = {asked[pair.place] for pair in pairs}
    return Common(
        shared=sum(not both.keys().isdisjoint(row) for row in validation),
        near=sum(not near.isdisjoint(row) for row in validation),
        examples=tuple(examples),
    )


def linked(questions: Sequence[Questions], keys: Sequence[str]) -> list[str]:
    """A sentence on the largest group, where it is a tenth of the rows and not one opening question asked again and again."""
    name, size = Counter(keys).most_common(1)[0]
    members = [row for row, key in zip(questions, keys, strict=True) if key == name]
    if size < _LARGE * len(keys) or len({row[0] for row in members}) < 2:
        return []
    linking, times = Counter(question for row in members for question in row).most_common(1)[0]
    return [
        f"{size:,} of {len(keys):,} rows form one group on one side of the split: they are linked by shared questions, "
        f"above all {_quoted(linking)} ({times:,} rows)"
    ]


def _quoted(question: str) -> str:
    return json.dumps(question if len(question) <= 80 else question[:77] + "...", ensure_ascii=False)
