"""The bracket search on synthetic valleys: what it runs, in which order, when it stops; alone, and as an Optuna sampler."""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import optuna
import pytest

from loratune.errors import SearchSpentError, SpecError
from loratune.samplers import BracketSampler, build, tell_untuned
from loratune.samplers.bracket_guard import grid, weighed
from loratune.samplers.bracket_line import believe
from loratune.samplers.bracket_rule import Options, PlacedRun, Proposal, SearchAxis, Step, propose
from loratune.samplers.bracket_sampler import length_of
from loratune.samplers.prior import Prior, effective, scale_of
from loratune.spec import SearchSpace

FAIR, OUTSIDE = Prior(centre=-2.35, sd=0.28), Prior(centre=-1.5, sd=0.7, outside=True)
SHORT = Fraction(1, 27)
Loss = Callable[[float, Fraction, Mapping[str, Any]], float]


def valley(optimum: float, depth: float = 0.1, noise: float = 0.0, seed: int = 0, shift: float = 0.26) -> Loss:
    """A loss that is lowest at `optimum`, for a run 10^x times as short `shift` x higher up; far above, runs diverge."""
    chance = random.Random(seed)

    def loss(u: float, length: Fraction, at: Mapping[str, Any]) -> float:
        x = u - optimum - shift * math.log10(1 / length)
        return math.inf if x > 1.3 else 1 + depth * x * x / (1 + 0.2 * x * x) + 0.5 * (1 - float(length)) + chance.gauss(0, noise)

    return loss


def play(
    loss: Loss,
    prior: Prior,
    budget: float,
    options: Options | None = None,
    start: Mapping[str, Any] | None = None,
    axes: tuple[SearchAxis, ...] = (),
) -> tuple[list[PlacedRun], Proposal]:
    """Run what is asked for until it stops or the full runs are spent; several at a time where there are slots."""
    options, history, spent = options or Options(), list[PlacedRun](), 0.0
    proposal = propose(history, prior, options, start=start, axes=axes)
    while not proposal.stop and spent < budget:
        assert proposal.steps, "nothing is in training, so something is to be run"
        for step in proposal.steps[: options.slots]:
            history.append(PlacedRun(u=step.u, at=step.at, length=step.length, loss=loss(step.u, step.length, step.at)))
            spent += float(step.length)
        proposal = propose(history, prior, options, start=start, axes=axes)
    return history, proposal


def best(history: list[PlacedRun]) -> PlacedRun:
    return min((run for run in history if run.length == 1), key=lambda run: run.loss or 0.0)


def test_guess_bracket_vertex_stop() -> None:
    history, proposal = play(valley(-2.3), FAIR, 20)
    us = [run.u for run in history]
    assert us[:2] == pytest.approx([-2.35, -2.05]), "the guess, and a step above"
    assert us[2] == pytest.approx(-2.65), "the vertex would be the guess again, so a step below"
    assert len(us) <= 4
    assert best(history).u == pytest.approx(-2.35)
    assert "less than 0.0005" in proposal.stop
    assert proposal.best is best(history)
    assert 0.001 < proposal.left < 0.0024, "not less than the noise"


@pytest.mark.parametrize("optimum", [-1.95, -2.8, -1.6])
def test_two_runs_tell_the_side_and_the_third_is_the_vertex(optimum: float) -> None:
    history, _ = play(valley(optimum), FAIR, 20)
    assert [run.u for run in history][:2] == pytest.approx([-2.35, -2.05])
    assert (history[2].u > -2.05) == (optimum > -2.05)
    assert best(history).u == pytest.approx(optimum, abs=0.08)
    assert sum(run.length == 1 for run in history) <= 5


def test_a_wave_fills_the_slots_with_three_at_once() -> None:
    proposal = propose([], FAIR, Options(slots=8))
    assert [step.u for step in proposal.steps] == pytest.approx([-2.35, -2.05, -2.65])
    flying = [PlacedRun(u=step.u) for step in proposal.steps]
    assert propose(flying[:1], FAIR, Options(slots=8)).steps == proposal.steps[1:]
    assert propose(flying, FAIR, Options(slots=8)) == Proposal(phase="line", expected=math.inf, left=math.inf), "wait"
    history, _ = play(valley(-2.3), FAIR, 20, Options(slots=3))
    assert len(history) == 3
    assert best(history).u == pytest.approx(-2.35)


