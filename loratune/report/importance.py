"""How much each hyperparameter tells good configurations from the rest, by Optuna's PED-ANOVA."""

import math
import warnings
from dataclasses import dataclass

from loratune.record import StudyRecord
from loratune.report.tables import finished_trials, space_of, value

FEW = 20  # finished trials below which an importance is called a rough guess
FEWEST = 8  # and below which it is not computed: fewer than 4 trials on either side of the split


@dataclass(frozen=True, kw_only=True)
class Importance:
    shares: dict[str, float]  # hyperparameter -> share of the total, descending; sums to 1
    quantile: float  # what "good" meant: the best share of the finished trials
    trials: int  # finished trials it rests on

    @property
    def few(self) -> bool:
        return self.trials < FEW


def importance_of(record: StudyRecord) -> Importance | None:
    """How much each hyperparameter tells good configurations from the rest.

    PED-ANOVA (Watanabe, Bansal, Hutter, IJCAI 2023, arXiv 2304.10255) as Optuna has it: the Pearson
    divergence between the density of a hyperparameter among the best trials and among all trials, each
    on its own, without interactions. The best are the best tenth, or the best 5 where that is more, or
    half. None when fewer than FEWEST trials are finished, or nothing tells them apart.
    """
    trials, space = finished_trials(record), space_of(record)
    worse = -1.0 if next(iter(record.objectives.values())) == "maximize" else 1.0
    values = [worse * t.values[0] if record.own_objective and t.values else value(t) for t in trials]
    if len(trials) < FEWEST or len(set(values)) < 2:
        return None
    import optuna  # late: it and what it brings take a second

    quantile = min(0.5, max(0.1, 5 / len(trials)))
    distributions = space.distributions("index")
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
        for trial, at in zip(trials, values, strict=True):
            params = space.encode(trial.params, "index")
            study.add_trial(
                optuna.trial.create_trial(params=params, distributions={name: distributions[name] for name in params}, value=at)
            )
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say, the report says in its own words
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(level)
    if len(shares) < 2 or len(set(shares.values())) < 2 or not all(math.isfinite(share) for share in shares.values()):
        return None
    return Importance(shares={name.removesuffix("_index"): share for name, share in shares.items()}, quantile=quantile, trials=len(trials))
