"""For each family: the recorded loss is that of plain peft on the exported folder and of the merged model, on plain Transformers.

The independent loss tokenises, runs and sums for itself. What cannot be trained is refused once, before the first step.
"""

import json
from dataclasses import replace
from pathlib import Path

import families
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune.data.prepare import prepare
from loratune.data.prepared import Prepared
from loratune.data.sources import DataRecipe, DataSource
from loratune.delivery.merge import export_adapter, merge
from loratune.errors import ModelError
from loratune.finetune import layers, preflight
from loratune.finetune.engines import Engine, load_engine, run_segments
from loratune.finetune.model import bare_model
from loratune.finetune.sizes import adapter_sizes
from loratune.work import Hyperparameters, ModelRecipe, Recipe, Segment, State, TrainingRecipe

CORE = ("llama tied, biased", "mixtral", "gemma3", "gpt2", "phi3 longrope", "llama4")
EACH = [pytest.param(family, marks=() if family in CORE else pytest.mark.slow) for family in families.FAMILIES]
WANTED = ("qv", "all-linear")
WITHOUT_QV = {"deepseek-v3": "q_a_proj", "mamba": "in_proj", "mamba2": "in_proj"}  # whose attention is something else
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{}\n\n### Response:"
)
ROWS = [{"instruction": f"Name {i} {'and more ' * (i % 3)}", "output": f"{i} is {i * 7 % 10}, Paris"} for i in range(18)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train", ROWS[:12]), ("validation", ROWS[12:])):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    tokenizer = families.tiny_tokenizer.build(folder / "tokenizer")
    sources = {name: (DataSource(path=str(folder / f"{name}.json")),) for name in ("train", "validation")}
    return prepare(DataRecipe(**sources, max_length=512), tokenizer=str(tokenizer), cache=folder / "cache")


def independent_loss(model: torch.nn.Module, folder: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for row in ROWS[12:]:
        prompt = tokenizer(PROMPT.format(row["instruction"]))["input_ids"]
        response = [*tokenizer(row["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
        nll = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")[len(prompt) - 1 :]
        total, count = total + nll.double().sum().item(), count + len(nll)
    return total / count


@pytest.mark.parametrize("family", EACH)
def test_what_is_recorded_is_what_plain_peft_and_the_merged_model_give(tmp_path: Path, data: Prepared, family: str) -> None:
    folder = families.build(tmp_path / "model", families.FAMILIES[family]())
    recipe = Recipe(
        model=ModelRecipe(name_or_path=str(folder), dtype="float32"),
        training=TrainingRecipe(),
        data=str(data.folder),
        engine="packed",
        slots=2,
        device="cpu",
    )
    wanted = list(WANTED)
    if family in WITHOUT_QV:
        with pytest.raises(ModelError, match=f"no linear layers for 'qv'.*{WITHOUT_QV[family]}"):
            preflight.check_fit(bare_model(recipe.model), recipe.model, data, ["qv"])
        wanted.remove("qv")
    preflight.check_fit(bare_model(recipe.model), recipe.model, data, wanted)
    base = independent_loss(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), folder)
    engine = load_engine(recipe, tmp_path)
    check(engine, recipe, tmp_path, wanted, "packed", base)
    if engine.slots > 1:
        check(load_engine(replace(recipe, engine="hf"), tmp_path), recipe, tmp_path, wanted, "hf", base)


def check(engine: Engine, recipe: Recipe, root: Path, wanted: list[str], run: str, base: float) -> None:
    hyperparameters = [Hyperparameters(lora_r=4, lora_dropout=0.0, learning_rate=0.03, batch_size=4, target_modules=w) for w in wanted]
    segments = [
        Segment(trial=i, run=run, hyperparameters=h, seed=0, total_steps=3, stop_step=3, validate_at=(0,))
        for i, h in enumerate(hyperparameters)
    ]
    outcomes = run_segments(engine, segments)
    engine.close()
    told, folder = adapter_sizes(recipe.model), Path(recipe.model.name_or_path)
    for outcome, segment in zip(outcomes, segments, strict=True):
        assert outcome.state is State.COMPLETED, outcome.message
        recorded = outcome.validation_loss
        assert recorded is not None
        assert outcome.curve[0].validation_loss == pytest.approx(base, abs=1e-4)
        assert abs(recorded - base) > 0.01
        exported = export_adapter(root / segment.folder / "adapter", root / "exported" / segment.key, {})
        weights = load_file(exported / "adapter_model.safetensors")
        assert sum(w.numel() for w in weights.values()) == outcome.trainable_parameters == told(segment.hyperparameters)
        assert all(w.any() for w in weights.values())  # a B that stayed 0 is a layer that does not run
        fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert independent_loss(peft.PeftModel.from_pretrained(fresh, str(exported)), folder) == pytest.approx(recorded, abs=1e-4)
        merged = merge(recipe.model, exported, root / "merged" / segment.key, {})
        loss = independent_loss(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), merged)
        assert loss == pytest.approx(recorded, abs=1e-4)


@pytest.mark.parametrize("family", EACH)
def test_a_trace_and_the_parts_of_a_model_say_the_same(family: str) -> None:
    model = families.bare(families.FAMILIES[family]())
    traced = layers.trace_text(model)
    assert (traced is None) == (family in ("qwen3-next", "mamba2", "jamba"))
    assert layers.sort_layers(model, traced) == layers.sort_layers(model, None)
