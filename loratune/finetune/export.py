"""Handing an adapter over: an ordinary PEFT folder with a model card, or the base model with the adapter merged in.

The exported folder needs nothing of loratune:

    base = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf")
    model = PeftModel.from_pretrained(base, "exported/")
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loratune.errors import ModelError, StorageError
from loratune.finetune.prompts import alpaca_chat_template, answer_ends, listed
from loratune.work import ModelRecipe

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_adapter(adapter: Path, destination: Path, card: Mapping[str, Any] | str) -> Path:
    """Copy the PEFT folder `adapter` to `destination` and write its README.md; returns `destination`.

    `card` is the whole model card, or facts to put in a table under a standard head. An earlier export is
    replaced; anything else that stands there is not. Raises ModelError for a folder that holds no adapter and
    StorageError when `destination` cannot be written.
    """
    config = _adapter_config(adapter)

    def fill(folder: Path) -> None:
        for name in (_CONFIG, _WEIGHTS):
            shutil.copyfile(adapter / name, folder / name)
        (folder / "README.md").write_text(card if isinstance(card, str) else model_card(config, card))

    return _install(fill, destination, mark=_CONFIG)


def merge(recipe: ModelRecipe, adapter: Path, destination: Path, card: Mapping[str, Any] | str, *, prompt: str = "chat") -> Path:
    """Write the base model with the adapter added to its weights, W + scale * B A, and its tokenizer; returns `destination`.

    prompt: what the adapter was trained with. After `alpaca` a chat template, where the tokenizer has one, is replaced by one that
    writes Alpaca's prompt; after `chat` generation stops at what the template ends an answer with.
    Works on CPU in the recipe's dtype (float32 for `auto`), on unquantised weights. Raises as `export_adapter`, and
    ModelError when the base model cannot be loaded or the sum is not finite.
    """
    import peft

    from loratune.finetune import model

    config = _adapter_config(adapter)
    base = model.load(replace(recipe, load_in_4bit=False), torch.device("cpu"), silent=False)
    try:
        merged = peft.PeftModel.from_pretrained(base.model, str(adapter)).merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{adapter} cannot be merged into {recipe.name_or_path}: {error}") from error

    _fit(merged, base.tokenizer, prompt)

    def fill(folder: Path) -> None:
        merged.save_pretrained(str(folder))
        base.tokenizer.save_pretrained(str(folder))
        (folder / "README.md").write_text(card if isinstance(card, str) else model_card(config, card, merged=True))

    return _install(fill, destination, mark="config.json")


def _fit(model: Any, tokenizer: Any, prompt: str) -> None:
    """Make a chat interface show the model what it was trained with, and `generate` stop where it was taught to."""
    if prompt == "alpaca" and tokenizer.chat_template:
        tokenizer.chat_template = alpaca_chat_template(tokenizer)
    elif prompt == "chat" and tokenizer.chat_template and model.generation_config is not None:
        model.generation_config.eos_token_id = sorted(answer_ends(tokenizer) | listed(model.generation_config.eos_token_id))


def model_card(config: Mapping[str, Any], facts: Mapping[str, Any], *, merged: bool = False) -> str:
    """A model card in the hub's format: YAML head, how to load it, the facts as a table."""
    base = config.get("base_model_name_or_path") or "the base model"
    head = ["---", "library_name: " + ("transformers" if merged else "peft"), "tags: [lora, loratune]", "pipeline_tag: text-generation"]
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):
        head.append(f"base_model: {base}")  # the hub refuses local paths here
    load = (
        'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("this folder")'
        if merged
        else "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(base, "this folder")'
    )
    own = {"base model": base, **{k: config[k] for k in ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules") if k in config}}
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in {**own, **facts}.items()]
    what = "Base model with a LoRA adapter merged in" if merged else "LoRA adapter"
    lines = [*head, "---", "", f"# {what}", "", "Hyperparameters found by loratune.", "", "```python", load, "```", ""]
    return "\n".join([*lines, "| | |", "|---|---|", *rows, ""])


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _adapter_config(adapter: Path) -> dict[str, Any]:
    missing = [name for name in (_CONFIG, _WEIGHTS) if not (adapter / name).is_file()]
    if missing:
        raise ModelError(f"{adapter} holds no adapter: {' and '.join(missing)} missing. Give the `adapter` folder of a completed trial.")
    try:
        config = json.loads((adapter / _CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{adapter / _CONFIG} cannot be read: {error}") from error
    return dict(config)


def _install(fill: Callable[[Path], None], destination: Path, *, mark: str) -> Path:
    """Fill a folder aside and put it in place of `destination`, which may be absent, empty, or an earlier one (`mark`)."""
    if destination.exists() and (not destination.is_dir() or (any(destination.iterdir()) and not (destination / mark).is_file())):
        raise StorageError(f"{destination} exists and is not an earlier export; nothing was written. Give another folder.")
    aside: Path | None = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}."))
        fill(aside)
        os.chmod(aside, 0o755)
        if destination.exists():
            shutil.rmtree(destination)
        aside.replace(destination)
    except OSError as error:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        raise StorageError(f"cannot write {destination}: {error}") from error
    return destination
