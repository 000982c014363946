"""The model card of an adapter, or of the model merged with it: README.md, with the YAML head that the Hugging Face Hub reads."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from loratune.downstream.results.scores import BASE, Result, describe_model, model_name
from loratune.record import StudyRecord, Trial
from loratune.record.paths import MAIN
from loratune.report import spec_summary, tables
from loratune.system.formatting import count, duration, loss, percent, perplexity, plural, show, signed
from loratune.system.machine import version_of_loratune

if TYPE_CHECKING:
    from loratune.report.evidence import Downstream
    from loratune.selection import SelectionRecord
    from loratune.statistics import Interval

HERE = "path/to/this/folder"


def model_card(record: StudyRecord, trial: Trial, selection: "SelectionRecord | None" = None, *, merged: bool = False) -> str:
    """The card of the trial's adapter; selection: the one that chose it, and which of its runs."""
    found, told = tables.headline(record), dict(spec_summary.spec_rows(record, trial))
    base, revision = spec_summary.base_model(record), record.spec.get("model", {}).get("revision")
    at = f", revision {_code(revision)}" if revision else ""
    shipped = selection.shipped if selection is not None else None
    best = found.best is not None and trial.number == found.best.number
    rank = "chosen from" if selection else "the best of" if best else "one of"
    again = f", trained again with seed {shipped.seed} ({_code(shipped.run)})" if shipped is not None and shipped.run != MAIN else ""
    losses = (
        ("this adapter", shipped.validation_loss if shipped else trial.value),
        ("default hyperparameters" if found.reference == tables.DEFAULT else found.against, found.default_loss),
        ("base model", found.base),
    )
    fresh = _fresh_seeds(found, selection)
    by = f"the validation loss {'of its one run' if fresh else 'shown here'}, which is therefore slightly flattering. "
    if own := record.own_objective:
        by = f"{_code(own)}, {show(trial.scores.get(own))} on the answers that guided the search, which is therefore flattering. "
    flattering = f"The adapter was chosen by {by}" * (rank != "one of")
    once = "Those with fresh seeds took no part in the choice." if fresh else "The loss of each adapter was measured once."
    data = ("Training data", "Validation data", "Examples", "Prompt", "Length", "Training")
    lines = [
        _head(base, merged),
        f"# {_text(record.name)}",
        f"{_code(base)}{at} merged with a LoRA adapter" if merged else f"A LoRA adapter for {_code(base)}{at}",
        "## Load it",
        f"```python\n{loading(base, revision, load_options(record), chat_end(record), merged=merged, template=own_template(record))}\n```",
        "## Validation loss",
        "Mean negative log-likelihood (nats) per response token over the whole validation set.",
        *fresh,
        _table(
            ("", "loss", "perplexity", f"loss − {found.reference}"),
            [
                (name, loss(its), perplexity(its), signed(its - found.default_loss) if its is not None and found.default_loss else "–")
                for name, its in losses
            ],
        ),
        "## Hyperparameters",
        _table(("", "value"), [(f"`{f.name}`", show(getattr(trial.hyperparameters, f.name))) for f in fields(trial.hyperparameters)]),
        "## Data",
        _table(("", ""), [(name, _text(told[name])) for name in data if told.get(name)]),
        "## How it was found",
        f"Sampler {_code(told['Sampler'])}, schedule {_code(told['Schedule'])}, "
        f"{count(record.tokens)} training tokens, {duration(record.device_seconds)} of device time. This is trial {trial.number}{again}.",
        _fenced(spec_summary.command(record)),
        *_scores(record, trial, selection),
        *(["## Why this one", "\n".join(f"- {_text(line)}" for line in selection.explain().splitlines())] if selection else []),
        "## Limits",
        f"- {flattering}{once}\n"
        "- A lower loss on this data is not a better score on any benchmark, and says nothing about safety, bias or facts.\n"
        "- The base model's and the data's licences hold for the adapter too.",
        f"Written by loratune {version_of_loratune()}.",
    ]
    lines[2] += f", found by loratune, {rank} {tables.trials_told(record)}."
    return "\n\n".join(lines) + "\n"


def _fresh_seeds(found: tables.Headline, selection: "SelectionRecord | None") -> list[str]:
    """Blocks of Markdown on the gain that no choice flatters; none where a selection did not measure it."""
    unbiased = selection.unbiased if selection is not None else None
    if selection is None or unbiased is None:
        return []
    gain = f"**gain over {found.against}**"
    rows = [
        (gain, f"**{signed(unbiased.gain.value)}**", _interval(unbiased.gain, signed)) if unbiased.gain else None,
        (f"these hyperparameters, trial {selection.chosen}", loss(unbiased.chosen.value), _interval(unbiased.chosen, loss)),
        (found.against, loss(unbiased.default.value), _interval(unbiased.default, loss)) if unbiased.default and unbiased.gain else None,
    ]
    seeds = plural(selection.fresh_seeds, "seed")
    return [
        f"With {seeds} that took no part in the choice{', the same for both' if unbiased.gain else ''}:",
        _table(("", "mean", "95 % interval"), [row for row in rows if row]),
        "One run each; the adapter was chosen among several, so its difference here is flattering:",
    ]


