"""One process's share of an evaluation: load the model with some adapters, check them, answer, keep every answer.

An `EvaluationJob` is the description of it, and crosses a process border as JSON. Results are kept per model, so that the jobs of one
evaluation never write the same file. torch is imported by `run_job`.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from loratune.downstream.events import BenchmarkBegan, BenchmarkProgress, Event
from loratune.downstream.results.scores import ResultWriter, adapter_fingerprint, describe_model
from loratune.downstream.tasks.base import Benchmark, Item, constant_scores, stratified
from loratune.downstream.tasks.benchmarks import HARNESS, build_benchmark
from loratune.downstream.tasks.generated import AnswerSet, GeneratedAnswers
from loratune.system.files import write_atomically
from loratune.work import Json, Message, ModelRecipe

if TYPE_CHECKING:
    from loratune.downstream.answering.answering_engine import AnsweringEngine
    from loratune.finetune.model import BaseModel

_SPECIAL = 16  # tokens that a tokenizer may put around a text
LOCAL, VLLM = ENGINES = ("loratune", "vllm")  # who answers (answering/answering_engine.py)


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel(Json):
    """The bare model (`adapter` None), or a trial's adapter on it."""

    name: str  # of its folder: `scores.model_name`, or base
    adapter: Path | None
    loss: float | None  # recorded validation loss


@dataclass(frozen=True, kw_only=True)
class EvaluationJob(Json):
    """Models, benchmarks, and how the ones are scored on the others."""

    folder: Path  # of the results
    recipe: ModelRecipe
    models: tuple[EvaluatedModel, ...]
    benchmarks: tuple[str, ...]
    answers: tuple[AnswerSet, ...] = ()  # besides, for a study's own metrics
    validation: Path  # the prepared data (data/prepare.py) whose losses were recorded
    recorded_base: float | None = None  # the bare model's validation loss
    data: Path | None = None  # the benchmarks' own data; None: the hub
    tasks: Path | None = None  # folder with descriptions of lm-evaluation-harness tasks
    subset: int | None = None  # items per benchmark, drawn with `seed`
    leave_out: dict[str, tuple[str, ...]] | None = None  # benchmark -> ids of items that must not count; None: the study's search items
    seed: int = 0
    device: str = "auto"
    allow_code_execution: bool = False
    weaker_sandbox: bool = False
    engine: str = LOCAL
    server: str | None = None  # address of a vLLM server that runs already

    @property
    def names(self) -> list[str]:
        return [model.name for model in self.models]


