"""What was measured after the search, as figures: fresh seeds, downstream scores, the finalists' race, people's votes."""

import math
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from loratune.preference import PreferenceRecord
from loratune.preference.summary_lines import PreferenceRow, rows_of
from loratune.report import tables
from loratune.report.drawing import BEST, INK, LEVELS, SHADES, SOFT, STUDIES, STYLE, WIDTH, Plot, Scale, blank, literal
from loratune.report.evidence import Downstream, Evidence
from loratune.report.live import tell_trials
from loratune.report.tables import value
from loratune.selection import Finalist, SelectionRecord
from loratune.statistics import Interval
from loratune.system.formatting import loss, plural

ROWS = 12  # finalists shown, at most
SHADE = SHADES[LEVELS // 3]


@matplotlib.rc_context(STYLE)
def fresh_seeds(evidence: Evidence) -> Plot | None:
    """The chosen configuration and the default, trained again with seeds that chose nothing."""
    selection = evidence.selection
    if selection is None or selection.unbiased is None or selection.unbiased.default is None or selection.unbiased.gain is None:
        return None
    unbiased, default, name = selection.unbiased, evidence.record.default, tables.reference(evidence.record)
    rows: list[tuple[str, int, Interval, str]] = [
        (name, default.number if default else -1, selection.unbiased.default, INK),
        ("chosen", selection.chosen, unbiased.chosen, BEST),
    ]
    figure, axes = blank(1.55)
    for y, (_, trial, mean, color) in enumerate(rows):
        _dots(axes, [run.loss for run in unbiased.runs if run.trial == trial], y, color)
        if mean.known:
            axes.plot([mean.low, mean.high], [y + 0.28] * 2, color=color, linewidth=1.6, solid_capstyle="butt")
        axes.plot([mean.value], [y + 0.28], marker="D", markersize=5, color=color)
        studied = [value(t) for t in tables.finished_trials(evidence.record) if t.number == trial]
        axes.scatter(studied, [y] * len(studied), s=34, facecolors="none", edgecolors=color, linewidths=1, zorder=4)
    axes.set_yticks(range(2), [f"{who}\ntrial {trial}" for who, trial, _, _ in rows])
    axes.set_ylim(1.6, -0.4)
    axes.set_xlabel("validation loss")
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.06)
    seeds = plural(selection.fresh_seeds, "fresh seed")
    means = f"chosen {unbiased.chosen:.4f}, {name} {unbiased.default:.4f}"
    return Plot(
        name="fresh-seeds",
        title=f"Chosen against {name}, with fresh seeds",
        figure=figure,
        alt=f"Two rows of dots on a scale of validation loss, {seeds} each, with mean and 95 % interval below them: {means}. "
        + ("The rows do not overlap." if _apart(selection, default.number if default else -1) else "The rows overlap."),
        caption=f"Dots: {seeds}, the same for both, that took no part in the choice. Diamond: their mean, with Student’s 95 % interval. "
        f"Ring: the loss in the study. Gain, paired by seed: {unbiased.gain:.4f}.",
    )


def _apart(selection: SelectionRecord, default: int) -> bool:
    runs = selection.unbiased.runs if selection.unbiased else ()
    return max(r.loss for r in runs if r.trial == selection.chosen) < min(r.loss for r in runs if r.trial == default)


def _dots(axes: Any, losses: list[float], y: float, color: str) -> None:
    sound = [at for at in losses if math.isfinite(at)]
    axes.scatter(sound, [y] * len(sound), s=14, color=color, alpha=0.75, linewidths=0, zorder=3)


