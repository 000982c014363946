"""The loop: ask the sampler, train what the schedule wants, tell both, until the budget is spent.

There is no resume path. Every start runs the same loop from the first trial: a trial that the storage
holds is not asked for again, and a segment whose outcome is on disk is not trained again. Results are
applied in the order of a virtual clock, by which a segment takes a time that is known when it is sent; so
the study is a function of its spec and not of timing, and yet a short segment need not wait for a long one.
"""

import heapq
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from loratune import samplers, schedules
from loratune.data.order import total_steps
from loratune.errors import SearchSpentError, error_of
from loratune.executors import Executor
from loratune.executors.crashes import stop_for_common_cause
from loratune.record import COMPLETE, DIVERGED, FAILED, INFEASIBLE, PAUSED, PRUNED, Record, Trial
from loratune.record.one_writer import together
from loratune.record.progress import ProgressTracker
from loratune.samplers.distinct import Distinct
from loratune.schedules import Decision, Slice, SliceResult
from loratune.spec import StudySpec
from loratune.study.objectives import Objectives, Sizes
from loratune.study.spending import Spending
from loratune.system.formatting import plural
from loratune.work import Message, Outcome, Progress, Segment, State

if TYPE_CHECKING:
    from loratune.downstream.search_scoring import ScoringProgress


@dataclass(frozen=True)
class TrialStarted:
    """A trial begins."""

    trial: Trial


@dataclass(frozen=True)
class SegmentFinished:
    """A segment's result was applied; `trial` is the trial after it."""

    trial: Trial
    outcome: Outcome


Event = TrialStarted | SegmentFinished | Message | Progress
Score = Callable[..., Iterator["ScoringProgress"]]
"""`downstream.search_scoring.Scorer.score`."""


@dataclass(frozen=True, order=True)
class _InFlight:
    """A segment that was sent and whose result is not yet applied, in the order of results."""

    end: int  # on the virtual clock
    number: int  # sent
    slice: Slice = field(compare=False)
    segment: Segment = field(compare=False)


