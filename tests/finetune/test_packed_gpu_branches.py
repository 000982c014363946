"""The branches that a GPU takes, on a CPU: the same masks to the last bit, the same training, two waits a round."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import exact_norms  # noqa: F401  # a fixture
from layer_deltas import layer_deltas, worst
from test_packed_varlen import torch_2_13
from tiny_engine import adapter, recipe, segment
from torch._dynamo.exc import TorchDynamoException
from torch.nn import functional
from torch.nn.attention import varlen as torch_varlen
from torch.utils._python_dispatch import TorchDispatchMode

from loratune.finetune import compiled, dropout, memory
from loratune.finetune.engines import run_segments
from loratune.finetune.packed import layout, mlp, varlen
from loratune.finetune.packed.engine import PackedEngine
from loratune.finetune.packed.products import Backend
from loratune.work import Segment, State

pytestmark = pytest.mark.usefixtures("exact_norms")
MIXED: list[dict[str, Any]] = [
    {"lora_r": 4, "lora_dropout": 0.0, "learning_rate": 0.01, "batch_size": 7},
    {"lora_r": 8, "lora_dropout": 0.1, "learning_rate": 0.003, "batch_size": 3, "target_modules": "all-linear"},
    {"lora_r": 16, "lora_dropout": 0.3, "learning_rate": 0.02, "batch_size": 11, "target_modules": "mlp", "use_rslora": True},
    {"lora_r": 5, "lora_dropout": 1.0, "learning_rate": 0.01, "batch_size": 4, "target_modules": "qkvo"},
    {"lora_r": 6, "lora_dropout": 0.1, "learning_rate": 0.005, "batch_size": 2, "loraplus_lr_ratio": 4.0},
]


def segments(run: str) -> list[Segment]:
    return [replace(segment(5, trial=k, **h), run=run) for k, h in enumerate(MIXED)]


def mask_before(rows: torch.Tensor, key: int, features: int, p: float) -> torch.Tensor:
    """`keep_mask` of commit 45142b4, adapter by adapter, as a product's factor."""

    def mix(h: torch.Tensor) -> torch.Tensor:
        h = h.clone()
        t = torch.empty_like(h)
        for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, None)):
            torch.bitwise_right_shift(h, shift, out=t)
            h.bitwise_xor_(t.bitwise_and_((1 << (32 - shift)) - 1))
            if multiplier is not None:
                h.mul_(multiplier)
        return h

    columns = torch.arange(features, dtype=torch.int32) * (0x9E3779B9 - 2**32)
    hashes = mix(mix(rows ^ key).unsqueeze(-1) + columns)
    return hashes >= min(round(p * 2**32) - 2**31, 2**31 - 1)


