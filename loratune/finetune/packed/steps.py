"""A pass and the optimiser steps of several slots: a device is asked twice, whether gradients are finite and whether weights are."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from loratune.data.tasks import TrainingTask
from loratune.finetune import memory
from loratune.finetune.failures import DivergedError, fits, ran_out
from loratune.finetune.packed.base import PackedBase
from loratune.finetune.packed.layout import Flat, Layouts, Share
from loratune.finetune.packed.slot import Slot, StepBatch, run_pass

Numbers = dict[Slot, tuple[float, float]]  # the step's loss, and the norm of its gradient


def try_pass(base: PackedBase, layouts: Layouts, slots: Sequence[Slot], shares: Sequence[Share], task: TrainingTask) -> Flat | None:
    """Run a pass of these shares, and tell the slots. None where memory ran out: their steps begin anew."""
    members = [slots[share.adapter] for share in shares]
    try:
        flat = layouts.flat(shares)
        sums = run_pass(base, flat, slots, task)
    except Exception as error:
        if not ran_out(error, base.device):
            raise
        sums = None
    if sums is None:  # the error is gone, and with it the failed pass's graph
        for slot in members:
            slot.again()
        return None
    for share, slot, total in zip(shares, members, sums, strict=True):
        slot.seen(share, total)
    return flat


def coming(slots: Sequence[Slot]) -> list[StepBatch]:
    """What the slots will offer in the next pass, if all step and nobody else comes."""
    return [batch for slot in slots if not slot.done and (batch := slot.ahead()) is not None]


def clip_all(slots: Sequence[Slot], device: torch.device, set_aside: Callable[[Slot], None]) -> dict[Slot, torch.Tensor]:
    """Clip the slots' gradients: the numbers, on the device. A slot without memory for that is set aside."""
    found: dict[Slot, torch.Tensor] = {}
    for slot in slots:
        if not fits(partial(_clip, slot, found), device):
            set_aside(slot)
    return found


def numbers_of(numbers: dict[Slot, torch.Tensor], device: torch.device) -> Numbers:
    """The numbers, in one transfer; the device has then done what it was given."""
    if not numbers:
        memory.synchronize(device)
        return {}
    together = memory.fetched(torch.stack(list(numbers.values())))
    return {slot: (loss, norm) for slot, (loss, norm) in zip(numbers, together, strict=True)}


def update_all(
    numbers: Numbers, device: torch.device, set_aside: Callable[[Slot], None], diverged: Callable[[Slot, DivergedError], None]
) -> dict[Slot, bool]:
    """Take the steps whose gradients are finite; of each, whether the weights still are."""
    taken: dict[Slot, torch.Tensor] = {}
    for slot, (loss, norm) in numbers.items():
        try:
            if not fits(partial(_update, slot, loss, norm, taken), device):
                set_aside(slot)
        except DivergedError as error:
            diverged(slot, error)
    return dict(zip(taken, memory.fetched(torch.stack(list(taken.values()))), strict=True)) if taken else {}


def _clip(slot: Slot, found: dict[Slot, torch.Tensor]) -> None:
    found[slot] = slot.measured()


def _update(slot: Slot, loss: float, norm: float, taken: dict[Slot, torch.Tensor]) -> None:
    slot.update(loss, norm)
    taken[slot] = slot.adapter.finite
