"""Continuing prompts: greedily or by sampling, until each answer is decided, ended or long enough.

A pass over prompts is limited by their tokens, a decoding step by the number of rows: few rows leave the machine idle.
So prompts are run in small batches, also of different prefixes; what is then undecided is collected and decoded
together. Each adapter's rows leave as they end; blocks stay of equal length, finished rows fill the gaps.

Sampling (temperature > 0) draws its uniform numbers per (item, seed, token): the same for all adapters, whatever
stands beside the item.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loratune.data.prompts import answer_ends, end_ids
from loratune.downstream.answering.completions import Completion, Reader
from loratune.downstream.answering.forward import SPARE, Forward, Layers, cached_layers, joined
from loratune.downstream.answering.rows import PromptRow
from loratune.downstream.tasks.base import Benchmark
from loratune.errors import ModelError
from loratune.finetune.memory import is_out_of_memory

_ROWS = 512  # decoded together, all adapters
_WORK = {"cpu": 2.5e11, "cuda": 1e15}  # parameters x tokens that a crash may cost
_SHRINK = 0.8  # let finished rows go at this share; above, the copy costs more than it saves


@dataclass(kw_only=True)
class _Batch:
    """Rows [R] whose prompts have been run, K blocks of equal length, and their next tokens."""

    completions: list[Completion]
    layers: Layers
    mask: torch.Tensor  # [R, P + T]
    tokens: torch.Tensor  # [R]
    begun: list[tuple[Completion, str]]  # the open completions and their texts, to begin anew


def turns(forward: Forward, benchmark: Benchmark, row: PromptRow) -> bool:
    """Whether what is run for the row may change its side (finetune/rope.py) on the way: it then has its passes to itself."""
    more = [len(tokens) for _, tokens in row.scored] or [benchmark.max_new_tokens]
    return forward.side(len(row.ids)) != forward.side(len(row.ids) + max(1, *more) - 1)  # the last token is never run


def _filled(completion: Completion, length: int) -> list[int]:
    """Its prompt and tokens; a finished completion's are filled up, and read by nobody."""
    sequence = [*completion.row.ids, *completion.tokens]
    return (sequence + sequence[-1:] * length)[:length]


