"""Instruction data: what the user names (`Source`, `DataRecipe`) and what is read from it (`Example`).

Five record formats, told apart by their fields. Every bad row has one message that says the file,
the place in it, the field, what was expected and what was found.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from loratune.errors import DataError
from loratune.finetune.records import described, records
from loratune.work import Json


@dataclass(frozen=True, kw_only=True)
class Source(Json):
    """Where instruction data comes from and how much of it is used."""

    path: str  # file (.json .jsonl .csv .parquet, also .gz), folder of such files or of `datasets`, or hub id
    format: str = "auto"  # auto | alpaca | dolly | sharegpt | messages | prompt_completion
    split: str | None = None  # of a folder or hub data set
    weight: float | None = None  # share in the recipe's train_count and validation_count; None: by number of rows
    count: int | None = None  # examples drawn from this source; in DataRecipe.train for training
    validation_count: int | None = None  # examples of this (training) source held out for validation


@dataclass(frozen=True, kw_only=True)
class DataRecipe(Json):
    """Which examples train, which validate, and how they become tokens.

    Validation data comes from exactly one of: `validation` sources; `validation_fraction` of every
    training source; `validation_count` examples, shared among the sources by weight (or by rows) unless
    a source has its own. Training draws from what is left: all of it, or `train_count` examples shared
    in the same way. A source asked for more training examples than it has repeats them: whole passes,
    then a random rest. Validation never repeats.
    """

    train: tuple[Source, ...]
    validation: tuple[Source, ...] = ()
    validation_fraction: float | None = None  # in (0, 1)
    train_count: int | None = None  # examples, over all sources
    validation_count: int | None = None  # examples, over all sources
    prompt: str = "auto"  # auto | alpaca | chat, see prompts/; auto: the tokenizer's chat template where it has one, else alpaca
    score_reasoning: bool = True  # whether an answer's thinking part counts in the loss
    max_length: int = 512  # tokens per example, prompt and response
    on_bad_rows: str = "error"  # error | skip
    seed: int = 0  # of the split and of the draws, not of training


class Exchange(NamedTuple):
    """What a user said and what the assistant answered. `input` is what the instruction is about, or empty."""

    instruction: str
    input: str
    response: str
    scored: bool = True  # False: the answer is context, no token of it counts in the loss
    reasoning: str = ""  # the thinking part that stands before the response (`reasoning_content`)


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One training example: a conversation of one exchange or more."""

    exchanges: tuple[Exchange, ...]
    system: str = ""
    tools: str = ""  # the functions that the assistant may call, a JSON list, for a chat template
    category: str = ""  # Dolly's, for stratified reports
    source: str = ""  # file or hub id
    place: str = ""  # "line 17" and the like


class BadRow(NamedTuple):
    """A row that cannot be used, and why."""

    source: str
    place: str
    problem: str

    def __str__(self) -> str:
        return f"{self.source}, {self.place}: {self.problem}"


class _BadError(ValueError):
    """A problem inside one row; its text lacks only the place."""


def read(source: Source, on_bad_rows: str = "error") -> tuple[list[Example], list[BadRow]]:
    """All usable examples of a source, in file order, and the bad rows.

    Raises DataError for a source that cannot be read, whose format is unknown or that holds no usable
    row, and at the first bad row unless `on_bad_rows` is "skip".
    """
    name = source.format
    if name != "auto" and name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise DataError(f"{source.path}: unknown format {name}. Known: auto, {', '.join(FORMATS)}.{hint}")
    examples: list[Example] = []
    bad: list[BadRow] = []
    for file, place, value, problem in records(source.path, source.split):
        try:
            if problem:
                raise _BadError(problem)
            if not isinstance(value, dict):
                raise _BadError(f"expected an object with fields, found {described(value)}")
            if name == "auto":
                name = _detect(value)
            system, exchanges = FORMATS[name].parse(value)
            category = value.get("category")
            examples.append(
                Example(
                    exchanges=tuple(exchanges),
                    system=system,
                    category=category if isinstance(category, str) else "",
                    source=file,
                    place=place,
                )
            )
        except _BadError as error:
            bad.append(BadRow(file, place, str(error)))
            if on_bad_rows != "skip":
                raise DataError(f"{bad[-1]}. Mend the row, or leave such rows out with on_bad_rows: skip.") from None
    if not examples:
        raise DataError(
            f"{source.path}: no usable row among {len(bad)}. The first: {bad[0]}." if bad else f"{source.path}: holds no records."
        )
    return examples, bad


