"""A flat batch: the token sequences of several adapters laid end to end, without padding.

Notation: T rows, one for each token of all sequences, but that a prefix which prompts of one adapter share
(data/shared_prefix.py) stands there once; N response tokens, of several adapters. Each adapter's rows are contiguous,
so that its part of any activation is a slice. Attention needs whole sequences again: P copies of rows, some rows several times.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from loratune.data.batches import Tokens
from loratune.data.shared_prefix import shared_prefixes
from loratune.finetune import compiled, memory

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
        exact = exact.index_put_((rows,), more, accumulate=True) if compiled.on_gpu(x) else exact.index_add_(0, rows, more)
        return exact.to(x.dtype)


class Rectangles:
    """The sequences side by side, those of similar length together. Made when asked for: most devices never do."""

    def __init__(self, rows_of: Sequence[np.ndarray], count: int, device: torch.device) -> None:
        """`rows_of`: the rows, of `count`, that each sequence stands in."""
        self._rows_of, self._count, self.device = rows_of, count, device

    @cached_property
    def _made(self) -> tuple[tuple[tuple[int, int], ...], RowCopies]:
        shapes, filled, real = _side_by_side(self._rows_of)
        held = _moved([filled, *_first_and_further(filled, real, self._count)], self.device)
        return shapes, RowCopies(rows=held[0], first=held[1], further=held[2])

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return self._made[0]

    @property
    def copies(self) -> RowCopies:
        return self._made[1]


@dataclass(frozen=True, kw_only=True)
class Flat:
    """What one pass sees."""

    ids: torch.Tensor  # int64 [1, T]
    positions: torch.Tensor  # int64 [1, T], from 0 in each sequence
    owners: torch.Tensor  # int64 [T]; of each token, for dropout
    whose: torch.Tensor  # int64 [T]; the number of the span that each row stands in
    predictors: torch.Tensor  # int64 [N]; rows whose hidden states predict a response token, none twice
    labels: torch.Tensor  # int64 [N]; those tokens
    spans: tuple[Span, ...]
    line: RowCopies | None  # in the sequences end to end; None where no row belongs to two of them
    rectangles: Rectangles
    sequences: tuple[SequenceSpan, ...]  # one per sequence
    last_layer: tuple[SequenceSpan, ...]  # the same from its first row that predicts: what is read behind the last layer
    starts: torch.Tensor  # int32 [sequences + 1]; where each sequence begins on that line, and its end
    longest: int

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(n, L): rectangles of n sequences of similar length times L positions."""
        return self.rectangles.shapes

    @property
    def buckets(self) -> RowCopies:
        """The copies in those rectangles, one behind the other; past a sequence's end stands its own first token."""
        return self.rectangles.copies


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A flat batch in main memory, before it goes to the device."""

    arrays: torch.Tensor  # int64, all of them end to end, in memory that the device copies from
    sizes: tuple[int, ...]
    spans: tuple[Span, ...]
    rows_of: tuple[np.ndarray, ...]
    sequences: tuple[SequenceSpan, ...]
    last_layer: tuple[SequenceSpan, ...]

    def to(self, device: torch.device) -> Flat:
        """One copy, which a GPU need not be waited for."""
        ids, positions, owners, whose, predictors, labels, starts, *line = self.arrays.to(device, non_blocking=True).split(self.sizes)
        return Flat(
            ids=ids.unsqueeze(0),
            positions=positions.unsqueeze(0),
            owners=owners,
            whose=whose,
            predictors=predictors,
            labels=labels,
            spans=self.spans,
            line=RowCopies(rows=line[0], first=line[1], further=line[2]) if line else None,
            rectangles=Rectangles(self.rows_of, len(ids), device),
            sequences=self.sequences,
            last_layer=self.last_layer,
            starts=starts.to(torch.int32),
            longest=max(len(rows) for rows in self.rows_of),
        )


def flatten(tokens: Tokens, shares: Sequence[Share], device: torch.device) -> Flat:
    """Lay the shares' sequences end to end, each adapter's in order of their prompts."""
    return lay_out(tokens, shares, device).to(device)


def lay_out(tokens: Tokens, shares: Sequence[Share], device: torch.device) -> Layout:
    """The part of `flatten` that needs no device: what can be done while it computes."""
    ids, positions, owners, whose, predictors, labels = [], [], [], [], [], []
    spans: list[Span] = []
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
        whose.append(np.full(row - start, len(spans)))
        spans.append(Span(adapter=share.adapter, start=start, stop=row, first=first_item, last=item))
    line = np.concatenate(rows_of)
    ends = np.concatenate([[0], np.cumsum([len(rows) for rows in rows_of])])
    arrays = [*map(np.concatenate, (ids, positions, owners, whose, predictors, labels)), ends]
    if len(line) > row:
        arrays += [line, *_first_and_further(line, np.arange(len(line)), row)]
    return Layout(
        arrays=memory.pinned(_joined(arrays), device),
        sizes=tuple(map(len, arrays)),
        spans=tuple(spans),
        rows_of=tuple(rows_of),
        sequences=tuple(sequences),
        last_layer=tuple(last_layer),
    )


def _side_by_side(rows_of: Sequence[np.ndarray]) -> tuple[tuple[tuple[int, int], ...], np.ndarray, np.ndarray]:
    """Sequences of similar length side by side: (the shapes, the row of each copy, the copies that are no filling)."""
    lengths = np.asarray([len(rows) for rows in rows_of])
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


def _first_and_further(rows: np.ndarray, real: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`rows` [P] of the copies, of which `real` are no filling; `count` rows: RowCopies' `first` and `further`."""
    first = np.zeros(count, dtype=np.int64)
    first[rows[real[::-1]]] = real[::-1]  # the first of several stays
    return first, real[first[rows[real]] != real]


def _joined(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64, copy=False))


def _moved(arrays: Sequence[np.ndarray], device: torch.device) -> tuple[torch.Tensor, ...]:
    return memory.pinned(_joined(arrays), device).to(device, non_blocking=True).split([len(array) for array in arrays])


class Layouts:
    """The flat batches of an engine's passes, the next one laid out while the device computes."""

    def __init__(self, tokens: Callable[[], Tokens], device: torch.device) -> None:
        """tokens: the engine's training set, which a probe changes."""
        self._tokens, self._device = tokens, device
        self._ahead: tuple[Tokens, object, Layout] | None = None

    def flat(self, shares: Sequence[Share]) -> Flat:
        """Of what was laid out ahead, if it is this; else it is laid out now."""
        ahead, self._ahead, tokens = self._ahead, None, self._tokens()
        if ahead is not None and ahead[0] is tokens and ahead[1] == _content(shares):
            return ahead[2].to(self._device)
        return lay_out(tokens, shares, self._device).to(self._device)

    def prepare(self, shares: Sequence[Share]) -> None:
        """Lay out what the next pass will hold, most likely."""
        tokens = self._tokens()
        self._ahead = (tokens, _content(shares), lay_out(tokens, shares, self._device)) if shares else None


def _content(shares: Sequence[Share]) -> object:
    """Equal for shares that are laid out alike."""
    return [(share.adapter, share.examples.tobytes(), [owner.tobytes() for owner in share.owners or ()]) for share in shares]
