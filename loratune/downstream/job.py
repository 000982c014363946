"""What one process does of an evaluation: load the model with some adapters, prove them, answer, keep every answer.

A `Part` holds all that it takes, and crosses a process border by pickle. Results are kept per model, so that parts of the
same evaluation never meet. torch is imported by `run`.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from loratune.downstream.events import Began, Event, Note, Progress
from loratune.downstream.results.scores import Ledger, in_words
from loratune.downstream.tasks.base import Benchmark, Item, constant_scores
from loratune.system.files import write_atomically
from loratune.work import ModelRecipe

if TYPE_CHECKING:
    from loratune.finetune.model import BaseModel


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is scored: the bare model (`adapter` None) or a trial's adapter on it."""

    name: str  # of its folder: `scores.model_name`, or base
    adapter: Path | None
    loss: float | None  # recorded validation loss


@dataclass(frozen=True, kw_only=True)
class Work:
    """A benchmark, its items, and each model's results."""

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

    def unfinished(self) -> set[str]:
        """The models that lack something."""
        return {name for names in self.lacking() for name in names}

    def standing(self) -> Progress:
        """How far it is at the start."""
        total = len(self.items) * len(self.ledgers)
        left = sum(len(names) * len(items) for names, items in self.lacking().items())
        return Progress(benchmark=self.benchmark.name, done=total - left, total=total, seconds=0.0, seconds_left=None)

    def describe(self, model: Model, subset: int | None) -> None:
        """Write what the model's answers are measured with. Raises StorageError."""
        self.ledgers[model.name].describe(
            {
                "title": self.benchmark.title,
                "chance": self.benchmark.chance,
                "mean_over_groups": self.benchmark.mean_over_groups,
                "constant": constant_scores(self.items),
                "protocol": self.benchmark.protocol,
                "items": len(self.items),
                "subset": subset,
                "validation_loss": model.loss,
            }
        )


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of lm-evaluation-harness, and each model's results: all of them or none."""

    task: str
    ledgers: dict[str, Ledger]

    @property
    def name(self) -> str:
        return name_of(self.task)

    def unfinished(self) -> set[str]:
        """The models without results."""
        return {name for name, ledger in self.ledgers.items() if not ledger.done}

    def standing(self) -> Progress:
        """How far it is at the start, in models."""
        total = len(self.ledgers)
        return Progress(benchmark=self.name, done=total - len(self.unfinished()), total=total, seconds=0.0, seconds_left=None)


