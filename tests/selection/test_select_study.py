"""Selecting from a real finished study of the embedded model: five trials of six steps."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from loratune.cli import main
from loratune.delivery import hand_over
from loratune.demo import study as demo_study
from loratune.errors import SpecError, StorageError
from loratune.record import open_record, read
from loratune.record.adapters import find_adapter
from loratune.selection import Planned, RerunFinished, Selected, SelectionRecord, read_selection, select
from loratune.selection.rerun import Rerun
from loratune.selection.workflow import CHECKS
from loratune.spec import StudySpec
from loratune.study.driver import tune
from loratune.system.formatting import signed

TRIALS = 5


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The study's folder. Copy it; do not write."""
    home = tmp_path_factory.mktemp("select")
    flags = [
        ("output.folder", str(home / "study")),
        ("data.train_count", "48"),
        ("data.validation_count", "40"),
        ("training.validations", "1"),
        ("sampler", "random"),
        ("budget.trials", str(TRIALS)),
        ("executor.name", "inline"),
        ("executor.workers", "1"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORATUNE_CACHE", str(home / "cache"))
        list(tune(StudySpec.load(None, flags, demo_study())))
    yield home / "study"
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "study", copy_function=shutil.copy2))


def result(folder: Path, **options: Any) -> SelectionRecord:
    last = list(select(folder, **options))[-1]
    assert isinstance(last, Selected)
    assert read_selection(folder) == last.record or math.isnan(last.record.noise.low)  # nan is not equal to itself
    return last.record


