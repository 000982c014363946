"""The adapters' part of a linear layer, each adapter on its own rows of a flat batch.

For adapter k with the rows X_k [T_k, in] of the layer's input, scale s_k and dropout mask M_k (dropout.py):

    forward    Z_k = (X_k * M_k) A_k^T           Y_k += s_k Z_k B_k^T                 A_k [r_k, in], B_k [out, r_k]
    backward   G_k = s_k dY_k B_k                dX_k += (G_k A_k) * M_k
               dA_k = G_k^T (X_k * M_k)          dB_k = s_k dY_k^T Z_k                (Hu et al. 2021, by the chain rule)

with M_k in {0, 1 / (1 - p_k)}. The gradients of A_k and B_k are added to the adapter's own storage, not returned to
autograd. Three backends compute the products; all keep a row's result a function of that row and its own adapter:

    loop          one product per adapter: the fewest operations in all, the most calls
    concatenated  the A's and B's of all adapters side by side, what belongs to another adapter cut out by selection (a
                  product with zero would let inf and NaN through); weights' gradients per adapter
    grouped       torch's grouped matrix product, ranks padded to the largest (float32, bfloat16)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch.nn import functional

from loratune.finetune.dropout import keep_mask

Backend = Literal["loop", "concatenated", "grouped"]


@dataclass(frozen=True, kw_only=True)
class LayerDelta:
    """One adapter's rows, factors and gradients in one layer, in one pass."""

    start: int  # its rows
    stop: int
    a: torch.Tensor  # [r, in], in the arithmetic's dtype
    b: torch.Tensor  # [out, r]
    grad_a: torch.Tensor | None  # where gradients are added, in the master dtype; None: the factor is not trained
    grad_b: torch.Tensor | None
    scale: float
    p: float  # dropout; 0 outside training
    key: int  # of the dropout mask

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


def add_deltas(
    x: torch.Tensor, y: torch.Tensor, parts: Sequence[LayerDelta], rows: torch.Tensor, anchor: torch.Tensor, backend: Backend
) -> torch.Tensor:
    """y + the adapters' deltas, in place. x [..., in], y [..., out], `rows` int32 [T] hash each token (dropout.py).

    `anchor` is any tensor that requires a gradient: it makes autograd come by, where x does not require one.
    """
    parts = [part for part in parts if part.p < 1]  # dropout 1 silences an adapter
    if not parts:
        return y
    if len(parts) == 1 or (backend == "grouped" and any(one.stop != next_.start for one, next_ in pairwise(parts))):
        backend = "loop"
    if y._is_view():  # a layer with a bias gives one; autograd would send x's gradient astray
        y = y.clone()
    return _Delta.apply(x, y, anchor, parts, rows, _BACKENDS[backend])


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor, anchor: torch.Tensor, parts: list[LayerDelta], rows: torch.Tensor, backend: Any
    ) -> Any:
        flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        mask = _mask(flat, parts, rows)
        seen = _masked(flat.to(parts[0].a.dtype), mask)
        products = backend(parts)
        with torch.autocast(x.device.type, enabled=False):
            z = products.down(seen)
            products.up(z, out)
        ctx.parts, ctx.products, ctx.marks = parts, products, mask is not None
        ctx.save_for_backward(x, *z, *([mask] if mask is not None else []))
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (dy,) = grads
        x, *z = ctx.saved_tensors
        mask = z.pop() if ctx.marks else None
        dtype = ctx.parts[0].a.dtype
        flat, d_out = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            g = ctx.products.down_back(d_out)
            ctx.products.weights(_masked(flat.to(dtype), mask), d_out, z, g)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = ctx.products.up_back(g, flat.shape, flat)
                dx = _masked(dx, mask).to(x.dtype).view(x.shape)
        return dx, dy, None, None, None, None


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


def _masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return x if mask is None else x * mask


