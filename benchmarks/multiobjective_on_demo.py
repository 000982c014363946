"""Loss against adapter size on the demo: the volume that each sampler's front dominates, at equal cost.

    python benchmarks/multiobjective_on_demo.py [--trials 30] [--seeds 20] [--runs runs/multiobjective] [--table-only N]

A finite space of 126 configurations of the embedded model (rank x layers x learning rate), of which 108 keep the constraint
`adapter_mb <= 0.5`. Each of these is trained once, by the packed engine, into a table; then `nomad` (DMulti-MADS), `nsga2`, `tpe` and
`random` search it with the real loop, storage and samplers, which take their outcomes from the table: a trial's result
depends on its hyperparameters and the training seed alone, and that is one for all. The seeds are the samplers'.

Equal cost is an equal number of proposals; one that breaks the constraint counts, though it is never trained. The volume is
that of (loss, log10 of the size) below the untuned model and the constraint, as a share of what the whole table's
front dominates. Goes on where it was. The table takes about five minutes of one core, each search seconds.
Writes benchmarks/results/multiobjective_on_demo/: results.json, figure.svg and figure.png.
"""

import argparse
import itertools
import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib.figure import Figure
from optuna._hypervolume import compute_hypervolume

from loratune import demo, samplers
from loratune.data.cache import prepare_data
from loratune.data.order import total_steps
from loratune.data.prepared import Prepared
from loratune.executors import Executor
from loratune.executors.inline import InlineExecutor
from loratune.finetune.sizes import adapter_sizes
from loratune.record import INFEASIBLE, StudyRecord, open_record, read
from loratune.record.progress import ProgressTracker
from loratune.record.storage import open_study
from loratune.spec import StudySpec
from loratune.statistics import paired_difference, student_mean
from loratune.study.loop import Loop
from loratune.system.files import write_atomically
from loratune.system.machine import environment
from loratune.work import Hyperparameters, Outcome, Progress, Segment

FEW = 5  # seeds that are also summarised by themselves
COLOURS = {"nomad": "#0072b2", "nsga2": "#cc79a7", "tpe": "#009e73", "random": "#5e6670"}
RESULTS = Path(__file__).resolve().parent / "results" / "multiobjective_on_demo"
LARGEST = 0.5  # MB
SAMPLERS: dict[str, dict[str, Any]] = {
    "nomad": {"name": "nomad"},
    "nsga2": {"name": "nsga2", "population_size": 10},  # Optuna's 50 would be random search
    "tpe": {"name": "tpe"},
    "random": {"name": "random"},
}
SPACE = {
    "lora_r": {"values": [1, 2, 4, 8, 16, 32, 64], "default": 8},
    "target_modules": {"choices": ["qv", "qkvo", "all-linear"], "default": "qv"},
    "learning_rate": {"values": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1], "default": 1e-3},
}


def spec_of(sampler: str, seed: int, trials: int, folder: Path) -> StudySpec:
    given = demo.study()
    given["data"] |= {"train_count": 200, "validation_count": 200}
    given["training"] |= {"validations": 1, "slots": 4}
    given |= {
        "objectives": ["validation_loss", "adapter_mb"],
        "constraints": [f"adapter_mb <= {LARGEST}"],
        "seed": seed,
        "search_space": {**SPACE, "alpha_ratio": 2.0},
        "sampler": SAMPLERS[sampler],
        "executor": "inline",
        "budget": {"trials": trials},
        "output": {"folder": str(folder)},
        "storage": str(folder / "study.log"),
    }
    return StudySpec.load(base=given)


