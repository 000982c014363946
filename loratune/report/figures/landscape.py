"""What the search found, as figures: which hyperparameters mattered, the loss against each of them, the front of several objectives."""

import math
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from loratune.record import StudyRecord, Trial
from loratune.report import importance as importances
from loratune.report import tables
from loratune.report.axes import ABSENT, Axis, axis_of
from loratune.report.drawing import BEST, INK, LEVELS, SHADES, STYLE, WIDTH, Plot, Scale, blank
from loratune.report.live import tell_axis, tell_trials
from loratune.report.tables import finished_trials, headline, value
from loratune.system.formatting import count, label, loss, metric, plural, show


@matplotlib.rc_context(STYLE)
def importance(record: StudyRecord) -> Plot | None:
    """How much each hyperparameter tells good configurations from the rest."""
    found = importances.importance_of(record)
    if found is None:
        return None
    names = list(found.shares)
    figure, axes = blank(0.65 + 0.3 * len(names))
    axes.grid(False)
    axes.barh(range(len(names)), [found.shares[n] for n in names], color=SHADES[LEVELS // 3], height=0.62)
    for y, name in enumerate(names):
        axes.text(found.shares[name] + 0.01, y, f"{found.shares[name]:.0%}", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(names)), [label(n) for n in names])
    axes.invert_yaxis()
    axes.set_xlim(0, max(found.shares.values()) * 1.12)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)
    numbers = ", ".join(f"{label(n)} {share:.0%}" for n, share in found.shares.items())
    sentence = numbers[0].upper() + numbers[1:]
    caption = (
        f"{sentence}. PED-ANOVA (Optuna) on {found.trials} finished trials: how differently the best {found.quantile:.0%} "
        "of them are distributed from all of them, each hyperparameter by itself, without interactions. "
        "A hyperparameter that the search hardly varied cannot look important."
    )
    if found.few:
        caption += f" With fewer than {importances.FEW} trials this is a rough guess."
    alt = f"Horizontal bars, the longest at the top: {numbers}."
    return Plot(name="importance", title="Which hyperparameters mattered", figure=figure, alt=alt, caption=caption)


@matplotlib.rc_context(STYLE)
def slices(record: StudyRecord) -> Plot | None:
    """Loss against each searched hyperparameter."""
    trials, found = finished_trials(record), headline(record)
    names = tables.searched(record)
    if not trials or not names:
        return None
    scale = Scale.of([value(t) for t in trials])
    rows = math.ceil(len(names) / 2)
    parameters = tables.space_of(record).parameters
    figure = Figure(figsize=(WIDTH, 1.85 * rows), layout="constrained")
    grid = list(figure.subplots(rows, 2, squeeze=False, sharey=True).flat)
    for axes in grid[len(names) :]:
        axes.remove()
    for axes, name in zip(grid, names, strict=False):
        _slice_panel(axes, axis_of(name, parameters[name]), trials, scale, found)
        axes.set_ylim(scale.low - scale.room, scale.high + 2 * scale.room)
        axes.set_ylabel("validation loss" if axes.get_subplotspec().is_first_col() else "")
    best, names_in_words = found.best, ", ".join(label(n) for n in names)
    numbers = tables.settings(record, best) if best else ""
    caption = f"Loss of {plural(len(trials), 'finished trial')} against each hyperparameter by itself. Ringed: the best, at {numbers}."
    if hidden := scale.beyond([value(t) for t in trials]):
        caption += f" {plural(hidden, 'loss') if hidden == 1 else f'{hidden} losses'} above {loss(scale.high)} drawn at the upper edge."
    alt = f"{plural(len(names), 'scatter plot')} of validation loss, against {names_in_words}. {tables.where_good(record)}".strip()
    return Plot(name="slices", title="One hyperparameter at a time", figure=figure, alt=alt, caption=caption)


