"""A flat batch: the token sequences of several adapters laid end to end, without padding.

Notation: T rows, one for each token of all sequences, but that a prefix which prompts of one adapter share
(data/shared_prefix.py) stands there once; N response tokens, of several adapters. Each adapter's rows are contiguous,
so that its part of any activation is a slice. Attention needs whole sequences again: P copies of rows, some rows several times.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from loratune.data.batches import Tokens
from loratune.data.shared_prefix import shared_prefixes

_ALIKE = 0.85  # a sequence at least this share of its bucket's longest joins the bucket


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one adapter puts into a flat batch."""

    adapter: int  # index in the caller's list
    examples: np.ndarray  # int64 [n], indices in the split
    owners: Sequence[np.ndarray] | None = None  # for each, int64 [its tokens]: their owners for dropout; needed in training


@dataclass(frozen=True, kw_only=True)
class Span:
    """An adapter's rows [start, stop) of the T rows, and [first, last) of the N response tokens."""

    adapter: int
    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class SequenceSpan:
    """A sequence's own rows [start, stop), and its copies [first, last) on the line of sequences end to end.

    The last row sees all of these copies, the one before it all but the last, and so on.
    """

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class RowCopies:
    """Rows copied to where attention wants them, each row once or several times."""

    rows: torch.Tensor  # int64 [P]; the row of each copy
    first: torch.Tensor  # int64 [T]; the first copy of each row
    further: torch.Tensor  # int64; all other copies

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [P, ...]"""
        return x.index_select(0, self.rows)

    def first_copies(self, x: torch.Tensor) -> torch.Tensor:
        """The first copy of each row: [P, ...] -> [T, ...]"""
        return x.index_select(0, self.first)

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over each row's copies, in a fixed order, in float32 or better: [P, ...] -> [T, ...]"""
        total = self.first_copies(x)
        if not len(self.further):
            return total
        exact = total.to(torch.promote_types(x.dtype, torch.float32))
        rows, more = self.rows[self.further], x[self.further].to(exact.dtype)
        # The one that adds in the order given: on a GPU index_add_ would not, on a CPU with several threads index_put_ would not.
        exact = exact.index_put_((rows,), more, accumulate=True) if x.is_cuda else exact.index_add_(0, rows, more)
        return exact.to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Flat:
    """What one pass sees."""

    ids: torch.Tensor  # int64 [1, T]
    positions: torch.Tensor  # int64 [1, T], from 0 in each sequence
    owners: torch.Tensor  # int64 [T]; of each token, for dropout
    predictors: torch.Tensor  # int64 [N]; rows whose hidden states predict a response token, none twice
    labels: torch.Tensor  # int64 [N]; those tokens
    spans: tuple[Span, ...]
    shapes: tuple[tuple[int, int], ...]  # (n, L): rectangles of n sequences of similar length times L positions
    buckets: RowCopies  # in those rectangles, one behind the other; past a sequence's end stands its own first token
    line: RowCopies | None  # in the sequences end to end; None where no row belongs to two of them
    sequences: tuple[SequenceSpan, ...]  # one per sequence
    last_layer: tuple[SequenceSpan, ...]  # the same from its first row that predicts: what is read behind the last layer
    starts: torch.Tensor  # int32 [sequences + 1]; where each sequence begins on that line, and its end
    longest: int

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]


def flatten(tokens: Tokens, shares: Sequence[Share], device: torch.device) -> Flat:
    """Lay the shares' sequences end to end, each adapter's in order of their prompts."""
    ids, positions, owners, predictors, labels, spans = [], [], [], [], [], []
    rows_of: list[np.ndarray] = []  # each sequence
    sequences: list[SequenceSpan] = []
    last_layer: list[SequenceSpan] = []
    row = item = 0
    for share in shares:
        start, first_item = row, item
        for index, shared in shared_prefixes(tokens, share.examples):
            text, mask = tokens[int(share.examples[index])]
            targets = np.flatnonzero(mask[1:]) + 1  # nothing predicts position 0
            own = np.arange(row, row + len(text) - shared)
            rows = np.concatenate([rows_of[-1][:shared], own]) if shared else own
            ids.append(text[shared:])
            positions.append(np.arange(shared, len(text)))
            owners.append(share.owners[index][shared:] if share.owners is not None else np.zeros(len(own), dtype=np.int64))
            predictors.append(rows[targets - 1])
            labels.append(text[targets])
            rows_of.append(rows)
            first = sequences[-1].last if sequences else 0
            sequences.append(SequenceSpan(start=row, stop=row + len(own), first=first, last=first + len(rows)))
            last_layer.append(replace(sequences[-1], start=int(rows[targets[0] - 1]) if len(targets) else row + len(own)))
            row, item = row + len(own), item + len(targets)
        spans.append(Span(adapter=share.adapter, start=start, stop=row, first=first_item, last=item))

    def tensor(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device, non_blocking=True)

    lengths = np.asarray([len(rows) for rows in rows_of])
    shapes, filled, real = _rectangles(rows_of, lengths)
    line = np.concatenate(rows_of)
    return Flat(
        ids=tensor(ids).unsqueeze(0),
        positions=tensor(positions).unsqueeze(0),
        owners=tensor(owners),
        predictors=tensor(predictors),
        labels=tensor(labels),
        spans=tuple(spans),
        shapes=shapes,
        buckets=_copies(filled, real, row, device),
        line=_copies(line, np.arange(len(line)), row, device) if len(line) > row else None,
        sequences=tuple(sequences),
        last_layer=tuple(last_layer),
        starts=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device),
        longest=int(lengths.max()),
    )


def _rectangles(rows_of: list[np.ndarray], lengths: np.ndarray) -> tuple[tuple[tuple[int, int], ...], np.ndarray, np.ndarray]:
    """Sequences of similar length side by side: (the shapes, the row of each copy, the copies that are no filling)."""
    groups: list[list[int]] = []
    for sequence in np.argsort(-lengths, kind="stable"):
        if not groups or lengths[sequence] < _ALIKE * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(int(sequence))
    longest = [int(lengths[group[0]]) for group in groups]
    # The filling is the sequence's own first row: causality hides it, and nothing of a neighbour can leak in.
    filled = [
        np.concatenate([rows_of[i], np.full(length - lengths[i], rows_of[i][0])])
        for group, length in zip(groups, longest, strict=True)
        for i in group
    ]
    inside = [np.arange(length) < lengths[i] for group, length in zip(groups, longest, strict=True) for i in group]
    shapes = tuple((len(group), length) for group, length in zip(groups, longest, strict=True))
    return shapes, np.concatenate(filled), np.flatnonzero(np.concatenate(inside))


def _copies(rows: np.ndarray, real: np.ndarray, count: int, device: torch.device) -> RowCopies:
    """`rows` [P] of the copies, of which `real` are no filling; `count` rows."""
    first = np.zeros(count, dtype=np.int64)
    first[rows[real[::-1]]] = real[::-1]  # the first of several stays
    further = real[first[rows[real]] != real]
    held = [torch.from_numpy(array.astype(np.int64)).to(device) for array in (rows, first, further)]
    return RowCopies(rows=held[0], first=held[1], further=held[2])
