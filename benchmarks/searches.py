"""Searches by name, each on one recorded table with one seed: the project's own samplers and schedules, asked as a study asks them.

A search is a function of a `Ledger`, which answers with losses and counts what they cost until the budget is spent.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import optuna
from multifidelity import botorch_search, priorband
from recorded import Point, Table

from loratune import samplers, schedules
from loratune.samplers.base import derived_seed
from loratune.samplers.nomad_points import Code
from loratune.samplers.prior import Facts, Recommendation, learning_rate, recommend
from loratune.schedules import SliceResult

FRAME = 0.25  # decades: NOMAD's first frame around the guess


class SpentError(Exception):
    """The next run would exceed the budget."""


@dataclass
class Ledger:
    """What a search has run on a table, with the noise of one seed."""

    table: Table
    seed: int
    budget: float  # full runs
    spent: float = 0.0
    runs: list[tuple[float, Point, int, float]] = field(default_factory=list)  # (spent by then, configuration, length, loss)
    ended: bool = False  # by the search's own rule
    claims: list[tuple[float, float]] = field(default_factory=list)  # (spent by then, with 90 % no more is left to find)

    def evaluate(self, point: Point, length: int = -1) -> float:
        """The loss of a run of this length, by its place in the table. Raises SpentError."""
        length %= len(self.table.lengths)
        cost = self.table.lengths[length]
        if self.spent + cost > self.budget + 1e-9:
            raise SpentError
        self.spent += cost
        loss = self.table.observed(point, self.seed, length)
        self.runs.append((self.spent, point, length, loss))
        return loss

    def regret(self, spent: float) -> float:
        """Of what it would hand over: the lowest loss at the greatest length so far; of the untuned model, where nothing was run."""
        there = [run for run in self.runs if run[0] <= spent + 1e-9]
        if not there:
            untuned = self.table.about["untuned_loss"]
            return float(self.table.worst if untuned is None else untuned) - self.table.best[0]
        longest = max(length for _, _, length, _ in there)
        return self.table.regret(min((run for run in there if run[2] == longest), key=lambda run: run[3])[1])


Search = Callable[[Ledger], None]


def guess(table: Table) -> tuple[Recommendation, dict[str, Any]]:
    """What public findings recommend for the table's model and data, and that in the table's space."""
    about = table.about
    found = recommend(Facts(hidden_size=about["hidden_size"], examples=about["training_examples"]))
    return found, in_space(table, found.values, found.prior.centre)


def in_space(table: Table, values: Mapping[str, Any], u: float) -> dict[str, Any]:
    """The nearest values that the space has; the learning rate is then that of u."""
    point: dict[str, Any] = {}
    for name, parameter in table.space.parameters.items():
        if parameter.type == "ordinal":
            point[name] = min(parameter.values, key=lambda value, name=name: (abs(value - values[name]), value))
        elif parameter.type == "categorical":
            point[name] = values[name] if values[name] in parameter.choices else parameter.choices[0]
        elif name != "lora_alpha":
            point[name] = min(max(values[name], parameter.low), parameter.high)
    if "lora_alpha" in table.space.parameters:
        ends = table.space.parameters["lora_alpha"]
        point["lora_alpha"] = round(min(max(values["alpha_ratio"] * point["lora_r"], ends.low), ends.high))
    ratio = point["lora_alpha"] / point["lora_r"] if "lora_alpha" in point else point["alpha_ratio"]
    rate = table.space.parameters["learning_rate"]
    point["learning_rate"] = min(max(learning_rate(u, ratio, point["lora_r"]), rate.low), rate.high)
    return {name: point[name] for name in table.space.parameters}


def by_sampler(name: str, begin: str = "", **options: Any) -> Search:
    """A sampler of Optuna's or ours, every trial a full run. begin: what trial 0 is, "defaults" (the published ones) or "guess"."""

    def search(ledger: Ledger) -> None:
        space, ordinals = ledger.table.space, samplers.ordinals(name)
        first = None
        if begin:
            first = space.defaults(ordinals) if begin == "defaults" else space.encode(guess(ledger.table)[1], ordinals)
        own = samplers.build(name, search_space=space.distributions(ordinals), seed=ledger.seed, options=options, x0=first)
        study = optuna.create_study(sampler=own)
        if first is not None:
            study.enqueue_trial(first)
        try:
            while True:
                trial = study.ask()
                study.tell(trial, ledger.evaluate(space.suggest(trial, ordinals)))
        finally:
            closing = getattr(getattr(own, "inner", None), "close", None)  # NOMAD's process
            if closing is not None:
                closing()

    return search


def nomad_near(ledger: Ledger) -> None:
    """NOMAD from the guess, its first frame 0.25 decades on logarithms and one place on lists: MADS as a bracket."""
    import PyNomad

    distributions = ledger.table.space.distributions("choice")
    code = Code(distributions)
    x0 = code.encode(ledger.table.space.encode(guess(ledger.table)[1], "choice"))
    frame = [
        FRAME if kind == "R" else 1.0 if upper < 20 else max(1.0, round((10**FRAME - 1) * x))
        for kind, upper, x in zip(code.types, code.upper, x0, strict=True)
    ]
    lines = [
        f"BB_INPUT_TYPE ( {' '.join(code.types)} )",
        "BB_OUTPUT_TYPE OBJ",
        f"SEED {1 + derived_seed(ledger.seed, 0, 'NOMAD') % 2**16}",
        f"MAX_BB_EVAL {int(ledger.budget)}",
        f"INITIAL_FRAME_SIZE ( {' '.join(map(str, frame))} )",
        "DISPLAY_DEGREE 0",
    ]

    def one(x: Any) -> int:
        try:
            loss = ledger.evaluate(code.decode([x.get_coord(i) for i in range(x.size())]))
        except SpentError:
            return 0
        x.setBBO(repr(loss).encode())
        return 1

    PyNomad.optimize(one, x0, code.lower, code.upper, lines)


