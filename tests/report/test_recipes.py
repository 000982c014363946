"""Recipes of other tools: a study made of each, and the settings a study found written as each."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_studies import Point, spec_of, write_study

from loratune.cli import main
from loratune.delivery.recipes.reading import read_recipe
from loratune.delivery.recipes.writing import export_recipe
from loratune.errors import SpecError, StorageError
from loratune.spec import StudySpec

AXOLOTL = """
base_model: meta-llama/Llama-3.2-1B
adapter: qlora
load_in_4bit: true
datasets:
  - path: data/talks.jsonl
    ds_type: json
    type: chat_template
    field_messages: dialogue
    roles_to_train: [assistant]
val_set_size: 0.05
sequence_len: 2048
sample_packing: true
lora_r: 12
lora_alpha: 24
lora_dropout: 0.05
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 8
num_epochs: 3
learning_rate: 2e-4
lr_scheduler: cosine
optimizer: adamw_bnb_8bit
warmup_steps: 10
bf16: auto
output_dir: ./out
wandb_project: mine
"""
LLAMAFACTORY = """
model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: q_proj,v_proj
dataset: faq,talks
template: qwen
cutoff_len: 1024
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""
INFO = {
    "faq": {"file_name": "faq.json", "columns": {"prompt": "question", "response": "answer"}},
    "talks": {"file_name": "talks.json", "formatting": "sharegpt", "columns": {"messages": "dialogue"}},
}
TRL = """
model_name_or_path: Qwen/Qwen2-0.5B
use_peft: true
lora_r: 32
lora_alpha: 16
lora_target_modules: all-linear
dataset_name: trl-lib/Capybara
dataset_test_split: test
learning_rate: 2.0e-5
num_train_epochs: 1
packing: true
eos_token: <|im_end|>
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
"""


def imported(tmp_path: Path, text: str, name: str = "recipe.yml") -> tuple[StudySpec, Any]:
    (tmp_path / name).write_text(text)
    made = read_recipe(tmp_path / name)
    study = tmp_path / "study.yaml"
    study.write_text(made.to_yaml(name))
    return StudySpec.load(study), made


def first_trial(spec: StudySpec) -> Any:
    return spec.hyperparameters(spec.search_space.default_values())


def test_axolotl(tmp_path: Path) -> None:
    spec, made = imported(tmp_path, AXOLOTL)
    h = first_trial(spec)
    assert made.tool == "axolotl"
    assert (h.lora_r, h.lora_alpha, h.lora_dropout, h.learning_rate) == (12, 24.0, 0.05, 2e-4)
    assert (h.epochs, h.batch_size, h.target_modules) == (3.0, 16, "all-linear")
    assert (spec.model.load_in_4bit, spec.data.max_length, spec.data.validation_fraction, spec.data.prompt) == (True, 2048, 0.05, "chat")
    assert (spec.data.train[0].path, spec.data.train[0].columns) == ("data/talks.jsonl", {"messages": "dialogue"})
    assert [line.partition(":")[0] for line in made.lost] == ["datasets[].roles_to_train", "warmup_steps", "optimizer"]
    assert "# Not carried over:\n#   datasets[].roles_to_train: ['assistant']  (no counterpart)" in (tmp_path / "study.yaml").read_text()


def test_axolotls_own_prompts_become_templates(tmp_path: Path) -> None:
    kind = {"field_instruction": "q", "field_output": "a", "format": "[INST] {instruction} [/INST]"}
    spec, _ = imported(tmp_path, yaml.safe_dump({**yaml.safe_load(AXOLOTL), "datasets": [{"path": "a/b", "type": kind, "split": "dev"}]}))
    assert spec.data.prompt == "[INST] {{ instruction }} [/INST]"
    assert (spec.data.train[0].columns, spec.data.train[0].split) == ({"instruction": "q", "output": "a"}, "dev")


