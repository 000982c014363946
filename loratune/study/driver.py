"""A whole study, from its description to its end: open the folder, prepare the data, run the loop, close.

for event in tune(spec):
    print(event)
delivery = deliver(spec.folder)   # the report, best.yaml and the adapter
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from optuna.samplers import BaseSampler

from loratune import executors, samplers, schedules
from loratune.data.cache import prepare_data
from loratune.data.prepared import Prepared
from loratune.errors import ModelError
from loratune.executors.devices import ClusterDevices, cuda_devices, seen_as, unused_gpu
from loratune.plugs import EXECUTORS
from loratune.record import Record, StudyRecord, open_record, read
from loratune.record.idle import busy_at_most
from loratune.record.paths import StudyPaths
from loratune.record.progress import ProgressTracker
from loratune.record.storage import explained, open_study, until_free
from loratune.record.storage_lock import StorageLock, network_warning, only_driver
from loratune.spec import StudySpec
from loratune.study.cleanup import remove_unneeded
from loratune.study.guess import Guess, guess_of, prior_of, with_guess
from loratune.study.loop import Event, Loop, SegmentFinished, TrialStarted
from loratune.study.plan import cluster_of, devices_of, few_steps, idle_of, slots_for, workers_for
from loratune.study.session import Session, adopt, same_data
from loratune.study.size_limits import check_size_limits
from loratune.system.files import AnyPath, working_folder, write_atomically
from loratune.system.formatting import plural
from loratune.system.imports import uncollected
from loratune.trackers import Feed, check
from loratune.work import Message, Progress

if TYPE_CHECKING:
    from loratune.downstream.search_scoring import Scorer


@dataclass(frozen=True)
class Delivery:
    """What a study hands over."""

    record: StudyRecord
    report: Path
    best: Path | None  # best.yaml; None when no trial was finished
    adapter: Path | None  # a PEFT folder


def tune(spec: StudySpec, stop: threading.Event | None = None) -> Iterator[Event]:
    """Run the study that `spec` describes, or continue it, and yield what happens.

    Setting `stop`, or closing the iterator, lets running segments finish their step and write a
    checkpoint; the same call continues. Raises LoratuneError.
    """
    stop = stop or threading.Event()
    working_folder()
    cluster = cluster_of(spec)
    devices = devices_of(spec)
    _sampler(spec, workers=1)  # a mistake in a plug's options is told before the data are read
    schedules.of_study(spec)
    check(spec.training.report_to)
    check_functions(spec)
    check_size_limits(spec)
    with open_record(spec.folder) as record, contextlib.ExitStack() as stack:
        guessed = guess_of(spec)
        spec = with_guess(spec, guessed.recommendation) if guessed is not None else spec
        adopt(spec, record)
        if guessed is not None:
            write_atomically(record.paths.guess, guessed.to_json())
        yield from _messages(until_free(spec.storage, record.folder, stop))
        if stop.is_set():
            return
        only = stack.enter_context(_only_driver(spec, record))
        session = Session(record)
        workers, ahead, per_trial = record.pin("workers", workers_for(spec)), None, spec.training.devices_per_trial
        if not session.all_spent(spec):
            ahead = stack.enter_context(
                executors.started_ahead(
                    spec.executor.name,
                    root=record.folder.resolve(),
                    lock=record.lock,
                    devices=devices,
                    workers=workers,
                    threads=spec.executor.threads,
                    devices_per_trial=per_trial,
                )
            )
        unused = unused_gpu(spec.executor.device, devices) if cluster is None else _in_words(cluster, workers * per_trial)
        idle = idle_of(spec, workers)
        notes = [note for note in (unused, idle, network_warning(spec.storage, record.folder)) if note]
        data = prepare_data(spec, notes, date=record.date())
        yield from _messages([*notes, data.summary()])
        same_data(record, data)
        record.prompt(asdict(data.manifest.prompt))
        yield from _messages(_known_beforehand(spec, record, data))
        recipe = replace(spec.recipe(str(data.folder)), slots=record.pin("slots", slots_for(spec, data)))
        if cluster is not None:  # what a node sees by itself, and what the cluster has by now, decides nothing
            recipe = replace(recipe, device=record.device("cuda" if cluster.gpus else "cpu"))
            devices = devices if recipe.device == "cuda" else []
        record.recipe(recipe)
        scorer = _scorer(spec, record.folder, data, devices if cluster is None else _own_devices(spec))
        if scorer is not None:
            scorer.prepare()
        executor = executors.build(
            spec.executor.name,
            recipe=recipe,
            root=record.folder.resolve(),
            lock=record.lock,
            devices=devices,
            workers=workers,
            threads=spec.executor.threads,
            max_retries=spec.executor.max_retries,
            hang_timeout=spec.executor.hang_timeout,
            options=spec.executor.options,
            ahead=ahead,
        )
        try:
            sampler = _sampler(spec, workers=executor.capacity, guessed=guessed)
            study = open_study(url=spec.storage, folder=record.folder, name=spec.name, sampler=sampler)
            meter = ProgressTracker(
                budget_trials=spec.budget.most,
                budget_runs=spec.budget.full_runs,
                workers=busy_at_most(spec.sampler.name, spec.budget.most, executor.processes),
                earlier_seconds=session.earlier_seconds,
                devices=per_trial,
                earlier_device_seconds=session.earlier_device_seconds,
                price=spec.budget.price_per_device_hour,
                budget_cost=spec.budget.max_cost,
                currency=spec.budget.currency,
                objectives={objective.name: objective.direction for objective in spec.objectives},
                idle=idle,
            )
            session.meter = meter
            loop = Loop(
                spec=spec,
                record=record,
                study=study,
                examples=len(data.train),
                validation_examples=len(data.validation),
                executor=executor,
                meter=meter,
                stop=stop,
                score=scorer.score if scorer is not None else None,
            )
            with explained(spec.storage, record.folder):
                feed, over = Feed(spec, record.folder), False
                try:
                    for event in loop.run():
                        session.tick()
                        only.keep()
                        yield event
                        yield from _tracked(feed, event)
                    over = not stop.is_set()
                    if over:
                        session.spent(spec)
                finally:
                    last = list(feed.close(over=over and not loop.paused))  # what is paused may go on in its run
                yield from last
        finally:
            executor.close()
            session.end()
        if not stop.is_set():
            remove_unneeded(spec, record.folder)


def check_functions(spec: StudySpec) -> None:
    """See that the functions of the study's own metrics are there, which are imported. Raises SpecError."""
    if spec.metrics:
        from loratune.downstream.metric_functions import functions_of

        functions_of(spec.metrics)


