"""Answers by a vLLM server: the same as ours, kept the same way; what is refused. A stand-in serves the demo's model (vllm_stand_in.py)."""

import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trained_adapters import NOTHING_TO_DO, RECIPE, kept, scored, trained
from vllm_stand_in import StandIn

from loratune.data.prepared import Prepared
from loratune.downstream.answering import completions_client, served_engine, vllm_server
from loratune.downstream.job import EvaluatedModel, EvaluationJob
from loratune.errors import EvaluationError, LoratuneError, MissingExtraError, ModelError
from loratune.finetune.model import load, output_head
from loratune.finetune.validation import validate
from loratune.work import Hyperparameters, Message

NAMES = ["demo_choice", "demo_match"]


@pytest.fixture(scope="module")
def models(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[EvaluatedModel]:
    """Adapters of rank 8 and 16, and the bare model."""
    torch.set_num_threads(1)
    base, data, home = load(RECIPE, torch.device("cpu")), Prepared.load(demo_data), tmp_path_factory.mktemp("trials")
    h = Hyperparameters(lora_r=8, lora_alpha=32, lora_dropout=0, learning_rate=1e-3, target_modules="all-linear")
    found = [
        trained(base, data, home / name, steps, replace(h, lora_r=rank)) for name, steps, rank in (("0001", 20, 8), ("0002-race-01", 5, 16))
    ]
    bare, _ = validate(base.model, data.validation, batch_size=16, pad_id=base.pad_id, head=output_head(base.model))
    return [*found, EvaluatedModel(name="base", adapter=None, loss=bare)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(completions_client, "_WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(served_engine, "_PIECE", 2)  # so that answers are asked for in pieces
    with StandIn(Path(RECIPE.name_or_path)) as running:
        yield running


def by_vllm(folder: Path, models: list[EvaluatedModel], data: Path, **options: Any) -> Iterator[Any]:
    return scored(folder / "demo" / "evaluation", models, data, NAMES, **{"engine": "vllm", "subset": 6, **options})


def log_likelihoods(folder: Path) -> dict[tuple[str, str], list[float]]:
    lines = ((path.parent.name, json.loads(line)) for path in folder.rglob("demo_choice.jsonl") for line in path.read_text().splitlines())
    return {(model, line["id"]): line["log_likelihoods"] for model, line in lines}


def test_same_answers_as_ours_and_resumed(models: list[EvaluatedModel], demo_data: Path, tmp_path: Path, server: StandIn) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "demo" / "evaluation"
    list(scored(ours, models, demo_data, NAMES, subset=6))
    server.fail = 3  # a busy server is asked again
    told = [event.text for event in by_vllm(tmp_path, models, demo_data, server=server.url) if isinstance(event, Message)]
    assert any(text.startswith("Adapter check: 2 adapters are on") for text in told)
    expected = kept(ours)
    assert len(expected) == 2 * 3 * 6
    assert kept(theirs) == expected
    exact = log_likelihoods(ours)
    assert all(values == pytest.approx(exact[key], abs=1e-4) for key, values in log_likelihoods(theirs).items())
    assert not server.adapters  # as it was found
    assert {body["model"] for body in server.seen} == {
        "base",
        *(body["model"] for body in server.seen if body["model"].startswith("demo-")),
    }
    assert all(isinstance(token, int) for body in server.seen for ids in body["prompt"] for token in ids)
    assert json.loads((theirs / "0001" / "demo_match.json").read_text())["engine"] == "vllm"

    # killed: half a line, and a model without answers; only these are asked for again
    part = theirs / "0001" / "demo_match.jsonl"
    part.write_bytes(part.read_bytes()[:-20])
    (theirs / "base" / "demo_choice.jsonl").unlink()
    server.seen.clear()
    server.load("demo-0001", str(models[0].adapter))  # its owner serves it
    list(by_vllm(tmp_path, models, demo_data, server=server.url))
    assert kept(theirs) == expected
    assert {body["model"] for body in server.seen} == {"base", "demo-0001"}
    assert list(server.adapters) == ["demo-0001"]
    assert [event.text for event in by_vllm(tmp_path, models, demo_data, server=server.url)] == [NOTHING_TO_DO]

    # another engine's answers are not mixed in: these are put aside
    list(scored(theirs, models[-1:], demo_data, ["demo_choice"], subset=6))
    assert (theirs / "base" / "demo_choice.jsonl.1.bak").is_file()


def test_stopped_while_it_answers(models: list[EvaluatedModel], demo_data: Path, tmp_path: Path, server: StandIn) -> None:
    stop, asked = threading.Event(), server.complete

    def stops(body: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        if body["model"].startswith("demo-"):
            stop.set()
        return asked(body, ids)

    server.complete = stops  # type: ignore[method-assign]
    told = [event.text for event in by_vllm(tmp_path, models, demo_data, server=server.url, stop=stop) if isinstance(event, Message)]
    assert told[-1] == "Stopped; the answers so far are kept."
    assert not server.adapters


def refused(folder: Path, models: list[EvaluatedModel], data: Path, **options: Any) -> str:
    with pytest.raises(LoratuneError) as error:
        list(by_vllm(folder, models, data, **options))
    assert not kept(folder / "demo" / "evaluation")
    return f"{type(error.value).__name__}: {error.value}"


def test_servers_that_do_not_do(models: list[EvaluatedModel], demo_data: Path, tmp_path: Path, server: StandIn) -> None:
    server.max_lora_rank = 8
    said = refused(tmp_path, models, demo_data, server=server.url)
    assert "EvaluationError: trial 2 (race-01): " in said
    assert "LoRA rank 16 is greater than max_lora_rank 8" in said
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in said
    assert not server.adapters  # the first one, which it had taken
    server.max_lora_rank, server.fail = 16, 100
    assert "did not answer after 4 tries. Last: HTTP 500: EngineCore encountered" in refused(tmp_path, models, demo_data, server=server.url)
    server.fail = 0
    server.length = 20
    assert "refuses. HTTP 400: This model's maximum context length is 20" in refused(tmp_path, models, demo_data, server=server.url)
    server.length, swapped = 512, [replace(models[0], adapter=models[1].adapter), models[-1]]
    assert "trial 1: validation loss" in refused(tmp_path, swapped, demo_data, server=server.url)  # the check goes through the server
    server.__exit__()
    assert "did not answer after 4 tries. Last: [Errno" in refused(tmp_path, models, demo_data, server=server.url)
    assert "http://localhost:8000" in refused(tmp_path, models, demo_data, server="localhost:8000")


def test_refused_before_anything_is_loaded(
    models: list[EvaluatedModel], demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dora = tmp_path / "dora"
    dora.mkdir()
    config = json.loads((models[0].adapter / "adapter_config.json").read_text())  # type: ignore[operator]
    (dora / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True, "modules_to_save": ["lm_head"]}))
    large = tmp_path / "large"
    large.mkdir()
    (large / "adapter_config.json").write_text(json.dumps({**config, "r": 513}))
    head = tmp_path / "head"
    head.mkdir()
    (head / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "lm_head"]}))
    many = [replace(models[0], adapter=dora), replace(models[1], adapter=large), replace(models[1], name="0003", adapter=head), models[-1]]
    recipe = replace(RECIPE, load_in_4bit=True)
    with pytest.raises(EvaluationError) as error:
        list(scored(tmp_path / "evaluation", many, demo_data, [*NAMES, "lm_eval:arc_easy"], engine="vllm", recipe=recipe))
    for reason in (
        "lm_eval:arc_easy",
        "load_in_4bit",
        "0001: vLLM serves plain LoRA",
        "use_dora, modules_to_save",
        "rank is 513",
        "0003: it adapts lm_head",
    ):
        assert reason in str(error.value)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'loratune\[vllm\]'"):
        list(by_vllm(tmp_path, models, demo_data))
    with pytest.raises(EvaluationError, match="with vllm alone"):
        list(scored(tmp_path / "evaluation", models, demo_data, NAMES, server="http://localhost:1"))


