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