class Writer:
    """Collects prompts with `begin`; gives back what is written, K completions per row, as soon as it is."""

    def __init__(
        self,
        forward: Forward,
        benchmark: Benchmark,
        blocks: int,
        *,
        memory: int,
        seed: int,
        interrupted: Callable[[], bool],
        most: int | None = None,
    ) -> None:
        """memory: bytes of keys and values held for decoding. seed: of sampling. most: prompts decoded together."""
        self.forward, self.benchmark, self.blocks, self.memory = forward, benchmark, blocks, memory
        self.seed, self.interrupted, self.most = seed, interrupted, most
        base = forward.base
        ends = answer_ends(base.tokenizer) | end_ids(getattr(base.model.generation_config, "eos_token_id", None))
        self._reader = Reader(base.tokenizer, benchmark, ends, forward.context)
        self._parameters = sum(p.numel() for p in base.model.parameters())
        self._uniform = functools.lru_cache(maxsize=None)(self._drawn)
        self._waiting: list[list[Completion]] = []  # of rows that some adapter still writes on
        self._parts: list[_Batch] = []

    def begin(self, rows: Sequence[PromptRow], prefix: Any, shared: int) -> list[list[Completion]]:
        """Run the prompts and choose the first token of each. Returns the completions of the rows that are finished."""
        if self.interrupted():
            raise InterruptedError
        completions = self._reader.begin(list(rows) * self.blocks)
        logits, cache, mask = self.forward.prompts([row.ids[shared:] for row in rows], prefix, shared, self.blocks)
        tokens = self._choose(logits, completions)
        self._reader.take(completions, tokens.tolist())
        if kept := self._open_rows(completions):
            index = torch.tensor(kept, device=mask.device) if len(kept) < len(completions) else slice(None)
            self._parts.append(
                _Batch(
                    completions=[completions[at] for at in kept],
                    layers=cached_layers(cache, index),
                    mask=mask[index],
                    tokens=tokens[index],
                    begun=[(completion, completion.text) for completion in completions if completion.open],
                )
            )
        by_row = [completions[number :: len(rows)] for number in range(len(rows))]
        self._waiting += [own for own in by_row if any(completion.open for completion in own)]
        return [own for own in by_row if not any(completion.open for completion in own)]

    @property
    def pending(self) -> bool:
        """Whether there is something to `finish`."""
        return bool(self._parts)

    @property
    def full(self) -> bool:
        """Whether to `finish` before more prompts are begun."""
        if self.most is not None and len(self._waiting) >= self.most:
            return True
        rows = sum(len(part.completions) for part in self._parts)
        tokens = sum(part.mask.numel() for part in self._parts)
        held = (tokens + rows * self.benchmark.max_new_tokens) * self.forward.token_bytes
        device = self.forward.base.device.type
        return rows >= _ROWS or held >= self.memory or tokens * self._parameters >= _WORK.get(device, _WORK["cuda"])

    def finish(self) -> list[list[Completion]]:
        """Decode all that was begun, to the end. Returns the completions of each row."""
        parts, waiting = self._parts, self._waiting
        self._parts, self._waiting = [], []
        self._decode_parts(parts)
        return waiting

    def _decode_parts(self, parts: list[_Batch]) -> None:
        if not parts:
            return
        try:
            self._continue(parts)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(parts) == 1:
                raise ModelError(
                    f"{self.benchmark.name}: {len(parts[0].completions)} answers do not fit the device's memory at once. "
                    "Score fewer models at a time (--top), or use a larger device."
                ) from None
        else:
            return
        torch.cuda.empty_cache()
        for some in (parts[: len(parts) // 2], parts[len(parts) // 2 :]):
            for completion, text in (begun for part in some for begun in part.begun):
                completion.begin_anew(text)
            self._decode_parts(some)

    def _continue(self, parts: list[_Batch]) -> None:
        longest = max(part.mask.shape[1] for part in parts)
        room = self.benchmark.max_new_tokens + SPARE
        masks = [torch.nn.functional.pad(part.mask, (longest - part.mask.shape[1], room)) for part in parts]
        mask, tokens = (self._by_block(some) for some in (masks, [part.tokens for part in parts]))
        per_block = [len(part.completions) // self.blocks for part in parts]
        completions = [
            completion
            for block in range(self.blocks)
            for part, n in zip(parts, per_block, strict=True)
            for completion in part.completions[block * n : (block + 1) * n]
        ]
        cache = joined([part.layers for part in parts], self.blocks)
        positions = mask.sum(1, keepdim=True)
        turning = turns(self.forward, self.benchmark, completions[0].row)  # then it is the only row, so that nothing is padded
        while kept := self._open_rows(completions):
            if self.interrupted():
                raise InterruptedError
            if len(kept) <= _SHRINK * len(completions):
                index = torch.tensor(kept, device=mask.device)
                cache.batch_select_indices(index)
                tokens, mask, positions = tokens[index], mask[index], positions[index]
                completions = [completions[at] for at in kept]
            mask[:, cache.get_seq_length()] = 1
            length = int(positions.max()) + 1 if turning else 0
            if turning and self.forward.side(length) != self.forward.side(length - 1):
                logits, filled = self.forward.anew([_filled(completion, length) for completion in completions], self.blocks)
                logits, cache = logits.unsqueeze(1), joined([cached_layers(filled, slice(None))], self.blocks)
            else:
                shown = mask[:, : cache.get_mask_sizes(1, 0)[0]]
                logits, cache = self.forward.run(tokens.view(-1, 1), cache, mask=shown, positions=positions)
            positions = (positions + 1).clamp(max=self.forward.context - 1)  # finished rows may run past the end
            tokens = self._choose(logits[:, -1], completions)
            self._reader.take(completions, tokens.tolist())

    def _by_block(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Parts [K n_p, ...] -> [K sum(n_p), ...], a block's rows side by side."""
        return torch.cat([part.unflatten(0, (self.blocks, -1)) for part in parts], dim=1).flatten(0, 1)

    def _open_rows(self, completions: Sequence[Completion]) -> list[int]:
        """Places of the open completions, and of finished ones to fill all blocks to the same length; none when all are finished."""
        n = len(completions) // self.blocks
        blocks = [sorted(range(block * n, (block + 1) * n), key=lambda at: not completions[at].open) for block in range(self.blocks)]
        most = max(sum(completions[at].open for at in block) for block in blocks)
        return [at for block in blocks for at in sorted(block[:most])]

    def _choose(self, logits: torch.Tensor, completions: Sequence[Completion]) -> torch.Tensor:
        """The next token of each completion: logits [R, V] -> [R]. Sampling inverts the cumulated probabilities at a uniform number."""
        temperature = self.benchmark.temperature
        if temperature == 0:
            # NumPy looks at several numbers at once, torch's CPU kernel at one
            return torch.from_numpy(logits.numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)
        cumulated = (logits / temperature).softmax(-1).cumsum(-1)
        drawn = [self._uniform(completion.row.item.id)[len(completion.tokens)] if completion.open else 0.0 for completion in completions]
        at = torch.tensor(drawn, dtype=cumulated.dtype, device=logits.device)
        return torch.searchsorted(cumulated, (at * cumulated[:, -1]).unsqueeze(1)).squeeze(1).clamp(max=logits.shape[-1] - 1)

    def _drawn(self, item: str) -> np.ndarray:
        digest = hashlib.sha256(f"{self.seed}/{item}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big")).random(self.benchmark.max_new_tokens)
