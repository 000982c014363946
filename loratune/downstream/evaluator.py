"""Score a study's models on benchmarks: prove that each adapter is on, answer, keep every answer, tell how far it is.

    models = [Model(name="0007", adapter=..., loss=0.97), Model(name="base", adapter=None, loss=5.37)]
    for event in evaluate(folder, recipe=..., models=models, benchmarks=["mmlu"], validation=...): print(event)

Continues where it stopped, per model, benchmark and item: what stands in `folder` with the same identity is not asked
again. torch is imported when there is something left to answer.
"""

import contextlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.downstream.events import Event, Note, Story
from loratune.downstream.job import Model, Part, Task, Work, name_of, run
from loratune.downstream.parallel import shares, spread
from loratune.downstream.results.scores import Ledger, alone, fingerprint
from loratune.downstream.results.search_items import items_that_guided
from loratune.downstream.tasks.base import stratified
from loratune.downstream.tasks.benchmarks import HARNESS, build, may_run
from loratune.errors import EvaluationError
from loratune.work import ModelRecipe

if TYPE_CHECKING:
    from loratune.finetune.model import BaseModel


def evaluate(
    folder: Path,
    *,
    recipe: ModelRecipe,
    models: Sequence[Model],
    benchmarks: Sequence[str],
    validation: Path,
    recorded_base: float | None = None,
    data: Path | None = None,
    tasks: Path | None = None,
    subset: int | None = None,
    leave_out: Mapping[str, Collection[str]] | None = None,
    seed: int = 0,
    device: str = "auto",
    allow_code_execution: bool = False,
    weaker_sandbox: bool = False,
    loaded: "BaseModel | None" = None,
    stop: threading.Event | None = None,
) -> Iterator[Event]:
    """Score `models` on `benchmarks` and keep the results in `folder`.

    validation: the prepared data (data/prepare.py) whose losses were recorded; recorded_base: the bare model's.
    data: the benchmarks' own data. tasks: folder with descriptions of lm-evaluation-harness tasks. subset: items per
    benchmark, drawn with `seed`. leave_out: benchmark -> ids of items that must not count; by default those that guided the
    search of the study that `folder` lies in (guided.py). loaded: the bare model, where it is in memory already. Where it is
    not, several processes may share the models (parallel.py).

    Setting `stop` ends the generator after the running tokens.

    Raises EvaluationError, DataError, ModelError, StorageError, MissingExtraError; those that can be known are raised
    before anything is computed.
    """
    stop = stop or threading.Event()
    if len({model.name for model in models}) < len(models) or len(set(benchmarks)) < len(benchmarks):
        raise EvaluationError("a model or a benchmark is named twice.")
    own = [build(name, data, weaker=weaker_sandbox) for name in benchmarks if not name.startswith(HARNESS)]
    foreign = [name.removeprefix(HARNESS) for name in benchmarks if name.startswith(HARNESS)]
    may_run(own, foreign, tasks, allow=allow_code_execution, weaker=weaker_sandbox)
    with alone(folder):
        prints = {model.name: fingerprint(model.adapter) for model in models}
        origin = f"{recipe.name_or_path}@{recipe.revision or 'main'}"

        def ledgers(name: str, **more: Any) -> dict[str, Ledger]:
            return {
                model: Ledger(folder, model, name, {"benchmark": name, "base": origin, "adapter": adapter, "seed": seed, **more})
                for model, adapter in prints.items()
            }

        works: list[Work | Task] = []
        beginnings = []
        leave_out = items_that_guided(folder.parent) if leave_out is None else leave_out
        for name in foreign if leave_out else ():
            yield Note(f"{HARNESS}{name}: items that guided the search ({', '.join(leave_out)}) cannot be left out of it.")
        for number, benchmark in enumerate(own, 1):
            items = benchmark.items()
            guided = set(leave_out.get(benchmark.name, ()))
            if guided:
                items = [item for item in items if item.id not in guided]
                yield Note(f"{benchmark.title}: {len(guided):,} items guided the search and are left out; {len(items):,} are left.")
            items = stratified(items, subset, seed)
            work = Work(benchmark=benchmark, items=items, ledgers=ledgers(benchmark.name, version=benchmark.version))
            works.append(work)
            beginnings.append(f"Benchmark {number} of {len(benchmarks)}: {benchmark.title}, {len(items):,} items, {len(models)} models")
            for model in models:
                work.describe(model, subset)
        for task in foreign:
            works.append(Task(task=task, ledgers=ledgers(name_of(task), subset=subset)))
            beginnings.append(f"lm-evaluation-harness task {task}, {len(models)} models one after the other")
        if not any(work.unfinished() for work in works):
            yield Note("All of it was scored before.")
            return
        whole = Part(
            folder=folder,
            recipe=recipe,
            device=device,
            models=tuple(models),
            works=tuple(works),
            validation=validation,
            recorded_base=recorded_base,
            tasks=tasks,
            subset=subset,
            seed=seed,
            allow_code_execution=allow_code_execution,
        )
        parts = [whole] if loaded is not None else shares(whole)
        story = Story(beginnings, [[work.standing() for work in part.works] for part in parts])
        here = ((0, event) for event in run(whole, interrupted=stop.is_set, loaded=loaded))
        with contextlib.closing(spread(parts, stop) if len(parts) > 1 else here) as events:
            try:
                for part, event in events:
                    yield from story.tell(part, event)
            except InterruptedError:
                yield Note("Stopped; what was answered is kept.")
