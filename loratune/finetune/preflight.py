"""Whether a model, its tokenised data and the wanted layers go together: known from the config, before anything is trained."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from loratune.data.prepared import Prepared
from loratune.data.sources import DataRecipe, DataSource
from loratune.data.tokenizers import load_tokenizer
from loratune.errors import ModelError
from loratune.finetune import layers
from loratune.finetune.targets import left_out
from loratune.work import ModelRecipe

_MADE_FOR = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")  # of config.json: what the model was made for
_LISTED = 5


def check_fit(model: Any, recipe: ModelRecipe, data: Prepared, wanted: Sequence[str | tuple[str, ...]]) -> list[str]:
    """Lines for the user on what training `wanted`, values of `target_modules`, will leave out, and on examples that are long.

    `model` is the recipe's, also one on torch's meta device. Raises one ModelError with all that cannot work: layers that it
    does not have or that no adapter can go on, tokens that it has no embedding for, examples longer than its positions.
    """
    wrong, notes = [], []
    for choice in dict.fromkeys(wanted):
        try:
            notes += left_out(model, choice)
        except ModelError as error:
            wrong.append(str(error))
    wrong.append(_tokens_without_embedding(model, recipe, data))
    refused, note = _too_long(model, data)
    wrong.append(refused)
    if any(wrong):
        raise ModelError("\n".join(filter(None, wrong)))
    return [line for line in [*notes, note] if line]


def position_limit(model: Any) -> tuple[int, str] | None:
    """How many positions the model has a table for, and the table's name; None where positions are computed.

    A table is an embedding, or a buffer of [positions, features], that is named for positions (`wpe`, `embed_positions`, ...). OPT's
    and BART's leave their first rows out (`offset`), RoBERTa's those up to the padding's.
    """
    inside = layers.decoder_name(model)
    tables = {}
    for name, module in model.named_modules():
        if inside and not name.startswith(inside + "."):
            continue
        if isinstance(module, nn.Embedding) and _for_positions(name):
            unused = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            tables[name] = module.num_embeddings - unused
        for leaf, buffer in module.named_buffers(recurse=False):
            if _for_positions(leaf) and buffer.dim() == 2 and buffer.is_floating_point():
                tables[f"{name}.{leaf}"] = buffer.shape[0]
    smallest = min(tables, key=lambda name: tables[name], default=None)
    return None if smallest is None else (tables[smallest], smallest)


def _for_positions(name: str) -> bool:
    return re.search(r"(^|[._])(wpe|pos|position|positions|positional)([._]|$)", name.rpartition(".")[2]) is not None


def _too_long(model: Any, data: Prepared) -> tuple[str, str]:
    """(why the longest example cannot be trained, or ""; a note where it can, but is longer than what the model was made for)."""
    lengths = np.concatenate([data.train.lengths, data.validation.lengths])
    longest = int(lengths.max())
    config = model.config.get_text_config()
    told = (getattr(config, key, None) for key in _MADE_FOR)
    made_for = next((value for value in told if isinstance(value, int) and value > 0), None)
    table = position_limit(model)
    if table is None and made_for is not None and longest > made_for:
        fails = layers.trace_text(model, longest) is None and layers.trace_text(model) is not None  # as far as shapes tell
        table = (made_for, "config.json") if fails else None
    if table is not None and longest > table[0]:
        limit, name = table
        return (
            f"data.max_length: {data.manifest.recipe.max_length} lets {int((lengths > limit).sum()):,} of {len(lengths):,} examples be "
            f"longer than the {limit:,} positions that the model has ({name}); the longest has {longest:,} tokens. "
            f"Set max_length to {limit} at most.",
            "",
        )
    if made_for is not None and longest > made_for:
        over = int((lengths > made_for).sum())
        return "", (
            f"{over:,} of {len(lengths):,} examples are longer than the {made_for:,} positions that the model was made for, the longest "
            f"{longest:,} tokens; it accepts them, but how well it handles them is unknown. max_length: {made_for} cuts them"
        )
    return "", ""


def _tokens_without_embedding(model: Any, recipe: ModelRecipe, data: Prepared) -> str:
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    rows = min(int(table.weight.shape[0]) for table in tables if isinstance(table, nn.Linear | nn.Embedding))
    outside: set[int] = set()
    for tokens in (data.train, data.validation):
        if tokens.ids.max() >= rows:  # one pass over the memory map; what it holds is looked at where there is something
            outside |= set(np.unique(tokens.ids[tokens.ids >= rows]).tolist())
    if not outside:
        return ""
    tokenizer = load_tokenizer(recipe.name_or_path, recipe.revision, recipe.trust_remote_code)
    listed = [_described(token, tokenizer, data) for token in sorted(outside)[:_LISTED]]
    more = f" and {len(outside) - _LISTED:,} more" if len(outside) > _LISTED else ""
    return (
        f"model {recipe.name_or_path!r}: {'; '.join(listed)}{more}: no embedding in a model of {rows:,}. The tokenizer has tokens "
        "that were never added to the model: resize its embeddings first (`model.resize_token_embeddings(len(tokenizer))`, "
        "`save_pretrained`), or use the model's own tokenizer."
    )


def _described(token: int, tokenizer: Any, data: Prepared) -> str:
    """ "token id 2048 ('<tool>', first in FILE, line 3)"."""
    text = tokenizer.decode([token])
    recipe = data.manifest.recipe
    for source in (*recipe.train, *recipe.validation):
        place = _first_place(token, text, tokenizer, source, recipe)
        if place:
            return f"token id {token} ({text!r}, first in {place})"
    if token == tokenizer.eos_token_id:
        return f"token id {token} ({text!r}, the EOS that ends every response)"
    return f"token id {token} ({text!r}, which the prompt adds)"


def _first_place(token: int, text: str, tokenizer: Any, source: DataSource, recipe: DataRecipe) -> str:
    for example in recipe.read(source)[0]:
        parts = [example.system, *(part for exchange in example.exchanges for part in exchange if isinstance(part, str))]
        for part in filter(None, parts):
            if text in part and token in tokenizer(part, add_special_tokens=False)["input_ids"]:
                return f"{example.source}, {example.place}"
    return ""
