"""Whether an adapter's folder, loaded by plain PEFT as its user will load it, is the adapter that was trained.

Checked are the weights: each one of the file is in the loaded model with its value, and the model has no other; the scale of
each layer; and the loss on a few validation examples. The loss that is expected is computed without PEFT: the file's A and
B, added to the outputs of the layers that they are named after,

    y = W x + scale B A x

Where the examples are the whole validation set, it is also the loss that the study recorded.
"""

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from loratune.data.batches import Tokens
from loratune.data.prepared import Prepared, pack_tokens
from loratune.errors import ModelError, StorageError
from loratune.finetune import lora, memory, model
from loratune.finetune.peft_layers import ADAPTER, lora_layers
from loratune.finetune.validation import validate
from loratune.record.paths import ADAPTER_WEIGHTS
from loratune.work import Hyperparameters, ModelRecipe

EXAMPLES = 32  # of the validation set, at most
EXACT = 1e-4  # how far losses may be apart in float32 or better, in nats; half precision: ROUGH of the loss
ROUGH = 0.02
_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class LossSample:
    """What a loss is compared on."""

    tokens: Tokens
    whole: bool  # it is the whole validation set


def loss_sample(data: Path | None, vocabulary: int) -> LossSample:
    """The first examples of the prepared data's validation set; where that is not there any more, some made-up ones."""
    if data is not None:
        with contextlib.suppress(StorageError):  # the cache was emptied: two losses can be compared on any text
            found = Prepared.load(data).validation
            chosen = [found[i] for i in range(min(EXAMPLES, len(found)))]
            return LossSample(tokens=pack_tokens(chosen), whole=len(found) <= EXAMPLES)
    made_up = [((np.arange(24) * 7 + i * 5) % vocabulary, np.arange(24) >= 8) for i in range(4)]
    return LossSample(tokens=pack_tokens(made_up), whole=False)


def check_adapter(
    folder: Path,
    recipe: ModelRecipe,
    h: Hyperparameters,
    *,
    data: Path | None = None,
    recorded: float | None = None,
    exact: bool = True,
    device: str = "cpu",
) -> float:
    """Load the PEFT folder on its base model, and compare; returns its loss on the sample in plain PEFT.

    data: the study's prepared data. recorded: the loss over its whole validation set; None where it is not known. exact: it was
    measured in float32 or better. device: where CUDA is absent, or has too little memory, the CPU does it.
    Raises ModelError that names the weights, or the losses, that are not what they should be.
    """
    where = model.choose_device(device) if torch.cuda.is_available() else torch.device("cpu")
    try:
        return _check(folder, recipe, h, data, recorded, exact, where)
    except Exception as error:
        if where.type == "cpu" or not memory.is_out_of_memory(error):
            raise
    memory.free(where)
    return _check(folder, recipe, h, data, recorded, exact, torch.device("cpu"))


