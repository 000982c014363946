"""Loading the frozen base model and its tokenizer from a folder or the Hugging Face hub."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from loratune.data.tokenizers import load_tokenizer
from loratune.errors import MissingExtraError, ModelError
from loratune.finetune.rope import forget_lengths
from loratune.system import hub
from loratune.work import ModelRecipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A causal language model with frozen weights and no dropout of its own, and its tokenizer."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype  # of the weights, or of the arithmetic where they are quantised

    @property
    def pad_id(self) -> int:
        """The token that fills a batch on the right. Nothing attends to it and no loss counts it, so any one serves.

        Some tokenizers name one that the model has no embedding for.
        """
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None and candidate < self.model.config.get_text_config().vocab_size:
                return int(candidate)
        return 0


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1`; under torchrun the CUDA device of this process's LOCAL_RANK. Raises ModelError."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError("device: cuda was asked for, but torch sees no CUDA device. Use device: cpu, or install a CUDA build of torch.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if name.startswith("cuda:"):
        return torch.device(name)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is float32 on CPU; on GPU bfloat16, or float16 where the hardware has no bfloat16. Raises ModelError."""
    if name != "auto":
        if name not in DTYPES:
            raise ModelError(f"dtype: {name!r} is not known; allowed: auto, {', '.join(DTYPES)}.")
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load(recipe: ModelRecipe, device: torch.device, *, silent: bool = True) -> BaseModel:
    """Load model and tokenizer, freeze the weights and, if `silent`, switch the model's own dropout off.

    LoRA dropout is then the only randomness in training, which makes a run a pure function of its seed.
    Raises ModelError, saying what is missing, for a folder or hub id that does not hold a causal language model.
    """
    load_config(recipe)
    tokenizer = load_tokenizer(recipe.name_or_path, recipe.revision, recipe.trust_remote_code)
    model = load_network(recipe, device, silent=silent)
    if device.type != "meta" and not is_causal(model):
        raise ModelError(
            f"model {recipe.name_or_path!r}: {type(model).__name__} is not a causal language model in this configuration: a later token "
            "changes earlier predictions, so training would show it the answers that it has to predict. Use a decoder-only model "
            "(Llama, Qwen, Mistral, GPT-2, ...); BERT-like models are decoders with is_decoder: true in config.json."
        )
    return BaseModel(model=model, tokenizer=tokenizer, device=device, dtype=choose_dtype(recipe.dtype, device))


def load_network(recipe: ModelRecipe, device: torch.device, *, silent: bool = True) -> transformers.PreTrainedModel:
    """The model of `load`, without its tokenizer. Raises ModelError."""
    dtype = choose_dtype(recipe.dtype, device)
    config = load_config(recipe)
    if silent:
        _silence(config)
    options: dict[str, Any] = {"config": config, "dtype": dtype, **_common(recipe)}
    if recipe.attn_implementation is not None:
        options["attn_implementation"] = recipe.attn_implementation
    if recipe.load_in_4bit:
        options |= _four_bit(dtype)
    if device.type != "cpu" or recipe.load_in_4bit:  # bitsandbytes would else take a GPU where there is one
        # Straight onto the device: a process per device would else need as many copies in main memory.
        options["device_map"] = {"": device}
    with _explained(recipe, "weights"), without_progress_bar():
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(recipe.name_or_path, output_loading_info=True, **options)
    model, info = loaded
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise ModelError(
            f"model {recipe.name_or_path!r}: {len(wrong)} weights are missing or have the wrong shape, {wrong[0]} among them. "
            "The files are incomplete or belong to another config.json."
        )
    if getattr(model, "_hf_peft_config_loaded", False):  # a hub that could not be asked before, and then answered
        raise ModelError(f"model {recipe.name_or_path!r}: an adapter was loaded with it. Give a model without one.")
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # bitsandbytes' second layout on such CPUs, which has no backward pass
            layer.support_avx512bf16_for_cpu = False
    model.base_revision = recipe.revision  # for what is trained on it: adapter_config.json names the base by both
    model.requires_grad_(False)
    forget_lengths(model)
    model.eval()
    return model


