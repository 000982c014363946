"""Several studies in one figure."""

import math
from collections.abc import Sequence

import matplotlib

from loratune.record import StudyRecord
from loratune.report import tables
from loratune.report.drawing import STUDIES, STYLE, Plot, Scale, blank, literal
from loratune.system.formatting import loss


@matplotlib.rc_context(STYLE)
def best_so_far(records: Sequence[StudyRecord]) -> Plot | None:
    """The best loss so far of several studies, at equal numbers of evaluations."""
    paths = [tables.running_best(r) for r in records]
    finite = [v for path in paths for v in path if math.isfinite(v)]
    if not finite:
        return None
    figure, axes = blank(3.0)
    samplers = list(dict.fromkeys(tables.sampler_of(r) for r in records))
    for k, (record, path) in enumerate(zip(records, paths, strict=True)):
        by_sampler = samplers.index(tables.sampler_of(record)) if len(samplers) > 1 else k
        dashes = ((None, None), (5, 2), (2, 1.5), (6, 2, 1, 2))[k % 4 if len(samplers) < len(records) else 0]
        xs = range(1, len(path) + 1)
        ys = [v if math.isfinite(v) else math.nan for v in path]
        axes.step(xs, ys, where="post", color=STUDIES[by_sampler % len(STUDIES)], dashes=dashes, label=literal(record.name))
    scale = Scale.of(finite)
    axes.set_ylim(scale.low - scale.room, scale.high + scale.room)
    axes.set_xlabel("evaluations (trials, failed ones included)")
    axes.set_ylabel("best validation loss so far")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="upper right")
    ends = [
        f"{r.name} {loss(path[-1])} after {len(path)}" for r, path in zip(records, paths, strict=True) if path and math.isfinite(path[-1])
    ]
    caption = "Best validation loss so far: " + ", ".join(ends) + "."
    ranking = sorted((path[-1], r.name) for r, path in zip(records, paths, strict=True) if path and math.isfinite(path[-1]))
    alt = f"{len(records)} falling step lines, the best loss so far over the number of evaluations. At their ends, the lowest first: "
    alt += ", ".join(f"{name} {loss(end)}" for end, name in ranking) + "."
    return Plot(name="best-so-far", title="Best so far", figure=figure, alt=alt, caption=caption)
