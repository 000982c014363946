"""A comparison read back, without a web framework; the table."""

import subprocess
import sys
from pathlib import Path

import pytest
from comparisons import ANN, BOB, made

from loratune.errors import StorageError
from loratune.preference import find_comparisons, read_preferences, summary_text
from loratune.preference.analysis import Vote
from loratune.preference.votes import NAME, Votes
from loratune.system.jsonl import append_lines


def voted(folder: Path) -> Path:
    with Votes(made(folder) / NAME) as votes:
        for rater, said in (("Ann", ANN), ("Bob", BOB)):
            for question, verdict in said.items():
                choice = verdict if verdict in ("tie", "neither") else "left" if verdict == "second" else "right"
                votes.cast(Vote(rater=rater, question=question, left="second", choice=choice))
    return folder


def test_the_table_says_what_was_worked_out_by_hand(tmp_path: Path) -> None:
    said = summary_text(read_preferences(voted(tmp_path / "c")))
    for line in (
        "trial 17 (tuned) against trial 0 (default), 6 questions",
        "Answers cut at 64 tokens: trial 17 (tuned) 1, trial 0 (default) 1.",
        "66.7% (39.1% to 86.2%); without ties 70.0% (39.7% to 89.2%)",
        "3 for trial 17 (tuned), 1 for trial 0 (default); sign test p = 0.62, so that they cannot be told apart.",
        "Raters agree in 67% of pairs of votes on the same question; Krippendorff’s alpha 0.48",
        "The answer shown as A won 3 of 10 (p = 0.34).",
    ):
        assert line in said, said
    assert "\n  rater Ann " in said
    assert "\n  odd " in said


def test_found_in_a_study(tmp_path: Path) -> None:
    assert find_comparisons(tmp_path) == []
    voted(tmp_path / "preference" / "trial-17-vs-trial-0")
    (record,) = find_comparisons(tmp_path)
    assert record.comparison.first.label == "trial 17 (tuned)"
    assert record.people is not None
    with pytest.raises(StorageError, match="holds no comparison"):
        read_preferences(tmp_path)


def test_identical_answers_are_asked_of_nobody(tmp_path: Path) -> None:
    folder = made(tmp_path / "c", 2)
    same = [{"question": "1", "side": side, "text": "the very same", "tokens": 3, "ended": True} for side in ("first", "second")]
    append_lines(folder / "answers.jsonl", same)
    record = read_preferences(folder)
    assert ([pair.question.id for pair in record.pairs], record.identical) == (["2"], 1)
    assert "On 1 question both answers were the same" in summary_text(record)


def test_reading_needs_neither_web_framework_nor_torch(tmp_path: Path) -> None:
    folder = voted(tmp_path / "c")
    code = (
        "import sys; from pathlib import Path; from loratune.preference import read_preferences;"
        "assert read_preferences(Path(sys.argv[1])).people;"
        "print(sorted({'fastapi', 'uvicorn', 'starlette', 'torch', 'transformers', 'optuna'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_damage_is_told(tmp_path: Path) -> None:
    folder = made(tmp_path / "c")
    (folder / "answers.jsonl").write_text('{"question": \n{}\n')
    with pytest.raises(StorageError, match=r"answers\.jsonl, line 1 is damaged"):
        read_preferences(folder)
    (folder / "comparison.json").write_text("{}")
    with pytest.raises(StorageError, match=r"comparison\.json cannot be read"):
        read_preferences(folder)
