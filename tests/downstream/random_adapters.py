"""PEFT folders with random weights, strong enough to change answers, on a real tiny model."""

from pathlib import Path

import torch

from loratune.finetune import lora
from loratune.finetune.model import BaseModel, load
from loratune.finetune.peft_layers import ADAPTER, detach, lora_layers
from loratune.work import Hyperparameters, ModelRecipe


def load_base(folder: Path) -> BaseModel:
    torch.set_num_threads(1)
    return load(ModelRecipe(name_or_path=str(folder)), torch.device("cpu"))


def write_adapters(base: BaseModel, folder: Path, ranks: list[int]) -> list[Path]:
    """One adapter per rank; all linear layers, B drawn from N(0, 0.2)."""
    folders = []
    for number, rank in enumerate(ranks):
        h = Hyperparameters(lora_r=rank, lora_alpha=2 * rank, lora_dropout=0.1, target_modules="all-linear")
        wrapped, _ = lora.attach(base.model, h, seed=number)
        generator = torch.Generator().manual_seed(number)
        for _, layer in lora_layers(wrapped):
            weight = layer.lora_B[ADAPTER].weight
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
        folders.append(folder / f"adapter-{number}")
        wrapped.save_pretrained(str(folders[-1]))
        detach(base.model)
    return folders
