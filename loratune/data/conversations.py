"""Messages into exchanges: what was said to the assistant, and what it answered or which tools it called.

Both spellings are read, {role, content} and ShareGPT's {from, value}; calls of tools in OpenAI's form (`tool_calls`, the earlier
`function_call`) and ShareGPT's (a message from `function_call`, its value JSON); a content of parts of text is joined as chat
templates join it, without anything between.
"""

import json
from typing import Any, NamedTuple

from loratune.data.fields import BadError, Fields, agreed, checked_text, empty, flag_of, optional_text
from loratune.data.records import described


class Exchange(NamedTuple):
    """What a user said and what the assistant answered. `input` is what the instruction is about, or empty."""

    instruction: str  # several messages of the user, one after the other, are joined by an empty line; empty behind a result of a tool
    input: str
    response: str  # may be empty beside calls
    scored: bool = True  # False: the answer is context, no token of it counts in the loss
    reasoning: str = ""  # the thinking part that stands before the response (`reasoning_content`)
    asked: str = ""  # JSON list of the messages before the answer, where these are not one text of the user
    calls: str = ""  # JSON list of the answer's calls of tools, in OpenAI's form, arguments as an object where they are one


class Turns(NamedTuple):
    """Exchanges, the system message among them, and how many exchanges come from `history`."""

    exchanges: list[Exchange]
    system: str = ""
    history: int = 0


ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "call"),  # ShareGPT's: an answer that calls
}
FLAGS = ("weight", "train", "training", "loss", "loss_scale")


class _Message(NamedTuple):
    role: str  # system | user | assistant | tool
    text: str
    scored: bool = True
    reasoning: str = ""
    calls: str = ""
    names: tuple[tuple[str, str], ...] = ()  # of a tool's result: its name and the call's id


def role_of(message: Any) -> str:
    """The role of a message in either spelling; empty where it has none that is known."""
    name = (message.get("from") or message.get("role")) if isinstance(message, dict) else None
    role = ROLES.get(name.lower(), "") if isinstance(name, str) else ""
    return "assistant" if role == "call" else role


def turns_of(fields: Fields, field: str, messages: Any) -> Turns:
    """The exchanges of a list of messages, an answer at the end. Raises BadError."""
    if not isinstance(messages, list) or not messages:
        raise BadError(f"field {field}: expected a list of messages, found {described(messages)}")
    system = ""
    exchanges: list[Exchange] = []
    waiting: list[_Message] = []  # what was said since the last answer
    for number, given in enumerate(messages, 1):
        where = f"{field}[{number}]"
        message = _message(given, where, fields, field)
        if message.role == "system" and number == 1:
            system = message.text
        elif message.role == "tool" and not (exchanges and exchanges[-1].calls):
            raise BadError(f"{where}: a result of a tool, but no call (tool_calls) stands before it")
        elif message.role in ("user", "tool"):
            waiting.append(message)
        elif message.role == "system" or not waiting:
            expected = "assistant" if waiting else "user"
            raise BadError(f"{where}: expected a message of the {expected}, found one of the {message.role}")
        else:
            exchanges.append(_exchange(waiting, message))
            waiting = []
    if waiting or not exchanges:
        raise BadError(f"field {field}: expected an assistant message at the end, found {described(messages[-1])}")
    return Turns(exchanges, system)


def _exchange(waiting: list[_Message], answer: _Message) -> Exchange:
    users = [message.text for message in waiting if message.role == "user"]
    asked = [{"role": message.role, "content": message.text, **dict(message.names)} for message in waiting]
    plain = len(users) == len(waiting) == 1
    told = "" if plain else json.dumps(asked, ensure_ascii=False)
    return Exchange("\n\n".join(users), "", answer.text, answer.scored, answer.reasoning, told, answer.calls)


