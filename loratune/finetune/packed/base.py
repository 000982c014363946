"""The frozen base model of the packed engine: a flat batch in, the NLL of each response token out.

Transformers' own model files run unchanged. What is ours is hung into them: a hook on each linear layer adds the
adapters' deltas, an attention function keeps sequences apart, norms, rotary positions and MLPs take fewer steps, the
last layer's queries and MLP are taken for the rows alone that predict a response token, and the output head is left out
of the model's forward pass, to be taken together with the loss. Whether a model bears that is tried when it is loaded
(loading_check.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from loratune.errors import NotPackableError
from loratune.finetune import compiled, dropout, memory
from loratune.finetune import model as base_model
from loratune.finetune.model import BaseModel
from loratune.finetune.packed import attention
from loratune.finetune.packed.adapter import Adapter
from loratune.finetune.packed.delta import add_deltas
from loratune.finetune.packed.head import frozen_head_nll
from loratune.finetune.packed.layout import Flat
from loratune.finetune.packed.loading_check import LoadingCheck
from loratune.finetune.packed.mlp import quick_mlps
from loratune.finetune.packed.norm import quick_norms
from loratune.finetune.packed.products import Backend, LayerDelta, PassRows, has_grouped_kernel
from loratune.finetune.packed.rotary import quick_rotary
from loratune.finetune.rope import sides_of
from loratune.finetune.targets import linear_layers


@dataclass(kw_only=True)
class ForwardPass:
    """What the hooks of a forward pass read, and again those of layers that its backward pass recomputes."""

    flat: Flat
    adapters: Sequence[Adapter]  # `flat.spans` say whose rows are whose
    training: bool  # with dropout
    rows: PassRows
    predicting: PassRows  # the same of `flat.predictors`
    backend: Backend
    hidden: torch.Tensor | None = None  # [1, T, D], what the head was given


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
        self.linear = {name: self.model.get_submodule(name) for name in linear_layers(self.model)}
        odd = {type(layer).__name__ for layer in self.linear.values() if not isinstance(layer, nn.Linear)}
        if odd:
            raise NotPackableError(f"{type(self.model).__name__} has linear layers of type {', '.join(sorted(odd))}")
        if any(getattr(self.model.config.get_text_config(), "activation_sparsity_pattern", None) or ()):
            # Gemma 3n: its losses came out 2e-4 away from those of the examples one by one, for a reason that was not found.
            raise NotPackableError(f"{type(self.model).__name__} cuts activations at a threshold")
        self._anchor = torch.zeros((), device=self.device, requires_grad=True)
        self._pass: ForwardPass  # the present one; there is one before any hook is called
        self.checkpointing = False
        self.backend: Callable[[Sequence[Adapter]], Backend] = choose_backend
        self._before = self.model.config._attn_implementation
        self._hooks: list[Any] = []
        self._replaced: list[tuple[Any, Any]] = []  # modules, and the forward functions that they had of their own
        self._last = self._read_alone()
        attention.register_attention()
        check = LoadingCheck(base, longest)
        self.model.config._attn_implementation = attention.NAME
        for module, forward in [*quick_norms(self.model), *quick_mlps(self.model)]:
            self._replaced.append((module, vars(module).get("forward")))
            module.forward = forward
        self._hooks += quick_rotary(self.model)
        for name, layer in self.linear.items():
            self._hooks.append(layer.register_forward_hook(partial(self._add, name)))
        self._hooks.append(self.head.register_forward_pre_hook(self._cut))
        for name in self._last:
            module = self.model.get_submodule(name)
            self._hooks += [module.register_forward_pre_hook(self._select), module.register_forward_hook(self._put_back)]
        if (last := self._last_layer()) is not None:
            self._hooks.append(last.register_forward_pre_hook(_ask_less, with_kwargs=True))
        try:
            check.compare(self)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Take everything out of the model again."""
        for hook in self._hooks:
            hook.remove()
        for module, before in self._replaced:
            del module.forward
            if before is not None:
                module.forward = before
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
        for adapter, step in zip(adapters, step_of or (), strict=False):
            adapter.key.step = step
        rows, predicting = self._rows(flat, adapters, training=step_of is not None)
        present = self._pass = ForwardPass(
            flat=flat,
            adapters=adapters,
            training=step_of is not None,
            rows=rows,
            predicting=predicting,
            backend=self.backend(adapters) if adapters else "loop",
        )
        if self.checkpointing:
            self.model.train(present.training)  # Transformers recomputes layers in training mode only
        try:
            with base_model.autocast(self.base):
                self.model(input_ids=flat.ids, position_ids=flat.positions, use_cache=False, flat=flat)
            if present.hidden is None:
                raise RuntimeError("it does not call its output head")
            hidden = present.hidden.squeeze(0).index_select(0, flat.predictors)
        finally:  # what is kept here would keep a failed pass's whole graph
            present.hidden = None
        head: Any = self.head
        return frozen_head_nll(hidden, head.weight, head.bias, flat.labels)

    def _rows(self, flat: Flat, adapters: Sequence[Adapter], *, training: bool) -> tuple[PassRows, PassRows]:
        """What is known of all rows, and of those that predict. A GPU gets the keys of all layers' masks in one copy."""
        members = [adapters[span.adapter] for span in flat.spans] if adapters else []
        words = [[dropout.threshold(adapter.hyperparameters.lora_dropout) for adapter in members]]
        names: list[str] = []
        if training and compiled.on_gpu(flat.ids) and any(0 < adapter.hyperparameters.lora_dropout < 1 for adapter in members):
            names = [name for name in self.linear if any(name in adapter.layers for adapter in members)]
            words += [[adapter.key.of(name) for adapter in members] for name in names]
        held = memory.pinned(torch.tensor(words, dtype=torch.int32), self.device).to(self.device, non_blocking=True)
        keys = dict(zip(names, held[1:].unbind(), strict=True))
        hashes = dropout.row_hashes(flat.owners, flat.positions.squeeze(0))
        everything = PassRows(hashes=hashes, whose=flat.whose, thresholds=held[0], keys=keys)
        return everything, replace(everything, hashes=hashes[flat.predictors], whose=flat.whose[flat.predictors], made={})

    def _cut(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Keep what the head is given; let it compute nothing."""
        (self._pass.hidden,) = arguments
        return (arguments[0][:, :0],)

    def _select(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give a module the rows alone that predict a response token."""
        return (arguments[0].index_select(1, self._pass.flat.predictors),)

    def _put_back(self, _: nn.Module, arguments: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
        flat = self._pass.flat
        return y.new_zeros(1, flat.tokens, y.shape[-1]).index_copy(1, flat.predictors, y)

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
        present = self._pass
        if not present.adapters:
            return y
        parts, selected = [], any(name == own or name.startswith(own + ".") for own in self._last)
        for number, span in enumerate(present.flat.spans):
            adapter = present.adapters[span.adapter]
            if name in adapter.layers:
                p = adapter.hyperparameters.lora_dropout if present.training else 0.0
                parts.append(
                    LayerDelta(
                        layer=name,
                        number=number,
                        start=span.first if selected else span.start,
                        stop=span.last if selected else span.stop,
                        a=adapter.work_a[name],
                        b=adapter.work_b[name],
                        grad_a=adapter.grad_a.get(name),
                        grad_b=adapter.grad_b.get(name),
                        scale=adapter.scale,
                        p=p,
                        key=adapter.key.of(name) if 0 < p < 1 and not present.rows.keys else 0,
                    )
                )
        if not parts:
            return y
        rows = present.predicting if selected else present.rows
        return add_deltas(arguments[0], y, parts, rows, self._anchor, present.backend)


def _ask_less(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hook: behind the last layer only what predicts is read, so only that need ask in its attention."""
    flat: Flat | None = options.get("flat")
    return arguments, options | ({"flat": replace(flat, sequences=flat.last_layer)} if flat is not None else {})


def choose_backend(adapters: Sequence[Adapter]) -> Backend:
    """A loop on CPU; on a GPU, where a call costs more than the extra work, one product for all small adapters."""
    device = adapters[0].weights["lora_A"].device
    if device.type == "cpu":
        return "loop"
    if sum(adapter.hyperparameters.lora_r for adapter in adapters) <= 256:
        return "concatenated"
    return "grouped" if has_grouped_kernel(device, adapters[0].dtype) else "loop"
