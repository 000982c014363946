"""Three samplers on one real problem: the published study scaled down to TinyStories-656K, Alpaca and Dolly.

    python benchmarks/samplers_on_tinystories.py DATA [--trials 30] [--samplers nomad nni_tpe random]

DATA holds models/tinystories656k, alpaca/alpaca_random_9k.json and dolly/databricks-dolly-15k.jsonl. The
studies run one after the other with one worker of one thread each; a study that has run already is only
read. Writes benchmarks/results/samplers_on_tinystories/: results.json (every trial, the machine, the
versions), report.html and figures/.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from loratune.record import StudyRecord, read
from loratune.report import write_report

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "samplers_on_tinystories"


def command(data: Path, sampler: str, trials: int, folder: Path) -> list[str]:
    alpaca, dolly = data / "alpaca" / "alpaca_random_9k.json", data / "dolly" / "databricks-dolly-15k.jsonl"
    flags = {"sampler": sampler, "trials": trials, "output": folder, "name": folder.name, "model": data / "models" / "tinystories656k"}
    flags |= {"data.train.0.path": alpaca, "data.train.1.path": dolly, "executor.workers": 1, "executor.threads": 1}
    study = [sys.executable, "-m", "loratune", "run", str(HERE.parent / "studies" / "tinystories.yaml")]
    return study + [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def summary(record: StudyRecord) -> dict[str, Any]:
    """What is committed of one study."""
    environment = dict(record.sessions[-1]["environment"])
    environment.pop("host")
    losses = [t.value for t in record.finished]
    best_so_far = [min(losses[: n + 1]) for n in range(len(losses))]
    return {
        "sampler": record.spec["sampler"]["name"],
        "environment": environment,
        "base_loss": record.base_loss,
        "default_loss": record.default.value if record.default else None,
        "best_loss": record.best.value if record.best else None,
        "median_loss": statistics.median(losses),
        "best_so_far": best_so_far,
        "device_seconds": record.device_seconds,
        "tokens": record.tokens,
        "trials": [
            {"number": t.number, **t.params, "state": t.state, "validation_loss": t.value, "device_seconds": t.device_seconds}
            for t in record.trials
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--samplers", nargs="+", default=["nomad", "nni_tpe", "random"])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the studies' folders are")
    args = parser.parse_args()
    folders = {sampler: args.runs / f"tinystories-{sampler.replace('_', '-')}" for sampler in args.samplers}
    for sampler, folder in folders.items():
        subprocess.run(command(args.data, sampler, args.trials, folder), check=True)
    records = [read(folder) for folder in folders.values()]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "results.json").write_text(json.dumps([summary(record) for record in records], indent=1) + "\n")
    write_report(records, RESULTS / "report.html")
    print("sampler    best      after 10  after 20  median    device-minutes")
    for record in records:
        one = summary(record)
        curve = one["best_so_far"]
        early = [curve[min(n, len(curve)) - 1] for n in (10, 20)]
        figures = [one["best_loss"], *early, one["median_loss"]]
        print(f"{one['sampler']:10} " + "  ".join(f"{x:.5f}" for x in figures) + f"  {one['device_seconds'] / 60:.1f}")


if __name__ == "__main__":
    main()
