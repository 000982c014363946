"""Studies of the embedded model on a Ray cluster of this machine: what `local` gives, whatever becomes of nodes and driver.

LORATUNE_RAY_KILLS: nodes that are killed, 4 by default. Needs pip install 'loratune[ray]'.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_machine import SMALL, cluster

from loratune.record import StudyRecord, read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = int(os.environ.get("LORATUNE_RAY_KILLS", "4"))
STUDY = [
    "--sampler",
    "tpe",
    "--trials",
    "10",
    "--data.train_count",
    "320",
    "--training.checkpoint_steps",
    "3",
    "--training.validations",
    "2",
]
STUDY += ["--executor.workers", "4", "--executor.threads", "1", "--training.slots", "1"]
HALVING = ["--schedule.name", "halving", "--schedule.fidelity", "steps"]


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "loratune", "run", "--demo", "--output", str(folder), *STUDY, *options]


def on(made: Any, *options: str) -> list[str]:
    return ["--executor.name", "ray", "--executor.options.address", made.address, *options]


def start(folder: Path, *options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(folder, *options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL
    )


def outline(record: StudyRecord) -> list[tuple[Any, ...]]:
    """What must not depend on where and how often a trial was trained."""
    return [(t.number, t.params, t.state, t.value, sorted((o.key, o.validation_loss) for o in t.outcomes)) for t in record.trials]


def workers() -> list[int]:
    found = subprocess.run(["pgrep", "-f", "executors.worker .*loratune-ray-"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def trained(folder: Path) -> int:
    return len(list(folder.glob("trials/*/*/outcomes/*.json")))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """The outline of the study by the `local` executor."""
    folder = tmp_path_factory.mktemp("local") / "study"
    subprocess.run(command(folder, *HALVING), check=True, capture_output=True)
    return outline(read(folder))


@pytest.fixture(scope="module")
def four() -> Iterator[Any]:
    with cluster(4) as made:
        yield made


def test_four_nodes_give_what_one_machine_gives(four: Any, expected: list[tuple[Any, ...]], tmp_path: Path) -> None:
    folder = tmp_path / "study"
    study = start(folder, *HALVING, *on(four))
    text, _ = study.communicate(timeout=900)
    assert study.returncode == 0, text
    assert outline(read(folder)) == expected
    adapters = list(folder.glob("trials/*/main/adapter/adapter_config.json"))
    assert adapters
    assert not any("loratune-node" in path.read_text() for path in adapters), "they name the model as the user does"
    assert all((adapter.parents[1] / "log.txt").stat().st_size for adapter in adapters)
    assert not list(folder.rglob(".*.tmp"))
    assert not workers()


def test_nodes_that_go_and_come_change_nothing(four: Any, expected: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """kill -9 of a node, SIGTERM to the actor of one, at random moments; no retry is allowed: none of it counts as a crash."""
    folder, chance, events = tmp_path / "study", random.Random(3), list[str]()
    study = start(folder, *HALVING, *on(four, "--executor.max_retries", "0"))
    while study.poll() is None and len(events) < KILLS:
        time.sleep(chance.uniform(1, 6))
        actors = subprocess.run(["pgrep", "-f", "^ray::NodeWorker"], capture_output=True, text=True, check=False).stdout.split()
        if not actors or trained(folder) < len(events):
            continue
        if len(events) % 2:
            os.kill(int(chance.choice(actors)), signal.SIGTERM)
            events.append("SIGTERM")
        else:
            four.remove_node(chance.choice(sorted(four.worker_nodes, key=lambda node: node.node_id)), allow_graceful=False)
            four.add_node(num_cpus=1, **SMALL)
            events.append("a node")
    text, _ = study.communicate(timeout=900)
    print(events, text)
    assert study.returncode == 0, text
    assert len(events) >= 3, "it was over before"
    assert "it was preempted" in text
    assert "went away" in text
    assert outline(read(folder)) == expected


def test_a_killed_driver_leaves_nothing_behind_and_goes_on_elsewhere(four: Any, expected: list[tuple[Any, ...]], tmp_path: Path) -> None:
    folder, moved = tmp_path / "study", tmp_path / "elsewhere" / "study"
    study = start(folder, *HALVING, *on(four))
    while trained(folder) < 3:
        assert study.poll() is None, study.communicate()[0]
        time.sleep(0.2)
    study.kill()
    study.communicate()
    deadline = time.monotonic() + 60
    while workers() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not workers(), "actors of a dead driver end, and their workers with them"
    moved.parent.mkdir()
    shutil.move(folder, moved)
    before = trained(moved)
    study = start(moved, *HALVING, *on(four))
    text, _ = study.communicate(timeout=900)
    assert study.returncode == 0, text
    assert before >= 3
    assert outline(read(moved)) == expected
