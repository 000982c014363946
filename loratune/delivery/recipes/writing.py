"""The best settings of a study as a recipe of another tool, or as PEFT's configuration."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loratune.delivery.handover import chosen_trial
from loratune.delivery.recipes.best_settings import (
    SCHEDULERS,
    BestSettings,
    recipe_text,
    target_names,
    transformers_arguments,
    whole_alpha,
)
from loratune.delivery.recipes.shown_rows import TALKS, builder, chat_template, tokenizers_template
from loratune.errors import SpecError, StorageError
from loratune.record import read
from loratune.system.files import AnyPath, write_atomically
from loratune.work import Hyperparameters


def export_recipe(folder: AnyPath, destination: AnyPath, form: str, *, trial: int | None = None) -> tuple[Path, tuple[str, ...]]:
    """Write the settings of a trial as a file of `form` (trl, axolotl, llamafactory, peft); returns it, and what it does not hold.

    trial: its number; by default the one that a selection chose, else the best. Beside the file, LLaMA-Factory's has a
    `dataset_info.json`, and TRL's the chat template of a study that showed messages by another than the tokenizer's. Raises SpecError
    for an unknown form, StorageError for a file that stands there or a trial that does not.
    """
    if form not in FORMS:
        raise SpecError(f"got the format {form!r}; allowed: {', '.join(FORMS)}")
    record, destination = read(folder), Path(destination)
    found, selection = chosen_trial(record, trial)
    notes: list[str] = []
    targets = target_names(record, found, notes)
    best = BestSettings(record=record, trial=found, h=found.hyperparameters, targets=targets, notes=notes, selection=selection)
    others = FORMS[form](best, destination)
    for path in others:
        if path.exists():
            raise StorageError(f"{path} exists. Choose another destination.")
    for path, text in others.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    return destination, tuple(notes)


# ---- one form each ----


def _peft(best: BestSettings, destination: Path) -> dict[Path, str]:
    h = best.h
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": best.base,
        "revision": best.section("model").get("revision"),
        "r": h.lora_r,
        "lora_alpha": best.alpha,
        "lora_dropout": h.lora_dropout,
        "target_modules": best.targets,
        "use_rslora": h.use_rslora,
        "bias": "none",
    }
    best.notes.append(f"not in PEFT's configuration: {', '.join(f'{name} {value:g}' for name, value in _training(h).items())}")
    return {destination: json.dumps(content, indent=2) + "\n"}


def _trl(best: BestSettings, destination: Path) -> dict[Path, str]:
    model, data = best.section("model"), best.section("data")
    shown, beside = _trl_shown(best, destination)
    content = {
        "model_name_or_path": best.base,
        **({"model_revision": model["revision"]} if model.get("revision") else {}),
        **({"attn_implementation": model["attn_implementation"]} if model.get("attn_implementation") else {}),
        "dtype": "auto" if model.get("dtype", "auto") == "auto" else model["dtype"],
        **({"load_in_4bit": True} if model.get("load_in_4bit") else {}),
        "use_peft": True,
        "lora_r": best.h.lora_r,
        "lora_alpha": whole_alpha(best),
        "lora_dropout": best.h.lora_dropout,
        "lora_target_modules": [best.targets] if isinstance(best.targets, str) else best.targets,
        "use_rslora": best.h.use_rslora,
        **_trl_sources(best),
        **shown,
        "max_length": data.get("max_length", 512),
        "gradient_checkpointing": bool(best.section("training").get("gradient_checkpointing", False)),
        **transformers_arguments(best),
    }
    for source in best.sources:
        if best.columns(source):
            best.notes.append(f"{source['given']}: trl reads no columns of other names; rename {best.columns(source)}")
    return {destination: recipe_text(best, content, "trl sft --config"), **beside}


def _trl_shown(best: BestSettings, destination: Path) -> tuple[dict[str, Any], dict[Path, str]]:
    """(fields that show the rows as the study did and score the answers alone, a template's file beside); TRL 1's names."""
    formats = {best.format(source) for source in best.sources}
    prompt = best.record.prompt
    its = "its own template" if prompt.get("template") else f"the prompt {prompt.get('kind')}"
    if formats and not formats & {*TALKS, ""}:
        if "text" in formats:
            best.notes.append("trl scores all of a plain text: write the rows as prompt and completion to score the answers alone")
        if others := sorted(formats - {"prompt_completion", "text"}):
            best.notes.append(f"trl reads no rows of the format {', '.join(others)}: write them as prompt and completion")
        best.notes.append(f"trl shows a prompt and completion of text as they stand, the study showed them by {its}: write it into them")
        return ({} if formats == {"text"} else {"completion_only_loss": True}), {}
    if "" in formats:
        best.notes.append("for rows of prompt and completion write completion_only_loss for assistant_only_loss, which is for messages")
    wanted = "assistant_only_loss needs {% generation %} around the answers in the chat template"
    if prompt.get("kind") == "chat" and not prompt.get("template"):
        if "generation" not in tokenizers_template(best.record):
            best.notes.append(f"{wanted}; trl has such templates of some model families, else give yours as chat_template_path")
        return {"assistant_only_loss": True}, {}
    template = chat_template(best.record, tagged=True)
    if not template:
        best.notes.append(f"the study showed rows by {its}: give chat_template_path a template that does; {wanted}")
        return {"assistant_only_loss": True}, {}
    path = destination.absolute().with_suffix(".jinja")
    best.notes.append(f"{path.name} shows messages as the study did, by {its}; a tokenizer may join text across an answer's start")
    if "generation" not in template:
        best.notes.append(f"{wanted}: write it into {path.name}")
    return {"assistant_only_loss": True, "chat_template_path": str(path)}, {path: template}


def _trl_sources(best: BestSettings) -> dict[str, Any]:
    """Training and validation data: of one hub data set its splits, of others the share that is held out."""
    sources = {"datasets": [_trl_data(source) for source in best.sources]}
    if best.held_out is not None:
        best.tell_of_validation("trl")
        return sources | {"test_split_size": best.held_out, "eval_strategy": "epoch"}
    one, other = (best.sources[0], best.validation[0]) if len(best.sources) == len(best.validation) == 1 else ({}, {})
    if one and one["path"] == other["path"] and not builder(str(one["path"])):
        best.tell_of_validation("trl")
        names = {"dataset_train_split": one.get("split") or "train", "dataset_test_split": other.get("split") or "train"}
        return {"dataset_name": str(one["path"]), **names, "eval_strategy": "epoch"}
    if best.validation:
        paths = ", ".join(str(source["given"]) for source in best.validation)
        best.notes.append(f"trl reads no validation files ({paths}): it validates on a share of the training data, or not at all")
    return sources


def _trl_data(source: Mapping[str, Any]) -> dict[str, Any]:
    path = str(source["path"])
    kind = builder(path)
    split = {"split": source["split"]} if source.get("split") else {}
    return {"path": kind, "data_files": path} if kind else {"path": path, **split}


def _axolotl(best: BestSettings, destination: Path) -> dict[Path, str]:
    model, data, training = best.section("model"), best.section("data"), best.section("training")
    four = bool(model.get("load_in_4bit"))
    if best.h.loraplus_lr_ratio != 1:
        extra: dict[str, Any] = {"loraplus_lr_ratio": best.h.loraplus_lr_ratio}
    else:
        extra = {}
    content = {
        "base_model": best.base,
        **({"revision_of_model": model["revision"]} if model.get("revision") else {}),
        "adapter": "qlora" if four else "lora",
        **({"load_in_4bit": True} if four else {}),
        "lora_r": best.h.lora_r,
        "lora_alpha": whole_alpha(best),
        "lora_dropout": best.h.lora_dropout,
        **({"lora_target_linear": True} if best.targets == "all-linear" else {"lora_target_modules": best.targets}),
        **({"peft_use_rslora": True} if best.h.use_rslora else {}),
        **extra,
        "datasets": [_axolotl_data(best, source) for source in best.sources],
        **_axolotl_validation(best),
        **_axolotl_template(best),
        "sequence_len": data.get("max_length", 512),
        "micro_batch_size": best.micro,
        "gradient_accumulation_steps": best.h.batch_size // best.micro,
        "num_epochs": best.h.epochs,
        "learning_rate": best.h.learning_rate,
        "lr_scheduler": SCHEDULERS.get(training.get("lr_scheduler_type", "cosine"), training.get("lr_scheduler_type", "cosine")),
        "warmup_ratio": best.h.warmup_ratio,
        "optimizer": "adamw_torch",
        "weight_decay": best.h.weight_decay,
        "max_grad_norm": training.get("max_grad_norm", 1.0) or 0.0,
        "bf16": "auto",
        "gradient_checkpointing": bool(training.get("gradient_checkpointing", False)),
        "train_on_inputs": False,
        "seed": best.record.spec.get("seed", 0),
        "output_dir": f"./{best.record.name}",
    }
    return {destination: recipe_text(best, content, "axolotl train")}


def _axolotl_validation(best: BestSettings) -> dict[str, Any]:
    best.tell_of_validation("axolotl")
    if best.held_out is not None:
        return {"val_set_size": best.held_out, "eval_strategy": "epoch"}
    entries = [_axolotl_data(best, source) for source in best.validation]  # of a file the one split that it has must be named
    tests = [{"split": "train", **entry} for entry in entries]
    return {"test_datasets": tests, "eval_strategy": "epoch"} if tests else {}


def _axolotl_template(best: BestSettings) -> dict[str, Any]:
    """How messages are shown, where that is not by the tokenizer's own chat template."""
    if not any(best.format(source) in TALKS for source in best.sources):
        return {}
    if template := chat_template(best.record):
        return {"chat_template": "jinja", "chat_template_jinja": template}
    if best.record.prompt.get("kind") != "chat" or best.record.prompt.get("template"):
        best.notes.append("the study showed messages by a prompt of its own: give chat_template_jinja one that does")
    return {}


def _axolotl_data(best: BestSettings, source: Mapping[str, Any]) -> dict[str, Any]:
    path, columns = str(source["path"]), best.columns(source)
    kind = builder(path)
    found: dict[str, Any] = {"path": path, **({"ds_type": kind} if kind else {})}
    if source.get("split"):
        found["split"] = source["split"]
    if best.record.prompt.get("kind") == "chat" or best.format(source) in TALKS:
        if source.get("format") in ("alpaca", "dolly", "prompt_completion") or columns.keys() & {"instruction", "prompt"}:
            best.notes.append(f"{source['given']}: axolotl's chat_template reads messages; write these rows as messages")
        names = {"role": "from", "content": "value"} if best.format(source) == "sharegpt" else {}
        field = columns.get("messages") or ("conversations" if names else "messages")
        return found | {"type": "chat_template", "field_messages": field, **({"message_property_mappings": names} if names else {})}
    fields = {f"field_{name}": columns[name] for name in ("instruction", "input", "output") if name in columns}
    if not fields:
        return found | {"type": "alpaca"}
    plain = {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}
    return found | {"type": {**plain, **fields, "format": _ALPACA[0], "no_input_format": _ALPACA[1]}}


_ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:",
)


