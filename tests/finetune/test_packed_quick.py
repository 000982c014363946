"""Norms and rotary positions with fewer steps: the same numbers and gradients, and the model as it was afterwards."""

import importlib

import pytest
import torch
import transformers

from loratune.finetune.packed.norm import quick_norms
from loratune.finetune.packed.rotary import quick_rotary

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = [
    transformers.LlamaConfig(**SHAPE),
    transformers.MistralConfig(**SHAPE),
    transformers.Qwen3Config(**SHAPE, head_dim=8),
    transformers.GemmaConfig(**SHAPE, head_dim=8),
    transformers.Phi3Config(**SHAPE, pad_token_id=0),
]


def model(config: transformers.PreTrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    found = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in found.parameters():  # norms of 1 would hide a weight
        parameter.data.normal_(0.5, 0.5)
    return found.requires_grad_(False)


def with_gradient(function, *inputs):  # type: ignore[no-untyped-def]
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    out = torch.cat([o.flatten() for o in out]) if isinstance(out, tuple) else out.flatten()
    (out * torch.linspace(-1, 1, len(out))).sum().backward()
    return [out, *(x.grad for x in inputs)]


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_norms(config: transformers.PreTrainedConfig) -> None:
    base = model(config)
    norms = [m for m in base.modules() if type(m).__name__.endswith("RMSNorm")]
    quick = dict(quick_norms(base))
    assert set(quick) == set(norms)
    for norm, forward in quick.items():
        x = torch.randn(1, 7, len(norm.weight)) * torch.logspace(-3, 3, 7).view(7, 1)
        for mine, theirs in zip(with_gradient(forward, x), with_gradient(norm, x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_rotary_positions(config: transformers.PreTrainedConfig) -> None:
    base = model(config)
    namespace = importlib.import_module(type(base).__module__)
    original, used = namespace.apply_rotary_pos_emb, []
    hidden = torch.randn(1, 7, 24)
    layer, positions = base.model.layers[0].self_attn, base.model.rotary_emb(hidden, torch.arange(7).unsqueeze(0))

    def attend(x: torch.Tensor) -> torch.Tensor:
        return layer(x, position_embeddings=positions, attention_mask=None)[0]

    theirs = with_gradient(attend, hidden)
    layer.o_proj.register_forward_hook(lambda *_: used.append(namespace.apply_rotary_pos_emb))
    handles = quick_rotary(base)
    mine = with_gradient(attend, hidden)
    assert used[0] is not original
    assert namespace.apply_rotary_pos_emb is original
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for handle in handles:
        handle.remove()
    attend(hidden)
    assert used[1] is original


def test_the_function_is_back_after_a_failure() -> None:
    base = model(FAMILIES[0])
    namespace = importlib.import_module(type(base).__module__)
    original = namespace.apply_rotary_pos_emb
    assert quick_rotary(base)
    with pytest.raises(TypeError):
        base.model.layers[0].self_attn(torch.randn(1, 7, 24), position_embeddings=None)
    assert namespace.apply_rotary_pos_emb is original


def test_a_norm_that_is_another_is_left_alone() -> None:
    class CenteredRMSNorm(torch.nn.LayerNorm):
        pass

    assert not list(quick_norms(torch.nn.Sequential(CenteredRMSNorm(8, bias=False))))


def test_a_function_of_the_name_that_does_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    base = model(FAMILIES[0])
    namespace = importlib.import_module(type(base).__module__)
    for other in (lambda q, k, cos, sin: (q * cos, k * sin), lambda q, k, positions: (q, k)):
        monkeypatch.setattr(namespace, "apply_rotary_pos_emb", other)
        assert not quick_rotary(base)
