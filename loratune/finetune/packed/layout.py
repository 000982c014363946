"""A flat batch: the token sequences of several adapters laid end to end, without padding.

Notation: T tokens of all sequences together, N response tokens, of several adapters. Each adapter's tokens are
contiguous, so that its rows of any activation are a slice. Within an adapter, sequences come longest first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loratune.finetune.batches import Tokens

_ALIKE = 0.85  # a sequence at least this share of its bucket's longest joins the bucket


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one adapter puts into a flat batch."""

    owner: int  # the adapter's place in the caller's list
    examples: np.ndarray  # int64 [n], places in the split
    slots: np.ndarray  # int64 [n], places in the adapter's global batch


@dataclass(frozen=True, kw_only=True)
class Span:
    """An adapter's rows [start, stop) of the T tokens, and [first, last) of the N response tokens."""

    owner: int
    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Sequences of similar length side by side in rectangles of n sequences times L positions, laid end to end: P places.

    A place past its sequence's end holds that sequence's own first token: causality hides it from the real ones, and
    nothing of a neighbour can leak in.
    """

    shapes: tuple[tuple[int, int], ...]  # (n, L) of each rectangle
    places: torch.Tensor  # int64 [P]; the flat row in each place
    homes: torch.Tensor  # int64 [T]; the place of each flat row


@dataclass(frozen=True, kw_only=True)
class Flat:
    """What one pass sees."""

    ids: torch.Tensor  # int64 [1, T]
    positions: torch.Tensor  # int64 [1, T], from 0 in each sequence
    slots: torch.Tensor  # int64 [T]
    predictors: torch.Tensor  # int64 [N]; flat rows whose hidden states predict a response token
    labels: torch.Tensor  # int64 [N]; those tokens
    spans: tuple[Span, ...]
    buckets: Buckets
    starts: torch.Tensor  # int32 [sequences + 1]; where each sequence begins, and T
    longest: int

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]


def flatten(tokens: Tokens, shares: Sequence[Share], device: torch.device) -> Flat:
    """Lay the shares' sequences end to end, in the order given."""
    ids, positions, slots, predictors, labels, spans, lengths = [], [], [], [], [], [], []
    row = item = 0
    for share in shares:
        start, first = row, item
        for example, slot in zip(share.examples, share.slots, strict=True):
            text, mask = tokens[int(example)]
            targets = np.flatnonzero(mask[1:]) + 1  # nothing predicts position 0
            ids.append(text)
            positions.append(np.arange(len(text)))
            slots.append(np.full(len(text), slot))
            predictors.append(row + targets - 1)
            labels.append(text[targets])
            lengths.append(len(text))
            row, item = row + len(text), item + len(targets)
        spans.append(Span(owner=share.owner, start=start, stop=row, first=first, last=item))

    def tensor(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device, non_blocking=True)

    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Flat(
        ids=tensor(ids).unsqueeze(0),
        positions=tensor(positions).unsqueeze(0),
        slots=tensor(slots),
        predictors=tensor(predictors),
        labels=tensor(labels),
        spans=tuple(spans),
        buckets=_buckets(np.asarray(lengths), starts, device),
        starts=torch.from_numpy(starts.astype(np.int32)).to(device),
        longest=max(lengths),
    )


def _buckets(lengths: np.ndarray, starts: np.ndarray, device: torch.device) -> Buckets:
    groups: list[list[int]] = []
    for sequence in np.argsort(-lengths, kind="stable"):
        if not groups or lengths[sequence] < _ALIKE * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(int(sequence))
    places, homes, shapes, begun = [], np.zeros(starts[-1], dtype=np.int64), [], 0
    for group in groups:
        longest = int(lengths[group[0]])
        column = np.arange(longest)
        inside = column < lengths[group][:, None]  # [n, L]
        rows = (starts[group][:, None] + np.where(inside, column, 0)).reshape(-1)
        real = np.flatnonzero(inside)
        homes[rows[real]] = begun + real
        places.append(rows)
        shapes.append((len(group), longest))
        begun += len(rows)
    held = [torch.from_numpy(array).to(device) for array in (np.concatenate(places), homes)]
    return Buckets(shapes=tuple(shapes), places=held[0], homes=held[1])
