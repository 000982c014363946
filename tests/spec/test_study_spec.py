"""The study's description: what may be written, what it means, and one line for every mistake."""

import json
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.errors import SpecError
from loratune.spec import SearchSpace, StudySpec, allowed_change, differences, sections
from loratune.spec.commented import template
from loratune.spec.hyperparameters import ALIASES, NAMES
from loratune.spec.loading import ROOT_ALIASES, SECTION_ALIASES
from loratune.spec.sections import Training
from loratune.work import Hyperparameters, ModelRecipe, Recipe, TrainingRecipe

MINIMAL: dict[str, Any] = {"model": "models/tiny", "data": {"train": "alpaca.json", "validation_fraction": 0.1}}


def load(text: str, folder: Path, *overrides: tuple[str, str]) -> StudySpec:
    path = folder / "study.yaml"
    path.write_text(text)
    return StudySpec.load(path, overrides)


def minimal(**sections: Any) -> StudySpec:
    return StudySpec.load(base={**MINIMAL, **sections})


def mistakes(*overrides: tuple[str, str], **sections: Any) -> str:
    with pytest.raises(SpecError) as caught:
        StudySpec.load(overrides=overrides, base={**MINIMAL, **sections})
    return str(caught.value)


def test_defaults() -> None:
    spec = minimal()
    assert spec.name == "tiny-alpaca"
    assert spec.folder == Path("runs/tiny-alpaca")
    assert (spec.sampler.name, spec.schedule.name, spec.executor.name, spec.budget.full_runs) == ("bracket", "full", "local", 3.0)
    assert spec.search_space == minimal(search_space="recommended").search_space
    assert [(source.path, source.format) for source in spec.data.train] == [("alpaca.json", "auto")]


def test_recipe_and_hyperparameters_default_to_what_work_says() -> None:
    """Two lists of defaults, pydantic's and the dataclasses', which must never drift apart."""
    spec = minimal()
    assert spec.recipe("cache/x") == Recipe(model=ModelRecipe(name_or_path="models/tiny"), training=TrainingRecipe(), data="cache/x")
    assert spec.hyperparameters({}) == Hyperparameters()
    published = minimal(sampler="nomad")
    assert published.hyperparameters(published.search_space.default_values()) == Hyperparameters()


def test_recipe_carries_every_field() -> None:
    model = {
        "name_or_path": "m",
        "revision": "r",
        "dtype": "float64",
        "load_in_4bit": True,
        "attn_implementation": "sdpa",
        "trust_remote_code": True,
    }
    own = {
        "micro_batch_size": 2,
        "validation_batch_size": 3,
        "lr_scheduler_type": "linear",
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-6,
        "max_grad_norm": None,
        "gradient_checkpointing": True,
        "checkpoint_steps": 7,
        "tokens_per_pass": 99,
    }
    spec = minimal(seed=5, model=model, training={**own, "report_to": "wandb", "devices_per_trial": 2}, executor={"device": "cuda"})
    assert spec.recipe("d") == Recipe(
        model=ModelRecipe(**model),
        training=TrainingRecipe(seed=5, **own),
        data="d",
        engine="hf",  # what trains on several devices
        devices_per_trial=2,
        device="cuda",
    )
    assert Recipe.from_json(spec.recipe("d").to_json()) == spec.recipe("d")


def test_hyperparameters_join_constants_searched_and_derived_values() -> None:
    spec = minimal(training={"epochs": 3, "target_modules": ["q_proj", "o_proj"], "weight_decay": 0.01}, search_space="ratio")
    values = {"lora_r": 16, "alpha_ratio": 0.5, "lora_dropout": 0, "learning_rate": 1e-3, "epochs": 1}
    assert spec.hyperparameters(values) == Hyperparameters(
        lora_r=16, lora_alpha=8.0, lora_dropout=0.0, learning_rate=1e-3, epochs=1.0, weight_decay=0.01, target_modules=("q_proj", "o_proj")
    )
    assert spec.hyperparameters({"alpha_ratio": 2.0}).lora_alpha == 16.0  # times the published rank
    assert spec.hyperparameters({"lora_r": 64}).lora_alpha == 32.0


