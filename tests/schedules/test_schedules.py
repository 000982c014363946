"""The contract of every schedule, on simulated learning curves, and what is particular to halving."""

import itertools
import random
from collections import deque
from collections.abc import Callable
from fractions import Fraction

import pytest

from loratune import schedules
from loratune.schedules import Decision, Schedule, Slice, SliceResult

CASES = {
    "full": {"name": "full", "fidelity": "steps"},
    "halving-steps": {"name": "halving", "fidelity": "steps"},
    "halving-budget": {"name": "halving", "fidelity": "budget"},
}


def make(case: str, trials: int) -> Schedule:
    return schedules.build(**CASES[case], trials=trials, baseline=True, reduction_factor=3, min_resource=1 / 9)


def loss(trial: int, share: Fraction) -> float:
    """A learning curve: every trial falls with training, to a floor of its own."""
    floor = random.Random(trial).random()
    return floor + 1 / (1 + 9 * float(share))


Result = Callable[[Slice], float | None]


def play(schedule: Schedule, width: int, result: Result, ready: Callable[[int], bool] = lambda _: True) -> list[tuple[Slice, Decision]]:
    """Run a schedule to its end with `width` places, results applied in the order sent."""
    flying: deque[Slice] = deque()
    done: list[tuple[Slice, Decision]] = []
    while True:
        while len(flying) < width and (slice := schedule.next(may_start=ready(len(done)) or not flying)) is not None:
            flying.append(slice)
        if not flying:
            return done
        slice = flying.popleft()
        done.append((slice, schedule.tell(slice, SliceResult(loss=result(slice)))))


def trained(slice: Slice) -> float | None:
    return loss(slice.trial, slice.length * slice.stop)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("trials", [1, 2, 5, 27, 40])
def test_no_trial_is_lost_and_none_is_trained_twice(case: str, width: int, trials: int) -> None:
    done = play(make(case, trials), width, trained)
    slices = [slice for slice, _ in done]
    assert {s.trial for s in slices} == set(range(trials))
    assert len({(s.trial, s.run, s.stop) for s in slices}) == len(slices)
    for trial in range(trials):
        own = [s for s in slices if s.trial == trial]
        for before, after in itertools.pairwise(own):
            assert before.length * before.stop < after.length * after.stop
            assert after.start == (before.stop if before.run == after.run else 0)
    decisions = {s.trial: decision for s, decision in done}
    assert decisions[0] is Decision.COMPLETE, "the baseline is trained to the end"
    assert Decision.DROPPED not in decisions.values()


@pytest.mark.parametrize("case", CASES)
def test_same_calls_same_decisions(case: str) -> None:
    assert play(make(case, 30), 3, trained) == play(make(case, 30), 3, trained)


@pytest.mark.parametrize("case", CASES)
def test_failures_go_no_further_and_hold_nobody_up(case: str) -> None:
    def result(slice: Slice) -> float | None:
        return None if slice.trial % 4 == 1 else trained(slice)

    done = play(make(case, 20), 2, result)
    assert {s.trial for s, decision in done if decision is Decision.DROPPED} == {1, 5, 9, 13, 17}
    assert all(sum(s.trial == t for s, _ in done) == 1 for t in (1, 5, 9, 13, 17))
    assert any(decision is Decision.COMPLETE and s.trial for s, decision in done)


@pytest.mark.parametrize("case", CASES)
def test_all_failing_ends(case: str) -> None:
    done = play(make(case, 7), 2, lambda _: None)
    assert [decision for _, decision in done] == [Decision.DROPPED] * 7


def test_a_sampler_that_is_not_ready_delays_new_trials_only() -> None:
    done = play(make("halving-steps", 9), 2, trained, ready=lambda settled: settled % 2 == 0)
    assert {s.trial for s, _ in done} == set(range(9))


@pytest.mark.parametrize("fidelity", ["steps", "budget"])
def test_halving_spends_what_it_says_and_keeps_the_best(fidelity: str) -> None:
    """27 trials, eta 3, rungs 1/9, 1/3, 1: about 9 reach a third and 3 the end; the curves never cross, so the best wins."""
    done = play(make(f"halving-{fidelity}", 27), 1, trained)
    complete = {s.trial for s, decision in done if decision is Decision.COMPLETE}
    assert min(range(27), key=lambda t: loss(t, Fraction(1))) in complete
    cost = sum((s.stop - s.start) * s.length for s, _ in done)
    by_rung = [sum(s.length * s.stop == r for s, _ in done) for r in (Fraction(1, 9), Fraction(1, 3), Fraction(1))]
    assert by_rung[0] == 27
    assert 9 <= by_rung[1] <= 14, "asynchronous promotion may send a few more than the ninth best"
    assert 3 <= by_rung[2] <= 7
    assert cost < 14, "27 full runs would cost 27"


def test_budget_runs_start_anew_and_steps_continue() -> None:
    steps = [s for s, _ in play(make("halving-steps", 3), 1, trained) if s.trial == 0]
    assert [(s.run, s.length, s.start, s.stop) for s in steps] == [
        ("main", 1, 0, Fraction(1, 9)),
        ("main", 1, Fraction(1, 9), Fraction(1, 3)),
        ("main", 1, Fraction(1, 3), 1),
    ]
    budgets = [s for s, _ in play(make("halving-budget", 3), 1, trained) if s.trial == 0]
    assert [(s.run, s.length, s.start, s.stop) for s in budgets] == [
        ("budget-1-9", Fraction(1, 9), 0, 1),
        ("budget-1-3", Fraction(1, 3), 0, 1),
        ("main", 1, 0, 1),
    ]


def test_somebody_reaches_the_top_though_promotion_alone_would_not() -> None:
    """Five trials: a third of five is one, a third of one is none; the best of the highest rung goes on all the same."""
    done = play(make("halving-steps", 5), 1, trained)
    assert {s.trial for s, decision in done if decision is Decision.COMPLETE} - {0}


def test_several_objectives_are_ranked_by_front_and_then_by_loss() -> None:
    """Nine trials at the first rung, of which a third goes on: the front of (loss, size), not the three lowest losses."""
    points = [(1.0, 9), (1.1, 8), (1.2, 8.5), (1.3, 7.5), (1.4, 9), (1.5, 9), (1.6, 9), (1.7, 9), (1.8, 6)]  # front: 0, 1, 3, 8
    schedule = schedules.build("halving", trials=9, baseline=False, fidelity="steps", reduction_factor=3, min_resource=1 / 3)
    for point in points:
        slice = schedule.next(may_start=True)
        while slice is not None and slice.start:  # promoted as soon as it is among the best third
            slice = schedule.next(may_start=True)
        assert slice is not None
        schedule.tell(slice, SliceResult(loss=point[0], objectives=point))
    sent = []
    while (slice := schedule.next(may_start=False)) is not None:
        sent.append(slice.trial)
    assert set(sent) <= {0, 1, 3}, "trial 2 has a lower loss than trial 3, but trial 1 beats it in both"
    assert 3 in sent