def test_with_two_slots_a_step_waits_for_the_pair_before_it() -> None:
    options = Options(slots=2)
    pair = propose([], FAIR, options).steps[:2]
    assert [step.u for step in pair] == pytest.approx([-2.35, -2.05])
    half = [PlacedRun(u=pair[0].u, loss=1.01), PlacedRun(u=pair[1].u)]
    assert propose(half, FAIR, options).steps == ()
    done = [half[0], PlacedRun(u=pair[1].u, loss=1.005)]
    assert [step.u > -2.05 for step in propose(done, FAIR, options).steps] == [True]


def test_three_runs_are_enough_with_a_fair_prior() -> None:
    regrets, spent = [], []
    for seed in range(200):
        optimum = random.Random(seed).gauss(FAIR.centre, FAIR.sd)
        history, _ = play(valley(optimum, noise=0.0003, seed=seed), FAIR, 3)
        regrets.append(0.1 * (best(history).u - optimum) ** 2)
        spent.append(len(play(valley(optimum, noise=0.0003, seed=seed), FAIR, 20)[0]))
    assert statistics.mean(regrets) < 0.0008
    assert statistics.mean(r < 0.002 for r in regrets) >= 0.88
    assert statistics.mean(spent) < 3.5, "it stops by itself"


def test_outside_the_prior_short_runs_come_first_and_put_the_bracket_right() -> None:
    regrets = []
    for seed in range(60):
        optimum = OUTSIDE.centre + random.Random(seed).choice([-1.5, -1, 1, 1.5])
        history, _ = play(valley(optimum, depth=0.5, noise=0.001, seed=seed), OUTSIDE, 3)
        assert [run.length for run in history[:7]] == [SHORT] * 7
        assert all(run.length == 1 for run in history[7:])
        regrets.append(0.5 * (best(history).u - optimum) ** 2)
    assert statistics.mean(regrets) < 0.013
    assert max(regrets) < 0.025


def test_short_runs_go_from_coarse_to_fine() -> None:
    centre, optimum = OUTSIDE.centre, OUTSIDE.centre + 0.6  # 0.97 higher for a short run
    history, _ = play(valley(optimum, depth=0.5), OUTSIDE, 0.5)
    offsets = [run.u - centre for run in history if run.length == SHORT]
    assert offsets == pytest.approx([-2, -1, 0, 1, 2, 0.5, 1.5]), "a decade apart, then half a decade beside the best"
    coarse = [PlacedRun(u=run.u, loss=run.loss, length=SHORT) for run in history[:4]]
    assert len(propose(coarse, OUTSIDE, Options()).steps) == 1
    assert propose([*coarse, PlacedRun(u=centre + 2, length=SHORT)], OUTSIDE, Options()) == Proposal(phase="guard"), "wait"


def test_the_guard_is_weighed_and_not_obeyed() -> None:
    points, _ = grid(FAIR.centre, Options())
    misled = [PlacedRun(u=u, length=SHORT, loss=1 + 0.02 * abs(u - (FAIR.centre + 1.5))) for u in points]  # says 1.5 higher, softly
    after = weighed(FAIR, misled, Options(untuned=1.2))
    assert FAIR.centre - 0.1 < after.centre < FAIR.centre + 0.5
    assert after.sd < FAIR.sd
    sharp = [PlacedRun(u=u, length=SHORT, loss=1 + 0.9 * (u - 0.2) ** 2) for u in grid(OUTSIDE.centre, Options())[0]]
    far = weighed(OUTSIDE, sharp, Options(untuned=9.0))
    assert -0.85 < far.centre < 0, "far from what it knows, the short runs count"


