"""What the machine is asked: its free memory, and how its cores are shared out."""

from pathlib import Path

import pytest

from loratune.system import machine
from loratune.system.hub import weights_on_disk
from loratune.system.machine import available_memory, cpu_processes, thread_variables, threads_for, usable_cores


def test_free_memory_is_the_control_groups_where_that_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_memory() > 0
    texts = {"meminfo": ["MemAvailable:  1000000 kB"], "memory.max": ["300000000"], "memory.current": ["100000000"]}
    monkeypatch.setattr(machine, "_lines", lambda path: texts.get(Path(path).name, []))
    assert available_memory() == 200000000
    texts["memory.max"] = ["max"]
    assert available_memory() == 1000000 * 1024


@pytest.mark.parametrize(
    ("weights", "most", "processes"),
    [(10**6, 8, 4), (10**6, 3, 3), (10**6, 0, 1), (2**30, 8, 2), (2**32, 8, 1), (None, 8, 1)],
    ids=["cores", "most", "none", "memory", "too large", "unknown"],
)
def test_processes_by_cores_and_memory(weights: int | None, most: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 10 * 2**30)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert cpu_processes(weights, most) == processes


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": ["max 100000"]}, 8),
        ({"cpu.max": ["250000 100000"]}, 2),
        ({"cpu.max": ["50000 100000"]}, 1),
        ({"cpu.max": ["1600000 100000"]}, 8),
        ({"pod/cpu.max": ["300000 100000"], "pod/box/cpu.max": ["max 100000"]}, 3),
        ({"cpu/cpu.cfs_quota_us": ["-1"], "cpu/cpu.cfs_period_us": ["100000"]}, 8),
        ({"cpu/pod/box/cpu.cfs_quota_us": ["400000"], "cpu/pod/box/cpu.cfs_period_us": ["100000"]}, 4),
        ({"cpu,cpuacct/cpu.cfs_quota_us": ["200000"], "cpu,cpuacct/cpu.cfs_period_us": ["100000"]}, 2),
    ],
)
def test_cores_are_those_that_a_quota_leaves(files: dict[str, list[str]], cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {f"/sys/fs/cgroup/{name}": lines for name, lines in files.items()}
    texts["/proc/self/cgroup"] = ["3:cpu,cpuacct:/pod/box", "2:memory:/", "0::/pod/box"]
    monkeypatch.setattr(machine, "_lines", lambda path: texts.get(str(path), []))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert usable_cores() == cores


@pytest.mark.parametrize(
    ("said", "processes", "threads"), [("", 2, 4), ("1", 2, 1), ("3,2", 1, 3), ("64", 4, 2), ("x", 16, 1), ("0", 8, 1)]
)
def test_threads_follow_omp_num_threads(said: str, processes: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert threads_for(processes) == threads
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLIS_NUM_THREADS"):
        assert thread_variables(threads)[name] == str(threads)


def test_weights_are_counted_once(tmp_path: Path) -> None:
    assert weights_on_disk(str(tmp_path), None) is None
    assert weights_on_disk("nobody/has-this-one", None) is None
    assert weights_on_disk("not a name", None) is None
    (tmp_path / "pytorch_model.bin").write_bytes(b"12345")
    assert weights_on_disk(str(tmp_path), None) == 5
    for part in ("1", "2"):
        (tmp_path / f"model-{part}.safetensors").write_bytes(b"1234567")
    assert weights_on_disk(str(tmp_path), None) == 14
