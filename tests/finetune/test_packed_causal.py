"""Attention on a CPU, block by block, against the same sequences one by one."""

import numpy as np
import pytest
import torch
from tiny_tokens import random_tokens
from torch.nn import functional

from loratune.data.shared_prefix import dropout_owners
from loratune.finetune.packed.causal import causal_attention
from loratune.finetune.packed.layout import Flat, Share, flatten

TOKENS = random_tokens(12, 4, longest=300)  # several blocks, most of them not full
SHAPES = [(8, 4, 16), (3, 3, 8), (4, 1, 6)]


@pytest.fixture(scope="module")
def flat() -> Flat:
    owns = (np.arange(7), np.arange(4, 12))
    return flatten(
        TOKENS, [Share(adapter=k, examples=own, owners=dropout_owners(TOKENS, own)) for k, own in enumerate(owns)], torch.device("cpu")
    )


def inputs(rows: int, heads: int, groups: int, features: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(rows, n, features, dtype=torch.float64, requires_grad=True) for n in (heads, groups, groups)]


def one_by_one(flat: Flat, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None) -> torch.Tensor:
    assert flat.line is not None
    out = torch.zeros_like(q)
    for rows in flat.line.rows.split(flat.starts.diff().tolist()):
        own = [x[rows].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        out = out.index_copy(
            0, rows, functional.scaled_dot_product_attention(*own, is_causal=True, scale=scaling, enable_gqa=True)[0].transpose(0, 1)
        )
    return out


def ours(flat: Flat, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, *, reads: bool = False) -> torch.Tensor:
    assert flat.line is not None
    return causal_attention(q, k[flat.line.rows], v[flat.line.rows], flat.last_layer if reads else flat.sequences, scaling)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_it_is_attention(flat: Flat, shape: tuple[int, int, int], scaling: float | None) -> None:
    assert flat.longest > 200
    x = inputs(flat.tokens, *shape)
    expected, got = one_by_one(flat, *x, scaling), ours(flat, *x, scaling)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    g = torch.randn_like(got)
    for mine, theirs in zip(torch.autograd.grad(got, x, g), torch.autograd.grad(expected, x, g), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_what_nothing_reads_is_not_asked(flat: Flat) -> None:
    """Rows that predict come out as ever, others as zero, and no gradient comes from these."""
    x = inputs(flat.tokens, *SHAPES[0])
    got, expected = ours(flat, *x, None, reads=True), one_by_one(flat, *x, None)
    torch.testing.assert_close(got[flat.predictors], expected[flat.predictors], rtol=1e-12, atol=1e-13)
    asked = torch.cat([torch.arange(one.start, one.stop) for one in flat.last_layer])
    assert set(flat.predictors.tolist()) <= set(asked.tolist())
    assert len(asked) < flat.tokens
    silent = torch.ones(flat.tokens, dtype=torch.bool)
    silent[asked] = False
    assert not got[silent].any()
    g = torch.zeros_like(got)
    g[flat.predictors] = torch.randn_like(g[flat.predictors])
    for mine, theirs in zip(torch.autograd.grad(got, x, g), torch.autograd.grad(expected, x, g), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_keys_may_need_no_gradient(flat: Flat) -> None:
    q, k, v = inputs(flat.tokens, *SHAPES[0])
    g = torch.randn_like(q)
    with_keys = torch.autograd.grad(ours(flat, q, k, v, None), (q, v), g)
    without = torch.autograd.grad(ours(flat, q, k.detach(), v, None), (q, v), g)
    assert all(torch.equal(a, b) for a, b in zip(with_keys, without, strict=True))


def test_a_sequence_leaves_no_trace_in_its_neighbours(flat: Flat) -> None:
    """Not even where it is not finite."""
    x = inputs(flat.tokens, *SHAPES[0])
    before = ours(flat, *x, None)
    span = flat.spans[0]
    with torch.no_grad():
        for tensor in x:
            tensor[span.start : span.stop] = torch.nan
    after = ours(flat, *x, None)
    assert torch.equal(after[span.stop :], before[span.stop :])
    g = torch.randn_like(after)
    gradients = torch.autograd.grad(after, x, g)
    assert all(one[span.stop :].isfinite().all() for one in gradients)
