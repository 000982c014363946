"""A finished set of answers to vote on, without a model: the first contestant's texts all say "amber", the second's "basil"."""

import json
from pathlib import Path

from loratune.cli import compare
from loratune.cli.parser import Parser
from loratune.preference.answers import Generation
from loratune.preference.comparison import Comparison, settle
from loratune.preference.contestants import Contestant
from loratune.preference.questions import Question
from loratune.system.jsonl import append_lines
from loratune.work import ModelRecipe

WORDS = {"first": "amber", "second": "basil"}

# The example worked by hand in test_preference_analysis.py: question -> verdict.
ANN = {"1": "first", "2": "first", "3": "first", "4": "second", "5": "tie", "6": "first"}
BOB = {"1": "first", "2": "first", "3": "second", "4": "second", "5": "neither", "6": "first"}


def made(folder: Path, count: int = 6) -> Path:
    """A comparison's folder with answers to `count` questions."""
    questions = tuple(
        Question(
            id=str(n),
            category="odd" if n % 2 else "even",
            instruction=f"Question number {n}: why?",
            input="As context.\nTwo lines." * (n == 2),
        )
        for n in range(1, count + 1)
    )
    comparison = Comparison(
        first=Contestant(label="trial 17 (tuned)", name="trial-17", adapter="/nowhere", weights="aa"),
        second=Contestant(label="trial 0 (default)", name="trial-0", adapter="/nowhere", weights="bb"),
        model=ModelRecipe(name_or_path="secret-model"),
        prompt="alpaca",
        questions=questions,
        generation=Generation(max_new_tokens=64),
        seed=3,
    )
    settle(comparison, folder)
    rows = [
        {"question": q.id, "side": side, "text": f"{word} says: " + f"because of {q.id}. " * 12, "tokens": 9, "ended": q.id != "4"}
        for side, word in WORDS.items()
        for q in questions
    ]
    append_lines(folder / "answers.jsonl", rows)
    return folder


def ready(home: Path) -> tuple[Path, list[str]]:
    """(its folder, arguments of `loratune compare`) of a comparison whose answers are there, so that no model is loaded."""
    adapter, folder, questions = home / "mine", home / "out", home / "questions.jsonl"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"weights that nobody loads")
    questions.write_text(
        "".join(json.dumps({"question": f"Question {n}: why?", "category": ("even", "odd")[n % 2]}) + "\n" for n in range(1, 7))
    )
    arguments = [str(adapter), "base", "--model", "some/model", "--questions", str(questions), "--out", str(folder)]
    parser = Parser()
    compare.add_arguments(parser)
    comparison = compare._comparison(parser.parse_args(arguments), None)
    settle(comparison, folder)
    rows = [
        {
            "question": q.id,
            "side": side,
            "text": f"{word} says: " + f"it is because of number {q.id}. " * 20,
            "tokens": 9,
            "ended": q.id != "4",
        }
        for side, word in WORDS.items()
        for q in comparison.questions
    ]
    append_lines(folder / "answers.jsonl", rows)
    return folder, arguments
