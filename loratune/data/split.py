"""Training and validation without a leak, as a pure function of the texts and a seed.

Rows that share a normalised question form a group, and so do rows that are linked by others (union-find); a group stands
wholly on one side. All random choices sort by a keyed hash of the row's own text, so neither the order of the rows nor the
random-number library of the day changes who goes where.

Questions that many conversations share ("go on") can link so many rows that no validation set is left. Only then are the
most common ones given up as links, of rows that have another question, and what stands on both sides is counted.

Notation: rows are numbered 0..N-1, sources 0..S-1; `questions[i]` are row i's, `keys[i]` is the name of its group.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from loratune.data.normalization import normalised
from loratune.data.sources import Example
from loratune.errors import DataError

_SPACE = re.compile(r"(?<!\d) | (?!\d)")  # not between two numbers: 1 2 and 12 are different questions
Questions = tuple[str, ...]  # of one row, at least one


def questions_of(example: Example) -> Questions:
    """Every question of a conversation, instruction + input, normalised, in order and each once. A result of a tool is none."""
    asked = [exchange for exchange in example.exchanges if exchange.instruction or exchange.input]
    return tuple(dict.fromkeys(normalised(f"{exchange.instruction} {exchange.input}") for exchange in asked))


def one_spelling(questions: Sequence[Questions]) -> list[Questions]:
    """The same rows with one text, the first in the alphabet, for all questions that differ only in spaces between words.

    Where punctuation is left out of a word or set into it: "what's" (what s) and "whats", "well-known" and "wellknown".
    """
    spelt: dict[str, str] = {}
    for question in {question for row in questions for question in row}:
        letters = _SPACE.sub("", question)
        spelt[letters] = min(spelt.get(letters, question), question)
    return [tuple(dict.fromkeys(spelt[_SPACE.sub("", question)] for question in row)) for row in questions]


def groups(questions: Sequence[Questions]) -> list[str]:
    """The name of each row's group: the first in the alphabet of the questions that open the group's rows."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    for row in questions:
        for key in row:
            parent.setdefault(key, key)
            parent[root(key)] = root(row[0])
    names: dict[str, str] = {}
    for row in questions:
        group = root(row[0])
        names[group] = min(names.get(group, row[0]), row[0])
    return [names[root(row[0])] for row in questions]


def identity(example: Example) -> str:
    """A text that tells an example from every different one."""
    parts = [example.system, *(part for exchange in example.exchanges for part in exchange[:3])]
    # Fields that most data lack are added where they are used, so that splits of other data stay what they were.
    rare = [example.tools, *(f"{exchange.scored} {exchange.reasoning}" for exchange in example.exchanges)]
    told = [text for exchange in example.exchanges for text in (exchange.asked, exchange.calls) if text]
    if not (example.tools or told or any(e.reasoning or not e.scored for e in example.exchanges)):
        return "\x1f".join(parts)
    return "\x1f".join([*parts, *rare, *told])


def shuffled(texts: Sequence[str], seed: int) -> list[int]:
    """A random order of `texts` that depends on the texts and the seed only; equal texts keep their order."""
    key = str(seed).encode()

    def rank(place: int) -> tuple[bytes, str]:
        return hashlib.blake2b(texts[place].encode(), key=key, digest_size=16).digest(), texts[place]

    return sorted(range(len(texts)), key=rank)


def divide(keys: Sequence[str], sources: Sequence[int], wanted: Sequence[int], seed: int) -> np.ndarray:
    """Choose whole groups for validation, `wanted[s]` rows from source s (fewer only where groups are too large).

    Groups are visited in random order and taken where all their rows still fit.
    Returns bool [N], True: validation.
    """
    sizes: dict[str, Counter[int]] = {}
    for key, source in zip(keys, sources, strict=True):
        sizes.setdefault(key, Counter())[source] += 1
    left = list(wanted)
    chosen = set()
    groups = list(sizes)
    for place in shuffled(groups, seed):
        group = sizes[groups[place]]
        if all(left[source] >= rows for source, rows in group.items()):
            chosen.add(groups[place])
            for source, rows in group.items():
                left[source] -= rows
    return np.array([key in chosen for key in keys], dtype=bool)


class Held(NamedTuple):
    """Which rows stand in validation, and the groups that were chosen from."""

    chosen: np.ndarray  # bool [N]
    keys: list[str]


