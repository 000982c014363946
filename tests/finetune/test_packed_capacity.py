"""The memory model against what autograd keeps and what the machine has."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_engine import recipe, segment

from loratune.finetune.engines import run_segments
from loratune.finetune.packed import capacity
from loratune.finetune.packed.engine import PackedEngine
from loratune.work import State


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> PackedEngine:
    root = tmp_path_factory.mktemp("study")
    return PackedEngine(replace(recipe(root), engine="packed", slots=3), root)


def test_bytes_per_token_cover_what_a_layer_must_keep(engine: PackedEngine) -> None:
    """At least the inputs of the two layers' MLP products, in float64; less than a megabyte for so small a model."""
    config = engine.base.model.config
    least = config.num_hidden_layers * 2 * config.intermediate_size * 8
    assert least < engine.capacity.per_token < 2**20
    _, once = capacity._saved(engine.base, _adapter(engine), engine.train, np.asarray([0]))
    tokens, _ = capacity._saved(engine.base, _adapter(engine), engine.train, np.asarray([0]))
    _, twice = capacity._saved(engine.base, _adapter(engine), engine.train, np.asarray([0, 0, 0]))
    assert twice == pytest.approx(3 * once, rel=0.2)  # in proportion to the tokens
    assert tokens == engine.train.lengths[0]


def _adapter(engine: PackedEngine):  # type: ignore[no-untyped-def]
    from loratune.finetune.packed.adapter import Adapter
    from loratune.work import Hyperparameters, TrainingRecipe

    layers = {name: engine.base.features(name) for name in engine.base.linear}
    return Adapter(layers, Hyperparameters(lora_r=16), 0, TrainingRecipe(), dtype=engine.base.base.dtype, device=engine.device)


def test_the_machine_is_asked(engine: PackedEngine) -> None:
    assert 2**20 < capacity.resident() < engine.capacity.limit
    assert engine.capacity.room(0) > engine.capacity.room(10**6)


def test_what_does_not_fit_waits_for_a_slot(engine: PackedEngine) -> None:
    """Memory for one adapter and the longest example: three trials pass through one slot, one after the other."""
    longest, size = (
        int(np.max(engine.train.lengths)),
        sum(4 * (engine.base.features(n)[0] + engine.base.features(n)[1]) for n in _qv(engine)),
    )
    before = engine.capacity
    tight = before.fixed + size * before.per_parameter * 1.5 + longest * before.per_token
    engine.capacity = replace(before, limit=int(tight))
    most = 0
    train = engine._train

    def counted(lanes) -> None:  # type: ignore[no-untyped-def]
        nonlocal most
        most = max(most, len(engine._occupied))
        train(lanes)

    engine._train = counted  # type: ignore[method-assign]
    outcomes = run_segments(engine, [segment(3, trial=k) for k in range(3)])
    engine._train, engine.capacity = train, before  # type: ignore[method-assign]
    assert [o.state for o in outcomes] == [State.COMPLETED] * 3
    assert most == 1


def _qv(engine: PackedEngine) -> list[str]:

    from loratune.finetune.targets import chosen_layers

    return chosen_layers(engine.base.model, "qv")
