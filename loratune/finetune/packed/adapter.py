"""One adapter: its weights in flat storage, its optimiser, its clipping, and the PEFT folder it becomes.

All A's lie end to end in one vector, all B's in another, of whatever ranks; the matrices are views. So one
AdamW step, one norm and one copy to the arithmetic's precision each are a handful of operations.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from loratune.finetune import lora
from loratune.finetune.dropout import DropoutKey
from loratune.finetune.optimisation import clip, make_optimizer
from loratune.work import Hyperparameters, TrainingRecipe


class Adapter:
    """A trainable LoRA adapter for some linear layers of a model.

    `layers` maps the name of each to its (in, out) features. Master weights are float32, or float64 on a float64 base.
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[int, int]],
        h: Hyperparameters,
        seed: int,
        training: TrainingRecipe,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`dtype`: of the arithmetic, that is of the base model."""
        self.hyperparameters, self.dtype, self.max_grad_norm = h, dtype, training.max_grad_norm
        self.layers = dict(layers)
        self.key = DropoutKey(seed)
        self.scale = lora.scale(h)
        master = torch.float64 if dtype == torch.float64 else torch.float32
        shapes_a = {name: (h.lora_r, wide) for name, (wide, _) in layers.items()}
        shapes_b = {name: (out, h.lora_r) for name, (_, out) in layers.items()}
        self.parameters = {
            side: nn.Parameter(torch.zeros(sum(r * c for r, c in shapes.values()), dtype=master, device=device))
            for side, shapes in (("lora_A", shapes_a), ("lora_B", shapes_b))
        }
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.a, self.b = self._views(shapes_a, shapes_b, lambda p: p.data)
        self.grad_a, self.grad_b = self._views(shapes_a, shapes_b, lambda p: p.grad)
        for name, matrix in self.a.items():
            matrix.copy_(lora.initial_a(seed, name, *matrix.shape))
        self.optimizer = make_optimizer(self.parameters, h, training)
        self._working: dict[str, torch.Tensor] = {}
        self.work_a, self.work_b = self.a, self.b  # what the arithmetic reads
        if dtype != master:
            self._working = {side: p.data.to(dtype) for side, p in self.parameters.items()}
            self.work_a, self.work_b = self._views(shapes_a, shapes_b, lambda p: self._working[self._side(p)])

    def clip(self, scale: float) -> torch.Tensor:
        """Divide the gradients by `scale` and clip them to `max_grad_norm`; returns the norm before."""
        return clip(self.parameters.values(), self.max_grad_norm, scale)

    def update(self, factor: float) -> None:
        """One AdamW step at `factor` times the peak learning rate; gradients are zero afterwards."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.step()
        self.forget_gradients()
        self.refresh()

    def refresh(self) -> None:
        """Bring the arithmetic's copy up to date with the master weights."""
        for side, copy in self._working.items():
            copy.copy_(self.parameters[side].data)

    def forget_gradients(self) -> None:
        for parameter in self.parameters.values():
            assert parameter.grad is not None  # noqa: S101  # for the type checker; made in __init__
            parameter.grad.zero_()

    def release(self) -> None:
        """Give its memory back at once, whoever still refers to it. It is of no use afterwards."""
        self.optimizer.state.clear()
        for parameter in self.parameters.values():
            parameter.grad, parameter.data = None, parameter.data.new_empty(0)
        self.a = self.b = self.work_a = self.work_b = self.grad_a = self.grad_b = {}
        self._working = {}

    @property
    def size(self) -> int:
        """How many parameters it has."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.parameters.values())

    def save(self, folder: Path, model: nn.Module) -> None:
        """Write an ordinary PEFT folder. Raises StorageError."""
        tensors = {f"{name}.lora_A.weight": matrix for name, matrix in self.a.items()}
        tensors |= {f"{name}.lora_B.weight": matrix for name, matrix in self.b.items()}
        lora.save_folder(folder, model, self.hyperparameters, tensors)

    def _views(self, shapes_a, shapes_b, data):  # type: ignore[no-untyped-def]
        return tuple(
            {
                name: piece.view(shape)
                for (name, shape), piece in zip(
                    shapes.items(), data(self.parameters[side]).split([r * c for r, c in shapes.values()]), strict=True
                )
            }
            for side, shapes in (("lora_A", shapes_a), ("lora_B", shapes_b))
        )

    def _side(self, parameter: nn.Parameter) -> str:
        return next(side for side, p in self.parameters.items() if p is parameter)
