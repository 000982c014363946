"""Messages that are more than a question and its answer, as chat templates want them: calls of tools, their results, several
messages of the user in a row.

Templates disagree on two points, so what one refuses is tried in the next spelling: the arguments of a call as an object or as
JSON text, messages of the user each by itself or as one.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loratune.data.prompts.chat_template import ANSWER, TEXT
from loratune.data.sources import Example, Exchange


@dataclass(frozen=True)
class Spelling:
    """One way of handing a conversation to a template."""

    text_arguments: bool = False
    joined: bool = False

    def arguments_are_repr(self, messages: Sequence[dict[str, Any]], whole: str) -> bool:
        """Whether an argument's object was written as Python shows it: the template expected JSON text."""
        calls = [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", ())]
        return any(isinstance(arguments, dict) and arguments and str(arguments) in whole for arguments in calls)


USUAL = Spelling()


def spellings(example: Example) -> Iterator[Spelling]:
    """The ways in which a conversation may be handed over, the customary one first; of most conversations there is only that."""
    calls = any(exchange.calls for exchange in example.exchanges)
    several = any(exchange.asked and exchange.instruction for exchange in example.exchanges)
    for joined in (False, True) if several else (False,):
        for text_arguments in (False, True) if calls else (False,):
            yield Spelling(text_arguments, joined)


def asked_messages(exchange: Exchange, how: Spelling, fields: bool) -> list[dict[str, str]]:
    """What was said before the answer: a question, or messages of the user and results of tools; `fields`: its parts beside it."""
    if not exchange.asked:
        asked = f"{exchange.instruction}\n\n{exchange.input}" if exchange.input else exchange.instruction
        parts = {"instruction": exchange.instruction, "input": exchange.input} if fields else {}
        return [{"role": "user", "content": asked, **parts}]
    messages: list[dict[str, str]] = json.loads(exchange.asked)
    if how.joined:
        results = [message for message in messages if message["role"] == "tool"]
        return [*results, {"role": "user", "content": exchange.instruction}]
    return messages


def answer_message(exchange: Exchange, content: str, as_text: Callable[[Any], Any], how: Spelling) -> dict[str, Any]:
    """The answer, marked: `content`, or from it, if there is any, to the name of the last call."""
    if not exchange.calls:
        return {"role": "assistant", "content": content}
    calls = as_text(json.loads(exchange.calls))
    if content:
        content = content.replace(ANSWER[1], "")
    else:
        calls[0]["function"]["name"] = ANSWER[0] + calls[0]["function"]["name"]
    calls[-1]["function"]["name"] += ANSWER[1]
    for call in calls:
        arguments = call["function"]["arguments"]
        if how.text_arguments and not isinstance(arguments, str):
            call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return {"role": "assistant", "content": content, "tool_calls": calls}


def without_parts(messages: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(a part in words, the messages without it), of results and of arguments where there are any: a template may drop either."""
    if any(message["role"] == "tool" and message["content"] for message in messages):
        yield "results of tools", [{**message, "content": ""} if message["role"] == "tool" else message for message in messages]
    if any(call["function"]["arguments"] not in ({}, "{}", "") for message in messages for call in message.get("tool_calls", ())):
        bare = copy.deepcopy(list(messages))
        for message in bare:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = "{}" if isinstance(call["function"]["arguments"], str) else {}
        yield "arguments of calls", bare


def find_unspelt(whole: str, token: str, start: int, stop: int) -> int | None:
    """Where the first `token` ends that is not text of the data, between two places; None where there is none."""
    place = whole.find(token, start, stop)
    while place > 0 and whole[place - 1] == TEXT[0]:
        place = whole.find(token, place + 1, stop)
    return None if place < 0 else place + len(token)