def test_data_recipe_is_what_finetune_reads() -> None:
    from loratune.data.sources import DataRecipe, DataSource

    spec = minimal(
        seed=3,
        data={
            "train": [
                {"path": "a.json", "weight": 1.0},
                {"path": "b", "format": "dolly", "weight": 2.0, "count": 5, "validation_count": 2},
            ],
            "train_count": 50,
            "validation_count": 9,
            "prompt": "chat",
            "max_length": 64,
            "on_bad_rows": "skip",
        },
    )
    assert DataRecipe.from_plain(spec.data_recipe_dict()) == DataRecipe(
        train=(DataSource(path="a.json", weight=1.0), DataSource(path="b", format="dolly", weight=2.0, count=5, validation_count=2)),
        train_count=50,
        validation_count=9,
        prompt="chat",
        max_length=64,
        on_bad_rows="skip",
        seed=3,
    )
    assert spec.data_recipe_dict().keys() == DataRecipe.__dataclass_fields__.keys()


@pytest.mark.parametrize(("alias", "field"), SECTION_ALIASES["training"].items())
def test_training_aliases(alias: str, field: str) -> None:
    values: dict[str, Any] = {"lr_scheduler_type": "linear", "target_modules": "mlp"}
    value = values.get(field, 1)
    if field in Training.model_fields:
        assert getattr(minimal(training={alias: value}).training, field) == value
    else:
        assert mistakes(training={alias: value}) == f"training.{field}: unknown field; write it as search_space.{field}"


def test_every_other_alias() -> None:
    tried = set()
    for alias, field in SECTION_ALIASES["data"].items():
        value: Any = 99 if field == "max_length" else 0.25
        spec = StudySpec.load(
            base={"model": "m", "data": {"train": "a", **({} if value == 0.25 else {"validation_count": 3}), alias: value}}
        )
        assert getattr(spec.data, field) == value
        tried.add(alias)
    for alias in SECTION_ALIASES["model"]:
        assert minimal(model={alias: "other"}).model.name_or_path == "other"
    for alias in ROOT_ALIASES:
        spec = StudySpec.load(
            base={"data": MINIMAL["data"], **({"model": "m"} if alias == "n_trials" else {}), alias: 7 if alias == "n_trials" else "m"}
        )
        assert (spec.model.name_or_path, spec.budget.trials) == ("m", 7 if alias == "n_trials" else 100)
    assert minimal(budget={"n_trials": 3}).budget.trials == 3
    assert minimal(search_space={"lr": [1e-4, 1e-3]}) == minimal(search_space={"learning_rate": [1e-4, 1e-3]})
    assert {"val_size", "val_set_size", "test_size", "cutoff_len", "max_seq_length", "max_seq_len"} <= tried
    assert {"r", "rank", "lora_rank", "alpha", "dropout", "lr", "num_train_epochs", "num_epochs", "warmup", "lora_target_modules"} <= set(
        ALIASES
    )


def test_sections_and_recipes_have_the_same_defaults() -> None:
    """What a worker is given repeats fields of the description; their meaning is told there alone."""
    from loratune.data import sources

    pairs = [(sections.Model, ModelRecipe), (sections.Source, sources.DataSource), (sections.Data, sources.DataRecipe)]
    for section, recipe in [*pairs, (sections.Training, TrainingRecipe), (sections.Training, Hyperparameters)]:
        shared = [field for field in fields(recipe) if field.name in section.model_fields and field.default is not MISSING]
        assert {f.name: f.default for f in shared} == {f.name: section.model_fields[f.name].default for f in shared}
        missing = {f.name for f in fields(recipe)} - section.model_fields.keys()
        assert missing <= {"seed", "lora_r", "lora_alpha", "lora_dropout", "learning_rate"}


