"""A study whose storage is a real PostgreSQL server, which is stopped and started in mid-study: it ends as SQLite's does.

Needs Debian's package `postgresql` and `pip install 'loratune[postgresql]'`. The server is started here, on loopback.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_machine import cluster
from sqlalchemy.exc import OperationalError

from loratune.record import read
from loratune.record.database import ServerStorage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SECRET = "pw-of-the-server"
SMALL = ["--demo", "--data.train_count", "24", "--data.validation.0.count", "12", "--training.batch_size", "4", "--training.epochs", "1"]
SMALL += ["--executor.name", "inline", "--sampler", "tpe", "--trials", "6", "--name", "study"]


class Server:
    """A PostgreSQL server of this test alone."""

    def __init__(self, binaries: Path, folder: Path, port: int) -> None:
        self.binaries, self.data, self.port = binaries, folder / "data", port
        self.url = f"postgresql+psycopg://loratune:{SECRET}@127.0.0.1:{port}/study"
        folder.chmod(0o777)
        (folder / "password").write_text(SECRET)
        (folder / "password").chmod(0o644)
        self._call("initdb", "-D", self.data, "-U", "loratune", "-A", "scram-sha-256", "--pwfile", folder / "password", "-E", "UTF8")
        self.start()
        self._call("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "loratune", "study")

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.data}"
        self._call("pg_ctl", "-D", self.data, "-w", "-l", self.data / "log", "-o", options, "start")

    def stop(self) -> None:
        self._call("pg_ctl", "-D", self.data, "-m", "immediate", "stop")

    def _call(self, program: str, *arguments: str | Path) -> None:
        # PostgreSQL refuses to run as root.
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
        command = [*user, str(self.binaries / program), *map(str, arguments)]
        environment = os.environ | {"PGPASSWORD": SECRET, "HOME": "/", "LC_ALL": "C"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/", check=False, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("psycopg", reason="needs pip install 'loratune[postgresql]'")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="loratune-postgresql-"))  # not pytest's, which is closed to other users
    yield Server(found[-1].parent, folder, port)
    subprocess.run(["pkill", "-9", "-f", str(folder)], check=False)
    shutil.rmtree(folder, ignore_errors=True)


def start(study: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "loratune", "run", "--output", str(study), *SMALL, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL)


def outline(study: Path) -> list[object]:
    return [(t.number, t.params, t.state, t.value) for t in read(study).trials]


def wait(until: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    while not until():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def planted(study: Path) -> list[str]:
    return [str(path) for path in study.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_a_server_that_comes_back_is_waited_for(server: Server, tmp_path: Path) -> None:
    plain = start(tmp_path / "sqlite")
    assert plain.wait() == 0
    study = tmp_path / "postgresql"
    process = start(study, "--storage", server.url)
    wait((study / "trials" / "0002").exists, process)
    server.stop()
    time.sleep(4)
    assert process.poll() is None, "it gave up at once"
    server.start()
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert outline(study) == outline(tmp_path / "sqlite")
    assert SECRET not in said
    assert not planted(study)


def test_a_server_that_comes_back_is_waited_for_by_a_cluster_too(server: Server, tmp_path: Path) -> None:
    """It is away while workers go on training; what they found meanwhile is told when it is there again."""
    two = ["--executor.workers", "2", "--training.slots", "1"]
    plain = start(tmp_path / "sqlite", "--executor.name", "local", *two)
    assert plain.wait() == 0
    study = tmp_path / "postgresql"
    with cluster(2) as made:
        process = start(study, "--storage", server.url, "--executor.name", "ray", "--executor.options.address", made.address, *two)
        wait((study / "trials" / "0003").exists, process)
        server.stop()
        time.sleep(4)
        assert process.poll() is None, "it gave up at once"
        server.start()
        said = process.communicate()[0]
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert outline(study) == outline(tmp_path / "sqlite")
    assert not planted(study)


def test_a_transaction_that_arrived_is_not_made_again(server: Server) -> None:
    """The connection breaks after the commit: nobody knows whether it was made."""
    import optuna

    from loratune.record.database import DatabaseStorage
    from loratune.record.one_writer import OneWriterStorage, together

    storage = OneWriterStorage(ServerStorage(server.url), "s")
    study = optuna.create_study(storage=storage, study_name="s")
    made, broken = DatabaseStorage.together, list[int]()

    def breaks(self: DatabaseStorage, study_id: int, changes: Any) -> list[Any]:
        done = made(self, study_id, changes)
        if len(broken) < 2:
            broken.append(len(changes))
            raise OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DatabaseStorage, "together", breaks)
        with together(study):
            trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
        with together(study):
            trial.report(0.5, 1)
            study.tell(trial, 0.25)
    assert len(broken) == 2
    (stored,) = optuna.load_study(study_name="s", storage=server.url).trials
    assert (stored.value, stored.params, stored.intermediate_values) == (0.25, trial.params, {1: 0.5})


def test_a_server_that_stays_away_is_one_error_and_the_same_command_goes_on(server: Server, tmp_path: Path) -> None:
    plain = start(tmp_path / "sqlite")
    assert plain.wait() == 0
    study = tmp_path / "postgresql"
    process = start(study, "--storage", server.url)
    wait((study / "trials" / "0002").exists, process)
    server.stop()
    said = process.communicate()[0]
    assert process.returncode == 5, said
    assert "Traceback" not in said
    assert said.count("loratune: ") == 1
    assert SECRET not in said
    server.start()
    again = start(study, "--storage", server.url)
    said = again.communicate()[0]
    assert again.returncode == 0, said
    assert outline(study) == outline(tmp_path / "sqlite")
    assert not planted(study)


def test_a_second_driver_with_a_copy_of_the_folder_is_refused(server: Server, tmp_path: Path) -> None:
    """The lock is the server's, so it outlives neither a killed driver nor, unnoticed, the server's own restart."""
    from loratune.errors import StorageError
    from loratune.record.storage_lock import only_driver

    with only_driver(server.url, tmp_path, "study") as lock:
        with (
            pytest.raises(StorageError, match="another driver is writing the study 'study'") as refused,
            only_driver(server.url, tmp_path, "study"),
        ):
            pass
        assert SECRET not in str(refused.value)
        server.stop()
        server.start()
        lock._tried = -1e9
        lock.keep()
        with pytest.raises(StorageError, match="another driver"), only_driver(server.url, tmp_path, "study"):
            pass
    with only_driver(server.url, tmp_path, "study"):
        pass
