"""The study's folder: what is written is read back; one writer at a time, outliving a killed driver's workers."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import loratune
from loratune.errors import StorageError
from loratune.record import COMPLETE, DIVERGED, PRUNED, Trial, TrialState, open_record, read
from loratune.record.common_practice import common_practice
from loratune.work import CurvePoint, Hyperparameters, Outcome, Segment, State

HYPERPARAMETERS = Hyperparameters(lora_r=16, learning_rate=3e-4, target_modules=("q_proj", "v_proj"))


def segment(trial: int, stop: int, run: str = "main") -> Segment:
    return Segment(trial=trial, run=run, hyperparameters=HYPERPARAMETERS, seed=0, total_steps=30, stop_step=stop)


def outcome(key: str, loss: float, step: int) -> Outcome:
    point = CurvePoint(step=step, tokens=step * 10, train_loss=loss, validation_loss=loss)
    return Outcome(key=key, state=State.COMPLETED, validation_loss=loss, curve=(point,), tokens=100, train_seconds=2.0, devices=2)


def study(folder: Path) -> None:
    (folder / "spec.yaml").write_text("name: s\nsampler: {name: nomad, defaults_first: true}\n")


def test_a_study_is_finished_when_its_budget_is_spent(tmp_path: Path) -> None:
    """By its record, whatever the times of its files: a copy has others."""
    (tmp_path / "spec.yaml").write_text("name: s\nbudget: {trials: 3, max_hours: 2.0}\n")
    with open_record(tmp_path) as record:
        record.trial(Trial(number=0, hyperparameters=HYPERPARAMETERS, params={}, state=COMPLETE, value=1.0))
        assert not read(tmp_path).budget_spent
        record.session({"number": 1, "seconds": 1.0})  # as an older loratune writes it
        assert not read(tmp_path).budget_spent
        (tmp_path / "best.yaml").write_text("trial: 0\n")
        assert read(tmp_path).budget_spent
        record.session({"number": 2, "seconds": 1.0, "spent": None})
        assert not read(tmp_path).budget_spent
        record.session({"number": 2, "seconds": 1.0, "spent": {"trials": 3, "max_hours": 2.0}})
        assert read(tmp_path).budget_spent
    (tmp_path / "spec.yaml").write_text("name: s\nbudget: {trials: 3, max_hours: 4.0}\n")
    assert not read(tmp_path).budget_spent
    (tmp_path / "spec.yaml").write_text("name: s\nbudget: {trials: 1, max_hours: 4.0}\n")
    assert read(tmp_path).budget_spent


def test_what_is_kept_is_read_back(tmp_path: Path) -> None:
    study(tmp_path)
    with open_record(tmp_path) as record:
        for trial, losses in enumerate([(1.5, 1.2), (1.4, 1.0)]):
            outcomes = tuple(outcome(segment(trial, stop).key, loss, stop) for stop, loss in zip((10, 30), losses, strict=True))
            for one in outcomes:
                record.keep(one)
            record.trial(
                Trial(
                    number=trial,
                    hyperparameters=HYPERPARAMETERS,
                    params={"lora_r": 16},
                    state=COMPLETE,
                    value=losses[-1],
                    outcomes=outcomes,
                )
            )
        assert record.outcome(segment(1, 30)) == outcome(segment(1, 30).key, 1.0, 30)
        assert record.outcome(segment(1, 20)) is None
    back = read(tmp_path)
    assert back.best is not None
    assert back.default is not None
    assert (back.best.number, back.best.value, back.default.value) == (1, 1.0, 1.2)
    assert back.best.hyperparameters == HYPERPARAMETERS
    assert [p.validation_loss for p in back.trials[1].curve] == [1.4, 1.0]
    assert back.device_seconds == 4 * 2.0 * 2
    assert back.tokens == 400


def test_a_curve_is_that_of_the_last_run(tmp_path: Path) -> None:
    study(tmp_path)
    outcomes = (outcome(segment(0, 10, "budget-1-3").key, 1.5, 10), outcome(segment(0, 30).key, 1.2, 30))
    trial = Trial(number=0, hyperparameters=HYPERPARAMETERS, params={}, outcomes=outcomes)
    assert [p.step for p in trial.curve] == [30]


def test_cancelled_segments_and_bad_input_are_not_final(tmp_path: Path) -> None:
    with open_record(tmp_path) as record:
        for state in (State.CANCELLED, State.BAD_INPUT):
            record.keep(Outcome(key=segment(0, 30).key, state=state))
        assert record.outcome(segment(0, 30)) is None
        record.keep(Outcome(key=segment(0, 30).key, state=State.DIVERGED, validation_loss=float("inf")))
        assert record.outcome(segment(0, 30)) == Outcome(key=segment(0, 30).key, state=State.DIVERGED, validation_loss=float("inf"))


def test_values_that_json_lacks_survive(tmp_path: Path) -> None:
    study(tmp_path)
    with open_record(tmp_path) as record:
        record.trial(Trial(number=0, hyperparameters=HYPERPARAMETERS, params={}, state=DIVERGED, value=float("inf")))
    assert read(tmp_path).trials[0].value == float("inf")


def test_common_practice_is_the_best_trial_with_its_settings(tmp_path: Path) -> None:
    study(tmp_path)
    usual = replace(HYPERPARAMETERS, lora_r=16, lora_alpha=32, learning_rate=2e-4)
    trials = [
        (HYPERPARAMETERS, COMPLETE, 0.5),
        (usual, COMPLETE, 1.2),
        (replace(usual, lora_dropout=0.1), COMPLETE, 1.1),
        (replace(usual, lora_r=8), COMPLETE, 0.7),
        (replace(usual, batch_size=2), DIVERGED, float("inf")),
        (replace(usual, batch_size=4), PRUNED, 0.6),
    ]
    with open_record(tmp_path) as record:
        record.trial(Trial(number=9, hyperparameters=HYPERPARAMETERS, params={}, state=COMPLETE, value=0.4))
        assert common_practice(read(tmp_path)) is None
        for number, (hyperparameters, state, value) in enumerate(trials):
            record.trial(Trial(number=number, hyperparameters=hyperparameters, params={}, state=state, value=value))
    found = common_practice(read(tmp_path))
    assert found is not None
    assert (found.number, found.value) == (2, 1.1)


def test_two_writers_are_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    with open_record(tmp_path), pytest.raises(StorageError, match=f"being written by process {os.getpid()} on"), open_record(tmp_path):
        pass
    with open_record(tmp_path):
        pass  # free again


HOLD = """
import subprocess, sys, time
from pathlib import Path
from loratune.record import open_record
with open_record(Path(sys.argv[1])) as record:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)"], pass_fds=(record.lock,))
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_drivers_workers_are_waited_for(tmp_path: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert driver.stdout is not None
    assert driver.stdout.readline() == b"held\n"
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    began = time.monotonic()
    with open_record(tmp_path):
        assert time.monotonic() - began > 0.3, "the worker still had the lock"


def test_reading_needs_neither_lock_nor_optuna(tmp_path: Path) -> None:
    study(tmp_path)
    code = (
        "import sys; from pathlib import Path; from loratune.record import read; read(Path(sys.argv[1]));"
        "print(sorted({'optuna', 'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    with open_record(tmp_path):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_folder_that_is_no_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"is not a study's folder: it has no spec\.yaml"):
        read(tmp_path)


def test_a_write_that_fails_names_the_file_and_leaves_the_old_one(tmp_path: Path) -> None:
    from loratune.system.files import write_atomically

    target = tmp_path / "folder" / "file.json"
    write_atomically(target, "old")
    (tmp_path / "plain").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*plain/file.json"):
        write_atomically(tmp_path / "plain" / "file.json", "new")
    limit = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10));"
    )
    code = (
        limit
        + "from pathlib import Path; from loratune.system.files import write_atomically; write_atomically(Path(sys.argv[1]), 'x' * 100)"
    )
    # -B: Python would keep a module's first bytes as its compiled file, which the next process could not read.
    done = subprocess.run([sys.executable, "-B", "-c", code, str(target)], capture_output=True, text=True, check=False)
    assert "StorageError: cannot write" in done.stderr
    assert target.read_text() == "old"
    assert json.dumps(sorted(p.name for p in target.parent.iterdir())) == '["file.json"]', "no half-written file stays behind"


