"""docs/tutorial.md is executed, block after block in one namespace, and prints what it shows.

Compared are the words; numbers may differ in their last digits between machines. A block marked `text varies` depends on close
decisions, so of it only the first words are compared. `python tests/test_tutorial.py` runs it and writes what it printed into the page.
"""

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```python\n(.*?)^```\n\n?(?:^```text( varies)?\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def executed() -> Iterator[tuple[re.Match[str], str]]:
    """Each block, and what it printed, in the current folder."""
    names: dict[str, Any] = {"__name__": "tutorial"}
    text = PAGE.read_text()
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start()) + 1
        code = compile("\n" * line + block[1], str(PAGE), "exec")  # so that a traceback names the line of the page
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        yield block, printed.getvalue()


def words(text: str) -> str:
    return " ".join(NUMBER.sub("#", text).split())


def test_the_page_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    blocks = 0
    for block, printed in executed():
        blocks += 1
        _, varies, shown = block.groups()
        assert bool(printed.strip()) == bool((shown or "").strip()), f"shown is {shown!r}, printed is {printed!r}"
        if varies:
            assert words(printed).split()[:2] == words(shown).split()[:2]
        elif shown:
            assert words(printed) == words(shown)
    assert blocks > 10
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


def test_no_place_of_this_machine_stands_in_the_page() -> None:
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|Users)/", PAGE.read_text())


def write() -> None:
    """Execute the page in an empty folder, and put what it printed below each block."""
    text, here = PAGE.read_text(), os.getcwd()
    pieces, last = [], 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["LORATUNE_CACHE"] = str(Path(folder) / "cache")
        for block, printed in executed():
            pieces.append(text[last : block.start()] + f"```python\n{block[1]}```\n")
            if printed:
                shown = "\n".join(line.rstrip() for line in printed.splitlines())
                pieces.append(f"\n```text{block[2] or ''}\n{shown}\n```\n")
            last = block.end()
        os.chdir(here)
    PAGE.write_text("".join(pieces) + text[last:])


if __name__ == "__main__":
    write()
