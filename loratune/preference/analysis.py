"""Votes in, numbers out: win rate, sign test, agreement, position bias.

Two counts are kept apart. Over *votes*, every vote weighs the same; this describes what was said. Over
*questions*, the raters' votes on a question are first netted into one preference (or none), for two
raters who read the same two answers are not two independent observations; the sign test uses these.
A tie and "both bad" prefer neither model; where a number needs it, they count as half a win for each.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

CHOICES = ("left", "right", "tie", "neither")
FIRST, SECOND, TIE, NEITHER = "first", "second", "tie", "neither"


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One rater's word on one question: what was shown where, and what was chosen."""

    rater: str
    question: str
    left: str  # first | second: the contestant shown as answer A
    choice: str  # left | right | tie | neither (both bad)

    @property
    def verdict(self) -> str:
        """first | second | tie | neither: the choice with the sides undone."""
        if self.choice in (TIE, NEITHER):
            return self.choice
        return self.left if self.choice == "left" else other(self.left)


def _even(count: int, number: int) -> float:
    """Two-sided exact binomial p-value of `count` among `number`, both ways being equally likely; 1 of nothing.

    p = min(1, 2 P(X <= min(count, number - count))), X ~ B(number, 1/2), as scipy.stats.binomtest has it; SciPy takes seconds to
    import, and the results are shown at Ctrl-C.
    """
    tail = sum(math.comb(number, less) for less in range(min(count, number - count) + 1))
    return min(1.0, 2 * tail / 2**number)


def other(side: str) -> str:
    return SECOND if side == FIRST else FIRST


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How often each verdict was given."""

    first: int = 0
    second: int = 0
    ties: int = 0
    neither: int = 0

    @property
    def total(self) -> int:
        return self.first + self.second + self.ties + self.neither

    @property
    def decided(self) -> int:
        return self.first + self.second

    @property
    def win_rate(self) -> float:
        """The first's share of all, ties and "both bad" as half; nan of nothing."""
        return (self.first + 0.5 * (self.ties + self.neither)) / self.total if self.total else math.nan

    @property
    def win_rate_decided(self) -> float:
        """The first's share of the decided; nan when none is."""
        return self.first / self.decided if self.decided else math.nan

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Wilson's interval about `win_rate`; a little too wide, since ties vary less than wins and losses."""
        return wilson_of_share(self.win_rate, self.total, level)

    def interval_decided(self, level: float = 0.95) -> tuple[float, float]:
        """Wilson's interval about `win_rate_decided`."""
        return wilson_of_share(self.win_rate_decided, self.decided, level)

    def sign_test(self) -> float:
        """Two-sided exact binomial p-value of first against second, both equally likely; ties left out. 1 of nothing."""
        return _even(self.first, self.decided)


@dataclass(frozen=True, kw_only=True)
class PositionBias:
    """How often the answer shown as A won."""

    left: int
    right: int

    @property
    def share(self) -> float:
        return self.left / (self.left + self.right) if self.left + self.right else math.nan

    @property
    def p_value(self) -> float:
        """Two-sided exact binomial test of both sides winning equally often."""
        return _even(self.left, self.left + self.right)


@dataclass(frozen=True, kw_only=True)
class VoteSummary:
    """What people's votes say."""

    votes: Tally
    questions: Tally  # net preference per question; `ties` are the questions without one
    alpha: float | None  # Krippendorff's, nominal, of the four verdicts; None: no question with two raters
    agreeing: float | None  # share of pairs of raters that gave the same verdict on the same question
    position: PositionBias
    categories: dict[str, Tally] = field(default_factory=dict)  # over votes
    raters: dict[str, Tally] = field(default_factory=dict)


