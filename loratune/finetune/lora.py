"""Attaching a LoRA adapter to the frozen base model, and taking it off again.

    y = W x + scale * B A dropout(x)        scale = alpha / r, or alpha / sqrt(r) with rsLoRA

with A [r, in] ~ U(-1/sqrt(in), 1/sqrt(in)), which is PEFT's kaiming_uniform(a=sqrt(5)), and B [out, r] = 0 (Hu et al.
2021, arXiv 2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732). A is drawn from a generator of its own
per (seed, module name), row by row: it depends on nothing else, and at a higher rank it begins with the same rows.
"""

import hashlib
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from loratune.errors import ModelError
from loratune.finetune import layers
from loratune.finetune.dropout import DropoutKey, KeyedDropout
from loratune.finetune.peft_layers import addressable, refuse_lost, words_on_lost
from loratune.finetune.peft_layers import detach as detach
from loratune.finetune.peft_layers import lora_layers as lora_layers
from loratune.record.paths import ADAPTER_WEIGHTS
from loratune.system.files import new_folder, write_atomically
from loratune.system.names import nearest
from loratune.work import Hyperparameters

ADAPTER = "default"

# Last part of a linear layer's name, by what it does. Families that fuse q, k and v in one layer have no other choice.
_QUERY = {"q_proj", "query", "q", "q_lin", "wq"}
_KEY = {"k_proj", "key", "k", "k_lin", "wk"}
_VALUE = {"v_proj", "value", "v", "v_lin", "wv"}
_FUSED = {"qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "W_pack", "att_proj"}
_OUTPUT = {"o_proj", "out_proj", "dense", "c_proj", "out_lin", "wo", "attn_out"}
_MLP = {
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate_up_proj",
    "fc1",
    "fc2",
    "fc_in",
    "fc_out",
    "c_fc",
    "c_proj",
    "dense_h_to_4h",
    "dense_4h_to_h",
}
_MLP |= {"w1", "w2", "w3", "lin1", "lin2", "ff_proj", "ff_out"}
NAMED_SETS = ("qv", "qkvo", "mlp", "all-linear")


def attach(model: transformers.PreTrainedModel, hyperparameters: Hyperparameters, seed: int) -> tuple[peft.PeftModel, DropoutKey]:
    """Put a fresh, trainable adapter on `model`, in place; returns the PEFT model and the key of its dropout.

    The adapter's weights are float32, or float64 on a float64 base. Raises ModelError for target modules the
    model does not have and for a rank or dropout out of range.
    """
    h = hyperparameters
    config = peft_config(model, h)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT corrects it per layer
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # an old name that PEFT asks for
        wrapped = peft.get_peft_model(model, config, adapter_name=ADAPTER)
    key = DropoutKey(seed)
    for name, layer in lora_layers(wrapped):
        if isinstance(layer.lora_dropout[ADAPTER], nn.Dropout):
            layer.lora_dropout[ADAPTER] = KeyedDropout(h.lora_dropout, name, key)
        dtype = torch.float64 if layer.get_base_layer().weight.dtype == torch.float64 else torch.float32
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        a.to(dtype), b.to(dtype)
        with torch.no_grad():
            a.weight.copy_(initial_a(seed, name, h.lora_r, a.weight.shape[1]))
            b.weight.zero_()
    return wrapped, key


def peft_config(model: nn.Module, h: Hyperparameters) -> peft.LoraConfig:
    """PEFT's description of the adapter. Raises ModelError as `attach` does."""
    if h.lora_r < 1 or not 0 <= h.lora_dropout <= 1:
        raise ModelError(f"lora_r must be at least 1 and lora_dropout in [0, 1]; got {h.lora_r} and {h.lora_dropout}.")
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=h.lora_r,
        lora_alpha=h.lora_alpha,  # type: ignore[arg-type]  # a float serves, whatever PEFT's annotation says
        lora_dropout=h.lora_dropout,
        use_rslora=h.use_rslora,
        target_modules=targets(model, h.target_modules),
        init_lora_weights=False,  # set here, from a generator of our own
        revision=getattr(model, "base_revision", None),
        fan_in_fan_out=any(isinstance(module, transformers.pytorch_utils.Conv1D) for module in model.modules()),
    )


