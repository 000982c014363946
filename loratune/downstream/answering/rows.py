"""From items to the sequences of tokens that are run: cut to the model's context, choices set behind their prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loratune.downstream.tasks.base import Benchmark, Item


@dataclass(kw_only=True)
class PromptRow:
    """A prompt to run: one that the model continues, or one behind which choices are scored."""

    item: Item
    place: int  # the item's, among those asked
    ids: list[int]
    scored: list[tuple[int, list[int]]] = field(default_factory=list)  # (choice, its tokens)
    cut: bool = False


Members = Sequence[tuple[int, Item]]  # (place, item)


class RowMaker:
    """Makes rows of at most `context` tokens."""

    def __init__(self, tokenizer: Any, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context

    def to_write(self, benchmark: Benchmark, members: Members) -> list[PromptRow]:
        """One row per item. A prompt that is too long loses its last examples, then its beginning."""
        room = max(self.context - benchmark.max_new_tokens, self.context // 2)  # a small context is shared by both
        limit = min(room, benchmark.max_prompt_tokens or room)
        rows = []
        encoded = iter(self._encode([item.prompt for _, item in members if not item.ids]))
        for place, item in members:
            ids = list(item.ids) or next(encoded)
            fitted = item
            while len(ids) > limit and (shorter := fitted.without_last_shot()) is not None:
                fitted = shorter
                ids = self._encode([fitted.prompt])[0]
            rows.append(PromptRow(item=fitted, place=place, ids=ids[-room:], cut=len(ids) > room))
        return rows

    def to_score(self, members: Members) -> list[PromptRow]:
        """As lm-evaluation-harness: a choice's tokens are those that the prompt gets by having it appended.

        One row per item; where prompt and choices exceed the context one per choice, cut at its left as far as the choice needs.
        """
        rows = []
        contexts = self._encode([item.prompt.rstrip(" ") for _, item in members])
        wholes = iter(self._encode([item.prompt + choice for _, item in members for choice in item.choices]))
        for (place, item), context in zip(members, contexts, strict=True):
            scored = [(number, next(wholes)[len(context) :][-self.context :]) for number in range(len(item.choices))]
            room = [self.context + 1 - max(1, len(tokens)) for _, tokens in scored]  # the last token is never run
            if len(context) <= min(room) or max(room) == min(room):
                rows.append(PromptRow(item=item, place=place, ids=context[-min(room) :], scored=scored, cut=len(context) > min(room)))
                continue
            rows += [
                PromptRow(item=item, place=place, ids=context[-left:], scored=[one], cut=len(context) > left)
                for left, one in zip(room, scored, strict=True)
            ]
        return rows

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids with the tokenizer's own special tokens, an EOS at the end apart."""
        encoded = self.tokenizer(texts)["input_ids"] if texts else []
        end = self.tokenizer.eos_token_id
        return [ids[:-1] if ids[-1:] == [end] else ids for ids in encoded]


def common(rows: Sequence[PromptRow]) -> int:
    """How many tokens all rows begin with, and may share: each keeps the one that its first prediction needs."""
    sequences = [row.ids for row in rows]
    first, last = min(sequences), max(sequences)  # in lexicographic order these two differ earliest
    same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(same, *(len(ids) - 1 for ids in sequences))