def hold_out(questions: Sequence[Questions], sources: Sequence[int], wanted: Sequence[int], seed: int) -> Held:
    """`divide` by `groups`. Where a source gives less than half of what is wanted, common questions are given up as links."""
    best = Held(np.zeros(len(questions), dtype=bool), [])
    for kept in _loosened(questions):
        keys = groups(kept)
        held = Held(divide(keys, sources, wanted, seed), keys)
        if (2 * np.bincount(np.array(sources)[held.chosen], minlength=len(wanted)) >= np.array(wanted)).all():
            return held
        if not best.keys or held.chosen.sum() > best.chosen.sum():
            best = held
    return best


def overlapping(questions: Sequence[Questions], sources: Sequence[int], held_out: Sequence[Questions]) -> np.ndarray:
    """Bool [N]: rows that ask what also stands in a given validation set, and which therefore must not train.

    Where a source would lose more than half of its rows, common questions are given up as links.
    """
    best = np.ones(len(questions), dtype=bool)
    for kept in _loosened([*questions, *held_out]):
        asked = {key for row in kept[len(questions) :] for key in row}
        leaks = np.array([not asked.isdisjoint(row) for row in kept[: len(questions)]], dtype=bool)
        if (2 * np.bincount(np.array(sources)[leaks], minlength=max(sources) + 1) <= np.bincount(sources)).all():
            return leaks
        if leaks.sum() < best.sum():
            best = leaks
    return best


def _loosened(questions: Sequence[Questions]) -> Iterator[list[Questions]]:
    """The questions of each row; then without those of more than n rows, n halved each time. A row keeps its rarest one."""
    counts = Counter(key for row in questions for key in row)
    yield list(questions)
    limit = max((counts[key] for row in questions if len(row) > 1 for key in row), default=1)
    while limit > 1:
        limit //= 2
        yield [tuple(key for key in row if counts[key] <= limit) or (min(row, key=lambda k: (counts[k], k)),) for row in questions]


def on_both_sides(train: Sequence[Questions], validation: Sequence[Questions]) -> Counter[str]:
    """Questions of the training rows that validation rows ask too -> the number of these validation rows."""
    trained = {key for row in train for key in row}
    return Counter(key for row in validation for key in row if key in trained)


def duplicates(keys: Sequence[Sequence[str]]) -> list[int]:
    """Of each source's rows those that have an earlier row in their group, in the same source or an earlier one."""
    seen: set[str] = set()
    found = []
    for source in keys:
        before = len(seen)
        seen.update(source)
        found.append(len(source) - (len(seen) - before))
    return found


def draw(texts: Sequence[str], count: int, seed: int) -> np.ndarray:
    """`count` of the rows in random order; more than there are: whole passes, then a random rest.

    Returns int64 [count].
    """
    return np.resize(np.array(shuffled(texts, seed), dtype=np.int64), count)


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total`, as near to proportional to `weights` as can be (largest remainder)."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(x + 1e-9) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda s: shares[s] - exact[s])
    for s in by_remainder[: total - sum(shares)]:
        shares[s] += 1
    return shares


def quotas(sizes: Sequence[int], counts: Sequence[int | None], weights: Sequence[float] | None, total: int | None) -> list[int]:
    """How many examples each source gives.

    A source's own count stands. The others share what `total` leaves by weight, or by size. Without a
    total they give all they have; with weights, as many in that proportion as repeats none.

    Raises DataError when counts and total contradict each other, or nothing is there to share it.
    """
    fixed = sum(count for count in counts if count is not None)
    free = [s for s, count in enumerate(counts) if count is None]
    if total is None:
        scale = min((sizes[s] / weights[s] for s in free), default=0.0) if weights else 0.0
        shares = [int(scale * weights[s] + 1e-9) if weights else sizes[s] for s in free]
    elif fixed > total or (fixed < total and not any(sizes[s] for s in free)):
        raise DataError(f"the sources' own counts give {fixed:,} of the {total:,} requested in all. Make them agree, or leave one out.")
    else:
        shares = apportion(total - fixed, [weights[s] if weights else sizes[s] for s in free]) if free else []
    by_source = dict(zip(free, shares, strict=True))
    return [by_source[s] if count is None else count for s, count in enumerate(counts)]
