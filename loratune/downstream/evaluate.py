"""Score a study's models on benchmarks: prove that each adapter is on, answer, keep every answer, tell how far it is.

    models = [Model(name="0007", adapter=..., loss=0.97), Model(name="base", adapter=None, loss=5.37)]
    for event in evaluate(folder, recipe=..., models=models, benchmarks=["mmlu"], validation=...): print(event)

Continues where it stopped, per model, benchmark and item: what stands in `folder` with the same identity is not asked
again. torch is imported when there is something left to answer.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.downstream.base import Benchmark, Item, constant_scores, stratified
from loratune.downstream.guided import items_that_guided
from loratune.downstream.registry import HARNESS, build, may_run
from loratune.downstream.scores import Ledger, alone, fingerprint
from loratune.errors import EvaluationError
from loratune.files import write_atomically
from loratune.work import ModelRecipe

if TYPE_CHECKING:
    from loratune.downstream.adapters import Adapters
    from loratune.finetune.model import BaseModel

BASE = "base"


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is scored: the bare model (`adapter` None) or a trial's adapter on it."""

    name: str  # of its folder: the trial's number, 0007, or base
    adapter: Path | None
    loss: float | None  # recorded validation loss


@dataclass(frozen=True)
class Note:
    """Something worth a line."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a benchmark is, all models together."""

    benchmark: str
    done: int  # answers
    total: int
    seconds: float  # since the benchmark began in this run
    seconds_left: float | None  # of this benchmark; None before the first answers


Event = Note | Progress


@dataclass(kw_only=True)
class _Work:
    """A benchmark, its items, and which model still lacks which of them."""

    benchmark: Benchmark
    items: list[Item]
    ledgers: dict[str, Ledger]

    def lacking(self) -> dict[tuple[str, ...], list[Item]]:
        """Items by the models that lack them, so that one pass serves all of these."""
        found: dict[tuple[str, ...], list[Item]] = {}
        for item in self.items:
            models = tuple(name for name, ledger in self.ledgers.items() if item.id not in ledger.done)
            if models:
                found.setdefault(models, []).append(item)
        return found


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

    validation: the prepared data (finetune/prepare.py) whose losses were recorded; recorded_base: the bare model's.
    data: the benchmarks' own data. tasks: folder with descriptions of lm-evaluation-harness tasks. subset: items per
    benchmark, drawn with `seed`. leave_out: benchmark -> ids of items that must not count; by default those that guided the
    search of the study that `folder` lies in (guided.py). loaded: the bare model, where it is in memory already.

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

        def identity(model: Model, name: str) -> dict[str, Any]:
            base = f"{recipe.name_or_path}@{recipe.revision or 'main'}"
            return {"benchmark": name, "base": base, "adapter": prints[model.name], "seed": seed}

        works = []
        leave_out = items_that_guided(folder.parent) if leave_out is None else leave_out
        for name in foreign if leave_out else ():
            yield Note(f"{HARNESS}{name}: items that guided the search ({', '.join(leave_out)}) cannot be left out of it.")
        for benchmark in own:
            items, version = benchmark.items(), {"version": benchmark.version}
            guided = set(leave_out.get(benchmark.name, ()))
            if guided:
                items = [item for item in items if item.id not in guided]
                yield Note(f"{benchmark.title}: {len(guided):,} items guided the search and are left out; {len(items):,} are left.")
            items = stratified(items, subset, seed)
            ledgers = {m.name: Ledger(folder, m.name, benchmark.name, identity(m, benchmark.name) | version) for m in models}
            works.append(_Work(benchmark=benchmark, items=items, ledgers=ledgers))
            for model in models:
                _describe(ledgers[model.name], benchmark, model, items, subset)
        if not foreign and not any(work.lacking() for work in works):
            yield Note("All of it was scored before.")
            return
        base, adapters, places = _load(recipe, models, device, loaded)
        try:
            yield from _prove(folder, base, adapters, places, models, prints, validation, recorded_base, stop.is_set)
            for number, work in enumerate(works, 1):
                yield Note(
                    f"Benchmark {number} of {len(benchmarks)}: {work.benchmark.title}, {len(work.items):,} items, {len(models)} models"
                )
                yield from _answer(work, base, adapters, places, seed, stop.is_set)
                for model in models:  # once more, with the seconds it took
                    _describe(work.ledgers[model.name], work.benchmark, model, work.items, subset)
            for task in foreign:
                yield from _harness(
                    folder, task, base, adapters, places, models, identity, tasks, subset, allow_code_execution, seed, stop.is_set
                )
        except InterruptedError:
            yield Note("Stopped; what was answered is kept.")
        finally:
            adapters.close()


def _describe(ledger: Ledger, benchmark: Benchmark, model: Model, items: Sequence[Item], subset: int | None) -> None:
    ledger.describe(
        {
            "title": benchmark.title,
            "chance": benchmark.chance,
            "mean_over_groups": benchmark.mean_over_groups,
            "constant": constant_scores(items),
            "items": len(items),
            "subset": subset,
            "validation_loss": model.loss,
        }
    )


