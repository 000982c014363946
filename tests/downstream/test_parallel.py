"""An evaluation over two processes: the same results, events in order; and how it ends when something dies. On the demo's model."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from trained_adapters import RECIPE, kept, scored, trained_models

from loratune.downstream import parallel
from loratune.downstream.events import BenchmarkBegan, BenchmarkProgress, EventMerger, JobEnded, from_line, to_line
from loratune.downstream.job import EvaluatedModel, EvaluationJob
from loratune.errors import EvaluationError, MissingExtraError
from loratune.finetune.model import load
from loratune.work import Message

NAMES = ["demo_choice", "demo_match"]
ITEMS = 40
Kept = dict[tuple[str, str, str], tuple[str, float]]

EVALUATE = """
import sys
from loratune.downstream import parallel
from loratune.downstream.evaluator import score_models
from loratune.downstream.job import EvaluationJob
parallel.MIN_ANSWERS, parallel.cpu_processes = 1, lambda weights, most: 2
for event in score_models(EvaluationJob.from_json(sys.stdin.read())):
    print(event, flush=True)
"""


@pytest.fixture(scope="module")
def models(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[EvaluatedModel]:
    torch.set_num_threads(1)
    return trained_models(load(RECIPE, torch.device("cpu")), demo_data, tmp_path_factory.mktemp("trials"))


@pytest.fixture(scope="module")
def expected(models: list[EvaluatedModel], demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """What one process keeps."""
    folder = tmp_path_factory.mktemp("one")
    assert not any("processes share" in event.text for event in scored(folder, models, demo_data, NAMES, subset=ITEMS) if is_message(event))
    return kept(folder)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "MIN_ANSWERS", 1)
    monkeypatch.setattr(parallel, "cpu_processes", lambda weights, most: min(2, most))


def is_message(event: Any) -> bool:
    return isinstance(event, Message)


def children(parent: int) -> list[int]:
    """The living processes of an evaluation."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, owner = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(owner) == parent and state != "Z" and b"loratune.downstream.job_process" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


@pytest.mark.usefixtures("two")
def test_same_results_in_order(models: list[EvaluatedModel], demo_data: Path, tmp_path: Path, expected: Kept) -> None:
    events = list(scored(tmp_path, models, demo_data, NAMES, subset=ITEMS))
    assert kept(tmp_path) == expected
    notes = [event.text for event in events if isinstance(event, Message)]
    assert notes[0].startswith("2 processes share the models")
    assert [note.partition(":")[0] for note in notes[1:]] == ["Adapter check", "Adapter check", "Benchmark 1 of 2", "Benchmark 2 of 2"]
    second = events.index(Message(text=notes[-1]))
    for name, own in zip(NAMES, (events[:second], events[second + 1 :]), strict=True):
        told = [event for event in own if isinstance(event, BenchmarkProgress)]
        assert {(event.benchmark, event.total) for event in told} == {(name, 4 * ITEMS)}
        assert [event.done for event in told] == sorted({event.done for event in told})
        assert told[-1].done == told[-1].total
    assert {path.name for path in tmp_path.iterdir()} == {"0001", "0002", "0003", "base", "lock"}
    assert [event.text for event in scored(tmp_path, models, demo_data, NAMES, subset=ITEMS)] == [
        "Nothing to do: everything is already scored."
    ]