def _check(
    folder: Path, recipe: ModelRecipe, h: Hyperparameters, data: Path | None, recorded: float | None, exact: bool, device: torch.device
) -> float:
    tensors = weights(folder)
    if recipe.load_in_4bit and device.type == "cpu":
        recipe, recorded = replace(recipe, load_in_4bit=False), None  # another model than was measured
    network = model.load_network(recipe, device, silent=False)
    try:
        where = loss_sample(data, network.config.get_text_config().vocab_size)
        expected = with_deltas(network, tensors, lora.scale(h), where.tokens)
        wrapped = load_adapter(network, folder)
        _compare_weights(folder, wrapped, tensors, lora.scale(h))
        found = exact_loss(wrapped, network, where.tokens)
        ours = network.dtype in (torch.float32, torch.float64)
    finally:
        del network
        memory.free(device)
    compare_losses(folder, found, "plain PEFT", expected, "its own weights", exact=ours)
    if where.whole and recorded is not None:
        compare_losses(folder, found, "plain PEFT", recorded, "the record", exact=ours and exact)
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The file's tensors, on the CPU. Raises ModelError for a file that is damaged, or not the one that training wrote."""
    path, written = folder / ADAPTER_WEIGHTS, lora.digest_of(folder)
    try:
        tensors = load_file(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        same = not written.is_file() or written.read_text() == digest
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not same:
        raise ModelError(f"{path} is not the file that training wrote: its SHA-256 is {digest}, in {written} stands another. {_AGAIN}")
    return tensors


_AGAIN = "It was not handed over. Restore the folder, or train the trial again."


def load_adapter(network: nn.Module, folder: Path) -> peft.PeftModel:
    """The adapter on the base model, in place, by plain PEFT. Raises ModelError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is an error here, and told as one
            return peft.PeftModel.from_pretrained(network, str(folder))
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, OSError) as error:
        if memory.is_out_of_memory(error):
            raise
        raise ModelError(f"{folder}: PEFT cannot load it: {' '.join(str(error).split())[:300]}. {_AGAIN}") from error


def exact_loss(network: nn.Module, base: nn.Module, tokens: Tokens) -> float:
    """The one loss, of one example at a time; plain arithmetic in the model's own precision."""
    value, _ = validate(network.eval(), tokens, batch_size=1, pad_id=0, head=model.output_head(base))
    return value


def with_deltas(network: nn.Module, tensors: Mapping[str, torch.Tensor], scale: float, tokens: Tokens) -> float:
    """The loss of the bare model with `scale` B A x added to its layers' outputs. Raises ModelError for weights without a layer."""
    layers = dict(network.named_modules())
    with contextlib.ExitStack() as hooks:
        for name in sorted({key.rpartition(".lora_")[0] for key in tensors}):
            sides = [tensors.get(f"{name}.lora_{side}.weight") for side in "AB"]
            layer = layers.get(name.removeprefix(_PREFIX))
            if layer is None or any(side is None or side.dim() != 2 for side in sides) or sides[0].shape[0] != sides[1].shape[1]:  # type: ignore[union-attr]
                raise ModelError(f"the adapter's weights {name}.* are not whole, or the base model has no such layer. {_AGAIN}")
            parameter = next(layer.parameters())
            exact = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            a, b = (side.to(parameter.device, exact) for side in sides if side is not None)
            hooks.enter_context(_hooked(layer, partial(_add, a, b * scale)))
        try:
            return exact_loss(network, network, tokens)
        except RuntimeError as error:
            if memory.is_out_of_memory(error):
                raise
            raise ModelError(f"the adapter's weights do not fit the base model's layers: {error}. {_AGAIN}") from error


def _add(a: torch.Tensor, b: torch.Tensor, _: nn.Module, arguments: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
    return (y + arguments[0].to(a.dtype) @ a.T @ b.T).to(y.dtype)


@contextlib.contextmanager
def _hooked(layer: nn.Module, hook: Callable[..., torch.Tensor]) -> Iterator[None]:
    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def compare_losses(folder: Path, found: float, how: str, expected: float, whose: str, *, exact: bool) -> None:
    """Raise ModelError when two losses are further apart than rounding takes them."""
    allowed = EXACT if exact else ROUGH * max(1.0, abs(expected))
    if not abs(found - expected) <= allowed:  # NaN is not near anything
        raise ModelError(
            f"{folder} is not what was measured: its loss is {found:.6f} in {how}, and {expected:.6f} by {whose}; "
            f"at most {allowed:.2g} apart was allowed. {_AGAIN}"
        )


def _compare_weights(folder: Path, wrapped: nn.Module, tensors: Mapping[str, torch.Tensor], scale: float) -> None:
    loaded = {name.replace(f".{ADAPTER}.", "."): p for name, p in wrapped.named_parameters() if ".lora_" in name}
    wrong = [
        ("not in the file, so new in each loading", sorted(loaded.keys() - tensors.keys())),
        ("in the file, and not loaded", sorted(tensors.keys() - loaded.keys())),
        ("loaded with other values", [name for name in sorted(loaded.keys() & tensors.keys()) if not _same(loaded[name], tensors[name])]),
        ("of another scale than the trial's", [n for n, layer in lora_layers(wrapped) if layer.scaling[ADAPTER] != scale]),
    ]
    told = [f"{what}: {_some(names)}" for what, names in wrong if names]
    if told:
        raise ModelError(f"{folder} is not what was trained when plain PEFT loads it; {'; '.join(told)}. {_AGAIN}")


def _same(loaded: torch.Tensor, written: torch.Tensor) -> bool:
    return loaded.shape == written.shape and torch.equal(loaded.detach().cpu().to(written.dtype), written)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
