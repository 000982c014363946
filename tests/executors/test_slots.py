"""Segments stream through the slots of every executor, around an engine that follows a script."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import scripted_engine
from scripted_engine import FATAL, LOST, POISONOUS, SLOTS

from loratune import executors
from loratune.errors import DeviceLostError
from loratune.executors import Executor
from loratune.executors.inbox import QueueInbox
from loratune.executors.process import WorkerProcess
from loratune.record import open_record
from loratune.system.files import write_atomically
from loratune.work import Hyperparameters, Message, ModelRecipe, Outcome, Progress, Recipe, Segment, State, TrainingRecipe

EVERY = pytest.mark.parametrize("name", ["inline", "local"])


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "loratune.finetune.engines", scripted_engine.module())
    monkeypatch.setattr(WorkerProcess, "_launcher", lambda _: [scripted_engine.__file__])


@contextmanager
def executor(name: Any, root: Path, **options: Any) -> Iterator[Executor]:
    recipe = Recipe(model=ModelRecipe(name_or_path=""), training=TrainingRecipe(), data="", slots=SLOTS)
    with open_record(root) as record:
        write_atomically(root / "recipe.json", recipe.to_json())
        given: dict[str, Any] = {"devices": [], "workers": 1, "threads": 1, "max_retries": 1, "hang_timeout": None} | options
        made = executors.build(name, recipe=recipe, root=root, lock=record.lock, **given)
        try:
            yield made
        finally:
            made.close(grace=10)


def segment(trial: int, steps: int, seed: int = 0) -> Segment:
    return Segment(trial=trial, hyperparameters=Hyperparameters(), seed=seed, total_steps=steps, stop_step=steps)


def finish(made: Executor, segments: list[Segment], on_news: Callable[[Any], None] = lambda _: None) -> dict[int, Outcome]:
    """Keep the executor filled, as the study does; the outcomes by trial, in the order in which they came."""
    waiting, outcomes, flying = list(segments), {}, 0
    deadline = time.monotonic() + 30
    while len(outcomes) < len(segments):
        assert time.monotonic() < deadline, f"only {outcomes} came"
        while waiting and flying < made.capacity:
            made.submit(waiting.pop(0))
            flying += 1
        for item in made.collect(1.0):
            on_news(item)
            if isinstance(item, Outcome):
                trial = int(item.key.split("/")[0])
                assert trial not in outcomes, "one outcome per segment"
                outcomes[trial] = item
                flying -= 1
    return outcomes


@EVERY
def test_segments_enter_and_leave_while_others_train(name: str, tmp_path: Path) -> None:
    with executor(name, tmp_path) as made:
        assert (made.capacity, made.processes) == (3, 1)
        outcomes = finish(made, [segment(0, 60), *(segment(trial, 5) for trial in range(1, 8))])
    assert {o.state for o in outcomes.values()} == {State.COMPLETED}
    assert list(outcomes)[-1] == 0, "seven short ones passed the long one by"
    assert outcomes[0].message == "neighbours: 2"


@EVERY
def test_a_message_comes_once(name: str, tmp_path: Path) -> None:
    heard: list[Any] = []
    with executor(name, tmp_path, workers=2) as made:
        finish(made, [segment(trial, 5) for trial in range(6)], heard.append)
    assert [item.text for item in heard if isinstance(item, Message)] == ["this engine follows a script"]


def test_the_emptiest_worker_is_given_the_next_segment(tmp_path: Path) -> None:
    with executor("local", tmp_path, workers=2) as made:
        assert (made.capacity, made.processes) == (6, 2)
        outcomes = finish(made, [segment(trial, 20) for trial in range(4)])
    assert sorted(Counter(o.device for o in outcomes.values()).values()) == [2, 2]


@pytest.mark.parametrize(("name", "kind"), [("local", FATAL), ("local", POISONOUS), ("inline", POISONOUS)])
def test_the_neighbours_of_one_that_crashes_never_notice(name: str, kind: int, tmp_path: Path) -> None:
    """One retry is enough for them: it happens alone, from their checkpoints; and the slots are filled again afterwards."""
    wanted = [segment(0, 20), segment(1, 20, seed=kind), segment(2, 20), *(segment(trial, 4) for trial in range(3, 9))]
    with executor(name, tmp_path) as made:
        outcomes = finish(made, wanted)
    states = {trial: o.state for trial, o in outcomes.items()}
    assert states == {trial: State.CRASHED if trial == 1 else State.COMPLETED for trial in range(9)}
    assert outcomes[1].message.startswith("gave up after 2 tries")
    if kind == FATAL:
        assert outcomes[1].message.startswith("gave up after 2 tries. the worker process died, killed by SIGKILL")
        assert str(tmp_path / "workers" / "0.log") in outcomes[1].message
    for trial in (0, 2):
        assert outcomes[trial].message == "neighbours: 0"
        assert 0 < outcomes[trial].tokens < 20, "it went on from its checkpoint"
    assert "neighbours: 2" in {outcomes[trial].message for trial in range(3, 9)}


def test_a_process_that_lost_its_device_is_replaced(tmp_path: Path) -> None:
    """What it had is trained by the new one, and nothing is sent to the old one any more."""
    with executor("local", tmp_path) as made:
        outcomes = finish(made, [segment(0, 20), segment(1, 20, seed=LOST), *(segment(trial, 20) for trial in range(2, 6))])
        log = (tmp_path / "workers" / "0.log").read_text()
    assert {o.state for o in outcomes.values()} == {State.COMPLETED}
    assert len({o.device for o in outcomes.values()}) == 1, "all ended in one process, the second"
    assert 0 < outcomes[1].tokens < 20, "it went on from its checkpoint"
    assert "CUDA error: an illegal memory access" in log


def test_a_preempted_worker_writes_checkpoints_and_another_goes_on(tmp_path: Path) -> None:
    """SIGTERM, three times and with no retry allowed: each time all its segments go on where they stood."""
    preempted: set[int] = set()

    def preempt(item: Any) -> None:
        workers = [worker.process for worker in made._workers]  # type: ignore[attr-defined]
        at = next((step for step in (10, 20, 30) if step not in preempted), None)
        if at is not None and isinstance(item, Progress) and item.step >= at and not workers[0].leaving:
            preempted.add(at)
            workers[0].preempt()

    with executor("local", tmp_path, max_retries=0) as made:
        outcomes = finish(made, [segment(trial, 60) for trial in range(SLOTS)], preempt)
    assert preempted == {10, 20, 30}
    assert {o.state for o in outcomes.values()} == {State.COMPLETED}
    assert {o.attempt for o in outcomes.values()} == {4}
    assert all(0 < o.tokens < 60 for o in outcomes.values()), "each went on from its checkpoint"


def test_a_device_that_is_lost_every_time_is_told(tmp_path: Path) -> None:
    with executor("local", tmp_path, max_retries=0) as made:
        (outcome,) = finish(made, [segment(1, 20, seed=LOST)]).values()
    assert outcome.state is State.CRASHED
    assert "the worker process died, because its device reported an unrecoverable error" in outcome.message


def test_this_process_cannot_be_replaced(tmp_path: Path) -> None:
    with executor("inline", tmp_path) as made, pytest.raises(DeviceLostError, match="Run the same command again"):
        finish(made, [segment(1, 20, seed=LOST)])


@EVERY
def test_closing_ends_all_slots_and_the_next_executor_goes_on(name: str, tmp_path: Path) -> None:
    wanted = [segment(trial, 80) for trial in range(SLOTS)]
    with executor(name, tmp_path) as made:
        for one in wanted:
            made.submit(one)
        seen: set[str] = set()
        while len(seen) < SLOTS:
            seen |= {item.key for item in made.collect(1.0) if isinstance(item, Progress) and item.step >= 3}
    with executor(name, tmp_path) as made:
        outcomes = finish(made, wanted)
    assert all(0 < o.tokens < 80 for o in outcomes.values())


DRIVER = """
import sys
from pathlib import Path
from loratune import executors
from loratune.executors.process import WorkerProcess
from loratune.record import open_record
from loratune.work import Recipe, Segment
WorkerProcess._launcher = lambda _: [sys.argv[3]]
root = Path(sys.argv[1])
with open_record(root) as record:
    recipe = Recipe.from_json((root / "recipe.json").read_text())
    options = {"devices": [], "workers": 1, "threads": 1, "max_retries": 0, "hang_timeout": None}
    made = executors.build("local", recipe=recipe, root=root, lock=record.lock, **options)
    made.submit(Segment.from_json(sys.argv[2]))
    while True:
        print(made.collect(1.0), flush=True)
