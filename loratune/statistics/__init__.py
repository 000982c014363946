"""Intervals, correlations and summaries: arrays in, numbers and sentences out. numpy and scipy only.

intervals     an estimate with its interval: means, paired differences, proportions
correlation   Spearman's and Kendall's rank correlation with intervals; what a careful reader would say of them
pareto        fronts of several objectives
summary       minimum, maximum, mean, standard deviation
"""

from loratune.statistics.correlation import kendall, sentence, spearman
from loratune.statistics.intervals import Interval, bootstrap_mean, paired_difference, student_mean, wilson
from loratune.statistics.pareto import front_ranks, non_dominated
from loratune.statistics.summary import Summary, summarise

__all__ = [
    "Interval",
    "Summary",
    "bootstrap_mean",
    "front_ranks",
    "kendall",
    "non_dominated",
    "paired_difference",
    "sentence",
    "spearman",
    "student_mean",
    "summarise",
    "wilson",
]