def halving(prior: bool) -> Search:
    """ASHA on complete short runs from 1/27, factor 3, of random configurations; with `prior`, of its u, the guess first."""

    def search(ledger: Ledger) -> None:
        table, space = ledger.table, ledger.table.space
        schedule = schedules.build(
            "halving", trials=10**6, baseline=False, fidelity="budget", reduction_factor=3, min_resource=Fraction(1, 27)
        )
        own = samplers.build("random", search_space=space.distributions("choice"), seed=ledger.seed, options={})
        study = optuna.create_study(sampler=own)
        random = np.random.default_rng([ledger.seed, 27])
        points: dict[int, dict[str, Any]] = {}
        lengths = [Fraction(text) for text in table.about["lengths"]]
        while (slice := schedule.next(may_start=True)) is not None:
            if slice.trial not in points:
                points[slice.trial] = space.suggest(study.ask(), "choice")
                if prior:
                    found, first = guess(table)
                    u = found.prior.centre + found.prior.sd * random.normal()
                    drawn = {"alpha_ratio": points[slice.trial].get("alpha_ratio", 0.5), **points[slice.trial]}
                    if "lora_alpha" in drawn:
                        drawn["alpha_ratio"] = drawn["lora_alpha"] / drawn["lora_r"]
                    points[slice.trial] = first if slice.trial == 0 else in_space(table, drawn, u)
            schedule.tell(slice, SliceResult(loss=ledger.evaluate(points[slice.trial], lengths.index(slice.length))))

    return search


def with_prior(search: Callable[..., None]) -> Search:
    """A search of multifidelity.py, from the guess."""

    def begun(ledger: Ledger) -> None:
        found, first = guess(ledger.table)
        search(ledger, first, found.prior, in_space)

    return begun


def rule(ledger: Ledger) -> None:
    """The guess, and nothing else."""
    ledger.evaluate(guess(ledger.table)[1])


def bracket(slots: int = 1, guard: str = "auto") -> Search:
    """Ours, one run at a time or in waves; ends by its own rule."""

    def search(ledger: Ledger) -> None:
        from loratune.samplers.bracket_sampler import UNTUNED, BracketSampler, length_of

        table = ledger.table
        found, _ = guess(table)
        given = {name: found.values[name] for name in ("learning_rate", *table.space.parameters)}
        own = BracketSampler(
            table.space.distributions("choice"),
            start=given,
            spread=found.prior.sd,
            outside=found.prior.outside,
            slots=slots,
            seed=ledger.seed,
            guard=guard if table.short else "never",  # type: ignore[arg-type]  # its three names
        )
        study = optuna.create_study(sampler=own)
        if table.about["untuned_loss"] is not None:
            study._storage.set_study_system_attr(study._study_id, UNTUNED, table.about["untuned_loss"])
        lengths = [Fraction(text) for text in table.about["lengths"]]
        while True:
            wave = []
            while len(wave) < slots:
                decision = own.proposal(study)
                if decision is None or not decision.steps:
                    break
                trial = study.ask()
                wave.append((trial, table.space.suggest(trial, "choice")))
            if not wave:
                return
            for trial, point in wave:
                length = length_of(study.get_trials(deepcopy=False)[trial.number])
                study.tell(trial, ledger.evaluate(point, lengths.index(length)))
            decision = own.proposal(study)
            if decision is not None and any(length == len(table.lengths) - 1 for _, _, length, _ in ledger.runs):
                ledger.claims.append((ledger.spent, decision.left))

    return search


SEARCHES: dict[str, Search] = {
    "bracket": bracket(),
    "bracket, waves of 3": bracket(slots=3),
    "bracket without guard": bracket(guard="never"),
    "rule alone": rule,
    "TPE from the rule": by_sampler("tpe", "guess", n_startup_trials=3),
    "NOMAD from the rule, frame 0.25": nomad_near,
    "ASHA from the prior": halving(prior=True),
    "ASHA": halving(prior=False),
    "PriorBand": with_prior(priorband),
    "BoTorch, multi-fidelity": with_prior(botorch_search),
    "random": by_sampler("random"),
    "TPE": by_sampler("tpe", "defaults"),
    "TPE, 3 random": by_sampler("tpe", "defaults", n_startup_trials=3),
    "NNI TPE": by_sampler("nni_tpe", "defaults"),
    "CMA-ES": by_sampler("cmaes", "defaults"),
    "GP, 3 random": by_sampler("gp", "defaults", n_startup_trials=3),
    "NOMAD": by_sampler("nomad", "defaults"),
}
SLOW = ("GP, 3 random", "NNI TPE", "BoTorch, multi-fidelity")  # to decide: fewer seeds
SHORT = ("ASHA", "ASHA from the prior", "PriorBand", "BoTorch, multi-fidelity")  # need short runs


def run(name: str, table: Table, seed: int, budget: float) -> Ledger:
    """What a search did."""
    ledger = Ledger(table, seed, budget)
    with contextlib.suppress(SpentError):
        SEARCHES[name](ledger)
        ledger.ended = True
    return ledger
