"""The kinds of plug, with the facts that each declares and the keyword arguments that a study gives to what it makes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from loratune.plugs.registry import Plug
from loratune.work import Hyperparameters, Outcome

ADAPTER_BYTES = 4  # of an adapter's parameter: float32


@dataclass(frozen=True, kw_only=True)
class SamplerPlug(Plug):
    """Makes an Optuna sampler (`BaseSampler`).

    The study gives `seed`, `search_space` (Optuna's names -> distributions), `x0` (the defaults, in these names), `workers`
    (trials in training at the same time).
    """

    given: ClassVar[tuple[str, ...]] = ("seed", "search_space", "x0", "workers")
    ordinals: Literal["index", "choice"] = "choice"  # how it wants an ordinal: an integer index, or a categorical of its values
    several_objectives: bool = True
    any_objective: bool = True  # not a loss in nats alone
    constraints: bool = True  # it reads Optuna's constraints
    conditional: bool = True  # it can search parameters that exist only for some values of others
    remembers: bool = False  # made once, and keeps in the storage what it must know; else made anew for each trial, with a seed of its own
    starts_itself: bool = False
    """It proposes the first trial too, around the first guess of model and data, which earlier studies (`warm_start`) sharpen."""
    sets_length: bool = False  # it says how much of a full run each trial is trained, so that the schedule must not
    full_runs: float | None = None  # the budget where the user writes none; None: the number of trials alone
    wave: int | None = None  # trials that it starts together, at most; None: any number
    settings: Callable[[Mapping[str, Any]], dict[str, Any]] = field(default=lambda study: {})
    """Its arguments in a study, where the user gave no option of that name, from what the study gives and `conditional`, `trials`,
    `prior` (of the first guess, a `loratune.samplers.prior.Prior`, or None) and `constants` (hyperparameters that are not searched)."""


@dataclass(frozen=True, kw_only=True)
class SchedulePlug(Plug):
    """Makes a `loratune.schedules.Schedule`.

    The study gives `trials`, `baseline` (whether trial 0 is the default that everything is compared with), `fidelity`,
    `reduction_factor`, `min_resource`.
    """

    given: ClassVar[tuple[str, ...]] = ("trials", "baseline", "fidelity", "reduction_factor", "min_resource")
    adaptive: bool = True  # what it trains depends on the losses
    pauses: Callable[[str], bool] = field(default=lambda fidelity: True)  # whether a run stops and goes on, and so is validated on its way


@dataclass(frozen=True, kw_only=True)
class ExecutorPlug(Plug):
    """Makes a `loratune.executors.Executor`.

    The study gives `recipe`, `root` (its folder), `lock` (a file descriptor), `devices` (CUDA indices, empty on CPU), `workers`,
    `threads`, `max_retries`, `hang_timeout`, `ahead` (what `ahead` below gave, else None).
    """

    given: ClassVar[tuple[str, ...]] = ("recipe", "root", "lock", "devices", "workers", "threads", "max_retries", "hang_timeout", "ahead")
    in_process: bool = False  # trials train in the driver's own process
    count: str | Callable[..., Any] | None = None
    """Where trials train on other machines: what counts their devices, or its address. It is called with `device`, `per_trial`,
    `threads` and the user's options, and gives a `loratune.executors.devices.ClusterDevices`."""
    ahead: str | Callable[..., Any] | None = None
    """Starts what the executor will need, or its address, while the driver reads the data. It is called with `root`, `lock`, `devices`,
    `workers`, `threads`, `devices_per_trial`, and gives something with a method `discard()`, or None."""


@dataclass(frozen=True, kw_only=True)
class TrackerPlug(Plug):
    """Makes a `loratune.trackers.Tracker`. The study gives `name`, `id` (its own, drawn once), `folder`."""

    given: ClassVar[tuple[str, ...]] = ("name", "id", "folder")
    package: str = ""  # what it needs, by pip's name
    modules: tuple[str, ...] = ()  # one of which must be there; empty: that of `package`


@dataclass(frozen=True, kw_only=True)
class BenchmarkPlug(Plug):
    """Makes a `loratune.downstream.tasks.base.Benchmark`.

    `evaluate` gives `data` (the folder of --data, or None), `weaker` (accept the weaker sandbox). Its score, 0 to 1, is a metric too.
    """

    given: ClassVar[tuple[str, ...]] = ("data", "weaker")
    runs_code: bool = False  # scoring runs programs that the model writes


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a metric is read from: a trial, as far as it is trained."""

    hyperparameters: Hyperparameters
    run: tuple[Outcome, ...]  # of the segments of its last run, in order; empty: not trained
    parameters: float = math.nan  # trainable ones of its adapter; NaN where no metric that is known before training is asked for


@dataclass(frozen=True, kw_only=True)
class MetricPlug(Plug):
    """A number of each trial, for objectives, constraints, report and trackers. `make` reads it: Measured -> float, NaN: not measured."""

    unit: str  # its meaning and unit
    label: str = ""  # in a report; "": its name
    direction: Literal["minimize", "maximize"] = "minimize"
    one_direction: str = ""  # why the user may not turn the direction round; "": they may
    known: Literal["before", "during", "after"] = "after"
    """before: from hyperparameters and model alone; during: once above a bound, more training does not bring it below; after: else."""
    benchmark: bool = False  # a benchmark's score: measured when a full run ends, 0 to 1
    own: bool = False  # a function of the user's (`metrics` of the description): measured when a full run ends, any number
