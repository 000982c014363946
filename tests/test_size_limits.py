"""Constraints on an adapter's size: refused beforehand where no adapter of the space keeps them, and kept by the first guess."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from loratune import demo
from loratune.cli import main
from loratune.errors import SpecError
from loratune.finetune.sizes import adapter_sizes
from loratune.spec import StudySpec
from loratune.study.guess import guess, with_guess
from loratune.study.size_limits import check_size_limits
from loratune.work import Hyperparameters, ModelRecipe

SIZES = adapter_sizes(ModelRecipe(name_or_path=str(demo.model_folder())))


def megabytes(rank: int, layers: str) -> float:
    return 4e-6 * SIZES(Hyperparameters(lora_r=rank, target_modules=layers))


def study_of(*constraints: str, **more: Any) -> StudySpec:
    train, validation = demo.data_files()
    base = {"model": str(demo.model_folder()), "data": {"train": [str(train)], "validation": [str(validation)]}}
    return StudySpec.load(base={**base, "constraints": list(constraints), **more})


def test_what_no_adapter_keeps_is_refused_with_the_nearest_that_one_has() -> None:
    smallest, largest = megabytes(4, "qv"), megabytes(256, "all-linear")
    check_size_limits(study_of(f"adapter_mb <= {smallest}"))
    with pytest.raises(SpecError) as refused:
        check_size_limits(study_of("adapter_mb <= 0.0001", "inference_cost > 1e12", "validation_loss < 1"))
    first, second = str(refused.value).splitlines()
    assert f"keeps adapter_mb <= 0.0001: all have adapter_mb >= {smallest:.4g}, at rank 4 on qv." in first
    assert f"inference_cost <= {largest / 4e-6:.4g}, at rank 256 on all-linear." in second
    with pytest.raises(SpecError, match=r"keeps adapter_mb >= 1 and adapter_mb < 0\.9 together"):
        check_size_limits(study_of("adapter_mb >= 1", "adapter_mb < 0.9"))
    ranged = {"lora_r": {"low": 3, "high": 9}, "learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}}
    check_size_limits(study_of(f"adapter_mb < {megabytes(4, 'qv')}", search_space=ranged))
    with pytest.raises(SpecError, match="at rank 3 on qv"):
        check_size_limits(study_of(f"adapter_mb < {megabytes(3, 'qv')}", search_space=ranged, sampler="random"))


@pytest.mark.parametrize("command", [("run", "--dry-run"), ("run",), ("recommend",)])
@pytest.mark.parametrize("sampler", ["bracket", "random"])
def test_every_command_refuses_it_before_a_trial(
    command: tuple[str, ...], sampler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study"
    verb, *flags = command
    code = main([verb, "--demo", "--output", str(study), "--sampler", sampler, "--constraints", "[adapter_mb <= 0.0001]", *flags, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (code, told["error"]["kind"]) == (2, "SpecError")
    assert "all have adapter_mb >= 0.1167, at rank 4 on all-linear" in told["error"]["message"]
    assert not study.exists()


def begins(*constraints: str, **more: Any) -> tuple[int, str]:
    spec = study_of(*constraints, **more)
    made = guess(spec).recommendation
    h = (filled := with_guess(spec, made)).hyperparameters(filled.search_space.default_values())
    assert (made.values["lora_r"], made.values["target_modules"]) == (h.lora_r, h.target_modules)
    assert math.isclose(h.learning_rate, made.values["learning_rate"], rel_tol=0.05)
    assert math.isclose(h.lora_alpha, made.values["lora_alpha"])
    return h.lora_r, str(h.target_modules)


def test_the_first_guess_is_the_largest_that_keeps_the_constraints() -> None:
    rank, layers = begins()
    assert (rank, layers) == (64, "all-linear")
    assert begins(f"adapter_mb <= {megabytes(64, layers)}") == (64, layers)
    assert begins(f"adapter_mb < {megabytes(64, layers)}") == (32, layers)
    assert begins(f"inference_cost <= {SIZES(Hyperparameters(lora_r=8, target_modules=layers))}") == (8, layers)
    assert begins(f"adapter_mb > {megabytes(64, layers)}") == (128, layers), "the nearest above, where none below keeps it"
    few = begins(f"adapter_mb < {megabytes(4, layers)}")
    assert few[1] != layers, "on fewer layers, where no rank keeps it on all"
    assert megabytes(few[0], few[1]) < megabytes(4, layers)
    moved = guess(study_of(f"adapter_mb < {megabytes(64, layers)}")).recommendation
    assert f"rank 32 on {layers} in place of rank 64 on {layers}: it breaks adapter_mb <" in moved.notes[-1]
    written = study_of("adapter_mb < 0.1", search_space={"preset": "recommended", "lora_r": {"values": [4, 64], "default": 64}})
    assert with_guess(written, guess(written).recommendation).search_space.default_values()["lora_r"] == 64, "what somebody wrote stays"