@pytest.fixture(scope="module")
def whole(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SelectionRecord]:
    """(a study, its selection), uninterrupted. Read it; do not write."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("whole") / "study", copy_function=shutil.copy2))
    return folder, result(folder)


def outcomes(folder: Path) -> dict[str, float]:
    return {
        path.relative_to(folder).as_posix(): json.loads(path.read_text())["validation_loss"]
        for path in folder.glob("finalists/trials/*/*/outcomes/*.json")
    }


def same(one: SelectionRecord, other: SelectionRecord) -> None:
    """The same log, choice and worth; losses to float rounding, for which the neighbours in a pack matter."""
    for record in (one, other):
        assert record.race is not None
        assert record.unbiased is not None
    told = [[*r.race.log, *r.unbiased.runs] for r in (one, other) if r.race and r.unbiased]
    assert [(run.trial, run.repeat, run.seed) for run in told[0]] == [(run.trial, run.repeat, run.seed) for run in told[1]]
    assert [run.loss for run in told[0]] == pytest.approx([run.loss for run in told[1]], rel=1e-5)
    for name in ("chosen", "share", "runner_up", "rule", "runs", "tokens", "excluded"):
        assert getattr(one, name) == getattr(other, name)
    assert (one.shipped.run, one.shipped.seed) == (other.shipped.run, other.shipped.seed)


def test_the_race_trains_everyone_with_the_same_fresh_seeds(whole: tuple[Path, SelectionRecord]) -> None:
    folder, record = whole
    assert record.race is not None
    seeds = {run.repeat: run.seed for run in record.race.log}
    assert all(run.seed == seeds[run.repeat] for run in record.race.log)
    assert record.unbiased is not None
    checks = {run.seed for run in record.unbiased.runs}
    assert len({*seeds.values(), *checks, read(folder).spec["seed"]}) == len(seeds) + CHECKS + 1
    disk = outcomes(folder)
    assert len(disk) == record.runs == len(record.race.log) + len(record.unbiased.runs)
    steps = json.loads(next(folder.glob("trials/0000/main/outcomes/*.json")).read_text())["key"].rpartition("/")[2]
    for run in record.race.log:
        assert disk[f"finalists/trials/{run.trial:04d}/race-{run.repeat:02d}/outcomes/{steps}.json"] == run.loss
    # Paired, and yet not one run repeated: the losses of a trial differ between seeds.
    assert len(set(disk.values())) == len(disk)


def test_nothing_of_it_counts_as_the_study(whole: tuple[Path, SelectionRecord], finished: Path) -> None:
    folder, _ = whole
    before, after = read(finished), read(folder)
    assert (after.trials, after.device_seconds, after.best) == (before.trials, before.device_seconds, before.best)


def test_the_choice_and_its_worth(whole: tuple[Path, SelectionRecord]) -> None:
    _, record = whole
    assert record.race is not None
    means = {finalist.trial: finalist.loss for finalist in record.candidates}
    raced = {t: [run.loss for run in record.race.log if run.trial == t] for t in means}
    assert means == pytest.approx({t: float(np.mean(losses)) for t, losses in raced.items()})
    assert record.chosen == min(means, key=means.__getitem__)  # so far apart that nothing ties
    assert record.share > 0.5
    assert record.unbiased is not None
    own, default = ([run.loss for run in record.unbiased.runs if run.trial == t] for t in (record.chosen, 0))
    assert record.unbiased.chosen.value == pytest.approx(np.mean(own))
    assert record.unbiased.gain is not None
    assert record.unbiased.gain.value == pytest.approx(np.mean(np.subtract(default, own)))
    assert record.unbiased.gain.low > 0
    assert record.noise.low < record.noise.value < record.noise.high
    lines = record.explain().splitlines()
    assert lines[0].startswith(f"Ship trial {record.chosen}. Its loss is ")
    assert "% of resamples" not in record.explain()  # of so few seeds they say nothing
    assert record.nearest is not None
    assert f"95 % interval {record.nearest.behind.low:.2g} to ".replace("-", "−") in lines[0]
    assert 6 <= len(lines) <= 14
    assert any(f"{record.unbiased.gain:.4f}" in line for line in lines)


def test_the_choice_is_handed_over(whole: tuple[Path, SelectionRecord]) -> None:
    folder, record = whole
    study = read(folder)
    chosen = record.trial_of(study)
    source = find_adapter(study, chosen, record.shipped.run)
    assert source is not None
    runs = {path.parts[-3]: loss for name, loss in outcomes(folder).items() if (path := Path(name)).parts[2] == f"{record.chosen:04d}"}
    runs |= {"main": chosen.value or 0.0}
    assert len(runs) == record.shipped.lowest_of
    assert (record.shipped.run, record.shipped.validation_loss) == min(runs.items(), key=lambda pair: pair[1])
    best, adapter = hand_over(study, folder)
    assert adapter is not None
    weights = "adapter_model.safetensors"
    assert (adapter / weights).read_bytes() == (source / weights).read_bytes()
    told = yaml.safe_load(best.read_text())
    assert (told["trial"], told["validation_loss"], told["chosen"]["seed"]) == (
        record.chosen,
        record.shipped.validation_loss,
        record.shipped.seed,
    )
    card = (adapter / "README.md").read_text()
    assert f"Ship trial {record.chosen}" in card
    kept = [path.parent.name for path in (folder / "finalists").glob("trials/*/*/adapter")]
    assert kept == ([] if record.shipped.run == "main" else [record.shipped.run])
    before = outcomes(folder)
    assert result(folder).shipped == record.shipped  # said again, nothing is trained again
    assert outcomes(folder) == before
    assert source.is_dir()


def test_ended_in_the_race_and_repeated_is_the_same(whole: tuple[Path, SelectionRecord], study: Path) -> None:
    """Stopped after three runs, then closed in the middle of another: the same log, the same choice, nothing trained twice."""
    stop, ran, after = threading.Event(), 0, 3
    for event in select(study, stop=stop):
        ran += isinstance(event, RerunFinished)
        if ran == after:
            stop.set()
        assert not isinstance(event, Selected)
    assert read_selection(study) is None
    before = {path: path.stat().st_mtime_ns for path in study.glob("finalists/trials/*/*/outcomes/*.json")}
    assert after <= len(before)
    events = select(study)
    for event in events:
        if isinstance(event, RerunFinished):
            break
    events.close()  # type: ignore[attr-defined]
    same(result(study), whole[1])
    assert outcomes(study) == pytest.approx(outcomes(whole[0]), rel=1e-5)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_killed_in_mid_race(whole: tuple[Path, SelectionRecord], study: Path) -> None:
    for _ in range(3):
        known = len(outcomes(study))
        driver = subprocess.Popen([sys.executable, "-m", "loratune", "select", str(study), "--yes"], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while driver.poll() is None and len(outcomes(study)) == known and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    same(result(study), whole[1])


def test_a_stated_number_of_runs_is_kept(study: Path) -> None:
    with pytest.raises(SpecError, match=r"got 5; at least 8 are needed"):
        list(select(study, runs=5))
    events = list(select(study, runs=4 + 2 * CHECKS))
    planned, last = events[0], events[-1]
    assert isinstance(planned, Planned)
    assert isinstance(last, Selected)
    assert planned.most.runs == 4 + 2 * CHECKS >= last.record.runs == len(outcomes(study))
    assert planned.most.tokens > last.record.tokens * 0.9
    assert len(last.record.candidates) == 2  # two seeds each for no more


def test_without_training(study: Path) -> None:
    record = result(study, rerun=False)
    assert not (study / "finalists").exists()
    assert (record.race, record.unbiased, record.runs) == (None, None, 0)
    best = read(study).best
    assert best is not None
    assert (record.chosen, record.lowest) == (best.number, best.number)
    assert "Nothing was trained again" in record.explain()


def test_constraints(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        SpecError, match=r"(?s)none of \d finished trials keeps.*adapter_mb <= 0.01: kept by 0; adapter_mb is from 0\.\d+ to"
    ):
        list(select(study, require=["adapter_mb <= 0.01"]))
    sizes = {t.number: t.outcomes[-1].trainable_parameters * 4e-6 for t in read(study).finished}
    best = read(study).best
    assert best is not None
    bound = sizes[best.number] - 1e-4
    record = result(study, rerun=False, require=[f"adapter_mb <= {bound}"])
    assert sizes[record.chosen] <= bound
    assert record.excluded == sum(size > bound for size in sizes.values())
    assert main(["select", str(study), "--require", "adapter_gb <= 1"]) == 2
    assert "did you mean 'adapter_mb'?" in capsys.readouterr().err


def test_another_rule_is_handed_over_until_the_study_goes_on(study: Path) -> None:
    record = result(study, rerun=False, prefer="adapter_mb,loss")
    smallest = min(t.outcomes[-1].trainable_parameters for t in read(study).finished)
    assert record.trial_of(read(study)).outcomes[-1].trainable_parameters == smallest
    assert record.chosen != record.lowest
    best, _ = hand_over(read(study), study)
    assert yaml.safe_load(best.read_text())["trial"] == record.chosen
    text = json.loads((study / "selection.json").read_text())
    (study / "selection.json").write_text(json.dumps({**text, "finished": text["finished"] - 1}))
    best, _ = hand_over(read(study), study)
    assert yaml.safe_load(best.read_text())["trial"] == record.lowest


def test_an_adapter_that_was_not_kept_is_trained_again(study: Path) -> None:
    """And it is the same: the run of a selection is the study's own in all but the seed."""
    before = read(study)
    trial = before.finished[-1]
    weights = (study / "trials" / f"{trial.number:04d}" / "main" / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(study / "trials" / f"{trial.number:04d}" / "main" / "adapter")
    with open_record(study) as held, Rerun(before, held.lock, threading.Event()) as trainer:
        losses = _value_of(trainer.train([(trial, "main")], adapters=True))
    assert losses == [pytest.approx(trial.value, rel=1e-6)]
    adapter = find_adapter(before, trial)
    assert adapter is not None
    again = (adapter / "adapter_model.safetensors").read_bytes()
    assert len(again) == len(weights)
    numbers = [np.frombuffer(content[-256:], dtype=np.float32) for content in (weights, again)]
    np.testing.assert_allclose(numbers[0], numbers[1], rtol=1e-3, atol=1e-6)


def _value_of(events: Any) -> Any:
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value


def _spec(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        spec = yaml.safe_load((folder / "spec.yaml").read_text())
        change(spec)
        (folder / "spec.yaml").write_text(yaml.safe_dump(spec))

    return apply


def test_a_study_that_is_not_finished(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _spec(lambda spec: spec["budget"].update(trials=9))(study)
    assert main(["select", str(study)]) == StorageError.exit_code
    assert f"is not finished: {TRIALS} of 9 trials ended. Go on with `loratune run {study}`" in capsys.readouterr().err
    assert not (study / "finalists").exists()
    assert main(["select", str(study / "nowhere")]) == StorageError.exit_code
    assert not (study / "nowhere").exists()


def test_the_command(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["select", str(study), "--runs", "13", "--common-practice", "--yes"]) == 0
    out = capsys.readouterr().out
    told = out.splitlines()
    cost = next(n for n, line in enumerate(told) if line.startswith("At most 13 runs, "))
    assert cost < next(n for n, line in enumerate(told) if ", race-00: " in line)
    record = read_selection(study)
    assert record is not None
    assert record.explain() in out
    assert sum("common practice, practice-0" in line for line in told) == CHECKS
    assert record.unbiased is not None
    practice, gain = record.unbiased.common_practice, record.unbiased.gain_over_common_practice
    assert practice is not None
    assert gain is not None
    assert gain.value == pytest.approx(practice.value - record.unbiased.chosen.value)
    runs = [json.loads(path.read_text()) for path in study.glob("finalists/trials/*/practice-*/outcomes/*.json")]
    assert practice.value == pytest.approx(sum(run["validation_loss"] for run in runs) / CHECKS)
    assert f"the gain over it is {gain:.4f}" in out
    assert f"Gain over common practice</dt><dd>{signed(gain.value)}" in (study / "report.html").read_text()
    before = outcomes(study)
    same(result(study, runs=13, common_practice=True), record)  # the same command once more is the same choice, and trains nothing
    assert outcomes(study) == before
    assert told[-1] == f"Adapter:  {study / 'adapter'}"


def test_a_study_is_held_meanwhile(study: Path) -> None:
    events = select(study)
    next(iter(events))
    with pytest.raises(StorageError, match="is being written by"), open_record(study):
        pass
    events.close()  # type: ignore[attr-defined]


def test_a_selection_that_cannot_be_read(study: Path) -> None:
    (study / "selection.json").write_text("{")
    with pytest.raises(StorageError, match="Remove it; `loratune select"):
        read_selection(study)
