"""A worker: a process that trains the segments it is sent, until told to stop or left alone.

    python -m loratune.executors.worker STUDY_FOLDER SOCKET

It reads and writes JSON, one object at a time, over a Unix socket. In come {"load": true}, which says that the study's recipe
is written, {"segment": ...} and {"stop": true}; until the first of them it imports what it will need. Out go {"progress": ...},
{"message": ...} and {"outcome": ...}, one outcome per segment. The loss of the socket means that the driver is gone: the worker
then ends at once, since nobody would record what it finished, and a checkpoint is on the disk. SIGTERM means that the machine
is taken away: it says {"leaving": true}, writes checkpoints, cancels its segments and ends. What it says carries the segment's
attempt. Under torchrun every process of the group trains; the one of rank 0 alone holds the socket, and passes the segments on
to the others.
"""

import json
import logging
import os
import signal
import sys
import threading
from dataclasses import replace
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

from loratune.errors import DeviceLostError, LoratuneError, error_kind
from loratune.executors.base import News
from loratune.executors.inbox import QueueInbox
from loratune.executors.process import DEVICE_LOST, ON_GPU
from loratune.record.paths import StudyPaths
from loratune.system.imports import uncollected
from loratune.work import Message, Outcome, Recipe, Segment, State


class _Driver:
    """The way to the driver, for several threads."""

    def __init__(self, address: str) -> None:
        self._connection, self._lock = Client(address, family="AF_UNIX"), threading.Lock()
        self._attempts: dict[str, int] = {}  # of the segments that came

    def receive(self) -> dict[str, Any]:
        """What comes next. Raises EOFError or OSError when the driver is gone."""
        message: dict[str, Any] = json.loads(self._connection.recv_bytes())
        if "segment" in message:
            segment = Segment.from_plain(message["segment"])
            self._attempts[segment.key] = segment.attempt
        return message

    def send(self, item: News) -> None:
        if not isinstance(item, Message):
            item = replace(item, attempt=self._attempts.get(item.key, 0))
        self.say(**{type(item).__name__.lower(): item.to_plain()})

    def say(self, **message: Any) -> None:
        try:
            with self._lock:
                self._connection.send_bytes(json.dumps(message).encode())
        except OSError:
            os._exit(3)


def main(root: Path, address: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the driver alone decides
    try:
        if int(os.environ.get("RANK", "0")) == 0:
            _lead(root, address)
        else:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # rank 0 says when to stop
            _follow(root)
    except DeviceLostError:
        # No outcome is sent: the driver sees the process end, and sends its segments to a new one. An orderly exit
        # would ask the device to free its memory, which may hang.
        logging.getLogger("loratune").exception("this process lost its device")
        sys.stderr.flush()
        os._exit(DEVICE_LOST)


def _recipe(root: Path) -> Recipe:
    recipe = Recipe.from_json(StudyPaths(root).recipe.read_text())
    return replace(recipe, device="cuda") if ON_GPU in os.environ else recipe


def _lead(root: Path, address: str) -> None:
    driver = _Driver(address)
    inbox, stop, answered = QueueInbox(), threading.Event(), threading.Event()

    def leave() -> None:
        driver.say(leaving=True)
        stop.set()
        inbox.end()
        answered.set()

    # In a thread: the handler may have interrupted a message.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=leave, daemon=True).start())
    threading.Thread(target=_listen, args=(driver, inbox, stop, answered), daemon=True).start()

    with uncollected():
        from loratune.finetune.engines import load_engine  # torch: seconds to import; the socket is open meanwhile

    answered.wait()
    if stop.is_set():
        return
    try:
        engine = load_engine(_recipe(root), root)
    except DeviceLostError:
        raise
    except LoratuneError as error:  # a model that cannot be loaded: every segment gets the same clear answer
        while (segment := inbox(wait=True)) is not None:
            driver.send(Outcome(key=segment.key, state=State.BAD_INPUT, message=str(error), error=error_kind(error)))
        return
    if engine.notice:
        driver.send(Message(text=engine.notice))
    engine.run(lambda wait: _share(inbox(wait)), driver.send, stop)
    engine.close()


def _follow(root: Path) -> None:
    from loratune.finetune.engines import load_engine

    try:
        engine = load_engine(_recipe(root), root)
    except DeviceLostError:
        raise
    except LoratuneError:
        return  # rank 0 met the same error, and tells it
    never = threading.Event()  # rank 0's word counts; the engine agrees on it across ranks
    engine.run(lambda wait: _share(None), lambda _: None, never)
    engine.close()


def _share(segment: Segment | None) -> Segment | None:
    """Rank 0's segment, or its None, in every process of the group."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return segment
    from loratune.finetune.distributed import broadcast

    text = broadcast(segment.to_json() if segment is not None else None)
    return Segment.from_json(text) if text is not None else None


def _listen(driver: _Driver, inbox: QueueInbox, stop: threading.Event, answered: threading.Event) -> None:
    """Hear the driver. `answered`: whether to load, or to stop, is known."""
    try:
        while True:
            message = driver.receive()
            if "segment" in message:
                inbox.put(Segment.from_plain(message["segment"]))
            elif "stop" in message:
                stop.set()
                inbox.end()
            answered.set()
    except (EOFError, OSError):
        os._exit(3)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
