"""A study as a table, as a line, and as what a notebook shows: its choice, a picture, its best trials."""

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from loratune.system.formatting import label, loss, plural, show

if TYPE_CHECKING:
    from loratune.record.trials import StudyRecord, Trial

_SHOWN = 10  # trials in a notebook's table
_WIDTH, _HEIGHT, _EDGE = 560, 150, 24  # of the picture, pixels


def rows(trials: "Sequence[Trial]") -> list[dict[str, Any]]:
    """Per trial: number, state, what was searched, validation loss (nats), scores, share of a full run, tokens, device-seconds."""
    return [
        {
            "trial": trial.number,
            "state": str(trial.state.value),
            **trial.params,
            "validation_loss": trial.value,
            **trial.scores,
            "length": trial.length,
            "tokens": trial.tokens,
            "device_seconds": trial.device_seconds,
        }
        for trial in trials
    ]


def dataframe(record: "StudyRecord") -> Any:
    """`rows` as a pandas DataFrame, one trial a row, in order of number."""
    import pandas

    return pandas.DataFrame(rows(record.trials))


def line(record: "StudyRecord") -> str:
    """The study in one line."""
    best = "" if record.best is None else f"; best trial {record.best.number}, validation loss {loss(record.best.value)}"
    return f"<study {record.name}: {plural(len(record.trials), 'trial')}{best}>"


def html(record: "StudyRecord") -> str:
    """What a notebook shows: which trial, a picture of all losses, the best trials. Plain HTML and SVG, nothing is loaded."""
    best = record.ranking[:_SHOWN]
    head = f"<b>{escape(record.name)}</b>: {plural(len(record.trials), 'trial')}, {record.device_seconds / 3600:.2f} device-hours"
    if not best:
        return f"<div>{head}; none was trained to its end yet.</div>"
    from loratune.record.adapters import shipped_run  # it imports the record

    shipped = shipped_run(record)
    made = shipped[0] if shipped is not None else None
    chosen = (
        f"ship trial {made} (chosen by <code>loratune select</code>)"
        if made is not None
        else f"{f'best {escape(record.own_objective)}' if record.own_objective else 'lowest loss'}: trial {best[0].number}"
    )
    others = [("the default", record.default.value if record.default else None), ("the untuned model", record.base_loss)]
    against = ", ".join(f"{name} {loss(value)}" for name, value in others if value is not None)
    names = list(dict.fromkeys(name for trial in best for name in trial.params))
    cells = [["trial", *map(label, names), "validation loss"]]
    cells += [[str(t.number), *(show(t.params[n]) if n in t.params else "" for n in names), loss(t.value)] for t in best]
    header, *body = (
        "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) for tag, row in zip(["th"] + ["td"] * len(best), cells, strict=True)
    )
    table = f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in body)}</tbody></table>"
    told = f"{chosen}, validation loss {loss(best[0].value)}" if made is None else chosen
    return f"<div>{head}; {told}{f' ({against})' if against else ''}.</div>{_picture(record, best[0])}{table}"


def _picture(record: "StudyRecord", best: "Trial") -> str:
    """Validation loss over trial, the best one filled; what lies far above the best is drawn at the upper edge."""
    points = [(t.number, t.value) for t in record.trials if t.value is not None and math.isfinite(t.value) and not t.short]
    losses = sorted(value for _, value in points)
    low, high = losses[0], losses[min(len(losses) - 1, int(0.9 * len(losses)))]
    last = max(number for number, _ in points) or 1

    def place(number: int, value: float) -> str:
        x = _EDGE + (_WIDTH - 2 * _EDGE) * number / last
        up = (min(value, high) - low) / ((high - low) or 1)
        return f'cx="{x:.1f}" cy="{_HEIGHT - _EDGE - (_HEIGHT - 2 * _EDGE) * up:.1f}"'

    circles = "".join(
        f'<circle {place(number, value)} r="4" fill="{"currentColor" if number == best.number else "none"}" stroke="currentColor">'
        f"<title>trial {number}: {value:.4f}</title></circle>"
        for number, value in points
    )
    words = f'<text x="{_EDGE}" y="14" font-size="12" fill="currentColor">validation loss, {low:.4f} to {high:.4f}, over trials</text>'
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" style="max-width:100%"'
    return f'<svg {size} role="img" aria-label="validation loss over trials">{words}{circles}</svg>'
