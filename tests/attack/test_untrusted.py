"""A study's folder from somebody else: none of its code runs unasked, nothing in it is taken for an adapter that is none."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from loratune import demo
from loratune.cli import main
from loratune.delivery.model_card import _fenced

CODE = """from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig as C, LlamaForCausalLM as M
class C(C):
    model_type = "evil"
class M(M):
    config_class = C
"""


@pytest.fixture
def received(finished: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(a copy of the study whose model brings code along and which says that this may run, the file that the code makes)."""
    study, model, mark = tmp_path / "study", tmp_path / "model", tmp_path / "code-ran"
    shutil.copytree(finished, study)
    shutil.copytree(demo.model_folder(), model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(CODE.format(mark=str(mark)))
    for path, read, write in ((study / "spec.yaml", yaml.safe_load, yaml.safe_dump), (study / "recipe.json", json.loads, json.dumps)):
        content = read(path.read_text())
        content["model"] |= {"name_or_path": str(model), "trust_remote_code": True}
        path.write_text(write(content))
    (study / "reloaded.json").unlink()  # what was checked with the other model
    return study, mark


COMMANDS = [
    ["evaluate", "STUDY", "--benchmarks", "demo_choice", "--subset", "8"],
    ["export", "STUDY", "STUDY.adapter"],
    ["export", "STUDY", "STUDY.merged", "--merged"],
    ["select", "STUDY", "--yes", "--finalists", "2"],
    ["compare", "tuned", "default", "--study", "STUDY", "--no-page", "--max-new-tokens", "2", "--out", "STUDY.compare"],
    ["run", "STUDY"],
    ["run", "STUDY", "--budget.trials", "4"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_code_of_a_received_folder_does_not_run(
    received: tuple[Path, Path], command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    study, mark = received
    code = main([word.replace("STUDY", str(study)) for word in command])
    said = capsys.readouterr().err
    assert not mark.exists()
    assert code == 4, said
    assert "trust" in said
    assert said.count("\n") == 1, said


def test_reading_a_received_folder_runs_nothing(received: tuple[Path, Path], tmp_path: Path) -> None:
    study, mark = received
    assert main(["status", str(study)]) == 0
    assert main(["report", str(study), "--output", str(tmp_path / "report.html")]) == 0
    assert not mark.exists()


@pytest.mark.slow
def test_the_users_own_consent_counts(received: tuple[Path, Path]) -> None:
    study, mark = received
    assert main(["evaluate", str(study), "--benchmarks", "demo_choice", "--subset", "8", "--trust-remote-code"]) == 0
    assert mark.exists()


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("kind", ["missing", "empty", "garbage", "pickle alone", "config is a link"])
def test_what_is_no_adapter_is_not_exported(finished: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    study, mark = tmp_path / "study", tmp_path / "unpickled"
    shutil.copytree(finished, study)
    trial = yaml.safe_load((study / "best.yaml").read_text())["trial"]
    adapter = study / "trials" / f"{trial:04d}" / "main" / "adapter"
    weights = adapter / "adapter_model.safetensors"
    shutil.rmtree(study / "adapter")
    weights.unlink()
    if kind == "empty":
        weights.touch()
    elif kind == "garbage":
        weights.write_bytes(bytes(range(256)) * 10)
    elif kind == "pickle alone":
        (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
        torch.save({"x": Bomb(mark)}, adapter / "adapter_model.bin")
    elif kind == "config is a link":
        shutil.copy(finished / "adapter" / weights.name, weights)
        (tmp_path / "secret.json").write_text('{"secret": "of the user"}')
        (adapter / "adapter_config.json").unlink()
        (adapter / "adapter_config.json").symlink_to(tmp_path / "secret.json")
    for options in ([], ["--merged"]):
        assert main(["export", str(study), str(tmp_path / "out"), *options]) in (4, 5)
        assert not (tmp_path / "out").exists()
        assert capsys.readouterr().err.startswith("loratune: ")
    assert not mark.exists()


def test_a_command_cannot_break_out_of_the_cards_fence() -> None:
    shown = _fenced("loratune run ```\n# heading\n````\n")
    assert shown.startswith("`````\n")
    assert shown.endswith("\n`````")
