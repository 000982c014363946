"""An adapter as a folder of its own: an ordinary PEFT folder, or the base model with the adapter merged in.

The exported folder needs nothing of loratune:

    base = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf")
    model = PeftModel.from_pretrained(base, "exported/")
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratune.data.prompts import alpaca_chat_template, answer_ends, as_chat_template, end_ids, is_template
from loratune.errors import ModelError
from loratune.record.paths import ADAPTER_CONFIG, ADAPTER_FILES
from loratune.system.files import new_folder
from loratune.work import ModelRecipe


def export_adapter(adapter: Path, destination: Path, card: str) -> Path:
    """Copy the PEFT folder `adapter` to `destination`, `card` as its README.md; returns `destination`.

    Whether the adapter is the one that was trained, `reload.check_adapter` says. Raises ModelError for a folder that holds no adapter and
    StorageError when `destination` cannot be written.
    """
    _adapter_config(adapter)
    with new_folder(destination) as fresh:
        for name in ADAPTER_FILES:
            shutil.copyfile(adapter / name, fresh / name)
        (fresh / "README.md").write_text(card, encoding="utf-8")
    return destination


def merge(
    recipe: ModelRecipe,
    adapter: Path,
    destination: Path,
    card: str,
    *,
    data: Path | None = None,
    prompt: str = "chat",
) -> Path:
    """Write the base model with the adapter added to its weights, W + scale * B A, and its tokenizer; returns `destination`.

    prompt: what the adapter was trained with. After `alpaca` a chat template, where the tokenizer has one, is replaced by one that
    writes Alpaca's prompt, after a template of the user's own by that; after `chat` generation stops at what the template ends an
    answer with.
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
    some = reload.loss_sample(data, base.model.config.get_text_config().vocab_size).tokens
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    expected = reload.with_deltas(base.model, reload.weights(adapter), scale, some)
    try:
        merged = reload.load_adapter(base.model, adapter).merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{adapter} cannot be merged into {recipe.name_or_path}: {error}") from error
    exact = merged.dtype in (torch.float32, torch.float64)
    _fit(merged, base.tokenizer, prompt)
    tokenizer, held = base.tokenizer, [merged]
    del base, merged

    with new_folder(destination) as fresh:
        with model.without_progress_bar():
            held.pop().save_pretrained(str(fresh))  # the last reference: a model of billions stands in memory once
        tokenizer.save_pretrained(str(fresh))
        (fresh / "README.md").write_text(card, encoding="utf-8")
        _by_umask(fresh, fresh / "README.md")
        memory.free(cpu)
        again = model.load_network(replace(plain, name_or_path=str(fresh), revision=None), cpu, silent=False)
        found = reload.exact_loss(again, again, some)
        reload.compare_losses(destination, found, "plain Transformers, merged", expected, "the adapter on its base model", exact=exact)
    return destination


def _by_umask(folder: Path, usual: Path) -> None:
    """Give every file the mode of `usual`, which the umask gave it: safetensors makes its own readable by their owner alone."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(usual.stat().st_mode & 0o777)


def _fit(model: Any, tokenizer: Any, prompt: str) -> None:
    """Make a chat interface show the model what it was trained with, and `generate` stop where it was taught to."""
    own = is_template(prompt)
    if own:
        tokenizer.chat_template = as_chat_template(prompt, tokenizer)
    if prompt == "alpaca" and tokenizer.chat_template:
        tokenizer.chat_template = alpaca_chat_template(tokenizer)
    elif (own or prompt == "chat") and tokenizer.chat_template and model.generation_config is not None:
        model.generation_config.eos_token_id = sorted(answer_ends(tokenizer) | end_ids(model.generation_config.eos_token_id))


def _adapter_config(adapter: Path) -> dict[str, Any]:
    missing = [name for name in ADAPTER_FILES if not (adapter / name).is_file()]
    if missing:
        raise ModelError(f"{adapter} holds no adapter: {' and '.join(missing)} missing. Give the `adapter` folder of a completed trial.")
    try:
        config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{adapter / ADAPTER_CONFIG} cannot be read: {error}") from error
    return dict(config)
