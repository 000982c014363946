"""An evaluation's models shared out over several processes: on a CPU, where a second thread gains a small model little.

Each process (job_process.py) loads the model and does all benchmarks for its own models, as one alone would (job.py). None
answers before all have checked their adapters. A process ends with the evaluation, however that ends; its log is
`evaluation/part-0.log`, which stays behind only where it died.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratune import errors
from loratune.downstream.events import BenchmarkBegan, Event, JobEnded, JobEvent, from_line
from loratune.downstream.job import BenchmarkRun, EvaluatedModel, EvaluationJob, HarnessRun
from loratune.errors import EvaluationError, LoratuneError
from loratune.record.paths import ADAPTER_FILES
from loratune.system.hub import weights_on_disk
from loratune.system.machine import cpu_processes, thread_variables, threads_for
from loratune.work import Message

GO, STOP = "go", "stop"
MIN_ANSWERS = 500  # fewer are not worth the start of processes
_GPUS = ("nvidia[0-9]*", "dxg", "kfd")  # in /dev: NVIDIA's, Windows', AMD's
_POLL = 0.2  # seconds between two looks at `stop`
_GRACE = 30.0  # seconds in which a process that is told to stop may finish its tokens, after an error


def share_out(job: EvaluationJob, runs: Sequence[BenchmarkRun | HarnessRun]) -> list[EvaluationJob]:
    """One job per process: `job` itself, but on a CPU, with much to do for several models, several with some of its models each."""
    lacking: set[str] = set()
    answers = 0
    for run in runs:
        standing = run.standing()
        answers += (standing.total - standing.done) * ((job.subset or MIN_ANSWERS) if isinstance(run, HarnessRun) else 1)
        lacking |= run.unfinished()
    if len(lacking) < 4 or answers < MIN_ANSWERS or not _on_cpu(job.device):
        return [job]
    processes = cpu_processes(weights_on_disk(job.recipe.name_or_path, job.recipe.revision), most=len(lacking) // 2)
    if processes == 1:
        return [job]
    hands = deal(job.models, processes, first=lacking)
    return [replace(job, models=tuple(model for model in job.models if model.name in hand), device="cpu") for hand in hands]


def deal(models: Sequence[EvaluatedModel], processes: int, first: set[str] | None = None) -> list[list[str]]:
    """Their names, dealt out like cards, larger ranks before smaller ones, and before all others those that have most to do, `first`."""
    cards = sorted(models, key=lambda model: (model.name in (first or ()), _rank(model)), reverse=True)
    return [[model.name for model in cards[number::processes]] for number in range(processes)]


def run_jobs(jobs: Sequence[EvaluationJob], stop: threading.Event) -> Generator[tuple[int, Event | BenchmarkBegan], None, None]:
    """Each job in a process of its own: (number of the job, its event).

    Raises the error that a job raises, EvaluationError when a process dies, and InterruptedError when `stop` ended one early; the
    answers so far are kept. Closing the iterator stops the processes.
    """
    threads = threads_for(len(jobs))
    events: queue.SimpleQueue[tuple[int, JobEvent | None]] = queue.SimpleQueue()
    processes: list[_JobProcess] = []
    try:
        for number, job in enumerate(jobs):
            processes.append(_JobProcess(number, job, threads, events))
        yield 0, Message(text=f"{len(jobs)} processes share the models, {threads} thread{'s' * (threads > 1)} each")
        running, checking = set(range(len(jobs))), set(range(len(jobs)))
        told = stopped = False
        while running:
            if stop.is_set() and not told:
                told = True
                for process in processes:
                    process.tell(STOP)
            try:
                number, event = events.get(timeout=_POLL)
            except queue.Empty:
                continue
            if number not in running:
                continue
            if event is None:
                raise EvaluationError(processes[number].cause_of_death())
            if isinstance(event, JobEnded):
                _raise_error(event)
                stopped |= event.stopped
                running.remove(number)
            else:
                yield number, event
            if number in checking and isinstance(event, BenchmarkBegan | JobEnded):
                checking.remove(number)
                for process in () if checking else processes:
                    process.tell(GO)
        if stopped:
            raise InterruptedError
    finally:
        for process in processes:
            process.tell(STOP)
        deadline = time.monotonic() + _GRACE
        for process in processes:
            process.end(deadline)


class _JobProcess:
    """The evaluation's end of one process."""

    def __init__(self, number: int, job: EvaluationJob, threads: int, events: "queue.SimpleQueue[tuple[int, JobEvent | None]]") -> None:
        self._job, self._log = job, job.folder / f"part-{number}.log"
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "loratune.downstream.job_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=os.environ | thread_variables(threads) | {"TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # Ctrl-C is the evaluation's to answer
            )
        self._commands: Any = self._process.stdin
        self._events: Any = self._process.stdout
        self._reader = threading.Thread(target=self._read, args=(number, events), daemon=True)
        self._reader.start()
        self.tell(job.to_json())

    def tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # it died; the end of its events tells
            self._commands.write(line + "\n")
            self._commands.flush()

    def _read(self, number: int, events: "queue.SimpleQueue[tuple[int, JobEvent | None]]") -> None:
        for line in self._events:
            if (event := from_line(line)) is not None:
                events.put((number, event))
        events.put((number, None))

    def end(self, deadline: float) -> None:
        """Wait until the process has ended; at the deadline, in monotonic seconds, kill it."""
        try:
            self._process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._events.close()
        with contextlib.suppress(OSError):  # of a line that it did not read any more
            self._commands.close()
        if self._process.returncode == 0:
            self._log.unlink(missing_ok=True)

    def cause_of_death(self) -> str:
        code = self._process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        memory = ", perhaps by the system because memory ran out" if code == -signal.SIGKILL else ""
        tail = "\n  ".join(self._log.read_text(errors="replace").strip().splitlines()[-5:])
        return f"a process that answered for {', '.join(self._job.names)} died ({how}{memory}). The answers so far are kept; run again." + (
            f" The end of {self._log}:\n  {tail}" if tail else ""
        )


def _raise_error(ended: JobEnded) -> None:
    """Raise the error with which a job ended, if any, as its own class."""
    if ended.error:
        kind: type[LoratuneError] = getattr(errors, ended.error)
        raise kind.__new__(kind, ended.text)  # not every class is made from its text


def _on_cpu(device: str) -> bool:
    """Whether `device` is the CPU, found out without torch's seconds of import where the machine has nothing else."""
    if device == "auto" and any(any(Path("/dev").glob(name)) for name in _GPUS):
        import torch

        return not torch.cuda.is_available()
    return device in ("auto", "cpu")


def _rank(model: EvaluatedModel) -> int:
    """The adapter's; 0 of the bare model, and of one that cannot be read: loading it reports why."""
    try:
        return int(json.loads((model.adapter / ADAPTER_FILES[0]).read_bytes())["r"]) if model.adapter else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0
