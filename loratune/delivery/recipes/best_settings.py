"""The settings a study found, and the parts of a recipe that are the same for several tools."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from loratune.delivery.recipes.shown_rows import place, row_format
from loratune.record import StudyRecord, Trial
from loratune.record.adapters import find_adapter
from loratune.record.paths import ADAPTER_CONFIG
from loratune.report.tables import headline
from loratune.system.formatting import plural
from loratune.work import Hyperparameters

if TYPE_CHECKING:
    from loratune.selection import SelectionRecord

_LLAMA = {
    "qv": ["q_proj", "v_proj"],
    "qkvo": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}
SCHEDULERS = {"constant": "constant_with_warmup"}  # ours warms up


@dataclass(frozen=True, kw_only=True)
class BestSettings:
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


def transformers_arguments(best: BestSettings) -> dict[str, Any]:
    """Fields of Transformers' TrainingArguments, as of 5: a warmup below 1 is a share of the steps."""
    training = best.section("training")
    kind = training.get("lr_scheduler_type", "cosine")
    return {
        "per_device_train_batch_size": best.micro,
        "gradient_accumulation_steps": best.h.batch_size // best.micro,
        "num_train_epochs": best.h.epochs,
        "learning_rate": best.h.learning_rate,
        "lr_scheduler_type": SCHEDULERS.get(kind, kind),
        "warmup_steps": best.h.warmup_ratio,
        "weight_decay": best.h.weight_decay,
        "max_grad_norm": training.get("max_grad_norm", 1.0) or 0.0,
        "optim": "adamw_torch",
        "seed": best.record.spec.get("seed", 0),
        "output_dir": f"./{best.record.name}",
    }


def whole_alpha(best: BestSettings) -> int:
    if best.alpha != int(best.alpha):
        best.notes.append(f"lora_alpha {best.alpha:g} is written as {round(best.alpha)}: the tool wants a whole number")
    return max(1, round(best.alpha))


def target_names(record: StudyRecord, trial: Trial, notes: list[str]) -> str | list[str]:
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


def _loss(best: BestSettings) -> str:
    """The validation loss that no choice flatters, where a selection measured it."""
    unbiased = best.selection.unbiased if best.selection is not None else None
    if best.selection is None or unbiased is None:
        return "" if best.trial.value is None else f", validation loss {best.trial.value:.4f} in the study"
    gain = f"; gain {unbiased.gain:.4f} over {headline(best.record).against}" if unbiased.gain else ""
    return f", validation loss {unbiased.chosen:.4f} with {plural(best.selection.fresh_seeds, 'fresh seed')}{gain}"


def recipe_text(best: BestSettings, content: Mapping[str, Any], command: str) -> str:
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
