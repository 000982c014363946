"""The loop: ask the sampler, train what the schedule wants, tell both, until the budget is spent.

There is no resume path. Every start runs the same loop from the first trial: a trial that the storage
holds is not asked for again, and a segment whose outcome is on disk is not trained again. Results are
applied in the order of a virtual clock, by which a segment takes a time that is known when it is sent; so
the study is a function of its spec and not of timing, and yet a short segment need not wait for a long one.
"""

import heapq
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.trial import TrialState

from loratune import samplers, schedules
from loratune.errors import SearchSpentError, error_of
from loratune.executors import Executor, Notice
from loratune.executors.crashes import stop_for_common_cause
from loratune.finetune.order import total_steps
from loratune.record import COMPLETE, DIVERGED, FAILED, INFEASIBLE, PAUSED, PRUNED, Record, Trial
from loratune.record.goals import Goals, Sizes
from loratune.record.progress import Meter
from loratune.record.spending import Spending
from loratune.samplers.distinct import Distinct
from loratune.schedules import Fate, Stretch
from loratune.spec import StudySpec
from loratune.work import Outcome, Pack, Progress, Segment, State

if TYPE_CHECKING:
    from loratune.downstream.scoring import Scored


@dataclass(frozen=True)
class Asked:
    """A trial begins."""

    trial: Trial


@dataclass(frozen=True)
class Settled:
    """A segment's result was applied; `trial` is the trial after it."""

    trial: Trial
    outcome: Outcome


@dataclass(frozen=True)
class Note:
    """A line for the user."""

    text: str


Event = Asked | Settled | Note | Progress
Score = Callable[[int, Path, float | None, threading.Event], Iterator["Scored"]]
"""`downstream.scoring.Scorer.score`."""


