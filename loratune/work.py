"""What crosses a process border: plain dataclasses that turn into JSON and back.

A `Recipe` is all that a study's trials share; `Hyperparameters` is what a trial varies. A `Segment`
asks for one part of one trial's training, "train trial 7 from step 120 to step 240, then validate";
an `Outcome` answers each segment.

Vocabulary: a *run* is one training from step 0 to `total_steps`, the span of its learning-rate
schedule. A trial has one run, `main`, unless a schedule trains it several times at different
budgets, when each budget is a run of its own. Steps are optimiser steps.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self


class Json:
    """Mixin: a dataclass to and from JSON. Tuples travel as lists, non-finite floats as strings."""

    def to_plain(self) -> dict[str, Any]:
        """What JSON has of it: dicts, lists, texts, numbers."""
        return _plain(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """The dataclass of which `to_plain` gave this. Unknown fields are dropped: an older loratune can read a newer study's record."""
        return _typed(cls, plain)

    def to_json(self) -> str:
        return json.dumps(self.to_plain(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls.from_plain(json.loads(text))


@dataclass(frozen=True, kw_only=True)
class Hyperparameters(Json):
    """Everything a trial may vary, in PEFT's and Transformers' spelling; the defaults are the published ones."""

    lora_r: int = 8
    lora_alpha: float = 32.0
    lora_dropout: float = 0.1  # probability in [0, 1]; 1 silences the adapter
    learning_rate: float = 1e-5  # peak, after warmup
    use_rslora: bool = False  # scale by alpha / sqrt(r) instead of alpha / r
    weight_decay: float = 0.0  # AdamW's, decoupled
    warmup_ratio: float = 0.03  # share of the run's steps spent in linear warmup
    batch_size: int = 128  # examples per optimiser step, over all devices
    epochs: float = 2.0  # passes over the training set
    loraplus_lr_ratio: float = 1.0  # LoRA+: learning rate of the B matrices over that of the A's
    target_modules: str | tuple[str, ...] = "qv"  # a named set (see finetune/targets.py) or module names


@dataclass(frozen=True, kw_only=True)
class ModelRecipe(Json):
    """Which base model, and how it is held in memory: `model` of the description (spec/sections.py says what each field means)."""

    name_or_path: str
    revision: str | None = None
    dtype: str = "auto"
    load_in_4bit: bool = False
    attn_implementation: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe(Json):
    """How every trial of a study is trained: the part of `training` in the description that no trial varies (spec/sections.py).

    `seed` is that of initialisation, data order and dropout, shared by all trials (common random numbers).
    """

    seed: int = 0
    micro_batch_size: int = 4
    validation_batch_size: int = 8
    lr_scheduler_type: str = "cosine"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    tokens_per_pass: int | None = None
    gradient_checkpointing: bool = False
    sharding: str = "none"  # of the frozen weights over the devices of a trial: none | fsdp
    checkpoint_steps: int | None = None
    keep: str = "last"


@dataclass(frozen=True, kw_only=True)
class Recipe(Json):
    """All that a worker needs besides segments. Saved as `recipe.json` in the study's folder."""

    model: ModelRecipe
    training: TrainingRecipe
    data: str  # folder of the prepared (tokenised, split) data, see data/prepare.py
    engine: str = "packed"  # packed where the model allows it | hf
    task: str = "sft"  # of data/tasks.py
    method: str = "lora"  # of finetune/methods.py
    slots: int = 1  # trials that one process of the packed engine trains at the same time
    devices_per_trial: int = 1
    device: str = "auto"  # auto | cpu | cuda


@dataclass(frozen=True, kw_only=True)
class Segment(Json):
    """Train one trial from `start_step` (from the run's checkpoint unless 0) to `stop_step`, then validate."""

    trial: int
    run: str = "main"  # name of the run's folder inside the trial's
    hyperparameters: Hyperparameters
    seed: int
    total_steps: int  # the run's length: what the learning-rate schedule spans
    start_step: int = 0
    stop_step: int
    validate_at: tuple[int, ...] = ()  # further steps in [start_step, stop_step) at which to validate; 0 is the base model
    validated_at: tuple[int, ...] = ()  # up to start_step, by segments before; done again, for keep: best, if the checkpoint is lost
    attempt: int = 1  # how often it was sent; what an older attempt says later is dropped

    @property
    def key(self) -> str:
        """Unique within a study: `<trial>/<run>/<stop_step>`."""
        return f"{self.trial:04d}/{self.run}/{self.stop_step:07d}"


class State(StrEnum):
    """How a segment ended. Every kind but the first has its own remedy, see docs/design.md, Laws."""

    COMPLETED = "completed"
    OUT_OF_MEMORY = "out_of_memory"  # alone on the device: the configuration is infeasible
    DIVERGED = "diverged"  # loss or weights became inf or NaN: a worst value, not a hole
    CRASHED = "crashed"  # the worker died or raised; retried from the last checkpoint, a few times
    CANCELLED = "cancelled"  # asked to stop, or preempted: goes on from its checkpoint, which counts as no try
    BAD_INPUT = "bad_input"  # the user must act: the study stops with this one error


@dataclass(frozen=True, kw_only=True)
class CurvePoint(Json):
    """One point of a learning curve."""

    step: int
    tokens: int  # training tokens seen so far, prompt and response, padding excluded
    train_loss: float | None  # mean over response tokens since the point before
    validation_loss: float | None  # the one loss, see finetune/validation.py


@dataclass(frozen=True, kw_only=True)
class Outcome(Json):
    """What became of a segment. Losses are summed NLL of response tokens / their number, natural log."""

    key: str  # the segment's
    state: State
    validation_loss: float | None = None  # of the run's adapter as it is saved; None unless completed
    kept_step: int | None = None  # where that was measured, with keep: best; None: at stop_step
    curve: tuple[CurvePoint, ...] = ()  # of this segment only, ascending steps
    tokens: int = 0  # training tokens processed by this segment
    train_seconds: float = 0.0
    validation_seconds: float = 0.0
    peak_memory_bytes: int = 0  # on a GPU what the segment needs by itself, the model included; of the process on CPU
    trainable_parameters: int = 0
    devices: int = 1
    device: str = ""  # name in words
    node: str = ""  # of a cluster, where it was trained: its host and the beginning of its number
    lost: tuple[str, ...] = ()  # nodes that went away, or were preempted, while they trained it: attempts that count as no tries
    scores: dict[str, float] = field(default_factory=dict)  # benchmark -> score in [0, 1], where scores guide the search
    scoring_seconds: float = 0.0  # that took, on one device
    message: str = ""  # for people: why, and what to do, when not completed
    error: str = ""  # of bad input: the name of its LoratuneError
    attempt: int = 0  # the segment's; 0: of the one that was sent last

    @property
    def run(self) -> str:
        """The name of the segment's run."""
        return self.key.split("/")[1]

    @property
    def stop_step(self) -> int:
        return int(self.key.split("/")[2])


@dataclass(frozen=True, kw_only=True)
class Progress(Json):
    """The heartbeat of a running segment. A lost one does no harm."""

    key: str
    step: int
    total_steps: int
    tokens: int
    train_loss: float | None = None
    validation_loss: float | None = None
    attempt: int = 0  # the segment's; 0: of the one that was sent last


@dataclass(frozen=True, kw_only=True)
class Message(Json):
    """A line for the user from where trials are trained."""

    text: str


_SCALARS: dict[Any, Any] = {int: (int, float), str: str, bool: bool}  # a count that another tool wrote as 3.0 is a count


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # JSON has no inf or nan; `_typed` reads them back
    if isinstance(value, Path):
        return str(value)
    return value


def _typed(kind: Any, value: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        fitting = [a for a in args if a is not type(None)]
        if isinstance(value, list):
            fitting = [a for a in fitting if typing.get_origin(a) is tuple]
        return _typed(fitting[0], value)
    if origin is tuple:
        return tuple(_typed(args[0], item) for item in value)
    if origin is dict:
        return {key: _typed(args[1], item) for key, item in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = {f.name for f in dataclasses.fields(kind)}
        return kind(**{name: _typed(hints[name], item) for name, item in value.items() if name in known})
    if kind is float or kind is Path:
        return kind(value)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return kind(value)
    if kind in _SCALARS and not isinstance(value, _SCALARS[kind]):
        raise TypeError(f"expected {kind.__name__}, found {value!r:.60}")
    return value
