"""Attention of one new token per row on a CPU: two batched products, where the flash kernel is made for long queries.

Registered with Transformers under a name, so that its model files run unchanged; everything else stays `sdpa`.

Notation: R rows, H query heads, G key and value heads, S positions seen, D features of a head.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from loratune.downstream.answering.last_token import ONLY_LAST

NAME = "loratune_decoding"
_EXACT = (torch.float32, torch.float64)  # lower precision wants sums in a higher one


@contextlib.contextmanager
def decoding(model: PreTrainedModel) -> Iterator[None]:
    """While open, `model` attends with this function where it would use `sdpa`."""
    config, before = model.config, model.config._attn_implementation
    if before != "sdpa" or not model._supports_attention_backend:
        yield
        return
    AttentionInterface.register(NAME, decode_attention)
    AttentionMaskInterface.register(NAME, additive_mask)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def additive_mask(*args: Any, **options: Any) -> torch.Tensor | None:
    """`sdpa`'s mask; on a CPU as what is added to scores, made once a pass where its kernels make it once a layer."""
    mask = sdpa_mask(*args, **options)
    if mask is None or mask.device.type != "cpu":
        return mask
    return torch.zeros(mask.shape, dtype=options["dtype"]).masked_fill_(~mask, -torch.inf)


def decode_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' signature: query [R, H, 1, D], key and value [R, G, S, D] -> [R, 1, H, D]."""
    if getattr(module, ONLY_LAST, False) and query.shape[2] > 1:
        seen = None if attention_mask is None else attention_mask[:, :, -1:]
        out, _ = decode_attention(module, query[:, :, -1:], key, value, seen, scaling=scaling, **more)
        return functional.pad(out, (0, 0, 0, 0, query.shape[2] - 1, 0)), None
    plain = query.shape[2] == 1 and query.device.type == "cpu" and query.dtype in _EXACT and key.is_contiguous()
    if not plain or more.get("softcap") is not None or more.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    (rows, heads, _, width), groups = query.shape, key.shape[1]
    scaling = width**-0.5 if scaling is None else scaling
    q = (query * scaling).view(rows * groups, heads // groups, width)  # heads of a group side by side
    scores = torch.bmm(q, key.flatten(0, 1).transpose(1, 2)).view(rows, heads, 1, -1)
    if attention_mask is not None:
        scores += attention_mask
    weights = scores.softmax(-1).view(rows * groups, heads // groups, -1)
    return torch.bmm(weights, value.flatten(0, 1)).view(rows, 1, heads, width), None
