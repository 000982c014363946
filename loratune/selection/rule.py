"""Which one to ship: a stated rule over criteria, run over bootstrap resamples, that says how sure it is and what would change it.

The default rule: lowest validation loss; ties within noise are broken by the downstream score, then by the smaller adapter.
Two candidates tie in a metric when they differ by no more than `tie_width` standard errors of their paired difference: one, by
default (the one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984, section 3.4.3).

A resample draws, for all candidates alike, the items of each benchmark, and noise of the repeats: residuals of the additive fit
  loss[i, r] = mu[i] + s[r] + e[i, r]  (s: the seed's effect on everyone), drawn
with replacement and scaled to unbiased variance (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 9).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loratune.errors import SpecError
from loratune.selection.trial_metrics import Constraint, higher_is_better

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One adapter, and all that was measured of it. Candidates share seeds by position, and items by position."""

    name: str
    losses: ArrayLike  # (repeats,)
    scores: Mapping[str, ArrayLike] = field(default_factory=dict)  # benchmark -> (items,) scores in [0, 1]
    measured: Mapping[str, float] = field(default_factory=dict)  # the other metrics, in their units; NaN where not measured


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Either `priorities`, one after the other, each breaking the ties of those before; or `weights`, all at once.

    With weights each metric is scaled to 0 (best candidate) to 1 (worst), and the lowest weighted sum wins.
    """

    priorities: tuple[str, ...] = ("validation_loss", "score", "adapter_mb")
    weights: Mapping[str, float] = field(default_factory=dict)
    tie_width: float = 1.0  # standard errors of a paired difference
    constraints: tuple[Constraint, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.weights) or self.priorities

    def without(self, metric: str) -> Self:
        weights = {name: weight for name, weight in self.weights.items() if name != metric}
        return replace(self, weights=weights, priorities=tuple(name for name in self.priorities if name != metric))

    def __str__(self) -> str:
        if self.weights:
            text = "lowest weighted sum of " + ", ".join(f"{weight:g} x {name}" for name, weight in self.weights.items())
        else:
            first, *then = [f"{'highest' if higher_is_better(name) else 'lowest'} {name}" for name in self.priorities]
            text = first + "".join(f", then {name}" for name in then) + f" among ties within {self.tie_width:g} standard errors"
        return text + "".join(f", {constraint}" for constraint in self.constraints)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The answer. `shares`: of the resamples, by candidate, the winner's first."""

    winner: str
    share: float
    runner_up: str | None
    runner_up_share: float
    shares: dict[str, float]
    why: tuple[str, ...]
    what_would_change: tuple[str, ...]


def choose(
    candidates: Sequence[Candidate], rule: Rule | None = None, *, seed: int, noise_sd: float | None = None, resamples: int = 1000
) -> Choice:
    """Apply `rule` to the candidates as measured, and to `resamples` resamples of them.

    noise_sd: of one run's loss (e.g. `Race.noise.value`); needed only where nobody has a second repeat.
    Raises SpecError: no candidates, a metric not measured, shapes that do not fit, nobody keeps the constraints.
    """
    rule = rule or Rule(priorities=tuple(m for m in Rule().priorities if _measured(m, candidates)))
    names = [c.name for c in candidates]
    if not names or len(set(names)) < len(names):
        raise SpecError(f"candidates: needed: one or more with different names; got {names}")
    wanted = dict.fromkeys([*rule.metrics, *(c.metric for c in rule.constraints)])
    if not rule.metrics:
        raise SpecError("the rule names no metric")
    for metric in wanted:
        if not _measured(metric, candidates):
            raise SpecError(f"{metric} was not measured for every candidate; leave it out of the rule, or measure it")
    rng = np.random.default_rng(seed)
    table = {metric: _resampled(metric, candidates, rng, resamples, noise_sd) for metric in wanted}  # (1 + resamples, K)
    table = {metric: -x if higher_is_better(metric) else x for metric, x in table.items()}  # lower is better, row 0: as measured
    judge = _Judge(names=names, table=table)
    allowed = judge.feasible(rule.constraints)
    if not allowed:
        raise SpecError(f"no candidate keeps {', '.join(map(str, rule.constraints))}")
    picks = [judge.pick(rule, allowed, row) for row in range(1 + resamples)]
    winner = picks[0]
    counts = np.bincount(picks[1:], minlength=len(names)) / max(resamples, 1)
    order = [winner, *sorted((n for n in range(len(names)) if n != winner), key=lambda n: -counts[n])]
    second = order[1] if len(order) > 1 and counts[order[1]] > 0 else None
    return Choice(
        winner=names[winner],
        share=float(counts[winner]),
        runner_up=names[second] if second is not None else None,
        runner_up_share=float(counts[second]) if second is not None else 0.0,
        shares={names[n]: float(counts[n]) for n in order},
        why=tuple(judge.reasons(rule, allowed, winner)),
        what_would_change=tuple(judge.changes(rule, allowed, winner, second)),
    )


