"""The best settings of a study as a recipe of another tool, or as PEFT's configuration."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from loratune.delivery.handover import chosen_trial
from loratune.delivery.recipes.shown_rows import TALKS, builder, chat_template, place, row_format, tokenizers_template
from loratune.errors import SpecError, StorageError
from loratune.record import StudyRecord, Trial, read
from loratune.record.adapters import find_adapter
from loratune.record.paths import ADAPTER_CONFIG
from loratune.report.tables import headline
from loratune.system.files import AnyPath, write_atomically
from loratune.system.formatting import plural
from loratune.work import Hyperparameters

if TYPE_CHECKING:
    from loratune.selection import SelectionRecord

_LLAMA = {
    "qv": ["q_proj", "v_proj"],
    "qkvo": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}
_SCHEDULERS = {"constant": "constant_with_warmup"}  # ours warms up


@dataclass(frozen=True, kw_only=True)
class _Best:
    """What a recipe is made of."""

    record: StudyRecord
    trial: Trial
    h: Hyperparameters
    targets: str | list[str]  # all-linear, or the names of modules
    notes: list[str]
    selection: "SelectionRecord | None" = None

    @property
    def base(self) -> str:
        """The base model's absolute path or hub id."""
        return place(self.record, str(self.section("model").get("name_or_path")))

    def section(self, name: str) -> Mapping[str, Any]:
        found = self.record.spec.get(name)
        return found if isinstance(found, Mapping) else {}

    @property
    def alpha(self) -> int | float:
        """Whole where it can be: these tools' lora_alpha is a whole number."""
        return int(self.h.lora_alpha) if self.h.lora_alpha == int(self.h.lora_alpha) else self.h.lora_alpha

    @property
    def micro(self) -> int:
        """The largest batch per pass, up to the study's, that divides the batch of a step."""
        most = int(self.section("training").get("micro_batch_size", 4))
        return next(size for size in range(min(most, self.h.batch_size), 0, -1) if self.h.batch_size % size == 0)

    @property
    def sources(self) -> list[Mapping[str, Any]]:
        return self._of("train")

    @property
    def validation(self) -> list[Mapping[str, Any]]:
        """The files of validation data; empty where it is held out of the training data."""
        return self._of("validation")

    def _of(self, role: str) -> list[Mapping[str, Any]]:
        found = [source for source in self.section("data").get(role) or [] if isinstance(source, Mapping)]
        return [{**source, "given": source["path"], "path": place(self.record, str(source["path"]))} for source in found]

    @property
    def held_out(self) -> float | int | None:
        """The share, below 1, or the number of the training examples that the study held out."""
        data, each = self.section("data"), [source.get("validation_count") for source in self.sources]
        if self.validation:
            return None
        if data.get("validation_fraction") is not None:
            return float(data["validation_fraction"])
        return data.get("validation_count") or sum(count for count in each if count) or None

    def tell_of_validation(self, tool: str) -> None:
        """What is not the same of the validation data in a recipe that holds their files, or their share."""
        if self.held_out is not None:
            self.notes.append(f"{tool} draws as many rows for validation as the study, but other ones, and not from each source its part")
        elif self.section("data").get("validation_count") or any(source.get("count") for source in self.validation):
            self.notes.append(f"{tool} validates on all rows of the validation data, of which the study drew some")

    def format(self, source: Mapping[str, Any]) -> str:
        return row_format(self.record, source, self.columns(source))

    def columns(self, source: Mapping[str, Any]) -> dict[str, str]:
        return {**(self.section("data").get("columns") or {}), **(source.get("columns") or {})}


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
    targets = _targets(record, found, notes)
    best = _Best(record=record, trial=found, h=found.hyperparameters, targets=targets, notes=notes, selection=selection)
    others = FORMS[form](best, destination)
    for path in others:
        if path.exists():
            raise StorageError(f"{path} exists. Choose another destination.")
    for path, text in others.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    return destination, tuple(notes)


# ---- one form each ----


def _peft(best: _Best, destination: Path) -> dict[Path, str]:
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


def _trl(best: _Best, destination: Path) -> dict[Path, str]:
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
        "lora_alpha": _whole_alpha(best),
        "lora_dropout": best.h.lora_dropout,
        "lora_target_modules": [best.targets] if isinstance(best.targets, str) else best.targets,
        "use_rslora": best.h.use_rslora,
        **_trl_sources(best),
        **shown,
        "max_length": data.get("max_length", 512),
        "gradient_checkpointing": bool(best.section("training").get("gradient_checkpointing", False)),
        **_transformers(best),
    }
    for source in best.sources:
        if best.columns(source):
            best.notes.append(f"{source['given']}: trl reads no columns of other names; rename {best.columns(source)}")
    return {destination: _yaml(best, content, "trl sft --config"), **beside}


def _trl_shown(best: _Best, destination: Path) -> tuple[dict[str, Any], dict[Path, str]]:
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


def _trl_sources(best: _Best) -> dict[str, Any]:
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


