"""DROP: questions about a passage that need counting, sorting and sums (Dua et al. 2019, arXiv 1903.00161).

Instruct-Eval's protocol (declare-lab/instruct-eval, drop.py): questions whose annotators all gave the same answer; three
of them, drawn by `random.sample` with seed 0, are the examples, and no other question about their passages is
passage_text; the model writes 8 tokens; right is an answer that begins with the annotated one (not F1). A prompt of more
than 2,048 tokens leaves out its last example until it fits.

Published scores are of the development set. The version names the file that was read.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loratune.downstream.tasks.base import Item, PrefixBenchmark
from loratune.downstream.tasks.folders import find_data, hub_rows
from loratune.errors import DataError

HUB = "ucinlp/drop"
SHOTS, SEED = 3, 0
_PLACES = ("drop_dataset_dev.json", "drop_dataset/drop_dataset_dev.json", "drop_validation.jsonl", "drop_train_salvaged.jsonl")


class DropBenchmark(PrefixBenchmark):
    """Of the development set, or of the part of the training set that a folder holds."""

    name, title = "drop", "DROP"
    chance = 0.0  # there is nothing to guess from
    max_new_tokens, max_prompt_tokens = 8, 2048

    def __init__(self, data: Path | None = None) -> None:
        self.file = None if data is None else find_data(data, "drop", _PLACES, "the release's dev file, or one question per line")
        self.version = f"drop/{self.file.stem if self.file else 'hub-validation'}/instruct-eval-3-shot/1"

    def items(self) -> list[Item]:
        rows = [row for row in self._rows() if len(set(row["spans"])) == 1]
        if len(rows) <= SHOTS:
            raise DataError(f"drop: {self.file or HUB} holds {len(rows)} questions with one answer; more than {SHOTS} are needed.")
        examples = random.Random(SEED).sample(rows, SHOTS)
        shown = {row["passage"] for row in examples}
        prompt, starts = "", []
        for row in examples:
            starts.append(len(prompt))
            prompt += f"{passage_text(row)} {row['spans'][0]}\n\n"
        return [
            Item(
                id=row["id"],
                prompt=prompt + passage_text(row),
                shared=len(prompt),
                shots=(*starts, len(prompt)),
                targets=(row["spans"][0],),
            )
            for row in rows
            if row["passage"] not in shown
        ]

    def _rows(self) -> Iterator[dict[str, Any]]:
        """`id`, `passage`, `question` and `spans`, the annotators' answers."""
        if self.file is None:
            yield from (_row(row, f"{HUB}, row {n}") for n, row in enumerate(hub_rows(HUB, None, "validation")))
            return
        try:
            text = self.file.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"drop: cannot read {self.file}: {error.strerror}") from error
        if self.file.suffix == ".jsonl":
            yield from (_row(_parsed(line, self.file, n), f"{self.file}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line)
        else:
            yield from _released(_parsed(text, self.file, 1), self.file)


def passage_text(row: dict[str, Any]) -> str:
    """Passage, question and "Answer:"."""
    return f"{row['passage'].strip()} {row['question'].strip()}\nAnswer:"


def _parsed(text: str, file: Path, line: int) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"{file}, line {line}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file}, line {line}: expected an object; got {type(found).__name__}.")
    return found


def _row(row: dict[str, Any], place: str) -> dict[str, Any]:
    """A row in the hub's form."""
    try:
        spans = [span.strip() for span in row["answers_spans"]["spans"]]
        return {"id": str(row["query_id"]), "passage": row["passage"], "question": row["question"], "spans": spans}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{place}: expected query_id, passage, question and answers_spans.spans; {error!r}.") from error


def _released(passages: dict[str, Any], file: Path) -> Iterator[dict[str, Any]]:
    """The official release: passages with their questions, each with an answer and its validators' answers."""
    for name, passage in passages.items():
        try:
            for pair in passage["qa_pairs"]:
                spans = [span for answer in (pair["answer"], *pair.get("validated_answers", ())) for span in _spans(answer)]
                yield {"id": pair["query_id"], "passage": passage["passage"], "question": pair["question"], "spans": spans}
        except (KeyError, TypeError) as error:
            raise DataError(f"{file}, passage {name}: expected passage and qa_pairs with answer and query_id; {error!r}.") from error


def _spans(answer: dict[str, Any]) -> list[str]:
    """An annotator's answer as texts: a number, a date, or spans of the passage."""
    date = " ".join(str(answer.get("date", {}).get(part, "")) for part in ("day", "month", "year")).strip()
    return [answer["number"]] if answer.get("number") else [" ".join(date.split())] if date else list(answer.get("spans", ()))
