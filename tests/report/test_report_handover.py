"""The hand-over: what it says is what the record says, and the folder loads in peft."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from report_studies import Point

from loratune.delivery import hand_over
from loratune.delivery.model_card import is_hub_id, model_card
from loratune.errors import StorageError, TrainingError
from loratune.record import FAILED, StudyRecord

Study = Callable[..., StudyRecord]
DEFAULT = {"lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "learning_rate": 1e-5}
POINTS = [
    Point(params=DEFAULT, value=1.2),
    Point(params={**DEFAULT, "lora_r": 4, "lora_alpha": 16}, value=1.1),
    Point(params=DEFAULT, value=1.3),
]


def adapter_of(record: StudyRecord, number: int = 1) -> Path:
    """A stand-in for a trained adapter: the names of the files, not their contents, matter here; so it is handed over unchecked."""
    folder = record.folder / "trials" / f"{number:04d}" / "main" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("peft's own")
    return folder


def test_best_yaml(study: Study) -> None:
    record = study(POINTS)
    adapter_of(record)
    best, adapter = hand_over(record, record.folder, check=None)
    assert (best, adapter) == (record.folder / "best.yaml", record.folder / "adapter")
    found = yaml.safe_load(best.read_text())
    assert (found["trial"], found["validation_loss"], found["default_validation_loss"], found["base_validation_loss"]) == (1, 1.1, 1.2, 1.9)
    hyperparameters = found["hyperparameters"]
    assert (hyperparameters["lora_r"], hyperparameters["lora_alpha"], hyperparameters["learning_rate"]) == (4, 16.0, 1e-5)
    assert hyperparameters["target_modules"] == "qv"
    assert found["base_model"] == "meta-llama/Llama-2-7b-hf"
    assert found["command"] == "loratune run 'my spec.yaml'"


def test_model_card(study: Study) -> None:
    record = study(POINTS, name="what | *is* <b>")
    adapter_of(record)
    _, adapter = hand_over(record, record.folder, check=None)
    assert (adapter / "adapter_model.safetensors").read_bytes() == b"weights"
    card = (adapter / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["base_model"] == "meta-llama/Llama-2-7b-hf"
    assert front["library_name"] == "peft"
    assert "base_model:adapter:meta-llama/Llama-2-7b-hf" in front["tags"]
    assert "# what \\| \\*is\\* \\<b\\>" in body
    for line in ("| this adapter | 1.1000 | 3.004 | −0.1000 |", "| base model | 1.9000 | 6.686 | +0.7000 |", "| `lora_r` | 4 |"):
        assert line in body
    assert "alpaca.json; dolly.jsonl (900 examples)" in body


def test_the_card_says_where_a_chat_answer_ends(study: Study) -> None:
    record = study(POINTS)
    best = record.best
    assert best is not None
    assert "apply_chat_template" not in model_card(record, best)  # a study older than the record of it
    card = model_card(replace(record, prompt=record.prompt | {"kind": "chat", "end": "<|im_end|>"}), best)
    assert 'end = tokenizer.convert_tokens_to_ids("<|im_end|>")' in card
    assert "eos_token_id=end" in card


def test_a_local_base_model_is_not_claimed_to_be_on_the_hub(study: Study, tmp_path: Path) -> None:
    record = study(POINTS, model={"name_or_path": str(tmp_path)})
    adapter_of(record)
    _, adapter = hand_over(record, tmp_path / "elsewhere", check=None)
    front = yaml.safe_load((adapter / "README.md").read_text().split("---\n")[1])
    assert "base_model" not in front
    assert not is_hub_id("./llama")
    assert not is_hub_id("a/b/c")
    assert is_hub_id("gpt2")


def test_an_earlier_adapter_is_replaced(study: Study) -> None:
    record = study(POINTS)
    source = adapter_of(record)
    _, adapter = hand_over(record, record.folder, check=None)
    (adapter / "stale.bin").write_bytes(b"")
    (source / "adapter_model.safetensors").write_bytes(b"newer")
    hand_over(record, record.folder, check=None)
    assert (adapter / "adapter_model.safetensors").read_bytes() == b"newer"
    assert not (adapter / "stale.bin").exists()
    assert not [path for path in record.folder.iterdir() if path.name.startswith(".adapter")]


def test_a_failed_copy_leaves_the_earlier_adapter(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    record = study(POINTS)
    adapter_of(record)
    _, adapter = hand_over(record, record.folder, check=None)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(StorageError, match="No space left"):
        hand_over(record, record.folder, check=None)
    assert (adapter / "adapter_model.safetensors").read_bytes() == b"weights"
    assert not [path for path in record.folder.iterdir() if path.name.startswith(".adapter")]


def test_nothing_to_hand_over(study: Study) -> None:
    failed = study([Point(params=DEFAULT, value=None, state=FAILED)], name="failed")
    with pytest.raises(TrainingError, match="nothing to hand over"):
        hand_over(failed, failed.folder, check=None)
    with pytest.raises(StorageError, match="no adapter of trial 1"):
        hand_over(study(POINTS, name="gone"), failed.folder, check=None)


def test_the_folder_loads_in_peft(study: Study, tmp_path: Path) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), lora).eval()
    record = study(POINTS, model={"name_or_path": str(tmp_path / "base")})
    model.save_pretrained(str(record.folder / "trials" / "0001" / "main" / "adapter"))
    _, adapter = hand_over(record, tmp_path / "out")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        loaded = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()(tokens).logits
        assert torch.equal(loaded, model(tokens).logits)
        with model.disable_adapter():
            assert not torch.allclose(loaded, model(tokens).logits)