def summarise_votes(votes: Iterable[Vote], categories: Mapping[str, str] | None = None) -> VoteSummary:
    """All numbers of one set of votes, at most one per (rater, question).

    categories: question -> category; questions without one are left out of the per-category counts.
    """
    votes, categories = list(votes), categories or {}
    by_question: dict[str, list[str]] = defaultdict(list)
    for vote in votes:
        by_question[vote.question].append(vote.verdict)
    ratings = list(by_question.values())
    groups = sorted({categories[vote.question] for vote in votes if categories.get(vote.question)})
    return VoteSummary(
        votes=tally(vote.verdict for vote in votes),
        questions=tally(net(verdicts) for verdicts in ratings),
        alpha=krippendorff_alpha(ratings),
        agreeing=_agreeing(ratings),
        position=position_bias(votes),
        categories={group: tally(v.verdict for v in votes if categories.get(v.question) == group) for group in groups},
        raters={rater: tally(v.verdict for v in votes if v.rater == rater) for rater in sorted({v.rater for v in votes})},
    )


def tally(verdicts: Iterable[str]) -> Tally:
    count = Counter(verdicts)
    return Tally(first=count[FIRST], second=count[SECOND], ties=count[TIE], neither=count[NEITHER])


def net(verdicts: Iterable[str]) -> str:
    """The side that more raters prefer; `tie` when as many prefer one as the other."""
    count = Counter(verdicts)
    if count[FIRST] == count[SECOND]:
        return TIE
    return FIRST if count[FIRST] > count[SECOND] else SECOND


def position_bias(votes: Iterable[Vote]) -> PositionBias:
    count = Counter(vote.choice for vote in votes)
    return PositionBias(left=count["left"], right=count["right"])


def wilson_of_share(share: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, (share + z²/2n ± z sqrt(share (1 - share)/n + z²/4n²)) / (1 + z²/n).

    `share` may be a mean of halves. (0, 1) of nothing. Source: Wilson, J. Am. Stat. Assoc. 22 (1927) 209.
    """
    if not n:
        return 0.0, 1.0
    from statistics import NormalDist

    z = NormalDist().inv_cdf(0.5 + level / 2)
    centre = share + z * z / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - reach) / (1 + z * z / n)), min(1.0, (centre + reach) / (1 + z * z / n))


def krippendorff_alpha(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Krippendorff's alpha for nominal values, 1 - observed / expected disagreement; units hold whatever ratings there are.

    1: perfect agreement, 0: what chance gives. None when no unit has two ratings or all ratings are the same value
    (nothing to disagree about). Source: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C.
    """
    pairable = [Counter(unit) for unit in units if len(unit) > 1]
    totals = sum(pairable, Counter[Hashable]())
    n = totals.total()
    expected = n * n - sum(count * count for count in totals.values())  # n_c n_k summed over c != k
    if not expected:
        return None
    observed = sum((unit.total() ** 2 - sum(count * count for count in unit.values())) / (unit.total() - 1) for unit in pairable)
    return 1 - (n - 1) * observed / expected


def _agreeing(units: Iterable[Sequence[str]]) -> float | None:
    same = pairs = 0
    for unit in units:
        pairs += math.comb(len(unit), 2)
        same += sum(math.comb(count, 2) for count in Counter(unit).values())
    return same / pairs if pairs else None


# --- a language model as judge ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class JudgeSummary:
    """What one judge says, each pair having been shown in both orders."""

    questions: Tally  # a win only where both orders say so
    inconsistent: int  # of the ties: the two orders contradicted each other
    unreadable: int  # questions left out: a reply that held no verdict
    position: PositionBias  # over single replies


def summarise_judge(rounds: Iterable[Vote], unreadable: Iterable[str] = ()) -> JudgeSummary:
    """`rounds`: two votes per question, the sides swapped; `unreadable`: questions with a reply that held no verdict."""
    rounds, lost = list(rounds), set(unreadable)
    by_question: dict[str, dict[str, str]] = defaultdict(dict)
    for vote in rounds:
        by_question[vote.question][vote.left] = vote.verdict
    both = [set(said.values()) for question, said in by_question.items() if len(said) == 2 and question not in lost]
    verdicts = [next(iter(said)) if len(said) == 1 else TIE for said in both]
    return JudgeSummary(
        questions=tally(verdicts),
        inconsistent=sum(len(said) > 1 for said in both),
        unreadable=len(lost),
        position=position_bias(rounds),
    )
