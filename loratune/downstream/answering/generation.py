"""Continuing prompts: greedily or by sampling, until each answer is decided, ended or long enough.

A pass over prompts is limited by their tokens, a decoding step by the number of rows: few rows leave the machine idle.
So prompts are run in small batches, also of different beginnings; what is then undecided is collected and decoded
together. Each adapter's rows leave as they end; blocks stay of equal length, finished rows fill the gaps.

Sampling (temperature > 0) draws its uniform numbers per (item, seed, token): the same for all adapters, whatever
stands beside the item.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from loratune.data.prompts import answer_ends, end_ids
from loratune.downstream.answering.forward import SPARE, Forward, Layers, joined, layers_of
from loratune.downstream.answering.rows import Row
from loratune.downstream.tasks.base import Benchmark
from loratune.errors import ModelError

_ROWS = 512  # decoded together, all adapters
_WORK = {"cpu": 2.5e11, "cuda": 1e15}  # parameters x tokens that a crash may cost
_TAIL = 4  # tokens of the prompt that new ones are decoded behind: some tokenizers drop a leading space
_FIX = 8  # tokens decoded again at each step; what is older is fixed
_SHRINK = 0.8  # let finished rows go at this share; above, the copy costs more than it saves


@dataclass(kw_only=True)
class Lane:
    """What one adapter writes to one prompt."""

    row: Row
    opening: str  # the end of the prompt, as text
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    open: bool = True
    fixed: int = 0  # so many tokens
    fixed_text: str = ""
    before: str = ""  # the last of the fixed tokens, as text

    def __post_init__(self) -> None:
        self.before = self.opening

    def begin_anew(self, text: str) -> None:
        """Back to the first token, which is `text`."""
        self.open, self.text = True, text
        del self.tokens[1:]
        self.fixed, self.fixed_text, self.before = 0, "", self.opening

    def fix(self, before: str) -> None:
        """Take all tokens but the newest as decoded for good."""
        self.fixed, self.fixed_text, self.before = len(self.tokens) - 1, self.text, before


@dataclass(kw_only=True)
class _Part:
    """Rows [R] whose prompts have been run, K blocks of equal length, and their next tokens."""

    lanes: list[Lane]
    layers: Layers
    mask: torch.Tensor  # [R, P + T]
    tokens: torch.Tensor  # [R]
    begun: list[tuple[Lane, str]]  # the open lanes and their texts, to begin anew


def turns(forward: Forward, benchmark: Benchmark, row: Row) -> bool:
    """Whether what is run for the row may change its side (finetune/rope.py) on the way: it then has its passes to itself."""
    more = [len(tokens) for _, tokens in row.scored] or [benchmark.max_new_tokens]
    return forward.side(len(row.ids)) != forward.side(len(row.ids) + max(1, *more) - 1)  # the last token is never run


def _filled(lane: Lane, length: int) -> list[int]:
    """Its prompt and tokens; a finished lane's are filled up, and read by nobody."""
    sequence = [*lane.row.ids, *lane.tokens]
    return (sequence + sequence[-1:] * length)[:length]


