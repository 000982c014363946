"""Forward passes of the frozen model behind a key-value cache: rows padded on the left, K blocks of them.

Notation: K adapters, n rows each, R = K n; P tokens of a shared prefix, T tokens after it, V words;
G key and value heads, D their features.
"""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers.cache_utils import DynamicLayer

from loratune.downstream.answering.last_token import LastTokenOnly
from loratune.errors import ModelError
from loratune.finetune.model import BaseModel
from loratune.finetune.rope import sides_of

SPARE = 16  # tokens that a cache has room for before it grows
_TOKENS = {"cpu": 1536, "cuda": 32768}  # in a pass over prompts; on a CPU what its caches hold

Layers = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer, [R, G, P + T, D]
Blocks = Callable[[int, int], contextlib.AbstractContextManager[None]]


class Forward:
    """Runs `base`. Raises ModelError for a model without a key-value cache.

    only: while what it gives is open, passes hold the rows of blocks `first` to `stop` alone.
    """

    def __init__(self, base: BaseModel, only: Blocks = lambda first, stop: contextlib.nullcontext()) -> None:
        self.base, self._only = base, only
        self.tokens = _TOKENS.get(base.device.type, _TOKENS["cuda"])
        config = base.model.config.get_text_config()
        self.context = context_of(config)
        self._known = inspect.signature(base.model.forward).parameters
        if "past_key_values" not in self._known or getattr(base.model, "_is_stateful", False):
            raise ModelError(f"{type(base.model).__name__} keeps no key-value cache, which generating answers needs. It cannot be scored.")
        self._sides = sides_of(config)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._last_token = LastTokenOnly(base.model)
        self.token_bytes = 2 * config.num_hidden_layers * heads * width * torch.empty((), dtype=base.dtype).element_size()

    def run(
        self,
        ids: torch.Tensor,
        cache: Any = None,
        *,
        keep: int = 1,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """One pass of [R, T] ids behind `cache`: logits of the last `keep` positions, float32 [R, keep, V], and the cache."""
        cache = transformers.DynamicCache() if cache is None else cache
        options: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": keep}
        given = {name: value for name, value in options.items() if value is not None and name in self._known}
        with self._last_token.last_position() if ids.shape[1] > keep == 1 else contextlib.nullcontext():
            out = self.base.model(input_ids=ids.to(self.base.device), past_key_values=cache, use_cache=True, **given)
        logits = out.logits[:, -keep:]
        return logits if logits.dtype == torch.float64 else logits.float(), out.past_key_values

    def side(self, length: int) -> int:
        """Sequences of so many tokens may share a pass with others of the same number (finetune/rope.py)."""
        return int(self._sides(np.asarray([length]))[0])

    def shared_prefix(self, ids: Sequence[int], blocks: int) -> Any:
        """The cache of a shared prefix [P], once per block."""
        return self.prompts([ids], None, 0, blocks)[1]

    def prompts(self, parts: Sequence[Sequence[int]], prefix: Any, shared: int, blocks: int) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """Run n prompts behind a `shared_prefix` of `shared` tokens, in each block: the last logits [R, V], cache, mask [R, P + T].

        parts: each prompt's tokens after the prefix.
        """
        longest = max(map(len, parts))
        ids = torch.full((len(parts), longest), self.base.pad_id)
        mask = torch.zeros(len(parts), shared + longest, dtype=torch.long)
        mask[:, :shared] = 1
        for number, part in enumerate(parts):
            ids[number, longest - len(part) :] = torch.tensor(part)
            mask[number, shared + longest - len(part) :] = 1
        logits, cache = self._in_blocks(ids.repeat(blocks, 1), mask.repeat(blocks, 1), prefix, blocks)
        return logits, cache, mask.repeat(blocks, 1).to(self.base.device)

    def anew(self, sequences: Sequence[Sequence[int]], blocks: int) -> tuple[torch.Tensor, Any]:
        """Run whole sequences of one length, R of them in `blocks`: the last logits [R, V] and the cache."""
        ids = torch.tensor(sequences)
        return self._in_blocks(ids, torch.ones_like(ids), None, blocks)

    def whole(self, ids: Sequence[int], blocks: int, *, keep: int) -> torch.Tensor:
        """Run one sequence in each of K blocks: logits [K, keep, V] of its last positions."""
        found = []
        for block in range(blocks):
            with self._only(block, block + 1):
                found.append(self.run(torch.tensor([list(ids)]), keep=keep)[0])
        return torch.cat(found)

    def _in_blocks(self, ids: torch.Tensor, mask: torch.Tensor, prefix: Any, blocks: int) -> tuple[torch.Tensor, Any]:
        """Rows [R, T] of K blocks behind a shared prefix, as many blocks in a pass as its tokens allow."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        ids, mask, positions = (t.to(self.base.device) for t in (ids, mask, positions))
        rows = len(ids) // blocks
        passes = min(blocks, max(1, -(-ids.numel() // self.tokens)))
        step = -(-blocks // passes)
        found = []
        for first in range(0, blocks, step):
            stop = min(first + step, blocks)
            cache = None
            if prefix is not None:
                cache = selected(prefix, torch.arange(first, stop, device=self.base.device).repeat_interleave(rows))
            here = [of_all[first * rows : stop * rows] for of_all in (ids, mask, positions)]
            with self._only(first, stop):
                found.append(self.run(here[0], cache, mask=here[1], positions=here[2]))
        logits = torch.cat([one[:, -1] for one, _ in found])
        return logits, found[0][1] if len(found) == 1 else _stacked([cache for _, cache in found])

    def behind(self, parts: Sequence[Sequence[int]], cache: Any, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Run tokens behind the prompts of some rows [r] of `cache`, which stays as it is: logits [r, T, V].

        parts: r of them, padded on the right.
        """
        longest = max(map(len, parts))
        ids = torch.tensor([[*part, *[self.base.pad_id] * (longest - len(part))] for part in parts], device=mask.device)
        real = torch.tensor([[1] * len(part) + [0] * (longest - len(part)) for part in parts], device=mask.device)
        before = mask[rows]
        positions = before.sum(1, keepdim=True) + (real.cumsum(1) - 1)  # padding stands where the last token does: none goes beyond it
        return self.run(ids, selected(cache, rows), keep=longest, mask=torch.cat([before, real], dim=1), positions=positions)[0]


def context_of(config: Any) -> int:
    """The longest sequence that is run, in tokens: the model's, or its window, within which every token sees all before it."""
    config = config.get_text_config()
    windows = (getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None))
    return min([int(getattr(config, "max_position_embeddings", None) or 2048), *(int(window) for window in windows if window)])


