"""The tokenizer's own chat template.

Scored is what a model writes at inference: from the end of the prompt that `add_generation_prompt` makes to the token that
ends the turn. Where that stands is found by rendering the conversation whole and up to each answer, whether or not the
template has {% generation %} tags: those of SmolLM3 hold the role header too, those of others lack the end of the turn.
Not scored: role headers, an empty thinking part that the template writes where the data have none, what follows the end of
the turn, and an end of turn that a template writes into the history alone (gpt-oss: <|end|>, where a model writes <|return|>).
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from loratune.data.prompts.chat_template import ANSWER, REASONING, RenderError, Template
from loratune.data.prompts.encoded import Prompt, UnfitError, join_pieces, thinking_part, without_end
from loratune.data.prompts.tool_calls import USUAL, Spelling, answer_message, asked_messages, find_unspelt, spellings, without_parts
from loratune.data.sources import Example, Exchange
from loratune.errors import ModelError

_OPENS = re.compile(r"[<\[][^<>\[\]/]*think[^<>\[\]]*[>\]]\s*$", re.IGNORECASE)  # a prompt that ends with <think>
_EMPTY = re.compile(r"\s*(?:[<\[][^<>\[\]/]*think[^<>\[\]]*[>\]]\s*)?[<\[]/[^<>\[\]]*think[^<>\[\]]*[>\]]\s*", re.IGNORECASE)
_CLOSED = "\n</think>\n\n"  # how models whose prompt ends with <think> end their thinking part


class Chat(Prompt):
    """Raises ModelError for a template that does not show an answer behind its question."""

    kind = "chat"

    def __init__(self, tokenizer: Any, *, date: str = "", score_reasoning: bool = True, why: str = "", fields: bool = False) -> None:
        super().__init__(tokenizer, score_reasoning=score_reasoning, why=why)
        self._fields = fields  # whether the template knows instruction and input beside content
        name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        try:
            self._template = Template(tokenizer, date)
            self._probe()
        except (RenderError, ValueError) as error:
            raise ModelError(f"{name}: the chat template cannot show a question and its answer: {error}. Use prompt: alpaca.") from error
        self.date = date if self._template.is_dated else ""
        end = tokenizer.eos_token_id if self._end is None else tokenizer.convert_tokens_to_ids(self._end)
        self.ends = frozenset([int(end)])

    @property
    def note(self) -> str:
        """Which prompt, and why, in one line."""
        end = self._end or f"{self.tokenizer.eos_token}, because the template ends them with no token"
        return f"{super().note}; answers end with {end}" + (f"; its date is {self.date}" if self.date else "")

    def question(self, instruction: str, input: str = "", system: str = "", *, thinking: bool = False) -> list[int]:
        messages = self._messages(Example(exchanges=(Exchange(instruction, input, "-"),), system=system))[:-1]
        asked = self._template.render(messages, ask=True) + self._header
        return self._template.ids(asked if thinking else asked + self._empty)

    def _probe(self) -> None:
        """How the template shows a question and its answer. Raises RenderError, and ValueError for one that serves no training."""
        messages = self._messages(Example(exchanges=(Exchange("Question", "", "Answer"),)))
        asked, whole = self._template.render(messages[:1], ask=True), self._template.render(messages)
        self._header = ""  # what stands before an answer in a template that ignores add_generation_prompt
        self._empty = ""  # what is written before an answer without thinking part
        self._end: str | None = None  # the token that ends a turn
        self._end_text = ""  # letters that do, where no token does; they cannot stop a model
        if whole.count(ANSWER[0]) != 1 or whole.count(ANSWER[1]) != 1:
            raise ValueError("the answer does not appear in it")
        opens = None if whole.startswith(asked) else _OPENS.search(asked)
        if opens:
            self._empty, asked = _CLOSED, asked[: opens.start()]
        if not whole.startswith(asked):
            raise ValueError("what it shows before an answer is not the beginning of the whole")
        lead = whole[len(asked) : whole.index(ANSWER[0])]
        if self._template.render(messages[:1]) == asked and lead.strip():
            self._header = lead
        elif _EMPTY.fullmatch(lead):
            self._empty = lead
        tail = whole[whole.index(ANSWER[1]) + 1 :]
        tokens = "|".join(map(re.escape, self._template.added)) or "(?!)"
        if found := re.match(rf"\s*({tokens})", tail):
            self._end = found[1]
        elif not asked.endswith(tail):  # else it is the beginning of the next answer
            self._end_text = tail.strip()
        thought = self._messages(Example(exchanges=(Exchange("Question", "", "Answer", reasoning="Thought"),)))
        self._shows_reasoning = opens is not None or REASONING[0] in self._template.render(thought)

    # ---- the conversation, marked ----

    def _messages(self, example: Example, how: Spelling = USUAL) -> list[dict[str, Any]]:
        text = self._template.as_text
        messages: list[dict[str, Any]] = [{"role": "system", "content": text(example.system)}] if example.system else []
        for exchange in example.exchanges:
            answer = answer_message(exchange, self._answer(exchange.response) if exchange.response.strip() else "", text, how)
            if exchange.reasoning:  # some templates know it as `thinking`, which older Transformers did not fill in
                answer |= dict.fromkeys(("reasoning_content", "thinking"), _marked(text(exchange.reasoning), REASONING))
            messages += [*text(asked_messages(exchange, how, self._fields)), answer]
        return messages

    def _answer(self, response: str) -> str:
        """The answer, marked. A thinking part that stands in it keeps its tags, which are not text but what a model writes."""
        text, part = self._template.as_text, thinking_part(response)
        if part is None:
            return _marked(text(response), ANSWER)
        return _marked(part[1] + text(part[2]) + part[3] + REASONING[1] + part[4] + text(response[part.end() :]), ANSWER)

    def _readable(self, exchange: Exchange) -> Exchange:
        """Without an end mark spelt out; a thinking part where the template looks for it."""
        response = without_end(exchange.response, [str(self.tokenizer.eos_token), self._end or ""])
        part = thinking_part(response)
        if part and self._shows_reasoning and not exchange.reasoning:
            return exchange._replace(response=response[part.end() :], reasoning=part[2].strip("\n"))
        return exchange._replace(response=response)

    # ---- which part of it is scored ----

    def _encode(self, example: Example) -> tuple[list[int], list[bool], int]:
        first: RenderError | None = None
        for how in spellings(example):
            try:
                return self._encoded(example, how)
            except RenderError as error:
                first = first or error
        raise UnfitError(example, f"the chat template cannot show this conversation: {first}") from (first and first.__cause__)

    def _encoded(self, example: Example, how: Spelling) -> tuple[list[int], list[bool], int]:
        exchanges = tuple(map(self._readable, example.exchanges))
        messages = self._messages(Example(exchanges=exchanges, system=example.system), how)
        tools = self._template.as_text(json.loads(example.tools)) if example.tools else None
        whole = self._template.render(messages, tools)
        if tools and whole == self._template.render(messages):
            raise RenderError("it shows no tools, and the row has some")
        if example.system.strip() and whole == self._template.render(messages[1:], tools):
            raise RenderError("it shows no system message, and the row has one")
        if how.arguments_are_repr(messages, whole):
            raise RenderError("it shows the arguments of a call as Python, not as JSON")
        if not self._template.shows_marked(messages, tools, whole):
            raise RenderError("what it shows depends on how an answer begins or how long it is. Use prompt: alpaca")
        written = [thinking_part(exchange.response) is not None for exchange in example.exchanges]
        chunks, left_out = self._chunks(exchanges, written, messages, tools, whole)
        for part, without in without_parts(messages):
            if whole == self._template.render(without, tools):
                raise RenderError(f"it shows no {part}, and the row has some")
        ids, mask = join_pieces(chunks, self._template.ids)
        if self._end is None:  # nothing that the template writes could stop a model
            ids, mask = [*ids, self.tokenizer.eos_token_id], [*mask, exchanges[-1].scored]
        return ids, mask, left_out

    def _chunks(
        self, exchanges: Sequence[Exchange], written: Sequence[bool], messages: Sequence[dict[str, Any]], tools: Any, whole: str
    ) -> tuple[list[tuple[str, bool]], int]:
        """(pieces of the conversation up to the end of its last answer, each with whether it is scored; thinking parts left out).

        written: whether an answer's text has a thinking part of its own, be it an empty one.
        """
        marks = [[found.start() for found in re.finditer(mark, whole)] for mark in ANSWER]
        if any(len(places) != len(exchanges) for places in marks):
            raise RenderError(
                "an answer does not appear in it as written" + ("" if any(e.calls for e in exchanges) else ". Use prompt: alpaca")
            )
        chunks: list[tuple[str, bool]] = []
        done = left_out = 0
        places = (place for place, message in enumerate(messages) if message["role"] == "assistant")
        for exchange, own, place, opened, closed in zip(exchanges, written, places, *marks, strict=True):
            last = place == len(messages) - 1
            asked = self._template.render(messages[:place], tools, ask=True) + self._header
            opens = None if whole.startswith(asked) else _OPENS.search(asked)
            opener = opens[0] if opens else ""  # of a thinking part that this answer is not shown with
            start = len(asked) - len(opener)
            if not whole.startswith(asked.removesuffix(opener)):
                raise RenderError("what it shows before an answer is not the beginning of the whole. Use prompt: alpaca")
            chunks.append((whole[done:start], False))
            lead = whole[start:opened]
            if opener and last:  # at inference the answer stands behind the thinking part, though the history does not show one
                part = exchange.reasoning and self._template.as_text(exchange.reasoning) + _CLOSED
                thinks = (bool(part) or own) and exchange.scored and self.score_reasoning
                chunks += [(opener, False), (part or self._empty, thinks)]
            elif exchange.reasoning and REASONING[0] not in lead:
                if last:
                    raise RenderError("it does not show the thinking part of an answer (reasoning_content)")
                left_out += 1
            after = start
            empty = _EMPTY.match(lead) if exchange.calls else _EMPTY.fullmatch(lead)  # a call is written with words of its own
            if empty and not (own and self.score_reasoning):
                after = start + empty.end()
            elif REASONING[0] in lead and not self.score_reasoning:
                after = opened
            if REASONING[1] in whole[opened:closed] and not self.score_reasoning:  # a thinking part inside the answer
                after = whole.index(REASONING[1], opened)
            done = self._call_end(whole, closed, messages[: place + 1], tools) if exchange.calls else self._turn_end(whole, closed)
            chunks += [(whole[start:after], False), (whole[after:done], exchange.scored)]
        return chunks, left_out

    def _turn_end(self, whole: str, closed: int) -> int:
        """Where what a model writes ends, behind an answer whose mark stands at `closed`."""
        found = re.compile(rf"\s*{re.escape(self._end or self._end_text)}").match(whole, closed + 1)
        return found.end() if found and (self._end or self._end_text) else closed + 1

    def _call_end(self, whole: str, closed: int, messages: Sequence[dict[str, Any]], tools: Any) -> int:
        """Where an answer ends that calls tools, the name of the last one having its mark at `closed`: with the token that ends a turn,
        else with what the template writes after it when nothing follows."""
        limit = whole.find(ANSWER[0], closed)
        found = find_unspelt(whole, self._end, closed, len(whole) if limit < 0 else limit) if self._end else None
        if found is not None:
            return found
        alone = self._template.render(messages, tools)
        if whole.startswith(alone.rstrip()) and len(alone.rstrip()) > closed:
            return len(alone.rstrip())
        raise RenderError("where a call of a tool ends does not show")


def _marked(text: str, marks: str) -> str:
    """The marks around the text, white space at its ends outside them: templates trim it."""
    core = text.strip()
    before, _, after = text.partition(core) if core else (text, "", "")
    return f"{before}{marks[0]}{core}{marks[1]}{after}"