def test_llamafactory(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    spec, made = imported(tmp_path, LLAMAFACTORY)
    h = first_trial(spec)
    assert made.tool == "llamafactory"
    assert (h.lora_r, h.lora_alpha, h.lora_dropout, h.learning_rate, h.batch_size, h.warmup_ratio) == (16, 32.0, 0.0, 1e-4, 8, 0.1)
    assert (h.target_modules, spec.model.dtype, spec.model.trust_remote_code) == (("q_proj", "v_proj"), "bfloat16", False)
    assert [source.columns for source in spec.data.train] == [{"instruction": "question", "output": "answer"}, {"messages": "dialogue"}]
    assert spec.data.train[0].path == str(tmp_path / "data" / "faq.json")
    assert made.lost == ("trust_remote_code: True  (consent is yours to give: --model.trust_remote_code true)",)
    assert any(note.startswith("template qwen: the tokenizer's own") for note in made.notes)


def test_trl(tmp_path: Path) -> None:
    spec, made = imported(tmp_path, TRL)
    h = first_trial(spec)
    assert made.tool == "trl"
    assert (h.lora_r, h.lora_alpha, h.lora_dropout, h.learning_rate, h.batch_size, h.epochs) == (32, 16.0, 0.05, 2e-5, 16, 1.0)
    assert (spec.training.lr_scheduler_type, spec.training.warmup_ratio, spec.data.max_length) == ("linear", 0.0, 1024)
    assert spec.data.validation[0].split == "test"
    assert made.lost == ("eos_token: <|im_end|>  (no counterpart)",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AXOLOTL.replace("adapter: qlora", ""), "adapter: got None; only recipes of LoRA make a study"),
        (LLAMAFACTORY.replace("stage: sft", "stage: dpo"), "stage: got 'dpo'"),
        (TRL.replace("use_peft: true", "use_peft: false"), "use_peft: got False"),
        (AXOLOTL.replace("2e-4", "fast"), "learning_rate: got 'fast'; needed: a number"),
        ("a: 1", "not a known recipe"),
        ("[", "not valid YAML"),
    ],
)
def test_recipes_that_make_no_study(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yml").write_text(text)
    with pytest.raises(SpecError, match=message.replace("(", r"\(")):
        read_recipe(tmp_path / "a.yml")


# ---- and back ----

BEST = {"lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "learning_rate": 3.1e-5}


def study(folder: Path, **changes: Any) -> Path:
    sources = [{"path": "faq.csv", "columns": {"instruction": "question", "output": "answer"}}]
    spec = spec_of(data={"train": sources, "validation_fraction": 0.2, "max_length": 700}, **changes)
    more = {"target_modules": "all-linear", "batch_size": 24, "warmup_ratio": 0.05}
    write_study(folder, [Point(BEST, 1.2, hyperparameters=more), Point({**BEST, "lora_r": 4}, 1.4)], spec)
    return folder


@pytest.mark.parametrize("form", ["axolotl", "llamafactory", "trl"])
def test_what_is_exported_is_imported_as_the_same_settings(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out" / "best.yml"
    assert main(["export", str(study(tmp_path / "study")), str(file), "--format", form]) == 0
    assert capsys.readouterr().out.startswith(str(file))
    made = read_recipe(file)
    h = first_trial(StudySpec.load(base=made.study))
    assert made.tool == form
    assert (h.lora_r, h.lora_alpha, h.lora_dropout, h.learning_rate) == (32, 16.0, 0.05, 3.1e-5)
    assert (h.batch_size, h.epochs, h.warmup_ratio, h.target_modules) == (24, 2.0, 0.05, "all-linear")
    data = made.study["data"]
    assert data["max_length"] == 700
    if form != "trl":  # which has no columns, and says so
        assert data["train"][0]["columns"] == {"instruction": "question", "output": "answer"}
    else:
        assert "# faq.csv: trl reads no columns of other names" in file.read_text()
    with pytest.raises(StorageError, match="exists"):
        export_recipe(tmp_path / "study", file, form)


def with_data(folder: Path, data: dict[str, Any]) -> Path:
    """A study of these data, written out in full as a study's folder has them."""
    write_study(folder, [Point(BEST, 1.2)], spec_of(data=StudySpec.load(base={"model": "m", "data": data}).data.model_dump(mode="json")))
    return folder


HUB = {"train": [{"path": "a/b"}], "validation": [{"path": "a/b", "split": "test"}]}


@pytest.mark.parametrize("form", ["axolotl", "llamafactory", "trl"])
@pytest.mark.parametrize(
    "data",
    [
        {"train": ["faq.jsonl"], "validation_fraction": 0.2},
        {"train": ["faq.jsonl"], "validation_count": 30},
        {"train": ["faq.jsonl"], "validation": ["asked.jsonl", "other.jsonl"]},
        HUB,
    ],
    ids=["share", "count", "files", "split"],
)
def test_the_validation_data_come_back(tmp_path: Path, form: str, data: dict[str, Any]) -> None:
    file = tmp_path / "out" / "best.yml"
    _, notes = export_recipe(with_data(tmp_path / "study", data), file, form)
    written, made = yaml.safe_load(file.read_text()), read_recipe(file)
    back = StudySpec.load(base=made.study).data
    if form == "trl" and "asked.jsonl" in str(data):  # the one thing that it cannot hold
        assert any("trl reads no validation files (asked.jsonl, other.jsonl)" in note for note in notes)
        assert "eval_strategy" not in written
        return
    assert written["eval_strategy"] == "epoch"
    assert (back.validation_fraction, back.validation_count) == (data.get("validation_fraction"), data.get("validation_count"))
    paths = [Path(source.path).name for source in back.validation]
    assert paths == [Path(str(source["path"] if isinstance(source, dict) else source)).name for source in data.get("validation", [])]
    assert [source.split for source in back.validation] == (["test"] if data is HUB else [None] * len(paths))
    assert not any("no validation data" in note for note in made.notes)
    assert any("draws as many rows" in note for note in notes) == (not paths)


def test_counts_of_each_source_are_one_number(tmp_path: Path) -> None:
    data = {"train": [{"path": "a.jsonl", "validation_count": 20}, {"path": "b.jsonl", "validation_count": 5}]}
    path, notes = export_recipe(with_data(tmp_path / "study", data), tmp_path / "a.yml", "axolotl")
    assert yaml.safe_load(path.read_text())["val_set_size"] == 25
    assert "not from each source its part" in notes[-1]


def test_the_command_writes_a_study_and_lists_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yml").write_text(AXOLOTL)
    arguments = ["import", str(tmp_path / "a.yml"), "--output", str(tmp_path / "study.yaml")]
    assert main(arguments) == 0
    assert "  optimizer: adamw_bnb_8bit  (AdamW in full precision is taken)\n" in capsys.readouterr().out
    assert main(arguments) == 5
    assert "exists" in capsys.readouterr().err


def test_pefts_configuration(tmp_path: Path) -> None:
    from peft import LoraConfig

    path, notes = export_recipe(study(tmp_path / "study"), tmp_path / "adapter_config.json", "peft", trial=0)
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules, config.task_type) == (
        32,
        16,
        0.05,
        "all-linear",
        "CAUSAL_LM",
    )
    assert path == tmp_path / "adapter_config.json"
    assert "learning_rate 3.1e-05" in notes[0]


# ---- the released packages' own parsers ----


def parser(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # not installed, or without what it needs
        pytest.skip(f"{name} cannot be imported: {error}")


@pytest.mark.slow
def test_axolotls_own_parser_takes_the_file(tmp_path: Path) -> None:
    config = parser("axolotl.utils.schemas.config")
    path, _ = export_recipe(study(tmp_path / "study"), tmp_path / "a.yml", "axolotl")
    read = config.AxolotlInputConfig(**yaml.safe_load(path.read_text()))
    assert (read.lora_r, read.lora_alpha, read.learning_rate, read.gradient_accumulation_steps) == (32, 16, 3.1e-5, 6)
    assert read.datasets[0].type.field_instruction == "question"


@pytest.mark.slow
def test_llamafactorys_own_parser_takes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")  # it wants an older Transformers
    hparams = parser("llamafactory.hparams.parser")
    path, _ = export_recipe(study(tmp_path / "study"), tmp_path / "a.yaml", "llamafactory")
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", str(path)])
    model, data, training, finetuning, _ = hparams._parse_train_args(hparams.read_args())
    assert (finetuning.lora_rank, finetuning.lora_alpha, finetuning.lora_target) == (32, 16, ["all"])
    assert (training.learning_rate, training.gradient_accumulation_steps, data.cutoff_len) == (3.1e-5, 6, 700)
    assert model.model_name_or_path == "meta-llama/Llama-2-7b-hf"


@pytest.mark.slow
def test_trls_own_parser_takes_the_file(tmp_path: Path) -> None:
    utils, sft, models = (parser(f"trl.{name}") for name in ("scripts.utils", "trainer.sft_config", "trainer.model_config"))
    path, _ = export_recipe(study(tmp_path / "study"), tmp_path / "a.yaml", "trl")
    reader = utils.TrlParser((utils.ScriptArguments, sft.SFTConfig, models.ModelConfig, utils.DatasetMixtureConfig))
    _, training, model, mixture = reader.parse_args_and_config(["--config", str(path), "--use_cpu", "true", "--bf16", "false"])
    assert (model.lora_r, model.lora_alpha, model.lora_target_modules, model.use_peft) == (32, 16, "all-linear", True)
    assert (training.learning_rate, training.gradient_accumulation_steps, training.max_length) == (3.1e-5, 6, 700)
    assert (mixture.datasets[0].path, mixture.datasets[0].data_files) == ("csv", str(Path("faq.csv").absolute()))
