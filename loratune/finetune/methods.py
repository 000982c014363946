"""A method of adapting a frozen model: what both engines ask of it. LoRA is the only one so far.

The `hf` engine trains whatever a method attaches through PEFT. The `packed` engine trains methods whose change of a linear
layer is a product of two factors; without a `delta`, `hf` trains. A new method is one file that adds itself to `METHODS`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loratune.errors import ModelError
from loratune.finetune import lora
from loratune.finetune.dropout import DropoutKey
from loratune.work import Hyperparameters


@dataclass(frozen=True, kw_only=True)
class LowRankDelta:
    """y += scale * B A dropout(x), as the packed engine computes it (packed/delta.py). B [out, r] is 0 at the beginning."""

    scale: Callable[[Hyperparameters], float]
    initial_a: Callable[[int, str, int, int], torch.Tensor]  # (seed, module, r, in) -> float32 [r, in]
    trains: tuple[str, ...] = ("lora_A", "lora_B")  # the other factor stays as it is


@dataclass(frozen=True, kw_only=True)
class Method:
    """Functions of a method. Each raises ModelError for a model or hyperparameters that it does not fit."""

    config: Callable[[nn.Module, Hyperparameters], Any]  # PEFT's description of the adapter, for adapter_config.json
    size: Callable[[Iterable[tuple[int, int]], Hyperparameters], int]  # trainable parameters on layers of these (in, out) features
    attach: Callable[[Any, Hyperparameters, int], tuple[Any, DropoutKey]]  # (model, h, seed) -> (PEFT model, key of its dropout)
    save: Callable[[Path, Any, Mapping[str, torch.Tensor]], None]  # (folder, config, weights by their names in the file)
    delta: LowRankDelta | None = None


LORA = Method(
    config=lora.peft_config,
    size=lora.adapter_size,
    attach=lora.attach,
    save=lora.save_adapter,
    delta=LowRankDelta(scale=lora.scale, initial_a=lora.initial_a),
)
METHODS = {"lora": LORA}


def method_named(name: str) -> Method:
    """Raises ModelError for a name that is not in `METHODS`."""
    if name not in METHODS:
        raise ModelError(f"method: {name!r} is not known; allowed: {', '.join(METHODS)}.")
    return METHODS[name]
