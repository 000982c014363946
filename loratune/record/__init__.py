"""The study's folder: where things lie in it (`paths.py`), who may write it, and how to read it back.

There is one writer, the driver (`Record`); workers write inside their run's folder alone.

    paths.py     StudyPaths: the folder's map
    states.py    TrialState
    trials.py    Trial, StudyRecord: a study as data
    reader.py    read: a StudyRecord from a folder
    adapters.py  a trial by its number, and where its adapter lies
    writer.py    Record, open_record: the writer and its lock
    progress.py  ProgressTracker: what runs right now, in numbers
    storage.py   open_study: the Optuna storage
    database.py  the same in a database server that may go away for a while
"""

from loratune.record.reader import read
from loratune.record.states import COMPLETE, DIVERGED, FAILED, INFEASIBLE, PAUSED, PRUNED, RUNNING, TrialState
from loratune.record.trials import StudyRecord, Trial
from loratune.record.writer import Record, open_record

__all__ = [
    "COMPLETE",
    "DIVERGED",
    "FAILED",
    "INFEASIBLE",
    "PAUSED",
    "PRUNED",
    "RUNNING",
    "Record",
    "StudyRecord",
    "Trial",
    "TrialState",
    "open_record",
    "read",
]