class _Loop:
    """Products adapter by adapter. The factor 1 / (1 - p) of the mask goes into the scale."""

    def __init__(self, parts: Sequence[LayerDelta]) -> None:
        self.parts = parts
        self.scales = [part.scale / (1 - part.p) for part in parts]

    def down(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [functional.linear(x[part.rows], part.a) for part in self.parts]

    def up(self, z: list[torch.Tensor], y: torch.Tensor) -> None:
        for part, scale, z_k in zip(self.parts, self.scales, z, strict=True):
            if z_k.dtype == y.dtype:
                y[part.rows].addmm_(z_k, part.b.T, alpha=scale)
            else:
                y[part.rows] += functional.linear(z_k, part.b) * scale

    def down_back(self, dy: torch.Tensor) -> list[torch.Tensor]:
        return [(dy[part.rows] @ part.b).mul_(scale) for part, scale in zip(self.parts, self.scales, strict=True)]

    def up_back(self, g: list[torch.Tensor], shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        if len(g) == 1 and len(g[0]) == shape[0]:
            return g[0] @ self.parts[0].a
        dx = torch.zeros(shape, dtype=g[0].dtype, device=like.device)
        for part, g_k in zip(self.parts, g, strict=True):
            torch.mm(g_k, part.a, out=dx[part.rows])
        return dx

    def weights(self, x: torch.Tensor, dy: torch.Tensor, z: list[torch.Tensor], g: list[torch.Tensor]) -> None:
        for part, scale, z_k, g_k in zip(self.parts, self.scales, z, g, strict=True):
            add_product(part.grad_a, g_k.T, x[part.rows], 1.0)
            add_product(part.grad_b, dy[part.rows].T, z_k, scale)


class _Concatenated(_Loop):
    """All adapters in one product; another adapter's columns are replaced by zero, whatever they hold."""

    def __init__(self, parts: Sequence[LayerDelta]) -> None:
        super().__init__(parts)
        # Weights that are not finite would reach the neighbours as 0 * inf; whose they are finds out at its next step.
        self.a = torch.nan_to_num(torch.cat([p.a for p in parts]), nan=0.0, posinf=0.0, neginf=0.0)
        self.b = torch.nan_to_num(torch.cat([p.b for p in parts], dim=1), nan=0.0, posinf=0.0, neginf=0.0)
        self.ranks = [p.a.shape[0] for p in parts]

    def down(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self._own(functional.linear(x, self.a), [1.0] * len(self.parts))]

    def up(self, z: list[torch.Tensor], y: torch.Tensor) -> None:
        scaled = self._own(z[0], self.scales)
        y += functional.linear(scaled, self.b).to(y.dtype)

    def down_back(self, dy: torch.Tensor) -> list[torch.Tensor]:
        return [self._own(dy @ self.b, self.scales)]

    def up_back(self, g: list[torch.Tensor], shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        return g[0] @ self.a

    def weights(self, x: torch.Tensor, dy: torch.Tensor, z: list[torch.Tensor], g: list[torch.Tensor]) -> None:
        super().weights(x, dy, self._blocks(z[0]), self._blocks(g[0]))

    def _blocks(self, wide: torch.Tensor) -> list[torch.Tensor]:
        return [block[part.rows] for part, block in zip(self.parts, wide.split(self.ranks, dim=1), strict=True)]

    def _own(self, wide: torch.Tensor, scales: list[float]) -> torch.Tensor:
        own = torch.zeros_like(wide)
        for mine, theirs, scale in zip(self._blocks(own), self._blocks(wide), scales, strict=True):
            torch.mul(theirs, scale, out=mine)
        return own


class _Grouped(_Loop):
    """torch.nn.functional.grouped_mm: rows in order, one group per adapter."""

    def __init__(self, parts: Sequence[LayerDelta]) -> None:
        super().__init__(parts)
        self.rank = -(-max(part.a.shape[0] for part in parts) // 8) * 8  # kernels want multiples of 16 bytes
        self.a = torch.stack([functional.pad(p.a, (0, 0, 0, self.rank - p.a.shape[0])) for p in parts])  # [K, r, in]
        self.b = torch.stack([functional.pad(p.b, (0, self.rank - p.b.shape[1])) for p in parts])  # [K, out, r]
        self.whole = slice(parts[0].start, parts[-1].stop)
        ends = [part.stop - self.whole.start for part in parts]
        self.ends = torch.tensor(ends, dtype=torch.int32, device=parts[0].a.device)
        counts = torch.tensor([part.stop - part.start for part in parts], device=parts[0].a.device)
        factors = torch.tensor(self.scales, dtype=parts[0].a.dtype, device=parts[0].a.device)
        self.factors = factors.repeat_interleave(counts, output_size=ends[-1]).unsqueeze(1)

    def down(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [functional.grouped_mm(x[self.whole], self.a.transpose(1, 2), offs=self.ends)]

    def up(self, z: list[torch.Tensor], y: torch.Tensor) -> None:
        y[self.whole] += functional.grouped_mm(z[0] * self.factors, self.b.transpose(1, 2), offs=self.ends).to(y.dtype)

    def down_back(self, dy: torch.Tensor) -> list[torch.Tensor]:
        return [functional.grouped_mm(dy[self.whole], self.b, offs=self.ends) * self.factors]

    def up_back(self, g: list[torch.Tensor], shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        dx = torch.zeros(shape, dtype=g[0].dtype, device=like.device)
        dx[self.whole] = functional.grouped_mm(g[0], self.a, offs=self.ends)
        return dx

    def weights(self, x: torch.Tensor, dy: torch.Tensor, z: list[torch.Tensor], g: list[torch.Tensor]) -> None:
        d_a = functional.grouped_mm(g[0].T, x[self.whole], offs=self.ends)  # [K, r, in]
        d_b = functional.grouped_mm((dy[self.whole] * self.factors).T, z[0], offs=self.ends)  # [K, out, r]
        for k, part in enumerate(self.parts):
            rank = part.a.shape[0]
            if part.grad_a is not None:
                part.grad_a.add_(d_a[k, :rank])
            if part.grad_b is not None:
                part.grad_b.add_(d_b[k, :, :rank])


_BACKENDS = {"loop": _Loop, "concatenated": _Concatenated, "grouped": _Grouped}


def add_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """total += scale * left right, the sum in total's precision; nothing where total is None."""
    if total is None:
        return
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)
