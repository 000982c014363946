"""A function with a kink and an integer, which a mesh search handles without derivatives or a model."""

from __future__ import annotations

import optuna
import optunahub


def objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", -5, 5)
    n = trial.suggest_int("n", -5, 5)
    return abs(x - 1) + (n + 2) ** 2


if __name__ == "__main__":
    sampler = optunahub.load_module("samplers/nomad").NomadSampler(seed=1)
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=50)
    print(study.best_trial.params, study.best_value)