class Table:
    """Outcomes by hyperparameters, one file each; those that are missing are trained."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec = spec_of("random", 0, 1, folder / "study")
        self.data: Prepared = prepare_data(self.spec, [])
        self.size = adapter_sizes(self.spec.recipe("").model)
        grid = (dict(zip(SPACE, values, strict=True)) for values in itertools.product(*(next(iter(d.values())) for d in SPACE.values())))
        every = [self.spec.hyperparameters({**values, "alpha_ratio": 2.0}) for values in grid]
        self.configurations = [h for h in every if self.megabytes(h) <= LARGEST]
        self.outcomes: dict[Hyperparameters, Outcome] = {}
        for index, h in enumerate(self.configurations):
            if (path := self._path(index)).exists():
                self.outcomes[h] = Outcome.from_json(path.read_text())

    def megabytes(self, h: Hyperparameters) -> float:
        return self.size(h) * 4 / 1e6

    def fill(self, most: int) -> None:
        """Train up to `most` of the configurations that are missing."""
        missing = [index for index, h in enumerate(self.configurations) if h not in self.outcomes][:most]
        if not missing:
            return
        executor = InlineExecutor(recipe=self.spec.recipe(str(self.data.folder)), root=self.folder.resolve(), max_retries=1)
        for index in missing:
            h = self.configurations[index]
            steps = total_steps(len(self.data.train), h.batch_size, h.epochs)
            segment = Segment(
                trial=index, hyperparameters=h, seed=0, total_steps=steps, stop_step=steps, validate_at=(0,) if index == 0 else ()
            )
            executor.submit(segment)
        left = set(missing)
        while left:
            for item in executor.collect(timeout=1.0):
                if isinstance(item, Outcome):
                    index = int(item.key.split("/")[0])
                    write_atomically(self._path(index), item.to_json())
                    self.outcomes[self.configurations[index]] = item
                    left.remove(index)
                    print(f"{len(self.outcomes)} of {len(self.configurations)}: {item.state} {item.validation_loss}", flush=True)
        executor.close()

    def _path(self, index: int) -> Path:
        return self.folder / "outcomes" / f"{index:04d}.json"


class FromTable(Executor):
    """Answers each segment with what the table has of its hyperparameters."""

    capacity = 1

    def __init__(self, table: Table) -> None:
        super().__init__(max_retries=0)
        self._table = table
        self._ready: list[Progress | Outcome] = []

    def _start(self, segment: Segment) -> None:
        self._ready.append(replace(self._table.outcomes[segment.hyperparameters], key=segment.key))

    def _poll(self, timeout: float) -> list[Any]:
        ready, self._ready = self._ready, []
        return ready

    def close(self, grace: float = 60.0) -> None:
        pass


def study(table: Table, sampler: str, seed: int, trials: int, folder: Path) -> StudyRecord:
    """One search, run or continued."""
    spec = spec_of(sampler, seed, trials, folder)
    kind = samplers.ordinals(sampler)
    with open_record(folder) as record:
        write_atomically(folder / "spec.yaml", spec.to_yaml())
        built = samplers.build(
            sampler,
            search_space=spec.search_space.distributions(kind),
            seed=seed,
            options=spec.sampler.options,
            x0=spec.search_space.defaults(kind),
        )
        loop = Loop(
            spec=spec,
            record=record,
            study=open_study(url=spec.storage, folder=folder, name=spec.name, sampler=built),
            examples=len(table.data.train),
            validation_examples=len(table.data.validation),
            executor=FromTable(table),
            meter=ProgressTracker(budget_trials=trials, workers=1),
            stop=threading.Event(),
            sizes=table.size,
        )
        for _ in loop.run():
            pass
    return read(folder)


def summed(rows: list[dict[str, Any]], seeds: int, after: list[int]) -> dict[str, Any]:
    """Mean shares over the first `seeds` seeds, and paired differences to random search, with 95 % intervals over seeds."""
    found: dict[str, Any] = {}
    for n in after:
        shares = {name: [r["share"][n - 1] for r in rows if r["sampler"] == name and r["seed"] < seeds] for name in SAMPLERS}
        found[f"after {n}"] = {
            name: {
                "mean_share": str(student_mean(values)) if seeds > 1 else values[0],
                "minus_random": str(paired_difference(values, shares["random"], seed=0)) if seeds > 1 else values[0] - shares["random"][0],
                "better_than_random": sum(own > other for own, other in zip(values, shares["random"], strict=True)),
            }
            for name, values in shares.items()
        }
    return found


def draw(rows: list[dict[str, Any]], known: list[tuple[float, float]], reference: list[float]) -> Figure:
    """Left: the mean share over proposals, with the quartiles over seeds. Right: every configuration, and the table's front."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, colour in COLOURS.items():
        shares = 100 * np.array([row["share"] for row in rows if row["sampler"] == name])
        n = np.arange(1, shares.shape[1] + 1)
        left.plot(n, shares.mean(axis=0), color=colour, label=name)
        if name in ("nomad", "random"):
            left.fill_between(n, *np.quantile(shares, [0.25, 0.75], axis=0), color=colour, alpha=0.15, linewidth=0)
    left.set(xlabel="proposals", ylabel="dominated volume, % of the table's", ylim=(0, 100))
    left.legend(frameon=False, fontsize=8, loc="lower right")
    right.scatter([size for _, size in known], [loss for loss, _ in known], s=9, color="#9aa3ad", linewidths=0, label="configurations")
    on = sorted((size, loss) for loss, size in known if not any(o[0] <= loss and o[1] <= size and o != (loss, size) for o in known))
    right.step(*zip(*on, strict=True), where="post", color="#d55e00", linewidth=1.2)
    right.plot(*zip(*on, strict=True), "o", color="#d55e00", markersize=4, label="front of all")
    right.axhline(reference[0], color="#1b1f24", linewidth=0.8, linestyle="--", label="untuned")
    right.set(xscale="log", xlabel="adapter size, MB", ylabel="validation loss", ylim=(None, reference[0] + 0.6))
    right.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 1.0), handletextpad=0.3, columnspacing=1.0)
    for axes in (left, right):
        axes.xaxis.label.set_size(8.5)
        axes.yaxis.label.set_size(8.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--runs", type=Path, default=Path("runs/multiobjective"))
    parser.add_argument("--table-only", type=int, metavar="N", help="train N more configurations of the table, and stop")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    table = Table(args.runs / "table")
    table.fill(args.table_only or len(table.configurations))
    if args.table_only:
        return
    base = next(p.validation_loss for p in table.outcomes[table.configurations[0]].curve if p.step == 0)
    reference = np.array([base or math.inf, math.log10(LARGEST * 1.001)])

    def volume(pairs: list[tuple[float, float]]) -> float:
        """Hypervolume of the pairs (loss, log10 of the size) up to the reference."""
        points = np.array([[loss, math.log10(size)] for loss, size in pairs]).reshape(-1, 2)
        inside = points[(points < reference).all(axis=1)]
        return float(compute_hypervolume(inside, reference)) if len(inside) else 0.0

    known = [(o.validation_loss, table.megabytes(h)) for h, o in table.outcomes.items() if o.validation_loss is not None]
    whole = volume(known)
    rows: list[dict[str, Any]] = []
    for seed, sampler in itertools.product(range(args.seeds), SAMPLERS):
        record = study(table, sampler, seed, args.trials, args.runs / f"{sampler}-{seed}-{args.trials}")
        finished = {t.number for t in record.finished}
        shares = [volume([t.values for t in record.trials[:n] if t.number in finished]) / whole for n in range(1, args.trials + 1)]  # type: ignore[misc]
        chosen = [t.number for t in {t.number: t for t in [*record.front, *filter(None, [record.best])]}.values()]
        rows.append(
            {
                "sampler": sampler,
                "seed": seed,
                "share": [round(share, 5) for share in shares],  # after 1, 2, ... proposals
                "trials": len(record.trials),
                "trained": sum(bool(t.outcomes) for t in record.trials),
                "infeasible": sum(t.state == INFEASIBLE for t in record.trials),
                "tokens": record.tokens,
                "front": [[t.number, *t.values] for t in record.front],
                "chosen_that_break_the_constraint": sum(table.megabytes(record.trials[n].hyperparameters) > LARGEST for n in chosen),
            }
        )
        print({key: value for key, value in rows[-1].items() if key not in ("front", "share")}, round(shares[-1], 4), flush=True)
    after = sorted({min(n, args.trials) for n in (10, 20, args.trials)})
    summary = {f"{seeds} seeds": summed(rows, seeds, after) for seeds in sorted({min(FEW, args.seeds), args.seeds})}
    machine = dict(environment())
    machine.pop("host", None)
    broken = sum(row["chosen_that_break_the_constraint"] for row in rows)
    settings = {"trials": args.trials, "seeds": args.seeds, "largest_adapter_mb": LARGEST, "untuned": base, "trained": len(known)}
    results = {
        "settings": settings,
        "environment": machine,
        "summary": summary,
        "chosen_that_break_the_constraint": broken,
        "studies": rows,
    }
    write_atomically(RESULTS / "results.json", json.dumps(results) + "\n")
    figure = draw(rows, known, reference)
    for ending in ("svg", "png"):
        figure.savefig(RESULTS / f"figure.{ending}", dpi=160)
    print(json.dumps(summary, indent=1), f"\nchosen trials that break the constraint: {broken}")


if __name__ == "__main__":
    main()
