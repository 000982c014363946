"""The one tree of errors. Each says what was given, what is allowed, and what to do.

Raise the narrowest; the command line prints its text alone (no traceback) and exits with its
`exit_code`. Anything that is not a `LoratuneError` is a bug in loratune and shows its traceback.
"""


class LoratuneError(Exception):
    """Root of every error a user can cause or mend."""

    exit_code = 1


class SpecError(LoratuneError):
    """The study's description is wrong. Carries every mistake at once, one per line."""

    exit_code = 2


class DataError(LoratuneError):
    """Instruction data that cannot be read or must not be used: file, line, field, expectation."""

    exit_code = 3


class ModelError(LoratuneError):
    """A base model, tokenizer or adapter that cannot be loaded or does not fit the request."""

    exit_code = 4


class NotPackableError(ModelError):
    """The packed engine cannot train this model; the text is the reason alone. The `hf` engine takes over."""


class StorageError(LoratuneError):
    """The study's folder or Optuna storage cannot be read, written or continued."""

    exit_code = 5


class MissingExtraError(LoratuneError):
    """An optional dependency is not installed; the text holds the command that installs it."""

    exit_code = 6

    def __init__(self, what: str, extra: str = "", cause: str = "", *, command: str = "") -> None:
        """extra: of loratune's own; command: where it is none of these."""
        because = f" ({cause})" if cause else ""
        command = command or f"pip install 'loratune[{extra}]'"
        super().__init__(f"{what} is not installed{because}. Install it with: {command}")


class TrainingError(LoratuneError):
    """No trial could be trained: the device, a worker or the engine failed for good."""

    exit_code = 7


class DeviceLostError(TrainingError):
    """The device reported an error after which this process cannot use it any more; another process can."""

    def __init__(self, device: str, cause: str) -> None:
        super().__init__(
            f"{device} reported an error after which this process cannot use it any more:\n{cause}\n"
            "Run the same command again: it continues from the checkpoints. If this happens again, look for hardware faults in dmesg."
        )


class SearchSpentError(LoratuneError):
    """A sampler has nothing more to propose: its finite space is exhausted. Ends a study cleanly."""

    exit_code = 8


class EvaluationError(LoratuneError):
    """A score that would not mean what it says: the adapter is not on, or a benchmark may not run as asked."""

    exit_code = 9


class SandboxError(LoratuneError):
    """Untrusted code cannot be run safely on this machine, or its sandbox broke."""

    exit_code = 10


_OF_BAD_INPUT: tuple[type[LoratuneError], ...] = (ModelError, DataError, StorageError)


def error_kind(error: Exception) -> str:
    """The name by which an error of the user's input crosses a process border; "" for one that is none."""
    return next((kind.__name__ for kind in _OF_BAD_INPUT if isinstance(error, kind)), "")


def error_of(kind: str, message: str) -> LoratuneError:
    """The error that `error_kind` named; TrainingError for no name."""
    return next((known for known in _OF_BAD_INPUT if known.__name__ == kind), TrainingError)(message)
