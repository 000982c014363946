import math

import pytest
import torch
import transformers

from loratune.errors import ModelError
from loratune.finetune.lora import adapter_parameters, attach, initial_a
from loratune.finetune.peft_layers import detach, lora_layers
from loratune.finetune.targets import target_endings
from loratune.work import Hyperparameters


def tiny(kind: str) -> transformers.PreTrainedModel:
    common = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    llama_like = {
        **common,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    configs = {
        "llama": lambda: transformers.LlamaConfig(**llama_like),
        "phi3": lambda: transformers.Phi3Config(**llama_like),
        "gpt2": lambda: transformers.GPT2Config(**common, n_embd=32, n_layer=2, n_head=4),
        "neox": lambda: transformers.GPTNeoXConfig(
            **common, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
        ),
        "opt": lambda: transformers.OPTConfig(
            **common, hidden_size=32, word_embed_proj_dim=32, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4
        ),
    }
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(configs[kind]()).requires_grad_(False).eval()


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("llama", "qv", ["q_proj", "v_proj"]),
        ("llama", "qkvo", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("llama", "mlp", ["down_proj", "gate_proj", "up_proj"]),
        ("llama", "all-linear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("phi3", "qv", ["qkv_proj"]),
        ("phi3", "mlp", ["down_proj", "gate_up_proj"]),
        ("gpt2", "qv", ["c_attn"]),
        ("gpt2", "qkvo", ["attn.c_proj", "c_attn"]),
        ("gpt2", "mlp", ["c_fc", "mlp.c_proj"]),
        ("neox", "qkvo", ["dense", "query_key_value"]),
        ("neox", "mlp", ["dense_4h_to_h", "dense_h_to_4h"]),
        ("opt", "qv", ["q_proj", "v_proj"]),
        ("opt", "mlp", ["fc1", "fc2"]),
    ],
)
def test_named_sets(kind: str, name: str, expected: list[str]) -> None:
    model = tiny(kind)
    assert target_endings(model, name) == expected
    wrapped, _ = attach(model, Hyperparameters(target_modules=name), 0)
    assert {layer.split(".")[-1] for layer, _ in lora_layers(wrapped)} == {e.split(".")[-1] for e in expected}
    assert all("lm_head" not in layer and "embed_out" not in layer for layer, _ in lora_layers(wrapped))


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ModelError, match="did you mean 'q_proj'"):
        target_endings(tiny("llama"), ("v_proj", "q_porj"))
    with pytest.raises(ModelError, match=r"c_attn, c_fc, c_proj.*qv, qkvo"):
        target_endings(tiny("gpt2"), "qkv_projection")
    assert target_endings(tiny("llama"), ("v_proj", "layers.1.mlp.up_proj")) == ["layers.1.mlp.up_proj", "v_proj"]


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "neox", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_at_start_and_bare_after(kind: str, dtype: torch.dtype) -> None:
    model = tiny(kind).to(dtype)
    ids = torch.arange(2, 32).view(3, 10)
    before = model(input_ids=ids).logits
    names = [name for name, _ in model.named_modules()]
    for trial in range(3):
        wrapped, key = attach(model, Hyperparameters(lora_r=2 + trial, target_modules="all-linear"), trial)
        key.set(0, torch.arange(3).view(-1, 1), torch.arange(10))
        assert {p.dtype for p in adapter_parameters(wrapped).values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
        assert torch.equal(wrapped(input_ids=ids).logits, before)
        for p in adapter_parameters(wrapped).values():
            torch.nn.init.normal_(p)
        assert not torch.equal(wrapped(input_ids=ids).logits, before)
        detach(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert names == [name for name, _ in model.named_modules()]
    assert not hasattr(model, "peft_config")


def test_initialisation_depends_on_seed_and_name_only() -> None:
    a = {
        name: layer.lora_A["default"].weight
        for name, layer in lora_layers(attach(tiny("llama"), Hyperparameters(target_modules="qv"), 1)[0])
    }
    torch.manual_seed(123)
    b = {
        name: layer.lora_A["default"].weight
        for name, layer in lora_layers(attach(tiny("llama"), Hyperparameters(target_modules="all-linear"), 1)[0])
    }
    c = {
        name: layer.lora_A["default"].weight
        for name, layer in lora_layers(attach(tiny("llama"), Hyperparameters(target_modules="qv"), 2)[0])
    }
    assert all(torch.equal(weight, b[name]) for name, weight in a.items())
    assert not any(torch.equal(weight, c[name]) for name, weight in a.items())
    assert len({weight.sum().item() for weight in b.values()}) == len(b)


def test_initialisation_is_uniform_within_pefts_bound() -> None:
    weight = initial_a(0, "m", 64, 256)
    bound = 1 / math.sqrt(256)
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert torch.equal(initial_a(0, "m", 8, 256), weight[:8])  # a higher rank begins with the same rows


@pytest.mark.parametrize(("rslora", "scale"), [(False, 10.5 / 4), (True, 10.5 / 2)])
def test_scaling(rslora: bool, scale: float) -> None:
    wrapped, _ = attach(tiny("llama"), Hyperparameters(lora_r=4, lora_alpha=10.5, use_rslora=rslora), 0)
    assert {layer.scaling["default"] for _, layer in lora_layers(wrapped)} == {scale}


@pytest.mark.parametrize("bad", [{"lora_r": 0}, {"lora_dropout": 1.5}])
def test_out_of_range(bad: dict[str, float]) -> None:
    with pytest.raises(ModelError, match=next(iter(bad))):
        attach(tiny("llama"), Hyperparameters(**bad), 0)  # type: ignore[arg-type]


def test_what_was_half_attached_comes_off() -> None:
    model = tiny("llama")
    wrapped, _ = attach(model, Hyperparameters(), 0)
    layer = model.model.layers[0].self_attn
    layer.q_proj = layer.q_proj.get_base_layer()
    del wrapped
    detach(model)
    assert not list(lora_layers(model))
