"""A slot: one trial on its way through the packed engine, from its entry to its outcome.

A slot never waits for another one: it offers the examples that its present optimiser step still needs, takes part in
whatever passes they are put into, and steps as soon as the last of them has been seen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from loratune.data.batches import Sides, Tokens, response_tokens
from loratune.data.shared_prefix import dropout_owners
from loratune.data.tasks import TrainingTask
from loratune.finetune.failures import DivergedError
from loratune.finetune.methods import Method
from loratune.finetune.optimisation import HALF_PRECISION_SCALE, learning_rate_factor, warmup_steps
from loratune.finetune.packed.adapter import Adapter
from loratune.finetune.packed.base import PackedBase
from loratune.finetune.packed.layout import Flat, Share
from loratune.finetune.segment import SegmentRun
from loratune.finetune.targets import chosen_layers, left_out
from loratune.record.paths import RunPaths, StudyPaths
from loratune.work import Progress, Recipe, Segment


@dataclass(kw_only=True)
class StepBatch:
    """One optimiser step's examples, and which of them are still to be seen."""

    step: int
    tokens: Tokens
    sides: Sides
    usual_tokens: float  # of such a batch, on average
    examples: np.ndarray
    waiting: np.ndarray = field(init=False)  # indices in `examples`, longest first

    def __post_init__(self) -> None:
        self.items = response_tokens(self.tokens, self.examples)
        self._owners = dropout_owners(self.tokens, self.examples) if len(self.examples) else []
        self.waiting = np.argsort(-np.asarray(self.tokens.lengths)[self.examples], kind="stable")

    def offer(self, room: int, number: int, *, beside: Share | None = None) -> Share | None:
        """The next examples that fit into `room` tokens, longest first, as adapter `number`'s share; or None.

        At least one example while there are any; `beside` others, those alone that may share a pass with them.
        """
        lengths = np.asarray(self.tokens.lengths)[self.examples[self.waiting]]
        count = int(np.searchsorted(np.cumsum(lengths), room, side="right"))
        first = self.examples[self.waiting[:1]] if beside is None else beside.examples[:1]
        side = self.sides(np.asarray(self.tokens.lengths)[first])
        count = max(min(count, _leading(self.sides(lengths) == side)), 0 if beside is not None else min(1, len(lengths)))
        if not count:
            return None
        taken = self.waiting[:count]
        return Share(adapter=number, examples=self.examples[taken], owners=[self._owners[index] for index in taken])


