"""Finds the LoRA hyperparameters for your model, your instruction data and your GPU budget.

    from loratune import StudySpec, tune, read

    spec = StudySpec.load("study.yaml")
    for event in tune(spec):
        print(event)
    print(read(spec.folder).best)

StudySpec       what is asked for
tune            run a study, or continue it, event by event
search          run it to its end; `Callback` has what may be called on the way
read            a study's folder -> its trials, the best, the default, what they cost
evaluate        score its adapters on downstream benchmarks
select          race the finalists with fresh seeds, and choose the one to ship
deliver         write the report, best.yaml and adapter/ into the study's folder
export          copy an adapter as a PEFT folder, or the model merged with it
write_report    the report of one study or of several as one HTML file
samplers        the samplers; `loratune.samplers.NomadSampler` serves plain Optuna studies too
demo            the embedded model, its data, and a study of them

`docs/tutorial.md` goes through them. Each is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratune import demo, samplers
    from loratune.delivery import export
    from loratune.record import read
    from loratune.report import write_report
    from loratune.selection import select
    from loratune.spec import StudySpec
    from loratune.study.callbacks import Callback, search
    from loratune.study.driver import deliver, tune
    from loratune.study.evaluation import evaluate

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "StudySpec",
    "__version__",
    "deliver",
    "demo",
    "evaluate",
    "export",
    "read",
    "samplers",
    "search",
    "select",
    "tune",
    "write_report",
]

_ROOMS = ("demo", "samplers")
_HOMES = {
    "Callback": "loratune.study.callbacks",
    "StudySpec": "loratune.spec",
    "deliver": "loratune.study.driver",
    "evaluate": "loratune.study.evaluation",
    "export": "loratune.delivery",
    "read": "loratune.record",
    "search": "loratune.study.callbacks",
    "select": "loratune.selection",
    "tune": "loratune.study.driver",
    "write_report": "loratune.report",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"loratune.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
