"""The packed engine: slots in which trials train side by side on one frozen base model.

A round: let segments in while slots are free, fill a pass with examples of the occupied ones, run it forward and backward,
let the slots step that have seen their batch, validate where that is due, let out the segments that are done.

Where memory runs out, passes become smaller, then slots fewer: a segment leaves its slot and waits for another to end, to
go on from its checkpoint. One that is alone and runs out of memory with one example cannot be trained on this device.
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

import numpy as np

from loratune.data.batches import Tokens
from loratune.data.prepared import Prepared
from loratune.data.tasks import task_named
from loratune.errors import DeviceLostError, NotPackableError, StorageError, error_kind
from loratune.finetune import memory, model, segment
from loratune.finetune.failures import DivergedError, error_text, fits, ran_out, state_of, too_large
from loratune.finetune.methods import method_named
from loratune.finetune.packed import capacity
from loratune.finetune.packed.base import PackedBase
from loratune.finetune.packed.layout import Layouts, Share
from loratune.finetune.packed.slot import Slot, StepBatch, fill
from loratune.finetune.packed.steps import Numbers, clip_all, coming, numbers_of, try_pass, update_all
from loratune.finetune.packed.validation_pass import validate_within
from loratune.finetune.segment import Inbox
from loratune.work import Outcome, Progress, Recipe, Segment, State

TOKENS_PER_PASS = {"cpu": 2048, "cuda": 16384}  # where the recipe leaves it open
ENOUGH = {"cpu": 64, "cuda": 16384}  # tokens that keep the device busy: a batch of this size shares its passes with no other


class PackedEngine:
    """Holds the base model and the data; trains up to `slots` segments at the same time.

    Raises ModelError and DataError when either cannot be loaded, NotPackableError for a model that it cannot train.
    """

    def __init__(self, recipe: Recipe, root: Path) -> None:
        if recipe.devices_per_trial > 1:
            raise NotPackableError("a trial takes several devices")
        self.recipe, self.root, self.slots, self.notice = recipe, root, recipe.slots, ""
        self.task, self.method = task_named(recipe.task), method_named(recipe.method)
        self.device = model.choose_device(recipe.device)
        prepared = Prepared.load(root / recipe.data)
        self.train: Tokens = prepared.train
        self.validation: Tokens = prepared.validation
        longest = max(int(np.max(tokens.lengths)) for tokens in (self.train, self.validation))
        self.base = PackedBase(model.load(recipe.model, self.device), longest)
        if recipe.training.gradient_checkpointing:
            model.checkpoint_activations(self.base.model, True)
            self.base.checkpointing = True
        self.capacity = capacity.measure(self.base, self.train, self.method)
        self.room = recipe.training.tokens_per_pass or TOKENS_PER_PASS[self.device.type]
        self.validation_room = 4 * self.room  # nothing is kept for a backward pass
        self.enough: float = ENOUGH[self.device.type]
        self._occupied: list[Slot] = []
        self._returned: deque[Segment] = deque()  # put out of their slots for want of memory
        self._limit = self.slots
        self._layouts = Layouts(lambda: self.train, self.base.device)
        self.looks_ahead = self.device.type != "cpu"  # lays the next pass out while the device computes
        self._base_loss: float | None = None  # of the base model, which is every trial's at step 0
        gc.collect()
        gc.freeze()  # what is loaded stays: collecting between trials need not look at it again

    def run(self, inbox: Inbox, tell: Callable[[Progress | Outcome], None], stop: threading.Event) -> None:
        """Train what comes in until the inbox has ended; tell one outcome per segment, as soon as it is known."""
        self._tell = tell
        while True:
            while len(self._occupied) < self._limit and self._has_room():
                wanted = self._returned.popleft() if self._returned else inbox(wait=not self._occupied)
                if wanted is None and not self._occupied:
                    return
                if wanted is None:
                    break
                self._enter(wanted, stop)
            if self._occupied:
                self._round(stop)

    def _has_room(self) -> bool:
        """Whether another adapter, as large as the largest of those here, leaves room for the longest example."""
        sizes = [slot.adapter.size for slot in self._occupied]
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
            self._tell(Outcome(key=wanted.key, state=State.CANCELLED, message="stopped before it began"))
            return
        self._note_peak(self._occupied)
        memory.reset_peak(self.device)
        lost = False
        try:
            slot = Slot(
                wanted, base=self.base, recipe=self.recipe, root=self.root, tokens=self.train, method=self.method, report=self._tell
            )
        except Exception as error:
            lost = ran_out(error, self.device)
            if not lost:
                self._tell(Outcome(key=wanted.key, state=state_of(error), message=error_text(error), error=error_kind(error)))
        else:
            self._occupied.append(slot)
        if lost:
            memory.free(self.device)
            if self._occupied:
                self._limit = len(self._occupied)
                self._returned.append(wanted)
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
            if ran_out(error, self.device) and len(self._occupied) > 1:  # one at a time
                self._returned.extend(slot.segment for slot in self._occupied)
                self._occupied, self._limit = [], 1
                return
            for slot in list(self._occupied):
                self._leave(slot, state_of(error), error_text(error), traceback.format_exc(), error_kind(error))

    def _advance(self, stop: threading.Event) -> None:
        if not self._validate([slot for slot in self._occupied if slot.run.validation_due()], stop):
            return
        working = [slot for slot in self._occupied if not slot.done]
        if working:
            self._train(working)
        if not stop.is_set():
            self._finish([slot for slot in self._occupied if slot.done], stop)

    def _train(self, slots: list[Slot]) -> None:
        """One pass, and the slots behind it come to the front; those whose batch is complete step.

        Their losses and norms are fetched in one transfer, at which the device is waited for.
        """
        shares = self._filled(slots)
        members = [slots[share.adapter] for share in shares]
        began, before = time.perf_counter(), memory.mark(self.device)
        flat = try_pass(self.base, self._layouts, slots, shares, self.task)
        if flat is None:
            self._make_room(shares)
            return
        last = slots.index(members[-1]) + (1 if members[-1].complete else 0)
        self._occupied = [*slots[last:], *slots[:last], *[slot for slot in self._occupied if slot.done]]
        clipped = clip_all([slot for slot in members if slot.complete], self.device, self._back_to_checkpoint)
        if self.looks_ahead:
            self._layouts.prepare(self._filled(coming(self._occupied)))
        numbers = numbers_of(clipped, self.base.device)
        seconds, used = time.perf_counter() - began, memory.since(self.device, before)
        for span, slot in zip(flat.spans, members, strict=True):
            part = (span.stop - span.start) / flat.tokens
            slot.run.train_seconds += seconds * part
            self._used(slot, used * part)
        self._step(numbers)

    def _filled(self, slots: Sequence[Slot | StepBatch]) -> list[Share]:
        free = self.capacity.room(sum(slot.adapter.size for slot in self._occupied))
        return fill(slots, min(self.room, max(free, 1)), self.enough) if slots else []

    def _make_room(self, shares: list[Share]) -> None:
        """A pass of these shares ran out of memory: smaller passes; when one example is too many, fewer slots."""
        memory.free(self.device)
        if len(shares) > 1 or len(shares[0].examples) > 1:
            self.room = max(1, sum(int(np.asarray(self.train.lengths)[share.examples].sum()) for share in shares) // 2)
        else:
            self._set_aside(self._occupied[-1])

    def _set_aside(self, slot: Slot, *, whole: bool = True) -> None:
        """Out of memory: the slot's segment waits for another one to end; alone on the device, it is too large.

        whole: its state is that after a step, and worth a checkpoint; else it goes back to the one before.
        """
        if len(self._occupied) == 1:
            self._leave(slot, State.OUT_OF_MEMORY, too_large(slot.segment, self.device))
        else:
            self._occupied.remove(slot)
            self._limit = len(self._occupied)
            self._returned.append(slot.segment)
            if whole:
                fits(slot.run.save, self.device)
            slot.run.log("out of memory: waits for a free slot")
        slot.adapter.release()
        memory.free(self.device)

    def _back_to_checkpoint(self, slot: Slot) -> None:
        self._set_aside(slot, whole=False)

    def _used(self, slot: Slot, working: float) -> None:
        """On a GPU, note what a slot takes by itself: the model, its training state, its part of what was computed."""
        if self.device.type == "cuda":
            slot.used(self.capacity.fixed + slot.adapter.size * self.capacity.per_parameter + int(working))

    def _note_peak(self, slots: Sequence[Slot]) -> None:
        """On a CPU, where there is no telling slots apart: the process's peak is that of all that were there meanwhile."""
        if self.device.type == "cpu":
            for slot in slots:
                slot.used(memory.peak_bytes(self.device))

    def _step(self, numbers: Numbers) -> None:
        """The optimiser steps of the slots that `numbers` were fetched of."""
        began, before = time.perf_counter(), memory.mark(self.device)
        finite = update_all(numbers, self.device, self._back_to_checkpoint, self._diverged)
        seconds, used = time.perf_counter() - began, memory.since(self.device, before)
        for slot in [slot for slot in finite if slot in self._occupied]:
            slot.run.train_seconds += seconds / len(finite)
            self._used(slot, used / len(finite))
            try:
                slot.stepped(numbers[slot][0], finite[slot])
            except DivergedError as error:
                self._diverged(slot, error)
                continue
            if slot.run.checkpoint_due() and not slot.run.validation_due() and not fits(slot.run.save, self.device):
                self._back_to_checkpoint(slot)

    def _diverged(self, slot: Slot, error: DivergedError) -> None:
        self._leave(slot, State.DIVERGED, f"diverged at {error}; lower learning rates are safer")

    def _validate(self, slots: Sequence[Slot], stop: threading.Event) -> bool:
        """Put a point on each slot's curve. False where memory ran out: a slot was set aside, and all may be tried again."""
        for slot in [slot for slot in slots if slot.run.step == 0 and self._base_loss is not None]:
            slot.run.add_point(self._base_loss or 0.0, 0.0)
        slots = [slot for slot in slots if slot.run.step not in slot.run.curve]
        if not slots:
            return True
        if self.device.type == "cpu" and len(slots) > 1:  # as fast, and the same to the last bit whoever else is due
            return all(self._validate([slot], stop) for slot in slots if slot in self._occupied)
        before = memory.mark(self.device)
        adapters = [slot.adapter for slot in slots]
        found, self.validation_room = validate_within(self.base, adapters, self.validation, self.validation_room, stop.is_set, self.task)
        if found is None and len(slots) > 1:
            return all(self._validate([slot], stop) for slot in slots if slot in self._occupied)
        if found is None:
            self._set_aside(next((slot for slot in reversed(self._occupied) if slot is not slots[0]), slots[0]))
            return False
        losses, seconds = found
        used = memory.since(self.device, before) / len(slots)
        for slot, loss in zip(slots, losses, strict=True):
            self._used(slot, used)
            if not np.isfinite(loss):
                why = f"diverged at step {slot.run.step}: validation loss {loss}; lower learning rates are safer"
                self._leave(slot, State.DIVERGED, why)
                continue
            if slot.run.step == 0:
                self._base_loss = loss
            slot.run.add_point(loss, seconds / len(slots))
            if not slot.done and slot.run.checkpoint_due() and not fits(slot.run.save, self.device):
                self._set_aside(slot, whole=False)
        return True

    def _finish(self, slots: list[Slot], stop: threading.Event) -> None:
        for slot in slots:
            if not fits(slot.run.save, self.device):
                self._set_aside(slot, whole=False)
        slots = [slot for slot in slots if slot in self._occupied]
        if not self._validate([slot for slot in slots if slot.segment.stop_step not in slot.run.curve], stop):
            return
        for slot in [slot for slot in slots if slot in self._occupied]:
            try:
                if fits(partial(slot.save_adapter, self.base.model), self.device):
                    self._leave(slot, State.COMPLETED)
                else:
                    self._set_aside(slot)
            except StorageError as error:
                self._leave(slot, State.BAD_INPUT, str(error), kind=error_kind(error))

    def _cancel(self) -> None:
        for slot in list(self._occupied):
            if not slot.done:
                slot.again()  # a step half seen is seen again
                slot.run.save()
            self._leave(slot, State.CANCELLED, "stopped; a checkpoint was written")
        for wanted in self._returned:
            self._tell(Outcome(key=wanted.key, state=State.CANCELLED, message="stopped; a checkpoint was written"))
        self._returned.clear()

    def _leave(self, slot: Slot, state: State, message: str = "", details: str = "", kind: str = "") -> None:
        if message:
            with suppress(OSError):
                segment.write_log(slot.run.folder, f"{state}: {message}" + (f"\n{details}" if details else ""))
        self._occupied.remove(slot)
        self._limit = min(self.slots, self._limit + (1 if not self._returned else 0))
        self._note_peak([slot])
        facts = {"peak_memory_bytes": slot.peak, "devices": 1, "device": memory.device_name(self.device), "error": kind}
        self._tell(slot.run.outcome(state, message, **facts))
