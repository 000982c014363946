"""What trackers are told of a study: everything, and each thing once, however often it is killed and started again.

TensorBoard, Weights & Biases, MLflow and trackio are the real packages, offline, where they are installed.
"""

import json
import random
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loratune.errors import MissingExtraError
from loratune.plugs import TRACKERS, TrackerPlug, register
from loratune.record import Trial, TrialState
from loratune.spec import StudySpec
from loratune.study.driver import tune
from loratune.trackers import Feed, Tracker, feed
from loratune.work import CurvePoint, Hyperparameters, Message, Outcome, Progress, State

HALF = "budget-1-2"


class Killed(BaseException):
    """Stands for kill -9."""


class Recorder(Tracker):
    told: list[tuple[Any, ...]] = []  # noqa: RUF012  # of all starts

    def begin(self, run: str, config: Mapping[str, Any]) -> None:
        self.told.append(("begin", run))

    def log(self, run: str, step: int, values: Mapping[str, float]) -> None:
        self.told += [("log", run, step, name, value) for name, value in values.items()]

    def finish(self, run: str, summary: Mapping[str, Any], *, failed: bool) -> None:
        self.told.append(("finish", run, summary["state"], failed))


@pytest.fixture
def recorder() -> Any:
    plug = TrackerPlug(name="recorder", make=Recorder)
    register(plug)
    Recorder.told = []
    yield Recorder
    TRACKERS.unregister("recorder")


def spec_of(folder: Path, *trackers: str) -> StudySpec:
    data = {"train": ["d.json"], "validation_fraction": 0.1}
    return StudySpec.load(
        base={"name": "colours", "model": "m", "data": data, "training": {"report_to": list(trackers)}, "output": {"folder": str(folder)}}
    )


def outcome(number: int, run: str, *steps: int, state: State = State.COMPLETED) -> Outcome:
    curve = tuple(CurvePoint(step=s, tokens=s, train_loss=3.0 - s / 100, validation_loss=2.0 - s / 100 + number) for s in steps)
    return Outcome(key=f"{number:04d}/{run}/{steps[-1]:07d}", state=state, validation_loss=curve[-1].validation_loss, curve=curve, tokens=9)


def story(told: Feed, replayed: Callable[[str], bool] = lambda key: False) -> list[Message]:
    """Trial 0 runs to its end in two segments, 1 crashes, 2 pauses after a short run. Of a replayed segment no points come."""
    said: list[Message] = []
    trials = {n: Trial(number=n, hyperparameters=Hyperparameters(lora_r=4 + n), params={"lora_r": 4 + n}) for n in range(3)}
    for trial in trials.values():
        told.started(trial)
    for number, run, steps, state, ended in (
        (0, "main", (0, 5, 10), TrialState.PAUSED, State.COMPLETED),
        (1, "main", (10,), TrialState.FAILED, State.CRASHED),
        (2, HALF, (5,), TrialState.PAUSED, State.COMPLETED),
        (0, "main", (15, 20), TrialState.COMPLETE, State.COMPLETED),
    ):
        result = outcome(number, run, *steps, state=ended)
        trials[number] = trial = replace(
            trials[number], state=state, value=result.validation_loss, outcomes=(*trials[number].outcomes, result)
        )
        if not replayed(result.key):
            for point in result.curve:
                live = Progress(key=result.key, step=point.step, total_steps=20, tokens=1, train_loss=point.train_loss)
                said += told.progressed(replace(live, validation_loss=point.validation_loss))
        said += told.finished(trial, result)
    said += told.close(over=True)
    return said


EXPECTED_RUNS = {
    ("finish", "trial-0000", "complete", False),
    ("finish", "trial-0001", "failed", True),
    ("finish", "trial-0002", "pruned", False),
    ("finish", "study", "complete", False),
}


def points(told: list[tuple[Any, ...]]) -> Counter[tuple[Any, ...]]:
    return Counter(call for call in told if call[0] == "log")


def test_a_run_for_each_trial_and_one_of_the_study(tmp_path: Path, recorder: type[Recorder]) -> None:
    spec = spec_of(tmp_path, "recorder")
    assert not story(Feed(spec, tmp_path))
    told = list(recorder.told)
    assert {call for call in told if call[0] == "finish"} == EXPECTED_RUNS
    assert Counter(call for call in told if call[0] == "begin") == Counter(
        ("begin", run) for run in ("trial-0000", "trial-0001", "trial-0002", "study")
    )
    assert {call[3] for call in told if call[:2] == ("log", "trial-0002")} == {f"{HALF}/train_loss", f"{HALF}/validation_loss"}
    losses = [call[2:] for call in told if call[:2] == ("log", "trial-0000") and call[3] == "validation_loss"]
    assert losses == [(step, "validation_loss", 2.0 - step / 100) for step in (0, 5, 10, 15, 20)]
    assert [call[2:] for call in told if call[:2] == ("log", "study") and call[3] == "trial"] == [
        (1, "trial", 1),
        (2, "trial", 0),
        (3, "trial", 2),
    ]
    assert max(points(told).values()) == 1

    assert not story(Feed(spec, tmp_path), replayed=lambda key: True)
    assert recorder.told == told, "a later start replays the study, and adds nothing"


