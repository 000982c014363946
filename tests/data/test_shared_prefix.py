"""Beginnings that prompts of a batch share, and whose tokens they are for dropout."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokens import random_tokens

from loratune.data.prepared import PreparedTokens, pack_tokens
from loratune.data.shared_prefix import dropout_owners, shared_prefixes

TOKENS = random_tokens(60, 5)


def written(*examples: tuple[list[int], int]) -> PreparedTokens:
    """Examples of (tokens, where the response begins)."""
    return pack_tokens([(np.asarray(ids, dtype=np.int32), np.arange(len(ids)) >= start) for ids, start in examples])


def test_a_template_belongs_to_the_first_in_order() -> None:
    tokens = written(([1, 2, 3, 9, 9], 4), ([1, 2, 3, 4, 8, 8], 5), ([5, 6, 7], 2), ([1, 2, 3, 4, 7, 7], 5))
    assert shared_prefixes(tokens, range(4)) == [(0, 0), (1, 3), (3, 4), (2, 0)]
    slots = [own.tolist() for own in dropout_owners(tokens, range(4))]
    assert slots == [[0] * 5, [0, 0, 0, 1, 1, 1], [2] * 3, [0, 0, 0, 1, 3, 3]]


def test_what_predicts_a_response_is_never_shared() -> None:
    """The same question twice, with two answers: its last token predicts the first token of both."""
    tokens = written(([1, 2, 3, 4, 8], 4), ([1, 2, 3, 4, 9], 4))
    assert shared_prefixes(tokens, [0, 1]) == [(0, 0), (1, 3)]


def test_no_response_and_no_prompt() -> None:
    tokens = written(([1, 2], 2), ([1, 2, 3], 0), ([1, 2], 2))
    assert shared_prefixes(tokens, range(3)) == [(1, 0), (0, 0), (2, 2)]


@given(st.lists(st.integers(0, 59), min_size=1, max_size=20, unique=True), st.data())
def test_a_part_of_a_batch_shares_no_token_that_dropout_knows_apart(batch: list[int], data: st.DataObject) -> None:
    slots = dropout_owners(TOKENS, batch)
    part = data.draw(st.lists(st.sampled_from(range(len(batch))), min_size=1, unique=True))
    order = shared_prefixes(TOKENS, [batch[place] for place in part])
    for (before, _), (place, shared) in pairwise(order):
        one, two = part[before], part[place]
        assert (slots[one][:shared] == slots[two][:shared]).all()
        assert (TOKENS[batch[one]][0][:shared] == TOKENS[batch[two]][0][:shared]).all()


@given(st.permutations(range(12)))
def test_the_owner_depends_on_the_examples_not_on_their_order(batch: list[int]) -> None:
    """But for equal prompts, of which there are none here."""
    usual, other = dropout_owners(TOKENS, range(12)), dropout_owners(TOKENS, batch)
    for place, example in enumerate(batch):
        assert [batch[slot] for slot in other[place]] == usual[example].tolist()
