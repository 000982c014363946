"""Weights & Biases: a project per study, its runs in one group. WANDB_MODE=offline, WANDB_ENTITY and the like hold as ever."""

from collections.abc import Mapping
from typing import Any

from loratune.trackers.base import Tracker


class WandbTracker(Tracker):
    """A run's id is of the study's and its own name, so a later start goes on with it; the x-axis is `step`."""

    def __init__(self, **study: Any) -> None:
        super().__init__(**study)
        import wandb

        self._wandb = wandb
        self._open: dict[str, Any] = {}

    def begin(self, run: str, config: Mapping[str, Any]) -> None:
        opened = self._open[run] = self._wandb.init(
            project=self.name,
            group=f"{self.name}-{self.id}",
            id=f"{self.id}-{run}",
            name=run,
            dir=str(self.folder),
            config=dict(config),
            resume="allow",
            reinit="create_new",  # trials train side by side
            settings=self._wandb.Settings(silent=True, console="off"),
        )
        opened.define_metric("*", step_metric="step")

    def log(self, run: str, step: int, values: Mapping[str, float]) -> None:
        self._open[run].log({"step": step, **values})

    def finish(self, run: str, summary: Mapping[str, Any], *, failed: bool) -> None:
        opened = self._open.pop(run)
        opened.summary.update({f"final_{name}": value for name, value in summary.items()})
        opened.finish(exit_code=int(failed))

    def close(self) -> None:
        for opened in self._open.values():
            opened.finish()
        self._open.clear()
