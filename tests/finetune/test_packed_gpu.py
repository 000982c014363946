"""What only a CUDA device can show: `make test-gpu`, or with torch, Transformers, PEFT, accelerate and pytest alone

python -m pytest tests/finetune/test_packed_gpu.py
"""

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_engine
import torch
import transformers
from exact import exact_norms  # noqa: F401  # a fixture
from layer_deltas import layer_deltas, worst
from test_four_bit import quantised  # noqa: F401  # a fixture
from tiny_engine import adapter, recipe, segment
from torch.nn import functional

from loratune.finetune import compiled, dropout, memory
from loratune.finetune.dropout import keep_mask, row_hashes
from loratune.finetune.engines import load_engine, run_segments
from loratune.finetune.hf import HfEngine
from loratune.finetune.packed import mlp, norm, products, rotary, varlen
from loratune.finetune.packed.engine import PackedEngine
from loratune.finetune.packed.head import frozen_head_nll
from loratune.finetune.packed.products import Backend, has_grouped_kernel
from loratune.work import State

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = torch.device("cuda", 0)
FLOAT32 = 4e-6  # ten times the 4e-7 by which Transformers' own float32 steps differ between devices, over twelve steps
CONFIGURATIONS = [
    {"lora_r": 4, "lora_dropout": 0.0, "batch_size": 7},
    {"lora_r": 16, "lora_dropout": 0.3, "batch_size": 3, "target_modules": "all-linear"},
    {"lora_r": 8, "lora_dropout": 0.1, "batch_size": 5},
]


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A model whose heads have 64 features, grouped: the kernel takes them, where those of the tiny one are of 8."""
    config = transformers.LlamaConfig(
        vocab_size=tiny_engine.VOCABULARY,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    tiny_engine.build_model(tmp_path / "model", config)
    return tmp_path


def test_dropout_masks_are_the_same_on_both_devices() -> None:
    slots, positions = torch.arange(50).view(-1, 1), torch.arange(40)
    on_cpu = keep_mask(row_hashes(slots, positions), 12345, 64, 0.3, torch.float32)
    on_gpu = keep_mask(row_hashes(slots.cuda(), positions.cuda()), 12345, 64, 0.3, torch.float32)
    assert torch.equal(on_cpu.bool(), on_gpu.cpu())


@pytest.mark.parametrize("backend", ["loop", "concatenated", "grouped"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-4), ("bfloat16", 3e-2)])
def test_packed_is_the_reference(tmp_path: Path, backend: Backend, dtype: str, tolerance: float) -> None:
    base = replace(recipe(tmp_path, dtype=dtype), device="cuda")
    wanted = [segment(12, trial=k, learning_rate=1e-3, **h) for k, h in enumerate(CONFIGURATIONS)]  # type: ignore[arg-type]
    expected = run_segments(HfEngine(base, tmp_path), [replace(s, run="hf") for s in wanted])
    packed = PackedEngine(replace(base, engine="packed", slots=3), tmp_path)
    packed.base.backend = lambda adapters: backend
    outcomes = run_segments(packed, wanted)
    assert [o.state for o in outcomes] == [State.COMPLETED] * 3, outcomes[0].message
    assert [o.validation_loss for o in outcomes] == pytest.approx([o.validation_loss for o in expected], rel=tolerance)


@pytest.mark.parametrize("backend", ["loop", "concatenated", "grouped"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4), ("bfloat16", 3e-2)])
def test_each_backend_is_the_loop_in_float64(backend: Backend, dtype: str, tolerance: float) -> None:
    if backend == "grouped" and not has_grouped_kernel(GPU, getattr(torch, dtype)):
        pytest.skip("never chosen here")
    expected = layer_deltas(torch.device("cpu"), torch.float64, "loop")
    assert worst(layer_deltas(GPU, getattr(torch, dtype), backend), expected) < tolerance


LEAVES = ["kept", "both_kept", "normed", "normed_back", "turned", "turned_back", "gated", "gated_back", "own_columns"]


def leaves() -> dict[str, tuple[compiled.Leaf, tuple[object, ...]]]:
    """Each function that is compiled on a GPU, with something to compute."""
    rows = torch.arange(300, device=GPU)
    words = [torch.tensor(w, dtype=torch.int32, device=GPU) for w in ([5, -7, 2**31 - 1], [-(2**31), 0, 2**31 - 9])]
    source = (dropout.row_hashes(rows // 7, rows % 7), rows // 100, *words, dropout.columns_of(128, GPU))
    x, g, w = (torch.randn(*shape, device=GPU, dtype=torch.bfloat16) for shape in ((300, 128), (300, 128), (128,)))
    heads, angles = x.view(1, 300, 4, 32).transpose(1, 2), x[:, :32].contiguous().view(1, 1, 300, 32)
    return {
        "kept": (dropout.kept, (x, *source)),
        "both_kept": (dropout.both_kept, (x, g, *source)),
        "normed": (norm._normed, (x, w, 1e-5)),
        "normed_back": (norm._normed_back, (x, w, torch.rand(300, 1, device=GPU), g)),
        "turned": (rotary._turned, (heads, angles, angles)),
        "turned_back": (rotary._turned_back, (heads, angles, angles)),
        "gated": (mlp._gated, (x, g)),
        "gated_back": (mlp._gated_back, (x, g, g)),
        "own_columns": (products.own_columns, (x, rows // 100, rows[:128] // 50, torch.rand(128, device=GPU))),
    }


@pytest.mark.parametrize(
    "name", ["kept", "both_kept", "normed", "normed_back", "turned", "turned_back", "gated", "gated_back", "own_columns"]
)
def test_a_leaf_is_one_kernel_with_the_same_numbers(name: str) -> None:
    from torch._inductor import metrics

    leaf, given = leaves()[name]
    torch._dynamo.reset()
    metrics.reset()
    got, expected = leaf(*given), leaf.function(*given)
    assert not compiled._broken, compiled._broken
    assert metrics.generated_kernel_count == 1
    for one, two in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True):
        assert one.stride() == two.stride()
        assert torch.equal(one, two) if "kept" in name else (one - two).norm() < 1e-2 * two.norm()


def test_a_round_waits_twice(wide: Path) -> None:
    """CUDA's own word for it."""
    engine = PackedEngine(replace(recipe(wide, dtype="bfloat16"), engine="packed", slots=3, device="cuda"), wide)
    wanted = [segment(4, trial=k, learning_rate=1e-3, **h) for k, h in enumerate(CONFIGURATIONS)]  # type: ignore[arg-type]
    run_segments(engine, [replace(s, run="warm") for s in wanted])
    train, waits = engine._train, []

    def watched(slots) -> None:  # type: ignore[no-untyped-def]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train(slots)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append([f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)])

    engine._train = watched  # type: ignore[method-assign]
    run_segments(engine, wanted)
    assert waits
    assert max(map(len, waits)) <= 2, waits


