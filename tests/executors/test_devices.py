"""Which GPUs there are: torch says so, in a process of its own, on machines that are made up here."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loratune.errors import TrainingError
from loratune.executors import devices
from loratune.executors.devices import cuda_devices, only, seen_as, unused_gpu
from loratune.executors.process import ON_GPU, WorkerProcess

NVIDIA, WSL2, ROCM = ["/dev/nvidia3"], ["/dev/dxg"], ["/dev/kfd"]
Machine = Callable[..., list[int]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Sets up a machine: its nodes in /dev, what torch sees, what is in the environment. Counts how often torch is asked."""
    asked = []

    def set_up(signs: list[str], count: int, *, hip: bool = False, why: str = "", **environment: str) -> list[int]:
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", *devices_of_the_allocator()):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        answer = json.dumps({"count": count, "hip": hip, "why": why})
        monkeypatch.setattr(devices, "_QUESTION", f"print('a warning before'); print({answer!r})")
        monkeypatch.setattr(devices, "_signs", lambda: signs)
        run = subprocess.run
        monkeypatch.setattr(subprocess, "run", lambda *given, **options: (asked.append(1), run(*given, **options))[1])
        devices._answer.cache_clear()
        asked.clear()
        return asked

    yield set_up
    devices._answer.cache_clear()


def devices_of_the_allocator() -> tuple[str, ...]:
    return ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@pytest.mark.parametrize(
    ("signs", "count", "environment", "expected", "second"),
    [
        (NVIDIA, 1, {}, [0], None),
        (["/dev/nvidia0", "/dev/nvidia1"], 2, {}, [0, 1], {"CUDA_VISIBLE_DEVICES": "1"}),
        (NVIDIA, 2, {"CUDA_VISIBLE_DEVICES": "5, 3"}, [5, 3], {"CUDA_VISIBLE_DEVICES": "3"}),
        (NVIDIA, 2, {"CUDA_VISIBLE_DEVICES": "GPU-8a1f,GPU-77b2"}, [0, 1], {"CUDA_VISIBLE_DEVICES": "GPU-77b2"}),
        (NVIDIA, 1, {"CUDA_VISIBLE_DEVICES": "MIG-11,MIG-22"}, [0, 1], {"CUDA_VISIBLE_DEVICES": "MIG-22"}),
        (WSL2, 1, {}, [0], None),
        (ROCM, 2, {"hip": True}, [0, 1], {"CUDA_VISIBLE_DEVICES": "1"}),
        (ROCM, 2, {"hip": True, "HIP_VISIBLE_DEVICES": "2,6"}, [2, 6], {"HIP_VISIBLE_DEVICES": "6"}),
        (NVIDIA, 2, {"HIP_VISIBLE_DEVICES": "0"}, [0, 1], {"CUDA_VISIBLE_DEVICES": "1"}),
        (NVIDIA, 1, {"CUDA_VISIBLE_DEVICES": "0,9"}, [0], None),  # the second does not exist
    ],
    ids=["GPU 3 alone", "two", "numbers", "UUIDs", "MIG", "WSL2", "ROCm", "ROCm, chosen", "another's variable", "absent"],
)
def test_devices_are_those_that_torch_sees(  # type: ignore[no-untyped-def]
    machine: Machine, signs: list[str], count: int, environment: dict, expected: list[int], second: dict[str, str] | None
) -> None:
    asked = machine(signs, count, **environment)
    assert cuda_devices("auto", None, 1) == expected
    assert cuda_devices("cuda", expected[-1:], 1) == expected[-1:]
    assert unused_gpu("auto", expected) is None
    assert [seen_as(number) for number in expected] == [f"cuda:{place}" for place in range(len(expected))]
    assert len(asked) == 1, "a process is started once"
    if second is not None:
        assert only(expected[1:2]) == second


@pytest.mark.parametrize("why", ["torch 2.13.0+cpu is a build for the CPU alone", "CUDA initialization: The NVIDIA driver is too old", ""])
@pytest.mark.parametrize("signs", [NVIDIA, WSL2, ROCM], ids=str)
def test_training_on_the_cpu_beside_a_gpu_is_told(machine: Machine, signs: list[str], why: str) -> None:
    machine(signs, 0, why=why)
    assert cuda_devices("auto", None, 1) == []
    told = unused_gpu("auto", [])
    assert told is not None
    assert told.startswith(f"warning: this machine has a GPU ({signs[0]}), but trials train on the CPU: {why}")
    assert "executor.device: cpu" in told
    assert unused_gpu("cpu", []) is None, "that was asked for"
    with pytest.raises(TrainingError, match=r"executor\.device: cuda was asked for, but this machine has no visible CUDA device"):
        cuda_devices("cuda", None, 1)


def test_a_cpu_machine_is_not_kept_waiting(machine: Machine) -> None:
    asked = machine([], 0)
    assert cuda_devices("auto", None, 1) == []
    assert unused_gpu("auto", []) is None
    assert not asked


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_what_is_hidden_is_not_missed(machine: Machine, hidden: str) -> None:
    asked = machine(NVIDIA, 1, CUDA_VISIBLE_DEVICES=hidden)
    assert cuda_devices("auto", None, 1) == []
    assert unused_gpu("auto", []) is None
    assert not asked


def test_mistakes_name_what_there_is(machine: Machine) -> None:
    machine(NVIDIA, 2)
    with pytest.raises(TrainingError, match=r"executor\.devices: no such CUDA device: \[3\]\. Visible here: \[0, 1\]"):
        cuda_devices("auto", [1, 3], 1)
    with pytest.raises(TrainingError, match=r"devices_per_trial is 4, but only 2 CUDA device"):
        cuda_devices("auto", None, 4)


def test_a_torch_that_dies_says_why(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(NVIDIA, 1)
    monkeypatch.setattr(devices, "_QUESTION", "import no_such_torch")
    assert cuda_devices("auto", None, 1) == []
    assert "No module named 'no_such_torch'" in str(unused_gpu("auto", []))


def test_a_worker_sees_its_device_alone(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(NVIDIA, 2, CUDA_VISIBLE_DEVICES="GPU-a,GPU-b")
    worker = WorkerProcess(number=0, root=tmp_path, lock=0, devices=[1], size=1, threads=1)
    given = worker._environment()
    assert given["CUDA_VISIBLE_DEVICES"] == "GPU-b"
    assert given[ON_GPU]
    assert given["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    for name in devices_of_the_allocator():
        monkeypatch.setenv(name, "max_split_size_mb:64")
        assert not set(devices_of_the_allocator()) & set(worker._environment()), "the user's own stands"
        monkeypatch.delenv(name)
    on_cpu = WorkerProcess(number=0, root=tmp_path, lock=0, devices=[], size=1, threads=1)._environment()
    assert not {ON_GPU, "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF"} & set(on_cpu)


def test_the_parent_stays_without_torch() -> None:
    code = (
        "import sys\n"
        "from loratune.executors import devices\n"
        "devices._signs = lambda: ['/dev/nvidia0']\n"
        'devices._QUESTION = \'print(\\\'{"count": 1, "hip": false, "why": ""}\\\')\'\n'
        "assert devices.cuda_devices('auto', None, 1) == [0]\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(Path(__file__).resolve().parents[2])})


@pytest.mark.slow  # imports torch
def test_the_question_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    devices._answer.cache_clear()
    seen = devices._ask()
    import torch

    assert seen.count == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if torch.version.cuda is None and torch.version.hip is None:
        assert seen.why == f"torch {torch.__version__} is a build for the CPU alone"
