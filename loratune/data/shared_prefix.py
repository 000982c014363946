"""Prompts of a batch that begin alike: most of them open with the same template.

In a causal model a token's activations follow from the tokens up to it. So where prompts share a beginning, one
adapter computes the same for each of them, and the packed engine computes it once (packed/layout.py). That holds under
dropout too if the shared tokens share a mask: dropout knows a token by the example that owns it, which is the first, in
lexicographic order of the prompts, of the examples of the global batch that begin so. Each example's own distribution
of masks is what it always is, and so is the expected gradient.

Notation: an example's prompt here is what stands before the token that predicts its first response token, so a
row that predicts is never shared. Its bytes decide the order, equal prompts stand in the order given.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from loratune.data.batches import Tokens


def beginnings(tokens: Tokens, examples: Sequence[int] | np.ndarray) -> list[tuple[int, int]]:
    """The examples' places in order of their prompts, each with how many tokens its prompt shares with the one before it.

    Of any examples between two that share n tokens, each shares them too. So the order of a part of a batch tells of
    the same sharing as the order of the whole.
    """
    prompts = [_prompt(*tokens[int(example)]) for example in examples]
    order = sorted(range(len(prompts)), key=lambda place: (prompts[place].tobytes(), place))
    shared = [0] + [_common(prompts[a], prompts[b]) for a, b in pairwise(order)]
    return list(zip(order, shared, strict=True))


def dropout_slots(tokens: Tokens, examples: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """For each example of a global batch, int64 [its tokens]: the place of the example that owns the token."""
    lengths = np.asarray(tokens.lengths)[np.asarray(examples)]
    slots = [np.full(length, place) for place, length in enumerate(lengths)]
    order = beginnings(tokens, examples)
    for (before, _), (place, shared) in pairwise(order):
        slots[place][:shared] = slots[before][:shared]
    return slots


def _prompt(ids: np.ndarray, response: np.ndarray) -> np.ndarray:
    targets = np.flatnonzero(response[1:])
    return ids[: targets[0]] if len(targets) else ids


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences share from their beginning."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n
