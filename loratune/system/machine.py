"""The machine: what a study ran on, recorded with every session; the memory that is free; the cores, and how to share them out."""

import math
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("loratune", "torch", "transformers", "peft", "accelerate", "optuna", "PyNomadBBO", "nni", "cmaes", "datasets", "bitsandbytes")
_THREADS = (*(f"{name}_NUM_THREADS" for name in ("OMP", "MKL", "OPENBLAS", "BLIS", "NUMEXPR")), "VECLIB_MAXIMUM_THREADS")
_GROUPS = Path("/sys/fs/cgroup")
_SAFE = 0.8  # share of the free memory that is planned with
_PROCESS = 2**30  # bytes that a process takes beside the weights


def environment() -> dict[str, Any]:
    """Versions, git revision, host, processor and GPUs, as plain JSON."""
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "git": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "host": platform.node(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": (_output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader") or "").splitlines(),
    }


def available_memory() -> int:
    """Bytes of main memory that this process may still take: the machine's, or its control group's where that is less."""
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")]
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable"):
            free = [int(line.split()[1]) * 1024]  # caches can be given back
    limit, used = _lines(_GROUPS / "memory.max"), _lines(_GROUPS / "memory.current")
    if limit and used and limit[0].isdigit():
        free.append(int(limit[0]) - int(used[0]))
    return max(0, min(free))


def gpu_memory() -> int | None:
    """Bytes of the machine's smallest GPU, as nvidia-smi says, in milliseconds and without a CUDA context; None: it names none."""
    said = (_output("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits") or "").split()
    found = [int(number) << 20 for number in said if number.isdigit()]
    return min(found, default=None)


def cpu_processes(weights: int | None, most: int) -> int:
    """How many processes should share the cores, each with a base model of `weights` bytes on disk; 1 where None, unknown.

    n = min(cores, most, 0.8 free memory / (2 weights + 1 GiB)): half-precision weights become float32, and Python, torch
    and activations come on top. A small model's operations gain little from a second thread, so that two processes of one
    thread do more than one of two (benchmarks/results/packed_throughput, answering).
    """
    if weights is None:
        return 1
    room = int(_SAFE * available_memory() / (2 * weights + _PROCESS))
    return max(1, min(usable_cores(), most, room))


def usable_cores() -> int:
    """Processors that this process may keep busy: those of its affinity, or its control groups' quota where that is less (rounded down)."""
    return max(1, int(min(len(os.sched_getaffinity(0)), _quota())))


def threads_for(processes: int) -> int:
    """Threads of each of several processes that share the usable cores; at most OMP_NUM_THREADS where that is set."""
    share = max(1, usable_cores() // max(1, processes))
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list gives one number for each level
    return min(share, int(first)) if first.isdigit() and int(first) else share


def thread_variables(threads: int) -> dict[str, str]:
    """The environment variables by which a process's libraries of linear algebra keep to `threads` threads."""
    return dict.fromkeys(_THREADS, str(threads))


def _quota() -> float:
    """Processors' worth of time that this process's control groups, and those around them, may take; infinite where none says."""
    found = [math.inf]
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, own = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        roots = [_GROUPS] if not controllers else [_GROUPS / controllers, _GROUPS / "cpu"]
        for root in roots:
            inside = root.joinpath(*Path(own).parts[1:])
            for group in [root, *(parent for parent in [inside, *inside.parents] if root in parent.parents)]:
                found += _limit(group)
    return min(found)


def _limit(group: Path) -> list[float]:
    """The quota that one control group sets, by version 2 ("max 100000", "150000 100000") or 1 (-1 for none); empty for none."""
    words = " ".join(_lines(group / "cpu.max")).split()
    if not words:
        words = [*_lines(group / "cpu.cfs_quota_us"), *_lines(group / "cpu.cfs_period_us")]
    if len(words) == 2 and all(word.isdigit() and int(word) for word in words):
        return [int(words[0]) / int(words[1])]
    return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    names = (line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []  # not Linux, or no control group


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version_of_loratune() -> str:
    return _version("loratune") or "from source"  # a checkout that is not installed
