"""One adapter: its weights in flat storage, its optimiser, its clipping, and the PEFT folder it becomes.

All A's lie end to end in one vector, all B's in another, of whatever ranks; the matrices are views. So one AdamW step, one
norm and one copy to the arithmetic's precision each are a handful of operations. A factor that the method does not train
is such a vector too, without gradient and optimiser state.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from loratune.errors import NotPackableError
from loratune.finetune.dropout import DropoutKey
from loratune.finetune.methods import LORA, Method
from loratune.finetune.optimisation import clip, make_optimizer
from loratune.work import Hyperparameters, TrainingRecipe


class Adapter:
    """A trainable adapter for some linear layers of a model, of a method that has a `delta`.

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
        method: Method = LORA,
    ) -> None:
        """`dtype`: of the arithmetic, that is of the base model. Raises NotPackableError for a method without delta."""
        if method.delta is None:
            raise NotPackableError("its method has no low-rank delta")
        self.hyperparameters, self.dtype, self.max_grad_norm = h, dtype, training.max_grad_norm
        self.layers, self.method = dict(layers), method
        self.key = DropoutKey(seed)
        self.scale = method.delta.scale(h)
        master = torch.float64 if dtype == torch.float64 else torch.float32
        shapes_a = {name: (h.lora_r, wide) for name, (wide, _) in layers.items()}
        shapes_b = {name: (out, h.lora_r) for name, (_, out) in layers.items()}
        sides = {"lora_A": shapes_a, "lora_B": shapes_b}
        self.weights = {
            side: torch.zeros(sum(r * c for r, c in shapes.values()), dtype=master, device=device) for side, shapes in sides.items()
        }
        self.parameters = {side: nn.Parameter(self.weights[side]) for side in method.delta.trains}
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.a, self.b = (_views(self.weights[side], shapes) for side, shapes in sides.items())
        self.grad_a, self.grad_b = (
            _views(self.parameters[side].grad, shapes) if side in self.parameters else {} for side, shapes in sides.items()
        )
        for name, matrix in self.a.items():
            matrix.copy_(method.delta.initial_a(seed, name, *matrix.shape))
        self.optimizer = make_optimizer(self.parameters, h, training)
        self._working: dict[str, torch.Tensor] = {}
        self.work_a, self.work_b = self.a, self.b  # what the arithmetic reads
        if dtype != master:
            self._working = {side: flat.to(dtype) for side, flat in self.weights.items()}
            self.work_a, self.work_b = (_views(self._working[side], shapes) for side, shapes in sides.items())

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
            copy.copy_(self.weights[side])

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
        self._working, self.weights = {}, {}

    @property
    def size(self) -> int:
        """How many weights it has, trained or not."""
        return sum(flat.numel() for flat in self.weights.values())

    @property
    def finite(self) -> torch.Tensor:
        """Whether all its trained weights are: a bool on the device."""
        return torch.stack([p.detach().isfinite().all() for p in self.parameters.values()]).all()

    def save(self, folder: Path, model: nn.Module) -> None:
        """Write an ordinary PEFT folder. Raises StorageError."""
        weights = {f"base_model.model.{name}.lora_A.weight": matrix for name, matrix in self.a.items()}
        weights |= {f"base_model.model.{name}.lora_B.weight": matrix for name, matrix in self.b.items()}
        self.method.save(folder, self.method.config(model, self.hyperparameters), weights)


def _views(flat: torch.Tensor | None, shapes: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """The matrices of these shapes that lie end to end in `flat`."""
    assert flat is not None  # noqa: S101  # for the type checker: a gradient is made in __init__
    pieces = flat.split([rows * columns for rows, columns in shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
