"""Causal self-attention in a flat batch: each sequence sees itself only.

Registered with Transformers under a name, so that its model files run unchanged. On a GPU in half precision the
variable-length kernel takes sequences end to end (varlen.py); on a CPU in full precision each is taken block by block
(causal.py); elsewhere, and where sequences are long, a window slides or the kernel refuses, those of similar length are
gathered into rectangles (`layout.Flat.buckets`) for scaled_dot_product_attention.

Notation: T rows, H query heads, G key and value heads, D features of a head; n sequences of L positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch.nn import functional

from loratune.errors import NotPackableError
from loratune.finetune.packed import varlen
from loratune.finetune.packed.causal import LONGEST, causal_attention
from loratune.finetune.packed.layout import Flat, RowCopies

NAME = "loratune_flat"


def register_attention() -> None:
    """Make the implementation known to Transformers under `NAME`. No mask is registered with it, so models build none."""
    transformers.AttentionInterface.register(NAME, flat_attention)


def flat_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    flat: Flat | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' signature: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]. Raises NotPackableError."""
    if flat is None or attention_mask is not None or softcap is not None:
        called = "soft-capped attention" if softcap is not None else f"the way {type(module).__name__} calls its attention"
        raise NotPackableError(f"it does not know {called}")
    window = sliding_window if sliding_window is not None and sliding_window < flat.longest else None
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    if window is None and varlen.takes(q, k, v):
        if flat.line is None:
            return varlen.varlen_attention(q, k, v, flat.starts, flat.longest, scaling).unsqueeze(0), None
        q, k, v = (_Copied.apply(x, flat.line) for x in (q, k, v))
        return _FirstCopies.apply(varlen.varlen_attention(q, k, v, flat.starts, flat.longest, scaling), flat.line).unsqueeze(0), None
    if window is None and _by_blocks(q, v, flat):
        if flat.line is not None:
            k, v = (_Copied.apply(x, flat.line) for x in (k, v))
        return causal_attention(q, k, v, flat.sequences, scaling).unsqueeze(0), None
    sides = [_Copied.apply(x, flat.buckets).split([n * length for n, length in flat.shapes]) for x in (q, k, v)]
    rectangles = [
        _rectangle([x.view(n, length, *x.shape[1:]).transpose(1, 2) for x in one], scaling, window)
        for one, (n, length) in zip(zip(*sides, strict=True), flat.shapes, strict=True)
    ]
    return _FirstCopies.apply(torch.cat(rectangles) if len(rectangles) > 1 else rectangles[0], flat.buckets).unsqueeze(0), None


def _by_blocks(q: torch.Tensor, v: torch.Tensor, flat: Flat) -> bool:
    exact = q.dtype in (torch.float32, torch.float64)
    return q.device.type == "cpu" and exact and q.shape[-1] == v.shape[-1] and flat.longest <= LONGEST


def _rectangle(qkv: Sequence[torch.Tensor], scaling: float | None, window: int | None) -> torch.Tensor:
    """Attention among the sequences of a rectangle: three of [n, heads, L, D] -> [n * L, H, D]."""
    q, k, v = qkv
    length, mask = q.shape[2], None
    if window is not None and window < length:  # position i sees i - window + 1 ... i
        distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
        mask = (distance >= 0) & (distance < window)
    grouped = q.shape[1] != k.shape[1]
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)


class _Copied(torch.autograd.Function):
    """Rows [T, ...] -> copies [P, ...]. Copies past a sequence's end send no gradient back: none reaches them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, copies: RowCopies) -> torch.Tensor:
        ctx.copies = copies
        return copies.copy(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.copies.summed(grads[0]), None


class _FirstCopies(torch.autograd.Function):
    """Copies [P, ...] -> rows [T, ...]. All copies of a row hold the same."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, copies: RowCopies) -> torch.Tensor:
        ctx.copies, ctx.count = copies, len(x)
        return copies.first_copies(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        whole = grads[0].new_zeros(ctx.count, *grads[0].shape[1:])
        return whole.index_copy_(0, ctx.copies.first, grads[0]), None
