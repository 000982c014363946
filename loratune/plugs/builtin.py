"""loratune's own plugs. A new one is one file and its declaration here; of another package, the declaration is its entry point."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from loratune.errors import SpecError
from loratune.plugs.kinds import (
    ADAPTER_BYTES,
    BenchmarkPlug,
    ExecutorPlug,
    Measured,
    MetricPlug,
    SamplerPlug,
    SchedulePlug,
    TrackerPlug,
)
from loratune.plugs.registry import Plug, Registry


def _bracket(study: Mapping[str, Any]) -> dict[str, Any]:
    """Where the bracket search starts, how sure that is, and how many trials it may start together."""
    prior, constants = study["prior"], study["constants"]
    start = {name: value for name, value in constants.items() if name not in study["search_space"]} | (study["x0"] or {})
    sure = {} if prior is None else {"spread": prior.sd, "outside": prior.outside}
    return {"start": start, "slots": study["workers"], "trials": study["trials"], **sure}


SAMPLERS = Registry(
    "sampler",
    SamplerPlug,
    (
        SamplerPlug(
            name="bracket",
            make="loratune.samplers.bracket_sampler:BracketSampler",
            several_objectives=False,
            any_objective=False,  # its prior, noise and tolerance are in nats
            conditional=False,
            remembers=True,
            starts_itself=True,
            sets_length=True,
            full_runs=3.0,
            wave=3,
            not_options=("start", "spread", "outside", "slots", "trials"),
            settings=_bracket,
            options={"guard": "short runs over four decades of learning rates: auto, always or never"},
        ),
        SamplerPlug(
            name="nomad",
            make="loratune.samplers.nomad:NomadSampler",
            conditional=False,
            remembers=True,
            not_options=("when_spent",),
            settings=lambda study: {"block_size": study["workers"]},
            options={"block_size": "points that NOMAD asks for at once"},
        ),
        SamplerPlug(
            name="nni_tpe",
            make="loratune.samplers.nni_tpe:NniTpeSampler",
            several_objectives=False,
            conditional=False,
            remembers=True,
            not_options=("when_spent",),
        ),
        SamplerPlug(
            name="tpe",
            make="optuna.samplers:TPESampler",
            ordinals="index",
            settings=lambda study: {"constant_liar": study["workers"] > 1, **({"group": True} if study["conditional"] else {})},
        ),
        SamplerPlug(name="gp", make="optuna.samplers:GPSampler", ordinals="index"),
        SamplerPlug(
            name="cmaes",
            make="optuna.samplers:CmaEsSampler",
            ordinals="index",
            several_objectives=False,
            constraints=False,  # Optuna's ignores them
            # From the published default, a poor point, its first population stays too near: worse than random after 45 trials.
            settings=lambda study: {"x0": None},
        ),
        SamplerPlug(
            name="qmc",
            make="loratune.samplers.qmc:NumberedQmcSampler",
            ordinals="index",
            not_options=("sequence_seed",),
            settings=lambda study: {  # one scrambled sequence for the whole study
                "scramble": True,
                "sequence_seed": study["seed"],
                "search_space": None if study["conditional"] else study["search_space"],
            },
        ),
        SamplerPlug(name="random", make="optuna.samplers:RandomSampler"),
        SamplerPlug(name="nsga2", make="optuna.samplers:NSGAIISampler"),
    ),
)

SCHEDULES = Registry(
    "schedule",
    SchedulePlug,
    (
        SchedulePlug(
            name="full",
            make="loratune.schedules.full:FullSchedule",
            help="every trial to its end",
            adaptive=False,
            pauses=lambda fidelity: False,
        ),
        SchedulePlug(
            name="halving",
            make="loratune.schedules.halving:HalvingSchedule",
            help="successive halving",
            pauses=lambda fidelity: fidelity == "steps",
        ),
    ),
)

EXECUTORS = Registry(
    "executor",
    ExecutorPlug,
    (
        ExecutorPlug(name="inline", make="loratune.executors.inline:InlineExecutor", help="in this process", in_process=True),
        ExecutorPlug(
            name="local",
            make="loratune.executors.local:LocalExecutor",
            help="one process per worker",
            ahead="loratune.executors.local:start_ahead",
        ),
        ExecutorPlug(
            name="ray",
            make="loratune.executors.ray_executor:RayExecutor",
            help="on the nodes of a Ray cluster",
            count="loratune.executors.ray_cluster:cluster_devices",
            options={
                "address": "of the cluster; null: RAY_ADDRESS, this machine's, else one started here",
                "shared_folder": "every node sees the study's folder, the data and the model under the same paths: nothing is copied",
                "max_devices": "maximum number of devices; the study is planned for all of them from the start, even if some join later",
            },
        ),
    ),
)

TRACKERS = Registry(
    "tracker",
    TrackerPlug,
    (
        TrackerPlug(
            name="tensorboard",
            make="loratune.trackers.tensorboard_files:TensorBoardTracker",
            package="tensorboardX",
            modules=("tensorboardX", "tensorboard"),
        ),
        TrackerPlug(name="wandb", make="loratune.trackers.weights_and_biases:WandbTracker", package="wandb"),
        TrackerPlug(name="mlflow", make="loratune.trackers.mlflow_runs:MlflowTracker", package="mlflow"),
        TrackerPlug(name="trackio", make="loratune.trackers.trackio_runs:TrackioTracker", package="trackio"),
    ),
)

BENCHMARKS = Registry(
    "benchmark",
    BenchmarkPlug,
    (
        BenchmarkPlug(name="mmlu", make="loratune.downstream.tasks.mmlu:Mmlu"),
        BenchmarkPlug(name="mmlu_loglikelihood", make="loratune.downstream.tasks.mmlu:MmluLoglikelihood"),
        BenchmarkPlug(name="bbh", make="loratune.downstream.tasks.bbh:Bbh"),
        BenchmarkPlug(name="drop", make="loratune.downstream.tasks.drop:DropBenchmark"),
        BenchmarkPlug(name="humaneval", make="loratune.downstream.tasks.humaneval:HumanEval", runs_code=True),
        BenchmarkPlug(  # an answer within ``` is taken out of them
            name="humaneval_fenced", make="loratune.downstream.tasks.humaneval:HumanEvalFenced", runs_code=True
        ),
        BenchmarkPlug(name="demo_choice", make="loratune.downstream.tasks.embedded:DemoChoice"),
        BenchmarkPlug(name="demo_match", make="loratune.downstream.tasks.embedded:DemoMatch"),
        BenchmarkPlug(name="demo_code", make="loratune.downstream.tasks.embedded:DemoCode", runs_code=True),
    ),
)


def _loss(trial: Measured) -> float:
    loss = trial.run[-1].validation_loss if trial.run else None
    return math.nan if loss is None else loss


def _peak(trial: Measured) -> float:
    peak = max((outcome.peak_memory_bytes for outcome in trial.run), default=0)
    return peak / 2**30 if peak else math.nan


def _tokens(trial: Measured) -> float:
    return sum(outcome.tokens for outcome in trial.run) if trial.run else math.nan


def _seconds(trial: Measured) -> float:
    return sum(outcome.train_seconds * outcome.devices for outcome in trial.run) if trial.run else math.nan


def _score(trial: Measured, *, name: str) -> float:
    return trial.run[-1].scores.get(name, math.nan) if trial.run else math.nan


class _Metrics(Registry[MetricPlug]):
    """The metrics; of every benchmark its score is one, and a description may declare its own.

    `names` has those of the description that was read last; those of earlier ones are still found by name.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._declared: dict[str, MetricPlug] = {}
        self._latest: tuple[str, ...] = ()

    def declare(self, plugs: Iterable[MetricPlug]) -> None:
        """The metrics of a description, in place of earlier ones' of these names."""
        new = {plug.name: plug for plug in plugs}
        self._declared |= new
        self._latest = tuple(new)

    @property
    def ever(self) -> tuple[str, ...]:
        """Also those of earlier descriptions."""
        return tuple(dict.fromkeys([*self.names, *self._declared]))

    @property
    def known(self) -> tuple[str, ...]:
        """The names that no description may take."""
        return super().names

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*super().names, *BENCHMARKS.names, *self._latest]))

    @property
    def builtin(self) -> tuple[str, ...]:
        return (*super().builtin, *BENCHMARKS.builtin)

    def __getitem__(self, name: str) -> MetricPlug:
        if name in self._declared and name not in self.known:
            return self._declared[name]
        if name not in BENCHMARKS:
            return super().__getitem__(name)
        return MetricPlug(
            name=name,
            make=functools.partial(_score, name=name),
            unit="the benchmark's score on the items that guide the search, 0 to 1; more is better",
            direction="maximize",
            one_direction=f"{name} is a score, and maximised",
            benchmark=True,
        )

    def read(self, name: str, trial: Measured) -> float:
        """The metric of a trial; NaN where it was not measured."""
        scored = name in BENCHMARKS or self[name].own
        return float(self[name].factory(trial) if scored else self.factory(name)(trial))

    def label(self, name: str) -> str:
        """As a report calls it; a name that no plug has any more as it is."""
        try:
            return self[name].label or name.replace("_", " ")
        except SpecError:
            return name.replace("_", " ")


