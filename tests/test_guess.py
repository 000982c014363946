"""The first guess: from a model's config and the rows of the data, sharpened by earlier studies, as the defaults of a space."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_study import Formula, events, spec_of

from loratune import demo
from loratune.cli import main
from loratune.errors import StorageError
from loratune.record import read
from loratune.samplers.prior import Facts, effective, learning_rate, public_findings, recommend
from loratune.spec import StudySpec
from loratune.study.guess import Guess, facts_of, guess, prior_of, with_guess


def study_of(model: str = "m", **more: Any) -> StudySpec:
    train, validation = demo.data_files()
    return StudySpec.load(base={"model": model, "data": {"train": [str(train)], "validation": [str(validation)]}, **more})


def test_every_finding_names_its_source() -> None:
    for name, finding in public_findings().items():
        parts = [part for part in finding.values() if isinstance(part, dict)] if name == "questions" else [finding]
        assert all(isinstance(part, str) or part["source"] for part in parts), name


def test_the_reference_and_what_moves_it() -> None:
    llama = recommend(Facts(hidden_size=4096, examples=53_610))
    assert (llama.values["learning_rate"], llama.values["lora_r"], llama.values["lora_alpha"]) == (4e-4, 128, 64)
    assert not llama.prior.outside
    tiny = recommend(Facts(hidden_size=96, examples=53_610))
    assert tiny.prior.outside
    assert tiny.prior.sd > 0.6
    assert tiny.values["lora_r"] == 64
    assert tiny.values["alpha_ratio"] == 2.0, "a higher scale outside the findings"
    assert tiny.values["lora_alpha"] == 128.0
    assert tiny.values["learning_rate"] > 4e-4
    few, many = (recommend(Facts(hidden_size=4096, examples=n)).values["learning_rate"] for n in (5_000, 300_000))
    assert few > 4e-4 > many
    assert recommend(Facts(examples=900)).values["batch_size"] == 8
    bounded = recommend(Facts(hidden_size=4096, memory=24 * 2**30, parameters_per_rank=2_500_000))
    assert bounded.values["lora_r"] == 64
    assert {"learning_rate", "lora_r", "batch_size", "target_modules", "epochs", "warmup_ratio"} <= llama.reasons.keys()


@pytest.mark.parametrize(
    ("examples", "batch", "share", "told"),
    [
        (53_610, 128, 0.03, "25 of about 838 steps"),
        (900, 8, 0.03, "7 of about 225 steps"),
        (200, 4, 0.05, "5 of about 100 steps"),
        (60, 4, 0.1, "3 of about 30 steps"),
        (3, 4, 0.1, "1 of about 2 steps"),
    ],
)
def test_the_warmup_follows_from_the_steps_and_few_of_them_are_told(examples: int, batch: int, share: float, told: str) -> None:
    found = recommend(Facts(hidden_size=4096, examples=examples))
    assert (found.values["batch_size"], found.values["warmup_ratio"]) == (batch, share)
    assert found.reasons["warmup_ratio"].startswith(told)
    few = [note for note in found.notes if "optimiser steps, fewer than 50" in note]
    assert bool(few) == (examples <= 60)
    assert recommend(Facts(hidden_size=4096)).values["warmup_ratio"] == 0.03, "data that were not counted"


def test_a_study_keeps_its_warmup() -> None:
    """Results recorded so far depend on it: the recommendation is told, not taken."""
    spec = study_of(str(demo.model_folder()))
    made = guess(spec)
    assert with_guess(spec, made.recommendation).training.warmup_ratio == 0.03
    assert "warmup_ratio" not in with_guess(spec, made.recommendation).search_space.parameters


@pytest.mark.parametrize("facts", [Facts(hidden_size=96, examples=900), Facts(hidden_size=4096, examples=53_610, memory=2**34)])
def test_the_factors_of_the_reason_multiply_to_the_learning_rate(facts: Facts) -> None:
    found = recommend(replace(facts, parameters_per_rank=2_500_000))
    first, *factors = found.reasons["learning_rate"].split("; times ")
    product = float(first.split()[0]) * math.prod(float(factor.split()[0].rstrip(",")) for factor in factors)
    assert product == pytest.approx(found.values["learning_rate"], rel=0.1)


def test_the_memory_of_the_gpu_bounds_the_rank_of_a_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    (model / "config.json").write_text(json.dumps({"model_type": "llama", **shape}))
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '81559\\n24576\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    spec = study_of(str(model))
    assert with_guess(spec, guess(spec).recommendation).search_space.default_values()["lora_r"] == 64, "by the smaller GPU's 24 GiB"
    assert guess(spec, memory=80 * 2**30).recommendation.values["lora_r"] == 128
    assert guess(study_of(str(model), executor={"device": "cpu"})).recommendation.values["lora_r"] == 128


def test_tokens_are_counted_by_the_models_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path))
    from loratune.data.cache import prepare_data

    spec = study_of(str(demo.model_folder()), data={"train": [str(demo.data_files()[0])], "validation_fraction": 0.1, "prompt": "alpaca"})
    told = facts_of(spec).tokens
    assert told == pytest.approx(float(prepare_data(spec, []).train.lengths.mean()), rel=0.1)  # of a sample


def test_facts_are_read_from_the_files() -> None:
    facts = facts_of(study_of(str(demo.model_folder())))
    assert (facts.family, facts.hidden_size, facts.parameters, facts.examples) == ("llama", 96, 538_464, 2000)
    assert facts.parameters_per_rank == 4 * (2 * (96 + 96) * 2 + 3 * (96 + 256))
    unknown = guess(study_of("no/such-model")).recommendation
    assert any("width is not known" in note for note in unknown.notes)


@pytest.mark.parametrize("preset", ["recommended", "published", "ratio"])
def test_the_defaults_that_nobody_wrote_follow_it(preset: str) -> None:
    spec = study_of(str(demo.model_folder()), sampler="bracket", search_space=preset)
    made = guess(spec).recommendation
    h = (filled := with_guess(spec, made)).hyperparameters(filled.search_space.default_values())
    assert h.lora_r == 64
    assert effective(h.learning_rate, h.lora_alpha / h.lora_r, h.lora_r) == pytest.approx(
        min(made.prior.centre, effective(1e-3, 1.0, 64) if preset == "published" else math.inf), abs=0.03
    )
    assert filled.search_space.to_fill is False
    assert StudySpec.model_validate(filled.model_dump(mode="json")).search_space.default_values() == filled.search_space.default_values()


def test_a_default_that_was_written_stays_and_far_away_it_is_an_extrapolation() -> None:
    space = {"learning_rate": {"low": 1e-6, "high": 1e-1, "log": True, "default": 1e-5}, "lora_r": [4, 32]}
    spec = study_of(str(demo.model_folder()), sampler="bracket", search_space=space)
    filled = with_guess(spec, made := guess(spec).recommendation)
    assert filled.search_space.default_values() == {"learning_rate": 1e-5, "lora_r": 32}
    assert prior_of(filled, made).outside


def test_other_samplers_keep_the_defaults_as_written() -> None:
    spec = study_of(sampler="nomad")
    assert not spec.search_space.to_fill
    assert study_of(sampler="tpe", search_space="recommended").search_space.to_fill


def test_a_guess_is_written_and_read_back() -> None:
    made = guess(study_of(str(demo.model_folder())))
    assert Guess.from_json(made.to_json()) == made


def test_earlier_studies_sharpen_it(tmp_path: Path) -> None:
    earlier = spec_of(tmp_path / "earlier", "random", trials=40)
    list(events(earlier, Formula(1, seed=1)))
    best = read(earlier.folder).best
    assert best is not None
    plain = guess(study_of()).recommendation
    warm = guess(study_of(sampler={"name": "bracket", "warm_start": [str(earlier.folder)]})).recommendation
    there = effective(
        best.hyperparameters.learning_rate, best.hyperparameters.lora_alpha / best.hyperparameters.lora_r, best.hyperparameters.lora_r
    )
    assert abs(warm.prior.centre - there) < abs(plain.prior.centre - there)
    assert warm.prior.sd < plain.prior.sd
    assert str(earlier.folder) in warm.notes[-1]
    assert warm.values["learning_rate"] == pytest.approx(learning_rate(warm.prior.centre, 0.5, 128), rel=0.05)
    with pytest.raises(StorageError, match=r"warm_start: .*nowhere is not a study's folder"):
        guess(study_of(sampler={"name": "bracket", "warm_start": [str(tmp_path / "nowhere")]}))


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    train, validation = map(str, demo.data_files())
    assert main(["recommend", "--model", str(demo.model_folder()), "--data", train, "--validation", validation]) == 0
    shown = capsys.readouterr().out
    assert "learning rate" in shown
    assert "96 wide" in shown
    assert main(["recommend", "--demo", "--json", "--memory", "24"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["outside"] is True
    assert told["recommended"]["lora_r"] == 64
    assert told["facts"]["examples"] == 800


def test_the_command_is_light() -> None:
    code = (
        "import sys; from loratune.cli import main; main(['recommend', '--demo', '--json'])\n"
        "print([m for m in ('torch', 'transformers', 'optuna', 'scipy', 'datasets') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        ("dat.jsonl", None, "no such file or folder. Did you mean data.jsonl?"),
        ("nowhere/data.jsonl", None, "the folder {0}/nowhere does not exist either"),
        ("folder", None, "the folder holds no data files"),
        ("data.txt", "words", "unknown kind of file"),
        ("empty.json", "", "the file is empty"),
        ("other.jsonl", '{"a": 1}\n', "no usable row"),
        ("folder/inside.json", "[{", "not valid JSON"),
    ],
)
@pytest.mark.parametrize("also", [False, True])
def test_data_that_a_run_would_refuse_are_refused(
    path: str, text: str | None, said: str, also: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    good = tmp_path / "data.jsonl"
    good.write_text('{"instruction": "a", "output": "b"}\n' * 20)
    if text is not None:
        (tmp_path / path).write_text(text)
    given = tmp_path / path if path != "folder/inside.json" else tmp_path / "folder"
    data = ["--data", str(good), "--validation", str(given)] if also else ["--data", str(given)]
    code = main(["recommend", "--model", str(demo.model_folder()), *data, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (code, told["error"]["kind"]) == (3, "DataError")
    assert said.format(tmp_path) in told["error"]["message"]
    assert "recommended" not in told


def test_data_on_the_hub_have_no_part_in_it_and_a_note_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 30)
    model = ["--model", str(demo.model_folder())]
    assert main(["recommend", *model, "--data", "owner/data", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["facts"]["examples"] is None
    assert "data not counted: they are on the Hugging Face hub" in told["notes"][-1]
    assert main(["recommend", *model, "--data", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["examples"] == 27, "a folder of files is counted"
