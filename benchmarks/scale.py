"""What the driver costs with many devices: the real loop, record and storage around devices that a formula stands for.

    python benchmarks/scale.py [--devices 1000] [--places 4000] [--trials 10000] [--sampler random] [--output NAME]
    python benchmarks/scale.py --order      # what the order of results alone costs, by places per device; seconds

A trial takes ten minutes of simulated time, give or take a tenth; one in fifty takes three times as long (a straggler), and a
device is taken away every six hours on average, for two minutes, its trial going on from a checkpoint a minute old. The simulated
clock runs on while the driver works, second by second, so a slow driver leaves devices idle. `--places` are the segments in flight
at a time, `executor.workers` of a study: those beyond the devices wait, so that a device that is done need not wait for the result
that is next in order. Results are applied in order, so all who come after a straggler are in flight until it ends.

Busy: device-seconds that trained / device-seconds that there were (devices that were taken away are not there), from the first
trial's start until there are no more trials than devices (`while_trials_are_left`), and to the end of the last (`whole_study`).
Writes NAME.json to benchmarks/results/scale.
"""

import argparse
import heapq
import json
import math
import os
import random
import resource
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import optuna

from loratune import samplers
from loratune.executors import Executor
from loratune.executors.base import News
from loratune.record import open_record, read
from loratune.record.progress import ProgressTracker
from loratune.record.storage import open_study
from loratune.spec import StudySpec
from loratune.study.loop import Loop, SegmentFinished
from loratune.system.files import write_atomically
from loratune.system.machine import environment
from loratune.work import CurvePoint, Outcome, Segment, State

RESULTS = Path(__file__).resolve().parent / "results" / "scale"
TRIAL, STRAGGLER, SHARE = 600.0, 3.0, 0.02  # seconds; times as long; share of the trials
BETWEEN, AWAY, LOST = 6 * 3600.0, 120.0, 60.0  # seconds between two preemptions of a device, without it, of work lost
EXAMPLES, VALIDATION = 640, 60


class Simulated(Executor):
    """Devices on a clock of their own, which runs on while the driver works."""

    def __init__(self, devices: int, places: int, trials: int, seed: int) -> None:
        super().__init__(max_retries=0)
        self.capacity, self.processes = places, devices
        self.clock = 0.0  # seconds
        self.worked, self.there = [0.0, 0.0], [0.0, 0.0]  # device-seconds: while trials are left for all devices, and in all
        self.preemptions = 0
        self._devices, self._running, self._away, self._left_over = devices, 0, 0, trials
        self._waiting: deque[tuple[Segment, float]] = deque()
        self._left: dict[str, float] = {}  # work of preempted segments
        self._events: list[tuple[float, int, Segment | None, float | None]] = []  # end, number, segment, work left if preempted
        self._news: list[News] = []
        self._chance, self._number, self._last = random.Random(seed), 0, time.perf_counter()

    def pause(self, seconds: float) -> None:
        """The clock stands for so long: the benchmark itself was at work."""
        self._last += seconds

    def _start(self, segment: Segment) -> None:
        self._run_on()
        work = TRIAL * self._chance.lognormvariate(0.0, 0.1) * (STRAGGLER if self._chance.random() < SHARE else 1.0)
        again = segment.attempt > 1  # as the executor for Ray: others wait for its result
        (self._waiting.appendleft if again else self._waiting.append)((segment, self._left.pop(segment.key, work)))
        self._fill()

    def _fill(self) -> None:
        while self._waiting and self._running + self._away < self._devices:
            segment, work = self._waiting.popleft()
            until = self._chance.expovariate(1 / BETWEEN)
            self._running += 1
            self._event(min(until, work), segment, work - max(0.0, until - LOST) if until < work else None)

    def _event(self, after: float, segment: Segment | None, left: float | None) -> None:
        self._number += 1
        heapq.heappush(self._events, (self.clock + after, self._number, segment, left))

    def _turn(self, clock: float) -> None:
        for place, counts in enumerate((self._left_over > self._devices, self._left_over > 0)):
            self.worked[place] += counts * (clock - self.clock) * self._running
            self.there[place] += counts * (clock - self.clock) * (self._devices - self._away)
        self.clock = clock

    def _run_on(self, wait: bool = False) -> None:
        """What happens until now, or, while the driver waits, until something does."""
        now = time.perf_counter()
        until, self._last = self.clock + now - self._last, now
        if wait and not self._news and self._events:
            until = max(until, self._events[0][0])
        while self._events and self._events[0][0] <= until:
            end, _, segment, left = heapq.heappop(self._events)
            self._turn(end)
            if segment is None:
                self._away -= 1
            elif left is None:
                self._running, self._left_over = self._running - 1, self._left_over - 1
                self._news.append(_outcome(segment))
            else:
                self.preemptions += 1
                self._running, self._away = self._running - 1, self._away + 1
                self._left[segment.key] = left
                self._event(AWAY, None, None)
                self._news.append(Outcome(key=segment.key, state=State.CANCELLED, attempt=segment.attempt))
            self._fill()
        self._turn(until)

    def _poll(self, timeout: float) -> list[News]:
        self._run_on(wait=True)
        news, self._news = self._news, []
        return news

    def close(self, grace: float = 60.0) -> None:
        pass


