"""The loss through a frozen output head, a tile of the vocabulary at a time.

    nll[n] = logsumexp(z[n]) - z[n, label[n]]        z = h W^T + bias
    d nll[n] / d h[n] = (softmax(z[n]) - onehot(label[n])) W

Since W is frozen, the gradient with respect to h is all that the backward pass needs, and it is known up to
the factor d loss / d nll[n] in the forward pass. Both sums over the vocabulary are taken tile by tile with a running
maximum, as flash attention does (Dao et al. 2022, arXiv 2205.14135, eq. 2): so each tile of logits is used while it is
in the cache, and none is kept. The idea of not keeping them is that of Cut Cross-Entropy and Liger's fused linear
cross-entropy (arXiv 2411.09009, 2410.10989). Products of half-precision factors are summed and kept in float32: a logit
of 20 rounded to bfloat16 is off by up to 0.06, and so would be the NLL.

Notation: N response tokens, D hidden features, V words; for the tiles so far m [N, 1] is the largest logit,
s [N, 1] the sum of e^(z - m), and g [N, D] the sum of e^(z - m) W.
"""

from typing import Any

import torch
from torch.nn import functional

_CPU_WORDS = 1024  # a tile's width; hundreds of rows of it stay in the cache
_GPU_LOGITS = 2**28  # a tile's size; one for all words, mostly


def frozen_head_nll(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    """NLL of `labels` [N], float32 or better, [N], differentiable in `hidden` [N, D]; `weight` is [V, D], `bias` [V]."""
    return _FrozenHeadNll.apply(hidden, weight, bias, labels, torch.is_grad_enabled() and hidden.requires_grad)


class _FrozenHeadNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, differentiable: bool
    ) -> torch.Tensor:
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        h, count = hidden.to(weight.dtype), len(labels)
        m = torch.full((count, 1), -torch.inf, dtype=exact, device=h.device)
        s = torch.zeros_like(m)
        g = torch.zeros(h.shape if differentiable else (), dtype=exact, device=h.device)
        width = _CPU_WORDS if h.device.type == "cpu" else max(1, _GPU_LOGITS // max(1, count))
        buffer = torch.empty(count * min(width, len(weight)), dtype=exact, device=h.device)
        with torch.autocast(h.device.type, enabled=False):
            for start in range(0, len(weight), width):
                w = weight[start : start + width]
                z = _product(h, w.T, out=buffer[: count * len(w)].view(count, len(w)))
                if bias is not None:
                    z += bias[start : start + width].to(exact)
                top = torch.maximum(m, z.amax(1, keepdim=True))
                z.sub_(top).exp_()
                shrink = (m - top).exp_()
                s.mul_(shrink).add_(z.sum(1, keepdim=True))
                if differentiable:
                    _add_product(g.mul_(shrink), z.to(weight.dtype), w)
                m = top
        own = functional.embedding(labels, weight)
        wanted = (h.to(exact) * own).sum(1)
        if bias is not None:
            wanted += bias[labels]
        if differentiable:
            ctx.save_for_backward(g.div_(s).sub_(own).to(hidden.dtype))
        return (m + s.log()).squeeze(1) - wanted

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0].unsqueeze(1)).to(gradient.dtype), None, None, None, None


def _product(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """left right, with sums and results in out's precision, which is the factors' own or float32."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if left.is_cuda and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(_product(left, right, out=torch.empty_like(total)))
