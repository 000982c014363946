"""The page: its numbers are the records', it opens offline, everyone can read it, whatever became of the study."""

import ast
import base64
import hashlib
import html
import json
import math
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from report_page import Page
from report_studies import DEFAULT, Point, published, spec_of, spread, write_study

from loratune.errors import StorageError
from loratune.record import COMPLETE, DIVERGED, FAILED, INFEASIBLE, PAUSED, PRUNED, RUNNING, StudyRecord, read
from loratune.report import write_report

Study = Callable[..., StudyRecord]


def page_of(*records: StudyRecord, folder: Path) -> Page:
    return Page(write_report(records, folder / "out" / "report.html"))


def test_the_numbers_are_the_records(study: Study, shared_data: Path, tmp_path: Path) -> None:
    points = [Point(params=DEFAULT, value=1.1672), *published(shared_data, "nomad")]
    points[5] = Point(params=points[5].params, value=2.5, state=DIVERGED, message="loss became NaN at step 120")
    page = page_of(study(points, name="nomad"), folder=tmp_path)
    assert page.row("Base model")[:3] == ["1.9000", f"{math.exp(1.9):.3f}", "+0.7328"]
    assert page.row("Default") == ["1.1672", f"{math.exp(1.1672):.3f}", "+0.0000", "1.000"]
    assert page.row("Best") == ["0.9607", f"{math.exp(0.960693):.3f}", "−0.2065", f"{math.exp(0.960693 - 1.1672):.3f}"]
    assert "perplexity 18.7 % lower" in page.text
    assert page.row("lora_r") == ["512", "8"]
    assert page.row("learning_rate") == ["4.794e-4", "1e-5"]
    assert "rank 512 (highest allowed)" in page.text
    assert "alpha 64 (highest allowed)" in page.text
    assert "100 complete, 1 diverged." in page.text
    assert "loss became NaN at step 120" in page.row("5")[0]
    trials = [row for row in page.rows if row and row[0].isdigit() and len(row) == 9]
    assert len(trials) == 101
    losses = [float(row[2]) for row in trials[:10]]
    assert losses == sorted(losses) == [round(v, 4) for v in sorted(p.value for p in points if p.state == COMPLETE and p.value)[:10]]
    assert "loratune run 'my spec.yaml'" in page.text
    assert "NVIDIA A100-SXM4-80GB" in page.text
    assert "node-17" not in page.text  # a report is passed on


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study with learning curves: all five figures."""
    folder = tmp_path_factory.mktemp("single")
    points = spread(12)
    for point in points:
        point.runs = (("main", (1.5, 1.3, point.value or 0.0)),)
    return write_report([write_study(folder / "study", points, spec_of())], folder / "out" / "report.html")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison of two studies without learning curves, one too short for importances."""
    folder = tmp_path_factory.mktemp("pair")
    records = [write_study(folder / name, spread(n, seed=n), spec_of(name)) for name, n in (("a", 9), ("b", 5))]
    return write_report(records, folder / "out" / "comparison.html")


@pytest.fixture(params=["single", "pair"])
def page(request: pytest.FixtureRequest) -> Page:
    return Page(request.getfixturevalue(request.param))


def test_it_loads_nothing_and_runs_its_own_script_alone(page: Page) -> None:
    assert page.named("script") == [{}]  # inline
    script = page.source.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(str(meta["content"]) for meta in page.named("meta") if "http-equiv" in meta)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not {"link", "img", "iframe", "object", "embed", "audio", "video", "base"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "srcset", "href", "xlink:href", "data", "poster"):
                assert tag == "a" or str(value).startswith("#"), (tag, name, value)
            assert not name.startswith("on")
    assert "@import" not in page.source
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page.source))


def test_figures_have_words_and_unique_ids(single: Path, pair: Path) -> None:
    for path, figures in ((single, 5), (pair, 2 + 4 + 3)):
        page = Page(path)
        svgs = page.named("svg")
        assert len(svgs) == len(page.named("figcaption")) == figures
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        for svg in svgs:
            assert svg["role"] == "img"
            assert all(part in ids for part in str(svg["aria-labelledby"]).split())
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page.source)) <= set(ids)
        texts = re.findall(r"<(?:title|desc) id=[^>]*>([^<]*)<", page.source)
        assert len(texts) == 2 * len(svgs)
        assert all(text.strip() for text in texts)


def test_the_figures_for_a_paper_lie_beside_it(single: Path) -> None:
    names = ("history", "parallel-coordinates", "learning-curves", "importance", "slices")
    folder = single.parent / "figures"
    assert {path.name for path in folder.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("svg", "pdf")}
    assert (folder / "history.pdf").read_bytes().startswith(b"%PDF")
    assert "var(--" not in (folder / "history.svg").read_text()


def marked(source: str) -> dict[str, list[tuple[str, list[int]]]]:
    """Figure -> (what its rows' ids begin with, the trials in the order drawn) of each group of marks."""
    found = {}
    for key, figure in re.findall(r'<figure id="([^"]+)">(.*?)</figure>', source, re.DOTALL):
        groups = re.split(r'data-study="([^"]*)"', figure)[1:]
        told = [(study, re.findall(r'data-trial="(\d+)"', its)) for study, its in zip(groups[::2], groups[1::2], strict=True)]
        found[key] = [(study, [int(number) for number in numbers]) for study, numbers in told]
    return found


def test_each_mark_knows_its_trial(study: Study, tmp_path: Path, pair: Path) -> None:
    points = spread(9)
    points[3] = Point(params=points[3].params, value=None, state=DIVERGED, message="NaN")
    points[5] = Point(params=points[5].params, value=1.4, state=PAUSED, runs=(("budget-1-3", (1.4,)),))
    for k in (0, 1, 2, 4, 6, 7, 8):
        points[k].runs = (("main", (1.5, points[k].value or 0.0)),)
    page = page_of(study(points), folder=tmp_path)
    trained = [0, 1, 2, 4, 6, 7, 8]
    told = marked(page.source)
    assert told["figure-history"] == [("", [5]), ("", [3]), ("", trained)]
    assert told["figure-slices"] == [("", trained)] * 4
    assert [(study, sorted(order)) for study, order in told["figure-learning-curves"]] == [("", sorted([*trained, 5]))]
    assert [(study, sorted(order)) for study, order in told["figure-parallel-coordinates"]] == [("", trained)]
    rows = {str(row.get("id")) for row in page.named("tr")}
    assert {f"trial-{number}" for number in range(9)} <= rows
    # The higher a mark stands, the higher its trial's loss.
    history = page.source.partition('<figure id="figure-history">')[2].partition("</figure>")[0]
    heights = {int(number): -float(y) for number, y in re.findall(r'<use data-trial="(\d+)"[^>]* y="([\d.]+)"', history)}
    rising = [heights[number] for number in sorted(trained, key=lambda number: points[number].value or 0)]
    assert rising == sorted(rising)
    several = marked(pair.read_text())
    assert [(study, sorted(order)) for study, order in several["figure-parallel-coordinates"]] == [
        ("1-a-", list(range(9))),
        ("2-b-", list(range(5))),
    ]
    assert 'id="2-b-trial-4"' in pair.read_text()


def test_axes_say_what_their_ends_are(single: Path) -> None:
    source = single.read_text()
    panels = [json.loads(html.unescape(told)) for told in re.findall(r'data-panel="([^"]+)"', source)]
    assert len(panels) == 1 + 1 + 4  # the search, the learning curves, four hyperparameters; parallel coordinates have no scales
    history, curves, rank, alpha, dropout, rate = panels
    assert history["x"]["whole"]
    assert history["y"]["low"] < min(p.value or 0 for p in spread(12)) < history["y"]["high"]
    assert curves["x"] == {"low": 0, "high": 1.02 * 1e6, "log": False, "large": True}
    assert [text for _, text in rank["x"]["named"]] == ["4", "8", "16", "32", "64", "128", "256", "512"]
    assert "low" not in rank["x"]
    assert (alpha["x"]["whole"], alpha["x"]["log"], dropout["x"]["named"][0][1]) == (True, False, "0")
    assert rate["x"]["low"] < 1e-6 < 1e-3 < rate["x"]["high"] < 1.5e-3
    for panel in panels:
        left, top, right, bottom = panel["box"]
        assert 0 < left < right < 375
        assert 0 <= top < bottom


def test_the_same_record_gives_the_same_bytes(single: Path, tmp_path: Path) -> None:
    again = write_report([read(single.parent.parent / "study")], tmp_path / "report.html")
    assert again.read_bytes() == single.read_bytes()
    for figure in (single.parent / "figures").iterdir():
        assert (tmp_path / "figures" / figure.name).read_bytes() == figure.read_bytes()


def test_headings_are_in_order_and_tables_are_labelled(page: Page) -> None:
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(cell.get("scope") in ("col", "row", "rowgroup") for cell in page.named("th"))


def test_foreign_text_is_escaped(study: Study, tmp_path: Path) -> None:
    name = '<script>alert("x")</script> & $\\alpha_$ ünïcödé 模型'
    points = spread(4)
    points[3] = Point(params=points[3].params, value=None, state=FAILED, message="<b>boom</b> & worse")
    first = study(points, name=name, folder="one", model={"name_or_path": '<img src="x">'})
    page = page_of(first, study(spread(2), name="_other", folder="two", model={"name_or_path": '<img src="x">'}), folder=tmp_path)
    assert page.source.count("<script") == 1  # ours
    assert "<script>alert" not in page.source
    assert not page.named("img")
    assert not page.named("b")
    assert (2, name) in page.headings
    assert "<b>boom</b> & worse" in page.text


