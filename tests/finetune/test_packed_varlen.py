"""The variable-length kernel's call, with the signature of each torch that loratune supports, on a CPU.

Stand-ins take what that torch's `varlen_attn` takes, no more, and compute true attention, one sequence after the other.
"""

import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_packed_causal import TOKENS, inputs, one_by_one
from tiny_engine import recipe, segment
from torch.nn import functional
from torch.nn.attention import varlen as torch_varlen

from loratune.data.shared_prefix import dropout_owners
from loratune.finetune.engines import run_segments
from loratune.finetune.packed import attention, varlen
from loratune.finetune.packed.engine import PackedEngine
from loratune.finetune.packed.layout import Flat, Share, flatten

CPU = torch.device("cpu")


def computed(query, key, value, ends, *, causal: bool, scale, gqa: bool):  # type: ignore[no-untyped-def]
    assert causal
    assert gqa or query.shape[1] == key.shape[1], "Expect query and key/value to have the same number of heads"
    assert all(x.is_contiguous() for x in (query, key, value))
    out = []
    for q, k, v in zip(*(x.split(ends.diff().tolist()) for x in (query, key, value)), strict=True):
        one = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        out.append(functional.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=gqa)[0].transpose(0, 1))
    return torch.cat(out)


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):  # type: ignore[no-untyped-def]
    return computed(query, key, value, cu_seq_q, causal=is_causal, scale=None, gqa=False)


def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
    return computed(query, key, value, cu_seq_q, causal=window_size == (-1, 0), scale=scale, gqa=False)


def torch_2_13(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    return computed(query, key, value, cu_seq_q, causal=window_size == (-1, 0), scale=scale, gqa=enable_gqa)


EVERY = pytest.mark.parametrize("kernel", [torch_2_10, torch_2_11, torch_2_13], ids=lambda kernel: kernel.__name__)


@pytest.fixture(scope="module", params=["no beginning shared", "beginnings shared"])
def flat(request: pytest.FixtureRequest) -> Flat:
    chosen = [range(1), range(4, 5)] if request.param == "no beginning shared" else [range(7), range(4, 12)]
    shares = [Share(adapter=k, examples=np.asarray(one), owners=dropout_owners(TOKENS, np.asarray(one))) for k, one in enumerate(chosen)]
    return flatten(TOKENS, shares, CPU)


def test_the_stand_in_for_the_torch_at_hand_is_true() -> None:
    theirs = inspect.signature(torch_varlen.varlen_attn).parameters
    for stand_in in (torch_2_13, torch_2_11):
        for name, parameter in inspect.signature(stand_in).parameters.items():
            if name in theirs:
                assert (theirs[name].kind, theirs[name].default) == (parameter.kind, parameter.default), name
    if torch.__version__.startswith("2.13"):
        assert list(theirs) == list(inspect.signature(torch_2_13).parameters)


@EVERY
@pytest.mark.parametrize("shape", [(8, 4, 16), (3, 3, 8)], ids=str)
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_it_is_attention(flat: Flat, kernel, shape, scaling: float | None, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Forward and backward, with and without grouped heads, where rows stand in several sequences and where they do not."""
    monkeypatch.setattr(torch_varlen, "varlen_attn", kernel)
    monkeypatch.setattr(varlen, "takes", lambda q, k, v: True)
    x = inputs(flat.tokens, *shape)

    def ours() -> torch.Tensor:
        q, k, v = (one.transpose(0, 1).unsqueeze(0) for one in x)
        return attention.flat_attention(torch.nn.Module(), q, k, v, None, flat=flat, scaling=scaling)[0][0]

    whole = flat if flat.line is not None else replace(flat, line=flat.buckets)
    got = ours()
    if flat.line is None:
        monkeypatch.setattr(varlen, "takes", lambda q, k, v: False)
        expected = ours()  # blocks, which test_packed_causal compares
    else:
        expected = one_by_one(whole, *x, scaling)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    g = torch.randn_like(got)
    for mine, theirs in zip(torch.autograd.grad(got, x, g), torch.autograd.grad(expected, x, g), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@EVERY
def test_training_through_it_is_the_same(kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """A whole model with grouped heads: packed, not `hf`."""
    losses = []
    for by_kernel in (False, True):
        if by_kernel:
            monkeypatch.setattr(torch_varlen, "varlen_attn", kernel)
            monkeypatch.setattr(varlen, "takes", lambda q, k, v: True)
        engine = PackedEngine(replace(recipe(tmp_path), engine="packed", slots=2), tmp_path)
        outcomes = run_segments(engine, [replace(segment(4, trial=k, lora_r=4 + k), run=f"run-{by_kernel}") for k in range(2)])
        losses.append([o.validation_loss for o in outcomes])
        engine.close()
    assert losses[0] == pytest.approx(losses[1], abs=1e-7)  # norms are float32


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """`varlen._tried` for a GPU of some compute capability, with a kernel; the CPU computes."""

    def ask(capability: tuple[int, int], features: int, kernel=torch_2_11) -> bool:  # type: ignore[no-untyped-def]
        varlen._tried.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch_varlen, "varlen_attn", kernel)
        return varlen._tried(CPU, torch.float32, 4, 2, features)

    yield ask
    varlen._tried.cache_clear()


def test_it_is_used_where_device_and_heads_allow(tried) -> None:  # type: ignore[no-untyped-def]
    assert tried((8, 0), 64)
    assert tried((9, 0), 256)
    assert not tried((7, 5), 64), "Turing has no such kernel"
    assert not tried((9, 0), 320), "wider than any"
    assert not tried((9, 0), 12), "not a multiple of 8"


def test_what_a_build_does_not_take_goes_by_rectangles(tried, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def refusing(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("USE_FLASH_ATTENTION was not enabled for build.")

    def one_way(*given: torch.Tensor, **options: object) -> torch.Tensor:
        return torch_2_11(*given, **options).detach()

    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert not tried((8, 0), 64, refusing)
    assert not tried((8, 0), 64, one_way), "a forward pass alone"
    with pytest.raises(torch.OutOfMemoryError):
        tried((8, 0), 64, full)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert tried((7, 5), 64), "AMD numbers its devices otherwise: the kernel itself says"


def test_never_on_a_cpu() -> None:
    q = torch.zeros(3, 2, 8, dtype=torch.bfloat16)
    assert not varlen.takes(q, q, q)


def test_half_precision_without_the_kernel_is_packed(tmp_path: Path) -> None:
    """Rectangles: what a device below Ampere takes."""
    engine = PackedEngine(replace(recipe(tmp_path, dtype="bfloat16"), engine="packed", slots=2), tmp_path)
    outcomes = run_segments(engine, [segment(3, trial=k, learning_rate=1e-3) for k in range(2)])
    assert all(o.validation_loss is not None for o in outcomes), outcomes[0].message
