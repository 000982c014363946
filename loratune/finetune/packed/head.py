"""The loss through a frozen output head, a chunk of logits at a time.

    nll[n] = logsumexp(z[n]) - z[n, label[n]]        z = h W^T + bias
    d nll[n] / d h[n] = (softmax(z[n]) - onehot(label[n])) W

Since W is frozen, the gradient with respect to h is all that the backward pass needs, and it is known up to
the factor d loss / d nll[n] in the forward pass: so the logits [N, V] are never kept, only a gradient [N, D].
The idea is that of Cut Cross-Entropy and Liger's fused linear cross-entropy (arXiv 2411.09009, 2410.10989).

Notation: N response tokens, D hidden features, V words.
"""

from typing import Any

import torch
from torch.nn import functional

_CHUNK = {"cpu": 2**22, "cuda": 2**28}  # float32 logits at a time; on CPU such as stay in the cache


def frozen_head_nll(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    """NLL of `labels` [N], float32 or better, [N], differentiable in `hidden` [N, D]; `weight` is [V, D], `bias` [V]."""
    return _FrozenHeadNll.apply(hidden, weight, bias, labels, torch.is_grad_enabled() and hidden.requires_grad)


class _FrozenHeadNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, differentiable: bool
    ) -> torch.Tensor:
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        nll = torch.empty(len(labels), dtype=exact, device=hidden.device)
        gradient = torch.empty_like(hidden) if differentiable else None
        rows = max(1, _CHUNK.get(hidden.device.type, _CHUNK["cuda"]) // len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(labels), rows):
                part, label = hidden[start : start + rows], labels[start : start + rows, None]
                z = functional.linear(part.to(weight.dtype), weight, bias).to(exact)
                total = z.logsumexp(dim=-1, keepdim=True)
                nll[start : start + rows] = (total - z.gather(1, label)).squeeze(1)
                if gradient is not None:
                    p = z.sub_(total).exp_()  # softmax, in place
                    p.scatter_add_(1, label, torch.full_like(total, -1.0))
                    gradient[start : start + rows] = p.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0].unsqueeze(1)).to(gradient.dtype), None, None, None, None
