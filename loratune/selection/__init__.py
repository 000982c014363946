"""Selection: from many noisy trials to the one adapter to ship, with how sure that is. Arrays in, decisions out.

finalists     which trials may be the best, given the noise
race          their repeats with fresh seeds: the clearly worse drop out; its test is in sequential.py
bias          what the winner's loss really is
choose        a rule over criteria, run over resamples
constraints   `adapter_mb <= 50`
pareto        several objectives: the front, and its hypervolume
"""

from loratune.selection.bias import Honest, expected_optimism, from_cross_fit, from_fresh_seeds, from_held_out
from loratune.selection.choose import Candidate, Choice, Rule, choose
from loratune.selection.constraints import METRICS, Constraint, parse
from loratune.selection.finalists import Finalists, Noise, finalists, noise_from_twins, scaled
from loratune.selection.pareto import hypervolume, non_dominated
from loratune.selection.race import Drop, Race, Standing

__all__ = [
    "METRICS",
    "Candidate",
    "Choice",
    "Constraint",
    "Drop",
    "Finalists",
    "Honest",
    "Noise",
    "Race",
    "Rule",
    "Standing",
    "choose",
    "expected_optimism",
    "finalists",
    "from_cross_fit",
    "from_fresh_seeds",
    "from_held_out",
    "hypervolume",
    "noise_from_twins",
    "non_dominated",
    "parse",
    "scaled",
]
