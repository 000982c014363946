"""Benchmarks: items with prompts, and a verdict on each answer. No model and no torch here.

A model answers an item in one of two ways: it continues the prompt (`choices` empty), or the log-likelihood of each of
the item's `choices` as a continuation is compared and the likeliest is the answer.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question."""

    id: str  # unique within the benchmark, the same in every run and on every machine
    group: str = ""  # subject or task, for scores that are means over groups
    prompt: str  # what the model continues, few-shot examples included
    ids: tuple[int, ...] = ()  # the prompt's tokens, where they are known; else the tokenizer's of the text
    shared: int = 0  # prompt[:shared] is common to the items of the group: computed once
    shots: tuple[int, ...] = ()  # where in the prompt each few-shot example begins, and where the last ends
    targets: tuple[str, ...] = ()  # accepted answers; of a choice, the accepted choices
    choices: tuple[str, ...] = ()  # continuations to compare; empty: the model writes
    facts: dict[str, Any] = field(default_factory=dict)  # what scoring needs besides: tests, entry point

    def without_last_shot(self) -> "Item | None":
        """The item with one example fewer, for a context that it does not fit; None when there is none to leave out."""
        if len(self.shots) < 2:
            return None
        start, stop = self.shots[-2:]
        return replace(self, prompt=self.prompt[:start] + self.prompt[stop:], shared=start, shots=self.shots[:-1])


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """An answer's score in [0, 1], and the reason where it is not obvious."""

    score: float
    why: str = ""


class Benchmark(ABC):
    """A set of items and the rule that scores them. Subclasses are one file each."""

    name: str  # as on the command line: mmlu
    title: str  # as in a table: MMLU
    version: str  # of the data and the protocol; results of different versions are not compared
    chance: float  # the score of a uniform guesser, in [0, 1]; 0 where there is nothing to guess from
    max_new_tokens: int = 0
    max_prompt_tokens: int | None = None  # the protocol's own limit, besides the model's context
    temperature: float = 0.0  # 0: greedy
    mean_over_groups: bool = False  # the benchmark's score: unweighted mean over groups, else over items
    runs_code: bool = False  # scoring executes what the model wrote
    protocol: str = ""  # a sentence that readers of the scores need; shown with them
    drawn: bool = False  # whether `items` is a sample already

    @abstractmethod
    def items(self) -> list[Item]:
        """All items, in a fixed order. Raises DataError."""

    @abstractmethod
    def score(self, items: Sequence[Item], answers: Sequence[str]) -> list[Verdict]:
        """A verdict per item. An answer is the text written, or the chosen one of `choices`."""

    def texts(self, item: Item) -> tuple[str, ...]:
        """Texts that training data must not hold: the question without examples and template, and parts of it that may stand alone."""
        return (item.prompt[item.shared :].removesuffix("Answer:"),)

    def decided(self, item: Item, text: str) -> bool:
        """Whether no continuation of `text` could change the verdict, so that generation may stop."""
        return False


class PrefixBenchmark(Benchmark):
    """Right is an answer that begins with the target, white space at its ends aside: Instruct-Eval's rule."""

    protocol = "Right is an answer that begins with the expected one; an answer that first explains counts as wrong."

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> list[Verdict]:
        return [Verdict(score=float(answer.strip().startswith(item.targets))) for item, answer in zip(items, answers, strict=True)]

    def decided(self, item: Item, text: str) -> bool:
        begun = text.strip()
        if begun.endswith("\ufffd"):  # the first bytes of a letter whose others are still to come
            return False
        return begun.startswith(item.targets) or not any(target.startswith(begun) for target in item.targets)


class ChoiceBenchmark(Benchmark):
    """Right is a likeliest choice that is among the targets."""

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> list[Verdict]:
        return [Verdict(score=float(answer in item.targets)) for item, answer in zip(items, answers, strict=True)]


def constant_scores(items: Sequence[Item]) -> tuple[float, float] | None:
    """The lowest and the highest score of choosing the same for every item; None where items have choices of their own, or none."""
    choices = {item.choices for item in items}
    if len(choices) != 1 or choices == {()}:
        return None
    shares = [sum(choice in item.targets for item in items) / len(items) for choice in choices.pop()]
    return min(shares), max(shares)


def stratified(items: Sequence[Item], number: int | None, seed: int = 0) -> list[Item]:
    """`number` of the items, from each group in proportion to its size, in their old order; all when None or too many.

    Decided by a hash of (seed, id), so that the same items are drawn everywhere and a larger subset holds a smaller one.
    """
    if number is None or number >= len(items):
        return list(items)
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    places = []
    for name, members in groups.items():
        phase = _fraction(f"{seed}/{name}")  # lest the same few groups come first in every small subset
        members.sort(key=lambda item: _fraction(f"{seed}/{item.id}"))
        places += [((place + phase) / len(members), item.id) for place, item in enumerate(members)]
    chosen = {name for _, name in sorted(places)[:number]}
    return [item for item in items if item.id in chosen]


def _fraction(text: str) -> float:
    """A number in [0, 1) that is a function of the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
