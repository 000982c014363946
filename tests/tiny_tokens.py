"""Tokenised examples of random lengths, many of which begin alike."""

import numpy as np

from loratune.data.prepared import PreparedTokens, pack_tokens

VOCABULARY = 96
TEMPLATES = ([], [7, 11, 13, 17], [7, 11, 13, 17, 19, 23, 29])  # what prompts begin with


def random_tokens(n: int, seed: int, longest: int = 24) -> PreparedTokens:
    """`n` examples of random lengths; tokens follow one another with a pattern that can be learnt; many begin alike."""
    generator = np.random.default_rng(seed)
    examples = []
    for _ in range(n):
        length = int(generator.integers(5, longest))
        ids = (generator.integers(0, 8) + 3 * np.arange(length)) % VOCABULARY
        ids = np.where(generator.random(length) < 0.2, generator.integers(0, VOCABULARY, length), ids)
        template = TEMPLATES[generator.integers(3)][: length - 1]
        ids[: len(template)] = template
        mask = np.arange(length) >= generator.integers(0, length - 1)
        examples.append((ids.astype(np.int32), mask))
    return pack_tokens(examples)
