"""Executors train segments somewhere: `inline` in this process, `local` in one long-lived process per device, `ray` on a cluster.

Executor        the contract, and the retries that all executors share
InlineExecutor  this process: for debugging and for one device
LocalExecutor   a process (or torchrun group of processes) per device, each running `worker.py`
RayExecutor     an actor per device of a Ray cluster, each with such a process
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from loratune.executors.base import Executor
from loratune.executors.devices import ClusterDevices, cuda_devices
from loratune.plugs import EXECUTORS
from loratune.plugs.registry import imported
from loratune.work import Recipe

__all__ = ["Executor", "build", "cluster", "devices_for", "started_ahead"]


def cluster(
    name: str, *, device: str, per_trial: int, threads: int | None, options: Mapping[str, Any] | None = None
) -> ClusterDevices | None:
    """The devices of the cluster that the executor called `name` trains on; None where it trains on this machine.

    Raises SpecError, TrainingError, MissingExtraError.
    """
    plug = EXECUTORS[name]
    if plug.count is None:
        return None
    EXECUTORS.keywords(name, dict.fromkeys(plug.given), options or {})  # a mistake in an option
    found: ClusterDevices = imported(plug.count)(device=device, per_trial=per_trial, threads=threads, **(options or {}))
    return found


def devices_for(
    name: str,
    *,
    device: Literal["auto", "cpu", "cuda"],
    chosen: Sequence[int] | None,
    per_trial: int,
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Numbers of the GPUs that trials train on, here or, counted from 0, in a cluster; empty for the CPU. Raises as `cluster`."""
    found = cluster(name, device=device, per_trial=per_trial, threads=threads, options=options)
    if found is None:
        return cuda_devices(device, chosen, per_trial)
    return list(range(found.number)) if found.gpus else []


@contextlib.contextmanager
def started_ahead(
    name: str, *, root: Path, lock: int, devices: Sequence[int], workers: int, threads: int | None, devices_per_trial: int
) -> Iterator[Any]:
    """What the executor called `name` can start before its recipe is known, for `build`; None where there is nothing. It ends with
    the context, unless an executor took it over. Raises TrainingError.
    """
    plug = EXECUTORS[name]
    if plug.ahead is None:
        yield None
        return
    begun = imported(plug.ahead)(
        root=root, lock=lock, devices=devices, workers=workers, threads=threads, devices_per_trial=devices_per_trial
    )
    try:
        yield begun
    finally:
        if begun is not None:
            begun.discard()


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
    ahead: Any = None,
) -> Executor:
    """Make the executor called `name` for the study in the folder `root`.

    `devices` are CUDA device indices, empty on CPU, where `workers` processes share the cores; each process
    is sent `recipe.slots` segments at a time, and an engine that trains fewer lets the others wait.
    `lock` is the file descriptor of the study's lock, which workers inherit. `options`: the executor's own. `ahead`: what
    `started_ahead` gave. Raises SpecError.
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
        "ahead": ahead,
    }
    return EXECUTORS.make(name, Executor, given, options)