def known_beforehand(spec: StudySpec, data: Prepared) -> list[str]:
    """Lines on too few steps, layers that get no adapter and examples longer than the model was made for; from the config, in seconds.

    Raises one ModelError for tokens without an embedding, examples beyond the model's positions, layers that it has not.
    """
    with uncollected():
        from loratune.finetune import preflight  # torch
        from loratune.finetune.model import bare_model

    recipe, few = spec.recipe("").model, few_steps(spec, data)
    try:
        model = bare_model(recipe)
    except ModelError:
        return few  # what cannot be built without weights, is loaded with them, or refused there in better words
    return [*few, *preflight.check_fit(model, recipe, data, _targets(spec))]


def deliver(folder: AnyPath, *, trust_remote_code: bool = False) -> Delivery:
    """Write the report, and hand over the trial that `loratune select` chose, else the best: `best.yaml` and the adapter.

    trust_remote_code: let code run that comes with the model, where the study asks for it.
    Before, plain PEFT loads the adapter on its base model, and it is compared with what was measured (`delivery/verify.py`).
    Raises ModelError, with the report written and nothing handed over, when it is another; StorageError.
    """
    from loratune.delivery import hand_over
    from loratune.report import write_report

    folder = Path(folder)
    record = read(folder, trust_remote_code=trust_remote_code)
    report = write_report([record], StudyPaths(folder).report)
    best, adapter = hand_over(record, folder) if record.best is not None else (None, None)
    return Delivery(record=record, report=report, best=best, adapter=adapter)