def test_the_grid_grows_where_its_last_point_is_the_best() -> None:
    history, _ = play(valley(OUTSIDE.centre + 2.2, depth=0.5, shift=0.0), OUTSIDE, 0.5)
    assert max(run.u for run in history) > OUTSIDE.centre + 2.4
    bounded, _ = play(valley(OUTSIDE.centre + 2.2, depth=0.5, shift=0.0), OUTSIDE, 0.5, Options(high=OUTSIDE.centre + 1))
    assert max(run.u for run in bounded) <= OUTSIDE.centre + 1


@pytest.mark.parametrize("first", [math.inf, 5.0], ids=["diverged", "no better than untuned"])
def test_a_guess_that_teaches_nothing_calls_the_guard(first: float) -> None:
    proposal = propose([PlacedRun(u=FAIR.centre, loss=first)], FAIR, Options(untuned=5.0))
    assert (proposal.phase, len(proposal.steps)) == ("guard", 5)
    assert {step.length for step in proposal.steps} == {SHORT}
    without = propose([PlacedRun(u=FAIR.centre, loss=first)], FAIR, Options(untuned=5.0, guard="never"))
    assert without.phase == "line"
    if first == math.inf:
        assert without.steps[0].u < FAIR.centre, "lower, where it diverged"


def test_a_bracket_that_runs_away_calls_the_guard_and_ends_near_the_optimum() -> None:
    history, _ = play(valley(FAIR.centre + 1.6, depth=0.5), FAIR, 8)
    lengths = [run.length for run in history]
    assert lengths[:3] == [1, 1, 1]
    assert SHORT in lengths
    assert best(history).u == pytest.approx(FAIR.centre + 1.6, abs=0.23)


def test_all_that_fails_ends() -> None:
    history, proposal = play(lambda u, length, at: math.inf, FAIR, 50)
    assert "learned anything" in proposal.stop
    assert len(history) == 10


AXES = (SearchAxis(name="lora_r", values=(16, 32, 64)), SearchAxis(name="lora_dropout", values=(0.0, 0.05, 0.1)))
START = {"lora_r": 32, "lora_dropout": 0.0}


def test_then_one_question_at_a_time_through_the_best_point() -> None:
    line = valley(-2.35)

    def loss(u: float, length: Fraction, at: Mapping[str, Any]) -> float:
        return line(u, length, at) - 0.003 * math.log2(at["lora_r"] / 32) + at["lora_dropout"]

    inside, _ = play(loss, FAIR, 20, start=START, axes=AXES)
    assert all(run.at == START for run in inside), "where the findings cover the model, a question is not worth a run"
    narrow = Prior(centre=FAIR.centre, sd=FAIR.sd, outside=True)
    history, proposal = play(loss, narrow, 20, Options(guard="never", untuned=1.8), start=START, axes=AXES)
    asked = [run for run in history if run.at != START]
    assert asked[0].at == {"lora_r": 64, "lora_dropout": 0.0}
    assert asked[0].u == pytest.approx(-2.35, abs=0.1), "at the best learning rate"
    assert {"lora_r": 64, "lora_dropout": 0.05} in [run.at for run in asked], "from there on the better rank"
    assert proposal.best is not None
    assert proposal.best.at == {"lora_r": 64, "lora_dropout": 0.0}
    assert all(sum(a != b for a, b in zip(run.at.values(), START.values(), strict=True)) <= 2 for run in history)


def test_what_does_not_fit_is_tried_at_a_lower_rank() -> None:
    refused = [PlacedRun(u=FAIR.centre, at=START, loss=math.inf, fits=False)]
    assert propose(refused, FAIR, Options(), start=START, axes=AXES).steps[0].at["lora_r"] == 16
    smaller = [*refused, PlacedRun(u=FAIR.centre, at={**START, "lora_r": 16}, loss=math.inf, fits=False)]
    assert "nothing fits" in propose(smaller, FAIR, Options(), start=START, axes=AXES).stop


def test_a_question_that_does_not_fit_is_asked_once() -> None:
    history, _ = play(valley(FAIR.centre), FAIR, 20, Options(guard="never"), START)
    asked = propose(history, FAIR, Options(guard="never", tolerance=1e-6), start=START, axes=AXES).steps[0]
    refused = [*history, PlacedRun(u=asked.u, at=asked.at, loss=math.inf, fits=False)]
    later = propose(refused, FAIR, Options(guard="never", tolerance=1e-6), start=START, axes=AXES)
    assert asked.at not in [step.at for step in later.steps]


