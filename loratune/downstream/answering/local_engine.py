"""Our own engine: the frozen model in this process, with the job's adapters hooked in."""

from collections.abc import Iterator, Sequence

from loratune.data.batches import Tokens
from loratune.downstream.answering.adapter_check import AdapterChecker
from loratune.downstream.answering.adapter_stack import Adapters, read_adapter
from loratune.downstream.answering.answerer import Answerer
from loratune.downstream.answering.answering_engine import Interrupted
from loratune.downstream.answering.completions import ItemAnswer
from loratune.downstream.job import EvaluationJob
from loratune.downstream.tasks.base import Benchmark, Item
from loratune.downstream.tasks.harness import HarnessResult, run_task
from loratune.finetune.model import BaseModel, choose_device, load


class LocalEngine:
    """An `AnsweringEngine`."""

    def __init__(self, job: EvaluationJob, loaded: BaseModel | None) -> None:
        self.job, self.base = job, loaded or load(job.recipe, choose_device(job.device))
        tuned = [model for model in job.models if model.adapter is not None]
        adapters = [read_adapter(model.adapter, self.base) for model in tuned if model.adapter]
        self.adapters = Adapters(self.base, [None, *adapters])  # the bare model has a place in any case
        self.places = {model.name: 0 for model in job.models} | {model.name: place for place, model in enumerate(tuned, 1)}

    def checker(self, validation: Tokens, recorded_base: float | None, interrupted: Interrupted) -> AdapterChecker:
        return AdapterChecker(self.base, self.adapters, validation, base_place=0, recorded_base=recorded_base, interrupted=interrupted)

    def place(self, name: str) -> int:
        return self.places[name]

    def answers(
        self, benchmark: Benchmark, items: Sequence[Item], names: Sequence[str], *, seed: int, interrupted: Interrupted
    ) -> Iterator[tuple[list[Item], list[list[ItemAnswer]]]]:
        places = [self.places[name] for name in names]
        return Answerer(self.base, self.adapters).answers(benchmark, items, places, seed=seed, interrupted=interrupted)

    def harness(self, task: str, name: str) -> HarnessResult:
        job, place, code = self.job, self.places[name], self.job.allow_code_execution
        return run_task(task, self.base, self.adapters, place, folder=job.tasks, limit=job.subset, allow_code=code, seed=job.seed)

    def close(self) -> None:
        self.adapters.close()
