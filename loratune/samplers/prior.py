"""What public findings say of LoRA's hyperparameters before anything is trained: the first guess and how sure it is.

The loss of a well-trained adapter depends, to a few thousandths of a nat, on one number, the effective learning rate

    u = log10 learning_rate + s log10 scale + g log10 lora_r        (scale: alpha / r; rsLoRA's alpha / sqrt(r))

`recommend` places its optimum by the width of the model and the size of the data. Constants and sources: `prior.json`.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_OUTSIDE = 1.5  # times the sweep's own spread: beyond, the model lies outside what the prior knows
_GIB = 2**30
FEW_STEPS = 50  # of a run


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a study beforehand; None: not known."""

    family: str = ""  # model_type of the model's config
    hidden_size: int | None = None
    parameters: int | None = None  # weights of the base model
    instruct: bool | None = None  # whether its tokenizer has a chat template
    examples: int | None = None  # for training
    tokens: float | None = None  # of an example, prompt and response, on average
    memory: float | None = None  # of the device, bytes
    parameters_per_rank: int | None = None  # of an adapter on every linear layer


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Where the best u lies: normal with this centre and spread, in factors of ten."""

    centre: float
    sd: float
    outside: bool = False  # whether model or data lie outside what the findings cover, so that the centre is an extrapolation

    def sharpened(self, centre: float, sd: float) -> "Prior":
        """The product of two normal densities."""
        own, other = self.sd**-2, sd**-2
        spread = (own + other) ** -0.5
        return Prior(centre=(self.centre * own + centre * other) * spread**2, sd=spread, outside=self.outside and spread > limit())


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The first guess: a value and a reason for each hyperparameter, and the prior of u that the learning rate comes from."""

    values: dict[str, Any]  # learning_rate, alpha_ratio, lora_r, lora_alpha, lora_dropout, target_modules, batch_size, epochs, warmup_ratio
    reasons: dict[str, str]
    prior: Prior
    notes: tuple[str, ...] = field(default=())

    def learning_rate(self, values: Mapping[str, Any]) -> float:
        """The recommended learning rate with another rank or scale."""
        return learning_rate(self.prior.centre, scale_of(values), values.get("lora_r", self.values["lora_r"]))


@functools.cache
def public_findings() -> dict[str, Any]:
    """`prior.json`."""
    return dict(json.loads((Path(__file__).parent / "prior.json").read_text(encoding="utf-8")))


def limit() -> float:
    """The spread of u, in factors of ten, beyond which the guess is an extrapolation."""
    return _OUTSIDE * float(public_findings()["sd"]["value"])


def effective(learning_rate: float, scale: float, lora_r: float) -> float:
    """u of a configuration."""
    return math.log10(learning_rate) + _weight("s") * math.log10(scale) + _weight("g") * math.log10(lora_r)


def learning_rate(u: float, scale: float, lora_r: float) -> float:
    """The learning rate that has this u."""
    return float(10 ** (u - _weight("s") * math.log10(scale) - _weight("g") * math.log10(lora_r)))


def rescaled(change: float) -> float:
    """The factor of the scale that changes u by so much, the learning rate being the same."""
    return float(10 ** (change / _weight("s")))


def _weight(name: str) -> float:
    return float(public_findings()[name]["value"])


def scale_of(values: Mapping[str, Any]) -> float:
    """The factor of an adapter's output: alpha / r, with rsLoRA alpha / sqrt(r). `values` has lora_r, and alpha_ratio or lora_alpha."""
    rank = values["lora_r"]
    ratio = values["alpha_ratio"] if "alpha_ratio" in values else values["lora_alpha"] / rank
    return float(ratio * math.sqrt(rank) if values.get("use_rslora") else ratio)


