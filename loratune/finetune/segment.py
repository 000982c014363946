"""One segment on its way: counters, learning curve, checkpoints, log and progress, the same in every engine.

A `SegmentRun` knows nothing of how steps are taken. An engine asks it which examples a step trains on, tells it
each step's loss, and asks it for the outcome.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from loratune.data.batches import Tokens
from loratune.data.order import order
from loratune.finetune import checkpoint
from loratune.record.paths import RunPaths
from loratune.system.masking import masked
from loratune.work import CurvePoint, Outcome, Progress, Segment, State, TrainingRecipe

_YOUNG = 30.0  # seconds; with checkpoint_steps unset, a crash checkpoint younger than this is not renewed


class Inbox(Protocol):
    """Where an engine takes its segments from, one at a time, whenever it has a free slot."""

    def __call__(self, wait: bool) -> Segment | None:
        """The next segment. None: nothing now, or, having waited, nothing ever again."""


class SegmentRun:
    """The bookkeeping of one segment. `writes` is true in the one process that writes and reports."""

    def __init__(
        self,
        segment: Segment,
        *,
        folder: Path,
        training: TrainingRecipe,
        tokens: Tokens,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        report: Callable[[Progress], None],
        writes: bool = True,
    ) -> None:
        self.segment, self.folder, self.writes = segment, folder, writes
        self.step = 0
        self.curve: dict[int, CurvePoint] = {}
        self._keeps_best = training.keep == "best"
        self._best_step: int | None = None  # of the lowest point so far, and the adapter's weights there
        self._best: dict[str, torch.Tensor] = {}
        self.train_seconds = 0.0  # of this segment, by all its attempts, up to the last checkpoint
        self.validation_seconds = 0.0
        self._clock: float | None = None  # when training last went on
        self._nll, self._items = 0.0, 0  # since the curve's last point
        self._parameters, self._optimizer, self._report = parameters, optimizer, report
        h = segment.hyperparameters
        self._examples = order(segment.seed, len(tokens), segment.total_steps * h.batch_size).reshape(-1, h.batch_size)
        self._tokens = np.concatenate([[0], np.cumsum(np.asarray(tokens.lengths)[self._examples].sum(axis=1))])
        self._every = training.checkpoint_steps or max(1, segment.total_steps // 10)
        self._age = 0.0 if training.checkpoint_steps else _YOUNG
        self._saved_at = self._reported_at = time.monotonic()
        self._pace = (time.monotonic(), 0)  # when the log's last line was written, tokens then
        self._identity = json.dumps([h.to_plain(), segment.seed, segment.total_steps], sort_keys=True)

    def examples(self, step: int) -> np.ndarray:
        """The examples that step `step` (from 0) trains on."""
        return self._examples[step]

    def tokens(self, step: int) -> int:
        """Training tokens of the run's first `step` steps, padding excluded."""
        return int(self._tokens[step])

    def resume(self) -> None:
        """Go on from the run's newest checkpoint that this segment can use; from step 0 when there is none."""
        stop = self.segment.stop_step
        found = checkpoint.newest_checkpoint(self.folder, run=self._identity, at_most=stop, moments_below=stop)
        if self.writes:
            checkpoint.remove_leftovers(self.folder)
        if found is None:
            if self.segment.start_step:
                self.log(f"no checkpoint for step {self.segment.start_step}: training again from step 0, to the same result")
            return
        checkpoint.restore(found, self._parameters, self._optimizer)
        facts = found.facts
        self.step = found.step
        self.curve = {p["step"]: CurvePoint(**p) for p in facts["curve"]}
        self._best_step, self._best = facts.get("best_step"), checkpoint.kept_weights(found)
        if facts["start_step"] == self.segment.start_step and facts["stop_step"] == stop:
            self._nll, self._items = facts["nll"], facts["items"]
            self.train_seconds, self.validation_seconds = facts["train_seconds"], facts["validation_seconds"]
        self.log(f"continuing from step {self.step}")

    def stepped(self, nll: float, items: int, learning_rate: float) -> None:
        """A step is done: `nll` summed over the global batch's `items` response tokens."""
        self.step += 1
        self._nll += nll
        self._items += items
        now = time.monotonic()
        if now - self._reported_at >= 1.0 and self.writes:
            self._reported_at = now
            since, tokens = self._pace
            speed = (self.tokens(self.step) - tokens) / max(now - since, 1e-9) if tokens else 0.0
            self._pace = (now, self.tokens(self.step))
            self.log(f"step {self.step}/{self.segment.total_steps}  loss {nll / items:.4f}  lr {learning_rate:.3e}  {speed:,.0f} tokens/s")
            self._report(self._progress(train_loss=nll / items))

    def training(self, goes_on: bool) -> None:
        """Start or stop the clock of `train_seconds`."""
        now = time.perf_counter()
        if self._clock is not None:
            self.train_seconds += now - self._clock
        self._clock = now if goes_on else None

    def validation_due(self) -> bool:
        """Whether the curve wants a point at the present step, other than the last."""
        points = (*self.segment.validate_at, *(self.segment.validated_at if self._keeps_best else ()))
        return self.step in points and self.step not in self.curve and self.step < self.segment.stop_step

    def add_point(self, validation_loss: float, seconds: float) -> None:
        """Put a validation on the curve."""
        train_loss = self._nll / self._items if self._items else None
        self._nll, self._items = 0.0, 0
        self.validation_seconds += seconds
        self.curve[self.step] = CurvePoint(
            step=self.step, tokens=self.tokens(self.step), train_loss=train_loss, validation_loss=validation_loss
        )
        # Step 0 is the base model, which is no adapter to keep.
        if self._keeps_best and self.step > 0 and validation_loss < self._lowest:
            self._best_step = self.step
            self._best = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}
        self.log(f"step {self.step}/{self.segment.total_steps}  validation loss {validation_loss:.6f}  in {seconds:.1f} s")
        if self.writes:
            self._report(self._progress(train_loss=train_loss, validation_loss=validation_loss))

    def checkpoint_due(self) -> bool:
        """Whether a crash checkpoint is due."""
        old = time.monotonic() - self._saved_at >= self._age
        return self.step % self._every == 0 and self.step < self.segment.stop_step and old

    def save(self) -> None:
        """Write a checkpoint; of a complete run the weights only."""
        self._saved_at = time.monotonic()
        self.training(self._clock is not None)
        if not self.writes:
            return
        complete = self.step >= self.segment.total_steps
        facts: dict[str, Any] = {
            "curve": [vars(p) for p in self.curve.values()],
            "nll": self._nll,
            "items": self._items,
            "start_step": self.segment.start_step,
            "stop_step": self.segment.stop_step,
            "train_seconds": self.train_seconds,
            "validation_seconds": self.validation_seconds,
            "best_step": self._best_step,
        }
        tensors = checkpoint.capture(self._parameters, None if complete else self._optimizer, self._best)
        made = checkpoint.Checkpoint(step=self.step, run=self._identity, tensors=tensors, facts=facts)
        checkpoint.save_checkpoint(self.folder, made, self.segment.attempt)

    def settle(self) -> None:
        """The last validation is on the curve: bring the weights to those of the point that is kept, so that they can be saved.

        With keep: best the checkpoint is written once more before, for the segment that may go on from it needs this curve and
        its best point.
        """
        if not self._keeps_best:
            return
        self.save()
        if self._best_step != self.step:
            self.log(f"keeping the adapter of step {self._best_step}, validation loss {self._lowest:.6f}")
            with torch.no_grad():
                for name, p in self._parameters.items():
                    p.copy_(self._best[name])

    @property
    def _lowest(self) -> float:
        """The lowest validation loss of the run so far; infinite before the first."""
        point = self.curve.get(self._best_step) if self._best_step is not None else None
        return math.inf if point is None or point.validation_loss is None else point.validation_loss

    def outcome(self, state: State, message: str = "", **facts: Any) -> Outcome:
        """The answer, as far as it got."""
        wanted = {*self.segment.validate_at, self.segment.stop_step}
        points = tuple(p for step, p in sorted(self.curve.items()) if step in wanted and step >= self.segment.start_step)
        completed = state is State.COMPLETED
        kept = self.curve.get(self._best_step if self._keeps_best and self._best_step is not None else self.segment.stop_step)
        return Outcome(
            key=self.segment.key,
            state=state,
            validation_loss=kept.validation_loss if kept is not None and completed else None,
            kept_step=self._best_step if completed else None,
            curve=points,
            tokens=max(0, self.tokens(self.step) - self.tokens(self.segment.start_step)),
            train_seconds=self.train_seconds,
            validation_seconds=self.validation_seconds,
            trainable_parameters=sum(p.numel() for p in self._parameters.values()),
            message=message,
            **facts,
        )

    def log(self, line: str) -> None:
        """Add a line to the run's log.txt."""
        if self.writes:
            write_log(self.folder, line)

    def _progress(self, train_loss: float | None, validation_loss: float | None = None) -> Progress:
        return Progress(
            key=self.segment.key,
            step=self.step,
            total_steps=self.segment.total_steps,
            tokens=self.tokens(self.step),
            train_loss=train_loss,
            validation_loss=validation_loss,
        )


def write_log(folder: Path, text: str) -> None:
    """Add a line, or a traceback, with the time to `log.txt` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(RunPaths(folder).log, "a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {masked(text)}\n")