def test_yaml_round_trip(tmp_path: Path) -> None:
    spec = minimal(
        name="n-1",
        seed=4,
        data={"train": [{"path": "a", "weight": 3.0}, {"path": "ü.jsonl", "weight": 1.0}], "validation": "v.json", "validation_count": 5},
        training={"target_modules": ["q", "v"], "adam_epsilon": 1e-9, "report_to": ["wandb"]},
        search_space={
            "use_rslora": [True, False],
            "lora_r": {"values": [2, 4], "when": {"use_rslora": True}},
            "lr": {"low": 1e-6, "high": 1e-3, "log": True},
        },
        sampler={"name": "tpe", "defaults_first": False, "n_startup_trials": 5},
        schedule={"name": "halving", "fidelity": "steps", "min_resource": "1/27"},
        executor={"name": "inline", "devices": [0, 2], "hang_timeout": 60},
        budget={"max_hours": 1.5},
        output={"folder": "x y", "keep_adapters": None},
    )
    assert load(spec.to_yaml(), tmp_path) == spec
    assert StudySpec.load(base=yaml.safe_load(spec.to_yaml())) == spec  # any YAML reader sees the same numbers
    assert spec.schedule.min_resource == 1 / 27
    assert spec.sampler.options == {"n_startup_trials": 5}


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.e-5", "+1e-5", "1.0e-5", "0.00001", ".1e-4"])
def test_numbers_in_scientific_notation(text: str, tmp_path: Path) -> None:
    body = f"model: m\ndata: {{train: a, val_size: 0.1}}\nsearch_space: {{lr: {{low: {text}, high: 1e-3, log: true}}}}\n"
    spec = load(body, tmp_path, ("training.adam_epsilon", text))
    assert spec.search_space.model_dump()["learning_rate"]["low"] == 1e-5
    assert spec.training.adam_epsilon == 1e-5


def test_a_flag_that_yaml_takes_for_a_comment_is_a_text() -> None:
    flags = [("data.response_marker", "### Response:"), ("model", "m"), ("data.train", "[a.json]"), ("data.validation_count", "3")]
    assert StudySpec.load(None, flags).data.response_marker == "### Response:"


def test_flags_lie_over_yaml_over_base(tmp_path: Path) -> None:
    text = """\
model: {name_or_path: m, dtype: float32}
data: {train: [a.json, b.json], val_size: 0.2}
training: {num_epochs: 3, batch_size: 8}
sampler: {name: tpe, n_startup_trials: 3}
"""
    path = tmp_path / "study.yaml"
    path.write_text(text)
    flags = [
        ("model", "other"),
        ("training.epochs", "2"),
        ("data.train.1.format", "dolly"),
        ("data.train.2.path", "c.json"),
        ("search_space.lr.high", "1e-2"),
        ("search_space.r", "[4, 8]"),
        ("sampler", "random"),
        ("n_trials", "7"),
        ("executor", "{name: inline, workers: 2}"),
    ]
    spec = StudySpec.load(path, flags, {"training": {"epochs": 9, "weight_decay": 0.5}, "seed": 1})
    assert (spec.model.name_or_path, spec.model.dtype) == ("other", "float32")
    assert (spec.training.epochs, spec.training.batch_size, spec.training.weight_decay, spec.seed) == (2, 8, 0.5, 1)
    assert [(source.path, source.format) for source in spec.data.train] == [("a.json", "auto"), ("b.json", "dolly"), ("c.json", "auto")]
    assert (
        spec.search_space == minimal(sampler="random", search_space={"lr": {"high": 1e-2}, "r": [4, 8], "preset": "published"}).search_space
    )
    assert (spec.sampler.name, spec.sampler.options) == ("random", {})
    assert (spec.budget.trials, spec.executor.name, spec.executor.workers) == (7, "inline", 2)


def test_load_does_not_change_its_base() -> None:
    base = {"model": "m", "data": {"train": ["a"], "validation_fraction": 0.1}}
    StudySpec.load(overrides=[("data.train.0.format", "dolly"), ("data.train.1", "b")], base=base)
    assert base == {"model": "m", "data": {"train": ["a"], "validation_fraction": 0.1}}


def test_sections_without_content_are_defaults(tmp_path: Path) -> None:
    text = "model: m\ndata: {train: a, val_size: 0.1}\ntraining:\nsampler:\nsearch_space:\nbudget:\n"
    assert load(text, tmp_path) == StudySpec.load(base={"model": "m", "data": {"train": "a", "val_size": 0.1}})


