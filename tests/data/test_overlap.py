"""Near-duplicates against a slow exact search, and benchmark items found in documents."""

import random
import time

import pytest

from loratune.data.near_duplicates import held_items, near_duplicates
from loratune.data.normalization import normalised, words


def runs(text, n=3):
    own = words(text)
    return {tuple(own[i : i + n]) for i in range(len(own) - n + 1)}


def jaccard(one, other):
    return len(runs(one) & runs(other)) / max(1, len(runs(one) | runs(other)))


def test_the_same_as_a_slow_exact_search():
    random.seed(1)
    vocabulary = [f"w{i}" for i in range(400)]
    others = [" ".join(random.choices(vocabulary, k=random.randint(1, 40))) for _ in range(150)]
    texts = []
    for other in others[:80]:
        own = other.split()
        for _ in range(random.randint(0, 2)):
            own[random.randrange(len(own))] = random.choice(vocabulary)
        texts.append(" ".join(own))
    found = {pair.place: pair for pair in near_duplicates(texts, others)}
    for place, text in enumerate(texts):
        best = max((jaccard(text, other) for other in others if other != text), default=0.0)
        assert (place in found) == (best >= 0.7), (text, best)
        if place in found:
            assert found[place].similarity == pytest.approx(best) == jaccard(text, others[found[place].other])
    assert 10 < len(found) < 80


def test_what_is_near_and_what_is_not():
    one = normalised("Write a short poem of four lines about a black cat that sleeps on the warm roof of the old house")
    near = normalised("Write a short poem of four lines about a black cat that sleeps on the warm roof of the old barn!")
    far = normalised("Write a short poem of four lines about two dogs")
    assert [pair.other for pair in near_duplicates([one], [far, near])] == [1]
    assert near_duplicates([one], [one, far]) == []  # equal is not near: that is the split's to keep
    assert near_duplicates(["why", ""], ["why not", "why"]) == []
    assert near_duplicates([one], []) == near_duplicates([], [one]) == []
    chinese = [normalised("请用一句话介绍一下北京这座城市的历史"), normalised("请用一句话介绍一下北京这座城市的历史吧")]
    assert len(near_duplicates(chinese[:1], chinese[1:])) == 1


def test_thousands_of_one_template_do_not_take_quadratic_time():
    texts = [f"what is the secret of box {i}" for i in range(8000)]
    began = time.process_time()
    assert near_duplicates(texts[:2000], texts[2000:]) == []
    assert time.process_time() - began < 5  # 12 million pairs


LONG = "def has close elements numbers threshold check if in given list of numbers are any two numbers closer"


def test_items_in_documents():
    items = [[LONG], ["What is the square root of minus one over two?"], ["Too short to say."], ["nothing of this stands anywhere " * 3]]
    documents = ["x " * 50, f"Please: {LONG.upper()}, thanks.", "What is... the square\u200b root, of minus one (over two)? i/2", LONG[:40]]
    (found,) = held_items([items], documents)
    assert found.compared == 3
    assert found.documents == {0: [1], 1: [2]}
    assert found.shown[0] == " ".join(normalised(LONG).split()[:13])


def test_a_run_never_spans_two_documents():
    own = LONG.split()
    (found,) = held_items([[[LONG]]], [" ".join(own[:7]), " ".join(own[7:])])
    assert found.documents == {}
    (found,) = held_items([[[" ".join(own[:13])]]], ["pad"] * 4500 + [LONG])  # beyond the first chunks
    assert found.documents == {0: [4500]}


def test_what_more_than_ten_items_hold_is_a_template():
    head = "Is the following sentence plausible, given all that you know about sports and their players today? "
    items = [[f"{head} {name} scored a goal for the blue team in the last minute of the long game"] for name in "abcdefghijkl"]
    (found,) = held_items([items], [head])
    assert found.documents == {}
    (found,) = held_items([items], [items[3][0]])
    assert 3 in found.documents
    assert found.compared == 12


def test_several_benchmarks_at_once():
    first, second = held_items([[[LONG]], [["some other thing that nobody ever asked of anyone before this very day"]]], [LONG])
    assert (first.documents, second.documents) == ({0: [0]}, {})


def test_the_real_benchmarks(shared_data):
    from loratune.downstream.tasks.benchmarks import build_benchmark

    sets = []
    for name in ("humaneval", "bbh"):
        benchmark = build_benchmark(name, shared_data, weaker=True)
        sets.append([benchmark.texts(item) for item in benchmark.items()])
    planted = [sets[0][7][0], sets[1][100][0]]
    code, bbh = held_items(sets, ["A merger about a cat.", *[f"ItemAnswer this.\n{text}\nThank you." for text in planted]])
    assert code.documents == {7: [1], 29: [1]}  # two problems with the same head and half a sentence in common
    assert bbh.documents == {100: [2]}
    assert code.compared == 164
