"""Device memory: its peak, freeing it between trials, recognising that it ran out; the device's health and its name in words."""

import contextlib
import gc
import platform
import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch

_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|(CUDA|HIP) (error: )?out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"
)
_LOST = re.compile(
    r"(CUDA|HIP) error: |device-side assert|(CUBLAS|CUDNN)_STATUS_(NOT_INITIALIZED|MAPPING_ERROR|EXECUTION_FAILED|INTERNAL_ERROR)"
)


def reset_peak(device: torch.device) -> None:
    """Start a new measurement. On CPU it is the process's, and only Linux can start anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is then that of the process's whole life
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Most bytes in use since `reset_peak`: of tensors on a GPU, resident in the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def mark(device: torch.device) -> int:
    """Begin to measure what an operation takes on a GPU, beside the bytes that are in use, which are returned. 0 on CPU."""
    if device.type != "cuda":
        return 0
    reset_peak(device)
    return torch.cuda.memory_allocated(device)


def since(device: torch.device, marked: int) -> int:
    """Most bytes that were in use since `mark`, beside those that it returned; 0 on CPU, where there is no telling."""
    return max(0, peak_bytes(device) - marked) if device.type == "cuda" else 0


def free(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def available(device: torch.device) -> int:
    """Bytes on a GPU that this process holds or may still take; other processes may have taken the rest of it."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def reserved(device: torch.device) -> int:
    """Bytes that this process holds of a GPU, used or not; 0 on CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU was given to do, so that a clock tells what it took. On CPU everything is done already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fetched(x: torch.Tensor) -> list[Any]:
    """Its numbers, in one transfer; what a GPU was given to do before is then done, as after `synchronize`."""
    return x.tolist()


def pinned(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same in memory that a GPU copies from without anybody's waiting; itself for any other device."""
    return host.pin_memory() if device.type == "cuda" else host


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on any device; CPU's allocator raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def is_device_lost(error: BaseException, device: torch.device) -> bool:
    """Whether an error leaves this process without a usable device: an illegal access, an ECC error, a failed assertion.

    CUDA calls such errors sticky: every later call fails as well, until the process ends. An error that is not the
    device's own may still have come from one of its operations, so a GPU is asked.
    """
    if is_out_of_memory(error):
        return False
    if isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and _LOST.search(str(error))):
        return True
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def device_name(device: torch.device) -> str:
    """In words, for the report: `NVIDIA H200, 139 GiB`; `x86_64 CPU, 2 threads`."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"