METRICS = _Metrics(
    "metric",
    MetricPlug,
    (
        MetricPlug(
            name="validation_loss",
            make=_loss,
            unit="nats per response token",
            label="validation loss",
            one_direction="validation_loss is minimised",
        ),
        MetricPlug(
            name="tokens",
            make=_tokens,
            unit="training tokens of the trial's last run, prompt and response",
            label="training tokens",
            known="during",
        ),
        MetricPlug(
            name="train_seconds",
            make=_seconds,
            unit="device-seconds of that run's training, validation excluded",
            label="training seconds",
            known="during",
        ),
        MetricPlug(
            name="adapter_mb",
            make=lambda trial: trial.parameters * ADAPTER_BYTES / 1e6,
            unit="trainable parameters x 4 bytes, 10^6 bytes",
            label="adapter size in MB",
            known="before",
        ),
        MetricPlug(
            name="peak_memory_gib",
            make=_peak,
            unit="that training takes on a GPU by itself, the model included (on a CPU its process, all slots together), 2^30 bytes",
            label="peak memory in GiB",
            known="during",
        ),
        MetricPlug(
            name="inference_cost",
            make=lambda trial: trial.parameters,
            unit="multiply-adds per token that the adapter adds to the base: its trainable parameters",
            label="multiply-adds per token",
            known="before",
        ),
    ),
)

_REGISTRIES: tuple[Registry[Any], ...] = (SAMPLERS, SCHEDULES, EXECUTORS, TRACKERS, BENCHMARKS, METRICS)


def register(plug: Plug) -> None:
    """Add a plug for this process, under its own name; what a script defines itself. Raises SpecError for a name that is taken.

    Worker processes do not run the script: what they need (a benchmark that several processes share) must come from a package.
    """
    for registry in _REGISTRIES:
        if isinstance(plug, registry.kind):
            registry.register(plug)
            return
    raise SpecError(f"{plug!r} is no plug; loratune.plugs has their kinds")
