"""The published Stanford Alpaca template; a system message takes the place of its opening sentence.

For a SentencePiece tokenizer (Llama 2) the response begins with the word-start mark, which is also what such a model
naturally writes after "### Response:".
"""

from typing import Any

from loratune.data.prompts.encoded import Prompt, UnfitError, join_pieces, thinking_part, without_end
from loratune.data.prompts.own import begins_with_bos
from loratune.data.sources import Example

_OPENING = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_OPENING_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


class Alpaca(Prompt):
    """Every answer is followed by the tokenizer's EOS. A special token spelt out in the data is text."""

    kind = "alpaca"

    def __init__(self, tokenizer: Any, *, score_reasoning: bool = True, why: str = "") -> None:
        super().__init__(tokenizer, score_reasoning=score_reasoning, why=why)
        self.ends = frozenset([int(tokenizer.eos_token_id)])

    def question(self, instruction: str, input: str = "", system: str = "", *, thinking: bool = False) -> list[int]:
        return self._ids(alpaca_prompt(instruction, input, system), first=True)

    def _advice(self) -> str:
        if getattr(self.tokenizer, "chat_template", None):
            return "Use prompt: chat"
        return "It needs a chat template, which this tokenizer lacks: use an instruction-tuned model, or a template of your own as prompt"

    def _encode(self, example: Example) -> tuple[list[int], list[bool], int]:
        if example.tools or any(exchange.calls for exchange in example.exchanges):
            raise UnfitError(example, f"the row has tools, for which prompt: alpaca has no place. {self._advice()}")
        if any(exchange.reasoning for exchange in example.exchanges):
            raise UnfitError(
                example, f"an answer has a thinking part (reasoning_content), for which prompt: alpaca has no place. {self._advice()}"
            )
        ids: list[int] = []
        mask: list[bool] = []
        eos = self.tokenizer.eos_token_id
        for number, exchange in enumerate(example.exchanges):
            first = number == 0
            turn = _turn(exchange.instruction, exchange.input)
            asked = self._ids(alpaca_prompt(exchange.instruction, exchange.input, example.system) if first else "\n\n" + turn, first=first)
            response = without_end(exchange.response, [str(self.tokenizer.eos_token)])
            part = None if self.score_reasoning else thinking_part(response)
            start = part.end() if part else 0
            answered, scored = join_pieces([(response[:start], False), (response[start:], True)], lambda text: self._ids(text, first=False))
            ids += [*asked, *answered, eos]
            mask += [False] * len(asked) + [one and exchange.scored for one in [*scored, True]]
        return ids, mask, 0

    def _ids(self, text: str, *, first: bool) -> list[int]:
        """Token ids; BOS before the first text if the tokenizer adds it, never EOS.

        `split_special_tokens`: a "</s>" that stands in the data is text, not the end of the answer.
        """
        ids = list(self.tokenizer(text, add_special_tokens=first, split_special_tokens=True)["input_ids"])
        return ids[:-1] if first and ids[-1] == self.tokenizer.eos_token_id else ids


def alpaca_prompt(instruction: str, input: str = "", system: str = "") -> str:
    """Stanford Alpaca's prompt, with or without input."""
    opening = system or (_OPENING_WITH_INPUT if input else _OPENING)
    return f"{opening}\n\n{_turn(instruction, input)}"


def alpaca_chat_template(tokenizer: Any, *, tagged: bool = False) -> str:
    """A chat template that writes Alpaca's prompt, for a model that was trained with it and is used through a chat interface.

    tagged: with {% generation %} around each answer and its EOS, by which Transformers tells what a model writes.
    """
    begins, ends = ("{% generation %}", "{% endgeneration %}") if tagged else ("", "")
    return (
        ("{{ bos_token }}" if begins_with_bos(tokenizer) else "")
        + "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set turns = messages[1:] %}"
        + "{% else %}{{ "
        + repr(_OPENING)
        + " }}{% set turns = messages %}{% endif %}"
        + "{% for m in turns %}{% if m['role'] == 'assistant' %}"
        + begins
        + "{{ m['content'] + eos_token }}"
        + ends
        + "{% else %}{{ '\n\n### Instruction:\n' + m['content'] + '\n\n### Response:' }}{% endif %}{% endfor %}"
    )


def _turn(instruction: str, input: str) -> str:
    about = f"### Input:\n{input}\n\n" if input else ""
    return f"### Instruction:\n{instruction}\n\n{about}### Response:"
