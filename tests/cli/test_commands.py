"""The small commands, on a real finished study."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from loratune.record import read


def test_init_writes_a_description_that_loads(loratune, tmp_path: Path) -> None:
    from loratune.spec import StudySpec

    answer = loratune("init", tmp_path / "a.yaml", "--model", "some/model", "--data", "my: data.json")
    assert answer.code == 0
    assert f"loratune run {tmp_path / 'a.yaml'} --dry-run" in answer.out
    spec = StudySpec.load(tmp_path / "a.yaml")
    assert (spec.model.name_or_path, spec.data.train[0].path) == ("some/model", "my: data.json")


def test_init_never_overwrites_unless_forced(loratune, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("mine")
    answer = loratune("init", path)
    assert (answer.code, path.read_text()) == (5, "mine")
    assert f"{path} exists" in answer.err
    assert loratune("init", path, "--force").code == 0
    assert path.read_text() != "mine"


def test_schema_is_the_schema(loratune) -> None:
    schema = json.loads(loratune("schema").out)
    assert schema["properties"]["training"]
    assert {"model", "data"} <= set(schema["required"])


def test_status_of_a_finished_study(loratune, done) -> None:
    home, _ = done
    record = read(home / "study")
    answer = loratune("status", home / "study")
    assert answer.code == 0
    assert "finished" in answer.out.splitlines()[0]
    assert "3 of 3 trials begun: 3 complete" in answer.out
    assert record.best is not None
    assert f"best, trial {record.best.number}" in answer.out
    assert f"base model, untuned  {record.base_loss:.4f}" in answer.out


def test_status_as_json(loratune, done) -> None:
    home, _ = done
    record = read(home / "study")
    facts = json.loads(loratune("status", home / "study", "--json").out)
    assert record.best is not None
    assert facts["best"]["value"] == record.best.value
    assert facts["default"]["trial"] == 0
    assert facts["trials"] == {"complete": 3}
    assert (facts["running"], facts["finished"], facts["base_loss"]) == (False, True, record.base_loss)
    assert facts["device_seconds"] == record.device_seconds > 0


def test_status_and_report_tell_which_node_trained_what(loratune, done, tmp_path: Path) -> None:
    home, _ = done
    study = tmp_path / "study"
    shutil.copytree(home / "study", study)
    assert json.loads(loratune("status", study, "--json").out)["by_node"] == []
    assert "attempts lost" not in loratune("status", study).out
    seconds = dict.fromkeys(("big/0123", "spot/89ab"), 0.0)
    for trial, node, lost in ((0, "big/0123", []), (1, "spot/89ab", ["gone/4567", "big/0123"]), (2, "big/0123", ["gone/4567"])):
        (path,) = (study / "trials" / f"{trial:04d}").glob("*/outcomes/*.json")
        outcome = json.loads(path.read_text())
        seconds[node] += outcome["train_seconds"] + outcome["validation_seconds"]
        path.write_text(json.dumps(outcome | {"node": node, "lost": lost}))
    by_node = json.loads(loratune("status", study, "--json").out)["by_node"]
    assert [(share["node"], share["trials"], share["lost"]) for share in by_node] == [
        ("big/0123", [0, 2], 1),
        ("gone/4567", [], 2),
        ("spot/89ab", [1], 0),
    ]
    assert {share["node"]: share["device_seconds"] for share in by_node} == pytest.approx(seconds | {"gone/4567": 0.0})
    rows = [line.split() for line in loratune("status", study).out.splitlines() if "/0123" in line or "/4567" in line]
    assert [(row[0], row[1], row[-1]) for row in rows] == [("big/0123", "2", "1"), ("gone/4567", "0", "2")]
    from loratune.cli.trial_lines import result
    from loratune.report import write_report

    assert "device-seconds on 3 nodes (3 attempts lost to nodes that went)" in result(read(study))[-1]
    page = write_report([read(study)], tmp_path / "report.html").read_text()
    assert "spot/89ab" in page
    assert "attempts lost" in page


def test_status_sees_the_lock_of_a_running_study(loratune, done) -> None:
    home, _ = done
    with open(home / "study" / "lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(lock.fileno())  # a heartbeat
        facts = json.loads(loratune("status", home / "study", "--json").out)
        assert facts["running"]
        assert "running (process" in loratune("status", home / "study").out
    assert not json.loads(loratune("status", home / "study", "--json").out)["running"]


def test_status_takes_the_newest_study(loratune, done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, _ = done
    (tmp_path / "runs" / "older").mkdir(parents=True)
    (tmp_path / "runs" / "older" / "spec.yaml").write_text("name: older\n")
    os.utime(tmp_path / "runs" / "older" / "spec.yaml", (1, 1))
    (tmp_path / "runs" / "newer").symlink_to(home / "study")
    monkeypatch.chdir(tmp_path)
    assert json.loads(loratune("status", "--json").out)["folder"] == "runs/newer"


def test_status_of_a_study_that_has_only_begun(loratune, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("name: young\nbudget: {trials: 4}\n")
    answer = loratune("status", tmp_path)
    assert answer.code == 0
    assert f"young  stopped; to continue: loratune run {tmp_path}" in answer.out
    assert "0 of 4 trials begun: none yet" in answer.out


def test_report_of_one_and_of_several(loratune, done, tmp_path: Path) -> None:
    home, _ = done
    one = tmp_path / "one.html"
    assert loratune("report", home / "study", "--output", one).out == f"{one}\n"
    assert "<html" in one.read_text()
    several = tmp_path / "two.html"
    assert loratune("report", home / "study", home / "study", "--output", several).code == 0
    assert "<html" in several.read_text()


def test_export_copies_the_best_adapter(loratune, done, tmp_path: Path) -> None:
    home, _ = done
    best = read(home / "study").best
    assert best is not None
    target = tmp_path / "deep" / "adapter"
    assert loratune("export", home / "study", target).out == f"{target}\n"
    trained = home / "study" / "trials" / f"{best.number:04d}" / "main" / "adapter"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (target / name).read_bytes() == (trained / name).read_bytes()
    assert f"{best.value:.4f}" in (target / "README.md").read_text()
    assert [path.name for path in target.parent.iterdir()] == ["adapter"]


def test_export_of_the_default_trial(loratune, done, tmp_path: Path) -> None:
    home, _ = done
    assert loratune("export", home / "study", tmp_path / "zero", "--trial", 0).code == 0
    assert json.loads((tmp_path / "zero" / "adapter_config.json").read_text())["r"] == read(home / "study").trials[0].hyperparameters.lora_r


def test_exported_merged_model_gives_the_validation_loss_of_its_trial(loratune, done, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from loratune.data.prepared import Prepared

    home, _ = done
    assert loratune("export", home / "study", tmp_path / "merged", "--merged").code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    validation = Prepared.load(json.loads((home / "study" / "recipe.json").read_text())["data"]).validation
    total, tokens = 0.0, 0
    for index in range(len(validation)):
        ids, mask = (torch.tensor(array) for array in validation[index])
        with torch.no_grad():
            logits = model(ids[None].long()).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, ids[1:].long(), reduction="none")
        total, tokens = total + float(losses[mask[1:]].sum()), tokens + int(mask[1:].sum())
    assert total / tokens == pytest.approx(read(home / "study").best.value, abs=1e-4)


def test_doctor_finds_this_machine_sound(loratune) -> None:
    answer = loratune("doctor")
    assert answer.code == 0, answer.out
    lines = {line[9:].split("  ")[0].strip(): line for line in answer.out.splitlines() if line}
    for what in ("python", "torch", "transformers", "peft", "optuna", "PyNomadBBO", "LoRA step", "NOMAD", "disk", "processor"):
        assert lines[what].startswith("ok"), answer.out


def test_doctor_says_what_is_missing_and_what_mends_it(loratune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PyNomad", None)  # as if not installed
    from loratune.cli import doctor

    for slow in ("lora_step", "nomad"):
        monkeypatch.setattr(doctor, slow, lambda report: None)
    answer = loratune("doctor")
    assert answer.code == 1
    assert "missing  PyNomadBBO" in answer.out
    assert "fix with: pip install --upgrade PyNomadBBO" in answer.out


def test_doctor_tells_what_it_is_doing_before_it_does_it() -> None:
    """Read line by line from a pipe: what is being imported is told before its import ends, on a machine where it takes a minute."""
    code = """
import sys, time
from loratune.cli import doctor, main
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "slow_package":
            input()  # the import goes on when the test says so
sys.meta_path.insert(0, Finder())
doctor._NEEDED, doctor._OPTIONAL = {"slow_package": "slow_package"}, {}
for name in ("devices", "lora_step", "nomad"):
    setattr(doctor, name, lambda report: None)
main(["doctor"])
"""
    started = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdin is not None
    assert started.stdout.readline().startswith("ok       python ")
    assert started.stdout.readline() == "...      slow_package   importing\n"
    assert started.poll() is None
    started.stdin.write("\n")
    started.stdin.flush()
    assert started.stdout.readline().startswith("missing  slow_package   not installed; fix with: pip install")
    started.communicate(timeout=60)


def test_the_description_kept_in_a_study_is_complete(done) -> None:
    home, _ = done
    kept = yaml.safe_load((home / "study" / "spec.yaml").read_text())
    assert kept["training"]["adam_beta2"] == 0.999
