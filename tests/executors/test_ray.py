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

from loratune.cli.status import facts
from loratune.executors import ray_executor
from loratune.executors.ray_cluster import cluster_devices
from loratune.record import StudyRecord, read
from loratune.record.nodes import by_node
from loratune.work import Hyperparameters, Message, ModelRecipe, Recipe, Segment, TrainingRecipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = int(os.environ.get("LORATUNE_RAY_KILLS", "4"))
DRIVERS = int(os.environ.get("LORATUNE_RAY_KILLS", "1"))
STUDY = [
    "--sampler",
    "tpe",
    "--trials",
    str(max(10, 2 * KILLS)),
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


def start(folder: Path, *options: str, cwd: Path | None = None) -> "subprocess.Popen[bytes]":
    """It writes into a file, where a pipe that nobody empties would stop a long study."""
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".out").open("wb") as out:
        return subprocess.Popen(command(folder, *options), stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=cwd)


def ended(study: "subprocess.Popen[bytes]", folder: Path) -> str:
    """What it said, once it has ended."""
    study.wait(timeout=900)
    return folder.with_suffix(".out").read_text()


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
    text = ended(study, folder)
    assert study.returncode == 0, text
    assert outline(read(folder)) == expected
    adapters = list(folder.glob("trials/*/main/adapter/adapter_config.json"))
    assert adapters
    assert not any("loratune-node" in path.read_text() for path in adapters), "they name the model as the user does"
    assert all((adapter.parents[1] / "log.txt").stat().st_size for adapter in adapters)
    assert not list(folder.rglob(".*.tmp"))
    assert not workers()


def node_folders() -> set[str]:
    """Where nodes of this machine keep what was sent to them, by name; one that is being removed by that which it had."""
    return {path.name.partition(".gone-")[0] for path in Path(tempfile.gettempdir()).glob(f"loratune-node-{os.getuid()}-*")}


def test_a_shared_folder_is_used_and_nothing_copied(four: Any, expected: list[tuple[Any, ...]], tmp_path: Path) -> None:
    folder, fetched, before = tmp_path / "study", set[str](), node_folders()  # of an earlier study, perhaps still being removed
    study = start(folder, *HALVING, *on(four, "--executor.options.shared_folder", "true"))
    here = False
    while study.poll() is None:
        fetched |= node_folders() - before
        here = here or subprocess.run(["pgrep", "-f", f"executors.worker .*{folder}"], capture_output=True, check=False).returncode == 0
        assert not workers(), "they have folders of their own"
        time.sleep(0.3)
    text = ended(study, folder)
    assert study.returncode == 0, text
    assert here, "the workers' folder is the study's"
    assert not fetched
    assert outline(read(folder)) == expected
    assert list(folder.glob("workers/*.log"))


def test_a_study_grows_and_shrinks_within_max_devices(four: Any, expected: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """Stopped and continued with another number: 2 of the four devices, then all, then 1."""
    folder, most = tmp_path / "study", list[int]()
    for devices in (2, 4, 1):
        study, before, used = start(folder, *HALVING, *on(four, "--executor.options.max_devices", str(devices))), trained(folder), 0
        while study.poll() is None and (devices == 1 or used < devices or trained(folder) < before + 3):
            used = max(used, len(workers()))
            time.sleep(0.2)
        told = facts(read(folder))["idle_devices"]
        assert study.poll() is not None or bool(told) == (devices == 4), "as many runs in flight as devices wait for each other"
        study.send_signal(signal.SIGTERM if devices == 2 else signal.SIGINT)  # which Ray must not take from us
        text = ended(study, folder)
        assert study.returncode == (0 if devices == 1 else 130), text
        assert f"at most {devices} processor" in text
        most.append(used)
    assert most == [2, 4, 1]
    assert outline(read(folder)) == expected


def test_gpus_are_asked_for_and_are_on_one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray lets nodes declare GPUs that are not there: where the actors go and what their processes see can be told all the same."""
    monkeypatch.setattr(ray_executor, "_SLOW", 2.0)
    for name in ("data", "model"):
        (tmp_path / name).mkdir()
    recipe = Recipe(
        model=ModelRecipe(name_or_path=str(tmp_path / "model")),
        training=TrainingRecipe(),
        data=str(tmp_path / "data"),
        device="cuda",
        devices_per_trial=2,
    )
    with cluster(0) as made:
        made.add_node(num_cpus=4, num_gpus=1, **SMALL)
        made.add_node(num_cpus=4, num_gpus=3, **SMALL)
        found = cluster_devices(device="auto", per_trial=2, address=made.address)
        assert (found.gpus, found.number, found.nodes) == (True, 2, 1)
        executor = ray_executor.RayExecutor(
            recipe=recipe, root=tmp_path, devices=[0, 1], workers=2, threads=1, max_retries=0, hang_timeout=None, address=made.address
        )
        import ray
        from ray._private.state import available_resources_per_node

        def visible(worker: Any) -> tuple[str, str]:
            """What the actor sees, and what its worker process does."""
            process = Path(f"/proc/{worker._process._process.pid}/environ").read_text().split("\0")
            (inner,) = (entry.partition("=")[2] for entry in process if entry.startswith("CUDA_VISIBLE_DEVICES="))
            return os.environ["CUDA_VISIBLE_DEVICES"], inner

        try:
            for trial in (0, 1):
                executor.submit(Segment(trial=trial, hyperparameters=Hyperparameters(), seed=0, total_steps=9, stop_step=9))
            said, deadline = list[str](), time.monotonic() + 120
            while not executor.where["devices"] and time.monotonic() < deadline:
                said += [item.text for item in executor.collect(1.0) if isinstance(item, Message)]
            asked = "did not start within 2 s: they wait for 2 CPU and 2 GPU on one node (`ray status` shows what is free)"
            assert [text for text in said if asked in text]
            assert executor.where == {"nodes": 1, "devices": 2}
            left = sorted(available_resources_per_node().values(), key=lambda node: node.get("CPU", 0))
            assert [(node.get("CPU", 0), node.get("GPU", 0)) for node in left] == [(0, 0), (2, 1), (4, 1)], "both of the one of three"
            actor = next(worker.actor for worker in executor._workers if worker.node)
            outer, inner = ray.get(actor.__ray_call__.remote(visible))
            assert len(set(outer.split(","))) == 2
            assert inner == outer
        finally:
            executor.close(grace=0.0)


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
            for tries in (2, 1, 0):  # on a busy machine a raylet may not answer in time
                try:
                    four.add_node(num_cpus=1, **SMALL)
                    break
                except Exception:
                    if not tries:
                        raise
            events.append("a node")
    text = ended(study, folder)
    print(events, text)
    assert study.returncode == 0, text
    assert len(events) == KILLS, "it was over before"
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
        study.wait()
        killed.append(trained(place / "study"))
        deadline = time.monotonic() + 60
        while workers() and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not workers(), "actors of a dead driver end, and their workers with them"
    text = ended(study, place / "study")
    assert study.returncode == 0, text
    assert before >= 3
    found = outline(read(place / "study"))
    figures = {"drivers": len(killed), "segments_at_each_kill": killed, "trials": len(found)}
    keep_figures("drivers", figures | {"seconds": round(time.monotonic() - began), "same": found == expected})
    assert found == expected
