"""Samplers: names -> Optuna samplers that propose hyperparameters.

`build` makes any that is declared (`loratune.plugs.SAMPLERS`) from a study's options. The bracket search, NOMAD and
NNI's TPE are ours and serve plain Optuna studies too (`optuna.create_study(sampler=NomadSampler())`); the rest is Optuna's own, made
resumable by `SeededSampler`. Importing this package imports none of them.
"""

from typing import TYPE_CHECKING, Any

from loratune.samplers.factory import build, length, ordinals, outlook, ready, starts_itself, tell_untuned

if TYPE_CHECKING:
    from loratune.samplers.bracket_sampler import BracketSampler
    from loratune.samplers.nni_tpe import NniTpeSampler
    from loratune.samplers.nomad import NomadSampler
    from loratune.samplers.seeded import SeededSampler, StudyView, ViewSampler

__all__ = [
    "BracketSampler",
    "NniTpeSampler",
    "NomadSampler",
    "SeededSampler",
    "StudyView",
    "ViewSampler",
    "build",
    "length",
    "ordinals",
    "outlook",
    "ready",
    "starts_itself",
    "tell_untuned",
]

_HOMES = {
    "BracketSampler": "bracket_sampler",
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


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
