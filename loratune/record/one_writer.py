"""What a driver knows of its storage is not read again, and what it writes of a trial at one time is one transaction.

Optuna reads every trial that is not finished from the database whenever anything is asked of the trials, since other processes
might have changed them, and commits each parameter and attribute alone. With a thousand trials in training that is a thousand rows
and their parameters read several times per trial, and seventeen commits.
"""

import contextlib
import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

Change = tuple[str, tuple[Any, ...]]
"""A method of a storage that writes, and its arguments."""


@runtime_checkable
class Transactions(Protocol):
    """A storage with transactions."""

    def together(self, study_id: int, changes: Sequence[Change]) -> list[Any]:
        """Make all the changes, of one study, or, after an error, none; what each gave."""
        ...


class OneWriterStorage(InMemoryStorage):
    """The study called `name` of the storage `behind`, read once; everything that is written goes there too.

    Studies and trials have numbers of their own here, since a trial is stored behind only when `together` ends.
    """

    def __init__(self, behind: BaseStorage, name: str) -> None:
        super().__init__()
        self._backend = behind
        self._studies_there: dict[int, int] = {}  # study here -> there
        self._trials_there: dict[int, int] = {}  # trial here -> there
        self._later: list[Change] | None = None  # written here and not yet there, while `together`
        with contextlib.suppress(KeyError):
            self._load(behind.get_study_id_from_name(name), name)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is written of trials until the end of the block is stored then, in one transaction where the storage has such.

        A process that is killed before has stored nothing, after it all. Also when the block ends by an exception.
        """
        if self._later is not None:
            yield
            return
        self._later = []
        try:
            yield
        finally:
            changes, self._later = self._later, None
            self._store(changes)

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        if study_name in self._study_name_to_id:
            return super().create_new_study(directions, study_name)  # raises DuplicatedStudyError
        there = self._backend.create_new_study(directions, study_name)
        here = super().create_new_study(directions, self._backend.get_study_name_from_id(there))
        self._studies_there[here] = there
        return here

    def delete_study(self, study_id: int) -> None:
        self._backend.delete_study(self._studies_there[study_id])
        super().delete_study(study_id)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._write("set_study_user_attr", study_id, key, _as_stored(value))

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._write("set_study_system_attr", study_id, key, _as_stored(value))

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        if template_trial is not None:
            template_trial = copy.deepcopy(template_trial)
            template_trial.user_attrs = _as_stored(template_trial.user_attrs)
            template_trial.system_attrs = _as_stored(template_trial.system_attrs)
        return int(self._write("create_new_trial", study_id, template_trial))

    def set_trial_param(self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution) -> None:
        self._write("set_trial_param", trial_id, param_name, param_value_internal, distribution)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        return bool(self._write("set_trial_state_values", trial_id, state, values))

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        self._write("set_trial_intermediate_value", trial_id, step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._write("set_trial_user_attr", trial_id, key, _as_stored(value))

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._write("set_trial_system_attr", trial_id, key, _as_stored(value))

    def remove_session(self) -> None:
        self._backend.remove_session()

    def _load(self, there: int, name: str) -> None:
        here = super().create_new_study(self._backend.get_study_directions(there), name)
        self._studies_there[here] = there
        for key, value in self._backend.get_study_user_attrs(there).items():
            super().set_study_user_attr(here, key, value)
        for key, value in self._backend.get_study_system_attrs(there).items():
            super().set_study_system_attr(here, key, value)
        for trial in self._backend.get_all_trials(there, deepcopy=False):
            self._trials_there[super().create_new_trial(here, trial)] = trial._trial_id

    def _write(self, name: str, *arguments: Any) -> Any:
        write = getattr(super(), name)
        if self._later is None:  # there first: what could not be stored is not known here either
            there = self._store([(name, arguments)])
            done = write(*arguments)
            if name == "create_new_trial":
                self._trials_there[done] = there[0]
            return done
        done = write(*arguments)
        if name == "create_new_trial":
            self._later.append((name, (done,)))
        elif done is not False:  # a trial that was begun before is not begun again
            self._later.append((name, arguments))
        return done

    def _store(self, changes: list[Change]) -> list[Any]:
        """Store the changes there; what each gave."""
        fresh = [arguments[0] for name, arguments in changes if name == "create_new_trial" and len(arguments) == 1]
        # A trial that is stored first now is stored as it has become; only then it may be finished.
        changes = [change for change in changes if change[0] == "create_new_trial" or change[1][0] not in fresh or "study" in change[0]]
        if not changes:
            return []
        there = [self._there(name, arguments) for name, arguments in changes]
        if isinstance(self._backend, Transactions):
            name, (first, *rest) = changes[0]
            of_study = "study" in name or (name == "create_new_trial" and rest)
            study_id = first if of_study else self._trial_id_to_study_id_and_number[first][0]
            given = self._backend.together(self._studies_there[study_id], there)
        else:
            given = [getattr(self._backend, name)(*arguments) for name, arguments in there]
        created = [number for (name, _), number in zip(there, given, strict=True) if name == "create_new_trial"]
        self._trials_there.update(zip(fresh, created, strict=False))
        return list(given)

    def _there(self, name: str, arguments: tuple[Any, ...]) -> Change:
        """The change, as the storage behind takes it."""
        first, *rest = arguments
        if name == "create_new_trial" and not rest:  # kept for later
            study_id, _ = self._trial_id_to_study_id_and_number[first]
            return name, (self._studies_there[study_id], self.get_trial(first))
        return name, ((self._studies_there if "study" in name or name == "create_new_trial" else self._trials_there)[first], *rest)


def together(study: optuna.Study) -> contextlib.AbstractContextManager[None]:
    """`OneWriterStorage.together` of the study's storage; of another storage, nothing."""
    storage = study._storage
    return storage.together() if isinstance(storage, OneWriterStorage) else contextlib.nullcontext()


def _as_stored(value: Any) -> Any:
    """As a storage gives an attribute back: a list for a tuple, text for a key."""
    return json.loads(json.dumps(value))
