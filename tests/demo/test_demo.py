"""The demo as a whole: light to import, a study of the known sections, and a real response to the hyperparameters."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune import demo
from tools.make_demo.pretrain import INPUT, RESPONSE, WITH_INPUT, WITHOUT_INPUT

torch.set_num_threads(1)
STEPS = 12


def test_importing_the_demo_is_light() -> None:
    code = "import sys, loratune.demo; loratune.demo.study(); print([m for m in ('torch', 'transformers', 'optuna') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_study_names_what_is_there() -> None:
    study = demo.study()
    assert json.loads(json.dumps(study)) == study
    assert (Path(study["model"]["name_or_path"]) / "model.safetensors").is_file()
    assert [Path(study["data"][part][0]["path"]) for part in ("train", "validation")] == list(demo.data_files())
    assert study["training"]["batch_size"] % study["training"]["micro_batch_size"] == 0
    study["name"] = "changed"
    assert demo.study()["name"] == "demo"


class Tuning:
    """A bare fine-tuning of the demo, STEPS steps of 32 examples, in plain Transformers and PEFT."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(demo.model_folder())
        train, validation = ([json.loads(line) for line in path.read_text().splitlines()] for path in demo.data_files())
        self.train = random.Random(0).sample([self.encode(record) for record in train], STEPS * 32)
        self.validation = [self.encode(record) for record in validation[:160]]

    def encode(self, record: dict[str, str]) -> tuple[list[int], list[int]]:
        opening, inserted = (WITH_INPUT, INPUT + record["input"]) if record["input"] else (WITHOUT_INPUT, "")
        prompt = opening + record["instruction"] + inserted + RESPONSE
        response = self.tokenizer(record["output"], add_special_tokens=False)["input_ids"]
        return self.tokenizer(prompt)["input_ids"], [*response, self.tokenizer.eos_token_id]

    def loss(self, model: Any, examples: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        """Mean negative log-likelihood per response token."""
        longest = max(len(prompt) + len(response) for prompt, response in examples)
        ids = torch.full((len(examples), longest), self.tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for row, (prompt, response) in enumerate(examples):
            ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            labels[row, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
        logits = model(input_ids=ids, attention_mask=(ids != self.tokenizer.pad_token_id).long()).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def __call__(self, *, learning_rate: float, lora_dropout: float = 0.0) -> tuple[float, float]:
        """Validation loss before and after."""
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(demo.model_folder())
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, lora_dropout=lora_dropout, target_modules=["q_proj", "v_proj"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0)
        before = self.validate(model)
        for start in range(0, len(self.train), 32):
            self.loss(model.train(), self.train[start : start + 32]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return before, self.validate(model)

    def validate(self, model: Any) -> float:
        with torch.no_grad():
            return self.loss(model.eval(), self.validation).item()


@pytest.fixture(scope="module")
def tuning() -> Tuning:
    return Tuning()


def test_a_good_learning_rate_learns(tuning: Tuning) -> None:
    before, after = tuning(learning_rate=1e-3)
    assert after < before - 0.5


def test_a_tiny_learning_rate_hardly_moves(tuning: Tuning) -> None:
    before, after = tuning(learning_rate=1e-6)
    assert abs(after - before) < 0.05


def test_full_dropout_silences_the_adapter(tuning: Tuning) -> None:
    before, after = tuning(learning_rate=1e-3, lora_dropout=1.0)
    assert after == before