def bare_model(recipe: ModelRecipe) -> Any:
    """The recipe's model without weights, on torch's meta device. Raises ModelError for one that cannot be built."""
    config = load_config(recipe)
    with _explained(recipe, "layers"), torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.trust_remote_code)


def is_causal(model: transformers.PreTrainedModel) -> bool:
    """Whether a token changes no prediction before it. Asked of two short texts that differ in their last token."""
    length, vocabulary = 8, int(model.config.get_text_config().vocab_size)
    ids = (torch.arange(length, device=model.device) % vocabulary).repeat(2, 1)
    ids[1, -1] = (ids[1, -1] + vocabulary // 2) % vocabulary
    with torch.no_grad():
        one, other = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    rounding = 1e-4 if model.dtype in (torch.float32, torch.float64) else 0.02
    return not bool((one - other).abs().max() > rounding * one.abs().max())


def autocast(base: BaseModel) -> contextlib.AbstractContextManager[Any]:
    """Half-precision arithmetic for half-precision weights, around every forward pass; the adapter stays in float32."""
    if base.dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(base.device.type, dtype=base.dtype)
    return contextlib.nullcontext()


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that turns hidden states into logits; None for a model that does not name one."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return head if isinstance(head, nn.Module) else None


def checkpoint_activations(model: transformers.PreTrainedModel, on: bool) -> None:
    """Trade compute for memory in training: keep no activations inside a layer, run it again on the way back."""
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    if not on:
        getattr(model, f"{name}_disable")()
    elif model.supports_gradient_checkpointing:
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    else:
        raise ModelError(f"gradient_checkpointing: {type(model).__name__} does not support it. Switch it off.")


def _common(recipe: ModelRecipe) -> dict[str, Any]:
    return {"revision": recipe.revision or "main", "trust_remote_code": recipe.trust_remote_code}


def _check_folder(recipe: ModelRecipe) -> None:
    name = recipe.name_or_path
    hub.refuse_adapter(name, recipe.revision)
    if hub.is_local(name) and not (Path(name).expanduser() / "config.json").is_file():
        raise ModelError(f"model: {name} holds no config.json. Give the folder that `save_pretrained` wrote.")


def load_config(recipe: ModelRecipe) -> transformers.PretrainedConfig:
    """Its config.json. Raises ModelError for what is no causal language model."""
    _check_folder(recipe)
    with _explained(recipe, "config.json"):
        config = transformers.AutoConfig.from_pretrained(recipe.name_or_path, **_common(recipe))
    causal = set(transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = type(config) in transformers.AutoModelForCausalLM._model_mapping
    named = set(config.architectures or ())
    if not remote and (not known or (named and not named & causal)):
        raise ModelError(
            f"model {recipe.name_or_path!r} is not a causal language model: its config.json says "
            f"{', '.join(sorted(named)) or config.model_type}. loratune tunes decoder-only models (Llama, Qwen, Mistral, GPT-2, ...)."
        )
    return config


def _silence(config: transformers.PretrainedConfig) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            _silence(value)
        elif isinstance(value, float) and ("dropout" in name or name.endswith(("pdrop", "_drop"))):
            setattr(config, name, 0.0)


def _four_bit(dtype: torch.dtype) -> dict[str, Any]:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("bitsandbytes, which load_in_4bit needs,", "4bit", str(error)) from error
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": quantization}


@contextlib.contextmanager
def without_progress_bar() -> Iterator[None]:
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _explained(recipe: ModelRecipe, what: str) -> Iterator[None]:
    """Turn whatever Transformers, safetensors or the hub raise for a model that cannot be read into a ModelError."""
    try:
        with hub.asked_once(recipe.name_or_path):
            yield
    except (torch.OutOfMemoryError, MemoryError, ModelError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        where = "" if hub.is_local(recipe.name_or_path) else " Check the hub id, the network and, for a gated model, `hf auth login`."
        raise ModelError(f"model {recipe.name_or_path!r}: cannot load its {what}: {type(error).__name__}: {reason}.{where}") from error
