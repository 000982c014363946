"""The products of the adapters' deltas (delta.py), of all adapters of a pass. Three backends compute them; all keep a row's
result a function of that row and its own adapter:

    loop          one product per adapter: the fewest operations in all, the most calls
    concatenated  the A's and B's of all adapters side by side, what belongs to another adapter cut out by selection (a
                  product with zero would let inf and NaN through); weights' gradients per adapter
    grouped       torch's grouped matrix product, ranks padded to the largest, where the device has a kernel for it
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch.nn import functional

from loratune.finetune import compiled, memory

Backend = Literal["loop", "concatenated", "grouped"]
_GROUPED_KERNEL = ((9, 0), (10, 0))  # compute capabilities; elsewhere torch takes one product after the other, and waits for each


@dataclass(frozen=True, kw_only=True)
class LayerDelta:
    """One adapter's rows, factors and gradients in one layer, in one pass."""

    layer: str
    number: int  # of its span
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


@dataclass(frozen=True, kw_only=True)
class PassRows:
    """The rows that a layer sees, all of a pass or those that predict, with what the layers' products need to know of them."""

    hashes: torch.Tensor  # int32 [T], of dropout.row_hashes
    whose: torch.Tensor  # int64 [T]; the number of each row's span
    thresholds: torch.Tensor  # int32 [spans], of dropout.threshold
    keys: dict[str, torch.Tensor]  # int32 [spans] for each layer; empty where masks are made adapter by adapter
    made: dict[Any, "Widths"] = field(default_factory=dict)

    def widths(self, parts: Sequence["LayerDelta"]) -> "Widths":
        """Made at the first layer with such parts: mostly at the pass's first."""
        key = tuple((part.number, part.stop, part.a.shape[0], part.scale, part.p) for part in parts)
        if key not in self.made:
            self.made[key] = Widths.of(parts, self.whose.device)
        return self.made[key]


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Of some adapters side by side: whose each column is, and by what it is scaled; where their rows end."""

    whose: torch.Tensor  # int64 [sum of ranks]
    scales: torch.Tensor  # [sum of ranks], float32 or better; with dropout's 1 / (1 - p)
    ones: torch.Tensor
    ends: torch.Tensor  # int32 [K], counted from the first one's start
    factors: torch.Tensor  # [rows, 1]: the scale of each row

    @classmethod
    def of(cls, parts: Sequence[LayerDelta], device: torch.device) -> "Widths":
        dtype = torch.promote_types(parts[0].a.dtype, torch.float32)
        scales = torch.tensor([part.scale / (1 - part.p) for part in parts], dtype=dtype)
        ranks, counts = [part.a.shape[0] for part in parts], torch.tensor([part.stop - part.start for part in parts])
        held = {
            "whose": torch.tensor([part.number for part in parts]).repeat_interleave(torch.tensor(ranks)),
            "scales": scales.repeat_interleave(torch.tensor(ranks)),
            "ones": torch.ones(sum(ranks), dtype=dtype),
            "ends": torch.tensor([part.stop - parts[0].start for part in parts], dtype=torch.int32),
            "factors": scales.repeat_interleave(counts).unsqueeze(1),
        }
        return cls(**{name: memory.pinned(x, device).to(device, non_blocking=True) for name, x in held.items()})


class _Loop:
    """Products adapter by adapter. The factor 1 / (1 - p) of the mask goes into the scale."""

    def __init__(self, parts: Sequence[LayerDelta], rows: PassRows) -> None:
        self.parts, self.pass_rows = parts, rows
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

    def __init__(self, parts: Sequence[LayerDelta], rows: PassRows) -> None:
        super().__init__(parts, rows)
        # Weights that are not finite would reach the neighbours as 0 * inf; whose they are finds out at its next step.
        self.a = torch.nan_to_num(torch.cat([p.a for p in parts]), nan=0.0, posinf=0.0, neginf=0.0)
        self.b = torch.nan_to_num(torch.cat([p.b for p in parts], dim=1), nan=0.0, posinf=0.0, neginf=0.0)
        self.ranks = [p.a.shape[0] for p in parts]
        self.widths = rows.widths(parts)

    def down(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self._own(functional.linear(x, self.a), self.widths.ones)]

    def up(self, z: list[torch.Tensor], y: torch.Tensor) -> None:
        scaled = self._own(z[0], self.widths.scales)
        if y.dtype == scaled.dtype:
            y.addmm_(scaled, self.b.T)
        else:
            y += functional.linear(scaled, self.b).to(y.dtype)

    def down_back(self, dy: torch.Tensor) -> list[torch.Tensor]:
        return [self._own(dy @ self.b, self.widths.scales)]

    def up_back(self, g: list[torch.Tensor], shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        return g[0] @ self.a

    def weights(self, x: torch.Tensor, dy: torch.Tensor, z: list[torch.Tensor], g: list[torch.Tensor]) -> None:
        super().weights(x, dy, self._blocks(z[0]), self._blocks(g[0]))

    def _blocks(self, wide: torch.Tensor) -> list[torch.Tensor]:
        return [block[part.rows] for part, block in zip(self.parts, wide.split(self.ranks, dim=1), strict=True)]

    def _own(self, wide: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return own_columns(wide, self.pass_rows.whose, self.widths.whose, scales)


@compiled.Leaf
def own_columns(wide: torch.Tensor, whose_row: torch.Tensor, whose_column: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """wide [T, R] times scales [R] where row and column are of the same adapter, else 0."""
    return torch.where(whose_row.unsqueeze(1) == whose_column, wide * scales, 0).to(wide.dtype)


class _Grouped(_Loop):
    """torch.nn.functional.grouped_mm: rows in order, one group per adapter."""

    def __init__(self, parts: Sequence[LayerDelta], rows: PassRows) -> None:
        super().__init__(parts, rows)
        self.rank = -(-max(part.a.shape[0] for part in parts) // 8) * 8  # kernels want multiples of 16 bytes
        self.a = torch.stack([functional.pad(p.a, (0, 0, 0, self.rank - p.a.shape[0])) for p in parts])  # [K, r, in]
        self.b = torch.stack([functional.pad(p.b, (0, self.rank - p.b.shape[1])) for p in parts])  # [K, out, r]
        self.whole = slice(parts[0].start, parts[-1].stop)
        widths = rows.widths(parts)
        self.ends, self.factors = widths.ends, widths.factors.to(parts[0].a.dtype)

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


BACKENDS = {"loop": _Loop, "concatenated": _Concatenated, "grouped": _Grouped}


def has_grouped_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's grouped product is one kernel there."""
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) in _GROUPED_KERNEL


def add_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """total += scale * left right, the sum in total's precision; nothing where total is None."""
    if total is None:
        return
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    elif adds_mixed(total.device, left.dtype, total.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, alpha=scale, out=total)
    else:
        total.add_(left @ right, alpha=scale)


@lru_cache
def adds_mixed(device: torch.device, factors: torch.dtype, total: torch.dtype) -> bool:
    """Whether a product of half-precision factors is added to a more precise sum in one call: tried, on a GPU."""
    if device.type != "cuda":
        return False
    left = torch.arange(64, device=device).view(8, 8).to(factors)
    sums = torch.ones(8, 8, dtype=total, device=device)
    try:
        torch.addmm(sums, left, left, out_dtype=total, alpha=2.0, out=sums)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        if memory.is_out_of_memory(error):
            raise
        return False
    exact = left.cpu().double()
    return bool(torch.equal(sums.cpu().double(), 1 + 2 * exact @ exact))