class _Until(threading.Event):
    """Is set as soon as `stop` is, or `reached` names a limit."""

    def __init__(self, stop: threading.Event, reached: Callable[[], str]) -> None:
        super().__init__()
        self._stop, self._reached = stop, reached

    def is_set(self) -> bool:
        return self._stop.is_set() or bool(self._reached())


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
        meter: ProgressTracker,
        stop: threading.Event,
        sizes: Sizes | None = None,
        score: Score | None = None,
    ) -> None:
        """`score` is needed where `spec.scores` are among the objectives and constraints."""
        self.stop = stop
        self._spec, self._record, self._study, self._executor, self._meter = spec, record, study, executor, meter
        self._examples, self._validation_examples = examples, validation_examples  # in the training and the validation set
        self._objectives, self._score = Objectives(spec, sizes), score
        self._ordinals, self._distinct = samplers.ordinals(spec.sampler.name), Distinct(spec)
        self._schedule = schedules.of_study(spec)
        self._trials: dict[int, Trial] = {}
        self._open: dict[int, optuna.Trial] = {}  # not yet finished in the storage
        self._flying: list[_InFlight] = []  # a heap
        self._clock = self._sent = self._earliest = 0
        self._arrived: dict[str, Outcome] = {}
        self._settled = 0
        self._first: int | None = None  # the first trial that was trained, which measures the untuned model too
        self._short: dict[int, Fraction] = {}  # trials that the sampler wants shorter than a full run
        self._spending = Spending(spec, examples, meter)
        self.paused = ""  # the limit of time or money at which running segments were left to be paused
        self._until = _Until(stop, self._spending.limit)
        self._began_at = record.began_at()  # trial -> segments settled when it began the first time
        self._spent = ""  # why the sampler proposes no more
        self._shown = 0.0  # when progress.json was last written

    def run(self) -> Iterator[Event]:
        while not self.stop.is_set():
            yield from self._send()
            if not self._flying:
                break
            while self._flying[0].segment.key not in self._arrived:
                if limit := self._spending.limit():
                    yield self._pause(limit)
                    return
                yield from self._listen()
                if self.stop.is_set():
                    return
            scored = yield from self._scored()
            if self.stop.is_set():
                return
            if not scored:
                yield self._pause(self._spending.limit())
                return
            yield self._apply()
            crashes = (t.message if t.state == FAILED else "" for t in self._trials.values() if t.outcomes)
            stop_for_common_cause(list(islice(crashes, 4)), self._record.paths.trials)  # more than three say nothing further
        if not self.stop.is_set():
            yield from self._close()
            self._record.progress(self._meter.snapshot())  # with the last result

    def _send(self) -> Iterator[Event]:
        """Fill the executor's free slots."""
        while len(self._flying) < self._executor.capacity and not self.stop.is_set():
            slice = self._schedule.next(may_start=self._may_start())
            if slice is None:
                return
            if slice.trial not in self._trials:
                trial = self._trials[slice.trial] = self._ask(slice.trial)
                yield TrialStarted(trial)
                slice = slice.shortened(self._short.get(slice.trial, Fraction(1)))
                if trial.state == INFEASIBLE:
                    yield from self._refuse(slice, trial)
                    continue
            self._first = slice.trial if self._first is None else self._first
            segment = self._segment(slice)
            self._spending.sent(segment)
            end = self._clock + self._work(segment)
            self._earliest = self._earliest or end  # no result before the first, which has the untuned model's loss
            heapq.heappush(self._flying, _InFlight(max(end, self._earliest), self._sent, slice, segment))
            self._sent += 1
            known = self._record.outcome(segment)
            if known is not None:
                self._arrived[segment.key] = known
            elif not self._spending.limit():
                self._meter.began(segment.key, segment.total_steps, segment.start_step)
                self._executor.submit(segment)

    def _may_start(self) -> bool:
        """Whether a new trial may begin now. A trial of the record begins exactly where it began the first time."""
        number = len(self._trials)
        if number in self._began_at:
            return self._settled >= self._began_at[number] or not self._flying
        if self._spending.spent():
            return False
        try:
            self._spent = self._spent or self._distinct.used_up(self._trials.values(), self._short)
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
        if number < len(stored) and stored[number].state.is_finished():
            values = space.decode(stored[number].params, self._ordinals)
        else:
            with together(self._study):  # a kill leaves a trial with all its parameters, or none
                values = self._asked(number, stored)
        length = samplers.length(self._study, number)
        if length < 1:
            self._short[number] = length
        trial = Trial(number=number, hyperparameters=self._spec.hyperparameters(values), params=values, length=float(length))
        refusal = self._objectives.refusal(trial.hyperparameters)
        if refusal:
            trial = self._objectives.valued(replace(trial, state=INFEASIBLE, message=refusal), self._trials.values())
        self._record.trial(trial)
        return trial

    def _asked(self, number: int, stored: Sequence[FrozenTrial]) -> dict[str, Any]:
        """The values that the sampler gives the trial, which is open then."""
        if not stored and self._spec.sampler.defaults_first and not samplers.starts_itself(self._spec.sampler.name):
            self._study.enqueue_trial(self._spec.search_space.defaults(self._ordinals))
        begun = number < len(stored) and stored[number].state is TrialState.RUNNING  # an older start's, perhaps half written
        asked = optuna.Trial(self._study, stored[number]._trial_id) if begun else self._study.ask()
        asked, values = self._distinct.suggest(asked, self._trials.values(), self._short)
        for name, value in values.items():
            if name not in asked.params:  # ordinals as indices, fixed values: what a dashboard would otherwise not show
                asked.set_user_attr(name, value)
        self._open[number] = asked
        return values

    def _refuse(self, slice: Slice, trial: Trial) -> Iterator[Event]:
        """End a trial that would break a known constraint, untrained."""
        self._schedule.tell(slice, SliceResult(loss=None))
        if trial.number in self._open:  # else it was told in an earlier start
            yield Message(text=f"trial {trial.number} is infeasible and not trained: {trial.message}")
        self._tell(trial)

    def _segment(self, slice: Slice) -> Segment:
        given, curve = self._trials[slice.trial].hyperparameters, self._trials[slice.trial].curve
        total = math.ceil(slice.length * total_steps(self._examples, given.batch_size, given.epochs))
        start, stop = math.ceil(slice.start * total), math.ceil(slice.stop * total)
        shares = range(1, self._spec.training.validations if slice.trial not in self._short else 1)
        points = {math.ceil(Fraction(i, self._spec.training.validations) * total) for i in shares}
        points |= {math.ceil(share * total) for share in slice.validate_at}
        points |= {0} if slice.trial == self._first else set()  # the base model's own loss, once per study
        return Segment(
            trial=slice.trial,
            run=slice.run,
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
            elif isinstance(item, Message):
                yield item
            elif item.state is State.BAD_INPUT:
                raise error_of(item.error, item.message)
            elif item.state is not State.CANCELLED:
                self._record.keep(item)
                self._meter.came(item)
                self._arrived[item.key] = item
        if time.monotonic() - self._shown >= _SHOWN:
            self._record.beat()
            self._record.progress(self._meter.snapshot() | self._executor.where)
            self._shown = time.monotonic()

    def _scored(self) -> Generator[Event, None, bool]:
        """Where trials are scored, score the next result, if it ends a full run and no constraint is broken already.

        At each rung too where the first objective is a metric of the user's own, by which a schedule then compares.

        Others train on meanwhile. Gives whether it has its scores, or needs none; it has not where it was stopped or a limit was reached.
        """
        slice, segment = self._flying[0].slice, self._flying[0].segment
        outcome = self._arrived[segment.key]
        ends = slice.ends_full_run
        if self._score is None or outcome.state is not State.COMPLETED or outcome.scores or not (ends or self._objectives.own_first):
            return True
        trial = self._trials[slice.trial]
        if self._objectives.broken(replace(trial, outcomes=(*trial.outcomes, outcome)), end=ends):
            return True
        if self._until.is_set():
            return False
        adapter = self._record.paths.of(segment).adapter
        rung = {} if ends else {"rung": f"{segment.run}-{segment.stop_step}"}
        for now in self._score(trial.number, adapter, outcome.validation_loss, self._until, **rung):
            self._meter.scoring(trial.number, now.done, now.total)
            if now.scores:
                outcome = replace(outcome, scores=now.scores, scoring_seconds=now.seconds)
                self._record.keep(outcome)
                self._arrived[segment.key] = outcome
            yield from self._listen(timeout=0.01)
        self._meter.scored(trial.number)
        return bool(outcome.scores)

    def _apply(self) -> Event:
        """Turn the clock to the end of the next segment, and tell the schedule and the storage what became of it."""
        result = heapq.heappop(self._flying)
        self._clock, slice = result.end, result.slice
        outcome = self._arrived.pop(result.segment.key)
        self._settled += 1
        trial = self._trials[slice.trial]
        trial = replace(trial, outcomes=(*trial.outcomes, outcome))
        broken = self._objectives.broken(trial, end=slice.ends_full_run) if outcome.state is State.COMPLETED else ""
        loss = None if broken else outcome.validation_loss
        told = SliceResult(loss=loss, objectives=self._objectives.minimised(trial), outcome=outcome, curve=trial.curve)
        decision = self._schedule.tell(slice, told)
        state = _STATES.get(outcome.state) or (INFEASIBLE if broken else _DECIDED[decision])
        trial = replace(trial, state=state, message=broken or outcome.message)
        trial = self._objectives.valued(trial, self._trials.values())
        self._trials[trial.number] = trial
        untuned = next((p.validation_loss for p in outcome.curve if p.step == 0), None)
        if untuned is not None:
            samplers.tell_untuned(self._study, untuned)
        self._tell(trial, outcome)
        outlook = samplers.outlook(self._study)
        self._meter.spent(self._spending.share(result.segment), None if outlook is None else outlook.left)
        return SegmentFinished(trial, outcome)

    def _tell(self, trial: Trial, outcome: Outcome | None = None) -> None:
        handle = self._open.get(trial.number)
        if handle is not None:
            with together(self._study):
                self._objectives.tell(self._study, handle, trial, outcome)
            if trial.state != PAUSED:
                del self._open[trial.number]
        self._record.trial(trial)
        self._meter.settled(trial)

    def _pause(self, limit: str) -> Message:
        """A hard limit is reached while segments run: the executor, when it is closed, lets them write checkpoints.

        Nothing is settled out of its turn, so a larger budget goes on exactly from here. A full run that is done, and waits for
        one before it on the virtual clock, is noted as complete, lest the study's end forgets it.
        """
        self.paused = limit
        waiting = {flying.slice.trial for flying in self._flying}
        for flying in self._flying:
            outcome = self._arrived.get(flying.segment.key)
            if self._score is not None or outcome is None or outcome.state is not State.COMPLETED or not flying.slice.ends_full_run:
                continue
            trial = self._trials[flying.slice.trial]
            trial = replace(trial, outcomes=(*trial.outcomes, outcome), state=COMPLETE)
            if not self._objectives.broken(trial, end=True):
                self._record.trial(self._objectives.valued(trial, self._trials.values()))
                waiting.discard(trial.number)
        self._record.progress(self._meter.snapshot() | {"running": []})
        trials = self._trials.values()
        left = f"; {plural(len(waiting), 'trial')} paused, which a larger budget continues" if waiting else ""
        return Message(text=f"{limit} {self._spending.after(trials)}{left}.")

    def _close(self) -> Iterator[Event]:
        """The budget is spent: trials still paused stay where they are."""
        for trial in list(self._trials.values()):
            if trial.state == PAUSED:
                self._trials[trial.number] = replace(trial, state=PRUNED)
                self._tell(self._trials[trial.number])
        outlook = samplers.outlook(self._study)
        if outlook is not None and outlook.best is not None and math.isfinite(outlook.left):
            yield Message(text=f"With 90 % probability at most {outlook.left:.4f} nats of improvement are left.")
        trials = self._trials.values()
        spent = self._spending.spent() if len(trials) < self._spec.budget.most else ""
        why = f"{self._spent} The study ends" if self._spent else spent
        if why:
            yield Message(text=f"{why} {self._spending.after(trials)}.")


_SHOWN = 0.5  # seconds between two versions of progress.json: with a thousand devices it would cost more than the results
_DECIDED = {Decision.COMPLETE: COMPLETE, Decision.PAUSED: PAUSED, Decision.DROPPED: PRUNED}
_STATES = {State.DIVERGED: DIVERGED, State.OUT_OF_MEMORY: INFEASIBLE, State.CRASHED: FAILED}
