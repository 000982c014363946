"""A study's folder with one file damaged: every command says which file, and what to do, or does without it; none shows a traceback."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loratune.cli import main
from loratune.errors import StorageError
from loratune.record import COMPLETE, read

BUG = 70


def damages(whole: bytes) -> Iterator[tuple[str, bytes | None]]:
    """Kinds of damage by name; None: a folder stands in the file's place."""
    yield "empty", b""
    yield "half", whole[: len(whole) // 2]
    yield "zeros", bytes(len(whole))
    yield "not text", b"\xff\xfe" + whole
    yield "a list", b"[1, 2]"
    yield "a number", b"7"
    yield "null", b"null"
    yield "nested", b"[" * 100_000
    yield "a folder", None
    try:
        content = json.loads(whole)
    except ValueError:
        return
    if isinstance(content, dict):
        for key in list(content)[:12]:
            yield f"without {key}", json.dumps({k: v for k, v in content.items() if k != key}).encode()
            yield f"{key} of another type", json.dumps(content | {key: {"x": []} if not isinstance(content[key], dict) else "x"}).encode()


def files(folder: Path) -> list[Path]:
    """One of each kind of file that a command reads back."""
    inside = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and "figures" not in path.parts)
    kinds: dict[str, Path] = {}
    for path in inside:
        if path.suffix in (".json", ".yaml", ".txt", ".db") or path.name in ("began", "lock"):
            kinds.setdefault("/".join(part for part in path.parts if not part[0].isdigit()) + path.name, path)
    return list(kinds.values())


def attack(
    whole: Path, copy: Path, path: Path, damage: bytes | None, capsys: pytest.CaptureFixture[str], commands: list[list[str]]
) -> list[int]:
    """The exit codes of the commands on a copy of the study with one file damaged."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    target = copy / path
    target.unlink()
    if damage is None:
        target.mkdir()
    else:
        target.write_bytes(damage)
    codes = []
    for command in commands:
        codes.append(main([str(copy) if word == "STUDY" else word for word in command]))
        said = capsys.readouterr()
        assert codes[-1] != BUG, f"{path}, {command}:\n{said.err}"
        if codes[-1]:
            assert said.err.startswith("loratune: "), said.err
    return codes


READING = [["status", "STUDY"], ["status", "STUDY", "--json"]]
ALL = [*READING, ["report", "STUDY", "--output", "STUDY.html"], ["export", "STUDY", "STUDY.adapter"], ["run", "STUDY"]]


def test_each_kind_of_file_half_written(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.chdir(tmp_path)
    for path in files(finished):
        whole = (finished / path).read_bytes()
        attack(finished, tmp_path / "copy", path, whole[: len(whole) // 2], capsys, READING)


@pytest.mark.slow
@pytest.mark.timeout(0)  # half an hour of a core with nothing else to do
def test_every_damage_to_every_kind_of_file(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], keep_figures: Callable[[str, dict[str, Any]], None]
) -> None:
    os.chdir(tmp_path)
    before = read(finished)
    results = [(t.number, t.state, t.value) for t in before.trials]
    count = refused = 0
    faults = []  # all of them, for the next run takes as long
    for path in files(finished):
        for name, damage in damages((finished / path).read_bytes()):
            count += 1
            try:
                codes = attack(finished, tmp_path / "copy", path, damage, capsys, ALL)
                refused += bool(codes[-1])
                if codes[-1] == 0:  # what went on came to the same end
                    assert [(t.number, t.state, t.value) for t in read(tmp_path / "copy").trials] == results
            except (AssertionError, StorageError) as fault:
                faults.append(f"{path}, {name}: {fault}")
        with capsys.disabled():
            print(f"{path}: {count} damaged files so far, faults {faults}", flush=True)
    assert not faults, "\n\n".join(faults)
    keep_figures("damaged files", {"files": count, "commands": count * len(ALL), "refused by run": refused})
    with capsys.disabled():
        print(f"{count} damaged files, {count * len(ALL)} commands: no traceback; `run` refused {refused} of them")
    assert count >= 80


def test_a_copy_with_other_times_says_the_same(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    outcomes = sorted(copy.glob("trials/*/*/outcomes/*.json"), key=lambda path: path.stat().st_mtime_ns)
    for number, path in enumerate(reversed(outcomes)):
        os.utime(path, (1.6e9 + number, 1.6e9 + number))
    before, after = read(finished), read(copy)
    assert after.trials == before.trials
    promoted = next(trial for trial in before.trials if len({o.key.split("/")[1] for o in trial.outcomes}) > 1 and trial.state == COMPLETE)
    assert [outcome.key.split("/")[1] for outcome in promoted.outcomes][-1] == "main"


def test_a_cache_is_done_without(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("progress.json", "recipe.json"):
        assert attack(finished, tmp_path / "copy", Path(name), b"{", capsys, [["status", "STUDY"]]) == [0]


def test_a_damaged_recipe_is_named_where_it_is_needed(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [
        ["evaluate", "STUDY", "--benchmarks", "demo_choice"],
        ["select", "STUDY", "--yes"],
        ["export", "STUDY", str(tmp_path / "out")],
    ]
    for command in commands:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(finished, tmp_path / "copy")
        (tmp_path / "copy" / "recipe.json").write_text('{"data": ')
        (tmp_path / "copy" / "reloaded.json").unlink()  # or nothing is checked again
        assert main([str(tmp_path / "copy") if word == "STUDY" else word for word in command]) == 5
        assert "recipe.json is damaged" in capsys.readouterr().err


def test_escape_sequences_of_a_folder_are_not_printed(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    evil = "\x1b[2J\x1b]0;owned\x07\x9b31m"
    for path in [*tmp_path.glob("copy/trials/*/trial.json"), *tmp_path.glob("copy/trials/*/*/outcomes/*.json")]:
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"message": evil + "so", "state": "failed" if "params" in content else content["state"]}))
    assert main(["status", str(tmp_path / "copy")]) == 0
    said = capsys.readouterr().out
    assert "so" in said
    assert "\x1b" not in said
    assert "\x9b" not in said


def test_a_stray_folder_is_no_trial(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    for name in ("0001 copy", "backup", "7"):
        shutil.copytree(finished / "trials" / "0001", tmp_path / "copy" / "trials" / name)
    assert read(tmp_path / "copy").trials == read(finished).trials
    assert main(["run", str(tmp_path / "copy")]) == 0
