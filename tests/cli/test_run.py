"""`loratune run`: what the flags mean, a study from start to end, stopping and going on."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from loratune.cli.parser import Parser
from loratune.cli.run import add_arguments, load_spec
from loratune.record import read


def parsed(*argv: str) -> argparse.Namespace:
    parser = Parser(prog="loratune run", fields=True)
    add_arguments(parser)
    return parser.parse_args(list(argv))


def spec_of(*argv: str):
    return load_spec(parsed(*argv))


def test_any_field_is_a_flag() -> None:
    spec = spec_of(
        "--model=m",
        "--data",
        "a.json",
        "--training.epochs",
        "3",
        "--training.batch-size=64",
        "--sampler",
        "tpe",
        "--budget.trials=30",
        "--data.train.0.format",
        "alpaca",
        "--search_space.lora_r",
        "[8, 16]",
        "--training.max_grad_norm",
        "null",
        "--data.validation_fraction",
        "0.2",
        "--seed",
        "7",
    )
    assert (spec.training.epochs, spec.training.batch_size, spec.sampler.name, spec.budget.trials) == (3, 64, "tpe", 30)
    assert (spec.data.train[0].path, spec.data.train[0].format) == ("a.json", "alpaca")
    assert spec.search_space.parameters["lora_r"].values == (8, 16)
    assert (spec.training.max_grad_norm, spec.data.validation_fraction, spec.seed) == (None, 0.2, 7)


def test_short_flags_and_repeated_data() -> None:
    spec = spec_of(
        "--model", "123", "--data", "a: b.json", "--data", "c#.json", "--validation", "v.json", "--output", "yes", "--trials", "5"
    )
    assert spec.model.name_or_path == "123"  # not YAML's number
    assert [source.path for source in spec.data.train] == ["a: b.json", "c#.json"]
    assert [source.path for source in spec.data.validation] == ["v.json"]
    assert (spec.output.folder, spec.budget.trials, spec.data.validation_fraction) == ("yes", 5, None)


def test_a_first_command_without_validation_holds_out_a_tenth_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert spec_of("--model", "m", "--data", "d").data.validation_fraction == 0.1
    assert capsys.readouterr().out.startswith("A tenth of the data is held out for validation")
    assert spec_of("--model", "m", "--data", "d", "--data.validation_count", "9").data.validation_fraction is None
    assert spec_of("--model", "m", "--data", "d", "--data.train.0.validation_count", "9").data.validation_fraction is None
    assert spec_of("--model", "m", "--data", "d", "--data.val_size", "0.3").data.validation_fraction == 0.3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("data", ["{train: [d]}", "d", "{train: {path: d}, max_length: 64}"])
def test_a_description_without_validation_holds_out_a_tenth_too(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(f"model: m\ndata: {data}\n")
    spec = spec_of(str(tmp_path / "a.yaml"))
    assert spec.data.validation_fraction == 0.1
    assert capsys.readouterr().out.startswith("A tenth of the data is held out for validation")
    (tmp_path / "b.yaml").write_text(spec.to_yaml())
    assert spec_of(str(tmp_path / "b.yaml")) == spec
    assert capsys.readouterr().out == "", "now it is written"
    assert spec_of(str(tmp_path / "a.yaml"), "--validation", "v").data.validation_fraction is None
    assert spec_of(str(tmp_path / "a.yaml"), "--data.validation_count", "5").data.validation_fraction is None


def test_flags_lie_over_the_file_and_both_over_the_demo(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("budget: {trials: 7}\nsampler: tpe\n")
    spec = spec_of(str(tmp_path / "a.yaml"), "--demo", "--sampler", "random")
    assert (spec.name, spec.budget.trials, spec.sampler.name) == ("demo", 7, "random")


def test_a_study_folder_is_its_own_description(done, tmp_path: Path) -> None:
    home, _ = done
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("spec.yaml", "lock"):
        (moved / name).write_text((home / "study" / name).read_text())
    spec = spec_of(str(moved), "--trials", "5")
    assert (spec.folder, spec.budget.trials) == (moved, 5)
    assert spec.training == spec_of(str(home / "study")).training


def test_a_study_from_start_to_end(done) -> None:
    home, printed = done
    record = read(home / "study")
    lines = printed.splitlines()
    assert lines[0] == f"Study {record.name} in {home / 'study'}: 3 trials by nomad"
    assert record.best is not None
    assert record.default is not None
    for trial in record.trials:
        assert len([line for line in lines if f"trial {trial.number} begins: " in line]) == 1
        assert len([line for line in lines if f"trial {trial.number}: validation loss {trial.value:.4f}" in line]) == 1
    assert any(line.startswith(f"  best, trial {record.best.number}") and f"{record.best.value:.4f}" in line for line in lines)
    assert any(line.startswith("  base model, untuned") and line.endswith(f"{record.base_loss:.4f}") for line in lines)
    assert lines[-3:] == [
        f"Settings: {home / 'study' / 'best.yaml'}",
        f"Report:   {home / 'study' / 'report.html'}",
        f"Adapter:  {home / 'study' / 'adapter'}",
    ]
    assert (home / "study" / "adapter" / "adapter_model.safetensors").is_file()
    assert yaml.safe_load((home / "study" / "best.yaml").read_text())["trial"] == record.best.number


def test_dry_run_tells_costs_and_leaves_nothing(loratune, done, tmp_path: Path) -> None:
    home, _ = done
    answer = loratune("run", home / "spec.yaml", "--output", tmp_path / "study", "--dry-run", "--trials", 40)
    assert answer.code == 0, answer.err
    manifest = read(home / "study").manifest
    assert "one trial     3 steps, " in answer.out
    assert f"41 validations of {manifest['validation']['tokens']:,} tokens" in answer.out
    assert re.search(r"^time +.* per trial; .* in all, [\d.]+ device-(seconds|hours)$", answer.out, re.MULTILINE)
    assert re.search(r"^memory +[\d.]+ [MG]iB at its peak, per device, at rank 4$", answer.out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []
    stages = [line for line in answer.out.splitlines() if line.endswith(" ...")]
    assert [line.split()[0] for line in stages] == ["First", "Loading", "Reading", "Measuring:"]
    assert re.search(r"^  roughly +\d.* on these processors, at \d+ GFLOP/s", answer.out, re.MULTILINE)
    assert answer.out.index("roughly") < answer.out.index("Loading the libraries")


def test_the_first_estimate_needs_neither_torch_nor_a_tokenizer(tmp_path: Path) -> None:
    """It must be there within seconds, and those take a minute to import on some machines."""
    rows = [{"instruction": "x" * 320, "output": "y" * 40} for _ in range(100)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"torch_dtype": "float16"}')
    (model / "model.safetensors").write_bytes(bytes(2_000_000))
    code = f"""
