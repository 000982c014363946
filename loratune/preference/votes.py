"""What people said, in SQLite: one row per vote, committed before it is acknowledged, never changed; and which browser is whose.

A changed mind and an undo are new rows that supersede the old one; triggers refuse UPDATE and DELETE. The
file may be read while the page is open (write-ahead log).
"""

import hashlib
import hmac
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loratune.errors import StorageError
from loratune.preference.analysis import CHOICES, Vote

NAME = "votes.db"
_UNDONE = "undone"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS votes (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time REAL NOT NULL,                                -- seconds since 1970
    rater TEXT NOT NULL,
    question TEXT NOT NULL,
    "left" TEXT NOT NULL CHECK ("left" IN ('first', 'second')),
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'tie', 'neither', 'undone')),
    supersedes INTEGER UNIQUE REFERENCES votes (id)    -- the row that no longer counts
);
CREATE TABLE IF NOT EXISTS raters (
    rater TEXT PRIMARY KEY,                            -- as `key` spells the name
    browser TEXT NOT NULL,                             -- SHA-256 of the secret that the rater's browser keeps
    time REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS votes_of_rater ON votes (rater, question);
CREATE TRIGGER IF NOT EXISTS votes_stay BEFORE UPDATE ON votes BEGIN SELECT RAISE (ABORT, 'votes are never changed'); END;
CREATE TRIGGER IF NOT EXISTS votes_last BEFORE DELETE ON votes BEGIN SELECT RAISE (ABORT, 'votes are never removed'); END;
"""
_STANDING = (
    'SELECT id, rater, question, "left", choice FROM votes AS v '
    "WHERE choice != 'undone' AND NOT EXISTS (SELECT 1 FROM votes WHERE supersedes = v.id)"
)


class Votes:
    """The votes of one comparison. Close it, or use it as a context."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it. Raises StorageError."""
        self.path = path
        self._alone = threading.Lock()  # one thread at a time, not always the same one
        with self._explained():
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut
            self._db.executescript(_SCHEMA)

    def __enter__(self) -> "Votes":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def cast(self, vote: Vote) -> None:
        """Keep the vote; an earlier one of the rater on the question no longer counts. On return it is on the disk."""
        if vote.choice not in CHOICES:
            raise ValueError(f"choice {vote.choice!r}; allowed: {', '.join(CHOICES)}")
        with self._transaction():
            old = self._db.execute(f"{_STANDING} AND rater = ? AND question = ?", (vote.rater, vote.question)).fetchone()
            if old is None or old[3:] != (vote.left, vote.choice):  # sent again after a lost reply: nothing new
                self._add(vote.rater, vote.question, vote.left, vote.choice, old[0] if old else None)

    def undo(self, rater: str) -> str | None:
        """Take back the rater's latest vote that stands; returns its question, None when there is none."""
        with self._transaction():
            last = self._db.execute(f"{_STANDING} AND rater = ? ORDER BY id DESC LIMIT 1", (rater,)).fetchone()
            if last is None:
                return None
            self._add(rater, last[2], last[3], _UNDONE, last[0])
            return str(last[2])

    def standing(self) -> list[Vote]:
        """The votes that count, in the order they were given."""
        with self._explained():
            rows = self._db.execute(f"{_STANDING} ORDER BY id").fetchall()
        return [Vote(rater=rater, question=question, left=left, choice=choice) for _, rater, question, left, choice in rows]

    def of(self, rater: str) -> dict[str, Vote]:
        """The rater's votes that count, by question."""
        return {vote.question: vote for vote in self.standing() if vote.rater == rater}

    def spelt(self, name: str) -> str:
        """The rater's name as it was first written: "ann" is "Ann" who voted before."""
        with self._explained():
            known = [row[0] for row in self._db.execute("SELECT DISTINCT rater FROM votes")]
        return next((rater for rater in known if key(rater) == key(name)), " ".join(name.split()))

    def claim(self, rater: str, secret: str) -> bool:
        """Give the rater's name to the browser that keeps `secret`, unless another has it; returns whether it is this one's."""
        with self._transaction():
            if (known := self._browser(rater)) is None:
                row = (key(rater), _digest(secret), time.time())
                self._db.execute("INSERT INTO raters (rater, browser, time) VALUES (?, ?, ?)", row)
        return known is None or hmac.compare_digest(known, _digest(secret))

    def readmit(self, rater: str) -> bool:
        """Let another browser have the rater's name; the votes stay. Returns whether one had it."""
        with self._transaction():
            return self._db.execute("DELETE FROM raters WHERE rater = ?", (key(rater),)).rowcount > 0

    def _browser(self, rater: str) -> str | None:
        row = self._db.execute("SELECT browser FROM raters WHERE rater = ?", (key(rater),)).fetchone()
        return None if row is None else str(row[0])

    def _add(self, rater: str, question: str, left: str, choice: str, supersedes: int | None) -> None:
        row = (time.time(), rater, question, left, choice, supersedes)
        self._db.execute('INSERT INTO votes (time, rater, question, "left", choice, supersedes) VALUES (?, ?, ?, ?, ?, ?)', row)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            with self._alone:
                yield
        except sqlite3.Error as error:
            raise StorageError(f"{self.path}: {error}. Votes given before are not lost; see that the folder can be written.") from error


def key(name: str) -> str:
    """What makes two spellings of a rater's name the same."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def read_votes(folder: Path) -> list[Vote]:
    """The votes that count; none when there is no file yet. Raises StorageError."""
    if not (folder / NAME).exists():
        return []
    with Votes(folder / NAME) as votes:
        return votes.standing()
