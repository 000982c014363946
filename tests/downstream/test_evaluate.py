"""A whole evaluation of trained adapters: proof, answers, resuming; and what it refuses. On the demo's model."""

import json
import threading
from pathlib import Path

import pytest
import torch
from trained_adapters import RECIPE, kept, scored, trained_models

from loratune.data.prepared import Prepared
from loratune.downstream.answering.adapter_check import AdapterChecker
from loratune.downstream.answering.adapter_stack import Adapters, read_adapter
from loratune.downstream.events import BenchmarkProgress
from loratune.downstream.job import EvaluatedModel
from loratune.downstream.tasks import benchmarks
from loratune.errors import EvaluationError, MissingExtraError, StorageError
from loratune.finetune.model import BaseModel, load
from loratune.work import Message


@pytest.fixture(scope="module")
def base() -> BaseModel:
    torch.set_num_threads(1)
    return load(RECIPE, torch.device("cpu"))


@pytest.fixture(scope="module")
def models(base: BaseModel, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[EvaluatedModel]:
    found = trained_models(base, demo_data, tmp_path_factory.mktemp("trials"))
    learnt, _, silent, bare = [model.loss or 0.0 for model in found]
    assert learnt < bare - 0.5
    assert silent == pytest.approx(bare)
    return found


def test_whole_and_resumed(models: list[EvaluatedModel], demo_data: Path, tmp_path: Path) -> None:
    names = ["demo_choice", "demo_match"]
    events = list(scored(tmp_path / "whole", models, demo_data, names))
    told = [event.text for event in events if isinstance(event, Message)]
    assert any(text.startswith("Adapter check: 3 adapters are on; 1 of them without effect") for text in told)
    ends = [event for event in events if isinstance(event, BenchmarkProgress) and event.done == event.total]
    assert [event.total for event in ends] == [64, 64]
    whole = kept(tmp_path / "whole")
    assert len(whole) == 2 * 4 * 16
    proof = json.loads((tmp_path / "whole" / "0001" / "proof.json").read_text())
    assert proof["logits_differ"]
    assert proof["loss"] == pytest.approx(models[0].loss, abs=1e-5)
    assert {key[1:]: v for key, v in whole.items() if key[0] == "0003"} == {key[1:]: v for key, v in whole.items() if key[0] == "base"}
    assert {key[1:]: v for key, v in whole.items() if key[0] == "0001"} != {key[1:]: v for key, v in whole.items() if key[0] == "base"}
    assert [event.text for event in scored(tmp_path / "whole", models, demo_data, names)] == [
        "Nothing to do: everything is already scored."
    ]

    # killed: one model lacks its last items and half a line, another has nothing
    part = tmp_path / "whole" / "0002" / "demo_match.jsonl"
    cut = part.read_bytes()
    part.write_bytes(cut[: len(cut) // 2])
    (tmp_path / "whole" / "base" / "demo_choice.jsonl").unlink()
    untouched = (tmp_path / "whole" / "0001" / "demo_match.jsonl").read_bytes()
    list(scored(tmp_path / "whole", models, demo_data, names))
    assert kept(tmp_path / "whole") == whole
    assert (tmp_path / "whole" / "0001" / "demo_match.jsonl").read_bytes() == untouched


def test_stop(models: list[EvaluatedModel], demo_data: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    for event in scored(tmp_path, models[:1] + models[-1:], demo_data, ["demo_match"], stop=stop, subset=120):
        if isinstance(event, BenchmarkProgress):
            stop.set()
            last = event
    assert last.done < last.total
    assert 0 < len(kept(tmp_path)) == last.done


def test_adapter_that_is_not_on(base: BaseModel, models: list[EvaluatedModel], demo_data: Path) -> None:
    data, real = Prepared.load(demo_data).validation, models[0]
    assert real.adapter is not None
    assert real.loss is not None
    adapters = Adapters(base, [None, read_adapter(real.adapter, base)])
    try:
        checker = AdapterChecker(base, adapters, data, base_place=0, recorded_base=models[-1].loss)
        assert checker.check(1, "trial 1", real.loss).logits_differ
        with pytest.raises(EvaluationError, match=r"trial 1: validation loss .* recorded .*: the adapter is not on"):
            checker.check(0, "trial 1", real.loss)  # the bare model in its place
        with pytest.raises(EvaluationError, match=r"validation loss .* was recorded"):
            checker.check(1, "trial 1", real.loss + 0.01)  # another adapter than the recorded one
        with pytest.raises(EvaluationError, match="equal the bare model's"):
            checker.check(0, "trial 1", None)
        assert not checker.check(0, "trial 3", models[-1].loss).logits_differ  # learnt nothing, as recorded
        sampled = AdapterChecker(base, adapters, data, base_place=0, recorded_base=models[-1].loss, limit=100)
        found = sampled.check(1, "trial 1", real.loss)
        assert found.examples < found.of == len(data)
        with pytest.raises(EvaluationError):
            sampled.check(0, "trial 1", real.loss)
    finally:
        adapters.close()


def test_hooks_taken_off(base: BaseModel, models: list[EvaluatedModel], demo_data: Path) -> None:
    """The field's known mistake: everything runs, but the base answers. The proof must see it."""
    assert models[0].adapter is not None
    adapters = Adapters(base, [None, read_adapter(models[0].adapter, base)])
    adapters.close()
    checker = AdapterChecker(base, adapters, Prepared.load(demo_data).validation, base_place=0, recorded_base=models[-1].loss)
    with pytest.raises(EvaluationError, match="the adapter is not on"):
        checker.check(1, "trial 1", models[0].loss)


def test_other_adapter_stops_before_scoring(models: list[EvaluatedModel], demo_data: Path, tmp_path: Path) -> None:
    swapped = [EvaluatedModel(name="0001", adapter=models[1].adapter, loss=models[0].loss), models[-1]]
    with pytest.raises(EvaluationError, match="trial 1: validation loss"):
        list(scored(tmp_path, swapped, demo_data, ["demo_choice"]))
    assert not kept(tmp_path)


def test_refusals(models: list[EvaluatedModel], demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluationError, match="--allow-code-execution"):
        list(scored(tmp_path, models, demo_data, ["demo_choice", "demo_code"]))
    with pytest.raises(EvaluationError, match="did you mean 'demo_choice'"):
        list(scored(tmp_path, models, demo_data, ["demo_choise"]))
    with pytest.raises(EvaluationError, match="twice"):
        list(scored(tmp_path, models, demo_data, ["demo_choice", "demo_choice"]))
    with pytest.raises(StorageError, match="holds no adapter"):
        list(scored(tmp_path, [EvaluatedModel(name="0009", adapter=tmp_path, loss=1.0)], demo_data, ["demo_choice"]))
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'loratune\[eval\]'"):
        list(scored(tmp_path, models, demo_data, [benchmarks.HARNESS + "arc_easy"]))
    assert not kept(tmp_path)