class Loop:
    """One study's loop over an opened record. Iterate over `run()`; setting `stop` ends it."""

    def __init__(
        self,
        *,
        spec: StudySpec,
        record: Record,
        study: optuna.Study,
        examples: int,
        validation_examples: int,
        executor: Executor,
        meter: Meter,
        stop: threading.Event,
        sizes: Sizes | None = None,
        score: Score | None = None,
    ) -> None:
        """`score` is needed where `spec.scores` are among the objectives and constraints."""
        self.stop = stop
        self._spec, self._record, self._study, self._executor, self._meter = spec, record, study, executor, meter
        self._examples, self._validation_examples = examples, validation_examples  # in the training and the validation set
        self._goals, self._score = Goals(spec, sizes), score
        self._ordinals, self._distinct = samplers.ordinals(spec.sampler.name), Distinct(spec)
        self._schedule = schedules.build(
            spec.schedule.name,
            trials=spec.budget.most,
            yardstick=spec.sampler.defaults_first,
            fidelity=spec.schedule.fidelity,
            reduction_factor=spec.schedule.reduction_factor,
            min_resource=spec.schedule.min_resource,
        )
        self._trials: dict[int, Trial] = {}
        self._open: dict[int, optuna.Trial] = {}  # not yet finished in the storage
        self._flying: list[tuple[int, int, Stretch, Segment]] = []  # sent, not yet applied: heap by (end on the clock, number sent)
        self._clock = self._sent = self._earliest = 0
        self._arrived: dict[str, Outcome] = {}
        self._settled = 0
        self._first: int | None = None  # the first trial that was trained, which measures the untuned model too
        self._short: dict[int, Fraction] = {}  # trials that the sampler wants shorter than a full run
        self._spending = Spending(spec, examples)
        self._began_at = record.began_at()  # trial -> segments settled when it began the first time
        self._spent = ""  # why the sampler proposes no more

    def run(self) -> Iterator[Event]:
        while not self.stop.is_set():
            yield from self._send()
            if not self._flying:
                break
            while self._flying[0][-1].key not in self._arrived:
                yield from self._listen()
                if self.stop.is_set():
                    return
            yield from self._scored()
            if self.stop.is_set():
                return
            yield self._apply()
            crashes = [t.message if t.state == FAILED else "" for t in self._trials.values() if t.outcomes]
            stop_for_common_cause(crashes, self._record.folder / "trials")
        if not self.stop.is_set():
            yield from self._close()

    def _send(self) -> Iterator[Event]:
        """Fill the executor's free slots."""
        while len(self._flying) < self._executor.capacity and not self.stop.is_set():
            stretch = self._schedule.next(may_start=self._may_start())
            if stretch is None:
                return
            if stretch.trial not in self._trials:
                trial = self._trials[stretch.trial] = self._ask(stretch.trial)
                yield Asked(trial)
                stretch = stretch.shortened(self._short.get(stretch.trial, Fraction(1)))
                if trial.state == INFEASIBLE:
                    yield from self._refuse(stretch, trial)
                    continue
            self._first = stretch.trial if self._first is None else self._first
            segment = self._segment(stretch)
            self._spending.sent(segment)
            end = self._clock + self._work(segment)
            self._earliest = self._earliest or end  # no result before the first, which has the untuned model's loss
            heapq.heappush(self._flying, (max(end, self._earliest), self._sent, stretch, segment))
            self._sent += 1
            known = self._record.outcome(segment)
            if known is not None:
                self._arrived[segment.key] = known
            else:
                self._meter.began(segment.key, segment.total_steps, segment.start_step)
                self._executor.submit(Pack(segments=(segment,)))

    def _may_start(self) -> bool:
        """Whether a new trial may begin now. A trial of the record begins exactly where it began the first time."""
        number = len(self._trials)
        if number in self._began_at:
            return self._settled >= self._began_at[number] or not self._flying
        if self._spending.spent(self._trials.values(), self._meter.wall_seconds):
            return False
        try:
            self._spent = self._spent or self._distinct.used_up(t for t in self._trials.values() if t.number not in self._short)
            may = not self._spent and samplers.ready(self._study)
        except SearchSpentError as error:
            self._spent, may = str(error), False
        if self._spent:
            self._schedule.no_more()
        return may

    def _ask(self, number: int) -> Trial:
        """The trial of that number: from the storage, or from the sampler."""
        space, stored = self._spec.search_space, self._study.get_trials(deepcopy=False)
        if number not in self._began_at:
            self._record.begin(number, self._settled)
        if not stored and self._spec.sampler.defaults_first and not samplers.starts_itself(self._spec.sampler.name):
            self._study.enqueue_trial(space.defaults(self._ordinals))
        if number < len(stored) and stored[number].state.is_finished():
            values = space.decode(stored[number].params, self._ordinals)
        else:
            begun = number < len(stored) and stored[number].state is TrialState.RUNNING  # its parameters may be half written
            asked = optuna.Trial(self._study, stored[number]._trial_id) if begun else self._study.ask()
            asked, values = self._distinct.suggest(asked, self._trials.values(), self._short)
            for name, value in values.items():
                if name not in asked.params:  # ordinals as indices, fixed values: what a dashboard would otherwise not show
                    asked.set_user_attr(name, value)
            self._open[number] = asked
        length = samplers.length(self._study, number)
        if length < 1:
            self._short[number] = length
        trial = Trial(number=number, hyperparameters=self._spec.hyperparameters(values), params=values, length=float(length))
        refusal = self._goals.refusal(trial.hyperparameters)
        if refusal:
            trial = self._goals.valued(replace(trial, state=INFEASIBLE, message=refusal), self._trials.values())
        self._record.trial(trial)
        return trial

    def _refuse(self, stretch: Stretch, trial: Trial) -> Iterator[Event]:
        """End a trial that would break a known constraint, untrained."""
        self._schedule.tell(stretch, None)
        if trial.number in self._open:  # else it was told in an earlier start
            yield Note(f"trial {trial.number} is infeasible and not trained: {trial.message}")
        self._tell(trial)

    def _segment(self, stretch: Stretch) -> Segment:
        given, curve = self._trials[stretch.trial].hyperparameters, self._trials[stretch.trial].curve
        total = math.ceil(stretch.length * total_steps(self._examples, given.batch_size, given.epochs))
        start, stop = math.ceil(stretch.start * total), math.ceil(stretch.stop * total)
        shares = range(1, self._spec.training.validations if stretch.trial not in self._short else 1)
        points = {math.ceil(Fraction(i, self._spec.training.validations) * total) for i in shares}
        points |= {0} if stretch.trial == self._first else set()  # the base model's own loss, once per study
        return Segment(
            trial=stretch.trial,
            run=stretch.run,
            hyperparameters=given,
            seed=self._spec.seed,
            total_steps=total,
            start_step=start,
            stop_step=stop,
            validate_at=tuple(sorted(p for p in points if p in range(start, stop) and (p > start or start == 0))),
            validated_at=tuple(p.step for p in curve if 0 < p.step <= start) if self._spec.training.keep == "best" else (),
        )

    def _work(self, segment: Segment) -> int:
        """How long the segment takes on the virtual clock, whose unit is one example validated: a third of one trained."""
        trained = (segment.stop_step - segment.start_step) * segment.hyperparameters.batch_size
        return 3 * trained + (len(segment.validate_at) + 1) * self._validation_examples

    def _listen(self, timeout: float = 1.0) -> Iterator[Event]:
        """Take what the executor has, and keep it, before anything else is done with it."""
        for item in self._executor.collect(timeout):
            if isinstance(item, Progress):
                self._meter.progressed(item)
                yield item
            elif isinstance(item, Notice):
                yield Note(item.text)
            elif item.state is State.BAD_INPUT:
                raise error_of(item.error, item.message)
            elif item.state is not State.CANCELLED:
                self._record.keep(item)
                self._meter.came(item)
                self._arrived[item.key] = item
        self._record.progress(self._meter.snapshot())

    def _scored(self) -> Iterator[Event]:
        """Where scores guide the search, score the next result, if it ends a full run and no constraint is broken already.

        Others train on meanwhile.
        """
        _, _, stretch, segment = self._flying[0]
        outcome = self._arrived[segment.key]
        if self._score is None or outcome.state is not State.COMPLETED or outcome.scores or stretch.length * stretch.stop < 1:
            return
        trial = self._trials[stretch.trial]
        if self._goals.broken(replace(trial, outcomes=(*trial.outcomes, outcome)), end=True):
            return
        adapter = self._record.folder / segment.folder / "adapter"
        for now in self._score(trial.number, adapter, outcome.validation_loss, self.stop):
            self._meter.scoring(trial.number, now.done, now.total)
            if now.scores:
                outcome = replace(outcome, scores=now.scores, scoring_seconds=now.seconds)
                self._record.keep(outcome)
                self._arrived[segment.key] = outcome
            yield from self._listen(timeout=0.01)
        self._meter.scored(trial.number)

    def _apply(self) -> Event:
        """Turn the clock to the end of the next segment, and tell the schedule and the storage what became of it."""
        self._clock, _, stretch, segment = heapq.heappop(self._flying)
        outcome = self._arrived.pop(segment.key)
        self._settled += 1
        trial = self._trials[stretch.trial]
        trial = replace(trial, outcomes=(*trial.outcomes, outcome))
        broken = self._goals.broken(trial, end=stretch.length * stretch.stop == 1) if outcome.state is State.COMPLETED else ""
        fate = self._schedule.tell(stretch, None if broken else outcome.validation_loss, self._goals.minimised(trial))
        fates = {Fate.COMPLETE: COMPLETE, Fate.PAUSED: PAUSED, Fate.SHORT: PRUNED}
        state = _STATES.get(outcome.state) or (INFEASIBLE if broken else fates[fate])
        trial = replace(trial, state=state, message=broken or outcome.message)
        trial = self._goals.valued(trial, self._trials.values())
        self._trials[trial.number] = trial
        untuned = next((p.validation_loss for p in outcome.curve if p.step == 0), None)
        if untuned is not None:
            samplers.tell_untuned(self._study, untuned)
        self._tell(trial, outcome)
        outlook = samplers.outlook(self._study)
        self._meter.spent(self._spending.share(segment), None if outlook is None else outlook.left)
        return Settled(trial, outcome)

    def _tell(self, trial: Trial, outcome: Outcome | None = None) -> None:
        handle = self._open.get(trial.number)
        if handle is not None:
            self._goals.tell(self._study, handle, trial, outcome)
            if trial.state != PAUSED:
                del self._open[trial.number]
        self._record.trial(trial)
        self._meter.settled(trial)

    def _close(self) -> Iterator[Event]:
        """The budget is spent: trials still paused stay where they are."""
        for trial in list(self._trials.values()):
            if trial.state == PAUSED:
                self._trials[trial.number] = replace(trial, state=PRUNED)
                self._tell(self._trials[trial.number])
        outlook = samplers.outlook(self._study)
        if outlook is not None and outlook.best is not None and math.isfinite(outlook.left):
            yield Note(f"Left to find, with 90 %: not more than {outlook.left:.4f} below the best.")
        trials = self._trials.values()
        spent = self._spending.spent(trials, self._meter.wall_seconds) if len(trials) < self._spec.budget.most else ""
        why = f"{self._spent} The study ends" if self._spent else spent
        if why:
            yield Note(f"{why} {self._spending.after(trials)}.")


_STATES = {State.DIVERGED: DIVERGED, State.OUT_OF_MEMORY: INFEASIBLE, State.CRASHED: FAILED}
