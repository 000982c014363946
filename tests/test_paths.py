"""Every public function that takes a path takes a text and a pathlib.Path alike."""

import threading
from pathlib import Path

import pytest

import loratune
from loratune import demo, preference, selection
from loratune.record import open_record
from loratune.record.adapters import find_adapter
from loratune.spec import StudySpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of the embedded model: two trials of a step each."""
    home = tmp_path_factory.mktemp("paths")
    base = demo.study()
    given = {
        **base,
        "model": {"name_or_path": demo.model_folder()},  # Paths, where a YAML file has texts
        "data": {"train": [{"path": demo.data_files()[0]}], "train_count": 8, "validation_count": 8, "max_length": 64},
        "training": {**base["training"], "validations": 1},
        "sampler": {"name": "random"},
        "budget": {"trials": 2},
        "executor": {"name": "inline", "workers": 1},
        "output": home / "study",
    }
    spec = StudySpec.load(None, (), given)
    assert spec.output.folder == str(home / "study")
    assert spec.model.name_or_path == str(demo.model_folder())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORATUNE_CACHE", str(home / "cache"))
        list(loratune.tune(spec))
    return home / "study"


KINDS = pytest.mark.parametrize("kind", [str, Path])


@KINDS
def test_reading_and_the_report(folder: Path, tmp_path: Path, kind: type) -> None:
    record = loratune.read(kind(folder))
    assert record.folder == folder
    assert len(record.trials) == 2
    assert loratune.write_report([record], kind(tmp_path / "report.html")) == tmp_path / "report.html"
    delivery = loratune.deliver(kind(folder))
    assert delivery.report == folder / "report.html"
    assert delivery.adapter == folder / "adapter"
    assert loratune.export(kind(folder), kind(tmp_path / "out")) == tmp_path / "out"
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert preference.find_comparisons(kind(folder)) == []
    with open_record(kind(folder)) as held:
        assert held.folder == folder


@KINDS
def test_selecting(folder: Path, kind: type) -> None:
    (*_, last) = loratune.select(kind(folder), rerun=False)
    assert isinstance(last, selection.Selected)
    made = selection.read_selection(kind(folder))
    assert made is not None
    assert made.chosen == last.record.chosen
    assert find_adapter(loratune.read(kind(folder)), made.trial_of(loratune.read(folder))) is not None


@KINDS
def test_evaluating(folder: Path, tmp_path: Path, kind: type) -> None:
    stop = threading.Event()
    for event in loratune.evaluate(
        kind(folder), benchmarks=["demo_choice"], subset=4, data=kind(tmp_path), tasks=kind(tmp_path), stop=stop
    ):
        assert event
        stop.set()  # that it begins is enough: what it reads are the same two paths


@KINDS
def test_a_description_in_a_file(folder: Path, tmp_path: Path, kind: type) -> None:
    assert StudySpec.load(kind(folder / "spec.yaml")).folder == folder
