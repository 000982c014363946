"""A comparison as data: what is compared, and all that was said, read back from its folder."""

import dataclasses
import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratune.errors import StorageError
from loratune.preference.analysis import JudgeSummary, Vote, VoteSummary, summarise_judge, summarise_votes
from loratune.preference.answers import SIDES, Generation, ModelAnswer, read_answers
from loratune.preference.contestants import Contestant
from loratune.preference.judge import read_judge
from loratune.preference.questions import Question
from loratune.preference.votes import read_votes
from loratune.system.files import AnyPath, write_atomically
from loratune.work import Json, ModelRecipe

FILE = "comparison.json"


@dataclass(frozen=True, kw_only=True)
class Comparison(Json):
    """What is compared and how. Fixed once answers exist."""

    first: Contestant
    second: Contestant
    model: ModelRecipe
    prompt: str  # the study's: alpaca | chat; without a study also auto, by the model's tokenizer
    date: str = ""  # ISO, for a chat template that shows one: the study's, else the day when the comparison began
    thinking: bool = False  # whether the study's answers have thinking parts, so that a model is left to begin with one
    questions: tuple[Question, ...]
    generation: Generation
    # Of the sides and of the questions' order. Secret, for the function that makes the sides of it is public, and a rater who knows
    # both knows who wrote what.
    seed: int = field(default_factory=lambda: secrets.randbits(128))

    def contestant(self, side: str) -> Contestant:
        return self.first if side == SIDES[0] else self.second


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A question with both answers."""

    question: Question
    first: ModelAnswer
    second: ModelAnswer

    def answer(self, side: str) -> ModelAnswer:
        return self.first if side == SIDES[0] else self.second


@dataclass(frozen=True, kw_only=True)
class PreferenceRecord:
    """All that one comparison holds."""

    folder: Path
    comparison: Comparison
    pairs: tuple[Pair, ...]  # whose answers are there and differ: what raters see
    identical: int  # questions to which both gave the very same answer; nobody is asked about them
    votes: tuple[Vote, ...]  # people's, those that count
    judges: dict[str, JudgeSummary]  # by the judge's model name

    @property
    def people(self) -> VoteSummary | None:
        """What people said; None before the first vote."""
        return summarise_votes(self.votes, {q.id: q.category for q in self.comparison.questions}) if self.votes else None


def read_preferences(folder: AnyPath) -> PreferenceRecord:
    """Read a comparison's folder; safe while people vote. Raises StorageError when it is not one."""
    folder = Path(folder)
    comparison = read_comparison(folder)
    if comparison is None:
        raise StorageError(f"{folder} holds no comparison: it has no {FILE}. `loratune compare` makes one.")
    answers = read_answers(folder)
    both = [
        Pair(question=q, first=answers[SIDES[0], q.id], second=answers[SIDES[1], q.id])
        for q in comparison.questions
        if all((side, q.id) in answers for side in SIDES)
    ]
    different = tuple(pair for pair in both if pair.first.text != pair.second.text)
    judges = {name: summarise_judge(rounds, lost) for name, (rounds, lost) in read_judge(folder).items()}
    return PreferenceRecord(
        folder=folder,
        comparison=comparison,
        pairs=different,
        identical=len(both) - len(different),
        votes=tuple(read_votes(folder)),
        judges=judges,
    )


def find_comparisons(study: AnyPath) -> list[PreferenceRecord]:
    """The comparisons in a study's folder, by name."""
    return [read_preferences(path.parent) for path in sorted(Path(study).glob(f"preference/*/{FILE}"))]


def read_comparison(folder: Path) -> Comparison | None:
    """What the folder compares; None when it is not a comparison's yet."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return Comparison.from_json(path.read_text())
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error


def settle(comparison: Comparison, folder: Path) -> Comparison:
    """Make the folder this comparison's, or see that it is; returns what stands there: its date of beginning and its seed are kept.

    Raises StorageError, saying what differs.
    """
    old = read_comparison(folder)
    if old is not None:
        changed = [name for name, value in _essence(comparison).items() if _essence(old)[name] != value]
        if changed:
            lines = "\n".join(f"  {name}: {_short(_essence(old)[name])}, now {_short(_essence(comparison)[name])}" for name in changed)
            raise StorageError(f"{folder} holds another comparison:\n{lines}\nUndo the change, or choose another --out.")
        return dataclasses.replace(comparison, date=old.date, seed=old.seed)
    if folder.exists() and any(folder.iterdir()):
        raise StorageError(f"{folder} is neither empty nor a comparison's folder. Choose another --out.")
    write_atomically(folder / FILE, comparison.to_json())
    return comparison


def _essence(comparison: Comparison) -> dict[str, Any]:
    """What decides the answers. Where an adapter lies and what it is called does not; nor do date and seed, which are the folder's own."""
    content = {f.name: getattr(comparison, f.name) for f in dataclasses.fields(comparison) if f.name not in ("date", "seed")}
    for side in SIDES:
        content[side] = content[side].weights or content[side].label
    return content


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} of them"
    text = json.dumps(vars(value)) if dataclasses.is_dataclass(value) else str(value)
    return text if len(text) < 100 else f"{text[:97]}..."
