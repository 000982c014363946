"""Prefixes that prompts of a batch share: most of them open with the same template.

In a causal model a token's activations follow from the tokens up to it. So where prompts share a prefix, one
adapter computes the same for each of them, and the packed engine computes it once (packed/layout.py). That holds under
dropout too if the shared tokens share a mask: dropout knows a token by the example that owns it, which is the first, in
lexicographic order of the prompts, of the examples of the global batch that have the prefix. Each example's own distribution
of masks is what it always is, and so is the expected gradient.

Notation: an example's prompt here is what stands before the token that predicts its first response token, so a
row that predicts is never shared. Its bytes decide the order, equal prompts stand in the order given.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from loratune.data.batches import Tokens


def shared_prefixes(tokens: Tokens, examples: Sequence[int] | np.ndarray) -> list[tuple[int, int]]:
    """(index in `examples`, tokens that its prompt shares with the one before it), in the order of the prompts.

    Of any examples between two that share n tokens, each shares them too. So a part of a batch
    shares what it shares in the whole.
    """
    prompts = [_prompt(*tokens[int(example)]) for example in examples]
    order = sorted(range(len(prompts)), key=lambda index: (prompts[index].tobytes(), index))
    shared = [0] + [_common(prompts[a], prompts[b]) for a, b in pairwise(order)]
    return list(zip(order, shared, strict=True))


def dropout_owners(tokens: Tokens, examples: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """For each example of a global batch, int64 [its tokens]: the index of the example that owns the token."""
    lengths = np.asarray(tokens.lengths)[np.asarray(examples)]
    owners = [np.full(length, index) for index, length in enumerate(lengths)]
    for (before, _), (index, shared) in pairwise(shared_prefixes(tokens, examples)):
        owners[index][:shared] = owners[before][:shared]
    return owners


def _prompt(ids: np.ndarray, response: np.ndarray) -> np.ndarray:
    targets = np.flatnonzero(response[1:])
    return ids[: targets[0]] if len(targets) else ids


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences share from their beginning."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n
