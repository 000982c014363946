"""MLflow: an experiment per study, the trials' runs nested in the study's. MLFLOW_TRACKING_URI says where."""

from collections.abc import Mapping
from typing import Any

from loratune.trackers.base import STUDY, Tracker

_TAG = "loratune.run"  # of a run: the study's id and the run's name, by which a later start finds it
_LONGEST = 500  # characters of a parameter, which MLflow's servers limit


class MlflowTracker(Tracker):
    def __init__(self, **study: Any) -> None:
        super().__init__(**study)
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(self.name)
        self._experiment = experiment.experiment_id if experiment else self._client.create_experiment(self.name)
        self._ids: dict[str, str] = {}

    def begin(self, run: str, config: Mapping[str, Any]) -> None:
        if run == STUDY:
            self._params(self._of(STUDY), {"study": self.name, "seed": config.get("seed")})
            return
        if STUDY not in self._ids:
            self._of(STUDY)
        self._params(self._of(run), config)

    def log(self, run: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._ids[run], name, value, step=step)

    def finish(self, run: str, summary: Mapping[str, Any], *, failed: bool) -> None:
        for name, value in summary.items():
            self._client.set_tag(self._ids[run], f"final_{name}", str(value))
        self._client.set_terminated(self._ids[run], "FAILED" if failed else "FINISHED")

    def _of(self, run: str) -> str:
        """The run's id there: begun in an earlier start, or begun now."""
        if run not in self._ids:
            tag = f"{self.id}-{run}"
            found = self._client.search_runs([self._experiment], filter_string=f"tags.`{_TAG}` = '{tag}'")
            parent = {"mlflow.parentRunId": self._ids[STUDY]} if run != STUDY else {}
            made = found[0] if found else self._client.create_run(self._experiment, run_name=run, tags={_TAG: tag, **parent})
            self._ids[run] = made.info.run_id
        return self._ids[run]

    def _params(self, id: str, params: Mapping[str, Any]) -> None:
        for name, value in params.items():  # the same once more is no error there
            self._client.log_param(id, name, str(value)[:_LONGEST])
