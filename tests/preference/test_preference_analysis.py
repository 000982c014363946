"""Numbers against examples worked by hand or published."""

import math

import pytest
from comparisons import ANN, BOB

from loratune.preference.analysis import Tally, Vote, krippendorff_alpha, net, summarise_judge, summarise_votes, tally, wilson_of_share


def votes(left: str = "first") -> list[Vote]:
    def choice(verdict: str) -> str:
        return verdict if verdict in ("tie", "neither") else "left" if verdict == left else "right"

    return [
        Vote(rater=rater, question=question, left=left, choice=choice(verdict))
        for rater, said in (("Ann", ANN), ("Bob", BOB))
        for question, verdict in said.items()
    ]


def test_the_example_worked_by_hand() -> None:
    found = summarise_votes(votes(), {str(n): "odd" if n % 2 else "even" for n in range(1, 7)})
    # Ann: 4 first, 1 second, 1 tie. Bob: 3 first, 2 second, 1 both bad.
    assert (found.votes.first, found.votes.second, found.votes.ties, found.votes.neither) == (7, 3, 1, 1)
    assert found.votes.win_rate == pytest.approx((7 + 0.5 * 2) / 12)
    assert found.votes.win_rate_decided == pytest.approx(0.7)
    # Net per question: 1, 2 and 6 for the first, 4 for the second, 3 split, 5 undecided.
    assert (found.questions.first, found.questions.second, found.questions.ties) == (3, 1, 2)
    # Four signs, three alike: (1 + 4 + 4 + 1) of the 16 outcomes are as extreme.
    assert found.questions.sign_test() == pytest.approx(10 / 16)
    # Coincidences (12 values): 6 first-first, 2 second-second, first-second 2, tie-neither 2 off the diagonal.
    # Observed 4/12; expected 1 - (7*6 + 3*2)/(12*11) = 84/132; alpha = 1 - (4/12)/(84/132) = 10/21.
    assert found.alpha == pytest.approx(10 / 21)
    assert found.agreeing == pytest.approx(4 / 6)
    odd, even = found.categories["odd"], found.categories["even"]
    assert (odd.first, odd.second, odd.ties, odd.neither) == (3, 1, 1, 1)  # questions 1, 3, 5
    assert (even.first, even.second, even.ties, even.neither) == (4, 2, 0, 0)  # questions 2, 4, 6
    assert found.raters["Ann"].first == 4
    assert found.raters["Bob"].second == 2


def test_the_sides_are_undone_and_only_position_bias_sees_them() -> None:
    one, two = summarise_votes(votes("first")), summarise_votes(votes("second"))
    assert one.votes == two.votes
    assert (one.position.left, one.position.right) == (7, 3)
    assert (two.position.left, two.position.right) == (3, 7)
    # P(X <= 3) + P(X >= 7) of Bin(10, 1/2) = 2 (1 + 10 + 45 + 120) / 1024
    assert one.position.p_value == pytest.approx(2 * 176 / 1024)


def test_wilson_against_scipy_and_of_halves() -> None:
    from scipy.stats import binomtest

    for k, n in ((7, 10), (0, 5), (5, 5), (60, 80)):
        theirs = binomtest(k, n).proportion_ci(0.95, method="wilson")
        assert wilson_of_share(k / n, n) == pytest.approx((theirs.low, theirs.high))
    low, high = wilson_of_share(7.5 / 10, 10)
    assert wilson_of_share(0.7, 10)[0] < low < wilson_of_share(0.8, 10)[0]
    assert wilson_of_share(0.7, 10)[1] < high < wilson_of_share(0.8, 10)[1]
    assert wilson_of_share(math.nan, 0) == (0, 1)


def test_krippendorff_published_example() -> None:
    # Krippendorff (2011), section C: four observers, twelve units, missing data; nominal alpha 0.743.
    rows = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    units = [[row[u] for row in rows if row[u] is not None] for u in range(12)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_alpha_where_there_is_nothing_to_say() -> None:
    assert krippendorff_alpha([["first"], ["second"]]) is None  # nobody shares a question
    assert krippendorff_alpha([["first", "first"], ["first", "first"]]) is None  # nothing varies
    assert krippendorff_alpha([["first", "first"], ["tie", "tie"]]) == 1
    assert summarise_votes([]).questions.sign_test() == 1
    assert math.isnan(summarise_votes([]).votes.win_rate)


def test_net_preference() -> None:
    assert net(["first", "tie", "neither"]) == "first"
    assert net(["first", "second"]) == net(["tie"]) == "tie"
    assert net(["second", "second", "first"]) == "second"


def test_a_judge_wins_only_in_both_orders() -> None:
    def vote(question: str, left: str, choice: str) -> Vote:
        return Vote(rater="m", question=question, left=left, choice=choice)

    rounds = [
        *(vote("1", "first", "left"), vote("1", "second", "right")),  # the first, twice
        *(vote("2", "first", "left"), vote("2", "second", "left")),  # always A: contradicts itself
        *(vote("3", "first", "tie"), vote("3", "second", "tie")),
        *(vote("4", "first", "right"), vote("4", "second", "tie")),  # only half convinced
        vote("5", "first", "left"),  # its other reply held no verdict
        vote("6", "second", "left"),  # not asked in the other order yet
    ]
    found = summarise_judge(rounds, ["5"])
    assert found.questions == tally(["first", "tie", "tie", "tie"])
    assert (found.inconsistent, found.unreadable) == (2, 1)
    assert (found.position.left, found.position.right) == (5, 2)


def test_the_sign_test_is_scipy_s() -> None:
    from scipy.stats import binomtest

    for number in (1, 2, 3, 7, 20, 31):
        for count in range(number + 1):
            expected = binomtest(count, number, 0.5).pvalue
            assert Tally(first=count, second=number - count).sign_test() == pytest.approx(expected, rel=1e-12)
    assert Tally(first=5100, second=4900).sign_test() == pytest.approx(binomtest(5100, 10000, 0.5).pvalue, rel=1e-9)
    assert Tally().sign_test() == 1
