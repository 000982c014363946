"""A model with one or several adapters answers the items of a benchmark.

Fast by: a KV cache; prompts of similar length together; the beginning that a group's prompts share computed once per
adapter; several adapters in one pass over the frozen base; an end as soon as the benchmark calls an answer decided.
None of it changes an answer, to float rounding: rows are padded on the left, padding is masked and takes no position.

Sampling (temperature > 0) draws its uniform numbers per (item, seed, token): the same for all adapters, whatever
stands beside the item in the batch.

Notation: K adapters, n items (or choices) of a batch, P tokens of the shared beginning, T tokens after it, V words.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers

from loratune.downstream.adapters import Adapters
from loratune.downstream.base import Benchmark, Item
from loratune.errors import ModelError
from loratune.finetune.model import BaseModel, autocast

_TOKENS = {"cpu": 4096, "cuda": 32768}  # per pass, all adapters together
_CPU_CACHE = 2**30  # bytes of keys and values
_SHARED = 16  # a shared beginning of fewer tokens is not worth its own pass
_FEW = 4  # a group of fewer items is answered with those of other groups: wide batches are worth more
_TAIL = 4  # tokens of the prompt that new ones are decoded behind: some tokenizers drop a leading space


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one model answered to one item."""

    text: str  # what it wrote, or the likeliest choice
    log_likelihoods: tuple[float, ...] = ()  # of the choices, natural logarithm, summed over tokens
    shots: int | None = None  # examples that were left in the prompt, where some had to be left out
    cut: bool = False  # even so the prompt did not fit, and lost its beginning


@dataclass(kw_only=True)
class _Row:
    """A sequence to run: of an item that the model continues, or of one or all choices of an item."""

    item: Item
    place: int  # the item's, among those asked
    ids: list[int]
    scored: list[tuple[int, list[int]]] = field(default_factory=list)  # (choice, its tokens), predicted by the last positions
    cut: bool = False


