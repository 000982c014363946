"""What an engine is, loading one, and probing what a trial costs before a study spends it."""

import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from loratune.errors import ModelError
from loratune.finetune.batches import Tokens
from loratune.finetune.distributed import broadcast
from loratune.work import Hyperparameters, Outcome, Pack, Progress, Recipe, Segment, State

__all__ = ["Engine", "Probe", "broadcast", "load_engine", "probe"]


class Engine(Protocol):
    """Trains packs. It may hold a base model on a device; nothing of one trial reaches the next.

    `run` returns one outcome per segment, in order, and never raises for what a trial did: that is the
    outcome's state. When `stop` is set it finishes the optimiser step, writes a checkpoint and answers CANCELLED.
    """

    def run(self, pack: Pack, report: Callable[[Progress], None], stop: threading.Event) -> list[Outcome]: ...

    def close(self) -> None: ...


def load_engine(recipe: Recipe, root: Path) -> Engine:
    """The recipe's engine for the study in the folder `root`. Raises ModelError, DataError, StorageError."""
    if recipe.engine == "hf":
        from loratune.finetune.hf import HfEngine

        return HfEngine(recipe, root)
    raise ModelError(f"engine: {recipe.engine!r} is not known; allowed: hf.")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A short measured run of one configuration."""

    state: State  # completed, or out_of_memory, ...
    message: str  # why, when not completed
    seconds_to_load: float  # model and data
    training_tokens_per_second: float  # prompt and response tokens, padding excluded; 0 unless completed
    validation_tokens_per_second: float
    training_tokens: int  # in one pass over the training set
    validation_tokens: int  # in one validation
    peak_memory_bytes: int  # while training and validating on the longest examples
    trainable_parameters: int
    device: str


class Subset:
    """Some examples of a split, in the order given."""

    def __init__(self, tokens: Tokens, chosen: np.ndarray) -> None:
        self._tokens, self._chosen = tokens, chosen

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray(self._tokens.lengths)[self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        return self._tokens[int(self._chosen[index])]


def probe(recipe: Recipe, root: Path, hyperparameters: Hyperparameters, *, steps: int = 3, validation_examples: int = 64) -> Probe:
    """Load the engine and train `hyperparameters` for a few steps: first on the longest examples, then timed on usual ones.

    Writes nothing into `root`. Raises what `load_engine` raises; out of memory is a state of the answer.
    """
    from loratune.finetune.hf import HfEngine

    recipe = replace(recipe, data=str((root / recipe.data).resolve()), training=replace(recipe.training, report_to=()))
    with tempfile.TemporaryDirectory(prefix="loratune-probe-") as scratch:
        began = time.perf_counter()
        engine = HfEngine(recipe, Path(scratch))
        loading = time.perf_counter() - began
        train, validation = engine.train, engine.validation

        def measured(train_on: Tokens, validate_on: Tokens, count: int, name: str) -> Outcome:
            engine.train, engine.validation = train_on, validate_on
            wanted = Segment(
                trial=0,
                run=name,
                hyperparameters=hyperparameters,
                seed=recipe.training.seed,
                total_steps=count,
                stop_step=count,
            )
            return engine.run(Pack(segments=(wanted,)), lambda _: None, threading.Event())[0]

        worst = measured(
            Subset(train, np.argsort(-np.asarray(train.lengths), kind="stable")[: hyperparameters.batch_size]),
            Subset(validation, np.argsort(-np.asarray(validation.lengths), kind="stable")[: recipe.training.validation_batch_size]),
            1,
            "longest",
        )
        usual = worst
        if worst.state is State.COMPLETED:
            sample = Subset(validation, np.random.default_rng(0).permutation(len(validation))[:validation_examples])
            usual = measured(train, sample, steps, "usual")
            validated = int(sample.lengths.sum())
        engine.close()
    done = usual.state is State.COMPLETED
    return Probe(
        state=usual.state,
        message=usual.message,
        seconds_to_load=loading,
        training_tokens_per_second=usual.tokens / usual.train_seconds if done else 0.0,
        validation_tokens_per_second=validated / usual.validation_seconds if done else 0.0,
        training_tokens=int(np.sum(train.lengths)),
        validation_tokens=int(np.sum(validation.lengths)),
        peak_memory_bytes=max(worst.peak_memory_bytes, usual.peak_memory_bytes),
        trainable_parameters=worst.trainable_parameters,
        device=worst.device,
    )