def recommend(facts: Facts) -> Recommendation:
    """The first guess for a model and data, in no time: arithmetic on public findings."""
    known, notes = public_findings(), []
    reference = known["reference"]
    ratio = reference["lora_alpha"] / reference["lora_r"]
    centre = effective(reference["learning_rate"], ratio, reference["lora_r"])
    sd = known["sd"]["value"]
    reasons = {"learning_rate": f"{reference['learning_rate']:g} at r {reference['lora_r']}, alpha / r {ratio:g} on 1B to 400B models"}

    smallest, width = known["width"]["smallest"], facts.hidden_size
    if width is None:
        notes.append("the model's width is not known: taken for one of the sweep's")
    elif width < smallest:
        factor = math.log10(smallest / width)
        centre += known["width"]["exponent"] * factor
        sd = math.hypot(sd, known["width"]["exponent_sd"] * factor)
        reasons["learning_rate"] += f"; times {10 ** (known['width']['exponent'] * factor):.2g}, as the model is {width:,} wide"
    if facts.examples:
        counted = min(max(facts.examples, known["data"]["fewest"]), known["data"]["most"])
        shift = known["data"]["exponent"] * math.log10(counted / reference["examples"])
        centre += shift
        reasons["learning_rate"] += _factor(shift, f"for {facts.examples:,} examples")
    outside = sd > limit()
    if outside:
        notes.append(f"{width:,} wide is narrower than what the findings cover: the learning rate is an extrapolation")

    reasons["alpha_ratio"] = f"alpha / r {ratio:g}, as in the reference; it and the learning rate are nearly one axis"
    if outside:
        ratio, source = known["ratio_outside"]["value"], known["ratio_outside"]["source"]
        reasons["alpha_ratio"] = f"alpha / r {ratio:g} for a model outside the findings: {source}"
    rank, reasons["lora_r"] = _rank(facts)
    scaled = ratio * reference["lora_r"] / reference["lora_alpha"]
    reasons["learning_rate"] += _factor(-_weight("s") * math.log10(scaled), f"at alpha / r {ratio:g}")
    reasons["learning_rate"] += _factor(-_weight("g") * math.log10(rank / reference["lora_r"]), f"at r {rank}")
    values: dict[str, Any] = {
        "learning_rate": _rounded(learning_rate(centre, ratio, rank)),
        "lora_r": rank,
        "lora_alpha": ratio * rank,
        "alpha_ratio": ratio,
        **{name: known[name]["value"] for name in ("lora_dropout", "target_modules", "epochs", "warmup_ratio")},
    }
    reasons |= {name: known[name]["source"] for name in ("lora_dropout", "target_modules", "epochs", "warmup_ratio")}
    values["batch_size"], reasons["batch_size"] = _batch_size(facts)
    if facts.examples:
        steps = max(1, round(facts.examples * values["epochs"] / values["batch_size"]))
        values["warmup_ratio"], reasons["warmup_ratio"] = _warmup(steps)
        if steps < FEW_STEPS:
            notes.append(
                f"about {steps} optimiser steps, fewer than {FEW_STEPS}: one learning rate is hard to tell from another; "
                "more epochs or more data help"
            )
    return Recommendation(values=values, reasons=reasons, prior=Prior(centre=centre, sd=sd, outside=outside), notes=tuple(notes))


def _rank(facts: Facts) -> tuple[int, str]:
    rule = public_findings()["rank"]
    rank, reason = int(rule["value"]), "high: the sweeps' best; the loss hardly depends on it once it is high enough"
    if facts.hidden_size is not None and facts.hidden_size < rank:
        rank, reason = _power(facts.hidden_size), f"the model is {facts.hidden_size} wide; beyond that a rank adds nothing"
    if facts.memory and facts.parameters_per_rank:
        most = rule["share_of_memory"] * facts.memory / (rule["bytes_per_parameter"] * facts.parameters_per_rank)
        if most < rank:
            rank, reason = _power(max(1, int(most))), f"an adapter's training state should take an eighth of {facts.memory / _GIB:.0f} GiB"
    return rank, reason


def _batch_size(facts: Facts) -> tuple[int, str]:
    rule = public_findings()["batch_size"]
    most, steps = int(rule["most"]), int(rule["fewest_steps"])
    if facts.examples is None or facts.examples >= most * steps:
        return most, "quality falls above 128"
    batch = _power(max(int(rule["fewest"]), facts.examples // steps))
    return batch, f"about {facts.examples // batch:,} steps in an epoch of {facts.examples:,} examples; never above 128"


def _warmup(steps: int) -> tuple[float, str]:
    """The share of the steps, with the number that it means."""
    rule = public_findings()["warmup_ratio"]
    share = _rounded(min(max(rule["value"], rule["fewest_steps"] / steps), rule["most"]))
    why = f"{max(1, round(share * steps))} of about {steps:,} steps; a study keeps training.warmup_ratio, {rule['value']:g} unless written"
    return share, why


def _factor(change: float, why: str) -> str:
    """A factor of the learning rate in words, from its change in factors of ten; empty where it is about 1."""
    return "" if abs(change) < 0.01 else f"; times {10**change:.2g} {why}"


def _power(number: int) -> int:
    """The largest power of two up to `number`."""
    return int(1 << (number.bit_length() - 1))


def _rounded(value: float, digits: int = 2) -> float:
    return float(f"{value:.{digits - 1}e}")
