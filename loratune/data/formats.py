"""What the fields of a record mean: six formats, told apart by their fields, each into a conversation.

Every field is read, refused or counted: what changes the text or the loss is read (`history`, `weight`, `train`,
`reasoning_content`, `tools`, calls of tools) or refused where it cannot be held (other weights than 0 and 1), and the names of
all other fields are handed on for the summary. A problem is a `BadError`, whose text lacks only the place.

Spellings: OpenAI's fine-tuning files (`weight`, `tools`, `developer`), LLaMA-Factory (`history`, `system`, `kto_tag`), Axolotl
(`train`, `training`), ms-swift and XTuner (`loss`, `loss_scale`), TRL (`prompt` and `completion` of messages, `label`).
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from loratune.data.conversations import Exchange, Turns, role_of, turns_of
from loratune.data.fields import BadError, Fields, agreed, checked_text, empty, flag_of, list_field, optional_text, text_field
from loratune.data.records import described
from loratune.system.names import close_names


class Conversation(NamedTuple):
    """What one record holds."""

    exchanges: tuple[Exchange, ...]
    system: str
    tools: str  # JSON text of a list, or empty
    history: int  # exchanges, the first ones, that came from the field `history`
    unread: tuple[str, ...]  # fields that hold something and were not read; of messages as messages[].name


class Format(NamedTuple):
    """`required` tells a format from the others; `parse` reads the exchanges."""

    required: tuple[str, ...]
    parse: Callable[[Fields], Turns]


class Markers(NamedTuple):
    """Of plain text (`text`): what stands before an answer, and, where a text holds several, before a question."""

    response: str = ""
    instruction: str = ""


NO_MARKERS = Markers()


def is_preference(record: dict[str, Any]) -> bool:
    """Whether a record is a pair of answers of which one is preferred, and no answer to learn alone."""
    return "chosen" in record and "rejected" in record and not any(all(f in record for f in known.required) for known in FORMATS.values())


def detect_format(record: dict[str, Any]) -> str:
    """The format that a record's fields fit. Raises BadError."""
    for name, known in FORMATS.items():
        if all(field in record for field in known.required):
            return name
    fields = [str(field) for field in record]
    wanted = {field for known in FORMATS.values() for field in known.required}
    near = [(f, meant) for f in fields if f not in wanted for meant in close_names(f, sorted(wanted), cutoff=0.75)]
    hint = " " + "; ".join(f"{given} looks like {meant}" for given, meant in near) + "." if near else ""
    formats = "; ".join(f"{name} ({', '.join(known.required)})" for name, known in FORMATS.items())
    named = ", ".join(fields)
    named = f"{named[:200]} ..." if len(named) > 200 else named or "(none)"
    raise BadError(f"the fields {named} fit no known format: {formats}.{hint}".rstrip("."))


def parse_record(record: dict[str, Any], name: str, markers: Markers = NO_MARKERS) -> Conversation:
    """A record of format `name`. Raises BadError."""
    fields = Fields(record)
    fields.get("category")  # kept with the example
    _usable(fields)
    turns = _plain_text(fields, markers) if name == "text" else FORMATS[name].parse(fields)
    beside = agreed(fields, ("system", "system_prompt"), optional_text)
    if beside and turns.system and beside != turns.system:
        raise BadError(f"field system and the first message are two different system messages: {described(beside)}; keep one")
    if not any(exchange.scored for exchange in turns.exchanges):
        raise BadError("no answer is scored (weight: 0, train: false, ...); expected at least one answer to learn from")
    return Conversation(tuple(turns.exchanges), turns.system or beside, _tools(fields), turns.history, fields.unread())


# ---- one question and its answer ----


def _single(instruction: str, contexts: tuple[str, ...], response: str) -> Callable[[Fields], Turns]:
    def parse(fields: Fields) -> Turns:
        asked, about, answer = text_field(fields, instruction), agreed(fields, contexts, optional_text), text_field(fields, response)
        if not asked.strip() and not about.strip():
            raise BadError(f"field {instruction}: is empty; expected at least one word")
        if not answer.strip():
            raise BadError(f"field {response}: is empty; expected a response to learn from")
        earlier = _history(fields)
        last = Exchange(asked, about, answer, reasoning=optional_text(fields, "reasoning_content"))
        return Turns([*earlier, last], history=len(earlier))

    return parse


