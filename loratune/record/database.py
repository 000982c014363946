"""Optuna's storage in a database, with transactions, and in a server, which may go away for a while: what was cut off is made again.

The study has one writer, so that a statement of which nobody knows whether it arrived can be looked up before it is repeated.
"""

import functools
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage

from loratune.record.one_writer import Change

PATIENCE = 60.0  # seconds that a server is waited for, once the study has begun
_MARK = "loratune:transaction"  # system attribute of the study: the latest transaction that arrived


class DatabaseStorage(RDBStorage):
    """Optuna's `RDBStorage`, and several of its writing methods as one transaction."""

    def together(self, study_id: int, changes: Sequence[Change]) -> list[Any]:
        """Make all the changes, of one study, or, after an error, none; what each gave."""
        given, sessions = list[Any](), self.scoped_session
        session = sessions()
        self.scoped_session = cast(Any, lambda: _Held(session))  # where Optuna's methods take theirs
        try:
            for name, arguments in changes:
                given.append(getattr(RDBStorage, name)(self, *arguments))
                if given[-1] is False:
                    raise StorageInternalError(f"{name} could not be stored")
            session.commit()
        except BaseException:
            session.rollback()
            raise
        finally:
            self.scoped_session = sessions
            session.close()
        return given


class _Held:
    """A session of SQLAlchemy that is committed, rolled back and closed by who made it."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def commit(self) -> None:
        self._session.flush()

    def rollback(self) -> None:
        raise  # the database's error, which Optuna would pass over or try again by itself

    def close(self) -> None:
        pass


class ServerStorage(DatabaseStorage):
    """A `DatabaseStorage` that waits for a server that went away, at most `PATIENCE` seconds, with growing pauses.

    Connections are tried before they are used (`pool_pre_ping`). The first one is not waited for: a wrong URL is told at once.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url, engine_kwargs={"pool_pre_ping": True})
        self._inside = False  # a transaction, which is made again as a whole

    def together(self, study_id: int, changes: Sequence[Change]) -> list[Any]:
        """As above. A mark that is stored with the changes tells whether they had arrived when the connection broke."""
        mark, tried = secrets.token_hex(8), False
        marked = [*changes, ("set_study_system_attr", (study_id, _MARK, mark))]

        def make() -> list[Any]:
            nonlocal tried
            if tried and self.get_study_system_attrs(study_id).get(_MARK) == mark:
                created = sum(name == "create_new_trial" for name, _ in changes)
                trials = self.get_all_trials(study_id, deepcopy=False)
                new = iter(trials[len(trials) - created :])
                return [next(new)._trial_id if name == "create_new_trial" else True for name, _ in changes]
            tried = self._inside = True
            try:
                return super(ServerStorage, self).together(study_id, marked)[:-1]
            finally:
                self._inside = False

        return list(_patiently(make))


def _waiting(name: str) -> Callable[..., Any]:
    """The method of `RDBStorage`, of which a repetition changes nothing."""
    method = getattr(RDBStorage, name)

    @functools.wraps(method)
    def call(self: ServerStorage, *arguments: Any, **options: Any) -> Any:
        return method(self, *arguments, **options) if self._inside else _patiently(lambda: method(self, *arguments, **options))

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
