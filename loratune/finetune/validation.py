"""The one loss: summed negative log-likelihood of response tokens (EOS included) / their number.

Natural logarithm; each token's NLL in float32 or better, their sum in float64. The engine `hf` trains and validates
through `token_nll`; the packed engine computes the same numbers with the head, tile by tile (`packed/head.py`).
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from loratune.data.batches import Batch, Tokens, collate, validation_batches
from loratune.data.tasks import SFT, TrainingTask
from loratune.errors import DataError
from loratune.finetune import distributed
from loratune.finetune.rope import sides_of

_CHUNK = 2**25  # logits turned into float32 at a time: 128 MiB


def token_nll(model: nn.Module, head: nn.Module | None, batch: Batch) -> torch.Tensor:
    """NLL of each response token, [N], float32 or float64; differentiable.

    Logits are computed at response positions only: the output head's input is cut to them on its way in, so whatever
    the model does to logits afterwards (soft capping, scaling) stays the model's own. Where the model does not
    pass through `head`, all logits are computed and then cut.
    """
    with _only(batch.predictors, head) as cut:
        logits = model(input_ids=batch.ids, use_cache=False).logits
    logits = logits.flatten(0, -2)
    return logits_nll(logits if cut else logits[batch.predictors], batch.labels)


def logits_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """NLL of `labels` [N] under `logits` [N, V], float32 or float64 [N], a bounded number of logits at a time."""
    rows = max(1, _CHUNK // logits.shape[-1])
    if len(labels) <= rows:
        return _nll(logits, labels)
    pieces = zip(logits.split(rows), labels.split(rows), strict=True)
    return torch.cat([checkpoint(_nll, x, y, use_reentrant=False) for x, y in pieces])


def validate(
    model: nn.Module,
    tokens: Tokens,
    *,
    batch_size: int,
    pad_id: int,
    head: nn.Module | None = None,
    device: torch.device | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    interrupted: Callable[[], bool] = lambda: False,
    task: TrainingTask = SFT,
    rank: int = 0,
    world: int = 1,
    in_step: bool = False,
) -> tuple[float, float]:
    """The task's metric of `model` over all of `tokens`, and the seconds it took; independent of `batch_size`.

    With `world` processes each scores a part and all return the same; `in_step`: all run the model equally often. Between
    batches `interrupted` is asked whether to give up, with InterruptedError. Raises DataError when there is no response
    token to score.
    """
    began = time.perf_counter()
    device = device or next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # NLL, number
    with torch.no_grad(), autocast():
        batches: Iterable[Batch] = validation_batches(tokens, batch_size, pad_id, rank, world, sides_of(model.config))
        if in_step:
            batches = list(batches)
            spare = [collate(tokens, [0], pad_id=pad_id, scored=False)]
            batches += spare * (distributed.most(len(batches), device) - len(batches))
        for batch in batches:
            if interrupted():
                raise InterruptedError
            batch = batch.to(device)
            sums[0] += task.metric(token_nll(model, head, batch), batch.labels).sum(dtype=torch.float64)
            sums[1] += len(batch.labels)
    model.train(was_training)
    if world > 1:
        dist.all_reduce(sums)
    total, number = sums.tolist()
    if not number:
        raise DataError("the validation set holds no response token; give data with non-empty responses, or a larger validation share.")
    return total / number, time.perf_counter() - began


def _nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    exact = logits if logits.dtype == torch.float64 else logits.float()
    with torch.autocast(logits.device.type, enabled=False):
        return functional.cross_entropy(exact, labels, reduction="none")


@contextlib.contextmanager
def _only(predictors: torch.Tensor, head: nn.Module | None) -> Iterator[list[bool]]:
    """While open, `head` sees the rows `predictors` of its flattened input; the list is non-empty once that happened."""
    seen: list[bool] = []

    def select(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if len(arguments) != 1:
            return None
        seen.append(True)
        hidden = arguments[0]
        return (hidden.reshape(1, -1, hidden.shape[-1])[:, predictors],)

    handle = head.register_forward_pre_hook(select) if head is not None else None
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()
