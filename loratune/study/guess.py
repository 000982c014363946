"""The first guess of a study: what public findings, and the user's own earlier studies, say of its model and data.

Reads files alone, in about a second: the model's config, the number of its weights, the rows of the data. No torch, no training.
"""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loratune.data.sources import DataRecipe
from loratune.errors import StorageError
from loratune.finetune.on_disk import data_size, weight_count
from loratune.plugs import METRICS, SAMPLERS
from loratune.record import StudyRecord, read
from loratune.record.paths import StudyPaths
from loratune.samplers.prior import Facts, Prior, Recommendation, effective, learning_rate, recommend
from loratune.spec import StudySpec
from loratune.spec.parameters import Parameter
from loratune.system import hub
from loratune.system.files import parsed
from loratune.system.machine import gpu_memory
from loratune.work import Hyperparameters, Json

_NEAR = 0.002  # nats above its best: as good, in an earlier study
_TRANSFER = 0.15  # factors of ten by which the best u of another study may differ, model and data being alike: an assumption
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")


@dataclass(frozen=True, kw_only=True)
class Guess(Json):
    """A recommendation, with what it was made from."""

    facts: Facts
    recommendation: Recommendation


def begins_with_guess(spec: StudySpec) -> bool:
    """Whether the study begins with a first guess: its sampler starts there, or its space's defaults are the recommendation."""
    return SAMPLERS[spec.sampler.name].starts_itself or spec.search_space.to_fill


def guess(spec: StudySpec, memory: float | None = None) -> Guess:
    """The first guess of this study. memory: of the device, in bytes; None: that of the machine's smallest GPU, where one may train.

    Its rank keeps the constraints on the adapter's size. Raises DataError for data that cannot be read, StorageError for a warm start
    that is no study, SpecError for constraints that no adapter of the space keeps, which needs torch.
    """
    if memory is None and spec.executor.device != "cpu":
        memory = gpu_memory()
    facts = facts_of(spec, memory)
    made = recommend(facts)
    for folder in spec.sampler.warm_start:
        made = _sharpened(made, facts, folder)
    if any(METRICS[limit.metric].known == "before" for limit in spec.limits):
        from loratune.study.size_limits import within_limits  # Optuna; torch for constraints on size

        made = within_limits(spec, made, with_guess(spec, made))
    return Guess(facts=facts, recommendation=made)


def guess_of(spec: StudySpec) -> Guess | None:
    """The guess that the study in the spec's folder begins, or began, with: that of its first start; None where it begins with none.

    Raises StorageError for a damaged one, and what `guess` does.
    """
    if not begins_with_guess(spec):
        return None
    paths = StudyPaths(spec.folder)
    if paths.guess.exists() and paths.begun:
        return parsed(paths.guess, Guess.from_json, "Restore it from a copy: the sampler's proposals depend on it.")
    return guess(spec)


def with_guess(spec: StudySpec, made: Recommendation) -> StudySpec:
    """The study whose space has the recommended values as defaults, where nobody wrote others and as far as its ranges reach."""
    space = spec.search_space
    wanted: dict[str, Any] = {**made.values, **{name: p.default for name, p in space.parameters.items() if name not in space.unwritten}}
    fitted: dict[str, Any] = {}
    for name in sorted(space.parameters, key=lambda name: ("learning_rate", "lora_alpha").index(name) if name in _LAST else -1):
        if name == "lora_alpha" and name in space.unwritten:
            wanted[name] = made.values["alpha_ratio"] * fitted.get("lora_r", Hyperparameters().lora_r)
        if name == "learning_rate" and name in space.unwritten:
            h = spec.hyperparameters({**space.default_values(), **fitted})
            wanted[name] = float(f"{learning_rate(made.prior.centre, _scale(h), h.lora_r):.1e}")
        fitted[name] = _nearest(space.parameters[name], wanted.get(name))
    return spec.model_copy(update={"search_space": space.with_defaults({n: fitted[n] for n in space.unwritten})})


def prior_of(spec: StudySpec, made: Recommendation) -> Prior:
    """The prior around the space's defaults: an extrapolation too where these are far from the recommendation."""
    h = spec.hyperparameters(spec.search_space.default_values())
    centre = effective(h.learning_rate, _scale(h), h.lora_r)
    far = abs(centre - made.prior.centre) > 2 * made.prior.sd
    return replace(made.prior, centre=centre, outside=made.prior.outside or far)


def facts_of(spec: StudySpec, memory: float | None = None) -> Facts:
    """What the files say. Raises DataError, and ModelError for a model's folder that is not there."""
    hub.refuse_missing_folder(spec.model.name_or_path)
    config = model_config(spec.model.name_or_path, spec.model.revision)
    size = data_size(
        DataRecipe.from_plain(spec.data_recipe_dict()), hub.small_file(spec.model.name_or_path, "tokenizer.json", spec.model.revision)
    )
    inner = config.get("text_config")
    text: dict[str, Any] = inner if isinstance(inner, dict) else config
    return Facts(
        family=str(config.get("model_type") or ""),
        hidden_size=width_of(text),
        parameters=weight_count(spec.model.name_or_path, spec.model.revision),
        instruct=hub.has_chat_template(spec.model.name_or_path, spec.model.revision),
        examples=size[0] if size else None,
        tokens=size[2] if size else None,
        memory=memory,
        parameters_per_rank=_per_rank(text),
    )