def busy_by_order(devices: int, places: int, trials: int, seed: int = 0) -> float:
    """`while_trials_are_left` of devices that are never away and a driver that takes no time: what waiting for stragglers costs."""
    chance, ends, waiting = random.Random(seed), list[tuple[float, int]](), deque[int]()
    clock = worked = there = 0.0
    sent = applied = running = 0
    done: set[int] = set()
    while applied < trials:
        while sent < min(trials, applied + places):
            waiting.append(sent)
            sent += 1
        while waiting and running < devices:
            work = TRIAL * chance.lognormvariate(0.0, 0.1) * (STRAGGLER if chance.random() < SHARE else 1.0)
            heapq.heappush(ends, (clock + work, waiting.popleft()))
            running += 1
        end, trial = heapq.heappop(ends)
        if trials - len(done) > devices:
            worked, there = worked + (end - clock) * running, there + (end - clock) * devices
        clock, running = end, running - 1
        done.add(trial)
        while applied in done:
            applied += 1
    return worked / there


def _outcome(segment: Segment) -> Outcome:
    h = segment.hyperparameters
    strength = math.log10(h.learning_rate) + 0.5 * math.log10(h.lora_alpha / h.lora_r)
    loss = 1.0 + 0.2 * (strength + 3.5) ** 2 + 0.1 * h.lora_dropout
    points = sorted({*segment.validate_at, segment.stop_step})
    curve = tuple(
        CurvePoint(step=p, tokens=100 * p, train_loss=loss, validation_loss=loss + 0.3 * (1 - p / segment.stop_step)) for p in points
    )
    return Outcome(key=segment.key, state=State.COMPLETED, validation_loss=loss, curve=curve, tokens=60_000, train_seconds=TRIAL)


