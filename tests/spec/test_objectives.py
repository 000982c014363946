"""Objectives and constraints: what may be written, and one line for every mistake."""

import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from loratune.errors import SpecError
from loratune.plugs import BENCHMARKS, METRICS
from loratune.spec import StudySpec, differences
from loratune.spec.limits import Constraint, parse

MINIMAL: dict[str, Any] = {"model": "models/tiny", "data": {"train": "alpaca.json", "validation_fraction": 0.1}}
NAMES = ", ".join(METRICS.names)


def spec_of(**fields: Any) -> StudySpec:
    return StudySpec.load(base={**MINIMAL, **fields})


def test_short_forms() -> None:
    assert [(o.name, o.direction) for o in spec_of().objectives] == [("validation_loss", "minimize")]
    assert spec_of().limits == ()
    assert spec_of(objectives="validation_loss") == spec_of(objectives={"name": "validation_loss"}) == spec_of()
    spec = spec_of(objectives=["validation_loss", {"name": "tokens", "direction": "maximize"}], constraints=" adapter_mb<=5e1")
    assert [(o.name, o.direction) for o in spec.objectives][1] == ("tokens", "maximize")
    assert spec.constraints == ("adapter_mb <= 50",)
    assert spec.limits == (Constraint("adapter_mb", "<=", 50.0),)
    flags = [("objectives", "[validation_loss, adapter_mb]"), ("constraints", "[peak_memory_gib < 24, adapter_mb <= 2]")]
    spec = StudySpec.load(overrides=flags, base=MINIMAL)
    assert [o.name for o in spec.objectives] == ["validation_loss", "adapter_mb"]
    assert spec.constraints == ("peak_memory_gib < 24", "adapter_mb <= 2")


def test_what_is_written_is_read_back_and_fits_the_schema(tmp_path: Path) -> None:
    spec = spec_of(objectives=["validation_loss", {"name": "tokens", "direction": "maximize"}], constraints=["adapter_mb <= 0.1"])
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    assert StudySpec.load(tmp_path / "spec.yaml") == spec
    for written in (yaml.safe_load(spec.to_yaml()), {**MINIMAL, "objectives": "validation_loss", "constraints": "tokens < 9"}):
        jsonschema.validate(written, StudySpec.json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**MINIMAL, "objectives": ["adaptor_mb"]}, StudySpec.json_schema())


def test_scores() -> None:
    spec = spec_of(objectives=["validation_loss", "mmlu"], constraints=["bbh >= 0.3", "mmlu > 0"], scoring={"subset": 50})
    assert [(o.name, o.direction) for o in spec.objectives][1] == ("mmlu", "maximize")
    assert spec.scores == ("mmlu", "bbh")
    assert spec.scoring.items == 50
    assert spec_of().scores == ()
    assert StudySpec.load(base=yaml.safe_load(spec.to_yaml())) == spec
    jsonschema.validate(yaml.safe_load(spec.to_yaml()), StudySpec.json_schema())
    assert spec_of(objectives=["validation_loss", "humaneval"], scoring={"allow_code_execution": True}).scores == ("humaneval",)


def test_what_is_declared_of_a_benchmark_is_true_of_its_class() -> None:
    assert set(BENCHMARKS.builtin) <= set(METRICS.names)
    for name in BENCHMARKS.builtin:
        kind = BENCHMARKS.factory(name)
        assert (kind.name, kind.runs_code) == (name, BENCHMARKS[name].runs_code)


