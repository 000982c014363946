"""Seconds from the command to the first training step of the embedded demo, and the CPU seconds spent by then.

    python -m benchmarks.starting OTHER_CHECKOUT --pairs 5      # this checkout and another one, by turns

Each start is `python -m loratune run --demo` in a new folder, watched through its progress.json until a step is told there, and
then stopped. With --cold the prepared data are not in the cache either. CPU seconds are the driver's and its workers'; they say
what a start costs where other programs use the same cores.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

REPOSITORY = Path(__file__).resolve().parents[1]
_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", nargs="?", type=Path, help="another checkout, to be started by turns with this one")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="prepare the data anew at every start")
    args = parser.parse_args()
    checkouts = [path.resolve() for path in (args.other, REPOSITORY) if path is not None]
    taken: dict[Path, list[tuple[float, float, float]]] = {path: [] for path in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        for checkout in checkouts:  # fills the caches of files and of data
            start(checkout, Path(folder), args.cold)
        for _ in range(args.pairs):
            for checkout in checkouts:
                taken[checkout].append(start(checkout, Path(folder), args.cold))
                print(checkout.name, *(f"{value:.1f}" for value in taken[checkout][-1]), flush=True)
    for checkout, values in taken.items():
        wall, driver, workers = (median(column) for column in zip(*values, strict=True))
        print(f"{checkout}: {wall:.1f} s; CPU {driver:.1f} s driver, {workers:.1f} s workers (medians of {len(values)})")


def start(checkout: Path, folder: Path, cold: bool) -> tuple[float, float, float]:
    """(seconds, CPU seconds of the driver, of its workers) until the first step."""
    study, cache = folder / "study", folder / "cache"
    shutil.rmtree(study, ignore_errors=True)
    if cold:
        shutil.rmtree(cache, ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": str(checkout), "LORATUNE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    driver = subprocess.Popen(
        [sys.executable, "-m", "loratune", "run", "--demo", "--output", str(study)],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    while not stepped(study):
        if driver.poll() is not None:
            raise SystemExit(f"{checkout}: the run ended with exit status {driver.returncode}")
        time.sleep(0.02)
    seconds, workers = time.monotonic() - began, sum(cpu_seconds(pid) for pid in children(driver.pid))
    own = cpu_seconds(driver.pid)
    driver.send_signal(signal.SIGINT)
    driver.wait()
    return seconds, own, workers


def stepped(study: Path) -> bool:
    """Whether progress.json, which is written every half second, tells of a step."""
    try:
        shown = json.loads((study / "progress.json").read_text())
    except (OSError, ValueError):
        return False
    return any(row["step"] > 0 for row in shown["running"])


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


if __name__ == "__main__":
    main()