def main(devices: int, places: int, trials: int, sampler: str, folder: Path) -> dict[str, Any]:
    given = {
        "name": "scale",
        "model": {"name_or_path": "formula"},
        "data": {"train": ["none.json"], "validation_count": VALIDATION},
        "sampler": {"name": sampler},
        "budget": {"trials": trials},
        "output": {"folder": str(folder)},
    }
    spec = StudySpec.model_validate(given)
    executor = Simulated(devices, places, trials, seed=0)
    points: list[dict[str, float]] = []
    with open_record(spec.folder) as record:
        write_atomically(record.paths.spec, spec.to_yaml())
        study = open_study(
            url=None,
            folder=record.folder,
            name=spec.name,
            sampler=samplers.build(
                sampler,
                search_space=spec.search_space.distributions(samplers.ordinals(sampler)),
                seed=0,
                options={},
                x0=spec.search_space.defaults(samplers.ordinals(sampler)),
                workers=places,
                conditional=False,
                trials=trials,
            ),
        )
        meter = ProgressTracker(budget_trials=trials, workers=devices)
        loop = Loop(
            spec=spec,
            record=record,
            study=study,
            examples=EXAMPLES,
            validation_examples=VALIDATION,
            executor=executor,
            meter=meter,
            stop=threading.Event(),
        )
        began = last = time.perf_counter()
        began_cpu = last_cpu = time.process_time()
        settled, step, spent = 0, max(1, trials // 10), 0.0
        for event in loop.run():
            if not isinstance(event, SegmentFinished):
                continue
            settled += 1
            if settled % step == 0:
                now, now_cpu = time.perf_counter(), time.process_time()
                size = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
                points.append(
                    {
                        "trials": settled,
                        "ms_per_trial": round(1000 * (now - last) / step, 2),
                        "cpu_ms_per_trial": round(1000 * (now_cpu - last_cpu) / step, 2),
                        "memory_mib": round(_memory() / 2**20, 1),
                        "storage_mib": round(sum(size) / 2**20, 2),
                        "database_mib": round(record.paths.database.stat().st_size / 2**20, 2),
                        "files": len(size),
                    }
                )
                print(json.dumps(points[-1]), flush=True)
                last, last_cpu = time.perf_counter(), time.process_time()
                executor.pause(last - now)
                spent, began_cpu = spent + last - now, began_cpu + last_cpu - now_cpu
        seconds, cpu = time.perf_counter() - began - spent, time.process_time() - began_cpu
    ended = [trial for trial in read(folder).trials if trial.state.ended]
    assert len({trial.number for trial in ended}) == len(ended) == trials, "none lost, none doubled"  # noqa: S101
    return {
        "devices": devices,
        "places": places,
        "trials": trials,
        "sampler": sampler,
        "driver_ms_per_trial": round(1000 * seconds / trials, 2),
        "driver_cpu_ms_per_trial": round(1000 * cpu / trials, 2),
        "load": round(os.getloadavg()[0], 1),  # of the machine, by other work too
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1),
        "storage_kib_per_trial": round(1024 * points[-1]["storage_mib"] / trials, 2),
        "simulated_hours": round(executor.clock / 3600, 2),
        "preemptions": executor.preemptions,
        "busy_while_trials_are_left": round(executor.worked[0] / max(1.0, executor.there[0]), 4),
        "busy_whole_study": round(executor.worked[1] / executor.there[1], 4),
        "disk": _disk(folder),
        "growth": points,
        "environment": environment(),
    }


def _disk(folder: Path) -> str:
    """The kind of file system that holds the folder: tmpfs is main memory, where nothing waits for a disk."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return max((mount for mount in mounts if folder.is_relative_to(mount[1])), key=lambda mount: len(mount[1]))[2]


def _memory() -> int:
    """Bytes of main memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--places", type=int, default=None, help="default: four for each device")
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--output", default=None)
    parser.add_argument("--order", action="store_true", help="only what the order of results costs, without a driver")
    args = parser.parse_args()
    if args.order:
        found = {f"{n:g}": round(busy_by_order(args.devices, int(n * args.devices), args.trials), 4) for n in (1, 1.5, 2, 3, 4, 6)}
        text = json.dumps({"devices": args.devices, "trials": args.trials, "busy_by_places_per_device": found}, indent=1)
        (RESULTS / f"order_{args.devices}_{args.trials}.json").write_text(text + "\n")
        print(text)
        raise SystemExit
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        found = main(args.devices, args.places or 4 * args.devices, args.trials, args.sampler, Path(temporary) / "study")
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = args.output or f"{args.sampler}_{args.devices}_{args.trials}"
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key not in ("growth", "environment")}, indent=1))
