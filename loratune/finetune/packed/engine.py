"""The packed engine: slots in which trials train side by side on one frozen base model.

A round: let segments in while there are slots, fill a pass with examples of the lanes, run it forward and backward,
let those lanes step that have seen their batch, validate who is due, let out who is done.
"""

import gc
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from loratune.errors import DataError, ModelError, NotPackableError, StorageError, kind_of
from loratune.finetune import memory, model, segment
from loratune.finetune.batches import Tokens
from loratune.finetune.packed import capacity
from loratune.finetune.packed.base import PackedBase
from loratune.finetune.packed.lane import Lane, fill
from loratune.finetune.packed.layout import flatten
from loratune.finetune.packed.validation import validate_together
from loratune.finetune.prepared import Prepared
from loratune.finetune.segment import Inbox
from loratune.finetune.trainer import DivergedError
from loratune.work import Outcome, Progress, Recipe, Segment, State

TOKENS_PER_PASS = {"cpu": 2048, "cuda": 16384}  # where the recipe leaves it open
ENOUGH = {"cpu": 64, "cuda": 16384}  # tokens that keep the device busy: a batch of so many shares its passes with no other


class PackedEngine:
    """Holds the base model and the data; trains up to `slots` segments at the same time.

    Raises ModelError and DataError when either cannot be loaded, NotPackableError for a model that it cannot train.
    """

    def __init__(self, recipe: Recipe, root: Path) -> None:
        if recipe.devices_per_trial > 1:
            raise NotPackableError("a trial takes several devices")
        if recipe.training.report_to:
            raise NotPackableError("report_to names trackers, which Transformers' Trainer feeds")
        self.recipe, self.root, self.slots, self.notice = recipe, root, recipe.slots, ""
        self.device = model.choose_device(recipe.device)
        prepared = Prepared.load(root / recipe.data)
        self.train: Tokens = prepared.train
        self.validation: Tokens = prepared.validation
        self.base = PackedBase(model.load(recipe.model, self.device))
        if recipe.training.gradient_checkpointing:
            model.checkpoint_activations(self.base.model, True)
            self.base.checkpointing = True
        self.capacity = capacity.measure(self.base, self.train)
        self.room = recipe.training.tokens_per_pass or TOKENS_PER_PASS[self.device.type]
        self.enough: float = ENOUGH[self.device.type]
        self._lanes: list[Lane] = []
        self._returned: deque[Segment] = deque()  # put out of their slots for want of memory
        self._limit = self.slots
        self._base_loss: float | None = None  # of the base model, which is every trial's at step 0
        gc.collect()
        gc.freeze()  # what is loaded stays: collecting between trials need not look at it again

    def run(self, inbox: Inbox, tell: Callable[[Progress | Outcome], None], stop: threading.Event) -> None:
        """Train what comes in until the inbox has ended; tell one outcome per segment, as soon as it is known."""
        self._tell = tell
        memory.reset_peak(self.device)
        while True:
            while len(self._lanes) < self._limit and self._has_room():
                wanted = self._returned.popleft() if self._returned else inbox(wait=not self._lanes)
                if wanted is None and not self._lanes:
                    return
                if wanted is None:
                    break
                self._enter(wanted, stop)
            if self._lanes:
                self._round(stop)

    def _has_room(self) -> bool:
        """Whether another adapter, as large as the largest of those here, leaves room for the longest example."""
        sizes = [lane.adapter.size for lane in self._lanes]
        if not sizes:
            return True
        return self.capacity.room(sum(sizes) + max(sizes)) >= int(np.max(self.train.lengths))

    def close(self) -> None:
        """Free the model; the engine is of no use afterwards."""
        self.base.release()
        del self.base
        gc.unfreeze()
        memory.free(self.device)

    def _enter(self, wanted: Segment, stop: threading.Event) -> None:
        if stop.is_set():
            self._tell(Outcome(key=wanted.key, state=State.CANCELLED, message="asked to stop before it began"))
            return
        try:
            lane = Lane(wanted, base=self.base, recipe=self.recipe, root=self.root, tokens=self.train, report=self._tell)
        except (ModelError, DataError, StorageError) as error:
            self._tell(Outcome(key=wanted.key, state=State.BAD_INPUT, message=str(error), error=kind_of(error)))
        except Exception as error:
            if memory.is_out_of_memory(error) and self._lanes:
                self._limit = len(self._lanes)
                self._returned.append(wanted)
            else:
                self._tell(Outcome(key=wanted.key, state=_state_of(error), message=_words(error)))
        else:
            self._lanes.append(lane)

    def _round(self, stop: threading.Event) -> None:
        try:
            self._validate([lane for lane in self._lanes if lane.run.validation_due()], stop)
            working = [lane for lane in self._lanes if not lane.done]
            if working:
                self._train(working)
            for lane in [lane for lane in working if lane.complete and lane in self._lanes]:
                self._step(lane)
            if stop.is_set():
                self._cancel()
                return
            self._finish([lane for lane in self._lanes if lane.done], stop)
        except Exception as error:  # nobody knows whose fault it is: all go back to their checkpoints
            for lane in list(self._lanes):
                self._leave(lane, _state_of(error), _words(error), traceback.format_exc(), kind_of(error))

    def _train(self, lanes: list[Lane]) -> None:
        """One pass, and the lanes behind it come to the front."""
        fits = self.capacity.room(sum(lane.adapter.size for lane in self._lanes))
        shares = fill(lanes, min(self.room, max(fits, 1)), self.enough)
        members = [lanes[share.owner] for share in shares]
        began = time.perf_counter()
        try:
            flat = flatten(self.train, shares, self.device)
            nll = self.base.nll(flat, [lane.adapter for lane in lanes], [lane.run.step for lane in lanes])
            sums = [nll[span.first : span.last].sum() for span in flat.spans]
            losses = [total * (lane.scale / lane.items) for total, lane in zip(sums, members, strict=True)]
            # Each adapter's loss reaches its own rows only; a common sum would do as well, but for inf and NaN.
            torch.autograd.backward([loss for loss in losses if loss.requires_grad])
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
            for lane in members:
                lane.again()
            alone = len(shares) == 1 and len(shares[0].examples) == 1
            del error
            self._make_room(flat_tokens=sum(int(np.asarray(self.train.lengths)[share.examples].sum()) for share in shares), alone=alone)
            return
        for share, lane, total in zip(shares, members, sums, strict=True):
            lane.seen(share, total)
        seconds = time.perf_counter() - began
        for span, lane in zip(flat.spans, members, strict=True):
            lane.run.train_seconds += seconds * (span.stop - span.start) / flat.tokens
        last = lanes.index(members[-1]) + (1 if members[-1].complete else 0)
        self._lanes = [*lanes[last:], *lanes[:last], *[lane for lane in self._lanes if lane.done]]

    def _make_room(self, *, flat_tokens: int, alone: bool) -> None:
        """Out of memory: smaller passes; when one example is too many, fewer lanes; a lane alone cannot be trained here."""
        memory.free(self.device)
        if not alone:
            self.room = max(1, flat_tokens // 2)
        elif len(self._lanes) > 1:
            self._limit = len(self._lanes) - 1
            lane = self._lanes.pop()
            lane.run.save()
            lane.run.log("out of memory: waits for a free slot")
            self._returned.append(lane.segment)
        else:
            h = self._lanes[0].segment.hyperparameters
            words = (
                f"out of memory on {memory.device_name(self.device)} with lora_r {h.lora_r}, one example at a time; "
                "gradient_checkpointing, load_in_4bit or a smaller max_length need less"
            )
            self._leave(self._lanes[0], State.OUT_OF_MEMORY, words)
        memory.free(self.device)

    def _step(self, lane: Lane) -> None:
        began = time.perf_counter()
        try:
            lane.step()
        except DivergedError as error:
            self._leave(lane, State.DIVERGED, f"diverged at {error}; lower learning rates are safer")
            return
        lane.run.train_seconds += time.perf_counter() - began
        if lane.run.checkpoint_due() and not lane.run.validation_due():
            lane.run.save()

    def _validate(self, lanes: Sequence[Lane], stop: threading.Event | None = None) -> None:
        """Put a point on each lane's curve."""
        for lane in [lane for lane in lanes if lane.run.step == 0 and self._base_loss is not None]:
            lane.run.add_point(self._base_loss or 0.0, 0.0)
        lanes = [lane for lane in lanes if lane.run.step not in lane.run.curve]
        if not lanes:
            return
        interrupted = stop.is_set if stop is not None else lambda: False
        if self.device.type == "cpu" and len(lanes) > 1:  # as fast, and the same to the last bit whoever else is due
            for lane in lanes:
                self._validate([lane], stop)
            return
        losses, seconds = self._validated(lanes, interrupted)
        for lane, loss in zip(lanes, losses, strict=True):
            if not np.isfinite(loss):
                self._leave(
                    lane, State.DIVERGED, f"diverged at step {lane.run.step}: validation loss {loss}; lower learning rates are safer"
                )
                continue
            if lane.run.step == 0:
                self._base_loss = loss
            lane.run.add_point(loss, seconds / len(lanes))
            if not lane.done and lane.run.checkpoint_due():
                lane.run.save()

    def _validated(self, lanes: Sequence[Lane], interrupted: Callable[[], bool]) -> tuple[list[float], float]:
        while True:
            try:
                return validate_together(
                    self.base, [lane.adapter for lane in lanes], self.validation, room=4 * self.room, interrupted=interrupted
                )
            except Exception as error:
                if not memory.is_out_of_memory(error) or self.room <= 1:
                    raise
                self.room //= 2
            memory.free(self.device)

    def _finish(self, lanes: list[Lane], stop: threading.Event) -> None:
        for lane in lanes:
            lane.run.save()
        try:
            self._validate([lane for lane in lanes if lane.segment.stop_step not in lane.run.curve], stop)
        except InterruptedError:
            self._cancel()
            return
        for lane in [lane for lane in lanes if lane in self._lanes]:
            try:
                lane.run.settle()
                lane.adapter.save(lane.run.folder / "adapter", self.base.model)
            except StorageError as error:
                self._leave(lane, State.BAD_INPUT, str(error), kind=kind_of(error))
            else:
                self._leave(lane, State.COMPLETED)

    def _cancel(self) -> None:
        for lane in list(self._lanes):
            if not lane.done:
                lane.again()  # a step half seen is seen again
                lane.run.save()
            self._leave(lane, State.CANCELLED, "asked to stop; a checkpoint is written")
        while self._returned:
            self._tell(Outcome(key=self._returned.popleft().key, state=State.CANCELLED, message="asked to stop; a checkpoint is written"))

    def _leave(self, lane: Lane, state: State, message: str = "", details: str = "", kind: str = "") -> None:
        if message:
            with suppress(OSError):
                segment.write_log(lane.run.folder, f"{state}: {message}" + (f"\n{details}" if details else ""))
        self._lanes.remove(lane)
        self._limit = min(self.slots, self._limit + (1 if not self._returned else 0))
        peak, name = memory.peak_bytes(self.device), memory.device_name(self.device)
        self._tell(lane.run.outcome(state, message, peak_memory_bytes=peak, devices=1, device=name, error=kind))


def _state_of(error: Exception) -> State:
    if isinstance(error, ModelError | DataError | StorageError):
        return State.BAD_INPUT
    return State.OUT_OF_MEMORY if memory.is_out_of_memory(error) else State.CRASHED


def _words(error: Exception) -> str:
    if isinstance(error, ModelError | DataError | StorageError):
        return str(error)
    return "".join("".join(traceback.format_exception(error)).strip().splitlines(keepends=True)[-6:])
