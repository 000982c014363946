"""Fronts and hypervolumes, from `statistics`: the choice knows them by these names."""

from loratune.statistics.pareto import hypervolume, non_dominated

__all__ = ["hypervolume", "non_dominated"]
