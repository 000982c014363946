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

from loratune.selection.rerun import RerunFinished
from loratune.selection.selected import Finalist, SelectionRecord, read_selection
from loratune.selection.workflow import Planned, Selected, SelectEvent, select

__all__ = ["Finalist", "Planned", "RerunFinished", "SelectEvent", "Selected", "SelectionRecord", "read_selection", "select"]
