"""The questions both models answer: Vicuna's form, one's own, or the demo's."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.demo import questions_file
from loratune.errors import DataError
from loratune.work import Json

FIELDS = ("turns", "question", "prompt", "instruction")  # where a question's text may stand


@dataclass(frozen=True, kw_only=True)
class Question(Json):
    """One question."""

    id: str  # unique in its file
    category: str = ""
    instruction: str
    input: str = ""  # further context, as in Alpaca's form


def read_questions(path: Path) -> tuple[Question, ...]:
    """The questions of a file, in its order.

    A file named .jsonl or .json holds one JSON object per line: Vicuna's and MT-Bench's `turns` (the first
    turn is asked), or a `question`, `prompt` or `instruction`, with an optional `input`, `category` and
    `question_id`. Any other file is text, one question per line; empty lines are skipped.

    Raises DataError naming file, line and field.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"cannot read the questions {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix in (".jsonl", ".json"):
        found = [_from_json(line, f"{path}, line {number}", number) for number, line in numbered]
    else:
        found = [Question(id=str(number), instruction=line.strip()) for number, line in numbered]
    if not found:
        raise DataError(f"{path} holds no question. Give one per line.")
    for twice in _repeated(question.id for question in found):
        raise DataError(f"{path}: question_id {twice!r} stands there twice; each must be its question's own.")
    return tuple(found)


def demo_questions() -> tuple[Question, ...]:
    """Questions about the demo's small world; none stands in its training or validation data."""
    return read_questions(questions_file())


def _from_json(line: str, place: str, number: int) -> Question:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f'{place}: not JSON ({error}). One object per line, such as {{"question": "Why is the sky blue?"}}.') from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: got {type(row).__name__}; needed: an object with one of {', '.join(FIELDS)}.")
    name = next((field for field in FIELDS if field in row), None)
    if name is None:
        raise DataError(
            f"{place}: no question in it; its fields are {', '.join(map(str, row)) or 'none'}, needed: one of {', '.join(FIELDS)}."
        )
    text: Any = row[name]
    if name == "turns":
        text = text[0] if isinstance(text, list) and text else None
    about = row.get("input") or ""
    for field, value in ((name, text), ("input", about)):
        if not isinstance(value, str) or (field == name and not value.strip()):
            raise DataError(f"{place}, field {field}: got {str(row.get(field))[:60]!r}; needed: text.")
    identity = row.get("question_id", row.get("id", number))
    return Question(id=str(identity), category=str(row.get("category") or ""), instruction=text, input=about)


def _repeated(names: Iterator[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield name
        seen.add(name)
