"""What travels between driver and nodes, and Ray's absence. The cluster itself: test_ray.py."""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from loratune import executors
from loratune.cli import main
from loratune.errors import MissingExtraError, SpecError, StorageError
from loratune.executors import Executor, ray_cluster, shipping
from loratune.executors.ray_executor import RayExecutor
from loratune.executors.ray_worker import Home, NodeWorker
from loratune.executors.shipping import RunWatch, brought_home, fetch_parcel, node_store, parcel, release
from loratune.record.paths import RunPaths
from loratune.work import Hyperparameters, ModelRecipe, Outcome, Recipe, Segment, State, TrainingRecipe


def test_a_folder_reaches_a_node_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    monkeypatch.setattr(shipping, "BLOCK", 4)
    source, blocks, asked = tmp_path / "model", list[bytes](), list[int]()
    (source / "inner").mkdir(parents=True)
    (tmp_path / "node").mkdir()
    (source / "config.json").write_text("0123456789")
    (source / "inner" / "empty").touch()

    def put(block: bytes) -> int:
        blocks.append(block)
        return len(blocks) - 1

    def get(number: int) -> bytes:
        asked.append(number)
        return blocks[number]

    made = parcel(str(source), put)
    assert [len(block) for block in blocks] == [4, 4, 2]
    first, second = node_store("a" * 56), node_store("a" * 56)  # two workers of a node
    here = fetch_parcel(made, first[0], get)
    assert fetch_parcel(made, second[0], get) == here
    assert asked == [0, 1, 2]
    assert (here / "config.json").read_text() == "0123456789"
    assert (here / "inner" / "empty").read_bytes() == b""
    assert parcel(str(source), lambda block: 0).digest == made.digest
    (source / "config.json").write_text("0123456780")
    assert parcel(str(source), lambda block: 0).digest != made.digest
    release(*first)
    assert here.is_dir(), "the other worker needs it"
    release(*second)
    assert not first[0].exists()
    dead = node_store("b" * 56)
    os.close(dead[1])  # as a kill does
    release(*node_store("c" * 56))
    assert not dead[0].exists(), "what dead workers left is removed by the next"


def test_a_worker_that_comes_while_the_last_one_removes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, came, remove = node_store("a" * 56), list[tuple[Path, int]](), shutil.rmtree

    def slowly(path: Path, **how: bool) -> None:
        (path / "lock").unlink(missing_ok=True)  # a removal has no order
        if not came:
            came.append((Path(), 0))
            came.append(node_store("a" * 56))
        remove(path, **how)

    (first[0] / "data").mkdir()
    monkeypatch.setattr(shutil, "rmtree", slowly)
    release(*first)
    assert [path.name for path in tmp_path.iterdir()] == [first[0].name], "only that of the worker that came"
    assert [path.name for path in came[1][0].iterdir()] == ["lock"], "with nothing of what was removed"
    (tmp_path / f"{first[0].name}.gone-1" / "data").mkdir(parents=True)  # of one that was killed while it removed
    release(*came[1])
    release(*node_store("c" * 56))
    assert not list(tmp_path.iterdir())


def test_what_a_run_writes_comes_home_whole(tmp_path: Path) -> None:
    there, home = RunPaths(tmp_path / "node" / "main"), RunPaths(tmp_path / "study" / "main")
    home.adapter.mkdir(parents=True)
    (home.adapter / "old").touch()
    (home.folder / "checkpoint-0000001.safetensors").touch()
    watch = RunWatch(there.folder, "0000/main/0000009", 2)
    there.folder.mkdir(parents=True)
    (there.folder / "checkpoint-0000009.safetensors").write_bytes(b"of an attempt before")
    watch.begin([("checkpoint-0000002.safetensors", b"two")])
    assert [path.name for path in there.folder.iterdir()] == ["checkpoint-0000002.safetensors"]
    assert not watch.has_new()
    assert not watch.changes(everything=False)
    there.log.write_text("first\n")
    (there.folder / ".checkpoint-0000003.safetensors.node@1.1").write_bytes(b"half")
    there.checkpoints()[0].rename(there.folder / "checkpoint-0000004.safetensors")
    assert watch.has_new()
    told = watch.changes(everything=False)
    assert (told.attempt, set(told.files), told.log) == (2, {"checkpoint-0000004.safetensors"}, b"first\n")
    brought_home(told, home)
    assert [path.name for path in home.checkpoints()] == ["checkpoint-0000004.safetensors"]
    there.adapter.mkdir()
    (there.adapter / "adapter_config.json").write_text("{}")
    (there.folder / "adapter.sha256").write_text("0")
    with there.log.open("a") as log:
        log.write("second\n")
    brought_home(watch.changes(everything=True), home)
    assert home.log.read_text() == "first\nsecond\n"
    assert [path.name for path in home.adapter.iterdir()] == ["adapter_config.json"]
    assert (home.folder / "adapter.sha256").read_text() == "0"
    assert not list(home.folder.rglob(".*"))


