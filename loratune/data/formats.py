"""What the fields of a record mean: five formats, told apart by their fields, each into a conversation.

Every field is read, refused or counted: what changes the text or the loss is read (`history`, `weight`, `train`,
`reasoning_content`, `tools`) or refused where it cannot be held (tool calls, other weights than 0 and 1), and the names of
all other fields are handed on for the summary. A problem is a `BadError`, whose text lacks only the place.

Spellings: OpenAI's fine-tuning files (`weight`, `tools`, `developer`), LLaMA-Factory (`history`, `system`, `kto_tag`), Axolotl
(`train`, `training`), ms-swift and XTuner (`loss`, `loss_scale`), TRL (`prompt` and `completion` of messages, `label`).
"""

import difflib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from loratune.data.fields import BadError, Fields, agreed, checked_text, empty, flag_of, list_field, optional_text, text_field
from loratune.data.records import described


class Exchange(NamedTuple):
    """What a user said and what the assistant answered. `input` is what the instruction is about, or empty."""

    instruction: str
    input: str
    response: str
    scored: bool = True  # False: the answer is context, no token of it counts in the loss
    reasoning: str = ""  # the thinking part that stands before the response (`reasoning_content`)


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
    parse: Callable[[Fields], "_Turns"]


class _Turns(NamedTuple):
    """Exchanges, the system message among them, and how many exchanges come from `history`."""

    exchanges: list[Exchange]
    system: str = ""
    history: int = 0


def detect_format(record: dict[str, Any]) -> str:
    """The format that a record's fields fit. Raises BadError."""
    for name, known in FORMATS.items():
        if all(field in record for field in known.required):
            return name
    fields = [str(field) for field in record]
    wanted = {field for known in FORMATS.values() for field in known.required}
    near = {field: difflib.get_close_matches(field, sorted(wanted), n=1, cutoff=0.75) for field in fields if field not in wanted}
    looks = "; ".join(f"{given} looks like {meant[0]}" for given, meant in near.items() if meant)
    hint = f" {looks}." if looks else ""
    if "chosen" in record and "rejected" in record:
        hint += " chosen and rejected are preference data, which is not trained on; keep one answer, under the name of its format."
    formats = "; ".join(f"{name} ({', '.join(known.required)})" for name, known in FORMATS.items())
    named = ", ".join(fields)
    named = f"{named[:200]} ..." if len(named) > 200 else named or "(none)"
    raise BadError(f"the fields {named} fit no known format: {formats}.{hint}".rstrip("."))


def parse_record(record: dict[str, Any], name: str) -> Conversation:
    """A record of format `name`. Raises BadError."""
    fields = Fields(record)
    fields.get("category")  # kept with the example
    _usable(fields)
    turns = FORMATS[name].parse(fields)
    beside = agreed(fields, ("system", "system_prompt"), optional_text)
    if beside and turns.system and beside != turns.system:
        raise BadError(f"field system and the first message are two different system messages: {described(beside)}; keep one")
    if not any(exchange.scored for exchange in turns.exchanges):
        raise BadError("no answer is scored (weight: 0, train: false, ...); expected at least one answer to learn from")
    return Conversation(tuple(turns.exchanges), turns.system or beside, _tools(fields), turns.history, fields.unread())


# ---- one question and its answer ----


def _single(instruction: str, contexts: tuple[str, ...], response: str) -> Callable[[Fields], _Turns]:
    def parse(fields: Fields) -> _Turns:
        asked, about, answer = text_field(fields, instruction), agreed(fields, contexts, optional_text), text_field(fields, response)
        if not asked.strip() and not about.strip():
            raise BadError(f"field {instruction}: is empty; expected at least one word")
        if not answer.strip():
            raise BadError(f"field {response}: is empty; expected a response to learn from")
        earlier = _history(fields)
        last = Exchange(asked, about, answer, reasoning=optional_text(fields, "reasoning_content"))
        return _Turns([*earlier, last], history=len(earlier))

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


# ---- conversations ----

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
}
_TOOL_ROLES = {"tool", "function", "function_call", "tool_call", "tool_calls", "tool_response", "observation", "ipython"}
_TOOL_FIELDS = ("tool_calls", "function_call", "tool_call_id", "tools")
_NO_TOOL_CALLS = "conversations with calls of tools are not trained yet; leave such rows out"


