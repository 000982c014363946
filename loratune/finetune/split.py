"""Training and validation without a leak, as a pure function of the texts and a seed.

Rows with the same normalised question form a group, and a group stands wholly on one side. All
random choices sort by a keyed hash of the row's own text, so neither the order of the rows nor the
random-number library of the day changes who goes where.

Notation: rows are numbered 0..N-1, sources 0..S-1; `keys[i]` is row i's group.
"""

import functools
import hashlib
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from loratune.errors import DataError
from loratune.finetune.data import Example


def group_key(example: Example) -> str:
    """The normalised instruction + input that opens an example: NFKC, casefolded, no punctuation, single spaces.

    A conversation is known by its first question: cut or regenerated copies of it then stay together.
    A question of punctuation alone is kept as it is.
    """
    first = example.exchanges[0]
    text = unicodedata.normalize("NFKC", f"{first.instruction} {first.input}").casefold()
    return " ".join(text.translate(_punctuation()).split()) or " ".join(text.split())


@functools.cache
def _punctuation() -> dict[int, str]:
    return {code: " " for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith("P")}


def identity(example: Example) -> str:
    """A text that tells an example from every different one."""
    parts = [example.system, *(part for exchange in example.exchanges for part in exchange[:3])]
    # Fields that most data lack are added where they are used, so that splits of other data stay what they were.
    rare = [example.tools, *(f"{exchange.scored} {exchange.reasoning}" for exchange in example.exchanges)]
    return "\x1f".join([*parts, *rare] if example.tools or any(e.reasoning or not e.scored for e in example.exchanges) else parts)


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


def overlapping(keys: Sequence[str], validation_keys: Sequence[str]) -> np.ndarray:
    """Bool [N]: rows whose group also stands in a given validation set, and which therefore must not train."""
    held_out = set(validation_keys)
    return np.array([key in held_out for key in keys], dtype=bool)


def duplicates(keys: Sequence[str]) -> int:
    """Rows that have an earlier row in their group."""
    return len(keys) - len(set(keys))


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
        raise DataError(f"the sources' own counts give {fixed:,} of the {total:,} asked for in all. Make them agree, or leave one out.")
    else:
        shares = apportion(total - fixed, [weights[s] if weights else sizes[s] for s in free]) if free else []
    by_source = dict(zip(free, shares, strict=True))
    return [by_source[s] if count is None else count for s, count in enumerate(counts)]
