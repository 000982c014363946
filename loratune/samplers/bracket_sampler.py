"""The bracket search (`bracket_rule.py`) as an Optuna sampler.

What it proposes depends on the stored trials alone. Beside the parameters of a trial it stores a system attribute,

    "bracket"  {"length": "1/27", "why": ...}     the share of a full run that the trial is to be trained

and it reads of the study, where a study knows it, the loss of the model before tuning (`UNTUNED`).

    study = optuna.create_study(sampler=loratune.samplers.BracketSampler(search_space))
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from loratune.errors import SearchSpentError
from loratune.samplers.base import Space, known_search_space, number_of_values, random_value, value_at
from loratune.samplers.bracket_rule import GUARD_RUNS, Options, PlacedRun, Proposal, SearchAxis, propose
from loratune.samplers.prior import Facts, Prior, effective, learning_rate, recommend, rescaled, scale_of

KEY = "bracket"
UNTUNED = "loratune:untuned"
"""System attribute of a study: the base model's loss, as far as it was measured."""

_SCALES = ("alpha_ratio", "lora_alpha")
_STANDARD = {"lora_r": 8, "lora_alpha": 32.0}  # what a study alone has where its space is silent
_LAYERS = ("qv", "qkvo", "mlp", "all-linear")  # by size
_DIGITS = 3  # of a learning rate or a scale
_FINE = 24  # values of a range on an axis, at most


class BracketSampler(BaseSampler):
    """A guess, a bracket around it in the effective learning rate, the vertex of a parabola, then one question at a time.

    For one objective, a loss to be minimised, and a space without conditional parameters. The names it knows are
    loratune's: learning_rate, lora_r, lora_alpha or alpha_ratio, use_rslora; every other parameter is an axis of questions.

    search_space: None takes the intersection of the study's trials, the first of which is then random.
    start: values with which the search begins, also of parameters that are not searched; by default the recommendation's, where
        they fit. Its u is the centre of the prior.
    spread: of the prior, in factors of ten. outside: whether start is an extrapolation, so that the guard comes first.
    slots: trials that train at the same time. trials: in all, at most; as few as the guard has leave no trial for a full run, so that
        guard "auto" then means "never".
    guard: short runs over four decades, "auto", "always" or "never". step, tolerance, noise: see `bracket_rule.Options`.
    """

    def __init__(
        self,
        search_space: Space | None = None,
        *,
        start: Mapping[str, Any] | None = None,
        spread: float | None = None,
        outside: bool | None = None,
        slots: int = 1,
        trials: int | None = None,
        seed: int | None = None,
        guard: Literal["auto", "always", "never"] = "auto",
        step: float = 0.3,
        tolerance: float = 0.0005,
        noise: float = 0.001,
    ) -> None:
        if guard not in ("auto", "always", "never"):
            raise ValueError(f"guard = {guard!r}; allowed: auto, always, never")
        for name, number in (("step", step), ("tolerance", tolerance), ("noise", noise), ("slots", slots)):
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"{name} = {number!r} must be a number above 0")
        self._space, self._start, self._seed = search_space, dict(start or {}), seed or 0
        guess = recommend(Facts()).prior
        self._spread = guess.sd if spread is None else spread
        self._outside = guess.outside if outside is None else outside
        if guard == "auto" and trials is not None and trials <= GUARD_RUNS:
            guard = "never"
        self._options = Options(slots=slots, step=step, guard=guard, tolerance=tolerance, noise=noise)

    def ready(self, study: Study) -> bool:
        """Whether it has something to run now. Raises SearchSpentError, with the reason, when it never will again."""
        if study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return True
        proposal = self.proposal(study)
        if proposal is None:
            return True
        if proposal.stop:
            raise SearchSpentError(f"The search is over: {proposal.stop}.")
        return bool(proposal.steps)

    def proposal(self, study: Study) -> Proposal | None:
        """What is to be done next, and how much is left to find; None where nothing is searched."""
        space = known_search_space(study, self._space)
        return self._proposed(study, space, None)[0] if space else None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Space:
        return known_search_space(study, self._space)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Space) -> dict[str, Any]:
        if not search_space or trial.system_attrs.get("fixed_params"):
            return {}
        proposal, params = self._proposed(study, search_space, trial.number)
        if not params:  # asked for all the same
            return {name: random_value(self._seed, trial, name, d) for name, d in search_space.items()}
        step = proposal.steps[0]
        study._storage.set_trial_system_attr(trial._trial_id, KEY, {"length": str(step.length), "why": step.why})
        return params

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        return random_value(self._seed, trial, param_name, param_distribution)

    def _proposed(self, study: Study, space: Space, number: int | None) -> tuple[Proposal, dict[str, Any]]:
        """(the proposal, its first step's parameters). A step that the space rounds to a known point has that point's result."""
        form = _Form(space, self._start)
        history = list(_history(study, form, number))
        seen = {(run.length, _key(form.params(run.u, run.at))): run for run in history}
        untuned = study._storage.get_study_system_attrs(study._study_id).get(UNTUNED)
        low, high = form.bounds
        options = replace(self._options, low=low, high=high, untuned=untuned)
        prior = Prior(centre=form.centre, sd=self._spread, outside=self._outside)
        while True:
            proposal = propose(history, prior, options, start=form.start, axes=form.axes)
            if not proposal.steps:
                return proposal, {}
            step = proposal.steps[0]
            params = form.params(step.u, step.at)
            known = seen.get((step.length, _key(params)))
            if known is None:
                return proposal, params
            placed = replace(known, u=step.u, at=step.at)
            if placed in history:  # the rule knows this result and would ask for it for ever
                return replace(proposal, steps=(), stop="the space has no other point for the next run"), {}
            history.append(placed)