def _conversation(field: str) -> Callable[[Fields], _Turns]:
    def parse(fields: Fields) -> _Turns:
        if field not in fields.values:
            text_field(fields, field)  # raises: missing
        return _turns(fields, field, fields.get(field))

    return parse


def _prompt_completion(fields: Fields) -> _Turns:
    """Two texts, or TRL's two lists of messages, of which the prompt's answers are not scored."""
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        return _single("prompt", (), "completion")(fields)
    before = sum(isinstance(message, dict) and str(message.get("role")).lower() in ("assistant", "model") for message in prompt)
    turns = _turns(fields, "prompt + completion", [*prompt, *completion])
    exchanges = [e._replace(scored=e.scored and place >= before) for place, e in enumerate(turns.exchanges)]
    return turns._replace(exchanges=exchanges)


def _turns(fields: Fields, field: str, messages: Any) -> _Turns:
    if not isinstance(messages, list) or not messages:
        raise BadError(f"field {field}: expected a list of messages, found {described(messages)}")
    system, asked, exchanges = "", None, []
    for number, given in enumerate(messages, 1):
        where = f"{field}[{number}]"
        role, text, scored, reasoning = _message(given, where, fields, field)
        expected = "user" if asked is None else "assistant"
        if role == "system" and number == 1:
            system = text
        elif role != expected:
            raise BadError(f"{where}: expected a message of the {expected} (turns alternate), found one of the {role}")
        elif role == "user":
            asked = text
        else:
            exchanges.append(Exchange(str(asked), "", text, scored, reasoning))
            asked = None
    if asked is not None or not exchanges:
        raise BadError(f"field {field}: expected an assistant message at the end, found {described(messages[-1])}")
    return _Turns(exchanges, system)


def _message(given: Any, where: str, record: Fields, field: str) -> tuple[str, str, bool, str]:
    """(role, text, whether it is scored, reasoning) of one message, in either spelling: {from, value} or {role, content}."""
    if not isinstance(given, dict):
        raise BadError(f"{where}: expected an object with role and content, found {described(given)}")
    message = Fields(given, f"{where}.")
    who, what = ("from", "value") if "from" in given else ("role", "content")
    name = message.get(who)
    if not isinstance(name, str) or name.lower() not in _ROLES:
        hint = f"; {_NO_TOOL_CALLS}" if isinstance(name, str) and name.lower() in _TOOL_ROLES else ""
        raise BadError(f"{where}.{who}: expected one of {', '.join(_ROLES)}, found {described(name)}{hint}")
    role = _ROLES[name.lower()]
    for tool in _TOOL_FIELDS:
        if not empty(message.get(tool)):
            raise BadError(f"{where}.{tool}: {_NO_TOOL_CALLS}" if tool != "tools" else f"{where}.tools: expected beside the messages")
    text = message.get(what)
    if not isinstance(text, str) or (not text.strip() and role != "system"):
        raise BadError(f"{where}.{what}: expected text, found {described(text)}")
    scored = flag_of(message, ("weight", "train", "training", "loss", "loss_scale"))
    if scored and role != "assistant":
        raise BadError(f"{where}: a message of the {role} is marked to be trained on; only the assistant's answers are scored")
    if not empty(message.get("train_detail")) or not empty(message.get("training_detail")):
        raise BadError(f"{where}.train_detail: an answer is scored as a whole or not at all; use train: true or false")
    reasoning = agreed(message, ("reasoning_content", "reasoning", "thinking"), optional_text)
    if reasoning.strip() and role != "assistant":
        raise BadError(f"{where}: a message of the {role} has a reasoning part; only the assistant's answers may")
    record.inner |= dict.fromkeys(f"{field}[].{name}" for name in message.unread())
    return role, checked_text(text, f"{where}.{what}"), scored is not False, reasoning if reasoning.strip() else ""


FORMATS = {
    "alpaca": Format(("instruction", "output"), _single("instruction", ("input", "context"), "output")),
    "dolly": Format(("instruction", "response"), _single("instruction", ("context", "input"), "response")),
    "sharegpt": Format(("conversations",), _conversation("conversations")),
    "messages": Format(("messages",), _conversation("messages")),
    "prompt_completion": Format(("prompt", "completion"), _prompt_completion),
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