def name_of(task: str) -> str:
    """Of a harness's task among the results."""
    return f"lm_eval-{task}"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Models, what they are scored on, and how; the arguments of `evaluate`."""

    folder: Path
    recipe: ModelRecipe
    device: str
    models: tuple[Model, ...]
    works: tuple[Work | Task, ...]
    validation: Path
    recorded_base: float | None
    tasks: Path | None
    subset: int | None
    seed: int
    allow_code_execution: bool

    def of(self, names: Collection[str]) -> Self:
        """What of it concerns these models."""
        works = [replace(work, ledgers={name: ledger for name, ledger in work.ledgers.items() if name in names}) for work in self.works]
        return replace(self, models=tuple(model for model in self.models if model.name in names), works=tuple(works))


def run(part: Part, *, interrupted: Callable[[], bool], loaded: "BaseModel | None" = None) -> Iterator[Event | Began]:
    """Prove the adapters, then go through the works. Each announces itself by Began, after which its Progress follows.

    Raises InterruptedError when `interrupted` says so, and what `evaluate` raises; what was answered is kept.
    """
    running = _Run(part, interrupted, loaded)
    try:
        yield from running.prove()
        for number, work in enumerate(part.works):
            yield Began(number)
            yield from running.answer(work) if isinstance(work, Work) else running.judge(work)
    finally:
        running.adapters.close()


class _Run:
    """The frozen model with the part's adapters hooked in."""

    def __init__(self, part: Part, interrupted: Callable[[], bool], loaded: "BaseModel | None") -> None:
        from loratune.downstream.answering.adapter_stack import Adapters, read_adapter
        from loratune.finetune.model import choose_device, load

        self.part, self.interrupted = part, interrupted
        self.base = loaded or load(part.recipe, choose_device(part.device))
        self.tuned = [model for model in part.models if model.adapter is not None]
        adapters = [read_adapter(model.adapter, self.base) for model in self.tuned if model.adapter]
        self.adapters = Adapters(self.base, [None, *adapters])  # the bare model has a place in any case
        self.places = {model.name: 0 for model in part.models} | {model.name: place for place, model in enumerate(self.tuned, 1)}

    def prove(self) -> Iterator[Event]:
        from loratune.data.prepared import Prepared
        from loratune.downstream.answering.adapter_check import Prover, summary

        if not self.tuned:
            return
        tokens, recorded_base = Prepared.load(self.part.validation).validation, self.part.recorded_base
        prover = Prover(self.base, self.adapters, tokens, base_place=0, recorded_base=recorded_base, interrupted=self.interrupted)
        proofs = []
        for model in self.tuned:
            proofs.append(prover.prove(self.places[model.name], in_words(model.name), model.loss))
            write_atomically(self.part.folder / model.name / "proof.json", proofs[-1].to_json() + "\n")
        yield Note(f"Proved: {summary(proofs)}.")

    def answer(self, work: Work) -> Iterator[Event]:
        from loratune.downstream.answering.answerer import Answerer

        answerer, benchmark, began = Answerer(self.base, self.adapters), work.benchmark, time.monotonic()
        standing = work.standing()
        done, total = standing.done, standing.total
        for names, items in work.lacking().items():
            mark = time.monotonic()
            places = [self.places[name] for name in names]
            answered = answerer.answers(benchmark, items, places, seed=self.part.seed, interrupted=self.interrupted)
            for batch, answers in answered:
                judged = _judged(benchmark, batch, [[answer.text for answer in own] for own in answers])
                seconds = (time.monotonic() - mark) / len(names)
                for name, own, verdicts in zip(names, answers, judged, strict=True):
                    work.ledgers[name].add([_line(*one) for one in zip(batch, own, verdicts, strict=True)], seconds)
                mark = time.monotonic()
                done += len(batch) * len(names)
                spent = mark - began
                left = spent * (total - done) / (done - standing.done)
                yield Progress(benchmark=benchmark.name, done=done, total=total, seconds=spent, seconds_left=left)
        for model in self.part.models:  # once more, with the seconds it took
            work.describe(model, self.part.subset)

    def judge(self, work: Task) -> Iterator[Event]:
        from loratune.downstream.tasks.harness import judge

        began, part, standing, unfinished = time.monotonic(), self.part, work.standing(), work.unfinished()
        models = [model for model in part.models if model.name in unfinished]
        for number, model in enumerate(models, 1):
            if self.interrupted():
                raise InterruptedError
            mark, place, code = time.monotonic(), self.places[model.name], part.allow_code_execution
            judged = judge(
                work.task, self.base, self.adapters, place, folder=part.tasks, limit=part.subset, allow_code=code, seed=part.seed
            )
            facts = {"title": work.task, "chance": judged.chance, "version": judged.version, "metric": judged.metric}
            facts |= {"mean_over_groups": False, "items": len(judged.lines), "validation_loss": model.loss}
            work.ledgers[model.name].describe(facts)
            work.ledgers[model.name].add(judged.lines, time.monotonic() - mark)
            spent = time.monotonic() - began
            left = spent / number * (len(models) - number)
            yield Progress(benchmark=work.name, done=standing.done + number, total=standing.total, seconds=spent, seconds_left=left)


def _line(item: Item, answer: Any, verdict: Any) -> dict[str, Any]:
    line = {"id": item.id, "group": item.group, "answer": answer.text, "score": verdict.score, "why": verdict.why}
    if answer.log_likelihoods:
        line["log_likelihoods"] = answer.log_likelihoods
    if answer.cut or (answer.shots is not None and answer.shots < len(item.shots) - 1):
        line |= {"shots": answer.shots, "cut": answer.cut}
    return line


def _judged(benchmark: Benchmark, items: Sequence[Item], texts: list[list[str]]) -> list[list[Any]]:
    """Verdicts per model and item; the same answer to the same item is judged once, programs being slow to run."""
    places: dict[tuple[int, str], int] = {}
    for own in texts:
        for number, text in enumerate(own):
            places.setdefault((number, text), len(places))
    verdicts = benchmark.score([items[number] for number, _ in places], [text for _, text in places])
    return [[verdicts[places[number, text]] for number, text in enumerate(own)] for own in texts]
