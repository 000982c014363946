"""`loratune dashboard` on a real study's storage: what it shows, and that nothing can be changed through it."""

import json
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import optuna
import pytest
import yaml

from loratune.cli import dashboard
from loratune.record import read

VALUES = (3.0, 1.5, 2.0)


@pytest.fixture
def study(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A study's folder whose storage will be in SQLite, or, by parameter, in a journal file of that name."""
    journal = getattr(request, "param", None)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({"name": "mine", "storage": str(tmp_path / journal) if journal else None}))
    return tmp_path


def fill(folder: Path) -> None:
    where = read(folder).spec["storage"]
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(where)) if where else f"sqlite:///{folder}/study.db"
    optuna.create_study(storage=storage, study_name="another")
    optuna.create_study(storage=storage, study_name="mine").add_trials([optuna.trial.create_trial(value=value) for value in VALUES])


@pytest.fixture
def address(study: Path) -> Iterator[str]:
    pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed (the extra `dashboard`)")
    fill(study)
    with dashboard.dashboard_server(read(study), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://{server.server_address[0]}:{server.server_port}{server.page}"
        server.shutdown()
        thread.join()


def ask(url: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    body = b"{}" if method != "GET" else None
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", "Accept-Encoding": "", **headers}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("study", [None, "study.journal"], indirect=True)
def test_it_shows_the_study_and_changes_nothing(address: str, study: Path) -> None:
    before = {path: path.read_bytes() for path in study.iterdir()}
    assert address.startswith("http://127.0.0.1:")
    status, page = ask(address)
    assert (status, "<title>Optuna Dashboard</title>" in page) == (200, True)
    api = address.replace("/dashboard/", "/api/")
    found = json.loads(ask(api)[1])
    assert found["name"] == "mine"
    assert [trial["values"] for trial in found["trials"]] == [[value] for value in VALUES]
    for method, url in (("DELETE", api), ("POST", f"{api}/rename"), ("PUT", f"{api}/note"), ("POST", api.rpartition("/")[0])):
        status, said = ask(url, method)
        assert (status, "read-only" in said) == (403, True), (method, url)
    assert ask(api, Host="evil.example:80")[0] == 403
    assert ask(api, Host="localhost:9")[0] == 200
    assert {path: path.read_bytes() for path in study.iterdir()} == before


@pytest.mark.parametrize("journal", [None, "study.journal"])
def test_ordinals_have_their_values_and_objectives_their_names(tmp_path: Path, journal: str | None) -> None:
    pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed (the extra `dashboard`)")
    from loratune.record.storage import open_study

    space = {"lora_r": {"type": "ordinal", "values": [4, 8, 64]}, "lora_dropout": {"type": "ordinal", "values": [0.0, 0.1]}}
    url = str(tmp_path / journal) if journal else None
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({"name": "mine", "storage": url, "search_space": space}))
    kept = open_study(url=url, folder=tmp_path, name="mine", sampler=optuna.samplers.RandomSampler())
    index = optuna.distributions.IntDistribution(0, 2)
    known = {"lora_r_index": index, "lora_dropout_index": index, "learning_rate": optuna.distributions.FloatDistribution(1e-5, 1e-2)}
    kept.add_trial(
        optuna.trial.create_trial(
            value=1.0, params={"lora_r_index": 2, "lora_dropout_index": 0, "learning_rate": 1e-3}, distributions=known
        )
    )
    with dashboard.dashboard_server(read(tmp_path), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        found = json.loads(ask(f"http://127.0.0.1:{server.server_port}{server.page.replace('/dashboard/', '/api/')}")[1])
        server.shutdown()
        thread.join()
    assert {p["name"]: p["param_external_value"] for p in found["trials"][0]["params"]} == {
        "lora_r": "64",
        "lora_dropout": "0.0",
        "learning_rate": "0.001",
    }
    assert {p["name"] for p in found["union_search_space"]} == {"lora_r", "lora_dropout", "learning_rate"}
    assert found["objective_names"] == ["validation_loss"]
    assert "lora_r_index" in kept.trials[0].params  # what samplers see has not changed


def test_a_port_that_is_taken(address: str, study: Path, loratune) -> None:
    port = re.findall(r":(\d+)/", address)[0]
    answer = loratune("dashboard", study, "--port", port)
    assert answer.code == 1
    assert f"cannot listen on port {port}" in answer.err
    assert "--port" in answer.err
    assert loratune("dashboard", study, "--port", "99999").code == 1


def test_without_a_storage_none_is_made(study: Path, loratune) -> None:
    pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed (the extra `dashboard`)")
    before = sorted(study.iterdir())
    answer = loratune("dashboard", study)
    assert answer.code == 5
    assert "no storage yet" in answer.err
    assert sorted(study.iterdir()) == before
    fill(study)
    (study / "spec.yaml").write_text((study / "spec.yaml").read_text().replace("mine", "other"))
    assert "holds no study named 'other'" in loratune("dashboard", study).err


def test_without_the_extra_the_command_to_install_it(study: Path, loratune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    answer = loratune("dashboard", study)
    assert answer.code == 6
    assert "pip install 'loratune[dashboard]'" in answer.err


def test_the_command_prints_the_address_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed (the extra `dashboard`)")
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({"name": "mine"}))
    optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="mine")
    command = [sys.executable, "-m", "loratune", "dashboard", str(tmp_path), "--no-browser", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.fullmatch(r"Dashboard at (http://127\.0\.0\.1:\d+/dashboard/studies/1)\n", said)
        assert found, said + process.stdout.read()
        assert ask(found[1])[0] == 200
        assert "read-only" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
