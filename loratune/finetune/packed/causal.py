"""Causal attention on a CPU, a block of queries at a time.

    S = s Q K^T + mask        P = softmax(S)              O = P V
    dV = P^T dO               dS = P * (dO V^T - rowsum(P * dO V^T))
    dQ = s dS K               dK = s dS^T Q                                   s: the scaling, mostly 1 / sqrt(D)

What a block's queries cannot see yet is not computed, and P is saved for the backward pass: for sequences of a few hundred
tokens that is faster than computing it twice, as flash attention does to save memory. Queries are rows, keys and
values are copies of rows (layout.py): a prefix that several sequences share asks once and is seen by all of them.

Notation: T rows, P copies, H query heads, G key and value heads, R = H / G, D features of a head.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch

from loratune.finetune.packed.layout import SequenceSpan

LONGEST = 1024  # tokens of a sequence; P takes 4 H / 2 bytes for each pair of them
_BLOCK = 96  # queries: what they see of a few hundred keys is used while it is in the cache


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequence[SequenceSpan], scaling: float | None
) -> torch.Tensor:
    """q [T, H, D], k and v [P, G, D] -> [T, H, D]; zero in rows that no sequence asks for. float32 or float64."""
    return _Causal.apply(q, k, v, sequences, q.shape[-1] ** -0.5 if scaling is None else scaling)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequence[SequenceSpan], scaling: float
    ) -> torch.Tensor:
        groups, each = k.shape[1], q.shape[1] // k.shape[1]
        queries, keys, values = _by_group(q, groups) * scaling, k.transpose(0, 1), v.transpose(0, 1)
        out, saved, hidden = torch.zeros_like(queries), [], _hidden(_BLOCK, each, q.dtype)
        for row, rows, first, seen in _blocks(sequences):
            s = torch.bmm(queries.narrow(1, row * each, rows * each), keys.narrow(1, first, seen).transpose(1, 2))
            s.narrow(2, seen - rows, rows).add_(hidden[: rows * each, :rows])
            torch.softmax(s, -1, out=s)
            out.narrow(1, row * each, rows * each).copy_(torch.bmm(s, values.narrow(1, first, seen)))
            if any(ctx.needs_input_grad):
                saved.append(s)
        ctx.save_for_backward(queries, k, v, *saved)
        ctx.sequences, ctx.scaling = sequences, scaling
        return _by_row(out, len(q))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        queries, k, v, *saved = ctx.saved_tensors
        (d_out,) = grads
        groups, each, wants_k = k.shape[1], d_out.shape[1] // k.shape[1], ctx.needs_input_grad[1]
        d_outs, keys, values = _by_group(d_out, groups), k.transpose(0, 1), v.transpose(0, 1)
        dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(k) if wants_k else None, torch.zeros_like(v)
        scratch = d_out.new_empty(max((p.numel() for p in saved), default=0))
        for (row, rows, first, seen), p in zip(_blocks(ctx.sequences), saved, strict=True):
            d = d_outs.narrow(1, row * each, rows * each)
            dv.narrow(0, first, seen).transpose(0, 1).add_(torch.bmm(p.transpose(1, 2), d))
            ds = torch.bmm(d, values.narrow(1, first, seen).transpose(1, 2), out=scratch[: p.numel()].view(p.shape))
            torch._softmax_backward_data(ds, p, -1, p.dtype, grad_input=ds)  # softmax's own backward pass
            dq.narrow(1, row * each, rows * each).copy_(torch.bmm(ds, keys.narrow(1, first, seen)))
            if dk is not None:
                asked = queries.narrow(1, row * each, rows * each)
                dk.narrow(0, first, seen).transpose(0, 1).add_(torch.bmm(ds.transpose(1, 2), asked))
        return _by_row(dq.mul_(ctx.scaling), len(d_out)), dk, dv, None, None


def _blocks(sequences: Sequence[SequenceSpan]) -> Iterator[tuple[int, int, int, int]]:
    """(first row, rows) that ask and (first copy, copies) that they see: the last ones, as many, are hidden from earlier rows."""
    for one in sequences:
        for start in range(one.start, one.stop, _BLOCK):
            stop = min(start + _BLOCK, one.stop)
            yield start, stop - start, one.first, one.last - one.first - (one.stop - stop)


def _by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[T, H, D] -> [G, T * R, D], contiguous."""
    return x.unflatten(1, (groups, -1)).permute(1, 0, 2, 3).contiguous().flatten(1, 2)


def _by_row(x: torch.Tensor, rows: int) -> torch.Tensor:
    """[G, T * R, D] -> [T, H, D], T being `rows`."""
    return x.unflatten(1, (rows, -1)).transpose(0, 1).flatten(1, 2)


@lru_cache(maxsize=8)
def _hidden(block: int, each: int, dtype: torch.dtype) -> torch.Tensor:
    """[block * R, block] to add to the block's own part of S: -inf where a query precedes a key."""
    return torch.full((block, block), -torch.inf, dtype=dtype).triu(1).repeat_interleave(each, 0)
