"""A whole study to a target loss: `hf` with `full` against `packed` with `halving`, in seconds and training tokens.

    python benchmarks/study_to_target.py [--trials 20] [--seeds 3] [--runs runs/study-to-target]

The demo's study (embedded model, random search, one worker of all cores), once per seed and way. The target of a seed is what
its `hf` + `full` study ends at, plus a tolerance of 0.05 nats. Told are the seconds on the clock and the training tokens
until a finished trial is at the target, and those of the whole study. Studies that are there are only read.
Writes benchmarks/results/study_to_target/results.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from loratune.record import StudyRecord, read

RESULTS = Path(__file__).resolve().parent / "results" / "study_to_target"
WAYS = {
    "hf + full": {"training.engine": "hf", "schedule": "full"},
    "packed + full": {"training.engine": "packed", "schedule": "full"},
    "packed + halving, budget": {"training.engine": "packed", "schedule": "halving", "schedule.fidelity": "budget"},
    "packed + halving, steps": {"training.engine": "packed", "schedule": "halving", "schedule.fidelity": "steps"},
}
TOLERANCE = 0.05


def run(way: str, seed: int, trials: int, folder: Path) -> StudyRecord:
    flags = {**WAYS[way], "sampler": "random", "seed": seed, "trials": trials, "executor.workers": 1, "output": folder}
    flags |= {"training.validations": 1, "name": folder.name}
    command = [sys.executable, "-m", "loratune", "run", "--demo", *[text for k, v in flags.items() for text in (f"--{k}", str(v))]]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read(folder)


def course(record: StudyRecord) -> list[tuple[float, int, float | None]]:
    """(seconds since the study began, tokens so far, loss if a trial was finished then), in the order outcomes came."""
    began = record.sessions[0]["started"]
    came = sorted(
        (
            record.paths.outcome(o.key).stat().st_mtime - began,
            o.tokens,
            o.validation_loss if o.key.split("/")[1] == "main" else None,
            t,
        )
        for t, o in ((t.state == "complete" and o is t.outcomes[-1], o) for t in record.trials for o in t.outcomes)
    )
    found, tokens = [], 0
    for seconds, more, loss, finished in came:
        tokens += more
        found.append((seconds, tokens, loss if finished else None))
    return found


def reached(record: StudyRecord, target: float) -> tuple[float, int] | None:
    return next(((s, tokens) for s, tokens, loss in course(record) if loss is not None and loss <= target), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/study-to-target"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        records = {way: run(way, seed, args.trials, args.runs / f"{n}-{seed}") for n, way in enumerate(WAYS)}
        best = records["hf + full"].best
        target = (best.value or 0.0) + TOLERANCE if best else 0.0
        for way, record in records.items():
            at, end = reached(record, target), course(record)[-1]
            row = {"seed": seed, "way": way, "target": target, "best": record.best.value if record.best else None}
            row |= {"seconds_to_target": at and at[0], "tokens_to_target": at and at[1], "seconds": end[0], "tokens": end[1]}
            rows.append(row)
            print(row, flush=True)
    machine = dict(read(args.runs / "0-0").sessions[-1]["environment"])
    machine.pop("host", None)
    ratios = {}
    for way in list(WAYS)[1:]:
        of = {(row["seed"], row["way"]): row for row in rows}
        pairs = [(of[seed, "hf + full"], of[seed, way]) for seed in range(args.seeds)]
        ratios[way] = {
            unit: statistics.median(one[unit] / two[unit] for one, two in pairs if one[unit] and two[unit])
            for unit in ("seconds", "tokens", "seconds_to_target", "tokens_to_target")
            if any(one[unit] and two[unit] for one, two in pairs)
        } | {"reached": sum(two["seconds_to_target"] is not None for _, two in pairs)}
        print(way, ratios[way])
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "results.json").write_text(json.dumps({"environment": machine, "hf_full_over": ratios, "studies": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
