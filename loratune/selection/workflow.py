"""From a finished study to the one trial to ship: race the finalists, apply the rule, and tell what the chosen one is really worth.

    for event in select(Path("runs/study")):
        print(event)
    print(read(Path("runs/study")).explain())

1. Finalists are the trials that keep the constraints and whose loss may differ from the lowest only by noise. The noise is assumed
   first; once everyone has `FIRST` fresh seeds it is measured, and if it is larger, more trials are let in.
2. They race (race.py). Losses of the study take no part: they were low partly by luck.
3. The rule picks one of them (choose.py).
4. The pick and the default are trained with further seeds, which chose nothing: their losses, and the gain, are unbiased.
5. Of all adapters of the pick, whatever their seed, the one with the lowest validation loss is handed over: what a seed did to an
   adapter stays with it.

Each step is a function of the study, the settings and the outcomes on disk, so the same command goes on wherever it was ended.
"""

import contextlib
import math
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

from loratune.errors import SpecError, StorageError, TrainingError
from loratune.plugs import METRICS
from loratune.record import StudyRecord, Trial, open_record, read
from loratune.record.adapters import find_adapter
from loratune.record.common_practice import in_common_practice
from loratune.record.reader import read_outcomes
from loratune.selection import selected
from loratune.selection.account import account, run_of
from loratune.selection.candidates import allowed, candidate_name, candidates, loss_of, noise_of, ranked_trials, rule_of, scores_of
from loratune.selection.finalists import Finalists, Noise, finalists
from loratune.selection.race import Race
from loratune.selection.rerun import AGAIN, CHECK, PRACTICE, RACE, Event, Rerun, RerunCost, Stopped, expected_cost, fresh_seed, run_name
from loratune.selection.rule import Choice, Rule, choose
from loratune.selection.selected import SelectionRecord, Shipped, UnbiasedLoss
from loratune.selection.trial_metrics import metric_names
from loratune.spec.own_metrics import declare
from loratune.statistics import student_mean
from loratune.system.files import AnyPath
from loratune.work import Message

FINALISTS = 8  # at most
LEAST = 4  # finalists, where there are so many trials, lest an assumed noise that is too small decides
FIRST = 2  # seeds that every finalist gets
REPEATS = 10  # of a finalist, at most
RUNS_EACH = 3  # the race's budget, per finalist
CHECKS = 3  # seeds of the chosen one and of the default, after the choice
TOLERANCE = 0.001  # nats per token: the race tells no smaller differences apart
ERROR_RATE = 0.05


def most_runs(finished: int, keep: int | None, full_runs: float | None = None) -> int:
    """Runs of a selection at its defaults, at most.

    finished, keep: trials of the study, and how many of their adapters it keeps (None: all). full_runs: its budget, if it has one: a
    short search is followed by a selection of twice its runs at most, but enough for two finalists.
    """
    if not finished:
        return 0
    again = keep is not None and keep < finished
    wanted = RUNS_EACH * min(FINALISTS, finished) + 2 * CHECKS
    return (wanted if full_runs is None else min(wanted, max(2 * math.ceil(full_runs), 2 * FIRST + 2 * CHECKS))) + again


@dataclass(frozen=True)
class Planned:
    """What will be done and what it will cost; nothing was trained yet."""

    text: str
    most: RerunCost


@dataclass(frozen=True)
class Selected:
    """The end: selection.json is written."""

    record: SelectionRecord


SelectEvent = Event | Planned | Selected


