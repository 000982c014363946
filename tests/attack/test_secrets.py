"""A secret that loratune was given stands in no file that it writes and in nothing that it prints."""

import re
from pathlib import Path

import pytest

from loratune.cli import main
from loratune.errors import StorageError
from loratune.record import Record
from loratune.system.masking import masked, masked_command, unmasked
from loratune.work import Hyperparameters, Outcome, Segment, State

SECRET = "s3cret/word@x"
TINY = ["--data.train_count", "24", "--data.validation.0.count", "12", "--training.batch_size", "8", "--training.epochs", "1"]
TINY += ["--executor.name", "inline", "--sampler", "random", "--trials", "2"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"postgresql://me:{SECRET}@host:5432/db", "postgresql://me:***@host:5432/db"),
        (f"--storage=postgresql+psycopg2://me:{SECRET}@host/db and more", "--storage=postgresql+psycopg2://me:***@host/db and more"),
        (f"mysql://host/db?user=me&password={SECRET}&x=1", "mysql://host/db?user=me&password=***&x=1"),
        (f"it failed: (--hub_token {SECRET})", "it failed: (--hub_token ***"),
        (f"wandb --api-key={SECRET}", "wandb --api-key=***"),
        ("a hf_abcdefghijklmnopqrstuv b", "a *** b"),
        ("redis://:passw0rd@host", "redis://:***@host"),
        ("postgresql://me:${PGPASSWORD}@host/db", "postgresql://me:${PGPASSWORD}@host/db"),
        ("postgresql://me:***@host/db", "postgresql://me:***@host/db"),
        ("sqlite:////home/me/a@b.db", "sqlite:////home/me/a@b.db"),
        ("see https://example.org:8080/x, mail me@example.org", "see https://example.org:8080/x, mail me@example.org"),
    ],
)
def test_what_is_masked_in_a_text(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_a_value_that_follows_its_flag_is_masked() -> None:
    words = ["loratune", "run", "--hub.token", SECRET, "--storage", f"postgresql://me:{SECRET}@h/d", "--trials", "3"]
    assert masked_command(words) == ["loratune", "run", "--hub.token", "***", "--storage", "postgresql://me:***@h/d", "--trials", "3"]


def test_the_environments_secrets_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "abcdefgh1234")
    monkeypatch.setenv("PGPASSWORD", SECRET)
    monkeypatch.setenv("SHORT_TOKEN", "a")
    assert masked(f"401 for abcdefgh1234, {SECRET}, s3cret%2Fword%40x: a") == "401 for ***, ***, ***: a"


def test_a_url_names_variables_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", SECRET)
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:x@h/d")
    assert unmasked("postgresql://me:${PGPASSWORD}@h/d") == "postgresql://me:s3cret%2Fword%40x@h/d"
    assert unmasked("${DATABASE_URL}") == "postgresql://me:x@h/d"
    with pytest.raises(StorageError, match="NOT_THERE is not set"):
        unmasked("postgresql://me:${NOT_THERE}@h/d")
    with pytest.raises(StorageError, match="--storage"):
        unmasked("postgresql://me:***@h/d")


def planted(folder: Path, *secrets: str) -> list[str]:
    """The files that hold one of the secrets, as it is or as it stands in a URL."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(re.search(re.escape(s.encode()), path.read_bytes()) for s in secrets)]


def test_no_file_of_a_study_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    secret, token = "hunter2hunter2", "tok3n-of-the-hub"
    monkeypatch.setenv("DB_PASSWORD", secret)
    monkeypatch.setenv("HF_TOKEN", token)
    command = ["run", "--demo", "--output", str(tmp_path / "study"), "--storage", f"sqlite:///{tmp_path}/${{DB_PASSWORD}}.db", *TINY]
    monkeypatch.setattr("sys.argv", ["loratune", *command, "--hub_token", token])
    assert main(command) == 0
    assert (tmp_path / f"{secret}.db").is_file()
    assert not planted(tmp_path / "study", secret, token)
    assert main(["run", str(tmp_path / "study"), "--budget.trials", "3"]) == 0, "the variable's name is kept, so the folder alone goes on"
    said = capsys.readouterr()
    assert secret not in said.out + said.err


def test_a_password_in_a_url_is_kept_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "hunter2hunter2"
    command = ["run", "--demo", "--output", str(tmp_path / "study"), "--storage", f"sqlite:///{tmp_path}/x.db?password={secret}", *TINY]
    monkeypatch.setattr("sys.argv", ["loratune", *command])
    assert main(command) == 0  # SQLite takes any query
    assert not planted(tmp_path / "study", secret)
    assert secret not in "".join(capsys.readouterr())
    assert main(["run", str(tmp_path / "study")]) == StorageError.exit_code
    assert "not kept" in capsys.readouterr().err
    assert main(command) == 0, "the same command goes on"


def test_messages_of_trials_are_masked(tmp_path: Path) -> None:
    segment = Segment(trial=0, hyperparameters=Hyperparameters(), seed=0, total_steps=1, stop_step=1)
    Record(tmp_path, -1).keep(Outcome(key=segment.key, state=State.CRASHED, message="at https://me:hunter2@host/x"))
    assert not planted(tmp_path, "hunter2")
