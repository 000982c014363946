"""The evidence of one study or of several, as one HTML file and as figures for a paper.

Nothing here imports torch; matplotlib, jinja2 and Optuna are imported when a report is written.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from loratune.record import StudyRecord, read
from loratune.system.files import AnyPath

__all__ = ["write_report"]


def write_report(records: StudyRecord | AnyPath | Sequence[StudyRecord | AnyPath], destination: AnyPath) -> Path:
    """Write the report of one study, or the comparison of several, as one HTML file that opens offline.

    records: studies, or their folders.
    Its figures are also written beside it, to `figures/`, as .svg and .pdf. Returns `destination`.
    Raises StorageError when `records` is empty or the folder cannot be written.
    """
    from loratune.report.html import render  # late: brings matplotlib and jinja2, a second of import

    several = [records] if isinstance(records, StudyRecord | str | PathLike) else records
    return render([one if isinstance(one, StudyRecord) else read(one) for one in several], Path(destination))
