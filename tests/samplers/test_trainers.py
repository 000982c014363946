"""loratune's samplers in a Transformers Trainer's own search, as docs/recipes.md shows."""

import optuna
import pytest

from loratune import demo
from loratune.samplers import NomadSampler


@pytest.mark.slow
def test_a_trainer_searches_with_nomad(tmp_path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    ids = torch.arange(16).repeat(8, 1)
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def model_init(trial: optuna.Trial | None) -> torch.nn.Module:
        rank = trial.suggest_int("lora_r", 2, 8) if trial else 2
        base = AutoModelForCausalLM.from_pretrained(demo.model_folder())
        return get_peft_model(base, LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))

    settings = TrainingArguments(output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, eval_strategy="no", save_strategy="no")
    trainer = Trainer(args=settings, model_init=model_init, train_dataset=rows, eval_dataset=rows)
    best = trainer.hyperparameter_search(
        direction="minimize",
        backend="optuna",
        n_trials=3,
        sampler=NomadSampler(seed=0),
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)},
        storage=f"sqlite:///{tmp_path}/study.db",
        study_name="search",
    )
    assert set(best.hyperparameters) == {"learning_rate", "lora_r"}
    trials = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/study.db").trials
    assert len({tuple(trial.params.items()) for trial in trials}) == 3
