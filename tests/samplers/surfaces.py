"""Synthetic surfaces shaped like LoRA's validation loss over the published space of arXiv 2312.00949.

A smooth valley in log10 learning rate x log2(alpha / r), a mild gain from rank, a loss from dropout, and
noise of sd 0.001 that depends on the configuration and a seed (a repeated evaluation repeats its value).
"""

import json
import math
import random
from collections.abc import Callable
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

RANKS = (4, 8, 16, 32, 64, 128, 256, 512)
DROPOUTS = (0, 0.0001, 0.001, 0.01, 0.1, 1)
DEFAULT: dict[str, Any] = {"lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "learning_rate": 1e-5}
Surface = Callable[[dict[str, Any], int], float]


def space(ordinals: str = "choice") -> dict[str, BaseDistribution]:
    index = ordinals == "index"
    return {
        "lora_r": IntDistribution(0, len(RANKS) - 1) if index else CategoricalDistribution(RANKS),
        "lora_alpha": IntDistribution(1, 64),
        "lora_dropout": IntDistribution(0, len(DROPOUTS) - 1) if index else CategoricalDistribution(DROPOUTS),
        "learning_rate": FloatDistribution(1e-6, 1e-3, log=True),
    }


def values(params: dict[str, Any], ordinals: str) -> dict[str, Any]:
    """A trial's parameters with its indices replaced by what they stand for."""
    if ordinals == "choice":
        return params
    return {**params, "lora_r": RANKS[params["lora_r"]], "lora_dropout": DROPOUTS[params["lora_dropout"]]}


def default(ordinals: str = "choice") -> dict[str, Any]:
    if ordinals == "choice":
        return DEFAULT
    return {**DEFAULT, "lora_r": RANKS.index(DEFAULT["lora_r"]), "lora_dropout": DROPOUTS.index(DEFAULT["lora_dropout"])}


def _surface(depth: float, slope: float, optimum: float, rank_gain: float, dropout_loss: float) -> Surface:
    def loss(p: dict[str, Any], seed: int) -> float:
        ratio = math.log2(p["lora_alpha"] / p["lora_r"])
        valley = math.log10(p["learning_rate"]) - optimum + slope * ratio
        value = 0.96 + depth * valley**2 / (1 + 0.3 * valley**2) - rank_gain * math.log2(p["lora_r"]) + dropout_loss * p["lora_dropout"]
        return value + random.Random(f"{seed} {json.dumps(p, sort_keys=True)}").gauss(0, 0.001)

    return loss


SURFACES: dict[str, Surface] = {
    "gentle": _surface(depth=0.03, slope=0.10, optimum=-3.6, rank_gain=0.002, dropout_loss=0.05),
    "ridge": _surface(depth=0.08, slope=0.25, optimum=-4.2, rank_gain=0.004, dropout_loss=0.02),
    "flat": _surface(depth=0.01, slope=0.05, optimum=-3.2, rank_gain=0.001, dropout_loss=0.10),
}
