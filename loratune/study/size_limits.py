"""Constraints on an adapter's size, known before training: whether the search space can keep them, and the first guess that does."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from loratune.errors import SpecError
from loratune.plugs import METRICS, Measured
from loratune.record.paths import StudyPaths
from loratune.samplers.prior import Recommendation, learning_rate
from loratune.spec import StudySpec
from loratune.spec.limits import Constraint
from loratune.study.objectives import Objectives
from loratune.work import Hyperparameters

_BY_SIZE = ("adapter_mb", "inference_cost")  # functions of the number of trainable parameters, so of rank and layers alone


def size_limits(spec: StudySpec) -> list[Constraint]:
    """The constraints that rank and layers alone decide."""
    return [limit for limit in spec.limits if limit.metric in _BY_SIZE]


def check_size_limits(spec: StudySpec) -> None:
    """See, of a study that did not begin yet, that some adapter of the search space keeps the constraints on size.

    Raises one SpecError with each constraint that none keeps and the value that comes nearest; ModelError for a model out of reach.
    """
    if size_limits(spec) and not StudyPaths(spec.folder).begun:
        _check(spec, Objectives(spec))


def _check(spec: StudySpec, objectives: Objectives) -> None:
    """Every rank on every layers: few, and arithmetic on the model's shapes."""
    limits, default = size_limits(spec), spec.hyperparameters(spec.search_space.default_values())
    ranks = ranks_of(spec, default)
    adapters = [replace(default, lora_r=rank, target_modules=layers) for layers in layers_of(spec, default) for rank in ranks]
    sized = [Measured(hyperparameters=adapter, run=(), parameters=objectives.size(adapter)) for adapter in adapters]

    def holds(limit: Constraint, adapter: Measured) -> bool:
        return limit.holds(METRICS.read(limit.metric, adapter))

    if any(all(holds(limit, adapter) for limit in limits) for adapter in sized):
        return
    broken = [limit for limit in limits if not any(holds(limit, adapter) for adapter in sized)]
    change = "Change the bound, or lora_r and target_modules in search_space."
    if not broken:
        raise SpecError(f"constraints: no adapter of the search space keeps {' and '.join(map(str, limits))} together. {change}")
    lines = (f"constraints: no adapter of the search space keeps {limit}: all have {_reached(limit, sized)}. {change}" for limit in broken)
    raise SpecError("\n".join(lines))


def _reached(limit: Constraint, sized: Sequence[Measured]) -> str:
    """The value nearest to the bound's right side, and whose it is: `adapter_mb >= 0.078, at rank 4 on qv`."""
    least = limit.lasting
    value, adapter = (min if least else max)(((METRICS.read(limit.metric, one), one) for one in sized), key=lambda pair: pair[0])
    h = adapter.hyperparameters
    return f"{limit.metric} {'>=' if least else '<='} {value:.4g}, at rank {h.lora_r} on {_named(h.target_modules)}"


def within_limits(spec: StudySpec, made: Recommendation, filled: StudySpec) -> Recommendation:
    """The recommendation with the largest rank, not above its own, that keeps the constraints on size; else the smallest above.

    On the recommended layers if any rank keeps them there, else on others. Only what nobody wrote a default of is changed.
    filled: the study with the recommendation as its defaults. Raises what `check_size_limits` does.
    """
    if not size_limits(spec):
        return made
    objectives = Objectives(spec)
    _check(spec, objectives)
    begin = filled.hyperparameters(filled.search_space.default_values())
    broken, free = objectives.refusal(begin), filled.search_space.parameters.keys() & spec.search_space.unwritten
    if not broken:
        return made
    ranks = ranks_of(spec, begin) if "lora_r" in free else [begin.lora_r]
    ranks = sorted(ranks, key=lambda rank: (rank > begin.lora_r, abs(rank - begin.lora_r)))
    layers = layers_of(spec, begin) if "target_modules" in free else [begin.target_modules]
    layers = sorted(layers, key=lambda some: (some != begin.target_modules, -objectives.size(replace(begin, target_modules=some))))
    kept = _first(objectives, (replace(begin, lora_r=rank, target_modules=some) for some in layers for rank in ranks))
    return made if kept is None else _moved(made, begin, kept, broken)


def _first(objectives: Objectives, adapters: Iterable[Hyperparameters]) -> Hyperparameters | None:
    return next((adapter for adapter in adapters if not objectives.refusal(adapter)), None)


def _moved(made: Recommendation, begin: Hyperparameters, kept: Hyperparameters, broken: str) -> Recommendation:
    """The recommendation at another rank, or on other layers; u and alpha / r stay, so the learning rate follows the rank."""
    ratio = made.values["alpha_ratio"]
    rate = float(f"{learning_rate(made.prior.centre, ratio, kept.lora_r):.1e}")
    was, now = (f"rank {h.lora_r} on {_named(h.target_modules)}" for h in (begin, kept))
    why = f"{now} in place of {was}: {broken}"
    moved: dict[str, Any] = {"lora_r": kept.lora_r, "target_modules": kept.target_modules}
    changed = [name for name, value in moved.items() if value != getattr(begin, name)]
    reasons = {**made.reasons, **dict.fromkeys(changed, f"the largest that keeps the constraints: {why}")}
    reasons["learning_rate"] += f"; {rate:.2g} at r {kept.lora_r}"
    values = {**made.values, **moved, "lora_alpha": ratio * kept.lora_r, "learning_rate": rate}
    return replace(made, values=values, reasons=reasons, notes=(*made.notes, why))


def ranks_of(spec: StudySpec, default: Hyperparameters) -> list[int]:
    """Every rank that a trial may have."""
    parameter = spec.search_space.parameters.get("lora_r")
    if parameter is None:
        return [default.lora_r]
    if parameter.type == "int":
        found = list(range(int(parameter.low), int(parameter.high) + 1, int(parameter.step or 1)))
    else:
        found = [int(value) for value in _listed(parameter)]
    return found + ([spec.hyperparameters({}).lora_r] if parameter.when else [])


def layers_of(spec: StudySpec, default: Hyperparameters) -> list[str | tuple[str, ...]]:
    """Every value of target_modules that a trial may have."""
    parameter = spec.search_space.parameters.get("target_modules")
    if parameter is None:
        return [default.target_modules]
    return _listed(parameter) + ([spec.training.target_modules] if parameter.when else [])


def _listed(parameter: Any) -> list[Any]:
    if parameter.type == "fixed":
        return [parameter.value]
    return list(parameter.values if parameter.type == "ordinal" else parameter.choices)


def _named(layers: str | tuple[str, ...]) -> str:
    return layers if isinstance(layers, str) else ", ".join(layers)
