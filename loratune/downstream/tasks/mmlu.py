"""MMLU: 14,042 questions of 57 subjects with four options each (Hendrycks et al. 2021, arXiv 2009.03300).

`mmlu` is Instruct-Eval's protocol (declare-lab/instruct-eval, mmlu.py): five examples of the subject's dev set, the model
writes two tokens, right is an answer that begins with the letter; the score is the mean over questions. As there, a
prompt of more than 2,048 tokens leaves out its last example until it fits. Unlike there, the CSV files' cells are
taken as written: pandas, which it reads them with, turns the option `None` into `nan`, and numbers into others.

`mmlu_loglikelihood` compares the log-likelihoods of " A", " B", " C" and " D": lm-evaluation-harness's `mmlu`, whose
prompts differ by one space and stripped questions. There a prompt that does not fit is cut at its left end.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

from loratune.downstream.tasks.base import Benchmark, ChoiceBenchmark, Item, PrefixBenchmark
from loratune.downstream.tasks.folders import find_data, hub_rows
from loratune.errors import DataError

LETTERS = "ABCD"
HUB = "cais/mmlu"
Row = tuple[str, tuple[str, ...], str]  # question, options, letter


class _Questions(Benchmark):
    def texts(self, item: Item) -> tuple[str, ...]:
        """The question with its options, and alone."""
        (whole,) = super().texts(item)
        return whole, whole.partition("\nA. ")[0]


class Mmlu(_Questions, PrefixBenchmark):
    """Instruct-Eval's: the model writes the letter."""

    name, title = "mmlu", "MMLU"
    version = "hendrycks-test/instruct-eval-5-shot/1"
    chance = 1 / len(LETTERS)
    max_new_tokens, max_prompt_tokens = 2, 2048

    def __init__(self, data: Path | None = None, *, shots: int = 5) -> None:
        self.data, self.shots = data, shots

    def items(self) -> list[Item]:
        return [self._item(subject, row, number, examples) for subject, row, number, examples in _questions(self.data, self.shots)]

    def _item(self, subject: str, row: Row, number: int, examples: Sequence[Row]) -> Item:
        # Two spaces: Instruct-Eval puts one before each word of the subject's name.
        prompt = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
        starts = []
        for example in examples:
            starts.append(len(prompt))
            prompt += f"{question_text(example)} {example[2]}\n\n"
        return Item(
            id=f"{subject}/{number}",
            group=subject,
            prompt=prompt + question_text(row),
            shared=len(prompt),
            shots=(*starts, len(prompt)),
            targets=(row[2],),
            facts={"options": list(LETTERS)},
        )


class MmluLoglikelihood(_Questions, ChoiceBenchmark):
    """lm-evaluation-harness's: the likeliest letter."""

    name, title = "mmlu_loglikelihood", "MMLU (log-likelihood)"
    version = "hendrycks-test/lm-evaluation-harness-1.0/1"
    chance = 1 / len(LETTERS)

    def __init__(self, data: Path | None = None, *, shots: int = 5) -> None:
        self.data, self.shots = data, shots

    def items(self) -> list[Item]:
        found = []
        for subject, row, number, examples in _questions(self.data, self.shots):
            shared = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
            shared += "".join(f"{question_text(example, strip=True)} {example[2]}\n\n" for example in examples)
            found.append(
                Item(
                    id=f"{subject}/{number}",
                    group=subject,
                    prompt=shared + question_text(row, strip=True),
                    shared=len(shared),
                    targets=(f" {row[2]}",),
                    choices=tuple(f" {letter}" for letter in LETTERS),
                )
            )
        return found


def question_text(row: Row, *, strip: bool = False) -> str:
    """The question, its options by letter, and "Answer:"."""
    question, options, _ = row
    lines = [question.strip() if strip else question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))]
    return "\n".join([*lines, "Answer:"])


def _questions(data: Path | None, shots: int) -> list[tuple[str, Row, int, list[Row]]]:
    """(subject, row, its number in the subject, the subject's examples), subjects in order of their names."""
    dev, test = (_rows(data, split) for split in ("dev", "test"))
    lacking = sorted(set(test) - set(dev)) if shots else []
    if lacking:
        raise DataError(f"mmlu: no dev examples for {', '.join(lacking[:3])}; each subject needs its dev file.")
    return [
        (subject, row, number, dev[subject][:shots] if shots else [])
        for subject in sorted(test)
        for number, row in enumerate(test[subject])
    ]


def _rows(data: Path | None, split: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    if data is None:
        for row in hub_rows(HUB, "all", split):
            options = tuple(map(str, row["choices"]))
            found.setdefault(row["subject"], []).append((row["question"], options, LETTERS[row["answer"]]))
        return found
    folder = find_data(data, "mmlu", (split, f"data/{split}"), f"headerless CSV files, <subject>_{split}.csv")
    for file in sorted(folder.glob(f"*_{split}.csv")):
        with open(file, newline="", encoding="utf-8") as text:
            found[file.name.removesuffix(f"_{split}.csv")] = [_row(cells, file, line) for line, cells in enumerate(csv.reader(text), 1)]
    if not found:
        raise DataError(f"mmlu: {folder} holds no file <subject>_{split}.csv.")
    return found


def _row(cells: list[str], file: Path, line: int) -> Row:
    if len(cells) != 6 or cells[5] not in tuple(LETTERS):
        raise DataError(f"{file}, row {line}: expected question, four options and a letter A-D; got {len(cells)} cells, {cells[-1:]} last.")
    return cells[0], tuple(cells[1:5]), cells[5]
