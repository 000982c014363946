"""Answers as they grow, token by token, whoever computes the tokens: their text, and when they end. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loratune.downstream.answering.rows import PromptRow
from loratune.downstream.tasks.base import Benchmark

_TAIL = 4  # tokens of the prompt that new ones are decoded behind: some tokenizers drop a leading space
_FIX = 8  # tokens decoded again at each step; what is older is fixed


@dataclass(frozen=True, kw_only=True)
class ItemAnswer:
    """One model's answer to one item."""

    text: str  # what it wrote, or the likeliest choice
    log_likelihoods: tuple[float, ...] = ()  # of the choices, natural logarithm, summed over tokens
    shots: int | None = None  # examples that were left in the prompt, where some had to be left out
    cut: bool = False  # even so the prompt did not fit, and lost its beginning


@dataclass(kw_only=True)
class Completion:
    """One adapter's answer to one prompt, as it grows."""

    row: PromptRow
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


class Reader:
    """Makes texts of the tokens that follow prompts.

    ends: the tokens that end an answer. context: the longest sequence that the model reads.
    """

    def __init__(self, tokenizer: Any, benchmark: Benchmark, ends: frozenset[int], context: int) -> None:
        self.tokenizer, self.benchmark, self.ends, self.context = tokenizer, benchmark, ends, context

    def begin(self, rows: Sequence[PromptRow]) -> list[Completion]:
        """An open completion, without a token, behind each prompt."""
        openings = self._decode([row.ids[-_TAIL:] for row in rows])
        return [Completion(row=row, opening=text) for row, text in zip(rows, openings, strict=True)]

    def take(self, completions: Sequence[Completion], tokens: Sequence[int]) -> None:
        """Append each open completion's token, and close the completions that are finished."""
        for completion, token in zip(completions, tokens, strict=True):
            if completion.open and token in self.ends:
                completion.open = False
            elif completion.open:
                completion.tokens.append(token)
        going = [completion for completion in completions if completion.open]
        self._read(going)
        for completion in going:
            written = len(completion.tokens)
            over = written >= self.benchmark.max_new_tokens or len(completion.row.ids) + written >= self.context
            completion.open = not over and not self.benchmark.decided(completion.row.item, completion.text)
        self._read([completion for completion in completions if completion.fixed and not completion.open], whole=True)

    def _read(self, completions: Sequence[Completion], *, whole: bool = False) -> None:
        """Bring the completions' texts up to date: what the tokens that are not fixed add to it; or, `whole`, all of them."""
        if whole:
            for completion in completions:
                completion.fixed, completion.fixed_text, completion.before = 0, "", completion.opening
        elif old := [
            completion
            for completion in completions
            if len(completion.tokens) > completion.fixed + _FIX and not completion.text.endswith("\ufffd")
        ]:
            tails = [[*completion.row.ids[-_TAIL:], *completion.tokens[:-1]][-_TAIL:] for completion in old]
            for completion, before in zip(old, self._decode(tails), strict=True):
                completion.fix(before)
        sequences = [
            [*completion.row.ids[-_TAIL:], *completion.tokens[: completion.fixed]][-_TAIL:] + completion.tokens[completion.fixed :]
            for completion in completions
        ]
        for completion, text in zip(completions, self._decode(sequences) if completions else (), strict=True):
            if text.startswith(completion.before):
                completion.text = completion.fixed_text + text[len(completion.before) :]
            else:
                completion.text = str(self.tokenizer.decode(completion.tokens, skip_special_tokens=True))

    def _decode(self, sequences: list[list[int]]) -> list[str]:
        rust = getattr(self.tokenizer, "backend_tokenizer", None)  # several times faster than the wrapper around it
        if rust is None or getattr(self.tokenizer, "clean_up_tokenization_spaces", False):
            return list(self.tokenizer.batch_decode(sequences, skip_special_tokens=True))
        return list(rust.decode_batch(sequences, skip_special_tokens=True))


def likeliest(row: PromptRow, likely: list[float]) -> ItemAnswer:
    """The answer that the choices' log-likelihoods give."""
    best = likely.index(max(likely))  # ties go to the first, as in lm-evaluation-harness
    return ItemAnswer(text=row.item.choices[best], log_likelihoods=tuple(likely), cut=row.cut)


def answer_of(completion: Completion) -> ItemAnswer:
    """What was written, and how much of the prompt it stands behind."""
    shots = completion.row.item.shots
    return ItemAnswer(text=completion.text, shots=len(shots) - 1 if shots else None, cut=completion.row.cut)
