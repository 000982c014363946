"""Quantised layers in both engines: by bitsandbytes where it is installed, and by a stand-in of its Linear4bit.

The class tree is the same: an nn.Linear whose weight is a frozen parameter of packed bytes, [out * in / 2, 1] uint8, with
what dequantises it beside it; the forward pass computes in its input's precision.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_engine import adapter, recipe, segment
from torch import nn

from loratune.finetune import model
from loratune.finetune.engines import load_engine, run_segments
from loratune.finetune.hf import HfEngine
from loratune.finetune.packed.engine import PackedEngine
from loratune.work import Segment, State


class Params4bit(nn.Parameter):
    """Bytes of two weights each, and the scale and shape that turn them back."""

    quant_state: tuple[float, torch.Size]

    def __new__(cls, weight: torch.Tensor) -> "Params4bit":
        scale = float(weight.abs().max()) / 7
        levels = (weight / scale).round().clamp(-7, 7).to(torch.int16) + 7
        packed = (levels.flatten()[::2] * 16 + levels.flatten()[1::2]).to(torch.uint8).unsqueeze(1)
        made = torch.Tensor._make_subclass(cls, packed, False)
        made.quant_state = (scale, weight.shape)
        return made

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        scale, shape = self.quant_state
        packed = self.data.as_subclass(torch.Tensor).flatten().to(torch.int16)
        return (torch.stack([packed // 16, packed % 16], 1).flatten().view(shape) - 7).to(dtype) * scale


class MatMul4Bit(torch.autograd.Function):
    """As bitsandbytes': the gradient of the input alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight, None


class Linear4bit(nn.Linear):
    def __init__(self, original: nn.Linear) -> None:
        super().__init__(original.in_features, original.out_features, bias=original.bias is not None, device="meta")
        self.weight = Params4bit(original.weight.data)  # type: ignore[assignment]
        self.bias = original.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        out = MatMul4Bit.apply(x, weight.dequantized(x.dtype))
        return out if self.bias is None else out + self.bias


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that any engine loads meanwhile have such layers, as Transformers puts them in: all but the head."""
    load = model.load

    def loaded(*given: Any, **options: Any) -> model.BaseModel:
        base = load(*given, **options)
        for parent in list(base.model.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear and name != "lm_head":
                    setattr(parent, name, Linear4bit(layer))
        return base

    monkeypatch.setattr(model, "load", loaded)


def segments(run: str) -> list[Segment]:
    chosen: list[dict[str, Any]] = [{"lora_r": 4, "target_modules": "all-linear"}, {"lora_r": 8, "lora_dropout": 0.1, "batch_size": 3}]
    return [replace(segment(8, trial=k, **h), run=run) for k, h in enumerate(chosen)]


@pytest.mark.usefixtures("quantised")
def test_both_engines_train_on_packed_bytes(tmp_path: Path) -> None:
    base = recipe(tmp_path, dtype="float32")
    packed = load_engine(replace(base, engine="packed", slots=2), tmp_path)
    assert isinstance(packed, PackedEngine), packed.notice
    assert {layer.weight.dtype for layer in packed.base.linear.values()} == {torch.uint8}
    mine = run_segments(packed, segments("packed"))
    assert [o.state for o in mine] == [State.COMPLETED] * 2, mine[0].message
    hf = load_engine(base, tmp_path)
    assert isinstance(hf, HfEngine)
    theirs = run_segments(hf, segments("hf"))
    assert [o.state for o in theirs] == [State.COMPLETED] * 2, theirs[0].message
    for one, two, a, b in zip(mine, theirs, segments("packed"), segments("hf"), strict=True):
        assert one.validation_loss == pytest.approx(two.validation_loss, abs=1e-4)
        assert one.trainable_parameters == two.trainable_parameters
        first, second = adapter(tmp_path, a), adapter(tmp_path, b)
        assert first.keys() == second.keys()
        for name in first:
            assert first[name].dtype == second[name].dtype == torch.float32
            assert (first[name] - second[name]).norm() < 1e-2 * second[name].norm()


@pytest.mark.usefixtures("quantised")
def test_half_precision_beside_packed_bytes(tmp_path: Path) -> None:
    """What a GPU has: weights of four bits, all else in bfloat16."""
    engine = load_engine(replace(recipe(tmp_path, dtype="bfloat16"), engine="packed", slots=2), tmp_path)
    assert isinstance(engine, PackedEngine), engine.notice
    outcomes = run_segments(engine, segments("half"))
    assert [o.state for o in outcomes] == [State.COMPLETED] * 2, outcomes[0].message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bitsandbytes_in_both_engines(tmp_path: Path, dtype: str) -> None:
    """The real thing: NF4 with double quantisation, which it computes on a CPU too."""
    bitsandbytes = pytest.importorskip("bitsandbytes", minversion="0.50")
    base = recipe(tmp_path, dtype=dtype)
    base = replace(base, model=replace(base.model, load_in_4bit=True))
    packed = load_engine(replace(base, engine="packed", slots=2), tmp_path)
    assert isinstance(packed, PackedEngine), packed.notice
    assert {type(layer) for layer in packed.base.linear.values()} == {bitsandbytes.nn.Linear4bit}
    mine = run_segments(packed, segments("packed"))
    hf = load_engine(base, tmp_path)
    assert isinstance(hf, HfEngine)
    theirs = run_segments(hf, segments("hf"))
    assert {o.state for o in [*mine, *theirs]} == {State.COMPLETED}, [o.message for o in [*mine, *theirs]]
    for one, two in zip(mine, theirs, strict=True):
        assert one.validation_loss == pytest.approx(two.validation_loss, rel=1e-4 if dtype == "float32" else 2e-2)
        assert one.trainable_parameters == two.trainable_parameters
