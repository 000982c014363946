"""How large an adapter will be, told before it is trained: from the model's config alone, no weights read."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

from loratune.errors import ModelError
from loratune.finetune.lora import chosen_layers
from loratune.system import hub
from loratune.work import Hyperparameters, ModelRecipe


def bare_model(recipe: ModelRecipe) -> Any:
    """The recipe's model without weights, on torch's meta device. Raises ModelError for one that cannot be built."""
    hub.refuse_adapter(recipe.name_or_path, recipe.revision)
    common: dict[str, Any] = {"trust_remote_code": recipe.trust_remote_code}
    try:
        with hub.asked_once(recipe.name_or_path):
            config = transformers.AutoConfig.from_pretrained(recipe.name_or_path, revision=recipe.revision or "main", **common)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, **common)
    except Exception as error:  # Transformers and the hub have many
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model {recipe.name_or_path!r}: cannot tell its layers: {type(error).__name__}: {reason}.") from error


def adapter_sizes(recipe: ModelRecipe) -> Callable[[Hyperparameters], int]:
    """A function that gives an adapter's number of trainable parameters: r x the sum of (in + out) over its layers.

    The layers are those that training will choose. Raises ModelError for a model that cannot be built; the function does for
    target modules that it does not have.
    """
    model = bare_model(recipe)
    sums: dict[str | tuple[str, ...], int] = {}

    def size(h: Hyperparameters) -> int:
        if h.target_modules not in sums:
            shapes = [model.get_submodule(layer).weight.shape for layer in chosen_layers(model, h.target_modules)]
            sums[h.target_modules] = sum(rows + columns for rows, columns in shapes)
        return h.lora_r * sums[h.target_modules]

    return size
