"""What a driver knows of its storage is not read again: it is the one who writes there.

Optuna reads every trial that is not finished from the database whenever anything is asked of the trials, since other processes
might have changed them. With a thousand trials in training that is a thousand rows and their parameters, several times per trial.
"""

import copy
from collections.abc import Callable, Container, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState


class OneWriterStorage(BaseStorage):
    """A storage whose trials are read once, and again when they were written here. Everything goes to `behind`."""

    def __init__(self, behind: BaseStorage) -> None:
        self._backend = behind
        self._trials: dict[int, list[FrozenTrial]] = {}  # study -> its trials, by number
        self._places: dict[int, tuple[int, int]] = {}  # trial's id -> study, number
        self._changed: set[int] = set()  # ids of trials that were written since they were read

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        trials = self._known(study_id)
        found = [trial for trial in trials if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found

    def get_trial(self, trial_id: int) -> FrozenTrial:
        if trial_id not in self._places:
            return self._backend.get_trial(trial_id)
        study_id, number = self._places[trial_id]
        return self._known(study_id)[number]

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trials = self._known(study_id)
        trial_id = self._backend.create_new_trial(study_id, template_trial)
        self._note(study_id, self._backend.get_trial(trial_id), trials)
        return trial_id

    def set_trial_param(self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution) -> None:
        self._write(trial_id, self._backend.set_trial_param, param_name, param_value_internal, distribution)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        return bool(self._write(trial_id, self._backend.set_trial_state_values, state, values))

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        self._write(trial_id, self._backend.set_trial_intermediate_value, step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._write(trial_id, self._backend.set_trial_user_attr, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._write(trial_id, self._backend.set_trial_system_attr, key, value)

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        return self._backend.create_new_study(directions, study_name)

    def delete_study(self, study_id: int) -> None:
        self._backend.delete_study(study_id)
        self._trials.pop(study_id, None)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._backend.set_study_user_attr(study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._backend.set_study_system_attr(study_id, key, value)

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._backend.get_study_id_from_name(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._backend.get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._backend.get_study_directions(study_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._backend.get_study_user_attrs(study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._backend.get_study_system_attrs(study_id)

    def get_all_studies(self) -> list[FrozenStudy]:
        return self._backend.get_all_studies()

    def remove_session(self) -> None:
        self._backend.remove_session()

    def check_trial_is_updatable(self, trial_id: int, trial_state: TrialState) -> None:
        self._backend.check_trial_is_updatable(trial_id, trial_state)

    def _known(self, study_id: int) -> list[FrozenTrial]:
        if study_id not in self._trials:
            self._trials[study_id] = []
            for trial in self._backend.get_all_trials(study_id, deepcopy=True):
                self._note(study_id, trial, self._trials[study_id])
        trials = self._trials[study_id]
        for trial_id in sorted(self._changed):
            of, number = self._places[trial_id]
            if of == study_id:
                trials[number] = self._backend.get_trial(trial_id)
                self._changed.discard(trial_id)
        return trials

    def _note(self, study_id: int, trial: FrozenTrial, trials: list[FrozenTrial]) -> None:
        self._places[trial._trial_id] = (study_id, len(trials))
        trials.append(trial)

    def _write(self, trial_id: int, write: Callable[..., Any], *what: Any) -> Any:
        if trial_id in self._places:
            self._changed.add(trial_id)
        return write(trial_id, *what)