class _Form:
    """A search space as the line and the axes that `propose` knows, and back."""

    def __init__(self, space: Space, start: Mapping[str, Any]) -> None:
        self._space = space
        self._on_line = [name for name in ("learning_rate", *_SCALES) if name in space]
        guess = recommend(Facts()).values
        values = {**_STANDARD, **start}
        for name, distribution in space.items():
            if name not in start:
                values[name] = _nearest(distribution, guess.get(name))
        values = _one_scale({"learning_rate": guess["learning_rate"], **values}, space, start)
        self.centre = self.u(values)
        self._values = values | {name: _nearest(distribution, values[name]) for name, distribution in space.items() if name in _SCALES}
        # A scale that the line need not move is an axis of its own; else it only carries u beyond the bounds of the learning rate.
        fixed = self._on_line[:1] if "alpha_ratio" in space else self._on_line
        self.axes = tuple(_axis(name, distribution, self._values[name]) for name, distribution in space.items() if name not in fixed)
        self.start = {axis.name: self._values[axis.name] for axis in self.axes}

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest u, at the start's place on the axes."""
        ends = [self._values, self._values]
        for name in self._on_line:
            values = _ends(self._space[name])
            ends = [{**end, name: value} for end, value in zip(ends, values, strict=True)]
        return self.u(ends[0]), self.u(ends[1])

    def u(self, values: Mapping[str, Any]) -> float:
        return effective(values["learning_rate"], scale_of(values), values["lora_r"])

    def run(self, params: Mapping[str, Any]) -> PlacedRun:
        values = {**self._values, **params}
        return PlacedRun(u=self.u(values), at={axis.name: values[axis.name] for axis in self.axes})

    def params(self, u: float, at: Mapping[str, Any]) -> dict[str, Any]:
        """The space's parameters with this u: by the learning rate as far as its bounds reach, then by the scale."""
        values = {**self._values, **at}
        for name in self._on_line:
            short = rescaled(u - self.u(values))
            if name == "learning_rate":
                wanted = learning_rate(u, scale_of(values), values["lora_r"])
                values[name] = _nearest(self._space[name], _rounded(wanted))
            elif abs(math.log10(short)) > 0.01:
                values[name] = _nearest(self._space[name], _rounded(values[name] * short))
        return {name: values[name] for name in self._space}


def _one_scale(values: dict[str, Any], space: Space, start: Mapping[str, Any]) -> dict[str, Any]:
    """Of alpha and alpha / r the one that is searched, else the ratio where it is given: the other would contradict it."""
    if "alpha_ratio" in space or ("alpha_ratio" in values and "lora_alpha" not in space):
        return {name: value for name, value in values.items() if name != "lora_alpha" or name in space}
    if "alpha_ratio" in start and "lora_alpha" not in start:
        values = {**values, "lora_alpha": start["alpha_ratio"] * values["lora_r"]}
    return {name: value for name, value in values.items() if name != "alpha_ratio"}


