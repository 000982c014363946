"""The reference engine: Transformers' Trainer and PEFT, one adapter at a time, on one or several devices.

One process per device under torchrun; every process calls `run` with the same segments, process 0 writes and reports.
"""

import contextlib
import copy
import gc
import random
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from loratune.data.batches import Tokens
from loratune.data.prepared import Prepared
from loratune.data.tasks import task_named
from loratune.errors import ModelError, TrainingError, error_kind
from loratune.finetune import distributed, memory, model, segment
from loratune.finetune.failures import DivergedError, error_text, ran_out, state_of
from loratune.finetune.lora import adapter_parameters
from loratune.finetune.methods import method_named
from loratune.finetune.optimisation import make_optimizer
from loratune.finetune.peft_layers import ADAPTER, detach
from loratune.finetune.segment import Inbox, SegmentRun
from loratune.finetune.targets import left_out
from loratune.finetune.trainer import SegmentTrainer, StepHooks
from loratune.finetune.validation import validate
from loratune.record.paths import RunPaths, StudyPaths
from loratune.system.files import write_atomically
from loratune.work import Outcome, Progress, Recipe, Segment, State

_GROUP_OUTCOME = "group-outcome.json"


class HfEngine:
    """Holds the base model and the data; trains one segment after the other.

    Raises ModelError and DataError when either cannot be loaded.
    """

    slots = 1
    notice = ""

    def __init__(self, recipe: Recipe, root: Path) -> None:
        self.recipe, self.root = recipe, root
        self.task, self.method = task_named(recipe.task), method_named(recipe.method)
        self.device = model.choose_device(recipe.device)
        self.rank, self.world = distributed.join_group(self.device)
        prepared = Prepared.load(root / recipe.data)
        self.train: Tokens = prepared.train
        self.validation: Tokens = prepared.validation
        self.sharded = recipe.training.sharding == "fsdp" and self.world > 1
        self.base = self._sharded(recipe) if self.sharded else model.load(recipe.model, self.device)
        gc.collect()
        gc.freeze()  # what is loaded stays: collecting between trials need not look at it again
        self.training = recipe.training  # with smaller batches, once memory did not suffice
        self._base_loss: float | None = None  # of the base model, which is every trial's at step 0

    def _sharded(self, recipe: Recipe) -> model.BaseModel:
        """Loaded into main memory, then shared out over the devices. Raises ModelError."""
        if recipe.model.load_in_4bit:
            raise ModelError("load_in_4bit: weights of four bits cannot be shared out (training.sharding: fsdp). Switch one of them off.")
        dtype = model.choose_dtype(recipe.model.dtype, self.device)
        named = replace(recipe.model, dtype=next(name for name, known in model.DTYPES.items() if known == dtype))
        base = model.load(named, torch.device("cpu"))
        distributed.shard(base.model, self.device, self.world)
        return replace(base, device=self.device)

    def run(self, inbox: Inbox, tell: Callable[[Progress | Outcome], None], stop: threading.Event) -> None:
        """Train what the inbox gives, in its order. Raises TrainingError only where one process of several failed."""
        while (wanted := inbox(wait=True)) is not None:
            tell(self._outcome(wanted, tell, stop))

    def close(self) -> None:
        """Free the model; the engine is of no use afterwards."""
        del self.base
        gc.unfreeze()
        memory.free(self.device)

    def _outcome(self, wanted: Segment, report: Callable[[Progress], None], stop: threading.Event) -> Outcome:
        folder = StudyPaths(self.root).of(wanted).folder
        if (words := self._group_outcome(folder, wanted)) is not None:
            return words
        if distributed.agree(stop.is_set()):
            return Outcome(key=wanted.key, state=State.CANCELLED, message="stopped before it began")
        memory.reset_peak(self.device)
        with _global_randomness_kept():
            outcome = self._attempt(wanted, folder, report, stop)
            while outcome.state is State.OUT_OF_MEMORY and self.training.micro_batch_size > 1 and self.world == 1:
                memory.free(self.device)
                size = self.training.micro_batch_size // 2
                self.training = replace(self.training, micro_batch_size=size)
                segment.write_log(folder, f"again with micro_batch_size {size}, to the same result")
                outcome = self._attempt(wanted, folder, report, stop)
        if outcome.state is State.OUT_OF_MEMORY:  # whatever the size: another configuration may train with the one that was chosen
            self.training = replace(self.training, micro_batch_size=self.recipe.training.micro_batch_size)
        memory.free(self.device)
        if self.world > 1 and outcome.state in (State.OUT_OF_MEMORY, State.CRASHED):
            # The other processes wait for this one in a collective operation: the whole group has to start again.
            if outcome.state is State.OUT_OF_MEMORY:
                write_atomically(folder / _GROUP_OUTCOME, outcome.to_json())
            raise TrainingError(f"process {self.rank} of {self.world}: {outcome.message}")
        return outcome

    def _attempt(self, wanted: Segment, folder: Path, report: Callable[[Progress], None], stop: threading.Event) -> Outcome:
        run: SegmentRun | None = None
        state, message, details, kind = State.COMPLETED, "", "", ""
        try:
            lines = left_out(self.base.model, wanted.hyperparameters.target_modules)
            adapter, key = self.method.attach(self.base.model, wanted.hyperparameters, wanted.seed)
            if self.recipe.training.gradient_checkpointing:
                model.checkpoint_activations(self.base.model, True)
            parameters = adapter_parameters(adapter)
            optimizer = make_optimizer(parameters, wanted.hyperparameters, self.recipe.training)
            run = SegmentRun(
                wanted,
                folder=folder,
                training=self.recipe.training,
                tokens=self.train,
                parameters=parameters,
                optimizer=optimizer,
                report=report,
                writes=self.rank == 0,
            )
            for line in lines:
                run.log(line)
            state = self._train(run, adapter, key, parameters, optimizer, stop)
            message = "stopped; a checkpoint was written" if state is State.CANCELLED else ""
        except DivergedError as error:
            state, message = State.DIVERGED, f"diverged at {error}; lower learning rates are safer"
        except Exception as error:
            state, message, kind = state_of(error), error_text(error), error_kind(error)
            if ran_out(error, self.device):
                message = (
                    f"out of memory on {memory.device_name(self.device)} with lora_r {wanted.hyperparameters.lora_r}, "
                    f"micro_batch_size {self.training.micro_batch_size}; "
                    "use a smaller micro_batch_size, gradient_checkpointing or load_in_4bit"
                )
            details = "" if kind else traceback.format_exc()
        facts: dict[str, Any] = {
            "peak_memory_bytes": memory.peak_bytes(self.device),
            "devices": self.world,
            "device": memory.device_name(self.device),
            "error": kind,
        }
        outcome = Outcome(key=wanted.key, state=state, message=message, **facts) if run is None else run.outcome(state, message, **facts)
        if message and self.rank == 0:
            with contextlib.suppress(OSError):
                segment.write_log(folder, f"{state}: {message}" + (f"\n{details}" if details else ""))
        if self.recipe.training.gradient_checkpointing:
            model.checkpoint_activations(self.base.model, False)
        detach(self.base.model)
        return outcome

    def _train(self, run: SegmentRun, adapter, key, parameters, optimizer, stop: threading.Event) -> State:  # type: ignore[no-untyped-def]
        run.resume()
        if run.validation_due():
            self._validate(run, adapter)
        if run.step < run.segment.stop_step:
            hooks = StepHooks(
                run, list(parameters.values()), self.recipe.training.max_grad_norm, lambda: self._validate(run, adapter), stop
            )
            trainer = SegmentTrainer(
                adapter,
                key,
                self.base,
                run,
                self.train,
                optimizer,
                self.training,
                hooks=hooks,
                task=self.task,
                rank=self.rank,
                world=self.world,
                sharded=self.sharded,
            )
            try:
                trainer.train()
            finally:
                memory.synchronize(self.device)  # the last step's seconds are this trial's
                run.training(False)
            if not all(bool(p.isfinite().all()) for p in parameters.values()):
                raise DivergedError(f"step {run.step}: the adapter's weights are not finite")
            run.save()
            if hooks.cancelled:
                return State.CANCELLED
        if run.segment.stop_step not in run.curve:
            try:
                self._validate(run, adapter, stop if self.world == 1 else None)
            except InterruptedError:
                return State.CANCELLED
        run.settle()
        if self.rank == 0:
            weights = peft.get_peft_model_state_dict(adapter, adapter_name=ADAPTER, save_embedding_layers=False)
            self.method.save(RunPaths(run.folder).adapter, copy.copy(adapter.peft_config[ADAPTER]), weights)
        return State.COMPLETED

    def _validate(self, run: SegmentRun, adapter: torch.nn.Module, stop: threading.Event | None = None) -> None:
        if run.step == 0 and self._base_loss is not None:
            run.add_point(self._base_loss, 0.0)
            return
        while True:
            try:
                loss, seconds = validate(
                    adapter,
                    self.validation,
                    batch_size=self.training.validation_batch_size,
                    pad_id=self.base.pad_id,
                    head=model.output_head(self.base.model),
                    device=self.device,
                    autocast=lambda: model.autocast(self.base),
                    interrupted=stop.is_set if stop is not None else lambda: False,
                    task=self.task,
                    rank=self.rank,
                    world=self.world,
                    in_step=self.sharded,
                )
                break
            except Exception as error:
                size = self.training.validation_batch_size
                if not ran_out(error, self.device) or size == 1 or self.world > 1:
                    raise
            self.training = replace(self.training, validation_batch_size=size // 2)  # the loss does not depend on it
            memory.free(self.device)
        if not np.isfinite(loss):
            raise DivergedError(f"step {run.step}: validation loss {loss}")
        if run.step == 0:
            self._base_loss = loss
        run.add_point(loss, seconds)

    def _group_outcome(self, folder: Path, wanted: Segment) -> Outcome | None:
        """The outcome that a process of a group left when it ran out of memory, and the group had to start again."""
        if self.world == 1:
            return None
        path = folder / _GROUP_OUTCOME
        text = distributed.broadcast(path.read_text() if self.rank == 0 and path.exists() else None)
        outcome = Outcome.from_json(text) if text is not None else None
        if outcome is None or outcome.key != wanted.key:
            return None
        if self.rank == 0:
            path.unlink()
        return outcome


@contextlib.contextmanager
def _global_randomness_kept() -> Iterator[None]:
    """Trainer seeds every global generator; give the caller's back."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
