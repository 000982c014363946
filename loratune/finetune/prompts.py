"""From an example to token ids, and which of them are the response.

The loss counts response tokens only: every assistant answer with the EOS that ends it.

Token boundary. At inference the model sees the prompt's tokens and continues them, so the prompt is
tokenised by itself and the response after it; the two are never merged into one token. For a
SentencePiece tokenizer (Llama 2) the response then begins with the word-start mark, which is
also what such a model naturally writes after "### Response:".
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from loratune.errors import DataError, ModelError
from loratune.finetune.data import Example, Exchange

PROMPTS = ("alpaca", "chat")

# The published Stanford Alpaca template; a system message takes the place of its opening sentence.
_OPENING = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_OPENING_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One example as tokens."""

    input_ids: list[int]
    response_mask: list[bool]  # same length; True: this token is predicted and counted in the loss
    truncated: bool  # cut at max_length; what is left then ends without EOS


def check_tokenizer(tokenizer: Any, prompt: str) -> None:
    """Raise ModelError for a tokenizer that cannot serve: no EOS, or no chat template for prompt "chat"."""
    name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{name}: the tokenizer has no EOS token, so a model could not learn to stop. Set eos_token in its tokenizer_config.json."
        )
    if prompt == "chat" and not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"{name}: the tokenizer has no chat template. Use prompt: alpaca, or an instruction-tuned model's tokenizer.")


def encode(example: Example, tokenizer: Any, *, prompt: str, max_length: int) -> Encoded | None:
    """Tokens of one example, at most `max_length`; None when the prompt alone leaves no response token.

    `tokenizer` is a Transformers tokenizer that passed `check_tokenizer`. A whole example ends with
    exactly one EOS, whether or not the response's text already ended with it.

    Raises DataError when the chat template refuses the conversation.
    """
    ids, mask = (_encode_chat if prompt == "chat" else _encode_alpaca)(_without_eos(example, tokenizer), tokenizer)
    mask[0] = False  # nothing stands before it to predict it from
    if not any(mask[:max_length]):
        return None
    return Encoded(input_ids=ids[:max_length], response_mask=mask[:max_length], truncated=len(ids) > max_length)


def encode_prompt(instruction: str, input: str = "", system: str = "", *, tokenizer: Any, prompt: str) -> list[int]:
    """The tokens after which a model generates its answer: exactly those that training puts before a first response."""
    if prompt == "chat":
        messages = _messages(Example(exchanges=(Exchange(instruction, input, ""),), system=system))[:-1]
        return _ids(tokenizer, _render(tokenizer, messages, add_generation_prompt=True))
    return _alpaca_ids(tokenizer, alpaca_prompt(instruction, input, system), first=True)


def alpaca_prompt(instruction: str, input: str = "", system: str = "") -> str:
    """Stanford Alpaca's prompt, with or without input."""
    opening = system or (_OPENING_WITH_INPUT if input else _OPENING)
    return f"{opening}\n\n{_alpaca_turn(instruction, input)}"


def _alpaca_turn(instruction: str, input: str) -> str:
    about = f"### Input:\n{input}\n\n" if input else ""
    return f"### Instruction:\n{instruction}\n\n{about}### Response:"


def _without_eos(example: Example, tokenizer: Any) -> Example:
    """Many data sets carry the EOS of the model they were made for; spelt out twice it would be learnt twice."""
    eos = str(tokenizer.eos_token)
    if not any(exchange.response.rstrip().endswith(eos) for exchange in example.exchanges):
        return example
    stripped = (e._replace(response=e.response.rstrip().removesuffix(eos).rstrip()) for e in example.exchanges)
    return dataclasses.replace(example, exchanges=tuple(stripped))


# ---- Alpaca ----


def _encode_alpaca(example: Example, tokenizer: Any) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    mask: list[bool] = []
    for number, (instruction, about, response, *_) in enumerate(example.exchanges):
        first = number == 0
        text = alpaca_prompt(instruction, about, example.system) if first else "\n\n" + _alpaca_turn(instruction, about)
        asked = _alpaca_ids(tokenizer, text, first=first)
        answered = [*_alpaca_ids(tokenizer, response, first=False), tokenizer.eos_token_id]
        ids += asked + answered
        mask += [False] * len(asked) + [True] * len(answered)
    return ids, mask


