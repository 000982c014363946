import platform
from pathlib import Path

import pytest
import torch

from loratune.finetune import memory

CPU = torch.device("cpu")


def test_peak_follows_allocation() -> None:
    memory.reset_peak(CPU)
    before = memory.peak_bytes(CPU)
    block = torch.ones(40 * 2**20)  # 160 MiB
    assert memory.peak_bytes(CPU) >= before + 100 * 2**20
    del block
    memory.free(CPU)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep it")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    memory.keep_freed(CPU)
    memory.free(CPU)
    before = resident()
    block = torch.ones(40 * 2**20)
    del block
    assert resident() >= before + 100 * 2**20
    memory.reset_peak(CPU)  # what is kept does not count as in use
    assert memory.peak_bytes(CPU) < before + 60 * 2**20
    block = torch.ones(40 * 2**20)
    assert memory.peak_bytes(CPU) >= before + 100 * 2**20
    del block
    memory.free(CPU)
    assert resident() < before + 60 * 2**20


def resident() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def test_out_of_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**55)
    assert memory.is_out_of_memory(failure.value)
    assert memory.is_out_of_memory(MemoryError())
    assert not memory.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not memory.is_out_of_memory(ValueError("out of memory"))


def test_device_in_words() -> None:
    assert "CPU" in memory.device_name(CPU)
    assert str(torch.get_num_threads()) in memory.device_name(CPU)
