"""A vLLM server as a child: it starts, dies, is killed with the evaluation, and ends. Also with vLLM itself, where it is installed.

python -m pytest -m slow tests/downstream/test_vllm_process.py
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from random_adapters import load_base, write_adapters
from trained_adapters import RECIPE, kept, scored

from loratune.data.prepared import Prepared
from loratune.downstream.job import EvaluatedModel, EvaluationJob
from loratune.finetune.model import BaseModel, load, output_head
from loratune.finetune.peft_layers import detach
from loratune.finetune.validation import validate
from loratune.work import ModelRecipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NAMES = ["demo_choice", "demo_match"]
STAND_IN = Path(__file__).resolve().parent / "stand_in"
EVALUATE = """
import sys

from loratune.downstream.evaluator import score_models
from loratune.downstream.job import EvaluationJob
from loratune.errors import LoratuneError

try:
    for event in score_models(EvaluationJob.from_json(sys.stdin.read())):
        print(event, flush=True)
except LoratuneError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def measured(base: BaseModel, data: Path, folders: list[Path]) -> list[EvaluatedModel]:
    """The adapters of the folders and the bare model, with their true validation losses."""
    validation, found = Prepared.load(data).validation, []
    for number, folder in enumerate([*folders, None], 1):
        model: Any = base.model
        if folder is not None:
            import peft

            model = peft.PeftModel.from_pretrained(base.model, str(folder)).eval()
        loss, _ = validate(model, validation, batch_size=16, pad_id=base.pad_id, head=output_head(base.model))
        found.append(EvaluatedModel(name=f"{number:04d}" if folder else "base", adapter=folder, loss=loss))
        if folder is not None:
            model.unload()
            detach(base.model)
    return found


def until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_dies_is_killed_and_goes_on(demo_data: Path, tmp_path: Path) -> None:
    base = load(RECIPE, torch.device("cpu"))
    models = measured(base, demo_data, write_adapters(base, tmp_path, [4, 16]))
    list(scored(tmp_path / "ours", models, demo_data, NAMES))
    expected, theirs = kept(tmp_path / "ours"), tmp_path / "demo" / "evaluation"
    job = EvaluationJob(
        folder=theirs,
        recipe=RECIPE,
        models=tuple(models),
        benchmarks=tuple(NAMES),
        validation=demo_data,
        recorded_base=models[-1].loss,
        subset=16,
        engine="vllm",
    )
    log = theirs / "vllm.log"

    def start(**environment: Any) -> "subprocess.Popen[str]":
        here = os.pathsep.join([str(STAND_IN), os.environ.get("PYTHONPATH", "")])
        variables = {**os.environ, "PYTHONPATH": here, **{name: str(value) for name, value in environment.items()}}
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen([sys.executable, "-c", EVALUATE], env=variables, text=True, **pipes)
        process.stdin.write(job.to_json())  # type: ignore[union-attr]
        process.stdin.close()  # type: ignore[union-attr]
        process.stdin = None
        return process

    died = start(STAND_IN_DIES_AFTER=90)  # 2 models are asked 3 texts and 32 examples for the check
    _, errors = died.communicate()
    assert died.returncode == 1
    assert "EvaluationError: " in errors
    assert f"{log} says:\n  RuntimeError: the stand-in was told to die" in errors
    assert log.is_file()

    killed = start(STAND_IN_SLOW=0.02)
    answered = len(kept(theirs))
    until(lambda: killed.poll() is not None or len(kept(theirs)) > answered, 240)
    pid = int(re.findall(r"pid (\d+)", log.read_text())[0])
    assert not gone(pid)
    killed.kill()
    killed.communicate()
    assert len(kept(theirs)) < len(expected)
    until(lambda: gone(pid), 20)

    whole = start()
    told, errors = whole.communicate()
    assert whole.returncode == 0, errors
    assert kept(theirs) == expected
    assert len(expected) == 2 * 3 * 16
    assert not log.exists()
    assert "Adapter check: 1 adapters are on" in told


@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or shutil.which("g++") is None, reason="vLLM is not installed, or no compiler for its kernels"
)
def test_vllm_itself(demo_data: Path, tmp_path: Path) -> None:
    """On a model of its own: vLLM's CPU kernels take no heads of 24 features, as the demo's model has."""
    folder = tmp_path / "model"
    shutil.copytree(RECIPE.name_or_path, folder)
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.update({"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.1})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    recipe = ModelRecipe(name_or_path=str(folder))
    base = load_base(folder)
    models = measured(base, demo_data, write_adapters(base, tmp_path, [4, 8]))
    for engine in ("loratune", "vllm"):
        list(scored(tmp_path / engine / "evaluation", models, demo_data, NAMES, recipe=recipe, engine=engine, device="auto"))
    ours, theirs = kept(tmp_path / "loratune" / "evaluation"), kept(tmp_path / "vllm" / "evaluation")
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * 3 * 16
    different = [key for key in ours if ours[key] != theirs[key]]
    assert len(different) <= (0 if base.dtype == torch.float32 and not torch.cuda.is_available() else len(ours) // 20), different
