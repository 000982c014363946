"""A tokenizer's chat template: rendered for one fixed date, with marks that tell what of the result comes from the data.

The marks are noncharacters of Unicode. They stand around answers, around their thinking parts and around control tokens
spelt out in the data; they are taken out again before anything is tokenised.
"""

import datetime
import re
from collections.abc import Sequence
from typing import Any

ANSWER = "\ufdd0\ufdd1"  # around an answer
REASONING = "\ufdd2\ufdd3"  # around its thinking part
TEXT = "\ufdd4\ufdd5"  # around a control token that is text
_MARKS = re.compile(f"[{ANSWER}{REASONING}]")
_ALL = re.compile(f"[{ANSWER}{REASONING}{TEXT}]")
_SPELT = re.compile(f"{TEXT[0]}([^{TEXT}]*){TEXT[1]}")
_DIRECTIVES = [f"%{d}" for d in ("-d", "-m", "-H", "-I", "-M", "-S", "-j", *"aAbBcdDeFfGHIjmMnprRStTuUVwWxXyYzZ")]


class RenderError(Exception):
    """The template raised."""


class Template:
    """Renders conversations and tokenises what was rendered. date: ISO, what `strftime_now` of the template tells."""

    def __init__(self, tokenizer: Any, date: str) -> None:
        self.tokenizer, self._fixed = tokenizer, _calendar(date) if date else ""
        sources = (tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}]))  # some have another one for tools
        self.is_dated = any("strftime_now" in source for source in sources)
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        #: All tokens that are taken out of a text before it is tokenised, longest first.
        self.added = sorted(added, key=len, reverse=True)
        # Added tokens that are not special (<tool_call>, Qwen's <think>) are words, which the data may use.
        control = [token for token in self.added if added[token]]
        self._control = re.compile("|".join(map(re.escape, control)) or "(?!)")
        self._line_feed = self._plain("\n")

    def render(self, messages: Sequence[dict[str, Any]], tools: Any = None, *, ask: bool = False) -> str:
        """The conversation as text; `ask`: with the beginning of the answer that a model is to write. Raises RenderError."""
        try:
            source = self.tokenizer.get_chat_template(tools=tools)
            fixed = self._fixed if "strftime_now" in source else ""
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tools=tools, chat_template=fixed + source, tokenize=False, add_generation_prompt=ask
                )
            )
        except Exception as error:  # Jinja's own, or whatever the template raises
            raise RenderError(str(error)) from error

    def shows_marked(self, messages: Sequence[dict[str, Any]], tools: Any, whole: str) -> bool:
        """Whether `whole`, these messages and tools as rendered, is but for the marks what they give without marks."""
        return _ALL.sub("", whole) == self.render(_unmarked(list(messages)), _unmarked(tools))

    def as_text(self, value: Any) -> Any:
        """The same with marks around control tokens that are spelt out in it; of lists and mappings the values."""
        if isinstance(value, dict):
            return {key: self.as_text(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.as_text(inner) for inner in value]
        return self._control.sub(rf"{TEXT[0]}\g<0>{TEXT[1]}", _ALL.sub("", value)) if isinstance(value, str) else value

    def ids(self, rendered: str) -> list[int]:
        """Token ids. A control token that comes from the data is tokenised as the text it is."""
        text = _MARKS.sub("", rendered)
        if TEXT[0] not in text:
            return self._plain(_ALL.sub("", text))
        first, *others = _SPELT.split(text)  # text, control token, text, control token, ..., text
        ids = self._plain(_ALL.sub("", first))
        for number, piece in enumerate(others):
            ids += self._inside(_ALL.sub("", piece), spelt=number % 2 == 0)
        return ids

    def _inside(self, piece: str, *, spelt: bool) -> list[int]:
        """Ids of a piece in the midst of a text: behind a line feed, since SentencePiece puts a mark before what comes first."""
        encode = self._letters if spelt else self._plain
        ids = encode("\n" + piece)
        return ids[len(self._line_feed) :] if ids[: len(self._line_feed)] == self._line_feed else encode(piece)

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _letters(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _unmarked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unmarked(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_unmarked(inner) for inner in value]
    return _ALL.sub("", value) if isinstance(value, str) else value


def _calendar(date: str) -> str:
    """Jinja that hides Transformers' own `strftime_now`, the clock, behind one that knows a single date.

    A function cannot be given to a template (Transformers hands on plain data only), a macro can stand before it.
    """
    when = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time())
    filters = "".join(f" | replace('{d}', {when.strftime(d)!r})" for d in _DIRECTIVES)
    # The line feed belongs to the block's end (trim_blocks), so the template begins at the beginning of a line, as it did.
    return "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}\n"
