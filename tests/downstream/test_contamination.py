"""Benchmark items in the training data: found in the prepared tokens, kept, told, and never in the way of an evaluation."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loratune import demo
from loratune.data.prepare import prepare
from loratune.data.sources import DataRecipe, DataSource
from loratune.downstream.results import contamination
from loratune.downstream.results.contamination import contamination_lines, find_contamination, read_contamination
from loratune.downstream.results.scores import ResultWriter
from loratune.downstream.tasks.base import Benchmark
from loratune.downstream.tasks.benchmarks import build_benchmark
from loratune.study import evaluation


def prepared(folder: Path, rows: list[dict[str, str]]) -> Path:
    """Training data that hold `rows`, beside a validation source."""
    folder.mkdir(exist_ok=True)
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "v.json").write_text(json.dumps([{"instruction": "Something else", "output": "x"}]))
    recipe = DataRecipe(
        train=(DataSource(path=str(folder / "a.json")),), validation=(DataSource(path=str(folder / "v.json")),), max_length=2000
    )
    return prepare(recipe, tokenizer=str(demo.model_folder()), cache=folder / "cache").folder


def answered(folder: Path, benchmark: Benchmark, first: int) -> None:
    """Scores of the bare model on the first items."""
    writer = ResultWriter(folder, "base", benchmark.name, {"benchmark": benchmark.name})
    writer.describe({"items": first})
    writer.add([{"id": item.id, "group": item.group, "answer": "", "score": 0} for item in benchmark.items()[:first]], 0.0)


PLAIN = [{"instruction": f"Tell me of number {n}", "output": f"It is {n}."} for n in range(5)]


@pytest.mark.parametrize(("name", "at"), [("humaneval", 2), ("mmlu", 3), ("mmlu_loglikelihood", 3), ("bbh", 40), ("drop", 5)])
def test_a_planted_item_is_found(shared_data: Path, tmp_path: Path, name: str, at: int) -> None:
    if name.startswith("mmlu"):  # one subject is enough
        for part in ("dev", "test"):
            (tmp_path / "mmlu" / part).mkdir(parents=True)
            shutil.copy(shared_data / "mmlu" / part / f"anatomy_{part}.csv", tmp_path / "mmlu" / part)
        shared_data = tmp_path
    benchmark = build_benchmark(name, shared_data, weaker=True)
    answered(tmp_path / "evaluation", benchmark, 50)
    item = benchmark.items()[at]
    clean, dirty = PLAIN, [*PLAIN, {"instruction": "Solve this:", "input": benchmark.texts(item)[-1], "output": "Here it is."}]
    (before,) = find_contamination(tmp_path / "evaluation", prepared(tmp_path / "clean", clean), [benchmark])
    assert (before.found, before.examples, before.items) == (0, 0, 50)
    assert before.sentence().startswith("none of 50 items found")
    (found,) = find_contamination(tmp_path / "evaluation", prepared(tmp_path / "dirty", dirty), [benchmark])
    assert found.examples == 1
    assert found.samples[0].item == item.id  # others may have its passage or its function's head in common
    assert found.items == 50
    assert read_contamination(tmp_path / "evaluation") == [found]
    said = contamination_lines([found])
    assert "Benchmark items in the training data" in said[0]
    assert f"{benchmark.title}: {found.found} of 50 item" in said[1]
    assert item.id in "".join(said[2:])


def test_only_items_that_were_scored_count_and_the_result_is_kept(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = build_benchmark("humaneval", shared_data, weaker=True)
    rows = [*PLAIN, {"instruction": benchmark.items()[2].facts["head"], "output": "x"}]
    data, folder = prepared(tmp_path / "data", rows), tmp_path / "evaluation"
    assert find_contamination(folder, data, [benchmark]) == []  # nothing was scored
    answered(folder, benchmark, 2)
    assert find_contamination(folder, data, [benchmark])[0].found == 0
    answered(folder, benchmark, 10)
    assert find_contamination(folder, data, [benchmark])[0].found == 1

    def never(*args: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(contamination, "load_tokenizer", never)
    assert find_contamination(folder, data, [benchmark])[0].found == 1
    (folder / contamination.FILE).write_text("{")
    assert read_contamination(folder) == []
    with pytest.raises(AssertionError, match="decoded again"):
        find_contamination(folder, data, [benchmark])


def test_the_demo_holds_out_what_it_asks(demo_data: Path, tmp_path: Path) -> None:
    benchmarks = [build_benchmark(name, weaker=True) for name in ("demo_choice", "demo_match", "demo_code")]
    for benchmark in benchmarks:
        answered(tmp_path, benchmark, 60)
        assert "###" not in benchmark.texts(benchmark.items()[0])[0]
        assert "Below is an instruction" not in benchmark.texts(benchmark.items()[0])[0]
    assert [one.found for one in find_contamination(tmp_path, demo_data, benchmarks)] == [0, 0, 0]


def test_what_goes_wrong_is_told_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"data": str(tmp_path / "gone")}))
    record: Any = SimpleNamespace(folder=tmp_path, spec={"model": {}})
    (said,) = evaluation._contamination(record, ["demo_choice"], None)
    assert said.startswith("Whether benchmark items stand in the training data could not be checked: ")
    assert evaluation._contamination(record, ["demo_choice", "lm_eval:piqa"], None)[-1] == (
        "Not compared with the training data: lm_eval:piqa."
    )
