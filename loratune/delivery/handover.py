"""The hand-over: the chosen configuration as a file, its adapter as an ordinary PEFT folder with a model card.

Chosen is what `loratune select` chose, as long as the study did not go on since; before that, the lowest validation loss.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from loratune.delivery.verify import as_measured
from loratune.errors import StorageError, TrainingError
from loratune.record import StudyRecord, Trial
from loratune.record.adapters import find_adapter
from loratune.record.paths import MAIN, StudyPaths
from loratune.report import spec_summary, tables
from loratune.system.files import AnyPath, new_folder, write_atomically
from loratune.system.formatting import count, duration, loss, perplexity, plural, show, signed
from loratune.system.machine import version_of_loratune

if TYPE_CHECKING:
    from loratune.selection import SelectionRecord


Check = Callable[[StudyRecord, Trial, Path], None]


def hand_over(record: StudyRecord, folder: AnyPath, check: Check | None = as_measured) -> tuple[Path, Path | None]:
    """Write `best.yaml` and `adapter/` of the study's chosen trial into `folder`; returns their paths.

    An adapter of an earlier call is replaced once the new one is complete. A study that was told to keep
    no adapters (`output.keep_adapters: none`) hands over `best.yaml` alone, and None for the adapter.
    check: what raises unless the adapter is what was measured; None: nothing does.
    Raises TrainingError when no trial was trained to the end, StorageError when its adapter is missing, and what `check` raises,
    with nothing written.
    """
    folder, found, selection = Path(folder), tables.answer(record), selection_of(record)
    if selection is not None:
        found = replace(found, best=selection.trial_of(record))
    if found.best is None:
        raise TrainingError(
            f"{record.name} has no trial that was trained to the end, so there is nothing to hand over. "
            f"See what became of them with `loratune status {record.folder}`."
        )
    source = find_adapter(record, found.best, selection.shipped.run if selection else MAIN)
    adapter: Path | None = StudyPaths(folder).adapter
    if source is not None:
        if check is not None:
            check(record, found.best, source)
        _replace_folder(source, StudyPaths(folder).adapter, {"README.md": model_card(record, found.best, selection)})
    elif record.spec.get("output", {}).get("keep_adapters") == "none":
        adapter = None
    else:
        which = "chosen" if selection else "best"
        raise StorageError(
            f"no adapter of trial {found.best.number}, the {which}, in {record.paths.trials}: it was removed, or training did not "
            f"write it. `loratune select {record.folder}` trains that of its choice again."
        )
    best = StudyPaths(folder).best
    content = _best(record, found, found.best, adapter, selection)
    write_atomically(best, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000))
    return best, adapter


def selection_of(record: StudyRecord) -> "SelectionRecord | None":
    """What `loratune select` chose; None where it did not, or the study went on since."""
    if not (record.paths.selection).is_file():
        return None
    from loratune import selection  # scipy: seconds of import

    made = selection.read(record.folder)
    return made if made is not None and made.holds_for(record) else None


def refresh_card(record: StudyRecord) -> Path | None:
    """Write the card of `adapter/` anew, where that is still the adapter to ship: what was measured since belongs on it."""
    selection = selection_of(record)
    chosen = selection.trial_of(record) if selection is not None else tables.answer(record).best
    best, card = record.paths.best, record.paths.adapter / "README.md"
    if chosen is None or not (best.is_file() and card.is_file()):
        return None
    told = yaml.safe_load(best.read_text(encoding="utf-8"))
    handed = (told["trial"], told["chosen"]["run"] if isinstance(told["chosen"], dict) and "run" in told["chosen"] else None)
    if handed != (chosen.number, selection.shipped.run if selection is not None else None):
        return None
    write_atomically(card, model_card(record, chosen, selection))
    return card


def model_card(record: StudyRecord, best: Trial, selection: "SelectionRecord | None" = None) -> str:
    """The adapter's README.md, with the YAML head that the Hugging Face Hub reads."""
    from loratune.delivery.card import scores_section  # scipy: a second of import
    from loratune.delivery.merge import chat_lines

    found, cost = tables.answer(record), tables.cost(record)
    base, revision = spec_summary.base_model(record), record.spec.get("model", {}).get("revision")
    at = f", revision {_code(revision)}" if revision else ""
    on_hub = is_hub_id(base)
    head: dict[str, Any] = {"base_model": base} if on_hub else {}
    tags = [f"base_model:adapter:{base}"] if on_hub else []
    head |= {"library_name": "peft", "pipeline_tag": "text-generation", "tags": [*tags, "lora", "transformers", "loratune"]}
    # The Hub refuses a card whose base_model is no Hub id, so a local folder is left to the user.
    local = (
        "" if on_hub else f"# The base model was the local folder {_one_line(base)}; add `base_model: <its Hub id>` before you publish.\n"
    )
    told = dict(spec_summary.asked(record))
    asking = chat_lines(base, revision, chat_end(record))
    lines = [
        f"---\n{local}{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {_text(record.name)}",
        f"A LoRA adapter for {_code(base)}{at}, {'chosen from' if selection else 'the best of'} {plural(found.finished, 'configuration')} "
        "that loratune trained and compared.",
        "## Load it",
        "\n".join(
            [
                "```python",
                "from peft import AutoPeftModelForCausalLM",
                *(["from transformers import AutoTokenizer"] if asking else []),
                "",
                f"model = {load_line(record, 'path/to/this/folder')}",
                *asking,
                "```",
            ]
        ),
        "## Validation loss",
        "Mean negative log-likelihood (nats) per response token over the whole validation set.",
        _table(
            ("", "loss", "perplexity", "loss − default"),
            [
                (
                    name,
                    loss(its),
                    perplexity(its),
                    signed(its - found.default_loss) if its is not None and found.default_loss else "–",
                )
                for name, its in (
                    ("this adapter", selection.shipped.validation_loss if selection else best.value),
                    ("default hyperparameters", found.default_loss),
                    ("base model", found.base),
                )
            ],
        ),
        "## Hyperparameters",
        _table(("", "value"), [(f"`{f.name}`", show(getattr(best.hyperparameters, f.name))) for f in fields(best.hyperparameters)]),
        "## Data",
        _table(
            ("", ""),
            [
                (what, _text(told[what]))
                for what in ("Training data", "Validation data", "Examples", "Prompt", "Length", "Training")
                if told.get(what)
            ],
        ),
        "## How it was found",
        f"Sampler {_code(told['Sampler'])}, schedule {_code(told['Schedule'])}, {plural(cost.trials, 'trial')}, "
        f"{count(cost.tokens)} training tokens, {duration(cost.device_seconds)} of device time. "
        f"This is trial {best.number}{_again(selection)}.",
        _fenced(spec_summary.command(record)),
        *scores_section(record, best, selection),
        *(["## Why this one", _why(selection)] if selection else []),
        "## Limits",
        "- The adapter was chosen by the validation loss shown here, which is therefore slightly flattering. It was measured once.\n"
        "- A lower loss on this data is not a better score on any benchmark, and says nothing about safety, bias or facts.\n"
        "- The base model's and the data's licences hold for the adapter too.",
        f"Written by loratune {version_of_loratune()}.",
    ]
    return "\n\n".join(lines) + "\n"


