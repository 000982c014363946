"""trackio: a project per study, on this machine; TRACKIO_SPACE_ID sends it to a Space."""

from collections.abc import Mapping
from typing import Any

from loratune.trackers.base import Tracker


class TrackioTracker(Tracker):
    """A run is found again by its name, which holds the study's id."""

    def __init__(self, **study: Any) -> None:
        super().__init__(**study)
        import trackio

        self._trackio = trackio
        self._open: dict[str, Any] = {}

    def begin(self, run: str, config: Mapping[str, Any]) -> None:
        self._open[run] = self._trackio.init(
            project=self.name,
            name=f"{run}-{self.id}",
            group=self.id,
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, run: str, step: int, values: Mapping[str, float]) -> None:
        self._open[run].log(dict(values), step=step)

    def finish(self, run: str, summary: Mapping[str, Any], *, failed: bool) -> None:
        opened = self._open.pop(run)
        opened.log({f"final_{name}": value for name, value in summary.items()} | {"failed": int(failed)})
        opened.finish()

    def close(self) -> None:
        for opened in self._open.values():
            opened.finish()
        self._open.clear()
