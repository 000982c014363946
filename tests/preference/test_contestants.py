"""What A and B may be, and what is said of what they cannot be."""

import json
from pathlib import Path

import pytest
import yaml

from loratune.errors import ModelError, StorageError
from loratune.preference.contestants import Tuned, base_of, contestant_of
from loratune.record import COMPLETE, FAILED, StudyRecord, Trial, read
from loratune.work import Hyperparameters


def adapter(folder: Path, weights: bytes = b"w", base: str = "some/base") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


@pytest.fixture
def study(tmp_path: Path) -> StudyRecord:
    """Three trials: the default, the best, and a failed one."""
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "spec.yaml").write_text(yaml.safe_dump({"name": "s", "model": {"name_or_path": "some/base"}}))
    for number, (state, value) in enumerate(((COMPLETE, 2.0), (COMPLETE, 1.0), (FAILED, None))):
        own = folder / "trials" / f"{number:04d}"
        own.mkdir(parents=True)
        trial = Trial(number=number, hyperparameters=Hyperparameters(), params={}, state=state, value=value)
        (own / "trial.json").write_text(trial.to_json())
        if value:
            adapter(own / "main" / "adapter", str(number).encode())
    return read(folder)


def test_by_role_number_and_folder(study: StudyRecord, tmp_path: Path) -> None:
    tuned, default, base = (contestant_of(name, study) for name in ("tuned", "default", "base"))
    assert (tuned.label, tuned.name) == ("trial 1 (tuned)", "trial-1")
    assert (default.label, default.name) == ("trial 0 (default)", "trial-0")
    assert (base.label, base.adapter) == ("base model", None)
    assert contestant_of("trial:1", study).weights == tuned.weights != default.weights
    own = contestant_of(str(adapter(tmp_path / "my adapter")), None)
    assert own.name.startswith("my-adapter-")
    assert Path(str(own.adapter)).is_absolute()


def test_tuned_is_what_a_selection_chose(study: StudyRecord, tmp_path: Path) -> None:
    shipped = Tuned(trial=study.trials[0], adapter=adapter(tmp_path / "race-01"), run="race-01")
    tuned = contestant_of("tuned", study, shipped)
    assert (tuned.label, tuned.name, tuned.adapter) == ("trial 0 (tuned, race-01)", "trial-0-race-01", str(tmp_path / "race-01"))
    same = contestant_of("tuned", study, Tuned(trial=study.trials[0], adapter=adapter(tmp_path / "main")))
    assert (same.label, same.name) == ("trial 0 (tuned)", "trial-0")
    assert contestant_of("default", study, shipped).adapter != tuned.adapter, "the other names mean what they meant"
    assert contestant_of("tuned", study).label == "trial 1 (tuned)"


def test_what_is_not_there(study: StudyRecord, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no trial 9; its trials are 0 to 2"):
        contestant_of("trial:9", study)
    with pytest.raises(StorageError, match=r"trial 2 \(failed\) is not on disk; adapters there: 0, 1"):
        contestant_of("trial:2", study)
    with pytest.raises(StorageError, match="with --study"):
        contestant_of("tuned", None)
    with pytest.raises(ModelError, match="'tunde' is none of tuned, default, base, trial:NUMBER, and there is no such folder"):
        contestant_of("tunde", study)
    with pytest.raises(ModelError, match=r"has no adapter_config\.json and no adapter_model\.safetensors"):
        contestant_of(str(tmp_path), study)


def test_the_base_model_as_adapters_tell_it(tmp_path: Path) -> None:
    one = contestant_of(str(adapter(tmp_path / "one")), None)
    two = contestant_of(str(adapter(tmp_path / "two", base="other/base")), None)
    base = contestant_of("base", None)
    assert base_of(one, base).name_or_path == "some/base"
    for some in ((one, two), (base, base)):
        with pytest.raises(ModelError, match="which base model"):
            base_of(*some)
