"""Optuna's storage in a database server, which may go away for a while: a statement that was cut off is made again.

The study has one writer, so that a statement of which nobody knows whether it arrived can be looked up before it is repeated.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

PATIENCE = 60.0  # seconds that a server is waited for, once the study has begun


class ServerStorage(RDBStorage):
    """Optuna's `RDBStorage` that waits for a server that went away, at most `PATIENCE` seconds, with growing pauses.

    Connections are tried before they are used (`pool_pre_ping`). The first one is not waited for: a wrong URL is told at once.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url, engine_kwargs={"pool_pre_ping": True})

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        before = len(self.get_all_trials(study_id, deepcopy=False))

        def create() -> FrozenTrial:
            there = self.get_all_trials(study_id, deepcopy=False)
            return there[-1] if len(there) > before else RDBStorage._create_new_trial(self, study_id, template_trial)

        return _patiently(create)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        def change() -> bool:
            if state.is_finished() and self.get_trial(trial_id).state is state:
                return True  # it had arrived
            return RDBStorage.set_trial_state_values(self, trial_id, state, values)

        return _patiently(change)


def _waiting(name: str) -> Callable[..., Any]:
    """The method of `RDBStorage`, of which a repetition changes nothing."""
    method = getattr(RDBStorage, name)

    @functools.wraps(method)
    def call(self: ServerStorage, *arguments: Any, **options: Any) -> Any:
        return _patiently(lambda: method(self, *arguments, **options))

    return call


for _name in (
    *("get_study_id_from_name", "get_study_name_from_id", "get_study_directions", "get_study_user_attrs", "get_study_system_attrs"),
    *("get_all_studies", "get_trial", "get_all_trials", "_get_trials", "get_trial_id_from_study_id_trial_number", "_get_best_trial_id"),
    *("set_study_user_attr", "set_study_system_attr", "set_trial_param", "_set_trial_param", "set_trial_intermediate_value"),
    *("set_trial_user_attr", "set_trial_system_attr"),
):
    setattr(ServerStorage, _name, _waiting(_name))


def _patiently(statement: Callable[[], Any]) -> Any:
    deadline, pause = time.monotonic() + PATIENCE, 0.25
    while True:
        try:
            return statement()
        except Exception as error:
            if not _lost(error) or time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def _lost(error: BaseException) -> bool:
    """Whether the server, or the way to it, failed, and not the statement."""
    from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, PendingRollbackError

    lost = (OperationalError, InterfaceError, PendingRollbackError)  # the last where Optuna itself went on after one of the others
    return any(isinstance(e, lost) or (isinstance(e, DBAPIError) and e.connection_invalidated) for e in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    inner: BaseException | None = error
    while inner is not None:
        yield inner
        inner = inner.__cause__
