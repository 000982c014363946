"""Rotary frequencies that follow the longest position of a pass: each example is computed as it would be alone, always."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_engine
import torch
import transformers
from tiny_engine import VOCABULARY, adapter, recipe, segment

from loratune.data import batches
from loratune.errors import NotPackableError
from loratune.finetune import model
from loratune.finetune.engines import run_segments
from loratune.finetune.hf import HfEngine
from loratune.finetune.packed.base import PackedBase
from loratune.finetune.packed.engine import PackedEngine
from loratune.finetune.rope import RopeSides, sides_of
from loratune.finetune.validation import validate
from loratune.record.paths import StudyPaths
from loratune.work import ModelRecipe, State

BORDER = 13  # the examples have 5 to 23 tokens
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # so that frequencies matter
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0, 9.0, 5.0, 7.0]}
CONFIGS = {
    "longrope": transformers.Phi3Config(
        **SHAPE,
        max_position_embeddings=64,
        original_max_position_embeddings=BORDER,
        rope_parameters={**LONGROPE, "original_max_position_embeddings": BORDER},
    ),
    "dynamic": transformers.LlamaConfig(
        **SHAPE, max_position_embeddings=BORDER, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    ),
}


def independent(folder: Path, tokens: batches.Tokens, trained: Path | None = None) -> float:
    """Plain Transformers and PEFT: the model is loaded anew for each example, so that nothing is left of another."""
    import peft

    total, number = 0.0, 0
    for i in range(len(tokens)):
        alone: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        if trained is not None:
            alone = peft.PeftModel.from_pretrained(alone, str(trained))
        ids, mask = tokens[i]
        with torch.no_grad():
            logs = alone(input_ids=torch.tensor(np.asarray([ids]), dtype=torch.long)).logits[0].log_softmax(-1)
        for t in np.flatnonzero(mask[1:]) + 1:
            total, number = total - float(logs[t - 1, ids[t]]), number + 1
    return total / number


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_loss_is_that_of_the_examples_one_by_one(kind: str, tmp_path: Path) -> None:
    tiny_engine.build_model(tmp_path / "model", CONFIGS[kind])
    tokens = tiny_engine.random_tokens(12, 2)
    assert min(tokens.lengths) < BORDER < max(tokens.lengths)
    expected = independent(tmp_path / "model", tokens)
    loaded = model.load(ModelRecipe(name_or_path=str(tmp_path / "model"), dtype="float64"), torch.device("cpu"))
    for size in (1, 5, 12):
        assert validate(loaded.model, tokens, batch_size=size, pad_id=0)[0] == pytest.approx(expected, abs=1e-6)
    mixed = batches.collate(tokens, range(12), pad_id=0)
    with torch.no_grad():
        logits = loaded.model(input_ids=mixed.ids, use_cache=False).logits.flatten(0, 1)[mixed.predictors]
    assert abs(float(torch.nn.functional.cross_entropy(logits, mixed.labels)) - expected) > 1e-3, "in one pass it is another"


@pytest.mark.parametrize("kind", CONFIGS)
def test_both_engines_train_each_example_as_it_is_alone(kind: str, tmp_path: Path) -> None:
    tiny_engine.build_model(tmp_path / "model", CONFIGS[kind])
    base = recipe(tmp_path)
    wanted = segment(4, target_modules="all-linear", validate_at=(0,))
    runs = {"packed": PackedEngine(replace(base, engine="packed", slots=2), tmp_path)}
    runs |= {f"hf-{size}": HfEngine(replace(base, training=replace(base.training, micro_batch_size=size)), tmp_path) for size in (1, 7)}
    found = {}
    for name, engine in runs.items():
        own = replace(wanted, run=name)
        (outcome,) = run_segments(engine, [own])
        assert outcome.state is State.COMPLETED, outcome.message
        found[name] = (outcome, adapter(tmp_path, own))
    reference, weights = found["hf-1"]
    untuned = independent(tmp_path / "model", runs["hf-1"].validation)
    tuned = independent(
        tmp_path / "model", runs["hf-1"].validation, StudyPaths(tmp_path).of(replace(wanted, run="hf-1")).folder / "adapter"
    )
    assert reference.validation_loss == pytest.approx(tuned, abs=1e-5)
    for outcome, own in found.values():
        assert outcome.curve[0].validation_loss == pytest.approx(untuned, abs=1e-5)
        assert outcome.validation_loss == pytest.approx(reference.validation_loss, abs=1e-5)
        for name in weights:
            torch.testing.assert_close(own[name], weights[name], rtol=1e-4, atol=1e-6)


def test_two_lanes_of_one_pass_are_of_one_side(tmp_path: Path) -> None:
    tiny_engine.build_model(tmp_path / "model", CONFIGS["longrope"])
    base = recipe(tmp_path)
    wanted = [segment(3, trial=k, lora_r=r, batch_size=size) for k, (r, size) in enumerate(((2, 2), (3, 3), (4, 2)))]
    together = run_segments(PackedEngine(replace(base, engine="packed", slots=3), tmp_path), wanted)
    alone = run_segments(HfEngine(base, tmp_path), [replace(one, run="hf") for one in wanted])
    for mine, other in zip(together, alone, strict=True):
        assert mine.validation_loss == pytest.approx(other.validation_loss, abs=1e-6)


def test_a_long_pass_leaves_nothing_behind(tmp_path: Path) -> None:
    tiny_engine.build_model(tmp_path / "model", CONFIGS["dynamic"])
    loaded = model.load(ModelRecipe(name_or_path=str(tmp_path / "model"), dtype="float64"), torch.device("cpu")).model
    ids = torch.arange(40)[None] % VOCABULARY
    with torch.no_grad():
        for length in (BORDER, BORDER + 5, BORDER - 2):
            before = loaded(input_ids=ids[:, :length]).logits
            loaded(input_ids=ids)
            torch.testing.assert_close(loaded(input_ids=ids[:, :length]).logits, before, rtol=0, atol=0)


def test_sides() -> None:
    lengths = np.asarray([5, 13, 14, 20, 20])
    assert sides_of(CONFIGS["longrope"])(lengths).tolist() == [0, 0, 1, 1, 1]
    side = sides_of(CONFIGS["dynamic"])(lengths)
    assert len({*side[:2]}) == 1
    assert len(set(side.tolist())) == 3
    assert side[3] == side[4]
    for rope in ({"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0}):
        usual = transformers.LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 10000.0, **rope})
        assert sides_of(usual) is batches.one_side
    assert sides_of(transformers.GPT2Config()) is batches.one_side
    layers = {"full_attention": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}, "sliding_attention": {"rope_type": "default"}}
    by_layer = transformers.Gemma3TextConfig(max_position_embeddings=99, rope_parameters=layers)
    assert sides_of(by_layer) == RopeSides(grows=99)


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 3), (3, 1)])
def test_a_batch_of_two_sides_is_dealt_out_once_and_apart(world: int, micro: int) -> None:
    lengths = np.random.default_rng(0).integers(5, 24, 9)
    sides = RopeSides(switch=BORDER)
    pieces = [batches.cut(lengths, micro, rank, world, sides, 12) for rank in range(world)]
    assert {len(own) for own in pieces} == {12}
    assert sorted(int(slot) for own in pieces for piece in own for slot in piece) == list(range(9))
    assert all(len(piece) <= micro and len(set(sides(lengths[piece]))) < 2 for own in pieces for piece in own)


@pytest.mark.parametrize(("longest", "packable"), [(14, True), (40, False)])
def test_attention_in_chunks_is_tried_beyond_a_chunk(longest: int, packable: bool) -> None:
    torch.manual_seed(0)
    shape = {**SHAPE, "num_local_experts": 1, "intermediate_size_mlp": 48, "head_dim": 8, "interleave_moe_layer_step": 0}
    config = transformers.Llama4TextConfig(
        **shape, max_position_embeddings=64, attention_chunk_size=16, no_rope_layers=[1, 1], moe_layers=[]
    )
    base = model.BaseModel(
        model=transformers.Llama4ForCausalLM(config).eval().requires_grad_(False),
        tokenizer=None,  # type: ignore[arg-type]  # not asked for
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    if packable:
        PackedBase(base, longest).release()
    else:
        with pytest.raises(NotPackableError):
            PackedBase(base, longest)


def test_chunks_too_long_to_be_tried_are_refused() -> None:
    from loratune.finetune.packed.loading_check import lengths_to_try

    config = transformers.Llama4TextConfig(attention_chunk_size=8192)
    assert lengths_to_try(config, 8192) == [7, 12, 5]
    with pytest.raises(NotPackableError, match="chunks of 8192 tokens"):
        lengths_to_try(config, 8193)
    assert lengths_to_try(transformers.MistralConfig(sliding_window=8), 20) == [7, 12, 5, 13]
    assert lengths_to_try(transformers.MistralConfig(sliding_window=4096), 20) == [7, 12, 5]
    assert lengths_to_try(CONFIGS["longrope"], 15) == [7, 12, 5, 15]
