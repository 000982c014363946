"""The packed engine: slots in which trials train side by side on one frozen base model.

A round: let segments in while there are slots, fill a pass with examples of the lanes, run it forward and backward,
let those lanes step that have seen their batch, validate who is due, let out who is done.

Where memory runs out, passes become smaller, then lanes fewer: one leaves its slot and waits for another to end, to go on
from its checkpoint. A lane that is alone and runs out of memory with one example cannot be trained on this device.
"""

import gc
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loratune.data.batches import Tokens
from loratune.data.prepared import Prepared
from loratune.errors import DataError, DeviceLostError, ModelError, NotPackableError, StorageError, kind_of
from loratune.finetune import memory, model, segment
from loratune.finetune.failures import fits, ran_out, state_of, too_large, words
from loratune.finetune.packed import capacity
from loratune.finetune.packed.base import PackedBase
from loratune.finetune.packed.layout import Share
from loratune.finetune.packed.slot import Lane, fill, run_pass
from loratune.finetune.packed.validation_pass import validate_within
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
        self.recipe, self.root, self.slots, self.notice = recipe, root, recipe.slots, ""
        self.device = model.choose_device(recipe.device)
        prepared = Prepared.load(root / recipe.data)
        self.train: Tokens = prepared.train
        self.validation: Tokens = prepared.validation
        longest = max(int(np.max(tokens.lengths)) for tokens in (self.train, self.validation))
        self.base = PackedBase(model.load(recipe.model, self.device), longest)
        if recipe.training.gradient_checkpointing:
            model.checkpoint_activations(self.base.model, True)
            self.base.checkpointing = True
        self.capacity = capacity.measure(self.base, self.train)
        self.room = recipe.training.tokens_per_pass or TOKENS_PER_PASS[self.device.type]
        self.validation_room = 4 * self.room  # nothing is kept for a backward pass
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
        self._note_peak(self._lanes)
        memory.reset_peak(self.device)
        lost = False
        try:
            lane = Lane(wanted, base=self.base, recipe=self.recipe, root=self.root, tokens=self.train, report=self._tell)
        except (ModelError, DataError, StorageError) as error:
            self._tell(Outcome(key=wanted.key, state=State.BAD_INPUT, message=str(error), error=kind_of(error)))
        except Exception as error:
            lost = ran_out(error, self.device)
            if not lost:
                self._tell(Outcome(key=wanted.key, state=State.CRASHED, message=words(error)))
        else:
            self._lanes.append(lane)
        if lost:
            memory.free(self.device)
            if self._lanes:
                self._wait_for_slot(wanted)
            else:
                self._tell(Outcome(key=wanted.key, state=State.OUT_OF_MEMORY, message=too_large(wanted, self.device)))

    def _round(self, stop: threading.Event) -> None:
        try:
            with suppress(InterruptedError):  # a validation was told to give up
                self._advance(stop)
            if stop.is_set():
                self._cancel()
        except DeviceLostError:
            raise
        except Exception as error:  # nobody knows whose fault it is: all go back to their checkpoints
            if ran_out(error, self.device) and len(self._lanes) > 1:  # one at a time
                self._returned.extend(lane.segment for lane in self._lanes)
                self._lanes, self._limit = [], 1
                return
            for lane in list(self._lanes):
                self._leave(lane, state_of(error), words(error), traceback.format_exc(), kind_of(error))

    def _advance(self, stop: threading.Event) -> None:
        if not self._validate([lane for lane in self._lanes if lane.run.validation_due()], stop):
            return
        working = [lane for lane in self._lanes if not lane.done]
        if working:
            self._train(working)
        for lane in [lane for lane in working if lane.complete and lane in self._lanes]:
            self._step(lane)
        if not stop.is_set():
            self._finish([lane for lane in self._lanes if lane.done], stop)

    def _train(self, lanes: list[Lane]) -> None:
        """One pass, and the lanes behind it come to the front."""
        free = self.capacity.room(sum(lane.adapter.size for lane in self._lanes))
        shares = fill(lanes, min(self.room, max(free, 1)), self.enough)
        members = [lanes[share.owner] for share in shares]
        began, before = time.perf_counter(), memory.mark(self.device)
        try:
            done = run_pass(self.base, self.train, lanes, shares)
        except Exception as error:
            if not ran_out(error, self.device):
                raise
            done = None
        if done is None:  # the error is gone, and with it the failed pass's graph
            for lane in members:
                lane.again()
            self._make_room(shares)
            return
        flat, sums = done
        for share, lane, total in zip(shares, members, sums, strict=True):
            lane.seen(share, total)
        seconds, used = time.perf_counter() - began, memory.since(self.device, before)
        for span, lane in zip(flat.spans, members, strict=True):
            part = (span.stop - span.start) / flat.tokens
            lane.run.train_seconds += seconds * part
            self._used(lane, used * part)
        last = lanes.index(members[-1]) + (1 if members[-1].complete else 0)
        self._lanes = [*lanes[last:], *lanes[:last], *[lane for lane in self._lanes if lane.done]]

    def _make_room(self, shares: list[Share]) -> None:
        """A pass of these shares ran out of memory: smaller passes; when one example is too many, fewer lanes."""
        memory.free(self.device)
        if len(shares) > 1 or len(shares[0].examples) > 1:
            lengths = np.asarray(self.train.lengths)
            self.room = max(1, sum(int(lengths[share.examples].sum()) for share in shares) // 2)
        else:
            self._set_aside(self._lanes[-1])

    def _set_aside(self, lane: Lane, *, whole: bool = True) -> None:
        """Out of memory: the lane waits for another one to end, or is told to be too large where it is alone.

        `whole`: its state is that after a step, and worth a checkpoint; else it goes back to the one before.
        """
        if len(self._lanes) == 1:
            self._leave(lane, State.OUT_OF_MEMORY, too_large(lane.segment, self.device))
        else:
            self._lanes.remove(lane)
            self._wait_for_slot(lane.segment)
            if whole:
                fits(lane.run.save, self.device)
            lane.run.log("out of memory: waits for a free slot")
        lane.adapter.release()
        memory.free(self.device)

    def _wait_for_slot(self, wanted: Segment) -> None:
        self._limit = len(self._lanes)
        self._returned.append(wanted)

    def _used(self, lane: Lane, working: float) -> None:
        """On a GPU, note what a lane takes by itself: the model, its training state, its part of what was computed."""
        if self.device.type == "cuda":
            lane.used(self.capacity.fixed + lane.adapter.size * self.capacity.per_parameter + int(working))

    def _note_peak(self, lanes: Sequence[Lane]) -> None:
        """On a CPU, where there is no telling lanes apart: the process's peak is that of all that were there meanwhile."""
        if self.device.type == "cpu":
            for lane in lanes:
                lane.used(memory.peak_bytes(self.device))

    def _step(self, lane: Lane) -> None:
        began, before = time.perf_counter(), memory.mark(self.device)
        try:
            if not fits(lane.step, self.device):
                self._set_aside(lane, whole=False)
                return
        except DivergedError as error:
            self._leave(lane, State.DIVERGED, f"diverged at {error}; lower learning rates are safer")
            return
        lane.run.train_seconds += time.perf_counter() - began
        self._used(lane, memory.since(self.device, before))
        if lane.run.checkpoint_due() and not lane.run.validation_due() and not fits(lane.run.save, self.device):
            self._set_aside(lane, whole=False)

    def _validate(self, lanes: Sequence[Lane], stop: threading.Event | None = None) -> bool:
        """Put a point on each lane's curve. False where memory ran out: a lane was set aside, and all may be tried again."""
        for lane in [lane for lane in lanes if lane.run.step == 0 and self._base_loss is not None]:
            lane.run.add_point(self._base_loss or 0.0, 0.0)
        lanes = [lane for lane in lanes if lane.run.step not in lane.run.curve]
        if not lanes:
            return True
        interrupted = stop.is_set if stop is not None else lambda: False
        if self.device.type == "cpu" and len(lanes) > 1:  # as fast, and the same to the last bit whoever else is due
            return all(self._validate([lane], stop) for lane in lanes if lane in self._lanes)
        before = memory.mark(self.device)
        adapters = [lane.adapter for lane in lanes]
        found, self.validation_room = validate_within(self.base, adapters, self.validation, self.validation_room, interrupted)
        if found is None and len(lanes) > 1:
            return all(self._validate([lane], stop) for lane in lanes if lane in self._lanes)
        if found is None:
            self._set_aside(next((lane for lane in reversed(self._lanes) if lane is not lanes[0]), lanes[0]))
            return False
        losses, seconds = found
        used = memory.since(self.device, before) / len(lanes)
        for lane, loss in zip(lanes, losses, strict=True):
            self._used(lane, used)
            if not np.isfinite(loss):
                self._leave(
                    lane, State.DIVERGED, f"diverged at step {lane.run.step}: validation loss {loss}; lower learning rates are safer"
                )
                continue
            if lane.run.step == 0:
                self._base_loss = loss
            lane.run.add_point(loss, seconds / len(lanes))
            if not lane.done and lane.run.checkpoint_due() and not fits(lane.run.save, self.device):
                self._set_aside(lane, whole=False)
        return True

    def _finish(self, lanes: list[Lane], stop: threading.Event) -> None:
        for lane in lanes:
            if not fits(lane.run.save, self.device):
                self._set_aside(lane, whole=False)
        lanes = [lane for lane in lanes if lane in self._lanes]
        if not self._validate([lane for lane in lanes if lane.segment.stop_step not in lane.run.curve], stop):
            return
        for lane in [lane for lane in lanes if lane in self._lanes]:
            try:
                if fits(partial(_settle, lane, self.base.model), self.device):
                    self._leave(lane, State.COMPLETED)
                else:
                    self._set_aside(lane)
            except StorageError as error:
                self._leave(lane, State.BAD_INPUT, str(error), kind=kind_of(error))

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
        self._note_peak([lane])
        name = memory.device_name(self.device)
        self._tell(lane.run.outcome(state, message, peak_memory_bytes=lane.peak, devices=1, device=name, error=kind))


def _settle(lane: Lane, model: Any) -> None:
    """Write the adapter of the point of the curve that is kept."""
    lane.run.settle()
    lane.adapter.save(lane.run.folder / "adapter", model)
