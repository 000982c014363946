"""What each low fidelity tells of the end, and what successive halving loses and saves on it: read off the recorded table.

    python benchmarks/schedules_on_curves.py [--seeds 5]

Trains nothing: benchmarks/results/learning_curves/table.json holds 100 configurations trained to the end, their losses on the
way (`steps`: a truncated long run) and as complete short runs (`budget`). The project's own schedule decides on them as in
a study with one worker and random search, whose seed is the order in which configurations come. Writes
benchmarks/results/learning_curves/schedules.json and figure.svg beside it.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from loratune import schedules
from loratune.schedules import Slice, SliceResult
from loratune.statistics import spearman

RESULTS = Path(__file__).resolve().parent / "results" / "learning_curves"
RUNGS = {"1/27": 1 / 27, "1/9": 1 / 9, "1/3": 1 / 3}


class Table:
    """The recorded losses, by configuration."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def look_up(self, row: int, run: str, share: float) -> tuple[float | None, int]:
        """(loss, tokens from the run's start) of a configuration at a share of a run; no loss where it diverged."""
        curve = self.rows[row][run]["curve"]
        last = self.rows[row][run]["state"] == "completed"
        if share == 1.0:
            _, tokens, loss = curve[-1] if curve else (0, 0, None)
            return (loss if last else None), tokens
        place = sorted(RUNGS.values()).index(share)
        return (curve[place][2], curve[place][1]) if place < len(curve) else (None, curve[-1][1] if curve else 0)

    def final(self, row: int) -> float | None:
        return self.look_up(row, "main", 1.0)[0]


def correlations(table: Table) -> list[dict[str, Any]]:
    """Spearman's rank correlation of each fidelity's loss with the final one, over the configurations that did not diverge."""
    found = []
    best = min(f for f in map(table.final, range(len(table.rows))) if f is not None)
    for axis in ("steps", "budget"):
        for name, share in RUNGS.items():
            run = "main" if axis == "steps" else f"budget-{name.replace('/', '-')}"
            pairs = [(table.look_up(n, run, share if axis == "steps" else 1.0)[0], table.final(n)) for n in range(len(table.rows))]
            both = [(low, end) for low, end in pairs if low is not None and end is not None]
            top = [pair for pair in both if pair[1] < best + 0.3]
            row: dict[str, Any] = {"axis": axis, "share": name, "configurations": len(both)}
            for label, chosen in (("all", both), ("within 0.3 of the best", top)):
                interval = spearman([a for a, _ in chosen], [b for _, b in chosen], seed=0)
                row[label] = {"n": len(chosen), "spearman": interval.value, "low": interval.low, "high": interval.high}
            found.append(row)
    return found


def simulate(table: Table, axis: str, smallest: float, seed: int) -> tuple[float, float]:
    """(final loss of the configuration found, training tokens) of a study of all configurations in a random order."""
    order = np.random.default_rng(seed).permutation(len(table.rows))
    name = "full" if axis == "full" else "halving"
    schedule = schedules.build(
        name,
        trials=len(order),
        baseline=False,
        fidelity=axis if axis != "full" else "budget",
        reduction_factor=3,
        min_resource=smallest,
    )
    tokens, best = 0, float("inf")
    while (slice := schedule.next(may_start=True)) is not None:
        loss, spent = answer(table, int(order[slice.trial]), slice)
        tokens += spent
        schedule.tell(slice, SliceResult(loss=loss))
        if loss is not None and slice.length * slice.stop == 1:
            best = min(best, loss)
    return best, tokens


def answer(table: Table, row: int, slice: Slice) -> tuple[float | None, int]:
    if slice.run != "main":
        return table.look_up(row, slice.run, 1.0)
    loss, end = table.look_up(row, "main", float(slice.stop))
    return loss, end - (table.look_up(row, "main", float(slice.start))[1] if slice.start else 0)


def random_search(table: Table, tokens: float, seed: int) -> float:
    """The best of as many full runs, in the same random order, as that many tokens pay for."""
    best, spent = float("inf"), 0
    for row in np.random.default_rng(seed).permutation(len(table.rows)):
        loss, cost = table.look_up(int(row), "main", 1.0)
        spent += cost
        if spent > tokens:
            break
        best = min(best, loss if loss is not None else float("inf"))
    return best


def draw(table: Table, path: Path) -> None:
    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(9, 5.5), sharey=True)
    for row, axis in enumerate(("steps", "budget")):
        for column, (name, share) in enumerate(RUNGS.items()):
            run = "main" if axis == "steps" else f"budget-{name.replace('/', '-')}"
            pairs = [(table.look_up(n, run, share if axis == "steps" else 1.0)[0], table.final(n)) for n in range(len(table.rows))]
            shown = [(low, end) for low, end in pairs if low is not None and end is not None]
            axes[row, column].scatter([a for a, _ in shown], [b for _, b in shown], s=9, color="#2a6f97")
            axes[row, column].set_title(f"{axis}, {name} of the run", fontsize=9)
    figure.supxlabel("loss at the low fidelity")
    figure.supylabel("loss at the end")
    figure.tight_layout()
    figure.savefig(path)


def _interval(row: dict[str, Any]) -> str:
    return f"{row['spearman']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    table = Table(json.loads((RESULTS / "table.json").read_text())["configurations"])
    finals = [f for f in map(table.final, range(len(table.rows))) if f is not None]
    best, whole = min(finals), sum(table.look_up(n, "main", 1.0)[1] for n in range(len(table.rows)))
    report: dict[str, Any] = {"best": best, "configurations": len(table.rows), "diverged": len(table.rows) - len(finals)}
    report["full_tokens"], report["correlations"], report["schedules"] = whole, correlations(table), []
    for row in report["correlations"]:
        everyone, near = row["all"], row["within 0.3 of the best"]
        print(f"{row['axis']:7} {row['share']:>5}  Spearman {_interval(everyone)}   near the best ({near['n']}) {_interval(near)}")
    for axis in ("steps", "budget"):
        for name, smallest in RUNGS.items():
            runs = [simulate(table, axis, smallest, seed) for seed in range(args.seeds)]
            alone = [random_search(table, tokens, seed) - best for seed, (_, tokens) in enumerate(runs)]
            lost, share = [loss - best for loss, _ in runs], [tokens / whole for _, tokens in runs]
            report["schedules"].append(
                {"axis": axis, "first rung": name, "lost": lost, "share of tokens": share, "random search at the same tokens lost": alone}
            )
            middle = [statistics.median(values) for values in (lost, share, alone)]
            print(
                f"halving on {axis:7} from {name:>5}: lost {middle[0]:.4f} (worst {max(lost):.4f}) for {middle[1]:.1%} of the tokens;",
                end=" ",
            )
            print(f"random search for the same: {middle[2]:.4f}")
    (RESULTS / "schedules.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(table, RESULTS / "figure.svg")


if __name__ == "__main__":
    main()
