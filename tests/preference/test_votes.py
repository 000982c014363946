"""The SQLite file: append-only, at once, readable meanwhile."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from loratune.errors import StorageError
from loratune.preference.analysis import Vote
from loratune.preference.votes import NAME, Votes, read_votes


def vote(question: str = "1", choice: str = "left", rater: str = "Ann", left: str = "first") -> Vote:
    return Vote(rater=rater, question=question, left=left, choice=choice)


def rows(folder: Path) -> list[tuple[str, str, int | None]]:
    db = sqlite3.connect(folder / NAME)
    try:
        return db.execute("SELECT question, choice, supersedes FROM votes ORDER BY id").fetchall()
    finally:
        db.close()


def test_a_vote_is_there_for_a_second_reader_at_once(tmp_path: Path) -> None:
    with Votes(tmp_path / NAME) as votes:
        votes.cast(vote())
        assert read_votes(tmp_path) == [vote()] == votes.standing()


def test_a_changed_mind_supersedes_and_nothing_is_removed(tmp_path: Path) -> None:
    with Votes(tmp_path / NAME) as votes:
        votes.cast(vote(choice="left"))
        votes.cast(vote(choice="tie"))
        votes.cast(vote(choice="tie"))  # sent again: the same vote
        assert votes.standing() == [vote(choice="tie")]
    assert rows(tmp_path) == [("1", "left", None), ("1", "tie", 1)]


def test_undo_goes_back_step_by_step(tmp_path: Path) -> None:
    with Votes(tmp_path / NAME) as votes:
        for question in ("1", "2"):
            votes.cast(vote(question))
        votes.cast(vote("3", rater="Bob"))
        assert votes.undo("Ann") == "2"
        assert votes.undo("Ann") == "1"
        assert votes.undo("Ann") is None
        assert votes.standing() == [vote("3", rater="Bob")]
        votes.cast(vote("2", "neither"))
        assert votes.of("Ann") == {"2": vote("2", "neither")}
    assert len(rows(tmp_path)) == 6


def test_the_file_refuses_changes(tmp_path: Path) -> None:
    with Votes(tmp_path / NAME) as votes:
        votes.cast(vote())
    db = sqlite3.connect(tmp_path / NAME)
    with pytest.raises(sqlite3.IntegrityError, match="never changed"):
        db.execute("UPDATE votes SET choice = 'right'")
    with pytest.raises(sqlite3.IntegrityError, match="never removed"):
        db.execute("DELETE FROM votes")
    db.close()


def test_names_that_mean_the_same_rater(tmp_path: Path) -> None:
    with Votes(tmp_path / NAME) as votes:
        votes.cast(vote(rater="Ann Ó"))
        assert votes.spelt(" ann   ó ") == "Ann Ó"
        assert votes.spelt("Anna") == "Anna"


def test_a_vote_survives_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from loratune.preference.votes import Votes; "
        "from loratune.preference.analysis import Vote\n"
        "votes = Votes(Path(sys.argv[1]))\n"
        "votes.cast(Vote(rater='Ann', question='1', left='first', choice='left')); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / NAME)], check=False).returncode == -9
    assert read_votes(tmp_path) == [vote()]


def test_an_unreadable_file_is_told(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"this is no database" * 100)
    with pytest.raises(StorageError, match=r"votes\.db"):
        read_votes(tmp_path)
    assert read_votes(tmp_path / "absent") == []


def test_unknown_choice_is_refused(tmp_path: Path) -> None:
    with Votes(tmp_path / NAME) as votes, pytest.raises(ValueError, match="allowed: left, right, tie, neither"):
        votes.cast(vote(choice="best"))
