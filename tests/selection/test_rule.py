"""The rule picks what its words say, and says how sure it is."""

import numpy as np
import pytest

from loratune.errors import SpecError
from loratune.selection.rule import Candidate, Rule, choose
from loratune.selection.trial_metrics import parse_constraint

RNG = np.random.default_rng(0)
SHARED = RNG.normal(0, 0.003, 5)


def candidate(name: str, loss: float, score: float = 0.5, mb: float = 10.0) -> Candidate:
    losses = loss + SHARED + 0.001 * np.random.default_rng(ord(name[0])).standard_normal(5)
    answers = (np.arange(400) < 400 * score).astype(float)
    return Candidate(name=name, losses=losses, scores={"mmlu": answers}, measured={"adapter_mb": mb})


def test_a_clear_winner_is_sure() -> None:
    choice = choose([candidate("a", 1.0), candidate("b", 1.1), candidate("c", 1.2)], seed=0)
    assert (choice.winner, choice.share, choice.runner_up) == ("a", 1.0, None)
    assert "no other candidate ties with it" in choice.why[1]


def test_a_tie_is_broken_by_the_score_then_by_size() -> None:
    same = candidate("a", 1.0).losses
    by_score = [
        Candidate(name="a", losses=same, scores={"mmlu": [1.0, 0, 0, 0] * 50}),
        Candidate(name="b", losses=same, scores={"mmlu": [1.0, 1, 1, 0] * 50}),
    ]
    assert choose(by_score, seed=0).winner == "b"
    scores = {"mmlu": [1.0, 0.0] * 50}
    by_size = [
        Candidate(name=n, losses=same, scores=scores, measured={"adapter_mb": size}) for n, size in (("a", 3.0), ("b", 1.0), ("c", 2.0))
    ]
    assert choose(by_size, seed=0).winner == "b"


def test_a_coin_toss_is_called_one() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.001, (2, 6))
    noise -= noise.mean(axis=1, keepdims=True)
    choice = choose([Candidate(name="a", losses=1 + noise[0]), Candidate(name="b", losses=1.00001 + noise[1])], seed=0)
    assert 0.35 < choice.share < 0.7
    assert choice.share + choice.runner_up_share == pytest.approx(1)


def test_repeats_of_those_who_dropped_out_early_are_compared_on_the_same_seeds() -> None:
    seeds = np.array([0.0, 0.0, -1.0, -1.0])  # the later seeds are kind to everyone
    wiggle = np.array([1, -1, 1, -1]) * 1e-4
    few, many = Candidate(name="few", losses=1.0 + seeds[:2] + wiggle[:2]), Candidate(name="many", losses=1.1 + seeds - wiggle)
    assert choose([few, many], seed=0).winner == "few"


def test_who_ran_with_every_seed_is_told_with_its_plain_mean() -> None:
    """Also where others dropped out; those are told what the seeds they missed would have made of them."""
    losses = {"a": [1.0, 1.2, 1.1], "b": [1.05, 1.22, 1.19], "c": [1.4, 1.5]}
    by_loss = Rule(priorities=("validation_loss",))
    why = choose([Candidate(name=name, losses=own) for name, own in losses.items()], by_loss, seed=0).why
    assert "of a: 1.1 (best: 1.1);" in why[1]


def test_constraints_exclude_and_are_named_as_a_change() -> None:
    those = [candidate("a", 1.0, mb=80), candidate("b", 1.1, mb=20)]
    choice = choose(those, Rule(constraints=(parse_constraint("adapter_mb <= 50"),)), seed=0)
    assert choice.winner == "b"
    assert "without adapter_mb <= 50: a" in choice.what_would_change
    assert "Out by constraints: a." in choice.why
    with pytest.raises(SpecError, match="no candidate keeps adapter_mb <= 5"):
        choose(those, Rule(constraints=(parse_constraint("adapter_mb <= 5"),)), seed=0)


def test_weights() -> None:
    those = [candidate("a", 1.0, score=0.2), candidate("b", 1.1, score=0.9)]
    assert choose(those, Rule(weights={"validation_loss": 3, "score": 1}), seed=0).winner == "a"
    heavy = choose(those, Rule(weights={"validation_loss": 1, "score": 3}), seed=0)
    assert heavy.winner == "b"
    assert "without score: a" in heavy.what_would_change


def test_what_the_runner_up_lacks_is_enough() -> None:
    rng = np.random.default_rng(3)
    a, b = 1 + rng.normal(0, 0.002, 6), 1.0005 + rng.normal(0, 0.002, 6)
    choice = choose([Candidate(name="a", losses=a), Candidate(name="b", losses=b)], seed=0)
    change = next(text for text in choice.what_would_change if "lower by" in text)
    lacking = float(change.split("lower by ")[1].split(" would")[0])
    losses = {"a": a, "b": b}
    losses[choice.runner_up or ""] = losses[choice.runner_up or ""] - 1.1 * lacking
    assert choose([Candidate(name=n, losses=x) for n, x in losses.items()], seed=0).winner == choice.runner_up


def test_the_same_seed_gives_the_same_choice() -> None:
    those = [candidate("a", 1.0), candidate("b", 1.0005, 0.6), candidate("c", 1.001, 0.7, 5)]
    choice = choose(those, seed=0)
    assert choice == choose(those, seed=0)
    assert sum(choice.shares.values()) == pytest.approx(1)


def test_bad_input() -> None:
    with pytest.raises(SpecError, match="different names"):
        choose([], seed=0)
    with pytest.raises(SpecError, match="one repeat each gives no estimate"):
        choose([Candidate(name="a", losses=[1.0]), Candidate(name="b", losses=[2.0])], seed=0)
    assert choose([Candidate(name="a", losses=[1.0]), Candidate(name="b", losses=[2.0])], seed=0, noise_sd=0.01).winner == "a"
    with pytest.raises(SpecError, match="seconds was not measured"):
        choose([candidate("a", 1.0)], Rule(priorities=("seconds",)), seed=0)