"""


def workers_of(root: Path) -> list[int]:
    """Processes whose command line names this study's folder as a worker's."""
    found = subprocess.run(["pgrep", "-f", f"executors.worker {root}"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split() if int(pid) != os.getpid()]


def test_a_killed_driver_takes_its_workers_along(tmp_path: Path) -> None:
    recipe = Recipe(model=ModelRecipe(name_or_path=""), training=TrainingRecipe(), data="", slots=SLOTS)
    write_atomically(tmp_path / "recipe.json", recipe.to_json())
    command = [sys.executable, "-c", DRIVER, str(tmp_path), segment(0, 20_000).to_json(), scripted_engine.__file__]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    assert any("Progress" in line for line in driver.stdout), "training began"
    assert len(workers_of(tmp_path)) == 1
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 30
    while workers_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers_of(tmp_path) == []
    with open_record(tmp_path):
        pass  # and the lock is free


def test_an_inbox_ends_after_what_was_put() -> None:
    inbox = QueueInbox()
    assert inbox(wait=False) is None
    inbox.put(segment(0, 1))
    threading.Timer(0.05, inbox.end).start()
    assert inbox(wait=True) == segment(0, 1)
    assert inbox(wait=True) is None
    assert inbox(wait=False) is None
    assert inbox(wait=True) is None, "it has ended for ever"
