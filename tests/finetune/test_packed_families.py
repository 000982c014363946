"""Model families from their Transformers classes, and what the packed engine refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_engine
import torch
import transformers
from exact import exact_norms  # noqa: F401  # a fixture
from tiny_engine import VOCABULARY, adapter, recipe, segment

from loratune.errors import NotPackableError
from loratune.finetune.engines import load_engine, run_segments
from loratune.finetune.hf import HfEngine
from loratune.finetune.packed import attention
from loratune.finetune.packed.engine import PackedEngine
from loratune.record.paths import StudyPaths
from loratune.work import State

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GEMMA_3N = {
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "num_kv_shared_layers": 0,
    "head_dim": 8,
    "sliding_window": 8,
    "activation_sparsity_pattern": [0.9, 0.0],
    "layer_types": ["sliding_attention", "full_attention"],
}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=8),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=8),
    "gemma": transformers.GemmaConfig(**SHAPE, head_dim=8),
    "phi3": transformers.Phi3Config(**SHAPE),
}


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_the_reference(tmp_path: Path, family: str) -> None:
    tiny_engine.build_model(tmp_path / "model", FAMILIES[family])
    base = recipe(tmp_path)
    wanted = [segment(5, trial=0, target_modules="all-linear"), segment(5, trial=1, lora_r=3, batch_size=4, target_modules="qv")]
    packed = PackedEngine(replace(base, engine="packed", slots=2), tmp_path)
    outcomes = run_segments(packed, wanted)
    assert [o.state for o in outcomes] == [State.COMPLETED] * 2, outcomes[0].message
    alone = [replace(s, run="hf") for s in wanted]
    expected = run_segments(HfEngine(base, tmp_path), alone)
    assert [o.state for o in expected] == [State.COMPLETED] * 2, expected[0].message
    for mine, theirs, one, two in zip(outcomes, expected, wanted, alone, strict=True):
        assert mine.validation_loss == pytest.approx(theirs.validation_loss, abs=1e-9)
        a, b = adapter(tmp_path, one), adapter(tmp_path, two)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=64), "GPT2"),
        (transformers.Gemma2Config(**SHAPE, head_dim=8), "Gemma2|soft-capped"),
        (transformers.Gemma3nTextConfig(**SHAPE, **GEMMA_3N), "threshold"),
    ],
    ids=["gpt2", "gemma2", "gemma3n"],
)
def test_others_fall_back_with_a_line_that_says_why(tmp_path: Path, config: transformers.PretrainedConfig, why: str) -> None:
    tiny_engine.build_model(tmp_path / "model", config)
    engine = load_engine(replace(recipe(tmp_path), engine="packed", slots=2), tmp_path)
    assert isinstance(engine, HfEngine)
    assert engine.slots == 1
    assert "packed engine cannot train this model" in engine.notice
    assert "warning: training takes longer, 1.7 to 2.5 times as long" in engine.notice
    (outcome,) = run_segments(engine, [segment(2, target_modules="all-linear")])
    assert outcome.state is State.COMPLETED, outcome.message


class OneWay(torch.autograd.Function):
    """A kernel that has a forward pass alone."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return x.clone()


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (OneWay.apply, r"LlamaForCausalLM has no backward pass in a flat batch \(NotImplementedError"),
        (lambda out: out.detach(), "LlamaForCausalLM gives other gradients in a flat batch"),
        (lambda out: out * 2 - out.detach(), "LlamaForCausalLM gives other gradients in a flat batch"),
    ],
    ids=["none", "cut off", "wrong"],
)
def test_a_model_is_tried_backward_too(tmp_path: Path, broken, why: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Its losses are right in each of these cases."""
    causal = attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", lambda *given: broken(causal(*given)))
    with pytest.raises(NotPackableError, match=why):
        PackedEngine(replace(recipe(tmp_path, dtype="float32"), engine="packed"), tmp_path)


def test_export_reloads_in_peft_with_the_recorded_loss(tmp_path: Path) -> None:
    import peft

    from loratune.finetune.validation import validate

    packed = PackedEngine(replace(recipe(tmp_path, dtype="float32"), engine="packed", slots=2), tmp_path)
    wanted = [segment(8, trial=k, lora_r=r, learning_rate=0.02) for k, r in enumerate((4, 7))]
    for outcome, one in zip(run_segments(packed, wanted), wanted, strict=True):
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, str(StudyPaths(tmp_path).of(one).folder / "adapter"))
        loss, _ = validate(model, packed.validation, batch_size=4, pad_id=0)
        assert loss == pytest.approx(outcome.validation_loss, abs=1e-5)
