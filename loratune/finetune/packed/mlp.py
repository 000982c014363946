"""SwiGLU on a GPU with fewer steps over memory: one between the products forward, one back, and what lies between is not kept.

    h = silu(g) u           du = silu(g) dh           dg = silu'(g) u dh           g, u [..., F]     (Shazeer 2020, eq. 6)

An MLP of gate_proj, up_proj, down_proj and a SiLU is tried, and one that does anything else is left as it is. On a CPU
Transformers' two steps are as fast.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loratune.finetune import compiled
from loratune.finetune.memory import is_out_of_memory

_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_CLOSE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # relative to the largest; else 1e-5


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) up, differentiable in both."""
    return _Swiglu.apply(gate, up)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _gated_back(*ctx.saved_tensors, *grads)


@compiled.Leaf
def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate) * up


@compiled.Leaf
def _gated_back(gate: torch.Tensor, up: torch.Tensor, dh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = torch.sigmoid(gate)
    return dh * up * s * (1 + gate * (1 - s)), dh * gate * s


def quick_mlps(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]]:
    """The MLPs of `model` on a GPU that `swiglu` can stand in, each with a forward function."""
    for module in model.modules():
        weight = getattr(getattr(module, "up_proj", None), "weight", None)
        if {name for name, _ in module.named_children()} == _PARTS and isinstance(weight, torch.Tensor) and compiled.on_gpu(weight):
            forward = partial(_forward, module)
            if _same(module, forward):
                yield module, forward


def _forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x)))


def _same(mlp: Any, forward: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    wide = mlp.up_proj.in_features
    dtype = mlp.up_proj.weight.dtype if mlp.up_proj.weight.is_floating_point() else torch.bfloat16  # weights of four bits
    x = torch.linspace(-1, 2, 2 * wide, device=mlp.up_proj.weight.device).to(dtype).view(2, -1)
    try:
        with torch.no_grad():
            wanted, got = mlp(x), forward(x)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        return False
    return bool((wanted - got).abs().max() <= _CLOSE.get(dtype, 1e-5) * wanted.abs().max())
