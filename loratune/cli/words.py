"""Trials and studies in a few words, for lines and tables of the terminal."""

from collections.abc import Iterable
from typing import Any

from loratune.record import COMPLETE, PAUSED, PRUNED, StudyRecord, Trial
from loratune.report.words import count, duration, in_order, label, loss, show

__all__ = ["clock", "count", "counts", "duration", "label", "loss", "params", "result", "share", "show", "varied"]

BASE = "base model, untuned"


def params(values: dict[str, Any]) -> str:
    """`rank 8, alpha 32, learning rate 1e-5`."""
    return ", ".join(f"{label(name)} {show(values[name])}" for name in in_order(set(values)))


def varied(trials: Iterable[Trial]) -> list[str]:
    """The searched parameters, those with one value in all trials left out, unless all have."""
    seen: dict[str, set[str]] = {}
    for trial in trials:
        for name, value in trial.params.items():
            seen.setdefault(name, set()).add(show(value))
    names = in_order(set(seen))
    return [name for name in names if len(seen[name]) > 1] or names


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `3:02:05`."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"


def counts(trials: Iterable[Trial]) -> str:
    """`12 complete, 3 pruned, 1 failed`."""
    numbers: dict[str, int] = {}
    for trial in trials:
        numbers[trial.state] = numbers.get(trial.state, 0) + 1
    order = [COMPLETE, PRUNED, PAUSED, *numbers]
    return ", ".join(f"{numbers[state]} {state}" for state in dict.fromkeys(order) if state in numbers) or "none yet"


def result(record: StudyRecord) -> list[str]:
    """Best against default against base model, and what it cost: the lines that end a run."""
    best, default, base = record.best, record.default, record.base_loss
    if best is None or best.value is None:
        return [f"No trial was trained to its end ({counts(record.trials)}).", *_reasons(record)]
    rows = [(f"best, trial {best.number}", best.value, params(best.params))]
    if default is not None and default.value is not None and default.state == COMPLETE:
        gain = f"; the best is {default.value - best.value:.4f} lower" if best.number else "; nothing was better"
        rows.append((f"default, trial {default.number}", default.value, params(default.params) + gain))
    if base is not None:
        rows.append((BASE, base, ""))
    width = max(len(row[0]) for row in rows)
    lines = [f"Validation loss after {len(record.trials)} trials ({counts(record.trials)}):"]
    lines += [f"  {name:<{width}}  {loss(value)}  {text}".rstrip() for name, value, text in rows]
    lines.append(f"Cost: {record.device_seconds / 3600:.2f} device-hours, {count(record.tokens)} training tokens.")
    return lines


def _reasons(record: StudyRecord) -> list[str]:
    """What the last failed trial said."""
    said = [trial for trial in record.trials if trial.message]
    return [f"Trial {said[-1].number} said: {said[-1].message}"] if said else []
