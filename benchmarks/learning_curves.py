"""100 configurations trained to the end once: a recorded table for comparing samplers and schedules without training.

    python benchmarks/learning_curves.py DATA [--configurations 100] [--part 0/1] [--runs runs/learning-curves]

The problem is studies/tinystories.yaml (TinyStories-656K on Alpaca + Dolly, 70/30), halved: 1,000 training and 250
validation examples, batches of 8, 125 steps. Configurations are drawn at random from the study's own search space, after the
defaults. Each is trained in full, with a validation after 1/27, 1/9 and 1/3 of its steps, and as a complete run of its own
(own warmup and decay) of 1/27, 1/9 and 1/3 of the steps. The packed engine trains them, four at a time. What has been
trained is kept in `--runs`: the same command goes on. `--part 1/2` trains every second configuration.
Writes benchmarks/results/learning_curves/table.json once all are there.
"""

import argparse
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import optuna

from loratune.data.cache import prepare_data
from loratune.data.order import total_steps
from loratune.finetune.engines import load_engine
from loratune.record.paths import StudyPaths
from loratune.spec import StudySpec
from loratune.system.files import write_atomically
from loratune.system.machine import environment
from loratune.work import Outcome, Progress, Segment

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "learning_curves"
RUNGS = (Fraction(1, 27), Fraction(1, 9), Fraction(1, 3))


def description(data: Path) -> StudySpec:
    flags = {
        "model": data / "models" / "tinystories656k",
        "data.train.0.path": data / "alpaca" / "alpaca_random_9k.json",
        "data.train.0.count": 700,
        "data.train.0.validation_count": 175,
        "data.train.1.path": data / "dolly" / "databricks-dolly-15k.jsonl",
        "data.train.1.count": 300,
        "data.train.1.validation_count": 75,
        "training.batch_size": 8,
        "training.engine": "packed",
        "sampler": "random",
    }
    return StudySpec.load(HERE.parent / "studies" / "tinystories.yaml", [(name, str(value)) for name, value in flags.items()])


def configurations(spec: StudySpec, count: int) -> list[dict[str, Any]]:
    """The defaults, then random points, in the space's own names."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [spec.search_space.suggest(study.ask(), "choice") for _ in range(count - 1)]
    return [spec.search_space.default_values(), *drawn]


def wanted(spec: StudySpec, points: list[dict[str, Any]], examples: int) -> list[Segment]:
    """Four segments per configuration: the full run, with its curve, and three short ones."""
    found = []
    for number, point in enumerate(points):
        h = spec.hyperparameters(point)
        total = total_steps(examples, h.batch_size, h.epochs)
        shared = {"trial": number, "hyperparameters": h, "seed": spec.seed}
        on_the_way = tuple(math.ceil(rung * total) for rung in RUNGS)
        found.append(Segment(run="main", total_steps=total, stop_step=total, validate_at=on_the_way, **shared))
        for rung in RUNGS:
            steps = math.ceil(rung * total)
            found.append(Segment(run=f"budget-{rung.numerator}-{rung.denominator}", total_steps=steps, stop_step=steps, **shared))
    return found


def path_of(runs: Path, segment: Segment) -> Path:
    return StudyPaths(runs).of(segment).folder / "outcome.json"


def train(spec: StudySpec, runs: Path, segments: list[Segment], data: str) -> None:
    """Train what is not there yet."""
    from dataclasses import replace

    missing = iter([s for s in segments if not path_of(runs, s).exists()])
    engine = load_engine(replace(spec.recipe(data), slots=4), runs)
    by_key = {s.key: s for s in segments}

    def tell(item: Outcome | Progress) -> None:
        if isinstance(item, Outcome):
            one = by_key[item.key]
            write_atomically(path_of(runs, one), item.to_json())
            print(f"{item.key}  {item.state}  {item.validation_loss}  {item.train_seconds + item.validation_seconds:.1f} s", flush=True)

    import threading

    engine.run(lambda wait: next(missing, None), tell, threading.Event())


def table(runs: Path, points: list[dict[str, Any]], segments: list[Segment]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"number": n, **point} for n, point in enumerate(points)]
    for segment in segments:
        outcome = Outcome.from_json(path_of(runs, segment).read_text())
        rows[segment.trial][segment.run] = {
            "state": outcome.state,
            "curve": [[p.step, p.tokens, None if p.validation_loss is None else round(p.validation_loss, 6)] for p in outcome.curve],
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--configurations", type=int, default=100)
    parser.add_argument("--part", default="0/1", help="i/n: the configurations i, i + n, i + 2 n, ...")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning-curves"))
    args = parser.parse_args()
    spec = description(args.data.resolve())
    prepared = prepare_data(spec, [])
    points = configurations(spec, args.configurations)
    segments = wanted(spec, points, len(prepared.train))
    part, parts = map(int, args.part.split("/"))
    args.runs.mkdir(parents=True, exist_ok=True)
    train(spec, args.runs, [s for s in segments if s.trial % parts == part], str(prepared.folder))
    if all(path_of(args.runs, s).exists() for s in segments):
        machine = environment()
        machine.pop("host", None)
        RESULTS.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps(row) for row in table(args.runs, points, segments)]
        head = json.dumps({"environment": machine, "training_examples": len(prepared.train), "columns": ["step", "tokens", "loss"]})
        (RESULTS / "table.json").write_text(f'{{"about": {head},\n "configurations": [\n  ' + ",\n  ".join(rows) + "\n ]}\n")


if __name__ == "__main__":
    main()
