"""keep: best. The value, the adapter and the checkpoint are those of the lowest point of the curve, in both engines, whatever interrupts.

The learning rate is so high that the loss rises again before the end.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_engine import adapter, recipe, run, segment

from loratune.finetune.checkpoint import Checkpoint, newest_checkpoint
from loratune.finetune.engines import Engine, load_engine
from loratune.record.paths import StudyPaths
from loratune.work import Outcome, Recipe, Segment, State

STEPS = 12
POINTS = (2, 4, 8)
ENGINES = ("hf", "packed")
HOT = {"learning_rate": 0.3, "lora_alpha": 320.0, "lora_dropout": 0.0}
Weights = dict[str, torch.Tensor]


def wanted(trial: int, **options: object) -> Segment:
    return segment(**{"total": STEPS, "validate_at": POINTS, "trial": trial, **HOT, **options})  # type: ignore[arg-type]


def of(root: Path, name: str, keep: str = "best", every: int | None = None) -> Recipe:
    return replace(recipe(root, keep=keep, checkpoint_steps=every), engine=name)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    root = tmp_path_factory.mktemp(request.param)
    return load_engine(of(root, request.param), root)


@pytest.fixture(scope="module")
def whole(engine: Engine) -> tuple[Outcome, Weights]:
    """An uninterrupted run and the adapter that it saved."""
    outcome = run(engine, wanted(0))
    return outcome, adapter(root_of(engine), wanted(0))


def root_of(engine: Engine) -> Path:
    return engine.root  # type: ignore[attr-defined, no-any-return]


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(outcome: Outcome) -> dict[int, float]:
    return {p.step: p.validation_loss for p in outcome.curve if p.validation_loss is not None}


def checkpoint_of(folder: Path) -> Checkpoint:
    (path,) = folder.glob("checkpoint-*")
    with safe_open(path, "pt") as file:
        found = newest_checkpoint(folder, run=file.metadata()["run"], at_most=STEPS, moments_below=STEPS)
    assert found is not None
    return found


def test_the_value_and_the_adapter_are_of_the_lowest_point(engine: Engine, whole: tuple[Outcome, Weights]) -> None:
    outcome, weights = whole
    curve = losses(outcome)
    assert list(curve) == [*POINTS, STEPS]
    lowest = min(curve, key=curve.__getitem__)
    assert lowest < STEPS, curve  # else the test tells nothing
    assert (outcome.validation_loss, outcome.kept_step) == (curve[lowest], lowest)
    # The same run, ended there: its last adapter is the one that was kept.
    there = run(engine, wanted(1, stop=lowest, validate_at=()))
    assert there.validation_loss == curve[lowest]
    assert same(weights, adapter(root_of(engine), wanted(1)))
    # One file holds the present weights and the kept ones, so that a kill never parts a curve from its best point.
    found = checkpoint_of(StudyPaths(root_of(engine)).of(wanted(0)).folder)
    assert found.facts["best_step"] == lowest
    assert {name.partition("/")[0] for name in found.tensors} == {"adapter", "best"}
    kept = {name.removeprefix("best/"): tensor for name, tensor in found.tensors.items() if name.startswith("best/")}
    assert any(not torch.equal(tensor, found.tensors[f"adapter/{name}"]) for name, tensor in kept.items())


def test_by_default_the_last_point_counts_as_ever(engine: Engine, whole: tuple[Outcome, Weights], tmp_path: Path) -> None:
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(root_of(engine) / name)
    name = "hf" if type(engine).__name__ == "HfEngine" else "packed"
    last = run(load_engine(of(tmp_path, name, keep="last"), tmp_path), wanted(0))
    assert losses(last) == losses(whole[0])
    assert (last.validation_loss, last.kept_step) == (losses(last)[STEPS], None)
    assert not same(adapter(tmp_path, wanted(0)), whole[1])


def test_the_untuned_model_is_no_point_to_keep(engine: Engine) -> None:
    outcome = run(engine, wanted(3, learning_rate=1.0, lora_alpha=32.0, validate_at=(0, *POINTS)))
    curve = losses(outcome)
    base = curve.pop(0)
    assert base < min(curve.values())  # so bad a learning rate
    assert (outcome.validation_loss, outcome.kept_step) == (min(curve.values()), min(curve, key=curve.__getitem__))


@pytest.mark.parametrize("cut", [4, 8])
def test_segments_of_a_run_keep_the_best_of_all_of_them(engine: Engine, whole: tuple[Outcome, Weights], cut: int) -> None:
    """Halving by steps: the best point may lie in an earlier segment, or be where that one ended. Once the checkpoint is lost."""
    outcome, weights = whole
    first = run(engine, wanted(cut, stop=cut, validate_at=tuple(p for p in POINTS if p < cut)))
    assert first.validation_loss == min(losses(first).values())
    if cut == 8:
        for checkpoint in (StudyPaths(root_of(engine)).of(wanted(cut)).folder).glob("checkpoint-*"):
            checkpoint.unlink()
    rest = tuple(p for p in POINTS if p > cut)
    second = run(engine, replace(wanted(cut, start=cut, validate_at=rest), validated_at=tuple(losses(first))))
    assert [p.step for p in second.curve] == [*rest, STEPS]  # the earlier points are the earlier segment's
    assert (second.validation_loss, second.kept_step) == (outcome.validation_loss, outcome.kept_step)
    assert same(adapter(root_of(engine), wanted(cut)), weights)


def test_stopped_and_gone_on(engine: Engine, whole: tuple[Outcome, Weights]) -> None:
    outcome, weights = whole
    stop = threading.Event()
    cancelled = run(engine, wanted(5), report=lambda p: stop.set() if p.step >= 8 else None, stop=stop, state=State.CANCELLED)
    assert cancelled.validation_loss is None
    for _ in range(2):  # once more: its outcome was lost after all was done
        resumed = run(engine, wanted(5))
        assert (resumed.validation_loss, resumed.kept_step, losses(resumed)) == (
            outcome.validation_loss,
            outcome.kept_step,
            losses(outcome),
        )
        assert same(adapter(root_of(engine), wanted(5)), weights)


_CHILD = """
import sys
from pathlib import Path
sys.path[:0] = {tests!r}
import test_keep_best as t
root = Path({root!r})
engine = t.load_engine(t.of(root, {name!r}, every=1), root)
t.run(engine, t.wanted(7, total=60, validate_at=tuple(range(2, 60, 2))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_killed_again_and_again(name: str, tmp_path: Path) -> None:
    engine = load_engine(of(tmp_path, name), tmp_path)
    points = tuple(range(2, 60, 2))
    expected = run(engine, wanted(8, total=60, validate_at=points))
    code = _CHILD.format(tests=[str(Path(__file__).parent), str(Path(__file__).parents[1])], root=str(tmp_path), name=name)
    folder = StudyPaths(tmp_path).of(wanted(7)).folder
    for _ in range(3):
        before = {p.name for p in folder.glob("checkpoint-*")}
        child = subprocess.Popen([sys.executable, "-c", code])
        deadline = time.monotonic() + 120
        while child.poll() is None and {p.name for p in folder.glob("checkpoint-*")} == before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    resumed = run(engine, wanted(7, total=60, validate_at=points))
    assert (resumed.validation_loss, resumed.kept_step) == (expected.validation_loss, expected.kept_step)
    assert same(adapter(tmp_path, wanted(7)), adapter(tmp_path, wanted(8)))
