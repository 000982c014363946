"""Handing an adapter over: an ordinary PEFT folder with a model card, or the base model with the adapter merged in.

The exported folder needs nothing of loratune:

    base = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf")
    model = PeftModel.from_pretrained(base, "exported/")
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratune.data.prompts import alpaca_chat_template, answer_ends, end_ids
from loratune.errors import ModelError, StorageError
from loratune.system.files import new_folder
from loratune.work import ModelRecipe

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_adapter(
    adapter: Path, destination: Path, card: Mapping[str, Any] | str, *, options: Mapping[str, Any] | None = None, chat_end: str = ""
) -> Path:
    """Copy the PEFT folder `adapter` to `destination` and write its README.md; returns `destination`.

    `card` is the whole model card, or facts to put in a table under a standard head; `options` are what the base model is to be
    loaded with beside its revision; `chat_end` as of `chat_lines`. Whether the adapter is what was trained, `reloaded.check`
    says. An earlier export is replaced; anything else that stands there is not. Raises ModelError for a folder that holds no
    adapter and StorageError when `destination` cannot be written.
    """
    config = _adapter_config(adapter)

    def fill(folder: Path) -> None:
        for name in (_CONFIG, _WEIGHTS):
            shutil.copyfile(adapter / name, folder / name)
        (folder / "README.md").write_text(card if isinstance(card, str) else model_card(config, card, options=options, chat_end=chat_end))

    return _install(fill, destination, mark=_CONFIG)


def merge(
    recipe: ModelRecipe,
    adapter: Path,
    destination: Path,
    card: Mapping[str, Any] | str,
    *,
    data: Path | None = None,
    prompt: str = "chat",
) -> Path:
    """Write the base model with the adapter added to its weights, W + scale * B A, and its tokenizer; returns `destination`.

    prompt: what the adapter was trained with. After `alpaca` a chat template, where the tokenizer has one, is replaced by one that
    writes Alpaca's prompt; after `chat` generation stops at what the template ends an answer with.
    Works on CPU in the recipe's dtype (float32 for `auto`), on unquantised weights. The folder is loaded by plain Transformers and
    its loss compared with the adapter's on some examples of `data`, the study's prepared data, before it stands at `destination`.
    Raises as `export_adapter`, and ModelError when the base model cannot be loaded, the sum is not finite, or the loss is another.
    """
    import torch

    from loratune.delivery import reload
    from loratune.finetune import memory, model

    config, cpu = _adapter_config(adapter), torch.device("cpu")
    plain = replace(recipe, load_in_4bit=False)
    base = model.load(plain, cpu, silent=False)
    some = reload.sample(data, base.model.config.get_text_config().vocab_size).tokens
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    expected = reload.with_deltas(base.model, reload.weights(adapter), scale, some)
    try:
        merged = reload.load(base.model, adapter).merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{adapter} cannot be merged into {recipe.name_or_path}: {error}") from error
    exact = merged.dtype in (torch.float32, torch.float64)
    _fit(merged, base.tokenizer, prompt)
    tokenizer, held = base.tokenizer, [merged]
    del base, merged

    def fill(folder: Path) -> None:
        held.pop().save_pretrained(str(folder))  # the last reference: a model of billions stands in memory once
        tokenizer.save_pretrained(str(folder))
        (folder / "README.md").write_text(card if isinstance(card, str) else model_card(config, card, merged=True))
        memory.free(cpu)
        again = model.load_network(replace(plain, name_or_path=str(folder), revision=None), cpu, silent=False)
        found = reload.loss(again, again, some)
        reload.compare(destination, found, "plain Transformers, merged", expected, "the adapter on its base model", exact=exact)

    return _install(fill, destination, mark="config.json")


def _fit(model: Any, tokenizer: Any, prompt: str) -> None:
    """Make a chat interface show the model what it was trained with, and `generate` stop where it was taught to."""
    if prompt == "alpaca" and tokenizer.chat_template:
        tokenizer.chat_template = alpaca_chat_template(tokenizer)
    elif prompt == "chat" and tokenizer.chat_template and model.generation_config is not None:
        model.generation_config.eos_token_id = sorted(answer_ends(tokenizer) | end_ids(model.generation_config.eos_token_id))


def chat_lines(base: str, revision: str | None, end: str) -> list[str]:
    """Python that asks `model`, the adapter on its base, through the base's chat template; none where `end` is empty.

    end: the token that ends an answer. It is named because a base model's generation config often lacks the token that its
    template ends turns with, and `generate` would write on behind it.
    """
    if not end:
        return []
    at = f", revision={json.dumps(revision)}" if revision else ""
    return [
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(base)}{at})",
        'messages = [{"role": "user", "content": "Name the opposite of sour."}]',
        'given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
        f"end = tokenizer.convert_tokens_to_ids({json.dumps(end)})  # ends an answer; stop there",
        'answer = model.generate(given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=256, eos_token_id=end)',
        'print(tokenizer.decode(answer[0, given["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def model_card(
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    merged: bool = False,
    options: Mapping[str, Any] | None = None,
    chat_end: str = "",
) -> str:
    """A model card in the hub's format: YAML head, how to load it, the facts as a table.

    options: what the base is loaded with. chat_end: as of `chat_lines`.
    """
    base, revision = config.get("base_model_name_or_path") or "the base model", config.get("revision")
    head = ["---", "library_name: " + ("transformers" if merged else "peft"), "tags: [lora, loratune]", "pipeline_tag: text-generation"]
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):
        head.append(f"base_model: {base}")  # the hub refuses local paths here
    wanted = ({"revision": revision} if revision else {}) | dict(options or {})
    given = "".join(f", {name}={json.dumps(value) if isinstance(value, str) else value}" for name, value in wanted.items())
    load = (
        'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("this folder")'
        if merged
        else f"from peft import PeftModel\nfrom transformers import AutoModelForCausalLM{', AutoTokenizer' if chat_end else ''}\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}"{given})\nmodel = PeftModel.from_pretrained(base, "this folder")'
    )
    if not merged:  # whose own generation config stops there
        load = "\n".join([load, *chat_lines(base, revision, chat_end)])
    own = {"base model": base} | ({"revision of the base model": revision} if revision else {})
    own |= {k: config[k] for k in ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules") if k in config}
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
    try:
        with new_folder(destination) as fresh:
            fill(fresh)
    except OSError as error:
        raise StorageError(f"cannot write {destination}: {error}") from error
    return destination
