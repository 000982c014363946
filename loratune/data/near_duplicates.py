"""What two sets of texts have in common, by runs of n words: near-duplicates, and benchmark items inside training data.

Texts are `normalised`. A run of words is known by a 64-bit hash, a polynomial of its words' hashes: two different runs have
the same one with a chance of about 5e-20.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

from loratune.data.normalization import normalised, words

N = 13  # words: Brown et al. 2020, Language Models are Few-Shot Learners (arXiv 2005.14165), appendix C
SHORTEST = 8  # words of a shorter text that is compared as a whole; the same source's lower bound
COMMON = 10  # a run that more items of a benchmark hold is its template
_RUN = 3  # words of the runs by which near-duplicates are found
_NEAR = 0.7
_CANDIDATES = 200  # texts compared with one question, at most
_CHUNK = 2000  # documents compared at once
_BASE = np.uint64(0x9E3779B97F4A7C15)


class Near(NamedTuple):
    """A pair of texts that are nearly the same."""

    place: int  # in the first set
    other: int  # in the second set
    similarity: float  # Jaccard, runs in common / runs in either


def near_duplicates(texts: Sequence[str], others: Sequence[str]) -> list[Near]:
    """For each of the normalised `texts` the most similar of `others`, where at least 0.7 of their runs of three words are the same.

    Equal texts, and texts of fewer than three words, are not pairs. Two sets that are this similar share one of the
    1 + floor(0.3 m) rarest of a text's m runs, so only texts with such a run are compared, at most 200 of them with each text: where
    thousands are alike, some pairs are not seen and the number is a lower bound. Time and memory are linear in the words.
    """
    hashes: dict[str, int] = {}
    runs, starts = _run_sets(others, hashes)
    owners = np.repeat(np.arange(len(others)), np.diff(starts))
    order = np.argsort(runs, kind="stable")
    known, first, frequency = np.unique(runs[order], return_index=True, return_counts=True)
    own_runs, own_starts = _run_sets(texts, hashes)
    found = []
    for place, text in enumerate(texts):
        own = own_runs[own_starts[place] : own_starts[place + 1]]
        if not len(own) or not len(known):
            continue
        at = np.minimum(np.searchsorted(known, own), len(known) - 1)
        times = np.where(known[at] == own, frequency[at], 0)
        candidates: set[int] = set()
        for rare in np.argsort(times, kind="stable")[: len(own) - int(np.ceil(_NEAR * len(own) - 1e-9)) + 1]:
            begin = first[at[rare]]
            room = _CANDIDATES - len(candidates)
            candidates.update(owners[order[begin : begin + min(times[rare], room)]].tolist())
        near = np.array(sorted(candidates), dtype=np.int64)
        sizes = starts[near + 1] - starts[near]
        fitting = (sizes >= _NEAR * len(own)) & (_NEAR * sizes <= len(own))
        near, sizes = near[fitting], sizes[fitting]
        if not len(near):
            continue
        begins = np.cumsum(sizes) - sizes
        theirs = runs[np.arange(sizes.sum()) + np.repeat(starts[near] - begins, sizes)]
        shared = np.add.reduceat(_among(theirs, own), begins, dtype=np.int64)
        similar = shared / (len(own) + sizes - shared)
        for best in np.argsort(-similar, kind="stable"):
            if similar[best] < _NEAR:
                break
            if others[near[best]] != text:
                found.append(Near(place, int(near[best]), float(similar[best])))
                break
    return found


@dataclass
class Found:
    """Which items of a set stand in documents."""

    compared: int  # items long enough to be compared
    documents: dict[int, list[int]] = field(default_factory=dict)  # item -> documents that hold a part of it
    shown: dict[int, str] = field(default_factory=dict)  # item -> words in common, in its first document
    runs: dict[int, int] = field(default_factory=dict)  # item -> places in documents where a part of it stands


def held_items(sets: Sequence[Sequence[Sequence[str]]], documents: Iterable[str]) -> list[Found]:
    """For each set of items (an item being one text or more) those of which a part stands in one of the `documents`.

    A part is any run of 13 words of a text, or the whole of a text of 8 to 12 words; shorter ones say too little. A run
    that more than ten items of the set hold is the benchmark's template and no part. Memory: 2,000 documents at a time.
    """
    hashes: dict[str, int] = {}
    parts = [_parts(items, hashes) for items in sets]
    found = [Found(compared=len({item for _, items in part.values() for item in items.tolist()})) for part in parts]
    wanted = {length: np.unique(np.concatenate([p[length][0] for p in parts if length in p])) for length in {n for p in parts for n in p}}
    waiting, number = iter(documents), 0
    while chunk := list(islice(waiting, _CHUNK)):
        spoken = [words(normalised(text)) for text in chunk]
        flat = _hashed([word for own in spoken for word in own], hashes)
        sizes = np.array([len(own) for own in spoken], dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        owners = np.repeat(np.arange(len(chunk)), sizes)
        for length, keys in wanted.items():
            runs = _runs(flat, length)
            hits = np.flatnonzero(_among(runs, keys))
            hits = hits[owners[hits] == owners[hits + length - 1]]  # runs that end in the document in which they began
            for hit in hits.tolist():
                document = int(owners[hit])
                begin = hit - starts[document]
                shown = " ".join(spoken[document][begin : begin + length])
                for part, into in zip(parts, found, strict=True):
                    for item in _owners(part, length, runs[hit]):
                        into.documents.setdefault(item, []).append(number + document)
                        into.shown.setdefault(item, shown)
        number += len(chunk)
    for into in found:
        into.runs = {item: len(places) for item, places in into.documents.items()}
        into.documents = {item: sorted(set(places)) for item, places in into.documents.items()}
    return found


def _among(runs: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Bool: which of the runs stand among the ascending keys."""
    if not len(keys):
        return np.zeros(len(runs), dtype=bool)
    return keys[np.minimum(np.searchsorted(keys, runs), len(keys) - 1)] == runs


