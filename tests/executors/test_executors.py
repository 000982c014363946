"""The contract of every executor, with the real engine and real processes: success, crash, hang, cancel. test_slots.py has the rest."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loratune import demo, executors
from loratune.executors import Executor
from loratune.record import open_record
from loratune.system.files import write_atomically
from loratune.work import Hyperparameters, ModelRecipe, Outcome, Progress, Recipe, Segment, State, TrainingRecipe

PATIENCE = 240.0  # seconds; a worker's first message takes as long as importing torch on a busy machine
STEPS = 120  # seconds of training: long enough to be disturbed between two heartbeats


@pytest.fixture
def recipe(demo_data: Path) -> Recipe:
    training = TrainingRecipe(micro_batch_size=4, validation_batch_size=32, checkpoint_steps=25)
    return Recipe(model=ModelRecipe(name_or_path=str(demo.model_folder())), training=training, data=str(demo_data), device="cpu")


def segment(trial: int, steps: int = STEPS) -> Segment:
    hyperparameters = Hyperparameters(lora_r=4, learning_rate=3e-3, batch_size=4, epochs=1.0)
    return Segment(trial=trial, hyperparameters=hyperparameters, seed=0, total_steps=steps, stop_step=steps)


@contextmanager
def executor(name: Any, recipe: Recipe, root: Path, **options: Any) -> Iterator[Executor]:
    with open_record(root) as record:
        write_atomically(root / "recipe.json", recipe.to_json())
        given: dict[str, Any] = {"devices": [], "workers": 1, "threads": 1, "max_retries": 2, "hang_timeout": None} | options
        made = executors.build(name, recipe=recipe, root=root, lock=record.lock, **given)
        try:
            yield made
        finally:
            made.close(grace=30)


def finish(made: Executor, count: int, on_progress: Callable[[Progress], None] = lambda _: None) -> dict[str, Outcome]:
    """Collect `count` outcomes, by key."""
    outcomes: dict[str, Outcome] = {}
    deadline = time.monotonic() + PATIENCE
    while len(outcomes) < count and time.monotonic() < deadline:
        for item in made.collect(1.0):
            if isinstance(item, Outcome):
                assert item.key not in outcomes, "one outcome per segment"
                outcomes[item.key] = item
            else:
                on_progress(item)
    return outcomes


def workers_of(root: Path) -> list[int]:
    """Processes whose command line names this study's folder as a worker's."""
    found = subprocess.run(["pgrep", "-f", f"executors.worker {root}"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split() if int(pid) != os.getpid()]


@pytest.fixture(scope="module")
def undisturbed(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """The validation loss that every way of running the same segment must give."""
    training = TrainingRecipe(micro_batch_size=4, validation_batch_size=32, checkpoint_steps=25)
    recipe = Recipe(model=ModelRecipe(name_or_path=str(demo.model_folder())), training=training, data=str(demo_data), device="cpu")
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers; the number of threads decides the order of sums
    try:
        with executor("inline", recipe, tmp_path_factory.mktemp("inline")) as made:
            made.submit(segment(0))
            (outcome,) = finish(made, 1).values()
    finally:
        torch.set_num_threads(threads)
    assert outcome.state is State.COMPLETED, outcome.message
    assert outcome.validation_loss is not None
    return outcome.validation_loss


def test_two_workers_give_what_one_process_gives(recipe: Recipe, tmp_path: Path, undisturbed: float) -> None:
    seen: list[Progress] = []
    with executor("local", recipe, tmp_path, workers=2) as made:
        assert made.capacity == 2
        made.submit(segment(0))
        made.submit(segment(1))
        outcomes = finish(made, 2, seen.append)
    assert {o.state for o in outcomes.values()} == {State.COMPLETED}
    assert [o.validation_loss for o in outcomes.values()] == [undisturbed] * 2, "same seed, same hyperparameters, same loss"
    assert {p.key for p in seen} == set(outcomes)
    assert (tmp_path / "trials" / "0000" / "main" / "adapter" / "adapter_config.json").is_file()
    assert workers_of(tmp_path) == [], "closing ends the processes"


@pytest.mark.slow  # two minutes of two cores; the others here kill workers too
def test_a_killed_and_a_frozen_worker_are_replaced_and_the_result_is_the_same(recipe: Recipe, tmp_path: Path, undisturbed: float) -> None:
    signals = [signal.SIGKILL, signal.SIGSTOP]

    def disturb(progress: Progress) -> None:
        if progress.step >= 2 and signals:
            os.kill(workers_of(tmp_path)[0], signals.pop())

    with executor("local", recipe, tmp_path, hang_timeout=60.0) as made:
        made.submit(segment(0))
        (outcome,) = finish(made, 1, disturb).values()
    assert not signals, "the worker was disturbed twice"
    assert outcome.state is State.COMPLETED, outcome.message
    assert outcome.validation_loss == undisturbed


@pytest.mark.slow  # two real workers; test_slots.py closes scripted ones, and cli/test_run.py stops and continues a study
def test_closing_checkpoints_and_the_next_executor_goes_on(recipe: Recipe, tmp_path: Path, undisturbed: float) -> None:
    with executor("local", recipe, tmp_path) as made:
        made.submit(segment(0))
        began = time.monotonic()
        while time.monotonic() < began + PATIENCE:
            if any(isinstance(item, Progress) and item.step >= 2 for item in made.collect(1.0)):
                break
    assert workers_of(tmp_path) == []
    steps: list[int] = []
    with executor("local", recipe, tmp_path) as made:
        made.submit(segment(0))
        (outcome,) = finish(made, 1, lambda p: steps.append(p.step)).values()
    assert min(steps) > 0, "it went on from the checkpoint"
    assert outcome.validation_loss == undisturbed


def test_a_model_that_cannot_be_loaded_is_bad_input(recipe: Recipe, tmp_path: Path, demo_data: Path) -> None:
    from dataclasses import replace

    wrong = replace(recipe, model=ModelRecipe(name_or_path=str(tmp_path / "nowhere")))
    with executor("local", wrong, tmp_path / "study") as made:
        made.submit(segment(0))
        (outcome,) = finish(made, 1).values()
    assert outcome.state is State.BAD_INPUT
    assert "nowhere" in outcome.message


@pytest.mark.slow
def test_two_processes_train_one_trial_together(recipe: Recipe, tmp_path: Path) -> None:
    """Few steps: over hundreds of them, at this learning rate, the last digits of float32 grow into the first."""
    from dataclasses import replace

    found = []
    for size in (1, 2):
        with executor("local", replace(recipe, devices_per_trial=size), tmp_path / str(size)) as made:
            made.submit(segment(0, steps=24))
            (outcome,) = finish(made, 1).values()
        assert outcome.state is State.COMPLETED, outcome.message
        assert outcome.devices == size
        found.append(outcome.validation_loss)
    assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.slow
def test_a_group_with_a_model_that_cannot_be_loaded_says_so(recipe: Recipe, tmp_path: Path) -> None:
    from dataclasses import replace

    wrong = replace(recipe, devices_per_trial=2, model=ModelRecipe(name_or_path=str(tmp_path / "nowhere")))
    with executor("local", wrong, tmp_path / "study") as made:
        made.submit(segment(0))
        (outcome,) = finish(made, 1).values()
    assert outcome.state is State.BAD_INPUT
