"""Causal attention by torch's variable-length kernel, which is flash attention: on a GPU, in half precision.

torch.nn.attention.varlen.varlen_attn took `is_causal` and no scale in torch 2.10, `scale` and `window_size` in 2.11, and
`enable_gqa` from 2.12 on. So its signature is read, and what it cannot be told is done to its inputs.

Notation: T tokens of all sequences, H query heads, G key and value heads, D features of a head.
"""

import inspect
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from loratune.finetune.memory import is_out_of_memory

_HALF = (torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # compute capability (Ampere) of the first devices that run it
_WIDEST = 256  # features of a head


def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the kernel computes attention of such inputs, [T, H, D] and [T, G, D], here, forward and backward."""
    if not q.is_cuda or q.dtype not in _HALF or not q.dtype == k.dtype == v.dtype or not q.shape[2] == k.shape[2] == v.shape[2]:
        return False
    return _tried(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[2])


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scaling: float | None
) -> torch.Tensor:
    """q [T, H, D], k and v [T, G, D] -> [T, H, D]; each sequence sees itself.

    `starts` int32 [sequences + 1]: where each begins, and T; `longest`: tokens of the longest; `scaling`: by default 1 / sqrt(D).
    """
    from torch.nn.attention.varlen import varlen_attn

    known, (heads, features), groups = _parameters(varlen_attn), q.shape[1:], k.shape[1]
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "scale" in known:
        options["scale"] = scaling
    elif scaling is not None:
        q = q * (scaling * math.sqrt(features))
    if heads != groups and "enable_gqa" in known:
        options["enable_gqa"] = True
    elif heads != groups:
        k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    return varlen_attn(q.contiguous(), k.contiguous(), v.contiguous(), starts, starts, longest, longest, **options)  # type: ignore[return-value]


@lru_cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@lru_cache
def _tried(device: torch.device, dtype: torch.dtype, heads: int, groups: int, features: int) -> bool:
    """Whether two short sequences go through, forward and backward: builds without the kernel, or for ROCm, differ in what they take."""
    if features % 8 or features > _WIDEST or (torch.version.hip is None and torch.cuda.get_device_capability(device) < _OLDEST):
        return False
    try:
        with torch.enable_grad():
            q, k, v = (torch.zeros(5, n, features, dtype=dtype, device=device, requires_grad=True) for n in (heads, groups, groups))
            starts = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
            torch.autograd.grad(varlen_attention(q, k, v, starts, 3, None).sum(), (q, k, v))
    except (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return False
    return True
