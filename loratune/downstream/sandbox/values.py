"""Plain Python values as JSON and back, and frames on a pipe: what the judge and the program under test say to each other.

Neither side trusts the other with pickle. A value keeps its type: a tuple is no list, a float no int. Standard library only.
"""

import json
import os
import select
import struct
from typing import Any

LARGEST_FRAME = 1 << 24


class NotPlainError(TypeError):
    """A value, or a claimed encoding of one, that is not made of plain Python values."""


def encode(value: Any) -> Any:
    """JSON of None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, and of NumPy's values as Python's.

    Subclasses travel as their base (a Counter as a dict, an IntEnum as an int). Raises NotPlainError for anything else.
    """
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return {"float": float(value).hex()}  # exact; infinities and NaN too
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist())
    raise NotPlainError(f"a value of type {type(value).__name__} cannot be compared")


def decode(written: Any) -> Any:
    """Inverse of `encode`. Raises NotPlainError for JSON that `encode` cannot have written."""
    if written is None or isinstance(written, bool | int | str):
        return written
    if isinstance(written, dict) and len(written) == 1:
        ((kind, inner),) = written.items()
        try:
            if kind == "float":
                return float.fromhex(inner)
            if kind == "complex":
                return complex(*map(float.fromhex, inner))
            if kind == "bytes":
                return bytes.fromhex(inner)
            if kind == "dict":
                return {decode(key): decode(item) for key, item in inner}
            makers: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
            return makers[kind](decode(item) for item in inner)
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise NotPlainError("an answer that is no plain value") from error
    raise NotPlainError("an answer that is no plain value")


def send(pipe: int, message: Any) -> None:
    """One JSON message, preceded by its length."""
    data = json.dumps(message).encode()
    data = struct.pack("!I", len(data)) + data
    while data:
        data = data[os.write(pipe, data) :]


def receive(pipe: int, *, alive: Any = None) -> Any:
    """The next message. Raises EOFError at the pipe's end or when `alive()` is false while nothing comes, NotPlainError for no message.

    Reads not one byte further, so that a process forked from this one can read the next message.
    """
    (length,) = struct.unpack("!I", _exactly(pipe, 4, alive))
    if length > LARGEST_FRAME:
        raise NotPlainError("an answer of more than 16 MiB")
    try:
        return json.loads(_exactly(pipe, length, alive))
    except ValueError as error:
        raise NotPlainError("an answer that is no JSON") from error


def _exactly(pipe: int, count: int, alive: Any) -> bytes:
    data = b""
    while len(data) < count:
        while alive is not None and not select.select([pipe], [], [], 0.1)[0]:
            if not alive():
                raise EOFError
        piece = os.read(pipe, count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data
