"""What a crash's text says of its cause, and how often it is tried again."""

from dataclasses import replace

import pytest

from loratune.executors import Executor
from loratune.executors.crashes import cause, certain, common_cause
from loratune.work import Hyperparameters, Outcome, Progress, Segment, State

INDEX = 'Traceback (most recent call last):\n  File "x.py", line 3, in f\n    y[9]\nIndexError: index out of range in self'
SHAPE = 'Traceback (most recent call last):\n  File "x.py", line 3\nRuntimeError: The size of tensor a ({}) must match 64'
CUDA = "Traceback ...\nRuntimeError: CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA"
DEAD = "the worker process died with signal 9. Worker log: runs/s/workers/{}.log"


def test_causes() -> None:
    assert cause(INDEX) == "IndexError: index out of range in self"
    assert cause(CUDA) == "RuntimeError: CUDA error: unspecified launch failure"
    assert cause(DEAD.format(1)) == "the worker process died with signal 9."
    assert cause("") == ""
    messages = (INDEX, SHAPE, CUDA, DEAD, "OSError: no space left", "torch.OutOfMemoryError: x")
    assert [certain(m) for m in messages] == [True, True, *[False] * 4]
    assert common_cause([DEAD.format(0), DEAD.format(1)])
    assert common_cause([SHAPE.format(130), SHAPE.format(99)]) == cause(SHAPE.format(130))
    assert not common_cause([INDEX, DEAD])
    assert not common_cause([])


class Crashing(Executor):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(max_retries=2)
        self.messages, self.tries = messages, 0

    def _start(self, segment: Segment) -> None:
        self.segment = segment
        self.tries += 1

    def _poll(self, timeout: float) -> list[Outcome]:  # type: ignore[override]
        return [Outcome(key=self.segment.key, state=State.CRASHED, message=self.messages[self.tries - 1])]

    def close(self, grace: float = 60.0) -> None: ...


@pytest.mark.parametrize(
    ("messages", "tries"),
    [
        ([INDEX] * 3, 2),
        ([CUDA] * 3, 3),
        ([DEAD] * 3, 3),
        ([INDEX, DEAD, INDEX], 3),
        ([DEAD, INDEX, INDEX], 3),
        ([INDEX, "KeyError: 1", INDEX], 3),
    ],
)
def test_the_same_exception_of_the_program_is_not_tried_a_third_time(messages: list[str], tries: int) -> None:
    executor = Crashing(messages)
    executor.submit(Segment(trial=0, hyperparameters=Hyperparameters(), seed=0, total_steps=1, stop_step=1))
    news: list[object] = []
    while not news:
        news += executor.collect(0.0)
    (outcome,) = news
    assert isinstance(outcome, Outcome)
    assert executor.tries == tries
    assert outcome.message.startswith(f"gave up after {tries} tries. ")


class Speaking(Crashing):
    """Says what it is told to, of its one segment."""

    def __init__(self) -> None:
        super().__init__([])
        self.said: list[Progress | Outcome] = []
        self.started: list[int] = []

    def _start(self, segment: Segment) -> None:
        super()._start(segment)
        self.started.append(segment.attempt)

    def _poll(self, timeout: float) -> list[Progress | Outcome]:  # type: ignore[override]
        said, self.said = self.said, []
        return said


def test_an_older_attempt_is_not_heard_and_a_preemption_is_no_try() -> None:
    executor = Speaking()
    executor.submit(Segment(trial=0, hyperparameters=Hyperparameters(), seed=0, total_steps=9, stop_step=9))
    key = executor.segment.key
    for attempt in range(1, 6):  # more often than a crash would be tried
        executor.said = [Outcome(key=key, state=State.CANCELLED, attempt=attempt)]
        assert executor.collect(0.0) == []
    assert executor.started == [1, 2, 3, 4, 5, 6]
    late = [
        Progress(key=key, step=3, total_steps=9, tokens=1, attempt=5),
        Outcome(key=key, state=State.CRASHED, message=DEAD, attempt=4),
        Outcome(key=key, state=State.CANCELLED, attempt=5),
        Outcome(key=key, state=State.COMPLETED, validation_loss=1.0, attempt=1),
    ]
    executor.said = list(late)
    assert executor.collect(0.0) == []
    assert executor.started[-1] == 6
    executor.said = [Outcome(key=key, state=State.CRASHED, message=DEAD)]  # of the present attempt, whichever it is
    assert executor.collect(0.0) == []
    assert executor.started[-1] == 7
    done = Outcome(key=key, state=State.COMPLETED, validation_loss=2.0, attempt=7)
    executor.said = [*late, done, replace(done, validation_loss=3.0)]
    assert executor.collect(0.0) == [done]


def test_an_outcome_names_the_nodes_that_left_its_segment() -> None:
    executor = Speaking()
    executor.submit(Segment(trial=0, hyperparameters=Hyperparameters(), seed=0, total_steps=9, stop_step=9))
    key = executor.segment.key
    for attempt, node in ((1, "a/1"), (2, ""), (3, "b/2")):  # without a node: asked to stop
        executor.said = [Outcome(key=key, state=State.CANCELLED, attempt=attempt, node=node)]
        assert executor.collect(0.0) == []
    executor.said = [Outcome(key=key, state=State.COMPLETED, validation_loss=2.0, attempt=4, node="c/3")]
    (done,) = executor.collect(0.0)
    assert (done.node, done.lost) == ("c/3", ("a/1", "b/2"))
    assert Outcome.from_plain(done.to_plain()) == done
