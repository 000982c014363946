"""LLaMA-Factory's YAML into a study (read as of 0.9.5), its data sets by `dataset_info.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratune.delivery.recipes import transformers_fields
from loratune.delivery.recipes.recipe import ForeignRecipe, only_lora

MARKS = ("finetuning_type", "stage")
_KERNELS = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}
_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history", "tools": "tools"}
_USUAL = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}


def read_llamafactory(recipe: ForeignRecipe) -> None:
    only_lora(recipe.path, "stage", recipe.take("stage", default="sft"), ("sft",))
    only_lora(recipe.path, "finetuning_type", recipe.take("finetuning_type", default="lora"), ("lora",))
    recipe.put("model", "name_or_path", recipe.take("model_name_or_path"))
    revision = recipe.take("model_revision", default="main")
    recipe.put("model", "revision", None if revision == "main" else revision)
    if recipe.take("quantization_bit") == 4:
        recipe.put("model", "load_in_4bit", True)
    else:
        recipe.lose("quantization_bit", "the frozen weights are held in 4 bits or in a data type")
    recipe.put("model", "attn_implementation", _KERNELS.get(str(recipe.take("flash_attn", default="auto"))))

    recipe.put("data", "max_length", recipe.number("cutoff_len", default=2048, kind=int))
    for name, role in (("dataset", "train"), ("eval_dataset", "validation")):
        names = recipe.take(name)
        several = names.split(",") if isinstance(names, str) else list(names or [])
        for place in several:
            _source(recipe, str(place).strip(), role)
    recipe.take("dataset_dir")
    template = str(recipe.take("template", default="default"))
    recipe.put("data", "prompt", "alpaca" if template == "alpaca" else "auto")
    if template not in ("alpaca", "default", "empty"):
        recipe.notes.append(f"template {template}: the tokenizer's own chat template is taken; write data.prompt for another")
    recipe.put("data", "train_count", recipe.take("max_samples"))
    recipe.validation(recipe.take("val_size", default=0))
    recipe.lose("train_on_prompt", "answers alone are scored")
    recipe.lose("mask_history", "each answer is scored, except those with weight: 0")

    r = recipe.number("lora_rank", default=8, kind=int)
    recipe.adapter(
        r=r,
        alpha=recipe.number("lora_alpha", default=2 * r),
        dropout=recipe.number("lora_dropout", default=0.0),
        learning_rate=recipe.number("learning_rate", default=5e-5),
    )
    recipe.targets(recipe.take("lora_target", default="all"))
    recipe.put("training", "use_rslora", recipe.take("use_rslora"))
    recipe.put("training", "loraplus_lr_ratio", recipe.take("loraplus_lr_ratio"))
    recipe.lose("use_dora", "DoRA is not trained here")
    recipe.put("training", "gradient_checkpointing", not recipe.take("disable_gradient_checkpointing", default=False))
    transformers_fields.read_training(recipe)


def _source(recipe: ForeignRecipe, name: str, role: str) -> None:
    folder = Path(recipe.path).parent / str(recipe.given.get("dataset_dir") or "data")
    folder = folder if folder.is_dir() else Path(str(recipe.given.get("dataset_dir") or "data"))
    sources = recipe.study["data"].setdefault(role, [])
    try:
        entry: Any = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError):
        entry = None
    if not isinstance(entry, Mapping):
        recipe.notes.append(f"dataset {name}: not found in {folder / 'dataset_info.json'}; write its path into data.{role}")
        sources.append({"path": name})
        return
    place = str(folder / entry["file_name"]) if "file_name" in entry else str(entry.get("hf_hub_url", name))
    given = entry.get("columns") or {}
    if entry.get("formatting") == "sharegpt":
        field = str(given.get("messages", _USUAL["messages"]))
        columns = {} if field in ("messages", "conversations") else {"messages": field}
        columns |= {ours: str(given[ours]) for ours in ("system", "tools") if given.get(ours) and given[ours] != ours}
    else:
        columns = {
            _COLUMNS[name]: str(column) for name, column in given.items() if name in _COLUMNS and column and column != _COLUMNS[name]
        }
    if entry.get("ranking"):
        recipe.lost.append(f"dataset {name}: ranking  (preference data is not trained on)")
    split = {"split": entry["split"]} if entry.get("split") and "file_name" not in entry else {}
    sources.append({"path": place, **split, **({"columns": columns} if columns else {})})
