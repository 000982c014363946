"""A study in Python and in a notebook: as a table, a line, HTML; a report by the folder's name."""

import json
from pathlib import Path
from xml.etree import ElementTree

from report_studies import Point, spec_of, spread, write_study

import loratune


def test_a_study_as_a_table_a_line_and_html(tmp_path: Path) -> None:
    odd = Point({"lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "learning_rate": 1e-4}, float("inf"))
    record = write_study(tmp_path / "s", [*spread(14), odd], spec_of(name="a<b"))
    table = record.to_dataframe()
    best = record.best
    assert best is not None
    assert list(table.columns[:6]) == ["trial", "state", "lora_r", "lora_alpha", "lora_dropout", "learning_rate"]
    assert (len(table), int(table.validation_loss.idxmin())) == (15, best.number)
    assert repr(record) == f"<study a<b: 15 trials; best trial {best.number}, validation loss {best.value:.4f}>"
    page = ElementTree.fromstring(f"<p>{record._repr_html_()}</p>")  # well-formed
    said = "".join(page.itertext())
    assert f"lowest loss: trial {best.number}, validation loss {best.value:.4f}" in said
    assert "the default 1.1672, the untuned model 1.9" in said
    assert len(page.findall(".//tr")) == 11
    assert [circle.find("title").text for circle in page.iter("circle") if circle.get("fill") == "currentColor"] == [  # type: ignore[union-attr]
        f"trial {best.number}: {best.value:.4f}"
    ]
    record.paths.selection.write_text(json.dumps({"chosen": 3, "finished": len(record.finished), "shipped": {"run": "main"}}))
    assert "ship trial 3 (chosen by <code>loratune select</code>)" in record._repr_html_()


def test_a_study_without_a_result_says_so(tmp_path: Path) -> None:
    assert "none was trained to its end yet" in write_study(tmp_path / "s", [], spec_of())._repr_html_()


def test_a_report_is_written_by_the_folders_name(tmp_path: Path) -> None:
    write_study(tmp_path / "study", spread(3), spec_of())
    assert loratune.write_report(str(tmp_path / "study"), str(tmp_path / "report.html")).is_file()


def test_the_package_is_typed_and_lists_its_samplers() -> None:
    assert (Path(loratune.__file__).parent / "py.typed").is_file()
    assert {"NomadSampler", "BracketSampler", "NniTpeSampler"} <= set(dir(loratune.samplers))
