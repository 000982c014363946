"""From token sequences to the tensors of a forward pass.

A split of the data (`tokens` below) is anything with `len()`, `[i] -> (ids int32 [T], response_mask bool [T])`
and `.lengths`; see prepared.py. Batches are padded on the right and carry no attention mask: in a causal model
no real token can see what comes after it. Position 0 is never a target, for nothing predicts it. Examples of different
sides (`Sides`) never stand in one batch.

Notation: B examples in a forward pass, T positions of the longest, N response tokens of all.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


class Tokens(Protocol):
    """A tokenised split."""

    @property
    def lengths(self) -> np.ndarray: ...  # [n] tokens of each example
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]: ...


class Sides(Protocol):
    """Lengths [n] -> int64 [n]: sequences of equal numbers may share a forward pass (rope.py); with the length it never falls."""

    def __call__(self, lengths: np.ndarray, /) -> np.ndarray: ...


def one_side(lengths: np.ndarray, /) -> np.ndarray:
    """`Sides` of a model that computes every sequence alike."""
    return np.zeros(len(lengths), dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward pass sees, and which of its predictions are scored."""

    ids: torch.Tensor  # int64 [B, T]
    owners: torch.Tensor  # int64 [B, T]; the example that owns each token, for dropout (shared_prefix.py)
    predictors: torch.Tensor  # int64 [N]; b * T + t of the hidden state that predicts a response token
    labels: torch.Tensor  # int64 [N]; that token

    def to(self, device: torch.device) -> "Batch":
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()}
        return Batch(**moved)


def collate(
    tokens: Tokens,
    examples: Sequence[int] | np.ndarray,
    *,
    pad_id: int,
    owners: Sequence[np.ndarray] | None = None,
    scored: bool = True,
) -> Batch:
    """Pad some examples into one batch; unless `scored`, none of their tokens counts in the loss.

    `owners`: for each example, int64 [its tokens] (shared_prefix.dropout_owners); only dropout needs them.
    """
    rows = [tokens[int(i)] for i in examples]
    length = max(len(ids) for ids, _ in rows)
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    targets = np.zeros((len(rows), length), dtype=bool)
    owned = np.zeros((len(rows), length), dtype=np.int64)
    for row, (tokens_of, mask) in enumerate(rows):
        ids[row, : len(tokens_of)] = tokens_of
        targets[row, 1 : len(tokens_of)] = mask[1:]
        owned[row, : len(tokens_of)] = owners[row] if owners is not None else 0
    b, t = np.nonzero(targets if scored else targets & False)
    return Batch(
        ids=torch.from_numpy(ids),
        owners=torch.from_numpy(owned),
        predictors=torch.from_numpy(b * length + t - 1),
        labels=torch.from_numpy(ids[b, t]),
    )


def response_tokens(tokens: Tokens, examples: Sequence[int] | np.ndarray) -> int:
    """How many tokens of these examples are scored."""
    return sum(int(tokens[int(i)][1][1:].sum()) for i in examples)


def micro_batch_count(batch_size: int, micro_batch_size: int, world: int) -> int:
    """Forward passes per optimiser step, the same in every process, of examples that may all share one."""
    return math.ceil(math.ceil(batch_size / world) / micro_batch_size)


def cut(
    lengths: np.ndarray, micro_batch_size: int, rank: int = 0, world: int = 1, sides: Sides = one_side, count: int | None = None
) -> list[np.ndarray]:
    """Deal a global batch out: the indices in it of each of this process's micro-batches, at most `micro_batch_size` each.

    `lengths` [batch_size] are the examples' tokens. Examples are sorted by length first, so that little is padded and
    every process gets its share of the long ones; since dropout is keyed by owner and the loss is a sum, the
    cut changes no result. Some micro-batches are empty where there are too few examples for all processes, or for `count`.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")  # longest first: memory runs out at once or not at all
    least, own = micro_batch_count(len(order), micro_batch_size, world), order[rank::world]
    groups = _apart(own, lengths, sides)
    if len(groups) < 2:
        pieces = np.array_split(own, least)
    else:
        pieces = [piece for group in groups for piece in np.array_split(group, math.ceil(len(group) / micro_batch_size))]
    return pieces + [own[:0]] * (max(least, count or 0) - len(pieces))


def validation_batches(
    tokens: Tokens, batch_size: int, pad_id: int, rank: int = 0, world: int = 1, sides: Sides = one_side
) -> Iterator[Batch]:
    """All of a split, longest first, every `world`-th batch."""
    lengths = np.asarray(tokens.lengths)
    groups = _apart(np.argsort(-lengths, kind="stable"), lengths, sides)
    batches = [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
    for examples in batches[rank::world]:
        yield collate(tokens, examples, pad_id=pad_id)


def _apart(order: np.ndarray, lengths: np.ndarray, sides: Sides) -> list[np.ndarray]:
    """`order`, in descending lengths, cut where the side changes."""
    return np.split(order, np.flatnonzero(np.diff(sides(lengths[order]))) + 1)