def _interval(its: "Interval", spelt: Callable[[float], str]) -> str:
    return f"{spelt(its.low)} to {spelt(its.high)}" if its.known else "–"


def _head(base: str, merged: bool) -> str:
    on_hub = is_hub_id(base)
    relation = f"base_model:{'merge' if merged else 'adapter'}:{base}"
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=[*([relation] if on_hub else []), "lora", *([] if merged else ["transformers"]), "loratune"],
    )
    # The Hub refuses a card whose base_model is no Hub id, so a local folder is left to the user.
    local = f"# The base model was the local folder {_one_line(base)}; add `base_model: <its Hub id>` before you publish.\n"
    return f"---\n{'' if on_hub else local}{data.to_yaml()}\n---"


def is_hub_id(name: str) -> bool:
    """Whether `name` is a model on the Hub rather than a folder here."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name)) and not Path(name).exists()


# --- how to load it


def loading(base: str, revision: str | None, options: Mapping[str, Any], end: str, *, merged: bool = False, template: str = "") -> str:
    """Python that loads the folder `HERE` as `model`, and asks it a question through the base's chat template where `end` is not empty.

    options: of the base model, beside its revision. template: the user's own, in place of the tokenizer's. end: the token that ends an
    answer. It is named because a base model's generation
    config often lacks the token that its template ends turns with, and `generate` would write on behind it; a merged model's does not.
    """
    if merged:
        return f'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{HERE}")'
    lines = ["from peft import AutoPeftModelForCausalLM", *(["from transformers import AutoTokenizer"] if end else []), ""]
    lines.append(f"model = {load_call(HERE, options)}")
    if end:
        at = f", revision={json.dumps(revision)}" if revision else ""
        lines += [
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(base)}{at})",
            *([f"tokenizer.chat_template = {template!r}"] if template else []),
            'messages = [{"role": "user", "content": "Name the opposite of sour."}]',
            'given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
            f"end = tokenizer.convert_tokens_to_ids({json.dumps(end)})  # ends an answer; stop there",
            'answer = model.generate(given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=256, eos_token_id=end)',
            'print(tokenizer.decode(answer[0, given["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    return "\n".join(lines)


def load_call(folder: str, options: Mapping[str, Any]) -> str:
    """The call that loads the adapter on its base model; PEFT knows the model and its revision from the adapter's config."""
    given = "".join(f", {name}={json.dumps(value) if isinstance(value, str) else value}" for name, value in options.items())
    return f'AutoPeftModelForCausalLM.from_pretrained("{folder}"{given})'


def load_options(record: StudyRecord) -> dict[str, Any]:
    """Keyword arguments, beside name and revision, by which the base model is held as the study held it."""
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


def own_template(record: StudyRecord) -> str:
    """The chat template that the adapter was trained through, where the description had one of its own; else empty."""
    template = str(record.prompt.get("template") or "")
    if not template:
        return ""
    from loratune.data.prompts import as_chat_template
    from loratune.data.tokenizers import load_tokenizer

    model = record.spec.get("model", {})
    return as_chat_template(template, load_tokenizer(str(model.get("name_or_path")), model.get("revision")))


# --- downstream scores


def _scores(record: StudyRecord, trial: Trial, selection: "SelectionRecord | None") -> list[str]:
    """Blocks of Markdown on the benchmarks that were answered to their end; none where nothing was."""
    if not record.paths.evaluation.is_dir():
        return []
    from loratune.report.evidence import downstream_of  # scipy: a second of import

    found = downstream_of(record, selection)
    if found is None:
        return []
    this = model_name(trial.number, selection.shipped.run if selection is not None else MAIN)
    own_run = model_name(trial.number)
    rows = {this: "**this adapter**"}
    if this != own_run:
        rows[own_run] = f"{describe_model(own_run)} as the study trained it, another seed"
    if found.default is not None and found.default not in rows:
        called = tables.reference(record)
        rows[found.default] = f"{f'{called} hyperparameters' if called == tables.DEFAULT else called}, {describe_model(found.default)}"
    rows[BASE] = "base model"
    names = {f.benchmark: f.title for f in found.findings if any(_done(found, model, f.benchmark) for model in rows)}
    if not names:
        return []
    table = [
        (said, *(_score(_done(found, model, name)) for name in names))
        for model, said in rows.items()
        if model in found.cells or model == this
    ]
    lacks = [] if this in found.cells else ["This adapter has not been scored itself; `loratune evaluate` does."]
    protocols = dict.fromkeys(str(r.facts["protocol"]) for r in found.results if r.benchmark in names and r.facts.get("protocol"))
    return [
        "## Downstream scores",
        "In %, with 95 % intervals over items. Each row is of the adapter that it names, of no other seed.",
        _table(("", *names.values()), table),
        *lacks,
        *([" ".join(protocols)] if protocols else []),
    ]


def _done(found: "Downstream", model: str, benchmark: str) -> Result | None:
    cell = found.cells.get(model, {}).get(benchmark)
    return cell if cell is not None and cell.done else None


def _score(cell: Result | None) -> str:
    if cell is None:
        return "–"
    score = cell.score
    return percent(score.value) + (f" ({percent(score.low)} to {percent(score.high)})" if score.known else "")


# --- Markdown


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
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
