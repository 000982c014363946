"""Which trial `loratune compare` takes for the tuned one, and that it says so."""

import json
from pathlib import Path

import pytest
import yaml

from loratune.cli.compare import _tuned
from loratune.errors import StorageError
from loratune.record import COMPLETE, StudyRecord, Trial, read
from loratune.selection import selected
from loratune.selection.selected import SelectionRecord, Shipped
from loratune.statistics import Interval
from loratune.work import Hyperparameters


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({}))
    (folder / "adapter_model.safetensors").write_bytes(b"w")
    return folder


@pytest.fixture
def study(tmp_path: Path) -> StudyRecord:
    """Two finished trials; trial 1 has the lower loss."""
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({"name": "s", "model": {"name_or_path": "some/base"}}))
    for number, value in enumerate((2.0, 1.0)):
        own = tmp_path / "trials" / f"{number:04d}"
        adapter(own / "main" / "adapter")
        trial = Trial(number=number, hyperparameters=Hyperparameters(), params={}, state=COMPLETE, value=value)
        (own / "trial.json").write_text(trial.to_json())
    return read(tmp_path)


def choose(study: StudyRecord, finished: int, run: str = "race-00") -> None:
    """A selection that chose trial 0 when `finished` trials were finished."""
    made = SelectionRecord(
        study="s",
        finished=finished,
        rule="",
        metrics=(),
        constraints=(),
        benchmarks=(),
        excluded=0,
        candidates=(),
        race=None,
        noise=Interval(0.1, 0.1, 0.1),
        noise_source="",
        lowest=1,
        chosen=0,
        share=1.0,
        runner_up=None,
        runner_up_share=0.0,
        why=(),
        what_would_change=(),
        unbiased=None,
        shipped=Shipped(run=run, seed=1, validation_loss=1.5, lowest_of=2),
        runs=0,
        tokens=0,
        device_seconds=0.0,
    )
    selected.write_selection(made, study.folder)


def test_the_selection_s_adapter_goes_first(study: StudyRecord, capsys: pytest.CaptureFixture[str]) -> None:
    choose(study, finished=2)
    with pytest.raises(StorageError, match="of trial 0, is not on disk; the command trains it again"):
        _tuned(study)
    raced = adapter(study.folder / "finalists" / "trials" / "0000" / "race-00" / "adapter")
    found = _tuned(study)
    assert found is not None
    assert (found.trial.number, found.adapter, found.run) == (0, raced, "race-00")
    told = "tuned is trial 0, which `loratune select` chose, trained with another seed (race-00): the adapter that is handed over\n"
    assert capsys.readouterr().out == told
    choose(study, finished=2, run="main")
    assert _tuned(study) is not None
    assert capsys.readouterr().out == "tuned is trial 0, which `loratune select` chose\n"


@pytest.mark.parametrize(("finished", "why"), [(None, "no selection was made"), (1, "the selection is out of date")])
def test_else_the_lowest_loss(study: StudyRecord, finished: int | None, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    if finished is not None:
        choose(study, finished)
    assert _tuned(study) is None
    assert capsys.readouterr().out == f"tuned is trial 1, the lowest validation loss ({why}: loratune select {study.folder})\n"
