"""The default search of three full runs against NOMAD and NNI's TPE with 100 trials, by real training.

    python benchmarks/three_full_runs.py DATA [--ways bracket nomad nni_tpe] [--problems ...] [--seeds 3] [--fresh 5] [--runs runs/three]

The three problems of record_tables.py: TinyStories-656K on Dolly, the embedded model on the demo's data, Stories-260K on
Alpaca. Every way searches the default space of `loratune run`; the seed is the study's, of data order, initial weights and
sampler. Studies run one after the other with one worker of one thread; one that has ended is only read, one that was killed goes
on. The lowest of a hundred noisy losses is lower than what its configuration gives, so each study's best is trained again with
fresh seeds, the same for all. Writes benchmarks/results/three_full_runs/results.json: the best loss after so many tokens, and
the losses with fresh seeds, of every study.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from record_tables import Problem, Recorder, description, prepare_sources, problems

from loratune.record import StudyRecord, read
from loratune.record.paths import StudyPaths
from loratune.spec import StudySpec
from loratune.work import Segment

RESULTS = Path(__file__).resolve().parent / "results" / "three_full_runs"
WAYS: dict[str, list[str]] = {
    "bracket": [],  # what `loratune run` does by itself
    "nomad": ["--sampler", "nomad", "--trials", "100"],
    "nni_tpe": ["--sampler", "nni_tpe", "--trials", "100"],
}


def run(spec: Path, way: str, seed: int, folder: Path) -> StudyRecord:
    """The study, trained to its end."""
    if StudyPaths(folder).spec.is_file() and (record := read(folder)).budget_spent:
        return record
    flags = ["--seed", str(seed), "--output", str(folder), "--executor.workers", "1", "--executor.threads", "1"]
    subprocess.run([sys.executable, "-m", "loratune", "run", str(spec), *WAYS[way], *flags], check=True, stdout=subprocess.DEVNULL)
    return read(folder)


def course(record: StudyRecord) -> list[tuple[int, float]]:
    """(training tokens so far, lowest validation loss of a full run so far), after each full run in order of number."""
    found: list[tuple[int, float]] = []
    tokens, best = 0, float("inf")
    for trial in record.trials:
        tokens += trial.tokens
        if trial.value is not None and not trial.short:
            best = min(best, trial.value)
            found.append((tokens, best))
    return found


def summary(record: StudyRecord) -> dict[str, Any]:
    best = record.best
    return {
        "best": best and best.value,
        "hyperparameters": best and best.params,
        "untuned": record.base_loss,
        "trials": len(record.trials),
        "tokens": record.tokens,
        "device_seconds": record.device_seconds,
        "wall_seconds": record.wall_seconds,
        "course": course(record),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--problems", nargs="+", help="of record_tables.py; all, unless given")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fresh", type=int, default=5, help="fresh seeds with which each study's best is trained again")
    parser.add_argument("--runs", type=Path, default=Path("runs/three"))
    args = parser.parse_args()
    runs = args.runs.resolve()
    prepare_sources(args.data, runs)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for problem in problems(args.data.resolve(), runs):
        if args.problems and problem.name not in args.problems:
            continue
        spec = runs / f"{problem.name}.yaml"
        plain = description(problem, target_modules="all-linear").model_dump(mode="json", exclude_defaults=True)
        del plain["budget"]  # each way has its own
        spec.write_text(yaml.safe_dump(plain, sort_keys=False))
        for seed in range(args.seeds):
            for way in args.ways:
                record = run(spec, way, seed, runs / f"{problem.name}-{way}-{seed}")
                keep(problem.name, way, seed, record)
        again(problem, runs, args.fresh)


def again(problem: Problem, runs: Path, fresh: int) -> None:
    """The best of each of the problem's studies, trained with fresh seeds: their losses into the results."""
    found = json.loads((RESULTS / "results.json").read_text())
    recorder, engine = Recorder(problem, runs / "fresh"), []
    for row in (study for study in found["studies"] if study["problem"] == problem.name and study["best"] is not None):
        folder = runs / f"{problem.name}-{row['way']}-{row['seed']}"
        h = StudySpec.load(StudyPaths(folder).spec).hyperparameters(row["hyperparameters"])
        segments = [
            Segment(
                trial=row["seed"], run=f"{row['way']}-{row['seed']}-{repeat}", hyperparameters=h, seed=1000 + repeat,
                total_steps=recorder.steps, stop_step=recorder.steps,
            )
            for repeat in range(fresh)
        ]  # fmt: skip
        recorder.train(segments, engine)
        row["fresh"] = [recorder.loss(segment) for segment in segments]
        print(problem.name, row["way"], row["seed"], "fresh seeds:", statistics.mean(row["fresh"]), flush=True)
    (RESULTS / "results.json").write_text(json.dumps(found, indent=1) + "\n")


def keep(problem: str, way: str, seed: int, record: StudyRecord) -> None:
    """One study's row into the results, in the place of an earlier one."""
    path = RESULTS / "results.json"
    found = json.loads(path.read_text()) if path.exists() else {"machine": {}, "studies": []}
    found["machine"] = {key: value for key, value in record.sessions[-1]["environment"].items() if key != "host"}
    row = {"problem": problem, "way": way, "seed": seed}
    others = [study for study in found["studies"] if any(study[key] != row[key] for key in row)]
    earlier = [study["fresh"] for study in found["studies"] if study not in others and "fresh" in study]
    row |= summary(record) | ({"fresh": earlier[0]} if earlier else {})
    found["studies"] = sorted([*others, row], key=lambda s: (s["problem"], s["way"], s["seed"]))
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(problem, way, seed, record.best and record.best.value, f"{record.tokens:,} tokens", flush=True)


if __name__ == "__main__":
    main()
