"""A study's storage as optuna-dashboard should see it: ordinals by their values, not by an index (`lora_r` 16, not `lora_r_index` 2).

Samplers that need numbers are shown the place of a value in its list; people are not.
"""

import copy
from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

_WIDE = 8  # times its lowest: beyond, a list of values is drawn on a log scale


class RealValues:
    """Mixed into a storage: its trials with real values. `ordinals`: the values of each ordinal of the space, by its name."""

    ordinals: Mapping[str, list[Any]] = {}

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._real(super().get_trial(trial_id))  # type: ignore[misc]

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        return self._real(super().get_best_trial(study_id))  # type: ignore[misc]

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        return [self._real(trial) for trial in super().get_all_trials(study_id, deepcopy=deepcopy, states=states)]  # type: ignore[misc]

    def _real(self, trial: FrozenTrial) -> FrozenTrial:
        indexed = [name for name in self.ordinals if f"{name}_index" in trial.params]
        if not indexed:
            return trial
        names = {f"{name}_index": name for name in indexed}
        trial = copy.copy(trial)  # the storage may keep the other
        given, scales = trial.params, trial.distributions
        trial.distributions = {names.get(key, key): _scale(self.ordinals[names[key]]) if key in names else scales[key] for key in given}
        trial.params = {names.get(key, key): self.ordinals[names[key]][value] if key in names else value for key, value in given.items()}
        return trial


def with_real_values(storage: BaseStorage, spec: Mapping[str, Any]) -> BaseStorage:
    """The same storage, whose trials have real values from now on."""
    kind = type(storage)
    storage.__class__ = type(f"{kind.__name__}OfRealValues", (RealValues, kind), {"ordinals": ordinals_of(spec)})
    return storage


def ordinals_of(spec: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values of each ordinal in the space of a study's description."""
    space = spec.get("search_space")
    if not isinstance(space, Mapping):
        return {}
    return {str(n): list(p["values"]) for n, p in space.items() if isinstance(p, Mapping) and isinstance(p.get("values"), list)}


def _scale(values: list[Any]) -> BaseDistribution:
    """The axis of a list of numbers."""
    low, high = min(values), max(values)
    log = low > 0 and high / low >= _WIDE
    if not all(isinstance(value, int | float) for value in values):
        return CategoricalDistribution(values)
    if all(isinstance(value, int) for value in values):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)
