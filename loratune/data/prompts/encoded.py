"""What every kind of prompt has in common.

Token boundary. At inference the model sees the prompt's tokens and continues them, so text that is scored is tokenised
behind the tokens of what stands before it, and the two are never merged into one token.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from loratune.data.sources import Example
from loratune.errors import DataError

_INLINE = re.compile(r"(\s*<think>)(.*?)(</think>)(\s*)(?=\S)", re.DOTALL)


class UnfitError(DataError):
    """A row that a prompt cannot show as it is. `problem` lacks the file and the place."""

    def __init__(self, example: Example, problem: str) -> None:
        super().__init__(f"{example.source}, {example.place}: {problem}")
        self.problem = problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One example as tokens."""

    input_ids: list[int]
    response_mask: list[bool]  # same length; True: this token is predicted and counted in the loss
    truncated: bool  # cut at max_length; what is left then does not end
    reasoning_left_out: int = 0  # thinking parts of earlier answers that the chat template does not show
    length: int = 0  # tokens before it was cut


class Prompt(ABC):
    """Turns examples and questions into tokens. Made once, with `choose`."""

    kind: ClassVar[str]  # alpaca | chat | text
    ends: frozenset[int]  # token ids that end an answer
    date: str = ""  # ISO, that the template was given; empty when it shows none

    def __init__(self, tokenizer: Any, *, score_reasoning: bool = True, why: str = "") -> None:
        self.tokenizer, self.score_reasoning, self._why = tokenizer, score_reasoning, why

    @property
    def note(self) -> str:
        """Which prompt, and why, in one line."""
        return f"{self.kind}, {self._why}"

    def encode(self, example: Example, max_length: int) -> Encoded | None:
        """Tokens of one example, at most `max_length`; None when the prompt alone leaves no scored token.

        Scored are the answers that count (`Exchange.scored`), each with the token that ends it, and nothing else.
        Raises UnfitError for a row that the prompt cannot show.
        """
        ids, mask, left_out = self._encode(example)
        mask[0] = False  # nothing stands before it to predict it from
        end = max((place for place, scored in enumerate(mask) if scored), default=-1) + 1  # what follows teaches nothing
        if not any(mask[:max_length]):
            return None
        ids, mask = ids[:end], mask[:end]
        return Encoded(
            input_ids=ids[:max_length],
            response_mask=mask[:max_length],
            truncated=len(ids) > max_length,
            reasoning_left_out=left_out,
            length=len(ids),
        )

    @abstractmethod
    def question(self, instruction: str, input: str = "", system: str = "", *, thinking: bool = False) -> list[int]:
        """The tokens after which a model generates its answer: those that training puts before a first scored token.

        thinking: whether the model was trained on answers with a thinking part, which it then begins with.
        """

    @abstractmethod
    def _encode(self, example: Example) -> tuple[list[int], list[bool], int]:
        """(token ids, which are scored, thinking parts left out)."""


def has_reasoning(example: Example) -> bool:
    """Whether any of its answers has a thinking part, in a field or in the text."""
    return any(exchange.reasoning or thinking_part(exchange.response) for exchange in example.exchanges)


def thinking_part(response: str) -> re.Match[str] | None:
    """The `<think>...</think>` that an answer begins with, in four groups: tag, content, tag, white space."""
    return _INLINE.match(response)


def without_end(response: str, ends: Iterable[str]) -> str:
    """The answer without an end mark spelt out behind it: many data sets carry that of the model they were made for."""
    for end in ends:
        if end and response.rstrip().endswith(end):
            response = response.rstrip().removesuffix(end).rstrip()
    return response


def join_pieces(chunks: Iterable[tuple[str, bool]], ids_of: Callable[[str], list[int]]) -> tuple[list[int], list[bool]]:
    """(token ids, which are scored) of pieces of one text, each with whether it is scored."""
    ids: list[int] = []
    mask: list[bool] = []
    text = ""
    for piece, scored in chunks:
        if not piece:
            continue
        text += piece
        through = ids_of(text)
        # Tokenised in context where that keeps the earlier tokens as they are at inference, else by itself.
        new = through[len(ids) :] if through[: len(ids)] == ids else ids_of(piece)
        ids += new
        mask += [scored] * len(new)
    return ids, mask
