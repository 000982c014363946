"""The engine across processes: killed at any moment, and spread over two."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_engine import adapter, recipe, segment
from torch import equal

from loratune.finetune import hf
from loratune.work import Outcome, Recipe, Segment, State

SCRIPT = str(Path(__file__).with_name("segment_process.py"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(root: Path, *segments: Segment, processes: int = 1) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0", "--rdzv-backend", "c10d"]
        launcher += ["--rdzv-endpoint", "localhost:0"]
    return [*launcher, SCRIPT, str(root), str(root / "outcomes.jsonl"), *(s.to_json() for s in segments)]


def study(root: Path, **training: object) -> Recipe:
    made = recipe(root, **training)
    (root / "recipe.json").write_text(made.to_json())
    return made


def outcomes(root: Path) -> list[Outcome]:
    return [Outcome.from_json(line) for line in (root / "outcomes.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_killed_again_and_again_the_result_is_the_same(tmp_path: Path) -> None:
    """kill -9 at random moments, crash checkpoints at every second step, a pause in the middle; bit for bit."""
    study(tmp_path, dtype="float32", checkpoint_steps=2)
    total = 160
    whole = segment(total=total, trial=0, validate_at=(60,))
    parts = [segment(total=total, trial=1, stop=80, validate_at=(60,)), segment(total=total, trial=1, start=80)]
    subprocess.run(command(tmp_path, whole), env=ENVIRONMENT, check=True, timeout=120)
    generator = np.random.default_rng(0)
    folder = tmp_path / parts[0].folder
    seen, began = set(), time.monotonic()
    for part, kills in zip(parts, (2, 1), strict=True):
        for _ in range(kills):
            process = subprocess.Popen(command(tmp_path, part), env=ENVIRONMENT)
            first = sorted(folder.glob("checkpoint-*"))[-1:]
            while sorted(folder.glob("checkpoint-*"))[-1:] == first and process.poll() is None:
                time.sleep(0.005)
            time.sleep(float(generator.uniform(0, 0.3)))
            process.kill()
            process.wait()
            seen |= {path.name for path in folder.glob("checkpoint-*")}
        subprocess.run(command(tmp_path, part), env=ENVIRONMENT, check=True, timeout=120)
    assert len(seen) >= 2, f"never killed in the middle, in {time.monotonic() - began:.0f} s"
    done = outcomes(tmp_path)
    assert [o.state for o in done] == [State.COMPLETED] * 3
    assert done[2].validation_loss == done[0].validation_loss
    assert done[1].curve[0] == done[0].curve[0]  # step 60: losses of training and validation
    a, b = adapter(tmp_path, whole), adapter(tmp_path, parts[1])
    assert all(equal(a[name], b[name]) for name in a)
    assert [p.name for p in folder.iterdir() if "checkpoint" in p.name] == [f"checkpoint-{total:07d}.safetensors"]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Batches that divide by nothing, dropout on: the same losses up to the order of summation; stops are agreed on."""
    study(tmp_path)
    wanted = [
        segment(trial=0, batch_size=7, validate_at=(0, 3)),
        segment(trial=1, batch_size=1, lora_dropout=0.5, target_modules="all-linear"),  # one process idles
        segment(trial=2, batch_size=7, learning_rate=1e200),
        segment(trial=3, batch_size=5, stop=4),
        segment(trial=3, batch_size=5, start=4),
        segment(trial=4, target_modules=("nonsense",)),
    ]
    subprocess.run(command(tmp_path, *wanted), env=ENVIRONMENT, check=True, timeout=120)
    alone = outcomes(tmp_path)
    (tmp_path / "outcomes.jsonl").unlink()
    (tmp_path / "trials").rename(tmp_path / "trials-alone")
    subprocess.run(command(tmp_path, *wanted, processes=2), env=ENVIRONMENT, check=True, timeout=200)
    together = outcomes(tmp_path)
    assert [o.state for o in together] == [o.state for o in alone]
    assert [o.state for o in alone].count(State.COMPLETED) == 4
    for a, b in zip(alone, together, strict=True):
        assert (a.tokens, a.trainable_parameters, b.devices) == (
            b.tokens,
            b.trainable_parameters,
            2 if b.state is not State.BAD_INPUT else b.devices,
        )
        for p, q in zip(a.curve, b.curve, strict=True):
            assert (p.step, p.tokens) == (q.step, q.tokens)
            assert q.validation_loss == pytest.approx(p.validation_loss, abs=1e-9)
            assert q.train_loss == pytest.approx(p.train_loss, abs=1e-9)
    (tmp_path / "outcomes.jsonl").unlink()
    stopped = segment(total=40, trial=5, validate_at=(4,))
    environment = {**ENVIRONMENT, "LORATUNE_STOP_AT": "4"}
    subprocess.run(command(tmp_path, stopped, processes=2), env=environment, check=True, timeout=200)
    subprocess.run(command(tmp_path, stopped), env=ENVIRONMENT, check=True, timeout=120)  # goes on alone
    cancelled, finished = outcomes(tmp_path)
    assert cancelled.state is State.CANCELLED
    assert cancelled.tokens < finished.tokens
    assert finished.state is State.COMPLETED


