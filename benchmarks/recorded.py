"""Recorded fine-tuning problems as functions: the loss of any configuration, at any recorded length, with the noise of a seed.

A table holds some hundred configurations; a search proposes others. What lies between is read off a Gaussian process per
length (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, chapters 2 and 5): Matern 5/2, one length
scale per feature, maximum a posteriori. Features: log10 of the effective rate u = lr (alpha / r) r^0.6, log10 alpha / r,
log2 r, dropout and whether it silences the adapter, target modules. The target is y = log(loss - lowest + c), so that
thousandths count near the bottom and not at the top; c is what makes left-out losses of full runs most likely. A diverged
run counts as the worst loss of its table.

The regret of a configuration is its surrogate's loss without noise less that of the best recorded one, and not below 0: best
"of so many full runs", not the lowest point of an extrapolation. What a search sees has noise on top, the same for the same
configuration, length and seed: a difference of two seeds' recorded y, drawn at random, divided by sqrt 2; where no second
seed was recorded, a normal number of the process's own noise.
"""

import functools
import itertools
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import cho_solve, cholesky
from scipy.optimize import minimize

from loratune.spec.space import SearchSpace

HERE = Path(__file__).resolve().parent
SOFTNESS = (0.003, 0.03, 0.3)  # nats
Point = Mapping[str, Any]  # learning_rate, lora_r, lora_dropout, alpha_ratio or lora_alpha, target_modules


def ratio_of(point: Point) -> float:
    """alpha / r."""
    return float(point["alpha_ratio"] if "alpha_ratio" in point else point["lora_alpha"] / point["lora_r"])


def features(point: Point) -> list[float]:
    rate, ratio, rank = math.log10(point["learning_rate"]), math.log10(ratio_of(point)), math.log2(point["lora_r"])
    dropout = math.log10(max(point["lora_dropout"], 1e-5))  # 0 stands a factor of ten below the lowest
    silenced = float(point["lora_dropout"] == 1)
    return [rate + ratio + 0.6 * rank * math.log10(2), ratio, rank, dropout, silenced, float(point.get("target_modules") == "all-linear")]


class Process:
    """Gaussian-process regression with a constant mean. `x` in features, `y` plain."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self._low, self._high = x.min(axis=0), x.max(axis=0)
        self._x, self._mean, self._sd = self._scaled(x), float(y.mean()), float(y.std())
        self._y = (y - self._mean) / self._sd
        self._apart = (self._x[:, None, :] - self._x[None, :, :]) ** 2
        start = np.concatenate([np.zeros(x.shape[1]), [0.0, -4.0]])
        bounds = [(-2.5, 3.0)] * x.shape[1] + [(-2.0, 3.0), (-12.0, 0.0)]
        self.theta = minimize(self._loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 40}).x
        kernel, _ = _matern(self._apart, self.theta)
        self._inverse = np.linalg.inv(kernel + np.exp(self.theta[-1]) * np.eye(len(y)))
        self._weights = self._inverse @ self._y

    @property
    def noise(self) -> float:
        """Standard deviation, in y's unit."""
        return float(np.exp(self.theta[-1] / 2) * self._sd)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Posterior mean."""
        apart = (self._scaled(x)[:, None, :] - self._x[None, :, :]) ** 2
        return self._mean + self._sd * (_matern(apart, self.theta)[0] @ self._weights)

    def left_out(self) -> tuple[np.ndarray, float]:
        """The prediction of each point from all others (equation 5.12), and the mean log density of y under these (5.10)."""
        variance = 1 / np.diag(self._inverse)
        error = self._weights * variance
        density = -0.5 * np.log(2 * np.pi * variance) - 0.5 * error**2 / variance - np.log(self._sd)
        return self._mean + self._sd * (self._y - error), float(density.mean())

    def _scaled(self, x: np.ndarray) -> np.ndarray:
        return (x - self._low) / np.where(self._high > self._low, self._high - self._low, 1.0)

    def _loss(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Negative log posterior: the likelihood, and normal priors on the logs of length scales, amplitude and noise."""
        kernel, common = _matern(self._apart, theta)
        try:
            factor = cholesky(kernel + np.exp(theta[-1]) * np.eye(len(self._y)), lower=True)
        except np.linalg.LinAlgError:
            return 1e10, np.zeros_like(theta)
        weights = cho_solve((factor, True), self._y)
        inner = cho_solve((factor, True), np.eye(len(self._y))) - np.outer(weights, weights)
        by_scale = 0.5 * np.tensordot(inner * common, self._apart, 2) / np.exp(2 * theta[:-2])
        slopes = [*by_scale, 0.5 * np.sum(inner * kernel), 0.5 * np.exp(theta[-1]) * np.trace(inner)]
        centre, spread = np.array([0.0] * (len(theta) - 1) + [-6.0]), np.array([1.0] * (len(theta) - 1) + [3.0])
        z = (theta - centre) / spread
        return float(0.5 * self._y @ weights + np.log(np.diag(factor)).sum() + 0.5 * z @ z), np.array(slopes) + z / spread