SAMPLERS = "bracket, nomad, nni_tpe, tpe, gp, cmaes, qmc, random, nsga2"
SETS = "a list of module names, or qv, qkvo, mlp, all-linear"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"modle": "x"}, "modle: unknown field; did you mean 'model'?"),
        ({"epochs": 3}, "epochs: unknown field; write it as training.epochs"),
        ({"lr": 3}, "lr: unknown field; write it as search_space.learning_rate"),
        ({"max_seq_length": 3}, "max_seq_length: unknown field; write it as data.max_length"),
        ({"name": "a/b"}, "name: got 'a/b'; needed: letters, digits, '.', '_' and '-', the first a letter or digit"),
        ({"seed": -1}, "seed: got -1; needed: a number >= 0"),
        ({"seed": 1.5}, "seed: got 1.5; needed: a whole number"),
        ({"model": {}}, "model: missing: The base model that the adapters are trained on."),
        ({"model": ""}, "model.name_or_path: got ''; needed: text that is not empty"),
        ({"model": 5}, "model: got 5; needed: a mapping of fields"),
        (
            {"model": {"name_or_path": "m", "dtype": "bf16"}},
            "model.dtype: got 'bf16'; allowed: auto, float32, bfloat16, float16, float64; did you mean 'bfloat16'?",
        ),
        (
            {"model": {"name_or_path": "m", "load_in_4bit": "yes"}},
            "model.load_in_4bit: got 'yes'; needed: true or false",
        ),
        (
            {"training": {"sharding": "fsdp"}},
            "training.sharding: got 'fsdp'; there is nothing to share out with devices_per_trial: 1; write 2 or more",
        ),
        (
            {"model": {"dtype": "auto"}},
            "model.name_or_path: missing: local folder or Hugging Face hub id of the base model",
        ),
        (
            {"model": {"base_model": "a", "name_or_path": "b"}},
            "model.name_or_path: 'model.base_model' and 'model.name_or_path' are two names for the same field; give one",
        ),
        ({"data": {"train": [], "val_size": 0.1}}, "data.train: got []; needed: at least 1 of them"),
        ({"data": {"train": 5, "val_size": 0.1}}, "data.train: got 5; needed: a list"),
        ({"data": {"val_size": 0.1}}, "data.train: missing: training sources: paths, or mappings with a path"),
        ({"data": {"train": "a", "val_size": 1.0}}, "data.validation_fraction: got 1.0; needed: a number < 1"),
        (
            {"data": {"train": "a", "validation": "b", "val_size": 0.1}},
            "data: validation data comes from one place; given: validation (sources), validation_fraction",
        ),
        (
            {"data": {"train": "a", "validation_count": 5, "val_size": 0.1}},
            "data: validation data comes from one place; given: validation_fraction, validation_count",
        ),
        (
            {"data": {"train": "a", "validation": {"path": "b", "validation_count": 3}}},
            "data: validation_count belongs to training sources; a validation source takes count",
        ),
        (
            {"data": {"train": ["a", {"path": "b", "weight": 1.0}], "val_size": 0.1}},
            "data: train: give every source a weight, or none",
        ),
        (
            {"data": {"train": {"path": "a", "formt": "dolly"}, "val_size": 0.1}},
            "data.train.0.formt: unknown field; did you mean 'format'?",
        ),
        (
            {"data": {"train": {"path": "a", "format": "alpacca"}, "val_size": 0.1}},
            "data.train.0.format: got 'alpacca'; allowed: auto, alpaca, dolly, sharegpt, messages, "
            "prompt_completion, text; did you mean 'alpaca'?",
        ),
        (
            {"data": {"train": {"format": "alpaca"}, "val_size": 0.1}},
            "data.train.0.path: missing: JSON, JSONL, CSV or Parquet file, folder of them, or hub id",
        ),
        (
            {"data": {"train": {"path": "a", "weight": 0}, "val_size": 0.1}},
            "data.train.0.weight: got 0; needed: a number > 0",
        ),
        ({"data": {"train": "a", "val_size": 0.1, "cutoff_len": 1}}, "data.max_length: got 1; needed: a number >= 2"),
        ({"training": {"epochs": "two"}}, "training.epochs: got 'two'; needed: a number"),
        ({"training": {"epochs": True}}, "training.epochs: got True; needed: a number"),
        ({"training": {"epochs": float("nan")}}, "training.epochs: got nan; needed: a finite number"),
        (
            {"training": {"epochs": 1, "num_epochs": 1}},
            "training.epochs: 'training.epochs' and 'training.num_epochs' are two names for the same field; give one",
        ),
        ({"training": {"warmup": 1.5}}, "training.warmup_ratio: got 1.5; needed: a number <= 1"),
        (
            {"training": {"lr_scheduler": "cosin"}},
            "training.lr_scheduler_type: got 'cosin'; allowed: cosine, linear, constant; did you mean 'cosine'?",
        ),
        ({"training": {"target_modules": "q_proj"}}, f"training.target_modules: got 'q_proj'; allowed: {SETS}"),
        ({"training": {"target_modules": []}}, f"training.target_modules: got []; allowed: {SETS}"),
        ({"training": {"max_hours": 3}}, "training.max_hours: unknown field; write it as budget.max_hours"),
        ({"training": [1]}, "training: got [1]; needed: a mapping of fields"),
        (
            {"search_space": "publishd"},
            "search_space.preset: got 'publishd'; allowed: recommended, published, ratio; did you mean 'published'?",
        ),
        (
            {"search_space": {"lr": {"low": 1, "high": 1e-3}}},
            "search_space.learning_rate.high: got 0.001; allowed: numbers >= low, which is 1.0",
        ),
        ({"sampler": "optuna"}, f"sampler.name: got 'optuna'; allowed: {SAMPLERS}"),
        ({"sampler": "noamd"}, f"sampler.name: got 'noamd'; allowed: {SAMPLERS}; did you mean 'nomad'?"),
        (
            {"sampler": {"name": "tpe", "default_first": True}},
            "sampler.default_first: unknown field; did you mean 'defaults_first'?",
        ),
        ({"schedule": "halvin"}, "schedule.name: got 'halvin'; allowed: full, halving; did you mean 'halving'?"),
        ({"schedule": {"name": "halving", "min_resource": 1}}, "schedule.min_resource: got 1; needed: a number < 1"),
        (
            {"schedule": {"name": "halving", "min_resource": "1/x"}},
            "schedule.min_resource: got '1/x'; needed: a number",
        ),
        ({"schedule": {"reduction_factor": 1}}, "schedule.reduction_factor: got 1; needed: a number >= 2"),
        ({"executor": {"workers": 0}}, "executor.workers: got 0; needed: a number >= 1"),
        ({"executor": {"devices": 0}}, "executor.devices: got 0; needed: a list"),
        ({"budget": {"trials": 1e3}}, "budget.trials: got 1000.0; needed: a whole number"),
        (
            {"n_trials": 3, "budget": {"trials": 4}},
            "budget.trials: 'n_trials' and 'budget.trials' are two names for the same field; give one",
        ),
        ({"output": {"keep_adapters": "best"}}, "output.keep_adapters: got 'best'; needed: a whole number"),
    ],
)
def test_one_mistake_is_one_line(sections: dict[str, Any], message: str) -> None:
    assert mistakes(**sections) == message


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["qv", 10**400, "low", 0.5])
keys = st.sampled_from(
    ["type", "low", "high", "values", "choices", "value", "when", "default", "step", "log", "name", "path", "int", "lora_r", ""]
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | st.integers(), inner, max_size=4), max_leaves=8
)
PATHS = [
    f"{section}.{field}" if field else section
    for section, fields in StudySpec.model_fields.items()
    for field in ("", *(NAMES if section == "search_space" else getattr(fields.annotation, "model_fields", ())))
]


