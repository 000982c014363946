"""What each search finds for the tokens of 1, 2, 3, 5 and 10 full runs, replayed on recorded tables: nothing is trained.

    python benchmarks/search_on_tables.py [--tables stories656k_mix ...] [--searches bracket ...] [--seeds 50] [--slow-seeds 10]

The tables (recorded.py) are those of benchmarks/tables and of learning_curves.py; the searches are listed in searches.py. A
search that ends by its own rule keeps what it found. Writes results.json, table.md and figure.svg to
benchmarks/results/search_on_tables; what a call leaves out stays there as it was.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import optuna
import recorded
from searches import SEARCHES, SHORT, SLOW, guess, run

from loratune.statistics import bootstrap_mean, wilson
from loratune.system.machine import environment

RESULTS = Path(__file__).resolve().parent / "results" / "search_on_tables"
BUDGET = 10.0  # full runs
AT = (1.0, 2.0, 3.0, 3.4, 5.0, 10.0)  # 3.4: three full runs and a guard of short ones
SETTINGS = ("stories656k_mix", "llama2_7b_published")  # the tables on which the bracket's settings were chosen
CURVE = np.arange(4, 41) / 4  # full runs, of the figure


def summary(table: recorded.Table, name: str, seeds: int) -> dict[str, Any]:
    """A search's regret on a table, over seeds, with 95 % intervals: of the mean by bootstrap, of the share Wilson's."""
    ledgers = [run(name, table, seed, BUDGET) for seed in range(seeds)]
    found: dict[str, Any] = {"table": table.name, "search": name, "seeds": seeds}
    regrets = np.array([[ledger.regret(spent) for spent in AT] for ledger in ledgers])
    for spent, column in zip(AT, regrets.T, strict=True):
        mean, within = bootstrap_mean(column, seed=0), wilson(int(np.sum(column <= table.tolerance)), seeds)
        figures = {"mean": mean.value, "low": mean.low, "high": mean.high, "median": np.median(column)}
        figures |= {"within": within.value, "within_low": within.low, "within_high": within.high}
        found[f"{spent:g}"] = {key: round(float(value), 5) for key, value in figures.items()}
    found["curve"] = [round(float(np.mean([ledger.regret(spent) for ledger in ledgers])), 5) for spent in CURVE]
    if any(ledger.claims for ledger in ledgers):
        right = [ledger.regret(spent) <= left for ledger in ledgers for spent, left in ledger.claims]
        at_end = [ledger.regret(BUDGET) <= ledger.claims[-1][1] for ledger in ledgers if ledger.claims]
        found["rule"] = {
            "stopped": round(sum(ledger.ended for ledger in ledgers) / seeds, 3),
            "cost": round(float(np.mean([ledger.spent for ledger in ledgers])), 3),
            "within": round(float(np.mean([ledger.regret(BUDGET) <= table.tolerance for ledger in ledgers])), 3),
            "claims": len(right),
            "claims_right": round(float(np.mean(right)), 3),
            "claims_right_at_end": round(float(np.mean(at_end)), 3),
        }
    return found


def markdown(results: list[dict[str, Any]], tables: dict[str, Any]) -> str:
    """A table of figures per recorded table: mean regret at each budget, and the share within tolerance at 3 and 3.4."""
    parts = []
    for name, about in tables.items():
        rows = [row for row in results if row["table"] == name]
        held = "settings were chosen on it" if name in SETTINGS else "held out"
        parts.append(f"**{name}** ({held}; tolerance {about['tolerance']:.4f}, noise {about['noise']:.4f} nats)\n")
        parts.append("| search | " + " | ".join(f"{spent:g}" for spent in AT) + " | median at 3 | within at 3 | at 3.4 | seeds |")
        parts.append("|---" * (len(AT) + 5) + "|")
        for row in rows:
            means = " | ".join(f"{row[f'{spent:g}']['mean']:.4f}" for spent in AT)
            three, more = row["3"], row["3.4"]
            end = f"{three['median']:.4f} | {three['within']:.0%} | {more['within']:.0%} | {row['seeds']} |"
            parts.append(f"| {row['search']} | {means} | {end}")
        parts.append("")
    stops = [row for row in results if "rule" in row]
    parts.append("| table | search | stopped by itself | full runs by then, or 10 | within | its 90 % statements right | the last |")
    parts.append("|---" * 7 + "|")
    for row in stops:
        rule = row["rule"]
        right = f"{rule['claims_right']:.0%} of {rule['claims']} | {rule['claims_right_at_end']:.0%}"
        parts.append(f"| {row['table']} | {row['search']} | {rule['stopped']:.0%} | {rule['cost']:.2f} | {rule['within']:.0%} | {right} |")
    return "\n".join(parts) + "\n"


def draw(results: list[dict[str, Any]], tables: dict[str, Any], path: Path) -> None:
    """Mean regret against full runs, a panel per table."""
    matplotlib.use("svg")
    from matplotlib import pyplot

    columns = 3
    lines = -(-(len(tables) + 1) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(11, 3.4 * lines), squeeze=False)
    colours = pyplot.get_cmap("tab20").colors
    for axis, (name, about) in zip(axes.flat, tables.items(), strict=False):
        for place, search in enumerate(SEARCHES):
            for row in results:
                if (row["table"], row["search"]) == (name, search):
                    wide = 2.2 if search.startswith("bracket") else 1.0
                    axis.plot(CURVE, np.maximum(row["curve"], 1e-4), color=colours[place % 20], linewidth=wide, label=search)
        axis.axhline(about["tolerance"], color="black", linewidth=0.6, linestyle=":")
        axis.set(title=name, yscale="log", xlabel="tokens, in full runs", ylabel="mean regret, nats")
    for axis in axes.flat[len(tables) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    for axis in axes.flat[: len(tables)]:
        more = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        for label, handle in more.items():
            if label not in labels:
                labels.append(label)
                handles.append(handle)
    axes.flat[-1].legend(handles, labels, fontsize=8, loc="center")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=recorded.names(), default=recorded.names(), metavar="TABLE")
    parser.add_argument("--searches", nargs="+", choices=list(SEARCHES), default=list(SEARCHES), metavar="SEARCH")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--slow-seeds", type=int, default=10, help=f"of {', '.join(SLOW)}, which take seconds to decide")
    args = parser.parse_args()
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "results.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"tables": {}, "results": []}
    machine = environment()
    report["environment"] = {key: machine[key] for key in ("python", "packages", "git", "processor", "cores")}
    for name in args.tables:
        table = recorded.load(name)
        report["tables"][name] = {
            "configurations": len(table.rows),
            "best": round(table.best[0], 5),
            "best_at": table.best[1],
            "lowest_recorded": min(row["losses"][-1] for row in table.rows if row["losses"][-1] is not None),
            "noise": round(table.noise, 5),
            "tolerance": round(table.tolerance, 5),
            "guess": guess(table)[1],
            "left_out": table.fit(),
            "shift": table.shift() if table.short else {},
        }
        shown = report["tables"][name]
        print(
            f"{name}: best {shown['best']} at {shown['best_at']}, noise {shown['noise']}, left out {shown['left_out']}",
            flush=True,
        )
        for search in args.searches:
            if search in SHORT and not table.short:
                continue
            row = summary(table, search, args.slow_seeds if search in SLOW else args.seeds)
            report["results"] = [old for old in report["results"] if (old["table"], old["search"]) != (name, search)] + [row]
            means = "  ".join(f"{row[f'{spent:g}']['mean']:.4f}" for spent in AT)
            print(f"  {search:32} {means}  within at 3: {row['3']['within']:.0%}  {row.get('rule', '')}", flush=True)
            order = list(SEARCHES)
            report["results"].sort(key=lambda old: (recorded.names().index(old["table"]), order.index(old["search"])))
            path.write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "table.md").write_text(markdown(report["results"], report["tables"]))
    draw(report["results"], report["tables"], RESULTS / "figure.svg")


if __name__ == "__main__":
    main()