class _Judge:
    """The rule at work on a table metric -> (rows, K), lower is better."""

    def __init__(self, *, names: list[str], table: dict[str, Floats]) -> None:
        self.names, self.table = names, table
        # Standard error of each paired difference, from the resamples: (K, K).
        self.error = {
            m: (x[1:, :, None] - x[1:, None, :]).std(axis=0) if len(x) > 1 else np.zeros(2 * x.shape[1:]) for m, x in table.items()
        }

    def feasible(self, constraints: Sequence[Constraint]) -> list[int]:
        return [n for n in range(len(self.names)) if all(c.holds(self.measured(c.metric, n)) for c in constraints)]

    def measured(self, metric: str, n: int) -> float:
        value = float(self.table[metric][0, n])
        return -value if higher_is_better(metric) else value

    def pick(self, rule: Rule, allowed: list[int], row: int) -> int:
        if rule.weights:
            return min(allowed, key=lambda n: self._weighted(rule, allowed, row, n))
        return self.ties(rule, allowed, row)[-1][0]

    def ties(self, rule: Rule, allowed: list[int], row: int) -> list[list[int]]:
        """Who is left after each priority; the last list starts with the pick."""
        left, steps = allowed, []
        for metric in rule.priorities:
            x = self.table[metric][row]
            best = min(left, key=lambda n: float(x[n]))
            width = rule.tie_width * self.error[metric][best]
            rounding = 1e-12 * abs(float(x[best]))
            left = sorted((n for n in left if x[n] <= x[best] + width[n] + rounding), key=lambda n: float(x[n]))
            steps.append(left)
        return steps

    def _weighted(self, rule: Rule, allowed: list[int], row: int, n: int) -> float:
        total = 0.0
        for metric, weight in rule.weights.items():
            measured = self.table[metric][0][allowed]  # the scale is that of the measured values, in every resample
            total += weight * (float(self.table[metric][row, n]) - float(measured.min())) / (float(np.ptp(measured)) or 1.0)
        return total

    def reasons(self, rule: Rule, allowed: list[int], winner: int) -> list[str]:
        lines = [f"Rule: {rule}."]
        out = [self.names[n] for n in range(len(self.names)) if n not in allowed]
        if out:
            lines.append(f"Out by constraints: {', '.join(out)}.")
        if rule.weights:
            sums = ", ".join(f"{self.names[n]} {self._weighted(rule, allowed, 0, n):.3f}" for n in allowed)
            return [*lines, f"Weighted sums: {sums}."]
        before = len(allowed)
        for metric, left in zip(rule.priorities, self.ties(rule, allowed, 0), strict=True):
            if before == 1:
                break
            others = f"{len(left)} of {before} candidates tie" if len(left) > 1 else "no other candidate ties with it"
            own, best = self.measured(metric, winner), self.measured(metric, left[0])
            lines.append(f"{metric} of {self.names[winner]}: {own:.6g} (best: {best:.6g}); {others}.")
            before = len(left)
        return lines

    def changes(self, rule: Rule, allowed: list[int], winner: int, second: int | None) -> list[str]:
        """Single changes of the rule that pick another one, and how much lower the runner-up's loss would have to be."""
        tried = [(f"without {c}", rule, self.feasible([k for k in rule.constraints if k is not c])) for c in rule.constraints]
        if not rule.weights:
            tried += [(f"with ties within {w:g} standard errors", replace(rule, tie_width=w), allowed) for w in (0.0, 2.0)]
        if len(rule.metrics) > 1:
            tried += [(f"without {m}", rule.without(m), allowed) for m in rule.metrics]
        picks = [(text, self.pick(other, those, 0)) for text, other, those in tried]
        found = [f"{text}: {self.names[n]}" for text, n in picks if n != winner]
        first = rule.metrics[0]
        if second is not None and second in allowed:
            kept = self.table[first]
            for step in np.geomspace(1e-6, 1, 121) * max(1e-9, float(np.abs(kept[0]).max())):
                self.table = {**self.table, first: kept - step * (np.arange(kept.shape[1]) == second)}
                if self.pick(rule, allowed, 0) == second:
                    better = "higher" if higher_is_better(first) else "lower"
                    found.append(f"{first} of {self.names[second]} {better} by {step:.2g} would choose {self.names[second]}")
                    break
            self.table = {**self.table, first: kept}
        return found


