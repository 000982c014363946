"""What an engine is, loading one, running one, and probing what a trial costs before a study spends it."""

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from loratune.data.batches import Tokens
from loratune.errors import LoratuneError, ModelError, NotPackableError
from loratune.finetune import memory, model
from loratune.finetune.failures import ran_out
from loratune.finetune.packed.engine import PackedEngine
from loratune.finetune.segment import Inbox
from loratune.system import files
from loratune.system.machine import threads_for
from loratune.work import Hyperparameters, Outcome, Progress, Recipe, Segment, State


class Engine(Protocol):
    """Trains segments in `slots`. It may hold a base model on a device; nothing of one trial reaches another.

    `run` takes segments while slots are free, tells progress on the way and exactly one outcome for each
    segment taken, as soon as it is known, and returns when the inbox has ended and every slot is empty. It
    never raises for what a trial did: that is the outcome's state. When `stop` is set it finishes the
    optimiser step, writes checkpoints, and answers CANCELLED for what it trains and takes.

    An outcome's seconds are the segment's share of the engine's: what trained together adds up to the clock. Its peak
    of memory is what the segment needs by itself, the model included; on a CPU it is the process's.
    """

    slots: int  # segments that it trains at the same time
    notice: str  # a line for the user, on what the engine is or does; usually empty
    device: torch.device
    train: Tokens
    validation: Tokens

    def run(self, inbox: Inbox, tell: Callable[[Progress | Outcome], None], stop: threading.Event) -> None: ...

    def close(self) -> None: ...


def load_engine(recipe: Recipe, root: Path) -> Engine:
    """The recipe's engine for the study in the folder `root`; `hf`, with a warning, for what `packed` cannot train.

    Raises ModelError, also where the device has no memory for the model, DataError, StorageError, DeviceLostError.
    """
    if recipe.engine not in ("packed", "hf"):
        raise ModelError(f"engine: {recipe.engine!r} is not known; allowed: hf, packed.")
    device = model.choose_device(recipe.device)
    try:
        return _loaded(recipe, root)
    except LoratuneError:
        raise
    except Exception as error:
        if not ran_out(error, device):
            raise
    memory.free(device)
    free = f", {memory.available(device) / 2**30:.1f} GiB available to this process" if device.type == "cuda" else ""
    raise ModelError(
        f"model {recipe.model.name_or_path!r}: out of memory while loading it on {memory.device_name(device)}{free}. "
        "Use load_in_4bit or a smaller model, or stop other programs that use the device's memory."
    )


def _loaded(recipe: Recipe, root: Path) -> Engine:
    if recipe.engine == "hf":
        return _reference(recipe, root)
    try:
        return PackedEngine(recipe, root)
    except NotPackableError as error:
        why = str(error)
    memory.free(model.choose_device(recipe.device))  # of the model that was loaded for `packed`: it goes with the error
    engine = _reference(recipe, root)
    cost = "training takes longer, 1.7 to 2.5 times as long where it was measured, on CPUs"
    engine.notice = f"the packed engine cannot train this model: {why}; warning: {cost}; training one trial at a time with hf"
    return engine


def _reference(recipe: Recipe, root: Path) -> Engine:
    from loratune.finetune.hf import HfEngine  # Trainer, with datasets and pandas: a second that `packed` does without

    return HfEngine(recipe, root)


def limit_threads(threads: int | None) -> None:
    """Keep this process's torch to so many threads; where None, to what it may use (machine.threads_for), if that is fewer."""
    torch.set_num_threads(threads or min(torch.get_num_threads(), threads_for(1)))


