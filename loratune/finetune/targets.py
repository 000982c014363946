"""From `target_modules` to the linear layers that get an adapter: named sets, names of layers, and what is refused."""

import re

from torch import nn

from loratune.errors import ModelError
from loratune.finetune import layers
from loratune.finetune.peft_layers import addressable, lost_line, refuse_lost
from loratune.system.names import nearest

# Last part of a linear layer's name, by what it does. Families that fuse q, k and v in one layer have no other choice.
_QUERY = {"q_proj", "query", "q", "q_lin", "wq"}
_KEY = {"k_proj", "key", "k", "k_lin", "wk"}
_VALUE = {"v_proj", "value", "v", "v_lin", "wv"}
_FUSED = {"qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "W_pack", "att_proj"}
_OUTPUT = {"o_proj", "out_proj", "dense", "c_proj", "out_lin", "wo", "attn_out"}
_MLP = {
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "fc_in", "fc_out", "c_fc", "c_proj"),
    *("dense_h_to_4h", "dense_4h_to_h", "w1", "w2", "w3", "lin1", "lin2", "ff_proj", "ff_out"),
}
NAMED_SETS = ("qv", "qkvo", "mlp", "all-linear")


def target_endings(model: nn.Module, wanted: str | tuple[str, ...]) -> list[str]:
    """The shortest name endings that select exactly the wanted linear layers, for PEFT's `target_modules`.

    Raises ModelError as `chosen_layers` does.
    """
    chosen = chosen_layers(model, wanted)
    modules = [name for name, _ in model.named_modules() if name]
    if wanted not in NAMED_SETS:
        endings = _listed(wanted)
        if {name for name in modules if _ends(name, endings)} == set(chosen):
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
        endings = _listed(wanted)
        _check_names(model, endings)
        chosen = [layer for layer in linear if _ends(layer, endings)]
        loaded = set(addressable(model, chosen))
        if lost := [layer for layer in chosen if layer not in loaded]:
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


def left_out(model: nn.Module, wanted: str | tuple[str, ...]) -> list[str]:
    """Lines on the layers that `wanted` names or stands for and that get no adapter.

    Raises ModelError as `chosen_layers` does.
    """
    chosen, known = set(chosen_layers(model, wanted)), layers.model_layers(model)
    endings = _listed(wanted)
    asked = {layer for layer in (*known.fit, *known.unfit) if (wanted in _sets(layer) if wanted in NAMED_SETS else _ends(layer, endings))}
    unfit = {layer: why for layer, why in known.unfit.items() if layer in asked}
    phrases = [layers.explain_unfit(unfit, known.fit)] if unfit else []
    if known.experts and wanted in ("mlp", "all-linear"):
        share, where = known.experts_share, layers.pattern(known.experts)
        phrases.append(f"the experts, {share:.0%} of the parameters ({where}: Transformers keeps them in tensors, not in linear layers)")
    lines = [f"target_modules {', '.join(endings)}: no adapter on {'; on '.join(phrases)}"] if phrases else []
    lost = [layer for layer in known.fit if layer in asked - chosen]
    return [*lines, lost_line(", ".join(endings), lost)] if lost else lines


def _check_names(model: nn.Module, endings: tuple[str, ...]) -> None:
    """Refuse names of no linear layer, and of layers that no adapter can go on."""
    known = layers.model_layers(model)
    wrong: dict[str, str] = {}
    for ending in endings:
        fit = [layer for layer in known.fit if _ends(layer, (ending,))]
        unfit = {layer: why for layer, why in known.unfit.items() if _ends(layer, (ending,))}
        if not fit and not unfit:
            _refuse(ending, list(known.fit))
        wrong |= {layer: why for layer, why in unfit.items() if why != layers.NOT_TEXT or not fit}
    if wrong:
        names = ", ".join(sorted({_leaf(layer) for layer in known.fit}))
        raise ModelError(
            f"target_modules: no adapter can go on {layers.explain_unfit(wrong, known.fit)}. "
            f"Its other linear layers: {names or 'none'}; or use one of {', '.join(NAMED_SETS)}."
        )


def _listed(wanted: str | tuple[str, ...]) -> tuple[str, ...]:
    return wanted if isinstance(wanted, tuple) else (wanted,)


def _ends(layer: str, endings: tuple[str, ...]) -> bool:
    return any(layer == ending or layer.endswith("." + ending) for ending in endings)


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


def linear_layers(model: nn.Module) -> list[str]:
    """The names of all linear layers that an adapter can go on, in the model's order; never the output head."""
    return list(layers.model_layers(model).fit)


def _endings(chosen: list[str], everything: list[str]) -> list[str]:
    wanted, endings = set(chosen), set()
    for layer in chosen:
        parts = layer.split(".")
        for length in range(1, len(parts) + 1):
            ending = ".".join(parts[-length:])
            if all(name in wanted for name in everything if _ends(name, (ending,))):
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
        f"allowed: these names, or one of {', '.join(NAMED_SETS)}."
    )