def test_the_front_of_a_study_with_several_objectives(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("objectives: [validation_loss, {name: tokens, direction: maximize}]\n")
    points = [(1.5, 10.0), (1.2, 5.0), (1.3, 4.0), (1.1, 1.0), (0.9, 99.0)]
    with open_record(tmp_path) as record:
        for number, values in enumerate(points):
            state = DIVERGED if number == 4 else COMPLETE
            record.trial(Trial(number=number, hyperparameters=HYPERPARAMETERS, params={}, state=state, value=values[0], values=values))
    back = read(tmp_path)
    assert back.objectives == {"validation_loss": "minimize", "tokens": "maximize"}
    assert [t.number for t in back.front] == [3, 1, 0]


def test_a_folder_from_before_there_were_objectives_is_read(tmp_path: Path) -> None:
    study(tmp_path)
    with open_record(tmp_path) as record:
        record.trial(Trial(number=0, hyperparameters=HYPERPARAMETERS, params={}, state=COMPLETE, value=1.0))
    path = tmp_path / "trials" / "0000" / "trial.json"
    old = json.loads(path.read_text())
    del old["values"]
    path.write_text(json.dumps(old))
    back = read(tmp_path)
    assert back.trials[0].values == ()
    assert back.objectives == {"validation_loss": "minimize"}
    assert [t.number for t in back.front] == [0]


def test_a_state_nobody_knows_is_a_damaged_file(tmp_path: Path) -> None:
    study(tmp_path)
    with open_record(tmp_path) as record:
        record.trial(Trial(number=0, hyperparameters=HYPERPARAMETERS, params={}, state=COMPLETE, value=1.0))
    path = tmp_path / "trials/0000/trial.json"
    path.write_text(path.read_text().replace('"complete"', '"completely"'))
    with pytest.raises(StorageError, match=r"trial\.json is damaged .*completely"):
        read(tmp_path)


def test_every_state_has_a_state_of_optuna() -> None:
    assert {state: state.optuna for state in TrialState} == {
        TrialState.COMPLETE: "COMPLETE",
        TrialState.RUNNING: "RUNNING",
        TrialState.PAUSED: "RUNNING",
        TrialState.PRUNED: "PRUNED",
        TrialState.FAILED: "FAIL",
        TrialState.DIVERGED: "COMPLETE",
        TrialState.INFEASIBLE: "COMPLETE",
    }
    assert [state for state in TrialState if not state.ended] == [TrialState.RUNNING, TrialState.PAUSED]


def test_no_other_file_spells_the_folders_names() -> None:
    package = Path(loratune.__file__).parent
    source = package / "record/paths.py"

    def texts(file: Path) -> set[str]:
        return {str(node.value) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}

    names = {text for text in texts(source) if re.fullmatch(r"[a-z_]+\.[a-z]+", text)}
    assert {"spec.yaml", "selection.json", "adapter_config.json", "log.txt"} <= names
    for file in package.rglob("*.py"):
        assert file == source or not texts(file) & names, f"{file} knows {texts(file) & names}"
