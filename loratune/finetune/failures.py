"""What a failure of an engine means: for the trial, for the process, as text.

Out of memory is recognised in `memory.py`; what an engine does then stands in `packed/engine.py`, `packed/validation_pass.py`, `hf.py`.
"""

import traceback
from collections.abc import Callable

import torch

from loratune.errors import DeviceLostError, error_kind
from loratune.finetune import memory
from loratune.work import Segment, State


class DivergedError(Exception):
    """Loss, gradient or weights became inf or NaN."""


def state_of(error: Exception) -> State:
    """The state of a trial that ended with this error."""
    if error_kind(error):
        return State.BAD_INPUT
    return State.OUT_OF_MEMORY if memory.is_out_of_memory(error) else State.CRASHED


def error_text(error: Exception) -> str:
    """The error's text, or the end of its traceback where it is a fault of the program or the device."""
    if error_kind(error):
        return str(error)
    return "".join("".join(traceback.format_exception(error)).strip().splitlines(keepends=True)[-6:])


def too_large(segment: Segment, device: torch.device) -> str:
    """For a configuration that does not fit on the device by itself."""
    return (
        f"out of memory on {memory.device_name(device)} with lora_r {segment.hyperparameters.lora_r}, one example at a time; "
        "use gradient_checkpointing, load_in_4bit or a smaller max_length"
    )


def ran_out(error: Exception, device: torch.device) -> bool:
    """Whether memory ran out. Raises DeviceLostError where this process cannot use the device any more, whatever it does."""
    if memory.is_device_lost(error, device):
        raise DeviceLostError(str(device), error_text(error)) from error
    return memory.is_out_of_memory(error)


def fits(action: Callable[[], None], device: torch.device) -> bool:
    """Do something; whether there was memory for it. Where not, how far it got is not known."""
    try:
        action()
    except Exception as error:
        if not ran_out(error, device):
            raise
        return False
    return True
