"""Studies of the embedded model on a Ray cluster of this machine: what `local` gives, whatever becomes of nodes and driver.

LORATUNE_RAY_KILLS: nodes and workers that are killed, 4 by default, and drivers, 1 by default. LORATUNE_RAY_RESULTS: a JSON file for
what was done. Needs pip install 'loratune[ray]'.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_machine import SMALL, cluster

from loratune.record import StudyRecord, read
from loratune.record.nodes import by_node

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = int(os.environ.get("LORATUNE_RAY_KILLS", "4"))
DRIVERS = int(os.environ.get("LORATUNE_RAY_KILLS", "1"))
STUDY = [
    "--sampler",
    "tpe",
    "--trials",
    str(max(10, KILLS)),
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


def start(folder: Path, *options: str, cwd: Path | None = None) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(folder, *options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL, cwd=cwd
    )


def keep_figures(name: str, figures: dict[str, Any]) -> None:
    if "LORATUNE_RAY_RESULTS" in os.environ:
        path = Path(os.environ["LORATUNE_RAY_RESULTS"])
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | {name: figures}, indent=1) + "\n")


def outline(record: StudyRecord) -> list[tuple[Any, ...]]:
    """What must not depend on where and how often a trial was trained."""
    return [(t.number, t.params, t.state, t.value, sorted((o.key, o.validation_loss) for o in t.outcomes)) for t in record.trials]


def workers() -> list[int]:
    mine = f"executors.worker .*{tempfile.gettempdir()}/loratune-ray-"
    found = subprocess.run(["pgrep", "-f", mine], capture_output=True, text=True, check=False)
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


def test_a_shared_folder_is_used_and_nothing_copied(four: Any, expected: list[tuple[Any, ...]], tmp_path: Path) -> None:
    folder, fetched = tmp_path / "study", set[Path]()
    study = start(folder, *HALVING, *on(four, "--executor.options.shared_folder", "true"))
    here = False
    while study.poll() is None:
        fetched |= set(Path(tempfile.gettempdir()).glob(f"loratune-node-{os.getuid()}-*"))
        here = here or subprocess.run(["pgrep", "-f", f"executors.worker .*{folder}"], capture_output=True, check=False).returncode == 0
        assert not workers(), "they have folders of their own"
        time.sleep(0.3)
    text, _ = study.communicate()
    assert study.returncode == 0, text
    assert here, "the workers' folder is the study's"
    assert not fetched
    assert outline(read(folder)) == expected
    assert list(folder.glob("workers/*.log"))


def test_nodes_that_go_and_come_change_nothing(four: Any, expected: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """kill -9 of a node, SIGTERM to the actor of one, at random moments; no retry is allowed: none of it counts as a crash."""
    folder, chance, events, began = tmp_path / "study", random.Random(3), list[str](), time.monotonic()
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
    found = outline(read(folder))
    killed = {"nodes": events.count("a node"), "workers": events.count("SIGTERM"), "trials": len(found)}
    keep_figures("nodes", killed | {"seconds": round(time.monotonic() - began), "same": found == expected})
    assert found == expected
    shares = by_node(read(folder).trials)
    assert len({share.node for share in shares}) == len(shares) >= 3
    told = sum(map(int, re.findall(r"; (\d+) segments? go(?:es)? on elsewhere", text)))
    assert sum(share.lost for share in shares) >= max(1, told)
    status = subprocess.run([sys.executable, "-m", "loratune", "status", str(folder)], check=True, capture_output=True, text=True).stdout
    assert "attempts lost" in status
    assert all(share.node[:20] in status for share in shares)


def test_killed_drivers_leave_nothing_behind_and_the_study_goes_on_elsewhere(
    four: Any, expected: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """kill -9 of the driver at random moments, every other one after a result; the folder moves each time, as does the working folder."""
    chance, killed, began, before = random.Random(5), list[int](), time.monotonic(), 0
    while True:
        place = tmp_path / str(len(killed))
        (place / "cwd").mkdir(parents=True)
        if killed:
            shutil.move(place.with_name(str(len(killed) - 1)) / "study", place / "study")
            before = trained(place / "study")
        study = start(place / "study", *HALVING, *on(four), cwd=place / "cwd")
        if len(killed) == DRIVERS:
            break
        until, more = time.monotonic() + chance.uniform(1, 40), 3 if not killed else len(killed) % 2  # results to wait for
        while study.poll() is None and (trained(place / "study") < before + more or (killed and time.monotonic() < until)):
            time.sleep(0.2)
        if study.poll() is not None:
            break
        study.kill()
        study.communicate()
        killed.append(trained(place / "study"))
        deadline = time.monotonic() + 60
        while workers() and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not workers(), "actors of a dead driver end, and their workers with them"
    text, _ = study.communicate(timeout=900)
    assert study.returncode == 0, text
    assert before >= 3
    found = outline(read(place / "study"))
    figures = {"drivers": len(killed), "segments_at_each_kill": killed, "trials": len(found)}
    keep_figures("drivers", figures | {"seconds": round(time.monotonic() - began), "same": found == expected})
    assert found == expected