def test_they_cannot_change_while_a_study_runs() -> None:
    old, new = spec_of(sampler="nomad"), spec_of(objectives=["validation_loss", "tokens"], constraints=["tokens < 5"])
    assert {line.partition(":")[0] for line in differences(old, new)} == {"objectives", "constraints"}
    asked = {"items": 50, "data": "d", "allow_code_execution": True, "weaker_sandbox": True}
    assert {line.partition(":")[0] for line in differences(old, spec_of(sampler="nomad", scoring=asked))} == {
        "scoring.items",
        "scoring.data",
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"objectives": ["adapter_mb"]},
            "objectives: got adapter_mb; validation_loss must be the first of them, or stand aside for a metric of your own",
        ),
        ({"objectives": []}, "objectives: got []; needed: at least 1 of them"),
        ({"objectives": 5}, "objectives: got 5; needed: a list"),
        ({"objectives": ["validation_loss"] * 2}, "objectives: got validation_loss, validation_loss; each may stand once"),
        (
            {"objectives": ["validation_loss", "adaptor_mb"]},
            f"objectives.1: got 'adaptor_mb'; allowed: {NAMES}; did you mean 'adapter_mb'?",
        ),
        (
            {"objectives": ["validation_loss", {"name": "token"}]},
            f"objectives.1.name: got 'token'; allowed: {NAMES}; did you mean 'tokens'?",
        ),
        ({"objectives": {"name": "validation_loss", "direction": "maximize"}}, "objectives.0.direction: validation_loss is minimised"),
        (
            {"objectives": ["validation_loss", "humaneval"]},
            "scoring.allow_code_execution: humaneval runs programs that the models write; write true to let them run in a sandbox, "
            "or leave it out",
        ),
        (
            {"constraints": "demo_code > 0", "scoring": {"allow_code_execution": False}},
            "scoring.allow_code_execution: demo_code runs programs that the models write; write true to let them run in a sandbox, "
            "or leave it out",
        ),
        (
            {"objectives": ["validation_loss", {"name": "mmlu", "direction": "minimize"}]},
            "objectives.1.direction: mmlu is a score, and maximised",
        ),
        (
            {"objectives": ["validation_loss", "lm_eval:arc_easy"]},
            "objectives.1: 'lm_eval:arc_easy': the items of such a task cannot be kept apart for the search; "
            f"allowed are {', '.join(BENCHMARKS.names)}",
        ),
        ({"objectives": ["validation_loss", "mmul"]}, f"objectives.1: got 'mmul'; allowed: {NAMES}; did you mean 'mmlu'?"),
        (
            {"objectives": "mmlu"},
            "objectives: got mmlu; validation_loss must be the first of them, or stand aside for a metric of your own",
        ),
        (
            {"objectives": ["exactmatch"]},
            f"objectives.0: got 'exactmatch'; allowed: {NAMES}; "
            "a metric of your own is named by metrics: [my_module:exactmatch] (--metrics)",
        ),
        (
            {"objectives": [{"name": "exact match"}], "constraints": "exactmatch > 0.5"},
            f"objectives.0.name: got 'exact match'; allowed: {NAMES}; "
            "a metric of your own is named by metrics: [my_module:function] (--metrics)\n"
            f"constraints.0: unknown metric 'exactmatch'; allowed: {NAMES}; "
            "a metric of your own is named by metrics: [my_module:exactmatch] (--metrics)",
        ),
        ({"constraints": "mmlu >= 30"}, "constraints.0: mmlu >= 30: a score is a share, from 0 to 1"),
        ({"scoring": {"items": 0}}, "scoring.items: got 0; needed: a number >= 1"),
        (
            {"constraints": ["seconds <= 4", "adapter_mb == 3", 5, "tokens < 2k", "adapter_mb < inf", "small"]},
            f"constraints.0: unknown metric 'seconds'; allowed: {NAMES}; did you mean 'train_seconds'?\n"
            "constraints.1: '==' is not a comparison; allowed: <=, >=, <, >\n"
            "constraints.2: got 5; needed: text like 'adapter_mb <= 50'\n"
            "constraints.3: '2k' is not a number; write it in the unit of tokens, without the unit\n"
            "constraints.4: the bound must be finite, got inf\n"
            "constraints.5: got 'small'; needed: a metric, a comparison and a number, like 'adapter_mb <= 50'",
        ),
        ({"constraints": 5}, "constraints: got 5; needed: a list"),
        (
            {"objectives": ["validation_loss", "tokens"], "sampler": "cmaes"},
            "sampler.name: got 'cmaes', which takes one objective, not 2; these take several: nomad, tpe, gp, qmc, random, nsga2",
        ),
        (
            {"objectives": ["validation_loss", "tokens"], "sampler": "nni_tpe"},
            "sampler.name: got 'nni_tpe', which takes one objective, not 2; these take several: nomad, tpe, gp, qmc, random, nsga2",
        ),
        (
            {"constraints": "tokens < 5", "sampler": "cmaes"},
            "sampler.name: got 'cmaes', which ignores constraints; "
            "these respect them: bracket, nomad, nni_tpe, tpe, gp, qmc, random, nsga2",
        ),
    ],
)
def test_mistakes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec_of(**fields)
    assert str(caught.value) == message


def test_all_mistakes_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        spec_of(objectives=["validation_loss", "x"], constraints=["y < 1"], seed=-1)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["seed", "objectives.1", "constraints.0"]


@pytest.mark.parametrize(
    ("text", "value", "excess"),
    [
        ("tokens <= 50", 75, 0.5),
        ("tokens <= 50", 50, 0.0),
        ("tokens < 50", 50, 1e-12),
        ("tokens >= 50", 75, -0.5),
        ("tokens > 50", 25, 0.5),
        ("tokens <= 0", 2, 2.0),
        ("tokens <= 50", math.nan, math.inf),
    ],
)
def test_excess_is_above_zero_exactly_where_it_does_not_hold(text: str, value: float, excess: float) -> None:
    limit = parse(text, METRICS.names)
    assert limit.excess(value) == pytest.approx(excess)
    assert (limit.excess(value) > 0) == (not limit.holds(value))
