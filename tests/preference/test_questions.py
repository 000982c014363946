"""Vicuna's real files, one's own, and what is wrong with a bad one."""

from pathlib import Path

import pytest

from loratune.errors import DataError
from loratune.preference.questions import demo_questions, read_questions


def test_vicuna_and_mt_bench(shared_data: Path) -> None:
    vicuna = read_questions(shared_data / "vicuna" / "vicuna_bench_question.jsonl")
    assert len(vicuna) == 80
    assert vicuna[0].instruction == "How can I improve my time management skills?"
    assert {q.category for q in vicuna} >= {"generic", "knowledge", "coding", "math", "writing"}
    mt_bench = read_questions(shared_data / "vicuna" / "mt_bench_question.jsonl")
    assert len(mt_bench) == 80
    assert mt_bench[0].instruction.startswith("Compose an engaging travel blog post")  # the first turn


def test_own_questions(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(
        '{"question": "Why?", "category": "short"}\n\n{"instruction": "Sum up.", "input": "A text.", "id": "x"}\n{"prompt": "Say."}\n'
    )
    one, two, three = read_questions(file)
    assert (one.id, one.instruction, one.category) == ("1", "Why?", "short")
    assert (two.id, two.instruction, two.input) == ("x", "Sum up.", "A text.")
    assert three.id == "4"
    text = tmp_path / "own.txt"
    text.write_text("Why is the sky blue?\n\n  {not JSON}  \n")
    assert [q.instruction for q in read_questions(text)] == ["Why is the sky blue?", "{not JSON}"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"question": "a"}\n{"question": ', "line 2: not JSON"),
        ("[1]", "line 1: got list"),
        ('{"text": "a"}', "no question in it; its fields are text"),
        ('{"question": " "}', "field question: got ' '; needed: text"),
        ('{"turns": []}', "field turns"),
        ('{"question": "a", "input": 3}', "field input: got '3'"),
        ('{"question": "a", "id": 1}\n{"question": "b", "id": 1}', "question_id '1' stands there twice"),
        ("\n\n", "holds no question"),
    ],
)
def test_bad_questions(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(content)
    with pytest.raises(DataError) as error:
        read_questions(file)
    assert said in str(error.value)
    assert str(file) in str(error.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the questions"):
        read_questions(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_questions(tmp_path / "latin.txt")


def test_demo_questions_stand_in_no_training_data() -> None:
    import json

    from loratune.demo import data_files

    questions = demo_questions()
    assert len(questions) == 40
    assert questions == demo_questions()
    asked = {(q.instruction, q.input) for q in questions}
    seen = {(row["instruction"], row["input"]) for file in data_files() for row in map(json.loads, file.read_text().splitlines())}
    assert not asked & seen
