"""Rotary positions with fewer steps over memory than Transformers' models take.

    y = [x1 cos - x2 sin, x2 cos + x1 sin]        x = [x1, x2], halves of a head's features     (Su et al. 2021, eq. 34)
    dx = [g1 cos + g2 sin, g2 cos - g1 sin]

The models' files call a function of their own for it, which bears one name in all of them. Where it is found to do just
this, ours stands in its place while an attention layer of the packed model runs: no other model meets it.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from loratune.finetune.compiled import Leaf

_NAME = "apply_rotary_pos_emb"
Function = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class _Rotated(torch.autograd.Function):
    """x [1, H, T, D], cos and sin [1, 1, T, D] -> [1, H, T, D]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turned_back(grads[0], cos, sin), None, None


@Leaf
def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return _turn(x, cos, sin, 1)


@Leaf
def _turned_back(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return _turn(x, cos, sin, -1)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, way: int) -> torch.Tensor:
    """Forward for `way` 1, back for -1."""
    half = x.shape[-1] // 2
    y, (x1, x2), (sin1, sin2) = x * cos, x.split(half, -1), sin.split(half, -1)
    y[..., :half].addcmul_(x2, sin1, value=-way)
    y[..., half:].addcmul_(x1, sin2, value=way)
    return y


def quick_rotary(model: nn.Module) -> list[RemovableHandle]:
    """Hook it into the attention layers of `model`; into none where the function of its file does something else."""
    namespace: Any = sys.modules[type(model).__module__]
    original: Function | None = getattr(namespace, _NAME, None)
    if original is None or not _same(original):
        return []

    def enter(*_: Any) -> None:
        setattr(namespace, _NAME, _standing_for(original))

    def leave(*_: Any) -> None:
        setattr(namespace, _NAME, original)

    handles = []
    for module in model.modules():
        if type(module).__module__ == namespace.__name__ and type(module).__name__.endswith("Attention"):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    return handles


def _same(original: Function) -> bool:
    q, angles = torch.linspace(-1, 2, 24).view(1, 2, 3, 4), torch.linspace(0, 1, 6).view(1, 3, 2).repeat(1, 1, 2)
    try:
        wanted, got = (function(q, q[:, :1], angles.cos(), angles.sin()) for function in (original, _standing_for(original)))
        return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(wanted, got, strict=True))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False


def _standing_for(original: Function) -> Function:
    def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **options: Any) -> Any:
        plain = q.dtype == k.dtype == cos.dtype and q.shape[-1] == cos.shape[-1]
        if more or options or not plain:
            return original(q, k, cos, sin, *more, **options)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return _Rotated.apply(q, cos, sin), _Rotated.apply(k, cos, sin)

    return rotary
