"""Flat batches: shared beginnings stand there once, and attention gets whole sequences."""

import numpy as np
import pytest
import torch
from tiny_tokens import random_tokens

from loratune.data.shared_prefix import dropout_owners
from loratune.finetune.packed.layout import Flat, RowCopies, Share, flatten

TOKENS = random_tokens(30, 9)
EXAMPLES = [np.arange(0, 12), np.arange(5, 20)]  # of two adapters, which have some in common


@pytest.fixture(scope="module")
def flat() -> Flat:
    shares = [Share(adapter=k, examples=own, owners=dropout_owners(TOKENS, own)) for k, own in enumerate(EXAMPLES)]
    return flatten(TOKENS, shares, torch.device("cpu"))


def sequences(flat: Flat) -> list[list[int]]:
    assert flat.line is not None
    along = flat.line.rows.split(flat.starts.diff().tolist())
    return [rows.tolist() for rows in along]


def test_every_sequence_is_there_whole(flat: Flat) -> None:
    found = sorted(flat.ids[0, rows].tolist() for rows in sequences(flat))
    assert found == sorted(TOKENS[i][0].tolist() for own in EXAMPLES for i in own)
    assert all(flat.positions[0, rows].tolist() == list(range(len(rows))) for rows in sequences(flat))
    assert flat.tokens < flat.starts[-1], "nothing was shared, so this test shows nothing"


def test_adapters_share_no_row(flat: Flat) -> None:
    one, two = flat.spans
    assert (one.start, one.stop, two.stop) == (0, two.start, flat.tokens)
    for rows, owner in zip(sequences(flat), [0] * 12 + [1] * 15, strict=True):
        assert all(flat.spans[owner].start <= row < flat.spans[owner].stop for row in rows)


def test_what_predicts_is_there_once_for_each_response_token(flat: Flat) -> None:
    assert len(set(flat.predictors.tolist())) == len(flat.predictors)
    assert len(flat.labels) == sum(int(TOKENS[i][1][1:].sum()) for own in EXAMPLES for i in own)


@pytest.mark.parametrize("kind", ["line", "buckets"])
def test_rows_go_out_and_come_back(flat: Flat, kind: str) -> None:
    copies: RowCopies = getattr(flat, kind)
    x = torch.randn(flat.tokens, 3, dtype=torch.float64)
    assert torch.equal(copies.first_copies(copies.copy(x)), x)
    real = torch.cat([copies.first, copies.further])
    g = torch.zeros(len(copies.rows), 3, dtype=torch.float64)
    g[real] = torch.randn(len(real), 3, dtype=torch.float64)
    torch.testing.assert_close(copies.summed(g), torch.zeros_like(x).index_add(0, copies.rows, g))
    assert len(real.unique()) == len(real) == flat.starts[-1]


def test_without_anything_shared_there_is_no_line() -> None:
    assert flatten(TOKENS, [Share(adapter=0, examples=np.asarray([3]))], torch.device("cpu")).line is None
