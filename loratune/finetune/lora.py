"""LoRA: its PEFT configuration, its starting values, attaching it to a frozen model, saving it.

    y = W x + scale * B A dropout(x)        scale = alpha / r, or alpha / sqrt(r) with rsLoRA

with A [r, in] ~ U(-1/sqrt(in), 1/sqrt(in)), which is PEFT's kaiming_uniform(a=sqrt(5)), and B [out, r] = 0 (Hu et al.
2021, arXiv 2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732). A is drawn from a generator of its own
per (seed, module name), row by row: it depends on nothing else, and at a higher rank it begins with the same rows.
"""

import hashlib
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import peft
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from loratune.errors import ModelError
from loratune.finetune.dropout import DropoutKey, KeyedDropout
from loratune.finetune.peft_layers import ADAPTER, lora_layers
from loratune.finetune.targets import target_endings
from loratune.record.paths import ADAPTER_WEIGHTS
from loratune.system.files import new_folder, write_atomically
from loratune.work import Hyperparameters


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
        target_modules=target_endings(model, h.target_modules),
        init_lora_weights=False,  # set here, from a generator of our own
        base_model_name_or_path=getattr(model, "name_or_path", None),
        revision=getattr(model, "base_revision", None),
        fan_in_fan_out=any(isinstance(module, transformers.pytorch_utils.Conv1D) for module in model.modules()),
    )


def scale(h: Hyperparameters) -> float:
    """What B A x is multiplied with."""
    return h.lora_alpha / (math.sqrt(h.lora_r) if h.use_rslora else h.lora_r)


def adapter_size(shapes: Iterable[tuple[int, int]], h: Hyperparameters) -> int:
    """Trainable parameters on layers of these (in, out) features: r x the sum of in + out."""
    return h.lora_r * sum(features + out for features, out in shapes)


def save_adapter(folder: Path, config: peft.LoraConfig, weights: Mapping[str, torch.Tensor]) -> None:
    """Write an ordinary PEFT folder, aside, then put it in place of the old one. Raises StorageError. Changes `config`.

    `weights` by their names in the file, `base_model.model.<module>.lora_A.weight`. Beside the folder, in `<folder>.sha256`,
    stands their digest, by which the hand-over knows that these are the weights that were measured.
    """
    config.inference_mode = True
    config.init_lora_weights = True  # B = 0: a weight that is not in the file adds nothing, instead of noise
    config.target_modules = sorted(config.target_modules or ())  # PEFT makes a set of it, in no order
    config.target_parameters = None
    named = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
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
