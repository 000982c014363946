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
from tiny_engine import adapter, recipe, run, segment

from loratune.finetune.checkpoint import newest
from loratune.finetune.engine import Engine, load_engine
from loratune.work import Outcome, Recipe, Segment, State

STEPS = 12
POINTS = (2, 4, 6, 8, 10)
ENGINES = ("hf", "packed")
HOT = {"learning_rate": 0.3, "lora_alpha": 320.0, "lora_dropout": 0.0}


def wanted(trial: int, **options: object) -> Segment:
    return segment(**{"total": STEPS, "validate_at": POINTS, "trial": trial, **HOT, **options})  # type: ignore[arg-type]


def of(root: Path, name: str, keep: str = "best") -> Recipe:
    return replace(recipe(root, keep=keep, checkpoint_steps=1), engine=name)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    root = tmp_path_factory.mktemp(request.param)
    return load_engine(of(root, request.param), root)


def root_of(engine: Engine) -> Path:
    return engine.root  # type: ignore[attr-defined, no-any-return]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(outcome: Outcome) -> dict[int, float]:
    return {p.step: p.validation_loss for p in outcome.curve if p.validation_loss is not None}


def test_the_value_and_the_adapter_are_of_the_lowest_point(engine: Engine) -> None:
    outcome = run(engine, wanted(0))
    curve = losses(outcome)
    assert list(curve) == [*POINTS, STEPS]
    lowest = min(curve, key=curve.__getitem__)
    assert lowest < STEPS, curve  # else the test tells nothing
    assert (outcome.validation_loss, outcome.kept_step) == (curve[lowest], lowest)
    # The same run, ended there: its last adapter is the one that was kept.
    there = run(engine, wanted(1, stop=lowest, validate_at=()))
    assert there.validation_loss == curve[lowest]
    assert same(adapter(root_of(engine), wanted(0)), adapter(root_of(engine), wanted(1)))


def test_by_default_the_last_point_counts_as_ever(engine: Engine, tmp_path: Path) -> None:
    best = run(engine, wanted(2))
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(root_of(engine) / name)
    last = run(load_engine(of(tmp_path, "hf" if type(engine).__name__ == "HfEngine" else "packed", keep="last"), tmp_path), wanted(2))
    assert losses(last) == losses(best)
    assert (last.validation_loss, last.kept_step) == (losses(best)[STEPS], None)
    assert not same(adapter(tmp_path, wanted(2)), adapter(root_of(engine), wanted(2)))


def test_the_untuned_model_is_no_point_to_keep(engine: Engine) -> None:
    outcome = run(engine, wanted(3, learning_rate=50.0, validate_at=(0,)), state=None)
    assert outcome.state in (State.COMPLETED, State.DIVERGED)
    if outcome.state is State.COMPLETED:
        assert (losses(outcome)[0] < losses(outcome)[STEPS], outcome.kept_step) == (True, STEPS)


@pytest.mark.parametrize("lost", [False, True], ids=["resumed", "checkpoint lost"])
def test_segments_of_a_run_keep_the_best_of_all_of_them(engine: Engine, lost: bool) -> None:
    """Halving by steps: the best point may lie in an earlier segment, or be the point at which that one ended."""
    whole = run(engine, wanted(4))
    assert whole.kept_step is not None
    for trial, cut in ((10, 8), (20, whole.kept_step)):
        trial += lost
        first = run(engine, wanted(trial, stop=cut, validate_at=tuple(p for p in POINTS if p < cut)))
        earlier = tuple(p.step for p in first.curve)
        assert first.validation_loss == min(losses(first).values())
        if lost:
            (checkpoint,) = (root_of(engine) / wanted(trial).folder).glob("checkpoint-*")
            checkpoint.unlink()
        rest = tuple(p for p in POINTS if p > cut)
        second = run(engine, replace(wanted(trial, start=cut, validate_at=rest), validated_at=earlier))
        assert [p.step for p in second.curve] == [*rest, STEPS]  # the earlier points are the earlier segment's
        assert (second.validation_loss, second.kept_step) == (whole.validation_loss, whole.kept_step)
        assert same(adapter(root_of(engine), wanted(trial)), adapter(root_of(engine), wanted(4)))


@pytest.mark.parametrize("after", [3, 11])
def test_stopped_before_and_after_the_best_point(engine: Engine, after: int) -> None:
    whole, stop = run(engine, wanted(5)), threading.Event()
    trial = 30 + after

    def report(progress: object) -> None:
        if (root_of(engine) / wanted(trial).folder / f"checkpoint-{after:07d}.safetensors").exists():
            stop.set()

    run(engine, wanted(trial), report=report, stop=stop, state=None)
    resumed = run(engine, wanted(trial))
    assert (resumed.validation_loss, resumed.kept_step, losses(resumed)) == (whole.validation_loss, whole.kept_step, losses(whole))
    assert same(adapter(root_of(engine), wanted(trial)), adapter(root_of(engine), wanted(5)))
    assert run(engine, wanted(trial)).validation_loss == whole.validation_loss  # its outcome was lost after all was done
    assert same(adapter(root_of(engine), wanted(trial)), adapter(root_of(engine), wanted(5)))


def test_a_checkpoint_holds_its_own_best(engine: Engine) -> None:
    """One file, so that a kill never leaves a curve beside the weights of another point."""
    outcome = run(engine, wanted(6))
    folder = root_of(engine) / wanted(6).folder
    (path,) = folder.glob("checkpoint-*")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found = newest(folder, run=file.metadata()["run"], at_most=STEPS, moments_below=STEPS)
    assert found is not None
    assert found.facts["best_step"] == outcome.kept_step
    names = {name.partition("/")[0] for name in found.tensors}
    assert names == {"adapter", "best"}
    assert not torch.equal(found.tensors[f"best/{_some(found)}"], found.tensors[f"adapter/{_some(found)}"])


def _some(found: object) -> str:
    names = [name for name in found.tensors if name.startswith("best/")]  # type: ignore[attr-defined]
    return str(next(name for name in names if "B" in name).removeprefix("best/"))


_CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_keep_best as t
root = Path({root!r})
engine = t.load_engine(t.of(root, {name!r}), root)
t.run(engine, t.wanted(7, total=60, validate_at=tuple(range(2, 60, 2))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_killed_again_and_again(name: str, tmp_path: Path) -> None:
    engine = load_engine(of(tmp_path, name), tmp_path)
    points = tuple(range(2, 60, 2))
    whole = run(engine, wanted(8, total=60, validate_at=points))
    code = _CHILD.format(tests=str(Path(__file__).parent), root=str(tmp_path), name=name)
    folder = tmp_path / wanted(7).folder
    for _ in range(3):
        before = {p.name for p in folder.glob("checkpoint-*")}
        child = subprocess.Popen([sys.executable, "-c", code])
        deadline = time.monotonic() + 60
        while child.poll() is None and {p.name for p in folder.glob("checkpoint-*")} == before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    resumed = run(engine, wanted(7, total=60, validate_at=points))
    assert (resumed.validation_loss, resumed.kept_step) == (whole.validation_loss, whole.kept_step)
    assert same(adapter(tmp_path, wanted(7)), adapter(tmp_path, wanted(8)))