@settings(max_examples=150, deadline=None)
@given(written=st.dictionaries(st.sampled_from(PATHS), anything, min_size=1, max_size=3))
def test_whatever_is_written_is_read_or_refused_in_words(written: dict[str, Any]) -> None:
    base: dict[str, Any] = {"model": {"name_or_path": "m"}, "data": {"train": ["a"], "validation_fraction": 0.1}}
    for path, value in sorted(written.items()):
        section, _, field = path.partition(".")
        if field and isinstance(base.get(section, {}), dict):
            base.setdefault(section, {})[field] = value
        else:
            base[section] = value
    try:
        spec = StudySpec.load(base=base)
    except SpecError as error:
        lines = str(error).splitlines()
    else:
        lines = []
        spec.search_space.distributions("index")
        assert StudySpec.load(base=yaml.safe_load(spec.to_yaml())) == spec
    assert all(": " in line for line in lines)


def test_all_mistakes_at_once_with_their_places(tmp_path: Path) -> None:
    text = """\
modle: x
model: m
data:
  train: [a.json, {path: b, formt: alpaca}]
  cutoff_len: big
training:
  epochs: two
  lr: 1e-4
search_space:
  lrr: 3
  r: [8, 4]
sampler: tp
budget: {trials: 3}
budget: {trials: 4}
"""
    path = tmp_path / "study.yaml"
    with pytest.raises(SpecError) as caught:
        load(
            text,
            tmp_path,
            ("trainin.x", "3"),
            ("data.train.7.path", "x"),
            ("model.dtype", "[1"),
            ("seed", "1e-5"),
            ("training.epochs.x", "1"),
        )
    assert sorted(str(caught.value).splitlines()) == sorted(
        [
            f"budget ({path}:14): given twice, first on line 13; give it once",
            "data.train.7.path (--data.train.7.path): 7 is not an index of the list, 0 to 2",
            "--model.dtype [1: not valid YAML: expected ',' or ']', but got '<stream end>'",
            "seed (--seed): got 1e-05; needed: a whole number",
            f"data.train.1.formt ({path}:4): unknown field; did you mean 'format'?",
            f"data.max_length ({path}:5): got 'big'; needed: a whole number",
            "training.epochs (--training.epochs.x): got {'x': 1}; needed: a number",
            f"training.learning_rate ({path}:8): unknown field; write it as search_space.learning_rate",
            f"search_space.lrr ({path}:10): not a searchable parameter; did you mean 'lora_r'?",
            f"search_space.lora_r.values ({path}:11): got [8, 4]; needed: ascending numbers, [4, 8]",
            f"sampler.name ({path}:12): got 'tp'; allowed: {SAMPLERS}; did you mean 'tpe'?",
            f"modle ({path}:1): unknown field; did you mean 'model'?",
            "trainin (--trainin.x): unknown field; did you mean 'training'?",
        ]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [m\n", "{path}:2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("model: m\n\tdata: x\n", "{path}:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("- model\n", "{path}: got ['model']; needed: a mapping of sections"),
        (
            "model: !!python/name:os.system\n",
            "{path}:1: not valid YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'",
        ),
    ],
)
def test_files_that_are_no_description(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    with pytest.raises(SpecError) as caught:
        load(text, tmp_path)
    assert str(caught.value).splitlines()[0] == message.format(path=path)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot read .*absent\.yaml: No such file or directory"):
        StudySpec.load(tmp_path / "absent.yaml")
    (tmp_path / "study.yaml").write_text("model: m")
    with pytest.raises(SpecError, match=r"Did you mean .*study\.yaml\? `loratune init .*stduy\.yaml` writes a description"):
        StudySpec.load(tmp_path / "stduy.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: é\n".encode("latin-1"))
    with pytest.raises(SpecError, match="it is not UTF-8 text"):
        StudySpec.load(tmp_path / "latin.yaml")


def test_anchors_and_cycles_in_yaml(tmp_path: Path) -> None:
    shared = "model: m\ndata: {train: [&a {path: x}, {<<: *a, format: dolly}], val_size: 0.1}\n"
    assert [(s.path, s.format) for s in load(shared, tmp_path).data.train] == [("x", "auto"), ("x", "dolly")]
    with pytest.raises(SpecError, match="training"):
        load("model: m\ndata: {train: a, val_size: 0.1}\ntraining: &t {epochs: *t}\n", tmp_path)


def test_template_loads_and_says_the_defaults(tmp_path: Path) -> None:
    spec = load(template("models/tiny", "alpaca.json"), tmp_path)
    assert spec == minimal()
    names = {line.split(":")[0].strip() for line in template().splitlines()}
    sections = [field.annotation for field in StudySpec.model_fields.values() if hasattr(field.annotation, "model_fields")]
    assert names >= StudySpec.model_fields.keys()
    assert names >= {name for section in sections for name in section.model_fields if section is not SearchSpace}


def test_every_field_has_a_description() -> None:
    for name, definition in StudySpec.model_json_schema()["$defs"].items():
        for field, schema in definition.get("properties", {}).items():
            assert schema.get("description") or name == "SearchSpace", f"{name}.{field}"


def test_json_schema() -> None:
    validator = pytest.importorskip("jsonschema", reason="needs jsonschema").Draft202012Validator
    schema = json.loads(json.dumps(StudySpec.json_schema()))
    validator.check_schema(schema)
    check = validator(schema).is_valid
    short = {
        "model": "m",
        "data": {"train": ["a", {"path": "b"}]},
        "search_space": {"lora_r": [1, 2], "lora_dropout": None},
        "sampler": {"name": "tpe", "multivariate": True},
    }
    for good in (yaml.safe_load(template()), yaml.safe_load(minimal().to_yaml()), short):
        assert check(good)
    for bad in ({**short, "modle": 1}, {**short, "training": {"epochs": "two"}}, {**short, "search_space": "publish"}, {"model": "m"}):
        assert not check(bad)


CHANGES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"budget": {"trials": 200, "max_hours": 3.0}}, ["budget.max_hours: was None, now 3.0; a budget can grow, not shrink"]),
    ({"budget": {"trials": 99}}, ["budget.trials: was 100, now 99; a budget can grow, not shrink"]),
    ({"budget": {"trials": 101}}, []),
    ({"training": {"report_to": ["wandb"]}, "output": {"folder": "elsewhere", "keep_adapters": 3}}, []),
    ({"executor": {"threads": 2, "max_retries": 5, "hang_timeout": 9.0, "name": "inline"}}, []),
    ({"executor": {"workers": 2}}, ["executor.workers: was None, now 2"]),
    ({"executor": {"device": "cpu"}}, ["executor.device: was 'auto', now 'cpu'"]),
    ({"executor": {"devices": [0, 1]}}, ["executor.devices: was None, now [0, 1]; you may use other devices, but the same number of them"]),
    ({"seed": 1, "training": {"epochs": 3}}, ["seed: was 0, now 1", "training.epochs: was 2.0, now 3.0"]),
    ({"search_space": {"preset": "published", "lr": {"high": 0.01}}}, ["search_space.learning_rate.high: was 0.001, now 0.01"]),
    ({"sampler": {"name": "nomad", "lh_search": 10}}, ["sampler.options: was {}, now None", "sampler.options.lh_search: was None, now 10"]),
    ({"name": "other"}, ["name: was 'tiny-alpaca', now 'other'"]),
]


@pytest.mark.parametrize(("sections", "expected"), CHANGES)
def test_differences(sections: dict[str, Any], expected: list[str]) -> None:
    assert differences(minimal(sampler="nomad"), minimal(**{"sampler": "nomad", **sections})) == expected


def test_other_devices_may_take_over() -> None:
    assert differences(minimal(executor={"devices": [0, 1]}), minimal(executor={"devices": [2, 3]})) == []
    assert not allowed_change("executor.workers")
    assert allowed_change("executor.threads")


def test_the_search_order_counts() -> None:
    """NOMAD's variables are in the space's order, so another order is another study."""
    one = minimal(search_space={"lora_r": [4, 8], "lr": [1e-4, 1e-3]})
    other = minimal(search_space={"lr": [1e-4, 1e-3], "lora_r": [4, 8]})
    assert differences(one, other) == ["search_space: was lora_r, learning_rate, now learning_rate, lora_r; the order counts"]


def test_import_is_light() -> None:
    code = (
        "import sys, loratune.spec, loratune.spec.commented;"
        "print([m for m in ('torch', 'transformers', 'optuna', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
