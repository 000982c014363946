"""`selection.json`: which trial to ship and why, written whole at the end of a selection; read by the hand-over and the report."""

import json
import math
from dataclasses import dataclass, field

from loratune.record import StudyRecord, Trial
from loratune.record.paths import StudyPaths
from loratune.selection.confidence import ENOUGH, Gap, confidence, gap
from loratune.statistics import Interval
from loratune.system.files import AnyPath, parsed, write_atomically
from loratune.work import Json

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Finalist(Json):
    """A candidate, as it was measured; NaN where it was not. `losses`: by the race's repeats, or the study's one."""

    trial: int
    study_loss: float
    losses: tuple[float, ...]
    scores: dict[str, float] = field(default_factory=dict)  # benchmark -> mean
    own: dict[str, float] = field(default_factory=dict)  # the study's own metrics, of the study's own run
    adapter_mb: float = math.nan
    seconds: float = math.nan
    tokens: float = math.nan
    peak_memory_gib: float = math.nan
    share: float = 0.0  # of the resamples in which the rule picks it
    out: str = ""  # why it left the race, in words

    @property
    def loss(self) -> float:
        """The mean of its losses."""
        return math.fsum(self.losses) / len(self.losses) if self.losses else math.nan


@dataclass(frozen=True, kw_only=True)
class FreshRun(Json):
    """One repeat of the race, or one check."""

    trial: int
    repeat: int
    seed: int
    loss: float  # infinite: diverged, or out of memory


@dataclass(frozen=True, kw_only=True)
class RaceRecord(Json):
    """How the finalists raced."""

    field: str  # who was let in, and why, in words
    tolerance: float
    error_rate: float
    budget: int
    log: tuple[FreshRun, ...]  # in the order they were told
    leader: int | None  # the trial with the lowest mean of those left
    gap: float  # how much worse than the best of them the leader may be, at the error rate
    ending: str
    explained: tuple[str, ...]  # the race in about ten lines


@dataclass(frozen=True, kw_only=True)
class UnbiasedLoss(Json):
    """Losses with seeds run after the choice, the same for both; means with Student's 95 % intervals."""

    runs: tuple[FreshRun, ...]
    chosen: Interval
    default: Interval | None  # None: the study has no default, or it diverged
    gain: Interval | None  # default - chosen, paired by seed; positive when tuning helped. None without default, and for it
    common_practice: Interval | None = None  # where it was trained too, and did not diverge
    gain_over_common_practice: Interval | None = None  # paired by seed


@dataclass(frozen=True, kw_only=True)
class Shipped(Json):
    """The adapter to hand over: of the chosen trial's runs, the one with the lowest validation loss."""

    run: str  # main: the study's own; race-03, check-01: with fresh seeds, below finalists/
    seed: int
    validation_loss: float  # somewhat too low, being the lowest of several
    lowest_of: int  # runs


