"""The report as one HTML file: numbers from tables.py and evidence.py, figures inline as SVG, nothing to download.

Its only script, `templates/figures.js`, tells trials under the pointer and zooms; the page is complete without it.

`templates/page.html` is the frame; each section of a study is a file of `templates/sections/`, in the order of `_sections`.
"""

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from loratune.downstream.results.contamination import RULE
from loratune.downstream.results.scores import describe_model
from loratune.errors import StorageError
from loratune.preference import summary_lines
from loratune.record import PAUSED, PRUNED, RUNNING, StudyRecord
from loratune.record.adapters import find_adapter
from loratune.record.common_practice import common_practice
from loratune.record.nodes import by_node
from loratune.record.paths import MAIN
from loratune.report import figures, spec_summary, tables
from loratune.report.drawing import DARK, SHADES, Plot
from loratune.report.evidence import Evidence, gather
from loratune.report.svg import Inline, inline, save_figure
from loratune.system import formatting
from loratune.system.files import write_atomically
from loratune.system.machine import version_of_loratune

TEMPLATES = Path(__file__).parent / "templates"
MANY = 12  # candidates of the table, at most


def render(records: Sequence[StudyRecord], destination: Path) -> Path:
    """Write the report to `destination` and its figures to `figures/` beside it."""
    if not records:
        raise StorageError("a report needs at least one study: give the folder that `loratune run` made.")
    folder = destination.parent / "figures"
    evidence = [gather(record) for record in records]
    prefixes = _prefixes(records)
    together = _figures(figures.of_several(records), folder, "", prefixes)
    drawn = [_figures(figures.of_one(found), folder, prefix, [prefix]) for found, prefix in zip(evidence, prefixes, strict=True)]
    write_atomically(destination, compose(evidence, drawn, together))
    return destination


def compose(evidence: Sequence[Evidence], drawn: Sequence[dict[str, Inline]], together: dict[str, Inline]) -> str:
    """The page: of each study its evidence and its figures by name, and the figures of all of them `together`."""
    records = [found.record for found in evidence]
    studies = [_study(*parts) for parts in zip(evidence, drawn, _prefixes(records), strict=True)]
    rows, common = tables.compare_studies(records)
    script = "\n" + (TEMPLATES / "figures.js").read_text(encoding="utf-8")
    return (
        _environment()
        .get_template("page.html")
        .render(
            studies=studies,
            together=together,
            rows=rows,
            common=common,
            repeats=tables.repeats(rows),
            differences=tables.incomparable_sections(records),
            benchmarks=list(dict.fromkeys(title for study in studies for title in study["means"])),
            version=version_of_loratune(),
            shades=list(zip(SHADES, DARK, strict=True)),
            script=Markup(script),
            digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def _prefixes(records: Sequence[StudyRecord]) -> list[str]:
    """What the names of each study's figures and ids begin with."""
    return [f"{number}-{_slug(record.name)}-" if len(records) > 1 else "" for number, record in enumerate(records, 1)]


def _environment() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    spelt = (
        "show",
        "loss",
        "signed",
        "perplexity",
        "duration",
        "count",
        "plural",
        "label",
        "percent",
        "points",
        "measured",
        "metric",
        "money",
    )
    found.globals |= {name: getattr(formatting, name) for name in (*spelt, "money")}
    found.globals |= {"rule": RULE, "tables": tables, "votes": summary_lines, "describe_model": describe_model, "repr": repr}
    found.globals |= {"exp": math.exp}
    return found


def _figures(plots: Iterable[Plot], folder: Path, prefix: str, studies: Sequence[str]) -> dict[str, Inline]:
    """The figures saved to `folder` and ready for the page, by name; `studies`: the prefix of each study they show."""
    return {
        plot.name: inline(plot, save_figure(plot, folder / (prefix + plot.name)), _slug(f"{prefix}figure-{plot.name}"), studies)
        for plot in plots
    }


def _sections(evidence: Evidence, plots: dict[str, Inline]) -> list[tuple[str, str]]:
    """(file of templates/sections, title) of what there is to tell, in the order of the story."""
    best, selection = evidence.chosen, evidence.selection
    told = [
        ("against", f"{'Chosen' if selection else 'Best'} against {tables.reference(evidence.record)}", best is not None),
        ("search", "The search", {"parallel-coordinates", "learning-curves"} & plots.keys()),
        ("mattered", "Importance", {"importance", "slices"} & plots.keys()),
        ("tradeoffs", "Trade-offs", "front" in plots),
        ("downstream", "Downstream scores", evidence.downstream is not None),
        ("finalists", "Finalists and noise", selection is not None),
        ("choice", "The choice and its confidence", selection is not None),
        ("preference", "Blind preference", evidence.comparisons),
        ("trials", "All trials", evidence.record.trials),
        ("asked", "Setup", True),
        ("cost", "Cost", True),
        ("missing", "Not measured", best is not None and evidence.missing),
        ("repeat", "To reproduce it", True),
    ]
    return [(name, title) for name, title, there in told if there]


def _study(evidence: Evidence, plots: dict[str, Inline], key: str) -> dict[str, Any]:
    """What the templates show of one study; `key` begins its ids."""
    record, selection, downstream = evidence.record, evidence.selection, evidence.downstream
    top, others = tables.ranked(record)
    handed_over = record.paths.adapter
    chosen = evidence.chosen
    trained = find_adapter(record, chosen, selection.shipped.run if selection else MAIN) if chosen else None
    entrants = sorted(selection.candidates, key=lambda e: (e.trial != selection.chosen, -e.share, e.loss))[:MANY] if selection else []
    return {
        "key": key,
        "record": record,
        "own": record.own_objective,
        "sections": _sections(evidence, plots),
        "answer": tables.headline(record),
        "chosen": chosen,
        "settings": tables.settings(record, chosen) if chosen else "",
        "common": usual.value if (usual := common_practice(record)) is not None else None,
        "edges": tables.edges(record, chosen) if chosen else (),
        "adapter": handed_over if handed_over.is_dir() else trained,
        "base_model": spec_summary.base_model(record),
        "open": sum(t.state in (RUNNING, PAUSED) for t in record.trials),
        "less_far": any(t.state in (PAUSED, PRUNED) for t in record.trials),
        "searched": tables.searched(record),
        "columns": tables.table_columns(record),
        "scores": list(dict.fromkeys(name for trial in record.trials for name in trial.scores)),
        "top": top,
        "others": others,
        "plots": plots,
        "downstream": downstream,
        "means": {f.title: formatting.percent(f.best.mean) for f in downstream.findings if f.best} if downstream else {},
        "selection": selection,
        "entrants": entrants,
        "benchmarks": sorted({name for e in entrants for name in e.scores}),
        "titles": {f.benchmark: f.title for f in downstream.findings} if downstream else {},
        "comparisons": evidence.comparisons,
        "missing": evidence.missing,
        "sources": spec_summary.sources(record),
        "asked": [
            (f"Training of trial {chosen.number}" if what == "Training" and chosen else what, how)
            for what, how in spec_summary.spec_rows(record, chosen)
        ],
        "space": spec_summary.space(record),
        "nodes": by_node(record.trials),
        "environment": spec_summary.environment_rows(record),
        "command": spec_summary.command(record),
    }


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "study"
