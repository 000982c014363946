"""The search for the price of three runs: a guess, a bracket around it, the vertex of a parabola, then one question at a time.

A pure function of what has been run: `propose` takes the history and says what to run next, or to stop. `BracketSampler`
(`bracket_sampler.py`) asks it for an Optuna study; a replay on a recorded table calls it as it is.

    line       full runs at u = centre, centre + d, centre - d; downhill in steps of d until the best one has neighbours on both
               sides, then the vertex of the parabola through these three (Brent, Algorithms for Minimization without
               Derivatives, 1973, chapter 5, without the golden section: runs are too dear for a guarantee)
    guard      where the model lies outside what the prior knows, or the first runs look wrong: complete short runs over four
               decades of u. Their minimum is weighed against the prior, never obeyed (`bracket_guard.py`)
    questions  at the best u: the neighbours of the best point on every other axis, the most promising first
    stop       when the expected improvement of the best next run, E max(0, best - loss) with the loss normal around the
               parabola (Mockus, 1978), falls below a tolerance
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from loratune.samplers.prior import Prior, public_findings

_SAME = 0.02  # factors of ten: two learning rates nearer than this are one
_WAVE = 3  # runs that are worth starting at once
_SURE = 1.2816  # standard deviations below which nine in ten values of a normal distribution lie


@dataclass(frozen=True, kw_only=True)
class PlacedRun:
    """A configuration and what became of it."""

    u: float  # log10 of the effective learning rate, `prior.effective`
    at: Mapping[str, Any] = field(default_factory=dict)  # its values on the other axes
    loss: float | None = None  # nats; infinite: diverged or failed; None: in training
    length: Fraction = Fraction(1)  # share of a full run
    fits: bool = True  # False: refused by a constraint, or out of memory


@dataclass(frozen=True, kw_only=True)
class SearchAxis:
    """A parameter other than u that the space leaves free."""

    name: str
    values: tuple[Any, ...]  # in order, where they have one
    ordered: bool = True


@dataclass(frozen=True, kw_only=True)
class Options:
    """The rule's settings; u in factors of ten, losses in nats."""

    slots: int = 1  # runs that can be in training together
    step: float = 0.2  # of the bracket, one run at a time
    wave_step: float = 0.3  # of the bracket, several at once
    guard: Literal["auto", "always", "never"] = "auto"
    guard_points: int = 9
    guard_decades: float = 4.0
    guard_length: Fraction = Fraction(1, 27)
    tolerance: float = 0.0005  # expected improvement below which the search stops
    noise: float = 0.001  # standard deviation of a full run's loss
    low: float = -math.inf  # what u can be, by the bounds of the space
    high: float = math.inf
    untuned: float | None = None  # the base model's loss


