"""What runs right now, in numbers: the one summary behind the live view, `loratune status` and `progress.json`."""

import math
import os
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from loratune.record.states import TrialState
from loratune.record.trials import LOSS, Trial, ranking_key
from loratune.work import Outcome, Progress

_SCORING = "/scoring"  # a trial's row while it is scored
_WINDOW = 30.0  # seconds over which tokens per second are averaged


@dataclass
class ProgressTracker:
    """Takes the study's events, gives snapshots: plain dicts of numbers and strings, seconds and tokens.

    Replayed outcomes count as work done, not as work of this session, so speed and time left stay honest.
    """

    budget_trials: int
    workers: int  # processes; a trial's seconds are its share of one's
    earlier_seconds: float = 0.0  # wall clock of former sessions
    budget_runs: float | None = None  # full runs, where they are the budget
    runs: float = 0.0  # settled so far
    left: float | None = None  # nats below the best that are left to find, with 90 %, where the sampler can tell
    devices: int = 1  # that train one trial
    earlier_device_seconds: float = 0.0  # of former sessions, what was paused there included
    price: float | None = None  # of a device-hour
    budget_cost: float | None = None
    currency: str = ""
    objectives: dict[str, str] = field(default_factory=lambda: {LOSS: "minimize"})  # name -> direction; the first says which trial is best
    idle: str = ""  # a sentence on devices without work
    _started: float = field(default_factory=time.monotonic)
    _running: dict[str, dict[str, Any]] = field(default_factory=dict)
    _trials: dict[int, Trial] = field(default_factory=dict)
    _speed: deque[tuple[float, int]] = field(default_factory=deque)  # (moment, tokens since the moment before)
    _here: float = 0.0  # device-seconds trained in this session
    _device_seconds: float = 0.0
    _tokens: int = 0
    _ended: int = 0
    _came: bool = False  # a result, in this session
    _settled_at: float = field(default_factory=time.monotonic)
    _best: Trial | None = None
    _at_work: set[str] = field(default_factory=set)  # segments and scorings that were heard of and run
    _busy: float = 0.0  # device-seconds of this session, by the clock
    _ticked: float = field(default_factory=time.monotonic)
    _heard: float = field(default_factory=time.monotonic)  # when what trains last spoke

    @property
    def wall_seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self._started

    @property
    def device_seconds(self) -> float:
        return self._device_seconds

    @property
    def tokens(self) -> int:
        """Training tokens of the settled trials."""
        return self._tokens

    @property
    def spent_device_seconds(self) -> float:
        """Of all starts, with what runs now: its own seconds are known at its end; until then a process at work counts by the clock."""
        self._tick()
        return max(self.device_seconds, self.earlier_device_seconds + self._busy)

    @property
    def cost(self) -> float | None:
        """That, at the price of a device-hour; None without a price."""
        return None if self.price is None else self.spent_device_seconds / 3600 * self.price

    def _tick(self) -> None:
        now, scoring = time.monotonic(), sum(key.endswith(_SCORING) for key in self._at_work)
        training = min(self.workers, len(self._at_work) - scoring)
        self._busy += (now - self._ticked) * (training * self.devices + scoring)
        self._ticked = now

    def began(self, key: str, total_steps: int, start_step: int) -> None:
        self._running[key] = {"trial": int(key.split("/")[0]), "run": key.split("/")[1], "step": start_step}
        self._running[key] |= {"total_steps": total_steps, "tokens": 0, "train_loss": None, "validation_loss": None}

    def progressed(self, progress: Progress) -> None:
        row = self._running.get(progress.key)
        if row is None:
            return
        self._work(progress.key)
        self._speed.append((time.monotonic(), max(0, progress.tokens - row["tokens"])))
        row |= {"step": progress.step, "tokens": progress.tokens}
        losses = {"train_loss": progress.train_loss, "validation_loss": progress.validation_loss}
        row |= {name: loss for name, loss in losses.items() if loss is not None}

    def scoring(self, trial: int, done: int, total: int) -> None:
        """So many of the answers that guide the search are there."""
        row = {"trial": trial, "run": "scoring", "step": done, "total_steps": total, "tokens": 0}
        self._running[f"{trial:04d}{_SCORING}"] = row | {"train_loss": None, "validation_loss": None}
        self._work(f"{trial:04d}{_SCORING}")

    def scored(self, trial: int) -> None:
        self._end_work(f"{trial:04d}{_SCORING}")

    def came(self, outcome: Outcome) -> None:
        """An outcome arrived from the executor (not from the record)."""
        self._came = True
        self._end_work(outcome.key)
        self._here += (outcome.train_seconds + outcome.validation_seconds) * outcome.devices

    def _work(self, key: str) -> None:
        self._tick()
        self._heard = time.monotonic()
        self._at_work.add(key)

    def _end_work(self, key: str) -> None:
        self._tick()
        self._heard = time.monotonic()
        self._running.pop(key, None)
        self._at_work.discard(key)

    def spent(self, runs: float, left: float | None) -> None:
        """So many full runs more are settled; `left` is as of now."""
        self.runs += runs
        self.left = left if left is not None and math.isfinite(left) else None

    def settled(self, trial: Trial) -> None:
        before, self._settled_at = self._trials.get(trial.number), time.monotonic()
        self._trials[trial.number] = trial
        self._device_seconds += trial.device_seconds - (before.device_seconds if before else 0.0)
        self._tokens += trial.tokens - (before.tokens if before else 0)
        self._ended += trial.state.ended - (before.state.ended if before else False)
        if trial.state is TrialState.COMPLETE:
            self._best = min(filter(None, (self._best, trial)), key=ranking_key(self.objectives))

    def snapshot(self) -> dict[str, Any]:
        now = time.monotonic()
        while self._speed and now - self._speed[0][0] > _WINDOW:
            self._speed.popleft()
        span = min(_WINDOW, now - self._started)
        best = self._best
        per_trial = self.device_seconds / max(1, len(self._trials))
        left = per_trial * (self.budget_trials - self._ended) / max(1, self.workers)
        if self.budget_runs is not None and self.runs > 0:
            left = min(left, self.device_seconds / self.runs * max(0.0, self.budget_runs - self.runs) / max(1, self.workers))
        left = max(0.0, left - (now - self._settled_at))
        of_results = None if self.price is None else self.device_seconds / 3600 * self.price
        return {
            "pid": os.getpid(),
            "host": os.uname().nodename,
            "updated": time.time(),
            "heard": time.time() - (now - self._heard),
            "trials_ended": self._ended,
            "trials_started": len(self._trials) + len({row["trial"] for row in self._running.values()} - set(self._trials)),
            "budget_trials": self.budget_trials,
            "full_runs": self.runs,
            "budget_full_runs": self.budget_runs,
            "left_to_find": self.left,
            "running": sorted(self._running.values(), key=lambda row: row["trial"]),
            "best": None if best is None else {"trial": best.number, "value": best.value, "params": best.params},
            "default": self._trials[0].value if 0 in self._trials else None,
            "tokens_per_second": sum(tokens for _, tokens in self._speed) / span if span > 1 else None,
            "device_seconds": self.device_seconds,
            "cost": of_results,
            "spent": {"device_seconds": self.spent_device_seconds, "cost": self.cost},
            "budget_max_cost": self.budget_cost,
            "currency": self.currency,
            "idle_devices": self.idle,
            "wall_seconds": self.wall_seconds,
            "seconds_left": left if self._ended and self._came else None,
        }