def _tracked(feed: Feed, event: Event) -> Iterator[Message]:
    match event:
        case TrialStarted(trial):
            feed.started(trial)
        case SegmentFinished(trial, outcome):
            yield from feed.finished(trial, outcome)
        case Progress():
            yield from feed.progressed(event)


def _in_words(cluster: ClusterDevices, wanted: int) -> str:
    """`wanted`: devices that the study's places need, as they were pinned when it began."""
    there = f"{plural(cluster.nodes, 'node')} of the cluster can train trials"
    most = plural(min(cluster.number, wanted), "GPU" if cluster.gpus else "processor")
    return f"{there}; at most {most} at a time, as they come and go"


def _own_devices(spec: StudySpec) -> list[int]:
    """The driver's own, where trials train on a cluster and are scored here."""
    return cuda_devices("cpu" if spec.executor.device == "cpu" else "auto", None, 1)


@contextlib.contextmanager
def _only_driver(spec: StudySpec, record: Record) -> Iterator[StorageLock]:
    with contextlib.ExitStack() as stack:
        with explained(spec.storage, record.folder, opening=True):
            lock = stack.enter_context(only_driver(spec.storage, record.folder, spec.name))
        yield lock


def _messages(texts: Iterable[str]) -> Iterator[Message]:
    return (Message(text=text) for text in texts)


def _sampler(spec: StudySpec, workers: int, guessed: Guess | None = None) -> BaseSampler:
    ordinals = samplers.ordinals(spec.sampler.name)
    return samplers.build(
        spec.sampler.name,
        search_space=spec.search_space.distributions(ordinals),
        seed=spec.seed,
        options=spec.sampler.options,
        x0=spec.search_space.defaults(ordinals),
        workers=workers,
        conditional=spec.search_space.conditional,
        trials=spec.budget.most,
        prior=prior_of(spec, guessed.recommendation) if guessed is not None else None,
        constants=asdict(spec.hyperparameters(spec.search_space.default_values())),
    )


def _scorer(spec: StudySpec, folder: Path, data: Prepared, devices: Sequence[int]) -> "Scorer | None":
    """What scores the trials, where benchmarks are among the objectives and constraints."""
    if not spec.scored:
        return None
    from loratune.downstream.job import EvaluationJob
    from loratune.downstream.metric_functions import answer_set
    from loratune.downstream.search_scoring import Scorer  # scipy: a second of import

    job = EvaluationJob(
        folder=StudyPaths(folder).scoring,
        recipe=spec.recipe("").model,
        models=(),
        benchmarks=tuple(spec.scores),
        answers=tuple(dict.fromkeys(map(answer_set, spec.metrics))),
        validation=data.folder,
        data=Path(spec.scoring.data) if spec.scoring.data else None,
        subset=spec.scoring.items,
        leave_out={},
        seed=spec.seed,
        device=seen_as(devices[0]) if devices else "cpu",
        allow_code_execution=spec.scoring.allow_code_execution,
        weaker_sandbox=spec.scoring.weaker_sandbox,
    )
    return Scorer(job=job, metrics=spec.metrics, hold=EXECUTORS[spec.executor.name].in_process)


def _targets(spec: StudySpec) -> list[str | tuple[str, ...]]:
    """Every value that target_modules may take in the study."""
    searched = spec.search_space.parameters.get("target_modules")
    choices = getattr(searched, "choices", ())
    return [spec.hyperparameters(spec.search_space.default_values()).target_modules, *choices]


def _known_beforehand(spec: StudySpec, record: Record, data: Prepared) -> list[str]:
    """`known_beforehand`, asked once per study and kept in its folder; nothing when the study goes on."""
    path = record.paths.notes
    if path.exists() and record.paths.begun:
        return []
    notes = known_beforehand(spec, data)
    write_atomically(path, "\n".join(notes))
    return notes