def select(
    folder: AnyPath,
    *,
    most: int = FINALISTS,
    runs: int | None = None,
    rerun: bool = True,
    require: Sequence[str] = (),
    prefer: str | None = None,
    tolerance: float = TOLERANCE,
    common_practice: bool = False,
    trust_remote_code: bool = False,
    stop: threading.Event | None = None,
) -> Iterator[SelectEvent]:
    """Choose the trial of the finished study in `folder` to ship, write `selection.json`, and yield what happens.

    most: finalists at most. runs: re-trainings in all, at most; by default 3 for each finalist, and 3 each for the chosen one and the
    default, and of a study with a budget of full runs what `most_runs` says. rerun=False: train nothing, choose by the study's own
    losses. require: constraints, `adapter_mb <= 50`. prefer: the rule, `loss,mmlu,adapter_mb`, or weights, `loss=1,adapter_mb=0.1`.
    common_practice: train also rank 16, alpha 32, learning rate 2e-4 with the seeds of the check, 3 runs more, and tell the gain over it.
    trust_remote_code: let code run that comes with the model, where the study asks for it.

    Setting `stop`, or closing the iterator, ends it; the same call goes on. Raises StorageError for a study that is not finished,
    SpecError for a rule that cannot be applied and constraints that nobody keeps, TrainingError.
    """
    study = read(folder, trust_remote_code=trust_remote_code)
    _check_finished(study)
    with open_record(folder, "select") as held, Rerun(study, held.lock, stop or threading.Event()) as trainer, contextlib.suppress(Stopped):
        yield from _Selection(study, trainer, most, runs, rerun, require, prefer, tolerance, common_practice).run()