@matplotlib.rc_context(STYLE)
def loss_and_score(evidence: Evidence) -> Plot | None:
    """Each benchmark's score over the validation loss of the scored trials."""
    found = evidence.downstream
    names = [f.benchmark for f in found.findings if len(found.points(f.benchmark)) > 2] if found else []
    if found is None or not names:
        return None
    rows = math.ceil(len(names) / 2)
    figure = Figure(figsize=(WIDTH, 2.2 * rows), layout="constrained")
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes in grid[len(names) :]:
        axes.remove()
    seen = [_score_panel(axes, found, name, tables.reference(evidence.record)) for axes, name in zip(grid, names, strict=False)]
    return Plot(
        name="loss-and-score",
        title="Does a lower loss mean a better score?",
        figure=figure,
        alt="Scatter plots of score over validation loss, a vertical line through each dot being its 95 % interval. " + " ".join(seen),
        caption="A dot per trial, with the 95 % interval over items. Orange: the lowest loss; square: the "
        f"{tables.reference(evidence.record)}; dashed: chance, if in sight. "
        "Trials far to the right are omitted from the drawing, not from the correlations.",
    )


def _score_panel(axes: Any, found: Downstream, benchmark: str, reference: str) -> str:
    """Draw one benchmark; returns what is seen."""
    points = found.points(benchmark)
    title, chance = next((f.title, f.chance) for f in found.findings if f.benchmark == benchmark)
    scale = Scale.of([at for _, at, _ in points])
    shown = [point for point in points if not scale.beyond([point[1]])]
    for name, at, cell in shown:
        best, score = found.best[:1] == (name,), cell.score
        color = BEST if best else INK if name == found.default else SHADE
        if score.known:
            axes.plot([at, at], [100 * score.low, 100 * score.high], color=color, linewidth=0.8, alpha=0.55)
        marker = "s" if name == found.default else "o"
        look = {"marker": marker, "linestyle": "none", "color": color, "markersize": 4 if color == SHADE else 5, "zorder": 4 if best else 3}
        tell_trials(axes.plot([at], [100 * score.value], **look)[0], [int(name)])
    axes.margins(x=0.06)
    low, high = axes.get_ylim()
    if chance is not None and low <= 100 * chance <= high:
        axes.axhline(100 * chance, color=SOFT, dashes=(4, 3), linewidth=0.9)
    both = found.correlation(benchmark)
    figures = f"Spearman {both[0].value:.2f}, Kendall {both[1].value:.2f}".replace("-", "−") if both else "no correlation"
    axes.set_title(f"{literal(title)}\n", loc="left", color=INK)
    axes.text(0, 1.03, figures, transform=axes.transAxes, fontsize=8, color=SOFT)
    axes.set_xlabel("validation loss")
    axes.set_ylabel("score, %" if axes.get_subplotspec().is_first_col() else "")
    axes.locator_params(axis="x", nbins=4)
    scores = [cell.score.value for _, _, cell in shown]
    said = (
        f"{title}: {plural(len(shown), 'dot')}, scores {100 * min(scores):.1f} to {100 * max(scores):.1f} %; {figures} over {len(points)}."
    )
    for name, at, cell in points:
        if scale.beyond([at]):
            who = f"the {reference}" if name == found.default else f"trial {int(name)}" if name.isdigit() else name
            said += f" Not drawn: {who}, loss {loss(at)}, score {100 * cell.score.value:.1f} %."
    return said


