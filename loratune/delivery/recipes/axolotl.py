"""Axolotl's YAML into a study (read as of 0.19)."""

from collections.abc import Mapping
from typing import Any

from loratune.delivery.recipes.recipe import ForeignRecipe, mappings, only_lora

MARKS = ("base_model", "datasets")
_FILES = {"json", "csv", "parquet", "text", "arrow"}  # of `path`: the builder, the data being in data_files
_READ = {"path", "type", "data_files", "ds_type", "split", "field_messages", "message_property_mappings", "field"}
_READ |= {"message_field_role", "message_field_content", "chat_template", "conversation"}


def read_axolotl(recipe: ForeignRecipe) -> None:
    adapter = recipe.take("adapter")
    only_lora(recipe.path, "adapter", adapter, ("lora", "qlora"))
    recipe.put("model", "name_or_path", recipe.take("base_model"))
    recipe.put("model", "revision", recipe.take("revision_of_model"))
    recipe.put("model", "load_in_4bit", bool(recipe.take("load_in_4bit")) or adapter == "qlora" or None)
    recipe.lose("load_in_8bit", "the frozen weights are held in 4 bits or in a data type")
    for name, kernel in (("flash_attention", "flash_attention_2"), ("sdp_attention", "sdpa"), ("eager_attention", "eager")):
        recipe.put("model", "attn_implementation", kernel if recipe.take(name) is True else None)
    recipe.put("model", "attn_implementation", recipe.take("attn_implementation"))
    recipe.precision()
    recipe.code_of_the_model()

    recipe.put("data", "max_length", recipe.number("sequence_len", default=512, kind=int))
    kinds = [_source(recipe, entry, "train") for entry in mappings(recipe.take("datasets"))]
    for entry in mappings(recipe.take("test_datasets")):
        _source(recipe, entry, "validation")
    if "prompt" not in recipe.study["data"]:
        recipe.put("data", "prompt", _prompt(recipe, kinds))
    recipe.validation(recipe.take("val_set_size"))
    recipe.lose("train_on_inputs", "answers alone are scored")

    r, learning_rate = recipe.number("lora_r", default=8, kind=int), recipe.number("learning_rate", default=2e-4)
    recipe.adapter(
        r=r,
        alpha=recipe.number("lora_alpha", default=r),
        dropout=recipe.number("lora_dropout", default=0.0),
        learning_rate=learning_rate,
    )
    linear = recipe.take("lora_target_linear")
    recipe.targets("all-linear" if linear else recipe.take("lora_target_modules"))
    recipe.put("training", "use_rslora", recipe.take("peft_use_rslora"))
    recipe.put("training", "loraplus_lr_ratio", recipe.take("loraplus_lr_ratio"))
    recipe.lose("peft_use_dora", "DoRA is not trained here")
    recipe.put("training", "epochs", recipe.number("num_epochs", default=1.0))
    recipe.lose("max_steps", "a study's length is training.epochs")
    micro = recipe.number("micro_batch_size", default=1, kind=int)
    recipe.batch(micro, recipe.number("gradient_accumulation_steps", default=1, kind=int))
    recipe.scheduler("lr_scheduler", default="cosine")
    recipe.warmup()
    recipe.optimizer("optimizer")
    recipe.put("training", "gradient_checkpointing", bool(recipe.take("gradient_checkpointing")) or None)
    recipe.study["seed"] = recipe.number("seed", default=42, kind=int)


def _source(recipe: ForeignRecipe, entry: Mapping[str, Any], role: str) -> str:
    """Add a data set; returns what kind of prompt its type means: alpaca, chat, own, or nothing known."""
    path, files = str(entry.get("path", "")), entry.get("data_files")
    places = ([files] if isinstance(files, str) else list(files or [])) if path in _FILES else [path]
    columns: dict[str, str] = {}
    kind, prompt = entry.get("type"), ""
    if isinstance(kind, Mapping):
        theirs = {"instruction": "field_instruction", "input": "field_input", "output": "field_output", "system": "field_system"}
        columns = {ours: str(kind[name]) for ours, name in theirs.items() if kind.get(name) and kind[name] != ours}
        prompt = "own"
        recipe.put("data", "prompt", _template(kind))
        if kind.get("system_prompt"):
            recipe.lost.append(f"datasets[].type.system_prompt: {str(kind['system_prompt'])[:40]!r}  (write it into data.prompt)")
    elif kind in ("chat_template", "sharegpt", None):
        prompt = "chat"
        field = entry.get("field_messages")
        if field and field not in ("messages", "conversations"):
            columns = {"messages": str(field)}
        names = entry.get("message_property_mappings") or {}
        spelt = {
            str(names.get("role", entry.get("message_field_role", "role"))),
            str(names.get("content", entry.get("message_field_content", "content"))),
        }
        if spelt not in ({"role", "content"}, {"from", "value"}):
            recipe.lost.append(f"datasets[].message_property_mappings: {dict(names)}  (messages have role and content, or from and value)")
    elif str(kind).startswith("alpaca"):
        prompt = "alpaca"
    else:
        recipe.lost.append(f"datasets[].type: {kind}  (the format is found by the fields of the rows; its prompt is not carried over)")
    for name in entry:
        if name not in _READ:
            recipe.lost.append(f"datasets[].{name}: {entry[name]}  (no counterpart)")
    split = {"split": entry["split"]} if entry.get("split") and entry["split"] != "train" and path not in _FILES else {}
    recipe.study["data"].setdefault(role, []).extend(
        {"path": str(place), **split, **({"columns": columns} if columns else {})} for place in places
    )
    return prompt


def _template(kind: Mapping[str, Any]) -> str | None:
    """Axolotl's own prompt, `{instruction} {input}`, as Jinja."""

    def jinja(text: Any) -> str:
        return str(text).replace("{instruction}", "{{ instruction }}").replace("{input}", "{{ input }}")

    with_input, without = kind.get("format"), kind.get("no_input_format")
    if not with_input and not without:
        return None
    if not with_input or not without or with_input == without:
        return jinja(with_input or without)
    return "{% if input %}{{ '' }}" + jinja(with_input) + "{{ '' }}{% else %}{{ '' }}" + jinja(without) + "{{ '' }}{% endif %}"


def _prompt(recipe: ForeignRecipe, kinds: list[str]) -> str:
    chosen = recipe.take("chat_template", default="tokenizer_default")
    own = recipe.take("chat_template_jinja")
    if set(kinds) == {"alpaca"}:
        return "alpaca"
    if own:
        return str(own)
    if chosen not in ("tokenizer_default", "tokenizer_default_fallback_chatml", "jinja"):
        recipe.lose("chat_template", "the tokenizer's own template is taken; write data.prompt for another")
    return "chat" if set(kinds) == {"chat"} else "auto"
