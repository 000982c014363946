"""Dropout whose mask is a pure function of where it is applied, not of a generator's state.

The mask's bit at one element is a hash of (trial seed, optimiser step, module name, owner of the token in the
global batch, position of the token in the example, feature). The owner is the index of an example: where several share a
prefix, the same one for all (data/shared_prefix.py). So it is the same on CPU and GPU, for every
micro-batch size, padding and number of processes, and when activation checkpointing runs a layer again.

Notation: B examples, T positions, D features; owner and position give a row its 32-bit row hash.

    row[b, t]     = mix(mix(owner[b, t]) ^ position[t])                 once per micro-batch
    hash[b, t, d] = mix(mix(row[b, t] ^ key) + d * 0x9E3779B9)      key = 32 bits of sha256(seed, step, module)
    keep[b, t, d] = hash / 2^32 >= p

`mix` is Wellons' lowbias32 (nullprogram.com/blog/2018/07/31), in int32 arithmetic that wraps around.
"""

import hashlib
from functools import lru_cache

import torch
from torch import nn

from loratune.errors import ModelError
from loratune.finetune import compiled

_GOLDEN = 0x9E3779B9 - 2**32  # 2^32 / golden ratio, as int32
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32  # lowbias32's multipliers


class DropoutKey:
    """Where training stands: shared by all dropout modules of one trial, set before every forward pass.

    It must not change between a forward pass and its backward pass.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step = 0
        self.rows: torch.Tensor | None = None  # int32 [B, T]

    def set(self, step: int, owners: torch.Tensor, positions: torch.Tensor) -> None:
        """`step` counts from 0; `owners` [B, T] or [B, 1] and `positions` [T] or [B, T] broadcast to a row per token."""
        self.step = step
        self.rows = row_hashes(owners, positions)

    def of(self, module: str) -> int:
        """The key of one module at this step, as int32."""
        digest = hashlib.sha256(f"dropout/{self.seed}/{self.step}/{module}".encode()).digest()
        return int.from_bytes(digest[:4], "little", signed=True)


class KeyedDropout(nn.Module):
    """Inverted dropout, keyed: y = x * keep / (1 - p). x [..., D], one row per token of `key.rows`.

    p = 0 is the identity; p = 1 gives zeros, so that the adapter is silent. Raises ModelError where the
    rows of x are not the tokens of the batch (experts that see a selection of tokens).
    """

    def __init__(self, p: float, module: str, key: DropoutKey) -> None:
        super().__init__()
        self.p, self.module, self.key = p, module, key

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p <= 0:
            return x
        if self.p >= 1:
            return torch.zeros_like(x)
        rows = self.key.rows
        if rows is None or rows.numel() != x.shape[:-1].numel():
            raise ModelError(
                f"module {self.module} does not see the batch's tokens one by one, so its LoRA dropout cannot be keyed to them. "
                "Leave it out of target_modules, or set lora_dropout to 0."
            )
        keep = keep_mask(rows.view(x.shape[:-1]), self.key.of(self.module), x.shape[-1], self.p, x.dtype)
        return x * keep * (1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def row_hashes(owners: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A hash per token of (its owner, its position), int32, of the shape to which both broadcast."""
    return _mix(_mix(owners.to(torch.int32)) ^ positions.to(torch.int32))


def keep_mask(rows: torch.Tensor, key: int, features: int, p: float, dtype: torch.dtype) -> torch.Tensor:
    """A mask to multiply by: [..., features] for row hashes [...]; 0 with probability p, to 2^-32, else 1.

    Bool on a GPU, where a product converts it on the way; of `dtype` on CPU, where that is five times faster.
    """
    if compiled.on_gpu(rows):
        words = [torch.full((1,), word, dtype=torch.int32, device=rows.device) for word in (key, threshold(p))]
        return keep_of_rows(rows.flatten(), *words, columns_of(features, rows.device)).view(*rows.shape, features)
    hashes = _mix(_mix(rows ^ key).unsqueeze(-1) + columns_of(features, rows.device))
    return hashes.ge_(threshold(p)).to(dtype)


def threshold(p: float) -> int:
    """The least hash, as int32, that is kept."""
    return min(round(p * 2**32) - 2**31, 2**31 - 1)


@compiled.Leaf
def keep_of_rows(rows: torch.Tensor, keys: torch.Tensor, thresholds: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """What is kept of rows with hashes int32 [T], each under a key and a threshold of its own, int32 [T] or [1]: bool [T, D]."""
    return _mix(_mix(rows ^ keys).unsqueeze(-1) + columns) >= thresholds.unsqueeze(-1)


@compiled.Leaf
def kept(
    x: torch.Tensor, rows: torch.Tensor, whose: torch.Tensor, keys: torch.Tensor, thresholds: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """x [T, D] where it is kept, else 0, for all adapters of a pass: row t under the key and threshold, int32 [S], of `whose[t]`."""
    hashes = _mix(_mix(rows ^ keys[whose]).unsqueeze(-1) + columns)
    return torch.where(hashes >= thresholds[whose].unsqueeze(-1), x, 0)


@compiled.Leaf
def both_kept(
    x: torch.Tensor,
    g: torch.Tensor,
    rows: torch.Tensor,
    whose: torch.Tensor,
    keys: torch.Tensor,
    thresholds: torch.Tensor,
    columns: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kept` of two tensors under one mask, computed once."""
    keep = _mix(_mix(rows ^ keys[whose]).unsqueeze(-1) + columns) >= thresholds[whose].unsqueeze(-1)
    return torch.where(keep, x, 0), torch.where(keep, g, 0)


@lru_cache(maxsize=64)
def columns_of(features: int, device: torch.device) -> torch.Tensor:
    return torch.arange(features, dtype=torch.int32, device=device) * _GOLDEN


def _mix(h: torch.Tensor) -> torch.Tensor:
    """lowbias32, elementwise. The masks undo the sign extension of int32's right shift."""
    h = h.clone()
    t = torch.empty_like(h)
    for shift, multiplier in ((16, _FIRST), (15, _SECOND), (16, None)):
        torch.bitwise_right_shift(h, shift, out=t)
        h.bitwise_xor_(t.bitwise_and_((1 << (32 - shift)) - 1))
        if multiplier is not None:
            h.mul_(multiplier)
    return h