def _owners(part: dict[int, tuple[np.ndarray, np.ndarray]], length: int, run: np.uint64) -> list[int]:
    """The items that hold a run."""
    if length not in part:
        return []
    keys, items = part[length]
    return [int(item) for item in items[np.searchsorted(keys, run, "left") : np.searchsorted(keys, run, "right")]]


def _parts(items: Sequence[Sequence[str]], hashes: dict[str, int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Length -> (runs uint64, ascending; the item of each), without those that too many items hold."""
    collected: dict[int, list[tuple[np.ndarray, int]]] = {}
    for item, texts in enumerate(items):
        for text in texts:
            own = words(normalised(text))
            if len(own) >= SHORTEST:
                length = min(len(own), N)
                collected.setdefault(length, []).append((_runs(_hashed(own, hashes), length), item))
    found = {}
    for length, pairs in collected.items():
        runs = np.concatenate([own for own, _ in pairs])
        owners = np.repeat([item for _, item in pairs], [len(own) for own, _ in pairs])
        order = np.lexsort((owners, runs))
        runs, owners = runs[order], owners[order]
        once = np.append(True, (runs[1:] != runs[:-1]) | (owners[1:] != owners[:-1]))
        runs, owners = runs[once], owners[once]
        begins = np.flatnonzero(np.append(True, runs[1:] != runs[:-1]))
        times = np.diff(np.append(begins, len(runs)))
        rare = np.repeat(times <= COMMON, times)
        found[length] = (runs[rare], owners[rare])
    return found


def _run_sets(texts: Sequence[str], hashes: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct runs of three words of each text, ascending, one text after the other; text i's are starts[i] to starts[i + 1]."""
    sets = [np.unique(_runs(_hashed(words(text), hashes), _RUN)) for text in texts]
    return np.concatenate([np.zeros(0, np.uint64), *sets]), np.cumsum([0, *map(len, sets)])


def _runs(flat: np.ndarray, length: int) -> np.ndarray:
    """uint64 hashes of all runs of `length` words, [words - length + 1]."""
    count = max(len(flat) - length + 1, 0)
    found = np.zeros(count, dtype=np.uint64)
    for place in range(length):
        found = found * _BASE + flat[place : place + count]
    return found


def _hashed(spoken: Sequence[str], hashes: dict[str, int]) -> np.ndarray:
    for word in spoken:
        if word not in hashes:
            hashes[word] = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest())
    return np.array([hashes[word] for word in spoken], dtype=np.uint64)
