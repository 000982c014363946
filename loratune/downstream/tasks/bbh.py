"""BIG-Bench Hard: 6,511 questions of 27 tasks (Suzgun et al. 2022, arXiv 2210.09261; suzgunmirac/BIG-Bench-Hard).

Instruct-Eval's protocol (declare-lab/instruct-eval, bbh.py): a task's first three questions are the examples, with their
answers alone (no chain of thought), the others the test: 6,430. The model writes 32 tokens; right is an answer that
begins with the target; the score is the unweighted mean over the tasks. A prompt of more than 2,048 tokens leaves out
its last example until it fits.

Chance: a guesser picks one of the options that the question names (or of true/false, yes/no where the task has only
those); nothing can be guessed where the answer is to be worked out (sorting words, arithmetic, brackets, counting).
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

from loratune.downstream.tasks.base import Item, PrefixBenchmark
from loratune.downstream.tasks.folders import find_data, hub_rows
from loratune.errors import DataError

HUB = "lukaemon/bbh"
SHOTS = 3
TASKS = (
    *("boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages", "formal_fallacies"),
    *("geometric_shapes", "hyperbaton", "logical_deduction_five_objects", "logical_deduction_seven_objects"),
    *("logical_deduction_three_objects", "movie_recommendation", "multistep_arithmetic_two", "navigate", "object_counting"),
    *("penguins_in_a_table", "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks"),
    *("sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects"),
    *("tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies", "word_sorting"),
)
# Tasks with two possible answers that the question does not list.
_UNLISTED = {"boolean_expressions": ["True", "False"], "sports_understanding": ["yes", "no"], "web_of_lies": ["Yes", "No"]}


class Bbh(PrefixBenchmark):
    """All tasks that the data hold."""

    name, title = "bbh", "BBH"
    version = "big-bench-hard/instruct-eval-3-shot/1"
    max_new_tokens, max_prompt_tokens = 32, 2048
    mean_over_groups = True

    def __init__(self, data: Path | None = None) -> None:
        self.data = data

    def items(self) -> list[Item]:
        return [item for task, rows in self._tasks.items() for item in _items(task, rows)]

    @functools.cached_property
    def chance(self) -> float:  # type: ignore[override]
        """The mean over tasks of the mean over questions of one in the number of options."""
        by_task: dict[str, list[float]] = {}
        for item in self.items():
            options = item.facts["options"]
            by_task.setdefault(item.group, []).append(1 / len(options) if item.targets[0] in options else 0.0)
        return sum(sum(found) / len(found) for found in by_task.values()) / len(by_task)

    @functools.cached_property
    def _tasks(self) -> dict[str, list[dict[str, Any]]]:
        if self.data is None:
            return {task: hub_rows(HUB, task, "test") for task in TASKS}
        folder = find_data(self.data, "bbh", ("bbh", "boolean_expressions.json"), "one JSON file per task, of BIG-Bench-Hard's folder bbh")
        folder = folder.parent if folder.is_file() else folder
        files = {path.stem: path for path in sorted(folder.glob("*.json"))}
        lacking = [task for task in TASKS if task not in files]
        if lacking:
            raise DataError(f"bbh: {folder} lacks {len(lacking)} of the {len(TASKS)} tasks: {', '.join(lacking[:3])} ...")
        return {task: _read(files[task]) for task in TASKS}


def options(task: str, question: str) -> list[str]:
    """The answers that a guesser would choose from; empty where the answer is to be worked out."""
    listed = question.partition("\nOptions:\n")[2].splitlines()
    lettered = re.findall(r"^\([A-Z]\)", "\n".join(listed), re.MULTILINE)
    return lettered or [line.removeprefix("- ").strip() for line in listed if line.startswith("- ")] or _UNLISTED.get(task, [])


def _items(task: str, rows: list[dict[str, Any]]) -> list[Item]:
    prompt, starts = "", []
    for row in rows[:SHOTS]:
        starts.append(len(prompt))
        prompt += f"{row['input']}\nAnswer: {row['target']}\n\n"
    return [
        Item(
            id=f"{task}/{number}",
            group=task,
            prompt=f"{prompt}{row['input']}\nAnswer:",
            shared=len(prompt),
            shots=(*starts, len(prompt)),
            targets=(row["target"],),
            facts={"options": options(task, row["input"])},
        )
        for number, row in enumerate(rows[SHOTS:], SHOTS)
    ]


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["examples"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f'{file}: expected a JSON object with the list "examples"; {type(error).__name__}: {error}') from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("input", "target")):
            raise DataError(f'{file}, example {number}: expected the texts "input" and "target".')
    return list(rows)