def _load(
    recipe: ModelRecipe, models: Sequence[Model], device: str, loaded: "BaseModel | None"
) -> tuple["BaseModel", "Adapters", dict[str, int]]:
    """The frozen model with all adapters hooked in, and each model's place; the bare model has one in any case."""
    from loratune.downstream.adapters import Adapters, read_adapter
    from loratune.finetune.model import choose_device, load

    base = loaded or load(recipe, choose_device(device))
    tuned = [model for model in models if model.adapter is not None]
    adapters = Adapters(base, [None, *(read_adapter(model.adapter, base) for model in tuned if model.adapter)])
    places = {model.name: 0 for model in models} | {model.name: place for place, model in enumerate(tuned, 1)}
    return base, adapters, places


def _prove(
    folder: Path,
    base: "BaseModel",
    adapters: "Adapters",
    places: dict[str, int],
    models: Sequence[Model],
    prints: dict[str, str | None],
    validation: Path,
    recorded_base: float | None,
    interrupted: Callable[[], bool],
) -> Iterator[Event]:
    from loratune.downstream.proof import Prover, summary
    from loratune.finetune.prepared import Prepared

    tuned = [model for model in models if model.adapter is not None]
    if not tuned:
        return
    tokens = Prepared.load(validation).validation
    prover = Prover(base, adapters, tokens, base_place=0, recorded_base=recorded_base, interrupted=interrupted)
    proofs = []
    for model in tuned:
        label = f"trial {int(model.name)}" if model.name.isdigit() else model.name
        proofs.append(prover.prove(places[model.name], label, model.loss))
        write_atomically(folder / model.name / "proof.json", proofs[-1].to_json() + "\n")
    yield Note(f"Proved: {summary(proofs)}.")


def _answer(
    work: _Work, base: "BaseModel", adapters: "Adapters", places: dict[str, int], seed: int, interrupted: Callable[[], bool]
) -> Iterator[Event]:
    from loratune.downstream.answering import Answerer

    answerer, benchmark, began = Answerer(base, adapters), work.benchmark, time.monotonic()
    total = len(work.items) * len(work.ledgers)
    lacking = work.lacking()
    before = done = total - sum(len(names) * len(items) for names, items in lacking.items())
    for names, items in lacking.items():
        mark = time.monotonic()
        for batch, answers in answerer.answers(benchmark, items, [places[name] for name in names], seed=seed, interrupted=interrupted):
            judged = _judged(benchmark, batch, [[answer.text for answer in own] for own in answers])
            seconds = (time.monotonic() - mark) / len(names)
            for name, own, verdicts in zip(names, answers, judged, strict=True):
                lines = []
                for item, answer, verdict in zip(batch, own, verdicts, strict=True):
                    line = {"id": item.id, "group": item.group, "answer": answer.text, "score": verdict.score, "why": verdict.why}
                    if answer.log_likelihoods:
                        line["log_likelihoods"] = answer.log_likelihoods
                    if answer.cut or (answer.shots is not None and answer.shots < len(item.shots) - 1):
                        line |= {"shots": answer.shots, "cut": answer.cut}
                    lines.append(line)
                work.ledgers[name].add(lines, seconds)
            mark = time.monotonic()
            done += len(batch) * len(names)
            spent = mark - began
            yield Progress(
                benchmark=benchmark.name,
                done=done,
                total=total,
                seconds=spent,
                seconds_left=spent * (total - done) / (done - before),
            )


def _judged(benchmark: Benchmark, items: list[Item], texts: list[list[str]]) -> list[list[Any]]:
    """Verdicts per model and item; the same answer to the same item is judged once, programs being slow to run."""
    places: dict[tuple[int, str], int] = {}
    for own in texts:
        for number, text in enumerate(own):
            places.setdefault((number, text), len(places))
    verdicts = benchmark.score([items[number] for number, _ in places], [text for _, text in places])
    return [[verdicts[places[number, text]] for number, text in enumerate(own)] for own in texts]


def _harness(
    folder: Path,
    task: str,
    base: "BaseModel",
    adapters: "Adapters",
    places: dict[str, int],
    models: Sequence[Model],
    identity: Callable[[Model, str], dict[str, Any]],
    tasks: Path | None,
    subset: int | None,
    allow_code: bool,
    seed: int,
    interrupted: Callable[[], bool],
) -> Iterator[Event]:
    from loratune.downstream.harness import judge

    began, name = time.monotonic(), f"lm_eval-{task}"
    yield Note(f"lm-evaluation-harness task {task}, {len(models)} models one after the other")
    for number, model in enumerate(models, 1):
        if interrupted():
            raise InterruptedError
        ledger = Ledger(folder, model.name, name, identity(model, name) | {"subset": subset})
        if not ledger.done:
            mark = time.monotonic()
            judged = judge(task, base, adapters, places[model.name], folder=tasks, limit=subset, allow_code=allow_code, seed=seed)
            facts = {"title": task, "chance": judged.chance, "version": judged.version, "metric": judged.metric}
            ledger.describe(facts | {"mean_over_groups": False, "items": len(judged.lines), "validation_loss": model.loss})
            ledger.add(judged.lines, time.monotonic() - mark)
        spent = time.monotonic() - began
        left = spent / number * (len(models) - number)
        yield Progress(benchmark=name, done=number, total=len(models), seconds=spent, seconds_left=left)
