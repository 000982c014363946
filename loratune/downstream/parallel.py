"""An evaluation's models shared out over several processes: on a CPU, where a second thread gains a small model little.

Each process (job_process.py) loads the model and does all benchmarks for its own models, as one alone would (job.py). None
answers before all have proved their adapters. A process ends with the evaluation, however that ends; its log is
`evaluation/part-0.log`, which stays behind only where it died.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path

from loratune import errors
from loratune.downstream.events import Began, Event, Note
from loratune.downstream.job import Model, Part, Task
from loratune.errors import EvaluationError, LoratuneError
from loratune.record.paths import ADAPTER_FILES
from loratune.system.hub import weights_on_disk
from loratune.system.machine import cpu_processes, thread_variables, threads_for

GO, STOP = "go", "stop"
WORTH = 500  # answers; fewer are not worth the start of processes
_GPUS = ("nvidia[0-9]*", "dxg", "kfd")  # in /dev: NVIDIA's, Windows', AMD's
_GLANCE = 0.2  # seconds between two looks at `stop`
_GRACE = 30.0  # seconds in which a process that is told to stop may finish its tokens, after an error


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A process's last word."""

    stopped: bool = False
    error: str = ""  # the name of its LoratuneError
    text: str = ""

    def raise_error(self) -> None:
        """Raise the error that it tells of, if any, as its own class."""
        if self.error:
            kind: type[LoratuneError] = getattr(errors, self.error)
            raise kind.__new__(kind, self.text)  # not every class is made from its text


def shares(whole: Part) -> list[Part]:
    """`whole` in as many parts as there should be processes: itself alone, but on a CPU, with much to do for several models."""
    lacking: set[str] = set()
    answers = 0
    for work in whole.works:
        standing = work.standing()
        answers += (standing.total - standing.done) * ((whole.subset or WORTH) if isinstance(work, Task) else 1)
        lacking |= work.unfinished()
    if len(lacking) < 4 or answers < WORTH or not _on_cpu(whole.device):
        return [whole]
    processes = cpu_processes(weights_on_disk(whole.recipe.name_or_path, whole.recipe.revision), most=len(lacking) // 2)
    if processes == 1:
        return [whole]
    return [replace(whole.of(names), device="cpu") for names in deal(whole.models, processes, first=lacking)]


def deal(models: Sequence[Model], processes: int, first: set[str] | None = None) -> list[list[str]]:
    """Their names, dealt out like cards, larger ranks before smaller ones, and before all others those that have most to do, `first`."""
    cards = sorted(models, key=lambda model: (model.name in (first or ()), _rank(model)), reverse=True)
    return [[model.name for model in cards[number::processes]] for number in range(processes)]


def spread(parts: Sequence[Part], stop: threading.Event) -> Generator[tuple[int, Event | Began], None, None]:
    """Each part in a process of its own: (number of the part, what it says).

    Raises what a part raises, EvaluationError when a process dies, and InterruptedError when `stop` ended one early; what
    was answered is kept. Closing the iterator stops the processes.
    """
    threads = threads_for(len(parts))
    children: list[_Child] = []
    try:
        for number, part in enumerate(parts):
            children.append(_Child(number, part, threads))
        for child in children:
            child.say(child.part)
        yield 0, Note(f"{len(parts)} processes share the models, {threads} thread{'s' * (threads > 1)} each")
        working = dict(enumerate(children))
        proving = set(working)
        told = stopped = False
        while working:
            if stop.is_set() and not told:
                told = True
                for child in children:
                    child.say(STOP)
            ready = wait([child.connection for child in working.values()], _GLANCE)
            for number, child in [(number, child) for number, child in working.items() if child.connection in ready]:
                said = child.hear()
                if isinstance(said, Ended):
                    stopped |= said.stopped
                    del working[number]
                else:
                    yield number, said
                if number in proving and isinstance(said, Began | Ended):
                    proving.remove(number)
                    for other in () if proving else children:
                        other.say(GO)
        if stopped:
            raise InterruptedError
    finally:
        for child in children:
            child.say(STOP)
        deadline = time.monotonic() + _GRACE
        for child in children:
            child.end(deadline)


class _Child:
    """The evaluation's end of one process."""

    def __init__(self, number: int, part: Part, threads: int) -> None:
        self.part, self._log = part, part.folder / f"part-{number}.log"
        self.connection, theirs = Pipe()
        with theirs, open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "loratune.downstream.job_process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | thread_variables(threads) | {"TOKENIZERS_PARALLELISM": "false"},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is the evaluation's to answer
            )

    def say(self, message: Part | str) -> None:
        with contextlib.suppress(OSError):  # it died; `hear` tells
            self.connection.send(message)

    def hear(self) -> Event | Began | Ended:
        """The next message. Raises the error with which the part ended, EvaluationError when the process is gone."""
        try:
            said: Event | Began | Ended = self.connection.recv()
        except (EOFError, OSError):
            raise EvaluationError(self._last_words()) from None
        if isinstance(said, Ended):
            said.raise_error()
        return said

    def end(self, deadline: float) -> None:
        """Wait until the process has left; at the deadline, in monotonic seconds, kill it."""
        try:
            self._process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.connection.close()
        if self._process.returncode == 0:
            self._log.unlink(missing_ok=True)

    def _last_words(self) -> str:
        code = self._process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        memory = ", perhaps by the system for want of memory" if code == -signal.SIGKILL else ""
        tail = "\n  ".join(self._log.read_text(errors="replace").strip().splitlines()[-5:])
        return (
            f"a process that answered for {', '.join(model.name for model in self.part.models)} died ({how}{memory}). "
            "What was answered is kept; run again." + (f" The end of {self._log}:\n  {tail}" if tail else "")
        )


def _on_cpu(device: str) -> bool:
    """Whether `device` is the CPU, found out without torch's seconds of import where the machine has nothing else."""
    if device == "auto" and any(any(Path("/dev").glob(name)) for name in _GPUS):
        import torch

        return not torch.cuda.is_available()
    return device in ("auto", "cpu")


def _rank(model: Model) -> int:
    """The adapter's; 0 of the bare model, and of one that cannot be read: whoever loads it says why."""
    try:
        return int(json.loads((model.adapter / ADAPTER_FILES[0]).read_bytes())["r"]) if model.adapter else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0
