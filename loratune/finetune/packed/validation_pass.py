"""Validation of several adapters together: each of them sees every example, in flat batches."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from loratune.data.batches import Tokens
from loratune.data.tasks import SFT, TrainingTask
from loratune.errors import DataError
from loratune.finetune import memory
from loratune.finetune.failures import ran_out
from loratune.finetune.packed.adapter import Adapter
from loratune.finetune.packed.base import PackedBase
from loratune.finetune.packed.layout import Share, flatten


def validate_together(
    base: PackedBase,
    adapters: Sequence[Adapter],
    tokens: Tokens,
    *,
    room: int,
    interrupted: Callable[[], bool] = lambda: False,
    task: TrainingTask = SFT,
) -> tuple[list[float], float]:
    """The task's metric (as finetune/validation.py) of each adapter over all of `tokens`, and the seconds that took in all.

    `room`: tokens per pass. Raises DataError without a response token, InterruptedError when asked to give up.
    """
    began = time.perf_counter()
    lengths = np.asarray(tokens.lengths)
    sums = torch.zeros(len(adapters), dtype=torch.float64, device=base.device)
    number = 0
    for examples in _chunks(lengths, max(1, room // len(adapters)), base.sides(lengths)):
        if interrupted():
            raise InterruptedError
        shares = [Share(adapter=k, examples=examples) for k in range(len(adapters))]
        flat = flatten(tokens, shares, base.device)
        with torch.no_grad():
            metric = task.metric(base.nll(flat, adapters), flat.labels).double()
        sums += torch.stack([metric[span.first : span.last].sum() for span in flat.spans])
        number += flat.spans[0].last
    if not number:
        raise DataError("the validation set holds no response token; give data with non-empty responses, or a larger validation share.")
    return (sums / number).tolist(), time.perf_counter() - began


def validate_within(
    base: PackedBase, adapters: Sequence[Adapter], tokens: Tokens, room: int, interrupted: Callable[[], bool], task: TrainingTask = SFT
) -> tuple[tuple[list[float], float] | None, int]:
    """What `validate_together` gives, None where there is no memory for one example of each adapter; and the room that was left."""
    least = int(np.max(tokens.lengths)) * len(adapters)
    while True:
        try:
            return validate_together(base, adapters, tokens, room=room, interrupted=interrupted, task=task), room
        except Exception as error:
            if not ran_out(error, base.device):
                raise
        memory.free(base.device)  # here, where the error and the failed pass are gone
        if room <= least:
            return None, room
        room = max(least, room // 2)


def _chunks(lengths: np.ndarray, room: int, sides: np.ndarray) -> list[np.ndarray]:
    """All examples, longest first, in chunks of one side and at most `room` tokens, at least one example each."""
    order = np.argsort(-lengths, kind="stable")
    chunks: list[list[int]] = []
    left = 0
    for example in order:
        if not chunks or lengths[example] > left or sides[example] != sides[chunks[-1][0]]:
            chunks.append([])
            left = room
        chunks[-1].append(int(example))
        left -= int(lengths[example])
    return [np.asarray(chunk) for chunk in chunks]
