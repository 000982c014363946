"""A random two-layer Llama with its tokenizer and prepared random data: a whole study's folder in a second."""

import threading
from pathlib import Path

import tiny_tokenizer
import torch
import transformers
from tiny_tokens import VOCABULARY, random_tokens

from loratune.data.prepared import Manifest, SetCounts, write_prepared
from loratune.data.sources import DataRecipe
from loratune.finetune.engines import run_segments
from loratune.record.paths import StudyPaths
from loratune.work import Hyperparameters, ModelRecipe, Outcome, Recipe, Segment, State, TrainingRecipe


def build_model(folder: Path, config: transformers.PretrainedConfig | None = None) -> Path:
    torch.manual_seed(0)
    config = config or transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.1,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return tiny_tokenizer.build(folder)


def build_data(folder: Path, train: int = 40, validation: int = 20) -> Path:
    sets = {"train": random_tokens(train, 1), "validation": random_tokens(validation, 2)}
    counts = {n: SetCounts(examples=len(t), tokens=len(t.ids), response_tokens=int(t.mask.sum())) for n, t in sets.items()}
    manifest = Manifest(
        hash="tiny",
        recipe=DataRecipe(train=()),
        tokenizer="",
        revision=None,
        pad_token_id=0,
        eos_token_id=0,
        duplicates=0,
        sources=(),
        **counts,
    )
    write_prepared(folder, manifest, sets)
    return folder


def recipe(root: Path, *, model: Path | None = None, dtype: str = "float64", **training: object) -> Recipe:
    """Build what is missing in `root`, and the recipe for it."""
    model = model or (root / "model" if (root / "model").exists() else build_model(root / "model"))
    if not (root / "data").exists():
        build_data(root / "data")
    return Recipe(
        model=ModelRecipe(name_or_path=str(model), dtype=dtype),
        training=TrainingRecipe(**{"micro_batch_size": 3, "validation_batch_size": 4, "max_grad_norm": 1.0, **training}),  # type: ignore[arg-type]
        data="data",
        engine="hf",
        device="cpu",
    )


def segment(
    total: int = 6, *, trial: int = 0, start: int = 0, stop: int | None = None, validate_at: tuple[int, ...] = (), **h: object
) -> Segment:
    hyperparameters = {"lora_r": 4, "lora_dropout": 0.2, "learning_rate": 0.01, "batch_size": 7, "warmup_ratio": 0.2, **h}
    return Segment(
        trial=trial,
        hyperparameters=Hyperparameters(**hyperparameters),  # type: ignore[arg-type]
        seed=0,
        total_steps=total,
        start_step=start,
        stop_step=total if stop is None else stop,
        validate_at=validate_at,
    )


def run(
    engine, wanted: Segment, *, report=lambda progress: None, stop: threading.Event | None = None, state: State | None = State.COMPLETED
) -> Outcome:  # type: ignore[no-untyped-def]
    (outcome,) = run_segments(engine, [wanted], tell=report, stop=stop)
    assert state is None or outcome.state is state, outcome.message
    return outcome


def adapter(root: Path, wanted: Segment) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(StudyPaths(root).of(wanted).adapter / "adapter_model.safetensors")
