"""What only a CUDA device can show: `make test-gpu`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_engine import adapter, recipe, segment

from loratune.finetune.dropout import kept, row_hashes
from loratune.finetune.engine import run_all
from loratune.finetune.hf import HfEngine
from loratune.finetune.packed.delta import Backend
from loratune.finetune.packed.engine import PackedEngine
from loratune.work import State

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CONFIGURATIONS = [
    {"lora_r": 4, "lora_dropout": 0.0, "batch_size": 7},
    {"lora_r": 16, "lora_dropout": 0.3, "batch_size": 3, "target_modules": "all-linear"},
    {"lora_r": 8, "lora_dropout": 0.1, "batch_size": 5},
]


def test_dropout_masks_are_the_same_on_both_devices() -> None:
    slots, positions = torch.arange(50).view(-1, 1), torch.arange(40)
    on_cpu = kept(row_hashes(slots, positions), 12345, 64, 0.3, torch.float32)
    on_gpu = kept(row_hashes(slots.cuda(), positions.cuda()), 12345, 64, 0.3, torch.float32)
    assert torch.equal(on_cpu.bool(), on_gpu.cpu())


@pytest.mark.parametrize("backend", ["loop", "concatenated", "grouped"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-4), ("bfloat16", 3e-2)])
def test_packed_is_the_reference(tmp_path: Path, backend: Backend, dtype: str, tolerance: float) -> None:
    base = replace(recipe(tmp_path, dtype=dtype), device="cuda")
    wanted = [segment(12, trial=k, learning_rate=1e-3, **h) for k, h in enumerate(CONFIGURATIONS)]  # type: ignore[arg-type]
    expected = run_all(HfEngine(base, tmp_path), [replace(s, run="hf") for s in wanted])
    packed = PackedEngine(replace(base, engine="packed", slots=3), tmp_path)
    packed.base.backend = lambda adapters: backend
    outcomes = run_all(packed, wanted)
    assert [o.state for o in outcomes] == [State.COMPLETED] * 3, outcomes[0].message
    assert [o.validation_loss for o in outcomes] == pytest.approx([o.validation_loss for o in expected], rel=tolerance)


def test_cpu_and_gpu_agree_in_float64(tmp_path: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        engine = PackedEngine(replace(recipe(tmp_path), engine="packed", slots=3, device=device), tmp_path)
        wanted = [replace(segment(12, trial=k, **h), run=device) for k, h in enumerate(CONFIGURATIONS)]  # type: ignore[arg-type]
        run_all(engine, wanted)
        found.append([adapter(tmp_path, s) for s in wanted])
    for one, two in zip(*found, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-7, atol=1e-9)


def test_memory_model_predicts_the_peak(tmp_path: Path) -> None:
    engine = PackedEngine(replace(recipe(tmp_path, dtype="float32"), engine="packed", slots=3, device="cuda"), tmp_path)
    assert engine.capacity.per_token > 0
    assert engine.capacity.room(0) > int(np.max(engine.train.lengths))
    assert engine.capacity.limit <= torch.cuda.get_device_properties(0).total_memory
