"""The study's folder: what is in it, who may write it, and how to read it back.

    study/
      spec.yaml            the study as asked for, complete
      recipe.json          what workers need of it (work.Recipe)
      data.txt             the prepared data's name: others cannot continue the study
      notes.txt            lines on the model and the data, found before the first trial
      prompt.json          the prompt in use, never `auto`, and the date that its template shows
      slots.txt            trials that one process trains together, chosen when the study began
      workers.txt          processes on a CPU, likewise
      study.db             the Optuna study (unless another storage URL is given)
      sessions/0001.json   one per start of the driver: command, versions, git, machine, seconds
      progress.json        what runs right now, for `loratune status`
      lock                 held by the driver and its workers
      trials/0007/
        began              how many segments were settled before this trial began; replay needs it
        trial.json         hyperparameters, state, value
        main/              a run: log.txt, checkpoint-*/, adapter/, outcomes/0000240.json
      scoring/             scores that guide the search, item by item (downstream/scoring.py)
      best.yaml, adapter/, report.html, figures/

There is one writer, the driver (`Record`); workers write inside their run's folder alone.

    states.py    TrialState
    adapters.py  a trial by its number, and where its adapter lies
    trials.py    Trial, StudyRecord, read: the folder as data
    writer.py    Record, open_record: the writer and its lock
    progress.py  Meter: what runs right now, in numbers
    storage.py   open_study: the Optuna storage
    database.py  the same in a database server that may go away for a while
"""

from loratune.record.states import COMPLETE, DIVERGED, FAILED, INFEASIBLE, PAUSED, PRUNED, RUNNING, TrialState
from loratune.record.trials import StudyRecord, Trial, read
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
