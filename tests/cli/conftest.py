"""A command line to drive in this process, and one finished study to read."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from workplace import rows, tiny, write_rows

from loratune.cli import main


@dataclass
class Answer:
    """What a command gave."""

    code: int
    out: str
    err: str


@pytest.fixture
def loratune(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run a command in this process."""

    def run(*argv: object) -> Answer:
        capsys.readouterr()
        code = main([str(arg) for arg in argv])
        said = capsys.readouterr()
        return Answer(code, said.out, said.err)

    return run


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="session")
def done(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """(folder with spec.yaml and a finished study in `study/`, what the run printed). Read it; do not write."""
    import contextlib
    import io

    home = tmp_path_factory.mktemp("done")
    spec = tiny(tinystories, write_rows(home / "data.jsonl", rows()))
    (home / "spec.yaml").write_text(yaml.safe_dump(spec))
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("LORATUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        code = main(["run", str(home / "spec.yaml"), "--output", str(home / "study")])
    assert code == 0, err.getvalue()
    yield home, out.getvalue()
    shutil.rmtree(home, ignore_errors=True)