def test_a_bound_of_the_space_ends_the_walk() -> None:
    history, proposal = play(valley(-1.0), FAIR, 20, Options(high=-2.0, guard="never"))
    assert max(run.u for run in history) == -2.0
    assert proposal.stop


# --- as an Optuna sampler ---


def sampler_of(preset: str = "recommended", **options: Any) -> Any:
    space = SearchSpace.of(preset)
    return build("bracket", search_space=space.distributions("choice"), seed=0, options=options)


def told(params: Mapping[str, Any]) -> float:
    u = effective(params["learning_rate"], scale_of(params), params["lora_r"])
    return 1 + 0.1 * (u + 2.1) ** 2 + 0.05 * params["lora_dropout"]


def run(study: optuna.Study, count: int = 50) -> list[dict[str, Any]]:
    """Ask and tell until the search is over; its parameters in order."""
    space = SearchSpace.of("recommended").distributions("choice")
    for _ in range(count):
        try:
            assert study.sampler.ready(study)  # type: ignore[attr-defined]
        except SearchSpentError:
            break
        began = time.perf_counter()
        trial = study.ask(space)
        assert time.perf_counter() - began < 0.5
        study.tell(trial, told(trial.params))
    return [trial.params for trial in study.trials]


def test_it_serves_a_plain_optuna_study_and_stops_by_itself() -> None:
    study = optuna.create_study(sampler=sampler_of())
    params = run(study)
    assert params[0]["learning_rate"] == pytest.approx(4e-4)
    assert params[0]["lora_r"] == 128
    assert 3 <= len(params) < 8
    assert study.best_value < 1.0005


def test_what_it_proposes_follows_from_the_storage_alone() -> None:
    study = optuna.create_study(sampler=sampler_of())
    whole = run(study)
    for known in range(1, len(whole)):
        again = optuna.create_study(sampler=sampler_of())
        again.add_trials(study.trials[:known])
        trial = again.ask(SearchSpace.of("recommended").distributions("choice"))
        assert trial.params == whole[known]


def test_a_trial_killed_before_its_parameters_were_stored_gets_the_same() -> None:
    study = optuna.create_study(sampler=sampler_of())
    space = SearchSpace.of("recommended").distributions("choice")
    study.tell(study.ask(space), 1.01)
    killed = study.ask()
    first = study.sampler.sample_relative(study, study._storage.get_trial(killed._trial_id), space)
    assert study.sampler.sample_relative(study, study._storage.get_trial(killed._trial_id), space) == first


def test_a_space_of_few_learning_rates_is_used_as_far_as_it_goes() -> None:
    space = SearchSpace.of({"learning_rate": [1e-4, 3e-4, 1e-3], "lora_r": [8, 16]}).distributions("choice")
    sampler = build("bracket", search_space=space, seed=0, options={"guard": "never"}, constants={"lora_alpha": 16.0})
    study, seen = optuna.create_study(sampler=sampler), []
    for _ in range(20):
        try:
            sampler.ready(study)  # type: ignore[attr-defined]
        except SearchSpentError:
            break
        trial = study.ask(space)
        seen.append(tuple(trial.params.values()))
        study.tell(trial, told({"lora_alpha": 16.0, "lora_dropout": 0, **trial.params}))
    assert len(seen) == len(set(seen)) <= 6


