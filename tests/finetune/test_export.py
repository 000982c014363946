import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_engine
import torch
import transformers
from test_validation import by_definition

from loratune.delivery.merge import export_adapter, merge
from loratune.delivery.model_card import HERE, loading
from loratune.errors import ModelError
from loratune.finetune.engines import load_engine, probe
from loratune.record.paths import StudyPaths
from loratune.work import Hyperparameters, State


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """(study's recipe, its folder, its validation tokens, the adapter's folder, the recorded loss)"""
    root = tmp_path_factory.mktemp("study")
    recipe = tiny_engine.recipe(root, dtype="float32")
    engine = load_engine(recipe, root)
    wanted = tiny_engine.segment(lora_alpha=12.5, use_rslora=True, target_modules="all-linear")
    outcome = tiny_engine.run(engine, wanted)
    return recipe, root, engine.validation, StudyPaths(root).of(wanted).adapter, outcome.validation_loss


def loss(model: torch.nn.Module, tokens) -> float:  # type: ignore[no-untyped-def]
    class Plain:
        def __len__(self) -> int:
            return len(tokens)

        def __getitem__(self, i: int) -> object:
            return tokens[i]

    return by_definition(model, Plain(), vocabulary=tiny_engine.VOCABULARY)  # type: ignore[arg-type]


def test_plain_peft_gives_the_recorded_loss(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe, root, tokens, adapter, recorded = trained
    exported = export_adapter(adapter, tmp_path / "out", "the card")
    base = transformers.AutoModelForCausalLM.from_pretrained(root / "model")
    untrained = loss(base.eval(), tokens)
    model = peft.PeftModel.from_pretrained(base, str(exported))
    assert loss(model.eval(), tokens) == pytest.approx(recorded, abs=1e-5)
    assert abs(untrained - recorded) > 0.01
    assert (exported / "README.md").read_text() == "the card"
    assert {p.name for p in exported.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert peft.LoraConfig.from_pretrained(str(exported)).base_model_name_or_path == recipe.model.name_or_path


def test_the_cards_lines_ask_and_stop_at_the_end_of_an_answer(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(trained[1] / "model", base)
    (base / "chat_template.jinja").write_text("xyz")  # within the tiny vocabulary
    shutil.copytree(trained[3], adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))

    def written(end: str) -> tuple[list[int], object]:
        """What the card's own lines generate, and their tokenizer."""
        names: dict[str, Any] = {}
        exec(loading(str(base), None, {}, end).replace(HERE, str(adapter)).replace("=256", "=4"), names)
        return names["answer"][0, names["given"]["input_ids"].shape[1] :].tolist(), names["tokenizer"]

    ids, tokenizer = written("<|im_end|>")
    assert len(ids) == 4
    assert written(tokenizer.convert_ids_to_tokens(ids[0]))[0] == ids[:1]
    assert "AutoTokenizer" not in loading(str(base), None, {}, "")


def test_the_merged_model_gives_the_recorded_loss(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe, _, tokens, adapter, recorded = trained
    folder = merge(recipe.model, adapter, tmp_path / "merged", "my own card")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert loss(model.eval(), tokens) == pytest.approx(recorded, abs=1e-5)
    assert model.config.attention_dropout == 0.1  # the base model's own, untouched
    assert len(transformers.AutoTokenizer.from_pretrained(folder))
    assert (folder / "README.md").read_text() == "my own card"


def test_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter_config\.json and adapter_model\.safetensors missing"):
        export_adapter(tmp_path, tmp_path / "out", "card")


def test_probe(trained) -> None:  # type: ignore[no-untyped-def]
    recipe, root, tokens, _, _ = trained
    before = sorted(root.rglob("*"))
    found = probe(recipe, root, Hyperparameters(batch_size=6, lora_r=4), steps=2, validation_examples=8)
    assert found.state is State.COMPLETED
    assert min(found.training_tokens_per_second, found.validation_tokens_per_second, found.seconds_to_load, found.peak_memory_bytes) > 0
    assert 0 < found.spread[0] <= 1 <= found.spread[1]
    assert found.validation_tokens == int(tokens.lengths.sum())
    assert sorted(root.rglob("*")) == before
    failed = probe(recipe, root, Hyperparameters(batch_size=6, lora_r=2**42))
    assert failed.state is State.OUT_OF_MEMORY
    assert failed.message
