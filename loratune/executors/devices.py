"""Which CUDA devices this process may use, told without importing torch."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from loratune.errors import TrainingError


def cuda_devices(device: Literal["auto", "cpu", "cuda"], chosen: Sequence[int] | None, per_trial: int) -> list[int]:
    """Indices of the devices to train on; empty for the CPU.

    `chosen` restricts them; `CUDA_VISIBLE_DEVICES` is respected. Raises TrainingError when CUDA is asked
    for and absent, when a chosen index does not exist, or when there are fewer than `per_trial` of them.
    """
    if device == "cpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = sorted(int(path.name.removeprefix("nvidia")) for path in Path("/dev").glob("nvidia[0-9]*"))
    if visible is not None:
        present = [int(index) for index in visible.split(",") if index.strip().isdigit() and int(index) in present]
    if not present and (device == "cuda" or chosen):
        raise TrainingError("executor.device: cuda was asked for, but this machine has no visible CUDA device. Use executor.device: cpu.")
    missing = [index for index in chosen or () if index not in present]
    if missing:
        raise TrainingError(f"executor.devices: no such CUDA device: {missing}. Visible here: {present}.")
    devices = list(chosen) if chosen is not None else present
    if devices and len(devices) < per_trial:
        raise TrainingError(f"training.devices_per_trial is {per_trial}, but only {len(devices)} CUDA device(s) can be used: {devices}.")
    return devices


def seen_as(device: int) -> str:
    """torch's name in this process for a device of `cuda_devices`: `CUDA_VISIBLE_DEVICES` numbers the visible ones anew."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"cuda:{device if visible is None else [index.strip() for index in visible.split(',')].index(str(device))}"
