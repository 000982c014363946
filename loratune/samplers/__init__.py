"""Samplers: names -> Optuna samplers that propose hyperparameters.

`build` makes any that is declared (`loratune.plugs.SAMPLERS`) from a study's options. NOMAD and NNI's TPE are ours and serve plain
Optuna studies too (`optuna.create_study(sampler=NomadSampler())`); the rest is Optuna's own, made
resumable by `SeededSampler`. Importing this package imports none of them.
"""

from typing import TYPE_CHECKING, Any

from loratune.samplers.registry import build, ordinals, ready

if TYPE_CHECKING:
    from loratune.samplers.nni_tpe import NniTpeSampler
    from loratune.samplers.nomad import NomadSampler
    from loratune.samplers.seeded import SeededSampler, StudyView, ViewSampler

__all__ = [
    "NniTpeSampler",
    "NomadSampler",
    "SeededSampler",
    "StudyView",
    "ViewSampler",
    "build",
    "ordinals",
    "ready",
]

_HOMES = {
    "NniTpeSampler": "nni_tpe",
    "NomadSampler": "nomad",
    "SeededSampler": "seeded",
    "StudyView": "seeded",
    "ViewSampler": "seeded",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
