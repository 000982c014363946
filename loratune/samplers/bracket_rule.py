"""The search for the price of three runs: a guess, a bracket around it, the vertex of a parabola, then one question at a time.

A pure function of what has been run: `propose` takes the history and says what to run next, or to stop. `BracketSampler`
(`bracket_sampler.py`) asks it for an Optuna study; a replay on a recorded table calls it as it is.

    guard      where the model lies outside what the prior knows, or the first runs look wrong: complete short runs over four
               decades of u. Their minimum is weighed against the prior, never obeyed (`bracket_guard.py`)
    line       a full run at u = centre and one a step d beside it; then the vertex of the parabola that these and the prior
               make likely, or, where that is nowhere new, a step to the other side, until the best run's expected regret is
               below the tolerance (`bracket_line.py`)
    questions  at the best u: the neighbours of the best point on every other axis, the most promising first
    stop       when no run is expected to lower the loss by more than the tolerance: on the line by the regret there, of a
               question by E max(0, gain), the gain normal (Mockus, 1978)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from loratune.samplers.bracket_line import believe
from loratune.samplers.prior import Prior, public_findings

_SAME = 0.02  # factors of ten: two learning rates nearer than this are one
_WAVE = 3  # runs that are worth starting at once
_SURE = 0.9  # probability of what is said to be left to find
_DEVIATIONS = 1.2816  # below which that share of a normal distribution lies
_STEPS = 2  # of an axis that may each lower the loss
_LONGEST = 0.5  # factors of ten: step of the bracket

GUARD_RUNS = 7  # short runs of a guard as a rule: five points of the grid, two beside the best


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
    step: float = 0.3  # of the bracket
    guard: Literal["auto", "always", "never"] = "auto"
    guard_points: int = 9  # of the grid
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
    known = sorted((run for run in here if run.length == 1 and run.loss is not None), key=lambda run: run.u)
    guards = [run for run in here if run.length < 1]
    best = min((run for run in history if _finite(run) and run.length == 1), key=lambda run: run.loss or 0.0, default=None)

    gained = _gained(history, options)
    wrong, before = _wrong(known, prior, options), prior
    if options.guard == "always" or (options.guard == "auto" and (guards or prior.outside or wrong)):
        grid = missing(guards, prior.centre, options)
        if grid or any(run.loss is None for run in guards):
            steps = tuple(
                Step(u=u, at=at, length=options.guard_length, why="a short run, to see where the learning rate lies") for u in grid
            )
            return Proposal(steps=steps, phase="guard", best=best)
        if not any(_finite(run) for run in guards):
            return Proposal(stop="no short run learned anything at any learning rate", phase="guard", best=best)
        prior = weighed(prior if prior.outside else Prior(centre=prior.centre, sd=max(prior.sd, 1.0), outside=True), guards, options)
    lean = -1.0 if guards and prior.centre < before.centre else 1.0  # the short runs pull further than the posterior went
    place = best.at if best else at
    full = [run for run in history if run.length == 1 and run.fits]
    asked = _line(full, place, prior, curvature(gained), options, lean)
    taken = [run.u for run in history if run.length == 1 and run.at == place]  # refused ones too: nobody asks twice
    line = [Step(u=u, at=place, why=asked.why) for u in asked.points if not any(abs(u - other) <= _SAME for other in taken)]
    refused = [run.at for run in history if not run.fits]
    questions, held = _questions(best, asked.u, full, refused, axes, (gained or 0.0) if prior.outside else 0.0) if best else ([], [])
    worth = [question.step for question in questions if question.expected >= options.tolerance]
    promised = max((question.expected for question in questions), default=0.0)
    expected, left = max(asked.expected, promised), math.hypot(asked.left, *(_STEPS * _DEVIATIONS * sd for sd in held))
    flying = [run for run in history if run.loss is None and run.fits]
    free = max(0, min(options.slots, _WAVE) - len(flying))
    leads = asked.expected >= max(promised, options.tolerance) and (line or flying)
    todo = [*line, *worth] if leads else [*worth, *line] if asked.expected >= options.tolerance else worth
    if options.slots < _WAVE and leads:
        todo = line  # an idle slot costs less than a run that the next result would have spared
    if todo or flying:
        phase: Literal["line", "questions"] = "line" if leads else "questions"
        return Proposal(steps=tuple(todo[:free]), phase=phase, best=best, expected=expected, left=left)
    if best is None:
        return Proposal(stop="no run was trained to its end", phase="line")
    stop = f"a further run is expected to lower the loss by {promised:.4f}, less than {options.tolerance:g}"
    return Proposal(stop=stop, phase="questions", best=best, expected=promised, left=left)


@dataclass(frozen=True)
class _Probe:
    """Where on the line to run next, the most useful first; nothing: the line is done."""

    points: list[float]
    expected: float
    left: float
    u: float  # the lowest expected loss
    why: str = ""


def _line(full: list[PlacedRun], place: Mapping[str, Any], prior: Prior, curvature: float, options: Options, lean: float) -> _Probe:
    """What to run next at `place`. lean: 1 or -1, the side that is tried first."""
    d = min(max(options.step, 0.7 * prior.sd), _LONGEST)
    centre = min(max(prior.centre, options.low), options.high)
    done = sorted((run for run in full if run.loss is not None), key=lambda run: run.u)
    there = [run.u for run in done if run.at == place and _finite(run)]
    if not done:
        return _Probe(_within([centre, centre + lean * d, centre - lean * d], options), math.inf, math.inf, centre, "the guess")
    if not there:
        lower = [done[0].u - 2 * d * 2**i for i in range(3)]
        return _Probe(_within(lower, options), math.inf, math.inf, centre, "lower, as the others diverged")
    places = [[(run.u, _loss(run)) for run in done if run.at == other] for other in _places(done)]
    belief = believe(places, prior, curvature, options.noise, (options.low, options.high))
    here = min(there, key=belief.regret)
    expected, vertex = belief.regret(here), belief.lowest
    unknown = _DEVIATIONS * math.sqrt(2) * belief.noise  # of the difference of two runs
    left = math.hypot(belief.regret_quantile(here, _SURE), unknown)
    side = lean if abs(vertex - here) <= _SAME else math.copysign(1.0, vertex - here)
    steps = [u for u in (here + side * d, here - side * d) if not any(abs(u - run.u) < d / 2 for run in done)]
    gain = expected - belief.regret(vertex)
    if gain >= options.tolerance and not any(abs(vertex - u) <= _SAME for u in there):
        points = [vertex, *steps] if options.slots >= _WAVE else [vertex]
        return _Probe(_within(points, options), max(gain, expected / 2), left, vertex, "the vertex of the parabola")
    points = [u for u in _within(steps, options) if abs(u - here) > _SAME][: 2 if options.slots >= _WAVE else 1]
    # A step finds what is left in two runs: itself, and the vertex that it leads to.
    return _Probe(points, expected / 2 if points else 0.0, left, vertex, "a step of the bracket")


def _places(runs: Sequence[PlacedRun]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for run in runs:
        if run.at not in found:
            found.append(run.at)
    return found


@dataclass(frozen=True)
class _Question:
    step: Step
    expected: float


def _questions(
    best: PlacedRun, u: float, runs: list[PlacedRun], refused: list[Mapping[str, Any]], axes: Sequence[SearchAxis], gained: float
) -> tuple[list[_Question], list[float]]:
    """(the best point's untried neighbours, of each axis the most promising, that first; standard deviation of what each axis holds).

    u: where they would be run. refused: places that do not fit, where nothing is asked or hoped for. gained: nats, where what a
    step gains is a share of what tuning gained; else 0. An answer that was no better makes the next less likely to be, and what
    the axis holds smaller; not nothing, for it was one noisy run.
    """
    known, found, held = public_findings()["questions"], [], []
    for axis in axes:
        here = best.at.get(axis.name)
        if here not in axis.values:
            continue
        place = axis.values.index(here)
        near = [place + 1, place - 1] if axis.ordered else [i for i in range(len(axis.values)) if i != place]
        sds = known.get(axis.name, known["other"])
        tried = {run.at.get(axis.name) for run in runs}
        worse = sum(value in tried and value != here for value in axis.values)
        steps = []
        for i in near:
            if 0 <= i < len(axis.values) and {**best.at, axis.name: axis.values[i]} not in refused:
                sd = max(sds["nats"], sds["share_up" if i > place else "share_down"] * gained)
                steps.append((sd / (1 + worse), axis.values[i]))
        held.append(max((sd for sd, _ in steps), default=0.0))
        promising = max((step for step in steps if step[1] not in tried), key=lambda step: step[0], default=None)
        if promising is not None:
            sd, value = promising
            step = Step(u=u, at={**best.at, axis.name: value}, why=f"{axis.name} {value}, at the best learning rate")
            found.append(_Question(step, _improvement(0.0, sd)))
    return sorted(found, key=lambda question: -question.expected), held


def _gained(history: Sequence[PlacedRun], options: Options) -> float | None:
    """Nats by which tuning has lowered the loss so far; None: not known."""
    losses = [run.loss for run in history if _finite(run) and run.loss is not None]
    return max(0.0, options.untuned - min(losses)) if losses and options.untuned is not None else None


def curvature(gained: float | None) -> float:
    """Of the line, nats per squared factor of ten."""
    known = public_findings()["curvature"]
    return max(float(known["value"]), float(known["share"]) * (gained or 0.0))


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