@pytest.mark.parametrize("features", [1, 24, 257])
def test_masks_of_all_adapters_at_once_are_those_of_each(features: int) -> None:
    counts, keys, rates = [3, 40, 1, 17, 9], [5, -7, 2**31 - 1, -(2**31), 0], [0.0, 0.05, 0.5, 0.97, 1e-9]
    owners = torch.randint(0, 11, (sum(counts),), generator=torch.Generator().manual_seed(0))
    rows = dropout.row_hashes(owners, torch.arange(sum(counts)))
    before = torch.cat([mask_before(r, k, features, p) for r, k, p in zip(rows.split(counts), keys, rates, strict=True)])
    whose = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    words = [torch.tensor(w, dtype=torch.int32) for w in (keys, [dropout.threshold(p) for p in rates])]
    x, g = torch.full((len(rows), features), 2.0), torch.full((len(rows), features), torch.inf)
    source = (rows, whose, *words, dropout.columns_of(features, rows.device))
    assert torch.equal(dropout.kept(x, *source), before * 2.0)
    assert torch.equal(dropout.keep_of_rows(rows, words[0][whose], words[1][whose], source[-1]), before)
    first, second = dropout.both_kept(x, g, *source)
    assert torch.equal(first, before * 2.0)
    assert torch.equal(second, torch.where(before, torch.inf, 0.0)), "what is dropped is 0, whatever it was"
    for r, part, k, p in zip(rows.split(counts), before.split(counts), keys, rates, strict=True):
        assert torch.equal(dropout.keep_mask(r, k, features, p, torch.float64), part.double())


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches of a GPU, but for what only CUDA computes; the kernel for attention is a stand-in in exact arithmetic."""
    monkeypatch.setattr(compiled, "on_gpu", lambda x: True)
    monkeypatch.setattr(torch_varlen, "varlen_attn", torch_2_13)
    monkeypatch.setattr(varlen, "takes", lambda q, k, v: True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def loop(root: Path) -> Iterator[list[dict[str, torch.Tensor]]]:
    """What a CPU makes of them, adapter by adapter in float64."""
    engine = PackedEngine(replace(recipe(root), engine="packed", slots=5), root)
    outcomes = run_segments(engine, segments("cpu"))
    assert {o.state for o in outcomes} == {State.COMPLETED}, outcomes[0].message
    yield [adapter(root, one) for one in segments("cpu")]
    engine.close()


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("backend", "options"),
    [("concatenated", {}), ("concatenated", {"gradient_checkpointing": True}), ("loop", {"tokens_per_pass": 60})],
    ids=str,
)
def test_training_is_the_same(
    root: Path, loop: list[dict[str, torch.Tensor]], backend: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    used, gated, ahead, laid_out = [], [], [], layout.Layouts.flat
    monkeypatch.setattr(mlp, "swiglu", lambda gate, up, real=mlp.swiglu: (gated.append(1), real(gate, up))[1])

    def watched(self: layout.Layouts, shares: Any) -> layout.Flat:
        ahead.append(self._ahead is not None and self._ahead[1] == layout._content(shares))
        used.append(laid_out(self, shares))
        return used[-1]

    monkeypatch.setattr(layout.Layouts, "flat", watched)
    run = f"{backend}-{len(options)}-{next(iter(options), '')}"
    engine = PackedEngine(replace(recipe(root, **options), engine="packed", slots=5), root)
    engine.base.backend = lambda adapters: backend  # type: ignore[return-value, assignment]
    engine.enough, engine.looks_ahead = float("inf"), True
    outcomes = run_segments(engine, segments(run))
    engine.close()
    assert {o.state for o in outcomes} == {State.COMPLETED}, outcomes[0].message
    for wanted, expected in zip(segments(run), loop, strict=True):
        got = adapter(root, wanted)
        for name, weight in expected.items():
            torch.testing.assert_close(got[name], weight, rtol=1e-9, atol=1e-11)
    assert gated
    assert sum(ahead) >= len(ahead) / 2, "most passes were laid out while the one before was computed"
    assert not any("_made" in vars(flat.rectangles) for flat in used), "the kernel wants no rectangles"


@pytest.mark.parametrize("backend", ["loop", "concatenated", "grouped"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 3e-2)])
def test_each_backend_is_the_loop_in_float64(backend: Backend, dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the masks of a GPU against those of a CPU."""
    if (backend, dtype) == ("grouped", "float64"):
        pytest.skip("torch has no grouped product in float64")
    expected = layer_deltas(torch.device("cpu"), torch.float64, "loop")
    monkeypatch.setattr(compiled, "on_gpu", lambda x: True)
    assert worst(layer_deltas(torch.device("cpu"), getattr(torch, dtype), backend), expected) < tolerance


def test_a_round_waits_twice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all slots' losses and norms, and for whether their weights are finite. Nothing else reads a number back."""
    monkeypatch.setattr(compiled, "on_gpu", lambda x: True)
    waits: list[int] = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
                waits[-1] += 1
            return function(*args, **(kwargs or {}))

    def one_more(real: Any) -> Any:
        def called(*given: Any) -> Any:
            waits[-1] += 1
            return real(*given)

        return called

    engine = PackedEngine(replace(recipe(root), engine="packed", slots=5), root)
    engine.base.backend, engine.enough = lambda adapters: "concatenated", float("inf")
    train = engine._train

    def watched(slots: Any) -> None:
        waits.append(0)
        with pytest.MonkeyPatch.context() as patch, Reads():
            for owner, name in ((torch.Tensor, "tolist"), (memory, "synchronize")):
                patch.setattr(owner, name, one_more(getattr(owner, name)))
            train(slots)

    monkeypatch.setattr(engine, "_train", watched)
    outcomes = run_segments(engine, segments("waits"))
    engine.close()
    assert {o.state for o in outcomes} == {State.COMPLETED}, outcomes[0].message
    assert max(waits) == 2


def test_without_a_compiler_steps_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one warning says so."""
    tried = []

    def fails(function: Any, **_: Any) -> Any:
        def call(*given: Any) -> Any:
            tried.append(1)
            raise TorchDynamoException("Cannot find a working triton installation.")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(compiled, "compiles", lambda given: True)
    monkeypatch.setattr(compiled, "_broken", [])
    leaf = compiled.Leaf(lambda x: x + 1)
    with pytest.warns(RuntimeWarning, match="triton") as warned:
        assert [leaf(torch.ones(1)).item() for _ in range(3)] == [2.0] * 3
    assert len(tried) == len(warned) == 1


def test_other_errors_are_not_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda function, **_: full)
    monkeypatch.setattr(compiled, "compiles", lambda given: True)
    with pytest.raises(torch.OutOfMemoryError):
        compiled.Leaf(lambda x: x)(torch.ones(1))


def test_swiglu_is_silu_times_up() -> None:
    gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    g = torch.randn(5, 7, dtype=torch.float64)
    ours, theirs = mlp.swiglu(gate, up), functional.silu(gate) * up
    torch.testing.assert_close(ours, theirs)
    for one, two in zip(torch.autograd.grad(ours, (gate, up), g), torch.autograd.grad(theirs, (gate, up), g), strict=True):
        torch.testing.assert_close(one, two)
