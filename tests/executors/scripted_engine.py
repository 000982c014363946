"""An engine of three slots that trains nothing: a step takes a hundredth of a second, so that what surrounds it can be tested fast.

    python scripted_engine.py -m loratune.executors.worker FOLDER SOCKET      a worker, with this engine

A segment's seed says what happens at its third step: to a FATAL one its process dies; a POISONOUS one crashes all that
train beside it; to a LOST one its process loses the device, the first time. An outcome's message tells the most
neighbours that the segment had, its tokens count the steps that were taken since its last checkpoint, which is written
at every step.
"""

import os
import runpy
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

from loratune.errors import DeviceLostError
from loratune.record.paths import StudyPaths
from loratune.work import Outcome, Progress, Recipe, Segment, State

FATAL, POISONOUS, LOST = 1, 2, 3
SLOTS = 3


class ScriptedEngine:
    slots = SLOTS
    notice = "this engine follows a script"

    def __init__(self, recipe: Recipe, root: Path) -> None:
        self._root = root

    def run(self, inbox: Callable[[bool], Segment | None], tell: Callable[[Progress | Outcome], None], stop: threading.Event) -> None:
        lanes: list[Lane] = []
        while True:
            while len(lanes) < SLOTS and (wanted := inbox(not lanes)) is not None:
                lanes.append(Lane(wanted, StudyPaths(self._root).of(wanted).folder / "checkpoint"))
            if not lanes:
                return
            time.sleep(0.01)
            for lane in lanes:
                lane.step(neighbours=len(lanes) - 1)
                tell(Progress(key=lane.segment.key, step=lane.taken, total_steps=lane.segment.total_steps, tokens=0))
            poisoned = any(lane.segment.seed == POISONOUS and lane.taken == 3 for lane in lanes)
            for lane in list(lanes):
                ended = State.CANCELLED if stop.is_set() else State.COMPLETED if lane.taken == lane.segment.stop_step else None
                if poisoned or ended:
                    lanes.remove(lane)
                    tell(lane.outcome(State.CRASHED if poisoned else ended or State.CANCELLED))

    def close(self) -> None:
        pass


class Lane:
    def __init__(self, segment: Segment, checkpoint: Path) -> None:
        self.segment, self._checkpoint, self._neighbours = segment, checkpoint, 0
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        self.taken = self._first = int(checkpoint.read_text()) if checkpoint.exists() else 0

    def step(self, neighbours: int) -> None:
        self.taken += 1
        self._neighbours = max(self._neighbours, neighbours)
        if self.segment.seed == FATAL and self.taken == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.segment.seed == LOST and self.taken == 3 and not (once := self._checkpoint.with_name("lost")).exists():
            once.touch()
            raise DeviceLostError("cuda:0", "CUDA error: an illegal memory access was encountered")
        if self.segment.seed != POISONOUS or self.taken < 3:
            self._checkpoint.write_text(str(self.taken))

    def outcome(self, state: State) -> Outcome:
        loss = 1.0 if state is State.COMPLETED else None
        words = f"neighbours: {self._neighbours}"
        done = self.taken - self._first
        return Outcome(key=self.segment.key, state=state, validation_loss=loss, tokens=done, device=str(os.getpid()), message=words)


def module() -> types.ModuleType:
    """What stands in for `loratune.finetune.engines`."""
    made = types.ModuleType("loratune.finetune.engines")
    made.load_engine = ScriptedEngine  # type: ignore[attr-defined]
    made.limit_threads = lambda threads: None  # type: ignore[attr-defined]
    return made


if __name__ == "__main__":
    sys.argv = sys.argv[2:]
    sys.modules["loratune.finetune.engines"] = module()
    runpy.run_module(sys.argv[0], run_name="__main__")