def _slice_panel(axes: Any, axis: Axis, trials: list[Trial], scale: Scale, found: tables.Headline) -> None:
    def point(trial: Trial) -> tuple[float, float]:
        return axis.place(trial.params.get(axis.name)), min(value(trial), scale.high + 0.03 * (scale.high - scale.low))

    placed = [point(t) for t in trials]
    shades = [scale.shade(value(t)) for t in trials]
    tell_trials(axes.scatter(*zip(*placed, strict=True), s=11, c=shades, alpha=0.8, linewidths=0, zorder=3), trials)
    if found.best:
        axes.scatter(*point(found.best), s=46, facecolors="none", edgecolors=BEST, linewidths=1.5, zorder=4)
    absent = any(x == ABSENT for x, _ in placed)
    ticks = [*axis.ticks(), *([(ABSENT, "inactive")] if absent else [])]
    axes.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
    if max(len(text) for _, text in ticks) * len(ticks) > 34:
        axes.tick_params(axis="x", rotation=30)
    axes.set_xlim(ABSENT - 0.05 if absent else -0.04, 1.04)
    spanned = {} if axis.places or axis.high == axis.low else {"low": axis.low, "high": axis.high, "log": axis.log, "whole": axis.whole}
    tell_axis(axes, "x", named=[(x, text) for x, text in ticks if x == ABSENT or not spanned], **spanned)
    axes.set_xlabel(axis.label)


@matplotlib.rc_context(STYLE)
def front(record: StudyRecord) -> Plot | None:
    """The loss against each other objective, and the trials that no other beats in all of them."""
    trials = [t for t in finished_trials(record) if t.values and all(map(math.isfinite, t.values))]
    names = list(record.objectives)
    if len(names) < 2 or not trials:
        return None
    scale = Scale.of([value(t) for t in trials])
    others = names[1:]
    columns = min(2, len(others))
    rows = math.ceil(len(others) / columns)
    figure = Figure(figsize=(WIDTH, 2.9 if columns == 1 else 2.2 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes in grid[len(others) :]:
        axes.remove()
    for place, (axes, name) in enumerate(zip(grid, others, strict=False), 1):
        _front_panel(axes, record, trials, scale, place)
        axes.set_xlabel(metric(name) + (", more is better" if record.objectives[name] == "maximize" else ""))
        axes.set_ylabel(metric(names[0]) if axes.get_subplotspec().is_first_col() else "")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, handletextpad=0.4)
    best, told = record.front, " and ".join(map(metric, names))
    ends = [f"trial {t.number} with " + ", ".join(f"{metric(n)} {show(v)}" for n, v in zip(names, t.values, strict=True)) for t in best]
    caption = f"{len(best)} of {plural(len(trials), 'trial')} are on the front: no other beats them in {told} together."
    if hidden := scale.beyond([value(t) for t in trials]):
        caption += f" {hidden} with losses above {loss(scale.high)} drawn at the upper edge."
    alt = f"Scatter of {metric(names[0])} over {', '.join(map(metric, others))}, {plural(len(trials), 'dot')}, those on the front ringed"
    alt += " and joined by a falling staircase" if len(names) == 2 else ""
    shown = ends if len(ends) <= 6 else [ends[0], ends[len(ends) // 2], ends[-1]]
    return Plot(name="front", title="The front", figure=figure, alt=f"{alt}. On it: {'; '.join(shown)}.", caption=caption)


def _front_panel(axes: Any, record: StudyRecord, trials: list[Trial], scale: Scale, place: int) -> None:
    """Loss over objective number `place`."""
    best = {t.number for t in record.front}
    top = scale.high + scale.room
    at = {t.number: (t.values[place], min(value(t), top)) for t in trials}
    rest = [t for t in trials if t.number not in best]
    dots = axes.scatter(
        *zip(*[at[t.number] for t in rest], strict=True) if rest else ([], []),
        s=13,
        color=SHADES[LEVELS // 3],
        linewidths=0,
        label="trials",
    )
    ringed = sorted((number for number in best if number in at), key=lambda number: at[number])
    on = [at[number] for number in ringed]
    if len(record.objectives) == 2:
        maximised = list(record.objectives.values())[place] == "maximize"
        axes.step(*zip(*on, strict=True), where="pre" if maximised else "post", color=BEST, linewidth=1.2, zorder=2)
    tell_trials(dots, rest)
    tell_trials(axes.scatter(*zip(*on, strict=True), s=26, facecolors=BEST, edgecolors="none", zorder=4, label="on the front"), ringed)
    if record.default is not None and record.default.number in at:
        axes.scatter(
            *at[record.default.number],
            s=52,
            marker="s",
            facecolors="none",
            edgecolors=INK,
            linewidths=1.2,
            zorder=5,
            label=tables.reference(record),
        )
    lowest, highest = (pick(x for x, _ in at.values()) for pick in (min, max))
    if lowest > 0 and highest > 20 * lowest:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: count(x) if x >= 1000 else show(x))
    tell_axis(axes, "x", large=True)
    axes.set_ylim(scale.low - scale.room, top + scale.room)