def test_the_demo_is_trained_on_the_gpu(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    command = [sys.executable, "-m", "loratune", "run", "--demo", "--output.folder", str(tmp_path / "demo")]
    done = subprocess.run([*command, "--executor.device", "cuda", "--budget.trials", "3"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads(path.read_text()).get("device") for path in (tmp_path / "demo").rglob("outcomes/**/*.json")]
    assert told
    assert {device.split(",")[0] for device in told} == {torch.cuda.get_device_name(0)}


@pytest.mark.usefixtures("exact_norms")
def test_cpu_and_gpu_agree_in_float64(tmp_path: Path) -> None:
    """To what float32 leaves of it: norms are exact here, angles of rotary positions are float32 in Transformers' own code."""
    found = []
    for device in ("cpu", "cuda"):
        engine = PackedEngine(replace(recipe(tmp_path), engine="packed", slots=3, device=device), tmp_path)
        wanted = [replace(segment(12, trial=k, **h), run=device) for k, h in enumerate(CONFIGURATIONS)]  # type: ignore[arg-type]
        run_segments(engine, wanted)
        found.append([adapter(tmp_path, s) for s in wanted])
    for one, two in zip(*found, strict=True):
        for name in one:
            assert (one[name] - two[name]).norm() <= FLOAT32 * one[name].norm(), name


def test_bfloat16_is_packed_by_the_kernel(wide: Path) -> None:
    """Whatever the signature of this torch's varlen_attn; a device below Ampere takes rectangles."""
    engine = load_engine(replace(recipe(wide, dtype="bfloat16"), engine="packed", slots=3, device="cuda"), wide)
    assert isinstance(engine, PackedEngine), engine.notice
    q, k = (torch.zeros(3, n, 64, dtype=torch.bfloat16, device=GPU) for n in (4, 2))
    assert varlen.takes(q, k, k) == (torch.cuda.get_device_capability() >= (8, 0))
    assert not varlen.takes(*(torch.zeros(3, 4, 12, dtype=torch.bfloat16, device=GPU) for _ in range(3)))
    outcomes = run_segments(engine, [segment(4, trial=k, learning_rate=1e-3, **h) for k, h in enumerate(CONFIGURATIONS)])  # type: ignore[arg-type]
    assert [o.state for o in outcomes] == [State.COMPLETED] * 3, outcomes[0].message


@pytest.mark.parametrize(("heads", "groups"), [(8, 8), (8, 2)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_the_kernel_is_attention(heads: int, groups: int, scaling: float | None) -> None:
    torch.manual_seed(0)
    lengths = [7, 300, 129, 64]
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=GPU)
    q, k, v = (torch.randn(sum(lengths), n, 64, device=GPU, dtype=torch.bfloat16, requires_grad=True) for n in (heads, groups, groups))
    if not varlen.takes(q, k, v):
        pytest.skip("this device has no such kernel")
    out = varlen.varlen_attention(q, k, v, starts, max(lengths), scaling)
    g = torch.randn_like(out)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    parts = [
        functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in one), is_causal=True, scale=scaling, enable_gqa=True)
        for one in zip(*(x.split(lengths) for x in exact), strict=True)
    ]
    expected = torch.cat([part.transpose(0, 1) for part in parts])
    assert (out.double() - expected).norm() < 1e-2 * expected.norm()
    for mine, theirs in zip(torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(expected, exact, g.double()), strict=True):
        assert (mine.double() - theirs).norm() < 2e-2 * theirs.norm()


def test_logits_are_not_rounded() -> None:
    torch.manual_seed(0)
    weight, labels = torch.randn(32000, 256) * 0.3, torch.randint(0, 32000, (100,))
    own = weight[labels]
    hidden = (20 * own / (own * own).sum(1, keepdim=True)).bfloat16()
    exact = hidden.double().requires_grad_()
    expected = functional.cross_entropy(exact @ weight.bfloat16().double().T, labels, reduction="none")
    expected.sum().backward()
    ours = hidden.to(GPU).requires_grad_()
    nll = frozen_head_nll(ours, weight.bfloat16().to(GPU), None, labels.to(GPU))
    nll.sum().backward()
    torch.testing.assert_close(nll.cpu().double(), expected.detach(), rtol=1e-4, atol=1e-4)
    assert ours.grad is not None
    assert exact.grad is not None
    assert (ours.grad.cpu().double() - exact.grad).norm() < 0.01 * exact.grad.norm()


@pytest.mark.usefixtures("quantised")
def test_layers_of_four_bits(wide: Path) -> None:
    engine = load_engine(replace(recipe(wide, dtype="bfloat16"), engine="packed", slots=3, device="cuda"), wide)
    assert isinstance(engine, PackedEngine), engine.notice
    outcomes = run_segments(engine, [segment(4, trial=k, learning_rate=1e-3, **h) for k, h in enumerate(CONFIGURATIONS)])  # type: ignore[arg-type]
    assert [o.state for o in outcomes] == [State.COMPLETED] * 3, outcomes[0].message


def test_memory_model_predicts_the_peak(tmp_path: Path) -> None:
    engine = PackedEngine(replace(recipe(tmp_path, dtype="float32"), engine="packed", slots=3, device="cuda"), tmp_path)
    assert engine.capacity.per_token > 0
    assert engine.capacity.room(0) > int(np.max(engine.train.lengths))
    assert engine.capacity.limit <= memory.available(GPU) <= torch.cuda.get_device_properties(0).total_memory


@pytest.fixture
def half_taken() -> Iterator[None]:
    free, _ = torch.cuda.mem_get_info(GPU)
    block = torch.empty(free // 2, dtype=torch.uint8, device=GPU)
    yield
    del block
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("half_taken")
def test_memory_is_planned_of_what_is_free(tmp_path: Path) -> None:
    """The block is this process's own, so it counts as in use: as `fixed`, not as room."""
    engine = PackedEngine(replace(recipe(tmp_path, dtype="float32"), engine="packed", slots=3, device="cuda"), tmp_path)
    left, _ = torch.cuda.mem_get_info(GPU)
    assert engine.capacity.limit - engine.capacity.fixed <= left + torch.cuda.memory_reserved(GPU) - torch.cuda.memory_allocated(GPU)


def test_seconds_and_memory_are_the_trials_own(wide: Path) -> None:
    """Seconds add up to the clock; a trial's memory is what it is told alone."""
    engine = PackedEngine(replace(recipe(wide, dtype="bfloat16"), engine="packed", slots=3, device="cuda"), wide)
    wanted = [segment(30, trial=k, learning_rate=1e-3, **h) for k, h in enumerate(CONFIGURATIONS)]  # type: ignore[arg-type]
    run_segments(engine, [replace(s, run="warm") for s in wanted])
    began = time.perf_counter()
    outcomes = run_segments(engine, wanted)
    wall = time.perf_counter() - began
    assert 0.5 * wall < sum(o.train_seconds + o.validation_seconds for o in outcomes) <= wall
    alone = [run_segments(engine, [replace(s, run="alone")])[0].peak_memory_bytes for s in wanted]
    assert [o.peak_memory_bytes for o in outcomes] == pytest.approx(alone, rel=0.25)


def test_weights_go_straight_onto_the_device(wide: Path) -> None:
    engine = PackedEngine(replace(recipe(wide, dtype="bfloat16"), engine="packed", slots=1, device="cuda"), wide)
    assert {p.device for p in engine.base.model.parameters()} == {GPU}


def test_the_failed_pass_of_a_real_shortage_is_freed(wide: Path) -> None:
    """A limit on this process's memory: passes are halved until they fit."""
    engine = PackedEngine(replace(recipe(wide, dtype="float32"), engine="packed", slots=3, device="cuda"), wide)
    total = torch.cuda.get_device_properties(0).total_memory
    memory.free(GPU)
    limit = torch.cuda.memory_reserved(GPU) + 24 * 2**20
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        outcomes = run_segments(engine, [segment(3, trial=k, learning_rate=1e-3, **h) for k, h in enumerate(CONFIGURATIONS)])  # type: ignore[arg-type]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert {o.state for o in outcomes} <= {State.COMPLETED, State.OUT_OF_MEMORY}, [o.message for o in outcomes]
    assert torch.cuda.memory_allocated(GPU) < limit


def test_a_lost_device_is_known() -> None:
    """In a process of its own: this one's device would be lost, too."""
    code = (
        "import torch\n"
        "from loratune.errors import DeviceLostError\n"
        "from loratune.finetune.failures import ran_out\n"
        "try:\n"
        "    torch.zeros(4, device='cuda')[torch.tensor([9], device='cuda')].sum().item()\n"
        "except Exception as error:\n"
        "    try:\n"
        "        ran_out(error, torch.device('cuda', 0))\n"
        "    except DeviceLostError:\n"
        "        print('lost')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "lost" in done.stdout, done.stderr
