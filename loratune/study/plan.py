"""What a study will cost, told before it is spent: trials, tokens, hours, memory and disk.

The hours come from a probe: the study's own engine trains the largest adapter of the search space, in every
slot, for a few steps on this machine. Tokens are counted, not guessed; how often successive halving lets a trial go
on is simulated with the schedule itself, all losses being equally likely.
"""

import math
import os
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

from loratune import executors, schedules
from loratune.data.order import order, total_steps
from loratune.data.prepared import Prepared
from loratune.executors.devices import ClusterDevices
from loratune.plugs import EXECUTORS, METRICS, SAMPLERS, SCHEDULES
from loratune.plugs.kinds import ADAPTER_BYTES
from loratune.record import StudyRecord, read
from loratune.record.idle import busy_at_most, idle_devices
from loratune.record.paths import StudyPaths
from loratune.samplers.bracket_rule import GUARD_RUNS, Options
from loratune.samplers.prior import FEW_STEPS
from loratune.schedules import SliceResult
from loratune.spec import StudySpec
from loratune.study.estimate import Plan, widened
from loratune.study.objectives import Objectives
from loratune.system.formatting import plural
from loratune.system.hub import weights_on_disk
from loratune.system.machine import cpu_processes, threads_for
from loratune.work import Hyperparameters

_FILLS_CPU, _FILLS_CUDA = 64, 16_384  # training tokens, of one batch of every slot, that keep a device busy
_MOST_SLOTS = _MOST_WORKERS = 8