def model_config(name: str, revision: str | None) -> dict[str, Any]:
    """The model's config.json; empty where it is out of reach, which loading the model says in better words."""
    path = hub.small_file(name, "config.json", revision)
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def width_of(config: Mapping[str, Any]) -> int | None:
    """The model's hidden size; None where its config does not say."""
    return next((config[name] for name in _WIDTHS if isinstance(config.get(name), int)), None)


def _per_rank(config: Mapping[str, Any]) -> int | None:
    """Parameters per rank of an adapter on every linear layer, for a decoder of LLaMA's shape; None where the config says too little."""
    try:
        width, inner, layers, heads = (
            int(config[n]) for n in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        )
        head = int(config.get("head_dim") or width // heads)
        pairs = int(config.get("num_key_value_heads") or heads)
    except (KeyError, TypeError, ValueError):
        return None
    return layers * (2 * (width + heads * head) + 2 * (width + pairs * head) + 3 * (width + inner))


def _sharpened(made: Recommendation, facts: Facts, folder: str) -> Recommendation:
    """The product of the prior and what an earlier study found, moved by what model and data differ in."""
    if not StudyPaths(folder).spec.is_file():
        raise StorageError(f"sampler.warm_start: {folder} is not a study's folder: it has no spec.yaml.")
    record = read(folder)
    found = _found(record)
    if found is None:
        return replace(made, notes=(*made.notes, f"{folder}: no trial was trained to its end, so it is not used"))
    best, spread = found
    model = record.spec.get("model", {})
    config = model_config(str(model.get("name_or_path", "")), model.get("revision"))
    width = width_of(config) or facts.hidden_size
    there = recommend(Facts(hidden_size=width, examples=_examples(record) or facts.examples)).prior
    own = recommend(facts).prior
    centre, sd = best + own.centre - there.centre, math.hypot(spread, _TRANSFER, abs(own.sd - there.sd))
    prior = made.prior.sharpened(centre, sd)
    factor = 10 ** (best - there.centre)
    note = f"{folder}: its best lies at {factor:.2g} times the guess there, give or take a factor of {10**sd:.2g}; the learning rate is now"
    rate = float(f"{learning_rate(prior.centre, made.values['alpha_ratio'], made.values['lora_r']):.1e}")
    return replace(
        made,
        values={**made.values, "learning_rate": rate},
        reasons={**made.reasons, "learning_rate": made.reasons["learning_rate"] + f"; and by {folder}"},
        prior=prior,
        notes=(*made.notes, f"{note} {rate:.2g}"),
    )


def _found(record: StudyRecord) -> tuple[float, float] | None:
    """(u of the best trial, its spread) of an earlier study; None where no trial was trained to its end."""
    at = sorted(
        (_u(trial.hyperparameters), trial.value) for trial in record.finished if trial.value is not None and math.isfinite(trial.value)
    )
    if not at:
        return None
    best, lowest = min(at, key=lambda item: item[1])
    near = [u for u, loss in at if loss <= lowest + _NEAR]
    place = [u for u, _ in at].index(best)
    gaps = [abs(at[i][0] - best) for i in (place - 1, place + 1) if 0 <= i < len(at)]
    width = statistics.pstdev(near) if len(near) > 1 else min(gaps, default=2 * _TRANSFER) / 2
    return statistics.fmean(near), width


def _examples(record: StudyRecord) -> int | None:
    counted = record.manifest.get("train", {}).get("examples")
    return counted if isinstance(counted, int) else None


def _u(h: Hyperparameters) -> float:
    return effective(h.learning_rate, _scale(h), h.lora_r)


def _scale(h: Hyperparameters) -> float:
    return h.lora_alpha / (math.sqrt(h.lora_r) if h.use_rslora else h.lora_r)


_LAST = ("learning_rate", "lora_alpha")


def _nearest(parameter: Parameter, wanted: Any) -> Any:
    """The parameter's value nearest to the one wanted, of positive numbers by their ratio."""
    if wanted is None or parameter.type == "fixed":
        return parameter.default
    if parameter.holds(wanted):
        return int(wanted) if parameter.type == "int" else wanted
    if parameter.type == "ordinal":
        return min(parameter.values, key=lambda v: abs(math.log(v / wanted)) if v > 0 and wanted > 0 else abs(v - wanted))
    if parameter.type == "categorical":
        return parameter.default
    return parameter.middle(parameter.model_dump(), min(max(wanted, parameter.low), parameter.high))