def _history(study: Study, form: _Form, number: int | None) -> Iterator[PlacedRun]:
    """The study's trials but the one of this number, as runs."""
    for trial in study.get_trials(deepcopy=False):
        if trial.number == number or trial.state == TrialState.WAITING or not form._space.keys() <= trial.params.keys():
            continue
        length = Fraction(trial.system_attrs.get(KEY, {}).get("length", 1))
        yield replace(form.run(trial.params), length=length, **_result(trial))


def _result(trial: FrozenTrial) -> dict[str, Any]:
    broken = any(value > 0 for value in trial.constraints.values())
    if trial.state == TrialState.RUNNING:
        return {"loss": None}
    if broken and not trial.intermediate_values:  # never trained, or out of memory
        return {"loss": math.inf, "fits": False}
    if broken or trial.state == TrialState.FAIL or trial.user_attrs.get("state") == "diverged":  # of which the storage has the worst seen
        return {"loss": math.inf}
    if trial.state == TrialState.PRUNED:
        return {"loss": trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else math.inf}
    loss = trial.value
    return {"loss": math.inf if loss is None or math.isnan(loss) else loss}


def _axis(name: str, distribution: BaseDistribution, start: Any) -> SearchAxis:
    """Its values: all where they are few, else the bounds and what lies between them in steps from the start."""
    if isinstance(distribution, CategoricalDistribution):
        if name == "target_modules" and set(distribution.choices) <= set(_LAYERS):
            return SearchAxis(name=name, values=tuple(sorted(distribution.choices, key=_LAYERS.index)))
        numbers = all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in distribution.choices)
        return SearchAxis(name=name, values=tuple(distribution.choices), ordered=numbers)
    low, high = _ends(distribution)
    count = number_of_values(distribution)
    if count is not None and count <= _FINE:
        return SearchAxis(name=name, values=tuple(value_at(distribution, i) for i in range(count)))
    if low > 0 and (getattr(distribution, "log", False) or high / low >= 8):
        values = [start * 2.0**i for i in range(-_FINE, _FINE + 1)]
    else:
        values = [start + (high - low) / 8 * i for i in range(-8, 9)]
    within = {_nearest(distribution, value) for value in values if low <= value <= high}
    return SearchAxis(name=name, values=tuple(sorted(within | {start})))


def _nearest(distribution: BaseDistribution, wanted: Any) -> Any:
    """The distribution's value nearest to the one wanted, of positive numbers by their ratio; without one, its middle."""
    if isinstance(distribution, CategoricalDistribution):
        if wanted in distribution.choices:
            return wanted
        numbers = [c for c in distribution.choices if isinstance(c, int | float) and not isinstance(c, bool)]
        if not numbers or not isinstance(wanted, int | float):
            return distribution.choices[0]
        return min(numbers, key=lambda choice: _distance(choice, wanted))
    low, high = _ends(distribution)
    value = (math.sqrt(low * high) if low > 0 else (low + high) / 2) if not isinstance(wanted, int | float) else min(max(wanted, low), high)
    step = distribution.step if isinstance(distribution, IntDistribution | FloatDistribution) else None
    if step:
        value = min(high, low + round((value - low) / step) * step)
    return int(value) if isinstance(distribution, IntDistribution) else float(value)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS - 1}e}")


def _distance(a: float, b: float) -> float:
    return abs(math.log(a / b)) if a > 0 and b > 0 else abs(a - b)


def _ends(distribution: BaseDistribution) -> tuple[Any, Any]:
    if isinstance(distribution, CategoricalDistribution):
        numbers = sorted(c for c in distribution.choices if isinstance(c, int | float))
        return (numbers[0], numbers[-1]) if numbers else (distribution.choices[0], distribution.choices[-1])
    assert isinstance(distribution, IntDistribution | FloatDistribution)  # noqa: S101  # Optuna has no other
    return distribution.low, distribution.high


def _key(params: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((name, float(f"{v:.12g}") if isinstance(v, float) else v) for name, v in sorted(params.items()))


def length_of(trial: FrozenTrial) -> Fraction:
    """The share of a full run that the trial is to be trained."""
    return Fraction(trial.system_attrs.get(KEY, {}).get("length", 1))