def scale(h: Hyperparameters) -> float:
    """What B A x is multiplied with."""
    return h.lora_alpha / (math.sqrt(h.lora_r) if h.use_rslora else h.lora_r)


def save_folder(folder: Path, model: nn.Module, h: Hyperparameters, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write an ordinary PEFT folder, aside, then put it in place of the old one. Raises StorageError.

    `tensors` are the A's and B's by `<module>.lora_A.weight` and `<module>.lora_B.weight`.
    """
    config = peft_config(model, h)
    config.base_model_name_or_path = getattr(model, "name_or_path", None)
    write_folder(folder, config, {f"base_model.model.{name}": tensor for name, tensor in tensors.items()})


def write_folder(folder: Path, config: peft.LoraConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a PEFT folder as `save_folder` does; `tensors` by their names in the file. Changes `config`.

    Beside it, in `<folder>.sha256`, stands the digest of its weights, by which the hand-over knows that they are those that
    were measured.
    """
    config.inference_mode = True
    config.init_lora_weights = True  # B = 0: a weight that is not in the file adds nothing, instead of noise
    config.target_modules = sorted(config.target_modules or ())  # PEFT makes a set of it, in no order
    config.target_parameters = None
    named = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with new_folder(folder) as fresh:
        config.save_pretrained(str(fresh))
        try:
            save_file(named, fresh / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        write_atomically(digest_of(folder), hashlib.sha256((fresh / ADAPTER_WEIGHTS).read_bytes()).hexdigest())


def digest_of(folder: Path) -> Path:
    """Where the SHA-256 of the weights of the PEFT folder `folder` stands."""
    return folder.with_name(f"{folder.name}.sha256")


def adapter_parameters(wrapped: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters, by name, sorted."""
    return dict(sorted((name, p) for name, p in wrapped.named_parameters() if p.requires_grad))


def initial_a(seed: int, module: str, r: int, features: int) -> torch.Tensor:
    """A's starting value, float32 [r, features] on CPU, a pure function of its arguments."""
    digest = hashlib.sha256(f"lora_A/{seed}/{module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    bound = 1 / math.sqrt(features)
    return torch.empty(r, features).uniform_(-bound, bound, generator=generator)


def targets(model: nn.Module, wanted: str | tuple[str, ...]) -> list[str]:
    """The shortest name endings that select exactly the wanted linear layers, for PEFT's `target_modules`.

    Raises ModelError as `chosen_layers` does.
    """
    chosen = chosen_layers(model, wanted)
    modules = [name for name, _ in model.named_modules() if name]
    if wanted not in NAMED_SETS:
        endings = wanted if isinstance(wanted, tuple) else (wanted,)
        if {name for name in modules if any(_ends(name, ending) for ending in endings)} == set(chosen):
            return sorted(endings)
    return _endings(chosen, modules)


def chosen_layers(model: nn.Module, wanted: str | tuple[str, ...]) -> list[str]:
    """The names of the wanted linear layers, in the model's order.

    `qv`: query and value projections; `qkvo`: all of attention; `mlp`; `all-linear`: both. Where a family fuses
    q, k and v, the fused layer stands for each of them. Layers that no adapter can go on (`layers.py`) or whose adapters plain
    PEFT would not load are left out of a set, and refused by name; a name stands for the text's layers of that name alone.
    Raises ModelError naming the layers that exist.
    """
    linear = linear_layers(model)
    if wanted not in NAMED_SETS:
        endings = wanted if isinstance(wanted, tuple) else (wanted,)
        _check_names(model, endings)
        chosen = [layer for layer in linear if any(_ends(layer, ending) for ending in endings)]
        if lost := _lost(model, chosen):
            refuse_lost(", ".join(endings), lost)
        return chosen
    chosen = [layer for layer in linear if wanted in _sets(layer)]
    leaves = {_leaf(layer) for layer in chosen}
    complete = bool(leaves & _QUERY and leaves & _VALUE) or bool(leaves & _FUSED) if wanted in ("qv", "qkvo") else bool(chosen)
    if not complete:
        _refuse(str(wanted), linear)
    kept = addressable(model, chosen)
    if not kept:
        refuse_lost(wanted, chosen)
    return kept


def _lost(model: nn.Module, layers: list[str]) -> list[str]:
    kept = set(addressable(model, layers))
    return [layer for layer in layers if layer not in kept]


def left_out(model: nn.Module, wanted: str | tuple[str, ...]) -> list[str]:
    """Lines on the layers that `wanted` names or stands for and that get no adapter.

    Raises ModelError as `chosen_layers` does.
    """
    chosen, known = set(chosen_layers(model, wanted)), layers.layers_of(model)
    endings = wanted if isinstance(wanted, tuple) else (wanted,)
    asked = {
        layer
        for layer in (*known.fit, *known.unfit)
        if (wanted in _sets(layer) if wanted in NAMED_SETS else any(_ends(layer, ending) for ending in endings))
    }
    unfit = {layer: why for layer, why in known.unfit.items() if layer in asked}
    phrases = [layers.in_words(unfit, known.fit)] if unfit else []
    if known.experts and wanted in ("mlp", "all-linear"):
        share, where = known.experts_share, layers.pattern(known.experts)
        phrases.append(f"the experts, {share:.0%} of the parameters ({where}: Transformers keeps them in tensors, not in linear layers)")
    lines = [f"target_modules {', '.join(endings)}: no adapter on {'; on '.join(phrases)}"] if phrases else []
    lost = [layer for layer in known.fit if layer in asked - chosen]
    return [*lines, words_on_lost(", ".join(endings), lost)] if lost else lines


def _check_names(model: nn.Module, endings: tuple[str, ...]) -> None:
    """Refuse names of no linear layer, and of layers that no adapter can go on."""
    known = layers.layers_of(model)
    wrong: dict[str, str] = {}
    for ending in endings:
        fit = [layer for layer in known.fit if _ends(layer, ending)]
        unfit = {layer: why for layer, why in known.unfit.items() if _ends(layer, ending)}
        if not fit and not unfit:
            _refuse(ending, list(known.fit))
        wrong |= {layer: why for layer, why in unfit.items() if why != layers.NOT_TEXT or not fit}
    if wrong:
        names = ", ".join(sorted({_leaf(layer) for layer in known.fit}))
        raise ModelError(
            f"target_modules: no adapter can go on {layers.in_words(wrong, known.fit)}. "
            f"Give others of its linear layers: {names or 'none'}; or one of {', '.join(NAMED_SETS)}."
        )


def _ends(layer: str, ending: str) -> bool:
    return layer == ending or layer.endswith("." + ending)


def _sets(layer: str) -> set[str]:
    """The named sets that a linear layer belongs to, by its name and its parents'."""
    leaf, parents = _leaf(layer), layer.rpartition(".")[0].rpartition(".")[2]
    attention = leaf in _QUERY | _KEY | _VALUE | _FUSED or (leaf in _OUTPUT and re.search(r"attn|attention|^att$", parents) is not None)
    found = {"all-linear"}
    if attention:
        found |= {"qkvo"}
        if leaf in _QUERY | _VALUE | _FUSED:
            found |= {"qv"}
    elif leaf in _MLP or re.search(r"mlp|ffn|feed_forward|expert", layer):
        found |= {"mlp"}
    return found


def linear_layers(model: Any) -> list[str]:
    """The names of all linear layers that an adapter can go on, in the model's order; never the output head."""
    return list(layers.layers_of(model).fit)


def _endings(chosen: list[str], everything: list[str]) -> list[str]:
    wanted, endings = set(chosen), set()
    for layer in chosen:
        parts = layer.split(".")
        for length in range(1, len(parts) + 1):
            ending = ".".join(parts[-length:])
            if all(name in wanted for name in everything if _ends(name, ending)):
                endings.add(ending)
                break
    return sorted(endings)


def _leaf(layer: str) -> str:
    return layer.rpartition(".")[2]


def _refuse(wanted: str, linear: list[str]) -> None:
    leaves = sorted({_leaf(layer) for layer in linear})
    hint = nearest(wanted, {*leaves, *NAMED_SETS} - {wanted}) or "."
    raise ModelError(
        f"target_modules: this model has no linear layers for {wanted!r}{hint} Its linear layers: {', '.join(leaves) or 'none'}; "
        f"allowed: those names, or one of {', '.join(NAMED_SETS)}."
    )
