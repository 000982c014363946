"""The front door: what is imported, unknown names, how errors leave."""

import subprocess
import sys
from pathlib import Path

import pytest

from loratune.cli import COMMANDS, main
from loratune.errors import DataError

HEAVY = {"torch", "transformers", "optuna", "matplotlib"}


def modules_after(*argv: str) -> set[str]:
    """The modules that a command has imported, told by a process of its own."""
    code = f"""
import sys
from loratune.cli import main
main({list(argv)!r})
print("\\n@@" + ",".join(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("@@")[2].strip().split(","))


def foreign(modules: set[str]) -> set[str]:
    """The packages among them that are neither Python's own, nor loratune, nor what every start of this Python imports."""
    bare = subprocess.run([sys.executable, "-c", "import sys; print(','.join(sys.modules))"], capture_output=True, text=True, check=True)
    known = {*sys.stdlib_module_names, "loratune", *(name.partition(".")[0] for name in bare.stdout.strip().split(","))}
    return {name.partition(".")[0] for name in modules} - known


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["--version"], ["run", "study.yaml", "--training.epochs", "2", "--help"], *([command, "--help"] for command in COMMANDS)],
    ids=" ".join,
)
def test_help_imports_the_standard_library_alone(argv: list[str]) -> None:
    """So that it is there at once: `compare --help` took seconds, for SciPy's sake."""
    modules = modules_after(*argv)
    assert foreign(modules) == set()
    assert not {"sqlite3", "asyncio", "multiprocessing"} & modules  # large ones of the standard library


def test_status_imports_nothing_heavy(done) -> None:
    home, _ = done
    modules = modules_after("status", str(home / "study"))
    assert not modules & {*HEAVY, "pydantic", "numpy", "scipy"}
    assert "rich" in modules  # it did print


def test_export_imports_nothing_that_trains(done, tmp_path: Path) -> None:
    home, _ = done
    modules = modules_after("export", str(home / "study"), str(tmp_path / "adapter"))
    assert not modules & {*HEAVY, "scipy"}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_report_imports_nothing_that_trains(done, tmp_path: Path) -> None:
    home, _ = done
    modules = modules_after("report", str(home / "study"), "--output", str(tmp_path / "report.html"))
    assert not modules & {"torch", "transformers", "datasets", "peft", "fastapi"}


def test_help_names_every_command(loratune) -> None:
    answer = loratune("--help")
    assert answer.code == 0
    for name, what in COMMANDS.items():
        assert f"  {name}" in answer.out
        assert what in answer.out
    assert loratune().out == answer.out
    assert max(map(len, answer.out.splitlines())) < 100


def test_version(loratune) -> None:
    from importlib.metadata import version

    assert loratune("--version").out == f"loratune {version('loratune')}\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["runn"], "no command 'runn'; did you mean 'run'? See `loratune --help`"),
        (["frobnicate"], "no command 'frobnicate'; the commands: run, recommend, status,"),
        (["run", "--modl", "x"], "unknown argument --modl; did you mean --model?"),
        (["run", "--epochs", "2"], "unknown argument --epochs; did you mean --training.epochs?"),
        (["run", "--lora-r", "2"], "unknown argument --lora-r; did you mean --search_space.lora_r?"),
        (["run", "--trainning.epochs", "2"], "did you mean --training.epochs?"),
        (["run", "--training.epochs"], "expected one argument"),
        (["status", "--jsn"], "unknown argument --jsn; did you mean --json?"),
        (["export", "x"], "nowhere to export to. Give a DESTINATION folder, or --push USER/NAME."),
    ],
)
def test_wrong_command_lines(loratune, argv: list[str], said: str) -> None:
    answer = loratune(*argv)
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.startswith("loratune: ")
    assert said in answer.err


def test_an_error_of_ours_is_one_text_without_traceback(loratune, monkeypatch: pytest.MonkeyPatch) -> None:
    import loratune.cli.schema as schema

    def fail(args: object) -> int:
        raise DataError("data.json, line 3: wrong")

    monkeypatch.setattr(schema, "main", fail)
    answer = loratune("schema")
    assert (answer.code, answer.err) == (3, "loratune: data.json, line 3: wrong\n")


def test_a_bug_shows_its_traceback_and_where_to_go(loratune, monkeypatch: pytest.MonkeyPatch) -> None:
    import loratune.cli.schema as schema

    monkeypatch.setattr(schema, "main", lambda args: 1 // 0)
    answer = loratune("schema")
    assert answer.code == 70
    assert "Traceback" in answer.err
    assert "ZeroDivisionError" in answer.err
    assert "this is a bug" in answer.err


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-c", "import sys; from loratune.cli import main; sys.exit(main())", "schema"]
    done = subprocess.run(["bash", "-o", "pipefail", "-c", '"$0" "$@" | head -1', *command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


def test_main_reads_the_process_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["loratune", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("loratune ")
