"""Which sequences may share a forward pass, where rotary frequencies follow the longest position in it.

Transformers takes them anew in each pass (`modeling_rope_utils.dynamic_rope_update`): LongRoPE has one set of factors up to
`original_max_position_embeddings` and another beyond (Ding et al. 2024, arXiv 2402.13753); dynamic NTK scales its base by
the pass's length beyond `max_position_embeddings`. So a short example beside a long one would be another function of its
tokens. Sequences of different sides never share a pass here, and each is computed as it would be alone. All other kinds
(default, linear, yarn, llama3) have constant frequencies: one side.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from loratune.data.batches import Sides, one_side

_SWITCHING = ("longrope", "su")  # su: LongRoPE's name in older configurations


@dataclass(frozen=True, kw_only=True)
class RopeSides:
    """A model's `Sides`: sequences of equal numbers may share a pass."""

    switch: int | None = None  # the longest sequence with the short factors
    grows: int | None = None  # beyond this length every length has frequencies of its own

    def __call__(self, lengths: np.ndarray) -> np.ndarray:
        lengths = np.asarray(lengths, dtype=np.int64)
        sides = np.zeros_like(lengths) if self.switch is None else (lengths > self.switch).astype(np.int64)
        return sides if self.grows is None else np.where(lengths > self.grows, 1 + lengths, sides)


def sides_of(config: Any) -> Sides:
    """Of a model's configuration."""
    config = config.get_text_config()
    switches: set[int | None] = set()
    growing: set[int | None] = set()
    for rope in _ropes(config):
        kind = str(rope.get("rope_type") or rope.get("type") or "default")
        if kind in _SWITCHING or "long_mscale" in rope:  # PhiMoE switches by its own code, whatever the kind
            switches.add(rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None))
        elif "dynamic" in kind:
            growing.add(getattr(config, "max_position_embeddings", None))
    switch, grows = (min((border for border in borders if border is not None), default=None) for borders in (switches, growing))
    return RopeSides(switch=switch, grows=grows) if switch is not None or grows is not None else one_side


def forget_lengths(model: nn.Module) -> None:
    """Make dynamic NTK a function of the present pass: Transformers' buffer keeps the frequencies of a longer pass before it."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if "dynamic" in (kinds if isinstance(kinds, str) else " ".join(kinds.values()) if isinstance(kinds, dict) else ""):
            module.register_forward_pre_hook(_as_loaded)


def _as_loaded(module: nn.Module, _: Any) -> None:
    own: Any = module
    prefixes = [f"{layer_type}_" for layer_type in own.rope_type] if isinstance(own.rope_type, dict) else [""]
    for prefix in prefixes:
        if getattr(own, f"{prefix}max_seq_len_cached", own.original_max_seq_len) != own.original_max_seq_len:
            original = getattr(own, f"{prefix}original_inv_freq").to(getattr(own, f"{prefix}inv_freq").device)
            own.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(own, f"{prefix}max_seq_len_cached", own.original_max_seq_len)


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """The rotary parameters of the model, or those of each type of its layers."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if isinstance(given, dict):
        inner = [value for value in given.values() if isinstance(value, dict)]
        yield from inner or [given]
