"""Several trained LoRA adapters on one frozen model at once, for answering: no gradients, no dropout.

    y = W x + scale_k B_k A_k x        for the rows of adapter k

The rows of a batch are K equal blocks, one per adapter in use, in order. A place without an adapter is the bare
model: nothing is added to its block. Adapters of one rank that stand side by side share a batched product; small ranks
count as one, filled up with zeros.

Notation: K adapters in use, n rows each, in and out features of a layer, r rank.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn
from torch.nn import functional

from loratune.downstream.answering.plain_lora import more_than_plain
from loratune.errors import ModelError
from loratune.finetune.model import BaseModel
from loratune.record.paths import ADAPTER_FILES

_SMALL = 16  # a product of this rank costs little more than one of rank 1, and less than two products
_PREFIX = "base_model.model."


Run = tuple[int, int, torch.Tensor, torch.Tensor]  # blocks `start` to `stop`, their A^T [k, in, r] and scaled B^T [k, r, out]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The weights of a PEFT folder."""

    folder: Path
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer -> A^T [in, r] and scale * B^T [r, out]
    rank: int


def read_adapter(folder: Path, base: BaseModel) -> Lora:
    """Read a PEFT LoRA folder for `base`. Raises ModelError for one that is absent, damaged, or more than plain LoRA."""
    try:
        configuration, tensors_file = ((folder / name).read_bytes() for name in ADAPTER_FILES)
        config, tensors = json.loads(configuration), load(tensors_file)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder} holds no readable adapter: {error}. Give the `adapter` folder of a completed trial.") from error
    if more := more_than_plain(config):
        raise ModelError(f"{folder}: only plain LoRA adapters can be scored together; this one has {more}.")
    exact = torch.float64 if base.dtype == torch.float64 else torch.float32
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    weights = {}
    for name in sorted({name.rpartition(".lora_")[0] for name in tensors}):
        try:
            a, b = (tensors.pop(f"{name}.lora_{side}.weight").to(base.device, exact) for side in "AB")
        except KeyError as error:
            raise ModelError(f"{folder}: the adapter has no weight {error}; its file is incomplete.") from error
        weights[name.removeprefix(_PREFIX)] = (a.T.contiguous(), (b.T * scale).contiguous())
    if tensors or not weights:
        raise ModelError(f"{folder}: the adapter's file holds {', '.join(sorted(tensors)[:3]) or 'no weights'}, which plain LoRA has not.")
    return Lora(folder=folder, weights=weights, rank=config["r"])


class Adapters:
    """Hooks on the linear layers of `base` that add the deltas of the adapters in use. `close` takes them off."""

    def __init__(self, base: BaseModel, adapters: Sequence[Lora | None]) -> None:
        """A place that holds None is the bare model. Raises ModelError for an adapter that does not fit the model."""
        self.adapters = list(adapters)
        self._active: tuple[int, ...] = ()
        self._runs: dict[str, list[Run]] = {}
        layers = dict(base.model.named_modules())
        names = sorted({name for adapter in adapters if adapter for name in adapter.weights})
        for adapter in adapters:
            for name, (a, b) in adapter.weights.items() if adapter else ():
                weight = getattr(layers.get(name), "weight", None)
                if weight is None or (not hasattr(weight, "quant_state") and {a.shape[0], b.shape[1]} != set(weight.shape)):
                    raise ModelError(f"{adapter.folder}: its weights for {name} do not fit the model. Was it trained on another one?")  # type: ignore[union-attr]
        self._handles = [layers[name].register_forward_hook(partial(self._add, name)) for name in names]

    def by_rank(self, places: Sequence[int]) -> list[int]:
        """The places in the order in which products are shared most."""
        return sorted(places, key=lambda place: (self._rank(place), place))

    @contextlib.contextmanager
    def use(self, places: Sequence[int]) -> Iterator[None]:
        """While open, batches hold the rows of these places, block by block."""
        before = self._active
        self._activate(tuple(places))
        try:
            yield
        finally:
            self._activate(before)

    @contextlib.contextmanager
    def only(self, first: int, stop: int) -> Iterator[None]:
        """While open, batches hold the rows of some of the blocks in use."""
        active, runs = self._active, self._runs
        if stop - first < len(active):
            self._active, self._runs = active[first:stop], {name: list(_between(own, first, stop)) for name, own in runs.items()}
        try:
            yield
        finally:
            self._active, self._runs = active, runs

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _rank(self, place: int) -> int:
        adapter = self.adapters[place]
        return adapter.rank if adapter else 0

    def _activate(self, places: tuple[int, ...]) -> None:
        if places == self._active:
            return
        self._active, self._runs = places, {}
        for name in {name for place in places for name in getattr(self.adapters[place], "weights", ())}:
            runs: list[tuple[int, int, list[torch.Tensor], list[torch.Tensor]]] = []
            for block, place in enumerate(places):
                adapter = self.adapters[place]
                if adapter is None or name not in adapter.weights:
                    continue
                a, b = adapter.weights[name]
                if runs and runs[-1][1] == block and _alike(runs[-1][2][-1], a):
                    start, _, many_a, many_b = runs.pop()
                    runs.append((start, block + 1, [*many_a, a], [*many_b, b]))
                else:
                    runs.append((block, block + 1, [a], [b]))
            self._runs[name] = [(start, stop, _together(a, 1), _together(b, 0)) for start, stop, a, b in runs]

    def _add(self, name: str, module: nn.Module, arguments: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor | None:
        runs = self._runs.get(name)
        if not runs:
            return None
        x, blocks = arguments[0], len(self._active)
        x_blocks, y_blocks = x.reshape(blocks, -1, x.shape[-1]), y.reshape(blocks, -1, y.shape[-1])
        for start, stop, a, b in runs:
            z = torch.bmm(x_blocks[start:stop].to(a.dtype), a)  # [k, n, r]; under autocast in half precision
            if z.dtype == b.dtype == y.dtype:
                y_blocks[start:stop].baddbmm_(z, b)
            else:
                y_blocks[start:stop] += torch.bmm(z, b).to(y.dtype)
        return y_blocks.view(y.shape)


def _alike(*sides: torch.Tensor) -> bool:
    """Whether A^T [in, r] of several adapters go into one product."""
    return len({max(side.shape[1], _SMALL) for side in sides}) == 1


def _between(runs: list[Run], first: int, stop: int) -> Iterator[Run]:
    """What of the runs lies in these blocks, counted from the first of them."""
    for begin, end, a, b in runs:
        low, high = max(begin, first), min(end, stop)
        if low < high:
            yield low - first, high - first, a[low - begin : high - begin], b[low - begin : high - begin]


def _together(sides: list[torch.Tensor], dim: int) -> torch.Tensor:
    """One tensor of A^T or B^T of several adapters, their ranks, at `dim`, filled up. Of one adapter without a copy."""
    rank = max(side.shape[dim] for side in sides)
    filled = [side if side.shape[dim] == rank else functional.pad(side, (0, 0) * (1 - dim) + (0, rank - side.shape[dim])) for side in sides]
    return torch.stack(filled) if len(filled) > 1 else filled[0].unsqueeze(0)
