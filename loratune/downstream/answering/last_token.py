"""In a pass over prompts that is read at the last position alone, the last layer works on that position alone.

Keys and values of the layer are still those of all positions. A model with few layers saves much of its work so.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

ONLY_LAST = "loratune_only_last"  # set on a module whose attention is asked for the last position


class LastTokenOnly:
    """Finds what of the last layer of `model` works on each position by itself; nothing in a model that names it otherwise."""

    def __init__(self, model: Any) -> None:
        layers = getattr(model.get_decoder(), "layers", None)
        last = layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None
        self._attention = getattr(last, "self_attn", None)
        parts = [getattr(self._attention, "o_proj", None), getattr(last, "mlp", None)]
        self._parts = [part for part in parts if part is not None and _linear(part)]

    @contextlib.contextmanager
    def last_position(self) -> Iterator[None]:
        """While open, the last position's output of these parts is right, the others' is 0."""
        hooks = [part.register_forward_pre_hook(_last_token) for part in self._parts]
        widths: list[int] = []
        for part in self._parts:
            hooks.append(part.register_forward_pre_hook(lambda _, arguments: widths.append(arguments[0].shape[1]), prepend=True))
            hooks.append(part.register_forward_hook(lambda _, __, y: functional.pad(y, (0, 0, widths.pop() - 1, 0))))
        if self._attention is not None:
            setattr(self._attention, ONLY_LAST, True)
        try:
            yield
        finally:
            if self._attention is not None:
                delattr(self._attention, ONLY_LAST)
            for hook in hooks:
                hook.remove()


def _last_token(_: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (arguments[0][:, -1:].contiguous(),)


def _linear(part: nn.Module) -> bool:
    """Whether all its weights are those of linear layers: no experts, which count and route tokens."""
    return all(isinstance(module, nn.Linear) for module in part.modules() if next(module.parameters(recurse=False), None) is not None)
