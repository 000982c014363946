"""Adapters of the demo's model after a few steps of training, with their true validation losses; and how they are scored."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loratune import demo
from loratune.data.prepared import Prepared
from loratune.downstream.evaluator import score_models
from loratune.downstream.job import EvaluatedModel, EvaluationJob
from loratune.downstream.results.scores import read_results
from loratune.finetune import lora
from loratune.finetune.model import BaseModel, output_head
from loratune.finetune.peft_layers import detach
from loratune.finetune.validation import validate
from loratune.work import Hyperparameters, ModelRecipe

NOTHING_TO_DO = "Nothing to do: everything is already scored."
RECIPE = ModelRecipe(name_or_path=str(demo.model_folder()))


def trained(base: BaseModel, data: Prepared, folder: Path, steps: int, h: Hyperparameters) -> EvaluatedModel:
    """An adapter after a few plain AdamW steps, with its true validation loss."""
    wrapped, _ = lora.attach(base.model, h, seed=0)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=h.learning_rate, weight_decay=0)
    for step in range(steps):
        ids, mask = data.train[step % len(data.train)]
        labels = torch.where(torch.from_numpy(mask), torch.from_numpy(ids).long(), -100)
        wrapped(input_ids=torch.from_numpy(ids).long()[None], labels=labels[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    loss, _ = validate(wrapped, data.validation, batch_size=16, pad_id=base.pad_id, head=output_head(base.model))
    wrapped.save_pretrained(str(folder))
    detach(base.model)
    return EvaluatedModel(name=folder.name, adapter=folder, loss=loss)


def trained_models(base: BaseModel, prepared: Path, home: Path) -> list[EvaluatedModel]:
    """Two that learnt, one whose adapter is silent, and the bare model."""
    data = Prepared.load(prepared)
    h = Hyperparameters(lora_r=8, lora_alpha=32, lora_dropout=0, learning_rate=1e-3, target_modules="all-linear")
    found = [trained(base, data, home / f"{n:04d}", steps, h) for n, steps in ((1, 40), (2, 15), (3, 0))]
    bare, _ = validate(base.model, data.validation, batch_size=16, pad_id=base.pad_id, head=output_head(base.model))
    return [*found, EvaluatedModel(name="base", adapter=None, loss=bare)]


def scored(
    folder: Path, models: list[EvaluatedModel], data: Path, benchmarks: list[str], *, stop: threading.Event | None = None, **options: Any
) -> Iterator[Any]:
    job = EvaluationJob(
        folder=folder,
        recipe=RECIPE,
        models=tuple(models),
        benchmarks=tuple(benchmarks),
        validation=data,
        recorded_base=models[-1].loss,
        device="cpu",
        subset=16,
    )
    return score_models(replace(job, **options), stop=stop)


def kept(folder: Path) -> dict[tuple[str, str, str], tuple[str, float]]:
    return {(r.model, r.benchmark, i): (r.answers[i], r.scores[i]) for r in read_results(folder) for i in r.scores}
