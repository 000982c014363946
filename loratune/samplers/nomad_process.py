"""The process in which NOMAD runs: one optimisation, spoken to in JSON lines over stdin and stdout.

    parent: {"x0": [[...], ...], "lower": [...], "upper": [...], "types": "IIR", "seed": 1, ...}
    child:  {"block": [[...], ...]}           points to evaluate (one, unless block_size > 1)
    parent: [loss, null, ...]                 one answer per point; null: it failed; of several objectives [[...], null, ...]
    child:  {"block": ...} ... and at last {"end": "why NOMAD stopped"}

NOMAD wants to call its blackbox, so its callback is where the two sides meet. It runs in a process
of its own because its state is global, its errors are segmentation faults, its signal handler
replaces Python's, and its search can then be replayed from a log. This file is run as a script
and imports nothing of loratune: it starts in a tenth of a second, whatever the caller's `__main__`.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from typing import Any, TextIO


def main() -> None:
    outgoing = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # NOMAD prints on stdout, which belongs to the protocol
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    start = json.loads(sys.stdin.readline())
    try:
        import PyNomad
    except ImportError as error:
        _send(outgoing, {"error": str(error)})
        return

    # A relative name, for NOMAD's parser splits a path at its blanks. Several x0 only work from a file.
    folder = tempfile.mkdtemp(prefix="loratune-nomad-")
    os.chdir(folder)
    with open("x0.txt", "w") as file:
        file.writelines(" ".join(map(repr, x)) + "\n" for x in start["x0"])

    def evaluate(points: list[Any]) -> list[int]:
        """One rendezvous. No exception may leave it: in C++ it would be a segmentation fault."""
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # again and again, for NOMAD sets its own
            os.chdir(tempfile.gettempdir())
            shutil.rmtree(folder, ignore_errors=True)  # NOMAD has read x0
            _send(outgoing, {"block": [[x.get_coord(i) for i in range(x.size())] for x in points]})
            line = sys.stdin.readline()
            if not line:  # the parent is gone
                os._exit(0)
            answers = json.loads(line)
            for x, answer in zip(points, answers, strict=True):
                if answer is not None:
                    values = answer if isinstance(answer, list) else [answer]
                    x.setBBO(" ".join(repr(float(value)) for value in values).encode())
            return [int(answer is not None) for answer in answers]
        except BaseException:
            os._exit(1)

    def one(x: Any) -> int:
        return evaluate([x])[0]

    def block(xs: Any) -> list[int]:
        return evaluate([xs.get_x(i) for i in range(xs.size())])

    in_blocks = start["block_size"] > 1
    result = PyNomad.optimize(block if in_blocks else one, [], start["lower"], start["upper"], _parameters(start))
    _send(outgoing, {"end": str(result.get("stop_reason", "")).strip()})


def _parameters(start: dict[str, Any]) -> list[str]:
    dimension = len(start["types"])
    lines = [
        f"BB_INPUT_TYPE ( {' '.join(start['types'])} )",
        " ".join(["BB_OUTPUT_TYPE", *["OBJ"] * start.get("objectives", 1)]),
        f"SEED {start['seed']}",
        f"MAX_BB_EVAL {start['max_evaluations']}",
        "DISPLAY_DEGREE 0",
    ]
    if start.get("objectives", 1) > 1:
        lines += ["DMULTIMADS_OPTIMIZATION yes", "DIRECTION_TYPE ORTHO 2N"]  # which has no other directions
    if start["x0"]:
        lines.append("X0 x0.txt")
    if start["latin_hypercube"]:
        lines.append(f"LH_SEARCH {start['latin_hypercube']} 0")
    if start["block_size"] > 1:
        lines.append(f"BB_MAX_BLOCK_SIZE {start['block_size']}")
        if start.get("objectives", 1) == 1:  # DMulti-MADS refuses it
            lines.append("MEGA_SEARCH_POLL yes")  # only then are blocks filled: a poll's points come together
    if "R" not in start["types"]:
        # On integers alone NOMAD circles around its best point, asking its own cache, until this many.
        lines.append(f"MAX_EVAL {30 * dimension}")
    return lines


def _send(outgoing: TextIO, message: dict[str, Any]) -> None:
    outgoing.write(json.dumps(message) + "\n")
    outgoing.flush()


def _leave_with_parent(parent: int) -> None:
    """End this process when its parent dies, even while a sibling holds the other end of the pipe."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


if __name__ == "__main__":
    main()
