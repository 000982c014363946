"""The recorded tables of benchmarks/ are well-formed, and a search replays on one."""

import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TABLES = sorted((BENCHMARKS / "tables").glob("*.json"))


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("recorded"), importlib.import_module("searches")


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_table_is_well_formed(path: Path) -> None:
    table = json.loads(path.read_text())
    about, rows = table["about"], table["configurations"]
    assert about["name"] == path.stem
    assert path.stat().st_size < 200_000
    assert len(about["lengths"]) == len(about["steps"])
    assert about["lengths"][-1] == "1"
    configurations = [{name: value for name, value in row.items() if name not in ("losses", "second_seed")} for row in rows]
    assert len({json.dumps(one, sort_keys=True) for one in configurations}) == len(rows)
    for row in rows:
        for losses in (row["losses"], row.get("second_seed", row["losses"])):
            assert len(losses) == len(about["steps"])
            assert all(loss is None or (math.isfinite(loss) and loss > 0) for loss in losses)


@pytest.mark.parametrize("path", [path for path in TABLES if path.stem != "llama2_7b_published"], ids=lambda path: path.stem)
def test_a_recorded_table_holds_what_was_asked_for(path: Path) -> None:
    table = json.loads(path.read_text())
    about, rows = table["about"], table["configurations"]
    assert about["lengths"] == ["1/27", "1/9", "1/3", "1"]
    assert len(rows) >= 150
    assert sum("second_seed" in row for row in rows) == 30
    assert about["tokens"] == sorted(about["tokens"])
    assert {"model", "data", "untuned_loss", "environment", "seeds"} <= about.keys()
    rate = about["search_space"]["learning_rate"]
    assert math.log10(rate["high"] / rate["low"]) == pytest.approx(4)
    assert min(row["losses"][-1] for row in rows if row["losses"][-1] is not None) < about["untuned_loss"]


def test_searches_replay_on_a_table(modules: tuple[ModuleType, ModuleType]) -> None:
    recorded, searches = modules
    table = recorded.load("llama2_7b_published")
    for name in ("bracket", "random"):
        first, again, other = (searches.run(name, table, seed, 5.0) for seed in (0, 0, 1))
        assert first.runs == again.runs
        assert 1 <= first.spent <= 5
        assert first.regret(1.0) >= 0
        assert [loss for *_, loss in first.runs] != [loss for *_, loss in other.runs]
    within = [searches.run("bracket", table, seed, 5.0).regret(3.0) <= table.tolerance for seed in range(20)]
    assert sum(within) >= 19, "the aim of three runs with a fair prior: 95 %"


def test_priorband_draws_around_the_guess_and_replays(modules: tuple[ModuleType, ModuleType]) -> None:
    recorded, searches = modules
    table = recorded.load("stories260k_alpaca")
    first, again = (searches.run("PriorBand", table, 0, 5.0) for _ in range(2))
    assert first.runs == again.runs
    assert first.runs[0][1] == searches.guess(table)[1]
    assert {length for _, _, length, _ in first.runs} == {0, 1, 2, 3}, "from 1/27 to full runs"
    assert all(
        table.space.parameters["learning_rate"].low <= p["learning_rate"] <= table.space.parameters["learning_rate"].high
        for _, p, *_ in first.runs
    )