@dataclass
class _Selection:
    """One selection at work, with the arguments of `select`."""

    study: StudyRecord
    trainer: Rerun
    most: int
    runs: int | None
    rerun: bool
    require: Sequence[str]
    prefer: str | None
    tolerance: float
    common_practice: bool = False

    def __post_init__(self) -> None:
        study = self.study
        declare(study.spec.get("metrics"))
        self.seed = int(study.spec["seed"])
        self.scores = scores_of(study)
        self.notes: list[str] = []
        ranking = ranked_trials(study)
        if not ranking:
            raise SpecError(f"{study.folder} has no trial that was trained to its end: there is nothing to choose from")
        self.default = next((t for t in study.finished if study.default and t.number == study.default.number), None)
        stated = rule_of(self.prefer, self.require, (), self.scores, study.own_objective)
        self.trials = allowed(ranking, stated, self.scores)
        self.excluded = len(ranking) - len(self.trials)
        # The choice's adapter may have to be trained again. Only what the study did not keep takes a run from the race: what an earlier
        # selection removed must not, or the same command would let fewer race than it did then.
        self.reserve = int(any(find_adapter(study, t) is None for t in self.trials))
        self.again = int(self.reserve or study.paths.selection.exists())
        self.noise = noise_of(ranking)
        self.by_own = METRICS[stated.metrics[0]].own if stated.metrics[0] in METRICS else False
        self.by_loss = stated.priorities[0] == "validation_loss" and not stated.weights
        self.most, self.runs = self._limits(self.most, self.runs)

    def _limits(self, most: int, runs: int | None) -> tuple[int, int | None]:
        """(finalists at most, runs of the race at most), as far as the stated runs go."""
        if most < 1:
            raise SpecError(f"finalists: got {most}; needed: a whole number above 0")
        most = min(most, len(self.trials))
        full_runs = self.study.spec.get("budget", {}).get("full_runs")
        if runs is None and full_runs is not None and self.by_loss:
            runs = most_runs(most, None, full_runs) + self.reserve + CHECKS * self.common_practice
        if runs is None or not self.rerun:
            return most, None
        left = runs - CHECKS * ((2 if self.default is not None else 1) + self.common_practice) - self.reserve
        if left < FIRST:
            raise SpecError(
                f"runs: got {runs}; at least {FIRST + runs - left} are needed: {FIRST} per finalist, {CHECKS} each for the chosen trial "
                "and the default, and 1 where an adapter was not kept"
            )
        return min(most, left // FIRST), left

    def run(self) -> Iterator[SelectEvent]:
        yield self._plan()
        few = self._finalists(self.noise)
        race: Race | None = None
        if self.rerun and self.by_loss:
            race, few = yield from self._race(few)
        trials = self._trials_of(few) if self.by_loss else self.trials
        unsound = {name for name, _, loss in race.log if not math.isfinite(loss)} if race else set()
        while True:
            sound = [t for t in trials if candidate_name(t) not in unsound]
            if not sound:
                raise TrainingError(f"all of {len(trials)} finalists diverged with a fresh seed: none can be relied on. Let more race.")
            choice, rule = self._choose(sound, race)
            chosen = next(t for t in sound if candidate_name(t) == choice.winner)
            unbiased, reliable = yield from self._check(chosen)
            if reliable:
                break
            unsound.add(candidate_name(chosen))
            self._tell(f"Trial {chosen.number} was chosen, and diverged with a seed after that; it is out.")
        shipped = yield from self._ship(chosen, race, unbiased)
        record = account(
            self.study,
            trials,
            self.scores,
            rule=rule,
            choice=choice,
            chosen=chosen,
            excluded=self.excluded,
            race=race,
            field=str(few),
            assumed=self.noise,
            unbiased=unbiased,
            shipped=shipped,
            outcomes=list(self.trainer.outcomes.values()),
            notes=self._notes(trials, rule, chosen, unbiased, shipped),
        )
        selected.write_selection(record, self.study.folder)
        self.trainer.keep_adapters("", {(chosen.number, shipped.run)})
        yield Selected(record)

    # --- before

    def _plan(self) -> Planned:
        if not self.rerun:
            return Planned("Nothing is trained again: the study's own losses choose.", RerunCost())
        few = self._finalists(self.noise)
        # Of the noise nothing is known yet, so all that may be let in are counted.
        widest = self.trials[: self.most]
        race = (self.runs or RUNS_EACH * len(widest)) if self.by_loss else 0
        each = [self.trials[0], *([self.default] if self.default is not None else [])]
        most = (expected_cost(widest, race) if race else RerunCost()) + expected_cost(
            each, CHECKS * (len(each) + self.common_practice) + self.again
        )
        lines = []
        if self.by_loss:
            more = f", up to {self.most} if the noise turns out larger" if self.most > len(few.chosen) else ""
            entered = len(self._trials_of(few))
            lines.append(f"{few} {entered} {'races' if entered == 1 else 'race'}{more}; their runs: {race} at most.")
        else:
            lines.append("The rule does not begin with the loss, so there is no race.")
        lines.append(f"Then {CHECKS} runs each of the chosen one" + (" and the default." if self.default is not None else "."))
        if self.common_practice:
            lines.append(f"And {CHECKS} of common practice.")
        if self.again:
            lines.append("And one more if the chosen one's adapter was not kept.")
        known = sum(len(trial.outcomes()) for trial in self.study.paths.finalists.trials_there())
        lines.append(f"At most {most}, as fast as the study was" + (f"; {known} of an earlier start are on disk." if known else "."))
        return Planned("\n".join(lines), most)

    def _finalists(self, noise: Noise) -> Finalists:
        return finalists([loss_of(t) for t in self.trials], noise, most=self.most, error_rate=ERROR_RATE)

    def _trials_of(self, few: Finalists) -> list[Trial]:
        """The finalists; never fewer than `LEAST` where so many may race. (`self.trials` begins with the lowest loss.)"""
        return self.trials[: max(len(few.chosen), min(LEAST, self.most))]

    # --- the race

    def _race(self, few: Finalists) -> Generator[Event, None, tuple[Race, Finalists]]:
        while True:
            trials = {candidate_name(trial): trial for trial in self._trials_of(few)}
            race = Race(
                list(trials),
                tolerance=self.tolerance,
                budget=self.runs or RUNS_EACH * len(trials),
                error_rate=ERROR_RATE,
                first=FIRST,
                repeats=REPEATS,
            )
            first = True
            while asked := race.next():
                losses = yield from self.trainer.train([(trials[name], run_name(RACE, repeat)) for name, repeat in asked])
                for (name, repeat), loss in zip(asked, losses, strict=True):
                    race.tell(name, repeat, loss)
                lowest = {t.number: _runs(t, race) for t in trials.values()}
                self.trainer.keep_adapters(RACE, {(number, min(own, key=own.__getitem__)) for number, own in lowest.items()})
                if first and race.noise.known:
                    wider = self._finalists(Noise(sd=race.noise.value, source=f"from {FIRST} fresh seeds of {len(trials)} trials"))
                    if len(self._trials_of(wider)) > len(trials):
                        few = wider
                        yield Message(text=f"{few} So {len(self._trials_of(few))} race.")
                        break  # the same seeds: what was run counts
                first = False
            else:
                yield Message(text=race.explain())
                return race, few

    # --- the choice

    def _choose(self, sound: list[Trial], race: Race | None) -> tuple[Choice, Rule]:
        rule = rule_of(self.prefer, self.require, sound, self.scores, self.study.own_objective)
        losses = {t.number: race.losses[candidate_name(t)] if race else [loss_of(t)] for t in sound}
        sd = race.noise.value if race is not None and race.noise.known else self.noise.sd
        return choose(candidates(sound, losses, self.scores), rule, seed=self.seed, noise_sd=sd), rule

    # --- after

    def _check(self, chosen: Trial) -> Generator[Event, None, tuple[UnbiasedLoss | None, bool]]:
        """(what the chosen one and the default are worth, whether the chosen one never diverged)."""
        both = {t.number: t for t in (chosen, self.default) if t is not None}
        if self.rerun:
            wanted = [(trial, repeat) for repeat in range(CHECKS) for trial in both.values()]
            losses = yield from self.trainer.train([(trial, run_name(CHECK, repeat)) for trial, repeat in wanted])
        else:
            wanted, losses = self._checked_before(list(both.values()))
            if not wanted:
                return None, True
            self._tell(f"The {len(wanted) // len(both)} fresh seeds are those of an earlier selection.")
        told = tuple(run_of(self.study, trial, CHECK, repeat, loss) for (trial, repeat), loss in zip(wanted, losses, strict=True))
        own = [run.loss for run in told if run.trial == chosen.number]
        if not all(map(math.isfinite, own)):
            return None, False
        default = [run.loss for run in told if self.default is not None and run.trial == self.default.number]
        if not all(map(math.isfinite, default)):
            self._tell("The default diverged with a fresh seed, so no gain over it is given.")
            default = []
        usual = yield from self._usual(chosen)
        return UnbiasedLoss(
            runs=told,
            chosen=student_mean(own),
            default=student_mean(default) if default else None,
            gain=student_mean([d - o for d, o in zip(default, own, strict=True)]) if default and chosen is not self.default else None,
            common_practice=student_mean(usual) if usual else None,
            gain_over_common_practice=student_mean([u - o for u, o in zip(usual, own, strict=True)]) if usual else None,
        ), True

    def _usual(self, chosen: Trial) -> Generator[Event, None, list[float]]:
        """Losses of common practice with the check's seeds, all else as the default has it; nothing where it was not asked for."""
        if not (self.common_practice and self.rerun):
            return []
        like = self.default or chosen
        usual = replace(like, hyperparameters=in_common_practice(like.hyperparameters))
        losses = yield from self.trainer.train([(usual, run_name(PRACTICE, repeat)) for repeat in range(CHECKS)])
        if not all(map(math.isfinite, losses)):
            self._tell("Common practice diverged with a fresh seed, so no gain over it is given.")
            return []
        return losses

    def _checked_before(self, both: list[Trial]) -> tuple[list[tuple[Trial, int]], list[float]]:
        """What an earlier selection measured of these trials after its choice: of two or more seeds that all of them ran, or nothing."""
        known = {}
        for trial in both:
            outcomes = read_outcomes(self.study.paths.finalists.trial(trial.number))
            known[trial.number] = {o.run: math.inf if o.validation_loss is None else o.validation_loss for o in outcomes}
        repeats = [repeat for repeat in range(CHECKS) if all(run_name(CHECK, repeat) in known[trial.number] for trial in both)]
        wanted = [(trial, repeat) for repeat in repeats for trial in both] if len(repeats) > 1 else []
        return wanted, [known[trial.number][run_name(CHECK, repeat)] for trial, repeat in wanted]

    def _ship(self, chosen: Trial, race: Race | None, unbiased: UnbiasedLoss | None) -> Generator[Event, None, Shipped]:
        """Which of the chosen trial's adapters to hand over; one that was not kept is trained again."""
        checked = [run for run in unbiased.runs if run.trial == chosen.number] if unbiased and self.rerun else []
        runs = _runs(chosen, race) | {run_name(CHECK, run.repeat): run.loss for run in checked}
        if self.by_own:  # only the study's own run was measured by it
            runs = {AGAIN: loss_of(chosen)}
        run = min(runs, key=runs.__getitem__)
        if find_adapter(self.study, chosen, run) is None:
            if not self.rerun:
                self._tell(f"The adapter of trial {chosen.number} was not kept. `loratune select {self.study.folder}` trains it again.")
            else:
                yield Message(text=f"The adapter of trial {chosen.number}, {run}, was not kept; training it again.")
                yield from self.trainer.train([(chosen, run)], adapters=True)
        seed = fresh_seed(self.seed, run)
        return Shipped(run=run, seed=seed, validation_loss=runs[run], lowest_of=len(runs))

    def _paid(self) -> selected.SelectionRecord | None:
        """The selection that stands in the folder, where it trained something."""
        with contextlib.suppress(StorageError):
            found = selected.read_selection(self.study.folder)
            return found if found is not None and found.runs else None
        return None

    def _tell(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _notes(self, trials: list[Trial], rule: Rule, chosen: Trial, unbiased: UnbiasedLoss | None, shipped: Shipped) -> tuple[str, ...]:
        if not self.rerun:
            self._tell("Nothing was trained again: the noise is not measured, and the chosen one's loss is likely too low.")
        if unbiased is None and self.default is not None and chosen is not self.default:
            gain, flattered = (
                loss_of(self.default) - loss_of(chosen),
                ", and optimistic, as the choice was made by these losses" * self.by_loss,
            )
            self._tell(f"Its gain over the default in the study, {gain:.4f}, is of one seed each, without an interval{flattered}.")
        if self.by_own and self.rerun:
            self._tell(
                f"{rule.metrics[0]} was measured of the study's own run alone, so that one is handed over; fresh seeds tell the loss."
            )
        if not self.rerun and (earlier := self._paid()) is not None:
            self._tell(
                f"This replaces an earlier selection of {earlier.runs} runs, which chose trial {earlier.chosen}; they are on disk, "
                "and its command chooses by them again without training."
            )
        if unbiased is not None:
            examples = self.study.manifest.get("validation", {}).get("examples")
            on = f"the {examples:,} validation examples" if isinstance(examples, int) else "the validation examples"
            self._tell(
                f"Intervals are over seeds, on {on} that also chose the trial: how the loss varies with the examples is not in them."
            )
        if self.prefer is None and "score" not in rule.metrics and len(trials) > 1:
            self._tell(
                f"No downstream score took part: not every candidate has one. `loratune evaluate {self.study.folder}` measures them."
            )
        if shipped.run != AGAIN and any(metric not in metric_names() or metric == "score" for metric in rule.metrics):
            self._tell("The downstream scores that took part are of the study's own runs, not of the adapter that is handed over.")
        return tuple(self.notes)


def _runs(trial: Trial, race: Race | None) -> dict[str, float]:
    """The trial's runs that took part in the choice: the study's own and the race's, and their losses."""
    raced = {run_name(RACE, repeat): loss for name, repeat, loss in race.log if name == candidate_name(trial)} if race else {}
    return {AGAIN: loss_of(trial), **raced}


def _check_finished(study: StudyRecord) -> None:
    """Raises StorageError."""
    if not study.budget_spent:
        ended, budget = sum(trial.state.ended for trial in study.trials), study.spec["budget"]["trials"]
        raise StorageError(
            f"the study in {study.folder} is not finished: {ended} of {budget} trials ended. "
            f"Go on with `loratune run {study.folder}`, then select."
        )
