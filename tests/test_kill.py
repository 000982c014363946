"""kill -9 of the driver, and of its workers, at random moments of real studies of the embedded model: nothing changes.

python -m pytest -m slow tests/test_kill.py
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loratune.record import StudyRecord, read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

KILLS = 10
STUDIES = {
    "nomad-full": ["--sampler", "nomad", "--trials", "12"],
    "tpe-halving": ["--sampler", "tpe", "--trials", "9", "--schedule.name", "halving", "--schedule.fidelity", "steps"],
}


def command(folder: Path, options: list[str]) -> list[str]:
    small = ["--data.train_count", "320", "--training.checkpoint_steps", "3", "--training.validations", "2"]
    machine = ["--executor.workers", "2", "--executor.threads", "1", "--executor.max_retries", "20"]
    return [sys.executable, "-m", "loratune", "run", "--demo", "--output", str(folder), *small, *machine, *options]


def outline(record: StudyRecord) -> list[tuple[Any, ...]]:
    """What must not depend on interruptions."""
    return [(t.number, t.params, t.state, t.value, sorted((o.key, o.validation_loss) for o in t.outcomes)) for t in record.trials]


@pytest.fixture(scope="module", params=STUDIES)
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Options of a study, and the outline of its uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    subprocess.run(command(folder, STUDIES[request.param]), check=True, capture_output=True)
    record = read(folder)
    assert record.finished
    return STUDIES[request.param], outline(record)


def test_a_driver_killed_at_random_moments(study: tuple[list[str], list[tuple[Any, ...]]], tmp_path: Path) -> None:
    options, expected = study
    chance, folder, kills = random.Random(1), tmp_path / "study", 0
    while True:
        driver = subprocess.Popen(command(folder, options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _, errors = driver.communicate(timeout=chance.uniform(3, 30) if kills < KILLS else None)
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.communicate()
            kills += 1
            continue
        assert driver.returncode == 0, errors.decode()
        break
    print(f"the driver was killed {kills} times")
    assert kills >= 3, "it was over before it could be killed"
    assert outline(read(folder)) == expected


def test_workers_killed_at_random_moments(study: tuple[list[str], list[tuple[Any, ...]]], tmp_path: Path) -> None:
    options, expected = study
    chance, folder, kills = random.Random(2), tmp_path / "study", 0
    driver = subprocess.Popen(command(folder, options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while driver.poll() is None:
        time.sleep(chance.uniform(1, 12))
        found = subprocess.run(["pgrep", "-f", f"executors.worker {folder}"], capture_output=True, text=True, check=False)
        workers = [int(pid) for pid in found.stdout.split()]
        if workers and kills < KILLS:
            os.kill(chance.choice(workers), signal.SIGKILL)
            kills += 1
    assert driver.stderr is not None
    assert driver.returncode == 0, driver.stderr.read().decode()
    print(f"workers were killed {kills} times")
    assert kills >= 3
    assert outline(read(folder)) == expected
