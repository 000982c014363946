"""The skill is all that an agent may have: what it names is there."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest

from loratune import errors
from loratune.cli import COMMANDS, as_json, module_of
from loratune.cli.activity import StudyState
from loratune.cli.interrupt import PATIENCE
from loratune.cli.parser import Parser, field_names
from loratune.spec import StudySpec
from loratune.spec.loading import ROOT_ALIASES

ROOT = Path(__file__).resolve().parents[2]
SKILL = (ROOT / "skills" / "loratune" / "SKILL.md").read_text()
PAGE = (ROOT / "docs" / "reference" / "json.md").read_text()


def options(command: str) -> set[str]:
    parser: argparse.ArgumentParser = Parser(prog=command)
    module_of(command).add_arguments(parser)
    as_json.add_json(parser)
    return {option for action in parser._actions for option in action.option_strings}


def test_it_is_short_and_points_at_nothing_that_it_lacks() -> None:
    assert len(SKILL.splitlines()) < 110
    assert not re.findall(r"docs/|\.rst|errors\.py|README|AGENTS|json\.md|https?:", SKILL)


def test_every_command_and_flag_is_there() -> None:
    fields = {f"--{name}" for name in field_names()} | {f"--{name}".replace("_", "-") for name in ROOT_ALIASES}
    fields |= {f"--{name}" for name in (*StudySpec.model_fields, *ROOT_ALIASES)}
    everywhere = set().union(*map(options, COMMANDS)) | fields
    told = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", SKILL))
    assert told - everywhere == set()
    for command, rest in re.findall(r"`loratune (\w+)([^`]*)`", SKILL):
        assert command in COMMANDS
        known = options(command) | (fields if command in ("run", "recommend") else set())
        assert set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", rest)) - known == set(), command


def test_every_exit_code_is_that_of_its_error() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", SKILL, re.MULTILINE)
    told = {int(code): set(re.findall(r"`(\w+Error|Bug|Interrupted)`", kinds)) for code, kinds in rows}
    own: dict[int, set[str]] = {0: set(), 1: {"MissingExtraError"}, 2: {"UsageError"}, 70: {"Bug"}, 130: {as_json.INTERRUPTION}}
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.LoratuneError) and "exit_code" in vars(kind) and kind.exit_code != 1:
            own.setdefault(kind.exit_code, set()).add(kind.__name__)
    assert told == own


def test_every_key_is_documented() -> None:
    known = set(re.findall(r"\w+", PAGE))
    keys = SKILL.split("## Keys")[1].split("## Exit codes")[0]
    for cell in re.findall(r"`([^`]+)`", keys):
        if not cell.startswith(("run", "--")):
            assert set(re.findall(r"[a-z_]{3,}", cell)) - known == set(), cell
    assert set(re.findall(r"`([^`]+)`", SKILL.split("`state` of `status` is")[1].split("\n")[0])) == set(StudyState)
    assert f"{PATIENCE:g} seconds" in SKILL


def test_its_settings_are_understood() -> None:
    def quoted(flag: str) -> str:
        return re.findall(rf"{flag} '(\[.*?\])'", SKILL)[0]

    given = [("constraints", quoted("--constraints")), ("search_space.lora_r", quoted("--search_space.lora_r"))]
    given += [("metrics", "my_metric.py:exact_match"), ("objectives", quoted("--objectives"))]
    base: dict[str, Any] = {"model": "m", "data": {"train": ["d"], "validation_fraction": 0.1}}
    spec = StudySpec.load(None, given, base)
    assert spec.constraints == ("adapter_mb <= 2",)
    assert spec.budget.full_runs is None
    assert spec.budget.trials == 100  # as it warns
    bound = '["exact_match >= 0.4"]'
    assert f"with --constraints '{bound}' it limits, and both keep the search of three runs" in SKILL.replace("`", "")
    assert StudySpec.load(None, [("metrics", "my_metric.py:exact_match")], base).budget.full_runs == 3


def test_the_metric_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratune.downstream.metric_functions import functions_of
    from loratune.spec.own_metrics import OwnMetric

    program = re.findall(r"```python\n(.*?)```", SKILL, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_metric.py").write_text(program)
    function = functions_of([OwnMetric(function="my_metric.py:exact_match")])["exact_match"]
    rows = [{"prompt": "p", "reference": "a", "answer": "a "}, {"prompt": "p", "reference": "b", "answer": "c"}]
    assert function(json.loads(json.dumps(rows))) == 0.5