@pytest.mark.slow  # test_an_adapter_that_is_off stops the other process, and test_evaluate.py goes on after a stop
@pytest.mark.usefixtures("two")
def test_stop_and_go_on(
    models: list[EvaluatedModel], demo_data: Path, tmp_path: Path, expected: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()
    for event in scored(tmp_path, models, demo_data, NAMES, subset=ITEMS, stop=stop):
        if isinstance(event, BenchmarkProgress):
            stop.set()
    assert event == Message(text="Stopped; the answers so far are kept.")
    assert not children(os.getpid())
    part = kept(tmp_path)
    assert 0 < len(part) < len(expected)
    monkeypatch.setattr(parallel, "MIN_ANSWERS", 10_000)  # in one process: faster started
    list(scored(tmp_path, models, demo_data, NAMES, subset=ITEMS))
    assert kept(tmp_path) == expected


def test_a_process_is_killed(
    models: list[EvaluatedModel], demo_data: Path, tmp_path: Path, expected: Kept, two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = scored(tmp_path, models, demo_data, NAMES, subset=ITEMS)
    assert any(isinstance(event, BenchmarkProgress) for event in events)
    os.kill(children(os.getpid())[0], signal.SIGKILL)
    with pytest.raises(EvaluationError, match=r"that answered for .* died \(killed by SIGKILL, perhaps .* run again"):
        list(events)
    assert not children(os.getpid())
    monkeypatch.setattr(parallel, "MIN_ANSWERS", 10_000)
    list(scored(tmp_path, models, demo_data, NAMES, subset=ITEMS))
    assert kept(tmp_path) == expected


def test_the_evaluation_is_killed(models: list[EvaluatedModel], demo_data: Path, tmp_path: Path, expected: Kept) -> None:
    job = EvaluationJob(
        folder=tmp_path,
        recipe=RECIPE,
        models=tuple(models),
        benchmarks=tuple(NAMES),
        validation=demo_data,
        subset=ITEMS,
        device="cpu",
    )
    run = subprocess.Popen([sys.executable, "-c", EVALUATE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.stdin is not None
    assert run.stdout is not None
    run.stdin.write(job.to_json().encode())
    run.stdin.close()
    assert any(line.startswith(b"BenchmarkProgress") for line in run.stdout)
    own = children(run.pid)
    assert len(own) == 2
    run.kill()
    run.wait()
    run.stdout.close()
    list(scored(tmp_path, models, demo_data, NAMES, subset=ITEMS))  # waits for them
    assert kept(tmp_path) == expected
    deadline = time.monotonic() + 2
    while alive := [pid for pid in own if is_alive(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.usefixtures("two")
def test_an_adapter_that_is_off(models: list[EvaluatedModel], demo_data: Path, tmp_path: Path) -> None:
    """It stops the other process too, before anything is scored."""
    swapped = [EvaluatedModel(name="0001", adapter=models[1].adapter, loss=models[0].loss), *models[1:]]
    with pytest.raises(EvaluationError, match=r"^trial 1: validation loss .* was recorded"):
        list(scored(tmp_path, swapped, demo_data, NAMES, subset=ITEMS))
    assert not kept(tmp_path)
    assert not children(os.getpid())


def test_error_of_another_making() -> None:
    with pytest.raises(MissingExtraError, match=r"^as it was said$"):
        parallel._raise_error(JobEnded(error="MissingExtraError", text="as it was said"))


def test_cards(tmp_path: Path) -> None:
    def model(name: str, rank: int) -> EvaluatedModel:
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(f'{{"r": {rank}}}')
        return EvaluatedModel(name=name, adapter=tmp_path / name, loss=None)

    models = [model("4", 4), model("64", 64), EvaluatedModel(name="base", adapter=None, loss=None), model("32", 32), model("8", 8)]
    assert parallel.deal(models, 2) == [["64", "8", "base"], ["32", "4"]]
    assert parallel.deal(models, 2, first={"4", "base"}) == [["4", "64", "8"], ["base", "32"]]


def test_events_as_lines() -> None:
    events = [
        Message(text="two\nlines \u2028 é"),
        BenchmarkBegan(3),
        BenchmarkProgress(benchmark="b", done=1, total=2, seconds=0.5, seconds_left=None),
        JobEnded(error="DataError", text="damaged"),
    ]
    assert [from_line(to_line(event)) for event in events] == events
    assert all(to_line(event).count("\n") == 1 for event in events)
    assert from_line("Downloading the model\n") is None
    assert from_line(to_line(events[0])[:-3]) is None


def test_two_streams_merged() -> None:
    def progress(number: int, done: int, total: int, seconds: float, left: float | None) -> BenchmarkProgress:
        return BenchmarkProgress(benchmark="ab"[number], done=done, total=total, seconds=seconds, seconds_left=left)

    merger = EventMerger(
        ["first", "second"], [[progress(0, 0, 20, 0, None), progress(1, 5, 20, 0, None)], [progress(0, 10, 10, 0, None)] * 2]
    )
    said = [
        (0, Message(text="proved"), [Message(text="proved")]),
        (0, BenchmarkBegan(0), []),
        (0, progress(0, 8, 20, 1, 2), []),  # the other is not there yet
        (1, BenchmarkBegan(0), [Message(text="first"), progress(0, 18, 30, 1, 2)]),
        (1, BenchmarkBegan(1), []),  # it had all of the first
        (0, progress(0, 20, 20, 3, 0), [progress(0, 30, 30, 3, 0)]),
        (0, BenchmarkBegan(1), [Message(text="second")]),
        (0, progress(1, 6, 20, 1, 9), [progress(1, 16, 30, 1, 9)]),
    ]
    for part, event, told in said:
        assert list(merger.merge(part, event)) == told