def _message(given: Any, where: str, record: Fields, field: str) -> _Message:
    """One message, in either spelling."""
    if not isinstance(given, dict):
        raise BadError(f"{where}: expected an object with role and content, found {described(given)}")
    message = Fields(given, f"{where}.")
    who, what = ("from", "value") if "from" in given else ("role", "content")
    name = message.get(who)
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise BadError(f"{where}.{who}: expected one of {', '.join(ROLES)}, found {described(name)}")
    role = ROLES[name.lower()]
    if not empty(message.get("tools")):
        raise BadError(f"{where}.tools: expected beside the messages")
    value = message.get(what)
    if role == "call":
        role, calls, text = "assistant", _calls(value, f"{where}.{what}"), ""
    else:
        calls = _called(message, where, role)
        text = _text(value, f"{where}.{what}", message, may_be_empty=role in ("system", "tool") or bool(calls), other=role == "tool")
    scored = flag_of(message, FLAGS)
    if scored and role != "assistant":
        raise BadError(f"{where}: a message of the {role} is marked to be trained on; only the assistant's answers are scored")
    if not empty(message.get("train_detail")) or not empty(message.get("training_detail")):
        raise BadError(f"{where}.train_detail: an answer is scored as a whole or not at all; use train: true or false")
    reasoning = agreed(message, ("reasoning_content", "reasoning", "thinking"), optional_text)
    if reasoning.strip() and role != "assistant":
        raise BadError(f"{where}: a message of the {role} has a reasoning part; only the assistant's answers may")
    names = tuple((key, optional_text(message, key)) for key in ("name", "tool_call_id")) if role == "tool" else ()
    record.inner |= dict.fromkeys(f"{field}[].{name}" for name in message.unread())
    return _Message(role, text, scored is not False, reasoning if reasoning.strip() else "", calls, tuple(n for n in names if n[1]))


def _text(value: Any, where: str, message: Fields, *, may_be_empty: bool, other: bool) -> str:
    """A content: text, or parts of text. other: whether anything else is written as JSON, as of a tool's result."""
    if isinstance(value, list) and value and all(isinstance(part, str | dict) for part in value) and not (other and not _are_parts(value)):
        value = "".join(_part(part, f"{where}[{number}]", message) for number, part in enumerate(value, 1))
    elif other and value is not None and not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, default=str)
    if value is None and may_be_empty:
        value = ""
    if not isinstance(value, str) or not (value.strip() or may_be_empty):
        raise BadError(f"{where}: expected text, found {described(value)}")
    return checked_text(value, where)


def _are_parts(value: list[Any]) -> bool:
    return all(isinstance(part, dict) and part.get("type") == "text" for part in value)


def _part(part: Any, where: str, message: Fields) -> str:
    if isinstance(part, str):
        return part
    kind, text = part.get("type", "text" if "text" in part else None), part.get("text")
    if kind != "text" or not isinstance(text, str):
        raise BadError(f"{where}: expected a part of type text, found {described(part)}; images and sound are not trained on")
    if any(not empty(part.get(flag)) for flag in FLAGS):
        raise BadError(f"{where}: an answer is scored as a whole or not at all; write train or weight beside its content")
    message.inner |= dict.fromkeys(f"content[].{key}" for key, inner in part.items() if key not in ("type", "text") and not empty(inner))
    return text


# ---- calls of tools ----


def _called(message: Fields, where: str, role: str) -> str:
    """The calls beside a message's content, in OpenAI's present or earlier form."""
    several, one = message.get("tool_calls"), message.get("function_call")
    if empty(several) and empty(one):
        return ""
    if role != "assistant":
        raise BadError(f"{where}: a message of the {role} calls a tool; only the assistant may")
    if not empty(several) and not empty(one):
        raise BadError(f"{where}.tool_calls and function_call: mean the same; keep one")
    return _calls(one if empty(several) else several, f"{where}.{'function_call' if empty(several) else 'tool_calls'}")


def _calls(value: Any, where: str) -> str:
    """Calls in OpenAI's form, from that, from {name, arguments}, from a list of either, or from JSON text of these."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            raise BadError(f"{where}: expected a call of a tool, an object with name and arguments, found {described(value)}") from None
    found = []
    for number, call in enumerate(value if isinstance(value, list) else [value], 1):
        at = f"{where}[{number}]" if isinstance(value, list) else where
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
            raise BadError(f"{at}: expected a call of a tool, an object with name and arguments, found {described(call)}")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = _parsed(arguments)
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        function = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        found.append({**named, "type": "function", "function": function})
    if not found:
        raise BadError(f"{where}: expected a call of a tool, found {described(value)}")
    try:
        return checked_text(json.dumps(found, ensure_ascii=False), where)
    except TypeError as error:
        raise BadError(f"{where}: is not JSON: {error}") from None


def _parsed(arguments: str) -> Any:
    """OpenAI writes the arguments as JSON text, chat templates want the object; text that is no object stays text."""
    try:
        value = json.loads(arguments)
    except (json.JSONDecodeError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