def _history(fields: Fields) -> list[Exchange]:
    """LLaMA-Factory's earlier exchanges, a list of [question, answer]. They are scored, as there unless mask_history is set."""
    value = list_field(fields, "history", "a list of pairs [question, answer]")
    found = []
    for number, pair in enumerate(value, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) and text.strip() for text in pair):
            raise BadError(f"history[{number}]: expected a pair of texts [question, answer], found {described(pair)}")
        asked, answer = (checked_text(text, f"history[{number}]") for text in pair)
        found.append(Exchange(asked, "", answer))
    return found


# ---- plain text ----


def _plain_text(fields: Fields, markers: Markers) -> Turns:
    """Text that stands for itself: an answer begins behind the response marker, as in TRL's completion-only collator.

    With an instruction marker each answer reaches to the next question; without, the last answer alone is one, and reaches to the end.
    """
    text, marker = text_field(fields, "text"), markers.response
    if marker not in text:
        raise BadError(f"field text: the response_marker {marker!r} does not appear: {described(text)}")
    if not markers.instruction:
        asked, _, answer = text.rpartition(marker)
        return _checked_text_turns("", [Exchange(asked, "", answer)])
    before, found, rest = text.partition(markers.instruction)
    if not found or marker in before:
        raise BadError(f"field text: expected the instruction_marker {markers.instruction!r} before the first {marker!r}")
    exchanges = []
    while rest:
        asked, found, behind = rest.partition(marker)
        if not found:
            break  # a question without an answer, at the end
        answer, _, rest = behind.partition(markers.instruction)
        exchanges.append(Exchange(asked, "", answer))
    return _checked_text_turns(before + markers.instruction, exchanges)


def _checked_text_turns(before: str, exchanges: list[Exchange]) -> Turns:
    if not all(exchange.response.strip() for exchange in exchanges):
        raise BadError("field text: nothing stands behind the response_marker; expected a response to learn from")
    return Turns(exchanges, before)


# ---- conversations ----


def _conversation(field: str) -> Callable[[Fields], Turns]:
    def parse(fields: Fields) -> Turns:
        if field not in fields.values:
            text_field(fields, field)  # raises: missing
        return turns_of(fields, field, fields.get(field))

    return parse


def _prompt_completion(fields: Fields) -> Turns:
    """Two texts, or TRL's two lists of messages, of which the prompt's answers are not scored."""
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        return _single("prompt", (), "completion")(fields)
    before = sum(role_of(message) == "assistant" for message in prompt)
    turns = turns_of(fields, "prompt + completion", [*prompt, *completion])
    exchanges = [e._replace(scored=e.scored and place >= before) for place, e in enumerate(turns.exchanges)]
    return turns._replace(exchanges=exchanges)


FORMATS = {
    "alpaca": Format(("instruction", "output"), _single("instruction", ("input", "context"), "output")),
    "dolly": Format(("instruction", "response"), _single("instruction", ("context", "input"), "response")),
    "sharegpt": Format(("conversations",), _conversation("conversations")),
    "messages": Format(("messages",), _conversation("messages")),
    "prompt_completion": Format(("prompt", "completion"), _prompt_completion),
    "text": Format(("text",), lambda fields: _plain_text(fields, NO_MARKERS)),
}

# ---- fields ----


def _usable(fields: Fields) -> None:
    """Refuse a whole record that is marked as not to be learnt, or as weighing more or less than others."""
    if flag_of(fields, ("weight", "train")) is False:
        raise BadError("the row is marked as not to be trained on (weight: 0, train: false); expected an answer to learn from")
    for name in ("label", "kto_tag"):  # TRL's and LLaMA-Factory's unpaired preferences; a label of another type is the user's own
        if isinstance(fields.values.get(name), bool) and not fields.get(name):
            raise BadError(f"field {name}: false marks a rejected answer; expected an answer to learn from")
    if not empty(fields.get("functions")):
        raise BadError("field functions: OpenAI's earlier spelling is not read; write the functions as tools")


def _tools(fields: Fields) -> str:
    tools = list_field(fields, "tools", "a list of objects")
    for number, tool in enumerate(tools, 1):
        if not isinstance(tool, dict):
            raise BadError(f"tools[{number}]: expected an object that describes a function, found {described(tool)}")
    try:
        return checked_text(json.dumps(tools, ensure_ascii=False), "field tools") if tools else ""
    except TypeError as error:
        raise BadError(f"field tools: is not JSON: {error}") from None
