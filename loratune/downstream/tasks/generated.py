"""Answers that a study's own metrics are made of: a sample of its validation set, or of a file of the user's, answered greedily.

It is answered as a benchmark is, and not judged here: a metric is one number of all answers together (metric_functions.py).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loratune.data.prepared import Prepared
from loratune.data.reference_answers import file_questions, tokenizer_of, validation_questions
from loratune.downstream.tasks.base import Benchmark, Item, Verdict, stratified
from loratune.work import Json


@dataclass(frozen=True, kw_only=True)
class AnswerSet(Json):
    """Which questions are answered, and how long an answer may be; metrics that agree on it share the answers."""

    data: str | None = None  # file of rows; None: the validation set
    examples: int = 200
    max_new_tokens: int = 128

    @property
    def name(self) -> str:
        """Of its results' files."""
        source = "validation" if self.data is None else "".join(c if c.isalnum() or c in "._-" else "-" for c in self.data)
        return f"answers-{source}-{self.examples}-{self.max_new_tokens}"


class GeneratedAnswers(Benchmark):
    """The items of an answer set; `facts` of each has the prompt and the reference as texts."""

    title = "answers for the study's own metrics"
    chance = 0.0
    drawn = True

    def __init__(self, asked: AnswerSet, validation: Path, *, seed: int, trust_remote_code: bool) -> None:
        """validation: the study's prepared data."""
        self.name, self.max_new_tokens = asked.name, asked.max_new_tokens
        self.version = f"{validation.name}/1"
        self._given = (asked, validation, seed, trust_remote_code)

    def items(self) -> list[Item]:
        return _items(*self._given)

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> list[Verdict]:
        return [Verdict(score=0.0, why="not judged by itself")] * len(items)


@functools.lru_cache(maxsize=8)
def _items(asked: AnswerSet, validation: Path, seed: int, trust_remote_code: bool) -> list[Item]:
    prepared = Prepared.load(validation)
    if asked.data is None:
        questions = validation_questions(prepared)
    else:
        questions = file_questions(asked.data, prepared, trust_remote_code=trust_remote_code)
    by_id = {question.id: question for question in questions}
    drawn = stratified([Item(id=name, prompt="") for name in by_id], asked.examples, seed)
    tokenizer = tokenizer_of(prepared, trust_remote_code=trust_remote_code)
    found = []
    for name in (item.id for item in drawn):
        question = by_id[name]
        prompt = tokenizer.decode(question.prompt)
        reference = tokenizer.decode(question.reference, skip_special_tokens=True)
        found.append(Item(id=name, prompt=prompt, ids=question.prompt, facts={"prompt": prompt, "reference": reference.strip()}))
    return found
