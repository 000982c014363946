"""The finalists' race: repeats with fresh seeds, in which the clearly worse drop out as evidence comes.

Every candidate runs `first` repeats; then those left run one repeat more at a time, all with the same seeds. After each round the
bounds of sequential.py say how much worse than i a candidate k may be:
    U(k, i) = min over the looks so far of -L(i, k, r),    L the lower confidence bound of mu[i] - mu[k];
k *covers* i when U(k, i) <= tolerance: it is better, or worse by no more than that. A candidate drops out when one left with a lower
mean covers it, and all that dropped out before are covered by others left as well. (So small concessions cannot add up along a
chain.) The race is over when one is left, when all have `repeats` repeats, or when the budget does not pay for another round.

With probability 1 - `error_rate`, whenever one stops, somebody left is at most `tolerance` worse than the best, and the leader at
most `gap` worse. A race that ends with one left has a gap of at most the tolerance. Proof: where all bounds of the best b hold,
mu[k] - mu[b] <= U(k, b) for every k; b is in the race itself, or is covered by somebody who is.

Losses found during the search take no part: they were low partly by luck, which is why their trials are finalists.
A repeat that diverges (NaN or infinite loss) takes its candidate out: it cannot be relied on. The race is a function of what
it is told, in whatever order within a round, so that resuming is telling it the `log` again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from loratune.errors import SpecError, StorageError
from loratune.selection.sequential import Floats, lower_bounds
from loratune.statistics import Interval


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """Who dropped out, after how many repeats, and why."""

    candidate: str
    repeats: int
    against: str = ""  # the better one; "" when it diverged
    worse_by: float = math.nan  # at least, at the race's error rate; negative: perhaps better, by so little

    def __str__(self) -> str:
        if not self.against:
            return f"{self.candidate} diverged with a fresh seed"
        shown = f"at least {self.worse_by:.2g} worse" if self.worse_by > 0 else f"at most {-self.worse_by:.2g} better"
        return f"{self.candidate} after {self.repeats} repeats, {shown} than {self.against}"


class Race:
    """Ask with `next`, answer with `tell`, until `finished`; then `winner`. Losses: lower is better."""

    def __init__(
        self,
        candidates: Sequence[str],
        *,
        tolerance: float,  # a loss this much higher is as good, nats per token
        budget: int,  # runs in all
        error_rate: float = 0.05,
        first: int = 3,  # repeats that everyone gets
        repeats: int = 10,  # at most, per candidate
    ) -> None:
        names = list(candidates)
        problems = [
            (not names or len(set(names)) < len(names), f"candidates: needed: one or more different names; got {names}"),
            (not tolerance >= 0 or math.isinf(tolerance), f"tolerance: needed: a number >= 0; got {tolerance}"),
            (not 0 < error_rate < 0.5, f"error_rate: needed: a number between 0 and 0.5; got {error_rate}"),
            (not 2 <= first <= repeats, f"first, repeats: needed: 2 <= first <= repeats; got {first} and {repeats}"),
        ]
        found = [text for wrong, text in problems if wrong]
        least = len(names) * first
        if not found and budget < least:
            found.append(f"budget: {len(names)} finalists with {first} repeats each are {least} runs; got {budget}. Take fewer finalists")
        if found:
            raise SpecError("\n".join(found))
        self.candidates, self.tolerance, self.budget = tuple(names), tolerance, budget
        self.error_rate, self.first, self.repeats = error_rate, first, repeats
        self.log: list[tuple[str, int, float]] = []  # all that was told: candidate, repeat, loss
        self.dropped: list[Dropped] = []
        self.ending = ""  # why it is over; "" while it is not
        self._told: dict[tuple[int, int], float] = {}  # (place, repeat) -> loss, finite or not
        self._place = {name: place for place, name in enumerate(names)}
        self._table: Floats = np.full((len(names), repeats), np.nan)
        self._left = list(range(len(names)))  # places of those in the race
        self._asked = [(place, repeat) for repeat in range(first) for place in self._left]
        self._diverged: set[int] = set()
        self._ahead: Floats = np.where(np.eye(len(names), dtype=bool), 0.0, np.inf)  # U(k, i)
        self._sound: list[int] = []  # those who came through the first repeats: the test's K candidates

    # --- ask and tell

    def next(self) -> list[tuple[str, int]]:
        """(candidate, repeat) to run now, together or in any order; repeats count from 0. Empty when finished."""
        return [(self.candidates[i], r) for i, r in self._open()]

    def tell(self, candidate: str, repeat: int, value: float) -> None:
        """The loss of one run that `next` asked for. Telling the same again does nothing.

        Raises StorageError for another value of the same run, and for a run that was not asked for: the log is of another race.
        """
        place = self._place.get(candidate, -1)
        if (place, repeat) not in self._asked:
            raise StorageError(f"the race did not ask for repeat {repeat} of {candidate!r}; its log belongs to a race with other settings")
        known = self._told.get((place, repeat))
        if known is not None:
            if known != value and not (math.isnan(known) and math.isnan(value)):
                raise StorageError(f"repeat {repeat} of {candidate!r} was told twice: {known} and {value}")
            return
        self.log.append((candidate, repeat, float(value)))
        self._told[place, repeat] = float(value)
        if math.isfinite(value):
            self._table[place, repeat] = value
        else:
            self._diverged.add(place)
        if not self.finished and not self._open():
            self._look()

    # --- what is known

    @property
    def finished(self) -> bool:
        return bool(self.ending)

    @property
    def survivors(self) -> list[str]:
        """Those in the race, the lowest mean first (in the given order before the first look)."""
        return [self.candidates[place] for place in self._left]

    @property
    def winner(self) -> str | None:
        """The leader of a finished race; None while it runs, or when all diverged."""
        return self.survivors[0] if self.finished and self._left else None

    @property
    def runs(self) -> int:
        """Runs spent."""
        return len(self.log)

    @property
    def gap(self) -> float:
        """How much worse than the best of all the leader may be, at the error rate; inf before the first look."""
        if not self._sound or not self._left:
            return math.inf
        return max(0.0, float(self._ahead[self._left[0], self._sound].max()))

    @property
    def losses(self) -> dict[str, list[float]]:
        """Each candidate's losses, by repeat; those of one repeat share their seed. The finite ones only."""
        return {name: [float(v) for v in self._table[place] if math.isfinite(v)] for name, place in self._place.items()}

    @property
    def noise(self) -> Interval:
        """sigma: sd of a run's loss when what the seed does to all alike is taken out; from everyone's first repeats.

        Its interval is that of a chi^2 variable with (K - 1)(n0 - 1) degrees; unknown before the first look and for one candidate.
        """
        table = self._table[self._sound, : self.first]
        degrees = (len(self._sound) - 1) * (self.first - 1)
        if degrees < 1:
            return Interval(math.nan, math.nan, math.nan, why="two candidates' first repeats are needed")
        rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
        squares = float((rest**2).sum())
        low, high = (math.sqrt(squares / stats.chi2.ppf(q, degrees)) for q in (0.975, 0.025))
        return Interval(math.sqrt(squares / degrees), low, high)

    def explain(self) -> str:
        """The race in about ten lines."""
        spent = f"{self.runs} of {self.budget} runs"
        entered = f"{len(self.candidates)} finalist{'s' * (len(self.candidates) > 1)}"
        lines = [f"Race of {entered}: {spent}, error rate {self.error_rate:.0%}, tolerance {self.tolerance:g}."]
        if self.noise.known:
            lines.append(f"Noise of a run (sd, same seeds): {self.noise:.2g}.")
        lines += [f"Out: {drop}." for drop in self.dropped]
        if self._sound and self._left:  # all of them have the same number of repeats
            bounds, run = self._bounds(), self._table[self._left][:, : self._done()]
            for n, name in enumerate(self.survivors):
                behind = f", {(run[n] - run[0]).mean():.2g} behind (at least {bounds[n, 0]:.2g})" if n else ""
                lines.append(f"In: {name}, mean {run[n].mean():.5f} of {run.shape[1]}{behind}.")
        if self.winner is not None and len(self.candidates) == 1:
            lines.append(f"{self.winner} raced alone, so the race gives no confidence in the choice.")
        elif self.winner is not None:
            sure = f"{1 - self.error_rate:.0%}"
            better = f"at most {self.gap:.2g} worse than the best of them" if self.gap > 0 else "the best of them"
            lines.append(f"Winner: {self.winner}, {better} ({sure} sure); over because {self.ending}.")
        elif self.finished:
            lines.append(f"No winner: {self.ending}.")
        else:
            lines.append(f"Next: {len(self.next())} runs.")
        return "\n".join(lines)

    # --- one look

    def _open(self) -> list[tuple[int, int]]:
        return [] if self.finished else [key for key in self._asked if key not in self._told and key[0] not in self._diverged]

    def _done(self) -> int:
        return int(np.isfinite(self._table[self._left]).all(axis=0).sum())

    def _bounds(self) -> Floats:
        """L of all pairs in the race, in the order of `_left`."""
        rows = [self._sound.index(place) for place in self._left]
        if len(self._sound) < 2:
            return np.zeros((1, 1))
        return lower_bounds(self._table[self._sound], rows, self.first, self.repeats, self.error_rate)

    def _look(self) -> None:
        """A round is complete: who drops out, is it over, and what to run next."""
        rounds = 1 + max(repeat for _, repeat in self._asked)
        for place in [p for p in self._left if p in self._diverged]:
            self._left.remove(place)
            self.dropped.append(Dropped(candidate=self.candidates[place], repeats=rounds))
        if not self._sound:
            self._sound = list(self._left)
        if not self._left:
            self.ending = "every candidate diverged"
            return
        self._left.sort(key=lambda place: float(self._table[place, :rounds].mean()))
        bounds = self._bounds()
        both = np.ix_(self._left, self._left)
        self._ahead[both] = np.minimum(self._ahead[both], -bounds.T)
        for n in range(len(self._left) - 1, 0, -1):  # the worst first; only a lower mean takes a candidate out
            place, rest = self._left[n], [other for other in self._left if other != self._left[n]]
            better = min(self._left[:n], key=lambda other: float(self._ahead[other, place]))
            covered = self._ahead[rest].min(axis=0) <= self.tolerance
            if self._ahead[better, place] <= self.tolerance and covered[self._sound].all():
                worse_by = -float(self._ahead[better, place])
                self.dropped.append(
                    Dropped(candidate=self.candidates[place], repeats=rounds, against=self.candidates[better], worse_by=worse_by)
                )
                self._left.remove(place)
        spent = len(self._asked) + len(self._left) > self.budget  # a run asked for is paid for
        if len(self._left) == 1:
            self.ending = "no other one is left"
        elif rounds == self.repeats:
            self.ending = f"all that are left have {self.repeats} repeats"
        elif spent:
            self.ending = "the budget does not pay for another round"
        else:
            self._asked += [(place, rounds) for place in self._left]