import sys
from loratune.cli.dry_run import first_estimate
from loratune.spec import StudySpec
data = {{"train": [{str(tmp_path / "data.json")!r}], "validation_fraction": 0.2}}
spec = StudySpec.load(None, [], {{"model": {str(model)!r}, "data": data, "budget": {{"trials": 10}},
    "training": {{"epochs": 2, "batch_size": 8, "validations": 1}}, "executor": {{"device": "cpu"}}}})
print("\\n".join(first_estimate(spec)))
print(sorted({{"torch", "transformers", "datasets", "peft"}} & set(sys.modules)))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    # 360 characters, and 144 of Alpaca's prompt around them, are 126 tokens with the end; 80 examples in batches of 8, twice, are 20 steps.
    assert said[0] == "data          80 training and 20 validation examples of about 126 tokens"
    assert said[1] == "work          10 full runs of about 20 steps; about 201 k training tokens"
    assert said[2] == "model         1 M weights"
    assert said[-1] == "[]"


def test_the_weights_of_the_first_estimate_are_those_that_the_files_list(tmp_path: Path) -> None:
    from loratune.finetune.on_disk import weight_count

    for dtype in (torch.float32, torch.bfloat16):  # whatever the configuration says that they are loaded as
        save_file({"a": torch.ones(30, 7, dtype=dtype), "b": torch.ones(5, dtype=dtype)}, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text('{"dtype": "float32"}')
        assert weight_count(str(tmp_path), None) == 215


def test_the_demo_has_a_budget_of_its_own_unless_one_is_said(tmp_path: Path) -> None:
    assert spec_of("--demo").budget.full_runs == 4
    asked = spec_of("--demo", "--sampler", "nomad", "--trials", "20")
    assert (asked.sampler.name, asked.budget.trials, asked.budget.full_runs) == ("nomad", 20, None)
    assert spec_of("--demo", "--trials", "5").budget.full_runs is None


def test_a_stage_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from loratune.cli import dry_run

    monkeypatch.setattr(dry_run, "_STILL", 0.1)
    with dry_run._stage("Thinking"):
        time.sleep(0.35)
    assert capsys.readouterr().out.startswith("Thinking ...\n  still running, ")


def test_dry_run_refuses_what_cannot_be_trained(loratune, done, tmp_path: Path) -> None:
    home, _ = done
    answer = loratune("run", home / "spec.yaml", "--output", tmp_path / "study", "--dry-run", "--training.target_modules", "[q_prj]")
    assert answer.code == 4
    assert "no linear layers for 'q_prj'; did you mean 'q_proj'?" in answer.err
    assert "Measuring" not in answer.out


def test_stopped_and_continued_is_the_same_study(loratune, done, tmp_path: Path) -> None:
    """A study interrupted by SIGINT in mid-trial ends, after the command is repeated, with the values of the uninterrupted one."""
    home, _ = done
    folder = tmp_path / "study"
    argv = ["run", str(home / "spec.yaml"), "--output", str(folder)]
    started = subprocess.Popen(
        [sys.executable, "-c", "import sys; from loratune.cli import main; sys.exit(main())", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not list(folder.glob("trials/0000/*/outcomes/*.json")):
            assert started.poll() is None, started.stderr and started.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(started.pid, signal.SIGINT)
        out, err = started.communicate(timeout=100)
    finally:
        started.kill()
    assert "Traceback" not in err
    if started.returncode == 0:
        pytest.fail("the study was over before the interrupt came")
    assert started.returncode == 130
    assert out.splitlines()[-1] == f"Stopped; nothing is lost. To continue: loratune {' '.join(argv)}"
    assert "Stopping after the running steps. Press Ctrl-C again to stop at once." in out
    facts = json.loads(loratune("status", folder, "--json").out)
    assert not facts["running"]
    assert not facts["finished"]

    first = next(folder.glob("trials/0000/main/outcomes/*.json"))
    written = first.stat().st_mtime_ns
    again = loratune(*argv)
    assert again.code == 0, again.err
    assert again.out.startswith("Continuing study")
    assert "of an earlier start; best so far: trial " in again.out  # trial 0, or a later one that was quick enough
    assert "trial 0 begins" not in again.out
    assert first.stat().st_mtime_ns == written  # not trained twice
    whole, resumed = read(home / "study"), read(folder)
    assert [(t.params, t.value) for t in resumed.trials] == [(t.params, t.value) for t in whole.trials]


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    code = """
import sys, time
from loratune.cli.interrupt import Interrupt
with Interrupt() as interrupt:
    print("ready", flush=True)
    time.sleep(60)
    time.sleep(60)
"""
    waiting = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "ready\n"
        waiting.send_signal(signal.SIGTERM)
        assert waiting.stdout.readline() == "Stopping after the running steps. Press Ctrl-C again to stop at once.\n"
        assert waiting.poll() is None
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(timeout=20) == 130
    finally:
        waiting.kill()