def plan(spec: StudySpec, data: Prepared, guard: bool = False) -> Plan:
    """Count and probe. Trains for some seconds; leaves nothing behind. Raises ModelError, DataError, TrainingError, StorageError.

    guard: whether the bracket search begins with its short runs. What a study in the spec's folder has done is left out.
    """
    from loratune.finetune.engines import probe  # torch
    from loratune.selection.workflow import most_runs  # SciPy
    from loratune.work import State

    slots, on = slots_for(spec, data), cluster_of(spec)
    default = spec.hyperparameters(spec.search_space.default_values())
    steps = total_steps(len(data.train), default.batch_size, default.epochs)
    shown = order(spec.seed, len(data.train), steps * default.batch_size)
    runs, validations = expected(spec, guard)
    all_trials, ending = _simulated(spec, random.Random(0), guard)[2:]
    largest = _largest(spec, default)
    probed = probe(replace(spec.recipe(str(data.folder.resolve())), slots=slots), Path.cwd(), largest, threads=_threads(spec))
    adapter = probed.trainable_parameters * ADAPTER_BYTES
    kept = spec.output.keep_adapters
    most = _processes(spec) if on is None else max(1, min(_processes(spec), on.number // spec.training.devices_per_trial))
    trials = all_trials
    trial_tokens = int(data.train.lengths[shown].sum())
    done = read(spec.folder) if StudyPaths(spec.folder).begun else None
    done_runs = done.tokens / trial_tokens if done else 0.0
    left = max(0.0, runs * _expected_epochs(spec, default) / default.epochs - done_runs)
    if done is not None:
        left = 0.0 if _all_spent(spec, done) else left
        trials = max(math.ceil(left), trials - len(done.trials)) if left else 0
        validations = max(0.0, validations - sum(len(o.curve) for t in done.trials for o in t.outcomes)) if left else 0.0
    shared = not devices_of(spec)
    load = _load() if shared else 0.0
    return Plan(
        trials=trials,
        full_runs=left,
        done_trials=len(done.trials) if done else 0,
        done_full_runs=done_runs,
        spent_hours=done.wall_seconds / 3600 if done else 0.0,
        spent_device_hours=done.spent_device_seconds / 3600 if done else 0.0,
        steps=steps,
        trial_tokens=trial_tokens,
        validation_tokens=int(data.validation.lengths.sum()),
        validations=validations,
        training_tokens_per_second=probed.training_tokens_per_second,
        validation_tokens_per_second=probed.validation_tokens_per_second,
        processes=busy_at_most(spec.sampler.name, max(1, trials), most),
        slots=slots,
        devices_per_trial=spec.training.devices_per_trial,
        device=probed.device,
        peak_memory_bytes=probed.peak_memory_bytes,
        largest_rank=largest.lora_r,
        adapter_bytes=adapter,
        adapters_kept=all_trials if kept is None else min(all_trials, kept + 1),
        problem="" if probed.state is State.COMPLETED else f"{probed.state.value.replace('_', ' ')}: {probed.message}",
        spread=widened(probed.spread, load) if shared else probed.spread,
        spread_is_assumed=shared,
        load=load,
        max_hours=spec.budget.max_hours,
        max_device_hours=spec.budget.max_device_hours,
        max_cost=spec.budget.max_cost,
        price=spec.budget.price_per_device_hour,
        currency=spec.budget.currency,
        notes=_not_counted(spec, len(data.validation), trial_tokens),
        idle=idle_of(spec, workers_for(spec)),
        cluster=on,
        seconds_to_load=probed.seconds_to_load,
        fresh_runs=most_runs(ending, kept, spec.budget.full_runs),
    )


def slots_for(spec: StudySpec, data: Prepared) -> int:
    """How many trials one process should train together: as the spec says, else the fewest that fill the device.

    slots = ceil(tokens that fill the device / tokens of one batch at the defaults), at most 8, and few enough that
    the sampler chooses at least four times: each of its choices knows the results of all but the trials in training. A sampler
    that starts a wave together has no more than that.
    """
    if spec.training.slots is not None:
        return spec.training.slots
    if spec.training.engine == "hf" or spec.training.devices_per_trial > 1:
        return 1
    tokens = spec.hyperparameters(spec.search_space.default_values()).batch_size * float(data.train.lengths.mean())
    fills = _FILLS_CUDA if devices_of(spec) else _FILLS_CPU
    wave = SAMPLERS[spec.sampler.name].wave
    most = math.ceil(spec.budget.most / (4 * _processes(spec))) if wave is None else wave // _processes(spec)
    return max(1, min(math.ceil(fills / tokens), _MOST_SLOTS, most))


def workers_for(spec: StudySpec) -> int:
    """How many processes should train on a CPU: as the spec says, else one per core as far as memory allows.

    At most 8, and few enough that the sampler chooses at least ten times, or as many as a sampler starts together; 1 where the
    model is not on this machine yet.
    """
    if spec.executor.workers is not None:
        return spec.executor.workers
    plug = EXECUTORS[spec.executor.name]
    if plug.in_process or (spec.training.devices_per_trial > 1 and plug.count is None):
        return 1
    wave = SAMPLERS[spec.sampler.name].wave
    if (found := cluster_of(spec)) is not None:
        places = found.number // spec.training.devices_per_trial
        return places if found.gpus or found.asked_for else max(1, min(places, wave or spec.budget.most // 10))
    weights = weights_on_disk(spec.model.name_or_path, spec.model.revision)
    return cpu_processes(weights, wave or min(_MOST_WORKERS, spec.budget.most // 10))


def _processes(spec: StudySpec) -> int:
    """Processes that train at the same time."""
    plug = EXECUTORS[spec.executor.name]
    if plug.in_process:
        return 1
    if plug.count is not None:
        return workers_for(spec)
    return len(devices_of(spec)) // spec.training.devices_per_trial or workers_for(spec)


def _threads(spec: StudySpec) -> int | None:
    """Of a worker on a CPU, as its executor shares the cores out; None: torch's own number."""
    if EXECUTORS[spec.executor.name].in_process or devices_of(spec):
        return spec.executor.threads
    if EXECUTORS[spec.executor.name].count is not None:
        return spec.executor.threads or 1
    return spec.executor.threads or threads_for(_processes(spec) * spec.training.devices_per_trial)


def devices_of(spec: StudySpec) -> list[int]:
    """The GPUs that trials train on, as `executors.devices_for` numbers them. Raises SpecError, TrainingError, MissingExtraError."""
    return executors.devices_for(
        spec.executor.name,
        device=spec.executor.device,
        chosen=spec.executor.devices,
        per_trial=spec.training.devices_per_trial,
        threads=spec.executor.threads,
        options=spec.executor.options,
    )


def cluster_of(spec: StudySpec) -> ClusterDevices | None:
    """The cluster that the study's trials train on; None for this machine. Raises SpecError, TrainingError, MissingExtraError."""
    chosen = spec.executor
    per_trial = spec.training.devices_per_trial
    return executors.cluster(chosen.name, device=chosen.device, per_trial=per_trial, threads=chosen.threads, options=chosen.options)


def idle_of(spec: StudySpec, places: int) -> str:
    """A sentence on devices that will wait while the study keeps `places` runs in flight; empty where there are none."""
    on, per_trial = cluster_of(spec), spec.training.devices_per_trial
    devices = len(devices_of(spec)) if on is None else on.number
    if EXECUTORS[spec.executor.name].in_process or not devices:
        return ""
    places = places if on is not None else devices // per_trial
    trials = spec.budget.most
    return idle_devices(
        sampler=spec.sampler.name, trials=trials, places=places, devices=devices, per_trial=per_trial, cluster=on is not None
    )


def expected(spec: StudySpec, guard: bool = False) -> tuple[float, float]:
    """(full runs, validations) that the schedule is expected to spend, the base model's validation included."""
    repeats = 20 if SCHEDULES[spec.schedule.name].adaptive else 1
    spent = [_simulated(spec, random.Random(seed), guard) for seed in range(repeats)]
    return fmean(runs for runs, *_ in spent), fmean(count for _, count, *_ in spent)


def _simulated(spec: StudySpec, chance: random.Random, guard: bool = False) -> tuple[float, float, int, int]:
    """(full runs, validations, trials, trials that reach the end of a full run) of one course of the schedule."""
    schedule = schedules.of_study(spec)
    runs, validations, ending = 0.0, 1.0, 0
    values: dict[int, float] = {}
    each = spec.training.validations
    short = GUARD_RUNS if guard and spec.budget.most > GUARD_RUNS else 0
    while runs < (spec.budget.full_runs or math.inf) and (slice := schedule.next(may_start=True)) is not None:
        guarding = len(values) < short  # each is validated at its end alone
        if guarding:
            slice = slice.shortened(Options.guard_length)
        runs += float(slice.length * (slice.stop - slice.start))
        points = {Fraction(i, each) for i in range(1, 1 if guarding else each)} | set(slice.validate_at)
        validations += 1 + sum(slice.start < point < slice.stop for point in points)
        schedule.tell(slice, SliceResult(loss=values.setdefault(slice.trial, chance.random())))
        ending += slice.ends_full_run
    return runs, validations, max(1, len(values)), ending


def _all_spent(spec: StudySpec, done: StudyRecord) -> bool:
    """Whether the study came to the end of the budget that it is given now."""
    return done.budget_spent and done.spec.get("budget") == spec.budget.model_dump(mode="json")


def _not_counted(spec: StudySpec, validation_examples: int, trial_tokens: int) -> tuple[str, ...]:
    """What makes a study cheaper or dearer than its trials' training."""
    known = [str(limit) for limit in spec.limits if METRICS[limit.metric].known == "before"]
    notes = [f"trials that break {', '.join(known)} are not trained and cost nothing"] if known else []
    if spec.scores:
        notes.append(f"scoring {', '.join(spec.scores)}, {spec.scoring.items} items each, after every trial that reaches its end")
    if spec.metrics:
        # Questions of a file of their own are counted when they are read.
        sets = {(m.data, min(m.examples, validation_examples) if m.data is None else m.examples, m.max_new_tokens) for m in spec.metrics}
        asked, names = sum(examples for _, examples, _ in sets), ", ".join(metric.name for metric in spec.metrics)
        tokens = sum(examples * most for _, examples, most in sets)
        rungs = " and at every rung" if spec.own_objective and SCHEDULES[spec.schedule.name].adaptive else ""
        notes.append(
            f"generating {'up to ' * any(m.data for m in spec.metrics)}{asked:,} answers for {names}, after every trial that reaches its "
            f"end{rungs}: at most {tokens:,} tokens, {100 * tokens / trial_tokens:.2g} % of the number that a trial trains on, "
            "each slower than one of these"
        )
    return tuple(notes)


def _largest(spec: StudySpec, default: Hyperparameters) -> Hyperparameters:
    """The space's adapter that needs most memory and keeps the constraints on size: the largest rank, on most layers.

    The default where none keeps them.
    """
    searched = spec.search_space.parameters
    ranks, layers = [default.lora_r], [default.target_modules]
    if "lora_r" in searched:
        ranks = sorted(map(int, _values(searched["lora_r"])), reverse=True)
    if "target_modules" in searched:
        sizes = ("qv", "qkvo", "mlp", "all-linear")
        layers = sorted(_values(searched["target_modules"]), key=sizes.index, reverse=True)
    if not any(METRICS[limit.metric].known == "before" for limit in spec.limits):
        return replace(default, lora_r=ranks[0], target_modules=layers[0])
    objectives = Objectives(spec)
    if len(ranks) == 2 and searched["lora_r"].type == "int":
        ranks = list(range(ranks[0], ranks[1] - 1, -1))
    kept = [h for some in layers for rank in ranks if not objectives.refusal(h := replace(default, lora_r=rank, target_modules=some))]
    return max(kept, key=objectives.size, default=default)


def _expected_epochs(spec: StudySpec, default: Hyperparameters) -> float:
    """The mean over the search space, every value being equally likely."""
    searched = spec.search_space.parameters.get("epochs")
    return default.epochs if searched is None else float(fmean(_values(searched)))


def _values(parameter: Any) -> list[Any]:
    """All values of a list, both ends of a range."""
    if parameter.type == "fixed":
        return [parameter.value]
    if parameter.type == "ordinal":
        return list(parameter.values)
    return list(parameter.choices) if parameter.type == "categorical" else [parameter.low, parameter.high]


def few_steps(spec: StudySpec, data: Prepared) -> list[str]:
    """A warning where a run at the defaults has fewer than 50 optimiser steps: a learning rate is then hard to tell from another."""
    default = spec.hyperparameters(spec.search_space.default_values())
    steps = total_steps(len(data.train), default.batch_size, default.epochs)
    if steps >= FEW_STEPS:
        return []
    return [
        f"warning: a run at the defaults has {plural(steps, 'optimiser step')}, fewer than {FEW_STEPS}: {len(data.train):,} examples, "
        f"epochs {default.epochs:g}, batch_size {default.batch_size}; write a smaller training.batch_size, or more epochs"
    ]


def _load() -> float:
    """Processes that want a processor, per processor, over the last minute."""
    return os.getloadavg()[0] / max(1, len(os.sched_getaffinity(0)))
