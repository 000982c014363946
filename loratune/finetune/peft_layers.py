"""The LoRA layers that PEFT puts into a model: finding them, taking them out, and asking which ones it would make.

What PEFT makes of the layers that are chosen is asked of PEFT itself before anything is trained. For some
mixture-of-experts models it takes names such as `gate_proj` for the experts of an older layout of the model: it drops the
linear layers of that name and puts adapters of its own on the fused experts instead (PEFT 0.21,
`peft/utils/transformers_weight_conversion.py`). Whatever was trained on such layers would be lost in loading.
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from loratune.errors import ModelError

ADAPTER = "default"  # PEFT's name of the one adapter
_known: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, ...], tuple[str, ...]]]" = weakref.WeakKeyDictionary()


def addressable(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Those of `layers`, by their full names and in their order, whose trained weights plain PEFT would load onto the same layers.

    `model` is the bare model, also one on torch's meta device; it is as before afterwards. Costs a fraction of a second for
    the first question about the same layers, and no memory.
    """
    asked = _known.setdefault(model, {})
    key = tuple(layers)
    if key not in asked:
        asked[key] = key if _loads(model, key) else _by_name(model, key)
    return list(asked[key])


def refuse_lost(wanted: str, lost: Sequence[str]) -> None:
    """Raise the ModelError for layers that were asked for and of which none, or not all, are addressable."""
    raise ModelError(
        f"target_modules: {wanted!r}: PEFT does not load adapters of {_leaves(lost)} on this model. In a mixture of experts it maps "
        "such names to the fused experts. Choose other layers: qv, qkvo, or the attention's own names."
    )


def lost_line(wanted: str, lost: Sequence[str]) -> str:
    """A line on the layers that a named set leaves out."""
    return f"target_modules {wanted}: {_leaves(lost)} ({len(lost)} layers) left out: PEFT does not load their adapters on this model"


def detach(model: nn.Module) -> None:
    """Take every adapter off the base model, in place, also one that `attach` left half attached."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, child.get_base_layer())
    model.__dict__.pop("peft_config", None)
    model.requires_grad_(False)
    model.eval()


def lora_layers(wrapped: nn.Module) -> Iterator[tuple[str, Any]]:
    """Each LoRA layer with its module's name in the base model, in the model's order."""
    for name, module in wrapped.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            yield name.removeprefix("base_model.model."), module


def _by_name(model: nn.Module, layers: Sequence[str]) -> tuple[str, ...]:
    """Ask for the layers of each name by themselves, then for all that are left together."""
    names: dict[str, list[str]] = {}
    for layer in layers:
        names.setdefault(layer.rpartition(".")[2], []).append(layer)
    kept = {layer for same in names.values() if _loads(model, same) for layer in same}
    found = tuple(layer for layer in layers if layer in kept)
    return found if _loads(model, found) else ()


def _loads(model: nn.Module, layers: Sequence[str]) -> bool:
    """Whether PEFT makes adapters for exactly these layers, and finds each one's weights under its name."""
    if not layers:
        return False
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=1, lora_alpha=1, target_modules=list(layers))
    try:
        peft.inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=True)
        made = dict(lora_layers(model))
        if set(made) != set(layers) or any(layer.scaling[ADAPTER] != 1 or layer.r[ADAPTER] != 1 for layer in made.values()):
            return False
        weights = {
            f"base_model.model.{name}.lora_{side}.weight": torch.empty_like(getattr(layer, f"lora_{side}")[ADAPTER].weight)
            for name, layer in made.items()
            for side in "AB"
        }
        result: Any = peft.set_peft_model_state_dict(model, weights, ADAPTER, low_cpu_mem_usage=True)
        return not result.unexpected_keys and not any(".lora_" in name for name in result.missing_keys)
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError):  # PEFT's ways to say no, and to fall over
        return False
    finally:
        detach(model)


def _leaves(layers: Sequence[str]) -> str:
    return ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