def _llamafactory(best: BestSettings, destination: Path) -> dict[Path, str]:
    model, data = best.section("model"), best.section("data")
    info, names = _dataset_info(best, [*best.sources, *best.validation])
    names, tests = names[: len(best.sources)], names[len(best.sources) :]
    best.tell_of_validation("LLaMA-Factory")
    chat = best.record.prompt.get("kind") == "chat"
    if chat:
        best.notes.append("template: LLaMA-Factory has templates of its own; write the name of your model's for `default`")
    kernels = {"flash_attention_2": "fa2", "sdpa": "sdpa", "eager": "disabled"}
    content = {
        "model_name_or_path": best.base,
        **({"model_revision": model["revision"]} if model.get("revision") else {}),
        **({"flash_attn": kernels[model["attn_implementation"]]} if model.get("attn_implementation") in kernels else {}),
        **({"quantization_bit": 4} if model.get("load_in_4bit") else {}),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": best.h.lora_r,
        "lora_alpha": whole_alpha(best),
        "lora_dropout": best.h.lora_dropout,
        "lora_target": "all" if best.targets == "all-linear" else ",".join(best.targets),
        **({"use_rslora": True} if best.h.use_rslora else {}),
        **({"loraplus_lr_ratio": best.h.loraplus_lr_ratio} if best.h.loraplus_lr_ratio != 1 else {}),
        "dataset": ",".join(names),
        "dataset_dir": str(destination.parent.absolute()),
        "template": "default" if chat else "alpaca",
        "cutoff_len": data.get("max_length", 512),
        **({"eval_dataset": ",".join(tests)} if tests else {}),
        **({"val_size": best.held_out} if best.held_out is not None else {}),
        **({"eval_strategy": "epoch"} if tests or best.held_out is not None else {}),
        **transformers_arguments(best),
    }
    beside = destination.parent / "dataset_info.json"
    return {destination: recipe_text(best, content, "llamafactory-cli train"), beside: json.dumps(info, indent=2) + "\n"}


