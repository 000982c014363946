"""Which PEFT adapters are plain LoRA, the only kind that several can answer together. No torch."""

from collections.abc import Mapping
from typing import Any

_MORE = ("use_dora", "modules_to_save", "alpha_pattern", "rank_pattern", "trainable_token_indices")


def more_than_plain(config: Mapping[str, Any]) -> str:
    """What an adapter_config.json asks for beyond plain LoRA; empty where it is nothing."""
    more = [name for name in _MORE if config.get(name)]
    if more or config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        return ", ".join(more) or "another type"
    return ""
