"""Which linear layers of a model an adapter can go on: those that run on text, called as modules, tensor in and tensor out.

The model itself is asked: its twin without memory (torch's meta device, built from the config) is given a few tokens, and
hooks note which layers were called with what. So a model of which only the config was read and the loaded one answer alike.
Where a twin cannot run (a mixture of experts may need numbers), the parts of the model tell: the text decoder runs.
Left out as well are routers, which choose experts (PEFT's users leave them out, and most families have none that is a
linear layer), and layers whose weight the model reads without calling them (Mamba's): an adapter there would do nothing.
"""

import copy
import inspect
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import nn

LINEAR = (nn.Linear, transformers.pytorch_utils.Conv1D)  # bitsandbytes' quantised layers are nn.Linear
NOT_TEXT, ROUTER, READ, ODD = "text does not run", "routers", "the model reads their weights without calling them", "return no tensor"
_TOKENS = 8
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Layers:
    """The linear layers of a model but its output head, by their full names, in the model's order."""

    fit: tuple[str, ...]  # an adapter can go on these
    unfit: Mapping[str, str]  # and on these it cannot: why
    experts: tuple[str, ...]  # modules that hold several experts in one tensor, so in no linear layer
    experts_share: float  # of the model's parameters


@dataclass(frozen=True)
class Trace:
    """What a few tokens of text called: layers and embeddings by name, and whether a tensor came in and a tensor out."""

    called: Mapping[str, bool]


_known: "weakref.WeakKeyDictionary[nn.Module, Layers]" = weakref.WeakKeyDictionary()


def model_layers(model: Any) -> Layers:
    """Sort the model's linear layers; on whatever device it is, with or without memory. Asked once per model."""
    if model not in _known:
        _known[model] = sort_layers(model, trace_text(model))
    return _known[model]


def sort_layers(model: Any, traced: Trace | None) -> Layers:
    """As `model_layers`, from what a trace showed; without one, from the model's parts."""
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR) and module is not head}
    text = decoder_name(model)
    counts = _expert_counts(model)
    unfit = {}
    for name, module in linear.items():
        if text and not name.startswith(text + "."):
            unfit[name] = NOT_TEXT
        elif _read_only(model, name):
            unfit[name] = READ
        elif traced is not None and name not in traced.called:
            unfit[name] = NOT_TEXT
        elif _routes(name, module, counts):
            unfit[name] = ROUTER
        elif traced is not None and not traced.called[name]:
            unfit[name] = ODD
    experts = [(name, module) for name, module in model.named_modules() if _fused(module)]
    inside = sum(p.numel() for _, module in experts for p in module.parameters())
    return Layers(
        fit=tuple(name for name in linear if name not in unfit),
        unfit=unfit,
        experts=tuple(name for name, _ in experts),
        experts_share=inside / max(1, sum(p.numel() for p in model.parameters())),
    )


def trace_text(model: Any, tokens: int = _TOKENS) -> Trace | None:
    """Run the model's twin on `tokens` tokens of text; None where that cannot be done without numbers."""
    called: dict[str, bool] = {}

    def note(name: str, arguments: tuple[Any, ...], result: Any) -> None:
        called[name] = bool(arguments) and isinstance(arguments[0], torch.Tensor) and isinstance(result, torch.Tensor)

    try:
        with torch.device("meta"):
            twin = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
            for name, module in twin.named_modules():
                if isinstance(module, (*LINEAR, nn.Embedding)):
                    module.register_forward_hook(lambda _, arguments, result, name=name: note(name, arguments, result))
                elif _fused(module):
                    module.forward = lambda hidden, *_, **__: hidden  # which expert sees which token depends on numbers
            ids = torch.zeros(1, tokens, dtype=torch.int64)
            with torch.no_grad():
                twin(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception:  # a model's own file may raise anything for tensors that have no content
        return None
    return Trace(called)


def decoder_name(model: Any) -> str:
    """The name of the part that text runs, in a model of several parts; "" for a model of text alone."""
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return ""
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), "")


def explain_unfit(unfit: Mapping[str, str], fit: Sequence[str]) -> str:
    """Where the layers are and why no adapter goes there, a phrase for each reason."""
    phrases = []
    for reason in dict.fromkeys(unfit.values()):
        layers = [layer for layer, why in unfit.items() if why == reason]
        where = pattern(_tops(layers, fit) if reason == NOT_TEXT else layers)
        phrases.append(f"{where} ({len(layers)} linear layer{'s' * (len(layers) > 1)}: {reason})")
    return "; on ".join(phrases)


def pattern(names: Iterable[str]) -> str:
    """Names of modules, those that differ in their number as one."""
    return ", ".join(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))


def _tops(layers: Iterable[str], fit: Sequence[str]) -> Iterator[str]:
    """The largest modules around `layers` that hold none of `fit`."""
    taken = {layer[:end] for layer in fit for end in [i for i, c in enumerate(layer) if c == "."] + [len(layer)]}
    for layer in layers:
        parts = layer.split(".")
        names = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        yield next(name for name in names if name not in taken)


def _expert_counts(model: Any) -> set[int]:
    config = getattr(model, "config", None)
    if config is None:
        return set()
    text = config.get_text_config()
    found = {getattr(part, key, None) for part in (text, getattr(text, "ffn_config", None)) for key in _EXPERTS}
    return {value for value in found if isinstance(value, int)}


def _routes(name: str, module: Any, counts: set[int]) -> bool:
    near = ".".join(name.split(".")[-2:])
    wide = module.weight.shape[0 if isinstance(module, nn.Linear) else 1]
    return wide in counts and re.search(r"router|gating|(^|\.)(gate|wg|classifier)(\.|$)", near) is not None


def _read_only(model: Any, name: str) -> bool:
    """Whether the class around the layer hands its weight to a kernel or a product of its own."""
    parent, _, leaf = name.rpartition(".")
    return re.search(rf"self\.{re.escape(leaf)}\.weight(,\s*$|\s*@)", _source(type(model.get_submodule(parent))), re.MULTILINE) is not None  # type: ignore[arg-type]


@lru_cache
def _source(kind: type) -> str:
    """The text of a class; it is parsed for that, a fiftieth of a second, and a model has few classes. Empty where there is no file."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # as for a class made in a notebook
        return ""


def _fused(module: nn.Module) -> bool:
    return "Experts" in type(module).__name__ and any(p.dim() > 2 for p in module.parameters(recurse=False))
