"""trackio: a project per study, on this machine; TRACKIO_SPACE_ID sends it to a Space."""

import contextlib
import io
from collections.abc import Mapping
from typing import Any

from loratune.trackers.base import Tracker


def _quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """Keeps what trackio prints from the study's live view."""
    return contextlib.redirect_stdout(io.StringIO())


class TrackioTracker(Tracker):
    """A run is found again by its name, which holds the study's id."""

    def __init__(self, **study: Any) -> None:
        super().__init__(**study)
        import trackio

        self._trackio = trackio
        self._open: dict[str, Any] = {}

    def begin(self, run: str, config: Mapping[str, Any]) -> None:
        with _quiet():
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
        self._trackio.context_vars.current_run.set(None)  # else the next `init` ends this run: trials train side by side

    def log(self, run: str, step: int, values: Mapping[str, float]) -> None:
        self._open[run].log(dict(values), step=step)

    def finish(self, run: str, summary: Mapping[str, Any], *, failed: bool) -> None:
        opened = self._open.pop(run)
        opened.log({f"final_{name}": value for name, value in summary.items()} | {"failed": int(failed)})
        with _quiet():
            opened.finish()

    def close(self) -> None:
        with _quiet():
            for opened in self._open.values():
                opened.finish()
        self._open.clear()
