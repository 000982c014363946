"""Causal self-attention in a flat batch: each sequence sees itself only.

Registered with Transformers under a name, so that its model files run unchanged. On a GPU in half precision the
variable-length kernel takes the flat batch as it is; elsewhere sequences of similar length are gathered into
rectangles (`layout.Bucket`) for scaled_dot_product_attention.

Notation: T tokens, H query heads, G key and value heads, D features of a head; n sequences of L positions.
"""

from typing import Any

import torch
import transformers
from torch.nn import functional

from loratune.errors import NotPackableError
from loratune.finetune.packed.layout import Bucket, Flat

NAME = "loratune_flat"


def register() -> None:
    """Make the implementation known to Transformers under `NAME`. No mask is registered with it, so models build none."""
    transformers.AttentionInterface.register(NAME, attention)


def attention(
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
        what = "soft-capped attention" if softcap is not None else f"the way {type(module).__name__} calls its attention"
        raise NotPackableError(f"{what} is not known to it")
    window = sliding_window if sliding_window is not None and sliding_window < flat.longest else None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and window is None:
        return _varlen(q, k, v, flat, scaling).unsqueeze(0), None
    if len(flat.buckets) == 1:
        bucket = flat.buckets[0]
        return _Unpad.apply(_rectangle(q, k, v, bucket, scaling, window), bucket, len(q)).unsqueeze(0), None
    out = sum(_Unpad.apply(_rectangle(q, k, v, bucket, scaling, window), bucket, len(q)) for bucket in flat.buckets)
    return out.unsqueeze(0), None


def _rectangle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bucket: Bucket, scaling: float | None, window: int | None
) -> torch.Tensor:
    """Attention among the sequences of a bucket, [n * L, H, D]."""
    n, length = bucket.sequences, bucket.length
    q, k, v = (_Pad.apply(x, bucket).view(n, length, x.shape[1], x.shape[2]).transpose(1, 2) for x in (q, k, v))
    mask = None
    if window is not None:  # position i sees i - window + 1 ... i
        distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)[None, :]
        mask = (distance >= 0) & (distance < window)
    grouped = q.shape[1] != k.shape[1]
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).reshape(n * length, out.shape[1], out.shape[3])


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, flat: Flat, scaling: float | None) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends, longest, grouped = flat.starts, flat.longest, q.shape[1] != k.shape[1]
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=grouped)  # type: ignore[return-value]


class _Pad(torch.autograd.Function):
    """Flat rows [T, ...] -> a bucket's rectangle [n * L, ...]. Places past a sequence's end get no gradient: none reaches them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bucket: Bucket) -> torch.Tensor:
        ctx.bucket, ctx.rows = bucket, len(x)
        return x.index_select(0, bucket.places)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        whole = grads[0].new_zeros(ctx.rows, *grads[0].shape[1:])
        return whole.index_copy_(0, ctx.bucket.rows, grads[0].index_select(0, ctx.bucket.real)), None


class _Unpad(torch.autograd.Function):
    """A bucket's rectangle [n * L, ...] -> flat rows [T, ...]; rows of other buckets are zero."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bucket: Bucket, rows: int) -> torch.Tensor:
        ctx.bucket, ctx.places = bucket, len(x)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, bucket.rows, x.index_select(0, bucket.real))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        whole = grads[0].new_zeros(ctx.places, *grads[0].shape[1:])
        return whole.index_copy_(0, ctx.bucket.real, grads[0].index_select(0, ctx.bucket.rows)), None, None