class Writer:
    """Collects prompts with `begin`; gives back what is written, K lanes per row, as soon as it is."""

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
        self._ends = answer_ends(base.tokenizer) | end_ids(getattr(base.model.generation_config, "eos_token_id", None))
        self._parameters = sum(p.numel() for p in base.model.parameters())
        self._uniform = functools.lru_cache(maxsize=None)(self._drawn)
        self._waiting: list[list[Lane]] = []  # of rows that some adapter still writes on
        self._parts: list[_Part] = []

    def begin(self, rows: Sequence[Row], prefix: Any, shared: int) -> list[list[Lane]]:
        """Run the prompts and choose the first token of each. Returns the lanes of the rows that are finished."""
        if self.interrupted():
            raise InterruptedError
        before = self._decode([row.ids[-_TAIL:] for row in rows])
        lanes = [Lane(row=row, opening=text) for _ in range(self.blocks) for row, text in zip(rows, before, strict=True)]
        logits, cache, mask = self.forward.prompts([row.ids[shared:] for row in rows], prefix, shared, self.blocks)
        tokens = self._choose(logits, lanes)
        self._take(lanes, tokens)
        if kept := self._open_rows(lanes):
            index = torch.tensor(kept, device=mask.device) if len(kept) < len(lanes) else slice(None)
            self._parts.append(
                _Part(
                    lanes=[lanes[at] for at in kept],
                    layers=layers_of(cache, index),
                    mask=mask[index],
                    tokens=tokens[index],
                    begun=[(lane, lane.text) for lane in lanes if lane.open],
                )
            )
        by_row = [lanes[number :: len(rows)] for number in range(len(rows))]
        self._waiting += [own for own in by_row if any(lane.open for lane in own)]
        return [own for own in by_row if not any(lane.open for lane in own)]

    @property
    def pending(self) -> bool:
        """Whether there is something to `finish`."""
        return bool(self._parts)

    @property
    def full(self) -> bool:
        """Whether to `finish` before more prompts are begun."""
        if self.most is not None and len(self._waiting) >= self.most:
            return True
        rows = sum(len(part.lanes) for part in self._parts)
        tokens = sum(part.mask.numel() for part in self._parts)
        held = (tokens + rows * self.benchmark.max_new_tokens) * self.forward.token_bytes
        device = self.forward.base.device.type
        return rows >= _ROWS or held >= self.memory or tokens * self._parameters >= _WORK.get(device, _WORK["cuda"])

    def finish(self) -> list[list[Lane]]:
        """Decode all that was begun, to the end. Returns the lanes of each row."""
        parts, waiting = self._parts, self._waiting
        self._parts, self._waiting = [], []
        self._decode_parts(parts)
        return waiting

    def _decode_parts(self, parts: list[_Part]) -> None:
        if not parts:
            return
        try:
            self._continue(parts)
        except torch.OutOfMemoryError:
            if len(parts) == 1:
                raise ModelError(
                    f"{self.benchmark.name}: {len(parts[0].lanes)} answers cannot be written at once in the device's memory. Score fewer "
                    "models at a time (--top), or use a larger device."
                ) from None
        else:
            return
        torch.cuda.empty_cache()
        for some in (parts[: len(parts) // 2], parts[len(parts) // 2 :]):
            for lane, text in (begun for part in some for begun in part.begun):
                lane.begin_anew(text)
            self._decode_parts(some)

    def _continue(self, parts: list[_Part]) -> None:
        longest = max(part.mask.shape[1] for part in parts)
        room = self.benchmark.max_new_tokens + SPARE
        masks = [torch.nn.functional.pad(part.mask, (longest - part.mask.shape[1], room)) for part in parts]
        mask, tokens = (self._by_block(some) for some in (masks, [part.tokens for part in parts]))
        per_block = [len(part.lanes) // self.blocks for part in parts]
        lanes = [
            lane
            for block in range(self.blocks)
            for part, n in zip(parts, per_block, strict=True)
            for lane in part.lanes[block * n : (block + 1) * n]
        ]
        cache = joined([part.layers for part in parts], self.blocks)
        positions = mask.sum(1, keepdim=True)
        turning = turns(self.forward, self.benchmark, lanes[0].row)  # then it is the only row, so that nothing is padded
        while kept := self._open_rows(lanes):
            if self.interrupted():
                raise InterruptedError
            if len(kept) <= _SHRINK * len(lanes):
                index = torch.tensor(kept, device=mask.device)
                cache.batch_select_indices(index)
                tokens, mask, positions = tokens[index], mask[index], positions[index]
                lanes = [lanes[at] for at in kept]
            mask[:, cache.get_seq_length()] = 1
            length = int(positions.max()) + 1 if turning else 0
            if turning and self.forward.side(length) != self.forward.side(length - 1):
                logits, filled = self.forward.anew([_filled(lane, length) for lane in lanes], self.blocks)
                logits, cache = logits.unsqueeze(1), joined([layers_of(filled, slice(None))], self.blocks)
            else:
                shown = mask[:, : cache.get_mask_sizes(1, 0)[0]]
                logits, cache = self.forward.run(tokens.view(-1, 1), cache, mask=shown, positions=positions)
            positions = (positions + 1).clamp(max=self.forward.context - 1)  # finished rows may run past the end
            tokens = self._choose(logits[:, -1], lanes)
            self._take(lanes, tokens)

    def _by_block(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Parts [K n_p, ...] -> [K sum(n_p), ...], a block's rows side by side."""
        return torch.cat([part.unflatten(0, (self.blocks, -1)) for part in parts], dim=1).flatten(0, 1)

    def _open_rows(self, lanes: Sequence[Lane]) -> list[int]:
        """Places of the open lanes, and of finished ones to fill all blocks to the same length; none when all are finished."""
        n = len(lanes) // self.blocks
        blocks = [sorted(range(block * n, (block + 1) * n), key=lambda at: not lanes[at].open) for block in range(self.blocks)]
        most = max(sum(lanes[at].open for at in block) for block in blocks)
        return [at for block in blocks for at in sorted(block[:most])]

    def _choose(self, logits: torch.Tensor, lanes: Sequence[Lane]) -> torch.Tensor:
        """The next token of each lane: logits [R, V] -> [R]. Sampling inverts the cumulated probabilities at a uniform number."""
        temperature = self.benchmark.temperature
        if temperature == 0:
            # NumPy looks at several numbers at once, torch's CPU kernel at one
            return torch.from_numpy(logits.numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)
        cumulated = (logits / temperature).softmax(-1).cumsum(-1)
        drawn = [self._uniform(lane.row.item.id)[len(lane.tokens)] if lane.open else 0.0 for lane in lanes]
        at = torch.tensor(drawn, dtype=cumulated.dtype, device=logits.device)
        return torch.searchsorted(cumulated, (at * cumulated[:, -1]).unsqueeze(1)).squeeze(1).clamp(max=logits.shape[-1] - 1)

    def _take(self, lanes: Sequence[Lane], tokens: torch.Tensor) -> None:
        """Append each open lane's token, and close the lanes that are finished."""
        for lane, token in zip(lanes, tokens.tolist(), strict=True):
            if lane.open and token in self._ends:
                lane.open = False
            elif lane.open:
                lane.tokens.append(token)
        going = [lane for lane in lanes if lane.open]
        self._read(going)
        for lane in going:
            written = len(lane.tokens)
            over = written >= self.benchmark.max_new_tokens or len(lane.row.ids) + written >= self.forward.context
            lane.open = not over and not self.benchmark.decided(lane.row.item, lane.text)
        self._read([lane for lane in lanes if lane.fixed and not lane.open], whole=True)

    def _read(self, lanes: Sequence[Lane], *, whole: bool = False) -> None:
        """Bring the lanes' texts up to date: what the tokens that are not fixed add to it; or, `whole`, all of them."""
        if whole:
            for lane in lanes:
                lane.fixed, lane.fixed_text, lane.before = 0, "", lane.opening
        elif old := [lane for lane in lanes if len(lane.tokens) > lane.fixed + _FIX and not lane.text.endswith("\ufffd")]:
            tails = [[*lane.row.ids[-_TAIL:], *lane.tokens[:-1]][-_TAIL:] for lane in old]
            for lane, before in zip(old, self._decode(tails), strict=True):
                lane.fix(before)
        sequences = [[*lane.row.ids[-_TAIL:], *lane.tokens[: lane.fixed]][-_TAIL:] + lane.tokens[lane.fixed :] for lane in lanes]
        for lane, text in zip(lanes, self._decode(sequences) if lanes else (), strict=True):
            if text.startswith(lane.before):
                lane.text = lane.fixed_text + text[len(lane.before) :]
            else:
                lane.text = str(self.forward.base.tokenizer.decode(lane.tokens, skip_special_tokens=True))

    def _decode(self, sequences: list[list[int]]) -> list[str]:
        tokenizer: Any = self.forward.base.tokenizer
        rust = getattr(tokenizer, "backend_tokenizer", None)  # several times faster than the wrapper around it
        if rust is None or getattr(tokenizer, "clean_up_tokenization_spaces", False):
            return list(tokenizer.batch_decode(sequences, skip_special_tokens=True))
        return list(rust.decode_batch(sequences, skip_special_tokens=True))

    def _drawn(self, item: str) -> np.ndarray:
        digest = hashlib.sha256(f"{self.seed}/{item}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big")).random(self.benchmark.max_new_tokens)
