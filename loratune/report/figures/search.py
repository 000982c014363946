"""The search as figures: every trial in its order, every configuration as a line, every learning curve."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure

from loratune.record import DIVERGED, FAILED, INFEASIBLE, PAUSED, PRUNED, StudyRecord, Trial
from loratune.report import tables
from loratune.report.axes import ABSENT, axis_of
from loratune.report.drawing import (
    BEST,
    INK,
    LEVELS,
    SHADES,
    SOFT,
    STYLE,
    WIDTH,
    Plot,
    Scale,
    blank,
    colour_key,
    literal,
    smooth,
    smooth_points,
    tag,
)
from loratune.report.live import tell_axis, tell_trials
from loratune.report.tables import finished_trials, headline, value
from loratune.system.formatting import count, loss, plural

LOST = (FAILED, DIVERGED, INFEASIBLE)


@matplotlib.rc_context(STYLE)
def history(record: StudyRecord) -> Plot | None:
    """Loss of each trial in the order of the search, and the best so far."""
    trials, found = finished_trials(record), headline(record)
    if not trials:
        return None
    losses = [value(t) for t in trials]
    scale = Scale.of(losses)
    figure, axes = blank(2.9)
    top = scale.high + scale.room
    axes.set_ylim(scale.low - scale.room, top + scale.room)
    less = [t for t in record.trials if t.state in (PAUSED, PRUNED) and t.value is not None and math.isfinite(t.value)]
    if less:
        open_dots = axes.scatter(*_points(less, top), s=13, facecolors="none", edgecolors=SOFT, linewidths=0.8, label="trained less far")
        tell_trials(open_dots, less)
    shades = [scale.shade(v) for v in losses]
    tell_trials(axes.scatter(*_points(trials, top), s=16, c=shades, linewidths=0, zorder=3), trials)
    axes.scatter([], [], s=16, c=SHADES[LEVELS // 4], linewidths=0, label="trained to the end")
    lost = [t for t in record.trials if t.state in LOST]
    if lost:
        places = [t.number for t in lost], [top] * len(lost)
        tell_trials(axes.scatter(*places, s=16, marker="x", c=INK, linewidths=0.9, label="failed or diverged"), lost)
    path = tables.running_best(record)
    axes.step(range(len(path)), [v if math.isfinite(v) else math.nan for v in path], where="post", color=BEST, label="best so far")
    if found.default:
        axes.axhline(min(value(found.default), top), color=INK, dashes=(5, 3), linewidth=1, label=found.reference)
        if value(found.default) > top:
            tag(axes, len(path) - 0.5, top - 1.4 * scale.room, f"{found.reference} {loss(value(found.default))} ↑", "right")
    axes.set_xlabel("trial")
    axes.set_ylabel("validation loss")
    axes.set_xlim(-0.5 - 0.01 * len(path), len(path) - 0.5 + 0.01 * len(path))
    axes.xaxis.get_major_locator().set_params(integer=True)
    tell_axis(axes, "x", whole=True)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=5, handletextpad=0.4, columnspacing=1.2, borderpad=0.2)
    hidden = scale.beyond([*losses, *(value(found.default) for _ in [0] if found.default)])
    best = found.best
    caption = f"{plural(len(trials), 'trial')} trained to the end. " + (
        f"Trial {best.number} is the best: {loss(value(best))}. " if best else ""
    )
    if found.default:
        caption += f"{found.against[0].upper()}{found.against[1:]} (dashed) reaches {loss(value(found.default))}; "
        caption += f"{plural(found.better, 'trial')} did better. "
    if hidden:
        caption += f"Losses above {loss(scale.high)} are drawn at the upper edge. "
    alt = (
        f"Scatter of validation loss over trial number, {plural(len(trials), 'dot')} between {loss(min(losses))} and {loss(max(losses))}. "
        f"The line of the best so far falls from {loss(next(filter(math.isfinite, path)))} to {loss(path[-1])}"
        + (f", which trial {best.number} reaches." if best else ".")
    )
    if found.default:
        alt += f" A dashed line across marks {found.against}, {loss(value(found.default))}."
    if lost:
        alt += f" Crosses at the upper edge: {plural(len(lost), 'trial')} failed or diverged."
    return Plot(name="history", title="History", figure=figure, alt=alt, caption=caption.strip())


@matplotlib.rc_context(STYLE)
def parallel(records: Sequence[StudyRecord]) -> Plot | None:
    """Every configuration a line through its hyperparameters to its loss; a panel per study, one colour scale."""
    shown = [r for r in records if finished_trials(r) and tables.searched(r)]
    if not shown:
        return None
    everything = [value(t) for r in shown for t in finished_trials(r)]
    scale = Scale.of(everything)
    figure = Figure(figsize=(WIDTH, 2.75 * len(shown) + 0.25), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for panel, record in zip(panels, shown, strict=True):
        lines = _parallel_panel(panel, record, scale, f"{literal(record.name)} ({tables.sampler_of(record)})" if len(records) > 1 else "")
        tell_trials(*lines, study=next(k for k, r in enumerate(records) if r is record))
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper left", ncols=3)
    tops = [(r, best) for r, best in ((r, headline(r).best) for r in shown) if best]
    sentences = [
        (f"{r.name}: " if len(records) > 1 else "") + f"the best is trial {t.number}, {loss(value(t))}, with " + tables.settings(r, t)
        for r, t in tops
    ]
    regions = [(r, tables.where_good(r)) for r in shown]
    beyond = scale.beyond(everything)
    clipped = f" {plural(beyond, 'configuration')} above {loss(scale.high)} end at the top." if beyond else ""
    return Plot(
        name="parallel-coordinates",
        title="Every configuration tried" + (f", by {tables.sampler_of(shown[0])}" if len(records) == 1 else ", by sampler"),
        figure=figure,
        alt=f"Parallel coordinates of {plural(len(everything), 'configuration')}, one line each over its hyperparameters "
        f"to its loss, {loss(min(everything))} to {loss(max(everything))}. "
        + " ".join(f"{r.name + ': ' if len(records) > 1 else ''}{good}" for r, good in regions if good),
        caption="One line per configuration, coloured by its validation loss as on the right axis; " + "; ".join(sentences) + "." + clipped,
    )


def _parallel_panel(axes: Any, record: StudyRecord, scale: Scale, title: str) -> tuple[PathCollection, list[Trial]]:
    """Draw one study; returns its lines, and whose they are."""
    parameters = tables.space_of(record).parameters
    columns = [axis_of(name, parameters[name]) for name in tables.searched(record)]
    trials = sorted(finished_trials(record), key=lambda t: (-value(t), -t.number))  # best last, on top
    last = len(columns)
    found = headline(record)

    def heights(trial: Trial) -> list[float]:
        return [c.place(trial.params.get(c.name)) for c in columns] + [scale.place(value(trial))]

    curves = [smooth(heights(t)) for t in trials]
    faint = 0.8 if len(trials) <= 60 else 0.55
    colors = [scale.shade(value(t)) for t in trials]
    lines = PathCollection(curves, facecolors="none", edgecolors=colors, linewidths=0.9, alpha=faint, zorder=2)
    axes.add_collection(lines)
    # Legend proxies are the highlighted curves themselves, drawn point by point.
    if found.default:
        xs, ys = smooth_points(heights(found.default))
        axes.plot(xs, ys, color=INK, dashes=(4, 2.5), linewidth=1.4, zorder=4, label=found.reference)
    if found.best:
        xs, ys = smooth_points(heights(found.best))
        axes.plot(xs, ys, color=BEST, linewidth=2.2, zorder=5, label="best")
    missing = False
    for x, column in enumerate(columns):
        absent = any(column.place(t.params.get(column.name)) == ABSENT for t in trials)
        missing |= absent
        axes.plot([x, x], [0, 1], color=SOFT, linewidth=0.8, zorder=3)
        for y, text in [*column.ticks(), *([(ABSENT, "inactive")] if absent else [])]:
            axes.plot([x, x - 0.03], [y, y], color=SOFT, linewidth=0.8, zorder=3)
            tag(axes, x - 0.05, y, text, "right")
        axes.text(x, 1.07, column.label, ha="center", va="bottom", fontsize=8.5, color=INK)
    step = 1 / LEVELS
    for k, shade in enumerate(SHADES):
        axes.plot([last, last], [k * step, min(1, (k + 1.3) * step)], color=shade, linewidth=5, solid_capstyle="butt", zorder=3)
    for k in range(5 if scale.high > scale.low else 1):
        at = scale.low + (scale.high - scale.low) * k / 4
        more = "≥ " if k == 4 and scale.beyond([value(t) for t in trials]) else ""
        tag(axes, last + 0.06, scale.place(at), more + scale.text(at), "left")
    axes.text(last, 1.07, "loss", ha="center", va="bottom", fontsize=8.5, color=INK)
    axes.set_xlim(-0.45, last + 0.35)
    axes.set_ylim(-0.16 if missing else -0.03, 1.2)
    axes.axis("off")
    if title:
        axes.set_title(title, loc="left", fontsize=9, fontweight="bold", color=INK, pad=8)
    return lines, trials


@matplotlib.rc_context(STYLE)
def curves(record: StudyRecord) -> Plot | None:
    """Validation loss over training tokens. All curves start at the base model, since an adapter starts at zero."""
    trials = [t for t in record.trials if t.state not in LOST and t.value is not None and math.isfinite(t.value) and _measured(t)]
    ends = [t for t in trials if any(t.number == s.number for s in finished_trials(record))]
    base = headline(record).base
    lines = {t.number: _from_base(_measured(t), base) for t in trials}
    if not ends or max(sum(tokens > 0 for tokens, _ in _measured(t)) for t in trials) < 2:
        return None
    keep = max(12, 40_000 // len(trials))  # points per curve: the page stays small
    scale = Scale.of([value(t) for t in ends])
    figure, axes = blank(3.0)
    done = {t.number for t in ends}
    paths, shades, widths = [], [], []
    drawn = sorted(trials, key=lambda t: (t.number in done, -value(t)))
    for trial in drawn:
        points = lines[trial.number]
        stride = math.ceil(len(points) / keep)
        paths.append([*points[:-1:stride], points[-1]])
        shades.append(scale.shade(value(trial)) if trial.number in done else SOFT)
        widths.append(0.9 if trial.number in done else 0.5)
    collection = LineCollection(paths, colors=shades, linewidths=widths, alpha=0.75)
    axes.add_collection(collection)
    tell_trials(collection, drawn)
    kept = {number: at for number, at in ((t.number, _kept(t)) for t in trials) if at is not None}
    if kept:
        marks = [scale.shade(value(t)) if t.number in done else SOFT for t in trials if t.number in kept]
        axes.scatter(*zip(*kept.values(), strict=True), s=22, facecolors="none", edgecolors=marks, linewidths=0.9, zorder=3, label="kept")
    found = headline(record)
    for marked, color, dashes, text in ((found.default, INK, (4, 2.5), found.reference), (found.best, BEST, (None, None), "best")):
        if marked and marked.number in lines:
            xs, ys = zip(*lines[marked.number], strict=True)
            axes.plot(xs, ys, color=color, dashes=dashes, linewidth=1.8, label=text, marker="o", markersize=2.5)
    seen = sorted(v for path in paths for _, v in path if math.isfinite(v))
    high = min(seen[-1], max(Scale.of(seen).high, base or 0.0))
    room = 0.04 * (high - seen[0] or abs(high))
    axes.set_ylim(seen[0] - room, high + room)
    axes.set_xlim(0, 1.02 * max(x for path in paths for x, _ in path))
    axes.xaxis.set_major_formatter(lambda x, _: count(x) if x else "0")
    tell_axis(axes, "x", large=True)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("validation loss")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3)
    colour_key(axes, scale)
    caption = f"{plural(len(paths), 'trial')}, coloured by {'the lowest loss, whose point (ring) is kept' if kept else 'final loss'}" + (
        "; grey: not trained to the end. " if len(done) < len(paths) else ". "
    )
    if base is not None:
        caption += f"All start at the base model's {loss(base)}. "
    if found.best and found.best.number in kept:
        (tokens, lowest), whole = kept[found.best.number], max(x for x, _ in lines[found.best.number])
        caption += f"The best trial is kept at {loss(lowest)}, after {count(tokens)} of {count(whole)} tokens."
    elif found.best:
        caption += f"The best trial ends at {loss(value(found.best))} after {count(max(x for x, _ in lines[found.best.number]))} tokens."
    ends_at = sorted(value(t) for t in ends)
    middle = ends_at[len(ends_at) // 2]
    alt = f"Validation loss over training tokens, {plural(len(paths), 'line')}" + (
        f" that start at {loss(base)}. " if base is not None else ". "
    )
    verb, ends_verb = ("are kept", "is kept at") if kept else ("finish", "ends at")
    alt += f"Those trained to the end {verb} between {loss(ends_at[0])} and {loss(ends_at[-1])}, the median {loss(middle)}."
    if found.default and found.best and found.default is not found.best:
        alt += f" The best {ends_verb} {loss(value(found.best))}, the dashed {found.reference} at {loss(value(found.default))}."
    if kept:
        alt += " A ring on each line marks the point whose adapter is kept, the lowest."
    return Plot(name="learning-curves", title="Learning curves", figure=figure, alt=alt, caption=caption.strip())


def _points(trials: Sequence[Trial], top: float) -> tuple[list[int], list[float]]:
    return [t.number for t in trials], [min(value(t), top) for t in trials]


def _measured(trial: Trial) -> list[tuple[float, float]]:
    """(tokens, validation loss) of the trial's last run, where measured and finite."""
    curve = trial.curve if trial.outcomes else ()
    return [(float(p.tokens), p.validation_loss) for p in curve if p.validation_loss is not None and math.isfinite(p.validation_loss)]


def _kept(trial: Trial) -> tuple[float, float] | None:
    """(tokens, validation loss) of the point whose adapter the trial keeps; None where that is the last by definition."""
    point = next((p for p in trial.curve if p.step == trial.kept_step), None) if trial.outcomes else None
    return (float(point.tokens), point.validation_loss) if point is not None and point.validation_loss is not None else None


def _from_base(points: list[tuple[float, float]], base: float | None) -> list[tuple[float, float]]:
    return [(0.0, base), *points] if base is not None and points[0][0] > 0 else points
