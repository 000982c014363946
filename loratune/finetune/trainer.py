"""Transformers' Trainer, given our batches, loss, clipping and bookkeeping.

Trainer keeps the loop, gradient accumulation, DDP and the trackers. Its own logging, saving, evaluation and shuffling
are off: they cost more than a step of a small model, and none of them can be resumed exactly.
"""

import threading
from typing import Any

import numpy as np
import peft
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.utils.data import DataLoader, Dataset

from loratune.data.batches import Batch, Sides, Tokens, collate, cut, micro_batch_count, response_tokens
from loratune.data.shared_prefix import dropout_owners
from loratune.data.tasks import TrainingTask
from loratune.finetune import memory
from loratune.finetune import model as base_model
from loratune.finetune.distributed import average_gradients
from loratune.finetune.dropout import DropoutKey
from loratune.finetune.failures import DivergedError
from loratune.finetune.model import BaseModel
from loratune.finetune.optimisation import HALF_PRECISION_SCALE, clip, learning_rate_factor, warmup_steps
from loratune.finetune.rope import sides_of
from loratune.finetune.segment import SegmentRun
from loratune.finetune.validation import token_nll
from loratune.work import TrainingRecipe


class MicroBatches(Dataset[dict[str, Any]]):
    """What one process sees of steps `start` to `stop`: item s * count + m is micro-batch m of step start + s."""

    def __init__(
        self, run: SegmentRun, tokens: Tokens, *, start: int, stop: int, size: int, pad_id: int, rank: int, world: int, sides: Sides
    ) -> None:
        self.run, self.tokens, self.start, self.stop = run, tokens, start, stop
        self.size, self.pad_id, self.rank, self.world, self.sides = size, pad_id, rank, world, sides
        self.count = micro_batch_count(run.segment.hyperparameters.batch_size, size, world)
        if np.ptp(sides(np.asarray(tokens.lengths))):  # Trainer accumulates as many at every step: so many as the worst needs
            steps = range(start, stop)
            self.count = max((len(self._cut(run.examples(step), other)) for step in steps for other in range(world)), default=self.count)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, micro = self.start + index // self.count, index % self.count
        examples = self.run.examples(step)
        if micro == 0:
            self._pieces = self._cut(examples, self.rank, self.count)
            self._items = response_tokens(self.tokens, examples)
            self._owners = dropout_owners(self.tokens, examples)
        members = self._pieces[micro]
        # A process without examples left still takes part in DDP's reduction, with an example that is not scored.
        seen = members if len(members) else [0]
        owners = [self._owners[index] for index in seen]
        batch = collate(self.tokens, examples[seen], owners=owners, pad_id=self.pad_id, scored=len(members) > 0)
        return {"batch": batch, "items": self._items, "step": step}

    def _cut(self, examples: np.ndarray, rank: int, count: int | None = None) -> list[np.ndarray]:
        return cut(self.tokens.lengths[examples], self.size, rank, self.world, self.sides, count)