@dataclass(frozen=True, kw_only=True)
class SelectionRecord(Json):
    """One selection, complete."""

    study: str
    finished: int  # trials of the study that were trained to the end when it was made
    rule: str  # in words
    metrics: tuple[str, ...]  # of the rule, in its order
    constraints: tuple[str, ...]
    benchmarks: tuple[str, ...]  # that took part in the choice: they report nothing about the chosen one any more
    excluded: int  # finished trials that the constraints left out
    candidates: tuple[Finalist, ...]  # by study_loss
    race: RaceRecord | None
    noise: Interval  # sd of one run's loss, what a seed does to all trials alike taken out
    noise_source: str
    lowest: int  # the trial with the study's lowest loss
    chosen: int
    share: float  # of the resamples that pick it
    runner_up: int | None
    runner_up_share: float
    why: tuple[str, ...]
    what_would_change: tuple[str, ...]
    unbiased: UnbiasedLoss | None
    shipped: Shipped
    runs: int  # trained for this selection, and their cost
    tokens: int
    device_seconds: float
    notes: tuple[str, ...] = ()
    own_metric: dict[str, str] = field(default_factory=dict)  # name and direction, where the rule begins with a metric of the user's own
    version: int = VERSION

    def finalist(self, trial: int) -> Finalist:
        return next(finalist for finalist in self.candidates if finalist.trial == trial)

    def holds_for(self, study: StudyRecord) -> bool:
        """Whether the study did not go on since; otherwise the selection is out of date."""
        return self.finished == len(study.finished)

    def trial_of(self, study: StudyRecord) -> Trial:
        """The chosen trial."""
        return next(trial for trial in study.trials if trial.number == self.chosen)

    @property
    def verdict(self) -> str:
        """What to ship and how sure that is, in a sentence or two."""
        return f"Ship trial {self.chosen}. {self.confidence}"

    @property
    def shares_tell(self) -> bool:
        """Whether there are seeds enough for shares of resamples to say something."""
        return self.nearest is not None and self.nearest.seeds >= ENOUGH

    def explain(self) -> str:
        """The choice in about ten lines."""
        own = self.finalist(self.chosen)
        lines = [self.verdict, *self.why]
        if self.chosen != self.lowest:
            lines.append(f"The study's lowest loss was trial {self.lowest}'s.")
        if self.race is not None:
            entered = len({run.trial for run in self.race.log})
            raced = f"Race: {entered} finalist{'s' * (entered != 1)}, {len(self.race.log)} runs"
            lines.append(f"{raced}; over because {self.race.ending}.")
        lines.append(f"Noise of one run (sd): {self.noise:.2g}, {self.noise_source}.")
        if self.unbiased is not None:
            lines.append(
                f"With {self.fresh_seeds} seeds run after the choice, trial {self.chosen} has a loss of {self.unbiased.chosen:.4f};"
                f" in the study {own.study_loss:.4f}."
            )
            if self.unbiased.gain is not None:
                lines.append(f"The default has {self.unbiased.default:.4f} with the same seeds: the gain is {self.unbiased.gain:.4f}.")
            if self.unbiased.gain_over_common_practice is not None:
                lines.append(
                    f"Common practice (rank 16, alpha 32, learning rate 2e-4) has {self.unbiased.common_practice:.4f} with the same seeds: "
                    f"the gain over it is {self.unbiased.gain_over_common_practice:.4f}."
                )
        if self.shipped.lowest_of > 1:
            lines.append(
                f"Of its {self.shipped.lowest_of} adapters the one with the lowest validation loss is handed over:"
                f" {self.shipped.validation_loss:.4f} ({self.shipped.run})."
            )
        changes = self.what_would_change or ("neither another tie width nor dropping any one criterion or constraint",)
        lines.append(f"What would change it: {'; '.join(changes)}.")
        return "\n".join([*lines, *self.notes])

    @property
    def nearest(self) -> Gap | None:
        """The chosen one against the runner-up, else against the next lowest loss; None when no other has a seed in common with it."""
        if self.runner_up is not None:
            return self.gap_to(self.runner_up)
        gaps = ((finalist.loss, self.gap_to(finalist.trial)) for finalist in self.candidates)
        found = [(loss, gap) for loss, gap in gaps if gap is not None]
        return min(found, key=lambda pair: pair[0])[1] if found else None

    @property
    def confidence(self) -> str:
        """How sure the choice is, in a sentence or two, with its interval."""
        if self.own_metric:
            return self._by_own_metric()
        said = confidence(self.nearest, self.share)
        if self.race is None and self.nearest is not None and self.metrics[0] == "validation_loss":
            return f"{said} It was chosen as the lowest of {self.finished - self.excluded} losses, so that is optimistic."
        return said

    def _by_own_metric(self) -> str:
        """Own metrics are one number of a trial each, so nothing tells their noise."""
        name, sign = self.own_metric["name"], -1.0 if self.own_metric["direction"] == "maximize" else 1.0
        others = [f for f in self.candidates if f.trial != self.chosen and name in f.own]
        said = f"Its {name} is {self.finalist(self.chosen).own.get(name, math.nan):.4g}"
        if others:
            second = min(others, key=lambda finalist: sign * finalist.own[name])
            said += f", that of trial {second.trial}, the best of the others, {second.own[name]:.4g}"
        return f"{said}; each was measured once, so there is no interval, and the best of {len(self.candidates)} flatters itself."

    def gap_to(self, trial: int) -> Gap | None:
        """How far a candidate's loss is above the chosen one's, paired by the seeds of both; None for itself and without such seeds."""
        if trial == self.chosen:
            return None
        own, other = self._losses(self.chosen), self._losses(trial)
        return gap(f"trial {trial}", own, other, (self.noise.value, self.noise_source))

    def _losses(self, trial: int) -> dict[int, float]:
        """Finite losses by the race's repeats, which share their seeds; without a race the study's one."""
        if self.race is None:
            return {0: self.finalist(trial).study_loss}
        return {run.repeat: run.loss for run in self.race.log if run.trial == trial and math.isfinite(run.loss)}

    @property
    def fresh_seeds(self) -> int:
        """Seeds with which the chosen one was trained after the choice."""
        return len({run.repeat for run in self.unbiased.runs}) if self.unbiased is not None else 0


def write_selection(record: SelectionRecord, folder: AnyPath) -> None:
    write_atomically(StudyPaths(folder).selection, json.dumps(record.to_plain(), indent=1) + "\n")


def read_selection(folder: AnyPath) -> SelectionRecord | None:
    """The study's selection; None when none was made. Raises StorageError for a file that cannot be read."""
    path = StudyPaths(folder).selection
    if not path.exists():
        return None
    return parsed(path, _selection, f"Remove it; `loratune select {folder}` writes it again.")


def _selection(text: str) -> SelectionRecord:
    made = json.loads(text)
    if "honest" in made:  # its name in earlier files
        made["unbiased"] = made.pop("honest")
    return SelectionRecord.from_plain(made)