@dataclass(frozen=True, kw_only=True)
class Step:
    """What to run."""

    u: float
    at: Mapping[str, Any] = field(default_factory=dict)
    length: Fraction = Fraction(1)
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What to run next, all at once if there are places; nothing: wait for what is in training, or, with `stop`, for ever."""

    steps: tuple[Step, ...] = ()
    stop: str = ""  # why the search is over
    phase: str = ""  # guard | line | questions
    best: PlacedRun | None = None  # the full run of the lowest loss
    expected: float = math.inf  # improvement by the next run, nats
    left: float = math.inf  # improvement that is left to find; with 90 % not more than this


def propose(
    history: Sequence[PlacedRun], prior: Prior, options: Options, *, start: Mapping[str, Any] | None = None, axes: Sequence[SearchAxis] = ()
) -> Proposal:
    """The next runs. A function of its arguments: the same history, the same answer.

    start: values on the axes with which the search begins; the line is searched there.
    """
    from loratune.samplers.bracket_guard import missing, weighed

    at = _fitting(start or {}, axes, history)
    if at is None:
        return Proposal(stop="nothing fits: the smallest rank broke a constraint or ran out of memory")
    here = [run for run in history if run.fits and run.at == at]
    line = sorted((run for run in here if run.length == 1), key=lambda run: run.u)
    known = [run for run in line if run.loss is not None]
    guards = [run for run in here if run.length < 1]
    best = min((run for run in history if _finite(run) and run.length == 1), key=lambda run: run.loss or 0.0, default=None)

    wrong, before = _wrong(known, prior, options), prior
    if options.guard == "always" or (options.guard == "auto" and (guards or prior.outside or wrong)):
        todo = missing(guards, prior.centre, options)
        if todo or any(run.loss is None for run in guards):
            steps = tuple(
                Step(u=u, at=at, length=options.guard_length, why="a short run, to see where the learning rate lies") for u in todo
            )
            return Proposal(steps=steps, phase="guard", best=best)
        if not any(_finite(run) for run in guards):
            return Proposal(stop="no short run learned anything at any learning rate", phase="guard", best=best)
        prior = weighed(prior if prior.outside else Prior(centre=prior.centre, sd=max(prior.sd, 1.0), outside=True), guards, options)
    lean = -1.0 if guards and prior.centre < before.centre else 1.0  # the short runs pull further than the posterior went
    asked = _line(known, prior, options, lean, guarded=bool(guards))
    flying = [run for run in history if run.loss is None and run.fits]
    free = min(options.slots, _WAVE) - len(flying)
    if asked.expected >= options.tolerance:
        new = [u for u in asked.points if all(abs(u - run.u) > _SAME for run in line)][: max(0, free)]
        if new or flying:
            steps = tuple(Step(u=u, at=at, why=asked.why) for u in new)
            return Proposal(steps=steps, phase="line", best=best, expected=asked.expected, left=asked.left)
    if best is None:
        return Proposal(stop="no run was trained to its end", phase="line")
    questions = _questions(best, [run for run in history if run.length == 1], axes)
    worth = [question for question in questions if question.expected >= options.tolerance]
    left = math.hypot(asked.left, *(_SURE * question.sd for question in questions[:1]))
    expected = max([question.expected for question in questions], default=min(asked.expected, options.tolerance))
    if worth:
        return Proposal(steps=tuple(q.step for q in worth[: max(0, free)]), phase="questions", best=best, expected=expected, left=left)
    if flying:
        return Proposal(phase="questions", best=best, expected=expected, left=left)
    stop = f"a further run is expected to lower the loss by {expected:.4f}, less than {options.tolerance:g}"
    return Proposal(stop=stop, phase="questions", best=best, expected=expected, left=left)


@dataclass(frozen=True)
class _Probe:
    """Where on the line to run next, the most useful first."""

    points: list[float]
    expected: float
    left: float
    why: str


def _line(known: list[PlacedRun], prior: Prior, options: Options, lean: float, guarded: bool) -> _Probe:
    """`known`: full runs at one place of the other axes, ascending u, all with a loss.

    lean: 1 or -1, the side that is tried first. guarded: the prior has seen short runs.
    """
    d = max(options.step if options.slots == 1 else options.wave_step, 0.7 * min(prior.sd, 0.7))
    centre = min(max(prior.centre, options.low), options.high)
    curvature = public_findings()["curvature"]["value"]
    unknown = curvature * prior.sd**2  # mean regret of a guess
    if not any(_finite(run) for run in known):
        if not known:
            points, why = [centre, centre + lean * d, centre - lean * d], "the guess"
        else:  # all diverged: lower, and lower
            points, why = [known[0].u - 2 * d * 2**i for i in range(3)], "lower, as the others diverged"
        return _Probe(_within(points, options), math.inf, math.inf, why)
    if guarded and all(abs(run.u - centre) > d for run in known):
        return _Probe([centre], math.inf, math.inf, "where the short runs and the prior see the best learning rate")
    best = min(range(len(known)), key=lambda i: _loss(known[i]))
    here = known[best].u
    below, above = known[best - 1] if best else None, known[best + 1] if best + 1 < len(known) else None
    ended = [below is None and here > options.low + _SAME, above is None and here < options.high - _SAME]
    if any(ended):
        far = 2 if len(known) > 3 else 1  # longer steps, where the first ones ran to the bracket's end
        down, up = [here - far * d * i for i in (1, 2)], [here + far * d * i for i in (1, 2)]
        both = [up[0], down[0]][:: int(lean)]
        # Of fewer slots than a wave has, one waits: a run that the next result would have spared costs more than an idle slot.
        points = (both if all(ended) else down if ended[0] else up)[: 2 if options.slots >= _WAVE else 1]
        other = below or above
        fell = _loss(other) - _loss(known[best]) if other is not None and _finite(other) else 0.0
        left = max(_SURE**2 * 1.65 * unknown, 2 * fell)
        return _Probe(_within(points, options), max(unknown, fell / 2), left, "a step of the bracket")
    if below is None or above is None:  # at a bound of the space
        return _Probe([], 0.0, options.noise * _SURE, "")
    return _vertex(below, known[best], above, options)


def _vertex(below: PlacedRun, middle: PlacedRun, above: PlacedRun, options: Options) -> _Probe:
    """The lowest point of the parabola through three runs, of which the middle one is the lowest."""
    a, b, c = below.u - middle.u, 0.0, above.u - middle.u
    low = _loss(middle)
    rises = [_loss(run) - low for run in (below, above)]
    finite = [rise for rise in rises if math.isfinite(rise)]
    most = 10 * max([*finite, options.noise])  # a diverged neighbour: steep, but not a wall
    left, right = (min(rise, most) for rise in rises)
    # loss - low = p x^2 + q x through (a, left), (0, 0), (c, right)
    p = (left / a - right / c) / (a - c)
    q = right / c - p * c
    at = -q / (2 * p) if p > 0 else b
    at = min(max(at, 0.9 * a), 0.9 * c)
    gain = max(0.0, -(p * at * at + q * at))
    spread = math.hypot(options.noise, gain / 4)  # of the vertex: noise, and how far a valley is from a parabola
    remaining = gain + _SURE * spread
    if any(abs(at - other) <= _SAME for other in (a, b, c)):
        return _Probe([], 0.0, remaining, "")
    return _Probe([middle.u + at], _improvement(gain, spread), remaining, "the vertex of the parabola")


@dataclass(frozen=True)
class _Question:
    step: Step
    expected: float
    sd: float


def _questions(best: PlacedRun, runs: list[PlacedRun], axes: Sequence[SearchAxis]) -> list[_Question]:
    """The best point's untried neighbours on every axis, the most promising first."""
    known, found = public_findings()["questions"], []
    for axis in axes:
        here = best.at.get(axis.name)
        if here not in axis.values:
            continue
        place = axis.values.index(here)
        near = [place + 1, place - 1] if axis.ordered else [i for i in range(len(axis.values)) if i != place]
        sds = known.get(axis.name, known["other"])
        tried = {run.at.get(axis.name) for run in runs}
        worse = sum(value in tried and value != here for value in axis.values)
        for i in near:
            value = axis.values[i] if 0 <= i < len(axis.values) else here
            if value not in tried:
                sd = sds["up" if i > place else "down"]
                expected = _improvement(0.0, sd) / (1 + worse)  # each answer that was no better makes the next less likely to be
                step = Step(u=best.u, at={**best.at, axis.name: value}, why=f"{axis.name} {value}, at the best learning rate")
                found.append(_Question(step, expected, sd))
    ranked = sorted(found, key=lambda question: -question.expected)
    return [q for i, q in enumerate(ranked) if not any(_axis(q, best) == _axis(earlier, best) for earlier in ranked[:i])]


