"""What a study hands over: one HTML file with the evidence, the figures for a paper, and the best adapter.

write_report   studies -> report.html and figures/
hand_over      study -> best.yaml and adapter/, an ordinary PEFT folder with a model card
export         study -> a copy of any trial's adapter, or the model merged with it

Nothing here imports torch; matplotlib, jinja2 and Optuna are imported when a report is written.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.files import AnyPath
from loratune.record import StudyRecord

if TYPE_CHECKING:
    from loratune.report.exporting import export
    from loratune.report.handover import hand_over

_HOMES = {"export": "loratune.report.exporting", "hand_over": "loratune.report.handover"}  # pydantic: half a second for `status`

__all__ = ["export", "hand_over", "write_report"]


def write_report(records: Sequence[StudyRecord], destination: AnyPath) -> Path:
    """Write the report of one study, or the comparison of several, as one HTML file that opens offline.

    Its figures are also written beside it, to `figures/`, as .svg and .pdf. Returns `destination`.
    Raises StorageError when `records` is empty or the folder cannot be written.
    """
    from loratune.report.html import render  # late: brings matplotlib and jinja2, a second of import

    return render(records, Path(destination))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
