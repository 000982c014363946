"""What the machine is asked: its free memory, and how its cores are shared out."""

from pathlib import Path

import pytest

from loratune import environment
from loratune.environment import available_memory, cpu_processes
from loratune.finetune.hub import weights_on_disk


def test_free_memory_is_the_control_groups_where_that_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_memory() > 0
    texts = {"meminfo": ["MemAvailable:  1000000 kB"], "memory.max": ["300000000"], "memory.current": ["100000000"]}
    monkeypatch.setattr(environment, "_lines", lambda path: texts.get(Path(path).name, []))
    assert available_memory() == 200000000
    texts["memory.max"] = ["max"]
    assert available_memory() == 1000000 * 1024


@pytest.mark.parametrize(
    ("weights", "most", "processes"),
    [(10**6, 8, 4), (10**6, 3, 3), (10**6, 0, 1), (2**30, 8, 2), (2**32, 8, 1), (None, 8, 1)],
    ids=["cores", "most", "none", "memory", "too large", "unknown"],
)
def test_processes_by_cores_and_memory(weights: int | None, most: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "available_memory", lambda: 10 * 2**30)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert cpu_processes(weights, most) == processes


def test_weights_are_counted_once(tmp_path: Path) -> None:
    assert weights_on_disk(str(tmp_path), None) is None
    assert weights_on_disk("nobody/has-this-one", None) is None
    assert weights_on_disk("not a name", None) is None
    (tmp_path / "pytorch_model.bin").write_bytes(b"12345")
    assert weights_on_disk(str(tmp_path), None) == 5
    for part in ("1", "2"):
        (tmp_path / f"model-{part}.safetensors").write_bytes(b"1234567")
    assert weights_on_disk(str(tmp_path), None) == 14