class SegmentTrainer(transformers.Trainer):
    """Trains one adapter from the run's step to the segment's last.

    Raises DivergedError as soon as the loss or the gradient's norm is not finite, before it reaches the weights.
    """

    def __init__(
        self,
        wrapped: peft.PeftModel,
        key: DropoutKey,
        base: BaseModel,
        run: SegmentRun,
        tokens: Tokens,
        optimizer: torch.optim.Optimizer,
        training: TrainingRecipe,
        *,
        hooks: "StepHooks",
        task: TrainingTask,
        rank: int,
        world: int,
        sharded: bool = False,
    ) -> None:
        self.key, self.base, self.run, self.task, self.world, self.sharded = key, base, run, task, world, sharded
        self.head = base_model.output_head(base.model)
        self.adamw = optimizer
        self.scale = HALF_PRECISION_SCALE if base.dtype == torch.float16 else 1.0
        segment, h = run.segment, run.segment.hyperparameters
        self.batches = MicroBatches(
            run,
            tokens,
            start=run.step,
            stop=segment.stop_step,
            size=training.micro_batch_size,
            pad_id=base.pad_id,
            rank=rank,
            world=world,
            sides=sides_of(base.model.config),
        )
        warmup = warmup_steps(h.warmup_ratio, segment.total_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: learning_rate_factor(training.lr_scheduler_type, step, warmup, segment.total_steps),
            last_epoch=run.step - 1,
        )
        arguments = transformers.TrainingArguments(
            output_dir=str(run.folder),
            max_steps=segment.stop_step - run.step,
            per_device_train_batch_size=training.micro_batch_size,
            gradient_accumulation_steps=self.batches.count,
            learning_rate=h.learning_rate,
            weight_decay=h.weight_decay,
            max_grad_norm=0.0,  # clipped by StepHooks
            seed=segment.seed % 2**32,
            use_cpu=base.device.type == "cpu",
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        arguments._n_gpu = min(1, arguments.n_gpu)  # never DataParallel: several GPUs mean torchrun
        self.step_loss = torch.zeros((), device=base.device, dtype=torch.float64)
        super().__init__(model=wrapped, args=arguments, optimizers=(optimizer, scheduler), callbacks=[hooks])
        self.remove_callback(transformers.PrinterCallback)
        hooks.trainer = self

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """DDP knows no weights that are shared out: then nothing is wrapped, and StepHooks averages the gradients."""
        return _Unwrapped(model) if self.sharded else super()._wrap_model(model, training, dataloader)

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.batches, batch_size=None)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        batch: Batch = inputs["batch"].to(self.base.device)
        if self.world == 1 and not len(batch.labels):  # left over at a step that needs fewer
            return torch.zeros((), device=self.base.device)
        if not model.training:
            model.train()
        positions = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        self.key.set(inputs["step"], batch.owners, positions)
        with base_model.autocast(self.base):
            summed = self.task.loss(token_nll(model, self.head, batch), batch.labels).sum()
        # DDP averages gradients over processes; the loss is a sum.
        loss = summed * (self.world * self.scale / inputs["items"])
        self.accelerator.backward(loss)
        self.step_loss += summed.detach()
        self.step_items = inputs["items"]
        return loss.detach() / self.scale

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's estimate walks over all parameters at every step

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        return None  # StepHooks has it


class _Unwrapped(nn.Module):
    """The model, so that Trainer takes it for one that is wrapped already."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Any, **options: Any) -> Any:
        return self.module(*given, **options)


class StepHooks(transformers.TrainerCallback):
    """What happens around every optimiser step: clip, look for inf and NaN, validate, checkpoint, report, stop."""

    trainer: SegmentTrainer

    def __init__(
        self, run: SegmentRun, parameters: list[nn.Parameter], max_norm: float | None, validate: Any, stop: threading.Event
    ) -> None:
        self.run, self.parameters, self.max_norm, self.validate, self.stop = run, parameters, max_norm, validate, stop
        self.cancelled = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.run.training(True)
        state.global_step, state.max_steps = self.run.step, self.run.segment.stop_step  # so that trackers see the run's steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        if trainer.sharded:
            average_gradients(self.parameters)
        norm = clip(self.parameters, self.max_norm, trainer.scale)
        word = torch.stack([trainer.step_loss, norm.double(), torch.full_like(trainer.step_loss, float(self.stop.is_set()))])
        if trainer.world > 1:
            word[1] /= trainer.world  # equal in all processes
            dist.all_reduce(word)
        self.nll, norm_value, stopped = word.tolist()
        trainer.step_loss.zero_()
        self.cancelled = stopped > 0
        self.learning_rate = float(trainer.adamw.param_groups[0]["lr"])
        if not (abs(self.nll) < float("inf") and norm_value < float("inf")):
            raise DivergedError(f"step {self.run.step + 1}: loss {self.nll / trainer.step_items:.4g}, gradient norm {norm_value:.4g}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self.run.stepped(self.nll, self.trainer.step_items, self.learning_rate)
        if self.run.step >= self.run.segment.stop_step:
            return control
        if self.run.validation_due() and not self.cancelled:
            memory.synchronize(self.trainer.base.device)
            self.run.training(False)
            self.validate()
            self.run.training(True)
        if self.cancelled:
            control.should_training_stop = True
        elif self.run.checkpoint_due():
            self.run.save()
        return control