def run_segments(
    engine: Engine, segments: Sequence[Segment], *, tell: Callable[[Progress], None] = lambda _: None, stop: threading.Event | None = None
) -> list[Outcome]:
    """Train `segments` with as many at a time as there are slots; their outcomes, in the segments' order."""
    waiting = iter(segments)
    outcomes: dict[str, Outcome] = {}

    def hear(item: Progress | Outcome) -> None:
        if isinstance(item, Outcome):
            outcomes[item.key] = item
        else:
            tell(item)

    engine.run(lambda wait: next(waiting, None), hear, stop or threading.Event())
    return [outcomes[segment.key] for segment in segments]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A short measured run of one configuration."""

    state: State  # completed, or out_of_memory, ...
    message: str  # why, when not completed
    seconds_to_load: float  # model and data
    training_tokens_per_second: float  # of all slots together; prompt and response, padding excluded; 0 unless completed
    validation_tokens_per_second: float
    spread: tuple[float, float]  # slowest and fastest training speed measured, each over the one told; (1, 1) unless completed
    training_tokens: int  # in one pass over the training set
    validation_tokens: int  # in one validation
    peak_memory_bytes: int  # while training and validating on the longest examples, every slot being full
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


def probe(
    recipe: Recipe,
    root: Path,
    hyperparameters: Hyperparameters,
    *,
    steps: int = 2,
    repeats: int = 3,
    validation_examples: int = 64,
    threads: int | None = None,
) -> Probe:
    """Load the engine and train `hyperparameters` in all of its slots, first on the longest examples, then timed on usual ones.

    repeats: how often so many steps are timed; the speed is that of all of them, its spread that between them.
    threads: of a process that trains, where that is not torch's number; this process keeps its own.
    Writes nothing into `root`. Raises what `load_engine` raises; out of memory is a state of the answer.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    scratch = files.scratch("probe")
    try:
        return _probe(recipe, root, Path(scratch), hyperparameters, steps, repeats, validation_examples)
    finally:
        torch.set_num_threads(before)
        shutil.rmtree(scratch, ignore_errors=True)


def _probe(
    recipe: Recipe, root: Path, scratch: Path, hyperparameters: Hyperparameters, steps: int, repeats: int, validation_examples: int
) -> Probe:
    recipe = replace(recipe, data=str((root / recipe.data).resolve()))
    began = time.perf_counter()
    engine = load_engine(recipe, scratch)
    loading = time.perf_counter() - began
    train, validation = engine.train, engine.validation

    def measured(train_on: Tokens, validate_on: Tokens, count: int, name: str) -> Outcome:
        """All slots' work as one outcome; the first that failed counts for all."""
        engine.train, engine.validation = train_on, validate_on
        wanted = Segment(
            trial=0,
            run=name,
            hyperparameters=hyperparameters,
            seed=recipe.training.seed,
            total_steps=count,
            stop_step=count,
        )
        outcomes = run_segments(engine, [replace(wanted, trial=slot) for slot in range(engine.slots)])
        # An outcome's memory is its trial's; what all of them need together is what the process holds of a GPU by now.
        return replace(
            min(outcomes, key=lambda outcome: outcome.state is State.COMPLETED),
            tokens=sum(outcome.tokens for outcome in outcomes),
            train_seconds=sum(outcome.train_seconds for outcome in outcomes),
            validation_seconds=sum(outcome.validation_seconds for outcome in outcomes),
            peak_memory_bytes=max(memory.reserved(engine.device), *(outcome.peak_memory_bytes for outcome in outcomes)),
        )

    worst = measured(
        Subset(train, np.argsort(-np.asarray(train.lengths), kind="stable")[: hyperparameters.batch_size]),
        Subset(validation, np.argsort(-np.asarray(validation.lengths), kind="stable")[: recipe.training.validation_batch_size]),
        1,
        "longest",
    )
    usual, times = worst, [worst]
    if worst.state is State.COMPLETED:
        sample = Subset(validation, np.random.default_rng(0).permutation(len(validation))[:validation_examples])
        times = [usual := measured(train, sample, steps, "usual")]
        while usual.state is State.COMPLETED and len(times) < repeats:
            times.append(usual := measured(train, Subset(validation, np.arange(1)), steps, f"usual-{len(times)}"))
        validated = int(sample.lengths.sum())
    engine.close()
    done = usual.state is State.COMPLETED
    speeds = [time.tokens / time.train_seconds for time in times] if done else []
    speed = sum(time.tokens for time in times) / sum(time.train_seconds for time in times) if done else 0.0
    return Probe(
        state=usual.state,
        message=usual.message,
        seconds_to_load=loading,
        training_tokens_per_second=speed,
        validation_tokens_per_second=engine.slots * validated / times[0].validation_seconds if done else 0.0,
        spread=(min(speeds) / speed, max(speeds) / speed) if done else (1.0, 1.0),
        training_tokens=int(np.sum(train.lengths)),
        validation_tokens=int(np.sum(validation.lengths)),
        peak_memory_bytes=max(worst.peak_memory_bytes, usual.peak_memory_bytes),
        trainable_parameters=worst.trainable_parameters,
        device=worst.device,
    )