@dataclass(frozen=True, kw_only=True)
class BenchmarkRun:
    """A benchmark, its items, and each model's results."""

    benchmark: Benchmark
    items: list[Item]
    writers: dict[str, ResultWriter]  # by model
    left_out: int  # items that guided the search
    left: int  # items without them, before a subset was drawn

    def title(self, number: int, of: int) -> str:
        """The line that announces it."""
        return f"Benchmark {number} of {of}: {self.benchmark.title}, {len(self.items):,} items, {len(self.writers)} models"

    def of(self, names: Collection[str]) -> Self:
        """The run of these models alone."""
        return replace(self, writers={name: writer for name, writer in self.writers.items() if name in names})

    def lacking(self) -> dict[tuple[str, ...], list[Item]]:
        """Items by the models that lack them, so that one pass serves all of these."""
        found: dict[tuple[str, ...], list[Item]] = {}
        for item in self.items:
            models = tuple(name for name, writer in self.writers.items() if item.id not in writer.done)
            if models:
                found.setdefault(models, []).append(item)
        return found

    def unfinished(self) -> set[str]:
        """The models that lack something."""
        return {name for names in self.lacking() for name in names}

    def standing(self) -> BenchmarkProgress:
        """How far it is at the start."""
        total = len(self.items) * len(self.writers)
        left = sum(len(names) * len(items) for names, items in self.lacking().items())
        return BenchmarkProgress(benchmark=self.benchmark.name, done=total - left, total=total, seconds=0.0, seconds_left=None)

    def describe(self, model: EvaluatedModel, subset: int | None) -> None:
        """Write down how the model's answers are measured. Raises StorageError."""
        self.writers[model.name].describe(
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
class HarnessRun:
    """A task of lm-evaluation-harness, and each model's results: all of them or none."""

    task: str
    writers: dict[str, ResultWriter]

    def title(self, number: int, of: int) -> str:
        return f"lm-evaluation-harness task {self.task}, {len(self.writers)} models one after the other"

    def of(self, names: Collection[str]) -> Self:
        return replace(self, writers={name: writer for name, writer in self.writers.items() if name in names})

    def unfinished(self) -> set[str]:
        """The models without results."""
        return {name for name, writer in self.writers.items() if not writer.done}

    def standing(self) -> BenchmarkProgress:
        """How far it is at the start, in models."""
        total, name = len(self.writers), harness_name(self.task)
        return BenchmarkProgress(benchmark=name, done=total - len(self.unfinished()), total=total, seconds=0.0, seconds_left=None)


def harness_name(task: str) -> str:
    """The name of a harness's task among the results."""
    return f"lm_eval-{task}"


def build_all(job: EvaluationJob) -> tuple[list[Benchmark], list[str]]:
    """The job's benchmarks, and its tasks of lm-evaluation-harness. Raises EvaluationError, DataError."""
    own = [build_benchmark(name, job.data, weaker=job.weaker_sandbox) for name in job.benchmarks if not name.startswith(HARNESS)]
    trusted = job.recipe.trust_remote_code
    own += [GeneratedAnswers(one, job.validation, seed=job.seed, trust_remote_code=trusted) for one in job.answers]
    return own, [name.removeprefix(HARNESS) for name in job.benchmarks if name.startswith(HARNESS)]


def open_runs(job: EvaluationJob, benchmarks: Sequence[Benchmark], tasks: Sequence[str]) -> list[BenchmarkRun | HarnessRun]:
    """Draw the items and open the results of all models. Raises DataError, StorageError."""
    fingerprints = {model.name: adapter_fingerprint(model.adapter) for model in job.models}
    origin = f"{job.recipe.name_or_path}@{job.recipe.revision or 'main'}"

    def writers(name: str, **more: Any) -> dict[str, ResultWriter]:
        return {
            model: ResultWriter(
                job.folder,
                model,
                name,
                {"benchmark": name, "base": origin, "adapter": fingerprint, "seed": job.seed, "engine": job.engine, **more},
            )
            for model, fingerprint in fingerprints.items()
        }

    runs: list[BenchmarkRun | HarnessRun] = []
    for benchmark in benchmarks:
        items = benchmark.items()
        excluded = set((job.leave_out or {}).get(benchmark.name, ()))
        allowed = [item for item in items if item.id not in excluded]
        run = BenchmarkRun(
            benchmark=benchmark,
            items=allowed if benchmark.drawn else stratified(allowed, job.subset, job.seed),
            writers=writers(benchmark.name, version=benchmark.version),
            left_out=len(excluded),
            left=len(allowed),
        )
        for model in job.models:
            run.describe(model, job.subset)
        runs.append(run)
    return runs + [HarnessRun(task=task, writers=writers(harness_name(task), subset=job.subset)) for task in tasks]


def run_job(
    job: EvaluationJob,
    runs: Sequence[BenchmarkRun | HarnessRun],
    *,
    interrupted: Callable[[], bool],
    loaded: "BaseModel | None" = None,
) -> Iterator[Event | BenchmarkBegan]:
    """Check the adapters, then go through the job's runs. Each announces itself by BenchmarkBegan; its progress follows.

    Raises InterruptedError when `interrupted` says so, and the errors of `score_models`; the answers so far are kept.
    """
    from loratune.downstream.answering.answering_engine import open_engine

    engine = open_engine(job, longest=_longest(job, runs), interrupted=interrupted, loaded=loaded)
    running = _Running(job, engine, interrupted)
    try:
        yield from running.check_adapters()
        for number, run in enumerate(runs):
            yield BenchmarkBegan(number)
            yield from running.answer(run) if isinstance(run, BenchmarkRun) else running.judge(run)
    finally:
        engine.close()


def _longest(job: EvaluationJob, runs: Sequence[BenchmarkRun | HarnessRun]) -> int:
    """Tokens that no sequence exceeds, a validation example included; there are at most as many as bytes."""
    from loratune.data.prepared import Prepared

    texts = [
        len(item.prompt.encode()) + max((len(choice.encode()) for choice in item.choices), default=run.benchmark.max_new_tokens)
        for run in runs
        if isinstance(run, BenchmarkRun)
        for item in run.items
    ]
    examples = Prepared.load(job.validation).validation.lengths if job.engine != LOCAL and any(m.adapter for m in job.models) else ()
    return max([*texts, *map(int, examples)], default=0) + _SPECIAL


@dataclass(frozen=True)
class _Running:
    """A job whose engine is ready."""

    job: EvaluationJob
    engine: "AnsweringEngine"
    interrupted: Callable[[], bool]

    def check_adapters(self) -> Iterator[Event]:
        from loratune.data.prepared import Prepared
        from loratune.downstream.answering.adapter_check import check_summary

        tuned = [model for model in self.job.models if model.adapter is not None]
        if not tuned:
            return
        checker = self.engine.checker(Prepared.load(self.job.validation).validation, self.job.recorded_base, self.interrupted)
        checks = []
        for model in tuned:
            checks.append(checker.check(self.engine.place(model.name), describe_model(model.name), model.loss))
            write_atomically(self.job.folder / model.name / "proof.json", checks[-1].to_json() + "\n")
        yield Message(text=f"Adapter check: {check_summary(checks)}.")

    def answer(self, run: BenchmarkRun) -> Iterator[Event]:
        benchmark, began = run.benchmark, time.monotonic()
        standing = run.standing()
        done, total = standing.done, standing.total
        for names, items in run.lacking().items():
            mark = time.monotonic()
            answered = self.engine.answers(benchmark, items, names, seed=self.job.seed, interrupted=self.interrupted)
            for batch, answers in answered:
                judged = _judged(benchmark, batch, [[answer.text for answer in own] for own in answers])
                seconds = (time.monotonic() - mark) / len(names)
                for name, own, verdicts in zip(names, answers, judged, strict=True):
                    run.writers[name].add([_line(*one) for one in zip(batch, own, verdicts, strict=True)], seconds)
                mark = time.monotonic()
                done += len(batch) * len(names)
                spent = mark - began
                left = spent * (total - done) / (done - standing.done)
                yield BenchmarkProgress(benchmark=benchmark.name, done=done, total=total, seconds=spent, seconds_left=left)
        for model in self.job.models:  # once more, with the seconds it took
            run.describe(model, self.job.subset)

    def judge(self, run: HarnessRun) -> Iterator[Event]:
        began, job, standing, unfinished = time.monotonic(), self.job, run.standing(), run.unfinished()
        models = [model for model in job.models if model.name in unfinished]
        for number, model in enumerate(models, 1):
            if self.interrupted():
                raise InterruptedError
            mark, judged = time.monotonic(), self.engine.harness(run.task, model.name)
            facts = {"title": run.task, "chance": judged.chance, "version": judged.version, "metric": judged.metric}
            facts |= {"mean_over_groups": False, "items": len(judged.lines), "validation_loss": model.loss}
            run.writers[model.name].describe(facts)
            run.writers[model.name].add(judged.lines, time.monotonic() - mark)
            spent = time.monotonic() - began
            left = spent / number * (len(models) - number)
            name, done = standing.benchmark, standing.done + number
            yield BenchmarkProgress(benchmark=name, done=done, total=standing.total, seconds=spent, seconds_left=left)


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
