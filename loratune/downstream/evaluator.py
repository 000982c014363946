"""Score a study's models on benchmarks: check that each adapter is on, answer, keep every answer, report progress.

    models = (EvaluatedModel(name="0007", adapter=..., loss=0.97), EvaluatedModel(name="base", adapter=None, loss=5.37))
    for event in score_models(EvaluationJob(folder=..., recipe=..., models=models, benchmarks=("mmlu",), validation=...)):
        print(event)

Continues where it stopped, per model, benchmark and item: an item that has an answer in the job's folder, under the same identity, is
not answered again. torch is imported when there is something left to answer.
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from loratune.downstream.answering import vllm_server
from loratune.downstream.events import Event, EventMerger
from loratune.downstream.job import ENGINES, VLLM, BenchmarkRun, EvaluationJob, HarnessRun, build_all, open_runs, run_job
from loratune.downstream.parallel import run_jobs, share_out
from loratune.downstream.results.scores import sole_evaluation
from loratune.downstream.results.search_items import search_items
from loratune.downstream.tasks.benchmarks import HARNESS, may_run
from loratune.errors import EvaluationError
from loratune.work import Message

if TYPE_CHECKING:
    from loratune.finetune.model import BaseModel


def score_models(job: EvaluationJob, *, loaded: "BaseModel | None" = None, stop: threading.Event | None = None) -> Iterator[Event]:
    """Score the job's models on its benchmarks, and keep the results in its folder.

    loaded: the bare model, where it is in memory already. Where it is not, several processes may share the models (parallel.py).
    Setting `stop` ends the generator after the running tokens.

    Raises EvaluationError, DataError, ModelError, StorageError, MissingExtraError; before anything is computed where possible.
    """
    stop = stop or threading.Event()
    if len({model.name for model in job.models}) < len(job.models) or len(set(job.benchmarks)) < len(job.benchmarks):
        raise EvaluationError("a model or a benchmark is named twice.")
    if job.engine not in ENGINES or (job.server is not None and job.engine != VLLM):
        raise EvaluationError(
            f"engine: {' or '.join(ENGINES)}, and an address of a server with {VLLM} alone; got {job.engine}, {job.server}."
        )
    if job.engine == VLLM:
        vllm_server.refuse_job(job)
    benchmarks, tasks = build_all(job)
    may_run(benchmarks, tasks, job.tasks, allow=job.allow_code_execution, weaker=job.weaker_sandbox)
    with sole_evaluation(job.folder):
        left_out = search_items(job.folder.parent) if job.leave_out is None else job.leave_out
        job = replace(job, leave_out={name: tuple(sorted(ids)) for name, ids in left_out.items()})
        for task in tasks if left_out else ():
            yield Message(text=f"{HARNESS}{task}: the items that guided the search ({', '.join(left_out)}) cannot be left out of it.")
        runs = open_runs(job, benchmarks, tasks)
        for run in runs:
            if isinstance(run, BenchmarkRun) and run.left_out:
                title, left = run.benchmark.title, run.left
                yield Message(text=f"{title}: {run.left_out:,} items guided the search and are left out; {left:,} remain.")
        if not any(run.unfinished() for run in runs):
            yield Message(text="Nothing to do: everything is already scored.")
            return
        try:
            for stage in _stages(job, runs, loaded):
                yield from _score(stage, runs, loaded, stop)
        except InterruptedError:
            yield Message(text="Stopped; the answers so far are kept.")


def _stages(job: EvaluationJob, runs: list[BenchmarkRun | HarnessRun], loaded: "BaseModel | None") -> list[list[EvaluationJob]]:
    """Jobs by the time at which they run: those of a stage side by side, each in a process of its own where there are several."""
    if job.engine == VLLM:
        return [[server] for server in vllm_server.server_groups(job, {name for run in runs for name in run.unfinished()})]
    return [[job] if loaded is not None else share_out(job, runs)]


def _score(
    jobs: list[EvaluationJob], runs: list[BenchmarkRun | HarnessRun], loaded: "BaseModel | None", stop: threading.Event
) -> Iterator[Event]:
    """Run the jobs of a stage. Raises InterruptedError."""
    runs = [run.of({name for job in jobs for name in job.names}) for run in runs]
    titles = [run.title(number, len(runs)) for number, run in enumerate(runs, 1)]
    merger = EventMerger(titles, [[run.of(own.names).standing() for run in runs] for own in jobs])
    here = ((0, event) for event in run_job(jobs[0], runs, interrupted=stop.is_set, loaded=loaded))
    with contextlib.closing(run_jobs(jobs, stop) if len(jobs) > 1 else here) as events:
        for number, event in events:
            yield from merger.merge(number, event)
