"""Two multi-fidelity searches from the literature that take the same prior, for search_on_tables.py: PriorBand and BoTorch.

PriorBand (Mallik et al., NeurIPS 2023; NePS): new configurations of ASHA are drawn at random, from the prior, or around the best
so far, by weights that shift from the prior to the best as the good configurations lie nearer to it. The rule of NePS 0.17
(`priorband.py`), which itself needs gpytorch 1.13 and pandas below 3.

BoTorch: a Gaussian process over configuration and length (`SingleTaskMultiFidelityGP`) whose mean is the prior's parabola in u,
moved by the length; the next run is the highest augmented expected improvement per cost (Huang et al., 2006),
EI(x at full length) x correlation(short, full) / (cost + 0.05), among short runs; each third of a full run spent on these is
followed by a full run where the model expects the lowest loss (left to itself the rule hardly ever takes a full run: with
correlations near one the cheapest wins). Optional: pip install botorch.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
from recorded import Point, Table, ratio_of

from loratune import schedules
from loratune.samplers.prior import Prior, effective, public_findings
from loratune.schedules import SliceResult

ETA = 3
SPREAD = 0.25  # of the unit range: NePS's prior of medium confidence, and its mutations
DESIGN = 9  # short runs before BoTorch's model
OVERHEAD = 0.05  # full runs, of a cost
SHARE = 1 / 3  # of a full run, spent on short ones before the next full one


class Cube:
    """A table's space as [0, 1]^d; the first coordinate is u, over the decades of the learning rate around the prior's centre."""

    def __init__(self, table: Table, prior: Prior, to_space: Callable[..., dict[str, Any]]) -> None:
        self._table, self._prior, self._to_space = table, prior, to_space
        rate = table.space.parameters["learning_rate"]
        self.decades = math.log10(rate.high / rate.low)
        self._others = {name: p for name, p in table.space.parameters.items() if name != "learning_rate"}

    def u(self, x: np.ndarray) -> np.ndarray:
        return self._prior.centre + (x[..., 0] - 0.5) * self.decades

    def place(self, point: Point) -> np.ndarray:
        u = effective(point["learning_rate"], ratio_of(point), point["lora_r"])
        return np.array([(u - self._prior.centre) / self.decades + 0.5, *(self._unit(p, point[name]) for name, p in self._others.items())])

    def point(self, x: np.ndarray) -> dict[str, Any]:
        values = {name: self._value(p, float(share)) for (name, p), share in zip(self._others.items(), x[1:], strict=True)}
        u = float(self.u(x))
        return self._to_space(self._table, {**values, "alpha_ratio": ratio_of(values), "learning_rate": 10**u}, u)

    def from_prior(self, random: np.random.Generator, guess: np.ndarray) -> np.ndarray:
        return self.near(random, guess, np.r_[self._prior.sd / self.decades, np.full(len(guess) - 1, SPREAD)])

    def near(self, random: np.random.Generator, centre: np.ndarray, spread: Any = SPREAD) -> np.ndarray:
        return np.clip(centre + spread * random.normal(size=len(centre)), 0.0, 1.0)

    @staticmethod
    def _list(p: Any) -> list[Any]:
        return list(p.values if p.type == "ordinal" else p.choices) if p.type in ("ordinal", "categorical") else []

    def _unit(self, p: Any, value: Any) -> float:
        if choices := self._list(p):
            return choices.index(value) / max(1, len(choices) - 1)
        low, high, value = (math.log(v) if p.log else v for v in (p.low, p.high, value))
        return (value - low) / (high - low)

    def _value(self, p: Any, share: float) -> Any:
        if choices := self._list(p):
            return choices[round(share * (len(choices) - 1))]
        low, high = (math.log(v) if p.log else v for v in (p.low, p.high))
        value = low + share * (high - low)
        return math.exp(value) if p.log else value


def priorband(ledger: Any, guess: Point, prior: Prior, to_space: Callable[..., dict[str, Any]]) -> None:
    """ASHA on complete short runs from 1/27 of what PriorBand draws; the guess first."""
    table, cube, random = ledger.table, Cube(ledger.table, prior, to_space), np.random.default_rng([ledger.seed, 28])
    schedule = schedules.build(
        "halving", trials=10**6, baseline=False, fidelity="budget", reduction_factor=ETA, min_resource=Fraction(1, 27)
    )
    lengths = [Fraction(text) for text in table.about["lengths"]]
    centre, drawn, losses = cube.place(guess), dict[int, np.ndarray](), dict[int, dict[int, float]]()  # losses: by length, by trial

    def density(x: np.ndarray, around: np.ndarray, sd: np.ndarray) -> float:
        return float(np.exp(-(((x - around) / sd) ** 2) / 2).prod() / sd.prod())

    def draw() -> np.ndarray:
        wide, narrow = np.full(len(centre), SPREAD), np.r_[prior.sd / cube.decades, np.full(len(centre) - 1, SPREAD)]
        share = 0.0  # of the best, of what is not random
        best = None
        if len(losses.get(len(lengths) - 1, {})) and any(len(rung) >= ETA for rung in losses.values()):
            rung = losses[max(length for length, rung in losses.items() if len(rung) >= ETA)]
            good = sorted(rung, key=lambda trial: rung[trial])[: len(rung) // ETA]
            longest = losses[max(losses)]
            best = drawn[min(longest, key=lambda trial: longest[trial])]
            weights = np.arange(len(good), 0, -1)
            by_best, by_prior = (
                float(weights @ [density(drawn[trial], around, sd) for trial in good]) for around, sd in ((best, wide), (centre, narrow))
            )
            share = by_best / (by_best + by_prior) if by_best + by_prior > 0 else 0.5
        if random.random() < 0.5:  # 1 / (1 + ETA^0): every new one starts on the first rung
            return random.random(len(centre))
        if best is None or random.random() >= share:
            return cube.from_prior(random, centre)
        return np.where(random.random(len(centre)) < 0.5, cube.near(random, best), best)

    while (slice := schedule.next(may_start=True)) is not None:
        if slice.trial not in drawn:
            drawn[slice.trial] = draw() if slice.trial else centre
        length = lengths.index(slice.length)
        loss = ledger.evaluate(guess if slice.trial == 0 else cube.point(drawn[slice.trial]), length)
        losses.setdefault(length, {})[slice.trial] = loss
        schedule.tell(slice, SliceResult(loss=loss))


def botorch_search(ledger: Any, guess: Point, prior: Prior, to_space: Callable[..., dict[str, Any]]) -> None:
    """BoTorch's multi-fidelity Gaussian process with the prior as its mean."""
    try:
        import torch
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskMultiFidelityGP
        from gpytorch.mlls import ExactMarginalLogLikelihood
    except ImportError as error:
        raise SystemExit(f"The search 'BoTorch' needs botorch (pip install botorch): {error}") from None
    table, cube, random = ledger.table, Cube(ledger.table, prior, to_space), np.random.default_rng([ledger.seed, 29])
    torch.manual_seed(ledger.seed)
    centre, found = cube.place(guess), public_findings()
    costs = np.array(table.lengths)
    fidelities = 1 + np.log(costs) / -math.log(costs[0])  # 0 to 1
    untuned = table.about["untuned_loss"]

    def mean(x: np.ndarray) -> np.ndarray:
        """The prior's parabola; last column: the fidelity."""
        lower = found["length"]["shift"] * (1 - x[:, -1]) * -math.log10(costs[0])
        return np.asarray(found["curvature"]["value"] * np.minimum((cube.u(x) - prior.centre + lower) ** 2, 4.0))

    def run(x: np.ndarray, length: int) -> None:
        loss = min(ledger.evaluate(cube.point(x), length), untuned)
        rows.append(np.r_[x, fidelities[length]])
        seen.append(loss)

    rows, seen, state = list[np.ndarray](), list[float](), None
    run(centre, 0)
    for _ in range(DESIGN - 1):
        run(cube.from_prior(random, centre), 0)
    fit_at, short = 0, DESIGN * costs[0]
    while True:
        x, loss = np.array(rows), np.array(seen)
        residual = loss - mean(x)
        shift, scale = residual.mean(), residual.std() + 1e-9
        targets = torch.tensor((residual - shift) / scale)[:, None]
        model = SingleTaskMultiFidelityGP(
            torch.tensor(x), targets, data_fidelities=[x.shape[1] - 1], linear_truncated=False, outcome_transform=None
        )
        if len(loss) >= fit_at:
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
            state, fit_at = model.state_dict(), math.ceil(1.25 * len(loss))
        else:
            model.load_state_dict(state)
        incumbent = rows[int(np.argmin(loss - 10 * x[:, -1]))][:-1]  # of the longest
        drawn = [cube.from_prior(random, centre) for _ in range(120)] + [cube.near(random, incumbent, 0.1) for _ in range(80)]
        new = np.array([*drawn, *random.random((40, len(centre)))])

        def at(points: np.ndarray, fidelity: float) -> np.ndarray:
            return np.c_[points, np.full(len(points), fidelity)]

        def expected(points: np.ndarray, means: Any, shift: float = shift, scale: float = scale) -> np.ndarray:
            return np.asarray(means.numpy().ravel() * scale + shift + mean(points))

        with torch.no_grad():
            known = at(np.unique(x[:, :-1], axis=0), 1.0)
            lowest = expected(known, model.posterior(torch.tensor(known)).mean).min()
            full = at(new, 1.0)
            scores = []
            for fidelity, cost in zip(fidelities[:-1], costs[:-1], strict=True):
                belief = model.posterior(torch.tensor(np.stack([at(new, fidelity), full], axis=1)))
                covariance = belief.distribution.covariance_matrix.numpy()
                deviation = np.sqrt(np.maximum(covariance[:, 1, 1], 1e-12))
                alike = covariance[:, 0, 1] / np.sqrt(np.maximum(covariance[:, 0, 0], 1e-12)) / deviation
                means = expected(full, belief.mean[:, 1, 0])
                scores.append(_improvement(lowest - means, deviation * scale) * np.clip(alike, 0.0, 1.0) / (cost + OVERHEAD))
        if short >= SHARE - 1e-9:
            run(new[int(np.argmin(means))], len(costs) - 1)
            short = 0.0
        else:
            length, place = np.unravel_index(int(np.argmax(scores)), (len(costs) - 1, len(new)))
            run(new[place], int(length))
            short += costs[length]


def _improvement(gain: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """E max(0, x) of x normal around `gain` (Mockus, 1978)."""
    from scipy.stats import norm

    z = gain / deviation
    return np.asarray(gain * norm.cdf(z) + deviation * norm.pdf(z))
