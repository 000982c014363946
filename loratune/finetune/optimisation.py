"""What one optimiser step means, the same in every engine: learning rate, AdamW, clipping.

The gradient of a step is that of its summed NLL over the response tokens of the global batch, divided by their number
(not a mean of micro-batch means): see `validation.py`.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from loratune.errors import ModelError
from loratune.work import Hyperparameters, TrainingRecipe

HALF_PRECISION_SCALE = 1024.0  # multiplies the loss where activations' gradients are float16, which would underflow


def warmup_steps(warmup_ratio: float, total_steps: int) -> int:
    """Steps of linear warmup: round(warmup_ratio * total_steps)."""
    return round(warmup_ratio * total_steps)


def learning_rate_factor(kind: str, step: int, warmup: int, total_steps: int) -> float:
    """Share of the peak learning rate with which step `step` (from 0) is taken; Transformers' schedules.

        step < warmup: step / warmup            after, with u = (step - warmup) / (total_steps - warmup):
        cosine: (1 + cos(pi u)) / 2             linear: 1 - u             constant: 1

    Raises ModelError for another kind.
    """
    if step < warmup:
        return step / warmup
    u = (step - warmup) / max(1, total_steps - warmup)
    if kind == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * u)))
    if kind == "linear":
        return max(0.0, 1.0 - u)
    if kind == "constant":
        return 1.0
    raise ModelError(f"lr_scheduler_type: {kind!r} is not known; allowed: cosine, linear, constant.")


def make_optimizer(parameters: Mapping[str, nn.Parameter], h: Hyperparameters, training: TrainingRecipe) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over the adapter, weight decay on all of it.

    With LoRA+ (Hayou et al. 2024, arXiv 2402.12354) the B matrices learn `loraplus_lr_ratio` times as fast as the A's.
    Each group's `initial_lr` is its peak learning rate.
    """
    sides: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in parameters.items():
        sides["lora_B" in name and h.loraplus_lr_ratio != 1].append(parameter)
    rates = {False: h.learning_rate, True: h.learning_rate * h.loraplus_lr_ratio}
    return torch.optim.AdamW(
        [{"params": side, "lr": rates[is_b], "initial_lr": rates[is_b]} for is_b, side in sides.items() if side],
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        weight_decay=h.weight_decay,
        fused=True,
    )


def clip(parameters: Iterable[nn.Parameter], max_norm: float | None, scale: float = 1.0) -> torch.Tensor:
    """Divide one adapter's gradients by `scale`, clip them to a global norm of `max_norm`; returns the norm before.

    A non-finite norm leaves the gradients non-finite: the caller must look at it before the optimiser step.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if scale != 1.0:
        torch._foreach_div_(gradients, scale)
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm
