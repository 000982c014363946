"""The numbers behind the report, and the small things they are made of."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from report_studies import RANKS, Point

from loratune import demo
from loratune.data.prepare import prepare
from loratune.data.sources import DataRecipe, DataSource
from loratune.record import DIVERGED, FAILED, PAUSED, StudyRecord
from loratune.report import tables
from loratune.report.axes import ABSENT, axis_of
from loratune.report.drawing import SHADES, Scale
from loratune.report.importance import importance_of
from loratune.report.spec_summary import command, sources, spec_rows
from loratune.spec.parameters import KINDS
from loratune.system.formatting import count, duration, in_order, show, signed

Study = Callable[..., StudyRecord]
PARAMS = {"lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "learning_rate": 1e-5}


def at(value: float | None, state: str = "complete", **params: float) -> Point:
    return Point(params=PARAMS | params, value=value, state=state)


def test_answer(study: Study) -> None:
    found = tables.headline(study([at(1.2), at(1.0, lora_r=512), at(1.0015), at(1.5), at(0.5, PAUSED), at(3.0, DIVERGED), at(math.nan)]))
    assert found.best is not None
    assert found.best.number == 1
    assert found.default_loss == 1.2
    assert found.base == 1.9
    assert found.gain == pytest.approx(0.2)
    assert found.perplexity_ratio == pytest.approx(math.exp(-0.2))
    assert (found.finished, found.near, found.better) == (4, 2, 2)
    assert found.edges == ("rank 512 (highest allowed)",)


def test_answer_without_a_default(study: Study) -> None:
    found = tables.headline(study([at(1.2), at(1.0)], sampler={"defaults_first": False}))
    assert found.default is None
    assert found.gain is None
    assert found.perplexity_ratio is None


def test_dropout_zero_is_no_edge(study: Study) -> None:
    assert tables.headline(study([at(1.0, lora_dropout=0.0)])).edges == ()
    assert tables.headline(study([at(1.0, learning_rate=1e-6)], name="b")).edges == ("learning rate 1e-6 (lowest allowed)",)


def test_cost(study: Study) -> None:
    record = study([at(1.2), at(1.0), at(None, FAILED)])
    assert tables.states(record) == {"complete": 2, "failed": 1}
    assert record.tokens == 2_000_000
    assert record.device_seconds == 480.0  # two runs of 120 s on two devices
    assert record.wall_seconds == 3600.0


def test_ranked_and_best_so_far(study: Study) -> None:
    record = study([at(None, FAILED), at(1.3), at(1.5), at(1.1), at(0.2, PAUSED), at(1.1)])
    top, others = tables.ranked(record, first=2)
    assert [t.number for t in top] == [3, 5]
    assert [t.number for t in others] == [0, 1, 2, 4]
    assert tables.running_best(record) == [math.inf, 1.3, 1.3, 1.1, 1.1, 1.1]


def test_studies_that_do_not_compare(study: Study) -> None:
    one, model, data = study([], name="a"), study([], name="b", model={"name_or_path": "x"}), study([], name="c", data={"train": []})
    assert tables.incomparable_sections([one, one]) == []
    assert tables.incomparable_sections([one, model, data]) == ["model", "data"]
    assert tables.incomparable_sections([replace(one, manifest={"hash": "1"}), replace(one, manifest={"hash": "2"})]) == ["data"]


def test_importance_finds_what_matters(study: Study) -> None:
    rng = random.Random(0)
    points = []
    for _ in range(60):
        exponent = rng.uniform(-6, -3)
        points.append(at(1 + 0.1 * (exponent + 3.5) ** 2, learning_rate=10**exponent, lora_r=rng.choice(RANKS)))
    found = importance_of(study(points))
    assert found is not None
    assert next(iter(found.shares)) == "learning_rate"
    assert found.shares["learning_rate"] > 0.6
    assert sum(found.shares.values()) == pytest.approx(1)
    assert (found.trials, found.quantile, found.few) == (60, 0.1, False)


def test_importance_of_few_or_equal_trials(study: Study) -> None:
    assert importance_of(study([at(1.0 + k, lora_r=RANKS[k]) for k in range(7)])) is None
    assert importance_of(study([at(1.0, lora_r=RANKS[k]) for k in range(8)], name="b")) is None
    rough = importance_of(study([at(1.0 + k, lora_r=RANKS[k]) for k in range(8)], name="c"))
    assert rough is not None
    assert rough.few


def test_command(study: Study) -> None:
    record = study([])
    assert command(record) == "loratune run 'my spec.yaml'"
    assert command(replace(record, sessions=())) == f"loratune run {record.folder / 'spec.yaml'}"


def test_asked(study: Study) -> None:
    told = dict(spec_rows(study([], budget={"max_hours": 2.5}, schedule={"name": "halving", "reduction_factor": 3})))
    assert told["Training data"] == "alpaca.json; dolly.jsonl (900 examples)"
    assert told["Validation data"] == "20 % of the training sources, held out"
    assert told["Budget"] == "100 trials or 2.5 hours"
    assert told["Schedule"] == "halving: reduction factor 3"


@pytest.mark.parametrize(
    ("kind", "fields", "places"),
    [
        ("float", {"low": 1e-6, "high": 1e-2, "log": True}, {1e-6: 0, 1e-4: 0.5, 1e-2: 1, None: ABSENT}),
        ("float", {"low": 0.0, "high": 2.0}, {0.0: 0, 0.5: 0.25, 2: 1, "x": ABSENT}),
        ("float", {"low": 2.0, "high": 2.0}, {2.0: 0.5}),
        ("int", {"low": 2, "high": 512, "log": True}, {2: 0, 32: 0.5, 512: 1}),
        ("ordinal", {"values": [0.0, 0.1]}, {0.0: 0.25, 0.1: 0.75, 0.3: ABSENT}),
        ("categorical", {"choices": ["qv", "all-linear"]}, {"qv": 0.25, "all-linear": 0.75}),
    ],
)
def test_axis(kind: str, fields: dict[str, object], places: dict[object, float]) -> None:
    name = "target_modules" if kind == "categorical" else "lora_r" if kind == "int" else "weight_decay"
    default = next(iter(places))
    axis = axis_of(name, KINDS[kind].model_validate({"name": name, "type": kind, "default": default, **fields}))  # type: ignore[arg-type]
    for value, place in places.items():
        assert axis.place(value) == pytest.approx(place)
    heights = [place for place, _ in axis.ticks()]
    assert heights == sorted(heights)
    assert len(heights) == len({text for _, text in axis.ticks()})
    assert all(0 <= place <= 1 for place in heights)


def test_axis_ticks() -> None:
    rank = KINDS["int"].model_validate({"name": "lora_r", "low": 2, "high": 512, "log": True, "default": 8})
    assert [text for _, text in axis_of("lora_r", rank).ticks()] == ["2", "4", "8", "16", "32", "64", "128", "256", "512"]  # type: ignore[arg-type]
    alpha = KINDS["int"].model_validate({"name": "lora_alpha", "low": 1, "high": 64, "default": 32})
    assert [text for _, text in axis_of("lora_alpha", alpha).ticks()] == ["1", "20", "40", "64"]  # type: ignore[arg-type]


def test_scale_tells_the_good_apart_beside_the_very_bad() -> None:
    losses = [1.0 + 0.001 * k for k in range(40)] + [50.0]
    scale = Scale.of(losses)
    assert scale.low == 1.0
    assert 1.039 <= scale.high < 1.1
    assert scale.beyond(losses) == 1
    assert scale.shade(1.0) == SHADES[0]
    assert scale.shade(50.0) == SHADES[-1]
    assert all(scale.place(a) < scale.place(b) for a, b in pairwise(losses[:40]))
    assert Scale.of([1.0]).place(1.0) == 0
    assert Scale.of([1.1161, 1.1168, 1.1279, 1.2840]).high == 1.2840, "of so few the default is one to be seen"


def test_words() -> None:
    assert [show(v) for v in (4.794e-4, 1e-5, 1e-6, 0.001, 0.1, 2.0, 1 / 3, True, None, ("q", "v"), 0.0)] == [
        *("4.794e-4", "1e-5", "1e-6", "0.001", "0.1", "2", "0.3333", "yes", "–", "q, v", "0"),
    ]
    assert [duration(s) for s in (5, 99.6, 240, 7260, 200_000)] == ["5 s", "2 min", "4 min", "2 h 1 min", "2 d 7 h"]
    assert [count(n) for n in (0, 999, 1500, 2_340_000, 7.7e9)] == ["0", "999", "1.5 k", "2.34 M", "7.7 G"]
    assert (signed(-0.2065), signed(0.1), signed(None)) == ("−0.2065", "+0.1000", "–")
    assert in_order({"zeta", "learning_rate", "lora_r"}) == ["lora_r", "learning_rate", "zeta"]


def test_duplicates_are_the_number_that_the_summary_says(tmp_path: Path) -> None:
    """Rows of one source that stand in another count once, where they come later."""
    for name, letters in (("a", "abcda"), ("b", "abxyz")):
        rows = [{"instruction": f"what is {letter}", "output": name} for letter in letters]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    recipe = DataRecipe(train=tuple(DataSource(path=str(tmp_path / f"{name}.json")) for name in "ab"), validation_fraction=0.3)
    prepared = prepare(recipe, tokenizer=str(demo.model_folder()), cache=tmp_path / "cache")
    record: Any = SimpleNamespace(manifest=prepared.manifest.to_plain())
    head, rows = sources(record)
    at = head.index("duplicates")
    assert [row[at] for row in rows] == ["1", "2", "3"]
    assert rows[-1][:2] == ["all", "10"]
    assert "3 rows that repeat an earlier row's question" in prepared.summary()
