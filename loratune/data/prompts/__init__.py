"""From an example to token ids, and which of them are scored: those that the model itself writes when it answers.

prompt = choose_prompt(tokenizer, "auto", date="2026-03-01")
prompt.encode(example, max_length=512)       # tokens and their mask, for training and validation
prompt.question("Name the capital of France.")  # the tokens after which a model generates
prompt.ends                                  # the token ids that end an answer

encoded.py   Encoded, Prompt: what all kinds have in common
alpaca.py    the published Stanford template
chat.py      the tokenizer's own chat template
chat_template.py  rendering it: its date, its control tokens, where in the result an answer stands
tool_calls.py   messages that are more than a question and its answer
own.py       the user's own template; plain text
"""

from typing import Any

from loratune.data.formats import NO_MARKERS, Markers
from loratune.data.prompts.alpaca import Alpaca, alpaca_chat_template, alpaca_prompt
from loratune.data.prompts.chat import Chat
from loratune.data.prompts.encoded import Encoded, Prompt, UnfitError, has_reasoning
from loratune.data.prompts.own import Plain, as_chat_template, is_template, template_of
from loratune.errors import ModelError

__all__ = [
    "KINDS",
    "Encoded",
    "Prompt",
    "UnfitError",
    "alpaca_chat_template",
    "alpaca_prompt",
    "answer_ends",
    "as_chat_template",
    "choose_prompt",
    "end_ids",
    "has_reasoning",
    "is_template",
    "template_of",
]

KINDS = ("auto", "alpaca", "chat")


def choose_prompt(tokenizer: Any, kind: str, *, date: str = "", score_reasoning: bool = True, markers: Markers = NO_MARKERS) -> Prompt:
    """The prompt of this kind for a Transformers tokenizer; `auto` is its chat template where it has one, else alpaca.

    kind: also a template's own text, which then takes the place of the tokenizer's. markers: of plain text, which is its own prompt.

    date: ISO, for a chat template that shows one. score_reasoning: whether an answer's thinking part counts in the loss.

    Raises ModelError for a tokenizer that cannot serve: without EOS, or of `chat` without a template that shows an answer.
    """
    name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{name}: the tokenizer has no EOS token, so a model could not learn to stop. Set eos_token in its tokenizer_config.json."
        )
    if markers.response:
        return Plain(tokenizer, markers, score_reasoning=score_reasoning)
    if is_template(kind):
        tokenizer.chat_template = as_chat_template(kind, tokenizer)
        return Chat(tokenizer, date=date, score_reasoning=score_reasoning, why="the description's own template", fields=True)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if kind == "chat" and not has_template:
        raise ModelError(f"{name}: the tokenizer has no chat template. Use prompt: alpaca, or an instruction-tuned model's tokenizer.")
    if kind == "chat" or (kind == "auto" and has_template):
        return Chat(tokenizer, date=date, score_reasoning=score_reasoning, why="the tokenizer's own template")
    if kind == "auto":
        why = "because the tokenizer has no chat template"
    elif has_template:
        why = "as asked: the tokenizer's own chat template is not what is trained"
    else:
        why = "as asked"
    return Alpaca(tokenizer, score_reasoning=score_reasoning, why=why)


def answer_ends(tokenizer: Any) -> frozenset[int]:
    """The token ids that end an answer, whatever the prompt: the tokenizer's EOS, and what its chat template ends a turn with."""
    eos = frozenset() if tokenizer.eos_token_id is None else frozenset([int(tokenizer.eos_token_id)])
    if not eos or not getattr(tokenizer, "chat_template", None):
        return eos
    try:
        return Chat(tokenizer).ends | eos
    except ModelError:  # a template that shows no answer ends none
        return eos


def end_ids(ends: int | list[int] | None) -> frozenset[int]:
    """`eos_token_id` of a generation config, in any of its three forms."""
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
