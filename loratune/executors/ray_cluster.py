"""A Ray cluster: connected to, and its devices counted. Ray is imported when it is asked for, and in this file's functions alone."""

import logging
import os
import signal
import threading
from types import ModuleType
from typing import Any

from loratune.errors import MissingExtraError, TrainingError
from loratune.executors.devices import ClusterDevices

_ours = False  # whether this process connected, and so disconnects


def ray() -> ModuleType:
    """The package. Raises MissingExtraError."""
    try:
        import ray as found
    except ImportError as error:
        raise MissingExtraError("Ray", "ray", str(error)) from error
    if found.__file__ is None:  # a folder of that name where Python looks, as Ray's own /tmp/ray for who stands in /tmp
        raise MissingExtraError("Ray", "ray", f"{next(iter(found.__path__))} is a folder without code")
    return found


def connect(address: str | None) -> ModuleType:
    """Connect this process to the cluster at `address`, unless it is connected; returns the package.

    None: the one that RAY_ADDRESS names or this machine is a node of, else one that is started here for as long as this process runs.
    Raises MissingExtraError, TrainingError where there is no such cluster.
    """
    global _ours
    package = ray()
    if package.is_initialized():
        return package
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that is started here
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        package.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise TrainingError(f"executor.address: cannot connect to a Ray cluster at {address or 'this machine'}: {error}") from error
    finally:
        if threading.current_thread() is threading.main_thread() and on_term is not None:
            signal.signal(signal.SIGTERM, on_term)  # Ray's own would end this process without a word
    _ours = True
    return package


def disconnect() -> None:
    """Leave the cluster, if this process came to it by `connect`."""
    global _ours
    if _ours:
        ray().shutdown()
        _ours = False


def cluster_devices(
    *, device: str, per_trial: int, threads: int | None = None, address: str | None = None, max_devices: int | None = None, **_: Any
) -> ClusterDevices:
    """The devices of the cluster: its GPUs, else its processors, of which a device takes `threads` (1).

    `max_devices` counts where it is given: as many trial places are pinned when a study begins, whatever is there by then.
    Raises MissingExtraError; TrainingError where the cluster has too few, and no max_devices says that others will come.
    """
    nodes = [node["Resources"] for node in connect(address).nodes() if node["Alive"]]
    gpus = [int(resources.get("GPU", 0)) // per_trial * per_trial for resources in nodes]
    on_gpu = device == "cuda" or (device == "auto" and any(gpus))
    cpus = [int(resources.get("CPU", 0) / (threads or 1)) // per_trial * per_trial for resources in nodes]
    there = gpus if on_gpu else cpus
    if max_devices is not None and max_devices < per_trial:
        raise TrainingError(f"executor.max_devices is {max_devices}, but a trial needs training.devices_per_trial: {per_trial}.")
    number = max_devices or sum(there)
    if number < per_trial:
        kind = "GPU" if on_gpu else "processor"
        raise TrainingError(
            f"no node of the Ray cluster has the {per_trial} {kind}(s) that a trial needs; there are {len(nodes)} nodes. Add some, or "
            "say with executor.max_devices how many will come."
        )
    return ClusterDevices(
        gpus=on_gpu,
        number=number // per_trial * per_trial,
        nodes=sum(map(bool, there)),
        there=sum(there),
        asked_for=max_devices is not None,
    )
