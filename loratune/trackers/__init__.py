"""Experiment trackers: a run for each trial and one for the study, fed by the driver's events, whatever engine trains.

base.py      Tracker: what a tracker can do; one file each for TensorBoard, Weights & Biases, MLflow, trackio
feed.py      Feed: passes a study's events on, each thing once however often the study is started

Which there are is declared in `loratune/plugs/builtin.py`.
"""

from loratune.trackers.base import Tracker
from loratune.trackers.feed import Feed, check

__all__ = ["Feed", "Tracker", "check"]
