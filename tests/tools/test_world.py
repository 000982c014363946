"""The world's text: deterministic, consistent with its tables, and free of answered instructions."""

import itertools
import random
import re

import pytest

from tools.make_demo import words
from tools.make_demo.world import PARAGRAPHS, SENTENCES, documents, fact


def some_documents(seed: int, number: int = 3000) -> list[str]:
    return list(itertools.islice(documents(random.Random(seed)), number))


def test_documents_are_a_function_of_the_seed() -> None:
    assert some_documents(3) == some_documents(3)
    assert some_documents(3) != some_documents(4)


def test_no_document_holds_a_prompt_form() -> None:
    assert not [text for text in some_documents(5) if "###" in text or "Below is" in text]


def test_every_stated_fact_agrees_with_the_table() -> None:
    text = "\n".join(some_documents(6, number=6000))
    for attribute, sentence in SENTENCES.items():
        pattern = re.escape(sentence).replace(r"\{animal\}", r"(\w+)").replace(r"\{value\}", r"(\w+)")
        stated = {(animal, value) for animal, value in re.findall(pattern, text) if animal in words.ANIMALS}
        assert len(stated) == len(words.ANIMALS), f"{attribute} of some animal is never told"
        assert all(fact(animal, attribute) == value for animal, value in stated)


def test_every_sum_and_comparison_is_right() -> None:
    text = "\n".join(some_documents(7))
    sums = re.findall(r"(\d+) \+ (\d+) = (\d+)", text)
    assert len(sums) > 50
    assert all(int(a) + int(b) == int(c) for a, b, c in sums)
    compared = re.findall(r"The (\w+) is bigger than the (\w+)\.", text)
    assert len(compared) > 50
    assert all(words.SIZE[big] > words.SIZE[small] for big, small in compared)


@pytest.mark.parametrize("kind", [kind for _, kind in PARAGRAPHS], ids=lambda kind: kind.__name__)
def test_every_paragraph_is_plain_text(kind) -> None:  # type: ignore[no-untyped-def]
    rng = random.Random(0)
    written = {kind(rng) for _ in range(200)}
    assert len(written) > 40
    for text in written:
        assert text.isascii()
        assert text == text.strip()
        assert "{" not in text


def test_the_tables_do_not_contradict_each_other() -> None:
    assert all(words.OPPOSITE_OF[words.OPPOSITE_OF[word]] == word for word in words.OPPOSITE_OF)
    assert len(words.OPPOSITE_OF) == 2 * len(words.OPPOSITES), "a word stands in two pairs of opposites"
    listed = [word for kind in words.CATEGORIES.values() for word in kind]
    assert sorted(listed) == sorted(set(listed)), "a word stands in two categories"
