"""Selection: from many noisy trials to the one adapter to ship, with how sure that is.

    for event in select(Path("runs/study")):
        print(event)
    print(read(Path("runs/study")).explain())

Arrays in, decisions out:
    finalists     which trials may be the best, given the noise
    race          their repeats with fresh seeds: the clearly worse drop out; its test is in sequential.py
    rule          a rule over criteria, run over resamples
    confidence    how sure that is: the interval to the next best
    trial_metrics the metrics of a choice, and constraints on them: `adapter_mb <= 50`

A study in, selection.json out:
    candidates    what the study measured of its trials
    rerun         trains trials again, with fresh seeds
    workflow      the whole of it: race, choice, unbiased losses
    account       all of that as a record
    selected      the file, as data
"""

from loratune.selection.confidence import Gap
from loratune.selection.finalists import Finalists, Noise, finalists, noise_from_twins, scaled
from loratune.selection.race import Dropped, Race, Standing
from loratune.selection.rerun import Note, RerunFinished
from loratune.selection.rule import Candidate, Choice, Rule, choose
from loratune.selection.selected import Finalist, SelectionRecord, Shipped, read_selection
from loratune.selection.trial_metrics import METRICS, Constraint, parse_constraint
from loratune.selection.workflow import Planned, Selected, SelectEvent, select

__all__ = [
    "METRICS",
    "Candidate",
    "Choice",
    "Constraint",
    "Dropped",
    "Finalist",
    "Finalists",
    "Gap",
    "Noise",
    "Note",
    "Planned",
    "Race",
    "RerunFinished",
    "Rule",
    "SelectEvent",
    "Selected",
    "SelectionRecord",
    "Shipped",
    "Standing",
    "choose",
    "finalists",
    "noise_from_twins",
    "parse_constraint",
    "read_selection",
    "scaled",
    "select",
]
