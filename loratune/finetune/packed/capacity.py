"""How much fits on the device: how many tokens into a pass, how many adapters beside them.

    bytes = fixed + sum over adapters k of c P_k + T * per_token         T tokens in the pass, P_k parameters of adapter k
    c     = 4 (master weights) + 4 (gradient) + 8 (AdamW's two moments) + 2 (copy for half-precision arithmetic)

`fixed` is what the loaded base model leaves in use; the limit is what this process may take of the device beside others.
`per_token` comes from a short probe on the longest examples: on a GPU the growth of the measured peak from a small pass to
one of at least twice the tokens, forward and backward; on CPU, where a peak that small cannot be told from the
allocator's habits, the bytes that autograd keeps for the backward pass.
Where the model is wrong after all, the engine meets the limit, halves its passes and remembers (engine.py).
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from loratune.data.batches import Tokens
from loratune.finetune import memory
from loratune.finetune.methods import LORA, Method
from loratune.finetune.packed.adapter import Adapter
from loratune.finetune.packed.base import PackedBase
from loratune.finetune.packed.layout import Share, flatten
from loratune.finetune.targets import linear_layers
from loratune.system.machine import available_memory
from loratune.work import Hyperparameters, TrainingRecipe

_SAFE = 0.9  # share of the memory that is planned with; the rest is for fragments and what others take
_SMALL, _LARGE = 256, 1024  # tokens of the two probing passes, on a GPU; more where a single example is longer


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """A device's memory, as far as it bears on passes."""

    limit: int  # bytes in all
    fixed: int  # bytes in use before any adapter
    per_token: float  # bytes that a token of a pass takes
    per_parameter: int  # bytes of an adapter's training state

    def room(self, parameters: int) -> int:
        """Tokens that a pass may hold beside adapters of that many parameters; 0 or less when there is no room at all."""
        return int((self.limit - self.fixed - parameters * self.per_parameter) / self.per_token)


def measure(base: PackedBase, tokens: Tokens, method: Method = LORA) -> Capacity:
    """Probe the device: a moment of computing, nothing is left behind. Raises what running out of memory raises, when there
    is no memory for an adapter. Where the longest example does not fit, a token is taken to need its share of what is free.
    """
    device, half = base.device, base.base.dtype in (torch.bfloat16, torch.float16)
    longest = np.argsort(-np.asarray(tokens.lengths), kind="stable")
    h = Hyperparameters(lora_r=16, lora_dropout=0.1, target_modules="all-linear")
    layers = {name: base.features(name) for name in linear_layers(base.model)}
    if device.type == "cuda":
        memory.free(device)  # of what loading left behind
        fixed, limit = torch.cuda.memory_allocated(device), memory.available(device)
    adapter = Adapter(layers, h, 0, TrainingRecipe(), dtype=base.base.dtype, device=device, method=method)
    if device.type == "cuda":
        per_token = _per_token(base, adapter, tokens, longest)
    else:
        count, saved = _saved(base, adapter, tokens, longest[:1])
        per_token, fixed = 2 * saved / count, resident()  # twice: gradients and intermediate results come on top
        limit = fixed + available_memory()
    del adapter
    return Capacity(limit=int(_SAFE * limit), fixed=fixed, per_token=max(1.0, per_token), per_parameter=16 + (2 if half else 0))


def resident() -> int:
    """Bytes of main memory that this process holds; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _share(tokens: Tokens, longest: np.ndarray, count: int) -> Share:
    """The fewest of the longest examples that hold `count` tokens."""
    needed = int(np.searchsorted(np.cumsum(np.asarray(tokens.lengths)[longest]), count)) + 1
    return Share(adapter=0, examples=longest[:needed])


def _per_token(base: PackedBase, adapter: Adapter, tokens: Tokens, longest: np.ndarray) -> float:
    """Bytes that each further token of a pass takes on a GPU."""
    began = torch.cuda.memory_allocated(base.device)
    seen: list[tuple[int, int]] = [(0, began)]
    for count in (_SMALL, _LARGE):
        try:
            seen.append(_peak(base, adapter, tokens, longest, max(count, 2 * seen[-1][0])))
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
            break
    if len(seen) == 1:
        return (memory.available(base.device) - began) / int(np.asarray(tokens.lengths)[longest[0]])
    small, large = seen[-2:] if seen[-1][0] > seen[-2][0] else (seen[0], seen[-1])  # all examples fit into the small pass
    return (large[1] - small[1]) / (large[0] - small[0])


def _peak(base: PackedBase, adapter: Adapter, tokens: Tokens, longest: np.ndarray, count: int) -> tuple[int, int]:
    """(tokens, peak bytes) of a pass of at least `count` tokens, where there are as many, forward and backward."""
    flat = flatten(tokens, [_share(tokens, longest, count)], base.device)
    memory.reset_peak(base.device)
    base.nll(flat, [adapter], [0]).sum().backward()
    memory.synchronize(base.device)
    return flat.tokens, memory.peak_bytes(base.device)


def _saved(base: PackedBase, adapter: Adapter, tokens: Tokens, examples: np.ndarray) -> tuple[int, int]:
    """(tokens, bytes that autograd keeps) of a forward pass; weights are not counted, nor a tensor twice."""
    flat = flatten(tokens, [Share(adapter=0, examples=examples)], base.device)
    weights = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    saved: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        base.nll(flat, [adapter], [0])
    return flat.tokens, sum(saved.values())