def _alpaca_ids(tokenizer: Any, text: str, *, first: bool) -> list[int]:
    """Token ids; BOS before the first text if the tokenizer adds it, never EOS.

    `split_special_tokens`: a "</s>" that stands in the data is text, not the end of the answer.
    """
    ids = list(tokenizer(text, add_special_tokens=first, split_special_tokens=True)["input_ids"])
    return ids[:-1] if first and ids[-1] == tokenizer.eos_token_id else ids


# ---- the tokenizer's chat template ----


def _encode_chat(example: Example, tokenizer: Any) -> tuple[list[int], list[bool]]:
    messages = _messages(example)
    try:
        ids, mask = _by_generation_tags(tokenizer, messages) or _by_prefixes(tokenizer, messages)
    except _TemplateError as error:
        raise DataError(f"{example.source}, {example.place}: the chat template cannot show this conversation: {error}") from error.__cause__
    eos = tokenizer.eos_token_id
    for place in range(1, len(ids)):  # an EOS written right after an answer ends it, tagged or not
        mask[place] = mask[place] or (ids[place] == eos and mask[place - 1])
    end = max((place for place in range(len(ids)) if mask[place]), default=len(ids) - 1) + 1
    ids, mask = ids[:end], mask[:end]
    return (ids, mask) if ids[-1] == eos else ([*ids, eos], [*mask, True])


def _messages(example: Example) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": example.system}] if example.system else []
    for instruction, about, response, *_ in example.exchanges:
        asked = f"{instruction}\n\n{about}" if about else instruction
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": response}]
    return messages


class _TemplateError(Exception):
    """A chat template that refuses a conversation or hides part of it."""


def _by_generation_tags(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]] | None:
    """Answers as the template itself marks them with {% generation %}; None when it does not."""
    if not re.search(r"\{%[-+]?\s*generation\b", tokenizer.get_chat_template()):
        return None
    try:
        out = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    except Exception as error:  # Jinja's own, or whatever the template raises
        raise _TemplateError(str(error)) from error
    return (list(out["input_ids"]), [bool(m) for m in out["assistant_masks"]]) if any(out["assistant_masks"]) else None


def _by_prefixes(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Answers as the text between what the template shows with and without them."""
    whole = _render(tokenizer, messages)
    chunks: list[tuple[int, bool]] = []  # (end in `whole`, is response)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _render(tokenizer, messages[:number], add_generation_prompt=True)
        if not whole.startswith(asked):
            raise _TemplateError("what it shows before an answer is not the beginning of the whole. Use prompt: alpaca.")
        shown = _render(tokenizer, messages[: number + 1])
        content = message["content"].strip()
        start = whole.find(content, len(asked))
        # Some templates show earlier answers differently (no thinking part); then the answer's own text tells where it ends.
        end = len(shown) if whole.startswith(shown) else start + len(content) if start >= 0 else 0
        if content[-20:] not in whole[len(asked) : end]:  # the last words: a template may lay out a thinking part before them
            raise _TemplateError("an answer does not appear in it as written. Use prompt: alpaca.")
        chunks += [(len(asked), False), (end, True)]
    ids: list[int] = []
    mask: list[bool] = []
    start = 0
    for end, is_response in chunks:
        through = _ids(tokenizer, whole[:end])
        # Tokenised in context where that keeps the earlier tokens as they are at inference, else by itself.
        new = through[len(ids) :] if through[: len(ids)] == ids else _ids(tokenizer, whole[start:end])
        spoken = len(new)
        if is_response and tokenizer.eos_token_id in new:  # the line feed after the EOS is the template's, not the model's
            spoken -= new[::-1].index(tokenizer.eos_token_id)
        ids += new
        mask += [is_response and place < spoken for place in range(len(new))]
        start = end
    return ids, mask


def _render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # Jinja's own, or whatever the template raises
        raise _TemplateError(str(error)) from error


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