# ---- the formats ----


class Format(NamedTuple):
    """`required` tells a format from the others; `parse` turns a record into (system, exchanges)."""

    required: tuple[str, ...]
    parse: Callable[[dict[str, Any]], tuple[str, list[Exchange]]]


def _detect(record: dict[str, Any]) -> str:
    for name, known in FORMATS.items():
        if all(field in record for field in known.required):
            return name
    fields = [str(field) for field in record]
    wanted = {field for known in FORMATS.values() for field in known.required}
    near = [(f, m[0]) for f in fields if f not in wanted and (m := difflib.get_close_matches(f, sorted(wanted), n=1, cutoff=0.75))]
    hint = " " + "; ".join(f"{given} looks like {meant}" for given, meant in near) + "." if near else ""
    formats = "; ".join(f"{name} ({', '.join(known.required)})" for name, known in FORMATS.items())
    raise _BadError(f"the fields {', '.join(fields)[:200] or '(none)'} fit no known format: {formats}.{hint}".rstrip("."))


def _text(record: dict[str, Any], field: str, *, optional: bool = False) -> str:
    if field not in record:
        if optional:
            return ""
        raise _BadError(f"field {field} is missing: expected text, found only the fields {', '.join(map(str, record))[:200] or '(none)'}")
    value = record[field]
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        raise _BadError(f"field {field}: expected text, found {described(value)}")
    return _clean(value, f"field {field}")


def _clean(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadError(f"{where}: holds half of a surrogate pair, which is no character: {ascii(text)[:60]}") from None
    return text


def _single(instruction: str, context: str, response: str) -> Callable[[dict[str, Any]], tuple[str, list[Exchange]]]:
    def parse(record: dict[str, Any]) -> tuple[str, list[Exchange]]:
        asked, about, answer = _text(record, instruction), _text(record, context, optional=True), _text(record, response)
        if not asked.strip() and not about.strip():
            raise _BadError(f"field {instruction}: is empty; expected at least one word")
        if not answer.strip():
            raise _BadError(f"field {response}: is empty; expected a response to learn from")
        return _text(record, "system", optional=True), [Exchange(asked, about, answer)]

    return parse


_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


def _conversation(field: str) -> Callable[[dict[str, Any]], tuple[str, list[Exchange]]]:
    def parse(record: dict[str, Any]) -> tuple[str, list[Exchange]]:
        if field not in record:
            _text(record, field)  # raises: missing
        messages = record[field]
        if not isinstance(messages, list) or not messages:
            raise _BadError(f"field {field}: expected a list of messages, found {described(messages)}")
        system, asked, exchanges = _text(record, "system", optional=True), None, []
        for number, message in enumerate(messages, 1):
            role, text = _message(message, f"{field}[{number}]")
            expected = "user" if asked is None else "assistant"
            if role == "system" and number == 1:
                system = text
            elif role != expected:
                raise _BadError(f"{field}[{number}]: expected a message of the {expected} (turns alternate), found one of the {role}")
            elif role == "user":
                asked = text
            else:
                exchanges.append(Exchange(str(asked), "", text))
                asked = None
        if asked is not None or not exchanges:
            raise _BadError(f"field {field}: expected an assistant message at the end, found {described(messages[-1])}")
        return system, exchanges

    return parse


def _message(message: Any, where: str) -> tuple[str, str]:
    """(role, text) of one message, in either spelling: {from, value} or {role, content}."""
    if not isinstance(message, dict):
        raise _BadError(f"{where}: expected an object with role and content, found {described(message)}")
    who, what = ("from", "value") if "from" in message else ("role", "content")
    role, text = message.get(who), message.get(what)
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise _BadError(f"{where}.{who}: expected one of {', '.join(_ROLES)}, found {described(role)}")
    if not isinstance(text, str) or (not text.strip() and _ROLES[role.lower()] != "system"):
        raise _BadError(f"{where}.{what}: expected text, found {described(text)}")
    return _ROLES[role.lower()], _clean(text, f"{where}.{what}")


FORMATS = {
    "alpaca": Format(("instruction", "output"), _single("instruction", "input", "output")),
    "dolly": Format(("instruction", "response"), _single("instruction", "context", "response")),
    "sharegpt": Format(("conversations",), _conversation("conversations")),
    "messages": Format(("messages",), _conversation("messages")),
    "prompt_completion": Format(("prompt", "completion"), _single("prompt", "", "completion")),
}
