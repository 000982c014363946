"""`export --push` against a stand-in hub that speaks the protocol of huggingface_hub: repository, pre-upload, LFS, one commit."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load

from loratune.cli import main

TOKEN = "hf_planted"


class Hub(BaseHTTPRequestHandler):
    """Keeps what is pushed in `server.files`; large kinds of file go through LFS, as on the hub."""

    server: Any

    def _answer(self, content: Any, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        self._answer({"id": "ann/colours", "siblings": [], "sha": "0" * 40})

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/lfs/" not in self.path:
            return self._answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.private = asked.get("private") or asked.get("visibility") == "private"
            return self._answer({"url": f"http://{self.headers['Host']}/ann/colours", "name": "ann/colours"})
        if self.path == "/api/validate-yaml":
            head = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            wrong = [] if head.get("library_name") in ("peft", "transformers") else [{"message": "library_name"}]
            return self._answer({"errors": wrong, "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in files}
            return self._answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False, "oid": None} for p, m in modes.items()]})
        if self.path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = {o["oid"]: {"upload": {"href": f"http://{self.headers['Host']}/put/{o['oid']}"}} for o in objects}
            return self._answer({"transfer": "basic", "objects": [o | {"actions": upload[o["oid"]]} for o in objects]})
        if "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[line["value"]["path"]] = self.server.objects[line["value"]["oid"]]
            return self._answer(
                {"success": True, "commitOid": "1" * 40, "commitUrl": f"http://{self.headers['Host']}/ann/colours/commit/1"}
            )
        return self._answer({"error": f"no such address: {self.path}"}, 404)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.objects, server.private = {}, {}, None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def finished_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "study"
    flags = ["--trials", "1", "--sampler", "random", "--executor", "inline", "--data.train_count", "24", "--data.validation_count", "12"]
    assert main(["run", "--demo", "--output", str(folder), *flags]) == 0
    return folder


def push(study: Path, endpoint: str, token: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "loratune", "export", str(study), "--push", "ann/colours", "--json", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def test_pushed_whole_and_refused_with_a_reason(finished_study: Path, hub: Any) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    done = push(finished_study, endpoint, TOKEN, "--private")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {name: told[name] for name in ("address", "trial", "run")} == {"address": f"{endpoint}/ann/colours", "trial": 0, "run": "main"}
    assert told["bytes"] > 200_000
    assert hub.private is True
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= hub.files.keys()
    kept = finished_study / "adapter" / "adapter_model.safetensors"
    pushed, own = load(hub.files["adapter_model.safetensors"]), load(kept.read_bytes())
    assert pushed.keys() == own.keys()
    assert all((pushed[name] == own[name]).all() for name in own)
    card = hub.files["README.md"].decode()
    assert "library_name: peft" in card
    assert TOKEN not in card
    hub.files.clear()
    refused = push(finished_study, endpoint, "hf_wrong")
    assert refused.returncode == 5
    assert "The token may not write there" in json.loads(refused.stdout)["error"]["message"]
    assert "hf_wrong" not in refused.stdout + refused.stderr
    gone = push(finished_study, "http://127.0.0.1:9", TOKEN)
    assert gone.returncode == 5
    assert "cannot be reached" in json.loads(gone.stdout)["error"]["message"]
    assert not hub.files
