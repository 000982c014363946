"""How large an adapter will be, told before it is trained: from the model's config alone, no weights read."""

from collections.abc import Callable

import torch

from loratune.finetune.methods import LORA, Method
from loratune.finetune.model import bare_model
from loratune.finetune.targets import chosen_layers
from loratune.work import Hyperparameters, ModelRecipe


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
