"""Downstream scores of a study in few numbers, for `loratune status`: no bootstrap, no scipy, no torch."""

from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.table import Table

from loratune.downstream.results.scores import BASE, Result, model_name, read_results
from loratune.record import StudyRecord
from loratune.record.adapters import shipped_run

_TOP = 10  # trials, as published


def score_summary(record: StudyRecord) -> list[dict[str, Any]]:
    """One entry per benchmark that was begun; scores in [0, 1]. Raises StorageError for damaged files.

    default, base, shipped (what a selection hands over): None where not scored.
    best: over the scored ones of the ten trials with the lowest validation loss;
    sd has the divisor n - 1. answered of asked: answers, all models together.
    """
    found: dict[str, dict[str, Result]] = {}
    for result in read_results(record.paths.evaluation, begun=True):
        found.setdefault(result.benchmark, {})[result.model] = result
    best = [model_name(trial.number) for trial in record.ranking[:_TOP]]
    default = model_name(record.default.number) if record.default is not None else ""
    chosen = shipped_run(record)
    shipped = model_name(*chosen) if chosen is not None else ""
    return [_entry(name, own, best, default, shipped) for name, own in sorted(found.items())]


def _entry(benchmark: str, own: dict[str, Result], best: list[str], default: str, shipped: str) -> dict[str, Any]:
    values = {model: result.value for model, result in own.items() if result.scores}
    top = [values[model] for model in best if model in values]
    some = next(iter(own.values()))
    asked = {model: int(result.facts["items"]) for model, result in own.items()}
    answered = sum(min(len(result.scores), asked[model]) for model, result in own.items())
    return {
        "benchmark": benchmark,
        "title": some.title,
        "items": max(asked.values()),
        "chance": some.chance,
        "default": values.get(default),
        "base": values.get(BASE),
        "shipped": values.get(shipped),
        "best": _summary(top) if top else None,
        "answered": answered,
        "asked": sum(asked.values()),
        "complete": all(result.done for result in own.values()),
    }


def _summary(values: list[float]) -> dict[str, float]:
    sd = stdev(values) if len(values) > 1 else 0.0
    return {"n": len(values), "min": min(values), "max": max(values), "mean": fmean(values), "sd": sd}


def score_table(entries: list[dict[str, Any]]) -> Table:
    """A row per benchmark, in %; narrow enough that 80 columns cut no number."""
    most = max((entry["best"]["n"] for entry in entries if entry["best"]), default=0)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    numbers = ("items", "chance", "base", "default", f"{most} best: min", "max", "mean", "sd")
    for name in numbers if most else numbers[:4]:
        table.add_column(name, justify="right", no_wrap=True, min_width=max(4, len(name)))
    table.add_column("")
    for entry in entries:
        best = entry["best"] or {}
        cells = [entry["chance"], entry["base"], entry["default"], *(best.get(name) for name in ("min", "max", "mean", "sd") if most)]
        fewer = f"of {best['n']} best" if best and best["n"] < most else ""
        state = "" if entry["complete"] else f"{entry['answered']:,} of {entry['asked']:,} answered"
        row = [entry["title"], f"{entry['items']:,}", *("–" if cell is None else f"{100 * cell:.1f}" for cell in cells)]
        table.add_row(*row, ", ".join(filter(None, [fewer, state])) or "complete")
    return table
