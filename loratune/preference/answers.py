"""The two models' answers: generated once, in the study's own prompt form, and kept.

A batch of questions is written when all its answers are there, and is generated whole or not at all: how
a batch is padded moves the last bits of its logits, so half a batch anew could give other words.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.errors import DataError, ModelError
from loratune.preference.questions import Question
from loratune.system.jsonl import append_lines, read_lines
from loratune.work import Json

if TYPE_CHECKING:
    from loratune.data.prompts import Prompt
    from loratune.finetune.model import BaseModel
    from loratune.preference.comparison import Comparison

SIDES = ("first", "second")


@dataclass(frozen=True, kw_only=True)
class Generation(Json):
    """How answers are generated; the same for both models."""

    max_new_tokens: int = 512
    temperature: float = 0.0  # 0: greedy; else plain sampling from the whole distribution
    seed: int = 0  # of sampling; both models draw from the same stream
    batch_size: int = 8  # questions at a time


@dataclass(frozen=True, kw_only=True)
class ModelAnswer(Json):
    """What one model said to one question."""

    question: str  # its id
    side: str  # first | second: which contestant
    text: str
    tokens: int  # generated, the end mark excluded
    ended: bool  # False: cut at the length limit


def read_answers(folder: Path) -> dict[tuple[str, str], ModelAnswer]:
    """All answers there are, by (side, question's id)."""
    found = (ModelAnswer(**row) for row in read_lines(folder / "answers.jsonl"))
    return {(answer.side, answer.question): answer for answer in found}


def write_answers(comparison: "Comparison", folder: Path, *, device: str = "auto", tell: Callable[[str], None] = print) -> None:
    """Generate the answers that are not there yet and add them to `answers.jsonl`.

    Raises ModelError for a base model or adapter that cannot be loaded or does not fit the device, DataError
    for a question that fills the model's context.
    """
    have = read_answers(folder)
    size = comparison.generation.batch_size
    batches = [comparison.questions[start : start + size] for start in range(0, len(comparison.questions), size)]
    todo = [(side, n, batch) for side in SIDES for n, batch in enumerate(batches) if any((side, q.id) not in have for q in batch)]
    if not todo:
        return
    from loratune.data.prompts import choose_prompt
    from loratune.finetune import model  # torch

    tell(f"Generating answers to {len(comparison.questions)} questions, {comparison.generation.max_new_tokens} tokens at most ...")
    base = model.load(comparison.model, model.choose_device(device))
    prompt = choose_prompt(base.tokenizer, comparison.prompt, date=comparison.date)
    tell(f"Prompt: {prompt.note}")
    if base.tokenizer.pad_token_id is None:
        base.tokenizer.pad_token = base.tokenizer.eos_token  # masked: which token fills a batch never matters
    done = len(comparison.questions) * 2 - sum(len(batch) for _, _, batch in todo)
    for side in SIDES:
        mine = [(n, batch) for which, n, batch in todo if which == side]
        if not mine:
            continue
        with _speaking(base, comparison.contestant(side).adapter) as network:
            for number, batch in mine:
                answers = _generate(network, base, prompt, batch, side, comparison, comparison.generation.seed + number)
                append_lines(folder / "answers.jsonl", [vars(answer) for answer in answers])
                done += len(batch)
                tell(f"  {done} of {2 * len(comparison.questions)} answers")


def _generate(
    network: Any, base: "BaseModel", prompt: "Prompt", batch: Sequence[Question], side: str, comparison: "Comparison", seed: int
) -> list[ModelAnswer]:
    import transformers

    from loratune.finetune.memory import is_out_of_memory
    from loratune.finetune.model import autocast

    how, tokenizer = comparison.generation, base.tokenizer
    prompts = [prompt.question(q.instruction, q.input, thinking=comparison.thinking) for q in batch]
    longest = max(map(len, prompts))
    room = getattr(base.model.config, "max_position_embeddings", None) or longest + how.max_new_tokens
    if longest >= room:
        question = batch[[len(one) for one in prompts].index(longest)]
        raise DataError(f"question {question.id} is {longest} tokens long, and the model's context is {room}: no room for an answer.")
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(base.device)
    ends = _ends(base, prompt)
    config = transformers.GenerationConfig(
        max_new_tokens=min(how.max_new_tokens, room - longest),
        do_sample=how.temperature > 0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(ends),
        **({"temperature": how.temperature, "top_k": 0, "top_p": 1.0} if how.temperature > 0 else {}),
    )
    base.model.generation_config = config  # what a model ships (penalties, top_p) is not what a study compares
    if how.temperature > 0:
        transformers.set_seed(seed)  # `generate` takes no generator of its own
    try:
        with autocast(base):
            out = network.generate(**padded, generation_config=config)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError("out of memory while generating answers. Give a smaller --batch-size or --max-new-tokens.") from error
    return [_answer(row[longest:], q, side, tokenizer, ends) for row, q in zip(out.tolist(), batch, strict=True)]


def _answer(ids: list[int], question: Question, side: str, tokenizer: Any, ends: set[int]) -> ModelAnswer:
    length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    text = str(tokenizer.decode(ids[:length], skip_special_tokens=True)).strip()
    return ModelAnswer(question=question.id, side=side, text=text, tokens=length, ended=length < len(ids))


def _ends(base: "BaseModel", prompt: "Prompt") -> set[int]:
    """The tokens that end an answer: the one that training puts there, and the model's own (a chat model may have several)."""
    from loratune.data.prompts import end_ids

    own = base.model.generation_config.eos_token_id if base.model.generation_config else None
    return {int(base.tokenizer.eos_token_id), *prompt.ends, *end_ids(own)}


@contextlib.contextmanager
def _speaking(base: "BaseModel", adapter: str | None) -> Iterator[Any]:
    """The base model with the adapter on it; without it again afterwards."""
    if adapter is None:
        yield base.model
        return
    import peft

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # an old name that PEFT asks for
            network = peft.PeftModel.from_pretrained(base.model, adapter)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise ModelError(f"{adapter} does not fit the base model: {' '.join(str(error).split())[:300]}") from error
    network.eval()
    try:
        yield network
    finally:
        network.unload()
