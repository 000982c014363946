"""executor.threads reaches every library of linear algebra, in worker processes and in this one."""

import threading
from pathlib import Path

import pytest
import torch

from loratune.executors.local import LocalExecutor
from loratune.executors.process import WorkerProcess
from loratune.finetune.engines import limit_threads
from loratune.system import machine
from loratune.work import ModelRecipe, Recipe, TrainingRecipe

NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLIS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def test_workers_share_the_usable_cores_and_follow_omp_num_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(model=ModelRecipe(name_or_path="m"), training=TrainingRecipe(), data="d")
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    monkeypatch.setenv("MKL_NUM_THREADS", "64")
    for said, given, expected in (("", None, 4), ("2", None, 2), ("2", 5, 5)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        executor = LocalExecutor(
            recipe=recipe, root=tmp_path, lock=0, devices=[], workers=2, threads=given, max_retries=0, hang_timeout=None
        )
        processes: list[WorkerProcess] = [worker.process for worker in executor._workers]
        assert [[process._environment()[name] for name in NAMES] for process in processes] == [[str(expected)] * len(NAMES)] * 2


def test_this_process_keeps_to_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = []

    def work() -> None:
        torch.set_num_threads(4)
        for quota, given in ((2, None), (16, None), (2, 3)):
            monkeypatch.setattr(machine, "usable_cores", lambda quota=quota: quota)
            limit_threads(given)
            found.append(torch.get_num_threads())

    before = torch.get_num_threads()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    assert found == [2, 2, 3]
