"""Who answers: one interface of our own engine (local_engine.py) and of a vLLM server (served_engine.py).

Both are given the same items, make the same prompts of them, token for token, and end answers by the same rule (completions.py),
so what they answer differs by rounding alone; of an item that is sampled (temperature > 0) also by the random numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from loratune.downstream.answering.completions import ItemAnswer
from loratune.downstream.job import VLLM, EvaluationJob
from loratune.downstream.tasks.base import Benchmark, Item

if TYPE_CHECKING:
    from loratune.data.batches import Tokens
    from loratune.downstream.answering.adapter_check import LossChecker
    from loratune.downstream.tasks.harness import HarnessResult
    from loratune.finetune.model import BaseModel

Interrupted = Callable[[], bool]


class AnsweringEngine(Protocol):
    """Answers for the models of a job, which are known by their names."""

    def checker(self, validation: "Tokens", recorded_base: float | None, interrupted: Interrupted) -> "LossChecker":
        """Whose `check` takes a model by what `place` says."""

    def place(self, name: str) -> object:
        """Where the engine has a model."""

    def answers(
        self, benchmark: Benchmark, items: Sequence[Item], names: Sequence[str], *, seed: int, interrupted: Interrupted
    ) -> Iterator[tuple[list[Item], list[list[ItemAnswer]]]]:
        """Some at a time, the items done and the answers of each of `names`, in their order. Raises InterruptedError."""

    def harness(self, task: str, name: str) -> "HarnessResult":
        """Score a model on a task of lm-evaluation-harness."""

    def close(self) -> None:
        """Let go of the models, whatever is still being answered."""


def open_engine(job: EvaluationJob, *, longest: int, interrupted: Interrupted, loaded: "BaseModel | None" = None) -> AnsweringEngine:
    """The job's models, ready to answer. longest: tokens that no prompt with its answer exceeds. loaded: the bare model, where it is."""
    if job.engine == VLLM:
        from loratune.downstream.answering.served_engine import ServedEngine

        return ServedEngine(job, longest=longest, interrupted=interrupted)
    from loratune.downstream.answering.local_engine import LocalEngine

    return LocalEngine(job, loaded)
