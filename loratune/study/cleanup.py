"""What a study removes at its end: checkpoints, and adapters that nobody asked to keep."""

import shutil
from pathlib import Path

from loratune.record import COMPLETE, DIVERGED, INFEASIBLE, read
from loratune.record.paths import MAIN
from loratune.spec import StudySpec


def remove_unneeded(spec: StudySpec, folder: Path) -> None:
    """Remove checkpoints that nothing can need again, and the adapters that `output.keep_adapters` does not ask for.

    Those of the best trials by loss stay, of several objectives the front's too, and trial 0's.
    """
    record = read(folder)
    kept = {0, *(trial.number for trial in [*record.ranking[: spec.output.keep_adapters], *record.front])}
    for trial in record.trials:
        if trial.state not in (COMPLETE, INFEASIBLE, DIVERGED):
            continue  # may go on, with a larger budget
        unwanted = spec.output.keep_adapters is not None and trial.number not in kept
        for run in record.paths.trial(trial.number).runs():
            for checkpoint in run.checkpoints():
                checkpoint.unlink(missing_ok=True)
            if run.folder.name != MAIN or unwanted:  # a short run's adapter was a step on the way
                shutil.rmtree(run.adapter, ignore_errors=True)
