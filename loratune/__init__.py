"""Finds the LoRA hyperparameters for your model, your instruction data and your GPU budget.

    from loratune import StudySpec, tune, read

    spec = StudySpec.load("study.yaml")
    for event in tune(spec):
        print(event)
    print(read(spec.folder).best)

`loratune.samplers.NomadSampler` serves plain Optuna studies too. All of it is imported when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratune import samplers
    from loratune.driver import tune
    from loratune.record import read
    from loratune.spec import StudySpec

__version__ = "0.1.0"
__all__ = ["StudySpec", "__version__", "read", "samplers", "tune"]

_HOMES = {"StudySpec": "loratune.spec", "read": "loratune.record", "samplers": "loratune.samplers", "tune": "loratune.driver"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if name == "samplers" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
