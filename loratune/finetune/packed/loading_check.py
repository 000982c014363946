"""Whether a model bears what the packed engine hangs into it: tried when it is loaded, on a few sequences.

Their losses and gradients, taken one sequence after the other by the unmodified model, must come out the same in a flat
batch: of three short sequences, and of one beyond each length at which the model computes otherwise.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from loratune.data.batches import collate
from loratune.errors import NotPackableError
from loratune.finetune import model as base_model
from loratune.finetune.memory import is_out_of_memory
from loratune.finetune.model import BaseModel
from loratune.finetune.packed.adapter import Adapter
from loratune.finetune.packed.layout import Share, flatten
from loratune.finetune.rope import RopeSides, sides_of
from loratune.finetune.validation import token_nll
from loratune.work import Hyperparameters, TrainingRecipe

_SHORT = (7, 12, 5)  # tokens of the sequences that every model is tried on, backwards too
_LONGEST_TRIED = 4096  # tokens: a moment, and what a batch of long examples takes anyway


class LoadingCheck:
    """Made before the model is changed: NLL of the sequences and gradient of the short ones, as Transformers has them.

    Raises NotPackableError where they cannot be had.
    """

    def __init__(self, base: BaseModel, longest: int) -> None:
        self.base, self.model = base, base.model
        self.sequences = _Sequences(lengths_to_try(self.model.config, longest))
        nll, short, head = [], len(_SHORT), base_model.output_head(self.model)
        with self._refused("cannot be tried"), self._embeddings_seen() as seen:
            for i in range(len(self.sequences)):
                with torch.set_grad_enabled(i < short), base_model.autocast(base):
                    nll.append(token_nll(self.model, head, collate(self.sequences, [i], pad_id=0).to(base.device)))
                if i < short:
                    nll[-1].sum().backward()
            self.nll, self.gradient = torch.cat(nll).detach(), _gradient(seen[:short])

    def compare(self, packed: Any) -> None:
        """Raises NotPackableError where a `PackedBase` of this model has others."""
        self._compare_losses(packed)
        self._compare_gradients(packed)

    def _compare_losses(self, packed: Any) -> None:
        sides = packed.sides(self.sequences.lengths)
        together = [Share(adapter=0, examples=np.flatnonzero(sides == side)) for side in np.unique(sides)]
        with self._refused("does not take a flat batch"), torch.no_grad():
            got = torch.cat([packed.nll(flatten(self.sequences, [share], self.base.device), ()) for share in together])
        tolerance = 0.05 if self.base.dtype in (torch.bfloat16, torch.float16) else 1e-4
        if got.shape != self.nll.shape or not torch.allclose(got, self.nll.to(got.dtype), rtol=tolerance, atol=tolerance):
            raise NotPackableError(f"{type(self.model).__name__} gives other losses in a flat batch")

    def _compare_gradients(self, packed: Any) -> None:
        """Also with an adapter on every layer, which adds nothing yet: an operation may have a forward pass alone."""
        layers = {name: packed.features(name) for name in packed.linear}
        h = Hyperparameters(lora_r=1, lora_dropout=0.0, target_modules="all-linear")
        adapter = Adapter(layers, h, 0, TrainingRecipe(), dtype=self.base.dtype, device=self.base.device)
        flat = flatten(self.sequences, [Share(adapter=0, examples=np.arange(len(_SHORT)))], self.base.device)
        with self._refused("has no backward pass in a flat batch"), self._embeddings_seen() as seen:
            packed.nll(flat, [adapter], [0]).sum().backward()
            got = _gradient(seen)
        tolerance = 0.25 if self.base.dtype in (torch.bfloat16, torch.float16) else 1e-3
        if not bool((got - self.gradient).norm() <= tolerance * self.gradient.norm()):  # nor where it is not finite
            raise NotPackableError(f"{type(self.model).__name__} gives other gradients in a flat batch")

    @contextlib.contextmanager
    def _refused(self, what: str) -> Iterator[None]:
        try:
            yield
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            raise NotPackableError(f"{type(self.model).__name__} {what} ({type(error).__name__}: {error})") from error

    @contextlib.contextmanager
    def _embeddings_seen(self) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        """While open, (tokens, their embeddings) of each pass are kept, and the embeddings take gradients."""
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(_: nn.Module, arguments: tuple[Any, ...], embedded: torch.Tensor) -> torch.Tensor:
            seen.append((arguments[0].flatten(), embedded.detach().requires_grad_()))
            return seen[-1][1].clone()  # which the model may change in place

        handle = self.model.get_input_embeddings().register_forward_hook(keep)
        try:
            with torch.enable_grad():
                yield seen
        finally:
            handle.remove()


def _gradient(seen: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The sum over all passes of each token's gradient, [largest token, D] in float32 or better: however rows are laid out."""
    largest = max(int(ids.max()) for ids, _ in seen)
    total = torch.zeros(())
    for ids, embedded in seen:
        if embedded.grad is None:
            raise RuntimeError("no gradient reaches the embeddings")
        g = embedded.grad.flatten(0, -2)
        g = g.to(torch.promote_types(g.dtype, torch.float32))
        total = total.to(g) + g.new_zeros(largest + 1, g.shape[-1]).index_add_(0, ids, g)
    return total


class _Sequences:
    """Sequences on which a model is tried."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = np.asarray(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        length = int(self.lengths[index])
        return ((np.arange(length) * 7 + index * 5) % 40 + 3).astype(np.int32), np.ones(length, dtype=bool)


def lengths_to_try(config: Any, longest: int) -> list[int]:
    """Three short sequences, and one beyond each length at which the model computes otherwise; none beyond what it will be given.

    Raises NotPackableError for attention in chunks that are too long to be tried.
    """
    config = config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    borders = {getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "original_max_position_embeddings")}
    borders |= {rope.get("original_max_position_embeddings") for rope in [ropes, *ropes.values()] if isinstance(rope, dict)}
    if isinstance(sides := sides_of(config), RopeSides):
        borders |= {sides.switch, sides.grows}
    crossed = sorted({int(border) for border in borders if border and border < longest})
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk in crossed and chunk > _LONGEST_TRIED:
        raise NotPackableError(f"its attention works in chunks of {chunk} tokens, and the longest example has {longest}")
    return [*_SHORT, *(min(border + 5, longest) for border in crossed if border <= _LONGEST_TRIED)]
