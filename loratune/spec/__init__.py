"""What a study is asked to do: one typed description, checked as a whole before anything starts.

study_spec.py         StudySpec: load, hand on to the rooms above
continuing.py         with which changes a study may go on
sections.py           model, data, training, sampler, ...: every field with its meaning and unit
objectives_and_constraints.py   Objective: what the search makes small; which constraints it must keep
own_metrics.py        metrics of the user's own: functions of generated answers
limits.py             Constraint: `adapter_mb <= 50`, read from text
space.py              SearchSpace: what is searched, its presets, and its Optuna distributions
parameters.py         the kinds of parameter: int, float, ordinal, categorical, fixed
hyperparameters.py    which hyperparameters can be searched, in which bounds, under which aliases
loading.py            what people write: YAML, flags, aliases, and where each value stood
validation_errors.py  all mistakes at once, each in one line
commented.py          the commented YAML of `loratune init`
"""

from loratune.spec.continuing import allowed_change, differences
from loratune.spec.space import SearchSpace
from loratune.spec.study_spec import StudySpec

__all__ = ["SearchSpace", "StudySpec", "allowed_change", "differences"]
