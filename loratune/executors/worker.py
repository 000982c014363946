"""A worker: a process that trains the packs it is sent, until told to stop or left alone.

    python -m loratune.executors.worker STUDY_FOLDER SOCKET

It speaks JSON, one message at a time, over a Unix socket: in come {"pack": ...} and {"stop": true}; out
go {"progress": ...} and {"outcome": ...}, one outcome per segment. The loss of the socket means that the
driver is gone: the worker then ends at once, since nobody would record what it finished, and a checkpoint
is on the disk. Under torchrun every process of the group trains; the one of rank 0 alone speaks, and
passes the packs on to the others.
"""

import json
import os
import signal
import sys
import threading
from multiprocessing.connection import Client, Connection
from pathlib import Path
from queue import SimpleQueue

from loratune.errors import LoratuneError
from loratune.work import Outcome, Pack, Progress, Recipe, State


def main(root: Path, address: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the driver alone decides
    recipe = Recipe.from_json((root / "recipe.json").read_text())
    if int(os.environ.get("RANK", "0")) == 0:
        _lead(recipe, root, address)
    else:
        _follow(recipe, root)


def _lead(recipe: Recipe, root: Path, address: str) -> None:
    driver = Client(address, family="AF_UNIX")
    packs: SimpleQueue[Pack | None] = SimpleQueue()
    stop = threading.Event()
    threading.Thread(target=_listen, args=(driver, packs, stop), daemon=True).start()

    from loratune.finetune.engine import load_engine  # torch: seconds to import; the socket is open meanwhile

    engine, trouble = None, None
    try:
        engine = load_engine(recipe, root)
    except LoratuneError as error:  # a model that cannot be loaded: every pack gets the same clear answer
        trouble = error
    while (pack := packs.get()) is not None:
        if engine is None:
            outcomes = [Outcome(key=s.key, state=State.BAD_INPUT, message=str(trouble)) for s in pack.segments]
        else:
            _share(pack)
            outcomes = engine.run(pack, lambda progress: _send(driver, {"progress": _plain(progress)}), stop)
        for outcome in outcomes:
            _send(driver, {"outcome": _plain(outcome)})
    if engine is not None:
        _share(None)
        engine.close()


def _follow(recipe: Recipe, root: Path) -> None:
    from loratune.finetune.engine import load_engine

    try:
        engine = load_engine(recipe, root)
    except LoratuneError:
        return  # rank 0 met the same error, and tells it
    never = threading.Event()  # rank 0's word counts; the engine agrees on it across ranks
    while (pack := _share(None)) is not None:
        engine.run(pack, lambda _: None, never)
    engine.close()


def _share(pack: Pack | None) -> Pack | None:
    """Rank 0's pack, in every process of the group; None ends them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return pack
    from loratune.finetune.engine import broadcast

    text = broadcast(pack.to_json() if pack is not None else None)
    return Pack.from_json(text) if text is not None else None


def _listen(driver: Connection, packs: SimpleQueue[Pack | None], stop: threading.Event) -> None:
    try:
        while True:
            message = json.loads(driver.recv_bytes())
            if "pack" in message:
                packs.put(Pack.from_json(json.dumps(message["pack"])))
            else:
                stop.set()
                packs.put(None)
    except (EOFError, OSError):
        os._exit(3)


def _send(driver: Connection, message: dict[str, object]) -> None:
    try:
        driver.send_bytes(json.dumps(message).encode())
    except OSError:
        os._exit(3)


def _plain(item: Progress | Outcome) -> object:
    return json.loads(item.to_json())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
