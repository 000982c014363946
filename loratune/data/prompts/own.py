"""Prompts of the user's own: a Jinja template of one question, and plain text that is its own prompt.

A template with `messages` is a chat template and takes the place of the tokenizer's; one with `instruction` (and `input`,
`system`) writes what stands before an answer, which the tokenizer's EOS ends, and is made into a chat template.
"""

import re
from pathlib import Path
from typing import Any

from loratune.data.formats import Markers
from loratune.data.prompts.encoded import Prompt, UnfitError, join_pieces, without_end
from loratune.data.sources import Example
from loratune.errors import DataError, ModelError

FILES = (".jinja", ".jinja2", ".j2")
VARIABLES = ("instruction", "input", "system")
_CHAT_TAGS = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")  # Transformers' own


def is_template(prompt: str) -> bool:
    """Whether `data.prompt` is a template or the name of a template's file."""
    return "{{" in prompt or "{%" in prompt or prompt.endswith(FILES)


def template_of(prompt: str) -> str:
    """The template's text; empty where `prompt` is none. Raises DataError for a file that cannot be read."""
    if not is_template(prompt):
        return ""
    if "{{" in prompt or "{%" in prompt:
        return prompt
    try:
        return Path(prompt).expanduser().read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.prompt: {prompt} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}.") from error


def as_chat_template(template: str, tokenizer: Any) -> str:
    """The template as a chat template; one of a question is put around each message of the user, EOS behind each answer.

    Raises ModelError for a template that Jinja does not understand, or with variables that are not given.
    """
    import jinja2
    from jinja2 import meta

    try:
        names = meta.find_undeclared_variables(
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_CHAT_TAGS.sub("", template))
        )
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"data.prompt: not a Jinja template: line {error.lineno}: {error.message}.") from error
    if "messages" in names:
        return template
    unknown = sorted(names - {*VARIABLES, "bos_token", "eos_token"})
    if unknown or "instruction" not in names:
        what = f"the variable{'s' * (len(unknown) > 1)} {', '.join(unknown)}" if unknown else "no variable that shows the question"
        raise ModelError(
            f"data.prompt: the template has {what}; expected instruction (also input, system), or messages as a chat template."
        )
    begins = "bos_token" not in names and begins_with_bos(tokenizer)
    said = "m.instruction | default(m.content)" if "input" in names else "m.content"
    # The empty expressions keep white space at the template's ends, which blocks beside it would swallow.
    return (
        ("{{ bos_token }}" if begins else "")
        + "{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
        + "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}{% elif m.role == 'user' %}"
        + "{% set instruction = "
        + said
        + " %}{% set input = m.input | default('') %}{% set system = first if loop.index0 < 2 else '' %}{{ '' }}"
        + template
        + "{{ '' }}{% endif %}{% endfor %}"
    )


class Plain(Prompt):
    """Text as it stands, EOS at its end. Special tokens spelt out in it are these tokens, as in TRL: such texts carry their template."""

    kind = "text"

    def __init__(self, tokenizer: Any, markers: Markers, *, score_reasoning: bool = True) -> None:
        super().__init__(tokenizer, score_reasoning=score_reasoning, why=f"scored behind {markers.response!r}")
        self.markers = markers
        self.ends = frozenset([int(tokenizer.eos_token_id)])

    def question(self, instruction: str, input: str = "", system: str = "", *, thinking: bool = False) -> list[int]:
        raise ModelError(
            "the study was trained on plain text, whose questions stand in a template that only the data know; "
            "to compare, say which prompt to ask with: --prompt alpaca or chat."
        )

    def _encode(self, example: Example) -> tuple[list[int], list[bool], int]:
        if not example.plain:
            raise UnfitError(example, "the row is no plain text (field text), which data.response_marker is for")
        chunks: list[tuple[str, bool]] = []
        last = len(example.exchanges) - 1
        for number, exchange in enumerate(example.exchanges):
            before = self.markers.instruction if number else example.system
            response = without_end(exchange.response, [str(self.tokenizer.eos_token)]) if number == last else exchange.response
            chunks += [(before + exchange.instruction + self.markers.response, False), (response, True)]
        bos = begins_with_bos(self.tokenizer) and not chunks[0][0].startswith(str(self.tokenizer.bos_token))
        begin = [int(self.tokenizer.bos_token_id)] if bos else []
        ids, mask = join_pieces(chunks, lambda text: list(self.tokenizer(text, add_special_tokens=False)["input_ids"]))
        return [*begin, *ids, self.tokenizer.eos_token_id], [*[False] * len(begin), *mask, True], 0


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
