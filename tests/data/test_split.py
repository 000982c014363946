"""No leak, exact counts, and the same answer whatever the order of the rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.data.sources import Example, Exchange
from loratune.data.split import (
    apportion,
    divide,
    draw,
    duplicates,
    groups,
    hold_out,
    identity,
    one_spelling,
    overlapping,
    questions_of,
    quotas,
    shuffled,
)
from loratune.errors import DataError


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
        (("What is a c\u200bat\ufeff?",), ("\u2060what\u00ad is a cat",)),  # Cf: dropped, not spaces
        (("I ❤\ufe0f cats",), ("I ❤ cats",)),  # variation selector
        (("cafe\u200b\u0301",), ("café",)),
        (("a\x00 c\x07at",), ("a cat",)),
        (("a\u2003cat\u2028here",), ("a cat here",)),
        (("a\u034fb \u3164c",), ("ab c",)),  # shown as nothing, though a mark and a letter
    ],
)
def test_the_same_question(one, other):
    assert questions_of(example(*one)) == questions_of(example(*other))


@pytest.mark.parametrize(("one", "other"), [("2 + 3", "2 3"), ("कि", "की"), ("?", "!"), ("a cat", "a bat")])
def test_different_questions(one, other):
    assert questions_of(example(one)) != questions_of(example(other))


def test_punctuation_inside_words_makes_no_other_question():
    rows = [questions_of(example(text)) for text in ("What's well-known?", "whats wellknown", "What s well known", "3-2", "32", "3 2")]
    assert one_spelling(rows) == [("what s well known",)] * 3 + [("3 2",), ("32",), ("3 2",)]


def test_every_question_of_a_conversation_is_a_key():
    long = Example(exchanges=(Exchange("Hi", "", "Hello"), Exchange("Bye", "", "See you"), Exchange("hi!", "", "?")), system="Be brief.")
    assert questions_of(long) == ("hi", "bye")
    assert identity(long) != identity(example("Hi", "", "Hello"))


def test_groups_are_linked_by_any_question_and_named_by_an_opening_one():
    assert groups([("x", "b"), ("b",), ("a", "c"), ("c", "x"), ("d",), ("z", "y")]) == ["a", "a", "a", "a", "d", "z"]


ROWS = st.lists(st.lists(st.sampled_from("abcdefghijklmnopqrstuv"), min_size=1, max_size=3).map(tuple), min_size=1, max_size=40)


@given(rows=ROWS, order=st.randoms(use_true_random=False))
def test_groups_are_the_connected_components(rows, order):
    keys = groups(rows)
    for i, one in enumerate(rows):  # reachable by shared questions, the slow way
        reached = set(one)
        while any(reached & set(row) and not set(row) <= reached for row in rows):
            reached |= {q for row in rows if reached & set(row) for q in row}
        assert [keys[j] == keys[i] for j in range(len(rows))] == [bool(reached & set(row)) for row in rows]
    places = list(range(len(rows)))
    order.shuffle(places)
    assert groups([rows[i] for i in places]) == [keys[i] for i in places]


@given(first=st.lists(st.integers(0, 30), min_size=1, max_size=60), seed=st.integers(0, 9))
def test_conversations_without_common_later_questions_split_as_before(first, seed):
    """Until every question became a key, the first alone was one."""
    rows = [(f"q{n}", f"later {place}") for place, n in enumerate(first)]
    wanted = [len(rows) // 4]
    before = divide([row[0] for row in rows], [0] * len(rows), wanted, seed)
    held = hold_out(rows, [0] * len(rows), wanted, seed)
    if 2 * before.sum() >= wanted[0]:
        assert held.chosen.tolist() == before.tolist()


def sides(rows, chosen):
    return [{q for row, c in zip(rows, chosen, strict=True) if c == side for q in row} for side in (False, True)]


@given(rows=ROWS, seed=st.integers(0, 9))
def test_no_question_stands_on_both_sides_where_the_split_can_be_made(rows, seed):
    strict = divide(groups(rows), [0] * len(rows), [len(rows) // 4], seed)
    held = hold_out(rows, [0] * len(rows), [len(rows) // 4], seed)
    if 2 * strict.sum() >= len(rows) // 4:
        assert held.chosen.tolist() == strict.tolist()
        assert not set.intersection(*sides(rows, held.chosen))


def test_a_question_that_links_everything_is_given_up_and_only_that():
    rows = [(f"q{i // 2}", "go on") for i in range(100)]
    held = hold_out(rows, [0] * 100, [20], 0)
    assert held.chosen.sum() == 20
    assert set.intersection(*sides(rows, held.chosen)) == {"go on"}
    half = [(f"q{i}", "go on") for i in range(50)] + [(f"p{i}", f"r{i // 2}") for i in range(50)]
    held = hold_out(half, [0] * 100, [20], 0)
    assert held.chosen.sum() == 20
    assert not set.intersection(*sides(half, held.chosen))  # enough rows without it


def test_copies_of_a_conversation_stay_together_even_then():
    rows = [("hi", f"q{i // 4}") for i in range(100)] + [("hi", "go on")] * 4
    held = hold_out(rows, [0] * 104, [20], 0)
    assert held.chosen.sum() == 20
    assert set.intersection(*sides(rows, held.chosen)) == {"hi"}


def test_one_question_asked_by_all_cannot_be_given_up():
    assert hold_out([("a",)] * 9, [0] * 9, [3], 0).chosen.sum() == 0


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
    assert overlapping([("a",), ("x", "b"), ("a",), ("c",)], [0] * 4, [("z", "a")]).tolist() == [True, False, True, False]
    assert overlapping([("a", "b"), ("c", "d"), ("e",), ("f",)], [0] * 4, [("d",), ("z", "b")]).tolist() == [True, True, False, False]
    assert duplicates([["a", "b", "a", "a"], ["b", "c", "c"]]) == [2, 2]  # with those of the sources before


def test_a_common_question_does_not_empty_training():
    rows = [(f"q{i}", "go on") for i in range(10)]
    leaks = overlapping(rows, [0] * 10, [("q3", "go on"), ("p", "go on")])
    assert np.flatnonzero(leaks).tolist() == [3]
    assert overlapping([("a",)] * 9, [0] * 9, [("a",)]).all()


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
        with pytest.raises(DataError, match=r"own counts give .* of the 10 requested"):
            quotas([10, 20], counts, None, 10)
    with pytest.raises(DataError, match="own counts give 4 of the 10"):
        quotas([10, 0], [4, None], None, 10)  # nothing left to share
