"""Asynchronous successive halving (ASHA): train many a little, the better ones further.

Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020 (arXiv 1810.05934),
algorithm 2. With reduction factor eta and smallest resource m, rung k lies at share m * eta^k of the full
run. A trial that is among the best 1/eta of the results at its rung is promoted to the next one; while
nobody is, a new configuration starts at the bottom.

Two fidelity axes, which predict very differently (docs/design.md):
    steps    rungs are points of one long run, which pauses there and resumes from its checkpoint;
    budget   rungs are complete short runs with their own warmup and decay; a promoted trial starts again.

With several objectives, or one that is not the loss, the results at a rung are ranked by non-dominated sorting, as in Schmucker et al.,
"Multi-objective Asynchronous Successive Halving" (arXiv 2106.12639); within a front by the validation loss, where the
paper spreads its choice over the front.

Beyond the papers: the baseline (the defaults, trial 0) is always promoted, since everything is compared
with it at full length; and when all is done and nobody else reached the top, the best of the highest rung goes on.
"""

from collections.abc import Sequence
from fractions import Fraction

from loratune.schedules.base import Decision, Schedule, Slice, SliceResult, short_run


class HalvingSchedule(Schedule):
    def __init__(self, *, trials: int, baseline: bool, fidelity: str, reduction_factor: int, min_resource: float) -> None:
        self._trials = trials
        self._baseline = baseline
        self._fidelity = fidelity
        self._eta = reduction_factor
        self.rungs = _rungs(
            Fraction(min_resource).limit_denominator(10_000), reduction_factor
        )  # ascending shares of the full run; the last is 1
        self._started = 0
        self._flying = 0  # slices handed out and not yet told
        self._values: list[dict[int, float]] = [{} for _ in self.rungs]  # per rung: trial -> loss
        self._several: list[dict[int, Sequence[float]]] = [
            {} for _ in self.rungs
        ]  # trial -> objectives, where these are not the loss alone
        self._promoted: list[set[int]] = [set() for _ in self.rungs]  # per rung: trials sent on from it

    def next(self, may_start: bool) -> Slice | None:
        for rung in reversed(range(len(self.rungs) - 1)):
            trial = self._promotable(rung)
            if trial is not None:
                return self._send(trial, rung + 1)
        if self._started < self._trials:
            if not may_start:
                return None
            self._started += 1
            return self._send(self._started - 1, 0)
        if self._flying == 0 and not self._winner():
            return self._last_resort()
        return None

    def no_more(self) -> None:
        self._trials = self._started

    def tell(self, slice: Slice, result: SliceResult) -> Decision:
        self._flying -= 1
        rung = self.rungs.index(slice.length * slice.stop)
        if result.loss is None:
            return Decision.DROPPED
        self._values[rung][slice.trial] = result.loss
        if result.objectives not in ((), (result.loss,)):
            self._several[rung][slice.trial] = result.objectives
        return Decision.COMPLETE if rung == len(self.rungs) - 1 else Decision.PAUSED

    def _promotable(self, rung: int) -> int | None:
        values, gone = self._values[rung], self._promoted[rung]
        if self._baseline and 0 in values and 0 not in gone:
            return 0
        for trial in self._ranking(rung)[: len(values) // self._eta]:
            if trial not in gone:
                return trial
        return None

    def _ranking(self, rung: int) -> list[int]:
        values, several = self._values[rung], self._several[rung]
        fronts = dict(zip(several, _front_ranks(list(several.values())), strict=True)) if several else {}
        return sorted(values, key=lambda trial: (fronts.get(trial, 0), values[trial], trial))

    def _send(self, trial: int, rung: int) -> Slice:
        self._flying += 1
        if rung:
            self._promoted[rung - 1].add(trial)
        here = self.rungs[rung]
        if self._fidelity == "budget":
            return Slice(trial=trial, run=short_run(here), length=here)
        return Slice(trial=trial, start=self.rungs[rung - 1] if rung else Fraction(0), stop=here)

    def _winner(self) -> bool:
        """Whether a trial other than the baseline has reached the top."""
        return bool(set(self._values[-1]) - ({0} if self._baseline else set()))

    def _last_resort(self) -> Slice | None:
        for rung in reversed(range(len(self.rungs) - 1)):
            for trial in self._ranking(rung):
                if trial not in self._promoted[rung]:
                    return self._send(trial, rung + 1)
        return None


def _front_ranks(points: list[Sequence[float]]) -> list[int]:
    from loratune.statistics.pareto import front_ranks  # numpy and scipy, which a loss alone does not need

    return [int(rank) for rank in front_ranks(points)]


def _rungs(smallest: Fraction, eta: int) -> list[Fraction]:
    shares = [Fraction(1)]
    while shares[0] / eta >= smallest:
        shares.insert(0, shares[0] / eta)
    return shares