def selected(cache: Any, rows: torch.Tensor) -> Any:
    """A new cache of some rows [r] of another."""
    found = transformers.DynamicCache()
    for number, (keys, values) in enumerate(cached_layers(cache, rows)):
        found.update(keys, values, number)
    return found


def _stacked(caches: Sequence[Any]) -> Any:
    """One cache of the rows of several, whose lengths are the same."""
    found = transformers.DynamicCache()
    for number, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        keys, values = (torch.cat([getattr(layer, side) for layer in layers]) for side in ("keys", "values"))
        found.update(keys, values, number)
    return found


def cached_layers(cache: Any, rows: torch.Tensor | slice) -> Layers:
    """The keys and values of some rows [r]."""
    return [(layer.keys[rows], layer.values[rows]) for layer in cache.layers]


def joined(parts: Sequence[Layers], blocks: int) -> Any:
    """One cache of parts of different lengths, aligned at their right, blocks kept together, with room for more tokens.

    What stands to the left of a short part is 0, and is to be masked.
    """
    cache = transformers.DynamicCache()
    cache.layers = [Room([part[number] for part in parts], blocks) for number in range(len(parts[0]))]
    return cache


class Room(DynamicLayer):
    """A layer's keys and values in buffers with room at their end, where DynamicLayer copies everything for each token.

    Attention is shown the whole buffers, as with a StaticLayer, and the mask hides what is empty: rows that are read
    without gaps come from memory several times faster. So there is little room, and more is made when it is used up.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], blocks: int) -> None:
        super().__init__()
        self.length = max(keys.shape[2] for keys, _ in parts)
        self.keys, self.values = (self._buffer([part[side] for part in parts], blocks) for side in (0, 1))
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        new = key_states.shape[2]
        if more := self.get_mask_sizes(new)[0] - self.keys.shape[2]:
            self.keys, self.values = (
                torch.cat([side, side.new_zeros(*side.shape[:2], more, side.shape[3])], dim=2) for side in (self.keys, self.values)
            )
        self.keys[:, :, self.length : self.length + new] = key_states
        self.values[:, :, self.length : self.length + new] = value_states
        self.length += new
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many places attention is shown with so many new tokens, and that they begin at 0."""
        lacking = self.length + query_length - self.keys.shape[2]
        return self.keys.shape[2] + (-(-lacking // SPARE) * SPARE if lacking > 0 else 0), 0

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.keys, self.values = self.keys[indices], self.values[indices]

    def _buffer(self, parts: Sequence[torch.Tensor], blocks: int) -> torch.Tensor:
        heads, width = parts[0].shape[1], parts[0].shape[3]
        rows = sum(len(part) for part in parts) // blocks
        buffer, start = parts[0].new_zeros(blocks, rows, heads, self.length + SPARE, width), 0
        for part in parts:
            own = part.unflatten(0, (blocks, -1))
            buffer[:, start : start + own.shape[1], :, self.length - part.shape[2] : self.length] = own
            start += own.shape[1]
        return buffer.flatten(0, 1)