def test_model_that_vllm_computes_otherwise(demo_data: Path, tmp_path: Path, models: list[EvaluatedModel]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(RECIPE.name_or_path).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    recipe = replace(RECIPE, name_or_path=str(folder))
    config["rope_parameters"] = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 12,
        "long_factor": [2.0] * 12,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 256,
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="rotary frequencies"):
        list(by_vllm(tmp_path, models[-1:], demo_data, recipe=recipe, server="http://127.0.0.1:9"))


def test_a_server_for_each_padded_rank(tmp_path: Path) -> None:
    found = []
    for number, rank in enumerate((4, 16, 24, 8, 1, 2, 300)):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "peft_type": "LORA"}))
        found.append(EvaluatedModel(name=f"{number}", adapter=folder, loss=1.0))
    models = (*found, EvaluatedModel(name="base", adapter=None, loss=2.0))
    job = EvaluationJob(
        folder=tmp_path, recipe=replace(RECIPE, revision="v1"), models=models, benchmarks=("mmlu",), validation=tmp_path, engine="vllm"
    )
    lacking = {model.name for model in models} - {"1"}
    assert [group.names for group in vllm_server.server_groups(job, lacking)] == [["6", "base"], ["2"], ["0", "3", "5"], ["4"]]
    assert [group.names for group in vllm_server.server_groups(job, {"base"})] == [["base"]]
    assert [group.names for group in vllm_server.server_groups(replace(job, server="http://x"), lacking)] == [
        ["0", "2", "3", "4", "5", "6", "base"]
    ]
    flags = vllm_server.arguments(vllm_server.server_groups(job, lacking)[2], 8000, dtype="bfloat16", length=512)
    assert flags[:2] == ["serve", RECIPE.name_or_path]
    for flag, value in (
        ("--max-lora-rank", "8"),
        ("--max-loras", "3"),
        ("--dtype", "bfloat16"),
        ("--revision", "v1"),
        ("--max-model-len", "512"),
    ):
        assert flags[flags.index(flag) + 1] == value
    assert [json.loads(module)["name"] for module in flags[flags.index("--lora-modules") + 1 :]] == ["0", "3", "5"]
    assert "--enable-lora" not in vllm_server.arguments(vllm_server.server_groups(job, {"base"})[0], 8000, dtype="float32", length=512)
