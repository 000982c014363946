"""The first worker, started while the driver reads the data."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import scripted_engine

from loratune import demo, executors
from loratune.errors import DataError
from loratune.executors.process import WorkerProcess
from loratune.record import open_record
from loratune.record.paths import StudyPaths
from loratune.spec import StudySpec
from loratune.study.driver import tune
from loratune.system.files import write_atomically
from loratune.work import Hyperparameters, ModelRecipe, Outcome, Recipe, Segment, State, TrainingRecipe

RECIPE = Recipe(model=ModelRecipe(name_or_path=""), training=TrainingRecipe(), data="", slots=1)


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkerProcess, "_launcher", lambda _: [scripted_engine.__file__])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[WorkerProcess]]:
    """Every worker process that is started."""
    made: list[WorkerProcess] = []
    start = WorkerProcess.start

    def noted(self: WorkerProcess) -> None:
        made.append(self)
        start(self)

    monkeypatch.setattr(WorkerProcess, "start", noted)
    yield made
    for process in made:
        process.kill()


def pid(process: WorkerProcess) -> int:
    assert process._process is not None
    return process._process.pid


def gone(process: WorkerProcess) -> bool:
    return process._process is not None and process._process.poll() is not None and not Path(process._folder).exists()


@pytest.mark.parametrize("threads", [1, 2])
def test_it_waits_for_the_recipe_and_trains_the_first_segment(threads: int, tmp_path: Path, started: list[WorkerProcess]) -> None:
    with open_record(tmp_path) as record:
        same = {"root": tmp_path, "lock": record.lock, "devices": [], "workers": 1}
        with executors.started_ahead("local", **same, threads=1, devices_per_trial=1) as ahead:
            time.sleep(1.0)
            assert ahead._process.poll() is None, "it does not miss the recipe"
            write_atomically(StudyPaths(tmp_path).recipe, RECIPE.to_json())
            made = executors.build("local", recipe=RECIPE, **same, threads=threads, max_retries=0, hang_timeout=None, ahead=ahead)
            made.submit(Segment(trial=0, hyperparameters=Hyperparameters(), seed=0, total_steps=2, stop_step=2))
            outcomes: list[Outcome] = []
            deadline = time.monotonic() + 60
            while not outcomes and time.monotonic() < deadline:
                outcomes += [item for item in made.collect(1.0) if isinstance(item, Outcome)]
            made.close()
        assert [outcome.state for outcome in outcomes] == [State.COMPLETED]
        assert (outcomes[0].device == str(pid(started[0]))) == (threads == 1), "one that was started otherwise is not taken"
        assert len(started) == threads
        assert all(gone(process) for process in started)


def test_where_nothing_can_be_started_there_is_none(tmp_path: Path, started: list[WorkerProcess]) -> None:
    for name, size in (("inline", 1), ("local", 2)):
        with executors.started_ahead(name, root=tmp_path, lock=0, devices=[], workers=1, threads=1, devices_per_trial=size) as ahead:
            assert ahead is None
    assert started == []


def spec(folder: Path, train: Path) -> StudySpec:
    base = demo.study()
    base["data"] = {**base["data"], "train": [str(train)]}
    base["sampler"] = "random"  # the first guess of the default reads the data before anything is started
    return StudySpec.load(base={**base, "output": {"folder": str(folder)}})


def test_it_ends_with_an_error_that_is_told_before_the_first_trial(tmp_path: Path, started: list[WorkerProcess]) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        list(tune(spec(tmp_path / "study", tmp_path / "nowhere.jsonl")))
    assert len(started) == 1
    assert gone(started[0])
    with open_record(tmp_path / "study"):
        pass  # and the lock is free


def test_a_worker_whose_driver_never_called_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from loratune.executors.process import WorkerProcess\n"
        f"WorkerProcess._launcher = lambda _: [{scripted_engine.__file__!r}]\n"
        "worker = WorkerProcess(number=0, root=Path(sys.argv[1]), lock=None, devices=[], size=1, threads=1); worker.start()\n"
        "print(worker._process.pid, flush=True); sys.stdin.read()"
    )
    driver = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    worker = int(driver.stdout.readline())
    time.sleep(1.0)
    driver.kill()
    driver.communicate()
    deadline = time.monotonic() + 30
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.slow  # imports torch
def test_a_worker_does_not_import_what_the_packed_engine_does_without() -> None:
    modules = (
        "import sys; import loratune.executors.worker, loratune.finetune.engines; print({'datasets', 'pandas', 'optuna'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", modules], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
