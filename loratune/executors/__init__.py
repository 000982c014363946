"""Executors train segments somewhere: `inline` in this process, `local` in one long-lived process per device.

Executor        the contract, and the retries that all executors share
InlineExecutor  this process: for debugging and for one device
LocalExecutor   a process (or torchrun group of processes) per device, each running `worker.py`
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratune.executors.base import Executor
from loratune.plugs import EXECUTORS
from loratune.work import Recipe

__all__ = ["Executor", "build"]


def build(
    name: str,
    *,
    recipe: Recipe,
    root: Path,
    lock: int,
    devices: Sequence[int],
    workers: int,
    threads: int | None,
    max_retries: int,
    hang_timeout: float | None,
    options: Mapping[str, Any] | None = None,
) -> Executor:
    """Make the executor called `name` for the study in the folder `root`.

    `devices` are CUDA device indices, empty on CPU, where `workers` processes share the cores; each process
    is sent `recipe.slots` segments at a time, and an engine that trains fewer lets the others wait.
    `lock` is the file descriptor of the study's lock, which workers inherit. `options`: the executor's own. Raises SpecError.
    """
    given = {
        "recipe": recipe,
        "root": root,
        "lock": lock,
        "devices": devices,
        "workers": workers,
        "threads": threads,
        "max_retries": max_retries,
        "hang_timeout": hang_timeout,
    }
    return EXECUTORS.make(name, Executor, given, options)