class Slot:
    """Trains one segment. Raises ModelError for hyperparameters that do not fit the model."""

    def __init__(
        self,
        segment: Segment,
        *,
        base: PackedBase,
        recipe: Recipe,
        root: Path,
        tokens: Tokens,
        method: Method,
        report: Callable[[Progress], None],
    ) -> None:
        h = segment.hyperparameters
        self.segment, self.tokens, self._kind = segment, tokens, recipe.training.lr_scheduler_type
        self._sides = base.sides
        layers = {name: base.features(name) for name in chosen_layers(base.model, h.target_modules)}
        method.config(base.model, h)  # refuses what PEFT would
        self.adapter = Adapter(layers, h, segment.seed, recipe.training, dtype=base.base.dtype, device=base.device, method=method)
        self.usual_tokens = h.batch_size * float(np.mean(tokens.lengths))  # of one step, on average
        self.scale = HALF_PRECISION_SCALE if base.base.dtype == torch.float16 else 1.0
        self._next: StepBatch | None = None
        self.peak = 0  # bytes of memory
        self._loss = torch.zeros((), dtype=torch.float64, device=base.device)
        self._warmup = warmup_steps(h.warmup_ratio, segment.total_steps)
        self.run = SegmentRun(
            segment,
            folder=StudyPaths(root).of(segment).folder,
            training=recipe.training,
            tokens=tokens,
            parameters=self.adapter.parameters,
            optimizer=self.adapter.optimizer,
            report=report,
        )
        for line in left_out(base.model, h.target_modules):
            self.run.log(line)
        self.run.resume()
        self.adapter.refresh()
        self._begin_step()

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.run.step >= self.segment.stop_step

    @property
    def complete(self) -> bool:
        """Whether the present step has seen all its examples."""
        return not len(self.batch.waiting)

    @property
    def items(self) -> int:
        """Response tokens of the present step's batch."""
        return self.batch.items

    def offer(self, room: int, number: int, *, beside: Share | None = None) -> Share | None:
        """See `StepBatch.offer`."""
        return self.batch.offer(room, number, beside=beside)

    def ahead(self) -> StepBatch | None:
        """What the slot will offer once it has stepped, if its step is complete; None if that is its last."""
        if not self.complete:
            return self.batch
        if self._next is None and self.run.step + 1 < self.segment.stop_step:
            self._next = self._batch_of(self.run.step + 1)
        return self._next

    def seen(self, share: Share, loss: torch.Tensor) -> None:
        """A pass is done: `share`'s examples gave a summed `loss`, and their gradients are in the adapter."""
        self.batch.waiting = self.batch.waiting[len(share.examples) :]
        self._loss = self._loss + loss.detach().double()

    def used(self, size: int) -> None:
        """It had so many bytes of memory in use."""
        self.peak = max(self.peak, size)

    def again(self) -> None:
        """Begin the present step anew: a pass broke off."""
        self.adapter.forget_gradients()
        self._begin_step()

    def measured(self) -> torch.Tensor:
        """Clip the gradients: (the step's summed loss, the gradient's norm before), float64 on the device."""
        norm = self.adapter.clip(self.scale)
        return torch.stack([self._loss, norm.double()])

    def update(self, loss: float, norm: float) -> None:
        """Take the optimiser step that all examples have been seen for. Raises DivergedError, before the weights are touched."""
        if not (abs(loss) < float("inf") and norm < float("inf")):
            raise DivergedError(f"step {self.run.step + 1}: loss {loss / self.items:.4g}, gradient norm {norm:.4g}")
        self.adapter.update(self._factor)

    def stepped(self, loss: float, finite: bool) -> None:
        """The optimiser step is taken, and left weights that are `finite` or not. Raises DivergedError if not."""
        if not finite:  # a step too large for float32: no neighbour may ever multiply with it
            raise DivergedError(f"step {self.run.step + 1}: the adapter's weights are not finite")
        self.run.stepped(loss, self.items, self.segment.hyperparameters.learning_rate * self._factor)
        self._begin_step()

    @property
    def _factor(self) -> float:
        return learning_rate_factor(self._kind, self.run.step, self._warmup, self.segment.total_steps)

    def save_adapter(self, model: nn.Module) -> None:
        """Write the adapter of the point of the curve that is kept. Raises StorageError."""
        self.run.settle()
        self.adapter.save(RunPaths(self.run.folder).adapter, model)

    def _begin_step(self) -> None:
        self._loss = torch.zeros_like(self._loss)
        prepared, self._next = self._next, None
        self.batch = prepared if prepared is not None and prepared.step == self.run.step else self._batch_of(self.run.step)

    def _batch_of(self, step: int) -> StepBatch:
        examples = self.run.examples(step) if step < self.segment.stop_step else np.zeros(0, dtype=np.int64)
        return StepBatch(step=step, tokens=self.tokens, sides=self._sides, usual_tokens=self.usual_tokens, examples=examples)


def fill(slots: Sequence[Slot | StepBatch], room: int, enough: float) -> list[Share]:
    """The shares of the next pass of at most `room` tokens: the first slot's examples, and others' beside them.

    A slot whose batches hold `enough` tokens to keep the device busy has its passes to itself: what it computes is then
    the same to the last bit, whoever its companions are. Smaller ones share a pass. A single example longer than
    `room` goes alone.
    """
    first = slots[0]
    shares: list[Share] = []
    for number, slot in enumerate(slots):
        if number and not (first.usual_tokens < enough and slot.usual_tokens < enough):
            continue
        share = slot.offer(room, number, beside=shares[0] if shares else None)
        if share is not None:
            shares.append(share)
            room -= int(np.asarray(slot.tokens.lengths)[share.examples].sum())
    return shares


def _leading(true: np.ndarray) -> int:
    """How many are true before the first that is not."""
    return len(true) if true.all() else int(np.argmin(true))


def run_pass(base: PackedBase, flat: Flat, slots: Sequence[Slot], task: TrainingTask) -> list[torch.Tensor]:
    """One pass, forward and backward: each span's summed loss. Gradients are added to the adapters'.

    A GPU is given all that, and not waited for.
    """
    each = task.loss(base.nll(flat, [slot.adapter for slot in slots], [slot.run.step for slot in slots]), flat.labels)
    sums = [part.sum() for part in each.split([span.last - span.first for span in flat.spans])]
    losses = [total * (slots[span.adapter].scale / slots[span.adapter].items) for total, span in zip(sums, flat.spans, strict=True)]
    # Each adapter's loss reaches its own rows only; a common sum would do as well, but for inf and NaN.
    torch.autograd.backward([loss for loss in losses if loss.requires_grad])
    return [total.detach() for total in sums]
