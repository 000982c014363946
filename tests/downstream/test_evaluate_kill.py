"""kill -9 of `loratune evaluate` at random moments: the scores are those of an uninterrupted one, nothing is answered twice.

python -m pytest -m slow tests/downstream/test_evaluate_kill.py
"""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loratune.record.paths import StudyPaths

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

BENCHMARKS = ["demo_choice", "demo_match", "demo_code"]
ITEMS = 30
AT_ANSWERS = 7  # kills when a random number of answers more is on disk
AT_TIMES = 3  # kills after random seconds: while loading, proving, or at work


def loratune(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "loratune", *map(str, arguments)]


def evaluate(study: Path) -> list[str]:
    options = ("--benchmarks", ",".join(BENCHMARKS), "--subset", ITEMS, "--allow-code-execution", "--weaker-sandbox")
    return loratune("evaluate", study, *options)


def whole_lines(study: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(model, benchmark) -> its lines, but for a torn last one. Raises where anything else is half written."""
    found = {}
    for path in sorted(StudyPaths(study).evaluation.glob("*/*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        found[path.parent.name, path.stem] = [json.loads(line) for line in lines if line.endswith("\n")]
        assert all(line.endswith("\n") for line in lines[:-1])
    for path in StudyPaths(study).evaluation.glob("*/*.json"):
        json.loads(path.read_text(encoding="utf-8"))
    return found


def answers(study: Path) -> int:
    """Lines on disk, the torn ones too. Cheap: it is asked while the evaluation writes."""
    return sum(path.read_bytes().count(b"\n") for path in StudyPaths(study).evaluation.glob("*/*.jsonl"))


def results(study: Path) -> dict[tuple[str, str, str], tuple[str, float, str]]:
    return {(*key, line["id"]): (line["answer"], line["score"], line["why"]) for key, lines in whole_lines(study).items() for line in lines}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of the demo, three trials."""
    folder = tmp_path_factory.mktemp("killed") / "study"
    small = ("--data.train_count", 320, "--trials", 3, "--executor.threads", 1)
    subprocess.run(loratune("run", "--demo", "--output", folder, *small), check=True, capture_output=True)
    return folder


def test_killed_at_random_moments(study: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        shutil.copytree(study, folder)
    subprocess.run(evaluate(whole), check=True, capture_output=True)
    expected = results(whole)
    models = {model for model, _, _ in expected}
    assert len(models) >= 4
    assert len(expected) == len(models) * len(BENCHMARKS) * ITEMS == answers(whole)

    chance, kills, before = random.Random(4), 0, {}
    plan = [("answers", k) for k in range(AT_ANSWERS)] + [("times", k) for k in range(AT_TIMES)]
    chance.shuffle(plan)
    for kind, _ in plan:
        target = min(answers(killed) + chance.randint(1, len(expected) // AT_ANSWERS), len(expected) - 1)
        deadline = time.monotonic() + (chance.uniform(1, 25) if kind == "times" else 600)
        run = subprocess.Popen(evaluate(killed), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while run.poll() is None and time.monotonic() < deadline and (kind == "times" or answers(killed) < target):
            time.sleep(0.002)
        done = run.poll() is not None
        run.kill()
        _, errors = run.communicate()
        assert not done or run.returncode == 0, errors.decode()
        kills += not done
        kept = whole_lines(killed)
        assert all(kept[key][: len(lines)] == lines for key, lines in before.items())  # what was answered stands as it was
        before = kept
    print(f"killed {kills} times; answers on disk by then: {sum(map(len, before.values()))} of {len(expected)}")
    assert kills >= 5, "it was over before it could be killed"

    subprocess.run(evaluate(killed), check=True, capture_output=True)
    assert results(killed) == expected
    assert answers(killed) == len(expected)  # no item of a model stands twice
    assert not list(StudyPaths(killed).evaluation.rglob("*.bak"))
    again = subprocess.run(evaluate(killed), check=True, capture_output=True, text=True)
    assert "Nothing to do: everything is already scored." in again.stdout
