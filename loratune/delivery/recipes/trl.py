"""The YAML of `trl sft --config` into a study (read as of 1.16)."""

from typing import Any

from loratune.delivery.recipes import transformers_fields
from loratune.delivery.recipes.recipe import ForeignRecipe, mappings, only_lora

MARKS = ("model_name_or_path", "use_peft")
_FILES = {"json", "csv", "parquet"}


def read_trl(recipe: ForeignRecipe) -> None:
    only_lora(recipe.path, "use_peft", recipe.take("use_peft", default=False), (True,))
    recipe.put("model", "name_or_path", recipe.take("model_name_or_path"))
    revision = recipe.take("model_revision", default="main")
    recipe.put("model", "revision", None if revision == "main" else revision)
    recipe.put("model", "load_in_4bit", recipe.take("load_in_4bit") or None)
    recipe.lose("load_in_8bit", "the frozen weights are held in 4 bits or in a data type")
    recipe.put("model", "attn_implementation", recipe.take("attn_implementation"))
    recipe.put("model", "dtype", recipe.take("dtype", "torch_dtype"))

    recipe.put("data", "max_length", recipe.number("max_length", "max_seq_length", default=1024, kind=int))
    train, test = str(recipe.take("dataset_train_split", default="train")), recipe.take("dataset_test_split")
    name = recipe.take("dataset_name")
    sources = [{"path": str(name), **({"split": train} if train != "train" else {})}] if name else []
    for entry in mappings(recipe.take("datasets")):
        sources += _sources(recipe, entry)
    recipe.put("data", "train", sources or None)
    if name and test:
        recipe.put("data", "validation", [{"path": str(name), "split": str(test)}])
    else:
        recipe.validation(recipe.take("test_split_size"))
    recipe.lose("dataset_config", "write the path of the configuration's files into data.train")
    field = recipe.take("dataset_text_field", default="text")
    if field != "text":
        recipe.put("data", "columns", {"text": field})
    template = recipe.take("chat_template_path")
    if template and str(template).endswith((".jinja", ".jinja2", ".j2")):
        recipe.put("data", "prompt", str(template))
    else:
        recipe.lose("chat_template_path", "write a .jinja file into data.prompt")
        recipe.put("data", "prompt", "auto")
    recipe.take("completion_only_loss")
    recipe.take("assistant_only_loss")
    recipe.notes.append("the answers alone are scored, as with assistant_only_loss or completion_only_loss")
    if recipe.take("loss_type", default="nll") != "nll":
        recipe.lose("loss_type", "the loss is the mean negative log-likelihood")

    recipe.adapter(
        r=recipe.number("lora_r", default=16, kind=int),
        alpha=recipe.number("lora_alpha", default=32),
        dropout=recipe.number("lora_dropout", default=0.05),
        learning_rate=recipe.number("learning_rate", default=2e-5),
    )
    recipe.targets(recipe.take("lora_target_modules"))
    recipe.put("training", "use_rslora", recipe.take("use_rslora"))
    recipe.lose("use_dora", "DoRA is not trained here")
    recipe.put("training", "gradient_checkpointing", recipe.take("gradient_checkpointing", default=True))
    transformers_fields.read_training(recipe)


def _sources(recipe: ForeignRecipe, entry: Any) -> list[dict[str, Any]]:
    path, files = str(entry.get("path", "")), entry.get("data_files")
    places = ([files] if isinstance(files, str) else list(files or [])) if path in _FILES else [path]
    for name in set(entry) - {"path", "data_files", "split"}:
        if entry[name] is not None:
            recipe.lost.append(f"datasets[].{name}: {entry[name]}  (no counterpart)")
    split = {"split": entry["split"]} if entry.get("split", "train") != "train" and path not in _FILES else {}
    return [{"path": str(place), **split} for place in places]