def test_a_tracker_that_is_named_later_gets_the_whole_story(tmp_path: Path, recorder: type[Recorder]) -> None:
    story(Feed(spec_of(tmp_path), tmp_path))
    story(Feed(spec_of(tmp_path, "recorder"), tmp_path), replayed=lambda key: True)
    assert {call for call in recorder.told if call[0] == "finish"} == EXPECTED_RUNS
    assert len([call for call in recorder.told if call[:2] == ("log", "trial-0000")]) == 10


@pytest.mark.parametrize("seed", range(20))
def test_killed_anywhere_it_loses_nothing_and_repeats_what_was_at_hand_alone(
    seed: int, tmp_path: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "_EVERY", 0.0)  # every point by itself
    spec, chance, write = spec_of(tmp_path, "recorder"), random.Random(seed), feed.write_atomically
    story(Feed(spec_of(tmp_path / "whole", "recorder"), tmp_path))
    whole = points(recorder.told)
    (tmp_path / "trackers.json").unlink()
    recorder.told.clear()
    left, starts = 0, 0

    def fragile(path: Path, content: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(feed, "write_atomically", fragile)
        while True:
            starts, left = starts + 1, chance.randint(2, 7) if starts < 12 else 10**6
            try:
                story(Feed(spec, tmp_path))
                break
            except Killed:
                continue
    assert starts > 2
    told = points(recorder.told)
    assert {call for call in recorder.told if call[0] == "finish"} == EXPECTED_RUNS
    assert told.keys() == whole.keys()
    assert sum(told.values()) - len(told) <= 4 * (starts - 1), "a kill repeats a segment's end: two curves, and the study's numbers"


def test_a_tracker_that_fails_is_switched_off_and_the_study_goes_on(
    tmp_path: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise ConnectionError("no route to\nhost")

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "log", away)
        said = story(Feed(spec_of(tmp_path, "recorder"), tmp_path))
    assert [m.text for m in said] == ["The tracker recorder is switched off until the next start: ConnectionError: no route to host"]


def test_a_missing_package_is_told_before_the_data_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"wandb, which report_to: wandb needs, is not installed\. Install it with: pip install wandb"
    ):
        next(tune(spec_of(tmp_path / "study", "wandb")))
    assert not (tmp_path / "study").exists()


def twice(name: str, folder: Path) -> str:
    """Tell the tracker the story, its second half in a second start; the study's id."""
    spec = spec_of(folder, name)
    first = Feed(spec, folder)
    trial = Trial(number=0, hyperparameters=Hyperparameters(lora_r=4), params={"lora_r": 4})
    first.started(trial)
    part = outcome(0, "main", 0, 5, 10)
    assert not list(first.finished(replace(trial, state=TrialState.PAUSED, value=1.9, outcomes=(part,)), part))
    assert not list(first.close(over=False))
    assert not story(Feed(spec, folder))
    return json.loads((folder / "trackers.json").read_text())["id"]


def scalars(file: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of an event file: records of length, its checksum, protobuf, checksum."""
    from tensorboardX.proto import event_pb2

    found, raw = [], file.read_bytes()
    while raw:
        (length,) = struct.unpack("<Q", raw[:8])
        event = event_pb2.Event.FromString(raw[12 : 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value if value.HasField("simple_value")]
        raw = raw[16 + length :]
    return found


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    twice("tensorboard", tmp_path)
    home = tmp_path / "tensorboard"
    assert {path.name for path in home.iterdir()} == {"trial-0000", "trial-0001", "trial-0002", "study"}
    found = [row for file in sorted((home / "trial-0000").iterdir()) for row in scalars(file)]
    assert [row[:2] for row in found if row[0] == "validation_loss"] == [("validation_loss", step) for step in (0, 5, 10, 15, 20)]
    assert found[1][2] == pytest.approx(2.0)


@pytest.mark.slow
def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    id = twice("wandb", tmp_path)
    runs = Counter(path.name.rpartition(f"{id}-")[2] for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert runs == {"trial-0000": 2, "trial-0001": 1, "trial-0002": 1, "study": 1}, "the same id, once per start"


@pytest.mark.slow
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path / 'mlruns'}")
    twice("mlflow", tmp_path)
    client = mlflow.MlflowClient()
    runs = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("colours").experiment_id])}
    assert {name: run.info.status for name, run in runs.items()} == {
        "trial-0000": "FINISHED",
        "trial-0001": "FAILED",
        "trial-0002": "FINISHED",
        "study": "FINISHED",
    }
    history = client.get_metric_history(runs["trial-0000"].info.run_id, "validation_loss")
    assert [(m.step, m.value) for m in history] == [(step, pytest.approx(2.0 - step / 100)) for step in (0, 5, 10, 15, 20)]
    assert runs["trial-0002"].data.params["lora_r"] == "6"
    assert runs["trial-0002"].data.tags["mlflow.parentRunId"] == runs["study"].info.run_id


@pytest.mark.slow
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    id = twice("trackio", tmp_path)
    assert {run.name for run in trackio.Api().runs("colours")} == {
        f"{run}-{id}" for run in ("trial-0000", "trial-0001", "trial-0002", "study")
    }
    from trackio.sqlite_storage import SQLiteStorage

    points = [row for row in SQLiteStorage.get_logs("colours", f"trial-0000-{id}") if "validation_loss" in row]
    assert [(row["step"], row["validation_loss"]) for row in points] == [(s, pytest.approx(2.0 - s / 100)) for s in (0, 5, 10, 15, 20)]
