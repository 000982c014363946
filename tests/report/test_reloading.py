"""A study's adapter is loaded as its user will load it before it is handed over: by `deliver`, by `export`, once for each content."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from loratune import demo
from loratune.delivery import export, hand_over, reload
from loratune.errors import ModelError
from loratune.record import read
from loratune.record.paths import StudyPaths
from loratune.spec import StudySpec
from loratune.study.driver import deliver, tune

ADAPTER, WEIGHTS = Path("trials/0000/main/adapter"), "adapter_model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of one trial, not yet handed over."""
    root = tmp_path_factory.mktemp("finished")
    given: dict[str, Any] = demo.study()
    given["model"]["revision"] = "v2-chat"  # a folder has none; what is told of it is the same
    given["data"] |= {"train_count": 16, "validation_count": 8}
    given["training"] |= {"epochs": 1, "batch_size": 8}
    given |= {"executor": {"name": "inline"}, "output": {"folder": str(root / "study")}, "budget": {"trials": 1}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORATUNE_CACHE", str(root / "cache"))
        list(tune(StudySpec.load(base=given)))
    return root / "study"


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "study")
    return tmp_path / "study"


def change(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def handed_over(study: Path) -> tuple[Path, Path | None]:
    """What `deliver` does but for the report, which takes as long as all the rest."""
    return hand_over(read(study), study)


def test_a_study_hands_over_what_it_measured(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delivery = deliver(study)
    assert delivery.adapter == study / "adapter"
    (found,) = json.loads(StudyPaths(study).reloaded.read_text()).values()
    assert found == pytest.approx(delivery.record.best.value, abs=1e-4)  # type: ignore[union-attr]

    def again(*_: object, **__: object) -> None:
        raise AssertionError("the same content is not checked twice")

    monkeypatch.setattr(reload, "check_adapter", again)
    assert export(study, tmp_path / "out") == tmp_path / "out"
    handed_over(study)


def test_the_base_model_is_named_with_its_revision(study: Path, tmp_path: Path) -> None:
    described, _ = handed_over(study)
    out = export(study, tmp_path / "out")
    for folder in (study / "adapter", out):
        assert json.loads((folder / "adapter_config.json").read_text())["revision"] == "v2-chat"
        assert "v2-chat" in (folder / "README.md").read_text()
        assert 'AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder", dtype="float32")' in (folder / "README.md").read_text()
    best = yaml.safe_load(described.read_text())
    assert best["base_model_revision"] == "v2-chat"
    assert best["load"] == 'peft.AutoPeftModelForCausalLM.from_pretrained("adapter", dtype="float32")'
    merged = export(study, tmp_path / "merged", merged=True)
    assert "v2-chat" in (merged / "README.md").read_text()
    assert not (merged / "adapter_config.json").exists()


def test_the_base_is_loaded_by_its_revision(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoPeftModelForCausalLM, which the card recommends, asks for the same base as training did."""
    import peft
    import transformers

    handed_over(study)
    asked = []
    real = transformers.AutoModelForCausalLM.from_pretrained

    def listening(name: str, **options: Any) -> Any:
        asked.append(options.get("revision"))
        return real(name, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", listening)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(str(study / "adapter"), dtype="float32")
    assert asked == ["v2-chat"]
    assert next(model.parameters()).dtype == torch.float32


def test_another_adapter_is_not_handed_over(study: Path, tmp_path: Path) -> None:
    change(study / ADAPTER)
    with pytest.raises(ModelError, match="not the file that training wrote"):
        deliver(study)
    assert (study / "report.html").is_file()
    assert not (study / "adapter").exists()
    assert not (study / "best.yaml").exists()
    for merged in (False, True):
        with pytest.raises(ModelError, match="It was not handed over"):
            export(study, tmp_path / "out", merged=merged)
    assert not (tmp_path / "out").exists()
    assert not StudyPaths(study).reloaded.exists()


def test_the_loss_tells_where_no_digest_does(study: Path) -> None:
    """As in a study of before there were digests."""
    (study / ADAPTER.with_name("adapter.sha256")).unlink()
    change(study / ADAPTER)
    with pytest.raises(ModelError, match=r"its loss is .* in plain PEFT, and .* by the record"):
        handed_over(study)


def test_the_prepared_data_may_be_gone(study: Path, tmp_path: Path) -> None:
    recipe = json.loads((study / "recipe.json").read_text())
    (study / "recipe.json").write_text(json.dumps(recipe | {"data": str(tmp_path / "gone")}))
    assert handed_over(study)[1] is not None
    (study / ADAPTER.with_name("adapter.sha256")).unlink()
    config = study / ADAPTER / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_rslora": false', '"use_rslora": true'))
    with pytest.raises(ModelError, match="of another scale"):
        handed_over(study)
