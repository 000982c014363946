"""A process that does a part of an evaluation, started by `parallel.py`.

    python -m loratune.downstream.job_process FILE_DESCRIPTOR

The descriptor is a socket to the evaluation. In come the `Part`, then GO when all parts have proved their adapters, and STOP;
out go the part's events and, last, `Ended`. The loss of the socket means that the evaluation is gone: this process then ends
at once, since another may be about to go on with its models. Whatever libraries print goes to the log.
"""

import os
import sys
import threading
from multiprocessing.connection import Connection

from loratune.downstream.events import Began
from loratune.downstream.job import Part, run
from loratune.downstream.parallel import STOP, Ended
from loratune.downstream.results.scores import beside
from loratune.downstream.sandbox import runner
from loratune.errors import LoratuneError


def main(evaluation: Connection) -> None:
    part: Part = evaluation.recv()
    stop, go = threading.Event(), threading.Event()
    threading.Thread(target=_listen, args=(evaluation, stop, go), daemon=True).start()
    beside(part.folder)
    runner.AT_ONCE = int(os.environ["OMP_NUM_THREADS"])  # the other parts run programs too
    try:
        for event in run(part, interrupted=stop.is_set):
            evaluation.send(event)
            if isinstance(event, Began):
                go.wait()
        ended = Ended()
    except InterruptedError:
        ended = Ended(stopped=True)
    except LoratuneError as error:
        ended = Ended(error=type(error).__name__, text=str(error))
    evaluation.send(ended)


def _listen(evaluation: Connection, stop: threading.Event, go: threading.Event) -> None:
    try:
        while True:
            if evaluation.recv() == STOP:
                stop.set()
            go.set()
    except (EOFError, OSError):
        os._exit(3)


if __name__ == "__main__":
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # nothing that is started from here holds it open
    main(Connection(descriptor))
