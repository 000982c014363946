"""Every command killed at random moments of its whole life, the first write included: the same command then ends as if nothing had been.

python -m pytest -m slow tests/attack/test_random_kills.py -s
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loratune.record import read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

DYING = Path(__file__).with_name("dying.py")
SMALL = ["--data.train_count", "24", "--data.validation.0.count", "12", "--training.batch_size", "4", "--training.epochs", "1"]
SMALL += ["--training.checkpoint_steps", "1", "--training.validations", "2"]
INLINE = ["run", "--demo", "--output", "STUDY", *SMALL, "--executor.name", "inline", "--sampler", "nomad", "--trials", "3"]
HALVING = [*INLINE[:-4], "--sampler", "tpe", "--trials", "3", "--schedule.name", "halving", "--schedule.min_resource", "1/3"]
WORKERS = [*INLINE, "--executor.name", "local", "--executor.workers", "2", "--executor.threads", "1"]
EVALUATE = ["evaluate", "STUDY", "--benchmarks", "demo_choice", "--subset", "12"]
SELECT = ["select", "STUDY", "--yes", "--finalists", "2", "--runs", "10"]
# (command, what must have run before it, kills at a write, kills by the clock)
LIVES: dict[str, tuple[list[str], list[list[str]], int, int]] = {
    "run": (INLINE, [], 20, 5),
    "run, halving": (HALVING, [], 10, 5),
    "run, workers": (WORKERS, [], 5, 10),
    "evaluate": (EVALUATE, [INLINE], 12, 4),
    "select": (SELECT, [INLINE], 12, 4),
    "report": (["report", "STUDY"], [INLINE], 5, 2),
    "export": (["export", "STUDY", "STUDY/exported"], [INLINE], 5, 1),
    "export --merged": (["export", "STUDY", "STUDY/merged", "--merged"], [INLINE], 4, 2),
}


def words(command: list[str], study: Path) -> list[str]:
    return [word.replace("STUDY", str(study)) for word in command]


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "LORATUNE_CACHE": str(folder / "cache")}


def run(command: list[str], study: Path) -> str:
    """The command to its end; what it said. Neither an error nor a traceback is allowed."""
    whole = [sys.executable, "-m", "loratune", *words(command, study)]
    done = subprocess.run(whole, capture_output=True, text=True, env=environment(study.parent), stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def dying(command: list[str], study: Path, moment: int, seconds: float | None = None) -> str:
    """The command, killed before a write, or after so many seconds; its last words."""
    whole = [sys.executable, str(DYING), str(moment), str(study), *words(command, study)]
    process = subprocess.Popen(
        whole, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(study.parent), stdin=subprocess.DEVNULL
    )
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
    assert "Traceback" not in errors, errors
    return errors.strip().splitlines()[-1] if errors.strip() else ""


def remains(study: Path) -> dict[str, Any]:
    """What a study's folder says, without times and places."""
    record = read(study)
    found: dict[str, Any] = {
        "trials": [(t.number, t.params, t.state, t.value, [(o.key, o.validation_loss) for o in t.outcomes]) for t in record.trials]
    }
    for path in sorted(study.rglob("*.safetensors")):
        if path.parent.name in ("adapter", "exported", "merged"):
            found[str(path.relative_to(study))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted((study / "evaluation").rglob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "score" in content:
            found[str(path.relative_to(study))] = content["score"]
    if (study / "selection.json").exists():
        chosen = json.loads((study / "selection.json").read_text())
        found["selection"] = {name: chosen.get(name) for name in ("chosen", "trial", "shipped", "rule")}
    found["files"] = sorted(path.name for path in study.iterdir())
    return found


def leftovers(study: Path) -> list[str]:
    return [str(path.relative_to(study)) for path in study.rglob(".*") if path.name.endswith(".tmp") and "cache" not in path.parts]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study, which the later commands start from."""
    study = tmp_path_factory.mktemp("before") / "study"
    run(INLINE, study)
    return study


@pytest.mark.parametrize("name", LIVES)
def test_a_command_killed_at_random_moments(name: str, before: Path, tmp_path: Path, keep_figures: Any) -> None:
    command, earlier, at_writes, by_clock = LIVES[name]
    study = tmp_path / "study"

    def fresh() -> None:
        shutil.rmtree(study, ignore_errors=True)
        if earlier:
            shutil.copytree(before, study)

    fresh()
    began = time.monotonic()
    last = dying(command, study, 0)
    seconds, writes = time.monotonic() - began, int(last.split()[0])
    expected = remains(study)
    chance = random.Random(name)
    spread = sorted({1, 2, 3, *(chance.randint(1, writes) for _ in range(at_writes - 3))})
    moments: list[tuple[int, float | None]] = [(moment, None) for moment in spread]
    moments += [(0, 0.05 + chance.random() * 0.15)] + [(0, chance.uniform(0.2, seconds)) for _ in range(by_clock - 1)]
    words_said = []
    for moment, clock in moments:
        fresh()
        words_said.append(dying(command, study, moment, clock) or f"killed after {clock} s")
        print(f"{name}: {words_said[-1]}", flush=True)
        run(command, study)
        assert remains(study) == expected, (name, moment, clock, words_said[-1])
        assert not leftovers(study), (name, moment, clock, words_said[-1])
    figures = {"kills": len(moments), "before a write": len(spread), "writes": writes, "by the clock": by_clock, "seconds": round(seconds)}
    keep_figures(f"kills: {name}", figures | {"moments": words_said})
    print(f"\n{name}: {len(moments)} kills, at {len(spread)} of {writes} writes and {by_clock} times within {seconds:.0f} s: the same end")