def load_line(record: StudyRecord, folder: str) -> str:
    """The call that loads the adapter on its base model; PEFT knows the model and its revision from the adapter's config."""
    given = "".join(f", {name}={json.dumps(value) if isinstance(value, str) else value}" for name, value in load_options(record).items())
    return f'AutoPeftModelForCausalLM.from_pretrained("{folder}"{given})'


def load_options(record: StudyRecord) -> dict[str, Any]:
    """What the base model is to be loaded with, to be held as the study held it, beside its name and revision."""
    model = record.spec.get("model", {})
    devices = [o.device for trial in record.trials for o in trial.outcomes]
    dtype = model.get("dtype", "auto")
    if dtype == "auto" and devices and all(" CPU" in name for name in devices):
        dtype = "float32"  # whatever the checkpoint holds
    options = {"dtype": dtype} if dtype != "auto" else {}
    return options | ({"trust_remote_code": True} if model.get("trust_remote_code") else {})


def chat_end(record: StudyRecord) -> str:
    """The token that ends an answer, where the adapter was trained through the tokenizer's chat template; else empty."""
    return str(record.prompt["end"]) if record.prompt.get("kind") == "chat" else ""


def is_hub_id(name: str) -> bool:
    """Whether `name` is a model on the Hub rather than a folder here."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name)) and not Path(name).exists()


def _again(selection: "SelectionRecord | None") -> str:
    """That another seed than the study's made the adapter."""
    shipped = selection.shipped if selection is not None else None
    return f", trained again with seed {shipped.seed} ({_code(shipped.run)})" if shipped is not None and shipped.run != MAIN else ""


def _why(selection: "SelectionRecord") -> str:
    return "\n".join(f"- {_text(line)}" for line in selection.explain().splitlines())


def _best(
    record: StudyRecord, found: tables.Answer, best: Trial, adapter: Path | None, selection: "SelectionRecord | None"
) -> dict[str, Any]:
    hyperparameters = {f.name: getattr(best.hyperparameters, f.name) for f in fields(best.hyperparameters)}
    return {
        "study": record.name,
        "trial": best.number,
        "validation_loss": selection.shipped.validation_loss if selection else best.value,
        "default_validation_loss": found.default_loss,
        "base_validation_loss": found.base,
        "chosen": _chosen(selection) if selection else "the lowest validation loss",
        "hyperparameters": {name: list(value) if isinstance(value, tuple) else value for name, value in hyperparameters.items()},
        "base_model": spec_summary.base_model(record),
        "base_model_revision": record.spec.get("model", {}).get("revision"),
        "prompt": record.prompt.get("kind"),
        "prompt_date": record.prompt.get("date") or None,
        "adapter": adapter.name if adapter else None,
        "load": f"peft.{load_line(record, 'adapter')}" if adapter else None,
        "command": spec_summary.command(record),
        "loratune": version_of_loratune(),
    }


def _chosen(selection: "SelectionRecord") -> dict[str, Any]:
    honest = selection.honest
    return {
        "rule": selection.rule,
        "seed": selection.shipped.seed,
        "run": selection.shipped.run,
        "how_sure": selection.sureness,
        "loss_with_fresh_seeds": honest.chosen.value if honest else None,
        "gain_over_default_with_fresh_seeds": honest.gain.value if honest and honest.gain else None,
    }


def _replace_folder(source: Path, target: Path, texts: dict[str, str]) -> None:
    """Copy the files of `source`, with `texts` beside them, into a new folder and rename it to `target`."""
    try:
        with new_folder(target) as fresh:
            for path in source.iterdir():
                if path.name not in texts and path.is_file():
                    shutil.copyfile(path, fresh / path.name)
            for name, text in texts.items():
                (fresh / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"cannot write {target}: {error.strerror or error}. Free the disk or open the folder, then try again."
        ) from error


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _fenced(text: str) -> str:
    """A block of code, in a fence that is longer than any inside it."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=2))
    return f"{fence}\n{text}\n{fence}"


def _text(text: str) -> str:
    """Markdown's and HTML's signs made harmless."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", _one_line(text))


def _code(text: str) -> str:
    return "`" + _one_line(text).replace("`", "'") + "`"
