"""The settings that most examples on the web have, against which a study's choice is held where a trial of it has them."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratune.record.trials import StudyRecord, Trial
    from loratune.work import Hyperparameters

COMMON_PRACTICE = {"lora_r": 16, "lora_alpha": 32.0, "learning_rate": 2e-4}


def in_common_practice(hyperparameters: "Hyperparameters") -> "Hyperparameters":
    """These settings in the place of the configuration's own."""
    return replace(hyperparameters, **COMMON_PRACTICE, use_rslora=False)  # type: ignore[arg-type]


def common_practice(record: "StudyRecord") -> "Trial | None":
    """Of the finished trials with these settings the one with the lowest loss; None where no trial has them."""
    found = [
        (trial.value, trial.number, trial)
        for trial in record.finished
        if trial.value is not None and math.isfinite(trial.value)
        if all(getattr(trial.hyperparameters, name) == value for name, value in COMMON_PRACTICE.items())
    ]
    return min(found)[2] if found else None