def _axis(question: _Question, best: PlacedRun) -> str:
    return next(name for name, value in question.step.at.items() if value != best.at.get(name))


def _fitting(start: Mapping[str, Any], axes: Sequence[SearchAxis], history: Sequence[PlacedRun]) -> Mapping[str, Any] | None:
    """`start`, with a lower rank as long as it does not fit; None where nothing does."""
    ranks = next((axis.values for axis in axes if axis.name == "lora_r"), ())
    at = dict(start)
    while any(not run.fits and run.at == at for run in history):
        place = ranks.index(at["lora_r"]) if at.get("lora_r") in ranks else 0
        if place == 0:
            return None
        at["lora_r"] = ranks[place - 1]
    return at


def _wrong(known: list[PlacedRun], prior: Prior, options: Options) -> bool:
    """Whether the first full runs say that the prior is wrong: the guess is no better than no tuning, or the best lies far out and last."""
    if not known:
        return False
    best = min(known, key=_loss)
    if not _finite(best) or (options.untuned is not None and _loss(best) >= options.untuned - 2 * options.noise):
        return True
    last = best in (known[0], known[-1]) and len(known) > 2
    return last and abs(best.u - prior.centre) >= 2 * prior.sd and options.low + _SAME < best.u < options.high - _SAME


def _improvement(gain: float, spread: float) -> float:
    """E max(0, x) of x normal around `gain`."""
    if spread <= 0:
        return max(0.0, gain)
    z = gain / spread
    return gain * 0.5 * math.erfc(-z / math.sqrt(2)) + spread * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _within(points: Sequence[float], options: Options) -> list[float]:
    clamped = (min(max(point, options.low), options.high) for point in points)
    return list(dict.fromkeys(clamped))


def _finite(run: PlacedRun) -> bool:
    return run.fits and run.loss is not None and math.isfinite(run.loss)


def _loss(run: PlacedRun) -> float:
    return math.inf if run.loss is None else run.loss
