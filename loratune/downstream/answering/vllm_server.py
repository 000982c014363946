"""vLLM as a child process: its command line, its groups of adapters, its start and its end.

vLLM fills all adapters of a server up to one rank (`--max-lora-rank`), so a server holds adapters of about the same rank, and servers
follow each other, that of the largest rank first. It listens on this machine alone. No vllm is imported here: its own process does.
"""

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratune.downstream.answering.plain_lora import more_than_plain
from loratune.downstream.job import VLLM, EvaluatedModel, EvaluationJob
from loratune.downstream.tasks.benchmarks import HARNESS
from loratune.errors import EvaluationError, MissingExtraError, ModelError
from loratune.record.paths import ADAPTER_FILES

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank may be
BASE_NAME = "base"  # under which our server has the bare model
_ERROR = re.compile(r"[\w.]*(Error|Exception): .*|error: argument .*")
_AT_ONCE = 16  # adapters in one batch of the device, which keeps room for so many
_GRACE = 25.0  # seconds in which it may end: more than server_process.py gives it


def refuse_job(job: EvaluationJob) -> None:
    """Raise EvaluationError, with all reasons at once, where vLLM cannot answer the job; MissingExtraError where it is not installed."""
    wrong = [f"{name} is answered by the engine loratune alone" for name in job.benchmarks if name.startswith(HARNESS)]
    if job.recipe.load_in_4bit:
        wrong.append("the study's base model is in 4 bits (model.load_in_4bit), which is not tried with vLLM")
    if job.recipe.dtype == "float64":
        wrong.append("model.dtype is float64, which vLLM does not compute in")
    reasons = {model.name: _reason(_config(model.adapter)) for model in job.models if model.adapter is not None}
    wrong += [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    if wrong:
        raise EvaluationError("\n".join([f"--engine {VLLM} cannot answer this:", *wrong, "Without --engine the engine loratune answers."]))
    if job.server is None and importlib.util.find_spec("vllm") is None:
        where = "it is not for every platform: Linux and an NVIDIA GPU by pip, others by https://docs.vllm.ai; --server takes one that runs"
        raise MissingExtraError(f"vLLM, which --engine {VLLM} starts,", "vllm", where)


def server_groups(job: EvaluationJob, lacking: Iterable[str]) -> list[EvaluationJob]:
    """One job per server, of the models that lack something: adapters that are filled up to the same rank, the largest first.

    The bare model goes with the first. A server that runs already takes all.
    """
    models = [model for model in job.models if model.name in set(lacking)]
    found: dict[int, list[EvaluatedModel]] = {}
    for model in models:
        if model.adapter is not None:
            found.setdefault(0 if job.server else padded_rank(_config(model.adapter)["r"]), []).append(model)
    parts = [found[rank] for rank in sorted(found, reverse=True)] or [[]]
    parts[0] = parts[0] + [model for model in models if model.adapter is None]
    return [replace(job, models=tuple(part)) for part in parts]


def padded_rank(rank: int) -> int:
    """What vLLM fills an adapter of this rank up to."""
    return min(allowed for allowed in RANKS if allowed >= rank)


class VllmServer:
    """`vllm serve` with the job's adapters. `close` ends it; so does the end of this process, however it ends."""

    def __init__(self, job: EvaluationJob, *, dtype: str, length: int, on_cpu: bool) -> None:
        """dtype: the model's. length: of the longest sequence, in tokens. on_cpu: it has no GPU."""
        self.log, self._failed = job.folder / "vllm.log", False
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments(job, port, dtype=dtype, length=length, on_cpu=on_cpu)]
        job.folder.mkdir(parents=True, exist_ok=True)
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "loratune.downstream.answering.server_process", str(job.folder), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"VLLM_NO_USAGE_STATS": "1", **os.environ},  # it would tell its makers what runs here
                start_new_session=True,  # Ctrl-C is the evaluation's to answer
            )

    def wait(self, answers: Callable[[], object], interrupted: Callable[[], bool]) -> None:
        """Until `answers` does not raise. Raises EvaluationError when the server ends before, InterruptedError."""
        while True:
            if interrupted():
                raise InterruptedError
            self.alive()
            with contextlib.suppress(EvaluationError):
                answers()
                self._failed = False
                return
            time.sleep(0.2)

    def alive(self) -> None:
        """Raises EvaluationError when the server has ended."""
        if (code := self._process.poll()) is not None:
            how = f"by {signal.Signals(code - 128).name}" if code - 128 in set(signal.Signals) else f"with exit status {code}"
            raise EvaluationError(f"the vLLM server ended {how}. The answers so far are kept; run again.{self.note()}")

    def note(self) -> str:
        """What its log, which is then kept, says last: of errors, since much is said after them."""
        self._failed = True
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = list(dict.fromkeys(found[0] for line in lines if (found := _ERROR.search(line))))
        told = "\n  ".join(errors[-3:] or lines[-5:])
        return f" {self.log} says:\n  {told}" if told else f" Its log, {self.log}, is empty."

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if not self._failed:
            self.log.unlink(missing_ok=True)


def arguments(job: EvaluationJob, port: int, *, dtype: str, length: int, on_cpu: bool = False) -> list[str]:
    """Those of the `vllm` command."""
    recipe = job.recipe
    found = ["serve", recipe.name_or_path, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", BASE_NAME, "--dtype", dtype]
    found += ["--max-model-len", str(length), "--generation-config", "vllm", "--seed", str(job.seed)]
    found += ["--revision", recipe.revision, "--tokenizer-revision", recipe.revision] if recipe.revision else []
    found += ["--trust-remote-code"] if recipe.trust_remote_code else []
    found += (
        ["--max-num-seqs", "1"] if on_cpu else []
    )  # vLLM 0.32's CPU kernels fail at prompt_logprobs of two requests where there is LoRA
    adapters = {model.name: model.adapter for model in job.models if model.adapter is not None}
    if adapters:
        rank, number = max(padded_rank(_config(adapter)["r"]) for adapter in adapters.values()), len(adapters)
        found += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(min(number, _AT_ONCE)), "--max-cpu-loras", str(number)]
        found += ["--lora-modules", *(json.dumps({"name": name, "path": str(path.resolve())}) for name, path in adapters.items())]
    return found


def _config(adapter: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((adapter / ADAPTER_FILES[0]).read_bytes()))
    except (OSError, ValueError) as error:
        raise ModelError(f"{adapter} holds no readable adapter: {error}. Give the `adapter` folder of a completed trial.") from error


def _reason(config: dict[str, Any]) -> str:
    """Why vLLM does not serve an adapter as PEFT means it; empty where it does."""
    if more := more_than_plain(config):
        return f"vLLM serves plain LoRA adapters; this one has {more}"
    targets = config.get("target_modules")
    if isinstance(targets, list) and any(str(name).rpartition(".")[2] == "lm_head" for name in targets):
        return "it adapts lm_head, which vLLM leaves out of the log-probabilities of prompts (vLLM's issue 51594)"
    rank = config.get("r")
    return "" if isinstance(rank, int) and 0 < rank <= RANKS[-1] else f"its rank is {rank}; vLLM takes at most {RANKS[-1]}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