@matplotlib.rc_context(STYLE)
def race(evidence: Evidence) -> Plot | None:
    """The candidates' losses by seed, and how far each is above the chosen one."""
    selection = evidence.selection
    if selection is None:
        return None
    order = sorted(selection.candidates, key=lambda e: (e.trial != selection.chosen, -e.share, bool(e.out), e.loss))
    shown = order[:ROWS]
    figure = Figure(figsize=(WIDTH, 1.1 + 0.27 * len(shown)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    for y, finalist in enumerate(shown):
        color = BEST if finalist.trial == selection.chosen else SOFT if finalist.out else SHADE
        if selection.race is not None:
            _dots(left, list(finalist.losses), y, color)
            if math.isfinite(finalist.loss):
                left.plot([finalist.loss] * 2, [y - 0.3, y + 0.3], color=color, linewidth=2, solid_capstyle="butt")
        left.scatter([finalist.study_loss], [y], s=34, facecolors="none", edgecolors=color, linewidths=1, zorder=4)
        if (gap := selection.gap_to(finalist.trial)) is not None:
            if gap.behind.known:
                right.plot([gap.behind.low, gap.behind.high], [y, y], color=color, linewidth=1.4, solid_capstyle="butt")
            right.plot([gap.behind.value], [y], marker="D", color=color, markersize=4)
    left.set_yticks(range(len(shown)), [f"trial {finalist.trial}" for finalist in shown])
    left.set_ylim(len(shown) - 0.4, -0.6)
    left.grid(axis="y", visible=False)
    left.set_xlabel("validation loss")
    left.margins(x=0.06)
    left.locator_params(axis="x", nbins=5)
    right.axvline(0, color=SOFT, dashes=(4, 3), linewidth=0.9)
    right.grid(axis="y", visible=False)
    right.locator_params(axis="x", nbins=3)
    right.margins(x=0.06)
    right.tick_params(axis="y", length=0)
    right.spines[["left"]].set_visible(False)
    right.set_xlabel("loss − the chosen’s")
    hidden = f" {plural(len(order) - len(shown), 'further candidate')} not shown." if len(order) > len(shown) else ""
    raced = (
        "Dots: one fresh seed each; bar: their mean; ring: the loss in the study. " if selection.race else "Ring: the loss in the study. "
    )
    return Plot(
        name="finalists",
        title="Finalists" if selection.race else "Candidates",
        figure=figure,
        alt=f"A row per candidate: its losses as dots, and how far it is above the chosen one. {_in_words(selection, shown)}{hidden}",
        caption=f"{raced}Right: loss minus the chosen one’s, paired by seed, with its 95 % interval. "
        f"Orange: chosen{'; grey: dropped out' if any(e.out for e in shown) else ''}. "
        f"Noise of one run (sd): {selection.noise:.2g}, {selection.noise_source}.{hidden}",
    )


def _in_words(selection: SelectionRecord, finalists: list[Finalist]) -> str:
    told = []
    for finalist in finalists:
        gap = selection.gap_to(finalist.trial)
        behind = f", {gap.behind:+.4f} to the chosen one" if gap is not None else ", chosen" if finalist.trial == selection.chosen else ""
        mean = f"mean {loss(finalist.loss)} of {len(finalist.losses)}"
        told.append(f"trial {finalist.trial}: {mean}, in the study {loss(finalist.study_loss)}{behind}")
    return "; ".join(told) + "."


@matplotlib.rc_context(STYLE)
def votes(record: PreferenceRecord) -> Plot | None:
    """Win rates with their intervals: of all votes, of each category, and of judges."""
    rows = [row for row in rows_of(record) if row.tally.total]
    if not rows:
        return None
    first, second = record.comparison.first.label, record.comparison.second.label
    figure, axes = blank(0.85 + 0.27 * len(rows))
    for y, row in enumerate(rows):
        low, high = row.tally.interval()
        color = STUDIES[0] if row.judge else BEST if row.main else SHADE
        axes.plot([100 * low, 100 * high], [y, y], color=color, linewidth=1.4 if row.main or row.judge else 0.9, solid_capstyle="butt")
        axes.plot([100 * row.tally.win_rate], [y], marker="D" if row.judge else "o", color=color, markersize=5)
    axes.axvline(50, color=SOFT, dashes=(4, 3), linewidth=0.9)
    axes.set_yticks(range(len(rows)), [literal(row.name) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"% of votes for {literal(first)} over {literal(second)}, ties as half")
    return Plot(
        name=f"preference-{record.folder.name}",
        title=f"{first} against {second}",
        figure=figure,
        alt=f"Win rates of {first} with 95 % intervals, and a dashed line at 50 %. " + " ".join(f"{_rate(row)}." for row in rows),
        caption=f"Share of votes for {first}, ties and “both bad” as half a vote for each, with Wilson’s 95 % intervals. "
        "Beyond the dashed line it wins more often than it loses."
        + (" Blue: judged by a language model." if any(r.judge for r in rows) else ""),
    )


def _rate(row: PreferenceRow) -> str:
    if not row.tally.total:
        return f"{row.name}: no votes"
    low, high = row.tally.interval()
    return f"{row.name}: {row.tally.win_rate:.0%}, {low:.0%} to {high:.0%}, of {row.tally.total}"