@pytest.mark.parametrize("seed", range(10))
def test_waves_with_refused_diverging_and_too_large_trials_end_and_ask_nothing_twice(seed: int) -> None:
    chance = random.Random(seed)
    fields = chance.choice([{"learning_rate": [1e-4, 3e-4, 1e-3], "lora_r": [8, 16, 32]}, None])
    space = (SearchSpace.of("recommended") if fields is None else SearchSpace.of(fields)).distributions("choice")
    refused, too_large, diverges = chance.choice([8, 64, 1000]), chance.choice([16, 256, 1000]), chance.uniform(-2.5, 0.0)
    slots, guard = chance.choice([1, 3, 4, 8]), chance.choice(("auto", "never", "always"))
    start = {"lora_alpha": 16.0} if fields else {}
    sampler = BracketSampler(space, start=start, outside=True, slots=slots, guard=guard)  # type: ignore[arg-type]
    study, flying, spent = optuna.create_study(sampler=sampler), list[optuna.Trial](), ""
    tell_untuned(study, 3.0)
    while flying or not spent:
        while len(flying) < slots and not spent:
            assert len(study.trials) < 60
            try:
                if not sampler.ready(study):
                    break
            except SearchSpentError as error:
                spent = str(error)
                break
            flying.append(study.ask(space))
            if flying[-1].params["lora_r"] > refused:
                flying[-1].set_constraint("adapter_mb", 1.0)
                study.tell(flying.pop(), 99.0)
        if not flying:
            break
        trial = flying.pop(chance.randrange(len(flying)))
        values = {"lora_alpha": 16.0, "lora_dropout": 0, **trial.params}
        if values["lora_r"] > too_large:
            trial.set_constraint("fits_in_memory", 1.0)
        elif effective(values["learning_rate"], scale_of(values), values["lora_r"]) > diverges:
            trial.set_user_attr("state", "diverged")
        else:
            trial.report(told(values), 1)
            study.tell(trial, told(values))
            continue
        study.tell(trial, 99.0)
    assert spent
    asked = [(length_of(trial), tuple(trial.params.items())) for trial in study.trials]
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize(("options", "message"), [({"guard": "maybe"}, "guard = 'maybe'; allowed"), ({"step": 0.0}, "step = 0.0 must be")])
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        sampler_of(**options)


def test_beyond_the_bound_of_the_learning_rate_the_scale_goes_on() -> None:
    sampler = BracketSampler(
        SearchSpace.of("published").distributions("choice"), start={"lora_alpha": 8, "lora_r": 64, "learning_rate": 1e-3}
    )
    study = optuna.create_study(sampler=sampler)
    space = SearchSpace.of("published").distributions("choice")
    for _ in range(3):
        trial = study.ask(space)
        u = effective(trial.params["learning_rate"], scale_of(trial.params), trial.params["lora_r"])
        study.tell(trial, 1 - 0.1 * u)
    assert [t.params["learning_rate"] for t in study.trials[1:]] == [1e-3, 1e-3]
    assert study.trials[1].params["lora_alpha"] > 8


@pytest.mark.parametrize("preset", ["published", "recommended"])
def test_of_two_scales_the_one_that_is_searched_counts(preset: str) -> None:
    space = SearchSpace.of(preset).distributions("choice")
    study = optuna.create_study(sampler=BracketSampler(space, start={"lora_r": 64, "lora_alpha": 32, "alpha_ratio": 0.5}))
    trial = study.ask(space)
    assert scale_of(trial.params) == 0.5
    ratio = optuna.create_study(sampler=BracketSampler(space, start={"lora_r": 64, "alpha_ratio": 1.0}))
    assert scale_of(ratio.ask(space).params) == 1.0


def test_a_run_at_another_place_bears_on_the_same_vertex() -> None:
    there = [(-2.6, 1.0 + 0.1 * 0.09), (-2.0, 1.0 + 0.1 * 0.09)]  # symmetric about -2.3
    belief = believe([[(-2.35, 0.7)], there], FAIR, 0.1, 0.001)
    assert belief.lowest == pytest.approx(-2.3, abs=0.02)
    assert believe([[(-2.35, 0.7)]], FAIR, 0.1, 0.001).lowest == pytest.approx(FAIR.centre, abs=0.01), "one run says its floor alone"
    assert belief.weights.sum() == pytest.approx(1)
    assert belief.regret(-2.0) == pytest.approx(0.009, rel=0.4)
    loud = believe([[(-2.6, 1.0), (-2.3, 1.2), (-2.0, 1.0), (-1.9, 1.3), (-2.5, 1.1)]], FAIR, 0.1, 0.001)
    assert loud.noise > 0.005, "noise is learnt from runs that no parabola fits"


def test_steps_say_why() -> None:
    assert propose([], FAIR, Options()).steps == (Step(u=FAIR.centre, why="the guess"),)
