"""What was measured of a study after its search, read once: downstream scores, the selection, what people preferred."""

import shlex
from dataclasses import dataclass
from functools import cached_property

from loratune.downstream.results.contamination import Contamination, read_contamination
from loratune.downstream.results.findings import Finding, findings
from loratune.downstream.results.scores import BASE, Result, by_model, describe_model, model_name, read_results, shipped_note
from loratune.preference import PreferenceRecord, find_comparisons
from loratune.record import StudyRecord, Trial
from loratune.report import tables
from loratune.selection import SelectionRecord, read_selection
from loratune.statistics import Interval, kendall, spearman

TOP = 10  # trials of the table, as published
_SEED = 0  # of the bootstraps


@dataclass(frozen=True, kw_only=True)
class Downstream:
    """Scores of the study's models, which are named as their folders (`scores.model_name`, or `base`)."""

    results: tuple[Result, ...]
    losses: dict[str, float]  # validation losses in the study; of what is handed over, its own
    best: tuple[str, ...]  # those scored of the ten with the lowest loss, the lowest first
    default: str | None  # where it was scored
    contamination: tuple[Contamination, ...] = ()  # benchmark items in the training data, where that was looked for
    shipped: str | None = None  # what a selection hands over, scored or not

    @cached_property
    def cells(self) -> dict[str, dict[str, Result]]:
        """model -> benchmark -> score with its interval."""
        return by_model(self.results)

    @cached_property
    def findings(self) -> list[Finding]:
        """Per benchmark: the summary of the best, and what may be concluded."""
        return findings(self.results, self.losses, self.best, self.default, self.shipped)

    @property
    def benchmarks(self) -> list[str]:
        return [finding.benchmark for finding in self.findings]

    @property
    def others(self) -> list[str]:
        """Scored models that are neither among the best nor the default, nor handed over."""
        return [name for name in self.cells if name not in (*self.best, self.default, self.shipped, BASE)]

    @property
    def whose(self) -> str:
        """Whose scores the table shows; empty where nothing was selected."""
        return shipped_note(self.shipped, self.shipped in self.cells) if self.shipped is not None else ""

    def items(self, benchmark: str) -> int:
        """How many items were answered by the model that answered most."""
        return max(cells[benchmark].n for cells in self.cells.values() if benchmark in cells)

    @property
    def gaining(self) -> str | None:
        """What is compared with the default: what is handed over, or, where that is not scored, the lowest loss."""
        return self.shipped if self.shipped in self.cells else next(iter(self.best), None)

    @cached_property
    def gains(self) -> dict[str, Interval]:
        """benchmark -> score of `gaining` minus the default's, paired over the items of both."""
        own = {(result.model, result.benchmark): result for result in self.results}
        if self.gaining is None or self.default is None or self.gaining == self.default:
            return {}
        pairs = {name: (own.get((self.gaining, name)), own.get((self.default, name))) for name in self.benchmarks}
        return {name: first.against(second) for name, (first, second) in pairs.items() if first is not None and second is not None}

    def points(self, benchmark: str) -> list[tuple[str, float, Result]]:
        """(model, validation loss, score) of the scored trials, in the results' order; without the base model."""
        return [
            (name, self.losses[name], cells[benchmark])
            for name, cells in self.cells.items()
            if benchmark in cells and name in self.losses and name.isdigit()
        ]

    def correlation(self, benchmark: str) -> tuple[Interval, Interval] | None:
        """(Spearman, Kendall) of loss and score; None of fewer than three trials, or where one of the two is constant."""
        points = self.points(benchmark)
        if len(points) < 3:
            return None
        loss, score = [at for _, at, _ in points], [cell.score.value for _, _, cell in points]
        if len(set(loss)) == 1 or len(set(score)) == 1:
            return None
        return spearman(loss, score, _SEED), kendall(loss, score, _SEED)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A study and all that was measured of it."""

    record: StudyRecord
    downstream: Downstream | None
    selection: SelectionRecord | None  # None also when the study went on since
    outdated: bool  # there is a selection, of an earlier state of the study
    comparisons: tuple[PreferenceRecord, ...]

    @property
    def chosen(self) -> Trial | None:
        """The trial to ship: the selection's, else the one with the lowest loss."""
        return self.selection.trial_of(self.record) if self.selection else tables.headline(self.record).best

    @property
    def missing(self) -> list[tuple[str, str]]:
        """(what was not measured, the command that does)."""
        folder = shlex.quote(str(self.record.folder))
        again = "Which one to ship, and how sure that is: the selection is of an earlier state of the study."
        found = []
        if self.downstream is None:
            found.append(("Downstream scores: whether a lower loss also means a better model.", f"loratune evaluate {folder}"))
        elif self.downstream.shipped is not None and self.downstream.shipped not in self.downstream.cells:
            what = f"Downstream scores of the adapter that is handed over, {describe_model(self.downstream.shipped)}."
            found.append((what, f"loratune evaluate {folder}"))
        if self.selection is None:
            told = again if self.outdated else "The noise of a loss, which trial to ship, and how sure that is."
            found.append((told, f"loratune select {folder}"))
        if not self.comparisons:
            found.append(("The preference of people in a blind comparison.", f"loratune compare tuned default --study {folder}"))
        return found


def gather(record: StudyRecord) -> Evidence:
    """Read what lies in the study's folder. Raises StorageError for what cannot be read."""
    selection = read_selection(record.folder)
    current = selection is not None and selection.holds_for(record)
    return Evidence(
        record=record,
        downstream=downstream_of(record, selection if current else None),
        selection=selection if current else None,
        outdated=selection is not None and not current,
        comparisons=tuple(find_comparisons(record.folder)),
    )


def downstream_of(record: StudyRecord, selection: SelectionRecord | None) -> Downstream | None:
    """What `loratune evaluate` measured; selection: one that holds for the study."""
    results = read_results(record.paths.evaluation)
    if not results:
        return None
    ranking = tables.ranked(record, TOP)[0]
    scored = {result.model for result in results}
    losses = {model_name(trial.number): tables.value(trial) for trial in tables.finished_trials(record)}
    base = tables.headline(record).base
    default = model_name(record.default.number) if record.default is not None else None
    shipped = model_name(selection.chosen, selection.shipped.run) if selection is not None else None
    if selection is not None and shipped is not None:
        losses[shipped] = selection.shipped.validation_loss
    return Downstream(
        results=tuple(results),
        losses=losses | ({BASE: base} if base is not None else {}),
        best=tuple(model_name(trial.number) for trial in ranking if model_name(trial.number) in scored),
        default=default if default in scored else None,
        contamination=tuple(read_contamination(record.paths.evaluation)),
        shipped=shipped,
    )
