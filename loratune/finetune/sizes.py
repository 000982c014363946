"""How large an adapter will be, told before it is trained: from the model's config alone, no weights read."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

from loratune.errors import ModelError
from loratune.finetune.methods import LORA, Method
from loratune.finetune.targets import chosen_layers
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


def adapter_sizes(recipe: ModelRecipe, method: Method = LORA) -> Callable[[Hyperparameters], int]:
    """A function that gives an adapter's number of trainable parameters.

    The layers are those that training will choose. Raises ModelError for a model that cannot be built; the function does for
    target modules that it does not have.
    """
    model = bare_model(recipe)
    shapes: dict[str | tuple[str, ...], list[tuple[int, int]]] = {}

    def size(h: Hyperparameters) -> int:
        if h.target_modules not in shapes:
            chosen = [model.get_submodule(layer) for layer in chosen_layers(model, h.target_modules)]
            weights = [layer.weight.T if isinstance(layer, torch.nn.Linear) else layer.weight for layer in chosen]  # [in, out]
            shapes[h.target_modules] = [(weight.shape[0], weight.shape[1]) for weight in weights]
        return method.size(shapes[h.target_modules], h)

    return size