def test_without_ray_its_absence_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"pip install 'loratune\[ray\]'"):
        executors.cluster("ray", device="auto", per_trial=1, threads=None)
    with pytest.raises(SpecError, match="has no option 'adress'; allowed: address, shared_folder, max_devices"):
        executors.cluster("ray", device="auto", per_trial=1, threads=None, options={"adress": "x"})
    assert executors.cluster("local", device="cpu", per_trial=1, threads=None) is None


def test_a_folder_called_ray_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As /tmp/ray, Ray's own, is to a Python that was started in /tmp."""
    (tmp_path / "ray" / "session_latest").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if not (Path(path) / "ray" / "__init__.py").exists())])
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    assert main(["run", "--demo", "--output", str(tmp_path / "study"), "--executor.name", "ray"]) == MissingExtraError.exit_code
    said = capsys.readouterr().err
    assert said.startswith(f"loratune: Ray is not installed ({tmp_path / 'ray'} is a folder without code)"), said
    assert "pip install 'loratune[ray]'" in said
    assert not (tmp_path / "study").exists()


def test_ray_is_an_extra_alone() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert not [needed for needed in project["dependencies"] if needed.startswith("ray")]
    assert [needed for needed in project["optional-dependencies"]["ray"] if needed.startswith("ray")]


def test_nothing_imports_ray_before_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise AssertionError('ray was imported')\n")
    code = (
        "import loratune, loratune.executors, loratune.executors.ray_executor, loratune.executors.ray_worker\n"
        "from loratune.spec import StudySpec\n"
        "data = {'train': ['d.json'], 'validation_count': 9}\n"
        "given = {'model': 'm', 'data': data, 'executor': {'name': 'ray', 'address': 'a:1', 'max_devices': 8}}\n"
        "assert StudySpec.model_validate(given).executor.options == {'address': 'a:1', 'max_devices': 8}\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).resolve().parents[2]}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    subprocess.run([sys.executable, "-m", "loratune", "run", "--help"], check=True, env=environment, stdout=subprocess.DEVNULL)


class Cluster:
    """Stands in for the package, connected."""

    def __init__(self, *nodes: dict[str, float]) -> None:
        self._nodes = [{"Alive": True, "Resources": node} for node in nodes] + [{"Alive": False, "Resources": {"GPU": 64.0, "CPU": 64.0}}]

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, object]]:
        return self._nodes


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"device": "auto", "per_trial": 1}, (True, 11, 2)),
        ({"device": "auto", "per_trial": 2}, (True, 10, 2)),  # one of a node's three is left over
        ({"device": "cpu", "per_trial": 1, "threads": 4}, (False, 9, 3)),
        ({"device": "auto", "per_trial": 2, "max_devices": 33}, (True, 32, 2)),  # they may come later
    ],
    ids=str,
)
def test_the_devices_of_a_cluster(asked: dict[str, object], expected: tuple[bool, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster({"CPU": 16.0, "GPU": 8.0}, {"CPU": 15.0, "GPU": 3.0}, {"CPU": 8.0})
    monkeypatch.setattr(ray_cluster, "ray", lambda: cluster)
    found = ray_cluster.cluster_devices(**asked)  # type: ignore[arg-type]
    assert (found.gpus, found.number, found.nodes) == expected


def test_a_node_that_does_not_see_the_shared_folder_is_named(tmp_path: Path) -> None:
    recipe = Recipe(model=ModelRecipe(name_or_path="m"), training=TrainingRecipe(), data="d")
    node = object.__new__(NodeWorker)
    absolute = replace(recipe, model=ModelRecipe(name_or_path=str(tmp_path)), data=str(tmp_path))
    assert node._see(Home(folder=str(tmp_path), cwd=str(tmp_path / "gone"), shared=True, recipe=absolute)) == tmp_path
    assert node._see(Home(folder=str(tmp_path), cwd=str(tmp_path), shared=True, recipe=recipe)) == tmp_path
    for folder, cwd in ((tmp_path / "study", tmp_path), (tmp_path, tmp_path / "study")):
        with pytest.raises(StorageError) as refused:
            node._see(Home(folder=str(folder), cwd=str(cwd), shared=True, recipe=recipe))
        assert f"does not see {tmp_path / 'study'}. Mount it there under the same path, or set shared_folder: false." in str(refused.value)


def test_a_segment_that_is_sent_again_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are applied in order: with thousands of places all who were sent after it would wait at the end of the queue with it."""
    monkeypatch.setattr(RayExecutor, "_dispatch", lambda self: None)
    executor = object.__new__(RayExecutor)
    Executor.__init__(executor, max_retries=0)
    executor._waiting = []
    for trial in range(4):
        executor.submit(Segment(trial=trial, hyperparameters=Hyperparameters(), seed=0, total_steps=9, stop_step=9))
    gone = executor._waiting.pop(0)
    monkeypatch.setattr(executor, "_poll", lambda timeout: [Outcome(key=gone.key, state=State.CANCELLED, attempt=1, node="a/1")])
    assert executor.collect(0.0) == []
    assert [(segment.trial, segment.attempt) for segment in executor._waiting] == [(0, 2), (1, 1), (2, 1), (3, 1)]
