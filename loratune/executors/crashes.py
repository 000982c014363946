"""What the text of a crash says of its cause: whether another try can help, whether two trials failed alike."""

import re
from collections.abc import Sequence
from pathlib import Path

from loratune.errors import TrainingError

_HOPELESS = 3  # trials
LOG = "Worker log:"
_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*([A-Za-z_]\w*(?:Error|Exception))\b")
_OF_THE_PROGRAM = {
    *("ArithmeticError", "AssertionError", "AttributeError", "ImportError", "IndexError", "KeyError", "LookupError"),
    *("ModuleNotFoundError", "NameError", "NotImplementedError", "RecursionError", "TypeError", "UnboundLocalError"),
    *("ValueError", "ZeroDivisionError"),
}
_OF_THE_DEVICE = re.compile(r"cuda|cublas|cudnn|nccl|device|memory|connection", re.IGNORECASE)


def cause(message: str) -> str:
    """One line: the exception's own, or how the process ended. Raises nothing; "" for an empty message."""
    lines = [line.strip() for line in message.strip().splitlines()] or [""]
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    return (exceptions or lines)[-1].partition(LOG)[0].strip()


def common_cause(messages: Sequence[str]) -> str:
    """The cause of all these crashes, in which numbers (sizes, places) may differ; "" where there are several, or none."""
    causes = [cause(message) for message in messages]
    return causes[0] if len({re.sub(r"\d+", "0", line) for line in causes}) == 1 else ""


def stop_for_common_cause(messages: Sequence[str], logs: Path) -> None:
    """Raise TrainingError where the first trials all crashed, and alike: `messages` of all so far, "" of those that did not."""
    why = common_cause(messages) if len(messages) == _HOPELESS else ""
    if why:
        raise TrainingError(
            f"the first {_HOPELESS} trials failed for the same reason, so the others would too: {why}\n"
            f"Logs: {logs}. Fix the cause, then start again with another --output.folder."
        )


def certain(message: str) -> bool:
    """Whether the crash is an exception of the program, which the same input raises again, and none of the machine."""
    line = cause(message)
    found = _EXCEPTION.match(line)
    if found is None:
        return False
    return found[1] in _OF_THE_PROGRAM or (found[1] == "RuntimeError" and not _OF_THE_DEVICE.search(line))
