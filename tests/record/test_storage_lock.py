"""One driver for a study in a storage, whichever folder it was started with; trials are read once; network disks are told of."""

import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from loratune.errors import StorageError
from loratune.record import storage_lock
from loratune.record.one_writer import OneWriterStorage
from loratune.record.storage_lock import filesystem, network_warning, only_driver


@pytest.mark.parametrize("url", ["sqlite:///{}/shared.db", "{}/shared.journal"])
def test_a_second_driver_with_a_copy_of_the_folder_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_lock, "_FAREWELL", 0.1)
    url = url.format(tmp_path)
    first, second = tmp_path / "study", tmp_path / "copy"
    with only_driver(url, first, "s"):
        said = rf"another driver is writing the study 's' \(process {os.getpid()} on "
        with pytest.raises(StorageError, match=said), only_driver(url, second, "s"):
            pass
        with only_driver(url, second, "another study"):
            pass
    with only_driver(url, second, "s"):
        pass


def test_a_killed_driver_leaves_no_lock(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom loratune.record.storage_lock import only_driver\n"
        "with only_driver(sys.argv[1], Path('.'), 's'):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "held\n"
        driver.kill()
    with only_driver(url, tmp_path, "s"):
        pass


def test_the_kind_of_disk_is_that_of_the_nearest_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    home = (tmp_path / "home with space").as_posix().replace(" ", "\\040")
    table.write_text(
        f"26 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n30 26 0:40 / {home} rw,relatime - nfs4 server:/home rw\n"
        f"31 26 0:41 / {home}/local rw - xfs /dev/vdb rw\n"
    )
    assert filesystem(tmp_path / "study.db", table) == "ext4"
    assert filesystem(tmp_path / "home with space" / "a" / "study.db", table) == "nfs4"
    assert filesystem(tmp_path / "home with space" / "local" / "study.db", table) == "xfs"
    monkeypatch.setattr(storage_lock, "filesystem", lambda path: filesystem(path, table))
    assert network_warning(None, tmp_path) == ""
    told = network_warning(None, tmp_path / "home with space")
    assert "study.db lies on a network disk (nfs4)" in told
    assert "postgresql" in told
    assert network_warning(f"{tmp_path}/home with space/s.journal", tmp_path) == ""


def test_trials_are_read_once_and_are_as_they_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = InMemoryStorage()
    study = optuna.create_study(storage=OneWriterStorage(behind, "s"), study_name="s", sampler=optuna.samplers.RandomSampler(seed=0))
    reads: list[int] = []
    get = behind.get_trial
    monkeypatch.setattr(behind, "get_trial", lambda trial_id: (reads.append(trial_id), get(trial_id))[1])
    open_ones = [study.ask() for _ in range(50)]
    for trial in open_ones:
        trial.suggest_float("x", 0, 1)
    study.get_trials(deepcopy=False)
    reads.clear()
    monkeypatch.setattr(behind, "get_all_trials", None)  # never again
    open_ones[7].report(2.0, 1)
    open_ones[7].set_user_attr("a", 1)
    assert study.get_trials(deepcopy=False)[7].intermediate_values == {1: 2.0}
    study.tell(open_ones[7], 3.0)
    assert not reads, "what is written is known"
    found = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    assert [(trial.number, trial.value, trial.user_attrs) for trial in found] == [(7, 3.0, {"a": 1})]
    assert study.best_trial.number == 7