def _axolotl(best: _Best, destination: Path) -> dict[Path, str]:
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
        "lora_alpha": _whole_alpha(best),
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
        "lr_scheduler": _SCHEDULERS.get(training.get("lr_scheduler_type", "cosine"), training.get("lr_scheduler_type", "cosine")),
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
    return {destination: _yaml(best, content, "axolotl train")}


def _axolotl_validation(best: _Best) -> dict[str, Any]:
    best.tell_of_validation("axolotl")
    if best.held_out is not None:
        return {"val_set_size": best.held_out, "eval_strategy": "epoch"}
    entries = [_axolotl_data(best, source) for source in best.validation]  # of a file the one split that it has must be named
    tests = [{"split": "train", **entry} for entry in entries]
    return {"test_datasets": tests, "eval_strategy": "epoch"} if tests else {}


def _axolotl_template(best: _Best) -> dict[str, Any]:
    """How messages are shown, where that is not by the tokenizer's own chat template."""
    if not any(best.format(source) in TALKS for source in best.sources):
        return {}
    if template := chat_template(best.record):
        return {"chat_template": "jinja", "chat_template_jinja": template}
    if best.record.prompt.get("kind") != "chat" or best.record.prompt.get("template"):
        best.notes.append("the study showed messages by a prompt of its own: give chat_template_jinja one that does")
    return {}


def _axolotl_data(best: _Best, source: Mapping[str, Any]) -> dict[str, Any]:
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


def _llamafactory(best: _Best, destination: Path) -> dict[Path, str]:
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
        "lora_alpha": _whole_alpha(best),
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
        **_transformers(best),
    }
    beside = destination.parent / "dataset_info.json"
    return {destination: _yaml(best, content, "llamafactory-cli train"), beside: json.dumps(info, indent=2) + "\n"}


def _dataset_info(best: _Best, sources: list[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
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


FORMS: dict[str, Callable[[_Best, Path], dict[Path, str]]] = {
    "trl": _trl,
    "axolotl": _axolotl,
    "llamafactory": _llamafactory,
    "peft": _peft,
}


# ---- parts ----


def _transformers(best: _Best) -> dict[str, Any]:
    """Fields of Transformers' TrainingArguments, as of 5: a warmup below 1 is a share of the steps."""
    training = best.section("training")
    kind = training.get("lr_scheduler_type", "cosine")
    return {
        "per_device_train_batch_size": best.micro,
        "gradient_accumulation_steps": best.h.batch_size // best.micro,
        "num_train_epochs": best.h.epochs,
        "learning_rate": best.h.learning_rate,
        "lr_scheduler_type": _SCHEDULERS.get(kind, kind),
        "warmup_steps": best.h.warmup_ratio,
        "weight_decay": best.h.weight_decay,
        "max_grad_norm": training.get("max_grad_norm", 1.0) or 0.0,
        "optim": "adamw_torch",
        "seed": best.record.spec.get("seed", 0),
        "output_dir": f"./{best.record.name}",
    }


def _training(h: Hyperparameters) -> dict[str, float]:
    names = ("learning_rate", "batch_size", "epochs", "warmup_ratio", "weight_decay")
    return {name: getattr(h, name) for name in names}


def _whole_alpha(best: _Best) -> int:
    if best.alpha != int(best.alpha):
        best.notes.append(f"lora_alpha {best.alpha:g} is written as {round(best.alpha)}: the tool wants a whole number")
    return max(1, round(best.alpha))


def _targets(record: StudyRecord, trial: Trial, notes: list[str]) -> str | list[str]:
    """all-linear by that name, other layers by their modules' names, as the trial's adapter has them."""
    given = trial.hyperparameters.target_modules
    if given == "all-linear":
        return given
    if not isinstance(given, str):
        return list(given)
    adapter = find_adapter(record, trial, handed_over=True)
    if adapter is not None:
        found = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("target_modules")
        if isinstance(found, list):
            return sorted({str(name).rpartition(".")[2] for name in found})
    notes.append(f"target_modules {given} by LLaMA's names, as the trial's adapter is not on disk: check them for your model")
    return _LLAMA[given]


def _loss(best: _Best) -> str:
    """The validation loss that no choice flatters, where a selection measured it."""
    unbiased = best.selection.unbiased if best.selection is not None else None
    if best.selection is None or unbiased is None:
        return "" if best.trial.value is None else f", validation loss {best.trial.value:.4f} in the study"
    gain = f"; gain {unbiased.gain:.4f} over {headline(best.record).against}" if unbiased.gain else ""
    return f", validation loss {unbiased.chosen:.4f} with {plural(best.selection.fresh_seeds, 'fresh seed')}{gain}"


def _yaml(best: _Best, content: Mapping[str, Any], command: str) -> str:
    head = f"# The settings of trial {best.trial.number} of the study {best.record.name}{_loss(best)}. Use: {command} THIS_FILE\n"
    notes = "".join(f"# {note}\n".replace("\n# ", " ") for note in best.notes)
    return head + notes + yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes 2e-05 as 2.0e-05: YAML 1.1 reads the other as text."""


def _number(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    text = repr(value)
    mantissa, found, exponent = text.partition("e")
    text = f"{mantissa}{'' if '.' in mantissa else '.0'}e{exponent}" if found else text
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _number)
