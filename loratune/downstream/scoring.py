"""Scores that guide the search: a finished trial's adapter, on some items of each benchmark that the study names.

Answers lie in the study's folder `scoring/`, laid out as `evaluation/` is (scores.py), and are no evidence. What was
answered is kept item by item, so that a killed study goes on with the next one. The model is loaded for each trial and
given back after: between two trials the device is training's.
"""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.downstream.evaluator import score_models
from loratune.downstream.events import BenchmarkProgress, Event
from loratune.downstream.job import EvaluatedModel, EvaluationJob
from loratune.downstream.results.scores import read_results
from loratune.downstream.results.search_items import FOLDER, keep_search_items
from loratune.downstream.tasks.base import stratified
from loratune.downstream.tasks.benchmarks import build_benchmark
from loratune.errors import EvaluationError, SpecError
from loratune.work import ModelRecipe

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
    """Scores the trials of the study in `folder` on `items` items of each of `benchmarks`, drawn with `seed`.

    hold: load the model in `prepare`, once for all. Needed where this process trains too, in another thread: Transformers
    changes torch's default dtype while it loads, for all threads.
    """

    folder: Path
    benchmarks: Sequence[str]
    items: int
    seed: int
    recipe: ModelRecipe
    validation: Path  # the prepared data, whose losses prove that the adapter is on
    data: Path | None = None
    device: str = "auto"
    allow_code_execution: bool = False
    weaker_sandbox: bool = False
    hold: bool = False
    _loaded: "BaseModel | None" = field(default=None, init=False)

    def prepare(self) -> None:
        """Draw the items, or see that they are still the same ones, and that all of it may and can be scored.

        Raises SpecError when too few would be left to report with, StorageError when the benchmark's data changed, and
        what `score_models` raises before anything is computed.
        """
        drawn = {}
        for name in self.benchmarks:
            everything = build_benchmark(name, self.data, weaker=self.weaker_sandbox).items()
            if 2 * self.items > len(everything):
                raise SpecError(
                    f"scoring.items: got {self.items}; {name} has {len(everything):,}, of which at most half ({len(everything) // 2:,}) "
                    "may guide the search: the others are there to report what it found"
                )
            drawn[name] = [item.id for item in stratified(everything, self.items, self.seed)]
        keep_search_items(self.folder, drawn)
        for _ in self._evaluate([], threading.Event()):
            pass
        if self.hold:
            from loratune.finetune.model import choose_device, load  # torch

            self._loaded = load(self.recipe, choose_device(self.device))

    def score(self, trial: int, adapter: Path, loss: float | None, stop: threading.Event) -> Iterator[ScoringProgress]:
        """Score a trial's adapter, telling how far it is after each batch of answers.

        What was answered in an earlier start counts. Without scores at its end it was stopped by `stop`. loss: as recorded.
        Raises what `score_models` raises, and EvaluationError where memory runs out.
        """
        began, name, done, total = time.monotonic(), f"{trial:04d}", 0, self.items
        for event in self._evaluate([EvaluatedModel(name=name, adapter=adapter, loss=loss)], stop):
            if isinstance(event, BenchmarkProgress):
                done, total = event.done, event.total
            yield ScoringProgress(done=done, total=total, seconds=time.monotonic() - began)
        found = {result.benchmark: result for result in read_results(self.folder / FOLDER) if result.model == name}
        if all(benchmark in found and found[benchmark].done for benchmark in self.benchmarks):
            scores = {benchmark: found[benchmark].interval().value for benchmark in self.benchmarks}
            yield ScoringProgress(done=total, total=total, seconds=time.monotonic() - began, scores=scores)

    def _evaluate(self, models: Sequence[EvaluatedModel], stop: threading.Event) -> Iterator[Event]:
        job = EvaluationJob(
            folder=self.folder / FOLDER,
            recipe=self.recipe,
            models=tuple(models),
            benchmarks=tuple(self.benchmarks),
            validation=self.validation,
            data=self.data,
            subset=self.items,
            leave_out={},
            seed=self.seed,
            device=self.device,
            allow_code_execution=self.allow_code_execution,
            weaker_sandbox=self.weaker_sandbox,
        )
        try:
            yield from score_models(job, loaded=self._loaded, stop=stop)
        except (RuntimeError, MemoryError) as error:
            from loratune.finetune.memory import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            raise EvaluationError(
                f"out of memory while scoring trial {int(models[0].name)}: for its scores the model stands on {self.device} once more, "
                "beside training. A smaller training.tokens_per_pass leaves room for it; the same command goes on."
            ) from error
        finally:
            if "torch" in sys.modules:  # else nothing was loaded
                import torch

                from loratune.finetune.memory import free

                free(torch.device("cuda" if torch.cuda.is_initialized() else "cpu"))
