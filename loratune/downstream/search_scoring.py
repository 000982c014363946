"""Scores that guide the search: a finished trial's adapter, on some items of each benchmark that the study names.

Answers lie in the study's folder `scoring/`, laid out as `evaluation/` is (scores.py), and are no evidence. Answers
are kept item by item, so that a killed study continues with the next one. The model is loaded for each trial and
released after it: between two trials the device is training's.
"""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.downstream.evaluator import score_models
from loratune.downstream.events import BenchmarkProgress, Event
from loratune.downstream.job import EvaluatedModel, EvaluationJob, build_all
from loratune.downstream.metric_functions import OwnMetrics
from loratune.downstream.results.scores import describe_model, model_name, read_results
from loratune.downstream.results.search_items import keep_search_items
from loratune.downstream.tasks.base import stratified
from loratune.downstream.tasks.benchmarks import build_benchmark
from loratune.errors import EvaluationError, SpecError
from loratune.record.paths import MAIN
from loratune.spec.own_metrics import OwnMetric

if TYPE_CHECKING:
    from loratune.finetune.model import BaseModel


@dataclass(frozen=True, kw_only=True)
class ScoringProgress:
    """How far the scoring of a trial is; the last one of a finished scoring has its scores."""

    done: int  # answers, of the benchmark at work
    total: int
    seconds: float  # since the scoring began in this start
    scores: dict[str, float] = field(default_factory=dict)  # benchmark -> score in [0, 1]; all of them or none


@dataclass(kw_only=True)
class Scorer:
    """Scores a study's trials, each as `job` says; its `subset` of items is drawn once for all trials.

    hold: load the model in `prepare`, once for all. Needed where this process trains too, in another thread: Transformers
    changes torch's default dtype while it loads, for all threads.
    """

    job: EvaluationJob  # without models; its folder is the study's `scoring`
    metrics: Sequence[OwnMetric] = ()  # the study's own, whose answers are among the job's
    hold: bool = False
    _loaded: "BaseModel | None" = field(default=None, init=False)
    _own: OwnMetrics | None = field(default=None, init=False)

    def prepare(self) -> None:
        """Draw the items, or check that they are still the same, and that the benchmarks may and can be scored.

        Raises SpecError when too few would be left to report with, StorageError when the benchmark's data changed, and
        the errors that `score_models` raises before anything is computed; SpecError and StorageError of the own metrics' functions.
        """
        drawn, job, number = {}, self.job, self.job.subset or 0
        for name in job.benchmarks:
            everything = build_benchmark(name, job.data, weaker=job.weaker_sandbox).items()
            if 2 * number > len(everything):
                raise SpecError(
                    f"scoring.items: got {number}; {name} has {len(everything):,}, of which at most half ({len(everything) // 2:,}) "
                    "may guide the search: the others are needed to report its result"
                )
            drawn[name] = [item.id for item in stratified(everything, number, job.seed)]
        if drawn:
            keep_search_items(job.folder.parent, drawn)
        if self.metrics:
            sets = [benchmark for benchmark in build_all(job)[0] if benchmark.drawn]
            self._own = OwnMetrics(self.metrics, job.folder, {benchmark.name: benchmark.items() for benchmark in sets})
        for _ in self._evaluate((), threading.Event()):
            pass
        if self.hold:
            from loratune.finetune.model import choose_device, load  # torch

            self._loaded = load(job.recipe, choose_device(job.device))

    def score(self, trial: int, adapter: Path, loss: float | None, stop: threading.Event, rung: str = "") -> Iterator[ScoringProgress]:
        """Score a trial's adapter, and report progress after each batch of answers.

        rung: what names it there, where the full run does not end. Answers of an earlier start count.
        Without scores at its end it was stopped by `stop`. loss: as recorded.
        Raises the errors of `score_models`, and EvaluationError where memory runs out.
        """
        began, name, done, total = time.monotonic(), model_name(trial, rung or MAIN), 0, self.job.subset or 0
        for event in self._evaluate((EvaluatedModel(name=name, adapter=adapter, loss=loss),), stop):
            if isinstance(event, BenchmarkProgress):
                done, total = event.done, event.total
            yield ScoringProgress(done=done, total=total, seconds=time.monotonic() - began)
        found = {result.benchmark: result for result in read_results(self.job.folder) if result.model == name}
        if all(benchmark in found and found[benchmark].done for benchmark in self.job.benchmarks):
            scores = {benchmark: found[benchmark].score.value for benchmark in self.job.benchmarks}
            if self._own is not None:
                own = self._own.measure(name)
                if not own:
                    return
                scores |= own
            yield ScoringProgress(done=total, total=total, seconds=time.monotonic() - began, scores=scores)

    def _evaluate(self, models: tuple[EvaluatedModel, ...], stop: threading.Event) -> Iterator[Event]:
        try:
            yield from score_models(replace(self.job, models=models), loaded=self._loaded, stop=stop)
        except (RuntimeError, MemoryError) as error:
            from loratune.finetune.memory import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            raise EvaluationError(
                f"out of memory while scoring {describe_model(models[0].name)}: scoring loads the model on {self.job.device} a second "
                "time, beside training. A smaller training.tokens_per_pass leaves room for it; the same command continues."
            ) from error
        finally:
            if "torch" in sys.modules:  # else nothing was loaded
                import torch

                from loratune.finetune.memory import free

                free(torch.device("cuda" if torch.cuda.is_initialized() else "cpu"))
