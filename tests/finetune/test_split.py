"""No leak, exact counts, and the same answer whatever the order of the rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.errors import DataError
from loratune.finetune.data import Example, Exchange
from loratune.finetune.split import apportion, divide, draw, duplicates, group_key, identity, overlapping, quotas, shuffled


def example(instruction, about="", response="x"):
    return Example(exchanges=(Exchange(instruction, about, response),))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("What is  a cat?",), ("what is a CAT",)),
        (("What is a cat?", ""), ("What is", "a cat?")),
        (("ﬁve ①",), ("five 1",)),  # NFKC
        (("«Straße»",), ("STRASSE",)),
        (("Hi\n",), ("hi!",)),
    ],
)
def test_the_same_question(one, other):
    assert group_key(example(*one)) == group_key(example(*other))


@pytest.mark.parametrize(("one", "other"), [("2 + 3", "2 3"), ("कि", "की"), ("?", "!"), ("a cat", "a bat")])
def test_different_questions(one, other):
    assert group_key(example(one)) != group_key(example(other))


def test_a_conversation_is_known_by_its_first_question():
    long = Example(exchanges=(Exchange("Hi", "", "Hello"), Exchange("Bye", "", "See you")), system="Be brief.")
    assert group_key(long) == group_key(example("hi"))
    assert identity(long) != identity(example("Hi", "", "Hello"))


KEYS = st.lists(st.tuples(st.sampled_from("abcdefghijkl"), st.integers(0, 2)), min_size=1, max_size=60)


@given(rows=KEYS, share=st.floats(0.05, 0.95), seed=st.integers(0, 9), order=st.randoms(use_true_random=False))
def test_no_group_stands_on_both_sides(rows, share, seed, order):
    keys, sources = [k for k, _ in rows], [s for _, s in rows]
    wanted = [round(share * sources.count(s)) for s in range(3)]
    held = divide(keys, sources, wanted, seed)
    assert not {k for k, h in zip(keys, held, strict=True) if h} & {k for k, h in zip(keys, held, strict=True) if not h}
    for s in range(3):
        assert sum(h for h, source in zip(held, sources, strict=True) if source == s) <= wanted[s]
    places = list(range(len(rows)))
    order.shuffle(places)
    again = divide([keys[i] for i in places], [sources[i] for i in places], wanted, seed)
    assert [held[i] for i in places] == again.tolist()


@given(n=st.integers(1, 200), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_without_duplicates_the_counts_are_exact(n, share, seed):
    wanted = round(share * n)
    assert divide([str(i) for i in range(n)], [0] * n, [wanted], seed).sum() == wanted


def test_duplicates_leave_counts_exact_where_singles_can_fill_up():
    keys = ["big"] * 30 + [str(i) for i in range(100)]
    for seed in range(20):
        assert divide(keys, [0] * 130, [20], seed).sum() == 20


def test_seed_decides_and_every_row_has_the_same_chance():
    keys = [str(i) for i in range(50)]
    held = np.array([divide(keys, [0] * 50, [10], seed) for seed in range(400)])
    assert len({row.tobytes() for row in held}) == 400
    # Binomial(400, 0.2): mean 80, sd 8; five sd around it.
    assert np.abs(held.sum(axis=0) - 80).max() <= 40


def test_overlapping_and_duplicates():
    assert overlapping(["a", "b", "a", "c"], ["a", "z"]).tolist() == [True, False, True, False]
    assert duplicates(["a", "b", "a", "a"]) == 2


def test_shuffled_keeps_equal_texts_in_order_and_is_pinned():
    assert shuffled(["a", "b", "c", "d", "e"], 0) == [0, 4, 1, 3, 2]  # a change here changes everyone's split
    assert [i for i in shuffled(["a", "b", "a"], 1) if i != 1] == [0, 2]


@given(n=st.integers(1, 30), count=st.integers(0, 100), seed=st.integers(0, 9))
def test_draw_repeats_in_whole_passes(n, count, seed):
    drawn = draw([str(i) for i in range(n)], count, seed)
    times = np.bincount(drawn, minlength=n) if count else np.zeros(n, dtype=int)
    assert len(drawn) == count
    assert set(times.tolist()) <= {count // n, count // n + 1}
    assert count // n * n == 0 or sorted(drawn[:n].tolist()) == list(range(n))


@given(total=st.integers(0, 10_000), weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_apportion_is_exact_and_proportional(total, weights):
    shares = apportion(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - total * weight / sum(weights)) < 1 + 1e-6


def test_the_published_mix():
    assert apportion(53_610, [0.7, 0.3]) == [37_527, 16_083]
    assert apportion(13_401, [0.7, 0.3]) == [9_381, 4_020]


def test_quotas():
    assert quotas([10, 20], [None, None], None, None) == [10, 20]
    assert quotas([10, 20], [None, None], None, 6) == [2, 4]
    assert quotas([10, 20], [None, None], [0.5, 0.5], None) == [10, 10]  # as many as repeat nothing
    assert quotas([10, 20], [4, None], None, 10) == [4, 6]
    assert quotas([52_002, 15_011], [None, None], [0.7, 0.3], 53_610) == [37_527, 16_083]
    for counts in ([4, 5], [11, None]):
        with pytest.raises(DataError, match=r"own counts give .* of the 10 asked for"):
            quotas([10, 20], counts, None, 10)
    with pytest.raises(DataError, match="own counts give 4 of the 10"):
        quotas([10, 0], [4, None], None, 10)  # nothing left to share
