"""`loratune evaluate` on a finished study of seconds."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def study(done: tuple[Path, str], tmp_path: Path) -> Path:
    shutil.copytree(done[0] / "study", tmp_path / "study")
    return tmp_path / "study"


def test_table_at_chance(loratune: Callable[..., Any], study: Path, shared_data: Path) -> None:
    """Models that tell stories cannot answer MMLU, and it is said so."""
    asked = ("evaluate", study, "--benchmarks", "mmlu_loglikelihood", "--data", shared_data, "--subset", 24)
    answer = loratune(*asked)
    assert answer.code == 0, answer.err
    assert "Adapter check: " in answer.out
    assert "default, trial 0" in answer.out
    assert "base model, untuned" in answer.out
    assert "No model is above chance (25.0 %; choosing the same for every item scores " in answer.out
    report = study / "report.html"
    assert f"Report: {report}" in answer.out
    assert "MMLU (log-likelihood)" in report.read_text()
    assert "Benchmark items in the training data (13 words in a row" in answer.out
    assert "MMLU (log-likelihood): none of 24 items found." in answer.out
    assert "none of 24 items found." in report.read_text()
    report.unlink()
    again = loratune(*asked)
    assert not report.exists()
    assert "Nothing to do: everything is already scored." in again.out
    assert again.out.partition("Scores in %")[2] in answer.out


def test_mistakes(loratune: Callable[..., Any], study: Path) -> None:
    for flags, said in (
        (("--benchmarks", "mmul"), "did you mean 'mmlu'"),
        (("--benchmarks", "humaneval"), "give --data FOLDER"),
        (("--benchmarks", "demo_code"), "--allow-code-execution"),
        (("--subset", 0), "whole numbers above 0"),
        (("--benchmarks", "mmlu", "--engine", "vllm", "--device", "cpu"), "vLLM chooses its own"),
        (("--benchmarks", "mmlu", "--server", "http://localhost:1"), "with vllm alone"),
        (("--benchmarks", "lm_eval:arc_easy", "--engine", "vllm"), "the engine loratune alone"),
    ):
        answer = loratune("evaluate", study, *flags)
        assert answer.code != 0
        assert said in answer.err
    for trial in (study / "trials").glob("*/main/adapter"):
        shutil.rmtree(trial)
    shutil.rmtree(study / "adapter")
    assert "holds no adapter" in loratune("evaluate", study, "--benchmarks", "mmlu").err
