"""Does the finalists' race pick a good one as often as it promises, and what does it cost? A synthetic study, 200 times.

    python benchmarks/finalists_race.py [--studies 200]

The blackbox has the shape of LoRA fine-tuning (log learning rate by rank by dropout; see `true_loss`), and noise of a known sd,
0.001 like that of the published study; what a seed does to all candidates alike comes on top. Each study draws 100 trials, most of
them near the optimum as a good sampler would, and observes each once. Four ways to pick from there:

raw minimum        the lowest loss observed; costs nothing more
race               loratune's: finalists by Gupta's margin, at most 8, then the race
equal replication  the same finalists, each as often as Bechhofer's design asks for the same promise (error rate, tolerance) when the
                   noise is known, which is more than the race is told: R = ceil((c sigma / tolerance)^2), c from Gupta's integral;
                   R. E. Bechhofer, Annals of Mathematical Statistics 25, 1954
same cost          the same finalists, replicated equally with the runs that the race spent (rounded up)

A second setting is the hardest for any such promise: eight finalists, seven of them just over the tolerance worse than the best.

All finalists' runs use fresh seeds common to the candidates. A pick is wrong when its true loss is more than the tolerance above
that of the best finalist. Writes benchmarks/results/finalists_race/: results.json, figure.svg and figure.png. Seconds, one core.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from loratune.selection.finalists import Noise, finalists, gupta
from loratune.selection.race import Race
from loratune.statistics import student_mean, summarise, wilson
from loratune.system.machine import environment

RESULTS = Path(__file__).resolve().parent / "results" / "finalists_race"
SIGMA, SEED_SHIFT = 0.001, 0.0015  # sd of a run's own noise; sd of what a seed does to all candidates
TOLERANCE, ERROR_RATE = 0.001, 0.05
TRIALS, FINALISTS, REPEATS, BUDGET = 100, 8, 20, 120
WAYS = ("raw minimum", "race", "equal replication", "same cost")


def true_loss(points: np.ndarray) -> np.ndarray:
    """points (n, 3): log10 learning rate, log2 rank, dropout. Lowest, 0.96, at 3e-4 for rank 512 without dropout."""
    rate, rank, dropout = points.T
    best_rate = math.log10(3e-4) - 0.02 * (rank - 9)  # higher for small ranks
    return 0.96 + 0.012 * (rate - best_rate) ** 2 + 0.0006 * (9 - rank) ** 1.2 + 0.01 * dropout


def study(seed: int, hardest: bool = False) -> dict[str, Any]:
    """One study: what each way picks, its regret (true loss above the best finalist's) and its cost in runs."""
    rng = np.random.default_rng(seed)
    wide = np.column_stack([rng.uniform(-6, -2.5, 40), rng.integers(2, 10, 40), rng.choice([0, 0.05, 0.1], 40)])
    near = np.column_stack([rng.normal(-3.5, 0.3, 60), rng.integers(5, 10, 60), rng.choice([0, 0.05], 60)])
    loss = np.r_[0.96, np.full(FINALISTS - 1, 0.96 + 1.05 * TOLERANCE)] if hardest else true_loss(np.vstack([wide, near]))
    observed = loss + SIGMA * rng.standard_normal(len(loss))
    few = finalists(observed, Noise(sd=SIGMA, source="known"), most=FINALISTS, error_rate=ERROR_RATE)
    true = loss[np.argsort(observed)] if hardest else loss[list(few.chosen)]  # the lowest observed first
    noise = SIGMA * rng.standard_normal((len(true), 200)) + SEED_SHIFT * rng.standard_normal(200)
    runs = true[:, None] + noise  # what repeat r of each finalist would give

    race = Race([str(n) for n in range(len(true))], tolerance=TOLERANCE, budget=BUDGET, error_rate=ERROR_RATE, repeats=REPEATS)
    while asked := race.next():
        for name, repeat in asked:
            race.tell(name, repeat, runs[int(name), repeat])
    equal = math.ceil((gupta(len(true), ERROR_RATE) * SIGMA / TOLERANCE) ** 2)
    same = math.ceil(race.runs / len(true))
    winner = int(race.winner or 0)
    picks = {
        "raw minimum": (0, 0),
        "race": (winner, race.runs),
        "equal replication": (int(runs[:, :equal].mean(axis=1).argmin()), equal * len(true)),
        "same cost": (int(runs[:, :same].mean(axis=1).argmin()), same * len(true)),
    }
    fresh = student_mean(runs[0, 100:105])
    raced = race.losses[str(winner)]
    return {
        "seed": seed,
        "finalists": len(true),
        "within_margin": few.within,
        "ending": race.ending,
        "gap": race.gap,
        "best_dropped": str(int(true.argmin())) not in race.survivors,
        "picks": {
            way: {"regret": float(true[n] - true.min()), "regret_of_all": float(true[n] - loss.min()), "runs": cost}
            for way, (n, cost) in picks.items()
        },
        "bias": {
            "raw minimum": float(observed.min() - true[0]),
            "raw minimum, fresh seeds": fresh.value - float(true[0]),
            "covered by fresh seeds": not fresh.excludes(float(true[0])),
            "winner, repeats of the race": student_mean(raced).value - float(true[winner]),
            "finalists, cross-fitted, against the best": cross_fitted(runs[:, :5]) - float(true.min()),
        },
    }


def cross_fitted(losses: np.ndarray) -> float:
    """Of (candidates, repeats): the mean over repeats of the loss, in that repeat, of the one with the lowest mean over all others."""
    total = losses.sum(axis=1)
    return float(np.mean([column[int((total - column).argmin())] for column in losses.T]))


def largest_of(n: int) -> float:
    """E[max of n standard normals]: how many noise sd too low the minimum of n equally good candidates is."""
    x = np.linspace(-9, 9, 4001)
    return float(np.trapezoid(x * n * stats.norm.pdf(x) * stats.norm.cdf(x) ** (n - 1), x))


def summary(studies: list[dict[str, Any]]) -> dict[str, Any]:
    ways: dict[str, Any] = {}
    for way in WAYS:
        regret = [one["picks"][way]["regret"] for one in studies]
        cost = summarise([one["picks"][way]["runs"] for one in studies])
        wrong = wilson(sum(r > TOLERANCE for r in regret), len(regret))
        ways[way] = {
            "wrong": wrong.value,
            "wrong_low": wrong.low,
            "wrong_high": wrong.high,
            "mean_regret": float(np.mean(regret)),
            "largest_regret": max(regret),
            "mean_regret_of_all_trials": float(np.mean([one["picks"][way]["regret_of_all"] for one in studies])),
            "runs_mean": cost.mean,
            "runs_sd": cost.sd,
            "runs_max": cost.max,
        }
    biases = {}
    for name, first in studies[0]["bias"].items():
        values = [float(one["bias"][name]) for one in studies]
        told = wilson(round(sum(values)), len(values)) if isinstance(first, bool) else student_mean(values)
        biases[name] = {"mean": told.value, "low": told.low, "high": told.high}
    return {
        "ways": ways,
        "best_dropped": sum(one["best_dropped"] for one in studies),
        "endings": {ending: sum(one["ending"] == ending for one in studies) for ending in sorted({one["ending"] for one in studies})},
        "bias": biases,
        "optimism_if_all_were_equal": -SIGMA * largest_of(TRIALS),
    }


def draw(studies: list[dict[str, Any]], found: dict[str, Any], hardest: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for way, colour in zip(WAYS, ("#d55e00", "#0072b2", "#5e6670", "#009e73"), strict=True):
        regret = np.sort([one["picks"][way]["regret"] for one in studies])
        left.step(regret, np.arange(1, len(regret) + 1) / len(regret), where="post", color=colour, label=way, linewidth=1.4)
        for one, face in ((found["ways"][way], colour), (hardest["ways"][way], "white")):
            error = [[100 * (one["wrong"] - one["wrong_low"])], [100 * (one["wrong_high"] - one["wrong"])]]
            right.errorbar(one["runs_mean"], 100 * one["wrong"], yerr=error, fmt="o", color=colour, markerfacecolor=face, capsize=3)
    left.axvline(TOLERANCE, color="#5e6670", linewidth=0.8, linestyle=":")
    left.set_title(f"{len(studies)} studies", fontsize=9)
    left.set(xlabel="true loss above the best finalist's", ylabel="share of studies", ylim=(0, 1.02))
    left.legend(frameon=False, fontsize=8, loc="lower right")
    right.axhline(100 * ERROR_RATE, color="#5e6670", linewidth=0.8, linestyle=":")
    right.set(xlabel="runs per study (hollow: the hardest setting)", ylabel="wrong picks, %", ylim=(-1, None), xlim=(-5, None))
    right.text(1, 6, "promised", fontsize=8, color="#5e6670")
    for axes in (left, right):
        axes.xaxis.label.set_size(8.5)
        axes.yaxis.label.set_size(8.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=200)
    args = parser.parse_args()
    started = time.perf_counter()
    seeds = range(1000, 1000 + args.studies)  # those below 1000 served to design the race
    studies = [study(seed) for seed in seeds]
    found = summary(studies)
    hardest = summary([study(seed, hardest=True) for seed in seeds])
    machine = environment()
    machine.pop("host")
    settings = {"sigma": SIGMA, "seed_shift": SEED_SHIFT, "tolerance": TOLERANCE, "error_rate": ERROR_RATE, "trials": TRIALS}
    settings |= {"most_finalists": FINALISTS, "most_repeats": REPEATS, "budget": BUDGET, "studies": args.studies}
    seconds = round(time.perf_counter() - started, 1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    everything = {
        "settings": settings,
        "summary": found,
        "hardest": hardest["ways"],
        "environment": machine,
        "seconds": seconds,
        "studies": studies,
    }
    (RESULTS / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
    figure = draw(studies, found, hardest)
    for ending in ("svg", "png"):
        figure.savefig(RESULTS / f"figure.{ending}", dpi=160)
    for title, ways in (("studies", found["ways"]), ("hardest", hardest["ways"])):
        print(f"{title:18} wrong                mean regret  runs")
        for way, one in ways.items():
            wrong = f"{one['wrong']:.1%} [{one['wrong_low']:.1%}, {one['wrong_high']:.1%}]"
            print(f"{way:18} {wrong:20} {one['mean_regret']:.5f}      {one['runs_mean']:.0f}")
    print(f"best dropped in {found['best_dropped']} of {len(studies)}; endings: {found['endings']}; {seconds} s")
    for name, told in found["bias"].items():
        print(f"{name}: {told['mean']:.5f} [{told['low']:.5f}, {told['high']:.5f}]")


if __name__ == "__main__":
    main()