PRUNED_RUNS = (("budget-1-9", (1.4,)), ("budget-1-3", (1.2,)))
DEGENERATE: dict[str, list[Point]] = {
    "no trials": [],
    "one trial running": [Point(params=DEFAULT, value=None, state=RUNNING)],
    "one finished": spread(1),
    "two finished": spread(2),
    "two alike": [Point(params=DEFAULT, value=1.0), Point(params=DEFAULT, value=1.0)],
    "all failed": [Point(params=p.params, value=None, state=FAILED, message="out of luck") for p in spread(4)],
    "default failed": [Point(params=DEFAULT, value=None, state=FAILED), *spread(9)[1:]],
    "inf and nan": [*spread(9), Point(params=DEFAULT, value=math.inf), Point(params=DEFAULT, value=math.nan)],
    "inf alone": [Point(params=DEFAULT, value=math.inf)],
    "one huge": [*spread(9), Point(params=DEFAULT, value=1e9, state=DIVERGED), Point(params=DEFAULT, value=1e9)],
    "paused and pruned": [
        *spread(2),
        Point(params=DEFAULT, value=1.2, state=PAUSED, runs=PRUNED_RUNS),
        Point(params=DEFAULT, value=1.2, state=PRUNED, runs=PRUNED_RUNS),
        Point(params=DEFAULT, value=2.0, state=INFEASIBLE),
    ],
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_whatever_became_of_the_study(study: Study, tmp_path: Path, case: str) -> None:
    points = DEGENERATE[case]
    page = page_of(study(points, base=None if case == "one finished" else 1.9), folder=tmp_path)
    finished = [p.value for p in points if p.state == COMPLETE and p.value is not None and math.isfinite(p.value)]
    if finished:
        assert page.row("Best")[0] == f"{min(finished):.4f}"
        assert page.named("svg")
    else:
        assert "No trial has been trained to the end" in page.text
        assert not page.named("svg")
    if case == "default failed":
        assert "how much tuning gained is not known" in page.text
        assert page.row("Default")[0] == "–"
    for number in range(len(points)):
        assert page.row(str(number))[0].startswith(points[number].state)
    assert not re.search(r"\bnan\b|Traceback|None", re.sub(r"<svg.*?</svg>", "", page.source, flags=re.S).replace(">nan<", ""))


def test_the_default_may_be_the_best(study: Study, tmp_path: Path) -> None:
    page = page_of(study([Point(params=DEFAULT, value=1.0), Point(params=DEFAULT, value=1.1)]), folder=tmp_path)
    assert "No configuration beat the default" in page.text


def test_conditional_and_categorical_hyperparameters(study: Study, tmp_path: Path) -> None:
    space = {
        "lora_r": {"type": "int", "low": 2, "high": 512, "log": True, "default": 8},
        "alpha_ratio": {"type": "float", "low": 0.125, "high": 16.0, "log": True, "default": 4.0},
        "target_modules": {"type": "categorical", "choices": ["qv", "qkvo", "all-linear"], "default": "qv"},
        "use_rslora": {"type": "categorical", "choices": [False, True], "default": False},
        "lora_dropout": {"type": "ordinal", "values": [0.0, 0.1], "default": 0.1, "when": {"use_rslora": [True]}},
        "weight_decay": {"type": "fixed", "value": 0.01},
    }
    rng = random.Random(1)
    points = []
    for k in range(16):
        rank = rng.randint(2, 512)
        params = {"lora_r": rank, "alpha_ratio": 2.0, "target_modules": ("qv", "qkvo", "all-linear")[k % 3]}
        params |= {"use_rslora": True, "lora_dropout": 0.1} if k % 2 else {"use_rslora": False}
        loss, alpha = 1.0 + 0.01 * (k % 3) + 1e-4 * k, 2.0 * rank
        points.append(Point(params={**params, "weight_decay": 0.01}, value=loss, hyperparameters={"lora_alpha": alpha}))
    page = page_of(study(points, search_space=space), folder=tmp_path)
    assert page.row("dropout") == ["0, 0.1; only when rsLoRA is yes", "0.1"]
    assert page.row("weight decay") == ["fixed", "0.01"]
    assert page.row("target_modules") == ["qv", "qv"]
    assert ">inactive<" in page.source  # a place on the dropout axis for trials that have none
    assert ">all-linear<" in page.source
    assert re.search(r"target modules \d+%", page.text)  # its importance


def test_data_counts_come_from_the_manifest(study: Study, tmp_path: Path) -> None:
    record = study(spread(1))
    size = {"examples": 53_610, "tokens": 7_700_000, "response_tokens": 3_100_000}
    source = {"path": "alpaca.json", "rows": 52_002, "train": 37_527, "validation": 9_381, "duplicates": 7, "cut": 11}
    manifest = {
        "train": size,
        "validation": {**size, "examples": 13_401},
        "sources": [{**source, "bad": 1, "dropped": 2, "overlapping": 3}],
    }
    full = StudyRecord(folder=record.folder, name=record.name, spec=record.spec, trials=record.trials, manifest=manifest)
    page = page_of(full, folder=tmp_path)
    assert page.row("alpaca.json") == ["52002", "37527", "9381", "7", "6", "11"]
    assert "53610 for training (7.7 M tokens, 3.1 M in responses); 13401 for validation" in page.text


def test_several_studies_side_by_side(study: Study, shared_data: Path, tmp_path: Path) -> None:
    points = published(shared_data, "nomad")[::-1][:30]
    values = [p.value for p in points if p.value]
    tpe = study(published(shared_data, "nni_tpe")[:7], name="tpe", sampler={"name": "nni_tpe"})
    page = page_of(study(points, name="nomad"), tpe, study(points[::-1], name="again"), folder=tmp_path)
    assert page.row("Best loss after")[1:] == ["5", "7", "10", "20", "30", "median of the first 7"]
    there, back = ([f"{min(order[:n]):.4f}" for n in (5, 7, 10, 20, 30)] for order in (values, values[::-1]))
    assert page.row("nomad") == ["nomad", *there, f"{sorted(values[:7])[3]:.4f}"]
    assert page.row("again")[1:6] == back
    assert page.row("median")[1] == f"{(min(values[:5]) + min(values[::-1][:5])) / 2:.4f} of 2"
    assert page.row("tpe")[3:6] == ["–", "–", "–"]
    assert "not comparable" not in page.text


def test_the_adapter_can_be_loaded_from_the_page(study: Study, tmp_path: Path) -> None:
    record = study(spread(1), folder='it\'s "here" & <there>')
    (record.folder / "adapter").mkdir()
    page = page_of(record, folder=tmp_path)
    line = next(line for line in "".join(page.texts).splitlines() if "from_pretrained" in line)
    assert ast.literal_eval(line.partition("from_pretrained")[2]) == str(record.folder / "adapter")


def test_five_hundred_trials_stay_small(study: Study, tmp_path: Path) -> None:
    points = spread(500)
    for point in points:
        point.runs = (("main", tuple(1.9 - (1.9 - (point.value or 0)) * k / 20 for k in range(1, 21))),)
    page = page_of(study(points), folder=tmp_path)
    assert len(page.source) < 5_000_000
    assert sum(1 for row in page.rows if row and row[0].isdigit() and len(row) == 9) == 500


def test_no_study_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="at least one study"):
        write_report([], tmp_path / "report.html")
