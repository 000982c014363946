"""A study's objectives and constraints in numbers: what a trial measured, what it broke, what Optuna is told of it.

What follows from the hyperparameters and the model alone (the adapter's size) is known before training, so a
trial that cannot keep a constraint on it is never trained. The rest is told once it is measured.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import TrialState

from loratune.plugs import METRICS, Measured
from loratune.record import DIVERGED, FAILED, INFEASIBLE, PAUSED, PRUNED, Trial
from loratune.record.trials import LOSS
from loratune.samplers.base import SO_FAR
from loratune.spec import StudySpec
from loratune.spec.limits import Constraint
from loratune.work import Hyperparameters, Outcome, State

Sizes = Callable[[Hyperparameters], int]  # an adapter's number of trainable parameters


class Objectives:
    """What the study that `spec` describes asks of its trials.

    sizes: of adapters; by default of the spec's model, whose layers are then looked up. Raises ModelError.
    """

    def __init__(self, spec: StudySpec, sizes: Sizes | None = None) -> None:
        self.objectives = [objective.name for objective in spec.objectives]
        self._signs = [1.0 if objective.direction == "minimize" else -1.0 for objective in spec.objectives]
        self._limits = spec.limits
        self._metrics = {name: METRICS[name] for name in [*self.objectives, *(limit.metric for limit in self._limits)]}
        self.own_first = spec.own_objective
        self._scores = [name for name, metric in self._metrics.items() if metric.benchmark or metric.own]
        self._sizes: Sizes | None = None
        if any(metric.known == "before" for metric in self._metrics.values()):
            if sizes is None:
                from loratune.finetune.sizes import adapter_sizes  # torch

                sizes = adapter_sizes(spec.recipe("").model)
            self._sizes = sizes

    @property
    def several(self) -> bool:
        return len(self.objectives) > 1

    def size(self, hyperparameters: Hyperparameters) -> float:
        """The adapter's number of trainable parameters; NaN where no objective or constraint asks for it."""
        return float(self._sizes(hyperparameters)) if self._sizes is not None else math.nan

    def refusal(self, hyperparameters: Hyperparameters) -> str:
        """Why such a trial need not be trained; "" where it may."""
        trial = Measured(hyperparameters=hyperparameters, run=(), parameters=self.size(hyperparameters))
        known = [name for name, metric in self._metrics.items() if metric.known == "before"]
        return self._broken({name: METRICS.read(name, trial) for name in known}, lambda limit: limit.metric in known)

    def broken(self, trial: Trial, end: bool) -> str:
        """The constraints that the trial broke for good, at the `end` of a full run or on the way; "" where none."""
        measured = self._measured(trial)
        unscored = {name for name in self._scores if math.isnan(measured[name])}
        growing = {name for name, metric in self._metrics.items() if metric.known == "during"}
        return self._broken(measured, lambda limit: (end and limit.metric not in unscored) or (limit.metric in growing and limit.lasting))

    def minimised(self, trial: Trial) -> tuple[float, ...]:
        """What the trial has of the objectives so far, each to be minimised; NaN where it is not measured.

        Scores are left out: trials are compared at the end of a rung, and scored only when no rung is left; but where the first
        objective is one, it is measured at each rung.
        """
        measured = self._measured(trial)
        pairs = zip(self.objectives, self._signs, strict=True)
        return tuple(sign * measured[name] for name, sign in pairs if self.own_first or name not in self._scores)

    def valued(self, trial: Trial, others: Iterable[Trial]) -> Trial:
        """The trial with its value and its objectives' values, as Optuna is to be told them.

        What it could not measure is the worst seen in `others`, the untuned model's loss included, else infinite, of a score 0;
        so the score of a trial that was not trained to its end is the lowest that was measured. A trial that diverged has the
        worst of everything, lest a small adapter that learns nothing stands on the front.
        """
        if trial.state == FAILED:
            return trial
        measured = {} if trial.state == DIVERGED else self._measured(trial)
        values = tuple(measured.get(name, math.nan) for name in self.objectives)
        loss = METRICS.read(LOSS, self._read(trial)) if measured else math.nan
        if any(map(math.isnan, (loss, *values))):  # else nobody else need be looked at
            trials = [trial, *others]
            values = tuple(w if math.isnan(v) else v for v, w in zip(values, self._worst(trials), strict=True))
            loss = _worst_loss(trials) if math.isnan(loss) else loss
        return replace(trial, value=loss if trial.outcomes else None, values=values)

    def constraints(self, trial: Trial) -> dict[str, float]:
        """Optuna's constraints, above 0 where violated: each by the share of its bound by which it is over; what was measured of them."""
        measured = self._measured(trial)
        told = {str(limit): limit.excess(measured[limit.metric]) for limit in self._limits if not math.isnan(measured[limit.metric])}
        if trial.state == INFEASIBLE and trial.outcomes and trial.outcomes[-1].state is State.OUT_OF_MEMORY:
            told["fits_in_memory"] = 1.0
        return told

    def tell(self, study: optuna.Study, handle: optuna.Trial, trial: Trial, outcome: Outcome | None) -> None:
        """Tell the storage what became of the trial after `outcome`; a paused one stays open there."""
        stored = study.get_trials(deepcopy=False)[trial.number]
        for step, value in self._points(outcome).items():
            if step > 0 and value is not None and step not in stored.intermediate_values:
                handle.report(value, step)
        constraints = self.constraints(trial)
        if trial.state == PAUSED:
            if self.several or self._limits:  # else its intermediate values say it all
                so_far: dict[str, Any] = {"values": list(trial.values), "constraints": constraints}
                study._storage.set_trial_system_attr(handle._trial_id, SO_FAR, so_far)
            return
        for name, violation in constraints.items():
            if name not in stored.constraints:  # by a start that was killed right here
                handle.set_constraint(name, violation)
        handle.set_user_attr("state", trial.state.value)
        handle.set_user_attr("device_seconds", trial.device_seconds)
        told = None if trial.state in (FAILED, PRUNED) else list(trial.values)
        study.tell(handle, told, TrialState[trial.state.optuna])

    def _points(self, outcome: Outcome | None) -> dict[int, float | None]:
        """The objective on the way, by step; the last is the value so far, which samplers read of a paused or pruned trial."""
        if outcome is None or self.several:
            return {}
        if self.own_first:
            return {outcome.stop_step: outcome.scores.get(self.own_first)}
        points = {p.step: p.validation_loss for p in outcome.curve}
        if points and outcome.validation_loss is not None:
            points[max(points)] = outcome.validation_loss
        return points

    def _broken(self, measured: Mapping[str, float], counts: Callable[[Constraint], bool]) -> str:
        broken = [limit for limit in self._limits if counts(limit) and not limit.holds(measured[limit.metric])]
        return "; ".join(f"it breaks {limit}: {measured[limit.metric]:.4g}" for limit in broken)

    def _measured(self, trial: Trial) -> dict[str, float]:
        """Every objective and constraint by its name; NaN where it was not measured. What a run costs is of the trial's last run."""
        measured = self._read(trial)
        return {name: METRICS.read(name, measured) for name in self._metrics}

    def _read(self, trial: Trial) -> Measured:
        return Measured(hyperparameters=trial.hyperparameters, run=trial.last_run, parameters=self.size(trial.hyperparameters))

    def _worst(self, trials: list[Trial]) -> list[float]:
        found = []
        for place, (name, sign) in enumerate(zip(self.objectives, self._signs, strict=True)):
            if name == LOSS:
                found.append(_worst_loss(trials))
                continue
            if name in self._scores:  # measured ones alone: many trials are told of before the first is scored
                scores = [sign * o.scores[name] for t in trials for o in t.outcomes if name in o.scores]
                found.append(sign * max(scores, default=0.0 if sign < 0 else math.inf))
                continue
            seen = [sign * t.values[place] for t in trials if t.values and math.isfinite(t.values[place])]
            found.append(sign * max(seen, default=math.inf))
        return found


def _worst_loss(trials: list[Trial]) -> float:
    """The highest seen, the untuned model's included; infinite before any."""
    return max((p.validation_loss for t in trials for p in t.curve if p.validation_loss is not None), default=math.inf)
