"""What the report says in numbers: plain data from study records, no layout, no matplotlib.

Only trials that were trained to the end are compared with each other; the loss of a paused or pruned
trial was measured after less training and stands in the table of trials alone. Losses are nats per
response token, so exp(loss) is the perplexity.
"""

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loratune.record import COMPLETE, PRUNED, StudyRecord, Trial, TrialState
from loratune.spec.space import SearchSpace
from loratune.system.formatting import in_order, label, plural, show
from loratune.work import Hyperparameters

DEFAULT = "default"  # as headings call the trial that gains are held against
_FIRST = "the first full run"
NEAR = 0.002  # nats: configurations this close to the best are counted as about as good


def finished_trials(record: StudyRecord) -> list[Trial]:
    """Finished trials with a finite loss, in order of number."""
    return [t for t in record.finished if t.value is not None and math.isfinite(t.value)]


def _ranking(record: StudyRecord) -> list[Trial]:
    """The finished trials, the best first."""
    return [t for t in record.ranking if math.isfinite(value(t))]


def value(trial: Trial) -> float:
    """The loss of a scored trial."""
    return math.nan if trial.value is None else trial.value


def space_of(record: StudyRecord) -> SearchSpace:
    return SearchSpace.of(record.spec.get("search_space") or "published")


def searched(record: StudyRecord) -> list[str]:
    """Names of the hyperparameters that the study varies, in reading order."""
    parameters = space_of(record).parameters
    return in_order({name for name, p in parameters.items() if p.type != "fixed"})


@dataclass(frozen=True, kw_only=True)
class Headline:
    """Best, default and base model side by side. None where it was not measured."""

    best: Trial | None
    default: Trial | None
    base: float | None  # validation loss of the untrained model
    finished: int
    near: int  # finished trials within NEAR of the best, the best included
    better: int  # finished trials better than the default
    reference: str  # what `default` is called: it need not have the search space's defaults
    edges: tuple[str, ...]  # searched hyperparameters whose best value is the lowest or highest allowed

    @property
    def best_loss(self) -> float | None:
        return value(self.best) if self.best else None

    @property
    def default_loss(self) -> float | None:
        return value(self.default) if self.default else None

    @property
    def gain(self) -> float | None:
        """Default's loss minus the best's: positive when tuning helped."""
        return value(self.default) - value(self.best) if self.best and self.default else None

    @property
    def against(self) -> str:
        """What gains are over, in words."""
        return "the default" if self.reference == DEFAULT or not self.default else f"{_FIRST} of the search, trial {self.default.number}"

    @property
    def perplexity_ratio(self) -> float | None:
        """exp(best - default): the best's perplexity as a share of the default's."""
        return None if self.gain is None else math.exp(-self.gain)


def headline(record: StudyRecord) -> Headline:
    trials = finished_trials(record)
    best = next(iter(_ranking(record)), None)
    default = next((t for t in trials if record.default and t.number == record.default.number), None)
    base = record.base_loss
    return Headline(
        best=best,
        default=default,
        base=base if base is not None and math.isfinite(base) else None,
        finished=len(trials),
        near=sum(value(t) <= value(best) + NEAR for t in trials) if best else 0,
        better=sum(value(t) < value(default) for t in trials) if default else 0,
        reference=reference(record),
        edges=edges(record, best) if best else (),
    )


def reference(record: StudyRecord) -> str:
    """What the trial is called that gains are held against: the default, where it was run as the search space has it.

    After short runs it is the first full run, at what these told: neither common practice nor the first guess.
    """
    trial = record.default
    if trial is None or trial.number == 0:
        return DEFAULT
    defaults = space_of(record).default_values()
    return DEFAULT if all(_same(at, defaults.get(name)) for name, at in trial.params.items()) else "first full run"


def _same(one: Any, other: Any) -> bool:
    numbers = all(isinstance(at, int | float) for at in (one, other))
    return math.isclose(one, other, rel_tol=1e-6) if numbers else bool(one == other)


def trials_told(record: StudyRecord) -> str:
    """How many trials there were, and what became of them: 12 trials (3 trained to the end, 9 short)."""
    total, finished = len(record.trials), len(finished_trials(record))
    rest = Counter("short" if t.short and t.state is PRUNED else t.state.value for t in record.trials if t.state is not COMPLETE)
    odd = sum(t.state is COMPLETE for t in record.trials) - finished  # without a finite loss
    parts = [f"{finished} trained to the end", *(f"{rest[what]} {what}" for what in sorted(rest, key=lambda what: what != "short"))]
    return f"{plural(total, 'trial')} ({', '.join([*parts, *([f'{odd} without a loss'] if odd else [])])})"


def edges(record: StudyRecord, best: Trial) -> tuple[str, ...]:
    """Searched hyperparameters whose value is the lowest or highest allowed, in words."""
    found = []
    for name, parameter in space_of(record).parameters.items():
        at = best.params.get(name)
        if parameter.type in ("int", "float"):
            low, high = parameter.low, parameter.high
        elif parameter.type == "ordinal":
            low, high = parameter.values[0], parameter.values[-1]
        else:
            continue
        # A dropout of 0 is no edge that one could move.
        if isinstance(at, int | float) and low < high and (at >= high or (at <= low and at > 0)):
            found.append(f"{label(name)} {show(at)} ({'highest' if at >= high else 'lowest'} allowed)")
    return tuple(found)