def _measured(metric: str, candidates: Sequence[Candidate]) -> bool:
    if metric == "validation_loss":
        return True
    if metric == "score":
        return bool(candidates) and all(c.scores and set(c.scores) == set(candidates[0].scores) for c in candidates)
    if higher_is_better(metric) and metric not in candidates[0].measured:
        return all(metric in c.scores for c in candidates)
    return bool(np.isfinite([c.measured.get(metric, np.nan) for c in candidates]).all())


def _resampled(metric: str, candidates: Sequence[Candidate], rng: np.random.Generator, resamples: int, noise_sd: float | None) -> Floats:
    """(1 + resamples, K): the metric as measured, then of each resample."""
    if metric == "validation_loss":
        return _losses(candidates, rng, resamples, noise_sd)
    if metric == "score":
        return np.mean([_scores(name, candidates, rng, resamples) for name in sorted(candidates[0].scores)], axis=0)
    if higher_is_better(metric) and metric not in candidates[0].measured:
        return _scores(metric, candidates, rng, resamples)
    return np.tile([c.measured[metric] for c in candidates], (1 + resamples, 1))


def _scores(name: str, candidates: Sequence[Candidate], rng: np.random.Generator, resamples: int) -> Floats:
    rows = [np.asarray(c.scores[name], dtype=float) for c in candidates]
    if len({row.shape for row in rows}) > 1 or rows[0].ndim != 1 or not rows[0].size:
        raise SpecError(f"{name}: every candidate needs a score for each of the same items; got {[row.shape for row in rows]}")
    return _weights(len(rows[0]), rng, resamples) @ np.stack(rows, axis=1)


def _weights(items: int, rng: np.random.Generator, resamples: int) -> Floats:
    """(1 + resamples, items): how much each item counts; the first row is the sample itself. Rows sum to 1."""
    return np.vstack([np.ones(items), rng.multinomial(items, np.full(items, 1 / items), size=resamples)]) / items


def _losses(candidates: Sequence[Candidate], rng: np.random.Generator, resamples: int, noise_sd: float | None) -> Floats:
    given = [np.asarray(c.losses, dtype=float) for c in candidates]
    if any(x.ndim != 1 or not x.size or not np.isfinite(x).all() for x in given):
        raise SpecError("losses: every candidate needs finite losses, one by repeat")
    who = np.repeat(np.arange(len(given)), [len(x) for x in given])
    when = np.concatenate([np.arange(len(x)) for x in given])
    measured = np.concatenate(given)  # (runs,)
    # Additive fit: one column per candidate, one per seed but the first.
    design = np.column_stack([who[:, None] == np.arange(len(given)), when[:, None] == np.arange(1, when.max() + 1)]).astype(float)
    fit = np.linalg.pinv(design)
    means = fit[: len(given)]  # (K, runs): runs -> mu, at the first seed
    spare = len(measured) - np.linalg.matrix_rank(design)
    rest = measured - design @ (fit @ measured)
    if spare > 0:
        noise = rng.choice(rest * np.sqrt(len(rest) / spare), size=(resamples, len(measured)))
    elif len(given) == 1:
        noise = np.zeros((resamples, len(measured)))
    elif noise_sd is None:
        raise SpecError("one repeat each gives no estimate of noise: give noise_sd, or run the finalists again with fresh seeds")
    else:
        noise = noise_sd * rng.standard_normal((resamples, len(measured)))
    fitted = (measured + np.vstack([np.zeros(len(measured)), noise])) @ means.T
    # The fit is at the first seed; told is the mean over the seeds there are: of who ran with all of them its plain mean.
    found: Floats = fitted + (fit[len(given) :] @ measured).sum() / (when.max() + 1)
    return found
