"""The adapters' part of a linear layer, each adapter on its own rows of a flat batch.

For adapter k with the rows X_k [T_k, in] of the layer's input, scale s_k and dropout mask M_k (dropout.py):

    forward    Z_k = (X_k * M_k) A_k^T           Y_k += s_k Z_k B_k^T                 A_k [r_k, in], B_k [out, r_k]
    backward   G_k = s_k dY_k B_k                dX_k += (G_k A_k) * M_k
               dA_k = G_k^T (X_k * M_k)          dB_k = s_k dY_k^T Z_k                (Hu et al. 2021, by the chain rule)

with M_k in {0, 1 / (1 - p_k)}. The gradients of A_k and B_k are added to the adapter's own storage, not returned to
autograd. The products are products.py's. On a GPU one function masks the rows of all adapters, and again on the way back,
where that costs less than a mask kept; on a CPU each adapter's mask is made once and kept.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from loratune.finetune import compiled
from loratune.finetune.dropout import both_kept, columns_of, keep_mask, kept
from loratune.finetune.packed.products import BACKENDS, Backend, LayerDelta, PassRows


def add_deltas(
    x: torch.Tensor, y: torch.Tensor, parts: Sequence[LayerDelta], rows: PassRows, anchor: torch.Tensor, backend: Backend
) -> torch.Tensor:
    """y + the adapters' deltas, in place. x [..., in], y [..., out], of the rows of a pass that the layer sees.

    `anchor` is any tensor that requires a gradient: it makes autograd come by, where x does not require one.
    """
    parts = [part for part in parts if part.p < 1]  # dropout 1 silences an adapter
    if not parts:
        return y
    if len(parts) == 1 or (backend == "grouped" and any(one.stop != next_.start for one, next_ in pairwise(parts))):
        backend = "loop"
    if y._is_view():  # a layer with a bias gives one; autograd would send x's gradient astray
        y = y.clone()
    return _Delta.apply(x, y, anchor, parts, rows, BACKENDS[backend])


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor, anchor: torch.Tensor, parts: list[LayerDelta], rows: PassRows, backend: Any
    ) -> Any:
        flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        source = _source(flat, parts, rows)
        mask = _mask(flat, parts, rows.hashes) if source is None else None
        seen = _masked(flat.to(parts[0].a.dtype), mask, source)
        products = backend(parts, rows)
        with torch.autocast(x.device.type, enabled=False):
            z = products.down(seen)
            products.up(z, out)
        ctx.parts, ctx.products, ctx.source, ctx.marks = parts, products, source, mask is not None
        ctx.save_for_backward(x, *z, *([mask] if mask is not None else []))
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (dy,) = grads
        x, *z = ctx.saved_tensors
        mask = z.pop() if ctx.marks else None
        dtype = ctx.parts[0].a.dtype
        flat, d_out, dx = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).to(dtype), None
        with torch.autocast(x.device.type, enabled=False):
            g = ctx.products.down_back(d_out)
            if ctx.needs_input_grad[0] and ctx.source is not None:
                seen, dx = both_kept(flat.to(dtype), ctx.products.up_back(g, flat.shape, flat), *ctx.source)
                ctx.products.weights(seen, d_out, z, g)
            else:
                ctx.products.weights(_masked(flat.to(dtype), mask, ctx.source), d_out, z, g)
                if ctx.needs_input_grad[0]:
                    dx = _masked(ctx.products.up_back(g, flat.shape, flat), mask, None)
        return None if dx is None else dx.to(x.dtype).view(x.shape), dy, None, None, None, None


def _source(x: torch.Tensor, parts: list[LayerDelta], rows: PassRows) -> tuple[torch.Tensor, ...] | None:
    """What `kept` needs to mask x [T, in] on a GPU; None on a CPU, and where no adapter drops anything."""
    if not compiled.on_gpu(x) or not any(part.p > 0 for part in parts):
        return None
    return rows.hashes, rows.whose, rows.keys[parts[0].layer], rows.thresholds, columns_of(x.shape[1], x.device)


def _mask(x: torch.Tensor, parts: list[LayerDelta], rows: torch.Tensor) -> torch.Tensor | None:
    """What dropout keeps, [T, in] to multiply by; None where no adapter drops anything."""
    if not any(part.p > 0 for part in parts):
        return None
    masks = {part.start: keep_mask(rows[part.rows], part.key, x.shape[1], part.p, part.a.dtype) for part in parts if part.p > 0}
    if len(parts) == 1 and parts[0].stop - parts[0].start == len(x):
        return masks[parts[0].start]
    mask = torch.ones(x.shape, dtype=next(iter(masks.values())).dtype, device=x.device)
    for part in parts:
        if part.p > 0:
            mask[part.rows] = masks[part.start]
    return mask


def _masked(x: torch.Tensor, mask: torch.Tensor | None, source: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
    if source is not None:
        return kept(x, *source)
    return x if mask is None else x * mask
