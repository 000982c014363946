"""The figures: each a function from the evidence to a `Plot`, a drawing with its words; None where there is nothing to show.

    search       history, parallel coordinates, learning curves
    landscape    importance, slices, the front of several objectives
    post_search  what was measured after the search: fresh seeds, downstream scores, finalists, votes
    studies      several in one figure

Drawn with matplotlib's object interface on the SVG backend; pyplot and its global state are not used.
"""

from collections.abc import Callable, Iterator, Sequence

from loratune.record import StudyRecord
from loratune.report.drawing import Plot
from loratune.report.evidence import Evidence
from loratune.report.figures.landscape import front, importance, slices
from loratune.report.figures.post_search import fresh_seeds, loss_and_score, race, votes
from loratune.report.figures.search import curves, history, parallel
from loratune.report.figures.studies import best_so_far

OF_ONE: tuple[Callable[[StudyRecord], Plot | None], ...] = (history, lambda r: parallel([r]), curves, importance, slices, front)
OF_SEVERAL: tuple[Callable[[Sequence[StudyRecord]], Plot | None], ...] = (best_so_far, parallel)


def of_one(evidence: Evidence) -> Iterator[Plot]:
    """The figures of one study that there is something to show of."""
    made = [draw(evidence.record) for draw in OF_ONE]
    made += [fresh_seeds(evidence), loss_and_score(evidence), race(evidence)]
    made += [votes(comparison) for comparison in evidence.comparisons]
    yield from (plot for plot in made if plot is not None)


def of_several(records: Sequence[StudyRecord]) -> Iterator[Plot]:
    """The figures of several studies together; none of a single one."""
    if len(records) > 1:
        yield from (plot for plot in (draw(records) for draw in OF_SEVERAL) if plot is not None)
