"""The report as one HTML file: numbers from tables.py, figures inline as SVG, no script, nothing to download."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from loratune.errors import StorageError
from loratune.files import write_atomically
from loratune.record import PAUSED, PRUNED, RUNNING, StudyRecord
from loratune.report import asked, figures, tables, words
from loratune.report.drawing import DARK, SHADES, Plot
from loratune.report.handover import version_of_loratune
from loratune.report.svg import Inline, inline, save

HERE = Path(__file__).parent


def render(records: Sequence[StudyRecord], destination: Path) -> Path:
    """Write the report to `destination` and its figures to `figures/` beside it."""
    if not records:
        raise StorageError("a report needs at least one study: give the folder that `loratune run` made.")
    folder = destination.parent / "figures"
    together = _figures(figures.OF_SEVERAL, records, folder, prefix="") if len(records) > 1 else {}
    studies = []
    for number, record in enumerate(records, 1):
        prefix = f"{number}-{_slug(record.name)}-" if len(records) > 1 else ""
        studies.append(_study(record, _figures(figures.OF_ONE, record, folder, prefix)))
    rows, common = tables.compare(records)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    spelt = (words.show, words.loss, words.signed, words.perplexity, words.duration, words.count, words.plural, words.label)
    environment.globals |= {"tables": tables, "repr": repr} | {spell.__name__: spell for spell in spelt}
    page = environment.get_template("template.html").render(
        studies=studies,
        together=together,
        rows=rows,
        common=common,
        repeats=tables.repeats(rows),
        differences=tables.differences(records),
        version=version_of_loratune(),
        shades=list(zip(SHADES, DARK, strict=True)),
    )
    write_atomically(destination, page)
    return destination


def _figures(draw: Iterable[Callable[[Any], Plot | None]], what: Any, folder: Path, prefix: str) -> dict[str, Inline]:
    """Draw the figures that there is something to show of; saved to `folder` and ready for the page, by name."""
    plots = [plot for function in draw if (plot := function(what)) is not None]
    return {plot.name: inline(plot, save(plot, folder / (prefix + plot.name)), key=prefix + plot.name) for plot in plots}


def _study(record: StudyRecord, plots: dict[str, Inline]) -> dict[str, Any]:
    """What the template shows of one study."""
    top, others = tables.ranked(record)
    handed_over = record.folder / "adapter"
    found = tables.answer(record)
    trained = record.folder / "trials" / f"{found.best.number:04d}" / "main" / "adapter" if found.best else handed_over
    return {
        "record": record,
        "answer": found,
        "adapter": handed_over if handed_over.is_dir() else trained if trained.is_dir() else None,
        "base_model": asked.base_model(record),
        "cost": tables.cost(record),
        "open": sum(t.state in (RUNNING, PAUSED) for t in record.trials),
        "less_far": any(t.state in (PAUSED, PRUNED) for t in record.trials),
        "searched": tables.searched(record),
        "columns": tables.varied(record),
        "top": top,
        "others": others,
        "plots": plots,
        "sources": asked.sources(record),
        "asked": asked.asked(record),
        "space": asked.space(record),
        "environment": asked.environment(record),
        "command": asked.command(record),
    }


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "study"
