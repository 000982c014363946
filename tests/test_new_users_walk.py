"""A new user's walk, command by command: a chat model and a JSONL of conversations to an adapter that plain Transformers loads; and a
recipe of Axolotl's imported, tuned, exported back. `--json` says where things are.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from loratune import demo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TEMPLATE = (
    "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)


def loratune(home: Path, *command: object) -> dict[str, Any]:
    """A command of its own process, as a user gives it; its facts."""
    told = subprocess.run(
        [sys.executable, "-m", "loratune", *map(str, command), "--json"], cwd=home, capture_output=True, text=True, timeout=900
    )
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a chat model, and conversations about the demo's world."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("walk")
    tokenizer = AutoTokenizer.from_pretrained(demo.model_folder())
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    AutoModelForCausalLM.from_pretrained(demo.model_folder()).save_pretrained(folder / "model")
    rows = [json.loads(line) for line in demo.data_files()[0].read_text().splitlines()[:1200]]
    with (folder / "talks.jsonl").open("w") as file:
        for row in rows:
            question = f"{row['instruction']} {row['input']}".strip()
            talk = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
            print(json.dumps({"messages": talk}), file=file)
    questions = [f"{row['instruction']} {row['input']}".strip() for row in rows[:6]]
    (folder / "questions.txt").write_text("\n".join(questions) + "\n")
    return folder


def test_from_conversations_to_an_adapter_that_answers(home: Path) -> None:
    flags = ("--data.train_count", 400, "--data.validation_count", 100, "--training.batch_size", 8, "--training.epochs", 1)
    run = loratune(home, "run", "--model", "model", "--data", "talks.jsonl", "--output", "study", "--budget.full_runs", 2, *flags)
    assert run["finished"]
    assert run["best"]["value"] < run["base_loss"]
    scored = loratune(home, "evaluate", "study", "--benchmarks", "demo_choice", "--top", 1, "--subset", 20)
    assert scored["scores"][0]["benchmark"] == "demo_choice"
    chosen = loratune(home, "select", "study", "--no-rerun", "--yes")
    assert chosen["chosen"] == run["best"]["trial"]
    loratune(home, "export", "study", "adapter")
    loratune(home, "compare", "tuned", "base", "--study", "study", "--questions", "questions.txt", "--no-page", "--out", "votes")
    told = [json.loads(line) for line in (home / "votes" / "answers.jsonl").read_text().splitlines()]
    ours = [row["text"].strip() for row in told if row["side"] == "first"]
    assert len(ours) == 6
    assert plain_answers(home) == ours


def plain_answers(home: Path) -> list[str]:
    """What the exported adapter says in plain Transformers and PEFT, asked through the chat template."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "model"), home / "adapter")
    said = []
    for question in (home / "questions.txt").read_text().splitlines():
        talk = [{"role": "user", "content": question}]
        given = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        given = {name: given[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            out = model.generate(**given, max_new_tokens=512, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
        said.append(tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return said


def test_a_recipe_comes_in_is_tuned_and_goes_out(home: Path) -> None:
    recipe = {
        "base_model": "model",
        "adapter": "lora",
        "datasets": [{"path": "talks.jsonl", "ds_type": "json", "type": "chat_template", "field_messages": "messages"}],
        "val_set_size": 0.1,
        "sequence_len": 128,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "learning_rate": 2e-4,
        "lr_scheduler": "cosine",
        "optimizer": "adamw_torch",
        "output_dir": "out",
    }
    (home / "axolotl.yml").write_text(yaml.safe_dump(recipe))
    made = loratune(home, "import", "axolotl.yml", "--output", "imported.yaml")
    assert made["file"] == "imported.yaml"
    flags = ("--output", "imported", "--sampler", "random", "--trials", 2, "--data.train_count", 200, "--data.validation_count", 60)
    run = loratune(home, "run", "imported.yaml", *flags, "--data.validation_fraction", "null")
    assert run["default"]["params"]["learning_rate"] == 2e-4, "the recipe's own settings come first"
    loratune(home, "export", "imported", "best.yml", "--format", "axolotl", "--trial", run["best"]["trial"])
    out = yaml.safe_load((home / "best.yml").read_text())
    assert out["base_model"] == "model" or Path(out["base_model"]).name == "model"
    assert out["learning_rate"] == pytest.approx(run["best"]["params"]["learning_rate"])
    assert out["adapter"] == "lora"
