"""The search space: presets, short forms, what Optuna sees, and that real values survive the way there and back."""

from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from loratune.errors import SpecError
from loratune.spec.hyperparameters import ALIASES, NAMES
from loratune.spec.space import SearchSpace

RANKS = (4, 8, 16, 32, 64, 128, 256, 512)
DROPOUTS = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0)


def test_published_preset_is_the_published_space() -> None:
    space = SearchSpace.of("published")
    assert space.distributions("index") == {
        "lora_r_index": IntDistribution(0, 7),
        "lora_alpha": IntDistribution(1, 64),
        "lora_dropout_index": IntDistribution(0, 5),
        "learning_rate": FloatDistribution(1e-6, 1e-3, log=True),
    }
    assert space.distributions("choice") == {
        "lora_r": CategoricalDistribution(RANKS),
        "lora_alpha": IntDistribution(1, 64),
        "lora_dropout": CategoricalDistribution(DROPOUTS),
        "learning_rate": FloatDistribution(1e-6, 1e-3, log=True),
    }
    assert list(space.distributions("index")) == ["lora_r_index", "lora_alpha", "lora_dropout_index", "learning_rate"]
    assert space.default_values() == {"lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "learning_rate": 1e-5}
    assert space.defaults("index") == {"lora_r_index": 1, "lora_alpha": 32, "lora_dropout_index": 4, "learning_rate": 1e-5}
    assert space.defaults("choice") == space.default_values()
    assert not space.conditional


def test_ratio_preset_reaches_the_published_best_and_largest_scale() -> None:
    space = SearchSpace.of("ratio")
    assert space.distributions("choice") == {
        "lora_r": CategoricalDistribution(RANKS),
        "alpha_ratio": FloatDistribution(64 / 512, 64 / 4, log=True),
        "lora_dropout": CategoricalDistribution(DROPOUTS),
        "learning_rate": FloatDistribution(1e-6, 1e-2, log=True),
    }
    assert space.default_values() == {"lora_r": 8, "alpha_ratio": 32 / 8, "lora_dropout": 0.1, "learning_rate": 1e-5}


@pytest.mark.parametrize(
    ("name", "short", "full"),
    [
        ("lora_r", [4, 8, 16], {"type": "ordinal", "values": [4, 8, 16], "default": 8}),
        ("lora_r", [2, 4, 6], {"type": "ordinal", "values": [2, 4, 6], "default": 4}),
        ("lora_r", {"low": 16, "high": 64}, {"type": "int", "low": 16, "high": 64, "default": 40}),
        ("lora_r", {"low": 16, "high": 64, "log": True}, {"type": "int", "low": 16, "high": 64, "log": True, "default": 32}),
        ("lora_r", {"low": 16, "high": 64, "step": 16}, {"type": "int", "low": 16, "high": 64, "step": 16, "default": 48}),
        ("lora_alpha", {"low": 1, "high": 64}, {"type": "int", "low": 1, "high": 64, "default": 32}),
        ("lora_alpha", {"low": 1.0, "high": 64}, {"type": "float", "low": 1.0, "high": 64.0, "default": 32.0}),
        ("lora_dropout", {"low": 0, "high": 1}, {"type": "float", "low": 0.0, "high": 1.0, "default": 0.1}),
        ("weight_decay", {"low": 0, "high": 1, "step": 0.1}, {"type": "float", "low": 0.0, "high": 1.0, "step": 0.1, "default": 0.0}),
        (
            "learning_rate",
            {"low": 1e-4, "high": 1e-2, "log": True},
            {"type": "float", "low": 1e-4, "high": 1e-2, "log": True, "default": 1e-3},
        ),
        ("use_rslora", [True, False], {"type": "categorical", "choices": [True, False], "default": False}),
        ("target_modules", ["mlp", "all-linear"], {"type": "categorical", "choices": ["mlp", "all-linear"], "default": "mlp"}),
        ("batch_size", {"choices": [64, 16]}, {"type": "categorical", "choices": [64, 16], "default": 64}),
        ("epochs", 3, {"type": "fixed", "value": 3}),
    ],
)
def test_short_forms(name: str, short: Any, full: dict[str, Any]) -> None:
    anchor = {"warmup_ratio": [0.0, 0.1]}  # a space must search something
    space = SearchSpace.of({name: short, **anchor})
    written = space.model_dump()[name]
    if full["type"] == "float" and full.get("log"):
        assert written.pop("default") == pytest.approx(full.pop("default"))
    assert written == full
    assert SearchSpace.of(space.model_dump()) == space


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_every_alias(alias: str, name: str) -> None:
    values = ["mlp", "qkvo"] if name == "target_modules" else [0.5, 0.75] if NAMES[name].kind == "float" else [2, 3]
    assert SearchSpace.of({alias: values}) == SearchSpace.of({name: values})


def test_a_mapping_beside_a_preset_changes_fields_joins_and_removes() -> None:
    space = SearchSpace.of(
        {"preset": "published", "lr": {"high": 1e-2}, "lora_dropout": 0.05, "lora_alpha": None, "use_rslora": [False, True], "r": [8, 16]}
    )
    assert list(space.parameters) == ["lora_r", "lora_dropout", "learning_rate", "use_rslora"]
    assert space.distributions("index") == {
        "lora_r_index": IntDistribution(0, 1),
        "learning_rate": FloatDistribution(1e-6, 1e-2, log=True),
        "use_rslora": CategoricalDistribution([False, True]),
    }
    assert space.default_values() == {"lora_r": 8, "lora_dropout": 0.05, "learning_rate": 1e-5, "use_rslora": False}


CONDITIONAL = {
    "use_rslora": [False, True],
    "lora_r": {"values": [4, 8, 256], "when": {"use_rslora": True}},
    "lora_dropout": {"value": 0.2, "when": {"r": [4, 8]}},
    "learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
}


@pytest.mark.parametrize("ordinals", ["index", "choice"])
def test_conditional_parameters_are_skipped_when_inactive(ordinals: Any) -> None:
    space = SearchSpace.of(CONDITIONAL)
    rank = "lora_r_index" if ordinals == "index" else "lora_r"
    assert space.conditional
    assert list(space.distributions(ordinals)) == ["use_rslora", rank, "learning_rate"]
    assert space.defaults(ordinals) == {"use_rslora": False, "learning_rate": 1e-5}

    def values_for(**fixed: Any) -> dict[str, Any]:
        trial = optuna.trial.FixedTrial({"learning_rate": 1e-4, **fixed})
        values = space.suggest(trial, ordinals)
        assert space.decode(trial.params, ordinals) == values
        assert space.encode(values, ordinals) == trial.params
        return values

    assert values_for(use_rslora=False) == {"use_rslora": False, "learning_rate": 1e-4}
    small, large = (1, 2) if ordinals == "index" else (8, 256)
    assert values_for(use_rslora=True, **{rank: small}) == {"use_rslora": True, "lora_r": 8, "lora_dropout": 0.2, "learning_rate": 1e-4}
    assert values_for(use_rslora=True, **{rank: large}) == {"use_rslora": True, "lora_r": 256, "learning_rate": 1e-4}


def test_a_study_starts_at_the_defaults_and_stays_inside() -> None:
    space = SearchSpace.of("ratio")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.enqueue_trial(space.defaults("index"))
    seen = []
    for _ in range(20):
        trial = study.ask()
        seen.append(space.suggest(trial, "index"))
        assert trial.distributions == space.distributions("index")
    assert seen[0] == space.default_values()
    assert {values["lora_r"] for values in seen} <= set(RANKS)
    assert len({values["learning_rate"] for values in seen}) == 20


numbers = st.floats(1e-6, 1.0, allow_nan=False)
definitions = st.fixed_dictionaries(
    {"learning_rate": st.tuples(numbers, numbers).map(lambda p: {"low": min(p), "high": max(p), "log": True})},
    optional={
        "lora_r": st.lists(st.integers(1, 1024), min_size=1, max_size=6, unique=True).map(sorted),
        "lora_alpha": st.tuples(st.integers(1, 99), st.integers(0, 99)).map(lambda p: {"low": p[0], "high": p[0] + p[1]}),
        "lora_dropout": st.lists(st.floats(0, 1), min_size=1, max_size=6, unique=True).map(sorted),
        "warmup_ratio": st.floats(0, 1),
        "use_rslora": st.permutations([True, False]),
        "target_modules": st.lists(st.sampled_from(["qv", "qkvo", "mlp", "all-linear"]), min_size=1, unique=True),
        "weight_decay": st.tuples(st.integers(1, 9), st.integers(1, 99)).map(
            lambda p: {"low": 0.0, "high": p[0] * p[1] / 100, "step": p[1] / 100}
        ),
    },
)


@settings(max_examples=60, deadline=None)
@given(definition=definitions, seed=st.integers(0, 2**31), ordinals=st.sampled_from(["index", "choice"]), conditional=st.booleans())
def test_encode_and_decode_are_inverse(definition: dict[str, Any], seed: int, ordinals: Any, conditional: bool) -> None:
    if conditional and "use_rslora" in definition:
        rate = {**definition.pop("learning_rate"), "when": {"use_rslora": [True]}}
        definition["learning_rate"] = rate
    space = SearchSpace.of(definition)
    assert SearchSpace.of(space.model_dump()) == space
    distributions = space.distributions(ordinals)
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    values = space.suggest(trial, ordinals)
    assert space.decode(trial.params, ordinals) == values
    assert space.encode(values, ordinals) == trial.params
    assert trial.distributions.items() <= distributions.items()
    defaults = space.defaults(ordinals)
    assert space.decode(defaults, ordinals) == space.default_values()
    assert all(distributions[key]._contains(distributions[key].to_internal_repr(value)) for key, value in defaults.items())


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        (7, "search_space: got 7; needed: a preset (recommended, published, ratio) or a mapping of parameters"),
        ("publish", "search_space.preset: got 'publish'; allowed: recommended, published, ratio; did you mean 'published'?"),
        ({}, f"search_space: nothing to search: give at least one of {', '.join(NAMES)} a range, or write: published"),
        ({"lora_r": 8}, f"search_space: nothing to search: give at least one of {', '.join(NAMES)} a range, or write: published"),
        ({"learnig_rate": 1}, "search_space.learnig_rate: not a searchable parameter; did you mean 'learning_rate'?"),
        ({"zzz": 1}, f"search_space.zzz: not a searchable parameter; these are: {', '.join(NAMES)}"),
        ({"r": [4, 8], "rank": 4}, "search_space.lora_r: 'r' and 'rank' are two names for the same parameter; give one"),
        ({"lora_r": [8, 4]}, "search_space.lora_r.values: got [8, 4]; needed: ascending numbers, [4, 8]"),
        ({"lora_r": [4, 4]}, "search_space.lora_r.values: got [4, 4]; needed: ascending numbers, [4]"),
        ({"lora_r": []}, "search_space.lora_r.values: got []; needed: at least 1 of them"),
        ({"lora_r": [0, 4]}, "search_space.lora_r.values: got 0; allowed: whole numbers >= 1"),
        ({"lora_r": [4, 8.5]}, "search_space.lora_r.values: got 8.5; needed: a whole number"),
        ({"lora_r": {"low": 1, "high": "x"}}, "search_space.lora_r.high: got 'x'; needed: a whole number"),
        ({"lora_r": {"low": 1}}, "search_space.lora_r.high: missing: a value is needed"),
        (
            {"lora_r": {"type": "float", "low": 1, "high": 8}},
            "search_space.lora_r.type: got 'float'; lora_r is a whole number: int, ordinal or fixed",
        ),
        (
            {"lora_r": {"type": "integer", "low": 1, "high": 8}},
            "search_space.lora_r: got 'integer'; allowed: int, float, ordinal, categorical, fixed; did you mean 'int'?",
        ),
        ({"lora_r": {"low": 8, "high": 4}}, "search_space.lora_r.high: got 4; allowed: numbers >= low, which is 8"),
        ({"lora_r": {"low": 4, "high": 8, "default": 9}}, "search_space.lora_r.default: got 9; allowed: 4 to 8"),
        ({"lora_r": {"low": 4, "high": 8, "step": 3}}, "search_space.lora_r.step: got 3, which does not lead from 4 to 8"),
        ({"lora_r": {"low": 4, "high": 8, "step": 0}}, "search_space.lora_r.step: got 0; allowed: numbers > 0"),
        ({"lora_r": {"low": 4, "high": 8, "step": 2, "default": 5}}, "search_space.lora_r.default: got 5; allowed: 4 to 8 in steps of 2"),
        (
            {"lora_r": {"low": 4, "high": 8, "step": 2, "log": True}},
            "search_space.lora_r.step: a range with log: true cannot have steps; give one of them",
        ),
        ({"lora_r": {"values": [4, 8], "default": 5}}, "search_space.lora_r.default: got 5; allowed: 4, 8"),
        ({"lora_r": {"low": 4, "hihg": 8, "high": 8}}, "search_space.lora_r.hihg: unknown field; did you mean 'high'?"),
        (
            {"lora_r": {"log": True}},
            "search_space.lora_r: got {'log': True}; needed: a value, a list, or a mapping with low and high, values, choices or value",
        ),
        ({"learning_rate": {"low": 0, "high": 1}}, "search_space.learning_rate.low: got 0.0; allowed: numbers > 0"),
        ({"learning_rate": {"low": 1e-5, "high": float("inf")}}, "search_space.learning_rate.high: got inf; needed: a finite number"),
        (
            {"weight_decay": {"low": 0, "high": 1, "log": True}},
            "search_space.weight_decay.low: got 0.0; allowed: numbers > 0, because of log: true",
        ),
        ({"lora_dropout": [0.1, 1.5]}, "search_space.lora_dropout.values: got 1.5; allowed: 0 to 1"),
        ({"lora_dropout": {"low": -0.1, "high": 1}}, "search_space.lora_dropout.low: got -0.1; allowed: 0 to 1"),
        ({"use_rslora": [1, 2]}, "search_space.use_rslora.choices: got 1; needed: true or false"),
        ({"use_rslora": [True, True]}, "search_space.use_rslora.choices: got [True, True]; each choice may stand once"),
        (
            {"target_modules": ["qv", "all-liner"]},
            "search_space.target_modules.choices: got 'all-liner'; allowed: qv, qkvo, mlp, all-linear; did you mean 'all-linear'?",
        ),
        (
            {"preset": "published", "alpha_ratio": [1, 2]},
            "search_space.alpha_ratio: lora_alpha = alpha_ratio * lora_r, so give one of them (null takes the other out)",
        ),
        (
            {"lora_r": {"values": [4, 8], "when": {"use_rslora": True}}, "use_rslora": [True, False]},
            "search_space.lora_r.when: 'use_rslora' is not an earlier parameter of this space; it must stand before",
        ),
        (
            {"lora_r": [4, 8], "learning_rate": {"low": 1, "high": 2, "when": {"lora_r": [16]}}},
            "search_space.learning_rate.when.lora_r: lora_r never has the value 16",
        ),
        (
            {"lora_r": [4, 8], "learning_rate": {"low": 1, "high": 2, "when": {"use_rslora": True}}},
            "search_space.learning_rate.when: 'use_rslora' is not an earlier parameter of this space",
        ),
        (
            {"lora_r": [4, 8], "learning_rate": {"low": 1, "high": 2, "when": 4}},
            "search_space.learning_rate.when: got 4; needed: a mapping",
        ),
    ],
)
def test_mistakes(definition: Any, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        SearchSpace.of(definition)
    assert str(caught.value) == message


def test_all_mistakes_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        SearchSpace.of({"lora_rr": 3, "lora_r": [8, 4], "lr": {"low": 0, "high": -1}, "epochs": {}})
    assert str(caught.value).splitlines() == [
        "search_space.lora_rr: not a searchable parameter; did you mean 'lora_r'?",
        "search_space.epochs: got {}; needed: a value, a list, or a mapping with low and high, values, choices or value",
        "search_space.lora_r.values: got [8, 4]; needed: ascending numbers, [4, 8]",
        "search_space.learning_rate.low: got 0.0; allowed: numbers > 0",
        "search_space.learning_rate.high: got -1.0; allowed: numbers > 0",
    ]
