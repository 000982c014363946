"""What a GPU would be given to do in one pass of the packed engine: counted without one, on torch's meta device.

Meta tensors have shapes and no numbers, so the very code of the GPU path runs at any size; `choose_backend`, attention and
compiled leaves take the branches that they take on CUDA. Counted are

- launches: the operations that reach the dispatcher but views and allocations, one each. A compiled leaf
  (loratune/finetune/compiled.py) is one, as is the variable-length attention kernel, forward and backward;
- bytes: what each of them reads and writes once, its tensor arguments and results;
- synchronising calls: reading a number back, sizes that depend on numbers, copies between devices that wait.

Layers are alike but the last, so a model of n layers costs c(2) + (n - 2) (c(3) - c(2)).
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.attention import varlen as torch_varlen
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import initialization

from loratune.finetune import compiled, model
from loratune.finetune.model import BaseModel
from loratune.finetune.packed import base, head, products, varlen
from loratune.finetune.packed.adapter import Adapter
from loratune.finetune.packed.layout import Share, flatten
from loratune.finetune.targets import chosen_layers
from loratune.work import Hyperparameters, TrainingRecipe

META = torch.device("meta")
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
}
_VIEWS = "view _unsafe_view t transpose permute slice select unsqueeze expand split split_with_sizes detach alias as_strided squeeze"
_ALLOCATIONS = "unflatten reshape unbind lift_fresh _reshape_alias empty empty_like new_empty empty_strided new_empty_strided"
_FREE = {*_VIEWS.split(" "), *_ALLOCATIONS.split(" ")}
_READS = {"_local_scalar_dense", "nonzero", "equal", "item", "masked_select", "unique_consecutive"}


@dataclass
class Cost:
    launches: float = 0
    bytes: float = 0
    syncs: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)

    def of_layers(self, more: "Cost", layers: int) -> "Cost":
        """With self of two layers and `more` of three."""
        add = layers - 2
        return Cost(
            launches=self.launches + add * (more.launches - self.launches),
            bytes=self.bytes + add * (more.bytes - self.bytes),
            syncs=self.syncs + more.syncs,
            kinds=Counter({k: n + add * (n - self.kinds[k]) if k in self.kinds else add * n for k, n in more.kinds.items()}),
        )


class Counting(TorchDispatchMode):
    """Counts while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()

    def add(self, name: str, read: Any, written: Any) -> None:
        seen = {id(x): x for x in [*_tensors(read), *_tensors(written)]}
        self.cost.launches += 1
        self.cost.bytes += sum(x.numel() * x.element_size() for x in seen.values())
        self.cost.kinds[name] += 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function._schema.name.split("::")[1]
        tensors = [*_tensors([args, kwargs]), *_tensors(out)]
        devices = {x.device.type for x in tensors}
        if name in _READS and "meta" in devices:
            self.cost.syncs[name] += 1
        if len(devices) > 1 and name in ("_to_copy", "copy_") and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
            self.cost.syncs[f"{name} between devices"] += 1
        if "meta" in devices and name not in _FREE:
            self.add(name, [args, kwargs], out)
            if name.endswith("_") and not name.endswith("__"):  # what is changed in place is read and written
                self.cost.bytes += sum(x.numel() * x.element_size() for x in _tensors(out))
        return out


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for one in tree:
            yield from _tensors(one)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


