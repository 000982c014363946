"""TensorBoard: event files in the study's folder, `tensorboard/<run>`, by tensorboardX, else by torch with tensorboard."""

import importlib
import json
import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from loratune.trackers.base import Tracker


class TensorBoardTracker(Tracker):
    """Show them with `tensorboard --logdir STUDY/tensorboard`."""

    def __init__(self, **study: Any) -> None:
        super().__init__(**study)
        module = "tensorboardX" if find_spec("tensorboardX") else "torch.utils.tensorboard"
        self._writer = importlib.import_module(module).SummaryWriter
        self._open: dict[str, Any] = {}

    def begin(self, run: str, config: Mapping[str, Any]) -> None:
        # A later session writes a file beside the earlier one's: TensorBoard reads a folder as one run. Their names hold the
        # second alone, so that of a session within the same second would be overwritten.
        folder = str(self.folder / "tensorboard" / run)
        writer = self._open[run] = self._writer(folder, filename_suffix=f".{time.time_ns()}")
        writer.add_text("config", f"```\n{json.dumps(config, indent=1, default=str)}\n```", 0)

    def log(self, run: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._open[run].add_scalar(name, value, step)
        self._open[run].flush()  # else a kill costs the last two minutes

    def finish(self, run: str, summary: Mapping[str, Any], *, failed: bool) -> None:
        writer = self._open.pop(run)
        writer.add_text("summary", f"```\n{json.dumps(summary, indent=1)}\n```", 0)
        writer.close()

    def close(self) -> None:
        for writer in self._open.values():
            writer.close()
        self._open.clear()