class Answerer:
    """Answers items with the adapters of `adapters`, which hooks them into `base`.

    rows: at most so many items in a batch, for tests and measurements; by default as many as memory and speed ask for.
    """

    def __init__(self, base: BaseModel, adapters: Adapters, *, rows: int | None = None, share: bool = True) -> None:
        self.base, self.adapters, self.rows, self.share = base, adapters, rows, share
        config = base.model.config.get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", None) or 2048)
        self._known = inspect.signature(base.model.forward).parameters
        if "past_key_values" not in self._known or getattr(base.model, "_is_stateful", False):
            raise ModelError(f"{type(base.model).__name__} keeps no key-value cache, which generating answers needs. It cannot be scored.")
        window = getattr(config, "sliding_window", None)
        if window and window < self.context:
            self.context = int(window)  # within it every token sees all before it, so padding is exact
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._token_bytes = 2 * config.num_hidden_layers * heads * width * torch.empty((), dtype=base.dtype).element_size()
        ends = getattr(base.model.generation_config, "eos_token_id", None)
        self._ends = {*(ends if isinstance(ends, list) else [ends]), base.tokenizer.eos_token_id} - {None}

    def answers(
        self,
        benchmark: Benchmark,
        items: Sequence[Item],
        places: Sequence[int],
        *,
        seed: int = 0,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[list[Item], list[list[Answer]]]]:
        """Batch by batch, the items done and the answers of each of `places`, in the order of `places`.

        Raises InterruptedError when `interrupted` says so, between two tokens; batches that were yielded are done.
        """
        order = self.adapters.by_rank(places)
        back = [order.index(place) for place in places]
        groups: dict[str, list[tuple[int, Item]]] = {}
        for number, item in enumerate(items):
            groups.setdefault(item.prompt[: item.shared], []).append((number, item))
        with torch.inference_mode(), autocast(self.base):
            pool: list[_Row] = []
            for members in groups.values():
                rows = self._score_rows(members) if members[0][1].choices else self._write_rows(benchmark, members)
                alike: dict[int, list[_Row]] = {}  # those that lost examples share less
                for row in rows:
                    alike.setdefault(row.item.shared, []).append(row)
                for some in alike.values():
                    if not self.share or len({row.place for row in some}) < _FEW:
                        pool += some
                        continue
                    for batch, found in self._batches(benchmark, some, order, seed, interrupted):
                        yield [items[place] for place in batch], [found[block] for block in back]
            if pool:
                for batch, found in self._batches(benchmark, pool, order, seed, interrupted):
                    yield [items[place] for place in batch], [found[block] for block in back]

    # --- prompts to rows ----------------------------------------------------------------------------------------------

    def _write_rows(self, benchmark: Benchmark, members: list[tuple[int, Item]]) -> list[_Row]:
        room = max(self.context - benchmark.max_new_tokens, self.context // 2)  # a small context is shared by both
        limit = min(room, benchmark.max_prompt_tokens or room)
        rows = []
        for (place, item), ids in zip(members, self._encode([item.prompt for _, item in members]), strict=True):
            fitted = item
            while len(ids) > limit and (shorter := fitted.without_last_shot()) is not None:
                fitted = shorter
                ids = self._encode([fitted.prompt])[0]
            rows.append(_Row(item=fitted, place=place, ids=ids[-room:], cut=len(ids) > room))
        return rows

    def _score_rows(self, members: list[tuple[int, Item]]) -> list[_Row]:
        """As lm-evaluation-harness: a choice's tokens are those that the prompt gets by having it appended."""
        rows = []
        contexts = self._encode([item.prompt.rstrip(" ") for _, item in members])
        wholes = iter(self._encode([item.prompt + choice for _, item in members for choice in item.choices]))
        for (place, item), context in zip(members, contexts, strict=True):
            choices = [next(wholes) for _ in item.choices]
            scored = [(number, whole[len(context) :]) for number, whole in enumerate(choices)]
            if all(len(tokens) == 1 for _, tokens in scored):
                rows.append(_Row(item=item, place=place, ids=context[-self.context :], scored=scored, cut=len(context) > self.context))
                continue
            for one in scored:
                whole = context + one[1]
                ids = whole[-(self.context + 1) :][:-1]
                rows.append(_Row(item=item, place=place, ids=ids, scored=[one], cut=len(whole) > self.context + 1))
        return rows

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids with the tokenizer's own special tokens, an EOS at the end apart."""
        encoded = self.base.tokenizer(texts)["input_ids"]
        end = self.base.tokenizer.eos_token_id
        return [ids[:-1] if ids[-1:] == [end] else ids for ids in encoded]

    # --- batches ------------------------------------------------------------------------------------------------------

    def _batches(
        self, benchmark: Benchmark, rows: list[_Row], order: list[int], seed: int, interrupted: Callable[[], bool]
    ) -> Iterator[tuple[list[int], list[list[Answer]]]]:
        """Rows of one beginning, longest first, cut into batches that hold all rows of their items."""
        shared = _common([row.ids for row in rows]) if self.share and len(rows) > 1 else 0
        shared = min(shared, *(len(row.ids) - max((len(t) for _, t in row.scored), default=1) for row in rows))
        shared = shared if shared >= _SHARED else 0
        by_item: dict[int, list[_Row]] = {}
        for row in sorted(rows, key=lambda row: (-len(row.ids), row.place)):
            by_item.setdefault(row.place, []).append(row)
        waiting = list(by_item.values())
        with self.adapters.use(order):
            prefix = self._run(torch.tensor([rows[0].ids[:shared]] * len(order)), None, shared, 1)[1] if shared else None
            at_most = len(waiting)
            while waiting:
                size = min(at_most, self._fitting(benchmark, waiting, len(order), shared))
                batch = waiting[:size]
                flat = [row for several in batch for row in several]
                try:
                    run = self._score if flat[0].scored else self._write
                    found = run(benchmark, flat, prefix, shared, len(order), seed, interrupted)
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise ModelError(
                            f"{benchmark.name}: one prompt of {len(flat[0].ids)} tokens for {len(order)} models at once does not fit the "
                            "device's memory. Score fewer models at a time (--top), or use a larger device."
                        ) from None
                    at_most = size // 2
                    torch.cuda.empty_cache()
                    continue
                yield [several[0].place for several in batch], found
                waiting = waiting[size:]

    def _fitting(self, benchmark: Benchmark, waiting: list[list[_Row]], blocks: int, shared: int) -> int:
        """How many of the waiting items, longest first, make the next batch."""
        device = self.base.device
        tokens = _TOKENS.get(device.type, _TOKENS["cuda"])
        memory = torch.cuda.mem_get_info(device)[0] // 3 if device.type == "cuda" else _CPU_CACHE
        longest = max(len(row.ids) for row in waiting[0])
        count = used = 0
        for several in waiting:
            used += len(several) * blocks
            over = used * (longest - shared) > tokens or used * (longest + benchmark.max_new_tokens) * self._token_bytes > memory
            if count and (over or (self.rows is not None and count >= self.rows)):
                break
            count += 1
        return count

    def _run(
        self, ids: torch.Tensor, cache: Any, shared: int, keep: int, mask: torch.Tensor | None = None, positions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        """One forward pass of [R, T] ids behind `cache`: logits of the last `keep` positions, float32 [R, keep, V], and the cache."""
        cache = transformers.DynamicCache() if cache is None else cache
        options: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": keep}
        given = {name: value for name, value in options.items() if value is not None and name in self._known}
        out = self.base.model(input_ids=ids.to(self.base.device), past_key_values=cache, use_cache=True, **given)
        logits = out.logits[:, -keep:]
        return logits if logits.dtype == torch.float64 else logits.float(), out.past_key_values

    def _begin(self, rows: list[_Row], prefix: Any, shared: int, blocks: int, keep: int) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """Run the prompts of K blocks of rows: logits [K * n, keep, V], cache, mask [K * n, P + T]."""
        parts = [row.ids[shared:] for row in rows]
        longest = max(map(len, parts))
        ids = torch.full((len(rows), longest), self.base.pad_id)
        mask = torch.zeros(len(rows), shared + longest, dtype=torch.long)
        mask[:, :shared] = 1
        for number, part in enumerate(parts):
            ids[number, longest - len(part) :] = torch.tensor(part)
            mask[number, shared + longest - len(part) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
        ids, mask, positions = (t.repeat(blocks, 1).to(self.base.device) for t in (ids, mask, positions))
        cache = _repeated(prefix, len(rows)) if prefix is not None else None
        logits, cache = self._run(ids, cache, shared, keep, mask, positions)
        return logits, cache, mask

    def _score(
        self, benchmark: Benchmark, rows: list[_Row], prefix: Any, shared: int, blocks: int, seed: int, interrupted: Callable[[], bool]
    ) -> list[list[Answer]]:
        """Log-likelihoods of the choices: sums of float32 log-probabilities over their tokens."""
        if interrupted():
            raise InterruptedError
        keep = max(len(tokens) for row in rows for _, tokens in row.scored)
        logits = self._begin(rows, prefix, shared, blocks, keep)[0].log_softmax(-1)
        spoken = [(number, choice, tokens) for number, row in enumerate(rows) for choice, tokens in row.scored]
        wanted = torch.tensor([[n, keep - len(t) + i, token] for n, _, t in spoken for i, token in enumerate(t)], device=logits.device)
        per_token = logits.view(blocks, len(rows), keep, -1)[:, wanted[:, 0], wanted[:, 1], wanted[:, 2]].cpu()
        sums = [part.sum(1).tolist() for part in per_token.split([len(t) for _, _, t in spoken], dim=1)]
        found: list[list[Answer]] = [[] for _ in range(blocks)]
        items = list({row.place: row for row in rows}.values())
        for block, answers in enumerate(found):
            values: dict[int, dict[int, float]] = {}
            for (number, choice, _), value in zip(spoken, sums, strict=True):
                values.setdefault(rows[number].place, {})[choice] = value[block]
            for row in items:
                likely = [values[row.place][choice] for choice in range(len(row.item.choices))]
                best = likely.index(max(likely))  # ties go to the first, as in lm-evaluation-harness
                answers.append(Answer(text=row.item.choices[best], log_likelihoods=tuple(likely), cut=row.cut))
        return found

    def _write(
        self, benchmark: Benchmark, rows: list[_Row], prefix: Any, shared: int, blocks: int, seed: int, interrupted: Callable[[], bool]
    ) -> list[list[Answer]]:
        """Continue the prompts, greedily or by sampling, until each answer is decided, ended or long enough."""
        logits, cache, mask = self._begin(rows, prefix, shared, blocks, 1)
        written: list[list[int]] = [[] for _ in range(blocks * len(rows))]
        texts = [""] * len(written)
        open_ = [True] * len(written)
        alive = list(range(len(rows)))  # items that some adapter still writes on
        tails = [row.ids[-_TAIL:] for row in rows]
        before = self._decode(tails)
        uniform = [_uniform(row.item.id, seed, benchmark.max_new_tokens) for row in rows] if benchmark.temperature > 0 else None
        positions = mask.sum(1, keepdim=True)
        for step in range(benchmark.max_new_tokens):
            if interrupted():
                raise InterruptedError
            tokens = _choose(logits[:, -1], benchmark.temperature, [u[step] for u in (uniform or ())], alive, blocks)
            lanes = [block * len(rows) + item for block in range(blocks) for item in alive]
            going = []
            for lane, token in zip(lanes, tokens.tolist(), strict=True):
                if open_[lane] and token in self._ends:
                    open_[lane] = False
                elif open_[lane]:
                    written[lane].append(token)
                    going.append(lane)
            new = self._texts([tails[lane % len(rows)] for lane in going], [written[lane] for lane in going], before, going, len(rows))
            for lane, text in zip(going, new, strict=True):
                row, texts[lane] = rows[lane % len(rows)], text
                full = len(row.ids) + step + 1 >= self.context
                open_[lane] = not full and not benchmark.decided(row.item, text)
            still = [item for item in alive if any(open_[block * len(rows) + item] for block in range(blocks))]
            if not still or step + 1 == benchmark.max_new_tokens:
                break
            tokens = tokens.view(-1, 1)
            if len(still) <= 0.8 * len(alive):  # let the finished go; below that the copy costs more than it saves
                kept = [block * len(alive) + alive.index(item) for block in range(blocks) for item in still]
                index = torch.tensor(kept, device=mask.device)
                cache.batch_select_indices(index)
                tokens, mask, positions, alive = tokens[index], mask[index], positions[index], still
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits, cache = self._run(tokens, cache, shared, 1, mask, positions)
            positions = positions + 1
        return [
            [Answer(text=texts[block * len(rows) + n], shots=_shots(row.item), cut=row.cut) for n, row in enumerate(rows)]
            for block in range(blocks)
        ]

    def _texts(self, tails: list[list[int]], written: list[list[int]], before: list[str], lanes: list[int], items: int) -> list[str]:
        """What the new tokens add to the text."""
        if not lanes:
            return []
        whole = self._decode([tail + new for tail, new in zip(tails, written, strict=True)])
        return [
            text[len(before[lane % items]) :]
            if text.startswith(before[lane % items])
            else str(self.base.tokenizer.decode(new, skip_special_tokens=True))
            for text, new, lane in zip(whole, written, lanes, strict=True)
        ]

    def _decode(self, sequences: list[list[int]]) -> list[str]:
        tokenizer: Any = self.base.tokenizer
        rust = getattr(tokenizer, "backend_tokenizer", None)  # several times faster than the wrapper around it
        if rust is None or getattr(tokenizer, "clean_up_tokenization_spaces", False):
            return list(tokenizer.batch_decode(sequences, skip_special_tokens=True))
        return list(rust.decode_batch(sequences, skip_special_tokens=True))


def _shots(item: Item) -> int | None:
    return len(item.shots) - 1 if item.shots else None


def _choose(logits: torch.Tensor, temperature: float, uniform: list[float], alive: list[int], blocks: int) -> torch.Tensor:
    """The next token of each row: logits [K * n, V] -> [K * n]. Sampling inverts the cumulated probabilities at `uniform`."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulated = (logits / temperature).softmax(-1).cumsum(-1)
    at = torch.tensor([uniform[item] for item in alive], dtype=cumulated.dtype, device=logits.device).repeat(blocks)
    return torch.searchsorted(cumulated, (at * cumulated[:, -1]).unsqueeze(1)).squeeze(1).clamp(max=logits.shape[-1] - 1)


def _uniform(item: str, seed: int, number: int) -> np.ndarray:
    digest = hashlib.sha256(f"{seed}/{item}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big")).random(number)


def _common(sequences: list[list[int]]) -> int:
    """How many tokens all sequences begin with."""
    first, last = min(sequences), max(sequences)  # in lexicographic order these two differ earliest
    return next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _repeated(prefix: Any, rows: int) -> Any:
    """A cache of K rows as one of K * n, each row n times; the first stays as it is."""
    cache = transformers.DynamicCache()
    for number, layer in enumerate(prefix.layers):
        cache.update(layer.keys.repeat_interleave(rows, 0), layer.values.repeat_interleave(rows, 0), number)
    return cache
