"""A task and a method of one file each, which both engines train: the seams are the ones that they go through."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_engine import adapter, recipe, run, segment

from loratune import demo
from loratune.data.prepare import prepare
from loratune.data.prepared import Prepared
from loratune.data.prompts import Encoded, Prompt
from loratune.data.sources import DataRecipe, DataSource, Example
from loratune.data.tasks import TASKS, TrainingTask
from loratune.errors import ModelError
from loratune.finetune import lora
from loratune.finetune.dropout import DropoutKey
from loratune.finetune.engines import load_engine
from loratune.finetune.hf import HfEngine
from loratune.finetune.methods import LORA, METHODS, LowRankDelta
from loratune.finetune.peft_layers import ADAPTER, lora_layers
from loratune.work import Hyperparameters, Outcome, Recipe

ENGINES = ("packed", "hf")


class Focal(TrainingTask):
    """The prompt is learnt too; what the model knows already counts less (focal loss); the metric is the share of surprises."""

    name = "focal"

    def encode(self, prompt: Prompt, example: Example, max_length: int) -> Encoded | None:
        found = prompt.encode(example, max_length)
        return found and replace(found, response_mask=[False] + [True] * (len(found.input_ids) - 1))

    def loss(self, nll: Any, labels: Any) -> Any:
        return nll * (1 - (-nll).exp()) ** 2

    def metric(self, nll: Any, labels: Any) -> Any:
        return (nll > 4.0).to(nll.dtype)


def frozen_a(model: Any, h: Hyperparameters, seed: int) -> tuple[Any, DropoutKey]:
    wrapped, key = lora.attach(model, h, seed)
    for _, layer in lora_layers(wrapped):
        layer.lora_A[ADAPTER].weight.requires_grad_(False)
    return wrapped, key


def size_of_b(shapes: Iterable[tuple[int, int]], h: Hyperparameters) -> int:
    return h.lora_r * sum(out for _, out in shapes)


# LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): A stays as it was drawn.
LORA_FA = replace(LORA, size=size_of_b, attach=frozen_a, delta=LowRankDelta(scale=lora.scale, initial_a=lora.initial_a, trains=("lora_B",)))


def trained(root: Path, made: Recipe, trial: int, **h: object) -> tuple[Outcome, dict[str, torch.Tensor]]:
    engine = load_engine(made, root)
    assert not engine.notice
    wanted = segment(trial=trial, validate_at=(0, 3), **h)  # type: ignore[arg-type]
    outcome = run(engine, wanted)
    engine.close()
    return outcome, adapter(root, wanted)


def test_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "focal", Focal())
    made = recipe(tmp_path)
    (plain, weights), *found = (
        trained(tmp_path, replace(made, task=task, engine=engine), trial)
        for trial, (task, engine) in enumerate([("sft", "packed"), *(("focal", engine) for engine in ENGINES)])
    )
    (packed, a), (hf, b) = found
    assert all(0 <= (p.validation_loss or 0) <= 1 for p in packed.curve), "a share"
    assert [p.validation_loss for p in packed.curve] == pytest.approx([p.validation_loss for p in hf.curve])
    assert [p.train_loss for p in packed.curve if p.step] == pytest.approx([p.train_loss for p in hf.curve if p.step], rel=1e-6)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-7)
    assert plain.validation_loss != packed.validation_loss
    assert any(not torch.allclose(a[name], weights[name]) for name in a)


def test_a_task_encodes(tmp_path: Path, demo_data: Path) -> None:
    sft = Prepared.load(demo_data)
    train, _ = demo.data_files()
    data = DataRecipe(train=(DataSource(path=str(train)),), train_count=96, validation_count=32, max_length=128)
    focal = prepare(data, tokenizer=str(demo.model_folder()), cache=tmp_path, task=Focal())
    assert focal.folder.name != sft.folder.name
    assert (focal.train.ids == sft.train.ids).all()
    assert focal.manifest.train.response_tokens == focal.manifest.train.tokens - focal.manifest.train.examples
    assert sft.manifest.train.response_tokens < focal.manifest.train.response_tokens


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setitem(METHODS, "lora_fa", LORA_FA)
    made = replace(recipe(tmp_path, dtype=dtype), method="lora_fa")
    (packed, a), (hf, b) = (trained(tmp_path, replace(made, engine=engine), trial) for trial, engine in enumerate(ENGINES))
    tolerance = 1e-6 if dtype == "float64" else 0.05
    assert packed.validation_loss == pytest.approx(hf.validation_loss, rel=tolerance)
    assert packed.trainable_parameters == hf.trainable_parameters == sum(t.numel() for name, t in a.items() if "lora_B" in name)
    for name in a:
        if "lora_A" in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            assert torch.equal(a[name], lora.initial_a(0, module, *a[name].shape).to(a[name].dtype)), "as it was drawn"
            assert torch.equal(a[name], b[name])
        else:
            assert a[name].abs().max() > 0
            if dtype == "float64":
                torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-7)


def test_a_frozen_factor_goes_on_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "lora_fa", LORA_FA)
    engine = load_engine(replace(recipe(tmp_path), method="lora_fa", engine="packed", slots=2), tmp_path)
    run(engine, segment(trial=0, stop=3))
    run(engine, segment(trial=0, start=3))
    run(engine, segment(trial=1))
    halves, whole = adapter(tmp_path, segment(trial=0)), adapter(tmp_path, segment(trial=1))
    assert all(torch.equal(halves[name], whole[name]) for name in whole)


def test_a_method_without_a_low_rank_delta_is_trained_by_hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "other", replace(LORA, delta=None))
    engine = load_engine(replace(recipe(tmp_path), method="other", engine="packed"), tmp_path)
    assert isinstance(engine, HfEngine)
    assert "its method has no low-rank delta" in engine.notice


@pytest.mark.parametrize(("field", "allowed"), [("task", "sft"), ("method", "lora")])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_unknown_name(tmp_path: Path, engine: str, field: str, allowed: str) -> None:
    with pytest.raises(ModelError, match=f"{field}: 'x' is not known; allowed: {allowed}"):
        load_engine(replace(recipe(tmp_path), engine=engine, **{field: "x"}), tmp_path)  # type: ignore[arg-type]