def _matern(apart: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(k, what its derivatives by the logs of the length scales have in common) of squared differences by feature."""
    distance = np.sqrt(5 * (apart @ np.exp(-2 * theta[:-2])))
    decay = np.exp(theta[-2] - distance)
    return decay * (1 + distance + distance**2 / 3), decay * (1 + distance) * 5 / 3


@dataclass
class Table:
    """One recorded problem."""

    name: str
    about: dict[str, Any]
    rows: list[dict[str, Any]]
    space: SearchSpace = field(init=False)

    def __post_init__(self) -> None:
        self.space = SearchSpace.of(self.about["search_space"])
        self.lengths: list[float] = [steps / self.about["steps"][-1] for steps in self.about["steps"]]  # what they cost, in full runs
        self.short = len(self.lengths) > 1
        finite = [loss for row in self.rows for loss in row["losses"] if loss is not None]
        self.worst = max(finite)
        self._lowest = [min(row["losses"][i] for row in self.rows if row["losses"][i] is not None) for i in range(len(self.lengths))]
        self._x = np.array([features(row) for row in self.rows])
        self._soft = max(SOFTNESS, key=self._density)

    def _density(self, soft: float) -> float:
        """Mean log density of a left-out full run's loss with this c."""
        self._soft = soft
        y = self._y([row["losses"][-1] for row in self.rows], -1)
        return Process(self._x, y).left_out()[1] - float(y.mean())

    def _y(self, losses: Any, length: int) -> np.ndarray:
        known = np.array([self.worst if loss is None else loss for loss in losses])
        return np.log(np.maximum(known - self._lowest[length] + self._soft, self._soft / 10))

    @functools.cached_property
    def processes(self) -> list[Process]:
        return [Process(self._x, self._y([row["losses"][i] for row in self.rows], i)) for i in range(len(self.lengths))]

    @functools.cached_property
    def residuals(self) -> list[np.ndarray | None]:
        """By length: what a seed does to y, from the pairs of seeds; None: no second seed."""
        pairs = [row for row in self.rows if "second_seed" in row]
        found: list[np.ndarray | None] = []
        for i in range(len(self.lengths)):
            if not pairs:
                found.append(None)
                continue
            moved = self._y([p["losses"][i] for p in pairs], i) - self._y([p["second_seed"][i] for p in pairs], i)
            moved = (moved - np.median(moved)) / math.sqrt(2)  # what moves all alike bears on no choice
            found.append(np.concatenate([moved, -moved]))
        return found

    def mean(self, points: list[Point], length: int = -1) -> np.ndarray:
        """Loss without noise, nats."""
        length %= len(self.lengths)
        y = self.processes[length].predict(np.array([features(point) for point in points]))
        return np.exp(y) + self._lowest[length] - self._soft

    def observed(self, point: Point, seed: int, length: int = -1) -> float:
        """Loss with the noise of this seed, nats."""
        length %= len(self.lengths)
        key = json.dumps([f"{value:.10g}" for value in features(point)] + [length])
        random = np.random.default_rng([seed, zlib.crc32(key.encode())])
        residuals = self.residuals[length]
        noise = random.normal(0, self.processes[length].noise) if residuals is None else random.choice(residuals)
        y = math.log(max(float(self.mean([point], length)[0]) - self._lowest[length] + self._soft, self._soft / 10))
        return math.exp(y + noise) + self._lowest[length] - self._soft

    @functools.cached_property
    def best(self) -> tuple[float, dict[str, Any]]:
        """The lowest loss without noise among the recorded configurations, and where."""
        losses = self.mean(list(self.rows))
        return float(losses.min()), {name: self.rows[int(np.argmin(losses))][name] for name in self.space.parameters}

    @functools.cached_property
    def noise(self) -> float:
        """Standard deviation of a full run's loss at the bottom of the valley, nats."""
        residuals = self.residuals[-1]
        spread = self.processes[-1].noise if residuals is None else float(residuals.std())
        return spread * (self.best[0] - self._lowest[-1] + self._soft)

    @property
    def tolerance(self) -> float:
        """The regret that counts as none."""
        return max(0.002, self.noise)

    def regret(self, point: Point) -> float:
        return max(0.0, float(self.mean([point])[0]) - self.best[0])

    def shift(self) -> dict[str, tuple[float, float]]:
        """By length, the best log10 learning rate less that of a full run: mean and standard deviation over ranks, ratios and modules."""
        ends = self.space.parameters["learning_rate"]
        rates = np.geomspace(ends.low, ends.high, 201)
        found: list[list[float]] = [[] for _ in self.lengths]
        for rest in self._slices():
            points = [{"learning_rate": float(rate), "lora_dropout": 0.0, **rest} for rate in rates]
            places = [int(np.argmin(self.mean(points, length))) for length in range(len(self.lengths))]
            if min(places) > 0 and max(places) < len(rates) - 1:  # not at a bound
                for values, place in zip(found, places, strict=True):
                    values.append(float(np.log10(rates[place] / rates[places[-1]])))
        return {
            name: (round(float(np.mean(values)), 3), round(float(np.std(values)), 3))
            for name, values in zip(self.about["lengths"][:-1], found, strict=False)
            if values
        }

    def _slices(self) -> Iterator[dict[str, Any]]:
        """Configurations without a learning rate, over the space."""
        known = self.space.parameters
        scales = [("alpha_ratio", value) for value in (0.25, 1.0, 4.0)] if "alpha_ratio" in known else [("lora_alpha", v) for v in (16, 64)]
        modules = [{"target_modules": name} for name in known["target_modules"].choices] if "target_modules" in known else [{}]
        for rank, (name, value), more in itertools.product(known["lora_r"].values, scales, modules):
            yield {"lora_r": rank, name: value, **more}

    def fit(self) -> dict[str, Any]:
        """How well the surrogate predicts rows that it was not given: root mean squares, and Spearman's correlation, by length."""
        from scipy.stats import spearmanr

        found = {}
        for i, process in enumerate(self.processes):
            y = self._y([row["losses"][i] for row in self.rows], i)
            losses, predicted = (np.exp(v) for v in (y, process.left_out()[0]))
            near = losses <= np.sort(losses)[len(losses) // 4]
            error = predicted - losses
            found[self.about["lengths"][i]] = {
                "rms": round(float(np.sqrt(np.mean(error**2))), 4),
                "rms_best_quarter": round(float(np.sqrt(np.mean(error[near] ** 2))), 4),
                "median_best_quarter": round(float(np.median(np.abs(error[near]))), 4),
                "spearman": round(float(spearmanr(losses, predicted).statistic), 3),
            }
        return found


def load(name: str) -> Table:
    """A table of benchmarks/tables, or `stories656k_mix`, which learning_curves.py recorded."""
    if name == "stories656k_mix":
        return _learning_curves()
    table = json.loads((HERE / "tables" / f"{name}.json").read_text())
    return Table(name, table["about"], table["configurations"])


def names() -> list[str]:
    """All tables there are."""
    return ["stories656k_mix", *sorted(path.stem for path in (HERE / "tables").glob("*.json"))]


def _learning_curves() -> Table:
    table = json.loads((HERE / "results" / "learning_curves" / "table.json").read_text())
    runs = ("budget-1-27", "budget-1-9", "budget-1-3", "main")
    rows = []
    for row in table["configurations"]:
        losses = [row[run]["curve"][-1][2] if row[run]["state"] == "completed" else None for run in runs]
        rows.append({name: value for name, value in row.items() if name not in (*runs, "number")} | {"losses": losses})
    about = {
        "name": "stories656k_mix",
        "model": "tinystories656k",
        "hidden_size": 128,
        "data": "Alpaca and Dolly, 70/30",
        "training_examples": table["about"]["training_examples"],
        "batch_size": 8,
        "lengths": ["1/27", "1/9", "1/3", "1"],
        "steps": [5, 14, 42, 125],
        "tokens": [row[-1][1] for row in (table["configurations"][0][run]["curve"] for run in runs)],
        "untuned_loss": 5.72419,
        "search_space": {"preset": "published", "learning_rate": {"low": 1e-6, "high": 1e-1, "log": True, "default": 1e-5}},
    }
    return Table("stories656k_mix", about, rows)
