"""A process that does one job of an evaluation: `python -m loratune.downstream.job_process`, started by parallel.py.

Lines come in by standard input: the job as JSON, GO when all processes have checked their adapters, STOP. Events go out by standard
output, one a line. The end of the input means that the evaluation is gone: this process then ends at once, since another evaluation may
be about to go on with its models. The output of libraries goes to standard error, the log.
"""

import os
import threading
from typing import BinaryIO

from loratune.downstream.events import BenchmarkBegan, JobEnded, to_line
from loratune.downstream.job import EvaluationJob, build_all, open_runs, run_job
from loratune.downstream.parallel import STOP
from loratune.downstream.results.scores import join_evaluation
from loratune.downstream.sandbox import runner
from loratune.errors import LoratuneError


def main() -> None:
    commands = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 - unbuffered: a thread that reads holds no lock at the exit
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    job = EvaluationJob.from_json(commands.readline().decode())
    stop, go = threading.Event(), threading.Event()
    threading.Thread(target=_listen, args=(commands, stop, go), daemon=True).start()
    join_evaluation(job.folder)
    runner.AT_ONCE = int(os.environ["OMP_NUM_THREADS"])  # the other processes run programs too
    try:
        for event in run_job(job, open_runs(job, *build_all(job)), interrupted=stop.is_set):
            events.write(to_line(event))
            if isinstance(event, BenchmarkBegan):
                go.wait()
        ended = JobEnded()
    except InterruptedError:
        ended = JobEnded(stopped=True)
    except LoratuneError as error:
        ended = JobEnded(error=type(error).__name__, text=str(error))
    events.write(to_line(ended))


def _listen(commands: BinaryIO, stop: threading.Event, go: threading.Event) -> None:
    while line := commands.readline():
        if line.decode().strip() == STOP:
            stop.set()
        go.set()
    os._exit(3)


if __name__ == "__main__":
    main()
