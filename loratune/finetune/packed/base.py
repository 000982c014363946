"""The frozen base model of the packed engine: a flat batch in, the NLL of each response token out.

Transformers' own model files run unchanged. What is ours is hung into them: a hook on each linear layer adds the
adapters' deltas, an attention function keeps sequences apart, norms and rotary positions take fewer steps, the last
layer's queries and MLP are taken for the rows alone that predict a response token, and the output head is left out of
the model's forward pass, to be taken together with the loss. Whether a model bears that is tried when it is loaded: some
sequences, on both sides of every length at which the model changes, must come out as they do one by one.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from loratune.data.batches import collate
from loratune.errors import NotPackableError
from loratune.finetune import dropout, lora
from loratune.finetune import model as base_model
from loratune.finetune.memory import is_out_of_memory
from loratune.finetune.model import BaseModel
from loratune.finetune.packed import attention
from loratune.finetune.packed.adapter import Adapter
from loratune.finetune.packed.delta import Backend, Part, add_deltas
from loratune.finetune.packed.head import frozen_head_nll
from loratune.finetune.packed.layout import Flat, Share, Span, flatten
from loratune.finetune.packed.norm import quick_norms
from loratune.finetune.packed.rotary import quick_rotary
from loratune.finetune.rope import RopeSides, sides_of
from loratune.finetune.validation import token_nll
from loratune.work import Hyperparameters, TrainingRecipe

_SHORT = (7, 12, 5)  # tokens of the sequences that every model is tried on, backwards too
_LONGEST_TRIED = 4096  # tokens: a moment, and what a batch of long examples takes anyway


class PackedBase:
    """A base model made ready for flat batches of sequences up to `longest` tokens.

    Raises NotPackableError, leaving the model as it was.
    """

    def __init__(self, base: BaseModel, longest: int = 0) -> None:
        self.base, self.model, self.device = base, base.model, base.device
        self.sides = sides_of(self.model.config)
        self.head = base_model.output_head(self.model)
        if not isinstance(self.head, nn.Linear):
            raise NotPackableError("it has no linear output head")
        self.linear = {name: self.model.get_submodule(name) for name in lora.linear_layers(self.model)}
        odd = {type(layer).__name__ for layer in self.linear.values() if not isinstance(layer, nn.Linear)}
        if odd:
            raise NotPackableError(f"{type(self.model).__name__} has linear layers of type {', '.join(sorted(odd))}")
        if any(getattr(self.model.config.get_text_config(), "activation_sparsity_pattern", None) or ()):
            # Gemma 3n: its losses came out 2e-4 away from those of the examples one by one, for a reason that was not found.
            raise NotPackableError(f"{type(self.model).__name__} cuts activations at a threshold")
        self._anchor = torch.zeros((), device=self.device, requires_grad=True)
        self._spans: Sequence[Span] = ()
        self._adapters: Sequence[Adapter] = ()
        self._rows: torch.Tensor = torch.empty(0)
        self._predictors, self._width = torch.empty(0, dtype=torch.int64), 0
        self._hidden: torch.Tensor = torch.empty(0)  # what the head was given last
        self._training = self.checkpointing = False
        self.backend: Callable[[Sequence[Adapter]], Backend] = choose_backend
        self._before = self.model.config._attn_implementation
        self._hooks: list[Any] = []
        self._norms: list[tuple[Any, Any]] = []  # and the forward function that it had of its own, not its class's
        self._last = self._read_alone()
        attention.register()
        self._tried = _Trial(_lengths(self.model.config, longest))
        expected, gradient = self._reference()
        self.model.config._attn_implementation = attention.NAME
        for norm, forward in list(quick_norms(self.model)):
            self._norms.append((norm, vars(norm).get("forward")))
            norm.forward = forward
        self._hooks += quick_rotary(self.model)
        for name, layer in self.linear.items():
            self._hooks.append(layer.register_forward_hook(partial(self._add, name)))
        self._hooks.append(self.head.register_forward_pre_hook(self._cut))
        for name in self._last:
            module = self.model.get_submodule(name)
            self._hooks += [module.register_forward_pre_hook(self._narrow), module.register_forward_hook(self._widen)]
        if (last := self._last_layer()) is not None:
            self._hooks.append(last.register_forward_pre_hook(_ask_less, with_kwargs=True))
        try:
            self._try(expected)
            self._try_backward(gradient)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Take everything out of the model again."""
        for hook in self._hooks:
            hook.remove()
        for norm, before in self._norms:
            del norm.forward
            if before is not None:
                norm.forward = before
        self.model.config._attn_implementation = self._before

    def features(self, layer: str) -> tuple[int, int]:
        """A linear layer's (in, out)."""
        module: Any = self.linear[layer]
        return module.in_features, module.out_features

    def nll(self, flat: Flat, adapters: Sequence[Adapter], step_of: Sequence[int] | None = None) -> torch.Tensor:
        """NLL of each response token, [N], float32 or better; `flat.spans` say whose rows are whose.

        With `step_of`, each adapter's step, dropout is on and the result differentiable; the rest of a forward pass must not
        be begun before its backward pass is done.
        """
        self._spans, self._adapters, self._training = flat.spans if adapters else (), adapters, step_of is not None
        self._rows, self._predictors = dropout.row_hashes(flat.slots, flat.positions[0]), flat.predictors
        for adapter, step in zip(adapters, step_of or (), strict=False):
            adapter.key.step = step
        if self.checkpointing:
            self.model.train(self._training)  # Transformers recomputes layers in training mode only
        try:
            with base_model.autocast(self.base):
                self.model(input_ids=flat.ids, position_ids=flat.positions, use_cache=False, flat=flat)
            hidden = self._hidden[0].index_select(0, flat.predictors)
        finally:  # what is kept here would keep a failed pass's whole graph
            self._hidden = torch.empty(0)
        head: Any = self.head
        return frozen_head_nll(hidden, head.weight, head.bias, flat.labels)

    def _cut(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Keep what the head is given; let it compute nothing."""
        (self._hidden,) = arguments
        return (self._hidden[:, :0],)

    def _narrow(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give a module the rows alone that predict a response token."""
        (hidden,) = arguments
        self._width = hidden.shape[1]
        return (hidden.index_select(1, self._predictors),)

    def _widen(self, _: nn.Module, arguments: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
        return y.new_zeros(1, self._width, y.shape[-1]).index_copy(1, self._predictors, y)

    def _last_layer(self) -> nn.Module | None:
        layers = getattr(self.model.get_decoder(), "layers", None)
        return layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None

    def _read_alone(self) -> tuple[str, ...]:
        """The last layer's modules that work on each row by itself, for no other row: those there are by these names."""
        last = self._last_layer()
        found = {name: module for name, module in self.model.named_modules() if module is last}
        inside = {f"{name}.{part}" for name in found for part in ("mlp", "self_attn.q_proj", "self_attn.o_proj")}
        return tuple(name for name, _ in self.model.named_modules() if name in inside)

    def _add(self, name: str, _: nn.Module, arguments: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
        """Hook: add the adapters' deltas to a layer's output."""
        parts, narrowed = [], any(name == own or name.startswith(own + ".") for own in self._last)
        for span in self._spans:
            adapter = self._adapters[span.owner]
            if name in adapter.layers:
                p = adapter.hyperparameters.lora_dropout if self._training else 0.0
                parts.append(
                    Part(
                        start=span.first if narrowed else span.start,
                        stop=span.last if narrowed else span.stop,
                        a=adapter.work_a[name],
                        b=adapter.work_b[name],
                        grad_a=adapter.grad_a[name],
                        grad_b=adapter.grad_b[name],
                        scale=adapter.scale,
                        p=p,
                        key=adapter.key.of(name) if 0 < p < 1 else 0,
                    )
                )
        if not parts:
            return y
        rows = self._rows[self._predictors] if narrowed else self._rows
        return add_deltas(arguments[0], y, parts, rows, self._anchor, self.backend(self._adapters))

    def _reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(NLL of the tried sequences, gradient of the short ones by `_gradient`) as Transformers has them, one after the other."""
        nll, short = [], len(_SHORT)
        with self._refused("cannot be tried"), self._embeddings_seen() as seen:
            for i in range(len(self._tried)):
                with torch.set_grad_enabled(i < short), base_model.autocast(self.base):
                    nll.append(token_nll(self.model, self.head, collate(self._tried, [i], pad_id=0).to(self.device)))
                if i < short:
                    nll[-1].sum().backward()
            return torch.cat(nll).detach(), _gradient(seen[:short])

    def _try(self, expected: torch.Tensor) -> None:
        sides = self.sides(self._tried.lengths)
        together = [Share(owner=0, examples=np.flatnonzero(sides == side)) for side in np.unique(sides)]
        with self._refused("does not take a flat batch"), torch.no_grad():
            got = torch.cat([self.nll(flatten(self._tried, [share], self.device), ()) for share in together])
        tolerance = 0.05 if self.base.dtype in (torch.bfloat16, torch.float16) else 1e-4
        if got.shape != expected.shape or not torch.allclose(got, expected.to(got.dtype), rtol=tolerance, atol=tolerance):
            raise NotPackableError(f"{type(self.model).__name__} gives other losses in a flat batch")

    def _try_backward(self, expected: torch.Tensor) -> None:
        """Also with an adapter on every layer, which adds nothing yet: an operation may have a forward pass alone."""
        layers = {name: self.features(name) for name in self.linear}
        h = Hyperparameters(lora_r=1, lora_dropout=0.0, target_modules="all-linear")
        adapter = Adapter(layers, h, 0, TrainingRecipe(), dtype=self.base.dtype, device=self.device)
        flat = flatten(self._tried, [Share(owner=0, examples=np.arange(len(_SHORT)))], self.device)
        with self._refused("has no backward pass in a flat batch"), self._embeddings_seen() as seen:
            self.nll(flat, [adapter], [0]).sum().backward()
            got = _gradient(seen)
        tolerance = 0.25 if self.base.dtype in (torch.bfloat16, torch.float16) else 1e-3
        if not bool((got - expected).norm() <= tolerance * expected.norm()):  # nor where it is not finite
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


def _ask_less(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hook: behind the last layer only what predicts is read, so only that need ask in its attention."""
    flat: Flat | None = options.get("flat")
    return arguments, options | ({"flat": replace(flat, stretches=flat.reads)} if flat is not None else {})


def choose_backend(adapters: Sequence[Adapter]) -> Backend:
    """A loop on CPU; on a GPU, where a call costs more than the extra work, one product for all small adapters."""
    if adapters[0].parameters["lora_A"].device.type == "cpu":
        return "loop"
    return "concatenated" if sum(adapter.hyperparameters.lora_r for adapter in adapters) <= 256 else "grouped"


class _Trial:
    """Sequences on which a model is tried."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = np.asarray(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        length = int(self.lengths[index])
        return ((np.arange(length) * 7 + index * 5) % 40 + 3).astype(np.int32), np.ones(length, dtype=bool)


def _lengths(config: Any, longest: int) -> list[int]:
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
