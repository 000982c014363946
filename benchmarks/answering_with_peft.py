"""Answers as PEFT and Transformers give them: one adapter at a time, or all in one batch by `adapter_names`."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch

from loratune.downstream.answering.rows import PromptRow, RowMaker
from loratune.downstream.tasks.base import Item
from loratune.finetune.model import BaseModel
from loratune.finetune.peft_layers import detach

BATCH_ROWS, BATCH_TOKENS = 64, 4096

Answers = dict[tuple[int, str], str]  # (adapter, item) -> text
Rows = list[tuple[int, PromptRow]]  # an adapter and a prompt for it


def with_peft(
    base: BaseModel, folders: list[Path], benchmark: Any, items: list[Item], watch: AbstractContextManager[None], *, mixed: bool
) -> Answers:
    """The answers of every adapter; mixed: rows of all adapters share batches."""
    found: Answers = {}
    make, members = RowMaker(base.tokenizer, base.model.config.max_position_embeddings), list(enumerate(items))
    with watch:
        rows = to_score(make, members) if items[0].choices else make.to_write(benchmark, members)
        rows.sort(key=lambda row: -len(row.ids))
    every = list(range(len(folders)))
    for places in [every] if mixed else [[place] for place in every]:
        first, *others = places
        model = peft.PeftModel.from_pretrained(base.model, str(folders[first]), adapter_name=str(first)).eval()
        for place in others:
            model.load_adapter(str(folders[place]), adapter_name=str(place))
        with watch:
            found |= answer(base, model, benchmark, items, [(place, row) for row in rows for place in places], mixed)
        model.unload()
        detach(base.model)
    return found


def to_score(make: RowMaker, members: list[tuple[int, Item]]) -> list[PromptRow]:
    """A row per choice, the choice's tokens but the last behind the prompt; one for all where each is a single token."""
    rows = make.to_score(members)
    if all(len(tokens) == 1 for row in rows for _, tokens in row.scored):
        return rows
    return [replace(row, ids=row.ids + tokens[:-1], scored=[(choice, tokens)]) for row in rows for choice, tokens in row.scored]


def answer(base: BaseModel, model: Any, benchmark: Any, items: list[Item], waiting: Rows, mixed: bool) -> Answers:
    found: Answers = {}
    likely: dict[tuple[int, str], dict[int, float]] = {}
    while waiting:
        longest = len(waiting[0][1].ids)
        batch = waiting[: max(1, min(BATCH_ROWS, BATCH_TOKENS // longest))]
        waiting = waiting[len(batch) :]
        ids = torch.tensor([[base.pad_id] * (longest - len(row.ids)) + row.ids for _, row in batch])
        mask = torch.tensor([[0] * (longest - len(row.ids)) + [1] * len(row.ids) for _, row in batch])
        names = {"adapter_names": [str(place) for place, _ in batch]} if mixed else {}
        with torch.inference_mode():
            if batch[0][1].scored:
                score(model, batch, ids, mask, likely, names)
            else:
                found |= dict(write(base, model, benchmark, batch, ids, mask, names))
    by_id = {item.id: item for item in items}
    for (place, item), own in likely.items():
        found[place, item] = by_id[item].choices[max(own, key=lambda choice: (own[choice], -choice))]
    return found


def write(
    base: BaseModel, model: Any, benchmark: Any, batch: Rows, ids: torch.Tensor, mask: torch.Tensor, names: dict[str, list[str]]
) -> Iterator[tuple[tuple[int, str], str]]:
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=benchmark.max_new_tokens, do_sample=False, pad_token_id=base.pad_id, **names
    )
    for (place, row), new in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
        tail = row.ids[-4:]
        text, before = (base.tokenizer.decode(t, skip_special_tokens=True) for t in (tail + new, tail))
        yield (place, row.item.id), text[len(before) :]


def score(
    model: Any, batch: Rows, ids: torch.Tensor, mask: torch.Tensor, likely: dict[tuple[int, str], dict[int, float]], names: Any
) -> None:
    """Add the log-likelihoods of the rows' choices to `likely`: adapter and item -> choice -> sum over its tokens."""
    keep = max(len(tokens) for _, row in batch for _, tokens in row.scored)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, use_cache=False, **names
    ).logits.log_softmax(-1)
    for (place, row), own in zip(batch, logits, strict=True):
        for choice, tokens in row.scored:
            places = range(keep - len(tokens), keep)
            likely.setdefault((place, row.item.id), {})[choice] = float(own[list(places), tokens].sum())
