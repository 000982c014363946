"""Tiny random models of the families that Transformers has: a config each, two layers deep."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tiny_tokenizer
import torch
import transformers as t

VOCABULARY = 320  # of tiny_tokenizer
_IDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
_LLAMA: Mapping[str, Any] = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_NEOX = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}
_GPT2 = {**_IDS, "n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 4}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2}
_WIDE = {**_MOE, "moe_intermediate_size": 24}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,  # all examples are longer
    "rope_theta": 10000.0,
}


def _gemma3() -> t.PretrainedConfig:
    text = t.Gemma3TextConfig(**_LLAMA, head_dim=8, query_pre_attn_scalar=8)
    vision = t.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    return t.Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4, image_token_index=5)


def _qwen3_next() -> t.PretrainedConfig:
    linear = {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")} | {
        f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")
    }
    kinds = ["linear_attention", "full_attention"]
    return t.Qwen3NextConfig(**_LLAMA, **_WIDE, **linear, shared_expert_intermediate_size=24, head_dim=8, layer_types=kinds)


def _deepseek_v3() -> t.PretrainedConfig:
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
    return t.DeepseekV3Config(**{**_LLAMA, "num_key_value_heads": 4}, **ranks, **experts, n_shared_experts=1, first_k_dense_replace=1)


def _llama4() -> t.PretrainedConfig:
    kinds = ["chunked_attention", "full_attention"]
    return t.Llama4TextConfig(
        **_LLAMA, head_dim=8, num_local_experts=2, attention_chunk_size=32, intermediate_size_mlp=48, layer_types=kinds
    )


def _jamba() -> t.PretrainedConfig:
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    return t.JambaConfig(**_LLAMA, **_MOE, **layers, mamba_d_state=8, mamba_dt_rank=4)


FAMILIES: Mapping[str, Callable[[], t.PretrainedConfig]] = {
    "llama": lambda: t.LlamaConfig(**_LLAMA),
    "llama tied, biased": lambda: t.LlamaConfig(**_LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": lambda: t.MistralConfig(**_LLAMA, sliding_window=8),
    "mixtral": lambda: t.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": lambda: t.Qwen2Config(**_LLAMA),
    "qwen2-moe": lambda: t.Qwen2MoeConfig(**_LLAMA, **_WIDE, shared_expert_intermediate_size=24),
    "qwen3": lambda: t.Qwen3Config(**_LLAMA, head_dim=8),
    "qwen3-moe": lambda: t.Qwen3MoeConfig(**_LLAMA, **_WIDE, head_dim=8),
    "qwen3-next": _qwen3_next,
    "gemma": lambda: t.GemmaConfig(**_LLAMA, head_dim=8),
    "gemma2": lambda: t.Gemma2Config(**_LLAMA, head_dim=8, sliding_window=8),
    "gemma3 text": lambda: t.Gemma3TextConfig(**_LLAMA, head_dim=8, query_pre_attn_scalar=8, sliding_window=8),
    "gemma3": _gemma3,
    "phi": lambda: t.PhiConfig(**_LLAMA),
    "phi3": lambda: t.Phi3Config(**_LLAMA),
    "phi3 longrope": lambda: t.Phi3Config(**_LLAMA, original_max_position_embeddings=64, rope_parameters=_LONGROPE),
    "phimoe": lambda: t.PhimoeConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": lambda: t.GPT2Config(**_GPT2),
    "gpt-neo": lambda: t.GPTNeoConfig(
        **_IDS,
        max_position_embeddings=512,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
    ),
    "gpt-neox": lambda: t.GPTNeoXConfig(**_NEOX),
    "gpt-j": lambda: t.GPTJConfig(**_GPT2, rotary_dim=4),
    "codegen": lambda: t.CodeGenConfig(**_GPT2, n_ctx=512, rotary_dim=4),
    "gpt-bigcode": lambda: t.GPTBigCodeConfig(**_GPT2),
    "opt": lambda: t.OPTConfig(
        **_IDS,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    ),
    "bloom": lambda: t.BloomConfig(**_IDS, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: t.FalconConfig(**_IDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, new_decoder_architecture=False),
    "mpt": lambda: t.MptConfig(**_IDS, d_model=32, n_heads=4, n_layers=2, max_seq_len=512, expansion_ratio=2),
    "stablelm": lambda: t.StableLmConfig(**_LLAMA),
    "starcoder2": lambda: t.Starcoder2Config(**_LLAMA),
    "cohere": lambda: t.CohereConfig(**_LLAMA),
    "cohere2": lambda: t.Cohere2Config(**_LLAMA, sliding_window=8),
    "olmo2": lambda: t.Olmo2Config(**_LLAMA),
    "olmo3": lambda: t.Olmo3Config(**_LLAMA, **_SLIDING),
    "olmoe": lambda: t.OlmoeConfig(**_LLAMA, **_MOE),
    "granite": lambda: t.GraniteConfig(**_LLAMA),
    "granite-moe": lambda: t.GraniteMoeConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "deepseek-v3": _deepseek_v3,
    "llama4": _llama4,
    "mamba": lambda: t.MambaConfig(**_IDS, hidden_size=32, num_hidden_layers=2, state_size=8),
    "mamba2": lambda: t.Mamba2Config(
        **_IDS, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=16
    ),
    "jamba": _jamba,
    "smollm3": lambda: t.SmolLM3Config(**_LLAMA),
    "gpt-oss": lambda: t.GptOssConfig(**_LLAMA, **_SLIDING, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "glm4": lambda: t.Glm4Config(**_LLAMA, head_dim=8),
    "nemotron": lambda: t.NemotronConfig(**_LLAMA),
    "exaone4": lambda: t.Exaone4Config(**_LLAMA, **_SLIDING),
    "helium": lambda: t.HeliumConfig(**_LLAMA, head_dim=8),
}


def model(config: t.PretrainedConfig) -> t.PreTrainedModel:
    """The same random weights at each call, three times as large as Transformers begins with, so that layers matter."""
    torch.manual_seed(0)
    made = t.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return made


def build(folder: Path, config: t.PretrainedConfig) -> Path:
    """A model's folder, its tokenizer in it."""
    model(config).save_pretrained(folder)
    return tiny_tokenizer.build(folder)


def bare(config: t.PretrainedConfig) -> t.PreTrainedModel:
    """A model without weights."""
    with torch.device("meta"):
        return t.AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]
