"""Descriptions with random faults: read, or refused with mistakes that are named; never a traceback."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from loratune import demo
from loratune.errors import SpecError
from loratune.spec import StudySpec

ODD = (
    *("null", "true", "-1", "0", "1e400", ".inf", ".nan", "''", "[]", "{}", "[[]]", "{a: {b: c}}", "2026-01-02", "1:30", "0x1f", "010"),
    *("'\\u0007'", "'\\ud800'", "&a [*a]", "*nowhere", "!!timestamp 2026-01-02", "!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]"),
    *("!!python/object/apply:os.system ['true']", "!own x", "? [a]", "- -", "'" + "x" * 5000 + "'", "[" * 500, "99999999999999999999"),
    *("<<: *a", "|\n  a\n   b", "%TAG ! x", "@x", "`x`", "a: b: c", "\t", "\x00", "\x1b[31m", "\u2028", "\ufeff", "🙂", "١٢"),
)


def mutated(text: str, chance: random.Random) -> str:
    """One to three faults in a description: a value, a key, a line, a character, or its end."""
    for _ in range(chance.randint(1, 3)):
        lines = text.split("\n")
        place = chance.randrange(len(lines))
        line = lines[place]
        match chance.randrange(8):
            case 0 | 1 | 2 if ":" in line:
                lines[place] = line.partition(":")[0] + ": " + chance.choice(ODD)
            case 3:
                lines[place] = line.replace(line.strip(), chance.choice(ODD)) if line.strip() else chance.choice(ODD)
            case 4:
                lines.insert(place, lines[chance.randrange(len(lines))])
            case 5:
                del lines[place]
            case 6:
                lines[place] = " " * chance.randint(1, 5) + line
            case _:
                at = chance.randrange(len(text) + 1)
                return text[:at] + chance.choice(ODD) + text[at + chance.randint(0, 3) :] if chance.random() < 0.8 else text[:at]
        text = "\n".join(lines)
    return text


def attack(folder: Path, count: int, seed: int) -> tuple[int, int]:
    """(descriptions read, descriptions refused) of `count` mutated ones."""
    chance = random.Random(seed)
    whole = StudySpec.load(base=demo.study()).to_yaml()
    path = folder / "study.yaml"
    read = refused = 0
    for number in range(count):
        text = mutated(whole, chance)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            spec = StudySpec.load(path)
            path.write_text(spec.to_yaml())
            assert StudySpec.load(path) == spec, text
            read += 1
        except SpecError as error:
            refused += bool(str(error).strip())
        except Exception as error:
            raise AssertionError(f"number {number}:\n{text}") from error
    assert read + refused == count
    return read, refused


def test_some_mutated_specs(tmp_path: Path) -> None:
    read, refused = attack(tmp_path, 60, seed=0)
    assert read
    assert refused


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_thousands_of_mutated_specs(tmp_path: Path, keep_figures: Callable[[str, dict[str, Any]], None]) -> None:
    read, refused = attack(tmp_path, 2500, seed=1)
    keep_figures("mutated specs", {"specs": read + refused, "read": read, "refused": refused})
    print(f"{read + refused} mutated specs: {read} read, {refused} refused")
    assert read > 100
    assert refused > 1000


@pytest.mark.parametrize("value", ["!!timestamp 2026-01-02", "!!binary aGk=", "!!set {a}", "!own x", "[" * 2000])
def test_a_value_that_json_lacks_is_refused_by_its_line(tmp_path: Path, value: str) -> None:
    (tmp_path / "study.yaml").write_text(f"model: m\nname: {value}\n")
    with pytest.raises(SpecError, match=r"study\.yaml"):
        StudySpec.load(tmp_path / "study.yaml")


def test_a_control_character_is_named(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("model: m\nname: a\x07b\n")
    with pytest.raises(SpecError, match=r"study\.yaml.*not allowed"):
        StudySpec.load(tmp_path / "study.yaml")


def test_a_date_is_text(tmp_path: Path) -> None:
    assert yaml.safe_load("2026-01-02") != "2026-01-02"
    (tmp_path / "study.yaml").write_text("name: 2026-01-02\nmodel: m\ndata: {train: [x.json], validation_fraction: 0.1}\n")
    assert StudySpec.load(tmp_path / "study.yaml").name == "2026-01-02"