def states(record: StudyRecord) -> dict[str, int]:
    """How many trials ended in each state, of those that occur."""
    counted = Counter(t.state for t in record.trials)
    return {state.value: counted[state] for state in TrialState if counted[state]}


def ranked(record: StudyRecord, first: int = 10) -> tuple[list[Trial], list[Trial]]:
    """(the `first` best finished trials, best first; all others in order of number)."""
    top = _ranking(record)[:first]
    chosen = {t.number for t in top}
    return top, [t for t in record.trials if t.number not in chosen]


def table_columns(record: StudyRecord) -> list[str]:
    """Columns of the table of trials: searched hyperparameters, lora_alpha too where its ratio is searched."""
    names = searched(record)
    return in_order({*names, "lora_alpha"}) if "alpha_ratio" in names else names


def setting(trial: Trial, name: str) -> Any:
    """A trial's value of a searched or derived hyperparameter; None where it does not exist."""
    return trial.params[name] if name in trial.params else getattr(trial.hyperparameters, name, None)


def settings(record: StudyRecord, trial: Trial) -> str:
    """The searched hyperparameters of a trial in words."""
    return ", ".join(f"{label(name)} {show(trial.params[name])}" for name in searched(record) if name in trial.params)


def where_good(record: StudyRecord) -> str:
    """Where the best quarter of the finished trials lies in the search space, in words; "" of fewer than eight."""
    trials = _ranking(record)
    good = trials[: len(trials) // 4]
    if len(good) < 2:
        return ""
    parts = []
    for name in searched(record):
        values = [trial.params[name] for trial in good if name in trial.params]
        if values and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            low, high = min(values), max(values)
            parts.append(f"{label(name)} {show(low)}" + (f" to {show(high)}" if high > low else ""))
        elif values:
            most, times = Counter(map(show, values)).most_common(1)[0]
            parts.append(f"{label(name)} {most} in {times}")
    return f"The best quarter, {len(good)} of {len(trials)}: {', '.join(parts)}."


def running_best(record: StudyRecord) -> list[float]:
    """Lowest loss among trials 0..n for each n; inf before the first finished one. Failed trials count: they were paid for."""
    lowest, path = math.inf, []
    for trial in record.trials:
        if trial.state == COMPLETE and trial.value is not None and math.isfinite(trial.value):
            lowest = min(lowest, trial.value)
        path.append(lowest)
    return path


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One study's row of the comparison."""

    record: StudyRecord
    sampler: str
    best_after: dict[int, float | None]  # evaluations -> best loss so far; None: not that many, or none finished
    median: float | None  # of the losses of its first `common` trials
    finished: int  # of those `common`


def compare_studies(records: Sequence[StudyRecord]) -> tuple[list[Compared], int]:
    """(a row per study, the number of evaluations that all of them have made)."""
    longest = max(len(r.trials) for r in records)
    common = min(len(r.trials) for r in records)
    ends = {n for n in (common, longest) if n}
    counts = sorted(ends | {n for n in (5, 10, 20, 50, 100, 200, 500) if n < longest and all(abs(n - end) > 0.1 * end for end in ends)})
    rows = []
    for record in records:
        path = running_best(record)
        losses = [value(t) for t in finished_trials(record) if t.number < common]
        rows.append(
            Compared(
                record=record,
                sampler=sampler_of(record),
                best_after={n: path[n - 1] if 0 < n <= len(path) and math.isfinite(path[n - 1]) else None for n in counts},
                median=statistics.median(losses) if losses else None,
                finished=len(losses),
            )
        )
    return rows, common


def repeats(rows: Sequence[Compared]) -> dict[str, dict[int, tuple[float, int]]]:
    """Samplers with several studies: evaluations -> (median of their best losses so far, number of studies)."""
    found: dict[str, dict[int, tuple[float, int]]] = {}
    for sampler in dict.fromkeys(row.sampler for row in rows):
        group = [row for row in rows if row.sampler == sampler]
        if len(group) > 1:
            after = {n: [row.best_after[n] for row in group] for n in group[0].best_after}
            reached = {n: [best for best in values if best is not None] for n, values in after.items()}
            found[sampler] = {n: (statistics.median(b), len(b)) for n, b in reached.items() if b}
    return found


def sampler_of(record: StudyRecord) -> str:
    """Sampler and, unless everyone is trained to the end, schedule."""
    sampler = str(record.spec.get("sampler", {}).get("name", "?"))
    schedule = str(record.spec.get("schedule", {}).get("name", "full"))
    return sampler if schedule == "full" else f"{sampler} + {schedule}"


def incomparable_sections(records: Sequence[StudyRecord]) -> list[str]:
    """Sections of the description in which the studies differ so that their losses cannot be compared."""
    found = [part for part in ("model", "data") if any(r.spec.get(part) != records[0].spec.get(part) for r in records)]
    hashes = {r.manifest["hash"] for r in records if "hash" in r.manifest}
    return [*found, "data"] if len(hashes) > 1 and "data" not in found else found


def hyperparameter_names() -> list[str]:
    return in_order({f.name for f in dataclasses.fields(Hyperparameters)})
