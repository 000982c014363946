"""A real Slurm, started here on one machine, runs studies/slurm.sh from its queue to its end.

Needs Debian's package `slurm-wlm`, root, and pip install 'loratune[ray]'.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loratune.record import read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = """
ClusterName=loratune
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort=17817
SlurmdPort=17818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
NodeName={host} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands speak to a Slurm of this test alone."""
    pytest.importorskip("ray", reason="needs pip install 'loratune[ray]'")
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))) or os.getuid():
        pytest.skip("needs root and apt-get install slurm-wlm")
    folder = Path(tempfile.mkdtemp(prefix="loratune-slurm-", dir="/var/tmp"))
    for part in ("state", "spool", "munge"):
        (folder / part).mkdir(mode=0o700)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    host = os.uname().nodename.partition(".")[0]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=folder, cpus=os.cpu_count()))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = [f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", f"--socket={folder}/munge.socket", "--force", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", host],
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("wb") as out:
                daemons.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True))
            time.sleep(2)
        for _ in range(30):
            state = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, check=False)
            if state.stdout.strip() == "idle":
                break
            time.sleep(1)
        else:
            logs = "\n".join(path.read_text(errors="replace")[-400:] for path in sorted(folder.glob("*.[ol][uo][tg]")))
            pytest.skip(f"Slurm cannot start here: {state.stdout} {state.stderr} {logs}")
        yield environment
    finally:
        subprocess.run(["scancel", "--full", "--user=root"], env=environment, check=False, capture_output=True, timeout=30)
        time.sleep(2)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_study_from_the_queue_over_a_time_limit_to_its_end(slurm: dict[str, str], tmp_path: Path) -> None:
    folder, log = tmp_path / "study", tmp_path / "log"
    options = ["--demo", "--output", str(folder), "--sampler", "random", "--trials", "6", "--data.train_count", "120"]
    options += ["--executor.workers", "2", "--training.slots", "1", "--executor.device", "cpu"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if not (Path(sys.executable).parent / "loratune").exists():
        pytest.skip("needs the command loratune on the path")
    ray = Path(sys.modules["ray"].__file__ or "").parents[1] / "bin"
    environment = slurm | {"PATH": f"{ray}:{path}", "RAY_PORT": "9379", "RAY_raylet_start_wait_time_s": "240"}
    command = ["sbatch", "--parsable", "--nodes=1", f"--output={log}", str(ROOT / "studies" / "slurm.sh"), *options]
    job = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT).stdout.strip()

    def slurm_says(*asked: str) -> str:
        return subprocess.run(asked, env=environment, capture_output=True, text=True, check=False, timeout=60).stdout.strip()

    def wait_for(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 500
        while not what():
            assert time.monotonic() < deadline, log.read_text() if log.exists() else slurm_says("squeue")
            time.sleep(0.5)

    wait_for(lambda: bool(list(folder.glob("trials/*/*/outcomes/*.json"))))
    slurm_says("scancel", "--batch", "--signal=USR1", job)  # as before the time limit
    wait_for(lambda: slurm_says("squeue", "-h", "-j", job, "-o", "%T") == "PENDING")
    slurm_says("scontrol", "update", f"JobId={job}", "StartTime=now")  # else it waits two minutes
    wait_for(lambda: slurm_says("squeue", "-h", "-j", job, "-o", "%T") not in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"))
    text = log.read_text()
    assert "1 node of the cluster can train trials" in text
    record = read(folder)
    assert record.finished, text
    assert len(record.trials) == 6
    assert len(list((folder / "sessions").iterdir())) == 2
