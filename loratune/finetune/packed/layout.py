"""A flat batch: the token sequences of several adapters laid end to end, without padding.

Notation: T rows, one for each token of all sequences, but that a beginning which prompts of one adapter share
(beginnings.py) stands there once; N response tokens, of several adapters. Each adapter's rows are contiguous,
so that its part of any activation is a slice. Attention needs whole sequences again: it spreads rows over P places.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from loratune.data.batches import Tokens
from loratune.data.shared_prefix import beginnings

_ALIKE = 0.85  # a sequence at least this share of its bucket's longest joins the bucket


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one adapter puts into a flat batch."""

    owner: int  # the adapter's place in the caller's list
    examples: np.ndarray  # int64 [n], places in the split
    slots: Sequence[np.ndarray] | None = None  # for each, int64 [its tokens]: whose they are for dropout; needed in training


@dataclass(frozen=True, kw_only=True)
class Span:
    """An adapter's rows [start, stop) of the T rows, and [first, last) of the N response tokens."""

    owner: int
    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A sequence's own rows [start, stop), and its places [first, last) on the line of sequences end to end.

    The last row sees all of those places, the one before it all but the last, and so on.
    """

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Rows spread over places, of which each row has one or more."""

    rows: torch.Tensor  # int64 [P]; the row in each place
    homes: torch.Tensor  # int64 [T]; the first place of each row
    again: torch.Tensor  # int64; places that hold a row once more

    def out(self, x: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [P, ...]"""
        return x.index_select(0, self.rows)

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """The first place of each row: [P, ...] -> [T, ...]"""
        return x.index_select(0, self.homes)

    def collected(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over each row's places, in a fixed order, in float32 or better: [P, ...] -> [T, ...]"""
        total = self.back(x)
        if not len(self.again):
            return total
        exact = total.to(torch.promote_types(x.dtype, torch.float32))
        rows, more = self.rows[self.again], x[self.again].to(exact.dtype)
        # The one that adds in the order given: on a GPU index_add_ would not, on a CPU with several threads index_put_ would not.
        exact = exact.index_put_((rows,), more, accumulate=True) if x.is_cuda else exact.index_add_(0, rows, more)
        return exact.to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Flat:
    """What one pass sees."""

    ids: torch.Tensor  # int64 [1, T]
    positions: torch.Tensor  # int64 [1, T], from 0 in each sequence
    slots: torch.Tensor  # int64 [T]; of dropout
    predictors: torch.Tensor  # int64 [N]; rows whose hidden states predict a response token, none twice
    labels: torch.Tensor  # int64 [N]; those tokens
    spans: tuple[Span, ...]
    shapes: tuple[tuple[int, int], ...]  # (n, L): rectangles of n sequences of similar length times L positions
    buckets: Spread  # over those rectangles, one behind the other; what is past a sequence's end is its own first token
    line: Spread | None  # over the sequences end to end; None where no row stands in two of them
    stretches: tuple[Stretch, ...]  # one per sequence
    reads: tuple[Stretch, ...]  # the same from its first row that predicts: what is read behind the last layer
    starts: torch.Tensor  # int32 [sequences + 1]; where each sequence begins on that line, and its end
    longest: int

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]


def flatten(tokens: Tokens, shares: Sequence[Share], device: torch.device) -> Flat:
    """Lay the shares' sequences end to end, each adapter's in order of their prompts."""
    ids, positions, slots, predictors, labels, spans = [], [], [], [], [], []
    sequences: list[np.ndarray] = []  # the rows of each
    stretches: list[Stretch] = []
    reads: list[Stretch] = []
    row = item = 0
    for share in shares:
        start, first_item = row, item
        for place, shared in beginnings(tokens, share.examples):
            text, mask = tokens[int(share.examples[place])]
            targets = np.flatnonzero(mask[1:]) + 1  # nothing predicts position 0
            own = np.arange(row, row + len(text) - shared)
            rows = np.concatenate([sequences[-1][:shared], own]) if shared else own
            ids.append(text[shared:])
            positions.append(np.arange(shared, len(text)))
            slots.append(share.slots[place][shared:] if share.slots is not None else np.zeros(len(own), dtype=np.int64))
            predictors.append(rows[targets - 1])
            labels.append(text[targets])
            sequences.append(rows)
            first = stretches[-1].last if stretches else 0
            stretches.append(Stretch(start=row, stop=row + len(own), first=first, last=first + len(rows)))
            reads.append(replace(stretches[-1], start=int(rows[targets[0] - 1]) if len(targets) else row + len(own)))
            row, item = row + len(own), item + len(targets)
        spans.append(Span(owner=share.owner, start=start, stop=row, first=first_item, last=item))

    def tensor(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device, non_blocking=True)

    lengths = np.asarray([len(rows) for rows in sequences])
    shapes, places, real = _rectangles(sequences, lengths)
    line = np.concatenate(sequences)
    return Flat(
        ids=tensor(ids).unsqueeze(0),
        positions=tensor(positions).unsqueeze(0),
        slots=tensor(slots),
        predictors=tensor(predictors),
        labels=tensor(labels),
        spans=tuple(spans),
        shapes=shapes,
        buckets=_spread(places, real, row, device),
        line=_spread(line, np.arange(len(line)), row, device) if len(line) > row else None,
        stretches=tuple(stretches),
        reads=tuple(reads),
        starts=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device),
        longest=int(lengths.max()),
    )


def _rectangles(sequences: list[np.ndarray], lengths: np.ndarray) -> tuple[tuple[tuple[int, int], ...], np.ndarray, np.ndarray]:
    """Sequences of similar length side by side: (the shapes, the row in each place, the places that are not filled up)."""
    groups: list[list[int]] = []
    for sequence in np.argsort(-lengths, kind="stable"):
        if not groups or lengths[sequence] < _ALIKE * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(int(sequence))
    longest = [int(lengths[group[0]]) for group in groups]
    # What fills a place up is its own sequence's: causality hides it, and nothing of a neighbour can leak in.
    filled = [
        np.concatenate([sequences[i], np.full(length - lengths[i], sequences[i][0])])
        for group, length in zip(groups, longest, strict=True)
        for i in group
    ]
    inside = [np.arange(length) < lengths[i] for group, length in zip(groups, longest, strict=True) for i in group]
    shapes = tuple((len(group), length) for group, length in zip(groups, longest, strict=True))
    return shapes, np.concatenate(filled), np.flatnonzero(np.concatenate(inside))


def _spread(rows: np.ndarray, real: np.ndarray, count: int, device: torch.device) -> Spread:
    """`rows` [P] in each place, of which `real` are not filled up; `count` rows."""
    homes = np.zeros(count, dtype=np.int64)
    homes[rows[real[::-1]]] = real[::-1]  # the first of several stays
    again = real[homes[rows[real]] != real]
    held = [torch.from_numpy(array.astype(np.int64)).to(device) for array in (rows, homes, again)]
    return Spread(rows=held[0], homes=held[1], again=held[2])
