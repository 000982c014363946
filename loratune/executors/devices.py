"""Which GPUs this process may use, told without importing torch.

A node in /dev says neither how CUDA numbers a GPU nor whether this torch can use it: containers show GPU 3 alone, WSL2 and
ROCm have other nodes, and `CUDA_VISIBLE_DEVICES` may name UUIDs or MIG slices. So torch is asked, in a process of its
own: importing it takes seconds, and a CUDA context takes memory on the GPU and does not survive a fork. It is asked only
where something says that a GPU may be here.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from loratune.errors import TrainingError

_SIGNS = ("nvidia[0-9]*", "dxg", "kfd", "nvhost-gpu", "nvgpu")  # in /dev, with: NVIDIA, WSL2, ROCm, Jetson
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_PATIENCE = 180.0  # seconds for torch to be imported and a driver to wake up
_QUESTION = """
import json, warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import torch
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
build = torch.version.cuda or torch.version.hip
why = f"torch {torch.__version__} is a build for the CPU alone" if build is None else "; ".join(str(w.message) for w in said)
print(json.dumps({"count": count, "hip": torch.version.hip is not None, "why": why}))
"""


@dataclass(frozen=True, kw_only=True)
class ClusterDevices:
    """The devices of a cluster."""

    gpus: bool  # GPUs, or else processors
    number: int  # that trials may use together, a multiple of what one needs
    nodes: int  # that have some
    there: int  # of them now; others may come
    asked_for: bool = False  # the user gave the number


@dataclass(frozen=True, kw_only=True)
class _Seen:
    count: int  # GPUs that torch can use
    hip: bool  # they are AMD's
    why: str  # there are none, where torch says so


def cuda_devices(device: Literal["auto", "cpu", "cuda"], chosen: Sequence[int] | None, per_trial: int) -> list[int]:
    """Numbers of the devices to train on; empty for the CPU.

    A device's number is the one that `CUDA_VISIBLE_DEVICES` has for it, else, also where that names UUIDs or MIG slices,
    its place among the visible ones, as torch counts them. `chosen` restricts them. Raises TrainingError when CUDA is
    asked for and absent, when a chosen number does not exist, or when there are fewer than `per_trial` of them.
    """
    if device == "cpu":
        return []
    wanted = device == "cuda" or bool(chosen)
    present = _numbers() if wanted or _signs() else []
    if not present and wanted:
        why = "" if _hidden() else _ask().why
        raise TrainingError(
            f"executor.device: cuda was asked for, but this machine has no visible CUDA device{f' ({why})' if why else ''}. "
            "Use executor.device: cpu."
        )
    missing = [index for index in chosen or () if index not in present]
    if missing:
        raise TrainingError(f"executor.devices: no such CUDA device: {missing}. Visible here: {present}.")
    devices = list(chosen) if chosen is not None else present
    if devices and len(devices) < per_trial:
        raise TrainingError(f"training.devices_per_trial is {per_trial}, but only {len(devices)} CUDA device(s) can be used: {devices}.")
    return devices


def unused_gpu(device: Literal["auto", "cpu", "cuda"], devices: Sequence[int]) -> str | None:
    """A warning where the CPU trains, nobody asked for that, and the machine has a GPU; `devices` as `cuda_devices` gave them."""
    if device != "auto" or devices or not (signs := _signs()) or _hidden():
        return None
    why = _ask().why or "torch finds none that it can use"
    return (
        f"warning: this machine has a GPU ({signs[0]}), but trials train on the CPU: {why}. Install a build of torch for it "
        "(https://pytorch.org/get-started), or set executor.device: cpu."
    )


def seen_as(device: int) -> str:
    """torch's name in this process for a device of `cuda_devices`."""
    entries = _entries(_variable())
    return f"cuda:{entries.index(str(device)) if _numbered(entries) else device}"


def only(devices: Sequence[int]) -> dict[str, str]:
    """The environment in which a new process sees these devices of `cuda_devices` and no other; for none, as this process does."""
    if not devices:
        return {}
    variable = _variable()
    entries = _entries(variable)
    named = entries if entries and not _numbered(entries) else None
    return {variable: ",".join(named[device] if named else str(device) for device in devices)}


def _numbers() -> list[int]:
    if _hidden():
        return []
    entries, count = _entries(_variable()), _ask().count
    if count and entries and all(entry.startswith("MIG-") for entry in entries):
        return list(range(len(entries)))  # a process sees the first alone; each has a process of its own
    return [int(entry) for entry in entries[:count]] if _numbered(entries) else list(range(count))


def _variable() -> str:
    """The variable that hides devices: AMD's runtime listens to its own first."""
    cuda, hip = _VARIABLES
    return hip if hip in os.environ and _ask().hip else cuda


def _entries(variable: str) -> list[str]:
    """What the variable lists; empty where it is not set."""
    return [entry.strip() for entry in os.environ.get(variable, "").split(",") if entry.strip()]


def _numbered(entries: Sequence[str]) -> bool:
    return bool(entries) and all(entry.isdigit() for entry in entries)


def _hidden() -> bool:
    """Whether somebody hid all GPUs from this process."""
    return any(os.environ.get(variable, "0").strip() in ("", "-1", "none", "NoDevFiles") for variable in _VARIABLES)


def _signs() -> list[str]:
    """Nodes of GPUs."""
    return sorted(str(path) for pattern in _SIGNS for path in Path("/dev").glob(pattern))


def _ask() -> _Seen:
    return _answer(*(os.environ.get(variable) for variable in _VARIABLES))


@lru_cache
def _answer(*_: str | None) -> _Seen:
    """What torch sees under these values of `_VARIABLES`."""
    try:
        done = subprocess.run([sys.executable, "-c", _QUESTION], capture_output=True, text=True, timeout=_PATIENCE, check=False)
        return _Seen(**json.loads(done.stdout.strip().splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return _Seen(count=0, hip=False, why=f"torch did not answer within {_PATIENCE:g} s")
    except (IndexError, ValueError):  # it died
        last = done.stderr.strip().splitlines()[-1:]
        return _Seen(count=0, hip=False, why="".join(last) or f"asking torch ended with exit status {done.returncode}")