class _Kernel(torch.autograd.Function):
    """Flash attention's kernels."""

    @staticmethod
    def forward(ctx: Any, counting: Counting, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ctx.counting, out = counting, torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        counting.add("attention", [q, k, v], out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, out = ctx.saved_tensors
        found = [torch.empty_like(x) for x in (q, k, v)]
        ctx.counting.add("attention_back", [q, k, v, out, *grads], found)
        return None, *found


@contextlib.contextmanager
def as_on_a_gpu(counting: Counting, *, mixed: bool = True) -> Iterator[None]:
    """What asks for numbers or for CUDA answers as on a GPU; `mixed`: a product is added to a more precise sum in one call."""

    def leaf(self: compiled.Leaf, *given: Any) -> Any:
        with _disable_current_modes():
            out = self.function(*given)
        counting.add(self.function.__name__, list(given), out)
        return out

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return _Kernel.apply(counting, q, k, v)

    class NoCheck:
        def __init__(self, *_: Any) -> None: ...

        def compare(self, _: Any) -> None: ...

    def norms(network: torch.nn.Module) -> Iterator[Any]:
        for norm in [m for m in network.modules() if type(m).__name__.endswith("RMSNorm")]:
            yield norm, lambda x, norm=norm: base_norm(x, norm.weight, norm.variance_epsilon)

    from loratune.finetune.packed.norm import rms_norm as base_norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled.Leaf, "__call__", leaf)
        patch.setattr(varlen, "takes", lambda *_: True)
        patch.setattr(torch_varlen, "varlen_attn", attend)
        patch.setattr(base, "LoadingCheck", NoCheck)
        patch.setattr(base, "quick_norms", norms)  # which numbers decide otherwise
        patch.setattr("loratune.finetune.packed.mlp._same", lambda *_: True)
        patch.setattr("loratune.finetune.packed.rotary._same", lambda *_: True)
        patch.setattr(products, "adds_mixed", lambda *_: mixed)
        patch.setattr(head, "_product", lambda left, right, *, out: torch.mm(left, right, out_dtype=out.dtype, out=out))
        patch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None)
        patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        patch.setattr(model, "autocast", lambda _: contextlib.nullcontext())  # the meta device has none; all is bfloat16
        yield


def count(layers: int, *, adapters: int, batch: int, targets: str = "qv", mixed: bool = True) -> Cost:
    """One pass, forward and backward, and the steps of all its adapters, of rank 16 with dropout."""
    counting = Counting()
    with as_on_a_gpu(counting, mixed=mixed):
        network = _network(layers)
        frozen = base.PackedBase(BaseModel(model=network, tokenizer=None, device=META, dtype=torch.bfloat16))  # type: ignore[arg-type]
        h = Hyperparameters(lora_r=16, lora_alpha=16, lora_dropout=0.05, target_modules=targets)
        layers_of = {name: frozen.features(name) for name in chosen_layers(network, targets)}
        members = [Adapter(layers_of, h, k, TrainingRecipe(), dtype=torch.bfloat16, device=META) for k in range(adapters)]
        tokens = _Tokens()
        shares = []
        for k in range(adapters):
            examples = np.arange(k * batch, (k + 1) * batch)
            shares.append(Share(adapter=k, examples=examples, owners=[np.full(tokens.lengths[i], i) for i in examples]))
        with counting:
            flat = flatten(tokens, shares, META)
            nll = frozen.nll(flat, members, [0] * adapters)
            sums = [part.sum() for part in nll.split([span.last - span.first for span in flat.spans])]
            torch.autograd.backward([total * 0.01 for total in sums])
            torch.stack([member.clip(1.0) for member in members])
            for member in members:
                member.update(1.0)
            torch.stack([member.finite for member in members])
        frozen.release()
    return counting.cost


class _Tokens:
    """Of Alpaca's lengths: median about 125, half of them the response."""

    def __init__(self) -> None:
        generator = np.random.default_rng(1)
        self.lengths = np.clip(np.exp(generator.normal(4.85, 0.5, 1024)), 30, 512).astype(int)
        self._ids = [generator.integers(1, 32000, length).astype(np.int32) for length in self.lengths]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        return self._ids[index], np.arange(len(self._ids[index])) >= len(self._ids[index]) // 2


def _network(layers: int) -> Any:
    config = transformers.LlamaConfig(**LLAMA_7B, num_hidden_layers=layers)
    with torch.device("meta"), initialization.no_init_weights():
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False).eval()