@pytest.mark.slow
def test_weights_that_are_shared_out_train_as_one(tmp_path: Path) -> None:
    """FSDP: each of two processes holds a half of each layer; seven validation batches, which divide by nothing."""
    study(tmp_path, sharding="fsdp", validation_batch_size=3, gradient_checkpointing=True)
    wanted = [
        segment(trial=0, batch_size=7, validate_at=(0, 3)),
        segment(trial=1, batch_size=1, lora_dropout=0.5, target_modules="all-linear"),
        segment(trial=2, batch_size=7, learning_rate=1e200),
    ]
    subprocess.run(command(tmp_path, *wanted), env=ENVIRONMENT, check=True, timeout=120)
    alone = outcomes(tmp_path)
    weights = [adapter(tmp_path, one) for one in wanted[:2]]
    (tmp_path / "outcomes.jsonl").unlink()
    (tmp_path / "trials").rename(tmp_path / "trials-alone")
    environment = {**ENVIRONMENT, "LORATUNE_SHARDS_OF": "2"}
    subprocess.run(command(tmp_path, *wanted, processes=2), env=environment, check=True, timeout=200)
    together = outcomes(tmp_path)
    assert [o.state for o in together] == [o.state for o in alone] == [State.COMPLETED] * 2 + [State.DIVERGED]
    for a, b in zip(alone, together, strict=True):
        for p, q in zip(a.curve, b.curve, strict=True):
            assert q.validation_loss == pytest.approx(p.validation_loss, abs=1e-9)
            assert q.train_loss == pytest.approx(p.train_loss, abs=1e-9)
    for one, before in zip(wanted, weights, strict=False):
        after = adapter(tmp_path, one)
        assert after.keys() == before.keys()
        assert all((after[name] - before[name]).norm() <= 1e-7 * before[name].norm() for name in before)


@pytest.mark.slow
def test_a_process_that_ran_out_of_memory_leaves_its_last_words(tmp_path: Path) -> None:
    """The group dies with it; started again, it answers out of memory instead of trying for ever."""
    study(tmp_path)
    impossible = segment(trial=0, lora_r=2**42)
    died = subprocess.run(command(tmp_path, impossible, processes=2), env=ENVIRONMENT, timeout=200, capture_output=True)
    assert died.returncode != 0
    assert (tmp_path / impossible.folder / hf._GROUP_OUTCOME).exists()
    subprocess.run(command(tmp_path, impossible, segment(trial=1), processes=2), env=ENVIRONMENT, check=True, timeout=200)
    assert [o.state for o in outcomes(tmp_path)] == [State.OUT_OF_MEMORY, State.COMPLETED]