def _dataset_info(best: BestSettings, sources: list[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """(dataset_info.json, the name there of each source)."""
    info: dict[str, Any] = {}
    for source in sources:
        path, columns = str(source["path"]), best.columns(source)
        name = Path(path).stem.replace(",", "-")
        while name in info:
            name += "-2"
        place = {"file_name": str(Path(path).resolve())} if Path(path).exists() or builder(path) else {"hf_hub_url": path}
        place |= {"split": source["split"]} if source.get("split") and "hf_hub_url" in place else {}
        theirs = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
        kind = best.format(source)
        if kind in TALKS or (not kind and best.record.prompt.get("kind") == "chat"):
            field = columns.get("messages") or ("conversations" if kind == "sharegpt" else "messages")
            tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
            roles = {} if kind == "sharegpt" else {"tags": tags}
            info[name] = {**place, "formatting": "sharegpt", "columns": {"messages": field}, **roles}
        else:
            named = {tool: columns[ours] for tool, ours in theirs.items() if ours in columns}
            response = {"response": columns.get("response", "response")} if kind == "dolly" or "response" in columns else {}
            info[name] = {**place, **({"columns": {**named, **response}} if named or response else {})}
    return info, list(info)


FORMS: dict[str, Callable[[BestSettings, Path], dict[Path, str]]] = {
    "trl": _trl,
    "axolotl": _axolotl,
    "llamafactory": _llamafactory,
    "peft": _peft,
}


def _training(h: Hyperparameters) -> dict[str, float]:
    names = ("learning_rate", "batch_size", "epochs", "warmup_ratio", "weight_decay")
    return {name: getattr(h, name) for name in names}
