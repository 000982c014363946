"""RMS norms on a CPU with fewer steps over memory: a frozen weight needs no gradient, and nothing but x and r is kept.

    r = 1 / sqrt(mean(x^2) + eps)       y = w r x
    dx = r (w dy) - x r^3 mean(x w dy)                                                  (Zhang & Sennrich 2019, eq. 4)

Transformers' norms take about six steps forward and ten back. Some families multiply by the weight, Gemma by 1 + weight:
which is tried, and a norm that is neither is left as it is.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Forward = Callable[[torch.Tensor], torch.Tensor]
_EXACT = (torch.float32, torch.float64)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D], weight [D] -> [..., D]; differentiable in x."""
    return _RmsNorm.apply(x, weight, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, r = ctx.saved_tensors
        g = grads[0] * weight
        along = torch.linalg.vecdot(g, x, dim=-1).unsqueeze(-1).mul_(r * r * r).div_(-x.shape[-1])
        return g.mul_(r).addcmul_(x, along), None, None


def quick_norms(model: nn.Module) -> Iterator[tuple[nn.Module, Forward]]:
    """The norms of `model` that `rms_norm` can stand for, each with a forward function."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if type(module).__name__.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and weight.dim() == 1 and isinstance(eps, float):
            factor = _factor(module, weight.detach(), eps)
            if factor is not None:
                yield module, lambda x, factor=factor, eps=eps: rms_norm(x, factor, eps)  # type: ignore[misc]


def _factor(module: nn.Module, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
    """What the module multiplies by."""
    if weight.device.type != "cpu" or weight.dtype not in _EXACT:
        return None
    x = torch.linspace(-1, 2, 2 * len(weight), dtype=weight.dtype).view(2, -1)
    with torch.no_grad():
        wanted = module(x)
        return next((factor for factor in (weight, 1 + weight) if torch.allclose(rms_norm(x, factor, eps), wanted, rtol=1e-5)), None)
