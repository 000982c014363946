"""RMS norms with fewer steps over memory: a frozen weight needs no gradient, and nothing but x and r is kept.

    r = 1 / sqrt(mean(x^2) + eps)       y = w r x
    dx = r (w dy) - x r^3 mean(x w dy)                                                  (Zhang & Sennrich 2019, eq. 4)

Transformers' norms take about six steps forward and ten back; here a GPU takes one each. Some families
multiply by the weight, Gemma by 1 + weight: which is tried, and a norm that is neither is left as it is.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from loratune.finetune.compiled import Leaf

Forward = Callable[[torch.Tensor], torch.Tensor]
_CLOSE = {torch.float16: 1e-2, torch.bfloat16: 3e-2}  # relative; else 1e-5


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D], weight [D] -> [..., D]; differentiable in x."""
    return _RmsNorm.apply(x, weight, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y, r = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _normed_back(*ctx.saved_tensors, *grads), None, None


@Leaf
def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, r), r in float32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * r).mul_(weight).to(x.dtype), r


@Leaf
def _normed_back(x: torch.Tensor, weight: torch.Tensor, r: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    wide = x.to(r.dtype)
    g = dy.to(r.dtype) * weight
    along = torch.linalg.vecdot(g, wide, dim=-1).unsqueeze(-1).mul_(r * r * r).div_(-x.shape[-1])
    return g.mul_(r).addcmul_(wide, along).to(x.dtype)


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
    if not weight.is_floating_point():
        return None
    x = torch.linspace(-1, 2, 2 * len(weight), dtype=torch.float32, device=weight.device).to(weight.dtype).view(2, -1)
    exact = torch.promote_types(weight.dtype, torch.float32)
    close = _CLOSE.get(weight.dtype, 1e-5)
    with torch.no_grad():
        wanted, factors = module(x), (weight, 1 + weight.to(exact))
        return next((factor for factor in factors if torch.allclose(rms_norm(x, factor, eps), wanted, rtol=close)), None)
