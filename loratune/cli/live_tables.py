"""The tables of the live view and of `loratune status`."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loratune.cli.trial_lines import params, standing, totals, varied_parameters
from loratune.record import COMPLETE, DIVERGED, FAILED, INFEASIBLE, PRUNED, RUNNING, StudyRecord, Trial
from loratune.system.formatting import NOTHING, duration, label, loss, metric, show

_BAR = 12  # characters of a progress bar
_STYLES = {COMPLETE: "", RUNNING: "cyan", FAILED: "red", DIVERGED: "yellow", INFEASIBLE: "yellow"}


def live(snapshot: dict[str, Any], record: StudyRecord, *, shown: int) -> RenderableType:
    """The latest trials, what runs now, the best so far, and the totals."""
    parts: list[RenderableType] = []
    if ended := [trial for trial in record.trials if trial.outcomes]:
        parts += [trial_table(ended[-shown:], record.best), ""]
    if snapshot.get("running"):
        parts += [running_table(snapshot["running"], record.trials), ""]
    parts += [*standing_lines(record), Text(" · ".join(totals(snapshot)) if snapshot else "preparing ...", style="dim")]
    return Group(*parts)


def trial_table(trials: Sequence[Trial], best: Trial | None) -> Table:
    """One row per trial; the best is marked."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    names = varied_parameters(trials)
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("loss", justify="right", no_wrap=True)
    scores = list(dict.fromkeys(name for trial in trials for name in trial.scores))
    for name in scores:
        table.add_column(metric(name), justify="right")
    for name in names:
        table.add_column(label(name), justify="right", overflow="fold")
    table.add_column("time", justify="right", no_wrap=True)
    for trial in trials:
        is_best = best is not None and trial.number == best.number
        cells = [show(trial.params[name]) if name in trial.params else "" for name in names]
        table.add_row(
            f"{'* ' if is_best else ''}{trial.number}",
            "short" if trial.short and trial.state == PRUNED else trial.state,
            loss(trial.value) if trial.state not in (DIVERGED, INFEASIBLE) else NOTHING,
            *(f"{trial.scores[name]:.4g}" if name in trial.scores else "" for name in scores),
            *cells,
            duration(trial.device_seconds),
            style="bold green" if is_best else _STYLES.get(trial.state, "dim"),
        )
    return table


def running_table(rows: Sequence[dict[str, Any]], trials: Sequence[Trial]) -> Table:
    """One row per segment in training."""
    settings = {trial.number: params(trial.params) for trial in trials}
    table = Table(box=None, pad_edge=False, show_header=True, header_style="")
    table.add_column("running", no_wrap=True)
    table.add_column("", width=_BAR)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("train", justify="right", no_wrap=True)
    table.add_column("validation", justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        run = "" if row["run"] == "main" else f" {row['run']}"
        bar = ProgressBar(total=max(1, row["total_steps"]), completed=row["step"], width=_BAR)
        steps = f"{row['step']}/{row['total_steps']}"
        losses = loss(row["train_loss"]), loss(row["validation_loss"])
        table.add_row(f"trial {row['trial']}{run}", bar, steps, *losses, settings.get(row["trial"], ""), style="cyan")
    return table


def standing_lines(record: StudyRecord) -> list[Text]:
    """Best, default and base model, the best in green."""
    styles = ["green"] if record.best is not None else [""]
    return [Text(line, style=style) for line, style in zip(standing(record), [*styles, "", ""], strict=False)]
