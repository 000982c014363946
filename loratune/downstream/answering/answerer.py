"""A model with one or several adapters answers the items of a benchmark.

Fast by: a KV cache; prompts of similar length together; the prefix that a group's prompts share computed once per
adapter; several adapters in one pass over the frozen base; a prompt run once for all choices behind it; a last layer that
works on the last token alone (last_token.py); wide decoding (generation.py); an end as soon as the benchmark calls an answer decided.
None of it changes an answer, to float rounding: rows are padded on the left, padding is masked and takes no position.

Notation: K adapters, n items (or choices) of a batch, V words.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from loratune.downstream.answering.adapter_stack import Adapters
from loratune.downstream.answering.completions import Completion, ItemAnswer, answer_of, likeliest
from loratune.downstream.answering.decode_attention import decoding
from loratune.downstream.answering.forward import Forward
from loratune.downstream.answering.generation import Writer, turns
from loratune.downstream.answering.rows import PromptRow, RowMaker, common
from loratune.downstream.tasks.base import Benchmark, Item
from loratune.errors import ModelError
from loratune.finetune.memory import is_out_of_memory
from loratune.finetune.model import BaseModel, autocast

_CPU_CACHE = 2**30  # bytes of keys and values
_SHARED = 16  # a shared prefix of fewer tokens is not worth its own pass
_FEW = 4  # a group of fewer items is answered with those of other groups: wide batches are worth more

Done = list[tuple[int, list[ItemAnswer]]]  # (an item's place, an answer of each block)


@dataclass(frozen=True, kw_only=True)
class _PassGroup:
    """Rows of an equal pass group may share a pass (finetune/rope.py)."""

    alone: bool = False  # one item's rows alone: what is run for them changes its side on the way
    which: int = 0  # side, or the item's place


_FIRST = _PassGroup()


class Answerer:
    """Answers items with the adapters of `adapters`, which hooks them into `base`.

    rows: at most so many items in a batch, for tests and measurements; by default as many as memory and speed ask for.
    """

    def __init__(self, base: BaseModel, adapters: Adapters, *, rows: int | None = None, share: bool = True) -> None:
        self.base, self.adapters, self.rows, self.share = base, adapters, rows, share
        self.forward = Forward(base, adapters.only)

    def answers(
        self,
        benchmark: Benchmark,
        items: Sequence[Item],
        places: Sequence[int],
        *,
        seed: int = 0,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[list[Item], list[list[ItemAnswer]]]]:
        """Some at a time, the items done and the answers of each of `places`, in the order of `places`.

        Raises InterruptedError when `interrupted` says so, between two tokens; what was yielded is done.
        """
        order = self.adapters.by_rank(places)
        back = [order.index(place) for place in places]

        def found(done: Done) -> tuple[list[Item], list[list[ItemAnswer]]]:
            return [items[place] for place, _ in done], [[answers[block] for _, answers in done] for block in back]

        with torch.inference_mode(), autocast(self.base), self.adapters.use(order), decoding(self.base.model):
            blocks = len(order)
            writer = Writer(self.forward, benchmark, blocks, memory=self._memory(), seed=seed, interrupted=interrupted, most=self.rows)
            before = _FIRST
            for pass_group, rows in self._groups(benchmark, items):
                if pass_group != before and writer.pending:
                    yield found(_written(writer.finish()))
                before = pass_group
                if rows[0].scored and pass_group.alone:
                    run: Callable[..., Done] = partial(self._score_whole, blocks)
                else:
                    run = partial(self._score, blocks) if rows[0].scored else partial(_begun, writer)
                for done in self._batches(benchmark, rows, blocks, run, interrupted):
                    if done:
                        yield found(done)
                    if writer.full:
                        yield found(_written(writer.finish()))
            if done := _written(writer.finish()):
                yield found(done)

    def _groups(self, benchmark: Benchmark, items: Sequence[Item]) -> Iterator[tuple["_PassGroup", list[PromptRow]]]:
        """The items' rows by shared prefix; last, together, those that share none with enough others.

        Where a model computes long sequences otherwise, those come behind, and one by one the items that may cross its border.
        """
        make = RowMaker(self.base.tokenizer, self.forward.context)
        groups: dict[str, list[tuple[int, Item]]] = {}
        for number, item in enumerate(items):
            groups.setdefault(item.prompt[: item.shared], []).append((number, item))
        pools: dict[_PassGroup, list[PromptRow]] = {_FIRST: []}
        later: list[tuple[_PassGroup, list[PromptRow]]] = []
        for members in groups.values():
            rows = make.to_score(members) if members[0][1].choices else make.to_write(benchmark, members)
            alike: dict[tuple[_PassGroup, int], list[PromptRow]] = {}  # those that lost examples share less
            for own in _by_item(rows):
                alike.setdefault((self._pass_group(benchmark, own), own[0].item.shared), []).extend(own)
            for (pass_group, _), rows in alike.items():
                if not self.share or len(_by_item(rows)) < _FEW:
                    pools.setdefault(pass_group, []).extend(rows)
                elif pass_group == _FIRST:
                    yield pass_group, rows
                else:
                    later.append((pass_group, rows))
        for pass_group, pool in pools.items():
            yield from [one for one in later if one[0] == pass_group]
            if pool:
                yield pass_group, pool
        yield from [one for one in later if one[0] not in pools]

    def _pass_group(self, benchmark: Benchmark, rows: list[PromptRow]) -> "_PassGroup":
        """Whom an item's rows may share a pass with: those of their side, whatever is written or scored behind them."""
        sides = {self.forward.side(len(row.ids)) for row in rows}
        if len(sides) > 1 or any(turns(self.forward, benchmark, row) for row in rows):
            return _PassGroup(alone=True, which=rows[0].place)
        return _PassGroup(which=sides.pop())

    def _batches(
        self,
        benchmark: Benchmark,
        rows: list[PromptRow],
        blocks: int,
        run: Callable[[list[PromptRow], Any, int], Done],
        interrupted: Callable[[], bool],
    ) -> Iterator[Done]:
        """What `run(rows, prefix, shared)` gives for batches of all rows of some items, longest first."""
        shared = common(rows) if self.share and len(rows) > 1 else 0
        alike = self.forward.side(shared) == self.forward.side(len(rows[0].ids))  # else the prefix alone is another one
        shared = shared if shared >= _SHARED and alike else 0
        by_item: dict[int, list[PromptRow]] = {}
        for row in sorted(rows, key=lambda row: (-len(row.ids), row.place)):
            by_item.setdefault(row.place, []).append(row)
        waiting = list(by_item.values())
        prefix = self.forward.shared_prefix(rows[0].ids[:shared], blocks) if shared else None
        at_most = len(waiting)
        while waiting:
            if interrupted():
                raise InterruptedError
            size = min(at_most, self._fitting(benchmark, waiting, blocks, shared))
            batch = [row for several in waiting[:size] for row in several]
            try:
                done = run(batch, prefix, shared)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise ModelError(
                        f"{benchmark.name}: one prompt of {len(batch[0].ids)} tokens for {blocks} models at once does not fit the "
                        "device's memory. Score fewer models at a time (--top), or use a larger device."
                    ) from None
                at_most = size // 2
                torch.cuda.empty_cache()
                continue
            yield done
            waiting = waiting[size:]

    def _memory(self) -> int:
        """Bytes of keys and values that may be held."""
        return torch.cuda.mem_get_info(self.base.device)[0] // 3 if self.base.device.type == "cuda" else _CPU_CACHE

    def _fitting(self, benchmark: Benchmark, waiting: list[list[PromptRow]], blocks: int, shared: int) -> int:
        """How many of the waiting items, longest first, make the next batch."""
        longest = max(len(row.ids) for row in waiting[0])
        count = run = held = 0
        for several in waiting:
            run += len(several) * blocks
            held += sum(max(1, len(row.scored)) for row in several) * blocks
            over = run * (longest - shared) > self.forward.tokens
            over = over or held * (longest + benchmark.max_new_tokens) * self.forward.token_bytes > self._memory()
            if count and (over or (self.rows is not None and count >= self.rows)):
                break
            count += 1
        return count

    def _score(self, blocks: int, rows: list[PromptRow], prefix: Any, shared: int) -> Done:
        """Log-likelihoods of the choices: sums of float32 log-probabilities over their tokens, behind a prompt that is run once."""
        logits, cache, mask = self.forward.prompts([row.ids[shared:] for row in rows], prefix, shared, blocks)
        spoken = [(number, choice, tokens) for number, row in enumerate(rows) for choice, tokens in row.scored]
        firsts = torch.tensor([[number, *tokens[:1]] for number, _, tokens in spoken if tokens], device=logits.device)
        likely = torch.zeros(blocks, len(spoken), dtype=torch.float64)
        likely[:, [at for at, one in enumerate(spoken) if one[2]]] = _at(logits.view(blocks, len(rows), -1), firsts)
        later = [at for at, one in enumerate(spoken) if len(one[2]) > 1]
        while later:
            longest = max(len(spoken[at][2]) for at in later)
            some = later[: max(1, self.forward.tokens // (blocks * longest))]
            later = later[len(some) :]
            places = torch.tensor([[block * len(rows) + spoken[at][0] for at in some] for block in range(blocks)], device=mask.device)
            parts = [spoken[at][2][:-1] for at in some] * blocks
            after = self.forward.behind(parts, cache, mask, places.flatten()).unflatten(0, (blocks, -1))
            for number, at in enumerate(some):
                tokens = spoken[at][2][1:]
                wanted = torch.tensor(list(enumerate(tokens)), device=after.device)
                likely[:, at] += _at(after[:, number], wanted).sum(1)
        return _chosen(rows, spoken, likely)

    def _score_whole(self, blocks: int, rows: list[PromptRow], prefix: Any, shared: int) -> Done:
        """As `_score`, each choice behind its prompt in a pass of its own: to the model the prompt alone is another one."""
        spoken = [(number, choice, tokens) for number, row in enumerate(rows) for choice, tokens in row.scored]
        likely = torch.zeros(blocks, len(spoken), dtype=torch.float64)
        for at, (number, _, tokens) in enumerate(spoken):
            if tokens:
                logits = self.forward.whole([*rows[number].ids, *tokens[:-1]], blocks, keep=len(tokens))
                likely[:, at] = _at(logits, torch.tensor(list(enumerate(tokens)), device=logits.device)).sum(1)
        return _chosen(rows, spoken, likely)


def _chosen(rows: list[PromptRow], spoken: Sequence[tuple[int, int, list[int]]], likely: torch.Tensor) -> Done:
    """Each item's likeliest choice: `likely` [K, m] are the log-likelihoods of m `spoken` (row, choice, tokens)."""
    values: dict[int, dict[int, list[float]]] = {}
    for (number, choice, _), value in zip(spoken, likely.T.tolist(), strict=True):
        values.setdefault(rows[number].place, {})[choice] = value
    return [
        (
            row.place,
            [likeliest(row, [values[row.place][choice][block] for choice in range(len(row.item.choices))]) for block in range(len(likely))],
        )
        for row in {row.place: row for row in rows}.values()
    ]


def _by_item(rows: Sequence[PromptRow]) -> list[list[PromptRow]]:
    found: dict[int, list[PromptRow]] = {}
    for row in rows:
        found.setdefault(row.place, []).append(row)
    return list(found.values())


def _at(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [K, w] at w pairs (place, token) of logits [K, places, V]."""
    rows = logits[:, wanted[:, 0]]
    return (rows.gather(-1, wanted[:, 1].expand(len(logits), -1).unsqueeze(-1)).squeeze(-1) - rows.logsumexp(-1)).double().cpu()


def _begun(writer: Writer, rows: list[PromptRow], prefix: Any, shared: int) -> Done:
    return _written(writer.begin(rows, prefix, shared))


def _written(completions: list[list[Completion]]) -> Done:
    return [(own[0].row.place, [answer_of(completion) for completion in own]) for own in completions]
